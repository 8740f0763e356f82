//! The end, in every case: the guest is put where the result has it.

use std::time::Duration;

use memferry_stages::wire::Message;
use memferry_stages::wire::messages::RunState;

use super::{Action, Part, SourceCourse, State};
use crate::events::Event;
use crate::migration::error::MigrationError;
use crate::settings::After;

/// The result, and the reason if it is not success.
#[derive(Debug)]
pub(in crate::migration) enum End {
    /// The guest runs at the destination, or the file is complete.
    Completed,
    /// The guest is here as it was.
    Failed(MigrationError),
    /// The guest is here as it was.
    Cancelled(MigrationError),
    /// The guest is paused here, and may run at the destination.
    Unconfirmed(MigrationError),
    /// The guest ran at the destination, and does not get the pages that are here.
    Lost(MigrationError),
}

impl End {
    /// The last message to the destination: why Go will not be sent, if it will not. After Go it may wait for
    /// this end, to answer it: it is notified that it need not.
    pub(super) fn farewell(&self, is_awaited: bool) -> Option<Message> {
        match self {
            Self::Completed | Self::Unconfirmed(_) => is_awaited.then_some(Message::Settled),
            Self::Failed(why) | Self::Lost(why) => Some(Message::Abort(why.to_string().into())),
            Self::Cancelled(why) => Some(Message::Abort(why_cancelled(why).into())),
        }
    }
}

/// Why a migration was cancelled, as text.
pub(in crate::migration) fn why_cancelled(why: &MigrationError) -> String {
    match why {
        MigrationError::Cancelled => "cancelled at the source".into(),
        gave_up => gave_up.to_string(),
    }
}

/// How the course ended.
#[derive(Debug)]
pub(in crate::migration) struct Conclusion {
    pub(in crate::migration) end: End,
    /// Why the guest could not be resumed here, if it should have been.
    pub(in crate::migration) resume_error: Option<MigrationError>,
    /// Does the guest stay paused here on purpose?
    pub(in crate::migration) stays_paused: bool,
}

impl SourceCourse {
    /// The migration ends before the handover.
    pub(super) fn fail(&mut self, error: MigrationError, now: Duration) -> Vec<Action> {
        let end = match error {
            MigrationError::Cancelled | MigrationError::GaveUp(_) => End::Cancelled(error),
            error => End::Failed(error),
        };
        self.end(end, now)
    }

    /// Puts the guest where the result has it.
    pub(super) fn end(&mut self, end: End, now: Duration) -> Vec<Action> {
        let stays_paused = match end {
            End::Completed => self.settings.after != Some(After::Resume),
            End::Unconfirmed(_) | End::Lost(_) => true,
            End::Failed(_) | End::Cancelled(_) => false,
        };
        let completed = matches!(end, End::Completed);
        if !self.is_serving() {
            self.spent.on(Part::Resume, now);
            self.downtime = self.spent.total().filter(|_| completed);
        }
        let mut actions = vec![Action::CloseHints];
        if self.done.throttled {
            actions.push(Action::LiftThrottle);
        }
        if completed && stays_paused {
            actions.push(Action::Moved);
        }
        if stays_paused || !self.done.paused {
            self.over(end, None, stays_paused);
            return actions;
        }
        self.state = State::Resuming(end);
        let run = self.facts.was == RunState::Running;
        actions.push(Action::Resume { reacquire: self.done.released, run });
        actions
    }

    /// The guest runs here again, or is paused here as its operator left it, or cannot be resumed.
    pub(super) fn resumed(&mut self, result: Result<(), MigrationError>, now: Duration) -> Vec<Action> {
        let State::Resuming(end) = std::mem::replace(&mut self.state, State::Connecting) else {
            unreachable!("only a guest that is resumed is reported as resumed");
        };
        let run = self.facts.was == RunState::Running && result.is_ok();
        self.over(end, result.err(), false);
        if !run {
            return Vec::new();
        }
        self.spent.on(Part::Resume, now);
        self.downtime = self.spent.total();
        vec![Action::notify(Event::Resumed)]
    }

    pub(super) fn over(&mut self, end: End, resume_error: Option<MigrationError>, stays_paused: bool) {
        let end = self.with_page(end);
        self.state = State::Over(Box::new(Conclusion { end, resume_error, stays_paused }));
    }

    /// The failure with the page that differs, if one was named.
    fn with_page(&mut self, end: End) -> End {
        match (end, self.differing_page.take()) {
            (End::Failed(MigrationError::Handover(source)), Some(page)) => {
                self.verified = Some(false);
                End::Failed(MigrationError::PageDiffers { source, page })
            }
            (end, _) => end,
        }
    }
}
