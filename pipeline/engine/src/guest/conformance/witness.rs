//! Wrappers around the guest under test: they delegate to it, and record its memory and state at the moments that
//! matter.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memferry_stages::dirty_log::DirtyLog;
use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::memory::GuestMemory;

use super::image::Image;
use super::{DestinationGuest, Guest, GuestBuilder, GuestState, SourceGuest};
use crate::guest::{GuestError, RunState};
use crate::migration::built_otherwise;

/// The records of a source.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// Memory when save was called, when it had returned, and just before Go.
    pub(super) unsaved: Option<Image>,
    pub(super) saved: Option<Image>,
    pub(super) committed: Option<Image>,
    /// The saved state.
    pub(super) state: Option<GuestState>,
}

/// A source that is recorded.
pub(super) struct Leaving {
    guest: Arc<dyn SourceGuest>,
    seen: Mutex<Left>,
    /// Called when the guest is saved: provokes the failure.
    pub(super) at_save: Option<Box<dyn Fn() + Send + Sync>>,
    /// Called when Go is about to leave.
    pub(super) at_commit: Option<Box<dyn Fn() + Send + Sync>>,
}

impl fmt::Debug for Leaving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.guest.fmt(f)
    }
}

impl Leaving {
    pub(super) fn of(guest: Arc<dyn SourceGuest>) -> Self {
        Self { guest, seen: Mutex::default(), at_save: None, at_commit: None }
    }

    pub(super) fn seen(&self) -> MutexGuard<'_, Left> {
        held(&self.seen)
    }

    fn image(&self) -> Option<Image> {
        // The migration reports memory that cannot be read with a better error.
        Image::of(&self.guest.memory()).ok()
    }
}

impl Guest for Leaving {
    fn memory(&self) -> GuestMemory {
        self.guest.memory()
    }
}

impl SourceGuest for Leaving {
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
        self.guest.committed(destination)?;
        self.at_commit.iter().for_each(|trouble| trouble());
        Ok(())
    }

    fn moved(&self) {
        self.guest.moved();
    }
}

/// The records of a destination.
#[derive(Debug)]
pub(super) struct Arrived<G> {
    /// The built guest.
    pub(super) guest: Option<Arc<G>>,
    /// The first error found in it.
    pub(super) badly_built: Option<String>,
    /// Memory when everything was loaded, before prepare.
    pub(super) loaded: Option<Image>,
    /// Its run state when prepare had returned.
    pub(super) prepared: Option<RunState>,
    /// It does not take back its preparation.
    pub(super) stays_prepared: bool,
}

impl<G> Default for Arrived<G> {
    fn default() -> Self {
        Self { guest: None, badly_built: None, loaded: None, prepared: None, stays_prepared: false }
    }
}

/// Builds a guest that is recorded.
pub(super) struct Expecting<B: GuestBuilder> {
    pub(super) builder: B,
    pub(super) seen: Arc<Mutex<Arrived<B::Built>>>,
    /// Prepare does its work and then fails.
    pub(super) refuses: bool,
}

/// A destination that is recorded.
#[derive(Debug)]
pub(super) struct Arriving<G> {
    guest: Arc<G>,
    seen: Arc<Mutex<Arrived<G>>>,
    refuses: bool,
}

impl<B: GuestBuilder<Built: SourceGuest>> GuestBuilder for Expecting<B> {
    type Built = Arriving<B::Built>;

    fn build(
        self,
        page_size: PageSize,
        blocks: &[BlockInfo],
        setup: &GuestState,
    ) -> Result<Arc<Self::Built>, GuestError> {
        let guest = self.builder.build(page_size, blocks, setup)?;
        let mut seen = held(&self.seen);
        seen.badly_built = what_is_wrong(&guest.memory(), page_size, blocks);
        seen.guest = Some(guest.clone());
        drop(seen);
        Ok(Arc::new(Arriving { guest, seen: self.seen, refuses: self.refuses }))
    }
}

impl<G: DestinationGuest + SourceGuest> Guest for Arriving<G> {
    fn memory(&self) -> GuestMemory {
        self.guest.memory()
    }

    fn can_be_userfaulted(&self) -> Result<(), GuestError> {
        self.guest.can_be_userfaulted()
    }

    fn mapping_is_exclusive(&self) -> Result<(), GuestError> {
        self.guest.mapping_is_exclusive()
    }
}

impl<G: DestinationGuest + SourceGuest> DestinationGuest for Arriving<G> {
    fn make_durable(&self) -> Result<(), GuestError> {
        self.guest.make_durable()
    }

    fn prepare(&self, state: &GuestState) -> Result<(), GuestError> {
        held(&self.seen).loaded = Image::of(&self.guest.memory()).ok();
        self.guest.prepare(state)?;
        held(&self.seen).prepared = Some(self.guest.run_state());
        if self.refuses { Err(GuestError("the conformance kit makes this call fail".into())) } else { Ok(()) }
    }

    fn unprepare(&self) -> Result<(), GuestError> {
        self.guest.unprepare().inspect_err(|_| held(&self.seen).stays_prepared = true)
    }

    fn start(&self, run_state: RunState) -> Result<(), GuestError> {
        self.guest.start(run_state)
    }
}

/// Takes the lock, also after a panic of its holder.
pub(super) fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The built guest matches the received blocks: the same blocks, zero where it must be.
pub(super) fn what_is_wrong(memory: &GuestMemory, page_size: PageSize, blocks: &[BlockInfo]) -> Option<String> {
    if let Some(otherwise) = built_otherwise(memory, page_size, blocks) {
        return Some(otherwise);
    }
    let image = Image::of(memory).ok()?;
    let fresh = (0..).zip(memory.blocks()).filter(|(_, block)| block.fresh);
    let not_zero = fresh.filter_map(|(index, _)| image.first_not_zero(index)).next()?;
    Some(format!("{not_zero} is not zero, though its block is reported as fresh"))
}
