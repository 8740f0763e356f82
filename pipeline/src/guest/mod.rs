//! Guests: what is moved, behind one trait.

use std::fmt;
use std::sync::Arc;

use memferry_stages::dirty_log::DirtyLog;
use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::memory::GuestMemory;
pub use memferry_stages::wire::messages::RunState;

pub mod file;
pub mod kvm;
pub mod workload;

/// What went wrong in a guest: a sentence for the operator, with the cause in it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct GuestError(pub String);

impl GuestError {
    /// `what`, and the error that caused it.
    pub fn caused(what: impl fmt::Display, cause: impl fmt::Display) -> Self {
        Self(format!("{what}: {cause}"))
    }
}

/// Named, versioned sections of guest state, opaque to memferry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestState {
    /// In the order they were saved.
    pub sections: Vec<StateSection>,
}

/// One section of state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateSection {
    /// Its name, 1 to 255 bytes.
    pub name: String,
    /// Version of its format.
    pub version: u32,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// A guest: at a source or at a destination.
///
/// All methods are called from threads that may block, one call at a time, except [`Guest::throttle`] which may come
/// at any time between the start of the dirty logs and the pause.
///
/// ```text
/// source:       setup_state  dirty_logs  (throttle)*  pause  save  release            ┬─ handed over: the guest stays paused
///                                                                                     └─ failed: reacquire, resume (if it ran)
/// destination:  build  ── memory() is written by the loaders ──  prepare  start       (or dropped at any point before start)
/// ```
pub trait Guest: Send + Sync + fmt::Debug {
    /// Its RAM blocks. At a destination: valid once [`Guest::build`] has returned.
    fn memory(&self) -> GuestMemory;

    /// Does it run?
    fn run_state(&self) -> RunState;

    // ---- at the source ----

    /// The logs that together see every write to its memory, not started yet.
    ///
    /// # Errors
    /// When the host cannot give one.
    fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError>;

    /// What a destination needs to know to build its machine. Nothing by default.
    ///
    /// # Errors
    /// When it cannot be told.
    fn setup_state(&self) -> Result<GuestState, GuestError> {
        Ok(GuestState::default())
    }

    /// Pauses the guest: when this returns, no vCPU, device thread or I/O in flight writes guest memory.
    ///
    /// # Errors
    /// When it cannot be paused; it is then resumed, and goes on.
    fn pause(&self) -> Result<(), GuestError>;

    /// Lets a paused guest go on. Called again after an error.
    ///
    /// # Errors
    /// When it cannot; the operator is told so (exit code 4).
    fn resume(&self) -> Result<(), GuestError>;

    /// Holds the guest back for `percent` of its time; 0 lets it run free.
    ///
    /// # Errors
    /// If this guest cannot be throttled.
    fn throttle(&self, percent: u8) -> Result<(), GuestError> {
        let _ = percent;
        Err(GuestError("this guest cannot be throttled".into()))
    }

    /// Its device state; called after the pause and before the last bitmap sync, for saving may write memory.
    ///
    /// # Errors
    /// When it cannot be saved.
    fn save(&self) -> Result<GuestState, GuestError>;

    /// Gives up what only one side may hold (disks, locks), before the destination may take it.
    ///
    /// # Errors
    /// When it cannot; the migration then fails and the guest goes on.
    fn release(&self) -> Result<(), GuestError> {
        Ok(())
    }

    /// Takes back what [`Guest::release`] gave up.
    ///
    /// # Errors
    /// When it cannot; the guest then stays paused and the operator is told.
    fn reacquire(&self) -> Result<(), GuestError> {
        Ok(())
    }

    /// Go is about to be handed to the transport: from here on this guest may run elsewhere, and nothing of its own (a guard that
    /// would resume it when this program dies) may start it again.
    fn committed(&self) {}

    // ---- at the destination ----

    /// Builds the machine for the blocks that come, or refuses with both sides' figures.
    ///
    /// # Errors
    /// When the blocks do not fit this guest.
    fn build(&self, page_size: PageSize, blocks: &[BlockInfo], setup: &GuestState) -> Result<(), GuestError>;

    /// Everything is loaded: applies the device state and opens what is needed. May fail; nothing runs yet.
    ///
    /// # Errors
    /// When the state does not fit; the guest goes on at its source.
    fn prepare(&self, state: &GuestState) -> Result<(), GuestError>;

    /// Starts the guest, or leaves it paused if it was. Cannot be taken back.
    ///
    /// # Errors
    /// When it does not start; the operators of both sides are told.
    fn start(&self, run_state: RunState) -> Result<(), GuestError>;
}
