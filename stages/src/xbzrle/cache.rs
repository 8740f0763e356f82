//! The XBZRLE cache of one lane: copies of pages as the destination holds them (ARCHITECTURE.md, law 6: the delta's reference is
//! what the destination holds).
//!
//! A page may lie in one of sixteen slots: two groups of eight neighbours, found by two hashes of its place. The group with more
//! free slots takes a page: so nine tenths of the cache fill before more than one page in a hundred is rejected, where a single
//! group of four would fill three tenths. If both are full, the page replaces the oldest of the sixteen, if that is old enough.
//! Each slot has its page of memory from its first use on.
//!
//! Its size may change at any time. Cached pages keep their memory and are placed again, the most recently used first; where the
//! cache shrinks, pages without a slot are dropped, and their memory returns to the host.

use std::cmp::Reverse;
use std::fmt;
use std::ops::Range;
use std::{mem, slice};

use crate::geometry::{PageAt, PageSize};
use crate::memory::MappedMemory;

/// Slots of a group.
const GROUP: usize = 8;
/// Bytes of a huge page, which the kernel may back at once.
const HUGE_BYTES: usize = 2 << 20;
/// Mappings that a cache begins with.
const CHUNKS: usize = 8;
/// The largest mapping, of which a process may have some ten thousand.
const MOST_CHUNK_BYTES: usize = 64 << 20;
/// A page used in round g may be replaced from round g + 2 on.
const LIFETIME: u32 = 2;

/// Copies of pages, bounded in bytes, replaced by age. Owned by one lane's encoder: no locks.
pub struct XbzrleCache {
    slots: Vec<Slot>,
    memory: PageMemory,
}

impl fmt::Debug for XbzrleCache {
    /// Sizes only, since its content is guest memory.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (slots, bytes) = (self.slots.len(), self.memory_bytes());
        f.debug_struct("XbzrleCache").field("slots", &slots).field("memory_bytes", &bytes).finish_non_exhaustive()
    }
}

/// One place for a page.
#[derive(Clone, Copy, Default)]
struct Slot {
    /// The page's key; 0 while the slot is free.
    key: u64,
    /// The last round it was used in.
    round: u32,
    /// Its memory, counted from 1; 0 before its first use.
    memory: u32,
}

impl XbzrleCache {
    /// A cache of at most `bytes`, its own bookkeeping included. Memory is allocated as pages come in. One that has no
    /// room for a page stays empty.
    #[must_use]
    pub fn new(page_size: PageSize, bytes: u64) -> Self {
        let page = page_size.bytes();
        let slots = slots_in(bytes, page);
        Self { slots: vec![Slot::default(); slots], memory: PageMemory::new(page, slots) }
    }

    /// Limits it to `bytes`. Pages are dropped only where slots are missing, the oldest first. This takes time for each cached
    /// page, and a second list of slots meanwhile.
    pub fn resize(&mut self, bytes: u64) {
        let slots = slots_in(bytes, self.memory.page_bytes);
        if slots == self.slots.len() {
            return;
        }
        let mut held = mem::replace(&mut self.slots, vec![Slot::default(); slots]);
        held.retain(|slot| slot.key != 0);
        held.sort_unstable_by_key(|slot| Reverse(slot.round));
        for slot in held {
            if let Some(place) = self.free_place(slot.key) {
                self.slots[place] = slot;
            }
        }
        self.give_memory(slots);
        self.memory.resize(slots);
    }

    /// Assigns memory after slots were filled again: each page of memory up to `most` belongs to one slot, and no slot has another.
    fn give_memory(&mut self, most: usize) {
        let mut is_owned = vec![false; most.min(self.memory.taken)];
        for index in self.slots.iter().filter_map(|slot| (slot.memory as usize).checked_sub(1)) {
            is_owned.get_mut(index).into_iter().for_each(|is_owned| *is_owned = true);
        }
        let mut free = (1..).zip(is_owned).filter_map(|(number, is_owned)| (!is_owned).then_some(number));
        for slot in self.slots.iter_mut().filter(|slot| slot.memory as usize > most) {
            let number = free.next().expect("no more pages than slots are held");
            self.memory.copy(slot.memory, number);
            slot.memory = number;
        }
        let idle = self.slots.iter_mut().filter(|slot| slot.memory == 0);
        idle.zip(free).for_each(|(slot, number)| slot.memory = number);
    }

