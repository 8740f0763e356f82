//! The steps on a stall, in the operator's order: each as often as it helps, then the next.
//!
//! | step | taken | over when |
//! |---|---|---|
//! | throttle | a little more each time | the ceiling is reached, or the guest cannot be throttled |
//! | raise the downtime limit | a little more each time | the highest is reached |
//! | switch over | once no more remains than a round before, or after as many rounds as make a stall | `max_downtime` forbids it then |
//! | postcopy | at once | |
//! | cancel | at once | |
//!
//! Only the operator takes a step back: the throttle only rises, and the caller of the controller lifts it at the end.
//! So it cannot oscillate between two levels.

use std::time::Duration;

use super::forecast::Forecast;
use super::reason::Stalled;
use crate::settings::{ConvergenceSettings, StallStep};

/// Pages that the guest dirties in the time of one page sent at which a throttle counts as sufficient: each round is
/// then clearly smaller than the one before.
const ENOUGH: f64 = 0.6;

/// A step, and why the migration does not converge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// The guest is throttled to this percentage of its time.
    Throttle { percent: u8, stalled: Stalled },
    /// The downtime limit is raised to this.
    Raise { limit: Duration, stalled: Stalled },
    /// The guest is switched over: at a local minimum, or after this number of rounds without one.
    SwitchOver { waited: Option<u32>, stalled: Stalled },
    /// The guest is started at the destination before its pages are all there.
    Postcopy { stalled: Stalled },
    /// The migration is cancelled.
    Cancel { stalled: Stalled },
}

/// The inputs of the choice of a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Situation<'a> {
    /// Why this is a stall, if it is one.
    pub(super) stalled: Option<Stalled>,
    pub(super) forecast: Option<&'a Forecast>,
    /// Does `max_downtime` allow a switchover?
    pub(super) may_switch: bool,
    /// Pages that the guest dirties in the time in which one is sent.
    pub(super) dirty_ratio: Option<f64>,
    /// The downtime limit.
    pub(super) limit: Duration,
    /// The ceiling for the raised limit.
    pub(super) highest: Duration,
}

/// The steps that were taken.
#[derive(Clone, Debug)]
pub(super) struct Steps {
    settings: ConvergenceSettings,
    /// The index of the current step in the settings.
    at: usize,
    /// Rounds since the last step.
    rounds_since: u32,
    throttle: u8,
    /// Was a step made smaller, because less was expected to suffice?
    was_smaller: bool,
    can_throttle: bool,
    raised: Option<Duration>,
    /// The rounds spent so far waiting for a local minimum, while one is awaited.
    waited: Option<u32>,
    last_remaining: f64,
}

impl Steps {
    pub(super) fn new(settings: &ConvergenceSettings) -> Self {
        Self {
            settings: settings.clone(),
            at: 0,
            rounds_since: u32::MAX,
            throttle: 0,
            was_smaller: false,
            can_throttle: true,
            raised: None,
            waited: None,
            last_remaining: f64::INFINITY,
        }
    }

    /// The downtime limit, if it was raised.
    pub(super) fn raised(&self) -> Option<Duration> {
        self.raised
    }

    /// Percent of its time that the guest is to be throttled.
    pub(super) fn throttling(&self) -> u8 {
        if self.can_throttle { self.throttle } else { 0 }
    }

    /// The operator has set the limit: an earlier raise is dropped.
    pub(super) fn limit_is_set(&mut self) {
        self.raised = None;
        self.reopen(StallStep::RaiseDowntimeLimit);
    }

    /// Sets the ceiling. Returns the percent of its time that the guest is to be throttled from here on.
    pub(super) fn set_throttle_most(&mut self, most: u8) -> u8 {
        self.settings.throttle.most = most;
        self.throttle = self.throttle.min(most);
        self.was_smaller = false;
        self.reopen(StallStep::Throttle);
        self.throttling()
    }

    /// A step that was exhausted may now have a higher level: it is tried first when the next step is due.
    fn reopen(&mut self, step: StallStep) {
        let at = self.settings.on_stall.iter().position(|&other| other == step);
        if let Some(at) = at.filter(|&at| at < self.at) {
            (self.at, self.waited) = (at, None);
        }
    }

