//! workload

pub mod settings;
mod stamp;

use std::sync::Arc;

use super::GuestError;

pub use settings::{Backing, Fill, LogChoice, Pattern, Region, WorkloadSettings, WriterSettings};

/// The guest.
#[derive(Debug)]
pub struct Workload {}

/// What the writers did and found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkloadStatus {
    /// Do the writers run?
    pub running: bool,
    /// Pages written since the workload was made, at its source too.
    pub writes: u64,
    /// Of these, those written in this process.
    pub writes_since_start_here: u64,
    /// Pages whose stamp was compared in this process.
    pub pages_checked: u64,
    /// Pages found to hold something else than what was last written to them.
    pub stale_pages: u64,
    /// The first of them, in words.
    pub first_stale: Option<String>,
}

impl Workload {
    /// Fills the memory and starts the writers.
    ///
    /// # Errors
    /// When the settings are out of their limits, or the host has not the memory.
    pub fn source(settings: WorkloadSettings) -> Result<Arc<Self>, GuestError> {
        settings.validate()?;
        todo!()
    }

    /// A workload that is to arrive: everything it must know travels with it.
    #[must_use]
    pub fn destination() -> Arc<Self> {
        todo!()
    }

    /// What the writers did and found, up to here.
    #[must_use]
    pub fn status(&self) -> WorkloadStatus {
        todo!()
    }

    /// Compares every page that was ever written with what was last written to it, and returns the status after that.
    /// The writers may run meanwhile.
    pub fn check_all(&self) -> WorkloadStatus {
        todo!()
    }
}
