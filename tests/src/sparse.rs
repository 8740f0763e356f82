//! A large, mostly unwritten guest, and the memory of a process while it is moved.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use memferry::guest::{DestinationGuest, Guest, GuestError, GuestState, RunState, SourceGuest};

use crate::run::Arrives;
use memferry_stages::dirty_log::{DirtyLog, SoftwareLog, UserfaultLog};
use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::memory::{GuestMemory, MappedMemory, Memory, RamBlock};
use memferry_stages::pool::PooledBuffer;
use memferry_stages::xbzrle::Delta;

/// The kind of its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private memory of this process.
    Anonymous,
    /// A memfd.
    Memfd,
}

/// The kind of its dirty log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogKind {
    /// See [`SoftwareLog`].
    Software,
    /// See [`UserfaultLog`].
    Userfault,
}

/// The guest: one block, which is not written during the migration.
#[derive(Debug)]
pub struct SparseGuest {
    backing: Backing,
    log: LogKind,
    block: Mutex<Option<(Arc<CountedMemory>, GuestMemory)>>,
}

/// Mapped memory that counts accesses.
#[derive(Debug)]
pub struct CountedMemory {
    memory: Arc<MappedMemory>,
    read: AtomicU64,
    written: AtomicU64,
}

impl CountedMemory {
    /// The memory itself.
    #[must_use]
    pub fn mapped(&self) -> &Arc<MappedMemory> {
        &self.memory
    }

    /// The number of pages read so far, with repetitions.
    #[must_use]
    pub fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// The number of pages written so far, zeros included.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }
}

impl Memory for CountedMemory {
    fn length(&self) -> u64 {
        self.memory.length()
    }

    fn read_extent(&self, page_size: PageSize, first_page: u64, mask: u64, into: &mut PooledBuffer) -> io::Result<u64> {
        self.read.fetch_add(u64::from(mask.count_ones()), Ordering::Relaxed);
        self.memory.read_extent(page_size, first_page, mask, into)
    }

    fn read_page(&self, page_size: PageSize, page: u64, into: &mut [u8]) -> io::Result<()> {
        self.read.fetch_add(1, Ordering::Relaxed);
        self.memory.read_page(page_size, page, into)
    }

    fn write_pages(&self, page_size: PageSize, first_page: u64, bytes: &[u8]) -> io::Result<()> {
        self.written.fetch_add((bytes.len() / page_size.bytes()) as u64, Ordering::Relaxed);
        self.memory.write_pages(page_size, first_page, bytes)
    }

    fn write_zeros(&self, page_size: PageSize, pages: Range<u64>) -> io::Result<()> {
        self.written.fetch_add(pages.end - pages.start, Ordering::Relaxed);
        self.memory.write_zeros(page_size, pages)
    }

    fn populate(&self, page_size: PageSize, pages: Range<u64>) -> io::Result<()> {
        self.memory.populate(page_size, pages)
    }

    fn populate_huge(&self, page_size: PageSize, pages: Range<u64>) -> io::Result<bool> {
        self.memory.populate_huge(page_size, pages)
    }

    fn patch(&self, page_size: PageSize, page: u64, delta: &Delta<'_>) -> io::Result<()> {
        self.written.fetch_add(1, Ordering::Relaxed);
        self.memory.patch(page_size, page, delta)
    }

    fn untouched_in(&self, page_size: PageSize, pages: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.memory.untouched_in(page_size, pages)
    }
}

impl SparseGuest {
    /// A guest without memory: a destination.
    #[must_use]
    pub fn destination(backing: Backing, log: LogKind) -> Self {
        Self { backing, log, block: Mutex::default() }
    }

    /// A guest of `length` bytes in which `pages` single pages are written, scattered evenly.
    ///
    /// # Panics
    /// If the host has not enough memory.
    #[must_use]
    pub fn source(backing: Backing, log: LogKind, length: u64, pages: u64) -> Self {
        let guest = Self::destination(backing, log);
        let info = BlockInfo::new("ram", length);
        guest.map(PageSize::DEFAULT, info).expect("memory for a test");
        let memory = guest.counted();
        let memory = memory.mapped();
        for page in written(length, pages) {
            memory.store(usize::try_from(page * 4096).expect("it fits memory"), &content(page));
        }
        guest
    }

