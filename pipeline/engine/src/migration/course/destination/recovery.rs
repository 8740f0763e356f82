//! Lost connections, and what a source that returns is sent.

use std::time::Duration;

use memferry_stages::wire::Message;

use super::{Action, DestinationCourse, Input, Postcopy, State};
use crate::events::{DowntimeParts, Event, Phase};
use crate::migration::error::{MigrationError, NotRecovered};

impl DestinationCourse {
    /// Is a lost connection made again?
    pub(in crate::migration) fn recovers(&self) -> bool {
        self.recovery.attempts > 0 && self.agreed.is_some_and(|agreed| agreed.recovers)
    }

    /// Is this a lost connection that is made again?
    pub(super) fn is_recoverable(&self, error: &MigrationError) -> bool {
        self.recovers() && error.is_lost_connection()
    }

    /// The migration fails, unless the error is a lost connection that can be made again.
    pub(super) fn fail_or_wait(&mut self, error: MigrationError, now: Duration) -> Vec<Action> {
        if !self.is_recoverable(&error) {
            return self.over(Err(error));
        }
        if self.started.is_some() && !self.is_filling() {
            self.state = State::Settling;
            return vec![Action::EndAttempt];
        }
        let attempts = self.recovery.attempts;
        if let State::Agreeing { lost: Some(since) } = self.state {
            self.state = State::Disconnected { since, cause: error };
            return vec![Action::EndAttempt];
        }
        if self.outages.lost == attempts {
            let not_recovered = NotRecovered::LostTooOften { attempts };
            return self.over(Err(MigrationError::NotRecovered { cause: Box::new(error), not_recovered }));
        }
        let mut actions = self.lost(error.to_string());
        self.state = State::Disconnected { since: now, cause: error };
        self.interrupt();
        actions.push(Action::EndAttempt);
        actions.extend(self.unprepare());
        actions
    }

    /// A switch to postcopy that a lost connection interrupts before the start did not happen.
    fn interrupt(&mut self) {
        if self.started.is_none() {
            self.postcopy = Postcopy::No;
        }
    }

    /// The connection is lost, and with it what was begun to hand the guest over.
    pub(super) fn lost(&mut self, why: String) -> Vec<Action> {
        self.outages.lost += 1;
        if self.started.is_none() {
            self.verified = None;
            self.parts = DowntimeParts::default();
        }
        let lost = Event::Disconnected { attempt: self.outages.lost, why };
        vec![Action::notify(lost), Action::notify(Event::Phase(Phase::Disconnected))]
    }

    /// The source is back, possibly before this end has noticed that it was gone.
    pub(super) fn returned(&mut self, now: Duration) -> Vec<Action> {
        let started = self.started.is_some();
        let mut actions = Vec::new();
        let since = match self.state {
            State::Disconnected { since, .. } => since,
            State::Agreeing { lost: Some(since) } => since,
            State::Settling => now,
            _ => {
                actions.extend(self.lost("the source returns on another one".into()));
                now
            }
        };
        self.interrupt();
        actions.push(Action::EndAttempt);
        if let Some(error) = self.refusal.take() {
            actions.extend(self.over(Err(error)));
            actions.push(Action::Rejoin { started });
            return actions;
        }
        self.state = State::Agreeing { lost: Some(since) };
        actions.push(self.unprepare().unwrap_or(Action::Rejoin { started }));
        actions
    }

    /// The guest runs on at its source: what only one side may hold is released here. A guest that was started is not asked.
    fn unprepare(&mut self) -> Option<Action> {
        let is_over = self.started.is_some() || !std::mem::take(&mut self.prepared);
        (!is_over).then_some(Action::Unprepare)
    }

    pub(super) fn not_returned(&mut self, now: Duration) -> Vec<Action> {
        let State::Disconnected { since, cause } = std::mem::replace(&mut self.state, State::Gathering) else {
            return Vec::new();
        };
        let waited = now.saturating_sub(since);
        self.outages.time += waited;
        if let Some(error) = self.refusal.take() {
            return self.over(Err(error));
        }
        let not_recovered = NotRecovered::NotReturned { waited };
        self.over(Err(MigrationError::NotRecovered { cause: Box::new(cause), not_recovered }))
    }

    /// The guest was started: only what the source knows of it has an effect.
    pub(super) fn settling(&mut self, input: Input) -> Vec<Action> {
        match input {
            Input::Received(Message::Settled | Message::Abort(_)) | Input::Cancel => self.settled(),
            Input::StreamEnded | Input::Failed(_) => return vec![Action::EndAttempt],
            _ => {}
        }
        Vec::new()
    }

    pub(super) fn settled(&mut self) {
        let result = self.started.take().map_or(Ok(()), |started| started.result);
        self.over(result);
    }
}
