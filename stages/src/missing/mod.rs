//! Memory of a guest that runs before all of its pages are there (postcopy, lazy restore).
//!
//! ```text
//!  a thread touches a page that is not there, and waits
//!        │ fault                                          pages that arrive, asked for or not
//!        ▼                                                           │
//!  ┌───────────┐ page ──▶ request ══▶ whoever has it ══▶ ┌───────────▼─────────┐
//!  │ Faults    │                                         │ place, place_zero   │ only where the page is still missing:
//!  │ a thread  │ not expected, or discarded: zero        │ any thread          │ the kernel fills it and wakes who waits
//!  └───────────┘                                         └─────────────────────┘
//! ```
//!
//! A [`MissingMemory`] has the pages that are *expected*, a bitmap that is given at the start. Each of them is placed once, by
//! by the thread that brings it first. All other pages are zero, and are resolved when they are touched, without a request. When all pages are
//! placed the memory is unregistered, and is like any other.
//!
//! Nothing here accesses the memory itself: pages are placed through the userfaultfd alone. So the memory may as well be another
//! process's, whose descriptor and addresses arrive from it.
//!
//! **Discards.** With [`Discards::Followed`] a guest may discard pages meanwhile (a balloon's `madvise`): they are zero from then on, and
//! no page that arrives later fills them. The kernel reports a discard before it happens, and lets no page be placed until the report
//! is read; after that, a page would be placed again. So no page is placed while a report is read: a lock, which is held for at most
//! 64 KiB. Holes that are punched into a shared file are not reported.
//!
//! **The descriptor** is never closed while a page is missing: the kernel would let the threads that wait read zeros, and the guest would
//! continue with wrong memory. Dropping a [`MissingMemory`] then leaks the descriptor, when it unwinds too, and the threads wait until
//! the process ends. The alternative, [`poison`](MissingMemory::poison), makes the pages fail with SIGBUS, which ends the whole process: of a
//! VMM with other guests too, and before the error that caused it is reported. So it happens only if it is asked for.

mod faults;
mod target;
#[cfg(test)]
pub(crate) mod tests;
mod times;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;
use std::time::Instant;

use rustix::event::EventfdFlags;

pub use crate::kernel::missing::NoMissingFaults;
pub use faults::{Faults, Next, Stop};
pub use target::TargetError;
pub use times::{MissingCounts, Waits};

use crate::bitmap::{DirtyBitmap, locate, words_of};
use crate::geometry::{ExtentAt, Layout, PageAt, PageSize, bits, run_mask, runs};
use crate::kernel::missing::{Event, MissingFaults, Step};
use crate::memory::MappedMemory;
use target::Target;
use times::Counters;

/// The most bytes that are placed in one call while a discard may be reported.
const MOST_BYTES: usize = 64 << 10;

/// Whether the owner of the memory may discard pages of it while some are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discards {
    /// It may: its discards wait until they are noticed. A thread must run [`Faults`] whenever it discards.
    Followed,
    /// It does not.
    Excluded,
}

/// Checks whether this process gets a userfaultfd that sees the faults of the kernel too.
///
/// # Errors
/// The reason if it does not.
pub fn supported() -> Result<(), NoMissingFaults> {
    MissingFaults::open(true).map(drop)
}

/// The memory of a guest, of which pages are missing. See the [module](self). Shared by the threads that place pages and the one that
/// takes its [`Faults`].
pub struct MissingMemory {
    target: Target,
    /// The pages that are placed, as given.
    expected: DirtyBitmap,
    /// Those of them that are not placed yet.
    missing: DirtyBitmap,
    /// Those of them that no thread places at the moment.
    unclaimed: DirtyBitmap,
    /// How many are missing.
    left: AtomicU64,
    /// Nothing is missing and nothing is registered.
    complete: AtomicBool,
    poisoned: AtomicBool,
    removes: Option<Removes>,
    queue: Mutex<Queue>,
    requested: Requested,
    counters: Counters,
    /// Wakes the thread that waits for faults.
    kick: OwnedFd,
    /// Whether there is a [`Faults`].
    followed: AtomicBool,
}

/// Discards that are followed.
#[derive(Debug)]
struct Removes {
    /// Held for reading while pages are placed, and for writing while events are read.
    reports: RwLock<()>,
    /// Pages of the host that were discarded, in a layout of such pages.
    removed: DirtyBitmap,
    /// Whether discards are ours at the moment.
    ours: AtomicBool,
}

