//! Populates memory ahead of its first write, with at most a little more than will be written.
//!
//! ```text
//! a frame's pages, not received yet ──▶ in a stretch that is populated? nothing to do
//!                                   ──▶ in a stretch that looks dense? populate all of it, by huge pages
//!                                   ──▶ otherwise populate exactly these pages
//! ```
//!
//! The first touch of pages is the most expensive work at a destination, and cheapest by huge pages. But a huge page is resident as
//! a whole: a guest that is mostly empty must not grow by it. So a whole stretch is populated only when its first extent comes
//! dense and the stretch before it came full, and only while the populated but unwritten pages stay below a share of those written.

use crate::bitmap::DirtyBitmap;
use crate::geometry::{EXTENT_PAGES, ExtentAt, runs};
use crate::memory::GuestMemory;

/// The least number of pages with which an extent is dense.
const DENSE_PAGES: u32 = 48;
/// A stretch came full if at most one page in this many did not come.
const MISSING: u64 = 16;
/// Populated but unwritten pages stay below one in this many of the pages written.
const IN_VAIN: u64 = 32;

/// The first touches of one lane. A stretch belongs to one lane, so lanes are independent.
#[derive(Debug, Default)]
pub(super) struct FirstTouch {
    /// The stretch whose pages are coming.
    current: Option<Stretch>,
    /// Whether the stretch before it came full.
    full_before: bool,
    /// Pages populated by whole stretches and not written yet.
    ahead: u64,
    /// Pages written for the first time.
    written: u64,
    /// Whether the memory cannot be populated.
    refused: bool,
}

/// A stretch, by its extents.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    block: u32,
    first: u32,
    extents: u32,
    /// Pages of it that came.
    came: u64,
    /// Whether it was populated as a whole.
    asked: bool,
}

impl FirstTouch {
    /// Populates memory for the pages of `mask`, which are about to be written. They may be written even if this fails.
    pub(super) fn prepare(&mut self, memory: &GuestMemory, received: &DirtyBitmap, at: ExtentAt, mask: u64) {
        let pages = mask & !received.peek(at);
        if pages == 0 || self.refused {
            return;
        }
        let count = u64::from(pages.count_ones());
        self.written += count;
        let mut stretch = self.enter(memory, at);
        if stretch.asked {
            self.ahead = self.ahead.saturating_sub(count);
        } else if self.ask_for_stretch(memory, received, at, pages, &stretch) {
            stretch.asked = true;
        } else {
            self.ask_for_pages(memory, at, pages);
        }
        stretch.came += count;
        self.current = Some(stretch);
    }

    /// The stretch of an extent, with its state.
    fn enter(&mut self, memory: &GuestMemory, at: ExtentAt) -> Stretch {
        if let Some(current) = self.current {
            if current.covers(at) {
                return current;
            }
            self.full_before = current.is_full();
        }
        let extents = u32::try_from(memory.page_size().stretch_extents()).expect("few extents in 2 MiB");
        Stretch { block: at.block, first: at.extent / extents * extents, extents, came: 0, asked: false }
    }

    /// Populates the whole stretch, where it is worth it. True if it is populated.
    fn ask_for_stretch(
        &mut self,
        memory: &GuestMemory,
        received: &DirtyBitmap,
        at: ExtentAt,
        pages: u64,
        stretch: &Stretch,
    ) -> bool {
        let layout = memory.layout();
        let is_likely = self.full_before && pages.count_ones() >= DENSE_PAGES;
        let is_whole = || stretch.parts().all(|part| layout.valid_mask(part) == u64::MAX && received.peek(part) == 0);
        if !(is_likely && self.ahead * IN_VAIN <= self.written && is_whole()) {
            return false;
        }
        let first = at.first_page() - u64::from(at.extent - stretch.first) * EXTENT_PAGES;
        let range = first..first + stretch.pages();
        match memory.block(at.block).memory.populate_huge(memory.page_size(), range) {
            Ok(true) => {
                self.ahead += stretch.pages() - u64::from(pages.count_ones());
                true
            }
            Ok(false) => false,
            Err(_refused) => {
                self.refused = true;
                true
            }
        }
    }

    fn ask_for_pages(&mut self, memory: &GuestMemory, at: ExtentAt, pages: u64) {
        let block = &memory.block(at.block).memory;
        self.refused = runs(pages).any(|(first, count)| {
            let start = at.first_page() + u64::from(first);
            // Writing a single page is as cheap as populating it.
            count > 1 && block.populate(memory.page_size(), start..start + u64::from(count)).is_err()
        });
    }
}

impl Stretch {
    fn covers(&self, at: ExtentAt) -> bool {
        self.block == at.block && (self.first..self.first + self.extents).contains(&at.extent)
    }

    fn pages(&self) -> u64 {
        u64::from(self.extents) * EXTENT_PAGES
    }

    fn is_full(&self) -> bool {
        self.pages().saturating_sub(self.came) * MISSING <= self.pages()
    }

    fn parts(&self) -> impl Iterator<Item = ExtentAt> {
        let block = self.block;
        (self.first..self.first.saturating_add(self.extents)).map(move |extent| ExtentAt { block, extent })
    }
}

#[cfg(test)]
mod tests;
