//! A region as a guest, as the engine sees it.
//!
//! Its setup state is the section `"region"`, version 1, without bytes: a destination that expects a region refuses any
//! other. Its device state is its named state, one section for each name, all of version 0. The
//! bytes are the program's own: there is nothing to encode.

use std::collections::BTreeMap;
use std::sync::Arc;

use memferry_stages::dirty_log::{DirtyLog, HashLog, UserfaultLog};
use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::memory::GuestMemory;

use super::Tracking;
use super::store::{BLOCK, Store};
use memferry::guest::{
    DestinationGuest, Guest, GuestBuilder, GuestError, GuestState, RunState, SourceGuest, StateSection,
};

const VERSION: u32 = 1;

/// The features of this host.
pub(super) fn tracking() -> Tracking {
    UserfaultLog::supported().map_or_else(Tracking::Hash, |()| Tracking::Userfault)
}

/// A region, as the engine sees it.
#[derive(Debug)]
pub(super) struct RegionGuest {
    pub(super) store: Arc<Store>,
}

impl RegionGuest {
    /// Builds a region of at most `at_most` bytes.
    pub(super) fn expecting(at_most: usize) -> impl GuestBuilder<Built = Self> {
        move |page_size: PageSize, blocks: &[BlockInfo], setup: &GuestState| {
            Self::build(at_most, page_size, blocks, setup).map(Arc::new)
        }
    }

    pub(super) fn build(
        at_most: usize,
        page_size: PageSize,
        blocks: &[BlockInfo],
        setup: &GuestState,
    ) -> Result<Self, GuestError> {
        let is_region = |section: &StateSection| section.name == BLOCK && section.version == VERSION;
        let ([block], [section]) = (blocks, &setup.sections[..]) else {
            return Err(GuestError("what comes is no region".into()));
        };
        if block.id != BLOCK || !is_region(section) {
            return Err(GuestError(format!("what comes is no region of version {VERSION}")));
        }
        let fits = usize::try_from(block.length).ok().filter(|&length| length <= at_most);
        let length = fits.ok_or_else(|| {
            GuestError(format!("a region of {} bytes comes, at most {at_most} are taken", block.length))
        })?;
        let store = Store::new(length, page_size, RunState::Paused);
        let store = store.map_err(|error| GuestError::caused("there is no memory for the region", error))?;
        Ok(Self { store: Arc::new(store) })
    }
}

impl Guest for RegionGuest {
    fn memory(&self) -> GuestMemory {
        self.store.memory().clone()
    }

    fn can_be_userfaulted(&self) -> Result<(), GuestError> {
        Ok(())
    }

    /// Nothing else maps it, and no page is pinned.
    fn mapping_is_exclusive(&self) -> Result<(), GuestError> {
        Ok(())
    }
}

impl SourceGuest for RegionGuest {
    fn run_state(&self) -> RunState {
        self.store.run_state()
    }

    fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError> {
        let memory = self.store.memory();
        Ok(vec![match tracking() {
            Tracking::Userfault => Arc::new(UserfaultLog::new(memory.layout(), vec![(0, self.store.mapped().clone())])),
            Tracking::Hash(_) => Arc::new(HashLog::new(memory.clone())),
        }])
    }

    fn setup_state(&self) -> Result<GuestState, GuestError> {
        let section = StateSection { name: BLOCK.into(), version: VERSION, bytes: Vec::new() };
        Ok(GuestState { sections: vec![section] })
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.store.pause();
        Ok(())
    }

    fn resume(&self) -> Result<(), GuestError> {
        self.store.resume();
        Ok(())
    }

    fn save(&self) -> Result<GuestState, GuestError> {
        let section = |(name, bytes): (String, _)| StateSection { name: name.into(), version: 0, bytes };
        Ok(GuestState { sections: self.store.states().into_iter().map(section).collect() })
    }
}

impl DestinationGuest for RegionGuest {
    fn prepare(&self, state: &GuestState) -> Result<(), GuestError> {
        let named: BTreeMap<_, _> =
            state.sections.iter().map(|section| (section.name.raw().to_owned(), section.bytes.clone())).collect();
        if named.len() != state.sections.len() {
            return Err(GuestError("two pieces of the region's state have the same name".into()));
        }
        self.store.set_states(named);
        Ok(())
    }

    /// The state of a later moment replaces what was applied.
    fn unprepare(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn start(&self, run_state: RunState) -> Result<(), GuestError> {
        if run_state == RunState::Running {
            self.store.resume();
        }
        Ok(())
    }
}
