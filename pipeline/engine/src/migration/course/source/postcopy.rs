//! The switch to postcopy: the guest runs at the destination before all of its pages are there.
//!
//! ```text
//!  Draining ─▶ Discarding ─▶ Pausing ─▶ Saving ─▶ Releasing ─▶ Syncing ─▶ SendingSaved ─▶ Digesting ─▶ Ending
//!   (nothing    (the destination discards      (the guest                 │
//!    in flight)  what is dirty; the guest       is paused)                └ from here on pages are served
//!                runs here)
//!  Ending ─▶ HandingOver ─▶ Committing ─▶ HandingOver ─▶ Serving ─▶ Over
//!                                                        (the guest runs there)
//! ```
//!
//! Each page of the bitmap at the last sync travels once, whoever takes its bit: the page server, for a thread that waits, or the
//! scanner. Pages outside of the bitmap are at the destination already, or are zero there.
//!
//! Until Go everything is as in precopy: a lost connection, a cancel or a failure resumes the guest here, and nothing is lost. From Running
//! on the destination's guest is the only one, and its memory is at both ends: losing either loses the guest. So from then on neither end
//! gives up by itself: it waits for the other until its operator cancels.

use std::time::Duration;

use memferry_stages::batch::RoundKind;
use memferry_stages::scanner::ScanOrder;
use memferry_stages::wire::Message;

use super::rounds::Round;
use super::spent::Part;
use super::{Action, End, Input, SourceCourse, State};
use crate::control::{Ask, ControlError};
use crate::events::{Event, Phase};
use crate::human;
use crate::migration::error::MigrationError;
use crate::settings::Mode;

/// How far a switch to postcopy is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Postcopy {
    /// Rounds, or a switchover as in precopy.
    #[default]
    No,
    /// Is the round in progress cut short? The switch follows.
    Cut,
    /// The destination discards pages, or the guest is handed over.
    Switching,
    /// The guest runs at the destination.
    Serving {
        /// Since when.
        since: Duration,
    },
}

impl SourceCourse {
    /// Is the guest handed over without the pages that are dirty?
    pub(in crate::migration) fn is_switching(&self) -> bool {
        matches!(self.postcopy, Postcopy::Switching | Postcopy::Serving { .. })
    }

    /// Does the guest run at the destination, with pages that are still here?
    pub(in crate::migration) fn is_serving(&self) -> bool {
        matches!(self.postcopy, Postcopy::Serving { .. })
    }

    /// Since when it runs there, and lost or got its pages.
    pub(in crate::migration) fn serving_since(&self) -> Option<Duration> {
        match self.postcopy {
            Postcopy::Serving { since } => Some(since),
            _ => None,
        }
    }

    /// What postcopy costs in safety, said before it can begin.
    pub(super) fn warn_of_postcopy(&self) -> Option<Action> {
        let what = "once the guest is started at the destination before all of its memory is there (postcopy), it exists at neither end \
                    alone: if either program or host is lost then, the guest is lost; a lost connection is made again";
        self.settings.mode.may_switch().then(|| Action::notify(Event::Warning(what.into())))
    }

    /// Where a migration begins with the switch.
    pub(super) fn begins_with_postcopy(&self) -> bool {
        self.settings.mode == Mode::Postcopy
    }

    /// It is time for postcopy: the round in progress ends at once.
    pub(super) fn cut_if_due(&mut self, now: Duration) -> Vec<Action> {
        let is_round = matches!(&self.state, State::Sending(round) if round.is_live());
        if !is_round || self.postcopy != Postcopy::No || !self.controller.is_postcopy_due(now) {
            return Vec::new();
        }
        self.postcopy = Postcopy::Cut;
        vec![Action::CutRound]
    }

    /// Before the first round: there is nothing in flight.
    pub(super) fn postcopy_at_once(&mut self, now: Duration) -> Vec<Action> {
        let decided = self.controller.postcopy_at_once();
        let mut actions = self.report(&decided);
        actions.extend(self.end_direct(now));
        actions
    }

    /// Nothing is in flight: the destination discards what is dirty, while the guest runs here. Hints end: a page that is hinted free from
    /// here on would be missing there.
    pub(super) fn end_direct(&mut self, now: Duration) -> Vec<Action> {
        self.postcopy = Postcopy::Switching;
        self.state = State::Discarding(now + self.settings.handover_timeout);
        vec![Action::CloseHints, Action::EndDirect]
    }

