//! The pages that the destination holds as zero (ARCHITECTURE.md, law 6: the delta's reference is what the destination holds).

use crate::bitmap::{DirtyBitmap, locate};
use crate::geometry::{ExtentAt, Layout, PageAt};

/// The pages that the destination holds as zero, one bit each: a page of zeros is a delta's reference without a copy in the cache.
///
/// A bit is set when a zero frame is made for its page, in the order of the lane, and cleared by any other encoding. All lanes share
/// the bits; each word is written by one of them. What takes pages from the destination clears them from outside.
#[derive(Debug)]
pub struct KnownZero {
    pages: DirtyBitmap,
}

impl KnownZero {
    /// No page is known to be zero.
    #[must_use]
    pub fn new(layout: &Layout) -> Self {
        Self { pages: DirtyBitmap::empty(layout) }
    }

    /// The pages of an extent that are known to be zero.
    ///
    /// # Panics
    /// If the extent is not of the layout.
    #[must_use]
    pub fn pages(&self, at: ExtentAt) -> u64 {
        self.pages.peek(at)
    }

    /// Forgets every page that is set in `lost`: its frame was put back, or the destination discards the page.
    ///
    /// No lane may hold a batch of these pages: its zero frame would set the bit again, and its delta would refer to the zeros.
    ///
    /// # Panics
    /// If `lost` is of another layout.
    pub fn forget(&self, lost: &DirtyBitmap) {
        for at in lost.all_dirty_extents() {
            self.remove(at, lost.peek(at));
        }
    }

    /// Forgets all pages, as a switch to postcopy does. No lane may hold a batch.
    pub fn forget_all(&self) {
        self.forget(&self.pages);
    }

    /// Whether a page is known to be zero.
    pub(super) fn contains(&self, at: PageAt) -> bool {
        self.pages.is_set(at)
    }

    /// A zero frame is made for these pages.
    pub(super) fn insert(&self, at: ExtentAt, zero: u64) {
        self.pages.set_mask(at, zero);
    }

    /// These pages are sent by another encoding.
    pub(super) fn remove(&self, at: ExtentAt, pages: u64) {
        let _known = self.pages.take_mask(at, pages);
    }

    /// This page is sent by another encoding.
    pub(super) fn remove_page(&self, at: PageAt) {
        let (extent, page) = locate(at);
        self.remove(extent, page);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stage::testing::{layout, page_size};

    const FIRST: ExtentAt = ExtentAt { block: 0, extent: 0 };
    const LAST: ExtentAt = ExtentAt { block: 1, extent: 1 };

    fn known() -> KnownZero {
        let known = KnownZero::new(&layout(page_size(4), &[64 * 4096, 100 * 4096]));
        known.insert(FIRST, 0b1111);
        known.insert(LAST, 0b1111);
        known
    }

    #[test]
    fn pages_that_are_put_back_are_forgotten_and_no_others() {
        let known = known();
        let lost = DirtyBitmap::empty(known.pages.layout());
        lost.set_mask(FIRST, 0b1_0110);
        known.forget(&lost);
        assert_eq!([FIRST, LAST].map(|at| known.pages(at)), [0b1001, 0b1111]);
        assert_eq!([0, 1].map(|page| known.contains(FIRST.page(page))), [true, false]);
        assert_eq!(lost.peek(FIRST), 0b1_0110, "what is sent again stays dirty");
    }

    #[test]
    fn a_switch_forgets_all_pages_and_zero_frames_set_them_again() {
        let known = known();
        known.forget_all();
        assert_eq!([FIRST, LAST].map(|at| known.pages(at)), [0, 0]);
        known.insert(LAST, 0b110);
        known.remove_page(LAST.page(2));
        assert_eq!(known.pages(LAST), 0b10);
    }
}
