//! Stage: dirty scanner.

use std::sync::Arc;

use crate::batch::{Batch, Item};
use crate::bitmap::DirtyBitmap;
use crate::dirty_log::DirtyLog;
use crate::error::StageError;
use crate::geometry::LaneMap;
use crate::in_flight::InFlight;
use crate::meter::Meter;
use crate::queue::{Inlet, Outlet};
use crate::stage::Stage;

/// Scan the bitmap once, from its first word to its last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScanOrder {
    /// The round's number, from 1.
    pub round: u32,
    /// Is the guest paused, and this the last round?
    pub last: bool,
}

/// The scan reached the bitmap's end; its batches are on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundScanned {
    /// As in the order.
    pub round: u32,
    /// Pages that were taken, all lanes together.
    pub pages: u64,
}

/// The stage: see the module.
#[derive(Debug)]
pub struct Scanner {
    bitmap: Arc<DirtyBitmap>,
    untouched: Option<Arc<DirtyBitmap>>,
    logs: Vec<Arc<dyn DirtyLog>>,
    lanes: LaneMap,
    in_flight: Arc<InFlight>,
    stage: Stage,
}

impl Scanner {
    /// A scanner of `bitmap` for the lanes of the map.
    #[must_use]
    pub fn new(
        bitmap: Arc<DirtyBitmap>,
        untouched: Option<Arc<DirtyBitmap>>,
        logs: Vec<Arc<dyn DirtyLog>>,
        lanes: LaneMap,
        in_flight: Arc<InFlight>,
        meter: Arc<Meter>,
    ) -> Self {
        Self { bitmap, untouched, logs, lanes, in_flight, stage: Stage::new("scanner", None, meter) }
    }

    /// Runs until the last round is scanned, or there are no more orders.
    ///
    /// # Errors
    /// When a log cannot be re-armed, or a lane has ended.
    pub async fn run(
        self,
        input: Inlet<ScanOrder>,
        lanes: Vec<Outlet<Item<Batch>>>,
        scanned: Outlet<RoundScanned>,
    ) -> Result<(), StageError> {
        todo!()
    }
}
