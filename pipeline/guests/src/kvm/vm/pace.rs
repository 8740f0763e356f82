//! When a vCPU may continue after a page: given the time, it returns how long to wait.

use std::time::{Duration, Instant};

/// The shortest sleep of a vCPU.
const NAP: Duration = Duration::from_millis(1);
/// The backlog that a vCPU may catch up after it was not scheduled.
const CATCH_UP: Duration = Duration::from_millis(20);

/// Paces one vCPU.
#[derive(Debug)]
pub(super) struct Pace {
    /// The time from one page to the next; zero for no limit.
    interval: Duration,
    /// When the next page is due.
    due: Instant,
}

impl Pace {
    /// For this number of pages a second; 0 is no limit.
    pub(super) fn new(pages_per_second: f64, now: Instant) -> Self {
        let interval = if pages_per_second > 0.0 { 1.0 / pages_per_second } else { 0.0 };
        Self { interval: Duration::try_from_secs_f64(interval).unwrap_or(Duration::MAX / 4), due: now }
    }

    /// A page is written: returns how long to wait, if at all.
    pub(super) fn page(&mut self, now: Instant) -> Option<Duration> {
        let earliest = now.checked_sub(CATCH_UP).unwrap_or(now);
        self.due = self.due.max(earliest).checked_add(self.interval)?;
        let wait = self.due.saturating_duration_since(now);
        (wait >= NAP).then_some(wait)
    }

    /// Adds time in which the vCPU could not run.
    pub(super) fn postpone(&mut self, time: Duration) {
        self.due += time;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages in ten seconds of a simulated clock: a page takes 20 µs. It is stopped for a share of each 10 ms.
    fn ten_seconds(rate: f64, percent: u32) -> f64 {
        let begin = Instant::now();
        let asleep = Duration::from_millis(10) * percent / 100;
        let awake = Duration::from_millis(10) - asleep;
        let (mut now, mut pages, mut held_at) = (begin, 0, begin + awake);
        let mut pace = Pace::new(rate, now);
        while now < begin + Duration::from_secs(10) {
            pages += 1;
            now += Duration::from_micros(20);
            now += pace.page(now).unwrap_or_default();
            if percent > 0 && now >= held_at {
                // Its wait is cut short.
                now = held_at + asleep;
                pace.postpone(asleep);
                held_at = now + awake;
            }
        }
        f64::from(pages)
    }

    #[test]
    fn a_pace_is_kept_and_held_time_counts_against_it() {
        for rate in [10.0, 1_000.0, 5_000.0] {
            let near = |pages: f64, expected: f64| (pages - expected).abs() <= expected * 0.05 + 25.0;
            let free = ten_seconds(rate, 0);
            assert!(near(free, rate * 10.0), "{free} pages at {rate} a second");
            if rate >= 1_000.0 {
                let held = ten_seconds(rate, 50);
                assert!(near(held, free / 2.0), "{held} of {free} pages, held for half of the time");
            }
        }
        assert_eq!(Pace::new(0.0, Instant::now()).page(Instant::now()), None);
    }
}
