//! The userfault log: the kernel tracks which pages of this process were stored into.
//!
//! Memory is registered with a userfaultfd in asynchronous write-protect mode; a sync asks PAGEMAP_SCAN for the pages
//! written since the last one, which write-protects them again in the same step. So it re-arms in sync. Needs Linux 6.7,
//! no privilege.
//!
//! It sees stores through the registered mapping only, those of the kernel (a read into guest memory) included. It does not
//! see a `pwrite` to the file of a shared block, a store through another mapping of it, hole punching, memory given
//! back by `madvise`, or DMA into pinned pages: code that does so must mark. A shared block therefore needs its guest's
//! guarantee that the mapping is exclusive.
//!
//! Anonymous memory is armed by a scan for present pages: a hole needs no arming, since a page that appears later
//! has no protection and so counts as written. Shared memory has pages that this mapping's table does not show, so it is armed
//! whole, at the price of page tables for its holes.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::DirtyLog;
use super::software::{clear, collect};
use crate::bitmap::DirtyBitmap;
use crate::geometry::Layout;
use crate::kernel::{self, PRESENT, Pagemap, SWAPPED, Scan, Userfaultfd, WP_ASYNC, WP_SHARED, WP_UNPOPULATED, WRITTEN};
use crate::memory::MappedMemory;

const FEATURES: u64 = WP_ASYNC | WP_UNPOPULATED | WP_SHARED;

/// Finds the stores into mapped memory of this process.
pub struct UserfaultLog {
    /// The first field, so that it is dropped before the memory.
    armed: Mutex<Option<Armed>>,
    /// By block: the memory that this log tracks, if any.
    memory: Vec<Option<Arc<MappedMemory>>>,
    pending: DirtyBitmap,
}

/// Dropping it unregisters everything.
#[derive(Debug)]
struct Armed {
    userfault: Userfaultfd,
    pagemap: Pagemap,
}

impl UserfaultLog {
    /// A log that tracks the memory of some blocks of this layout, each given with its index. For the other blocks it
    /// finds only what is marked.
    ///
    /// # Panics
    /// If there is no such block, or its memory is not as long as the block.
    #[must_use]
    pub fn new(layout: &Layout, blocks: Vec<(u32, Arc<MappedMemory>)>) -> Self {
        let mut memory = vec![None; layout.blocks().len()];
        for (block, mapped) in blocks {
            assert_eq!(mapped.len() as u64, layout.blocks()[block as usize].length, "length of block {block}");
            memory[block as usize] = Some(mapped);
        }
        Self { armed: Mutex::new(None), memory, pending: DirtyBitmap::empty(layout) }
    }

    /// Checks whether this host supports the log.
    ///
    /// # Errors
    /// The reason if it does not, and the remedy.
    pub fn supported() -> Result<(), String> {
        let missing = FEATURES & !kernel::userfault_features()?;
        if missing != 0 {
            return Err(format!("userfaultfd lacks the features {missing:#x}: Linux 6.7 or later has them"));
        }
        kernel::pagemap_scan()
    }

    fn armed(&self) -> MutexGuard<'_, Option<Armed>> {
        self.armed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn followed(&self) -> impl Iterator<Item = &Arc<MappedMemory>> {
        self.memory.iter().flatten()
    }

    /// The addresses of the pages of some extents, cut off at the end of the mapping.
    fn addresses(&self, memory: &MappedMemory, extents: &Range<u32>) -> Range<usize> {
        let (whole, extent) = (mapping(memory), self.pending.layout().page_size().extent_bytes());
        let at = |extents: u32| whole.start.saturating_add(extents as usize * extent).min(whole.end);
        at(extents.start)..at(extents.end)
    }
}

impl DirtyLog for UserfaultLog {
    fn start(&self) -> io::Result<()> {
        let armed = Armed { userfault: Userfaultfd::open(FEATURES)?, pagemap: Pagemap::open()? };
        for memory in self.followed() {
            // SAFETY: the mapping belongs to the memory, which this log keeps alive until the descriptor is dropped.
            unsafe { armed.userfault.register(mapping(memory)) }?;
            if memory.is_shared() {
                armed.userfault.write_protect(mapping(memory))?;
            } else {
                armed.pagemap.scan(
                    Scan { all_of: 0, any_of: PRESENT | SWAPPED, protect: true },
                    mapping(memory),
                    |_| (),
                )?;
            }
        }
        *self.armed() = Some(armed);
        Ok(())
    }

