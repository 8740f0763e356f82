//! Page hashes: the hash of each page as the source has sent it, or as the destination has loaded it.
//!
//! ```text
//!  SOURCE                                           DESTINATION
//!  encoder ── hash of the copy that is sent ──▶ ┐   loader ── hash of the page that is written ──▶ ┐
//!                                  PageHashes ◀─┘                                     PageHashes ◀─┘
//!  check ── memory, again ──▶ equal?                check ── memory, again ──▶ equal?
//!                     sum of each stretch ════════▶ equal?
//! ```
//!
//! Each end has one hash a page, recorded while the page is in the processor's cache, so that a paused guest waits for the hashes of
//! the last round's pages alone. A stretch has the sum of the products of its pages' hashes and an odd number for each page's place
//! (multilinear hashing, Carter and Wegman 1979), modulo 2^64. The sum is updated with every page, so the comparison of two guests
//! reads eight bytes a stretch. A single page that differs always changes it; several go unnoticed with a probability of 2^-64.
//!
//! **The check** reads memory again in the background, extent by extent, and compares it with the hashes. Where a guest runs, a page may
//! differ because it was just written, and will be sent again. So a difference is only noted, and a page that is recorded again, or found
//! equal later, loses its note. When memory rests, [`PageHashes::first_difference`] reads the noted pages once more: what differs then,
//! and is not to be sent, is wrong. At a source it was written without a dirty log that reported it; at a destination something else
//! than the loader wrote it.
//!
//! Pages that were never read, because they were untouched, are not checked: reading a hole may allocate memory.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use serde::{Deserialize, Serialize};

use crate::batch::page_hash;
use crate::bitmap::DirtyBitmap;
use crate::digest::STRETCH_WORDS;
use crate::geometry::{ExtentAt, Layout, PageAt, bits};
use crate::memory::{GuestMemory, ZEROS};
use crate::pool::PooledBuffer;

/// The hash of a page that has none.
const NONE: u64 = 0;

/// The hashes of a guest's pages. See the [module](self). Shared by reference: a page is recorded by one thread at a time, its lane's
/// (ARCHITECTURE.md, law 4), and all else may happen meanwhile on another.
#[derive(Debug)]
pub struct PageHashes {
    layout: Layout,
    /// The hash of a zero page.
    zero: u64,
    blocks: Vec<Block>,
    /// Pages that have a hash and may be read.
    readable: DirtyBitmap,
    /// Those of them that equalled their hash when they were last checked.
    checked: DirtyBitmap,
    /// Those of them that did not.
    differing: DirtyBitmap,
}

#[derive(Debug)]
struct Block {
    /// By page; 0 where none is recorded.
    hashes: Box<[AtomicU64]>,
    /// By stretch.
    sums: Box<[AtomicU64]>,
}

/// How many pages a check has covered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Coverage {
    /// Pages whose memory equalled their hash when they were last checked, after they were last recorded.
    #[serde(rename = "pages")]
    pub checked: u64,
    /// Pages that can be checked.
    pub of: u64,
}

impl PageHashes {
    /// No hashes yet. Memory is taken where they are recorded.
    #[must_use]
    pub fn new(layout: &Layout) -> Self {
        let block =
            |block| Block { hashes: zeroed(layout.block_pages(block)), sums: zeroed(layout.block_stretches(block)) };
        Self {
            zero: page_hash(&ZEROS[..layout.page_size().bytes()]),
            blocks: (0..layout.block_count()).map(block).collect(),
            readable: DirtyBitmap::empty(layout),
            checked: DirtyBitmap::empty(layout),
            differing: DirtyBitmap::empty(layout),
            layout: layout.clone(),
        }
    }

    /// The most bytes of memory that the hashes of a guest of this layout take.
    #[must_use]
    pub fn bytes_of(layout: &Layout) -> u64 {
        let words = |block| layout.block_pages(block) + layout.block_stretches(block);
        let words: u64 = (0..layout.block_count()).map(words).sum();
        words * size_of::<AtomicU64>() as u64 + 3 * DirtyBitmap::bytes_of(layout)
    }

