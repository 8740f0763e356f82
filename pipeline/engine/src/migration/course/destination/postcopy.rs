//! The switch to postcopy: the guest runs here before all of its pages are there.
//!
//! ```text
//!  Loading ─▶ Discarding ─▶ Loading ─▶ Registering ─▶ Comparing ─▶ Writing ─▶ Preparing ─▶ AwaitingGo ─▶ Starting ─▶ Filling
//!   (DirectEnds  (the guest    (device   (what the last sync found                                                     │
//!    of each lane, runs at its  state)    is discarded too, and pages                                   every page is there:
//!    Discard)      source)                can be asked for from here on)                                     Settling
//! ```
//!
//! Until Go a lost connection gives the missing pages up: the guest continues at its source, and its pages are loaded as before. From the
//! start on, pages that are missing are missing until the source returns, and threads that touch them wait.

use std::time::Duration;

use memferry_stages::wire::Message;

use super::{Action, DestinationCourse, Input, State, closed};
use crate::events::{Event, Phase, Role};
use crate::migration::error::MigrationError;

/// How far a switch to postcopy is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Postcopy {
    /// As in precopy.
    #[default]
    No,
    /// What the source named is discarded, or is about to be.
    Switching,
    /// Every page is there.
    Filled,
}

impl DestinationCourse {
    /// Does the guest run here, with pages that are still at its source?
    pub(in crate::migration) fn is_filling(&self) -> bool {
        self.postcopy == Postcopy::Switching && self.runs()
    }

    /// Did the guest not get its pages?
    #[cfg(test)]
    pub(in crate::migration) fn is_lost(&self) -> bool {
        matches!(self.state, State::Over(Err(MigrationError::PagesLost(_))))
    }

    fn runs(&self) -> bool {
        self.started.as_ref().is_some_and(|started| started.result.is_ok())
    }

    /// The lanes write directly no more, and what is to be discarded is named.
    pub(super) fn discard_if_named(&mut self) -> Vec<Action> {
        let State::Loading(arrival) = &mut self.state else { return Vec::new() };
        if arrival.direct_left > 0 || !arrival.discards {
            return Vec::new();
        }
        self.postcopy = Postcopy::Switching;
        self.state = State::Discarding(*arrival);
        vec![Action::Discard]
    }

    /// The guest was started, or could not be: the source is asked for what is missing, or for nothing more.
    pub(super) fn fill(&mut self) -> Vec<Action> {
        match self.postcopy {
            Postcopy::Switching if self.runs() => {
                self.state = State::Filling;
                vec![Action::notify(Event::Phase(Phase::Postcopy))]
            }
            Postcopy::Filled => {
                self.state = State::Settling;
                vec![Action::Send(Message::Complete)]
            }
            Postcopy::No | Postcopy::Switching => {
                self.state = State::Settling;
                Vec::new()
            }
        }
    }

    /// Every page is there.
    pub(super) fn filled(&mut self, now: Duration) -> Vec<Action> {
        self.postcopy = Postcopy::Filled;
        if let Some(started) = &mut self.started {
            started.until = now + self.recovery.give_up;
        }
        if matches!(self.state, State::Filling) { self.fill() } else { Vec::new() }
    }

    /// The guest runs here. The source, which is not to give up, decides nothing any more.
    pub(super) fn filling(&mut self, input: Input, now: Duration) -> Vec<Action> {
        match input {
            Input::Received(Message::Abort(why)) => self.lose(MigrationError::GivenUp { peer: Role::Source, why }),
            // A mistake, such as an observer's panic, is no reason to lose a guest either.
            Input::Failed(error) if error.is_lost_connection() || error.is_mistake() => self.wait_for_pages(error, now),
            Input::StreamEnded => self.wait_for_pages(MigrationError::Lost(closed()), now),
            Input::Failed(error) => self.lose(error),
            Input::Cancel => {
                let what =
                    "cancel comes too late: the guest runs here, and needs the pages that are still at its source";
                vec![Action::notify(Event::Warning(what.into()))]
            }
            _ => Vec::new(),
        }
    }

    /// Threads that touch missing pages wait for the source to return, for as long as the operator lets them.
    fn wait_for_pages(&mut self, cause: MigrationError, now: Duration) -> Vec<Action> {
        let mut actions = self.lost(cause.to_string());
        self.state = State::Disconnected { since: now, cause };
        actions.push(Action::EndAttempt);
        actions
    }

    /// While there is no connection, or what is missing is being reported: what fails is tried again when the source returns.
    pub(super) fn waiting_for_pages(&mut self, input: Input, now: Duration) -> Vec<Action> {
        match input {
            Input::Cancel => self.lose(MigrationError::Cancelled),
            Input::Failed(cause) => {
                let since = match self.state {
                    State::Disconnected { since, .. } => since,
                    State::Agreeing { lost } => lost.unwrap_or(now),
                    _ => now,
                };
                self.state = State::Disconnected { since, cause };
                vec![Action::EndAttempt]
            }
            _ => Vec::new(),
        }
    }

    /// The guest was started here and does not get its pages.
    pub(super) fn lose(&mut self, error: MigrationError) -> Vec<Action> {
        self.over(Err(MigrationError::PagesLost(Box::new(error))))
    }
}
