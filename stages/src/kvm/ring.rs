//! Reads one vCPU's dirty ring, and resynchronizes when the kernel has overrun it.
//!
//! ```text
//!   ── reset ──▶│ harvested │ dirty │ free, until the kernel comes around
//!              next
//! ```
//!
//! The kernel counts the entries that it wrote and those that were reset, and exposes neither count. It checks a ring's fill when
//! it enters the guest, and reserves some entries for what one guest entry can write. Where it emulates the guest's stores the
//! reserve may be too small: one repeated store makes an entry for each of its parts, and a host that emulates many instructions
//! in a row checks only after the last. Then it **overwrites** entries that were not read, and its count of written entries runs
//! ahead by more than the ring holds.
//!
//! Three signs show that, and at least one is always there: every entry of the ring was dirty; the kernel did not reset what was
//! harvested, since it stops at an entry that is dirty again; or the last entry before the reset ones is written when the reset is
//! over. The third is for an entry that the vCPU writes while the kernel resets it: the kernel checks an entry and frees it in two
//! steps, and a write between them leaves no trace. The lost entries are unknown, so all pages count as written.
//!
//! The third sign counts on entries that are written in order from the first reset one. A reader that is out of step does not
//! know where the next one is written, so whatever it resets counts as overrun.
//!
//! Once everything was reset, the kernel's count is still ahead by a *gap* of entries that were never written at their place. The
//! next dirty entry shows where the gap ends, and the gap is reset with it.
//!
//! The layout of an entry and its flags are those of linux/kvm.h (`struct kvm_dirty_gfn`).

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// One entry of a ring, as the kernel writes it.
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    page: AtomicU64,
}

const FREE: u32 = 0;
const DIRTY: u32 = 1;
const HARVESTED: u32 = 2;

/// How often in a row the kernel may reset nothing: a signal can prevent one reset.
const MOST_IN_VAIN: u32 = 100;

impl Entry {
    /// The kernel writes an entry's flags last, and entries in order: reads after this load see what was written before it.
    fn flags(&self) -> u32 {
        self.flags.load(Ordering::Acquire)
    }

    fn mark_harvested(&self) {
        self.flags.store(HARVESTED, Ordering::Release);
    }
}

/// The position at which a ring is read.
#[derive(Debug, Default)]
pub(super) struct Reading {
    /// The first entry that is not reset.
    next: usize,
    /// Entries from there on that are marked for the reset.
    harvested: usize,
    step: Step,
    /// The kernel called the ring full, it was empty, and nothing was reset since.
    full_in_vain: bool,
}

/// Whether the reader's position is in step with the kernel's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Step {
    #[default]
    In,
    /// The kernel has overrun the ring.
    Out,
    /// It has, and every entry is free: the next written entry ends the gap.
    Drained,
}

impl Reading {
    /// Calls `found` with slot and page of each dirty entry and marks it for the reset. `is_full` means that the kernel does
    /// not enter the guest. Returns how many entries are marked.
    pub(super) fn harvest(&mut self, ring: &[Entry], is_full: bool, found: &mut dyn FnMut(u32, u64)) -> usize {
        self.mark_gap(ring);
        // At most all entries: harvested ones stay until the reset.
        while self.harvested < ring.len() {
            let entry = at(ring, self.next + self.harvested);
            match entry.flags() {
                FREE => break,
                flags if flags & DIRTY != 0 => {
                    found(entry.slot.load(Ordering::Relaxed), entry.page.load(Ordering::Relaxed));
                    entry.mark_harvested();
                }
                // Left by a harvest that the kernel has overrun.
                _harvested => {}
            }
            self.harvested += 1;
        }
        if self.harvested == 0 && is_full && self.full_in_vain {
            self.mark_some_of_an_endless_gap(ring);
        }
        self.full_in_vain = self.harvested == 0 && (is_full || self.full_in_vain);
        self.harvested
    }

    /// Lets the kernel reset the marked entries of the ring; `reset` returns how many it did reset. True if the kernel has overrun
    /// the ring, so that entries are lost.
    pub(super) fn reset(&mut self, ring: &[Entry], mut reset: impl FnMut() -> io::Result<usize>) -> io::Result<bool> {
        let entries = ring.len();
        let all_were_dirty = self.harvested == entries;
        // Entries are written in order: what comes around to the first reset entry has written this one before.
        let last = self.next + entries - 1;
        let mut in_vain = 0;
        while self.harvested > 0 && in_vain < MOST_IN_VAIN {
            let done = reset()?.min(self.harvested);
            in_vain = if done == 0 { in_vain + 1 } else { 0 };
            self.harvested -= done;
            self.next = (self.next + done) % entries;
        }
        let is_run_over =
            self.harvested > 0 || all_were_dirty || at(ring, last).flags() != FREE || self.step != Step::In;
        self.harvested = 0;
        if is_run_over {
            self.step = Step::Out;
        }
        Ok(is_run_over)
    }

