//! The memory of a workload, its blocks taken as one row of pages, and the log that sees its writers.

use std::sync::Arc;

use memferry_stages::dirty_log::{DirtyLog, HashLog, SoftwareLog, UserfaultLog};
use memferry_stages::geometry::BlockInfo;
use memferry_stages::memory::{GuestMemory, MappedMemory, RamBlock};

use super::settings::{Backing, LogChoice, WorkloadSettings};
use crate::guest::GuestError;

/// Memory and log. Pages are numbered from 0 over all blocks.
#[derive(Debug)]
pub(super) struct Machine {
    settings: WorkloadSettings,
    block_pages: u32,
    blocks: Vec<Arc<MappedMemory>>,
    memory: GuestMemory,
    marks: Option<Arc<SoftwareLog>>,
}

impl Machine {
    /// Maps the memory, which reads as zeros. `fresh` says that it will until pages are loaded.
    pub(super) fn new(settings: WorkloadSettings, fresh: bool) -> Result<Self, GuestError> {
        settings.validate()?;
        let infos = block_infos(&settings);
        let blocks: Vec<_> = infos.iter().map(|info| map(settings.backing, info)).collect::<Result<_, _>>()?;
        let as_block =
            |(info, memory): (BlockInfo, &Arc<MappedMemory>)| RamBlock { info, memory: memory.clone(), fresh };
        let rams = infos.into_iter().zip(&blocks).map(as_block).collect();
        let memory = GuestMemory::new(settings.page_size, rams).map_err(|error| GuestError(error.to_string()))?;
        let is_marking = match settings.dirty_log {
            LogChoice::Auto => UserfaultLog::supported().is_err(),
            choice => choice == LogChoice::Software,
        };
        let marks = is_marking.then(|| Arc::new(SoftwareLog::new(memory.layout())));
        let block_pages = u32::try_from(memory.layout().block_pages(0)).expect("at most MAX_PAGES");
        Ok(Self { settings, block_pages, blocks, memory, marks })
    }

    pub(super) fn settings(&self) -> &WorkloadSettings {
        &self.settings
    }

    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Pages of all blocks.
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
        let numbered = (0..).zip(self.blocks.iter().cloned()).collect();
        Ok(vec![Arc::new(UserfaultLog::new(self.memory.layout(), numbered))])
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

    /// Marks a page as written where the log must be told.
    pub(super) fn mark(&self, page: u32) {
        if let Some(marks) = &self.marks {
            let at = u64::from(page % self.block_pages);
            marks.mark(page / self.block_pages, at..at + 1);
        }
    }

    /// Names a page for the operator.
    pub(super) fn place(&self, page: u32) -> String {
        let (block, at) = (page / self.block_pages, page % self.block_pages);
        format!("page {at} of block {}", self.memory.block(block).info.id)
    }

    /// The block of a page, and where in it the page begins.
    fn locate(&self, page: u32) -> (u32, usize) {
        (page / self.block_pages, (page % self.block_pages) as usize * self.page_bytes())
    }
}

/// The blocks that a workload of these settings has.
pub(super) fn block_infos(settings: &WorkloadSettings) -> Vec<BlockInfo> {
    let length = settings.block_bytes();
    let info = |index: u32| BlockInfo {
        id: format!("ram{index}"),
        length,
        guest_address: u64::from(index) * length,
        backing_page_size: settings.backing.page_bytes(),
    };
    (0..settings.blocks).map(info).collect()
}

fn map(backing: Backing, info: &BlockInfo) -> Result<Arc<MappedMemory>, GuestError> {
    let refuse = |why: &dyn std::fmt::Display| {
        GuestError::caused(format_args!("{} bytes of memory for block {}", info.length, info.id), why)
    };
    let length = usize::try_from(info.length).map_err(|error| refuse(&error))?;
    let mapped = match backing {
        Backing::Anonymous => MappedMemory::anonymous(length),
        Backing::Memfd => MappedMemory::memfd(&info.id, length),
        Backing::Hugetlb => MappedMemory::hugetlb(&info.id, length),
    };
    mapped.map(Arc::new).map_err(|error| refuse(&error))
}
