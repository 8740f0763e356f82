//! Fault injection: memory and dirty logs that fail in the middle of a migration.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::dirty_log::{DirtyLog, SoftwareLog};
use memferry_stages::geometry::{Layout, PageSize};
use memferry_stages::memory::{MappedMemory, Memory};
use memferry_stages::pool::PooledBuffer;
use memferry_stages::xbzrle::Delta;

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Reading this page of any block panics.
    ReadPanics(u64),
    /// Reading this page of any block fails.
    ReadFails(u64),
    /// After this many pages of a block were written, the disk is full.
    DiskFull(u64),
    /// Each write of pages takes this long.
    WriteTakes(Duration),
    /// The log cannot be synced.
    SyncFails,
    /// The log panics when it is synced.
    SyncPanics,
    /// The log cannot be started.
    LogStartFails,
    /// The log takes this long to start.
    LogStartTakes(Duration),
    /// The log takes this long to sync.
    SyncTakes(Duration),
    /// The start of the log blocks until it is released.
    LogStartWaits,
    /// The sync of the log blocks until it is released.
    SyncWaits,
}

/// The faults of one guest, shared by its memory and its log. Without a fault, the check costs one load.
#[derive(Clone, Debug, Default)]
pub struct Troubles(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    is_any: AtomicBool,
    trouble: Mutex<Option<Trouble>>,
    gate: Gate,
    /// The page whose reads are counted, and how many there were.
    watched: AtomicU64,
    reads: AtomicU64,
}

impl Troubles {
    /// Sets this fault, and removes any other. A call that blocks is released.
    pub fn set(&self, trouble: Option<Trouble>) {
        *self.0.trouble.lock().unwrap() = trouble;
        self.0.is_any.store(trouble.is_some(), Ordering::Release);
        self.0.gate.let_go();
    }

    /// Waits until the log blocks.
    pub fn until_it_waits(&self) {
        self.0.gate.until_somebody_waits();
    }

    /// Counts how often this page of any block is read from here on.
    pub fn watch(&self, page: u64) {
        self.0.watched.store(page, Ordering::SeqCst);
        self.0.reads.store(0, Ordering::SeqCst);
    }

    /// How often the watched page was read.
    #[must_use]
    pub fn reads(&self) -> u64 {
        self.0.reads.load(Ordering::SeqCst)
    }

    fn get(&self) -> Option<Trouble> {
        if self.0.is_any.load(Ordering::Acquire) { *self.0.trouble.lock().unwrap() } else { None }
    }
}

/// Blocks a log until it is released.
#[derive(Debug, Default)]
struct Gate {
    waits: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    fn pass(&self) {
        let mut waits = self.waits.lock().unwrap();
        *waits = true;
        self.changed.notify_all();
        drop(self.changed.wait_while(waits, |waits| *waits).unwrap());
    }

    fn until_somebody_waits(&self) {
        let waits = self.waits.lock().unwrap();
        drop(self.changed.wait_while(waits, |waits| !*waits).unwrap());
    }

    fn let_go(&self) {
        *self.waits.lock().unwrap() = false;
        self.changed.notify_all();
    }
}

/// Mapped memory, with faults.
#[derive(Debug)]
pub struct TroubledMemory {
    memory: Arc<MappedMemory>,
    troubles: Troubles,
    written: AtomicU64,
}

impl TroubledMemory {
    /// The same memory, with faults.
    #[must_use]
    pub fn new(memory: Arc<MappedMemory>, troubles: Troubles) -> Self {
        Self { memory, troubles, written: AtomicU64::new(0) }
    }

    fn before_reading(&self, holds: impl Fn(u64) -> bool) -> io::Result<()> {
        let shared = &self.troubles.0;
        shared.reads.fetch_add(u64::from(holds(shared.watched.load(Ordering::Relaxed))), Ordering::SeqCst);
        match self.troubles.get() {
            Some(Trouble::ReadPanics(page)) if holds(page) => panic!("made to panic when page {page} is read"),
            Some(Trouble::ReadFails(page)) if holds(page) => Err(io::Error::other("made to fail at reading")),
            _ => Ok(()),
        }
    }