    /// Marks the entries of the gap, if its end is known.
    fn mark_gap(&mut self, ring: &[Entry]) {
        if self.step == Step::In {
            return;
        }
        let is_empty = at(ring, self.next).flags() == FREE;
        match self.gap(ring) {
            Some(gap) => {
                gap.clone().for_each(|entry| at(ring, self.next + entry).mark_harvested());
                // Written entries before the position: the kernel has overrun the ring again.
                if gap.start == 0 {
                    self.harvested = gap.end;
                    self.step = Step::In;
                }
            }
            None if is_empty => self.step = Step::Drained,
            None if self.step == Step::Drained => self.step = Step::In,
            None => {}
        }
    }

    /// Free entries before one that is written.
    fn gap(&self, ring: &[Entry]) -> Option<Range<usize>> {
        let is_free = |entry: &usize| at(ring, self.next + entry).flags() == FREE;
        let mut from = 0;
        loop {
            let free = (from..ring.len()).find(is_free)?;
            let written = (free..ring.len()).find(|entry| !is_free(entry))?;
            // Entries before that one that were written after they were checked are visible by now.
            let end = (free..written).find(|entry| !is_free(entry)).unwrap_or(written);
            if end > free {
                return Some(free..end);
            }
            from = written;
        }
    }

    /// Handles a ring that is empty, and that the kernel repeatedly calls full: its count is ahead by at least a ring's length.
    /// The kernel calls no ring full that is less than a quarter full.
    fn mark_some_of_an_endless_gap(&mut self, ring: &[Entry]) {
        self.step = Step::Out;
        self.harvested = ring.len() / 4;
        (0..self.harvested).for_each(|entry| at(ring, self.next + entry).mark_harvested());
    }
}

