//! A guest that records its calls and those to its log, with page hinters of the test's own.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use memferry::guest::hints::PageHinter;
use memferry::guest::{DestinationGuest, Guest, GuestError, GuestState, RunState, SourceGuest};
use memferry::memory::GuestMemory;
use memferry::settings::SourceSettings;
use memferry_stages::batch::CopiedBatch;
use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::dirty_log::{DirtyLog, HashLog};
use memferry_stages::geometry::{BlockInfo, ExtentAt, PageSize};
use memferry_stages::memory::Memory;
use memferry_stages::pool::PooledBuffer;
use memferry_stages::xbzrle::Delta;
use memferry_tests::run::{Arrives, Ends, Expected, Recorder};
use memferry_tests::{TestGuest, migrate_watched};
use memferry_transports::memory::MemoryTransport;
use tokio_util::sync::CancellationToken;

/// The recorded calls, in order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Notes(Arc<Mutex<Vec<String>>>);

impl Notes {
    pub(crate) fn add(&self, what: impl Into<String>) {
        self.0.lock().unwrap().push(what.into());
    }

    /// All calls, with immediate repetitions of one call reduced to one.
    pub(crate) fn read(&self) -> Vec<String> {
        let mut notes = self.0.lock().unwrap().clone();
        notes.dedup();
        notes
    }
}

/// A [`TestGuest`] with page hinters, which records syncs and the scanner's swaps.
#[derive(Debug)]
pub(crate) struct Noting {
    pub(crate) guest: Arc<TestGuest>,
    pub(crate) hinters: Vec<Arc<dyn PageHinter>>,
    pub(crate) notes: Notes,
    /// Pages of block 0 that may not be accessed.
    pub(crate) forbidden: Range<u64>,
    /// Does its log find writes by hashes?
    pub(crate) hashes: bool,
    /// Does the guest report no block as ignored?
    pub(crate) sends_all: bool,
}

impl Noting {
    pub(crate) fn new(guest: Arc<TestGuest>, hinters: Vec<Arc<dyn PageHinter>>, notes: &Notes) -> Self {
        Self { guest, hinters, notes: notes.clone(), forbidden: 0..0, hashes: false, sends_all: false }
    }
}

/// Memory in which some pages may not be accessed.
#[derive(Debug)]
struct Forbidding {
    memory: Arc<dyn Memory>,
    forbidden: Range<u64>,
    notes: Notes,
}

impl Forbidding {
    fn look(&self, pages: impl IntoIterator<Item = u64>) {
        if pages.into_iter().any(|page| self.forbidden.contains(&page)) {
            self.notes.add("TOUCHED");
        }
    }
}

impl Memory for Forbidding {
    fn length(&self) -> u64 {
        self.memory.length()
    }

    fn read_extent(&self, page_size: PageSize, first_page: u64, mask: u64, into: &mut PooledBuffer) -> io::Result<u64> {
        self.look((0..64).filter(|bit| mask & 1 << bit != 0).map(|bit| first_page + bit));
        self.memory.read_extent(page_size, first_page, mask, into)
    }

    fn read_page(&self, page_size: PageSize, page: u64, into: &mut [u8]) -> io::Result<()> {
        self.look([page]);
        self.memory.read_page(page_size, page, into)
    }

    fn write_pages(&self, page_size: PageSize, first_page: u64, bytes: &[u8]) -> io::Result<()> {
        self.look(first_page..first_page + (bytes.len() / page_size.bytes()) as u64);
        self.memory.write_pages(page_size, first_page, bytes)
    }

    fn write_zeros(&self, page_size: PageSize, pages: Range<u64>) -> io::Result<()> {
        self.look(pages.clone());
        self.memory.write_zeros(page_size, pages)
    }

    fn patch(&self, page_size: PageSize, page: u64, delta: &Delta<'_>) -> io::Result<()> {
        self.look([page]);
        self.memory.patch(page_size, page, delta)
    }
}

/// A log that records its calls. The scanner re-arms directly after a swap, before the next word.
#[derive(Debug)]
struct NotingLog(Arc<dyn DirtyLog>, Notes);

