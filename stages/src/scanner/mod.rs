//! Stage: dirty scanner. Takes dirty pages from the bitmap and distributes them to the lanes.
//!
//! - **Takes** a [`ScanOrder`] from the controller: one round, of all that is dirty or of a sample.
//! - **Gives** each lane its batches in address order and, after them in the same queue, the round's
//!   [`RoundComplete`](Item::RoundComplete) (ARCHITECTURE.md, law 5: the round travels in band); a [`RoundScanned`] to the
//!   controller. The last round ends with [`Switchover`](Item::Switchover) in every lane.
//! - **Owns** nothing: the bitmap is shared.
//! - **Promises** law 1 (the bitmap is the truth): every bit that is taken is in exactly one batch, and batches have no other
//!   bits. A round takes all bits that are set when the scanner reaches their word; a sample takes some of them and leaves the
//!   others. And law 2 (clear, then re-arm, then read): the word is taken, then the logs are re-armed for its bits, and only then
//!   is the batch passed on to be read. Taken bits are added to [`InFlight`] first, so they can be put back whenever the
//!   migration ends.
//!
//! Clean words are skipped by plain loads; a dirty one costs a swap and a put. When a lane is full the scanner waits, so it takes
//! nothing that has no room.

use std::num::NonZeroU32;
use std::sync::Arc;

use crate::batch::{Batch, Item};
use crate::bitmap::DirtyBitmap;
use crate::dirty_log::{DirtyLog, LogCall};
use crate::error::{Cause, StageError};
use crate::geometry::{ExtentAt, LaneMap, bits};
use crate::in_flight::InFlight;
use crate::meter::Meter;
use crate::queue::{Inlet, Outlet};
use crate::stage::Stage;
use crate::stage_id::StageId;
use crate::tally::RoundTally;

