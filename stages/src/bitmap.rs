//! The dirty bitmap: one atomic word per extent, the single source of truth (law 1).
//!
//! A set bit says that the page must be sent. Writers of bits (dirty logs, marks) set with Release after their store;
//! the scanner takes a whole word with one Acquire swap, so that a bit set later belongs to the next round (law 2).
//! Bits beyond a block's last page are never set. The same type serves wherever a bit per page is kept: a log's own
//! pending bits, the pages a destination holds, the pages known to be untouched.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::geometry::{EXTENT_PAGES, ExtentAt, Layout, PageAt, run_mask};

/// One bit for each page of a layout. Shared by reference; all methods may be called from any thread.
#[derive(Debug)]
pub struct DirtyBitmap {
    layout: Layout,
    blocks: Vec<Box<[AtomicU64]>>,
}

impl DirtyBitmap {
    /// A bitmap with no bit set.
    #[must_use]
    pub fn empty(layout: &Layout) -> Self {
        let words = |block| (0..layout.block_extents(block)).map(|_| AtomicU64::new(0)).collect();
        Self { blocks: (0..layout.block_count()).map(words).collect(), layout: layout.clone() }
    }

    /// A bitmap with the bit of every page set: how a migration starts.
    #[must_use]
    pub fn filled(layout: &Layout) -> Self {
        let bitmap = Self::empty(layout);
        for at in bitmap.extents() {
            bitmap.set_mask(at, layout.valid_mask(at));
        }
        bitmap
    }

    /// The layout whose pages the bits stand for.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Every extent, block by block.
    pub fn extents(&self) -> impl Iterator<Item = ExtentAt> + use<'_> {
        let of_block = |block| (0..self.layout.block_extents(block)).map(move |extent| ExtentAt { block, extent });
        (0..self.layout.block_count()).flat_map(of_block)
    }

    /// Takes the word of an extent: its bits are returned and cleared in one step (Acquire). A clean word costs a plain
    /// load.
    ///
    /// # Panics
    /// If the extent is not of this layout.
    #[must_use]
    pub fn take(&self, at: ExtentAt) -> u64 {
        let word = self.word(at);
        if word.load(Ordering::Relaxed) == 0 { 0 } else { word.swap(0, Ordering::Acquire) }
    }

    /// Takes only the bits of `mask`: they are returned and cleared, others stay (Acquire).
    ///
    /// # Panics
    /// If the extent is not of this layout.
    #[must_use]
    pub fn take_mask(&self, at: ExtentAt, mask: u64) -> u64 {
        let word = self.word(at);
        if word.load(Ordering::Relaxed) & mask == 0 { 0 } else { word.fetch_and(!mask, Ordering::Acquire) & mask }
    }

    /// The word of an extent as it is.
    ///
    /// # Panics
    /// If the extent is not of this layout.
    #[must_use]
    pub fn peek(&self, at: ExtentAt) -> u64 {
        self.word(at).load(Ordering::Acquire)
    }

    /// Sets the bits of `mask` (Release) and returns those that were clear before.
    ///
    /// # Panics
    /// If the extent is not of this layout or the mask has a bit beyond the block's last page.
    pub fn set_mask(&self, at: ExtentAt, mask: u64) -> u64 {
        if mask == 0 {
            return 0;
        }
        let valid = self.layout.valid_mask(at);
        assert_eq!(mask & !valid, 0, "bits beyond the end of block {} in extent {}", at.block, at.extent);
        mask & !self.word(at).fetch_or(mask, Ordering::Release)
    }

    /// Sets the bit of one page (Release): true if it was clear.
    ///
    /// # Panics
    /// If the page is not of this layout.
    pub fn set(&self, at: PageAt) -> bool {
        let (extent, mask) = locate(at);
        self.set_mask(extent, mask) != 0
    }

    /// Is the bit of a page set?
    ///
    /// # Panics
    /// If the page is not of this layout.
    #[must_use]
    pub fn is_set(&self, at: PageAt) -> bool {
        let (extent, mask) = locate(at);
        self.peek(extent) & mask != 0
    }

    /// Sets the bits of a range of pages of a block.
    ///
    /// # Panics
    /// If the range reaches beyond the block.
    pub fn set_range(&self, block: u32, pages: Range<u64>) {
        for (at, mask) in words_of(block, pages) {
            self.set_mask(at, mask);
        }
    }

    /// Clears the bits of a range of pages of a block, and returns how many were set.
    ///
    /// # Panics
    /// If the range reaches beyond the block.
    pub fn clear_range(&self, block: u32, pages: Range<u64>) -> u64 {
        words_of(block, pages).map(|(at, mask)| u64::from(self.take_mask(at, mask).count_ones())).sum()
    }

    /// How many bits are set. One sweep over the words.
    #[must_use]
    pub fn count(&self) -> u64 {
        let ones = |word: &AtomicU64| u64::from(word.load(Ordering::Relaxed).count_ones());
        self.blocks.iter().flat_map(|words| words.iter()).map(ones).sum()
    }

    /// Bytes this bitmap keeps in memory.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.blocks.iter().map(|words| std::mem::size_of_val(&words[..]) as u64).sum()
    }

    fn word(&self, at: ExtentAt) -> &AtomicU64 {
        &self.blocks[at.block as usize][at.extent as usize]
    }
}

/// The extent of a page, and its bit there.
fn locate(at: PageAt) -> (ExtentAt, u64) {
    let extent = u32::try_from(at.page / EXTENT_PAGES).expect("a page of the layout");
    (ExtentAt { block: at.block, extent }, 1 << (at.page % EXTENT_PAGES))
}

/// A range of pages, word by word: each extent with the mask of its pages in the range.
pub fn words_of(block: u32, pages: Range<u64>) -> impl Iterator<Item = (ExtentAt, u64)> {
    let mut page = pages.start;
    std::iter::from_fn(move || {
        if page >= pages.end {
            return None;
        }
        let (at, _) = locate(PageAt { block, page });
        let first = page % EXTENT_PAGES;
        let length = (EXTENT_PAGES - first).min(pages.end - page);
        page += length;
        #[expect(clippy::cast_possible_truncation, reason = "both are at most 64")]
        Some((at, run_mask(first as u32, length as u32)))
    })
}
