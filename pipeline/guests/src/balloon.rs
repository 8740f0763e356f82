//! The balloon of the guests in this crate: hints their free memory on request, and reports unplugged memory.
//!
//! While a window is open a thread walks over the free ranges repeatedly, and hints those that are free at that moment.
//! It is stopped, and has ended, when the next point is answered.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::free::FreeRanges;
use memferry::guest::GuestError;
use memferry::guest::hints::{BlockPages, Hints, PageHinter, Point};
use memferry::threads::explained;

/// The most ranges that are hinted together.
const TOGETHER: u32 = 64;
/// The pause between two walks over all ranges.
const REST: Duration = Duration::from_millis(1);

/// Memory of which some is free or unplugged. Pages are numbered over all blocks.
pub(super) trait Ballooned: Send + Sync + fmt::Debug {
    /// The ranges that may be free, if there are any.
    fn free(&self) -> Option<&FreeRanges>;

    /// The pages that are unplugged.
    fn unplugged(&self) -> Range<u32>;

    /// Splits a range of pages into ranges of blocks.
    fn by_block(&self, pages: Range<u32>) -> Vec<BlockPages>;

    /// A migration begins, or has ended.
    fn set_migrating(&self, is_migrating: bool) {
        let _ = is_migrating;
    }
}

/// The balloon of some memory.
#[derive(Debug)]
pub(super) struct Balloon {
    machine: Arc<dyn Ballooned>,
    reporter: Mutex<Option<Reporter>>,
}

/// A thread that gives hints. Dropping it ends it.
#[derive(Debug)]
struct Reporter {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Balloon {
    /// The balloon of a guest, if any of its memory is free or unplugged.
    pub(super) fn of(machine: Arc<dyn Ballooned>) -> Vec<Arc<dyn PageHinter>> {
        if machine.free().is_none() && machine.unplugged().is_empty() {
            return Vec::new();
        }
        vec![Arc::new(Self { machine, reporter: Mutex::default() })]
    }

    fn set_reporter(&self, reporter: Option<Reporter>) {
        *self.reporter.lock().unwrap_or_else(PoisonError::into_inner) = reporter;
    }
}

impl PageHinter for Balloon {
    fn reached(&self, point: &Point) -> Result<(), GuestError> {
        match point {
            Point::Setup => self.machine.set_migrating(true),
            Point::AfterSync { hints: Some(hints) } => {
                self.set_reporter(Some(Reporter::start(self.machine.clone(), hints.clone())?));
            }
            Point::BeforeSync => self.set_reporter(None),
            Point::Cleanup => {
                self.set_reporter(None);
                self.machine.set_migrating(false);
            }
            _ => {}
        }
        Ok(())
    }

    fn gives_hints(&self) -> bool {
        self.machine.free().is_some()
    }

    fn unplugged(&self) -> Vec<BlockPages> {
        self.machine.by_block(self.machine.unplugged())
    }
}

impl Reporter {
    fn start(machine: Arc<dyn Ballooned>, hints: Hints) -> Result<Self, GuestError> {
        let is_over = Arc::new(AtomicBool::new(false));
        let over = is_over.clone();
        let report = move || {
            let Some(free) = machine.free() else { return };
            while !over.load(Ordering::Relaxed) {
                walk(&*machine, free, &hints, &over);
                thread::park_timeout(REST);
            }
        };
        let thread = thread::Builder::new().name("balloon".into()).spawn(report);
        let thread =
            thread.map_err(|error| GuestError::caused("the balloon's thread cannot be started", explained(error)))?;
        Ok(Self { is_over, thread: Some(thread) })
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A thread that panicked has reported it itself.
            drop(thread.join());
        }
    }
}

/// Hints the free ranges, once.
fn walk(machine: &dyn Ballooned, free: &FreeRanges, hints: &Hints, over: &AtomicBool) {
    let mut next = 0;
    while next < free.count() && !over.load(Ordering::Relaxed) {
        let held = free.hold(next, TOGETHER);
        next = held.end + u32::from(held.is_empty());
        if held.is_empty() {
            continue;
        }
        let pages = free.pages(held.start).start..free.pages(held.end - 1).end;
        for (block, pages) in machine.by_block(pages) {
            hints.free(block, pages);
        }
        free.let_go(held);
    }
}
