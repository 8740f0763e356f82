//! The free memory of a guest in this crate, as ranges with a state each.
//!
//! ```text
//!          take                    hold
//!  taken ◀────── free ◀──────────────────▶ held, while it is hinted
//!          ──────▶     let_go
//!         give_back
//! ```
//!
//! A range is taken only while it is free, so none is written while a hint for it is in progress. This is how these
//! guests meet the contract of [`Hints::free`](memferry::guest::hints::Hints::free).

use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};

const FREE: u8 = 0;
const HELD: u8 = 1;
const TAKEN: u8 = 2;

/// The ranges, all free at first. Shared by the threads that take them and the thread that hints them.
#[derive(Debug)]
pub(super) struct FreeRanges {
    pages: Range<u32>,
    range_pages: u32,
    states: Box<[AtomicU8]>,
}

impl FreeRanges {
    /// These pages, in ranges of the given size; the last may have fewer.
    pub(super) fn new(pages: Range<u32>, range_pages: u32) -> Self {
        let count = pages.end.saturating_sub(pages.start).div_ceil(range_pages);
        Self { pages, range_pages, states: (0..count).map(|_| AtomicU8::new(FREE)).collect() }
    }

    /// How many there are.
    pub(super) fn count(&self) -> u32 {
        u32::try_from(self.states.len()).expect("as many as pages at most")
    }

    /// The pages of a range.
    pub(super) fn pages(&self, range: u32) -> Range<u32> {
        let start = self.pages.start + range * self.range_pages;
        start..self.pages.end.min(start.saturating_add(self.range_pages))
    }

    /// Takes a range into use, if it is free.
    pub(super) fn take(&self, range: u32) -> bool {
        self.change(range, TAKEN).is_ok()
    }

    /// Takes a range into use, in any state: waits while it is held, which is not long.
    #[cfg_attr(
        not(all(feature = "kvm", target_os = "linux", target_arch = "x86_64")),
        expect(dead_code, reason = "machines alone wait for a range")
    )]
    pub(super) fn take_when_let_go(&self, range: u32) {
        while self.change(range, TAKEN).is_err_and(|by| by != TAKEN) {
            std::thread::yield_now();
        }
    }

    /// Is it in use?
    #[cfg_attr(
        not(all(feature = "kvm", target_os = "linux", target_arch = "x86_64")),
        expect(dead_code, reason = "machines alone ask")
    )]
    pub(super) fn is_taken(&self, range: u32) -> bool {
        self.states[range as usize].load(Ordering::Relaxed) == TAKEN
    }

    /// Frees a range that was taken.
    pub(super) fn give_back(&self, range: u32) {
        self.states[range as usize].store(FREE, Ordering::Release);
    }

    /// Holds the free ranges from here on, up to the first that is not free, at most the given number. They must be
    /// released.
    pub(super) fn hold(&self, from: u32, most: u32) -> Range<u32> {
        let end = self.count().min(from.saturating_add(most));
        let held = (from..end).take_while(|&range| self.change(range, HELD).is_ok()).count();
        from..from + u32::try_from(held).expect("at most `most`")
    }

    /// Frees ranges that were held.
    pub(super) fn let_go(&self, held: Range<u32>) {
        held.for_each(|range| self.states[range as usize].store(FREE, Ordering::Release));
    }

    /// Changes the state of a range that is free; else returns its state.
    fn change(&self, range: u32, to: u8) -> Result<u8, u8> {
        self.states[range as usize].compare_exchange(FREE, to, Ordering::Acquire, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_has_one_holder() {
        let ranges = FreeRanges::new(100..111, 4);
        assert_eq!((ranges.count(), ranges.pages(0), ranges.pages(2)), (3, 100..104, 108..111));
        assert!(ranges.take(1) && !ranges.take(1));
        assert_eq!((ranges.hold(0, 9), ranges.hold(1, 9), ranges.hold(2, 9)), (0..1, 1..1, 2..3));
        assert!(!ranges.take(0) && !ranges.take(2));
        ranges.let_go(0..1);
        ranges.give_back(1);
        assert!(ranges.take(0) && ranges.take(1));
    }

    #[test]
    #[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
    fn who_waits_for_a_range_has_it() {
        let (ranges, over) = (FreeRanges::new(0..3, 1), std::sync::atomic::AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    ranges.let_go(ranges.hold(1, 9));
                }
            });
            for _ in 0..200_000 {
                ranges.take_when_let_go(1);
                assert!(ranges.is_taken(1));
                ranges.give_back(1);
            }
            over.store(true, Ordering::Relaxed);
        });
    }
}
