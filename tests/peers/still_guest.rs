//! A guest that does not write: the least that a VMM's author implements for memferry.

use std::fs::OpenOptions;
use std::path::Path;
use std::sync::Arc;

use memferry::guest::{DestinationGuest, Guest, GuestError, GuestState, RunState, SourceGuest};
use memferry_stages::dirty_log::{DirtyLog, SoftwareLog};
use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::memory::{GuestMemory, MappedMemory, RamBlock};
use xxhash_rust::xxh3::Xxh3;

use crate::image::CHUNK;

/// The guest: a mapped image, or memory that was allocated for an arriving guest.
#[derive(Debug)]
pub(crate) struct StillGuest {
    mapped: Arc<MappedMemory>,
    memory: GuestMemory,
}

impl StillGuest {
    /// A source: the whole image, mapped and shared.
    pub(crate) fn mapping(image: &Path) -> Result<Self, GuestError> {
        let file = OpenOptions::new().read(true).write(true).open(image);
        let mapped = file.and_then(MappedMemory::file).map_err(|error| GuestError::caused("the image", error))?;
        let length = mapped.len() as u64;
        Self::of(PageSize::DEFAULT, BlockInfo::new("ram", length), mapped)
    }

    /// A destination: fresh private memory.
    pub(crate) fn build(
        page_size: PageSize,
        blocks: &[BlockInfo],
        _setup: &GuestState,
    ) -> Result<Arc<Self>, GuestError> {
        let [block] = blocks else { return Err(GuestError(format!("{} blocks came, not one", blocks.len()))) };
        let length = usize::try_from(block.length).map_err(|error| GuestError::caused("the block", error))?;
        let mapped = MappedMemory::anonymous(length).map_err(|error| GuestError::caused("memory", error))?;
        Self::of(page_size, block.clone(), mapped).map(Arc::new)
    }

    /// The hash of its memory, comparable with that of an image.
    pub(crate) fn hash(&self) -> u128 {
        let mut hash = Xxh3::new();
        let mut chunk = vec![0; CHUNK];
        for start in (0..self.mapped.len()).step_by(CHUNK) {
            self.mapped.load(start, &mut chunk);
            hash.update(&chunk);
        }
        hash.digest128()
    }

    fn of(page_size: PageSize, info: BlockInfo, mapped: MappedMemory) -> Result<Self, GuestError> {
        let mapped = Arc::new(mapped);
        let block = RamBlock { info, memory: mapped.clone(), fresh: true };
        let memory =
            GuestMemory::new(page_size, vec![block]).map_err(|error| GuestError::caused("the block", error))?;
        Ok(Self { mapped, memory })
    }
}

impl Guest for StillGuest {
    fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }
}

impl SourceGuest for StillGuest {
    fn run_state(&self) -> RunState {
        RunState::Paused
    }

    fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError> {
        Ok(vec![Arc::new(SoftwareLog::new(self.memory().layout()))])
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

impl DestinationGuest for StillGuest {
    fn prepare(&self, _state: &GuestState) -> Result<(), GuestError> {
        Ok(())
    }

    fn start(&self, _run_state: RunState) -> Result<(), GuestError> {
        Ok(())
    }
}
