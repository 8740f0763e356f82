//! Stage: dirty scanner. Takes dirty pages from the bitmap and distributes them to the lanes.
//!
//! - **Takes** a [`ScannerOrder`] from the controller: one round, of all that is dirty or of a sample, or a mark.
//! - **Gives** each lane its batches in address order and, after them in the same queue, the round's
//!   [`RoundComplete`](Mark::RoundComplete) (ARCHITECTURE.md, law 5: the round travels in band); a [`RoundScanned`] to the
//!   controller. A mark that is ordered goes into every lane.
//! - **Owns** nothing: the bitmap is shared, and [`PageTaker`] takes from it.
//! - **Promises** law 1 (the bitmap is the truth): every bit that is taken is in exactly one batch, and batches have no other
//!   bits. A round takes all bits that are set when the scanner reaches their word; a sample takes some of them and leaves the
//!   others. And law 2 (clear, then re-arm, then read): the word is taken, then the logs are re-armed for its bits, and only then
//!   is the batch passed on to be read. Taken bits are added to [`InFlight`](crate::in_flight::InFlight) first, so they can be put back whenever the
//!   migration ends.
//!
//! Clean words are skipped by plain loads; a dirty one costs a swap and a put. When a lane is full the scanner waits, so it takes
//! nothing that has no room.

mod background;

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::batch::{Batch, Item, Mark, RoundKind};
use crate::dirty_log::LogCall;
use crate::error::{Cause, StageError};
use crate::geometry::{ExtentAt, LaneMap};
use crate::meter::{Meter, Wait};
use crate::pending::pending;
use crate::queue::{Inlet, Outlet};
use crate::stage::Stage;
use crate::stage_id::StageId;
use crate::take::PageTaker;
use crate::tally::RoundTally;
pub use background::Background;

/// What the scanner is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScannerOrder {
    /// A round.
    Scan(ScanOrder),
    /// Mark the end of an epoch in every lane.
    Checkpoint(u64),
    /// Mark the switch to postcopy in every lane.
    EndDirect,
    /// End every lane, and the scanner.
    EndLanes,
}

impl From<ScanOrder> for ScannerOrder {
    fn from(order: ScanOrder) -> Self {
        Self::Scan(order)
    }
}

/// Scan the bitmap once, from its first word to its last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScanOrder {
    /// The round's number, from 1.
    pub round: u32,
    /// Whether its pages may change again.
    pub kind: RoundKind,
    /// About this many dirty pages from all over the guest, or `None` for all.
    pub sample: Option<NonZeroU32>,
}

/// All pages of an extent.
const WHOLE: u32 = 64;
/// The most pages of an extent in a sample: enough to share a frame as those of a round do, and few enough to see many places.
const SAMPLED_EACH: u32 = 16;

impl ScanOrder {
    /// A round of all that is dirty.
    #[must_use]
    pub fn all(round: u32, kind: RoundKind) -> Self {
        Self { round, kind, sample: None }
    }

    /// A round of about `pages` pages; the others stay dirty, for the next.
    #[must_use]
    pub fn sample(round: u32, pages: NonZeroU32) -> Self {
        Self { round, kind: RoundKind::Live, sample: Some(pages) }
    }
}

/// The scan reached the bitmap's end; its batches are in the lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundScanned {
    /// As in the order.
    pub round: u32,
    /// Pages that were taken, all lanes together.
    pub pages: u64,
}

/// Ends rounds before the bitmap's end: what is not scanned stays dirty. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Cut(Arc<AtomicBool>);

impl Cut {
    /// From here on every round that is not final ends with the batch that is being taken, the round in progress too.
    pub fn cut(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn ends(&self, kind: RoundKind) -> bool {
        !kind.is_final() && self.0.load(Ordering::Relaxed)
    }
}

/// The stage: see the module.
#[derive(Debug)]
pub struct Scanner {
    taker: PageTaker,
    lanes: LaneMap,
    cut: Cut,
    background: Arc<Background>,
    /// Whether the guest runs at the destination, or is about to.
    is_direct_ended: bool,
    stage: Stage,
}

impl Scanner {
    /// A scanner of the taker's bitmap for the lanes of the map. The meter counts batches, their pages and the bytes of these.
    #[must_use]
    pub fn new(taker: PageTaker, lanes: LaneMap, meter: Arc<Meter>) -> Self {
        Self {
            taker,
            lanes,
            cut: Cut::default(),
            background: Arc::default(),
            is_direct_ended: false,
            stage: Stage::new(StageId::SCANNER, meter),
        }
    }

    /// Learns from `background` what is sent and asked for, once [`ScannerOrder::EndDirect`] was given.
    #[must_use]
    pub fn with_background(mut self, background: Arc<Background>) -> Self {
        self.background = background;
        self
    }

    /// What ends its rounds early.
    #[must_use]
    pub fn cut(&self) -> Cut {
        self.cut.clone()
    }

