//! Requests of the operator during the migration: other limits, or a switchover.

use std::time::Duration;

use super::forecast::Standing;
use super::reason::{AboveMaxDowntime, LeftAtRate, Reason};
use super::{Controller, Decided, Decision};
use crate::settings::SwitchoverBandwidth;

impl Controller {
    /// Sets the bandwidths of the rounds and of the paused guest.
    pub fn set_bandwidth(&mut self, rounds: Option<u64>, switchover: SwitchoverBandwidth) {
        self.forecaster.set_bandwidth(rounds, switchover);
        self.stall.forget_pace();
    }

    /// Sets the downtime limit. It replaces a limit that was raised on a stall, and may be raised again.
    pub fn set_downtime_limit(&mut self, limit: Duration) {
        self.limits.downtime = limit;
        self.steps.limit_is_set();
        self.stall.forget_pace();
    }

    /// Sets the limit that no switchover may exceed by the forecast. A downtime limit that was raised above it is cut
    /// to it.
    pub fn set_max_downtime(&mut self, most: Option<Duration>) {
        self.limits.max_downtime = most;
    }

    /// Sets the deadline, from the start of the migration.
    pub fn set_deadline(&mut self, deadline: Option<Duration>) {
        self.limits.deadline = deadline;
    }

    /// Sets the ceiling of the throttle. Returns the percent of its time that the guest is to be throttled from here
    /// on, less than before if that was above the ceiling.
    pub fn set_throttle_most(&mut self, most: u8) -> u8 {
        self.stall.forget_pace();
        self.steps.set_throttle_most(most)
    }

    /// Is the switchover decided?
    #[must_use]
    pub fn is_switching(&self) -> bool {
        self.switching
    }

    /// The operator requests a switchover, with the given remaining work.
    ///
    /// # Errors
    /// If `max_downtime` forbids it, by the forecast or because there is none.
    pub fn switch_over(&mut self, now: &Standing) -> Result<Decided, Box<AboveMaxDowntime>> {
        let found = self.with_unseen(now);
        let forecast = found.and_then(|now| self.forecast(&now));
        let limit = self.downtime_limit();
        if !self.is_allowed(forecast.as_ref()) {
            let max_downtime = self.limits.max_downtime.unwrap_or_default();
            let left = (now.page_rate > 0).then(|| LeftAtRate {
                bytes: self.forecaster.page_bytes(now.dirty_pages + now.in_flight_pages),
                rate: now.page_rate,
            });
            return Err(Box::new(AboveMaxDowntime { max_downtime, limit, forecast, left }));
        }
        self.switching = true;
        found.iter().for_each(|now| self.note_likely(now));
        let round = self.round + 1;
        Ok(Decided { round, decision: Decision::SwitchOver, reason: Reason::Operator, limit, forecast })
    }
}

#[cfg(test)]
mod tests {
    use memferry_stages::batch::RoundKind;
    use memferry_stages::tally::{PageTally, RoundTally};

    use super::*;
    use crate::controller::forecast::Work;
    use crate::settings::{
        ConvergenceSettings, EncoderSettings, OnDeadline, RaiseSettings, SourceSettings, StallStep, ThrottleSettings,
    };

    const MS: Duration = Duration::from_millis(1);

    /// A controller after a round of a second at 100,000 pages a second, and its settings.
    fn after_a_round(change: impl FnOnce(&mut SourceSettings)) -> Controller {
        let mut settings = SourceSettings {
            encoder: EncoderSettings { compress: None, xbzrle: None },
            downtime_limit: 100 * MS,
            on_deadline: OnDeadline::SwitchOver,
            ..SourceSettings::default()
        };
        change(&mut settings);
        let mut controller = Controller::new(&settings, 4096);
        controller.armed(Duration::ZERO);
        controller.round(&round(1, 100_000), 1000 * MS, Work::default());
        controller
    }

    fn round(round: u32, pages: u64) -> RoundTally {
        RoundTally {
            pages: PageTally { all: pages, bytes_in: pages * 4096, bytes_out: pages * 4096, ..PageTally::default() },
            ..RoundTally::new(round, RoundKind::Live)
        }
    }

    /// After the given milliseconds the given thousands of pages are dirty: ten milliseconds' worth each.
    fn standing(ms: u32, thousands: u64) -> Standing {
        Standing { elapsed: ms * MS, dirty_pages: thousands * 1000, ..Standing::default() }
    }

    fn throttling(most: u8, on_stall: &[StallStep]) -> Controller {
        let mut controller = after_a_round(|settings| {
            settings.convergence = ConvergenceSettings {
                on_stall: on_stall.to_vec(),
                stall_rounds: 1,
                cool_down_rounds: 0,
                throttle: ThrottleSettings { start: 20, step: 30, most },
                raise: RaiseSettings { step: 50 * MS, most: 150 * MS },
            };
        });
        controller.synced(&standing(1000, 100));
        controller
    }

    /// The next rounds leave as much as the round before.
    fn stalled(controller: &mut Controller, rounds: u32) -> Vec<Decision> {
        let first = controller.round + 1;
        let mut decide = |number: u32| {
            controller.round(&round(number, 100_000), 1000 * MS, Work::default());
            controller.synced(&standing(number * 1000, 100)).decision
        };
        (first..first + rounds).map(&mut decide).collect()
    }

