//! The rate for observers: the mean over the last few seconds.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The window of the mean. Under a small bandwidth limit a connection writes once in a second or two.
const WINDOW: Duration = Duration::from_secs(3);

/// The rate of bytes on the wire.
#[derive(Debug, Default)]
pub(super) struct Speed {
    /// Totals and when they were taken, the oldest first: at least one as old as the window, if there is one.
    looks: VecDeque<(Instant, u64)>,
    latest: f64,
}

impl Speed {
    /// Records the total of bytes sent by now. Returns the recent rate, in bytes a second.
    pub(super) fn tick(&mut self, total: u64) -> f64 {
        self.tick_at(Instant::now(), total)
    }

    fn tick_at(&mut self, now: Instant, total: u64) -> f64 {
        self.looks.push_back((now, total));
        while self.looks.get(1).is_some_and(|(then, _)| now.duration_since(*then) >= WINDOW) {
            self.looks.pop_front();
        }
        let (then, before) = self.looks[0];
        let time = now.duration_since(then).as_secs_f64();
        self.latest = if time > 0.0 { (total - before) as f64 / time } else { 0.0 };
        self.latest
    }

    /// The rate at the latest update.
    pub(super) fn latest(&self) -> f64 {
        self.latest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_right_from_the_start_through_bursts_and_when_nothing_moves() {
        let (mut speed, start) = (Speed::default(), Instant::now());
        let mut at = |ms: u64, total| speed.tick_at(start + Duration::from_millis(ms), total);
        assert!(at(0, 0).abs() < 1e-9);
        assert!((at(100, 100_000) - 1e6).abs() < 1.0);
        // A burst each second.
        let rates: Vec<_> = (2..100).map(|tenth| at(tenth * 100, 100_000 + tenth / 10 * 1_000_000)).collect();
        assert!(rates[40..].iter().all(|rate| (6e5..1.4e6).contains(rate)), "{rates:?}");
        assert!(at(13_000, 9_100_000) < 1e6 && at(16_000, 9_100_000).abs() < 1e-9);
    }
}
