//! What flows through a lane: the dirty pages of one extent, and the marks between them.
//!
//! ```text
//! scanner ── Batch ──▶ zero detector ── CopiedBatch ──▶ encoder ── Frame ──▶ sender
//!          (which)                        (the only copy)             (wire bytes)
//! ```
//!
//! All three kinds travel as [`Item`]s of the lane's queues, so a round's end cannot overtake a batch (law 5).

use crate::geometry::ExtentAt;
use crate::pool::PooledBuffer;
use crate::tally::RoundTally;

/// What a lane's queue carries.
#[derive(Debug)]
pub enum Item<B> {
    /// Pages on their way.
    Batch(B),
    /// All batches of the round stand before this in the lane.
    RoundComplete(RoundTally),
    /// Nothing follows in this lane: the guest is paused and everything was sent.
    Switchover,
}

/// Which pages: taken from the bitmap, not read yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The extent.
    pub at: ExtentAt,
    /// Its pages to send; never 0.
    pub mask: u64,
    /// Those of `mask` that were never touched when the round's log was already armed: zero without being read.
    pub untouched: u64,
    /// The round, from 1.
    pub round: u32,
    /// Is this the last round? The guest is paused and each page is sent at most once more.
    pub last: bool,
}

/// A batch whose pages have left guest memory.
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
    /// The mask of the pages that lie in the buffer.
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
