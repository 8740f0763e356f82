//! A model of the kernel's dirty log and rings, as strict as any host may be. A host that emulates guest stores would hide some
//! mistakes.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use super::{LogCalls, RingCalls};
use crate::geometry::bits;
use crate::kvm::Slot;

/// A machine with a dirty log.
///
/// A write to a page that is not protected leaves no trace; a clear forgets a write that was not fetched, and refuses
/// what the kernel refuses.
#[derive(Debug)]
pub(super) struct LogModel {
    initially_set: bool,
    slots: Vec<Slot>,
    state: Mutex<LogState>,
}

#[derive(Debug)]
struct LogState {
    pages: Vec<Vec<LoggedPage>>,
    logging: bool,
    lost: u64,
    clears: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct LoggedPage {
    dirty: bool,
    protected: bool,
    /// Its bit was fetched.
    fetched: bool,
}

impl LogModel {
    pub(super) fn new(slots: &[Slot], initially_set: bool) -> Arc<Self> {
        let pages = |slot: &Slot| vec![LoggedPage::default(); usize::try_from(slot.pages()).unwrap()];
        let pages = slots.iter().map(pages).collect();
        let state = Mutex::new(LogState { pages, logging: false, lost: 0, clears: 0 });
        Arc::new(Self { initially_set, slots: slots.to_vec(), state })
    }

    /// A vCPU's write; trap and store are one step to all others.
    pub(super) fn write(&self, slot: u32, page: u64, store: impl FnOnce()) {
        let mut state = self.state();
        let page = &mut state.pages[self.index(slot)][usize::try_from(page).unwrap()];
        if page.protected {
            *page = LoggedPage { dirty: true, protected: false, fetched: false };
        }
        store();
    }

    /// Pages of a slot.
    pub(super) fn pages(&self, slot: u32) -> u32 {
        u32::try_from(self.slots[self.index(slot)].pages()).unwrap()
    }

    /// Writes that were lost.
    pub(super) fn lost(&self) -> u64 {
        self.state().lost
    }

    /// How often bits were cleared.
    pub(super) fn clears(&self) -> u64 {
        self.state().clears
    }

    fn index(&self, slot: u32) -> usize {
        self.slots.iter().position(|own| own.number == slot).expect("a slot of the machine")
    }

    fn state(&self) -> MutexGuard<'_, LogState> {
        self.state.lock().unwrap()
    }
}

impl LogCalls for LogModel {
    fn manual_protect(&self) -> io::Result<bool> {
        Ok(self.initially_set)
    }

    fn set_logging(&self, slot: u32, on: bool) -> io::Result<()> {
        let (all, mut state) = (self.initially_set, self.state());
        state.logging = on;
        let begun = LoggedPage { dirty: on && all, protected: on && !all, fetched: false };
        state.pages[self.index(slot)].fill(begun);
        Ok(())
    }

    fn fetch(&self, slot: u32, into: &mut [u64]) -> io::Result<()> {
        let mut state = self.state();
        if !state.logging {
            return Err(io::ErrorKind::NotFound.into());
        }
        let pages = &mut state.pages[self.index(slot)];
        for (word, pages) in into.iter_mut().zip(pages.chunks_mut(64)) {
            *word = 0;
            for (bit, page) in pages.iter_mut().enumerate().filter(|(_, page)| page.dirty) {
                page.fetched = true;
                *word |= 1 << bit;
            }
        }
        Ok(())
    }

