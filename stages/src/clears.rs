//! What clears bits in the dirty bitmap besides the scanner that takes them: hints of free pages, and pages that never travel.
//!
//! Clearing a bit is all that it takes to spare a page: the bitmap is the truth (law 1), and nobody else is told. So this is the
//! one place where it is done, where it is counted, and where the rules are kept that make it right.
//!
//! - **Out for good** are pages that must not travel in this migration at all: unplugged memory, ignored blocks. They leave the
//!   bitmap where it is made, and whatever a log says of them leaves it again in the sync that brought it in.
//! - **Hints** name pages that are free: what they hold does not matter. They come from threads of the guest's while the scanner
//!   works, through a [`Hints`] of the window that is open; all others are dropped.
//!
//! ```text
//!         sync            window open            sync
//!  ──────▇▇▇▇▇▇──┬───────────────────────────┬──▇▇▇▇▇▇──▶
//!                open: every log is armed    close: no hint is at work any more, none comes through
//! ```
//!
//! **Why no written page is lost.** A hint clears a bit only while a window is open, and while one is open no sync sets any
//! and no page waits to be re-armed. So the store that takes a hinted page into use again comes either before the hint,
//! which its giver must not let happen (see [`Hints::free`]), or after it, and then a log has it and the next sync sets the
//! bit again. A hint and the scanner may reach for the same bit: one of them gets it. If it is the scanner, a free page is
//! sent, and no harm is done.
//!
//! **What the destination holds.** Of a page that was hinted while its bit was set the destination has anything old, until
//! the page is found written and is sent. [`Clears::left_out`] says which pages these are: digests must leave them out. What
//! a delta refers to is what the destination holds, and a hint changes nothing there.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use serde::{Deserialize, Serialize};

use crate::bitmap::{DirtyBitmap, words_of};

/// Why pages never travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutForGood {
    /// There is no memory behind them.
    Unplugged,
    /// The destination has the block's memory already.
    Ignored,
}

/// How many pages were spared, by why.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Spared {
    /// Bits that hints cleared: the page was to be sent, and was not in that round.
    pub hinted: u64,
    /// Pages that hints named while no window, or not theirs, was open.
    #[serde(rename = "hints_dropped")]
    pub dropped: u64,
    /// Pages that are unplugged.
    pub unplugged: u64,
    /// Pages of ignored blocks.
    pub ignored: u64,
}

/// The clearing of bits in one migration's bitmap. See the [module](self).
#[derive(Debug)]
pub struct Clears {
    bitmap: Arc<DirtyBitmap>,
    /// `None`: no page.
    out_for_good: Option<DirtyBitmap>,
    /// Hinted while their bit was set, which no sync has set since.
    hinted: DirtyBitmap,
    /// Held for reading by each hint at work.
    window: RwLock<Window>,
    unplugged: u64,
    ignored: u64,
    cleared: AtomicU64,
    dropped: AtomicU64,
}

/// The windows are numbered: a hint of an earlier one does not count in a later.
#[derive(Debug, Default)]
struct Window {
    number: u64,
    is_open: bool,
}

impl Clears {
    /// For a bitmap that nobody scans yet: the pages that are out for good leave it. No window is open.
    ///
    /// # Panics
    /// If a range reaches beyond its block.
    pub fn new(bitmap: Arc<DirtyBitmap>, out_for_good: &[(OutForGood, u32, Range<u64>)]) -> Self {
        let out = DirtyBitmap::empty(bitmap.layout());
        let (mut unplugged, mut ignored) = (0, 0);
        for (why, block, pages) in out_for_good {
            let count = match why {
                OutForGood::Unplugged => &mut unplugged,
                OutForGood::Ignored => &mut ignored,
            };
            // A page that is named twice counts once.
            let added =
                words_of(*block, pages.clone()).map(|(at, mask)| u64::from(out.set_mask(at, mask).count_ones()));
            *count += added.sum::<u64>();
            bitmap.clear_range(*block, pages.clone());
        }
        Self {
            hinted: DirtyBitmap::empty(bitmap.layout()),
            bitmap,
            out_for_good: (unplugged + ignored > 0).then_some(out),
            window: RwLock::default(),
            unplugged,
            ignored,
            cleared: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        }
    }

    /// The pages that are out for good, if there are any.
    #[must_use]
    pub fn out_for_good(&self) -> Option<&DirtyBitmap> {
        self.out_for_good.as_ref()
    }

    /// Opens the next window: hints through what this returns clear bits, until it is closed. The caller answers for it that no
    /// sync comes before that, and that every log is armed for every page: a store is found from here on.
    #[must_use]
    pub fn open(self: &Arc<Self>) -> Hints {
        let mut window = self.window.write().unwrap_or_else(PoisonError::into_inner);
        window.number += 1;
        window.is_open = true;
        Hints { clears: self.clone(), window: window.number }
    }

    /// Closes the window, if one is open: when this returns, no hint clears a bit any more, not even one that came in time and
    /// was still at work.
    pub fn close(&self) {
        self.window.write().unwrap_or_else(PoisonError::into_inner).is_open = false;
    }