impl DirtyLog for NotingLog {
    fn start(&self) -> io::Result<()> {
        self.0.start()
    }

    fn sync(&self, block: u32, extents: Range<u32>, into: &DirtyBitmap) -> io::Result<()> {
        self.1.add("sync");
        self.0.sync(block, extents, into)
    }

    fn rearm(&self, at: ExtentAt, mask: u64) -> io::Result<()> {
        self.1.add("swap");
        self.0.rearm(at, mask)
    }

    fn arm_unread(&self, pages: &DirtyBitmap) -> io::Result<bool> {
        self.1.add("arm");
        self.0.arm_unread(pages)
    }

    fn leave_out(&self, pages: &DirtyBitmap) -> io::Result<()> {
        self.0.leave_out(pages)
    }

    fn sees_stores(&self) -> bool {
        self.0.sees_stores()
    }

    fn copied(&self, copy: &CopiedBatch) {
        self.0.copied(copy);
    }

    fn mark(&self, block: u32, pages: Range<u64>) {
        self.0.mark(block, pages);
    }

    fn stop(&self) -> io::Result<()> {
        self.0.stop()
    }
}

impl Guest for Noting {
    fn memory(&self) -> GuestMemory {
        let memory = self.guest.memory();
        let mut blocks = memory.blocks().to_vec();
        if self.sends_all {
            blocks.iter_mut().for_each(|block| block.info.ignored = false);
        }
        blocks[0].memory = Arc::new(Forbidding {
            memory: blocks[0].memory.clone(),
            forbidden: self.forbidden.clone(),
            notes: self.notes.clone(),
        });
        GuestMemory::new(memory.page_size(), blocks).unwrap()
    }

    fn page_hinters(&self) -> Vec<Arc<dyn PageHinter>> {
        self.hinters.clone()
    }
}

impl SourceGuest for Noting {
    fn run_state(&self) -> RunState {
        self.guest.run_state()
    }

    fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError> {
        let hash = || -> Vec<Arc<dyn DirtyLog>> { vec![Arc::new(HashLog::new(self.memory()))] };
        let logs = if self.hashes { hash() } else { self.guest.dirty_logs()? };
        Ok(logs.into_iter().map(|log| Arc::new(NotingLog(log, self.notes.clone())) as _).collect())
    }

    fn setup_state(&self) -> Result<GuestState, GuestError> {
        self.guest.setup_state()
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.notes.add("pause");
        self.guest.pause()
    }

    fn resume(&self) -> Result<(), GuestError> {
        self.guest.resume()
    }

    fn save(&self) -> Result<GuestState, GuestError> {
        self.notes.add("save");
        self.guest.save()
    }

    fn release(&self) -> Result<(), GuestError> {
        self.guest.release()
    }

    fn reacquire(&self) -> Result<(), GuestError> {
        self.guest.reacquire()
    }

    fn committed(&self, destination: &str) -> Result<(), GuestError> {
        self.guest.committed(destination)
    }

    fn moved(&self) {
        self.guest.moved();
    }
}

impl DestinationGuest for Noting {
    fn make_durable(&self) -> Result<(), GuestError> {
        self.guest.make_durable()
    }

    fn prepare(&self, state: &GuestState) -> Result<(), GuestError> {
        self.guest.prepare(state)
    }

    fn start(&self, run_state: RunState) -> Result<(), GuestError> {
        self.guest.start(run_state)
    }
}

impl Arrives for Noting {
    fn build(&self, page_size: PageSize, blocks: &[BlockInfo], setup: &GuestState) -> Result<(), GuestError> {
        self.guest.build(page_size, blocks, setup)
    }
}

/// Moves a guest through memory.
pub(crate) fn move_guest(
    source: Arc<dyn SourceGuest>,
    destination: impl Expected,
    settings: SourceSettings,
    cancel: CancellationToken,
    recorder: Recorder,
) -> Ends {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let transport = Arc::new(MemoryTransport::new(1 << 20));
    runtime.block_on(migrate_watched(source, destination, transport, settings, cancel, recorder))
}
