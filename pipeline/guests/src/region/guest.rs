//! A region as a guest: how the engine sees it.
//!
//! Its setup state is the section `"region"`, version 1, without bytes: a destination that expects a region refuses
//! anything else. Its device state is its named state, a section for each name, all of version 0.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use memferry_stages::dirty_log::{DirtyLog, HashLog, UserfaultLog};
use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::memory::GuestMemory;

use super::Tracking;
use super::store::{BLOCK, Store};
use memferry::guest::{Guest, GuestError, GuestState, RunState, StateSection};

const VERSION: u32 = 1;

/// What this host can do.
pub(super) fn tracking() -> Tracking {
    UserfaultLog::supported().map_or_else(Tracking::Hash, |()| Tracking::Userfault)
}

/// A region that is here, or one that is to arrive.
#[derive(Debug)]
pub(super) struct RegionGuest {
    store: OnceLock<Arc<Store>>,
    at_most: usize,
}

impl RegionGuest {
    pub(super) fn of(store: Arc<Store>) -> Self {
        Self { at_most: store.len(), store: OnceLock::from(store) }
    }

    pub(super) fn expecting(at_most: usize) -> Self {
        Self { store: OnceLock::new(), at_most }
    }

    pub(super) fn arrived(&self) -> Option<Arc<Store>> {
        self.store.get().cloned()
    }

    fn store(&self) -> Result<&Arc<Store>, GuestError> {
        self.store.get().ok_or_else(|| GuestError("the region has not been built".into()))
    }
}

impl Guest for RegionGuest {
    /// # Panics
    /// Before [`Guest::build`], where a region is to arrive.
    fn memory(&self) -> GuestMemory {
        self.store.get().expect("build comes before memory").memory().clone()
    }

    fn run_state(&self) -> RunState {
        self.store.get().map_or(RunState::Paused, |store| store.run_state())
    }

    fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError> {
        let store = self.store()?;
        let memory = store.memory();
        Ok(vec![match tracking() {
            Tracking::Userfault => Arc::new(UserfaultLog::new(memory.layout(), vec![(0, store.mapped().clone())])),
            Tracking::Hash(_) => Arc::new(HashLog::new(memory.clone())),
        }])
    }

    fn setup_state(&self) -> Result<GuestState, GuestError> {
        let section = StateSection { name: BLOCK.into(), version: VERSION, bytes: Vec::new() };
        Ok(GuestState { sections: vec![section] })
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.store()?.pause();
        Ok(())
    }

    fn resume(&self) -> Result<(), GuestError> {
        self.store()?.resume();
        Ok(())
    }

    fn save(&self) -> Result<GuestState, GuestError> {
        let section = |(name, bytes): (String, _)| StateSection { name: name.into(), version: 0, bytes };
        Ok(GuestState { sections: self.store()?.states().into_iter().map(section).collect() })
    }

    fn build(&self, page_size: PageSize, blocks: &[BlockInfo], setup: &GuestState) -> Result<(), GuestError> {
        let is_region = |section: &StateSection| section.name == BLOCK && section.version == VERSION;
        let ([block], [section]) = (blocks, &setup.sections[..]) else {
            return Err(GuestError("what comes is no region".into()));
        };
        if block.id != BLOCK || !is_region(section) {
            return Err(GuestError(format!("what comes is no region of version {VERSION}")));
        }
        let fits = usize::try_from(block.length).ok().filter(|&length| length <= self.at_most);
        let length = fits.ok_or_else(|| {
            GuestError(format!("a region of {} bytes comes, at most {} are taken", block.length, self.at_most))
        })?;
        let store = Store::new(length, page_size, RunState::Paused);
        let store = store.map_err(|error| GuestError::caused("there is no memory for the region", error))?;
        self.store.set(Arc::new(store)).map_err(|_| GuestError("the region is built already".into()))
    }

    fn prepare(&self, state: &GuestState) -> Result<(), GuestError> {
        let named: BTreeMap<_, _> =
            state.sections.iter().map(|section| (section.name.raw().to_owned(), section.bytes.clone())).collect();
        if named.len() != state.sections.len() {
            return Err(GuestError("two pieces of the region's state have the same name".into()));
        }
        self.store()?.set_states(named);
        Ok(())
    }

    fn start(&self, run_state: RunState) -> Result<(), GuestError> {
        if run_state == RunState::Running {
            self.store()?.resume();
        }
        Ok(())
    }
}
