//! The XBZRLE cache of one lane: copies of pages as the destination holds them (law 6).
//!
//! A page may lie in one of eight slots: two groups of four neighbours, found by two hashes of its place. The least used
//! group takes a page as long as it has a free slot, which fills the cache nearly to its end before pages have to
//! compete; then the oldest of the eight gives way, if it is old enough. Each slot has its page of memory from its
//! first use on; memory is taken in chunks, as pages come in.

use std::ops::Range;

use crate::geometry::{PageAt, PageSize};

/// Slots of a group.
const GROUP: usize = 4;
/// Bytes of a chunk of page memory.
const CHUNK_BYTES: usize = 2 << 20;
/// A page used in round g may be replaced from round g + 2 on.
const LIFETIME: u32 = 2;

/// Copies of pages, bounded in bytes, replaced by age. Owned by one lane's encoder: no locks.
#[derive(Debug)]
pub struct XbzrleCache {
    slots: Vec<Slot>,
    memory: PageMemory,
}

/// One place for a page.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    /// The page's key; 0 while the slot is free.
    key: u64,
    /// The last round it was used in.
    round: u32,
    /// Its memory, counted from 1; 0 before its first use.
    memory: u32,
}

impl XbzrleCache {
    /// A cache that keeps at most `bytes`, its own bookkeeping included. Memory is used as pages come in. One that has no
    /// room for a page keeps nothing.
    #[must_use]
    pub fn new(page_size: PageSize, bytes: u64) -> Self {
        let page = page_size.bytes();
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        let chunk_entry = size_of::<Vec<u8>>();
        // The table of chunks grows by a rounded-up entry for each chunk that is begun.
        let slots =
            bytes.saturating_sub(chunk_entry) / (page + size_of::<Slot>() + chunk_entry.div_ceil(CHUNK_BYTES / page));
        let slots = slots.min(u32::MAX as usize);
        Self { slots: vec![Slot::default(); slots], memory: PageMemory::new(page, slots) }
    }

    /// The copy of a page, to encode against and to overwrite with what is sent; marks it as used in `round`.
    pub fn get(&mut self, at: PageAt, round: u32) -> Option<&mut [u8]> {
        let slot = self.find(at)?;
        let slot = &mut self.slots[slot];
        slot.round = round;
        Some(self.memory.page(slot.memory))
    }

    /// Keeps a copy of what was sent for a page, if its place is free or holds a page that was not used in `round` or the
    /// round before. Returns whether it is kept.
    ///
    /// # Panics
    /// If `page` is not of the cache's page size.
    pub fn insert(&mut self, at: PageAt, page: &[u8], round: u32) -> bool {
        let Some(slot) = self.find(at).or_else(|| self.place(at, round)) else { return false };
        let slot = &mut self.slots[slot];
        if slot.memory == 0 {
            slot.memory = self.memory.take();
        }
        (slot.key, slot.round) = (key(at), round);
        self.memory.page(slot.memory).copy_from_slice(page);
        true
    }

    /// Forgets a page.
    pub fn remove(&mut self, at: PageAt) {
        if let Some(slot) = self.find(at) {
            self.slots[slot].key = 0;
        }
    }

    /// The most bytes it takes.
    #[must_use]
    pub fn bound_bytes(&self) -> u64 {
        (size_of_val(&self.slots[..]) + self.memory.bound_bytes()) as u64
    }

    /// Bytes it takes now (it never shrinks before its end).
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        (size_of_val(&self.slots[..]) + self.memory.bytes()) as u64
    }

    /// The slot that holds a page.
    fn find(&self, at: PageAt) -> Option<usize> {
        let key = key(at);
        self.groups(key).into_iter().flatten().find(|&slot| self.slots[slot].key == key)
    }

    /// The slot that may take a page that is in none: a free one of the emptier group, else the oldest of both.
    fn place(&self, at: PageAt, round: u32) -> Option<usize> {
        let free = |slot: &usize| self.slots[*slot].key == 0;
        let [one, two] = self.groups(key(at));
        let emptier = if one.clone().filter(free).count() >= two.clone().filter(free).count() { &one } else { &two };
        if let Some(slot) = emptier.clone().find(free) {
            return Some(slot);
        }
        let oldest = one.chain(two).min_by_key(|&slot| self.slots[slot].round)?;
        (self.slots[oldest].round.saturating_add(LIFETIME) <= round).then_some(oldest)
    }

    /// The two groups of slots in which a page may lie. They may overlap; in a cache of few slots they do.
    fn groups(&self, key: u64) -> [Range<usize>; 2] {
        let length = GROUP.min(self.slots.len());
        let starts = (self.slots.len() - length + 1) as u64;
        let hash = mix(key);
        [hash & 0xffff_ffff, hash >> 32].map(|hash| {
            let start = usize::try_from((hash * starts) >> 32).expect("an index of a slot");
            start..start + length
        })
    }
}

/// A page as one number other than 0: a block has at most 2^38 pages, a guest at most 2^10 blocks.
fn key(at: PageAt) -> u64 {
    ((u64::from(at.block) + 1) << 38) | at.page
}

/// Spreads a key over 64 bits, so that pages dealt to one lane spread over its slots.
fn mix(key: u64) -> u64 {
    let product = u128::from(key ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93_a076_1d64_78bd_642f;
    let product = product ^ (product >> 64);
    #[expect(clippy::cast_possible_truncation, reason = "the lower half is wanted")]
    let half = product as u64;
    half
}

/// Memory for a number of pages, taken in chunks as pages are asked for.
#[derive(Debug)]
struct PageMemory {
    page_bytes: usize,
    pages: usize,
    taken: usize,
    chunks: Vec<Vec<u8>>,
}

impl PageMemory {
    fn new(page_bytes: usize, pages: usize) -> Self {
        let chunks = Vec::with_capacity(pages.div_ceil(CHUNK_BYTES / page_bytes));
        Self { page_bytes, pages, taken: 0, chunks }
    }

    /// The next page that was not taken yet, as its number from 1.
    fn take(&mut self) -> u32 {
        assert!(self.taken < self.pages, "all {} pages are taken", self.pages);
        let chunk_pages = CHUNK_BYTES / self.page_bytes;
        if self.taken.is_multiple_of(chunk_pages) {
            let pages = chunk_pages.min(self.pages - self.taken);
            self.chunks.push(vec![0; pages * self.page_bytes]);
        }
        self.taken += 1;
        u32::try_from(self.taken).expect("no more pages than a u32 counts")
    }

    /// A page by its number from 1.
    fn page(&mut self, number: u32) -> &mut [u8] {
        let chunk_pages = CHUNK_BYTES / self.page_bytes;
        let index = number as usize - 1;
        let (chunk, start) = (index / chunk_pages, index % chunk_pages * self.page_bytes);
        &mut self.chunks[chunk][start..start + self.page_bytes]
    }

    fn bound_bytes(&self) -> usize {
        self.pages * self.page_bytes + self.chunks.capacity() * size_of::<Vec<u8>>()
    }

    fn bytes(&self) -> usize {
        self.chunks.iter().map(Vec::len).sum::<usize>() + self.chunks.capacity() * size_of::<Vec<u8>>()
    }
}
