//! The last handshake and the start.

use std::time::Duration;

use memferry_stages::wire::Message;
use memferry_stages::wire::messages::RunState;

use super::{Action, DestinationCourse, Input, Started, State, closed};
use crate::events::Event;
use crate::migration::course::handshake::{DestinationStep, Happening, NotStarted, awaiting_go};
use crate::migration::error::MigrationError;

impl DestinationCourse {
    /// From here on this end waits for Go or the end.
    pub(super) fn report_loaded(&mut self, now: Duration) -> Vec<Action> {
        self.state = State::AwaitingGo { give_up: now + self.handover_timeout };
        vec![self.times(), Action::Send(Message::Loaded { verified: self.verified == Some(true) })]
    }

    pub(super) fn awaiting_go(&mut self, input: Input, now: Duration) -> Vec<Action> {
        let happening = match input {
            Input::Failed(error) if self.is_recoverable(&error) => {
                return self.fail_or_wait(error, now);
            }
            Input::StreamEnded if self.recovers() => {
                return self.fail_or_wait(MigrationError::Lost(closed()), now);
            }
            Input::Received(message) => Happening::Received(message),
            Input::StreamEnded => Happening::Lost(closed()),
            Input::Cancel => Happening::Cancel,
            Input::Failed(error) => error.into(),
            _ => return Vec::new(),
        };
        self.happened(happening, now)
    }

    /// One step of the last handshake: see [`handshake`](super::handshake).
    pub(super) fn happened(&mut self, happening: Happening, now: Duration) -> Vec<Action> {
        match awaiting_go(happening) {
            DestinationStep::Wait => Vec::new(),
            DestinationStep::Start(run_state) => self.start(run_state, true, now),
            DestinationStep::End(NotStarted::Cancelled) => self.over(Err(MigrationError::Cancelled)),
            DestinationStep::End(why) => self.over(Err(why.into())),
        }
    }

    pub(super) fn start(&mut self, run_state: RunState, return_path: bool, now: Duration) -> Vec<Action> {
        self.start_begun = true;
        self.state = State::Starting { began: now, return_path };
        vec![Action::notify(Event::HandedOver), Action::Start(run_state)]
    }

    pub(super) fn started(
        &mut self,
        result: Result<(), MigrationError>,
        return_path: bool,
        began: Duration,
        now: Duration,
    ) -> Vec<Action> {
        if !return_path {
            return self.over(result);
        }
        self.parts.start = now.saturating_sub(began);
        let answer = answer(&result);
        let mut actions = vec![self.times(), Action::Send(answer)];
        if self.recovers() {
            let runs = result.is_ok();
            self.started = Some(Started { result, until: now + self.recovery.give_up });
            self.state = State::Settling;
            if runs {
                actions.extend(self.fill());
            }
        } else {
            self.over(result);
        }
        actions
    }
}

/// Whether the guest was started, for the source.
pub(super) fn answer(started: &Result<(), MigrationError>) -> Message {
    match started {
        Ok(()) => Message::Running,
        Err(error) => Message::StartFailed(error.to_string().into()),
    }
}
