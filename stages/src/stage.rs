//! The identity of a stage: its id and its meter, for its errors and its waits.

use std::sync::Arc;

use crate::error::{Cause, StageError};
use crate::meter::{Meter, Wait};
use crate::pool::{BufferPool, PooledBuffer};
use crate::stage_id::StageId;

#[cfg(test)]
mod chain_tests;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod urgent_tests;

/// The identity of a running stage. Its meter stops when this is dropped, with the stage or with its task.
#[derive(Debug)]
pub(crate) struct Stage {
    id: StageId,
    /// Where its work and its waits are counted.
    pub(crate) meter: Arc<Meter>,
}

impl Stage {
    pub(crate) fn new(id: StageId, meter: Arc<Meter>) -> Self {
        Self { id, meter }
    }

    /// This stage's error with the given cause.
    pub(crate) fn fails(&self, cause: impl Into<Cause>) -> StageError {
        StageError { stage: self.id, cause: cause.into() }
    }

    /// A buffer of a pool. Waiting for one counts as waiting for output, since the stages downstream hold the buffers.
    pub(crate) async fn take_buffer(&self, pool: &BufferPool) -> PooledBuffer {
        if let Some(buffer) = pool.try_take() {
            return buffer;
        }
        let _waiting = self.meter.waiting(Wait::Output);
        pool.take().await
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.meter.end();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn waiting_for_a_buffer_counts_as_waiting_for_output_and_the_meter_stops_with_the_stage() {
        let stage = Stage::new(StageId::SCANNER, testing::meter());
        let meter = stage.meter.clone();
        let pool = BufferPool::new(1, 8);
        testing::block_on(async {
            let held = stage.take_buffer(&pool).await;
            assert_eq!(meter.read().output_wait, Duration::ZERO);
            let release = async {
                tokio::time::sleep(Duration::from_millis(20)).await;
                drop(held);
            };
            tokio::join!(stage.take_buffer(&pool), release);
        });
        drop(stage);
        let reading = meter.read();
        assert!(reading.output_wait >= Duration::from_millis(20), "{reading:?}");
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(meter.read(), reading);
    }
}
