//! KVM's dirty rings.
//!
//! ```text
//!            write                harvest            reset
//!  protected ─────▶ ring's entry ─────────▶ aside ───────▶ protected, and only then found
//! ```
//!
//! The kernel makes an entry when a protected page is written; until the rings are reset, further writes to the page leave no
//! trace. So harvested entries are set aside, the rings are reset, and only then does the scanner get the pages: a page that it
//! reads was protected again before.
//!
//! A vCPU whose ring is full leaves the guest: its loop calls [`KvmRingLog::make_room`] and enters it again.
//!
//! Where KVM emulates the guest's stores, one guest entry can write more than the ring has room for: one repeated store
//! does, or a host that emulates many instructions in a row. Entries are lost then, and which ones is unknown. So all
//! pages are protected again, and the next sync finds all of them. That is slow but correct; larger rings make it rare,
//! and KVM's dirty log does not have the problem.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{RingCalls, extents_of, per_page};
use crate::bitmap::DirtyBitmap;
use crate::dirty_log::DirtyLog;
use crate::dirty_log::software::{clear, collect};
use crate::geometry::{Layout, PageAt};
use crate::kvm::{KVM_PAGE_BYTES, Slot};

/// Tracks a machine's slots by its vCPUs' rings. For blocks without a slot it finds only what is marked.
#[derive(Debug)]
pub struct KvmRingLog {
    machine: Arc<dyn RingCalls>,
    slots: Vec<Slot>,
    /// Locked from harvest to reset.
    harvest: Mutex<Harvest>,
    /// The pages that the next sync reports.
    pending: DirtyBitmap,
    /// Pages that are excluded until the log is stopped.
    left_out: DirtyBitmap,
    run_over: AtomicU64,
}

#[derive(Debug, Default)]
struct Harvest {
    /// Harvested and not reset yet.
    aside: Vec<PageAt>,
    is_logging: bool,
}

impl KvmRingLog {
    /// A log of these slots of a machine.
    ///
    /// # Panics
    /// If a slot does not begin on an extent of its block, or does not fit it.
    #[must_use]
    pub fn new(machine: Arc<dyn RingCalls>, slots: impl IntoIterator<Item = Slot>, layout: &Layout) -> Self {
        let slots: Vec<_> = slots.into_iter().collect();
        for slot in &slots {
            let _checked = extents_of(layout, slot);
        }
        Self {
            machine,
            slots,
            harvest: Mutex::default(),
            pending: DirtyBitmap::empty(layout),
            left_out: DirtyBitmap::empty(layout),
            run_over: AtomicU64::new(0),
        }
    }

    /// Empties the rings: the next sync reports their pages.
    ///
    /// # Errors
    /// When the kernel does not reset the rings.
    pub fn harvest(&self) -> io::Result<()> {
        let mut harvest = self.locked();
        (0..self.machine.count()).try_for_each(|ring| self.empty(ring, false, &mut harvest).map(drop))
    }

    /// Makes room in the ring of a vCPU that KVM does not let enter the guest (rings are numbered as they were added).
    /// The next sync reports its pages. False if it was empty: a sync may have emptied it just before.
    ///
    /// # Errors
    /// When the kernel does not reset the ring.
    pub fn make_room(&self, ring: usize) -> io::Result<bool> {
        self.empty(ring, true, &mut self.locked())
    }

    /// How often the kernel overran a ring, so that all pages had to count as written.
    #[must_use]
    pub fn times_run_over(&self) -> u64 {
        self.run_over.load(Ordering::Relaxed)
    }

    /// Empties one ring. True if there was something in it.
    fn empty(&self, ring: usize, is_full: bool, harvest: &mut Harvest) -> io::Result<bool> {
        let aside = &mut harvest.aside;
        let harvested = self.machine.harvest(ring, is_full, &mut |slot, page| aside.extend(self.place(slot, page)));
        if harvested > 0 {
            let is_run_over = self.machine.reset(ring)?;
            if is_run_over && harvest.is_logging {
                self.find_all()?;
            }
            harvest.aside.drain(..).for_each(|page| _ = self.pending.set(page));
        }
        Ok(harvested > 0)
    }

    fn locked(&self) -> MutexGuard<'_, Harvest> {
        self.harvest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Handles writes that are in no ring: all pages are protected again, and only then reported.
    fn find_all(&self) -> io::Result<()> {
        self.run_over.fetch_add(1, Ordering::Relaxed);
        self.switch(false)?;
        self.switch(true)?;
        for slot in &self.slots {
            let page_bytes = KVM_PAGE_BYTES * per_page(self.pending.layout());
            let pages = slot.offset / page_bytes..(slot.offset + slot.length).div_ceil(page_bytes);
            self.pending.set_range(slot.block, pages);
        }
        for at in self.left_out.all_dirty_extents() {
            let _unwritten = self.pending.take_mask(at, self.left_out.peek(at));
        }
        Ok(())
    }

    /// The place of a page of a slot in its block.
    fn place(&self, number: u32, page: u64) -> Option<PageAt> {
        let slot = self.slots.iter().find(|slot| slot.number == number)?;
        let page = (slot.offset / KVM_PAGE_BYTES + page) / per_page(self.pending.layout());
        Some(PageAt { block: slot.block, page })
    }

    fn switch(&self, on: bool) -> io::Result<()> {
        let switched = self.slots.iter().map(|slot| self.machine.set_logging(slot.number, on));
        // Each slot, even if another fails.
        switched.collect::<Vec<_>>().into_iter().collect()
    }

    /// Empties rings and bitmap.
    fn forget(&self) -> io::Result<()> {
        let harvested = self.harvest();
        clear(&self.pending);
        harvested
    }
}

impl DirtyLog for KvmRingLog {
    fn start(&self) -> io::Result<()> {
        self.forget()?;
        self.locked().is_logging = true;
        self.switch(true).inspect_err(|_| drop(self.stop()))
    }

    fn sync(&self, block: u32, extents: Range<u32>, into: &DirtyBitmap) -> io::Result<()> {
        self.harvest()?;
        collect(&self.pending, block, extents, into);
        Ok(())
    }

    fn leave_out(&self, pages: &DirtyBitmap) -> io::Result<()> {
        pages.all_dirty_extents().for_each(|at| _ = self.left_out.set_mask(at, pages.peek(at)));
        Ok(())
    }

    fn mark(&self, block: u32, pages: Range<u64>) {
        self.pending.set_range(block, pages);
    }

    fn memory_bytes(&self) -> u64 {
        self.pending.memory_bytes() + self.left_out.memory_bytes()
    }

    fn stop(&self) -> io::Result<()> {
        self.locked().is_logging = false;
        clear(&self.left_out);
        self.switch(false).and(self.forget())
    }
}
