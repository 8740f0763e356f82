//! KVM's dirty rings.
//!
//! ```text
//!            write                harvest            reset
//!  protected ─────▶ ring's entry ─────────▶ aside ───────▶ protected, and only then found
//! ```
//!
//! An entry is made when a protected page is written; until the rings are reset the page's further writes leave no trace.
//! So what was harvested is laid aside, the rings are reset, and only then may the scanner learn of it: a page that it
//! reads has been protected again before.
//!
//! A vCPU whose ring is full leaves the guest: its loop calls [`KvmRingLog::harvest`] and enters it again.
//!
//! **Not to be trusted where KVM emulates the guest's stores.** On such a host a write shortly before the pause is now and then
//! missing in the rings; the digests find it, and the migration fails. One repeated store can also make more entries at once
//! than the kernel keeps in reserve. KVM's dirty log has neither fault.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::{RingCalls, extents_of, per_page};
use crate::bitmap::DirtyBitmap;
use crate::dirty_log::DirtyLog;
use crate::dirty_log::software::{clear, collect};
use crate::geometry::{Layout, PageAt};
use crate::kvm::{KVM_PAGE_BYTES, Slot};

/// Follows a machine's slots by its vCPUs' rings. Blocks without a slot are known by what is marked.
#[derive(Debug)]
pub struct KvmRingLog {
    machine: Arc<dyn RingCalls>,
    slots: Vec<Slot>,
    /// Harvested and not reset yet. Locked from harvest to reset.
    aside: Mutex<Vec<PageAt>>,
    /// What the next sync finds.
    pending: DirtyBitmap,
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
        Self { machine, slots, aside: Mutex::default(), pending: DirtyBitmap::empty(layout) }
    }

    /// Empties the rings: what was in them is found by the next sync. Called by a vCPU whose ring is full, and by syncs.
    /// Returns how many entries there were.
    ///
    /// # Errors
    /// When the kernel does not reset the rings.
    pub fn harvest(&self) -> io::Result<usize> {
        let mut aside = self.aside.lock().unwrap_or_else(PoisonError::into_inner);
        self.machine.harvest(&mut |slot, page| aside.extend(self.place(slot, page)));
        let found = aside.len();
        if found > 0 {
            self.machine.reset()?;
            aside.drain(..).for_each(|page| _ = self.pending.set(page));
        }
        Ok(found)
    }

    /// Where a page of a slot is.
    fn place(&self, number: u32, page: u64) -> Option<PageAt> {
        let slot = self.slots.iter().find(|slot| slot.number == number)?;
        let page = (slot.offset / KVM_PAGE_BYTES + page) / per_page(self.pending.layout());
        Some(PageAt { block: slot.block, page })
    }

    fn switch(&self, on: bool) -> io::Result<()> {
        let switched = self.slots.iter().map(|slot| self.machine.set_logging(slot.number, on));
        // Each of them, whatever becomes of the others.
        switched.collect::<Vec<_>>().into_iter().collect()
    }

    /// Empties rings and bitmap.
    fn forget(&self) -> io::Result<()> {
        let harvested = self.harvest();
        clear(&self.pending);
        harvested.map(drop)
    }
}

impl DirtyLog for KvmRingLog {
    fn start(&self) -> io::Result<()> {
        self.forget()?;
        self.switch(true).inspect_err(|_| drop(self.switch(false)))
    }

    fn sync(&self, block: u32, extents: Range<u32>, into: &DirtyBitmap) -> io::Result<()> {
        self.harvest()?;
        collect(&self.pending, block, extents, into);
        Ok(())
    }

    fn mark(&self, block: u32, pages: Range<u64>) {
        self.pending.set_range(block, pages);
    }

    fn memory_bytes(&self) -> u64 {
        self.pending.memory_bytes()
    }

    fn stop(&self) -> io::Result<()> {
        self.switch(false).and(self.forget())
    }
}
