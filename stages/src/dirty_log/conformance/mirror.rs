//! The kit's scanner and destination: takes pages by the bitmap, and stores the copy that a destination would have.

use std::io;
use std::sync::Arc;

use super::{Breach, Case, Order, Subject, all_pages};
use crate::batch::{Batch, CopiedBatch, RoundKind};
use crate::bitmap::DirtyBitmap;
use crate::dirty_log::DirtyLog;
use crate::geometry::{ExtentAt, Layout, PageAt, bits};
use crate::memory::GuestMemory;
use crate::pool::BufferPool;

/// The source's side: logs and bitmap.
#[derive(Debug)]
pub(super) struct Scanner {
    pub(super) memory: GuestMemory,
    pub(super) logs: Vec<Arc<dyn DirtyLog>>,
    pub(super) dirty: DirtyBitmap,
    buffers: BufferPool,
    order: Order,
}

/// Pages that left the bitmap and are not read yet, unless the order is a wrong one.
#[derive(Debug)]
pub(super) struct Taken {
    batch: Batch,
    early: Option<CopiedBatch>,
}

impl Scanner {
    /// Starts the logs, all pages dirty.
    pub(super) fn start(subject: &Subject, order: Order) -> io::Result<Self> {
        let (memory, logs) = (subject.memory.clone(), subject.logs.clone());
        logs.iter().try_for_each(|log| log.start())?;
        let buffers = BufferPool::new(4, memory.page_size().extent_bytes());
        Ok(Self { dirty: DirtyBitmap::filled(memory.layout()), memory, logs, buffers, order })
    }

    pub(super) fn layout(&self) -> &Layout {
        self.memory.layout()
    }

    /// A whole bitmap sync.
    pub(super) fn sync(&self) -> io::Result<()> {
        (0..self.layout().block_count()).try_for_each(|block| self.sync_block(block))
    }

    fn sync_block(&self, block: u32) -> io::Result<()> {
        let extents = 0..self.layout().block_extents(block);
        self.logs.iter().try_for_each(|log| log.sync(block, extents.clone(), &self.dirty))
    }

    /// Takes an extent from the bitmap and re-arms it: what the scanner does before a lane gets it.
    pub(super) fn take(&self, at: ExtentAt) -> io::Result<Option<Taken>> {
        let batch = |mask| Batch { at, mask, untouched: 0, round: 1, kind: RoundKind::Live };
        if self.order == Order::ReadBeforeTake && self.dirty.peek(at) != 0 {
            let copy = self.read_batch(batch(self.dirty.peek(at)))?;
            // Wide enough for a writer to be in.
            std::thread::sleep(std::time::Duration::from_micros(50));
            let mask = self.dirty.take(at);
            self.rearm(at, mask)?;
            return Ok(Some(Taken { batch: copy.batch, early: Some(copy) }));
        }
        let mask = self.dirty.take(at);
        if mask == 0 {
            return Ok(None);
        }
        if self.order == Order::Right {
            self.rearm(at, mask)?;
        }
        Ok(Some(Taken { batch: batch(mask), early: None }))
    }

    /// Reads what was taken: what the lane does later.
    pub(super) fn read(&self, taken: Taken) -> io::Result<CopiedBatch> {
        if let Some(copy) = taken.early {
            return Ok(copy);
        }
        self.read_batch(taken.batch)
    }

    fn rearm(&self, at: ExtentAt, mask: u64) -> io::Result<()> {
        self.logs.iter().try_for_each(|log| log.rearm(at, mask))
    }

    fn read_batch(&self, batch: Batch) -> io::Result<CopiedBatch> {
        let size = self.memory.page_size();
        let another = || BufferPool::new(1, size.extent_bytes()).try_take().expect("a pool of one");
        let mut buffer = self.buffers.try_take().unwrap_or_else(another);
        let memory = &self.memory.block(batch.at.block).memory;
        let zero = memory.read_extent(size, batch.at.first_page(), batch.mask, &mut buffer)?;
        let pages = (zero != batch.mask).then_some(buffer);
        Ok(CopiedBatch { batch, zero, pages })
    }

    /// Reports a copy to the logs.
    pub(super) fn report(&self, copy: &CopiedBatch) -> io::Result<()> {
        if self.order == Order::ReadBeforeRearm {
            self.rearm(copy.batch.at, copy.batch.mask)?;
        }
        self.logs.iter().for_each(|log| log.copied(copy));
        Ok(())
    }

    /// Takes, reads, reports and sends everything that is dirty.
    pub(super) fn send_all(&self, mirror: &mut Mirror) -> io::Result<()> {
        for at in self.dirty.extents() {
            if let Some(taken) = self.take(at)? {
                let copy = self.read(taken)?;
                self.report(&copy)?;
                mirror.load(&copy);
            }
        }
        Ok(())
    }

    /// Arms the logs for pages that will not be read.
    pub(super) fn arm_unread(&self, pages: &DirtyBitmap) -> io::Result<()> {
        self.logs.iter().try_for_each(|log| log.arm_unread(pages).map(drop))
    }

    pub(super) fn stop(&self) -> io::Result<()> {
        self.logs.iter().try_for_each(|log| log.stop())
    }
}

/// The destination's memory.
#[derive(Debug)]
pub(super) struct Mirror {
    layout: Layout,
    blocks: Vec<Vec<u8>>,
}

impl Mirror {
    /// A destination that holds other bytes than any source until they are loaded.
    pub(super) fn new(layout: &Layout) -> Self {
        let bytes = |block| usize::try_from(layout.block_pages(block)).expect("small") * layout.page_size().bytes();
        let blocks = (0..layout.block_count()).map(|block| vec![0xdd; bytes(block)]).collect();
        Self { layout: layout.clone(), blocks }
    }

    /// Applies a copy.
    pub(super) fn load(&mut self, copy: &CopiedBatch) {
        let at = copy.batch.at;
        bits(copy.zero).for_each(|bit| self.page(at.page(bit)).fill(0));
        let size = self.layout.page_size().bytes();
        let pages = copy.pages.iter().flat_map(|pages| pages.chunks_exact(size));
        for (bit, page) in bits(copy.present()).zip(pages) {
            self.page(at.page(bit)).copy_from_slice(page);
        }
    }

    /// Makes a page zero.
    pub(super) fn clear(&mut self, at: PageAt) {
        self.page(at).fill(0);
    }

    /// Compares with a paused source.
    pub(super) fn compare(&mut self, case: Case, memory: &GuestMemory) -> Result<(), Breach> {
        let layout = self.layout.clone();
        let mut source = vec![0; layout.page_size().bytes()];
        for at in all_pages(&layout) {
            let memory = &memory.block(at.block).memory;
            memory.read_page(layout.page_size(), at.page, &mut source).map_err(Breach::failed(case))?;
            let copy = self.page(at);
            if source != copy {
                let byte = (0..source.len()).find(|&byte| source[byte] != copy[byte]).expect("they differ");
                let (has, sent) = (source[byte], copy[byte]);
                let what = format!("{at} was lost: byte {byte} is {has:#04x}, the destination has {sent:#04x}");
                return Err(Breach::new(case, what));
            }
        }
        Ok(())
    }

    fn page(&mut self, at: PageAt) -> &mut [u8] {
        let size = self.layout.page_size().bytes();
        let start = super::offset(&self.layout, at);
        &mut self.blocks[at.block as usize][start..start + size]
    }
}
