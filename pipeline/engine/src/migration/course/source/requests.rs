//! Requests of the operator to a running source: change settings, or switch over at once.

use std::sync::Arc;
use std::time::Duration;

use memferry_transports::Transport;

use super::{Action, Answer, SourceCourse, State};
use crate::change::Change;
use crate::control::{Ask, ControlError, Request, differences, with_all};
use crate::controller::forecast::Standing;
use crate::human;

impl SourceCourse {
    /// Handles a request, or answers why it is refused. What depends on the host was checked before.
    pub(super) fn asked(&mut self, request: Request, standing: Standing, now: Duration) -> Vec<Action> {
        let Request { ask, answer } = request;
        let decided = match ask {
            Ask::Set(changes) => match self.changes(&changes, now) {
                Ok(differences) => return self.change(differences, answer),
                Err(why) => Err(why),
            },
            Ask::SetAddress(transport) => return self.set_transport(transport, answer, now),
            Ask::Postcopy => return self.postcopy(answer, now),
            Ask::SwitchOver => self.switch_over(&Standing { elapsed: now, ..standing }),
        };
        match decided {
            Ok(mut actions) => {
                actions.push(Action::Answer(answer, Ok(())));
                actions.extend(self.pause_at_once(now));
                actions
            }
            Err(why) => vec![Action::Answer(answer, Err(why))],
        }
    }

    /// The destination is elsewhere from here on. While there is no connection it is tried there at once.
    fn set_transport(&mut self, transport: Arc<dyn Transport>, answer: Answer, now: Duration) -> Vec<Action> {
        if !self.recovers() {
            let why =
                "a lost connection of this migration is not made again, so the destination is not looked for elsewhere";
            return vec![Action::Answer(answer, Err(ControlError::Refused(why.into())))];
        }
        let mut actions = vec![Action::SetTransport(transport), Action::Answer(answer, Ok(()))];
        if self.is_disconnected() {
            actions.extend(self.try_again(now));
        }
        actions
    }

    /// Postcopy is decided on when the round in progress has ended, which is at once.
    fn postcopy(&mut self, answer: Answer, now: Duration) -> Vec<Action> {
        let refused = if !self.settings.mode.may_switch() {
            let why = "its mode is \"precopy\", and the destination does not expect another: set mode = \"hybrid\" at the source";
            Some(ControlError::Refused(why.into()))
        } else if self.controller.is_switching() || self.done.paused || self.is_switching() {
            Some(ControlError::TooLate("it switches over already".into()))
        } else {
            None
        };
        if let Some(why) = refused {
            return vec![Action::Answer(answer, Err(why))];
        }
        self.controller.ask_for_postcopy();
        let mut actions = vec![Action::Answer(answer, Ok(()))];
        actions.extend(self.cut_if_due(now));
        actions
    }

    fn switch_over(&mut self, standing: &Standing) -> Result<Vec<Action>, ControlError> {
        if matches!(self.state, State::Connecting | State::Arming) {
            let why = "it is being set up, and no page has been sent: ask again once rounds run";
            return Err(ControlError::Refused(why.into()));
        }
        if self.controller.is_switching() || self.done.paused {
            return Err(ControlError::TooLate("it switches over already".into()));
        }
        let decided = self.controller.switch_over(standing)?;
        Ok(self.report(&decided))
    }

    /// Sets all of the changes, or none of them. Returns the settings that differ, with the values before and after.
    fn changes(&mut self, changes: &[Change], now: Duration) -> Result<Vec<(Change, Change)>, ControlError> {
        let after = with_all(&self.settings, changes)?;
        let differences = differences(&self.settings, &after);
        differences.iter().try_for_each(|(_, to)| self.check(to, now))?;
        self.settings = after;
        Ok(differences)
    }

    /// The settings are changed already: the parts that depend on them follow, and then the answer.
    fn change(&mut self, differences: Vec<(Change, Change)>, answer: Answer) -> Vec<Action> {
        let throttle = self.controller.throttle();
        let mut actions = Vec::new();
        for (from, to) in differences {
            actions.extend(self.put_in_force(to));
            actions.push(Action::ReportChange { round: self.round, from, to });
        }
        let less = self.controller.throttle();
        let is_unchanged = less == throttle || self.is_disconnected();
        actions.push(if is_unchanged { Action::Answer(answer, Ok(())) } else { self.throttle(less, Some(answer)) });
        actions
    }

    /// Is this change allowed at this moment?
    fn check(&self, to: &Change, now: Duration) -> Result<(), ControlError> {
        let bandwidth = matches!(to, Change::MaxBandwidth(_) | Change::SwitchoverBandwidth(_));
        if self.done.paused && !bandwidth {
            let why = format!("the guest is paused already: {} would change nothing", to.key());
            return Err(ControlError::TooLate(why));
        }
        match *to {
            Change::Deadline(Some(deadline)) if deadline <= now => {
                let gone = human::time(now);
                Err(to.wrong(format!("{gone} are gone already; to end it, cancel it")).into())
            }
            _ => Ok(()),
        }
    }

    fn put_in_force(&mut self, to: Change) -> Option<Action> {
        match to {
            Change::MaxBandwidth(_) | Change::SwitchoverBandwidth(_) => {
                let (rounds, switchover) = (self.settings.max_bandwidth, self.settings.switchover_bandwidth);
                self.controller.set_bandwidth(rounds, switchover);
                return Some(Action::SetBandwidth(self.bandwidth()));
            }
            Change::DowntimeLimit(limit) => self.controller.set_downtime_limit(limit),
            Change::MaxDowntime(most) => self.controller.set_max_downtime(most),
            Change::Deadline(deadline) => self.controller.set_deadline(deadline),
            Change::ThrottleMost(most) => _ = self.controller.set_throttle_most(most),
            Change::XbzrleCache(bytes) => return Some(Action::SetCache(bytes)),
        }
        None
    }
}