    /// The destination has not discarded in time. It may be alive: another connection would change nothing.
    pub(super) fn not_discarded(&mut self, now: Duration) -> Vec<Action> {
        let limit = human::time(self.settings.handover_timeout);
        let what = format!("the destination has not discarded what is dirty within {limit} (handover_timeout)");
        self.fail(MigrationError::TimedOut(what), now)
    }

    /// The destination has discarded what it was sent.
    pub(super) fn discarded(&mut self, now: Duration) -> Vec<Action> {
        if self.done.paused { self.save(now) } else { self.pause(now) }
    }

    /// The guest runs at the destination: what is left is sent in the background.
    pub(super) fn serve(&mut self, now: Duration) -> Vec<Action> {
        self.spent.on(Part::Resume, now);
        self.downtime = self.spent.total();
        self.postcopy = Postcopy::Serving { since: now };
        let mut actions = vec![Self::phase(Phase::Postcopy)];
        if std::mem::take(&mut self.done.throttled) {
            actions.push(Action::LiftThrottle);
        }
        actions.push(Action::SetBandwidth(self.bandwidth()));
        actions.extend(self.background(now));
        actions
    }

    /// Sends what is dirty.
    fn background(&mut self, now: Duration) -> Vec<Action> {
        if !self.settings.postcopy.background {
            self.state = State::Serving(None);
            return Vec::new();
        }
        self.round += 1;
        let order = ScanOrder::all(self.round, RoundKind::Final);
        self.state = State::Serving(Some(Round::new(order, self.settings.lanes, now)));
        vec![Action::Scan(order), Action::EndLanes]
    }

    /// The guest runs at the destination, and only what concerns its pages has an effect.
    pub(super) fn serving(&mut self, input: Input, now: Duration) -> Vec<Action> {
        match input {
            Input::Received(Message::Complete) => self.end(End::Completed, now),
            // After a reconnect the destination answers Go once more.
            Input::Received(Message::Running) => Vec::new(),
            Input::Received(message) => self.end(End::Lost(super::unwelcome(message)), now),
            // A mistake, such as an observer's panic, is no reason to lose a guest either.
            Input::Failed(error) if error.is_lost_connection() || error.is_mistake() => self.disconnect(error, now),
            Input::Failed(error) => self.end(End::Lost(error), now),
            Input::Cancel => vec![self.too_late()],
            Input::Asked { request, standing } => match request.ask {
                Ask::Set(_) | Ask::SetAddress(_) => self.asked(request, standing, now),
                Ask::SwitchOver | Ask::Postcopy => {
                    let why = "the guest runs at the destination".into();
                    vec![Action::Answer(request.answer, Err(ControlError::TooLate(why)))]
                }
            },
            Input::Scanned(scanned) => {
                let State::Serving(Some(round)) = &mut self.state else { return Vec::new() };
                round.is_scanned = true;
                let mut actions = vec![Action::notify(Event::RoundScanned { round: scanned.round })];
                actions.extend(self.background_sent(now));
                actions
            }
            Input::Sent(sent, _) => {
                let State::Serving(Some(round)) = &mut self.state else { return Vec::new() };
                round.note(sent);
                self.background_sent(now)
            }
            Input::Tick { bulk_bytes, .. } => match self.stalled(bulk_bytes, now) {
                Some(why) => self.disconnect(MigrationError::Lost(why), now),
                None => Vec::new(),
            },
            _ => Vec::new(),
        }
    }

    /// Reports the background's round once it is complete. Then the destination has what it needs, or receives it.
    fn background_sent(&mut self, now: Duration) -> Vec<Action> {
        let State::Serving(background @ Some(_)) = &mut self.state else { return Vec::new() };
        let Some((tally, duration)) = background.as_ref().and_then(|round| round.complete(now)) else {
            return Vec::new();
        };
        *background = None;
        vec![Action::notify(Event::RoundSent { tally, duration })]
    }

    /// The destination is reached again: what it does not have is sent again, what waits there first.
    pub(super) fn serve_again(&mut self, now: Duration) -> Vec<Action> {
        let mut actions = vec![Self::phase(Phase::Postcopy), Action::StartStages(self.bandwidth()), Action::Serve];
        actions.extend(self.background(now));
        actions
    }
}
