//! Excluded pages: free-page hints, and pages that never travel. The one place besides the scanner that clears bits of the dirty
//! bitmap.
//!
//! Clearing its bit is enough to exclude a page (ARCHITECTURE.md, law 1: the bitmap is the truth). This module clears the bits,
//! counts the pages, and enforces the rules that make it correct.
//!
//! - **Pages excluded for the whole migration** are unplugged memory and ignored blocks. Their bits are cleared when the bitmap is
//!   made, and again in each sync in which a log reports them.
//! - **Hints** name free pages, whose content does not matter. They come from the guest's threads while the scanner works, through
//!   the [`Hints`] of the open window; all others are dropped.
//!
//! ```text
//!         sync            window open            sync
//!  ──────▇▇▇▇▇▇──┬───────────────────────────┬──▇▇▇▇▇▇──▶
//!                open: every log is armed    close: no hint is in progress, later ones are dropped
//! ```
//!
//! **Why no written page is lost.** A hint clears a bit only while a window is open. While one is open, no sync sets any bit
//! and no page waits to be re-armed. The store that reuses a hinted page comes either before the hint, which the caller must
//! prevent (see [`Hints::free`]), or after it: then a log finds it and the next sync sets the bit again. A hint and the scanner
//! may race for the same bit, and one of them gets it. If the scanner does, a free page is sent, which is harmless.
//!
//! **What the destination holds.** A page that was hinted while its bit was set has stale content at the destination, until it is
//! written and sent. [`Exclusions::left_out`] returns these pages: digests must leave them out. A delta refers to what the
//! destination holds, and a hint does not change that.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use serde::{Deserialize, Serialize};

use crate::bitmap::{DirtyBitmap, words_of};

/// Why pages are excluded for the whole migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExclusionReason {
    /// No memory backs them.
    Unplugged,
    /// The destination has the block's memory already.
    Ignored,
}

/// How many pages were excluded, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct ExcludedPages {
    /// Bits that hints cleared: the page was dirty, and was not sent in that round.
    pub hinted: u64,
    /// Pages of hints that came while their window was not open.
    #[serde(rename = "hints_dropped")]
    pub dropped: u64,
    /// Pages that are unplugged.
    pub unplugged: u64,
    /// Pages of ignored blocks.
    pub ignored: u64,
}

/// The clearing of bits in one migration's bitmap. See the [module](self).
#[derive(Debug)]
pub struct Exclusions {
    bitmap: Arc<DirtyBitmap>,
    /// `None`: no page.
    permanent: Option<DirtyBitmap>,
    /// Pages that were hinted while their bit was set, and that no sync has set since.
    hinted: DirtyBitmap,
    /// Locked for reading by each hint in progress.
    window: RwLock<Window>,
    unplugged: u64,
    ignored: u64,
    cleared: AtomicU64,
    dropped: AtomicU64,
}

/// The number of the window: a hint of an earlier one is dropped.
#[derive(Debug, Default)]
struct Window {
    number: u64,
    is_open: bool,
}

