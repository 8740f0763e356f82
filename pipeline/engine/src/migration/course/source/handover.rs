//! The handover: the last handshake with a destination, or the end of a file.

use std::time::Duration;

use super::{Action, End, Input, Part, SourceCourse, State};
use crate::control::ControlError;
use crate::events::Event;
use crate::migration::course::handshake::{Happening, SourceHandshake, SourceStep, Verdict};
use crate::migration::error::MigrationError;
use crate::settings::After;

impl SourceCourse {
    /// The guest is being handed over: only what the handshake waits for has an effect.
    pub(super) fn handing_over(&mut self, input: Input, now: Duration) -> Vec<Action> {
        match (input, &self.state) {
            (Input::Asked { request, .. }, _) => {
                let why = "the guest is being handed over to the destination".into();
                vec![Action::Answer(request.answer, Err(ControlError::TooLate(why)))]
            }
            (Input::PageNamed(page), _) => {
                self.differing_page = Some(page);
                Vec::new()
            }
            (Input::Committed, State::Committing) => self.go(now),
            (Input::Failed(error), State::Committing) => self.fail(error, now),
            (Input::Committed, State::Completing) => vec![Action::Finish],
            (Input::FileComplete, State::Completing) => self.end(End::Completed, now),
            (Input::Failed(error), State::Completing) => self.fail(error, now),
            (Input::Cancel, State::Completing) => {
                vec![warning("cancel comes too late: the file is being completed")]
            }
            (Input::Received(message), State::HandingOver { .. }) => self.happened(Happening::Received(message), now),
            (Input::Cancel, State::HandingOver { .. }) => self.happened(Happening::Cancel, now),
            (Input::Failed(error), State::HandingOver { .. }) if self.is_recoverable(&error) => {
                self.fail_or_recover(error, now)
            }
            (Input::Failed(error), State::HandingOver { .. }) => self.happened(error.into(), now),
            _ => Vec::new(),
        }
    }

    pub(super) fn handover_timed_out(&mut self, now: Duration) -> Vec<Action> {
        self.happened(Happening::TimedOut, now)
    }

    /// One step of the last handshake: see [`handshake`](crate::migration::course::handshake).
    fn happened(&mut self, happening: Happening, now: Duration) -> Vec<Action> {
        let State::HandingOver { handshake, .. } = &mut self.state else { return Vec::new() };
        match handshake.step(happening) {
            SourceStep::Wait => Vec::new(),
            SourceStep::NamePage(message) => vec![Action::NamePage(message)],
            SourceStep::HandOver => {
                self.spent.on(Part::Handover, now);
                self.spent.reported(Part::Verify, self.times.verify, Part::Load);
                self.spent.reported(Part::Durable, self.times.durable, Part::Load);
                self.spent.reported(Part::Prepare, self.times.prepare, Part::Load);
                self.verified = self.settings.verify.is_on().then_some(true);
                self.state = State::Committing;
                vec![Action::Commit]
            }
            SourceStep::TooLate => vec![self.too_late()],
            SourceStep::End(verdict) => {
                let runs_there = self.is_switching() && verdict == Verdict::Completed;
                let actions = if runs_there { self.serve(now) } else { self.end(verdict.into(), now) };
                self.spent.reported(Part::Start, self.times.start, Part::Handover);
                actions
            }
        }
    }

    /// Nothing here resumes the guest on its own any more. No part of Go leaves before this.
    fn go(&mut self, now: Duration) -> Vec<Action> {
        let give_up = self.gives_up_running(now);
        self.state = State::HandingOver { handshake: SourceHandshake::AwaitingRunning, give_up };
        vec![Action::notify(Event::HandedOver), Action::Go(self.facts.was)]
    }

    /// When Running is waited for no longer. In postcopy the destination needs this end, however long the start takes; its silence is noticed.
    pub(super) fn gives_up_running(&self, now: Duration) -> Duration {
        if self.is_switching() { Duration::MAX } else { now + self.settings.handover_timeout }
    }

    /// The operator cancels after Go.
    pub(super) fn too_late(&mut self) -> Action {
        self.attempts.cancelled_late = true;
        warning("cancel comes too late: the destination may run the guest already")
    }

    /// A file has no return path: syncing its end mark to disk and renaming the file take the place of Go.
    pub(super) fn complete_file(&mut self, now: Duration) -> Vec<Action> {
        self.spent.on(Part::Durable, now);
        self.state = State::Completing;
        if self.settings.after == Some(After::Pause) { vec![Action::Commit] } else { vec![Action::Finish] }
    }
}

fn warning(what: &str) -> Action {
    Action::notify(Event::Warning(what.into()))
}

impl From<Verdict> for End {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Completed => Self::Completed,
            Verdict::Cancelled => Self::Cancelled(MigrationError::Cancelled),
            Verdict::Failed(why) => Self::Failed(why.into()),
            Verdict::Unconfirmed(why) => Self::Unconfirmed(why.into()),
        }
    }
}
