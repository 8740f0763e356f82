//! KVM's dirty log with manual protection.
//!
//! ```text
//!            write              fetch (sync)            clear (rearm)
//!  protected ─────▶ bit is set ──────────────▶ fetched ───────────────▶ protected
//! ```
//!
//! A sync copies the kernel's bits and leaves them. They are cleared, and their pages protected again, when the scanner
//! re-arms: for a whole chunk at its first extent, since each clear holds the machine's memory lock and flushes every
//! vCPU's translations. Never more is cleared than was fetched: the kernel would forget a write that came after the fetch.
//! Clearing a page early is always correct, since it is in the dirty bitmap and will be read later.
//!
//! Where the kernel supports it, logging starts with all bits set and nothing protected, which costs nothing: this log then
//! considers everything as fetched, since everything is in the dirty bitmap.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{LogCalls, extents_of, per_page};
use crate::bitmap::DirtyBitmap;
use crate::dirty_log::DirtyLog;
use crate::dirty_log::software::{clear, collect};
use crate::geometry::{EXTENT_PAGES, ExtentAt, Layout, bits};
use crate::kvm::{KVM_PAGE_BYTES, Slot};

/// Words of the kernel's bits in a chunk, which is cleared at once: 64 MiB of memory.
const CHUNK: usize = 256;

/// Tracks a machine's slots by their dirty log. For blocks without a slot it finds only what is marked.
#[derive(Debug)]
pub struct KvmLog {
    machine: Arc<dyn LogCalls>,
    slots: Vec<Followed>,
    pending: DirtyBitmap,
    /// Words of the kernel's bits for an extent.
    extent_words: usize,
}

#[derive(Debug)]
struct Followed {
    slot: Slot,
    extents: Range<u64>,
    bits: Mutex<Bits>,
}

/// A slot's bits, as the kernel lays them out: one for each 4 KiB.
#[derive(Debug)]
struct Bits {
    /// What was fetched last.
    latest: Box<[u64]>,
    /// The words of it that were not moved into the bitmap yet.
    ahead: Range<usize>,
    /// What was moved into the bitmap and not cleared yet.
    fetched: Box<[u64]>,
}

impl KvmLog {
    /// A log of these slots of a machine.
    ///
    /// # Panics
    /// If a slot does not begin on an extent of its block, or does not fit it.
    #[must_use]
    pub fn new(machine: Arc<dyn LogCalls>, slots: impl IntoIterator<Item = Slot>, layout: &Layout) -> Self {
        let extent_words = usize::try_from(per_page(layout)).expect("at most 16");
        let follow = |slot: Slot| {
            let extents = extents_of(layout, &slot);
            let words = usize::try_from(slot.pages().div_ceil(64)).expect("a slot in memory");
            let none = || vec![0; words].into_boxed_slice();
            Followed { slot, extents, bits: Mutex::new(Bits { latest: none(), ahead: 0..0, fetched: none() }) }
        };
        let slots = slots.into_iter().map(follow).collect();
        Self { machine, slots, pending: DirtyBitmap::empty(layout), extent_words }
    }

    /// Bytes of memory that a log takes for a machine that has one slot for each block.
    #[must_use]
    pub fn bytes_for(layout: &Layout) -> u64 {
        let of_slots = layout.blocks().iter().map(|block| bits_bytes(block.length.div_ceil(KVM_PAGE_BYTES)));
        DirtyBitmap::bytes_of(layout) + of_slots.sum::<u64>()
    }

    /// Clears what was fetched and is chosen by `choose`, which gets the number of a word, among some words of a slot. True if
    /// there was any.
    fn clear(&self, slot: &Slot, fetched: &mut [u64], first: usize, choose: impl Fn(usize) -> u64) -> io::Result<bool> {
        let mut chosen = [0; CHUNK];
        let chosen = &mut chosen[..fetched.len()];
        for (index, (chosen, fetched)) in chosen.iter_mut().zip(fetched.iter()).enumerate() {
            *chosen = fetched & choose(first + index);
        }
        let Some(begin) = chosen.iter().position(|&word| word != 0) else { return Ok(false) };
        let end = chosen.iter().rposition(|&word| word != 0).expect("there is one") + 1;
        let first_page = (first + begin) as u64 * 64;
        let pages = ((end - begin) as u64 * 64).min(slot.pages() - first_page);
        let pages = u32::try_from(pages).expect("at most a chunk");
        self.machine.clear(slot.number, first_page, pages, &chosen[begin..end])?;
        fetched.iter_mut().zip(chosen).for_each(|(fetched, cleared)| *fetched &= !*cleared);
        Ok(true)
    }

    /// The pages of an extent that are set in its words of the kernel's bits.
    fn fold(&self, words: &[u64]) -> u64 {
        if self.extent_words == 1 {
            return words[0];
        }
        let page = |(word, bit): (usize, u32)| (word * 64 + bit as usize) / self.extent_words;
        let set = words.iter().enumerate().flat_map(|(word, &set)| bits(set).map(move |bit| (word, bit)));
        set.fold(0, |mask, at| mask | 1 << page(at))
    }

    /// The kernel's bits of a word that are pages of `mask`, the word being the `word`th of its extent.
    fn unfold(&self, mask: u64, word: usize) -> u64 {
        if self.extent_words == 1 {
            return mask;
        }
        (0..64)
            .filter(|bit| mask & 1 << ((word * 64 + bit) / self.extent_words) != 0)
            .fold(0, |all, bit| all | 1 << bit)
    }