    /// A sync has brought in what the logs say of these extents: what is out for good leaves the bitmap again, and pages whose
    /// bit is set will be sent, whatever was hinted of them before.
    ///
    /// # Panics
    /// If the extents reach beyond the block.
    pub fn synced(&self, block: u32, extents: Range<u32>) {
        if let Some(out) = &self.out_for_good {
            for at in out.dirty_extents(block, extents.clone()) {
                let _never_sent = self.bitmap.take_mask(at, out.peek(at));
            }
        }
        for at in self.hinted.dirty_extents(block, extents) {
            let _sent_again = self.hinted.take_mask(at, self.bitmap.peek(at));
        }
    }

    /// The pages of which the destination may hold anything, as they are after a sync while no window is open.
    #[must_use]
    pub fn left_out(&self) -> DirtyBitmap {
        let all = DirtyBitmap::empty(self.bitmap.layout());
        for some in self.out_for_good.iter().chain([&self.hinted]) {
            some.all_dirty_extents().for_each(|at| _ = all.set_mask(at, some.peek(at)));
        }
        all
    }

    /// What was spared so far.
    #[must_use]
    pub fn spared(&self) -> Spared {
        Spared {
            hinted: self.cleared.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
            unplugged: self.unplugged,
            ignored: self.ignored,
        }
    }

    /// The most bytes that it keeps for a guest of this layout.
    #[must_use]
    pub fn bytes_of(layout: &crate::geometry::Layout) -> u64 {
        2 * DirtyBitmap::bytes_of(layout)
    }
}

/// Through this a guest says which pages are free, while one window is open. Cheap to clone; any thread may use it.
#[derive(Clone, Debug)]
pub struct Hints {
    clears: Arc<Clears>,
    window: u64,
}

impl Hints {
    /// These pages of a block are free: their bits are cleared, and they are not sent until they are written. Returns how many
    /// would have been sent; none if the window is closed.
    ///
    /// **They must be free until this returns**: nothing may be stored into them that anybody will read, from before this call
    /// until it is over. Afterwards they may be taken into use at once: a store after this call is found by the log, and the page
    /// is sent. (A guest that reports asynchronously must hold a page back from its allocator from the report until this
    /// call for it has returned, or until it is told that the report was dropped.)
    ///
    /// Pages that the block does not have are passed over: the ranges come from a guest, whose word is not trusted.
    pub fn free(&self, block: u32, pages: Range<u64>) -> u64 {
        let clears = &*self.clears;
        let layout = clears.bitmap.layout();
        let end = if block < layout.block_count() { layout.block_pages(block) } else { 0 };
        let pages = pages.start..pages.end.min(end);
        let window = clears.window.read().unwrap_or_else(PoisonError::into_inner);
        if !window.is_open || window.number != self.window {
            clears.dropped.fetch_add(pages.end.saturating_sub(pages.start), Ordering::Relaxed);
            return 0;
        }
        let mut cleared = 0;
        for (at, mask) in words_of(block, pages) {
            let mask = clears.bitmap.take_mask(at, mask);
            // Nobody looks at these before the window is closed.
            clears.hinted.set_mask(at, mask);
            cleared += u64::from(mask.count_ones());
        }
        clears.cleared.fetch_add(cleared, Ordering::Relaxed);
        cleared
    }

    /// Is its window still open? Only to save the work: a hint that comes too late is dropped anyway.
    #[must_use]
    pub fn are_wanted(&self) -> bool {
        let window = self.clears.window.read().unwrap_or_else(PoisonError::into_inner);
        window.is_open && window.number == self.window
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use proptest::prelude::*;

    use super::*;
    use crate::geometry::{ExtentAt, Layout, PageAt, bits};
    use crate::stage::testing::{layout as layout_of, page_size};

    const PAGES: [u64; 2] = [130, 70];

    fn layout() -> Layout {
        layout_of(page_size(4), &PAGES.map(|pages| pages * 4096))
    }

    #[derive(Clone, Debug)]
    enum Step {
        /// Of the latest window, or of the one before it.
        Hint {
            old: bool,
            block: u32,
            pages: Range<u64>,
        },
        Open,
        Close,
        Sync {
            written: Vec<PageAt>,
        },
        Scan(ExtentAt),
    }

    fn page() -> impl Strategy<Value = PageAt> {
        (0..2u32, any::<u64>()).prop_map(|(block, page)| PageAt { block, page: page % PAGES[block as usize] })
    }

    fn range() -> impl Strategy<Value = (u32, Range<u64>)> {
        (0..4u32, 0..150u64, 0..150u64).prop_map(|(block, one, two)| (block, one.min(two)..one.max(two)))
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (any::<bool>(), range()).prop_map(|(old, (block, pages))| Step::Hint { old, block, pages }),
            2 => Just(Step::Open),
            1 => Just(Step::Close),
            2 => prop::collection::vec(page(), 0..60).prop_map(|written| Step::Sync { written }),
            2 => page().prop_map(|at| Step::Scan(ExtentAt { block: at.block, extent: u32::try_from(at.page / 64).unwrap() })),
        ]
    }