    /// Its memory, once it exists.
    ///
    /// # Panics
    /// Before that.
    #[must_use]
    pub fn counted(&self) -> Arc<CountedMemory> {
        self.block.lock().unwrap().as_ref().expect("built").0.clone()
    }

    fn map(&self, page_size: PageSize, info: BlockInfo) -> Result<(), GuestError> {
        let length = usize::try_from(info.length).map_err(|error| GuestError(error.to_string()))?;
        let mapped = match self.backing {
            Backing::Anonymous => MappedMemory::anonymous(length),
            Backing::Memfd => MappedMemory::memfd("ram", length),
        };
        let memory = Arc::new(mapped.map_err(|error| GuestError(error.to_string()))?);
        let counted = Arc::new(CountedMemory { memory, read: AtomicU64::new(0), written: AtomicU64::new(0) });
        let block = RamBlock { info, memory: counted.clone(), fresh: true };
        let memory = GuestMemory::new(page_size, vec![block]).map_err(|error| GuestError(error.to_string()))?;
        *self.block.lock().unwrap() = Some((counted, memory));
        Ok(())
    }
}

/// The pages of a sparse guest that were written.
pub fn written(length: u64, pages: u64) -> impl Iterator<Item = u64> {
    let step = length / 4096 / pages;
    (0..pages).map(move |index| index * step + index % step.min(61))
}

/// The first bytes of such a page.
fn content(page: u64) -> [u8; 16] {
    (u128::from(page) * 0x9e37_79b9_7f4a_7c15 + 1).to_le_bytes()
}

impl Guest for SparseGuest {
    fn memory(&self) -> GuestMemory {
        self.block.lock().unwrap().as_ref().expect("built").1.clone()
    }
}

impl SourceGuest for SparseGuest {
    fn run_state(&self) -> RunState {
        RunState::Paused
    }

    fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError> {
        let memory = self.memory();
        Ok(vec![match self.log {
            LogKind::Software => Arc::new(SoftwareLog::new(memory.layout())),
            LogKind::Userfault => {
                Arc::new(UserfaultLog::new(memory.layout(), vec![(0, self.counted().mapped().clone())]))
            }
        }])
    }

    fn pause(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn resume(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn save(&self) -> Result<GuestState, GuestError> {
        Ok(GuestState::default())
    }
}

impl DestinationGuest for SparseGuest {
    fn prepare(&self, _state: &GuestState) -> Result<(), GuestError> {
        Ok(())
    }

    fn start(&self, _run_state: RunState) -> Result<(), GuestError> {
        Ok(())
    }
}

impl Arrives for SparseGuest {
    fn build(&self, page_size: PageSize, blocks: &[BlockInfo], _setup: &GuestState) -> Result<(), GuestError> {
        match blocks {
            [info] => self.map(page_size, info.clone()),
            _ => Err(GuestError("one block is wanted here".into())),
        }
    }
}

/// The memory of a process, in KiB, as the kernel reports it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Resident.
    pub resident: u64,
    /// The peak of resident memory since [`forget_peak`].
    pub peak: u64,
    /// Private.
    pub anonymous: u64,
    /// Page tables.
    pub tables: u64,
}

impl Held {
    /// The memory of this process, if there is a /proc that reports it.
    #[must_use]
    pub fn here() -> Option<Self> {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let figure = |name: &str| {
            status.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
        };
        Some(Self {
            resident: figure("VmRSS:")?,
            peak: figure("VmHWM:")?,
            anonymous: figure("RssAnon:")?,
            tables: figure("VmPTE:")?,
        })
    }
}

/// Resets the peak, if the kernel supports that.
pub fn forget_peak() {
    let forgotten = std::fs::write("/proc/self/clear_refs", "5");
    drop(forgotten);
}
