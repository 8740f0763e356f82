//! The dirty bitmap: one atomic word per extent, the single source of truth (ARCHITECTURE.md, law 1: the bitmap
//! is the truth).
//!
//! A set bit means that the page must be sent. Writers of bits (dirty logs, marks) set with Release after their store; the
//! scanner takes a whole word with one Acquire swap, so that a bit set later belongs to the next round (law 2: clear, then
//! re-arm, then read). Bits beyond a block's last page are never set. The same type serves for every set of pages: a log's own
//! pending bits, the pages that a destination has received, the pages known to be untouched.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::geometry::{EXTENT_PAGES, ExtentAt, Layout, PageAt, run_mask, runs};

/// Words that are tested together when clean ones are skipped: a cache line.
const LINE: usize = 8;

/// One bit for each page of a layout. Shared by reference; all methods may be called from any thread.
#[derive(Debug)]
pub struct DirtyBitmap {
    layout: Layout,
    blocks: Vec<Block>,
}

/// The words of one block.
#[derive(Debug)]
struct Block {
    words: Box<[AtomicU64]>,
    /// The bits of the last word that stand for pages; in all others each does.
    last: u64,
}

impl DirtyBitmap {
    /// A bitmap with no bit set. It takes memory where bits are set, and only there.
    #[must_use]
    pub fn empty(layout: &Layout) -> Self {
        Self::of(layout, 0)
    }

    /// A bitmap with the bit of every page set, as a migration starts with.
    #[must_use]
    pub fn filled(layout: &Layout) -> Self {
        Self::of(layout, u64::MAX)
    }

    /// A bitmap of words like this one.
    fn of(layout: &Layout, word: u64) -> Self {
        let block = |block| {
            let extents = layout.block_extents(block);
            let last = layout.valid_mask(ExtentAt { block, extent: extents - 1 });
            // Zeroed memory, which the kernel backs on first touch, is made atomic in place.
            let mut words = vec![word; extents as usize];
            if word & !last != 0 {
                words[extents as usize - 1] = word & last;
            }
            Block { words: words.into_iter().map(AtomicU64::new).collect(), last }
        };
        Self { blocks: (0..layout.block_count()).map(block).collect(), layout: layout.clone() }
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

    /// The extents of a range that have a bit set when the iterator reaches them, ascending. Words between them cost a
    /// plain load each, a cache line at a time.
    ///
    /// # Panics
    /// If the extents reach beyond the block.
    pub fn dirty_extents(&self, block: u32, extents: Range<u32>) -> impl Iterator<Item = ExtentAt> + use<'_> {
        let (start, words) = (extents.start, self.words(block, extents));
        let mut next = 0;
        std::iter::from_fn(move || {
            let found = next + first_dirty(&words[next..])?;
            next = found + 1;
            #[expect(clippy::cast_possible_truncation, reason = "a block has at most 2^32 extents")]
            Some(ExtentAt { block, extent: start + found as u32 })
        })
    }

    /// [`DirtyBitmap::dirty_extents`] of all blocks.
    pub fn all_dirty_extents(&self) -> impl Iterator<Item = ExtentAt> + use<'_> {
        let of_block = |block| self.dirty_extents(block, 0..self.layout.block_extents(block));
        (0..self.layout.block_count()).flat_map(of_block)
    }

    /// The runs of set bits of a block as ranges of pages, ascending. A run does not end with an extent.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn page_runs(&self, block: u32) -> impl Iterator<Item = Range<u64>> + use<'_> {
        let extents = self.dirty_extents(block, 0..self.layout.block_extents(block));
        let of_extent = |at: ExtentAt| {
            runs(self.peek(at)).map(move |(first, count)| {
                let start = at.page(first).page;
                start..start + u64::from(count)
            })
        };
        let mut parts = extents.flat_map(of_extent).peekable();
        std::iter::from_fn(move || {
            let mut run = parts.next()?;
            while let Some(next) = parts.next_if(|next| next.start == run.end) {
                run.end = next.end;
            }
            Some(run)
        })
    }

    /// A bitmap with the same bits.
    #[must_use]
    pub fn copied(&self) -> Self {
        let copy = Self::empty(&self.layout);
        self.all_dirty_extents().for_each(|at| _ = copy.set_mask(at, self.peek(at)));
        copy
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

    /// The word of an extent, unchanged.
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
        let (index, Block { words, last }) = (at.extent as usize, &self.blocks[at.block as usize]);
        let valid = if index + 1 == words.len() { *last } else { u64::MAX };
        assert_eq!(mask & !valid, 0, "bits beyond the end of block {} in extent {}", at.block, at.extent);
        mask & !words[index].fetch_or(mask, Ordering::Release)
    }

    /// Sets the bit of one page (Release): true if it was clear.
    ///
    /// # Panics
    /// If the page is not of this layout.
    pub fn set(&self, at: PageAt) -> bool {
        let (extent, mask) = locate(at);
        self.set_mask(extent, mask) != 0
    }

    /// Whether the bit of a page is set.
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
        (0..self.layout.block_count()).map(|block| self.count_in(block, 0..self.layout.block_extents(block))).sum()
    }

    /// How many bits of some extents of a block are set.
    ///
    /// # Panics
    /// If the extents reach beyond the block.
    #[must_use]
    pub fn count_in(&self, block: u32, extents: Range<u32>) -> u64 {
        let ones = |word: &AtomicU64| u64::from(word.load(Ordering::Relaxed).count_ones());
        let lines = self.words(block, extents).chunks(LINE).filter(|line| !is_clean(line));
        lines.flat_map(|line| line.iter().map(ones)).sum()
    }

    /// Whether no bit is set. Stops at the first that is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.all_dirty_extents().next().is_none()
    }

    /// The most bytes of memory that this bitmap takes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        Self::bytes_of(&self.layout)
    }

    /// The most bytes of memory that a bitmap of this layout takes.
    #[must_use]
    pub fn bytes_of(layout: &Layout) -> u64 {
        let words = |block| u64::from(layout.block_extents(block));
        (0..layout.block_count()).map(words).sum::<u64>() * size_of::<AtomicU64>() as u64
    }

    fn word(&self, at: ExtentAt) -> &AtomicU64 {
        &self.blocks[at.block as usize].words[at.extent as usize]
    }

    fn words(&self, block: u32, extents: Range<u32>) -> &[AtomicU64] {
        &self.blocks[block as usize].words[extents.start as usize..extents.end as usize]
    }
}

