//! The model log: as strict as any hypervisor's may be, to test scanners and the conformance kit.
//!
//! ```text
//!             write                 fetch (sync)               rearm
//!  protected ───────▶ written ────────────────────▶ fetched ──────────▶ protected
//!                    └── a write here leaves no further trace ──┘
//! ```
//!
//! Real hypervisors tolerate different mistakes; this one tolerates none. A page that was written is reported once. Until
//! it is re-armed, further writes leave no trace. Re-arming a page whose write was not fetched loses that write. A
//! scanner that reads before it re-arms, or a log that re-arms too much, loses writes here that an emulated or a
//! lenient host would still find.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::DirtyLog;
use super::software::{clear, collect};
use crate::bitmap::DirtyBitmap;
use crate::geometry::{ExtentAt, Layout, PageAt, bits};

/// The state of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    Protected,
    Written,
    Fetched,
}

/// The hypervisor's side: it tracks the writes that go through it. Shared by the guest's writers and the log.
#[derive(Debug)]
pub struct Hypervisor {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    blocks: Vec<Vec<Page>>,
    lost: u64,
}

impl Hypervisor {
    /// A hypervisor for guests of this layout; nothing is protected yet.
    #[must_use]
    pub fn new(layout: &Layout) -> Arc<Self> {
        let pages = |block| (0..layout.block_pages(block)).map(|_| Page::Fetched).collect();
        let blocks = (0..layout.block_count()).map(pages).collect();
        Arc::new(Self { state: Mutex::new(State { blocks, lost: 0 }) })
    }

    /// A guest's write to a page, made by `store`. Trap and store are atomic to all others, as on hardware, which repeats the store
    /// after its fault.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn write(&self, at: PageAt, store: impl FnOnce()) {
        let mut state = self.state();
        let page = state.page(at);
        if *page == Page::Protected {
            *page = Page::Written;
        }
        store();
    }

    /// Protects every page and discards what was written.
    pub fn protect_all(&self) {
        self.state().blocks.iter_mut().for_each(|pages| pages.fill(Page::Protected));
    }

    /// Reports the written pages of an extent, each once; `valid` are the pages that the extent has.
    ///
    /// # Panics
    /// If `valid` has others.
    pub fn fetch(&self, at: ExtentAt, valid: u64) -> u64 {
        let mut state = self.state();
        let mut found = 0;
        for bit in bits(valid) {
            let page = state.page(at.page(bit));
            if *page == Page::Written {
                *page = Page::Fetched;
                found |= 1 << bit;
            }
        }
        found
    }

    /// Protects pages again. A write to them that was not fetched is lost.
    ///
    /// # Panics
    /// If there are no such pages.
    pub fn rearm(&self, at: ExtentAt, mask: u64) {
        let mut state = self.state();
        for bit in bits(mask) {
            let page = state.page(at.page(bit));
            let forgotten = std::mem::replace(page, Page::Protected) == Page::Written;
            state.lost += u64::from(forgotten);
        }
    }

    /// How many writes were lost because their page was re-armed before they were fetched. 0 unless the contract is
    /// broken.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.state().lost
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn page(&mut self, at: PageAt) -> &mut Page {
        &mut self.blocks[at.block as usize][usize::try_from(at.page).expect("a page of this guest")]
    }
}

/// The log over a [`Hypervisor`], as a log for a real one must be. It re-arms late, and only what it has fetched.
#[derive(Debug)]
pub struct ModelLog {
    hypervisor: Arc<Hypervisor>,
    /// Fetched from the hypervisor and not re-armed yet.
    fetched: DirtyBitmap,
    pending: DirtyBitmap,
}

impl ModelLog {
    /// A log over this hypervisor, which was made for the same layout.
    #[must_use]
    pub fn new(hypervisor: Arc<Hypervisor>, layout: &Layout) -> Self {
        Self { hypervisor, fetched: DirtyBitmap::empty(layout), pending: DirtyBitmap::empty(layout) }
    }
}

impl DirtyLog for ModelLog {
    fn start(&self) -> io::Result<()> {
        clear(&self.fetched);
        self.hypervisor.protect_all();
        Ok(())
    }

    fn sync(&self, block: u32, extents: Range<u32>, into: &DirtyBitmap) -> io::Result<()> {
        for extent in extents.clone() {
            let at = ExtentAt { block, extent };
            let found = self.hypervisor.fetch(at, into.layout().valid_mask(at));
            // Noted as fetched before the scanner can take it from the bitmap.
            self.fetched.set_mask(at, found);
            into.set_mask(at, found);
        }
        collect(&self.pending, block, extents, into);
        Ok(())
    }

    fn rearm(&self, at: ExtentAt, mask: u64) -> io::Result<()> {
        self.hypervisor.rearm(at, self.fetched.take_mask(at, mask));
        Ok(())
    }

    fn rearms_late(&self) -> bool {
        true
    }

    fn arm_unread(&self, pages: &DirtyBitmap) -> io::Result<bool> {
        let mut late = false;
        for at in self.fetched.all_dirty_extents() {
            let fetched = self.fetched.take_mask(at, pages.peek(at));
            self.hypervisor.rearm(at, fetched);
            late |= fetched != 0;
        }
        Ok(late)
    }

    fn mark(&self, block: u32, pages: Range<u64>) {
        self.pending.set_range(block, pages);
    }

    fn stop(&self) -> io::Result<()> {
        clear(&self.fetched);
        clear(&self.pending);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{BlockInfo, PageSize};

    #[test]
    fn a_second_write_leaves_no_trace_until_the_page_is_rearmed() {
        let block = BlockInfo::new("ram", 1 << 20);
        let layout = Layout::new(PageSize::DEFAULT, vec![block]).unwrap();
        let hypervisor = Hypervisor::new(&layout);
        let (log, dirty) = (ModelLog::new(hypervisor.clone(), &layout), DirtyBitmap::empty(&layout));
        let at = ExtentAt { block: 0, extent: 1 };
        let write = || hypervisor.write(at.page(3), || ());
        let found = || {
            log.sync(0, 0..4, &dirty).unwrap();
            dirty.take(at)
        };
        log.start().unwrap();
        write();
        assert_eq!(found(), 0b1000);
        write();
        assert_eq!(found(), 0, "fetched and not re-armed");
        log.rearm(at, u64::MAX).unwrap();
        write();
        log.rearm(at, u64::MAX).unwrap();
        assert_eq!((found(), hypervisor.lost()), (0b1000, 0), "the log re-arms only what it fetched");
        log.rearm(at, u64::MAX).unwrap();
        write();
        hypervisor.rearm(at, u64::MAX);
        assert_eq!((found(), hypervisor.lost()), (0, 1), "a hypervisor that re-arms more forgets");
    }
}