    fn clear(&self, slot: u32, first_page: u64, pages: u32, mask: &[u64]) -> io::Result<()> {
        let mut state = self.state();
        let all = state.pages[self.index(slot)].len() as u64;
        let end = first_page + u64::from(pages);
        let aligned = first_page.is_multiple_of(64) && (pages.is_multiple_of(64) || end == all);
        if !state.logging || !aligned || pages == 0 || end > all {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        state.clears += 1;
        let set = mask
            .iter()
            .enumerate()
            .flat_map(|(word, &mask)| bits(mask).map(move |bit| word as u64 * 64 + u64::from(bit)));
        for page in set.take_while(|&page| page < u64::from(pages)) {
            let at = usize::try_from(first_page + page).unwrap();
            let page = &mut state.pages[self.index(slot)][at];
            // Where all bits are set at the start, a page counts as fetched.
            let unread = page.dirty && !page.fetched && !self.initially_set;
            if page.dirty {
                *page = LoggedPage { dirty: false, protected: true, fetched: false };
            }
            state.lost += u64::from(unread);
        }
        Ok(())
    }
}

/// A machine with two vCPUs that have a small ring each.
#[derive(Debug)]
pub(super) struct RingModel {
    slots: Vec<Slot>,
    entries: usize,
    state: Mutex<RingState>,
}

#[derive(Debug)]
struct RingState {
    protected: Vec<Vec<bool>>,
    rings: [Ring; 2],
    logging: bool,
}

/// Entries in order; those harvested are at the front.
#[derive(Debug, Default)]
struct Ring {
    entries: VecDeque<(u32, u64)>,
    harvested: usize,
    is_run_over: bool,
}

impl RingModel {
    pub(super) fn new(slots: &[Slot], entries: usize) -> Arc<Self> {
        let protected = slots.iter().map(|slot| vec![false; usize::try_from(slot.pages()).unwrap()]).collect();
        let state = Mutex::new(RingState { protected, rings: Default::default(), logging: false });
        Arc::new(Self { slots: slots.to_vec(), entries, state })
    }

    /// A store of a vCPU that KVM emulates: it is made even if the ring is full, and then an entry is lost. True if one was.
    pub(super) fn write_emulated(&self, vcpu: usize, slot: u32, page: u64, store: &dyn Fn()) -> bool {
        let mut state = self.state.lock().unwrap();
        let (index, at) = (self.index(slot), usize::try_from(page).unwrap());
        if state.logging && std::mem::take(&mut state.protected[index][at]) {
            let ring = &mut state.rings[vcpu];
            if ring.entries.len() == self.entries {
                ring.is_run_over = true;
            } else {
                ring.entries.push_back((slot, page));
            }
        }
        store();
        state.rings[vcpu].is_run_over
    }

    /// A vCPU's write; trap and store are one step to all others. False, and nothing stored, if its ring is full.
    pub(super) fn write(&self, vcpu: usize, slot: u32, page: u64, store: &dyn Fn()) -> bool {
        let mut state = self.state.lock().unwrap();
        let (index, at) = (self.index(slot), usize::try_from(page).unwrap());
        if state.logging && state.protected[index][at] {
            let ring = &mut state.rings[vcpu];
            if ring.entries.len() == self.entries {
                return false;
            }
            ring.entries.push_back((slot, page));
            state.protected[index][at] = false;
        }
        store();
        true
    }

    fn index(&self, slot: u32) -> usize {
        self.slots.iter().position(|own| own.number == slot).expect("a slot of the machine")
    }
}

impl RingCalls for RingModel {
    fn set_logging(&self, slot: u32, on: bool) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.logging = on;
        state.protected[self.index(slot)].fill(on);
        Ok(())
    }

    fn count(&self) -> usize {
        2
    }

    fn harvest(&self, ring: usize, _is_full: bool, found: &mut dyn FnMut(u32, u64)) -> usize {
        let ring = &mut self.state.lock().unwrap().rings[ring];
        ring.entries.iter().skip(ring.harvested).for_each(|&(slot, page)| found(slot, page));
        ring.harvested = ring.entries.len();
        ring.harvested
    }

    fn reset(&self, ring: usize) -> io::Result<bool> {
        let mut state = self.state.lock().unwrap();
        let RingState { protected, rings, .. } = &mut *state;
        let ring = &mut rings[ring];
        for (slot, page) in ring.entries.drain(..std::mem::take(&mut ring.harvested)) {
            protected[self.index(slot)][usize::try_from(page).unwrap()] = true;
        }
        Ok(std::mem::take(&mut ring.is_run_over))
    }
}