    pub(super) fn cannot_throttle(&mut self) {
        self.can_throttle = false;
        self.rounds_since = u32::MAX;
    }

    /// The step to take after a round, if one is due.
    pub(super) fn next(&mut self, now: &Situation<'_>) -> Option<Taken> {
        self.rounds_since = self.rounds_since.saturating_add(1);
        let remaining = now.forecast.map_or(f64::INFINITY, |forecast| forecast.remaining_bytes);
        let falls = remaining <= std::mem::replace(&mut self.last_remaining, remaining);
        let cooled_down = self.rounds_since >= self.settings.cool_down_rounds;
        let stalled = match now.stalled.filter(|_| cooled_down) {
            Some(stalled) => stalled,
            None if self.waited.is_some() => Stalled::NotNearer,
            None => return None,
        };
        loop {
            let taken = match self.settings.on_stall.get(self.at)? {
                StallStep::Throttle => {
                    self.throttle(now.dirty_ratio).map(|percent| Taken::Throttle { percent, stalled })
                }
                StallStep::RaiseDowntimeLimit => {
                    self.raise(now.limit, now.highest).map(|limit| Taken::Raise { limit, stalled })
                }
                StallStep::SwitchOver => match self.wait_for_a_minimum(falls, now.may_switch) {
                    Wait::Over { waited } => return Some(Taken::SwitchOver { waited, stalled }),
                    Wait::On => return None,
                    Wait::InVain => None,
                },
                StallStep::Postcopy => Some(Taken::Postcopy { stalled }),
                StallStep::Cancel => Some(Taken::Cancel { stalled }),
            };
            if let Some(taken) = taken {
                self.rounds_since = 0;
                return Some(taken);
            }
            self.at += 1;
        }
    }

    /// The next level, if there is a higher one.
    fn throttle(&mut self, dirty_ratio: Option<f64>) -> Option<u8> {
        let settings = self.settings.throttle;
        if !self.can_throttle || self.throttle >= settings.most {
            return None;
        }
        let full = if self.throttle == 0 { settings.start } else { self.throttle.saturating_add(settings.step) };
        let full = full.min(settings.most);
        let enough = dirty_ratio.map_or(full, |dirty_ratio| suffices(self.throttle, dirty_ratio));
        // If a smaller step was expected to suffice and did not, the estimate is not used again.
        if self.throttle > 0 && !self.was_smaller && (self.throttle + 1..full).contains(&enough) {
            self.was_smaller = true;
            self.throttle = enough;
        } else {
            self.throttle = full;
        }
        Some(self.throttle)
    }

    fn raise(&mut self, limit: Duration, highest: Duration) -> Option<Duration> {
        let settings = self.settings.raise;
        let raised = limit.saturating_add(settings.step).min(settings.most).min(highest);
        if raised <= limit {
            return None;
        }
        self.raised = Some(raised);
        self.raised
    }

    /// Waits until no more remains than a round before, for no more rounds than make a stall.
    fn wait_for_a_minimum(&mut self, falls: bool, may_switch: bool) -> Wait {
        let waited = self.waited.map_or(0, |waited| waited + 1);
        self.waited = Some(waited);
        let long_enough = waited >= self.settings.stall_rounds;
        match (may_switch, falls, long_enough) {
            (true, true, _) => Wait::Over { waited: None },
            (true, false, true) => Wait::Over { waited: Some(waited) },
            (false, _, true) => {
                self.waited = None;
                Wait::InVain
            }
            (_, _, false) => Wait::On,
        }
    }
}

enum Wait {
    /// At a local minimum, or after this number of rounds without one.
    Over {
        waited: Option<u32>,
    },
    On,
    InVain,
}

/// The least throttle at which a guest with this dirty rate at this throttle would be expected not to converge.
fn suffices(throttle: u8, dirty_ratio: f64) -> u8 {
    let runs = 1.0 - f64::from(throttle) / 100.0;
    let percent = (1.0 - ENOUGH * runs / dirty_ratio) * 100.0;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it saturates")]
    let percent = percent.ceil() as u8;
    percent
}