    /// Records the pages of `mask`: those of `zero` are zero, and `hashes` are the [`page_hash`]es of the others, lowest first. Those of
    /// `readable` may be read again by a check.
    ///
    /// # Panics
    /// If a page is not of the layout, or there are fewer hashes than pages that are not zero.
    pub fn record(&self, at: ExtentAt, mask: u64, zero: u64, readable: u64, hashes: impl IntoIterator<Item = u64>) {
        let block = &self.blocks[at.block as usize];
        let mut hashes = hashes.into_iter();
        let mut added = 0_u64;
        for bit in bits(mask) {
            let hash = if zero >> bit & 1 == 1 { self.zero } else { hashes.next().expect("a hash for each page") };
            let page = at.page(bit).page;
            let place = &block.hashes[index(page)];
            let before = place.load(Ordering::Relaxed);
            if before != hash {
                place.store(hash, Ordering::Relaxed);
                added = added.wrapping_add(hash.wrapping_sub(before).wrapping_mul(factor(page)));
            }
        }
        let stretch = u64::from(at.extent) / self.layout.page_size().stretch_extents();
        block.sums[index(stretch)].fetch_add(added, Ordering::Relaxed);
        self.readable.set_mask(at, mask & readable);
        let _not_read_any_more = self.readable.take_mask(at, mask & !readable);
        // A check that does not see the hashes above has its notes removed here: see `check`.
        fence(Ordering::SeqCst);
        for notes in [&self.checked, &self.differing] {
            let _outdated = notes.take_mask(at, mask);
        }
    }

    /// Forgets the hashes of all pages that are set in `lost`: they are sent again.
    ///
    /// # Panics
    /// If `lost` is of another layout.
    pub fn forget(&self, lost: &DirtyBitmap) {
        for at in lost.all_dirty_extents() {
            let mask = lost.peek(at);
            self.record(at, mask, 0, 0, bits(mask).map(|_| NONE));
        }
    }

    /// The sum of a stretch without some of its pages, extent by extent. To be read when nothing is recorded.
    ///
    /// # Panics
    /// If there is no such stretch.
    #[must_use]
    pub fn stretch_sum(&self, block: u32, stretch: u64, left_out: &[u64; STRETCH_WORDS]) -> u64 {
        let block_hashes = &self.blocks[block as usize];
        let mut sum = block_hashes.sums[index(stretch)].load(Ordering::Relaxed);
        for (at, left_out) in self.layout.stretch_extents(block, stretch).zip(left_out) {
            for page in bits(*left_out).map(|bit| at.page(bit).page) {
                let hash = block_hashes.hashes[index(page)].load(Ordering::Relaxed);
                sum = sum.wrapping_sub(hash.wrapping_mul(factor(page)));
            }
        }
        sum
    }

    /// The hash of each page of a stretch; 0 for a page that is left out or was never recorded.
    ///
    /// # Panics
    /// If there is no such stretch.
    #[must_use]
    pub fn of_stretch(&self, block: u32, stretch: u64, left_out: &[u64; STRETCH_WORDS]) -> Vec<u64> {
        let of_extent = |(at, left_out): (ExtentAt, &u64)| {
            let left_out = *left_out;
            let hash = move |bit| if left_out >> bit & 1 == 1 { 0 } else { self.hash(at.page(bit)) };
            bits(self.layout.valid_mask(at)).map(hash)
        };
        self.layout.stretch_extents(block, stretch).zip(left_out).flat_map(of_extent).collect()
    }

    /// Pages of an extent that a check may read.
    #[must_use]
    pub fn readable(&self, at: ExtentAt) -> u64 {
        self.readable.peek(at)
    }

