//! A guest around the guest under test: it does what that one does, and takes down what its memory and state were at the
//! moments that matter.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memferry_stages::dirty_log::DirtyLog;
use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::memory::GuestMemory;

use super::image::Image;
use crate::guest::{Guest, GuestError, GuestState, RunState};
use crate::migration::built_otherwise;

/// What was seen.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Memory when save was called; when it had returned; and just before Go.
    pub(super) unsaved: Option<Image>,
    pub(super) saved: Option<Image>,
    pub(super) committed: Option<Image>,
    /// What was saved.
    pub(super) state: Option<GuestState>,
    /// Memory when everything was loaded, before prepare.
    pub(super) loaded: Option<Image>,
    /// What is wrong with what was built.
    pub(super) badly_built: Option<String>,
    /// How it ran when prepare had returned.
    pub(super) prepared: Option<RunState>,
}

/// See the module.
pub(super) struct Witness {
    guest: Arc<dyn Guest>,
    seen: Mutex<Seen>,
    /// Called when the guest is saved: trouble begins.
    pub(super) at_save: Option<Box<dyn Fn() + Send + Sync>>,
    /// Prepare does its work and then fails.
    pub(super) refuses: bool,
}

impl fmt::Debug for Witness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.guest.fmt(f)
    }
}

impl Witness {
    pub(super) fn of(guest: Arc<dyn Guest>) -> Self {
        Self { guest, seen: Mutex::default(), at_save: None, refuses: false }
    }

    pub(super) fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn image(&self) -> Option<Image> {
        // Memory that cannot be read fails the migration in better words.
        Image::of(&self.guest.memory()).ok()
    }
}

impl Guest for Witness {
    fn memory(&self) -> GuestMemory {
        self.guest.memory()
    }

    fn run_state(&self) -> RunState {
        self.guest.run_state()
    }

    fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError> {
        self.guest.dirty_logs()
    }

    fn setup_state(&self) -> Result<GuestState, GuestError> {
        self.guest.setup_state()
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.guest.pause()
    }

    fn resume(&self) -> Result<(), GuestError> {
        self.guest.resume()
    }

    fn throttle(&self, percent: u8) -> Result<(), GuestError> {
        self.guest.throttle(percent)
    }

    fn save(&self) -> Result<GuestState, GuestError> {
        self.seen().unsaved = self.image();
        let state = self.guest.save()?;
        let mut seen = self.seen();
        seen.saved = self.image();
        seen.state = Some(state.clone());
        self.at_save.iter().for_each(|trouble| trouble());
        Ok(state)
    }

    fn release(&self) -> Result<(), GuestError> {
        self.guest.release()
    }

    fn reacquire(&self) -> Result<(), GuestError> {
        self.guest.reacquire()
    }

    fn committed(&self, destination: &str) -> Result<(), GuestError> {
        self.seen().committed = self.image();
        self.guest.committed(destination)
    }

    fn moved(&self) {
        self.guest.moved();
    }

    fn build(&self, page_size: PageSize, blocks: &[BlockInfo], setup: &GuestState) -> Result<(), GuestError> {
        self.guest.build(page_size, blocks, setup)?;
        self.seen().badly_built = what_is_wrong(&self.guest.memory(), page_size, blocks);
        Ok(())
    }

    fn prepare(&self, state: &GuestState) -> Result<(), GuestError> {
        self.seen().loaded = self.image();
        self.guest.prepare(state)?;
        self.seen().prepared = Some(self.guest.run_state());
        if self.refuses { Err(GuestError("told by the conformance kit to refuse".into())) } else { Ok(()) }
    }

    fn start(&self, run_state: RunState) -> Result<(), GuestError> {
        self.guest.start(run_state)
    }
}

/// What a guest built is what came: the same blocks, zero where it says that they are.
pub(super) fn what_is_wrong(memory: &GuestMemory, page_size: PageSize, blocks: &[BlockInfo]) -> Option<String> {
    if let Some(otherwise) = built_otherwise(memory, page_size, blocks) {
        return Some(otherwise);
    }
    let image = Image::of(memory).ok()?;
    let fresh = (0..).zip(memory.blocks()).filter(|(_, block)| block.fresh);
    let not_zero = fresh.filter_map(|(index, _)| image.first_not_zero(index)).next()?;
    Some(format!("{not_zero} is not zero, though its block says that it is fresh"))
}
