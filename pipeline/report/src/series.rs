//! A migration over time: progress samples and marks. The caller supplies the times, counted from the first event of
//! an end; nothing here reads a clock.

use std::time::Duration;

use memferry::events::{Phase, Progress};

/// The most samples that are stored. A chart on a screen shows no more.
pub const MOST_SAMPLES: usize = 600;

/// Samples of a migration's progress, spaced evenly whatever its duration, and marks of its events.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    samples: Thinned<Sample>,
    latest: Option<Sample>,
    marks: Vec<Mark>,
}

/// Samples from the beginning on, evenly spaced. At [`MOST_SAMPLES`], every second one is dropped and the spacing
/// doubles.
#[derive(Clone, Debug, PartialEq)]
pub struct Thinned<T> {
    samples: Vec<T>,
    /// Only each sample whose number is a multiple of this is stored.
    every: usize,
    seen: usize,
}

impl<T> Default for Thinned<T> {
    fn default() -> Self {
        Self { samples: Vec::new(), every: 1, seen: 0 }
    }
}

impl<T> Thinned<T> {
    /// Takes the next sample.
    pub fn push(&mut self, sample: T) {
        if self.seen.is_multiple_of(self.every) && self.samples.len() == MOST_SAMPLES {
            let mut index = 0_usize;
            self.samples.retain(|_| {
                index += 1;
                index % 2 == 1
            });
            self.every *= 2;
        }
        if self.seen.is_multiple_of(self.every) {
            self.samples.push(sample);
        }
        self.seen += 1;
    }

    /// The stored samples, in order.
    #[must_use]
    pub fn samples(&self) -> &[T] {
        &self.samples
    }
}

/// The figures of one [`Progress`] event.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// The time of the sample.
    pub at: Duration,
    /// Bytes of pages that are dirty, or taken and not yet acknowledged, if known.
    pub remaining_bytes: Option<u64>,
    /// Bytes written to the transport so far.
    pub wire_bytes: u64,
    /// Rate at which the guest dirtied page bytes between the last two syncs, per second.
    pub dirty_rate: Option<f64>,
    /// The expected cost of a switchover at this time.
    pub expected_downtime: Option<Duration>,
    /// The downtime limit; `None` at the destination.
    pub downtime_limit: Duration,
    /// Percent of its time that the guest is throttled.
    pub throttle: u8,
}

/// An event at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The time of the event.
    pub at: Duration,
    /// The event.
    pub what: Happened,
}

/// The event that a [`Mark`] marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happened {
    /// The phase changed.
    Phase(Phase),
    /// A round was sent.
    Round {
        /// Its number.
        round: u32,
        /// How long before the mark it began.
        took: Duration,
    },
    /// A sync found this number of dirty pages.
    Synced(u64),
    /// The controller decided: the index of the decision.
    Decided(usize),
    /// A setting was changed: the index of the change.
    Changed(usize),
    /// The guest was paused at the source.
    Paused,
    /// The guest was resumed at the source.
    Resumed,
    /// The connection was lost: its index among the lost ones.
    Disconnected(usize),
    /// The connection was made again.
    Reconnected,
    /// The verdict.
    Ended,
}

impl Series {
    /// Adds the figures of a progress event at this time.
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
        self.samples.push(sample);
        self.latest = Some(sample);
    }

    /// Adds a mark at this time.
    pub(super) fn mark(&mut self, what: Happened, at: Duration) {
        self.marks.push(Mark { at, what });
    }

    /// The samples, in order; the latest one is always the last.
    #[must_use]
    pub fn samples(&self) -> Vec<Sample> {
        let samples = self.samples.samples();
        let last_sample = samples.last().map(|sample| sample.at);
        let latest = self.latest.filter(|latest| Some(latest.at) != last_sample);
        samples.iter().copied().chain(latest).collect()
    }

    /// The marks, in order.
    #[must_use]
    pub fn marks(&self) -> &[Mark] {
        &self.marks
    }

    /// The time of the first mark of this kind.
    #[must_use]
    pub fn first(&self, what: Happened) -> Option<Duration> {
        self.marks.iter().find(|mark| mark.what == what).map(|mark| mark.at)
    }

    /// The time of the last mark of this kind.
    #[must_use]
    pub fn last(&self, what: Happened) -> Option<Duration> {
        self.marks.iter().rfind(|mark| mark.what == what).map(|mark| mark.at)
    }

    /// The ranges of time in which the guest was paused; the last may have no end.
    #[must_use]
    pub fn paused(&self) -> Vec<(Duration, Option<Duration>)> {
        let runs = |what| matches!(what, Happened::Resumed | Happened::Phase(Phase::Postcopy));
        self.ranges(|what| what == Happened::Paused, runs)
    }

    /// The ranges of time in which there was no connection; the last may have no end.
    #[must_use]
    pub fn outages(&self) -> Vec<(Duration, Option<Duration>)> {
        self.ranges(|what| matches!(what, Happened::Disconnected(_)), |what| what == Happened::Reconnected)
    }

    fn ranges(
        &self,
        begins: impl Fn(Happened) -> bool,
        ends: impl Fn(Happened) -> bool,
    ) -> Vec<(Duration, Option<Duration>)> {
        let mut ranges: Vec<(Duration, Option<Duration>)> = Vec::new();
        for mark in &self.marks {
            let open = ranges.last_mut().filter(|range| range.1.is_none());
            match open {
                Some(range) if ends(mark.what) => range.1 = Some(mark.at),
                None if begins(mark.what) => ranges.push((mark.at, None)),
                _ => {}
            }
        }
        ranges
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
        let samples: Vec<_> = series(599).samples().iter().map(|sample| sample.wire_bytes).collect();
        assert_eq!(samples, (0..599).collect::<Vec<_>>());
        assert!(series(0).samples().is_empty());
    }

    #[test]
    fn many_samples_are_thinned_evenly_and_the_latest_is_among_them() {
        for count in [600, 601, 602, 1200, 1201, 5000, 123_456] {
            let samples: Vec<_> = series(count).samples().iter().map(|sample| sample.wire_bytes).collect();
            assert!((MOST_SAMPLES / 2..=MOST_SAMPLES + 1).contains(&samples.len()), "{} of {count}", samples.len());
            assert_eq!((samples[0], *samples.last().unwrap()), (0, count - 1));
            let even = samples[1] - samples[0];
            assert!(
                even.is_power_of_two() && samples[..samples.len() - 1].windows(2).all(|two| two[1] - two[0] == even)
            );
        }
    }
}
