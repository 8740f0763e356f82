//! What a guest writes in a stretch of its own time, and what that comes to on the wire.

use std::num::NonZeroU32;
use std::time::Duration;

use memferry_stages::batch::RoundKind;
use memferry_stages::tally::{PageTally, RoundTally};

use crate::controller::forecast::{seconds, whole};

/// A guest as a model: the pages it writes, and their size on the wire.
///
/// A simulation calls in this order: `send` for a round, `written` for the sync after it, then `send` for the next
/// round, whose pages are the ones that were found.
pub trait Guest {
    /// All its pages.
    fn pages(&self) -> u64;

    /// Bytes of a page in memory.
    fn page_bytes(&self) -> u64;

    /// A round begins, with the pages that the last sync found: their size on the wire. In the first round these are
    /// all pages.
    fn send(&mut self, sending: &Sending<'_>) -> Encoded;

    /// As `send`, without deltas: the pages of a guest that runs at its destination. By default their size is that of a round.
    fn send_whole(&mut self, sending: &Sending<'_>) -> Encoded {
        self.send(sending)
    }

    /// The size of the pages of such a round if it were sent: a sample is a share of that.
    fn look(&self, round: u32, pages: u64) -> Encoded;

    /// The pages that a sync finds, written from one moment of the guest's own time to another: from the sync before to
    /// this one, while a round was sent.
    fn written(&mut self, from: Duration, to: Duration) -> Found;
}

/// The number of distinct pages that a sync finds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// All of them.
    pub dirty: u64,
    /// The pages that can be sent as deltas.
    pub cached: u64,
}

/// A round that begins.
#[derive(Clone, Copy)]
pub struct Sending<'a> {
    /// Its number, from 1.
    pub round: u32,
    /// Its pages.
    pub pages: u64,
    /// The moment of the guest's own time; `None` if it is paused.
    pub from: Option<Duration>,
    /// The guest's own time that passes while pages of the given size on the wire are sent.
    pub takes: &'a dyn Fn(&Encoded) -> Duration,
}

impl std::fmt::Debug for Sending<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { round, pages, from, .. } = self;
        f.debug_struct("Sending")
            .field("round", round)
            .field("pages", pages)
            .field("from", from)
            .finish_non_exhaustive()
    }
}

/// The pages of a round after encoding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The counts, as the encoders would report them.
    pub tally: RoundTally,
    /// The least time that the stages need for them, whatever the link.
    pub stages: Duration,
}

impl Encoded {
    /// The same for the given number of its pages.
    pub(crate) fn sample(&self, pages: NonZeroU32) -> Self {
        let all = &self.tally.pages;
        let share = f64::from(pages.get()) / all.all.max(1) as f64;
        let of = |all: u64| whole((all as f64 * share).round());
        let [zero, raw, compressed, xbzrle, unchanged] =
            [all.zero, all.raw, all.compressed, all.xbzrle, all.unchanged].map(of);
        let tally = RoundTally {
            round: self.tally.round,
            kind: RoundKind::Live,
            batches: of(self.tally.batches),
            pages: PageTally {
                all: zero + raw + compressed + xbzrle + unchanged,
                zero,
                raw,
                compressed,
                xbzrle,
                unchanged,
                xbzrle_misses: of(all.xbzrle_misses),
                xbzrle_overflows: of(all.xbzrle_overflows),
                bytes_in: of(all.bytes_in),
                bytes_out: of(all.bytes_out),
            },
        };
        Self { tally, stages: self.stages.mul_f64(share) }
    }
}

/// The size of pages on the wire, for a guest of which only the mean size of a page is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    /// Bytes of a page in memory.
    pub page_bytes: u64,
    /// Share of the pages that are zero in the first round.
    pub zero: f64,
    /// Bytes on the wire of a nonzero page, in the first round.
    pub first: f64,
    /// Bytes on the wire of a written page, in later rounds.
    pub later: f64,
    /// The least time that the stages need for a page.
    pub per_page: Duration,
}

impl Costs {
    /// The given number of pages of a round.
    #[must_use]
    pub fn encode(&self, round: u32, pages: u64) -> Encoded {
        let (zero, each) = if round == 1 { (self.zero, self.first) } else { (0.0, self.later) };
        let zero = whole((pages as f64 * zero).round());
        let tally = RoundTally {
            round,
            pages: PageTally {
                all: pages,
                zero,
                raw: pages - zero,
                bytes_in: pages * self.page_bytes,
                bytes_out: whole(((pages - zero) as f64 * each).round()),
                ..PageTally::default()
            },
            ..RoundTally::default()
        };
        Encoded { tally, stages: seconds(pages as f64 * self.per_page.as_secs_f64()) }
    }
}

/// The time that passes for a guest that is throttled for this percentage of its time.
pub(crate) fn own_time(time: Duration, throttle: u8) -> Duration {
    time.mul_f64(1.0 - f64::from(throttle) / 100.0)
}
