//! The hash log: a page is dirty when its hash is not that of the copy that was sent.
//!
//! It works on any memory that can be read and needs nothing from its writers or the kernel; a sync costs one read of the
//! memory. It stores 8 bytes for each page:
//!
//! ```text
//!           take (rearm)               copied
//!  ┌──────────────────────┐  ┌──────────────────────────┐
//!  │                      ▼  │                          ▼
//! sent: hash of the copy   in flight × n ──── n = 0 ──▶ sent
//! ```
//!
//! - *sent*: the hash of the last copy that was made for the destination. A sync compares the page with it.
//! - *in flight*: the page was taken, and that many of its copies are still to be made. Every sync reports it as dirty without
//!   reading it. Otherwise a page that changes from A to B and back to A around a read would be lost: the copy has B, the sync
//!   reads A, and the hash of the copy before was A's. Takes are counted because a sync may come between a take and its copy: the
//!   page is then taken again, and nothing about the second follows from the first copy.
//!
//! A page starts in flight, with no copy to come: its bit is set when a migration starts, so nothing needs to be compared
//! before its first copy. Copies of a page are reported in the order in which they are sent (ARCHITECTURE.md, law 4: a page keeps
//! its lane), so the last one reported is what the destination will hold, and every later difference is found against it. A page
//! that was taken and put back unread stays in flight: it is sent again each round until the log is stopped.
//!
//! A paused guest waits for the sync, so it reads with every core. Untouched pages count as zero pages without being read, so
//! that a hole stays one. Excluded pages are neither read nor reported. A page that was only hinted free stays in flight, and is
//! sent anyway: a store of the bytes that it already held leaves no difference to find, and the destination does not have them.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::DirtyLog;
use crate::batch::CopiedBatch;
use crate::bitmap::{DirtyBitmap, words_of};
use crate::geometry::{ExtentAt, Layout, bits};
use crate::hash::xxh3_64;
use crate::host::cores;
use crate::memory::GuestMemory;
use crate::pool::BufferPool;

/// The least amount of memory for which a worker is started.
const LEAST_EXTENTS: usize = 16;

/// Finds any change of any memory that can be read.
#[derive(Debug)]
pub struct HashLog {
    memory: GuestMemory,
    pages: Vec<Box<[PageState]>>,
    zero: u64,
    scratch: BufferPool,
}

impl HashLog {
    /// A log for all blocks of this memory.
    #[must_use]
    pub fn new(memory: GuestMemory) -> Self {
        let layout = memory.layout();
        let of_block = |block| (0..layout.block_pages(block)).map(|_| PageState::default()).collect();
        Self {
            pages: (0..layout.block_count()).map(of_block).collect(),
            zero: hash(&vec![0; layout.page_size().bytes()]),
            scratch: BufferPool::new(cores(), layout.page_size().extent_bytes()),
            memory,
        }
    }

    /// Bytes of memory that a log for such a guest takes.
    #[must_use]
    pub fn bytes_for(layout: &Layout) -> u64 {
        layout.pages() * size_of::<PageState>() as u64 + (cores() * layout.page_size().extent_bytes()) as u64
    }

    fn page(&self, at: ExtentAt, bit: u32) -> &PageState {
        let page = usize::try_from(at.page(bit).page).expect("a page of this memory");
        &self.pages[at.block as usize][page]
    }

    /// The pages of `mask` for which `differs` is true.
    fn those(&self, at: ExtentAt, mask: u64, differs: impl Fn(&PageState) -> bool) -> u64 {
        bits(mask).filter(|&bit| differs(self.page(at, bit))).fold(0, |found, bit| found | 1 << bit)
    }

    /// One worker's part of a sync.
    fn sync_part(&self, block: u32, extents: Range<u32>, into: &DirtyBitmap) -> io::Result<()> {
        let layout = self.memory.layout();
        let first = |extent| ExtentAt { block, extent }.first_page().min(layout.block_pages(block));
        let pages = first(extents.start)..first(extents.end);
        let untouched = self.memory.block(block).memory.untouched_in(layout.page_size(), pages)?;
        let mut holes = untouched.into_iter().flat_map(|pages| words_of(block, pages)).peekable();
        for extent in extents {
            let at = ExtentAt { block, extent };
            let mut hole = 0;
            while let Some((_, mask)) = holes.next_if(|(hole_at, _)| *hole_at == at) {
                hole |= mask;
            }
            // A page that is dirty already will be taken after this and need not be read.
            let clean = layout.valid_mask(at) & !into.peek(at);
            let clean = self.those(at, clean, |page| !page.is_left_out());
            let in_flight = self.those(at, clean, PageState::is_in_flight);
            let gone = self.those(at, clean & !in_flight & hole, |page| page.differs(self.zero));
            let to_read = clean & !in_flight & !hole;
            let changed = if to_read == 0 { 0 } else { self.changed(at, to_read)? };
            into.set_mask(at, in_flight | gone | changed);
        }
        Ok(())
    }