    fn switch(&self, on: bool) -> io::Result<()> {
        self.slots.iter().try_for_each(|followed| self.machine.set_logging(followed.slot.number, on))
    }
}

impl Followed {
    fn bits(&self) -> MutexGuard<'_, Bits> {
        self.bits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which words of the slot's bits belong to some extents of its block.
    fn words(&self, extents: Range<u64>, extent_words: usize) -> Range<usize> {
        let whole = usize::try_from(self.slot.pages().div_ceil(64)).expect("a slot in memory");
        let word = |extent: u64| {
            let extent = extent.clamp(self.extents.start, self.extents.end) - self.extents.start;
            (usize::try_from(extent).expect("a slot in memory") * extent_words).min(whole)
        };
        word(extents.start)..word(extents.end)
    }
}

impl Bits {
    /// Sets the bits to their state when logging begins.
    fn begin(&mut self, all: bool, pages: u64) {
        self.ahead = 0..0;
        self.fetched.fill(if all { u64::MAX } else { 0 });
        let rest = pages % 64;
        if let Some(last) = self.fetched.last_mut().filter(|_| rest != 0) {
            *last &= (1 << rest) - 1;
        }
    }
}

impl DirtyLog for KvmLog {
    fn start(&self) -> io::Result<()> {
        clear(&self.pending);
        let all = self.machine.manual_protect()?;
        for followed in &self.slots {
            followed.bits().begin(all, followed.slot.pages());
        }
        self.switch(true).inspect_err(|_| drop(self.switch(false)))
    }

    fn sync(&self, block: u32, extents: Range<u32>, into: &DirtyBitmap) -> io::Result<()> {
        collect(&self.pending, block, extents.clone(), into);
        for followed in self.slots.iter().filter(|followed| followed.slot.block == block) {
            let words = followed.words(extents.start.into()..extents.end.into(), self.extent_words);
            if words.is_empty() {
                continue;
            }
            let Bits { latest, ahead, fetched } = &mut *followed.bits();
            // The kernel returns a whole slot. A sync goes range by range: the range that follows the last one was fetched with it.
            if words.start != ahead.start || words.end > ahead.end {
                self.machine.fetch(followed.slot.number, latest)?;
                *ahead = words.start..latest.len();
            }
            ahead.start = words.end;
            let first = u64::try_from(words.start / self.extent_words).expect("small") + followed.extents.start;
            for (extent, words) in (first..).zip(words.clone().step_by(self.extent_words)) {
                let words = words..(words + self.extent_words).min(latest.len());
                let at = ExtentAt { block, extent: u32::try_from(extent).expect("an extent of the block") };
                into.set_mask(at, self.fold(&latest[words]));
            }
            fetched[words.clone()].iter_mut().zip(&latest[words]).for_each(|(fetched, new)| *fetched |= new);
        }
        Ok(())
    }

    fn rearm(&self, at: ExtentAt, _mask: u64) -> io::Result<()> {
        let extent = u64::from(at.extent);
        let holds = |followed: &&Followed| followed.slot.block == at.block && followed.extents.contains(&extent);
        let Some(followed) = self.slots.iter().find(holds) else { return Ok(()) };
        let own = followed.words(extent..extent + 1, self.extent_words);
        let fetched = &mut followed.bits().fetched;
        if fetched[own.clone()].iter().all(|&word| word == 0) {
            return Ok(());
        }
        let start = own.start / CHUNK * CHUNK;
        let end = (start + CHUNK).min(fetched.len());
        self.clear(&followed.slot, &mut fetched[start..end], start, |_| u64::MAX).map(drop)
    }

    fn rearms_late(&self) -> bool {
        true
    }

    fn arm_unread(&self, pages: &DirtyBitmap) -> io::Result<bool> {
        let mut late = false;
        for followed in &self.slots {
            let choose = |word: usize| {
                let extent = followed.extents.start + (word / self.extent_words) as u64;
                let extent = u32::try_from(extent).expect("an extent of the block");
                self.unfold(pages.peek(ExtentAt { block: followed.slot.block, extent }), word % self.extent_words)
            };
            let fetched = &mut followed.bits().fetched;
            for (chunk, fetched) in fetched.chunks_mut(CHUNK).enumerate() {
                late |= self.clear(&followed.slot, fetched, chunk * CHUNK, choose)?;
            }
        }
        Ok(late)
    }

    fn mark(&self, block: u32, pages: Range<u64>) {
        self.pending.set_range(block, pages);
    }

    fn memory_bytes(&self) -> u64 {
        let of_slots = self.slots.iter().map(|followed| bits_bytes(followed.slot.pages()));
        self.pending.memory_bytes() + of_slots.sum::<u64>()
    }

    fn stop(&self) -> io::Result<()> {
        clear(&self.pending);
        self.slots.iter().for_each(|followed| followed.bits().begin(false, followed.slot.pages()));
        // Each slot, even if another fails.
        let stops = self.slots.iter().map(|followed| self.machine.set_logging(followed.slot.number, false));
        stops.collect::<Vec<_>>().into_iter().collect()
    }
}

/// Bytes of the [`Bits`] of a number of pages.
fn bits_bytes(pages: u64) -> u64 {
    2 * 8 * pages.div_ceil(64)
}

/// 64 pages of KVM's are at least one page of ours: an extent has whole words.
const _: () = assert!(EXTENT_PAGES == 64);
