//! Decides whether pages that no delta helps are compressed.
//!
//! Compressing a page takes time in its lane and saves time on the wire. It pays where it saves more than it takes:
//!
//! ```text
//! bytes saved × time of a byte on the wire  >  time of a try × MARGIN
//! ```
//!
//! All three are measured while the pages travel. The time of a byte is how long the sender waits for its transport or for the
//! bandwidth limit, per byte: it is 0 where the sender waits for the encoders, whatever the link could carry. The other two come
//! from one timed try in each batch. The decision is made once for each batch, and applies to all of its pages.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::codec::Codec;
use crate::meter::Meter;
use crate::token_bucket::TokenBucket;

/// By how much the time saved must exceed the time taken: processor time that a lane uses is taken from other stages and the guest.
const MARGIN: f64 = 2.0;
/// The number of written bytes from which a sender's wait gives a rate: more than a socket's buffers take without a wait.
const WINDOW_BYTES: u64 = 512 << 10;
/// A wait this long gives a rate however little was written.
const WINDOW: Duration = Duration::from_millis(20);
/// Where compressing does not pay, a page of each batch of this number is tried all the same: the first tries find a cold
/// processor, and pages change.
const TRY_AGAIN: u32 = 8;
/// The weight of a new measurement in the mean of the tries.
const WEIGHT: f64 = 0.125;

/// What to do with a page that misses the cache, or whose delta is not smaller than the page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnMiss {
    /// Send it raw.
    #[default]
    Raw,
    /// Compress it.
    Compress(Codec),
    /// Compress it where that pays, and send it raw elsewhere.
    Auto(Codec),
}

impl OnMiss {
    /// The codec of the pages that are compressed, if any are.
    pub(super) fn codec(self) -> Option<Codec> {
        match self {
            Self::Raw => None,
            Self::Compress(codec) | Self::Auto(codec) => Some(codec),
        }
    }
}

/// Whether it pays to compress a page: a try takes `nanos` and saves `saved` bytes, and a byte takes a lane `nanos_per_byte` on
/// the wire.
#[must_use]
pub fn pays(saved: f64, nanos: f64, nanos_per_byte: f64) -> bool {
    saved * nanos_per_byte > nanos * MARGIN
}

/// How long a byte takes on the connection behind an encoder.
#[derive(Clone, Debug)]
pub struct Wire {
    sender: Arc<Meter>,
    limit: Arc<TokenBucket>,
    /// Lanes of the connection, and of all connections.
    lanes: (u16, u16),
    rate: Rate,
}

impl Wire {
    /// A connection that carries `lanes_here` of `lanes` lanes. `sender` is the meter of its sender, `limit` its bandwidth limit.
    #[must_use]
    pub fn new(sender: Arc<Meter>, limit: Arc<TokenBucket>, lanes_here: u16, lanes: u16) -> Self {
        Self { sender, limit, lanes: (lanes_here, lanes), rate: Rate::default() }
    }

    /// How long a byte of one lane takes now, in nanoseconds: as measured lately, and at least what the bandwidth limit implies.
    pub(super) fn nanos_per_byte(&mut self) -> f64 {
        let sender = self.sender.read();
        self.rate.measure(sender.bytes, sender.output_wait);
        let by_limit = self.limit.rate().map_or(0.0, |rate| 1e9 * f64::from(self.lanes.1) / rate as f64);
        by_limit.max(self.rate.nanos_per_byte * f64::from(self.lanes.0))
    }
}

/// How long a sender waited for each byte lately.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Rate {
    nanos_per_byte: f64,
    /// The reading of the sender's meter at the start of the window.
    bytes: u64,
    wait: Duration,
}

impl Rate {
    /// Adds what the sender has written and waited since it was created.
    fn measure(&mut self, bytes: u64, wait: Duration) {
        // A wait that ends while the meter is read may be counted twice for a moment.
        let (more, waited) = (bytes.saturating_sub(self.bytes), wait.saturating_sub(self.wait));
        if more >= WINDOW_BYTES || waited >= WINDOW {
            let nanos_per_byte = waited.as_nanos() as f64 / more.max(1) as f64;
            *self = Self { nanos_per_byte, bytes, wait };
        }
    }
}

/// The time that tries took lately, and the bytes that they saved.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Tries {
    nanos: f64,
    saved: f64,
}

impl Tries {
    /// Adds a try. One that took much longer than the mean was interrupted, and counts as twice the mean.
    fn and(self, nanos: f64, saved: f64) -> Self {
        let towards = |mean: f64, value: f64| mean + (value - mean) * WEIGHT;
        let nanos = if nanos < self.nanos { nanos } else { towards(self.nanos, nanos.min(2.0 * self.nanos)) };
        Self { nanos, saved: towards(self.saved, saved) }
    }
}

/// The decision of one lane, from batch to batch.
#[derive(Debug)]
pub(super) struct Decision {
    wire: Wire,
    tries: Option<Tries>,
    compresses: bool,
    /// Whether the next try is timed.
    times: bool,
    /// Batches since one was tried.
    untried: u32,
}

impl Decision {
    pub(super) fn new(wire: Wire) -> Self {
        Self { wire, tries: None, compresses: true, times: true, untried: 0 }
    }

    /// Decides on the pages of the next batch. Until a page has shrunk, all are tried: the sampler skips pages that do not shrink,
    /// at almost no cost.
    pub(super) fn next_batch(&mut self) {
        let nanos_per_byte = self.wire.nanos_per_byte();
        self.compresses = self.tries.is_none_or(|Tries { nanos, saved }| pays(saved, nanos, nanos_per_byte));
        self.times = true;
        self.untried += 1;
    }

