//! The memory of a workload, with the pages of its blocks numbered as one sequence, and the log of its writers.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memferry_stages::dirty_log::{DirtyLog, HashLog, SoftwareLog, UserfaultLog};
use memferry_stages::geometry::BlockInfo;
use memferry_stages::memory::{GuestMemory, MappedMemory, RamBlock};

use super::settings::{Backing, LogChoice, WorkloadSettings};
use crate::balloon::Ballooned;
use crate::free::FreeRanges;
use memferry::guest::GuestError;
use memferry::guest::hints::BlockPages;

/// Memory and log. Pages are numbered from 0 over all blocks.
#[derive(Debug)]
pub(super) struct Machine {
    settings: WorkloadSettings,
    block_pages: u32,
    blocks: Vec<Arc<MappedMemory>>,
    memory: GuestMemory,
    marks: Option<Arc<SoftwareLog>>,
    free: Option<FreeRanges>,
    plugging: Mutex<Plugging>,
}

/// May unplugged memory be plugged?
#[derive(Debug)]
struct Plugging {
    /// Is it plugged already?
    is_done: bool,
    is_migrating: bool,
}

impl Machine {
    /// Maps the memory, which reads as zeros. `fresh` says that it does so until pages are loaded.
    pub(super) fn new(settings: WorkloadSettings, fresh: bool, is_plugged: bool) -> Result<Self, GuestError> {
        settings.validate()?;
        let infos = block_infos(&settings);
        let map = |info: &BlockInfo| match &settings.shared {
            Some(shared) if info.ignored => shared.map(fresh),
            _ => map(settings.backing, info),
        };
        let blocks: Vec<_> = infos.iter().map(map).collect::<Result<_, _>>()?;
        let as_block = |(info, memory): (BlockInfo, &Arc<MappedMemory>)| RamBlock {
            fresh: fresh && !info.ignored,
            info,
            memory: memory.clone(),
        };
        let rams = infos.into_iter().zip(&blocks).map(as_block).collect();
        let memory = GuestMemory::new(settings.page_size, rams).map_err(|error| GuestError(error.to_string()))?;
        let is_marking = match settings.dirty_log {
            LogChoice::Auto => UserfaultLog::supported().is_err(),
            choice => choice == LogChoice::Software,
        };
        let marks = is_marking.then(|| Arc::new(SoftwareLog::new(memory.layout())));
        let block_pages = u32::try_from(memory.layout().block_pages(0)).expect("at most MAX_PAGES");
        let [_, free, _] = settings.parts();
        let free = settings.free.map(|of| FreeRanges::new(free, of.range_pages));
        let plugging = Mutex::new(Plugging { is_done: is_plugged, is_migrating: false });
        Ok(Self { settings, block_pages, blocks, memory, marks, free, plugging })
    }

    pub(super) fn settings(&self) -> &WorkloadSettings {
        &self.settings
    }

    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    pub(super) fn is_plugged(&self) -> bool {
        self.plugging().is_done
    }

    /// Plugs the unplugged memory, unless a migration runs.
    pub(super) fn plug(&self) -> Result<(), GuestError> {
        let mut plugging = self.plugging();
        if plugging.is_migrating {
            return Err(GuestError("memory cannot be plugged while the guest is migrated: try again later".into()));
        }
        plugging.is_done = true;
        Ok(())
    }

    fn plugging(&self) -> MutexGuard<'_, Plugging> {
        self.plugging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pages of the shared block, numbered after those of all others.
    pub(super) fn shared(&self) -> Range<u32> {
        let pages = self.settings.shared.as_ref().map_or(0, |shared| shared.bytes / self.page_bytes() as u64);
        self.pages()..self.pages() + u32::try_from(pages).expect("at most MAX_PAGES")
    }

    /// Pages of all blocks except the shared one.
    pub(super) fn pages(&self) -> u32 {
        self.block_pages * self.settings.blocks
    }

    pub(super) fn page_bytes(&self) -> usize {
        self.settings.page_size.bytes()
    }