    fn sync(&self, block: u32, extents: Range<u32>, into: &DirtyBitmap) -> io::Result<()> {
        collect(&self.pending, block, extents.clone(), into);
        let Some(memory) = &self.memory[block as usize] else { return Ok(()) };
        let armed = self.armed();
        let armed = armed.as_ref().ok_or_else(|| io::Error::other("the userfault log was not started"))?;
        let (start, page) = (mapping(memory).start, into.layout().page_size().bytes());
        let end = into.layout().block_pages(block);
        let found = |written: Range<usize>| {
            let first = ((written.start - start) / page) as u64;
            let last = ((written.end - start).div_ceil(page) as u64).min(end);
            into.set_range(block, first..last);
        };
        // A hole beside a present page counts as written. In anonymous memory nothing was stored there. In shared memory it
        // may be a page that was written and then removed from this mapping's tables.
        let there = if memory.is_shared() { 0 } else { PRESENT | SWAPPED };
        let scan = Scan { all_of: WRITTEN, any_of: there, protect: true };
        armed.pagemap.scan(scan, self.addresses(memory, &extents), found)
    }

    fn mark(&self, block: u32, pages: Range<u64>) {
        self.pending.set_range(block, pages);
    }

    fn memory_bytes(&self) -> u64 {
        self.pending.memory_bytes()
    }

    fn stop(&self) -> io::Result<()> {
        let armed = self.armed().take();
        clear(&self.pending);
        let Some(armed) = armed else { return Ok(()) };
        self.followed().try_for_each(|memory| armed.userfault.unregister(mapping(memory)))
    }
}

impl fmt::Debug for UserfaultLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UserfaultLog").field("memory", &self.memory).finish_non_exhaustive()
    }
}

/// The addresses of a memory's mapping, in whole pages of the host.
fn mapping(memory: &MappedMemory) -> Range<usize> {
    let start = memory.as_ptr().addr();
    start..start + memory.len().next_multiple_of(rustix::param::page_size())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::geometry::{BlockInfo, ExtentAt, PageSize};

    fn log(memory: &Arc<MappedMemory>, page_size: u64) -> (UserfaultLog, DirtyBitmap) {
        let length = memory.len() as u64;
        let info = BlockInfo::new("ram", length);
        let layout = Layout::new(PageSize::new(page_size).unwrap(), vec![info]).unwrap();
        (UserfaultLog::new(&layout, vec![(0, memory.clone())]), DirtyBitmap::empty(&layout))
    }

    fn found(log: &UserfaultLog, dirty: &DirtyBitmap) -> u64 {
        log.sync(0, 0..1, dirty).unwrap();
        dirty.take(ExtentAt { block: 0, extent: 0 })
    }

    #[test]
    fn host_pages_are_folded_into_larger_ones() {
        if let Err(why) = UserfaultLog::supported() {
            return println!("skipped: {why}");
        }
        let memory = Arc::new(MappedMemory::anonymous(10 * 16384 + 5).unwrap());
        let (log, dirty) = log(&memory, 16384);
        log.start().unwrap();
        memory.store(3 * 16384 - 1, &[1, 1]);
        memory.store(10 * 16384 + 4, &[1]);
        assert_eq!(found(&log, &dirty), 0b100_0000_1100);
        assert_eq!(found(&log, &dirty), 0);
        log.stop().unwrap();
    }

    #[test]
    fn stores_of_the_kernel_are_seen_and_those_to_the_file_are_not() {
        if let Err(why) = UserfaultLog::supported() {
            return println!("skipped: {why}");
        }
        let file = File::from(rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(64 * 4096).unwrap();
        let memory = Arc::new(MappedMemory::file(file.try_clone().unwrap()).unwrap());
        let (log, dirty) = log(&memory, 4096);
        log.start().unwrap();
        // SAFETY: the page is in the mapping, and nothing else uses it while this reference lives.
        let page = unsafe { std::slice::from_raw_parts_mut(memory.as_ptr().add(5 * 4096), 4096) };
        File::open("/dev/zero").unwrap().read_exact_at(page, 0).unwrap();
        assert_eq!(found(&log, &dirty), 1 << 5);
        file.write_all_at(&[1], 7 * 4096).unwrap();
        assert_eq!(found(&log, &dirty), 0);
        log.mark(0, 7..8);
        assert_eq!(found(&log, &dirty), 1 << 7);
        log.stop().unwrap();
        assert!(log.sync(0, 0..1, &dirty).is_err(), "a log that was stopped cannot be read");
    }
}