/// What the thread that takes faults has to handle.
#[derive(Debug, Default)]
struct Queue {
    /// Addresses of faults.
    faults: VecDeque<usize>,
    /// Pages to ask for again.
    again: VecDeque<PageAt>,
}

/// The pages that were requested and have not arrived.
#[derive(Debug)]
struct Requested {
    pages: DirtyBitmap,
    since: Mutex<BTreeMap<PageAt, Instant>>,
}

/// Why a page cannot be placed, or a fault not be handled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlaceError {
    /// A page that was not in the bitmap of missing pages.
    #[error("{0} is not expected: it was not missing at the start")]
    NotExpected(PageAt),
    /// There is no such page.
    #[error("there is no {0}")]
    OutOfRange(PageAt),
    /// The bytes are not those of the pages.
    #[error("{bytes} bytes for {pages} pages")]
    Length {
        /// How many pages.
        pages: u32,
        /// How many bytes.
        bytes: usize,
    },
    /// A missing page is there: its memory is written past the userfaultfd.
    #[error("{0} is missing, but somebody else has populated it")]
    Populated(PageAt),
    /// The memory is no longer mapped where it was registered.
    #[error("{0} is not registered for missing faults")]
    NotRegistered(PageAt),
    /// The process that owns the memory has ended.
    #[error("the process that owns the memory has ended")]
    OwnerGone,
    /// A fault at an address that is not the guest's.
    #[error("a fault at {0:#x}, where no block lies")]
    NoBlock(usize),
    /// The kernel refuses to place a page.
    #[error("cannot place {0}: {1}")]
    Kernel(PageAt, #[source] io::Error),
    /// The kernel refuses to report faults.
    #[error("cannot read faults: {0}")]
    Faults(#[source] io::Error),
}

impl MissingMemory {
    /// Registers memory of this process for missing faults, by block. The pages of `expected` are missing: they were never touched, or
    /// were [discarded](MappedMemory::discard). Blocks without memory here are not followed.
    ///
    /// Huge pages are no longer requested for the memory: a fault would fill one as a whole.
    ///
    /// # Errors
    /// [`TargetError`] if a page is expected where no memory is given, if the memory's kind or the host's page size does not allow it, or
    /// if there is no userfaultfd. Nothing is registered then.
    ///
    /// # Panics
    /// If a block's memory is not as long as the block, or there is no such block.
    pub fn register(
        layout: &Layout,
        blocks: Vec<(u32, Arc<MappedMemory>)>,
        expected: DirtyBitmap,
        discards: Discards,
    ) -> Result<Arc<Self>, TargetError> {
        assert_eq!(expected.layout(), layout, "a bitmap of this guest");
        let kick = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let kick = kick.map_err(|error| TargetError::Kernel(error.into()))?;
        let target = Target::own(layout, blocks, &expected, discards)?;
        Ok(Arc::new(Self::over(target, expected, discards, kick)))
    }

    fn over(target: Target, expected: DirtyBitmap, discards: Discards, kick: OwnedFd) -> Self {
        let removes = || Removes {
            reports: RwLock::default(),
            removed: DirtyBitmap::empty(&target.host_layout),
            ours: AtomicBool::new(false),
        };
        let this = Self {
            missing: expected.copied(),
            unclaimed: expected.copied(),
            left: AtomicU64::new(expected.count()),
            complete: AtomicBool::new(false),
            poisoned: AtomicBool::new(false),
            removes: (discards == Discards::Followed).then(removes),
            queue: Mutex::default(),
            requested: Requested { pages: DirtyBitmap::empty(expected.layout()), since: Mutex::default() },
            counters: Counters::default(),
            kick,
            followed: AtomicBool::new(false),
            expected,
            target,
        };
        if this.left.load(Ordering::Relaxed) == 0 {
            this.finish();
        }
        this
    }

    /// The size of the guest's pages.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.expected.layout().page_size()
    }

    /// The pages that are not placed yet: after a lost connection, those that must be sent.
    #[must_use]
    pub fn missing(&self) -> &DirtyBitmap {
        &self.missing
    }

    /// How many pages are missing.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.left.load(Ordering::Acquire)
    }

    /// Whether all pages are placed or [abandoned](Self::abandon), and the memory is like any other.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// What happened until now.
    #[must_use]
    pub fn counts(&self) -> MissingCounts {
        self.counters.read()
    }

    /// The most bytes of memory that this takes for a guest of this layout, beside a few for each thread that waits.
    #[must_use]
    pub fn bytes_of(layout: &Layout) -> u64 {
        let host_pages = layout.page_size().bytes() / rustix::param::page_size().min(layout.page_size().bytes());
        (4 + host_pages as u64) * DirtyBitmap::bytes_of(layout)
    }

    /// Places pages of an extent: `bytes` are those of the set bits, lowest first. Returns the pages that were placed: those that were
    /// placed before are left as they are, and those that were discarded stay zero.
    ///
    /// # Errors
    /// [`PlaceError`]; where it is the kernel's, some of the pages may be there, though they do not count as placed.
    pub fn place(&self, at: ExtentAt, pages: u64, bytes: &[u8]) -> Result<u64, PlaceError> {
        self.check(at, pages)?;
        let count = pages.count_ones();
        if bytes.len() != count as usize * self.page_size().bytes() {
            return Err(PlaceError::Length { pages: count, bytes: bytes.len() });
        }
        self.place_missing(at, pages, |run| {
            let before = (pages & run_mask(0, run.trailing_zeros())).count_ones() as usize;
            let (start, length) =
                (before * self.page_size().bytes(), run.count_ones() as usize * self.page_size().bytes());
            self.fill(at, run, &bytes[start..start + length])
        })
    }

    /// As [`place`](Self::place), for pages that are zero.
    ///
    /// # Errors
    /// As there.
    pub fn place_zero(&self, at: ExtentAt, pages: u64) -> Result<u64, PlaceError> {
        self.check(at, pages)?;
        self.place_missing(at, pages, |run| {
            let (start, length) = self.offsets(at, run);
            self.steps(at.block, start..start + length, |part, _| self.target.faults.zero(part))
        })
    }

    /// Drops pages that are expected, before the guest runs: memory that was written, but is to be placed anew. A thread must run
    /// [`Faults`] meanwhile if discards are followed; these are not taken for the guest's.
    ///
    /// # Errors
    /// As [`MappedMemory::discard`].
    ///
    /// # Panics
    /// If a page is not missing, or belongs to memory of another process.
    pub fn discard(&self, pages: &DirtyBitmap) -> io::Result<()> {
        let all_missing = |at| pages.peek(at) & !self.missing.peek(at) == 0;
        assert!(pages.all_dirty_extents().all(all_missing), "only missing pages are dropped");
        if let Some(removes) = &self.removes {
            removes.ours.store(true, Ordering::SeqCst);
        }
        let dropped = (0..pages.layout().block_count()).try_for_each(|block| {
            let mut runs = pages.page_runs(block).peekable();
            if runs.peek().is_none() {
                return Ok(());
            }
            self.target.memory(block).expect("memory of this process").discard(self.page_size(), runs)
        });
        if let Some(removes) = &self.removes {
            // A report that was read is handled when the lock is free.
            let _handled = removes.reports.read().unwrap_or_else(PoisonError::into_inner);
            removes.ours.store(false, Ordering::SeqCst);
        }
        dropped
    }

    /// The pages that were requested and have not arrived, those that wait longest first.
    #[must_use]
    pub fn outstanding(&self) -> Vec<PageAt> {
        let since = self.requested.since();
        let mut pages: Vec<_> = since.iter().map(|(page, since)| (*since, *page)).collect();
        pages.sort_unstable();
        pages.into_iter().map(|(_, page)| page).collect()
    }

    /// Lets [`Faults`] give the outstanding pages once more: the requests were lost.
    pub fn ask_again(&self) {
        let outstanding = self.outstanding();
        self.queue().again = outstanding.into();
        self.kick();
    }

    /// Gives the missing pages up: a thread that touches one, or waits for it, gets SIGBUS, or EFAULT in a system call. Returns how many
    /// there were. To be called when no thread places pages any more.
    ///
    /// # Errors
    /// When the kernel cannot: Linux 6.6 or later can.
    pub fn poison(&self) -> Result<u64, PlaceError> {
        self.poisoned.store(true, Ordering::SeqCst);
        let mut poisoned = 0;
        for at in self.unclaimed.all_dirty_extents() {
            let pages = self.unclaimed.peek(at);
            let placed = self.claim(at, pages, |run| {
                let (start, length) = self.offsets(at, run);
                self.steps(at.block, start..start + length, |part, _| self.target.faults.poison(part))
            })?;
            poisoned += u64::from(placed.count_ones());
        }
        Ok(poisoned)
    }

    /// Gives the missing pages up before the guest runs: the memory is like any other, and missing pages read as zeros until they are
    /// written. A thread that waits for one continues with zeros, so what it does must be of no effect.
    pub fn abandon(&self) {
        self.finish();
    }

    // ---- placing ----

    /// Checks what a peer may have sent.
    fn check(&self, at: ExtentAt, pages: u64) -> Result<(), PlaceError> {
        let beyond = pages & !self.expected.layout().valid_mask(at);
        if beyond != 0 {
            return Err(PlaceError::OutOfRange(at.page(beyond.trailing_zeros())));
        }
        match pages & !self.expected.peek(at) {
            0 => Ok(()),
            others => Err(PlaceError::NotExpected(at.page(others.trailing_zeros()))),
        }
    }

    /// Places those of the pages that are missing, and returns those that hold what was placed.
    fn place_missing(
        &self,
        at: ExtentAt,
        pages: u64,
        place: impl Fn(u64) -> Result<(), PlaceError>,
    ) -> Result<u64, PlaceError> {
        let count =
            |counter: &AtomicU64, pages: u64| counter.fetch_add(u64::from(pages.count_ones()), Ordering::Relaxed);
        let claimed = self.claim(at, pages, |run| {
            place(run)?;
            // Before the last page makes the memory complete: whoever waits for that reads the counts.
            let discarded = self.removed_in(at, run);
            count(&self.counters.discarded, discarded);
            count(&self.counters.placed, run & !discarded);
            Ok(())
        })?;
        count(&self.counters.duplicates, pages & !claimed);
        Ok(claimed & !self.removed_in(at, claimed))
    }

    /// Claims those of the pages that no other thread has, settles them run by run, and returns them.
    fn claim(
        &self,
        at: ExtentAt,
        pages: u64,
        settle: impl Fn(u64) -> Result<(), PlaceError>,
    ) -> Result<u64, PlaceError> {
        let claimed = self.unclaimed.take_mask(at, pages);
        let mut left = claimed;
        for (first, count) in runs(claimed) {
            let run = run_mask(first, count);
            settle(run).inspect_err(|_| _ = self.unclaimed.set_mask(at, left))?;
            self.settled(at, run);
            left &= !run;
        }
        Ok(claimed)
    }

    /// Pages are there, and their threads awake: from here on they count as received (law 8).
    fn settled(&self, at: ExtentAt, pages: u64) {
        let settled = self.missing.take_mask(at, pages);
        self.requested.arrived(at, settled, &self.counters);
        let count = u64::from(settled.count_ones());
        if count > 0 && self.left.fetch_sub(count, Ordering::AcqRel) == count && !self.poisoned.load(Ordering::SeqCst) {
            self.finish();
        }
    }

    /// Nothing is missing: the memory is like any other.
    fn finish(&self) {
        // Where it fails the mapping is gone, or closing the descriptor does it.
        self.target.regions().for_each(|region| _ = self.target.faults.unregister(region));
        self.complete.store(true, Ordering::Release);
        self.kick();
    }

    /// Where adjacent pages lie in their block, in whole pages of the host.
    fn offsets(&self, at: ExtentAt, run: u64) -> (usize, usize) {
        let page_bytes = self.page_size().bytes();
        let first = usize::try_from(at.page(run.trailing_zeros()).page).expect("a page of the block");
        let (start, end) = (first * page_bytes, self.target.length(at.block));
        (start, (run.count_ones() as usize * page_bytes).min(end - start))
    }

    /// Fills adjacent pages. What lies beyond a block's end, in its last page, is dropped and reads as zeros.
    fn fill(&self, at: ExtentAt, run: u64, bytes: &[u8]) -> Result<(), PlaceError> {
        let (start, length) = self.offsets(at, run);
        let block_bytes =
            usize::try_from(self.expected.layout().blocks()[at.block as usize].length).expect("it is mapped");
        let inside = length.min(block_bytes - start);
        let whole = inside / self.target.host_bytes() * self.target.host_bytes();
        let copy = |start: usize, bytes: &[u8]| {
            self.steps(at.block, start..start + bytes.len(), |part, offset| {
                self.target.faults.copy(part.start, &bytes[offset..offset + part.len()])
            })
        };
        copy(start, &bytes[..whole])?;
        if whole == length {
            return Ok(());
        }
        let mut last = vec![0; length - whole];
        last[..inside - whole].copy_from_slice(&bytes[whole..inside]);
        copy(start + whole, &last)
    }

    /// Takes steps of the kernel over a range of a block, whole pages of the host, until all of it is done but for what was discarded.
    /// `act` gets the addresses of each step, and their offset in the range.
    fn steps(
        &self,
        block: u32,
        range: Range<usize>,
        act: impl Fn(Range<usize>, usize) -> Step,
    ) -> Result<(), PlaceError> {
        let start = self.target.start(block);
        let mut most = if self.removes.is_some() { MOST_BYTES } else { usize::MAX };
        let mut at = range.start;
        while at < range.end {
            let (part, step) = {
                let _unreported = self.removes.as_ref().map(|removes| removes.reports.read());
                let part = self.not_removed(block, at..range.end.min(at.saturating_add(most)));
                if part.is_empty() {
                    at = part.end;
                    continue;
                }
                let step = act(start + part.start..start + part.end, part.start - range.start);
                (part, step)
            };
            let page = PageAt { block, page: (part.start / self.page_size().bytes()) as u64 };
            match step {
                Step::Done => at = part.end,
                Step::Again(0) => self.let_discard()?,
                Step::Again(bytes) => at = part.start + bytes,
                Step::Present => return Err(PlaceError::Populated(page)),
                // It may cross from one mapping to another.
                Step::NotRegistered if part.len() > self.target.host_bytes() => most = self.target.host_bytes(),
                Step::NotRegistered => return Err(PlaceError::NotRegistered(page)),
                Step::OwnerGone => return Err(PlaceError::OwnerGone),
                Step::Failed(error) => return Err(PlaceError::Kernel(page, error.into())),
            }
        }
        Ok(())
    }

    /// A discard is under way: it continues once its report is read, by whichever thread.
    fn let_discard(&self) -> Result<(), PlaceError> {
        self.counters.retries.fetch_add(1, Ordering::Relaxed);
        self.read_events()?;
        if !self.queue().faults.is_empty() {
            self.kick();
        }
        thread::yield_now();
        Ok(())
    }

    // ---- discards ----

    /// The first part of a range of a block that was not discarded; empty, at the end of what was, if there is none at its start.
    fn not_removed(&self, block: u32, range: Range<usize>) -> Range<usize> {
        let Some(Removes { removed, .. }) = &self.removes else { return range };
        let host = self.target.host_bytes();
        let is_removed = |offset: &usize| removed.is_set(PageAt { block, page: (offset / host) as u64 });
        let mut offsets = range.clone().step_by(host);
        let removed = offsets.by_ref().take_while(is_removed).count() * host;
        if removed > 0 {
            let end = (range.start + removed).min(range.end);
            return end..end;
        }
        let end = offsets.find(is_removed).unwrap_or(range.end);
        range.start..end
    }

    /// Those of the pages of which a part was discarded.
    fn removed_in(&self, at: ExtentAt, pages: u64) -> u64 {
        let Some(Removes { removed, .. }) = &self.removes else { return 0 };
        let any =
            |bit: &u32| self.host_pages(at.page(*bit)).any(|page| removed.is_set(PageAt { block: at.block, page }));
        bits(pages).filter(any).fold(0, |all, bit| all | 1 << bit)
    }

    /// The pages of the host of a page, as numbers in its block.
    fn host_pages(&self, page: PageAt) -> Range<u64> {
        let each = (self.page_size().bytes() / self.target.host_bytes()) as u64;
        let end = (self.target.length(page.block) / self.target.host_bytes()) as u64;
        page.page * each..((page.page + 1) * each).min(end)
    }

    /// The owner discards a range of addresses: its pages are zero from here on.
    fn remove(&self, removes: &Removes, range: &Range<usize>) {
        if removes.ours.load(Ordering::SeqCst) {
            return;
        }
        let (host, page_bytes) = (self.target.host_bytes(), self.page_size().bytes());
        for (block, offsets) in self.target.parts(range) {
            let pages = |bytes: usize| (offsets.start / bytes) as u64..offsets.end.div_ceil(bytes) as u64;
            removes.removed.set_range(block, pages(host));
            for (at, mask) in words_of(block, pages(page_bytes)) {
                let mask = mask & self.unclaimed.peek(at);
                let whole = |bit: &u32| {
                    let mut pages = self.host_pages(at.page(*bit));
                    pages.all(|page| removes.removed.is_set(PageAt { block, page }))
                };
                let whole = bits(mask).filter(whole).fold(0, |all, bit| all | 1 << bit);
                let claimed = self.unclaimed.take_mask(at, whole);
                self.counters.discarded.fetch_add(u64::from(claimed.count_ones()), Ordering::Relaxed);
                self.settled(at, claimed);
            }
        }
        // A thread that waits touches the page again, and finds it discarded. Where this fails no thread waits: the range is unregistered.
        let _woken = self.target.faults.wake(range.clone());
    }

    // ---- faults ----

    /// Reads what the kernel reports: discards are handled, faults wait for [`Faults`].
    fn read_events(&self) -> Result<(), PlaceError> {
        let _alone = self.removes.as_ref().map(|removes| removes.reports.write());
        let mut faults = Vec::new();
        let read = self.target.faults.read(|event| match event {
            Event::Fault(address) => faults.push(address),
            Event::Remove(range) => {
                if let Some(removes) = &self.removes {
                    self.remove(removes, &range);
                }
            }
        });
        self.queue().faults.extend(faults);
        read.map_err(PlaceError::Faults)
    }

    /// Handles a fault: the page to ask for, if any.
    fn fault(&self, address: usize) -> Result<Option<PageAt>, PlaceError> {
        self.counters.faults.fetch_add(1, Ordering::Relaxed);
        let (block, offset) = self.target.find(address).ok_or(PlaceError::NoBlock(address))?;
        let page = PageAt { block, page: (offset / self.page_size().bytes()) as u64 };
        if self.missing.is_set(page) && !self.is_removed(block, offset) {
            let ask = self.requested.ask(page, &self.missing, &self.counters);
            self.counters.requests.fetch_add(u64::from(ask), Ordering::Relaxed);
            return Ok(ask.then_some(page));
        }
        let start = self.target.start(block) + offset / self.target.host_bytes() * self.target.host_bytes();
        self.zero(page, start..start + self.target.host_bytes())?;
        Ok(None)
    }

    fn is_removed(&self, block: u32, offset: usize) -> bool {
        let page = PageAt { block, page: (offset / self.target.host_bytes()) as u64 };
        self.removes.as_ref().is_some_and(|removes| removes.removed.is_set(page))
    }

    /// Resolves a page of the host as zero, unless it is there.
    fn zero(&self, page: PageAt, addresses: Range<usize>) -> Result<(), PlaceError> {
        loop {
            match self.target.faults.zero(addresses.clone()) {
                Step::Done => _ = self.counters.zeros.fetch_add(1, Ordering::Relaxed),
                Step::Again(_) => {
                    self.let_discard()?;
                    continue;
                }
                Step::Present => {
                    let woken = self.target.faults.wake(addresses);
                    return woken.map_err(|error| PlaceError::Kernel(page, error));
                }
                // Unregistering wakes everybody.
                Step::NotRegistered if self.left() == 0 => {}
                Step::NotRegistered => return Err(PlaceError::NotRegistered(page)),
                Step::OwnerGone => return Err(PlaceError::OwnerGone),
                Step::Failed(error) => return Err(PlaceError::Kernel(page, error.into())),
            }
            return Ok(());
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kick(&self) {
        // It fails only where the counter is full: then the thread is woken as well.
        let _woken = rustix::io::write(&self.kick, &1_u64.to_ne_bytes());
    }
}

impl Requested {
    fn since(&self) -> MutexGuard<'_, BTreeMap<PageAt, Instant>> {
        self.since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a thread waits for a page. False if it was noted before, or if the page has arrived meanwhile.
    fn ask(&self, page: PageAt, missing: &DirtyBitmap, counters: &Counters) -> bool {
        {
            let mut since = self.since();
            if !self.pages.set(page) {
                return false;
            }
            since.insert(page, Instant::now());
        }
        // Either this sees that the page has arrived, or who places it sees the note.
        fence(Ordering::SeqCst);
        let still_missing = missing.is_set(page);
        if !still_missing {
            let (at, mask) = locate(page);
            self.arrived(at, mask, counters);
        }
        still_missing
    }

    /// Pages are there: those that were requested are outstanding no more.
    fn arrived(&self, at: ExtentAt, pages: u64, counters: &Counters) {
        fence(Ordering::SeqCst);
        for bit in bits(self.pages.take_mask(at, pages)) {
            if let Some(since) = self.since().remove(&at.page(bit)) {
                counters.waits.record(since.elapsed());
            }
        }
    }
}

impl fmt::Debug for MissingMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MissingMemory({} of {} pages are missing)", self.left(), self.expected.count())
    }
}

impl Drop for MissingMemory {
    fn drop(&mut self) {
        if self.left() > 0 && !self.is_complete() {
            self.target.leak();
        }
    }
}