    /// What the destination may hold of a page, told without any bitmap.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Naive {
        /// To be sent.
        Dirty,
        /// Sent, and not written since.
        Sent,
        /// Free when it was to be sent: anything.
        Anything,
        /// Never looked at.
        Out,
    }

    fn set(bitmap: &DirtyBitmap) -> BTreeSet<PageAt> {
        bitmap.all_dirty_extents().flat_map(|at| bits(bitmap.peek(at)).map(move |bit| at.page(bit))).collect()
    }

    proptest! {
        #[test]
        fn windows_and_hints_are_as_a_page_by_page_account_has_it(
            out in prop::collection::vec((0..2u32, 0..70u64, 0..70u64), 0..3), steps in prop::collection::vec(step(), 0..80),
        ) {
            let bitmap = Arc::new(DirtyBitmap::filled(&layout()));
            let why = [OutForGood::Unplugged, OutForGood::Ignored];
            let out: Vec<_> = (0..).zip(out).map(|(index, (block, one, two))| {
                let why: OutForGood = why[index % 2];
                (why, block, one.min(two)..one.max(two))
            }).collect();
            let clears = Arc::new(Clears::new(bitmap.clone(), &out));
            let mut naive: std::collections::BTreeMap<_, _> = (0..2u32)
                .flat_map(|block| (0..PAGES[block as usize]).map(move |page| (PageAt { block, page }, Naive::Dirty)))
                .collect();
            for (_, block, pages) in &out {
                pages.clone().for_each(|page| _ = naive.insert(PageAt { block: *block, page }, Naive::Out));
            }
            let (mut windows, mut is_open, mut cleared, mut dropped) = (Vec::new(), false, 0, 0);
            for step in steps {
                match step {
                    Step::Open => {
                        windows.push(clears.open());
                        is_open = true;
                    }
                    Step::Close => {
                        clears.close();
                        is_open = false;
                    }
                    Step::Hint { old, block, pages } => {
                        let Some(hints) = windows.iter().rev().nth(usize::from(old)) else { continue };
                        let here = |at: &PageAt| at.block == block && pages.contains(&at.page);
                        prop_assert_eq!(hints.are_wanted(), is_open && !old);
                        let counted = hints.free(block, pages.clone());
                        if is_open && !old {
                            let spared = naive.iter_mut().filter(|(at, state)| here(at) && **state == Naive::Dirty);
                            let spared = spared.map(|(_, state)| *state = Naive::Anything).count() as u64;
                            prop_assert_eq!(counted, spared);
                            cleared += spared;
                        } else {
                            prop_assert_eq!(counted, 0);
                            dropped += naive.keys().filter(|at| here(at)).count() as u64;
                        }
                    }
                    Step::Sync { written } => {
                        // No sync comes while a window is open.
                        clears.close();
                        is_open = false;
                        for at in written {
                            bitmap.set(at);
                            naive.entry(at).and_modify(|state| if *state != Naive::Out { *state = Naive::Dirty });
                        }
                        clears.synced(0, 0..3);
                        clears.synced(1, 0..2);
                        let left_out = naive.iter().filter(|(_, state)| matches!(state, Naive::Anything | Naive::Out));
                        prop_assert_eq!(set(&clears.left_out()), left_out.map(|(at, _)| *at).collect());
                    }
                    Step::Scan(extent) => {
                        for bit in bits(bitmap.take(extent)) {
                            prop_assert_eq!(naive.insert(extent.page(bit), Naive::Sent), Some(Naive::Dirty));
                        }
                    }
                }
                let dirty = naive.iter().filter(|(_, state)| **state == Naive::Dirty).map(|(at, _)| *at).collect();
                prop_assert_eq!(set(&bitmap), dirty);
            }
            let spared = clears.spared();
            prop_assert_eq!((spared.hinted, spared.dropped), (cleared, dropped));
            let out = naive.values().filter(|state| **state == Naive::Out).count() as u64;
            prop_assert_eq!(spared.unplugged + spared.ignored, out);
        }
    }

    #[test]
    fn once_a_window_is_closed_no_hint_is_at_work() {
        let bitmap = Arc::new(DirtyBitmap::empty(&layout_of(page_size(4), &[64 * 64 * 4096])));
        let clears = Arc::new(Clears::new(bitmap.clone(), &[]));
        for _ in 0..200 {
            bitmap.set_range(0, 0..4096);
            let (before, hints, stop) = (clears.spared(), clears.open(), AtomicBool::new(false));
            thread::scope(|scope| {
                for start in [0, 2048] {
                    let (hints, stop) = (hints.clone(), &stop);
                    scope.spawn(move || {
                        while !stop.load(Ordering::Relaxed) {
                            (0..32).for_each(|run| _ = hints.free(0, start + run * 64..start + (run + 1) * 64));
                        }
                    });
                }
                while clears.spared().hinted == before.hinted {
                    thread::yield_now();
                }
                clears.close();
                bitmap.set_range(0, 0..4096);
                while clears.spared().dropped == before.dropped {
                    thread::yield_now();
                }
                let set = bitmap.count();
                stop.store(true, Ordering::Relaxed);
                assert_eq!(set, 4096);
            });
        }
    }
}
