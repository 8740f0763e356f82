//! A guest that stands still: what a VMM's author writes for memferry, at its least.

use std::fs::OpenOptions;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use memferry::guest::{Guest, GuestError, GuestState, RunState};
use memferry_stages::dirty_log::{DirtyLog, SoftwareLog};
use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::memory::{GuestMemory, MappedMemory, RamBlock};
use xxhash_rust::xxh3::Xxh3;

use crate::image::CHUNK;

/// The guest: an image that is mapped, or memory that is yet to come.
#[derive(Debug)]
pub(crate) struct StillGuest {
    ram: OnceLock<(Arc<MappedMemory>, GuestMemory)>,
}

impl StillGuest {
    /// A source: the whole image, mapped and shared.
    pub(crate) fn mapping(image: &Path) -> Result<Self, GuestError> {
        let file = OpenOptions::new().read(true).write(true).open(image);
        let mapped = file.and_then(MappedMemory::file).map_err(|error| GuestError::caused("the image", error))?;
        let guest = Self { ram: OnceLock::new() };
        let length = mapped.len() as u64;
        let info = BlockInfo::new("ram", length);
        guest.put_in(PageSize::DEFAULT, info, mapped)?;
        Ok(guest)
    }

    /// A destination: fresh private memory.
    pub(crate) fn arriving() -> Self {
        Self { ram: OnceLock::new() }
    }

    /// The hash of its memory, as that of an image.
    pub(crate) fn hash(&self) -> u128 {
        let (mapped, _) = self.ram.get().expect("built");
        let (mut hash, mut chunk) = (Xxh3::new(), vec![0; CHUNK]);
        for start in (0..mapped.len()).step_by(CHUNK) {
            mapped.load(start, &mut chunk);
            hash.update(&chunk);
        }
        hash.digest128()
    }

    fn put_in(&self, page_size: PageSize, info: BlockInfo, mapped: MappedMemory) -> Result<(), GuestError> {
        let mapped = Arc::new(mapped);
        let block = RamBlock { info, memory: mapped.clone(), fresh: true };
        let memory =
            GuestMemory::new(page_size, vec![block]).map_err(|error| GuestError::caused("the block", error))?;
        self.ram.set((mapped, memory)).map_err(|_| GuestError("it has its memory already".into()))
    }
}

impl Guest for StillGuest {
    fn memory(&self) -> GuestMemory {
        self.ram.get().expect("built").1.clone()
    }

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

    fn build(&self, page_size: PageSize, blocks: &[BlockInfo], _setup: &GuestState) -> Result<(), GuestError> {
        let [block] = blocks else { return Err(GuestError(format!("{} blocks came, not one", blocks.len()))) };
        let length = usize::try_from(block.length).map_err(|error| GuestError::caused("the block", error))?;
        let mapped = MappedMemory::anonymous(length).map_err(|error| GuestError::caused("memory", error))?;
        self.put_in(page_size, block.clone(), mapped)
    }

    fn prepare(&self, _state: &GuestState) -> Result<(), GuestError> {
        Ok(())
    }

    fn start(&self, _run_state: RunState) -> Result<(), GuestError> {
        Ok(())
    }
}
