//! The steps that are taken about a stall, in the operator's order: each as often as it helps, then the next.
//!
//! | step | taken | over when |
//! |---|---|---|
//! | throttle | a little more each time | the most is reached, or the guest cannot be throttled |
//! | raise the downtime limit | a little more each time | the highest is reached |
//! | switch over | as soon as no more remains than a round before, or after as many rounds as make a stall | `max_downtime` forbids it then |
//! | cancel | at once | |
//!
//! Nothing is taken back but by the operator: the throttle only rises, and whoever runs the migration lifts it at its end. So
//! it cannot swing between two levels. Postcopy, which ends every stall, has its place in `Steps::next` beside the switchover.

use std::time::Duration;

use super::forecast::Forecast;
use crate::settings::{ConvergenceSettings, StallStep};

/// Pages that the guest dirties in the time of one page sent at which a throttle is said to suffice: each round is then
/// smaller than the one before by a good share.
const ENOUGH: f64 = 0.6;

/// A step that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The guest is held back for so many percent of its time.
    Throttle(u8),
    /// The downtime limit is raised to this.
    Raise(Duration),
    /// It switches over.
    SwitchOver,
    /// It is cancelled.
    Cancel,
}

/// Which steps were taken.
#[derive(Clone, Debug)]
pub struct Steps {
    settings: ConvergenceSettings,
    /// The step of the settings that is being taken.
    at: usize,
    /// Rounds since one was taken.
    rounds_since: u32,
    throttle: u8,
    /// Was a step made smaller, because less was to suffice?
    was_smaller: bool,
    can_throttle: bool,
    raised: Option<Duration>,
    /// How many rounds a local minimum was waited for, while it is.
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

    /// Percent of its time that the guest is to be held back.
    pub(super) fn throttling(&self) -> u8 {
        if self.can_throttle { self.throttle } else { 0 }
    }

    /// The limit is the operator's: what it was raised to counts no more.
    pub(super) fn limit_is_set(&mut self) {
        self.raised = None;
        self.reopen(StallStep::RaiseDowntimeLimit);
    }

    /// Another most: percent of its time that the guest is to be held back from here on.
    pub(super) fn set_throttle_most(&mut self, most: u8) -> u8 {
        self.settings.throttle.most = most;
        self.throttle = self.throttle.min(most);
        self.was_smaller = false;
        self.reopen(StallStep::Throttle);
        self.throttling()
    }

    /// A step that was over may have more to give: it comes first where the next one is due.
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

    /// The step to take after a round, and why. `stall` says why this is one, if it is.
    ///
    /// `outrun` is how many pages the guest dirties in the time in which one is sent; `highest` is the limit that none may
    /// exceed; `may_switch` says that a switchover now would not.
    pub(super) fn next(
        &mut self,
        stall: Option<String>,
        forecast: Option<&Forecast>,
        may_switch: bool,
        outrun: Option<f64>,
        limit: Duration,
        highest: Duration,
    ) -> Option<(Taken, String)> {
        self.rounds_since = self.rounds_since.saturating_add(1);
        let remaining = forecast.map_or(f64::INFINITY, |forecast| forecast.remaining_bytes);
        let falls = remaining <= std::mem::replace(&mut self.last_remaining, remaining);
        let cooled_down = self.rounds_since >= self.settings.cool_down_rounds;
        let stall = match stall.filter(|_| cooled_down) {
            Some(why) => why,
            None if self.waited.is_some() => "it does not come nearer to its end".into(),
            None => return None,
        };
        loop {
            let taken = match self.settings.on_stall.get(self.at)? {
                StallStep::Throttle => self.throttle(outrun),
                StallStep::RaiseDowntimeLimit => self.raise(limit, highest),
                StallStep::SwitchOver => match self.wait_for_a_minimum(falls, may_switch) {
                    Wait::Go(why) => return Some((Taken::SwitchOver, format!("{stall}, and {why}"))),
                    Wait::On => return None,
                    Wait::InVain => None,
                },
                StallStep::Cancel => Some(Taken::Cancel),
            };
            if let Some(taken) = taken {
                self.rounds_since = 0;
                return Some((taken, stall));
            }
            self.at += 1;
        }
    }

    /// The next level, if there is a higher one.
    fn throttle(&mut self, outrun: Option<f64>) -> Option<Taken> {
        let settings = self.settings.throttle;
        if !self.can_throttle || self.throttle >= settings.most {
            return None;
        }
        let full = if self.throttle == 0 { settings.start } else { self.throttle.saturating_add(settings.step) };
        let full = full.min(settings.most);
        let enough = outrun.map_or(full, |outrun| suffices(self.throttle, outrun));
        // Once it was said that less would suffice and it did not, the figures are not asked again.
        if self.throttle > 0 && !self.was_smaller && (self.throttle + 1..full).contains(&enough) {
            self.was_smaller = true;
            self.throttle = enough;
        } else {
            self.throttle = full;
        }
        Some(Taken::Throttle(self.throttle))
    }

    fn raise(&mut self, limit: Duration, highest: Duration) -> Option<Taken> {
        let settings = self.settings.raise;
        let raised = limit.saturating_add(settings.step).min(settings.most).min(highest);
        if raised <= limit {
            return None;
        }
        self.raised = Some(raised);
        Some(Taken::Raise(raised))
    }

    /// Waits until no more remains than a round before; after as many rounds as make a stall, no longer.
    fn wait_for_a_minimum(&mut self, falls: bool, may_switch: bool) -> Wait {
        let waited = self.waited.map_or(0, |waited| waited + 1);
        self.waited = Some(waited);
        let long_enough = waited >= self.settings.stall_rounds;
        match (may_switch, falls, long_enough) {
            (true, true, _) => Wait::Go("no more remains than a round before".into()),
            (true, false, true) => Wait::Go(format!("{waited} rounds more brought no local minimum")),
            (false, _, true) => {
                self.waited = None;
                Wait::InVain
            }
            (_, _, false) => Wait::On,
        }
    }
}

enum Wait {
    Go(String),
    On,
    InVain,
}

/// The least throttle at which a guest that outruns the wire so much at this throttle would be outrun by it.
fn suffices(throttle: u8, outrun: f64) -> u8 {
    let runs = 1.0 - f64::from(throttle) / 100.0;
    let percent = (1.0 - ENOUGH * runs / outrun) * 100.0;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it saturates")]
    let percent = percent.ceil() as u8;
    percent
}