fn at(ring: &[Entry], index: usize) -> &Entry {
    &ring[index % ring.len()]
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use proptest::prelude::*;

    const ENTRIES: usize = 64;
    const RESERVE: usize = 8;

    /// The kernel's side of a ring, as virt/kvm/dirty_ring.c keeps it.
    struct Kernel {
        ring: Arc<[Entry]>,
        entered: usize,
        reset: usize,
    }

    impl Kernel {
        fn new() -> Self {
            Self { ring: (0..ENTRIES).map(|_| Entry::default()).collect(), entered: 0, reset: 0 }
        }

        fn push(&mut self, page: u64) {
            let entry = at(&self.ring, self.entered);
            entry.page.store(page, Ordering::Relaxed);
            entry.flags.store(DIRTY, Ordering::Release);
            self.entered += 1;
        }

        fn is_full(&self) -> bool {
            self.entered - self.reset >= ENTRIES - RESERVE
        }

        /// Resets at most `most` entries. The vCPU writes `amid` entries after the kernel has checked the first one, and before
        /// it frees that; afterwards, if there is none to free.
        fn reset(&mut self, most: usize, amid: Range<u64>) -> usize {
            let mut amid = Some(amid);
            let began = self.reset;
            while self.reset - began < most && at(&self.ring, self.reset).flags() & HARVESTED != 0 {
                assert!(self.reset < self.entered, "nothing is reset that was not entered");
                amid.take().into_iter().flatten().for_each(|page| self.push(page));
                at(&self.ring, self.reset).flags.store(FREE, Ordering::Release);
                self.reset += 1;
            }
            amid.into_iter().flatten().for_each(|page| self.push(page));
            self.reset - began
        }
    }

    /// A ring with its reader, and the pages still to be found.
    struct Bench {
        kernel: Kernel,
        reading: Reading,
        pages: u64,
        /// Pages that were written and neither found nor declared lost.
        owed: Vec<u64>,
    }

    impl Bench {
        fn new() -> Self {
            Self { kernel: Kernel::new(), reading: Reading::default(), pages: 0, owed: Vec::new() }
        }

        fn write(&mut self, count: usize) {
            for _ in 0..count {
                self.kernel.push(self.pages);
                self.owed.push(self.pages);
                self.pages += 1;
            }
        }

        /// `between` writes come between harvest and reset, `amid` while the kernel resets the first entry; the kernel
        /// resets `most` at a time.
        fn harvest(&mut self, is_full: bool, between: usize, amid: usize, most: usize) -> bool {
            let owed = &mut self.owed;
            let marked =
                self.reading.harvest(&self.kernel.ring, is_full, &mut |_, page| owed.retain(|&own| own != page));
            self.write(between);
            if marked == 0 {
                return false;
            }
            let is_run_over = self.reset(amid, most);
            if is_run_over {
                // All pages count as written.
                self.owed.clear();
            }
            is_run_over
        }

        fn reset(&mut self, amid: usize, most: usize) -> bool {
            // The mapping, which the reader shares with the kernel.
            let ring = self.kernel.ring.clone();
            let mut written = self.pages..self.pages + amid as u64;
            self.pages = written.end;
            self.owed.extend(written.clone());
            let Self { kernel, reading, .. } = self;
            reading.reset(&ring, || Ok(kernel.reset(most, std::mem::take(&mut written)))).unwrap()
        }

        /// The vCPU is stopped: its ring is emptied until the kernel would let it continue.
        fn empty(&mut self) {
            // With a large gap each harvest frees a quarter of the ring.
            for _ in 0..2000 {
                self.harvest(self.kernel.is_full(), 0, 0, usize::MAX);
            }
            assert!(!self.kernel.is_full(), "the guest continues");
            assert_eq!(self.owed, [0; 0], "every write is found, or all are declared lost");
        }
    }

    #[test]
    fn what_fits_is_found_and_nothing_is_declared_lost() {
        let mut bench = Bench::new();
        for count in [1, ENTRIES - 1, 0, 17] {
            bench.write(count);
            assert!(!bench.harvest(false, 0, 0, usize::MAX));
            assert_eq!(bench.owed, [0; 0]);
        }
    }

    #[test]
    fn a_reset_that_a_signal_cuts_short_is_gone_on_with() {
        let mut bench = Bench::new();
        bench.write(40);
        assert!(!bench.harvest(false, 0, 0, 7));
        assert_eq!(bench.kernel.reset, 40);
    }

    #[test]
    fn a_ring_that_was_run_over_says_so_and_comes_back_into_step() {
        for count in [ENTRIES, ENTRIES + 5, 2 * ENTRIES + 3, 7 * ENTRIES] {
            let mut bench = Bench::new();
            bench.write(11);
            bench.harvest(false, 0, 0, usize::MAX);
            bench.write(count);
            assert!(bench.harvest(true, 0, 0, usize::MAX), "{count}");
            bench.empty();
            // With a large gap a few entries may overrun the ring once more.
            for _ in 0..2 {
                bench.write(ENTRIES / 4);
                bench.empty();
            }
            bench.write(ENTRIES / 2);
            assert!(!bench.harvest(false, 0, 0, usize::MAX), "{count}: it is in step");
            assert_eq!(bench.kernel.entered, bench.kernel.reset, "{count}: without a gap");
        }
    }

    #[test]
    fn entries_that_are_written_over_between_harvest_and_reset_are_not_taken_for_read() {
        let mut bench = Bench::new();
        bench.write(20);
        assert!(bench.harvest(false, ENTRIES, 0, usize::MAX));
        bench.empty();
    }

    #[test]
    fn an_entry_that_is_written_while_the_kernel_frees_it_is_declared_lost() {
        let mut bench = Bench::new();
        bench.write(20);
        // The write after the one that fills the ring is on the entry that is being freed.
        assert!(bench.harvest(false, 0, ENTRIES - 20 + 1, usize::MAX));
        bench.empty();
    }

    #[test]
    fn an_empty_ring_that_is_called_full_once_is_left_alone() {
        let mut bench = Bench::new();
        // Another thread emptied it between the vCPU's exit and its call.
        bench.harvest(true, 0, 0, usize::MAX);
        bench.write(3);
        bench.harvest(true, 0, 0, usize::MAX);
        bench.harvest(true, 0, 0, usize::MAX);
        assert_eq!(bench.kernel.reset, 3);
    }

    proptest! {
        #[test]
        fn no_write_is_missed_in_silence(
            steps in proptest::collection::vec((0..3 * ENTRIES, 0..2 * ENTRIES, 1..2 * ENTRIES, 0..6_u8), 1..60)
        ) {
            let mut bench = Bench::new();
            for (count, between, most, kind) in steps {
                // A vCPU writes only after the kernel has let it enter, then any number of entries.
                if !bench.kernel.is_full() {
                    bench.write(count);
                }
                let amid = if kind == 1 { between } else { 0 };
                let between = if kind == 0 { between } else { 0 };
                bench.harvest(bench.kernel.is_full(), between, amid, most);
                if kind == 4 {
                    bench.empty();
                }
            }
            bench.empty();
        }
    }
}
