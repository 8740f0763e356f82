//! When rounds bring a migration no nearer to its end.

use std::collections::VecDeque;
use std::time::Duration;

use super::forecast::Forecast;

/// What the rounds left of what remains, as far as a stall is seen in it.
#[derive(Clone, Debug)]
pub(super) struct Stall {
    /// Rounds that make one.
    most: u32,
    least: f64,
    since_least: u32,
    /// What the rest would have taken after the latest rounds, the latest in front.
    pace: VecDeque<Duration>,
}

impl Stall {
    /// So many rounds without progress are a stall.
    pub(super) fn new(most: u32) -> Self {
        Self { most, least: f64::INFINITY, since_least: 0, pace: VecDeque::new() }
    }

    /// Something is done about it: what was before says nothing of what comes.
    pub(super) fn forget_pace(&mut self) {
        self.pace.clear();
    }

    /// A round has ended: is this a stall, and why?
    pub(super) fn note(&mut self, forecast: Option<&Forecast>, limit: Duration, rounds_left: u32) -> Option<String> {
        let remaining = forecast.map_or(f64::INFINITY, |forecast| forecast.remaining_bytes);
        if remaining < self.least {
            (self.least, self.since_least) = (remaining, 0);
        } else {
            self.since_least += 1;
        }
        self.pace.push_front(forecast.map_or(Duration::MAX, |forecast| forecast.transfer));
        self.pace.truncate(self.most as usize + 1);
        if self.since_least >= self.most {
            return Some(format!("{} rounds brought no new least of what remains", self.since_least));
        }
        let needed = self.rounds_to(limit.saturating_sub(forecast?.fixed.total()))?;
        (needed > f64::from(rounds_left)).then(|| {
            let last = self.most;
            if needed.is_finite() {
                return format!(
                    "at the pace of the last {last} rounds it needs {needed:.0} more, and {rounds_left} are left"
                );
            }
            "what a switchover costs without a page is above the limit already".into()
        })
    }

    /// Rounds that it takes until the rest takes no more than this, at the pace of the latest; `None` if they are too few to
    /// tell, or it needs none.
    fn rounds_to(&self, transfer: Duration) -> Option<f64> {
        let (now, before) = (self.pace.front()?.as_secs_f64(), self.pace.get(self.most as usize)?.as_secs_f64());
        let falls = f64::ln(before / now);
        let way = f64::ln(now / transfer.as_secs_f64());
        (falls > 0.0 && way > 0.0).then(|| f64::from(self.most) * way / falls)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::forecast::FixedCost;

    const LIMIT: Duration = Duration::from_millis(100);

    /// What is said after each round, for what remains after each: so many bytes, that take as many milliseconds.
    fn said(stall: &mut Stall, rest: &[u32], rounds_left: u32) -> Vec<bool> {
        let mut note = |&rest: &u32| {
            let transfer = Duration::from_millis(u64::from(rest));
            let forecast = Forecast { remaining_bytes: f64::from(rest), transfer, fixed: FixedCost::default() };
            stall.note(Some(&forecast), LIMIT, rounds_left).is_some()
        };
        rest.iter().map(&mut note).collect()
    }

    #[test]
    fn rounds_count_from_the_last_least_whatever_dips_between() {
        let mut stall = Stall::new(3);
        assert_eq!(said(&mut stall, &[900, 800, 850, 810, 800], u32::MAX), [false, false, false, false, true]);
        assert_eq!(said(&mut stall, &[700, 900, 800], u32::MAX), [false; 3], "a new least begins anew");
        assert_eq!(said(&mut stall, &[850], u32::MAX), [true]);
    }

    #[test]
    fn a_pace_that_is_too_slow_for_the_rounds_that_are_left_is_a_stall_too() {
        // A tenth less each round: 16 rounds on the way from 525 to 100.
        let rest = [800, 720, 648, 583, 525];
        assert_eq!(said(&mut Stall::new(4), &rest, 17), [false; 5]);
        assert_eq!(said(&mut Stall::new(4), &rest, 15), [false, false, false, false, true]);
        let mut stall = Stall::new(4);
        said(&mut stall, &rest[..4], 15);
        stall.forget_pace();
        assert_eq!(said(&mut stall, &rest[4..], 15), [false]);
    }

    #[test]
    fn a_limit_below_what_a_switchover_costs_anyway_is_never_met() {
        let fixed = FixedCost { verify: LIMIT, ..FixedCost::default() };
        let mut stall = Stall::new(1);
        let mut note = |rest: f64| {
            let transfer = Duration::from_secs_f64(rest);
            stall.note(Some(&Forecast { remaining_bytes: rest, transfer, fixed }), LIMIT, u32::MAX)
        };
        assert_eq!(note(2.0), None);
        assert!(note(1.0).unwrap().contains("without a page"));
    }
}