    fn before_writing(&self, pages: u64) -> io::Result<()> {
        let before = self.written.fetch_add(pages, Ordering::Relaxed);
        match self.troubles.get() {
            Some(Trouble::DiskFull(room)) if before + pages > room => Err(io::ErrorKind::StorageFull.into()),
            Some(Trouble::WriteTakes(time)) => {
                std::thread::sleep(time);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl Memory for TroubledMemory {
    fn length(&self) -> u64 {
        self.memory.length()
    }

    fn into_mapping(self: Arc<Self>) -> Option<Arc<MappedMemory>> {
        self.memory.clone().into_mapping()
    }

    fn read_extent(&self, page_size: PageSize, first_page: u64, mask: u64, into: &mut PooledBuffer) -> io::Result<u64> {
        self.before_reading(|page| page.checked_sub(first_page).is_some_and(|bit| bit < 64 && mask >> bit & 1 == 1))?;
        self.memory.read_extent(page_size, first_page, mask, into)
    }

    fn read_page(&self, page_size: PageSize, page: u64, into: &mut [u8]) -> io::Result<()> {
        self.before_reading(|other| other == page)?;
        self.memory.read_page(page_size, page, into)
    }

    fn write_pages(&self, page_size: PageSize, first_page: u64, bytes: &[u8]) -> io::Result<()> {
        self.before_writing((bytes.len() / page_size.bytes()) as u64)?;
        self.memory.write_pages(page_size, first_page, bytes)
    }

    fn write_zeros(&self, page_size: PageSize, pages: Range<u64>) -> io::Result<()> {
        self.before_writing(pages.end - pages.start)?;
        self.memory.write_zeros(page_size, pages)
    }

    fn populate(&self, page_size: PageSize, pages: Range<u64>) -> io::Result<()> {
        self.memory.populate(page_size, pages)
    }

    fn populate_huge(&self, page_size: PageSize, pages: Range<u64>) -> io::Result<bool> {
        self.memory.populate_huge(page_size, pages)
    }

    fn patch(&self, page_size: PageSize, page: u64, delta: &Delta<'_>) -> io::Result<()> {
        self.before_writing(1)?;
        self.memory.patch(page_size, page, delta)
    }

    fn untouched_in(&self, page_size: PageSize, pages: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.memory.untouched_in(page_size, pages)
    }
}

/// A software log that records whether it is armed and whether it is used correctly, with faults.
#[derive(Debug)]
pub struct WatchedLog {
    log: SoftwareLog,
    troubles: Troubles,
    armed: AtomicBool,
    asked: AtomicBool,
    misused: Mutex<Option<&'static str>>,
}

impl WatchedLog {
    /// A log for the blocks of this layout.
    #[must_use]
    pub fn new(layout: &Layout, troubles: Troubles) -> Self {
        Self {
            log: SoftwareLog::new(layout),
            troubles,
            armed: AtomicBool::new(false),
            asked: AtomicBool::new(false),
            misused: Mutex::default(),
        }
    }

    /// Was it started and not stopped?
    #[must_use]
    pub fn is_armed(&self) -> bool {
        self.armed.load(Ordering::SeqCst)
    }

    /// The first incorrect use, if there was one.
    #[must_use]
    pub fn misused(&self) -> Option<&'static str> {
        *self.misused.lock().unwrap()
    }

    fn demand(&self, right: bool, else_: &'static str) {
        if !right {
            self.misused.lock().unwrap().get_or_insert(else_);
        }
    }
}

impl DirtyLog for WatchedLog {
    fn start(&self) -> io::Result<()> {
        self.demand(!self.armed.swap(true, Ordering::SeqCst), "it was started twice");
        match self.troubles.get() {
            Some(Trouble::LogStartFails) => Err(io::Error::other("made to fail at start")),
            Some(Trouble::LogStartTakes(time)) => {
                std::thread::sleep(time);
                self.log.start()
            }
            Some(Trouble::LogStartWaits) => {
                self.troubles.0.gate.pass();
                self.demand(self.is_armed(), "it was stopped while it was started");
                self.log.start()
            }
            _ => self.log.start(),
        }
    }

    fn sync(&self, block: u32, extents: Range<u32>, into: &DirtyBitmap) -> io::Result<()> {
        self.demand(!self.asked.swap(true, Ordering::SeqCst), "two syncs overlap");
        self.demand(self.is_armed(), "it was synced while it was not started");
        let synced = match self.troubles.get() {
            Some(Trouble::SyncFails) => Err(io::Error::other("made to fail at sync")),
            Some(Trouble::SyncPanics) => {
                self.asked.store(false, Ordering::SeqCst);
                panic!("made to panic at sync")
            }
            Some(Trouble::SyncTakes(time)) => {
                std::thread::sleep(time);
                self.log.sync(block, extents, into)
            }
            Some(Trouble::SyncWaits) => {
                self.troubles.0.gate.pass();
                self.log.sync(block, extents, into)
            }
            _ => self.log.sync(block, extents, into),
        };
        self.demand(self.is_armed(), "it was stopped while it was synced");
        self.asked.store(false, Ordering::SeqCst);
        synced
    }

    fn mark(&self, block: u32, pages: Range<u64>) {
        self.log.mark(block, pages);
    }

    fn stop(&self) -> io::Result<()> {
        self.armed.store(false, Ordering::SeqCst);
        self.log.stop()
    }
}