    /// Whether to compress the next page of the batch.
    pub(super) fn compresses(&mut self) -> bool {
        let tries = self.compresses || self.untried >= TRY_AGAIN;
        if tries {
            self.untried = 0;
        }
        tries
    }

    /// The start of a try, if it is to be timed: the first of a batch.
    pub(super) fn starts(&mut self) -> Option<Instant> {
        std::mem::take(&mut self.times).then(Instant::now)
    }

    /// Adds a timed try that shrank its page by `saved` bytes.
    pub(super) fn shrank(&mut self, started: Instant, saved: usize) {
        let (nanos, saved) = (started.elapsed().as_nanos() as f64, saved as f64);
        self.tries = Some(self.tries.map_or(Tries { nanos, saved }, |tries| tries.and(nanos, saved)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meter::Wait;
    use crate::stage_id::StageId;

    const MS: Duration = Duration::from_millis(1);

    fn decision(limit: Option<u64>, lanes: (u16, u16)) -> (Decision, Arc<Meter>) {
        let sender = Meter::start(StageId::sender(0));
        let bucket = Arc::new(limit.map_or_else(TokenBucket::unlimited, TokenBucket::new));
        (Decision::new(Wire::new(sender.clone(), bucket, lanes.0, lanes.1)), sender)
    }

    /// What is decided where tries take so long, and halve a page.
    fn decides(decision: &mut Decision, nanos: f64) -> bool {
        decision.tries = Some(Tries { nanos, saved: 2048.0 });
        decision.next_batch();
        decision.compresses()
    }

    #[test]
    fn it_pays_where_it_saves_twice_what_it_takes() {
        assert!(pays(2048.0, 4_000.0, 4.0));
        assert!(!pays(2048.0, 4_100.0, 4.0));
        assert!(!pays(0.0, 1.0, 1e9) && !pays(4096.0, 1.0, 0.0));
    }

    #[test]
    fn a_limit_is_known_before_a_byte_is_sent() {
        // 10 MB/s are 100 ns a byte, and twice that for each of two lanes: 2,048 bytes take 409,600 ns.
        let (mut two, _) = decision(Some(10_000_000), (1, 2));
        assert!(decides(&mut two, 204_000.0) && !decides(&mut two, 205_000.0));
        let (mut one, _) = decision(Some(10_000_000), (1, 1));
        assert!(decides(&mut one, 102_000.0) && !decides(&mut one, 103_000.0));
    }

    #[test]
    fn a_sender_that_never_waits_is_given_raw_pages() {
        let (mut decision, sender) = decision(None, (2, 2));
        sender.count(64, 100 << 20);
        assert!(!decides(&mut decision, 1.0));
    }

    #[test]
    fn a_sender_that_waits_for_its_transport_is_given_compressed_pages() {
        let (mut decision, sender) = decision(None, (2, 2));
        let waiting = sender.waiting(Wait::Output);
        std::thread::sleep(WINDOW);
        sender.count(0, 1 << 20);
        // At least 20 ms for 1 MiB, while the wait lasts: 19 ns a byte, 38 for each lane.
        assert!(decides(&mut decision, 38.0 * 1024.0));
        drop(waiting);
        assert!(decides(&mut decision, 38.0 * 1024.0), "until something else is measured");
        sender.count(0, 64 << 20);
        assert!(!decides(&mut decision, 38.0 * 1024.0));
    }

    #[test]
    fn a_rate_takes_enough_bytes_or_a_long_wait() {
        let mut rate = Rate::default();
        rate.measure(WINDOW_BYTES - 1, WINDOW - MS);
        assert_eq!(rate, Rate::default());
        rate.measure(1 << 20, MS);
        assert_eq!(rate, Rate { nanos_per_byte: 1e6 / f64::from(1 << 20), bytes: 1 << 20, wait: MS });
        rate.measure((1 << 20) + 20_000, 21 * MS);
        assert_eq!(rate.nanos_per_byte, 1000.0);
        rate.measure((1 << 20) + 20_000, 41 * MS);
        assert_eq!(rate.nanos_per_byte, 20e6, "nothing was written");
    }

    #[test]
    fn a_try_that_was_interrupted_changes_little() {
        let tries = Tries { nanos: 4000.0, saved: 2048.0 };
        assert_eq!(tries.and(1e9, 2048.0), Tries { nanos: 4500.0, saved: 2048.0 });
        assert_eq!(tries.and(3000.0, 4096.0), Tries { nanos: 3000.0, saved: 2304.0 });
    }

    #[test]
    fn pages_are_tried_until_one_has_shrunk() {
        let (mut decision, _) = decision(None, (1, 1));
        for _ in 0..3 {
            decision.next_batch();
            assert!(decision.compresses() && decision.starts().is_some());
            assert!(decision.starts().is_none(), "one try of a batch is timed");
        }
        decision.shrank(Instant::now(), 2048);
        decision.next_batch();
        assert!(!decision.compresses(), "nothing waits for the wire");
    }

    #[test]
    fn where_it_does_not_pay_a_page_is_tried_now_and_then() {
        let (mut decision, _) = decision(Some(10_000_000), (1, 1));
        // A first try that took too long, of a cold processor.
        assert!(!decides(&mut decision, 103_000.0));
        let tried: Vec<_> = (0..2 * TRY_AGAIN)
            .map(|_| {
                decision.next_batch();
                [decision.compresses(), decision.compresses()]
            })
            .collect();
        assert_eq!(tried.iter().filter(|batch| **batch == [true, false]).count(), 2, "one page each");
        assert!(tried.iter().all(|batch| !batch[1]));
        // The next one is quick, and compressing pays from the next batch on.
        decision.tries = decision.tries.map(|tries| tries.and(5_000.0, 2048.0));
        decision.next_batch();
        assert!(decision.compresses() && decision.compresses());
    }
}