    /// Every extent.
    pub fn all_extents(&self) -> impl Iterator<Item = ExtentAt> + use<'_> {
        self.readable.extents()
    }

    /// Reads the pages of `mask` again, as far as they are readable, and notes whether they equal their hashes. `scratch` holds an extent.
    ///
    /// # Errors
    /// When the memory cannot be read.
    pub fn check(&self, memory: &GuestMemory, at: ExtentAt, mask: u64, scratch: &mut PooledBuffer) -> io::Result<()> {
        let mask = mask & self.readable.peek(at);
        let mut before = [0; u64::BITS as usize];
        bits(mask).for_each(|bit| before[bit as usize] = self.hash(at.page(bit)));
        let mut equal = 0;
        self.each_page(memory, at, mask, scratch, |bit, hash| equal |= u64::from(hash == before[bit as usize]) << bit)?;
        self.checked.set_mask(at, equal);
        self.differing.set_mask(at, mask & !equal);
        let _equal_again = self.differing.take_mask(at, equal);
        let _differs_again = self.checked.take_mask(at, mask & !equal);
        // What is recorded from here on removes its notes; what was recorded before is seen here.
        fence(Ordering::SeqCst);
        let recorded = bits(mask).filter(|&bit| self.hash(at.page(bit)) != before[bit as usize]);
        let recorded = recorded.fold(0, |all, bit| all | 1 << bit);
        for notes in [&self.checked, &self.differing] {
            let _outdated = notes.take_mask(at, recorded);
        }
        Ok(())
    }

    /// The first page that a check found different, and that still is, except those for which `skip` has a bit. Memory rests, and nothing
    /// is recorded. `scratch` holds an extent.
    ///
    /// # Errors
    /// When the memory cannot be read.
    pub fn first_difference(
        &self,
        memory: &GuestMemory,
        skip: impl Fn(ExtentAt) -> u64,
        scratch: &mut PooledBuffer,
    ) -> io::Result<Option<PageAt>> {
        for at in self.differing.all_dirty_extents() {
            let mut differs = None;
            let mask = self.differing.peek(at) & !skip(at);
            self.each_page(memory, at, mask, scratch, |bit, hash| {
                if differs.is_none() && hash != self.hash(at.page(bit)) {
                    differs = Some(at.page(bit));
                }
            })?;
            if differs.is_some() {
                return Ok(differs);
            }
        }
        Ok(None)
    }

    /// How much a check has covered. Two sweeps over bitmaps.
    #[must_use]
    pub fn coverage(&self) -> Coverage {
        Coverage { checked: self.checked.count(), of: self.readable.count() }
    }

    /// Whether a check has noted a difference at this page.
    #[cfg(test)]
    fn is_noted(&self, page: PageAt) -> bool {
        let (at, mask) = crate::bitmap::locate(page);
        self.differing.peek(at) & mask != 0
    }

    /// Reads pages of an extent, and gives the hash of each.
    fn each_page(
        &self,
        memory: &GuestMemory,
        at: ExtentAt,
        mask: u64,
        scratch: &mut PooledBuffer,
        mut use_hash: impl FnMut(u32, u64),
    ) -> io::Result<()> {
        if mask == 0 {
            return Ok(());
        }
        let size = memory.page_size();
        let zero = memory.block(at.block).memory.read_extent(size, at.first_page(), mask, scratch)?;
        let mut read = scratch.chunks_exact(size.bytes());
        for bit in bits(mask) {
            let is_zero = zero >> bit & 1 == 1;
            use_hash(bit, if is_zero { self.zero } else { page_hash(read.next().expect("it was read")) });
        }
        Ok(())
    }

    fn hash(&self, page: PageAt) -> u64 {
        self.blocks[page.block as usize].hashes[index(page.page)].load(Ordering::Relaxed)
    }
}

/// The odd number of a page's place: a finalizer of splitmix64, so that neighbours differ in most bits.
fn factor(page: u64) -> u64 {
    let mut mixed = page.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed ^ mixed >> 31) | 1
}

/// Zeroed memory, which the kernel backs on first touch, is made atomic in place.
fn zeroed(words: u64) -> Box<[AtomicU64]> {
    vec![0; index(words)].into_iter().map(AtomicU64::new).collect()
}

fn index(number: u64) -> usize {
    usize::try_from(number).expect("a guest's pages can be counted")
}

#[cfg(test)]
mod tests;