impl Exclusions {
    /// Clears the bits of excluded pages in a bitmap that is not scanned yet. No window is open.
    ///
    /// # Panics
    /// If a range reaches beyond its block.
    pub fn new(bitmap: Arc<DirtyBitmap>, permanent: &[(ExclusionReason, u32, Range<u64>)]) -> Self {
        let out = DirtyBitmap::empty(bitmap.layout());
        let (mut unplugged, mut ignored) = (0, 0);
        for (why, block, pages) in permanent {
            let count = match why {
                ExclusionReason::Unplugged => &mut unplugged,
                ExclusionReason::Ignored => &mut ignored,
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
            permanent: (unplugged + ignored > 0).then_some(out),
            window: RwLock::default(),
            unplugged,
            ignored,
            cleared: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        }
    }

    /// The pages that are excluded for the whole migration, if there are any.
    #[must_use]
    pub fn permanent(&self) -> Option<&DirtyBitmap> {
        self.permanent.as_ref()
    }

    /// Opens the next window: hints through the returned value clear bits until it is closed. The caller must ensure that no sync
    /// comes before that, and that every log is armed for every page, so that stores are found from this call on.
    #[must_use]
    pub fn open(self: &Arc<Self>) -> Hints {
        let mut window = self.window.write().unwrap_or_else(PoisonError::into_inner);
        window.number += 1;
        window.is_open = true;
        Hints { exclusions: self.clone(), window: window.number }
    }

    /// Closes the window, if one is open. Once this returns, no hint clears a bit, not even one that came in time and was in
    /// progress.
    pub fn close(&self) {
        self.window.write().unwrap_or_else(PoisonError::into_inner).is_open = false;
    }

    /// To be called when a sync has moved what the logs found in these extents: clears the bits of excluded pages again, and
    /// notes that pages whose bit is set will be sent, whatever was hinted before.
    ///
    /// # Panics
    /// If the extents reach beyond the block.
    pub fn synced(&self, block: u32, extents: Range<u32>) {
        if let Some(out) = &self.permanent {
            for at in out.dirty_extents(block, extents.clone()) {
                let _never_sent = self.bitmap.take_mask(at, out.peek(at));
            }
        }
        for at in self.hinted.dirty_extents(block, extents) {
            let _sent_again = self.hinted.take_mask(at, self.bitmap.peek(at));
        }
    }

    /// The pages whose content at the destination may be stale, after a sync and while no window is open.
    #[must_use]
    pub fn left_out(&self) -> DirtyBitmap {
        let all = DirtyBitmap::empty(self.bitmap.layout());
        for some in self.permanent.iter().chain([&self.hinted]) {
            some.all_dirty_extents().for_each(|at| _ = all.set_mask(at, some.peek(at)));
        }
        all
    }

    /// What was excluded so far.
    #[must_use]
    pub fn excluded(&self) -> ExcludedPages {
        ExcludedPages {
            hinted: self.cleared.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
            unplugged: self.unplugged,
            ignored: self.ignored,
        }
    }

    /// The most bytes of memory that it takes for a guest of this layout.
    #[must_use]
    pub fn bytes_of(layout: &crate::geometry::Layout) -> u64 {
        2 * DirtyBitmap::bytes_of(layout)
    }
}

/// A guest reports its free pages through this while one window is open. Cheap to clone; any thread may use it.
#[derive(Clone, Debug)]
pub struct Hints {
    exclusions: Arc<Exclusions>,
    window: u64,
}

impl Hints {
    /// Reports pages of a block as free: their bits are cleared, and they are not sent until they are written. Returns how many
    /// of them were dirty; 0 if the window is closed.
    ///
    /// **They must be free until this returns**: nothing that will be read may be stored into them from before this call
    /// until it returns. Afterwards they may be reused at once: the log finds a store after this call, and the page
    /// is sent. (A guest that reports asynchronously must keep a page out of its allocator from the report until this
    /// call for it has returned, or until the guest is notified that the report was dropped.)
    ///
    /// Pages beyond the block are ignored: the ranges come from a guest, which is not trusted.
    pub fn free(&self, block: u32, pages: Range<u64>) -> u64 {
        let exclusions = &*self.exclusions;
        let layout = exclusions.bitmap.layout();
        let end = if block < layout.block_count() { layout.block_pages(block) } else { 0 };
        let pages = pages.start..pages.end.min(end);
        let window = exclusions.window.read().unwrap_or_else(PoisonError::into_inner);
        if !window.is_open || window.number != self.window {
            exclusions.dropped.fetch_add(pages.end.saturating_sub(pages.start), Ordering::Relaxed);
            return 0;
        }
        let mut cleared = 0;
        for (at, mask) in words_of(block, pages) {
            let mask = exclusions.bitmap.take_mask(at, mask);
            // These are read only after the window is closed.
            exclusions.hinted.set_mask(at, mask);
            cleared += u64::from(mask.count_ones());
        }
        exclusions.cleared.fetch_add(cleared, Ordering::Relaxed);
        cleared
    }

