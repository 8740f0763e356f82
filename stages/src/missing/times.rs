//! Counts of a [`MissingMemory`](super::MissingMemory), and how long the threads that touched its pages waited.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Buckets for each doubling: a bound is at most a quarter above the time.
const STEPS: usize = 4;
/// Doublings from 1 µs: the last bucket holds all that takes longer than 2^25 µs (34 s).
const DOUBLINGS: usize = 25;
const BUCKETS: usize = 1 + STEPS * DOUBLINGS + 1;

/// Counters as they are written.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) faults: AtomicU64,
    pub(super) requests: AtomicU64,
    pub(super) zeros: AtomicU64,
    pub(super) placed: AtomicU64,
    pub(super) duplicates: AtomicU64,
    pub(super) discarded: AtomicU64,
    pub(super) retries: AtomicU64,
    pub(super) waits: Histogram,
}

impl Counters {
    pub(super) fn read(&self) -> MissingCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        MissingCounts {
            faults: read(&self.faults),
            requests: read(&self.requests),
            zeros: read(&self.zeros),
            placed: read(&self.placed),
            duplicates: read(&self.duplicates),
            discarded: read(&self.discarded),
            retries: read(&self.retries),
            waits: self.waits.read(),
        }
    }
}

/// What happened to missing memory, in pages unless told otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MissingCounts {
    /// Faults that the kernel reported.
    pub faults: u64,
    /// Requests that were made for them.
    pub requests: u64,
    /// Pages of the host that were resolved as zero without a request.
    pub zeros: u64,
    /// Pages that were placed, zero or not.
    pub placed: u64,
    /// Pages that arrived when they were placed already, or discarded.
    pub duplicates: u64,
    /// Pages that were discarded before they arrived.
    pub discarded: u64,
    /// Calls of the kernel that were repeated since a discard was under way.
    pub retries: u64,
    /// The time from the report of a fault until its page was placed and its thread woken, for each page that was requested.
    pub waits: Waits,
}

/// A histogram of times as it is written.
#[derive(Debug)]
pub(super) struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    total_ns: AtomicU64,
    max_ns: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [const { AtomicU64::new(0) }; BUCKETS], total_ns: AtomicU64::new(0), max_ns: AtomicU64::new(0) }
    }
}

impl Histogram {
    pub(super) fn record(&self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket(ns)].fetch_add(1, Ordering::Relaxed);
        self.total_ns.fetch_add(ns, Ordering::Relaxed);
        self.max_ns.fetch_max(ns, Ordering::Relaxed);
    }

    fn read(&self) -> Waits {
        let nanoseconds = |counter: &AtomicU64| Duration::from_nanos(counter.load(Ordering::Relaxed));
        Waits {
            buckets: self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect(),
            total: nanoseconds(&self.total_ns),
            max: nanoseconds(&self.max_ns),
        }
    }
}

/// How long threads waited for pages: a histogram.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Waits {
    buckets: Vec<u64>,
    total: Duration,
    max: Duration,
}

impl Waits {
    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// All of them together.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.total
    }

    /// The longest.
    #[must_use]
    pub fn max(&self) -> Duration {
        self.max
    }

    /// The time that this part of them, from 0 to 1, does not exceed, at most a quarter too long. Zero if there are none.
    #[must_use]
    pub fn quantile(&self, part: f64) -> Duration {
        #[expect(clippy::cast_precision_loss, reason = "a part of a count")]
        let wanted = part.clamp(0.0, 1.0) * self.count() as f64;
        let mut seen = 0;
        let reaches = |(_, count): &(Duration, u64)| {
            seen += count;
            #[expect(clippy::cast_precision_loss, reason = "as above")]
            let enough = seen as f64 >= wanted;
            enough
        };
        self.buckets().find(reaches).map_or(self.max, |(bound, _)| bound.min(self.max))
    }

    /// The bounds of the buckets that hold any, with how many they hold, ascending. The last bucket of all has no bound: it is given
    /// as the longest time.
    pub fn buckets(&self) -> impl Iterator<Item = (Duration, u64)> + use<'_> {
        let bound = |index| if index + 1 == BUCKETS { self.max } else { bound(index) };
        self.buckets
            .iter()
            .enumerate()
            .filter(|(_, count)| **count > 0)
            .map(move |(index, count)| (bound(index), *count))
    }
}

/// The bucket of a time: bucket 0 is for less than 1 µs, and each that follows for a quarter of a doubling.
fn bucket(ns: u64) -> usize {
    let Some(doubling) = (ns / 1000).checked_ilog2() else { return 0 };
    let start = 1000_u64 << doubling;
    let step = usize::try_from((ns - start) * STEPS as u64 / start).expect("less than STEPS");
    (1 + doubling as usize * STEPS + step).min(BUCKETS - 1)
}

/// The time that those of a bucket are below.
fn bound(index: usize) -> Duration {
    let Some(index) = index.checked_sub(1) else { return Duration::from_micros(1) };
    let start = 1000_u64 << (index / STEPS);
    Duration::from_nanos(start + start * (index % STEPS + 1) as u64 / STEPS as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_below_the_bound_of_its_bucket_and_not_below_that_of_the_one_before() {
        let mut random = fastrand::Rng::with_seed(5);
        let drawn = |_| {
            let bits = random.u32(1..34);
            random.u64(..1 << bits)
        };
        let random: Vec<_> = (0..10_000).map(drawn).collect();
        for ns in random.into_iter().chain([0, 999, 1000, 1249, 1250, 1999, 2000, (1000 << 25) - 1]) {
            let (index, time) = (bucket(ns), Duration::from_nanos(ns));
            assert!(time < bound(index), "{time:?}");
            assert!(index == 0 || time >= bound(index - 1), "{time:?}");
        }
        assert_eq!(bucket(1000 << 25), BUCKETS - 1);
        assert_eq!(bucket(u64::MAX / 8), BUCKETS - 1);
    }

    #[test]
    fn quantiles_are_bounds_of_buckets_and_never_above_the_longest() {
        let histogram = Histogram::default();
        assert_eq!(histogram.read().quantile(0.5), Duration::ZERO);
        (0..98).for_each(|_| histogram.record(Duration::from_micros(10)));
        histogram.record(Duration::from_micros(100));
        histogram.record(Duration::from_secs(100));
        let waits = histogram.read();
        assert_eq!((waits.count(), waits.max()), (100, Duration::from_secs(100)));
        assert_eq!(waits.quantile(0.5), bound(bucket(10_000)));
        assert_eq!(waits.quantile(0.99), bound(bucket(100_000)));
        assert_eq!(waits.quantile(1.0), Duration::from_secs(100));
        assert_eq!(waits.buckets().map(|(_, count)| count).collect::<Vec<_>>(), [98, 1, 1]);
    }
}
