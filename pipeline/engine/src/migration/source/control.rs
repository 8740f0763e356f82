//! Requests of the operator to a running source: change settings, or switch over at once.

use super::Source;
use crate::control::{Ask, Change, Changed, ControlError, Request, differences, with_all};
use crate::events::Event;
use crate::human;
use crate::migration::bounds;
use crate::migration::error::MigrationError;
use crate::migration::flow::Flow;
use crate::settings::SwitchoverBandwidth;
use crate::values::Size;

impl Source {
    /// Handles a request, or answers why it is refused. `flow` is set once the stages run.
    pub(super) async fn answer(&mut self, flow: Option<&Flow>, request: Request) -> Result<(), MigrationError> {
        let Request { ask, answer } = request;
        // The requester may be gone.
        match ask {
            Ask::Set(changes) => drop(answer.send(self.change(flow, &changes).await)),
            Ask::SwitchOver => match self.decide_to_switch_over(flow) {
                Ok(flow) => {
                    drop(answer.send(Ok(())));
                    self.pause(flow).await?;
                }
                Err(why) => drop(answer.send(Err(why))),
            },
        }
        Ok(())
    }

    /// The guest is being handed over: requests are refused from here on.
    pub(super) fn refuse(&self, request: Request) {
        let why = "the guest is being handed over to the destination".into();
        drop(request.answer.send(Err(ControlError::TooLate(why))));
    }

    fn decide_to_switch_over<'a>(&mut self, flow: Option<&'a Flow>) -> Result<&'a Flow, ControlError> {
        let refused = "it is being set up, and no page has been sent: ask again once rounds run";
        let flow = flow.ok_or_else(|| ControlError::Refused(refused.into()))?;
        if self.controller.is_switching() || self.paused.is_some() {
            return Err(ControlError::TooLate("it switches over already".into()));
        }
        let decided = self.controller.switch_over(&self.standing_now(flow))?;
        self.tell(&decided);
        Ok(flow)
    }

    /// Applies all of the changes, or none of them.
    async fn change(&mut self, flow: Option<&Flow>, changes: &[Change]) -> Result<(), ControlError> {
        let after = with_all(&self.settings, changes)?;
        let differences = differences(&self.settings, &after);
        differences.iter().try_for_each(|(_, to)| self.check(to))?;
        self.settings = after;
        for (from, to) in differences {
            self.put_in_force(flow, to).await;
            let memory_bound = self.bound() + bounds::logs_bytes(&self.logs);
            self.observers.tell(&Event::Changed(Changed { round: self.round, from, to, memory_bound }));
        }
        Ok(())
    }

    /// Is this change allowed at this moment, on this host?
    fn check(&self, to: &Change) -> Result<(), ControlError> {
        let bandwidth = matches!(to, Change::MaxBandwidth(_) | Change::SwitchoverBandwidth(_));
        if self.paused.is_some() && !bandwidth {
            let why = format!("the guest is paused already: {} would change nothing", to.key());
            return Err(ControlError::TooLate(why));
        }
        match *to {
            Change::Deadline(Some(deadline)) if deadline <= self.started.elapsed() => {
                let gone = human::time(self.started.elapsed());
                Err(to.wrong(format!("{gone} are gone already; to end it, cancel it")).into())
            }
            Change::XbzrleCache(bytes) => self.check_cache(to, bytes),
            _ => Ok(()),
        }
    }

    /// The checks of the start: the cache holds pages, is no larger than the guest, and this host has the memory.
    fn check_cache(&self, to: &Change, bytes: u64) -> Result<(), ControlError> {
        let (page, lanes) = (self.page_bytes(1), self.settings.lanes);
        let least = bounds::least_cache(page, lanes);
        if bytes < least {
            return Err(to
                .wrong(format!("a cache of {} holds no pages; write {} or more", Size(bytes), Size(least)))
                .into());
        }
        if let Some((what, write)) = bounds::cache_beyond_guest(bytes, self.layout().bytes(), page, lanes) {
            return Err(to.wrong(format!("{what}; {write}")).into());
        }
        let settings = with_all(&self.settings, &[*to])?;
        let bound = bounds::source_bound(self.layout(), &settings, self.may_leave_out());
        bounds::check_cache(bound, bytes).map_err(|why| to.wrong(why).into())
    }

    /// The settings are changed already: notify the other parts that depend on them.
    async fn put_in_force(&mut self, flow: Option<&Flow>, to: Change) {
        match to {
            Change::MaxBandwidth(_) | Change::SwitchoverBandwidth(_) => {
                let (rounds, switchover) = (self.settings.max_bandwidth, self.settings.switchover_bandwidth);
                self.controller.set_bandwidth(rounds, switchover);
                flow.iter().for_each(|flow| flow.graph.set_bandwidth(self.bandwidth()));
            }
            Change::DowntimeLimit(limit) => self.controller.set_downtime_limit(limit),
            Change::MaxDowntime(most) => self.controller.set_max_downtime(most),
            Change::Deadline(deadline) => self.controller.set_deadline(deadline),
            Change::ThrottleMost(most) => {
                let before = self.controller.throttle();
                let after = self.controller.set_throttle_most(most);
                if after != before {
                    self.throttle(after).await;
                }
            }
            Change::XbzrleCache(bytes) => flow.iter().for_each(|flow| flow.graph.set_cache(bytes)),
        }
    }

    /// The limit in force at this moment, in bytes a second on the wire.
    pub(super) fn bandwidth(&self) -> Option<u64> {
        match self.settings.switchover_bandwidth {
            _ if self.paused.is_none() => self.settings.max_bandwidth,
            SwitchoverBandwidth::AsRounds => self.settings.max_bandwidth,
            SwitchoverBandwidth::Unlimited => None,
            SwitchoverBandwidth::AtMost(most) => Some(most),
        }
    }
}