    /// Whether its window is still open. Only an optimization: a late hint is dropped anyway.
    #[must_use]
    pub fn are_wanted(&self) -> bool {
        let window = self.exclusions.window.read().unwrap_or_else(PoisonError::into_inner);
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

    /// What the destination may hold of a page, modelled without a bitmap.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Naive {
        /// To be sent.
        Dirty,
        /// Sent, and not written since.
        Sent,
        /// Free when it was dirty: any content.
        Anything,
        /// Never sent.
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
            let why = [ExclusionReason::Unplugged, ExclusionReason::Ignored];
            let out: Vec<_> = (0..).zip(out).map(|(index, (block, one, two))| {
                let why: ExclusionReason = why[index % 2];
                (why, block, one.min(two)..one.max(two))
            }).collect();
            let exclusions = Arc::new(Exclusions::new(bitmap.clone(), &out));
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
                        windows.push(exclusions.open());
                        is_open = true;
                    }
                    Step::Close => {
                        exclusions.close();
                        is_open = false;
                    }
                    Step::Hint { old, block, pages } => {
                        let Some(hints) = windows.iter().rev().nth(usize::from(old)) else { continue };
                        let here = |at: &PageAt| at.block == block && pages.contains(&at.page);
                        prop_assert_eq!(hints.are_wanted(), is_open && !old);
                        let counted = hints.free(block, pages.clone());
                        if is_open && !old {
                            let excluded = naive.iter_mut().filter(|(at, state)| here(at) && **state == Naive::Dirty);
                            let excluded = excluded.map(|(_, state)| *state = Naive::Anything).count() as u64;
                            prop_assert_eq!(counted, excluded);
                            cleared += excluded;
                        } else {
                            prop_assert_eq!(counted, 0);
                            dropped += naive.keys().filter(|at| here(at)).count() as u64;
                        }
                    }
                    Step::Sync { written } => {
                        // No sync comes while a window is open.
                        exclusions.close();
                        is_open = false;
                        for at in written {
                            bitmap.set(at);
                            naive.entry(at).and_modify(|state| if *state != Naive::Out { *state = Naive::Dirty });
                        }
                        exclusions.synced(0, 0..3);
                        exclusions.synced(1, 0..2);
                        let left_out = naive.iter().filter(|(_, state)| matches!(state, Naive::Anything | Naive::Out));
                        prop_assert_eq!(set(&exclusions.left_out()), left_out.map(|(at, _)| *at).collect());
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
            let excluded = exclusions.excluded();
            prop_assert_eq!((excluded.hinted, excluded.dropped), (cleared, dropped));
            let out = naive.values().filter(|state| **state == Naive::Out).count() as u64;
            prop_assert_eq!(excluded.unplugged + excluded.ignored, out);
        }
    }

    #[test]
    fn once_a_window_is_closed_no_hint_is_at_work() {
        let bitmap = Arc::new(DirtyBitmap::empty(&layout_of(page_size(4), &[64 * 64 * 4096])));
        let exclusions = Arc::new(Exclusions::new(bitmap.clone(), &[]));
        for _ in 0..200 {
            bitmap.set_range(0, 0..4096);
            let (before, hints, stop) = (exclusions.excluded(), exclusions.open(), AtomicBool::new(false));
            thread::scope(|scope| {
                for start in [0, 2048] {
                    let (hints, stop) = (hints.clone(), &stop);
                    scope.spawn(move || {
                        while !stop.load(Ordering::Relaxed) {
                            (0..32).for_each(|run| _ = hints.free(0, start + run * 64..start + (run + 1) * 64));
                        }
                    });
                }
                while exclusions.excluded().hinted == before.hinted {
                    thread::yield_now();
                }
                exclusions.close();
                bitmap.set_range(0, 0..4096);
                while exclusions.excluded().dropped == before.dropped {
                    thread::yield_now();
                }
                let set = bitmap.count();
                stop.store(true, Ordering::Relaxed);
                assert_eq!(set, 4096);
            });
        }
    }
}
