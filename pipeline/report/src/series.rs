//! A migration over time: figures taken on the way, and what happened when. Times are counted from the first thing that an
//! end told, by whoever keeps the series; here is no clock.

use std::time::Duration;

use memferry::events::{Phase, Progress};

/// The most samples that are kept. A picture on a screen shows no more.
pub const MOST_SAMPLES: usize = 600;

/// Samples of a migration's progress, spread evenly over it however long it takes, and marks of what happened.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    kept: Thinned<Sample>,
    latest: Option<Sample>,
    marks: Vec<Mark>,
}

/// Samples from the beginning on, at even distances: when there are [`MOST_SAMPLES`], every other one goes and the distance doubles.
#[derive(Clone, Debug, PartialEq)]
pub struct Thinned<T> {
    kept: Vec<T>,
    /// Each sample that is a multiple of it is kept.
    every: usize,
    seen: usize,
}

impl<T> Default for Thinned<T> {
    fn default() -> Self {
        Self { kept: Vec::new(), every: 1, seen: 0 }
    }
}

impl<T> Thinned<T> {
    /// Takes the next sample.
    pub fn push(&mut self, sample: T) {
        if self.seen.is_multiple_of(self.every) && self.kept.len() == MOST_SAMPLES {
            let mut index = 0_usize;
            self.kept.retain(|_| {
                index += 1;
                index % 2 == 1
            });
            self.every *= 2;
        }
        if self.seen.is_multiple_of(self.every) {
            self.kept.push(sample);
        }
        self.seen += 1;
    }

    /// Those that are kept, in order.
    #[must_use]
    pub fn kept(&self) -> &[T] {
        &self.kept
    }
}

/// What one [`Progress`] said.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// When.
    pub at: Duration,
    /// Page bytes that are dirty or taken and not acknowledged, if this is known.
    pub remaining_bytes: Option<u64>,
    /// Bytes handed to the transport so far.
    pub wire_bytes: u64,
    /// Page bytes a second that the guest dirtied between the last syncs.
    pub dirty_rate: Option<f64>,
    /// What a switchover would have cost.
    pub expected_downtime: Option<Duration>,
    /// The downtime limit; nothing at the destination.
    pub downtime_limit: Duration,
    /// Percent of its time that the guest is held back.
    pub throttle: u8,
}

/// Something that happened at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// When.
    pub at: Duration,
    /// What.
    pub what: Happened,
}

/// What a [`Mark`] marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happened {
    /// The phase changed.
    Phase(Phase),
    /// A round was sent; it had begun so long before.
    Round {
        /// Its number.
        round: u32,
        /// How long it took.
        took: Duration,
    },
    /// A sync found so many dirty pages.
    Synced(u64),
    /// The controller decided: this one of its decisions, from 0.
    Decided(usize),
    /// A setting was changed: this one of the changes, from 0.
    Changed(usize),
    /// The guest was paused at the source.
    Paused,
    /// It goes on at the source.
    Resumed,
    /// The verdict.
    Ended,
}

impl Series {
    /// Takes what a progress event said, at this time.
    pub(super) fn sample(&mut self, progress: &Progress, at: Duration) {
        let sample = Sample {
            at,
            remaining_bytes: progress.remaining_bytes,
            wire_bytes: progress.wire_bytes,
            dirty_rate: progress.dirty_rate,
            expected_downtime: progress.expected_downtime,
            downtime_limit: progress.downtime_limit,
            throttle: progress.throttle,
        };
        self.kept.push(sample);
        self.latest = Some(sample);
    }

    /// Marks what happened at this time.
    pub(super) fn mark(&mut self, what: Happened, at: Duration) {
        self.marks.push(Mark { at, what });
    }

    /// The samples, in order; the latest one is always the last.
    #[must_use]
    pub fn samples(&self) -> Vec<Sample> {
        let kept = self.kept.kept();
        let kept_last = kept.last().map(|sample| sample.at);
        let latest = self.latest.filter(|latest| Some(latest.at) != kept_last);
        kept.iter().copied().chain(latest).collect()
    }

    /// What happened, in order.
    #[must_use]
    pub fn marks(&self) -> &[Mark] {
        &self.marks
    }

    /// When something first happened.
    #[must_use]
    pub fn first(&self, what: Happened) -> Option<Duration> {
        self.marks.iter().find(|mark| mark.what == what).map(|mark| mark.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(samples: u64) -> Series {
        let mut series = Series::default();
        for wire_bytes in 0..samples {
            series.sample(&Progress { wire_bytes, ..Progress::default() }, Duration::from_millis(100 * wire_bytes));
        }
        series
    }

    #[test]
    fn few_samples_are_all_kept() {
        let kept: Vec<_> = series(599).samples().iter().map(|sample| sample.wire_bytes).collect();
        assert_eq!(kept, (0..599).collect::<Vec<_>>());
        assert!(series(0).samples().is_empty());
    }

    #[test]
    fn many_samples_are_thinned_evenly_and_the_latest_is_among_them() {
        for count in [600, 601, 602, 1200, 1201, 5000, 123_456] {
            let kept: Vec<_> = series(count).samples().iter().map(|sample| sample.wire_bytes).collect();
            assert!((MOST_SAMPLES / 2..=MOST_SAMPLES + 1).contains(&kept.len()), "{} of {count}", kept.len());
            assert_eq!((kept[0], *kept.last().unwrap()), (0, count - 1));
            let even = kept[1] - kept[0];
            assert!(even.is_power_of_two() && kept[..kept.len() - 1].windows(2).all(|two| two[1] - two[0] == even));
        }
    }
}
