//! Stage: zero detector. The only read of guest memory (ARCHITECTURE.md, law 3: what is compared, hashed or encoded is one copy).
//!
//! - **Takes** batches of a lane: which pages.
//! - **Gives** them copied: which of them are zero, and the bytes of the others in a pooled buffer.
//! - **Owns** nothing but its lane's figures: it adds the zero pages to the tally that RoundComplete carries.
//! - **Promises** that each byte of a batch is loaded at most once, in one pass with the zero test, that untouched pages
//!   are not read at all, and that the logs see each copy after it is made and before it is passed on.
//!
//! It waits for a buffer only when there is something to read, and holds none while it waits (law 9: memory is bounded).

use std::sync::Arc;

use crate::batch::{Batch, CopiedBatch, Item, Mark};
use crate::dirty_log::DirtyLog;
use crate::error::{Cause, StageError};
use crate::memory::GuestMemory;
use crate::meter::Meter;
use crate::pool::BufferPool;
use crate::queue::{Inlet, Outlet};
use crate::stage::Stage;
use crate::stage_id::StageId;

/// The stage: see the module.
#[derive(Debug)]
pub struct ZeroDetector {
    memory: GuestMemory,
    pool: BufferPool,
    logs: Vec<Arc<dyn DirtyLog>>,
    stage: Stage,
}

impl ZeroDetector {
    /// The detector of one lane; a buffer of `pool` holds a whole extent. The meter counts batches, their pages and the
    /// bytes of these.
    #[must_use]
    pub fn new(
        lane: u16,
        memory: GuestMemory,
        pool: BufferPool,
        logs: Vec<Arc<dyn DirtyLog>>,
        meter: Arc<Meter>,
    ) -> Self {
        Self { memory, pool, logs, stage: Stage::new(StageId::zero_detector(lane), meter) }
    }

    /// Runs until the lane's end has passed, or there is no more input.
    ///
    /// # Errors
    /// When guest memory cannot be read, or the next stage has ended.
    pub async fn run(self, input: Inlet<Item<Batch>>, output: Outlet<Item<CopiedBatch>>) -> Result<(), StageError> {
        let (input, output) = (input.metered(&self.stage.meter), output.metered(&self.stage.meter));
        let mut zero_pages = 0;
        while let Some(item) = input.next().await {
            let item = match item {
                Item::Batch(batch) => {
                    let copied = self.copy(batch).await?;
                    zero_pages += u64::from(copied.zero.count_ones());
                    Item::Batch(copied)
                }
                Item::Mark(Mark::RoundComplete(mut tally)) => {
                    tally.pages.zero += std::mem::take(&mut zero_pages);
                    Item::Mark(Mark::RoundComplete(tally))
                }
                Item::Mark(mark) => Item::Mark(mark),
            };
            let over = matches!(item, Item::Mark(Mark::LaneEnds));
            output.put(item).await.map_err(|closed| self.stage.fails(closed))?;
            if over {
                break;
            }
        }
        Ok(())
    }

    async fn copy(&self, batch: Batch) -> Result<CopiedBatch, StageError> {
        let copied = if batch.mask == batch.untouched {
            CopiedBatch { batch, zero: batch.mask, pages: None }
        } else {
            self.read(batch).await?
        };
        for log in &self.logs {
            log.copied(&copied);
        }
        let pages = u64::from(batch.mask.count_ones());
        self.stage.meter.count(pages, pages * self.memory.page_size().bytes() as u64);
        Ok(copied)
    }

    async fn read(&self, batch: Batch) -> Result<CopiedBatch, StageError> {
        let mut pages = self.stage.take_buffer(&self.pool).await;
        let to_read = batch.mask & !batch.untouched;
        let memory = &self.memory.block(batch.at.block).memory;
        let read = memory.read_extent(self.memory.page_size(), batch.at.first_page(), to_read, &mut pages);
        let zero = batch.untouched
            | read.map_err(|error| {
                let at = batch.at.page(to_read.trailing_zeros());
                self.stage.fails(Cause::Memory { doing: "cannot read the extent from", at, error })
            })?;
        Ok(CopiedBatch { batch, zero, pages: (zero != batch.mask).then_some(pages) })
    }
}

#[cfg(test)]
mod tests;