/// Scan the bitmap once, from its first word to its last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScanOrder {
    /// The round's number, from 1.
    pub round: u32,
    /// Whether the guest is paused and this is the last round.
    pub last: bool,
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
    pub fn all(round: u32, last: bool) -> Self {
        Self { round, last, sample: None }
    }

    /// A round of about `pages` pages; the others stay dirty, for the next.
    #[must_use]
    pub fn sample(round: u32, pages: NonZeroU32) -> Self {
        Self { round, last: false, sample: Some(pages) }
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

/// The stage: see the module.
#[derive(Debug)]
pub struct Scanner {
    bitmap: Arc<DirtyBitmap>,
    untouched: Option<Arc<DirtyBitmap>>,
    logs: Vec<Arc<dyn DirtyLog>>,
    lanes: LaneMap,
    in_flight: Arc<InFlight>,
    stage: Stage,
}

impl Scanner {
    /// A scanner of `bitmap` for the lanes of the map. The meter counts batches, their pages and the bytes of these.
    ///
    /// `untouched` are pages that were still untouched after the `logs` were armed: the first batch that takes one marks it so.
    /// If a sync may come before the first scan, it needs them too
    /// ([`BitmapSync::with_untouched`](crate::bitmap_sync::BitmapSync::with_untouched)).
    #[must_use]
    pub fn new(
        bitmap: Arc<DirtyBitmap>,
        untouched: Option<Arc<DirtyBitmap>>,
        logs: Vec<Arc<dyn DirtyLog>>,
        lanes: LaneMap,
        in_flight: Arc<InFlight>,
        meter: Arc<Meter>,
    ) -> Self {
        Self { bitmap, untouched, logs, lanes, in_flight, stage: Stage::new(StageId::SCANNER, meter) }
    }

    /// Runs until the last round is scanned, or there are no more orders.
    ///
    /// # Errors
    /// When a log cannot be re-armed, or a lane or the controller has ended.
    ///
    /// # Panics
    /// If there is not one queue for each lane of the map.
    pub async fn run(
        mut self,
        input: Inlet<ScanOrder>,
        lanes: Vec<Outlet<Item<Batch>>>,
        scanned: Outlet<RoundScanned>,
    ) -> Result<(), StageError> {
        assert_eq!(lanes.len(), usize::from(self.lanes.lanes()), "queues for the lanes");
        let (input, scanned) = (input.metered(&self.stage.meter), scanned.metered(&self.stage.meter));
        let lanes: Vec<_> = lanes.into_iter().map(|lane| lane.metered(&self.stage.meter)).collect();
        while let Some(order) = input.next().await {
            // No bit is ever added to them: once all are reported, the bitmap can be dropped.
            drop(self.untouched.take_if(|untouched| untouched.is_empty()));
            let pages = self.scan(order, &lanes).await?;
            self.put(&scanned, RoundScanned { round: order.round, pages }).await?;
            if order.last {
                for lane in &lanes {
                    self.put(lane, Item::Switchover).await?;
                }
                break;
            }
        }
        Ok(())
    }

    /// One round: every lane gets its batches and then its RoundComplete. Returns how many pages were taken.
    async fn scan(&self, order: ScanOrder, lanes: &[Outlet<Item<Batch>>]) -> Result<u64, StageError> {
        let mut tallies = vec![RoundTally::new(order.round, order.last); lanes.len()];
        let (step, most) = order.sample.map_or((1, WHOLE), |pages| (self.step(pages), SAMPLED_EACH));
        for at in self.bitmap.all_dirty_extents().step_by(step) {
            let Some(batch) = self.take(at, most, order)? else { continue };
            let lane = self.lanes.lane(at);
            self.in_flight.record(lane, &batch);
            self.count(&batch, &mut tallies[usize::from(lane)]);
            self.put(&lanes[usize::from(lane)], Item::Batch(batch)).await?;
        }
        for (lane, &tally) in lanes.iter().zip(&tallies) {
            self.put(lane, Item::RoundComplete(tally)).await?;
        }
        Ok(tallies.iter().map(|tally| tally.pages.all).sum())
    }

    /// The step N of a sample, which takes each N-th extent with dirty pages.
    ///
    /// An extent gives its dirty pages, on average `each` of them and at most [`SAMPLED_EACH`]. `extents / N` extents give the wanted
    /// number of pages if `N = extents × each / pages`. N is odd: a step that divides a stretch would hit one lane only.
    fn step(&self, pages: NonZeroU32) -> usize {
        let extents = self.bitmap.all_dirty_extents().count() as u64;
        let each = (self.bitmap.count() / extents.max(1)).clamp(1, SAMPLED_EACH.into());
        usize::try_from((extents * each / u64::from(pages.get())) | 1).unwrap_or(usize::MAX)
    }

    /// Takes at most `most` pages of a word: clear, then re-arm (law 2). The stage that gets the batch reads them.
    fn take(&self, at: ExtentAt, most: u32, order: ScanOrder) -> Result<Option<Batch>, StageError> {
        let mask = if most == WHOLE {
            self.bitmap.take(at)
        } else {
            let some = bits(self.bitmap.peek(at)).take(most as usize).fold(0, |mask, bit| mask | 1 << bit);
            self.bitmap.take_mask(at, some)
        };
        if mask == 0 {
            return Ok(None);
        }
        let untouched = self.untouched.as_ref().map_or(0, |untouched| untouched.take_mask(at, mask));
        for log in &self.logs {
            log.rearm(at, mask).map_err(|error| {
                self.bitmap.set_mask(at, mask);
                self.stage.fails(Cause::Log { doing: LogCall::Rearm, error })
            })?;
        }
        Ok(Some(Batch { at, mask, untouched, round: order.round, last: order.last }))
    }

    fn count(&self, batch: &Batch, tally: &mut RoundTally) {
        let pages = u64::from(batch.mask.count_ones());
        let bytes = pages * self.bitmap.layout().page_size().bytes() as u64;
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
