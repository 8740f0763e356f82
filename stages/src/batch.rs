//! What flows through a lane: the dirty pages of one extent, and the marks between them.
//!
//! ```text
//! scanner ── Batch ──▶ zero detector ── CopiedBatch ──▶ encoder ── EncodedBatch ──▶ framer ══▶ deframer ── Arrived ──▶ loader
//!          (which)                        (the only copy)       (how, and where)
//! ```
//!
//! What leaves the encoder is of no dialect: see [`dialect`](crate::dialect). Batches travel as [`Item`]s of the lane's queues, so a
//! round's end cannot overtake a batch (ARCHITECTURE.md, law 5: the round travels in band).

mod arrived;
mod encoded;
mod encoding;
mod hashes;

use crate::geometry::ExtentAt;
use crate::pool::PooledBuffer;
pub use crate::tally::RoundKind;
use crate::tally::RoundTally;
pub(crate) use arrived::Piece;
pub use arrived::{Arrived, PageFault};
pub use encoded::EncodedBatch;
pub use encoding::{GROUP_BYTES, PageEncoding, group_pages};
pub(crate) use hashes::parts;
pub use hashes::{page_hash, payload_hash};

/// What a lane's queue carries.
#[derive(Debug)]
pub enum Item<B> {
    /// Pages to send.
    Batch(B),
    /// A mark, which every stage passes on in its place.
    Mark(Mark),
}

/// A mark between the batches of a lane. No batch and no other mark overtakes it, from the scanner to the loader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// The end of a round: all of its batches precede this in the lane. Each stage adds its part to the figures.
    RoundComplete(RoundTally),
    /// The end of an epoch: what precedes this belongs to the checkpoint of this number.
    Checkpoint(u64),
    /// The switch to postcopy: pages that follow are not for the [`Direct`](crate::loader::Direct) sink.
    DirectEnds,
    /// The end of the lane: nothing follows.
    LaneEnds,
}

/// Which pages: taken from the bitmap, not read yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The extent.
    pub at: ExtentAt,
    /// Its pages to send; never 0.
    pub mask: u64,
    /// Those of `mask` that were still untouched after the round's log was armed: zero, and never read.
    pub untouched: u64,
    /// The round, from 1.
    pub round: u32,
    /// Whether its pages may be sent again.
    pub kind: RoundKind,
}

/// A batch whose pages were copied out of guest memory.
#[derive(Debug)]
pub struct CopiedBatch {
    /// Which pages.
    pub batch: Batch,
    /// Those of the batch's mask that are all zero.
    pub zero: u64,
    /// The others, whole pages one after another in the order of their bits. `None` if all are zero.
    pub pages: Option<PooledBuffer>,
}

impl CopiedBatch {
    /// The mask of the pages in the buffer.
    #[must_use]
    pub fn present(&self) -> u64 {
        self.batch.mask & !self.zero
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stage::testing::batch;

    #[test]
    fn the_pages_in_the_buffer_are_those_that_are_not_zero() {
        let copied = |mask, zero| CopiedBatch { batch: batch(0, mask, 1), zero, pages: None };
        assert_eq!(copied(0b1110, 0b0110).present(), 0b1000);
        assert_eq!(copied(u64::MAX, 0).present(), u64::MAX);
        assert_eq!(copied(1 << 63, 1 << 63).present(), 0);
    }
}