/// The first word that has a bit set.
#[inline]
fn first_dirty(words: &[AtomicU64]) -> Option<usize> {
    if words.first()?.load(Ordering::Relaxed) != 0 {
        return Some(0);
    }
    let clean = LINE * words.chunks_exact(LINE).take_while(|line| is_clean(line)).count();
    words[clean..].iter().position(|word| word.load(Ordering::Relaxed) != 0).map(|found| clean + found)
}

#[inline]
fn is_clean(words: &[AtomicU64]) -> bool {
    words.iter().fold(0, |all, word| all | word.load(Ordering::Relaxed)) == 0
}

/// The extent of a page, and its bit there.
pub(crate) fn locate(at: PageAt) -> (ExtentAt, u64) {
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::thread;

    use proptest::prelude::*;

    use super::*;
    use crate::geometry::{BlockInfo, PageSize, bits};
    use crate::stage::testing::{layout as layout_of, page_size};

    const PAGES: [u64; 3] = [130, 64, 3];

    fn layout() -> Layout {
        let block = |(index, pages): (usize, u64)| BlockInfo::new(index.to_string(), pages * 4096 - 1);
        Layout::new(PageSize::DEFAULT, PAGES.into_iter().enumerate().map(block).collect()).unwrap()
    }

    #[derive(Clone, Debug)]
    enum Step {
        Set(PageAt),
        SetRange(u32, Range<u64>),
        ClearRange(u32, Range<u64>),
        Take(ExtentAt),
        TakeMask(ExtentAt, u64),
        SetMask(ExtentAt, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        (0..3u32, any::<u64>(), any::<u64>(), any::<u64>(), 0..6).prop_map(|(block, one, two, mask, kind)| {
            let pages = PAGES[block as usize];
            let (one, two) = (one % pages, two % (pages + 1));
            let at = ExtentAt { block, extent: u32::try_from(one / 64).unwrap() };
            match kind {
                0 => Step::Set(PageAt { block, page: one }),
                1 => Step::SetRange(block, one.min(two)..one.max(two)),
                2 => Step::ClearRange(block, one.min(two)..one.max(two)),
                3 => Step::Take(at),
                4 => Step::TakeMask(at, mask),
                _ => Step::SetMask(at, mask & layout().valid_mask(at)),
            }
        })
    }

    /// The bitmap as a set of pages.
    type Naive = BTreeSet<PageAt>;

    fn remove(naive: &mut Naive, pages: impl Iterator<Item = PageAt>) -> u64 {
        pages.filter(|at| naive.remove(at)).count() as u64
    }

    fn pages_of(at: ExtentAt, mask: u64) -> impl Iterator<Item = PageAt> {
        bits(mask).map(move |bit| at.page(bit))
    }

    proptest! {
        #[test]
        fn a_bitmap_is_a_set_of_pages(steps in prop::collection::vec(step(), 0..60), full: bool) {
            let layout = layout();
            let bitmap = if full { DirtyBitmap::filled(&layout) } else { DirtyBitmap::empty(&layout) };
            let all = bitmap.extents().flat_map(|at| pages_of(at, layout.valid_mask(at)));
            let mut naive: Naive = all.filter(|_| full).collect();
            for step in steps {
                match step {
                    Step::Set(at) => prop_assert_eq!(bitmap.set(at), naive.insert(at)),
                    Step::SetRange(block, pages) => {
                        bitmap.set_range(block, pages.clone());
                        naive.extend(pages.map(|page| PageAt { block, page }));
                    }
                    Step::ClearRange(block, pages) => {
                        let removed = remove(&mut naive, pages.clone().map(|page| PageAt { block, page }));
                        prop_assert_eq!(bitmap.clear_range(block, pages), removed);
                    }
                    Step::Take(at) => {
                        let taken = bitmap.take(at);
                        prop_assert_eq!(remove(&mut naive, pages_of(at, u64::MAX)), u64::from(taken.count_ones()));
                    }
                    Step::TakeMask(at, mask) => {
                        let taken = bitmap.take_mask(at, mask);
                        prop_assert_eq!(taken & !mask, 0);
                        prop_assert_eq!(remove(&mut naive, pages_of(at, mask)), u64::from(taken.count_ones()));
                    }
                    Step::SetMask(at, mask) => {
                        let added = pages_of(at, mask).filter(|&at| naive.insert(at)).count();
                        prop_assert_eq!(bitmap.set_mask(at, mask).count_ones() as usize, added);
                    }
                }
                let kept: Naive = bitmap.extents().flat_map(|at| pages_of(at, bitmap.peek(at))).collect();
                prop_assert_eq!(&kept, &naive);
                prop_assert_eq!(bitmap.count(), naive.len() as u64);
                prop_assert_eq!(bitmap.is_empty(), naive.is_empty());
                for block in 0..3 {
                    let pages = bitmap.page_runs(block).flatten().map(|page| PageAt { block, page });
                    prop_assert!(pages.eq(naive.iter().copied().filter(|at| at.block == block)));
                    prop_assert!(bitmap.page_runs(block).is_sorted_by(|one, two| one.end < two.start));
                }
                prop_assert!(bitmap.copied().extents().all(|at| bitmap.copied().peek(at) == bitmap.peek(at)));
            }
        }

        #[test]
        fn dirty_extents_are_those_with_a_bit_set(
            dirty in prop::collection::vec((0..2u32, 0..100u32), 0..40), block in 0..2u32, start in 0..=100u32, end in 0..=100u32,
        ) {
            let bitmap = DirtyBitmap::empty(&layout_of(page_size(4), &[100 * 64 * 4096; 2]));
            let at = |&(block, extent): &(u32, u32)| ExtentAt { block, extent };
            dirty.iter().map(at).for_each(|at| _ = bitmap.set_mask(at, 1 << (at.extent % 64)));
            let naive: BTreeSet<_> = dirty.iter().map(at).collect();
            prop_assert!(bitmap.all_dirty_extents().eq(naive.iter().copied()));
            let (start, end) = (start.min(end), start.max(end));
            let here = |at: &&ExtentAt| at.block == block && (start..end).contains(&at.extent);
            prop_assert!(bitmap.dirty_extents(block, start..end).eq(naive.iter().filter(here).copied()));
            prop_assert_eq!(bitmap.count_in(block, start..end), naive.iter().filter(here).count() as u64);
        }

        #[test]
        fn words_of_a_range_are_its_pages(start in 0..300u64, length in 0..300u64) {
            let words = words_of(7, start..start + length);
            let pages: Vec<_> = words.flat_map(|(at, mask)| pages_of(at, mask)).collect();
            let expected: Vec<_> = (start..start + length).map(|page| PageAt { block: 7, page }).collect();
            prop_assert_eq!(pages, expected);
        }
    }

    #[test]
    #[should_panic(expected = "bits beyond the end of block 2")]
    fn a_bit_beyond_the_last_page_is_our_own_mistake() {
        DirtyBitmap::empty(&layout()).set(PageAt { block: 2, page: 3 });
    }

    #[test]
    fn a_bit_set_by_one_thread_is_taken_once_by_another_with_what_was_stored_before() {
        const TIMES: u64 = 20_000;
        let bitmap = DirtyBitmap::empty(&layout());
        let stored: Vec<_> = (0..64).map(|_| AtomicU64::new(0)).collect();
        let at = ExtentAt { block: 0, extent: 0 };
        thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for time in 1..=TIMES {
                    let page = time % 64;
                    stored[usize::try_from(page).unwrap()].store(time, Ordering::Relaxed);
                    bitmap.set(PageAt { block: 0, page });
                }
            });
            let mut seen = [0; 64];
            loop {
                let finished = writer.is_finished();
                for bit in bits(bitmap.take(at)) {
                    seen[bit as usize] = stored[bit as usize].load(Ordering::Relaxed);
                }
                if finished {
                    break;
                }
            }
            let last = stored.iter().map(|time| time.load(Ordering::Relaxed));
            assert!(last.eq(seen), "a store was not followed by a bit that was taken");
        });
    }
}
