//! Stage: zero-page detector.

use std::sync::Arc;

use crate::batch::{Batch, CopiedBatch, Item};
use crate::dirty_log::DirtyLog;
use crate::error::StageError;
use crate::memory::GuestMemory;
use crate::meter::Meter;
use crate::pool::BufferPool;
use crate::queue::{Inlet, Outlet};
use crate::stage::Stage;

/// The stage: see the module.
#[derive(Debug)]
pub struct ZeroDetector {
    memory: GuestMemory,
    pool: BufferPool,
    logs: Vec<Arc<dyn DirtyLog>>,
    stage: Stage,
}

impl ZeroDetector {
    /// The detector of one lane. Buffers of `pool` hold an extent.
    #[must_use]
    pub fn new(
        lane: u16,
        memory: GuestMemory,
        pool: BufferPool,
        logs: Vec<Arc<dyn DirtyLog>>,
        meter: Arc<Meter>,
    ) -> Self {
        Self { memory, pool, logs, stage: Stage::new("zero-page detector", Some(lane), meter) }
    }

    /// Runs until the switchover has passed, or there is no more input.
    ///
    /// # Errors
    /// When guest memory cannot be read, or the next stage has ended.
    pub async fn run(self, input: Inlet<Item<Batch>>, output: Outlet<Item<CopiedBatch>>) -> Result<(), StageError> {
        todo!()
    }
}
