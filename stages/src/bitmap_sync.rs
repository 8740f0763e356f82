//! Stage: bitmap sync. Brings what the dirty logs saw into the dirty bitmap, once for each order.
//!
//! - **Takes** a [`SyncOrder`] from the controller.
//! - **Gives** a [`Synced`]: how many pages are dirty now, and how long it took.
//! - **Owns** nothing; logs and bitmap are shared.
//! - **Promises** that syncs never overlap, that every log is asked for every extent, and that a dropped task ends its sync
//!   at the next range of [`RANGE_BYTES`].

use std::io;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crate::bitmap::DirtyBitmap;
use crate::dirty_log::DirtyLog;
use crate::error::{Cause, StageError};
use crate::geometry::Layout;
use crate::meter::Meter;
use crate::queue::{Closed, Inlet, Outlet};
use crate::stage::Stage;

/// The most guest memory that a log is asked for in one call, in bytes: a cancel comes between two.
pub const RANGE_BYTES: u64 = 64 << 20;

/// Sync what the logs saw until now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyncOrder {
    /// The round that was scanned before; 0 before the first.
    pub after_round: u32,
}

/// A sync is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Synced {
    /// As in the order.
    pub after_round: u32,
    /// Pages whose bit is set now.
    pub dirty_pages: u64,
    /// How long the logs took.
    pub duration: Duration,
}

/// The stage: see the module.
#[derive(Debug)]
pub struct BitmapSync {
    logs: Arc<[Arc<dyn DirtyLog>]>,
    bitmap: Arc<DirtyBitmap>,
    stage: Stage,
}

impl BitmapSync {
    /// A sync of all `logs` into `bitmap`. The meter counts syncs as batches, and the pages found dirty.
    #[must_use]
    pub fn new(logs: Vec<Arc<dyn DirtyLog>>, bitmap: Arc<DirtyBitmap>, meter: Arc<Meter>) -> Self {
        Self { logs: logs.into(), bitmap, stage: Stage::new("bitmap sync", None, meter) }
    }

    /// Runs until there are no more orders.
    ///
    /// # Errors
    /// When a log cannot be synced, or nobody takes the answers.
    pub async fn run(self, input: Inlet<SyncOrder>, output: Outlet<Synced>) -> Result<(), StageError> {
        todo!()
    }
}
