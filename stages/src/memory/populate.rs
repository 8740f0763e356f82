//! First touch of mapped memory, many pages in one call.
//!
//! A page that is touched for the first time costs a fault, a cleared page and a page table entry: several times what
//! copying into it costs. Populating many pages in one call saves the faults, and a huge page the rest. Both are advice: where the
//! kernel does not follow it, pages are touched as they are written.

use std::io;
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use rustix::mm::Advice;

/// Bytes of a huge page, and what its address is a multiple of.
pub(super) const HUGE_BYTES: usize = 2 << 20;
/// Areas of huge pages in one block. The kernel makes a separate mapping of each, and allows a process 65,530 mappings
/// (vm.max_map_count).
const MOST_AREAS: usize = 8192;

/// Touches `length` bytes from `start` on without changing them.
///
/// # Errors
/// When the kernel cannot do it (before Linux 5.14), or has no memory.
///
/// # Safety
/// The range is mapped for writing, from a page of the host to the end of one.
pub(super) unsafe fn populate(start: NonNull<u8>, length: usize) -> io::Result<()> {
    // SAFETY: the caller's promise; the advice changes no content.
    unsafe { rustix::mm::madvise(start.as_ptr().cast(), length, Advice::LinuxPopulateWrite) }?;
    Ok(())
}

/// The huge pages of one block that were requested.
#[derive(Debug, Default)]
pub(super) struct HugePages {
    areas: Mutex<Areas>,
}

#[derive(Debug, Default)]
struct Areas {
    /// A bit for each huge page.
    asked: Vec<u64>,
    /// How many runs of set bits there are.
    count: usize,
}

impl HugePages {
    /// Backs huge page number `index` of the block, which lies at `start`, by a huge page, and touches it. False if that
    /// would make too many areas.
    ///
    /// # Errors
    /// As [`populate`], or when the kernel has no huge pages.
    ///
    /// # Safety
    /// [`HUGE_BYTES`] from `start` on are private anonymous memory, mapped for writing, and `start` is a multiple of it.
    pub(super) unsafe fn populate(&self, index: usize, start: NonNull<u8>) -> io::Result<bool> {
        if !self.areas.lock().unwrap_or_else(PoisonError::into_inner).admit(index) {
            return Ok(false);
        }
        // SAFETY: the caller's promise; the advice changes no content.
        unsafe { rustix::mm::madvise(start.as_ptr().cast(), HUGE_BYTES, Advice::LinuxHugepage) }?;
        // SAFETY: the caller's promise.
        unsafe { populate(start, HUGE_BYTES) }?;
        Ok(true)
    }
}

impl Areas {
    /// Adds a huge page, unless that would make too many areas.
    fn admit(&mut self, index: usize) -> bool {
        let neighbours = [index.checked_sub(1), Some(index + 1)].into_iter().flatten();
        let touching = neighbours.filter(|&neighbour| self.is_asked(neighbour)).count();
        if self.is_asked(index) {
            return true;
        }
        if touching == 0 && self.count == MOST_AREAS {
            return false;
        }
        if self.asked.len() <= index / 64 {
            self.asked.resize(index / 64 + 1, 0);
        }
        self.asked[index / 64] |= 1 << (index % 64);
        self.count = self.count + 1 - touching;
        true
    }

    fn is_asked(&self, index: usize) -> bool {
        self.asked.get(index / 64).is_some_and(|word| word >> (index % 64) & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn areas_are_runs_of_huge_pages(indices in prop::collection::vec(0..200_usize, 0..150)) {
            let mut areas = Areas::default();
            let mut asked = [false; 201];
            for index in indices {
                prop_assert!(areas.admit(index));
                asked[index] = true;
                let starts = (0..asked.len()).filter(|&at| asked[at] && (at == 0 || !asked[at - 1])).count();
                prop_assert_eq!(areas.count, starts);
            }
        }
    }

    #[test]
    fn the_number_of_areas_is_bounded() {
        let mut areas = Areas::default();
        assert!((0..MOST_AREAS).all(|area| areas.admit(area * 2)));
        assert!(!areas.admit(MOST_AREAS * 2), "one area too many");
        assert!(areas.admit(1), "it joins two areas");
        assert!(areas.admit(MOST_AREAS * 2), "there is room for one again");
    }
}