    /// The pages of `mask` whose content differs from the last copy.
    fn changed(&self, at: ExtentAt, mask: u64) -> io::Result<u64> {
        let size = self.memory.page_size();
        let mut buffer = self.scratch.try_take().expect("a buffer for each worker of a sync, and syncs do not overlap");
        let block = self.memory.block(at.block);
        let zero = block.memory.read_extent(size, at.first_page(), mask, &mut buffer)?;
        let mut found = self.those(at, zero, |page| page.differs(self.zero));
        for (bit, page) in bits(mask & !zero).zip(buffer.chunks_exact(size.bytes())) {
            if self.page(at, bit).differs(hash(page)) {
                found |= 1 << bit;
            }
        }
        Ok(found)
    }
}

impl DirtyLog for HashLog {
    fn start(&self) -> io::Result<()> {
        self.pages.iter().flatten().for_each(PageState::reset);
        Ok(())
    }

    fn sync(&self, block: u32, extents: Range<u32>, into: &DirtyBitmap) -> io::Result<()> {
        let part = extents.len().div_ceil(cores()).max(LEAST_EXTENTS);
        let parts = extents
            .clone()
            .step_by(part)
            .map(|start| start..start.saturating_add(u32::try_from(part).unwrap_or(u32::MAX)).min(extents.end));
        let parts: Vec<_> = parts.collect();
        let Some((first, others)) = parts.split_first() else { return Ok(()) };
        std::thread::scope(|scope| {
            let (mut own, mut helpers) = (vec![first], Vec::new());
            for part in others {
                let helper = || self.sync_part(block, part.clone(), into);
                match std::thread::Builder::new().spawn_scoped(scope, helper) {
                    Ok(helper) => helpers.push(helper),
                    // Without more threads the sync takes longer, but need not fail.
                    Err(_) => own.push(part),
                }
            }
            let own = own.into_iter().try_for_each(|part| self.sync_part(block, part.clone(), into));
            helpers.into_iter().fold(own, |result, helper| {
                result.and(helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            })
        })
    }

    fn rearm(&self, at: ExtentAt, mask: u64) -> io::Result<()> {
        bits(mask).for_each(|bit| self.page(at, bit).take());
        Ok(())
    }

    fn leave_out(&self, pages: &DirtyBitmap) -> io::Result<()> {
        for at in pages.all_dirty_extents() {
            bits(pages.peek(at)).for_each(|bit| self.page(at, bit).leave_out());
        }
        Ok(())
    }

    /// False: it compares content.
    fn sees_stores(&self) -> bool {
        false
    }

    /// True: the copy re-arms.
    fn rearms_late(&self) -> bool {
        true
    }

    fn copied(&self, copy: &CopiedBatch) {
        let at = copy.batch.at;
        bits(copy.batch.mask & copy.zero).for_each(|bit| self.page(at, bit).copied(self.zero));
        let pages = copy.pages.iter().flat_map(|pages| pages.chunks_exact(self.memory.page_size().bytes()));
        for (bit, page) in bits(copy.present()).zip(pages) {
            self.page(at, bit).copied(hash(page));
        }
    }

    fn memory_bytes(&self) -> u64 {
        Self::bytes_for(self.memory.layout())
    }

    /// Does nothing: every write is found by the page's content.
    fn mark(&self, _block: u32, _pages: Range<u64>) {}

    fn stop(&self) -> io::Result<()> {
        Ok(())
    }
}

/// What the destination has of a page, or will have.
#[derive(Debug)]
struct PageState(AtomicU64);

/// Set: in flight, the other bits count the copies to come. Clear: the other bits are the hash of the last copy.
const IN_FLIGHT: u64 = 1 << 63;
/// All bits set, which no count of copies reaches: excluded, and never read.
const LEFT_OUT: u64 = u64::MAX;

impl Default for PageState {
    fn default() -> Self {
        Self(AtomicU64::new(IN_FLIGHT))
    }
}

impl PageState {
    fn reset(&self) {
        self.0.store(IN_FLIGHT, Ordering::Release);
    }

    fn leave_out(&self) {
        self.0.store(LEFT_OUT, Ordering::Release);
    }

    fn is_left_out(&self) -> bool {
        self.0.load(Ordering::Acquire) == LEFT_OUT
    }

    fn is_in_flight(&self) -> bool {
        self.0.load(Ordering::Acquire) & IN_FLIGHT != 0
    }

    /// Whether a page with this hash, just read, is to be sent. The state is loaded after the read, so that a take or a copy in
    /// between counts.
    fn differs(&self, hash: u64) -> bool {
        self.0.load(Ordering::Acquire) != hash
    }

    fn take(&self) {
        self.update(|state| if state & IN_FLIGHT == 0 { IN_FLIGHT | 1 } else { state + 1 });
    }

    fn copied(&self, hash: u64) {
        self.update(|state| if state & IN_FLIGHT != 0 && state & !IN_FLIGHT > 1 { state - 1 } else { hash });
    }

    fn update(&self, step: impl Fn(u64) -> u64) {
        let _before = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |state| Some(step(state)));
    }
}

fn hash(page: &[u8]) -> u64 {
    xxh3_64(page) & !IN_FLIGHT
}