    #[test]
    fn another_limit_counts_at_the_next_decision() {
        let mut controller = after_a_round(|_| ());
        assert_eq!(controller.synced(&standing(1000, 20)).decision, Decision::AnotherRound);
        controller.set_downtime_limit(199 * MS);
        assert_eq!(controller.synced(&standing(1100, 20)).decision, Decision::AnotherRound);
        controller.set_downtime_limit(200 * MS);
        assert_eq!(controller.synced(&standing(1200, 20)).decision, Decision::SwitchOver);
    }

    #[test]
    fn a_lower_cap_counts_before_a_round_has_shown_it() {
        let mut controller = after_a_round(|_| ());
        let expected = |controller: &Controller| controller.forecast(&standing(1000, 10)).unwrap().expected();
        assert_eq!(expected(&controller), 100 * MS);
        controller.set_bandwidth(Some(100_000 * 4096 / 10), SwitchoverBandwidth::AsRounds);
        assert_eq!(expected(&controller), 1000 * MS);
        controller.set_bandwidth(None, SwitchoverBandwidth::AsRounds);
        assert_eq!(expected(&controller), 100 * MS, "what the rounds have shown");
    }

    #[test]
    fn a_deadline_may_come_and_go() {
        let mut controller = after_a_round(|_| ());
        controller.synced(&standing(1000, 100));
        assert!(controller.tick(&standing(5000, 100)).is_none());
        controller.set_deadline(Some(4000 * MS));
        controller.set_deadline(None);
        assert!(controller.tick(&standing(5000, 100)).is_none());
        controller.set_deadline(Some(5500 * MS));
        assert_eq!(controller.tick(&standing(5000, 100)).unwrap().decision, Decision::SwitchOver);
    }

    #[test]
    fn a_throttle_above_its_ceiling_is_lowered_and_rises_again_with_it() {
        use Decision::{AnotherRound, Throttle};
        let mut controller = throttling(90, &[StallStep::Throttle]);
        assert_eq!(stalled(&mut controller, 2), [Throttle(20), Throttle(50)]);
        assert_eq!(controller.set_throttle_most(30), 30);
        assert_eq!(stalled(&mut controller, 2), [AnotherRound, AnotherRound]);
        assert_eq!(controller.set_throttle_most(40), 30, "it rises only about a stall");
        assert_eq!(stalled(&mut controller, 2), [Throttle(40), AnotherRound]);
        assert_eq!(controller.set_throttle_most(0), 0);
        assert_eq!(stalled(&mut controller, 2), [AnotherRound, AnotherRound]);
    }

    #[test]
    fn the_operators_limit_takes_the_place_of_one_that_was_raised_and_may_be_raised_anew() {
        use Decision::{AnotherRound, RaiseLimit};
        let mut controller = throttling(90, &[StallStep::RaiseDowntimeLimit]);
        assert_eq!(stalled(&mut controller, 2), [RaiseLimit(150 * MS), AnotherRound]);
        controller.set_downtime_limit(60 * MS);
        assert_eq!(controller.downtime_limit(), 60 * MS);
        assert_eq!(stalled(&mut controller, 3), [RaiseLimit(110 * MS), RaiseLimit(150 * MS), AnotherRound]);
        controller.set_max_downtime(Some(120 * MS));
        assert_eq!(controller.downtime_limit(), 120 * MS);
    }

    #[test]
    fn it_switches_over_on_request_but_not_above_max_downtime() {
        let mut controller = after_a_round(|settings| settings.max_downtime = Some(500 * MS));
        controller.synced(&standing(1000, 100));
        // 10,000 pages are left of the round, and in 0.3 s another 30,000 were written.
        let decided = controller.switch_over(&standing(1300, 10)).unwrap();
        assert_eq!((decided.round, decided.decision), (2, Decision::SwitchOver));
        assert_eq!((decided.reason, decided.forecast.unwrap().expected()), (Reason::Operator, 400 * MS));
        assert!(controller.is_switching());

        let mut controller = after_a_round(|settings| settings.max_downtime = Some(500 * MS));
        controller.synced(&standing(1000, 100));
        let refused = controller.switch_over(&standing(1300, 21)).unwrap_err();
        assert_eq!((refused.max_downtime, refused.forecast.unwrap().expected()), (500 * MS, 510 * MS));
        assert!(!controller.is_switching());
        controller.set_max_downtime(None);
        assert!(controller.switch_over(&standing(1300, 21)).is_ok());
    }

    #[test]
    fn in_the_first_round_the_cost_of_a_switchover_is_not_known() {
        let limited = SourceSettings { max_downtime: Some(500 * MS), ..SourceSettings::default() };
        let now = standing(500, 100);
        let refusal = |now| Controller::new(&limited, 4096).switch_over(now).unwrap_err();
        assert_eq!((refusal(&now).forecast, refusal(&now).left), (None, None));
        let shown = refusal(&Standing { page_rate: 4096 * 50_000, ..now });
        assert_eq!(shown.left, Some(LeftAtRate { bytes: 100_000 * 4096, rate: 4096 * 50_000 }));
        assert!(Controller::new(&SourceSettings::default(), 4096).switch_over(&now).is_ok());
    }
}