    /// The copy of a page, to encode against and to overwrite with what is sent; marks it as used in `round`.
    pub fn get(&mut self, at: PageAt, round: u32) -> Option<&mut [u8]> {
        let slot = self.find(at)?;
        let slot = &mut self.slots[slot];
        slot.round = round;
        Some(self.memory.page(slot.memory))
    }

    /// Caches a copy of what was sent for a page, if one of its slots is free or holds a page that was not used in `round` or the
    /// round before. Returns whether it is cached; it is not where the host has no memory for it.
    ///
    /// # Panics
    /// If `page` is not of the cache's page size.
    pub fn insert(&mut self, at: PageAt, page: &[u8], round: u32) -> bool {
        let Some(slot) = self.find(at).or_else(|| self.place(at, round)) else { return false };
        let slot = &mut self.slots[slot];
        if slot.memory == 0 {
            let Some(memory) = self.memory.take() else { return false };
            slot.memory = memory;
        }
        (slot.key, slot.round) = (key(at), round);
        self.memory.page(slot.memory).copy_from_slice(page);
        true
    }

    /// Removes a page.
    pub fn remove(&mut self, at: PageAt) {
        // An encoder removes each zero page of a first round, though no page may have entered yet.
        if self.memory.taken == 0 {
            return;
        }
        if let Some(slot) = self.find(at) {
            self.slots[slot].key = 0;
        }
    }

    /// The most bytes it takes.
    #[must_use]
    pub fn bound_bytes(&self) -> u64 {
        (size_of_val(&self.slots[..]) + self.memory.bound_bytes()) as u64
    }

