//! When a writer may write: its pace, and its throttle.
//!
//! Given the time, it returns what to do, so it is tested without a clock. Throttling divides time into slices of 10
//! ms: a throttled writer is awake for the first part of each, and only time awake earns it pages. So throttling slows
//! a paced writer just as it slows one that writes without a limit.

use std::time::Duration;

/// The period of throttling.
const SLICE: Duration = Duration::from_millis(10);
/// A paced writer wakes no more often than this.
const NAP: Duration = Duration::from_millis(1);
/// The backlog that a writer may catch up after it was not scheduled.
const CATCH_UP: Duration = Duration::from_millis(20);
/// Most pages between two reads of the clock.
const BURST: u32 = 64;

/// The next action of a writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// It writes this number of pages.
    Write(u32),
    /// It sleeps for this time.
    Sleep(Duration),
}

/// Paces one writer.
#[derive(Debug)]
pub(super) struct Pacer {
    pages_per_second: f64,
    credit: f64,
    last_turn: Duration,
    slice: Duration,
    is_held: bool,
}

impl Pacer {
    /// For a writer of this number of pages a second; 0 is no limit.
    pub(super) fn new(pages_per_second: f64) -> Self {
        Self { pages_per_second, credit: 0.0, last_turn: Duration::ZERO, slice: Duration::ZERO, is_held: false }
    }

    /// The action at time `now`, which never runs backwards, at a throttle of `percent`, less than 100.
    pub(super) fn turn(&mut self, now: Duration, percent: u8) -> Turn {
        if std::mem::take(&mut self.is_held) {
            self.slice = now;
        } else {
            self.earn(now.saturating_sub(self.last_turn));
        }
        self.last_turn = now;
        if percent == 0 {
            return self.write_or_nap(SLICE);
        }
        let asleep = SLICE * u32::from(percent) / 100;
        let awake = (SLICE - asleep).saturating_sub(now - self.slice);
        if awake.is_zero() {
            self.is_held = true;
            return Turn::Sleep(asleep);
        }
        self.write_or_nap(awake)
    }

    fn earn(&mut self, time: Duration) {
        let most = (CATCH_UP.as_secs_f64() * self.pages_per_second).max(1.0);
        self.credit = (self.credit + time.as_secs_f64() * self.pages_per_second).min(most);
    }

    fn write_or_nap(&mut self, longest: Duration) -> Turn {
        if self.pages_per_second == 0.0 {
            return Turn::Write(BURST);
        }
        if self.credit < 1.0 {
            let wait = ((1.0 - self.credit) / self.pages_per_second).min(1.0);
            return Turn::Sleep(Duration::from_secs_f64(wait).max(NAP).min(longest));
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most BURST")]
        let pages = self.credit.min(f64::from(BURST)) as u32;
        self.credit -= f64::from(pages);
        Turn::Write(pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages written in ten seconds of a simulated clock: a write takes 2 µs, a sleep oversleeps by `late`.
    fn ten_seconds(rate: f64, percent: u8, late: Duration) -> (u64, u64) {
        let (mut now, mut pages, mut turns) = (Duration::ZERO, 0, 0);
        let mut pacer = Pacer::new(rate);
        while now < Duration::from_secs(10) {
            turns += 1;
            match pacer.turn(now, percent) {
                Turn::Write(count) => {
                    pages += u64::from(count);
                    now += Duration::from_micros(2) * count;
                }
                Turn::Sleep(time) => now += time + late,
            }
        }
        (pages, turns)
    }

    fn near(pages: u64, expected: f64) -> bool {
        (pages as f64 - expected).abs() <= expected * 0.03 + 2.0
    }

    #[test]
    fn a_paced_writer_keeps_its_pace_and_never_spins() {
        for rate in [0.5, 3.0, 100.0, 5_000.0, 200_000.0] {
            let (pages, turns) = ten_seconds(rate, 0, Duration::from_micros(80));
            assert!(near(pages, rate * 10.0), "{pages} pages at {rate} a second");
            assert!(turns <= 20_000 + pages / 8, "{turns} turns for {pages} pages");
        }
    }

    #[test]
    fn throttling_takes_its_share_of_paced_and_of_free_writers() {
        for rate in [1_000.0, 100_000.0, 0.0] {
            let (free, _) = ten_seconds(rate, 0, Duration::ZERO);
            for percent in [20, 50, 80, 99] {
                let (pages, _) = ten_seconds(rate, percent, Duration::ZERO);
                let expected = free as f64 * f64::from(100 - percent) / 100.0;
                // A burst that has begun is completed: 128 µs of a slice.
                let least = expected * 0.97 - 2.0;
                let most = expected * 1.03 + if rate == 0.0 { free as f64 * 0.0128 } else { 2.0 };
                assert!((least..=most).contains(&(pages as f64)), "{pages} of {free} at {percent} %, rate {rate}");
            }
        }
    }

    #[test]
    fn what_was_missed_for_long_is_not_caught_up() {
        let mut pacer = Pacer::new(1_000.0);
        assert_eq!(pacer.turn(Duration::ZERO, 0), Turn::Sleep(NAP));
        let (mut pages, now) = (0, Duration::from_secs(60));
        while let Turn::Write(count) = pacer.turn(now, 0) {
            pages += count;
        }
        assert_eq!(pages, 20);
    }
}
