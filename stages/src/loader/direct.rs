//! The sink for the memory of a guest that does not run.

use std::io;
use std::sync::Arc;

use super::first_touch::FirstTouch;
use super::sink::{PageSink, SinkError};
use crate::batch::{Mark, page_hash};
use crate::bitmap::{DirtyBitmap, locate};
use crate::geometry::{ExtentAt, PageAt, PageSize, run_mask, runs};
use crate::memory::GuestMemory;
use crate::page_hashes::PageHashes;
use crate::xbzrle::Delta;

/// Writes pages into guest memory, over what is there. The guest does not run, and no other sink writes the pages of the lane.
///
/// - A page's bit in the received bitmap is cleared before the page is written, and set once it is complete.
/// - A zero page of a fresh block that was never received is not touched: it is zero already. In any other block it is written,
///   since its content is unknown.
/// - Memory is populated ahead of its first write (`first_touch`).
/// - After [`Mark::DirectEnds`] it takes no pages.
#[derive(Debug)]
pub struct Direct {
    memory: GuestMemory,
    pub(super) received: Arc<DirtyBitmap>,
    first_touch: FirstTouch,
    pub(super) page_hashes: Option<Arc<PageHashes>>,
    /// A page that is read back, for its hash.
    page: Box<[u8]>,
    ended: bool,
}

impl Direct {
    /// A sink for one lane. The bitmap `received` starts empty and is shared by all lanes.
    #[must_use]
    pub fn new(memory: GuestMemory, received: Arc<DirtyBitmap>) -> Self {
        let page = vec![0; memory.page_size().bytes()].into();
        Self { memory, received, first_touch: FirstTouch::default(), page_hashes: None, page, ended: false }
    }

    /// Records the hash of each page in `page_hashes`.
    #[must_use]
    pub fn with_page_hashes(mut self, page_hashes: Arc<PageHashes>) -> Self {
        self.page_hashes = Some(page_hashes);
        self
    }

    /// Makes pages zero. Pages of a fresh block that were not received were never written: a write that fails ends the loader.
    fn clear(&self, at: ExtentAt, zero: u64) -> Result<(), SinkError> {
        let touched = if self.memory.block(at.block).fresh { self.received.peek(at) } else { u64::MAX };
        for (first, count) in runs(zero & touched) {
            let start = at.page(first);
            self.replace(at, run_mask(first, count), || {
                let pages = start.page..start.page + u64::from(count);
                self.memory.block(at.block).memory.write_zeros(self.memory.page_size(), pages)
            })?;
        }
        self.received.set_mask(at, zero & !touched);
        if let Some(page_hashes) = &self.page_hashes {
            // Where nothing was written there may be a hole.
            page_hashes.record(at, zero, zero, 0, []);
        }
        Ok(())
    }

    /// Runs a write of pages, whose received bits are clear meanwhile.
    fn replace(&self, at: ExtentAt, mask: u64, write: impl FnOnce() -> io::Result<()>) -> Result<(), SinkError> {
        let _before = self.received.take_mask(at, mask);
        write().map_err(|error| SinkError::Memory(at.page(mask.trailing_zeros()), error))?;
        self.received.set_mask(at, mask);
        Ok(())
    }
}

impl PageSink for Direct {
    fn page_size(&self) -> PageSize {
        self.memory.page_size()
    }

    fn wants_hashes(&self) -> bool {
        self.page_hashes.is_some()
    }

    fn begin(&mut self, at: ExtentAt, zero: u64, others: u64) -> Result<(), SinkError> {
        if self.ended {
            return Err(SinkError::DirectEnded);
        }
        self.clear(at, zero)?;
        self.first_touch.prepare(&self.memory, &self.received, at, others);
        Ok(())
    }

    fn write(&mut self, at: ExtentAt, pages: u64, bytes: &[u8], hashes: &[u64]) -> Result<(), SinkError> {
        let first = at.page(pages.trailing_zeros()).page;
        let block = &self.memory.block(at.block).memory;
        self.replace(at, pages, || block.write_pages(self.memory.page_size(), first, bytes))?;
        match &self.page_hashes {
            Some(page_hashes) if hashes.is_empty() => {
                let hashes = bytes.chunks_exact(self.memory.page_size().bytes()).map(page_hash);
                page_hashes.record(at, pages, 0, pages, hashes);
            }
            Some(page_hashes) => page_hashes.record(at, pages, 0, pages, hashes.iter().copied()),
            None => {}
        }
        Ok(())
    }

    fn patch(&mut self, page: PageAt, delta: &Delta<'_>) -> Result<(), SinkError> {
        if !self.received.is_set(page) {
            return Err(SinkError::NotReceived(page));
        }
        let block = &self.memory.block(page.block).memory;
        let (at, mask) = locate(page);
        self.replace(at, mask, || block.patch(self.memory.page_size(), page.page, delta))?;
        if let Some(page_hashes) = &self.page_hashes {
            let read = block.read_page(self.memory.page_size(), page.page, &mut self.page);
            read.map_err(|error| SinkError::Memory(page, error))?;
            page_hashes.record(at, mask, 0, mask, [page_hash(&self.page)]);
        }
        Ok(())
    }

    fn mark(&mut self, mark: Mark) -> Result<(), SinkError> {
        self.ended |= mark == Mark::DirectEnds;
        Ok(())
    }
}
