//! Detects a stall: rounds that bring a migration no nearer to its end.

use std::collections::VecDeque;
use std::time::Duration;

use super::forecast::{Forecast, seconds, whole};
use super::reason::Stalled;

/// What remained after each round, as far as it is needed to detect a stall.
#[derive(Clone, Debug)]
pub(super) struct Stall {
    /// The number of rounds that make a stall.
    most: u32,
    least: f64,
    since_least: u32,
    /// The time that the rest would have taken after each of the latest rounds, the latest in front.
    pace: VecDeque<Duration>,
}

/// The budgets that are left.
#[derive(Clone, Copy, Debug)]
pub(super) struct Left {
    pub(super) rounds: u32,
    /// Of the deadline, if there is one.
    pub(super) time: Option<Duration>,
}

impl Stall {
    /// A stall is this number of rounds without progress.
    pub(super) fn new(most: u32) -> Self {
        Self { most, least: f64::INFINITY, since_least: 0, pace: VecDeque::new() }
    }

    /// A step is taken: earlier rounds say nothing about later ones.
    pub(super) fn forget_pace(&mut self) {
        self.pace.clear();
    }

    /// A round has ended, with these budgets left. Returns the reason if this is a stall.
    pub(super) fn note(&mut self, forecast: Option<&Forecast>, limit: Duration, left: Left) -> Option<Stalled> {
        let remaining = forecast.map_or(f64::INFINITY, |forecast| forecast.remaining_bytes);
        if remaining < self.least {
            (self.least, self.since_least) = (remaining, 0);
        } else {
            self.since_least += 1;
        }
        self.pace.push_front(forecast.map_or(Duration::MAX, |forecast| forecast.transfer));
        self.pace.truncate(self.most as usize + 1);
        if self.since_least >= self.most {
            return Some(Stalled::NoNewLeast { rounds: self.since_least });
        }
        let fixed = forecast?.fixed.total();
        if limit <= fixed {
            return self.pace.get(self.most as usize).map(|_| Stalled::FixedCost);
        }
        self.too_slow(limit - fixed, left)
    }

    /// Why the budgets left do not suffice, at the pace of the latest rounds, to bring the rest to this time or less;
    /// `None` if they do, or if the rounds are too few for an estimate.
    fn too_slow(&self, transfer: Duration, left: Left) -> Option<Stalled> {
        let (now, before) = (self.pace.front()?.as_secs_f64(), self.pace.get(self.most as usize)?.as_secs_f64());
        let falls = f64::ln(before / now) / f64::from(self.most);
        let way = f64::ln(now / transfer.as_secs_f64());
        if falls <= 0.0 || way <= 0.0 {
            return None;
        }
        let rounds = (way / falls).ceil();
        let shown_by = self.most;
        if rounds > f64::from(left.rounds) {
            return Some(Stalled::TooFewRounds { shown_by, needed: whole(rounds), left: left.rounds });
        }
        // Each takes as long as the rest that it sends.
        let shrinks = f64::exp(-falls);
        let needed = seconds(now * (1.0 - shrinks.powf(rounds)) / (1.0 - shrinks));
        let left = left.time.filter(|left| needed > *left)?;
        Some(Stalled::TooLittleTime { shown_by, needed, left })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::forecast::FixedCost;

    const LIMIT: Duration = Duration::from_millis(100);

    /// The result after each round, for the given rests: each is a number of bytes that takes as many milliseconds.
    fn stalls(stall: &mut Stall, rest: &[u32], rounds_left: u32) -> Vec<bool> {
        let mut note = |&rest: &u32| {
            let transfer = Duration::from_millis(u64::from(rest));
            let forecast = Forecast { remaining_bytes: f64::from(rest), transfer, fixed: FixedCost::default() };
            stall.note(Some(&forecast), LIMIT, Left { rounds: rounds_left, time: None }).is_some()
        };
        rest.iter().map(&mut note).collect()
    }

    #[test]
    fn rounds_count_from_the_last_least_whatever_dips_between() {
        let mut stall = Stall::new(3);
        assert_eq!(stalls(&mut stall, &[900, 800, 850, 810, 800], u32::MAX), [false, false, false, false, true]);
        assert_eq!(stalls(&mut stall, &[700, 900, 800], u32::MAX), [false; 3], "a new least begins anew");
        assert_eq!(stalls(&mut stall, &[850], u32::MAX), [true]);
    }

    #[test]
    fn a_pace_that_is_too_slow_for_the_rounds_that_are_left_is_a_stall_too() {
        // A tenth less each round: 16 rounds on the way from 525 to 100.
        let rest = [800, 720, 648, 583, 525];
        assert_eq!(stalls(&mut Stall::new(4), &rest, 17), [false; 5]);
        assert_eq!(stalls(&mut Stall::new(4), &rest, 15), [false, false, false, false, true]);
        let mut stall = Stall::new(4);
        stalls(&mut stall, &rest[..4], 15);
        stall.forget_pace();
        assert_eq!(stalls(&mut stall, &rest[4..], 15), [false]);
    }

    #[test]
    fn so_is_one_that_is_too_slow_for_the_time_that_is_left() {
        // Half of it each round: 800, 400 and 200 ms are on the way to 100.
        let stalls = |ms| {
            let left = Left { rounds: u32::MAX, time: Some(Duration::from_millis(ms)) };
            let (fixed, mut stall) = (FixedCost::default(), Stall::new(1));
            let mut note = |ms| {
                let transfer = Duration::from_millis(ms);
                stall.note(Some(&Forecast { remaining_bytes: ms as f64, transfer, fixed }), LIMIT, left)
            };
            [note(1600), note(800)]
        };
        assert_eq!(stalls(1450), [None, None]);
        let [first, second] = stalls(1350);
        assert_eq!(first, None);
        let Some(Stalled::TooLittleTime { shown_by: 1, needed, left }) = second else { panic!("{second:?}") };
        assert_eq!((needed.as_millis(), left.as_millis()), (1400, 1350));
    }

    #[test]
    fn a_limit_below_what_a_switchover_costs_anyway_is_never_met() {
        let fixed = FixedCost { verify: LIMIT, ..FixedCost::default() };
        let mut stall = Stall::new(1);
        let mut note = |rest: f64| {
            let transfer = Duration::from_secs_f64(rest);
            let left = Left { rounds: u32::MAX, time: None };
            stall.note(Some(&Forecast { remaining_bytes: rest, transfer, fixed }), LIMIT, left)
        };
        assert_eq!(note(2.0), None);
        assert_eq!(note(1.0), Some(Stalled::FixedCost));
    }
}