    /// The log that sees every write of the writers.
    pub(super) fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError> {
        if let Some(marks) = &self.marks {
            return Ok(vec![marks.clone()]);
        }
        if self.settings.dirty_log == LogChoice::Hash {
            return Ok(vec![Arc::new(HashLog::new(self.memory.clone()))]);
        }
        UserfaultLog::supported().map_err(|why| {
            GuestError(format!("the userfault log cannot be used: {why}; or take dirty_log = \"software\""))
        })?;
        let own = (0..).zip(self.blocks.iter().cloned()).take(self.settings.blocks as usize).collect();
        Ok(vec![Arc::new(UserfaultLog::new(self.memory.layout(), own))])
    }

    /// Stores bytes into a page. [`Machine::mark`] must follow.
    pub(super) fn store(&self, page: u32, offset: usize, bytes: &[u8]) {
        let (block, start) = self.locate(page);
        self.blocks[block as usize].store(start + offset, bytes);
    }

    /// Loads bytes of a page.
    pub(super) fn load(&self, page: u32, offset: usize, into: &mut [u8]) {
        let (block, start) = self.locate(page);
        self.blocks[block as usize].load(start + offset, into);
    }

    /// Marks a page as written if the log depends on it.
    pub(super) fn mark(&self, page: u32) {
        if let Some(marks) = &self.marks {
            let (block, at) = self.place_of(page);
            marks.mark(block, at.into()..u64::from(at) + 1);
        }
    }

    /// The name of a page for the operator.
    pub(super) fn place(&self, page: u32) -> String {
        let (block, at) = self.place_of(page);
        format!("page {at} of block {}", self.memory.block(block).info.id)
    }

    /// The block of a page, and where in it the page begins.
    fn locate(&self, page: u32) -> (u32, usize) {
        let (block, at) = self.place_of(page);
        (block, at as usize * self.page_bytes())
    }

    /// The block of a page, and its number there.
    fn place_of(&self, page: u32) -> (u32, u32) {
        match page.checked_sub(self.pages()) {
            Some(shared) => (self.settings.blocks, shared),
            None => (page / self.block_pages, page % self.block_pages),
        }
    }
}

impl Ballooned for Machine {
    fn free(&self) -> Option<&FreeRanges> {
        self.free.as_ref()
    }

    fn unplugged(&self) -> Range<u32> {
        let [_, _, unplugged] = self.settings.parts();
        if self.is_plugged() { unplugged.end..unplugged.end } else { unplugged }
    }

    fn by_block(&self, pages: Range<u32>) -> Vec<BlockPages> {
        let mut pieces = Vec::new();
        let mut next = pages.start;
        while next < pages.end {
            let (block, first) = self.place_of(next);
            let length = (pages.end - next).min(self.block_pages - first);
            next += length;
            pieces.push((block, first.into()..u64::from(first) + u64::from(length)));
        }
        pieces
    }

    fn set_migrating(&self, is_migrating: bool) {
        self.plugging().is_migrating = is_migrating;
    }
}

/// The blocks of a workload with these settings.
pub(super) fn block_infos(settings: &WorkloadSettings) -> Vec<BlockInfo> {
    let length = settings.block_bytes();
    let info = |index: u32| BlockInfo {
        guest_address: u64::from(index) * length,
        backing_page_size: settings.backing.page_bytes(),
        ..BlockInfo::new(format!("ram{index}"), length)
    };
    let shared = settings.shared.as_ref().map(|shared| shared.block_info(settings.memory));
    (0..settings.blocks).map(info).chain(shared).collect()
}

fn map(backing: Backing, info: &BlockInfo) -> Result<Arc<MappedMemory>, GuestError> {
    let refuse = |why: &dyn std::fmt::Display| {
        GuestError::caused(format_args!("{} bytes of memory for block {}", info.length, info.id), why)
    };
    let length = usize::try_from(info.length).map_err(|error| refuse(&error))?;
    let mapped = match backing {
        Backing::Anonymous => MappedMemory::anonymous(length),
        Backing::Memfd => MappedMemory::memfd(info.id.raw(), length),
        Backing::Hugetlb => MappedMemory::hugetlb(info.id.raw(), length),
    };
    mapped.map(Arc::new).map_err(|error| refuse(&error))
}