    /// Runs until the lanes are ended, or there are no more orders.
    ///
    /// # Errors
    /// When a log cannot be re-armed, or a lane or the controller has ended.
    ///
    /// # Panics
    /// If there is not one queue for each lane of the map, or a round is ordered that is not final while pages are taken urgently.
    pub async fn run(
        mut self,
        input: Inlet<ScannerOrder>,
        lanes: Vec<Outlet<Item<Batch>>>,
        scanned: Outlet<RoundScanned>,
    ) -> Result<(), StageError> {
        assert_eq!(lanes.len(), usize::from(self.lanes.lanes()), "queues for the lanes");
        let (input, scanned) = (input.metered(&self.stage.meter), scanned.metered(&self.stage.meter));
        let lanes: Vec<_> = lanes.into_iter().map(|lane| lane.metered(&self.stage.meter)).collect();
        while let Some(order) = input.next().await {
            match order {
                ScannerOrder::Scan(order) => {
                    self.taker.begin_round(order.kind);
                    let pages = if self.is_direct_ended {
                        self.scan_in_background(order, &lanes).await?
                    } else {
                        self.scan(order, &lanes).await?
                    };
                    self.taker.end_round();
                    self.put(&scanned, RoundScanned { round: order.round, pages }).await?;
                }
                ScannerOrder::Checkpoint(number) => self.mark(&lanes, Mark::Checkpoint(number)).await?,
                ScannerOrder::EndDirect => {
                    self.is_direct_ended = true;
                    self.mark(&lanes, Mark::DirectEnds).await?;
                }
                ScannerOrder::EndLanes => return self.mark(&lanes, Mark::LaneEnds).await,
            }
        }
        Ok(())
    }

    async fn mark(&self, lanes: &[Outlet<Item<Batch>>], mark: Mark) -> Result<(), StageError> {
        for lane in lanes {
            self.put(lane, Item::Mark(mark)).await?;
        }
        Ok(())
    }

    /// One round: every lane gets its batches and then its RoundComplete. Returns how many pages were taken.
    async fn scan(&self, order: ScanOrder, lanes: &[Outlet<Item<Batch>>]) -> Result<u64, StageError> {
        let mut tallies = vec![RoundTally::new(order.round, order.kind); lanes.len()];
        let (step, most) = order.sample.map_or((1, WHOLE), |pages| (self.step(pages), SAMPLED_EACH));
        for at in self.taker.bitmap().all_dirty_extents().step_by(step) {
            if self.cut.ends(order.kind) {
                break;
            }
            self.take(at, most, order, lanes, &mut tallies).await?;
        }
        self.complete(lanes, &tallies).await
    }

    /// The round of a guest that runs at the destination: see [`background`].
    async fn scan_in_background(&self, order: ScanOrder, lanes: &[Outlet<Item<Batch>>]) -> Result<u64, StageError> {
        let mut tallies = vec![RoundTally::new(order.round, order.kind); lanes.len()];
        let mut taken = self.background.sent();
        let mut at = ExtentAt { block: 0, extent: 0 };
        loop {
            let room = self.background.room(taken);
            pending(room, &self.stage.meter, Wait::Output).await;
            let Some(next) = self.background.next(self.taker.bitmap(), at) else { break };
            at = next;
            taken += u64::from(self.take(at, background::PAGES, order, lanes, &mut tallies).await?);
        }
        self.complete(lanes, &tallies).await
    }

    /// Takes pages of an extent, and gives them to their lane. Whether there were any.
    async fn take(
        &self,
        at: ExtentAt,
        most: u32,
        order: ScanOrder,
        lanes: &[Outlet<Item<Batch>>],
        tallies: &mut [RoundTally],
    ) -> Result<bool, StageError> {
        let taken = self.taker.take(at, most, order.round, order.kind);
        let taken = taken.map_err(|error| self.stage.fails(Cause::Log { doing: LogCall::Rearm, error }))?;
        let Some(batch) = taken else { return Ok(false) };
        let lane = self.lanes.lane(at);
        self.taker.in_flight().record(lane, &batch);
        self.count(&batch, &mut tallies[usize::from(lane)]);
        self.put(&lanes[usize::from(lane)], Item::Batch(batch)).await?;
        Ok(true)
    }

    /// Ends a round in every lane. Returns how many pages were taken.
    async fn complete(&self, lanes: &[Outlet<Item<Batch>>], tallies: &[RoundTally]) -> Result<u64, StageError> {
        for (lane, &tally) in lanes.iter().zip(tallies) {
            self.put(lane, Item::Mark(Mark::RoundComplete(tally))).await?;
        }
        Ok(tallies.iter().map(|tally| tally.pages.all).sum())
    }

    /// The step N of a sample, which takes each N-th extent with dirty pages.
    ///
    /// An extent gives its dirty pages, on average `each` of them and at most [`SAMPLED_EACH`]. `extents / N` extents give the wanted
    /// number of pages if `N = extents × each / pages`. N is odd: a step that divides a stretch would hit one lane only.
    fn step(&self, pages: NonZeroU32) -> usize {
        let extents = self.taker.bitmap().all_dirty_extents().count() as u64;
        let each = (self.taker.bitmap().count() / extents.max(1)).clamp(1, SAMPLED_EACH.into());
        usize::try_from((extents * each / u64::from(pages.get())) | 1).unwrap_or(usize::MAX)
    }

    fn count(&self, batch: &Batch, tally: &mut RoundTally) {
        let pages = u64::from(batch.mask.count_ones());
        let bytes = pages * self.taker.bitmap().layout().page_size().bytes() as u64;
        tally.batches += 1;
        tally.pages.all += pages;
        tally.pages.bytes_in += bytes;
        self.stage.meter.count(pages, bytes);
    }

    /// Puts an item, and yields to other tasks: a queue that always has room never makes the scanner wait.
    async fn put<T>(&self, outlet: &Outlet<T>, item: T) -> Result<(), StageError> {
        tokio::task::coop::consume_budget().await;
        outlet.put(item).await.map_err(|closed| self.stage.fails(closed))
    }
}

#[cfg(test)]
mod tests;