    /// Bytes it takes now. That shrinks only where it is resized.
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
        let key = key(at);
        self.free_place(key).or_else(|| {
            let oldest = self.groups(key).into_iter().flatten().min_by_key(|&slot| self.slots[slot].round)?;
            (self.slots[oldest].round.saturating_add(LIFETIME) <= round).then_some(oldest)
        })
    }

    /// A free slot of the emptier group.
    fn free_place(&self, key: u64) -> Option<usize> {
        let free = |slot: &usize| self.slots[*slot].key == 0;
        let [one, two] = self.groups(key);
        let mut emptier = if one.clone().filter(free).count() >= two.clone().filter(free).count() { one } else { two };
        emptier.find(free)
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

/// How many slots, with their pages, fit into `bytes`.
fn slots_in(bytes: u64, page_bytes: usize) -> usize {
    let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
    (bytes / (page_bytes + size_of::<Slot>())).min(u32::MAX as usize)
}

/// A page as one number other than 0: a block has at most 2^38 pages, a guest at most 2^10 blocks.
fn key(at: PageAt) -> u64 {
    ((u64::from(at.block) + 1) << 38) | at.page
}

/// Spreads a key over 64 bits, so that the pages of one lane spread over its slots.
fn mix(key: u64) -> u64 {
    let product = u128::from(key ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xd6e8_feb8_6659_fd93_a076_1d64_78bd_642f);
    let product = product ^ (product >> 64);
    #[expect(clippy::cast_possible_truncation, reason = "the lower half is wanted")]
    let half = product as u64;
    half
}

/// Memory for a number of pages, which are taken in order.
///
/// It lies in mappings of some megabytes that the kernel backs as pages are taken, by huge pages where it can: the first
/// touch of small ones costs several times the copy of a page, and more than all other work that the first round does
/// with it. That justifies the `unsafe` here.
struct PageMemory {
    page_bytes: usize,
    pages: usize,
    taken: usize,
    chunk_pages: usize,
    /// The mappings, for the pages that were taken.
    chunks: Vec<MappedMemory>,
}

impl PageMemory {
    fn new(page_bytes: usize, pages: usize) -> Self {
        let chunk_bytes = (pages * page_bytes / CHUNKS).next_power_of_two().clamp(HUGE_BYTES, MOST_CHUNK_BYTES);
        Self { page_bytes, pages, taken: 0, chunk_pages: chunk_bytes / page_bytes, chunks: Vec::new() }
    }

    /// The next page that was not taken yet, as its number from 1; `None` where the host has no room for it.
    fn take(&mut self) -> Option<u32> {
        assert!(self.taken < self.pages, "all {} pages are taken", self.pages);
        if self.taken == self.chunks.len() * self.chunk_pages {
            let chunk = MappedMemory::anonymous(self.chunk_pages * self.page_bytes).ok()?;
            // A host that cannot leave the guest's pages out of core dumps is no error.
            drop(chunk.leave_out_of_dumps());
            self.chunks.push(chunk);
            self.advise_last();
        }
        self.taken += 1;
        Some(u32::try_from(self.taken).expect("no more pages than a u32 counts"))
    }

    /// Huge pages are requested as far as they lie within the bound.
    fn advise_last(&self) {
        let Some(last) = self.chunks.last() else { return };
        let before = (self.chunks.len() - 1) * self.chunk_pages;
        let whole = (self.pages.saturating_sub(before) * self.page_bytes).min(last.len()) / HUGE_BYTES * HUGE_BYTES;
        if whole > 0 {
            // Without huge pages it is slower, but still correct.
            drop(last.advise_huge_up_to(whole));
        }
    }

    /// Limits it to `pages` pages. Pages beyond return to the host, even if they were taken.
    fn resize(&mut self, pages: usize) {
        self.pages = pages;
        self.taken = self.taken.min(pages);
        self.chunks.truncate(self.taken.div_ceil(self.chunk_pages));
        if let Some(last) = self.chunks.last() {
            let used = (self.taken - (self.chunks.len() - 1) * self.chunk_pages) * self.page_bytes;
            // Memory that the kernel does not take back is reused by the pages that are taken next.
            drop(last.give_back(used, last.len() - used));
        }
        self.advise_last();
    }

    /// A page by its number from 1.
    fn page(&mut self, number: u32) -> &mut [u8] {
        let index = number as usize - 1;
        assert!(index < self.taken, "page {index} of {}", self.taken);
        let (chunk, offset) = (&self.chunks[index / self.chunk_pages], index % self.chunk_pages * self.page_bytes);
        assert!(offset + self.page_bytes <= chunk.len(), "a page lies in its chunk");
        // SAFETY: the page lies in the mapping, which reads as zeros at first and has no other users; it is borrowed
        // as long as `self` is.
        unsafe { slice::from_raw_parts_mut(chunk.as_ptr().add(offset), self.page_bytes) }
    }

    fn copy(&mut self, from: u32, to: u32) {
        let page: Box<[u8]> = self.page(from).as_ref().into();
        self.page(to).copy_from_slice(&page);
    }

    fn bound_bytes(&self) -> usize {
        self.pages * self.page_bytes
    }

    /// Whole huge pages.
    fn bytes(&self) -> usize {
        (self.taken * self.page_bytes).next_multiple_of(HUGE_BYTES).min(self.bound_bytes())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const PAGE: PageSize = PageSize::DEFAULT;

    fn at(page: u64) -> PageAt {
        PageAt { block: 0, page }
    }

    fn cache_of(pages: u64) -> XbzrleCache {
        XbzrleCache::new(PAGE, pages * 4200)
    }

    #[derive(Clone, Debug)]
    enum Operation {
        Get(PageAt),
        Overwrite(PageAt, u8),
        Insert(PageAt, u8),
        Remove(PageAt),
        Resize(u64),
        NextRound,
    }

    fn operations() -> impl Strategy<Value = Vec<Operation>> {
        let page = (0..3_u32, 0..20_u64).prop_map(|(block, page)| PageAt { block, page });
        let one = prop_oneof![
            3 => page.clone().prop_map(Operation::Get),
            3 => (page.clone(), any::<u8>()).prop_map(|(at, fill)| Operation::Overwrite(at, fill)),
            8 => (page.clone(), any::<u8>()).prop_map(|(at, fill)| Operation::Insert(at, fill)),
            1 => page.prop_map(Operation::Remove),
            1 => (0..80_000_u64).prop_map(Operation::Resize),
            1 => Just(Operation::NextRound),
        ];
        prop::collection::vec(one, 0..300)
    }

    proptest! {
        /// The model stores what the destination holds and when it was used. The cache may hold fewer pages, never other bytes, and
        /// a page may leave it only when it is removed or old, or when the size changes.
        #[test]
        fn it_holds_what_was_sent_or_nothing(mut bytes in 0..80_000_u64, operations in operations()) {
            let mut cache = XbzrleCache::new(PAGE, bytes);
            let mut sent: HashMap<PageAt, (u8, u32)> = HashMap::new();
            let mut round = LIFETIME;
            for operation in operations {
                match operation {
                    Operation::Get(at) | Operation::Overwrite(at, _) => {
                        let found = cache.get(at, round);
                        let known = sent.get_mut(&at);
                        let Some(page) = found else {
                            prop_assert!(known.is_none_or(|(_, used)| *used + LIFETIME <= round), "{at} was lost");
                            sent.remove(&at);
                            continue;
                        };
                        let (fill, used) = known.expect("a page that was not sent");
                        prop_assert!(page.len() == 4096 && page.iter().all(|byte| byte == fill), "{at} has other bytes");
                        *used = round;
                        if let Operation::Overwrite(_, other) = operation {
                            page.fill(other);
                            *fill = other;
                        }
                    }
                    Operation::Insert(at, fill) => {
                        let known = cache.get(at, round).is_some();
                        let kept = cache.insert(at, &[fill; 4096], round);
                        prop_assert!(kept || !known, "a page that is held is always replaced");
                        prop_assert_eq!(cache.get(at, round).is_some(), kept);
                        if kept { sent.insert(at, (fill, round)); } else { sent.remove(&at); }
                    }
                    Operation::Remove(at) => {
                        cache.remove(at);
                        sent.remove(&at);
                        prop_assert!(cache.get(at, round).is_none());
                    }
                    Operation::Resize(other) => {
                        cache.resize(other);
                        bytes = other;
                        sent.values_mut().for_each(|(_, used)| *used = 0);
                    }
                    Operation::NextRound => round += 1,
                }
                prop_assert!(cache.memory_bytes() <= cache.bound_bytes() && cache.bound_bytes() <= bytes);
            }
        }
    }

    #[test]
    fn a_cache_without_room_for_a_page_keeps_nothing() {
        for bytes in [0, 1, 4095, 4096] {
            let mut cache = XbzrleCache::new(PAGE, bytes);
            assert!(!cache.insert(at(0), &[1; 4096], 1));
            assert!(cache.get(at(0), 1).is_none());
            cache.remove(at(0));
            assert_eq!((cache.memory_bytes(), cache.bound_bytes()), (0, 0));
        }
    }

    #[test]
    fn a_page_is_safe_in_its_round_and_the_next() {
        let mut cache = cache_of(1);
        assert!(cache.insert(at(1), &[1; 4096], 5));
        assert!(!cache.insert(at(2), &[2; 4096], 5));
        assert!(!cache.insert(at(2), &[2; 4096], 6));
        assert!(cache.get(at(1), 6).is_some(), "used in round 6");
        assert!(!cache.insert(at(2), &[2; 4096], 7));
        assert!(cache.insert(at(2), &[2; 4096], 8));
        assert!(cache.get(at(1), 8).is_none());
        assert!(cache.insert(at(2), &[3; 4096], 8), "the same page is always replaced");
        assert_eq!(cache.get(at(2), 8).unwrap()[4095], 3);
    }

    #[test]
    fn the_oldest_gives_way() {
        let mut cache = cache_of(4);
        (0..4_u32).for_each(|page| assert!(cache.insert(at(page.into()), &[1; 4096], 10 - page)));
        assert!(cache.insert(at(9), &[1; 4096], 12));
        let held: Vec<_> = (0..4).map(|page| cache.get(at(page), 12).is_some()).collect();
        assert_eq!(held, [true, true, true, false]);
    }

    #[test]
    fn it_fills_up_with_the_pages_dealt_to_a_lane() {
        for lanes in [1, 2, 3, 4, 7, 64] {
            let mut cache = cache_of(4096);
            let slots = cache.slots.len() as u64;
            let dealt = |number: u64| at(number / 512 * 512 * lanes + number % 512);
            let mut kept = |numbers: Range<u64>| {
                numbers.filter(|&number| cache.insert(dealt(number), &[1; 4096], 1)).count() as u64
            };
            let most = kept(0..slots * 8 / 10);
            let all = most + kept(slots * 8 / 10..slots);
            assert!(most * 100 > slots * 79 && all * 100 > slots * 94, "{most} and {all} of {slots}, {lanes} lanes");
        }
    }

    #[test]
    fn memory_is_taken_as_pages_come_and_page_sizes_differ() {
        for bytes in [4096, 16384, 65536] {
            let page_size = PageSize::new(bytes).unwrap();
            let mut cache = XbzrleCache::new(page_size, 64 << 20);
            let empty = cache.memory_bytes();
            assert!(empty < 1 << 20);
            assert!(cache.bound_bytes() > 63 << 20 && cache.bound_bytes() <= 64 << 20);
            assert!(cache.insert(at(3), &vec![7; page_size.bytes()], 1));
            assert_eq!(cache.memory_bytes(), empty + (2 << 20));
            (0..20_000).for_each(|page| _ = cache.insert(at(page), &vec![7; page_size.bytes()], 1));
            assert!(cache.memory_bytes() <= cache.bound_bytes());
        }
    }

    /// Pages of these numbers, each filled with its own, used in a round of its own: later the higher the number.
    fn filled(cache: &mut XbzrleCache, numbers: Range<u32>) {
        let fill = |number: u32| [number.to_le_bytes()[0]; 4096];
        numbers.for_each(|number| _ = cache.insert(at(number.into()), &fill(number), number));
    }

    /// Which of them are there, and as they were.
    #[track_caller]
    fn found(cache: &mut XbzrleCache, numbers: Range<u32>) -> Vec<u32> {
        let mut is_there = |number: &u32| {
            let found = cache.find(at((*number).into())).map(|slot| cache.slots[slot].memory);
            found
                .inspect(|&memory| assert_eq!(cache.memory.page(memory)[..], [number.to_le_bytes()[0]; 4096]))
                .is_some()
        };
        numbers.filter(|number| is_there(number)).collect()
    }

    #[test]
    fn a_cache_that_grows_keeps_what_it_holds_and_takes_more() {
        let mut cache = cache_of(2000);
        filled(&mut cache, 0..1500);
        let before = found(&mut cache, 0..1500);
        cache.resize(8000 * 4200);
        let kept = found(&mut cache, 0..1500);
        assert!(kept.len() * 1000 >= before.len() * 999, "{} of {}", kept.len(), before.len());
        filled(&mut cache, 1500..7000);
        assert!(found(&mut cache, 0..7000).len() > 6950);
        assert!(cache.memory_bytes() > 6950 * 4096 && cache.memory_bytes() <= cache.bound_bytes());
    }

    #[test]
    fn a_cache_that_shrinks_keeps_the_latest_in_as_much_memory_as_it_has_left() {
        let mut cache = cache_of(8000);
        filled(&mut cache, 0..7000);
        let before = found(&mut cache, 0..7000).len();
        cache.resize(2000 * 4200);
        let kept = found(&mut cache, 0..7000);
        // Three tenths of all: a slot is rarely free once the most recently used pages have theirs.
        assert!((1900..=2052).contains(&kept.len()) && before > 6900, "{} of {before}", kept.len());
        let latest = kept.iter().filter(|&&number| number >= 5500).count();
        assert!(latest > 1400, "{latest} of the latest 1500 are kept");
        assert!(cache.memory.chunks.len() * cache.memory.chunk_pages < 2052 + cache.memory.chunk_pages);
        assert!(cache.memory_bytes() <= cache.bound_bytes() && cache.bound_bytes() <= 2000 * 4200);
        cache.resize(0);
        assert_eq!((cache.memory_bytes(), cache.memory.chunks.len()), (0, 0));
        cache.resize(100 * 4200);
        assert!(cache.insert(at(1), &[1; 4096], 9000));
    }

    #[test]
    fn pages_of_the_largest_guest_have_keys_of_their_own() {
        let ends = [0, 1, (1 << 38) - 1];
        let keys = [0, 1, 1023].map(|block| ends.map(|page| key(PageAt { block, page })));
        let mut keys = keys.concat();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!((keys.len(), keys[0]), (9, 1 << 38));
    }
}
