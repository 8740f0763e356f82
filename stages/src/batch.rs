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

use crate::geometry::ExtentAt;
use crate::pool::PooledBuffer;
use crate::tally::RoundTally;
pub(crate) use arrived::Piece;
pub use arrived::{Arrived, PageFault, payload_hash};
pub use encoded::EncodedBatch;
pub use encoding::{GROUP_BYTES, PageEncoding, group_pages};

/// What a lane's queue carries.
#[derive(Debug)]
pub enum Item<B> {
    /// Pages to send.
    Batch(B),
    /// The end of a round: all of its batches precede this in the lane.
    RoundComplete(RoundTally),
    /// The end of the lane: the guest is paused and everything was sent.
    Switchover,
}

/// What stands between the batches of a lane, once the encoder has completed its figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// The end of a round: all of its frames precede this one in the lane, and the figures are complete.
    RoundComplete(RoundTally),
    /// The lane's last frame.
    Switchover,
}

impl<B> From<Mark> for Item<B> {
    fn from(mark: Mark) -> Self {
        match mark {
            Mark::RoundComplete(tally) => Self::RoundComplete(tally),
            Mark::Switchover => Self::Switchover,
        }
    }
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
    /// Whether this is the last round: the guest is paused and each page is sent at most once more.
    pub last: bool,
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
