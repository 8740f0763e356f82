//! Receiver: reads the batches of one connection, and passes them to the lanes that travel on it.
//!
//! ```text
//!              ┌──────────┐ ── Arrived, marks ──▶ loader of each lane (in band)
//! Deframer ──▶ │ receiver │
//!              └──────────┘ ── every other message ──▶ controller
//! ```
//!
//! It takes the [`Deframer`] of the connection's stream, which checks everything (ARCHITECTURE.md, law 8: the peer is not trusted),
//! and promises:
//! - A frame that the deframer refuses ends the stage with its error, which names the frame's offset.
//! - A payload is read from the transport straight into a pooled buffer. While it waits for one it holds no other.
//! - The end of the stream between two frames is a normal end. Other stages check whether everything had arrived.
//!
//! Its meter counts pages and the bytes of their frames.

use std::sync::Arc;

use crate::batch::{Arrived, Item};
use crate::dialect::{Deframed, Deframer};
use crate::error::{Cause, StageError};
use crate::meter::{Meter, Wait};
use crate::pending::pending;
use crate::pool::{BufferPool, PooledBuffer};
use crate::queue::Outlet;
use crate::stage::Stage;
use crate::stage_id::StageId;

/// The stage: see the module.
#[derive(Debug)]
pub struct Receiver<D> {
    deframer: D,
    pool: BufferPool,
    stage: Stage,
}

impl<D: Deframer> Receiver<D> {
    /// The receiver of connection number `connection`. Buffers of `pool` hold an extent.
    #[must_use]
    pub fn new(connection: u16, deframer: D, pool: BufferPool, meter: Arc<Meter>) -> Self {
        Self { deframer, pool, stage: Stage::new(StageId::receiver(connection), meter) }
    }

    /// Runs until the stream ends. `lanes` has an outlet at the index of each lane of this connection, and `None` for the
    /// others.
    ///
    /// # Errors
    /// When the transport fails, a frame is invalid, or a later stage has ended.
    ///
    /// # Panics
    /// If a lane of this connection has no outlet, or a buffer of the pool is too small for an extent.
    pub async fn run(
        mut self,
        lanes: Vec<Option<Outlet<Item<Arrived>>>>,
        control: Outlet<D::Message>,
    ) -> Result<(), StageError> {
        let meter = &self.stage.meter;
        let lanes: Vec<_> = lanes.into_iter().map(|lane| lane.map(|outlet| outlet.metered(meter))).collect();
        let control = control.metered(meter);
        self.work(&lanes, &control).await.map_err(|cause| self.stage.fails(cause))
    }

    async fn work(
        &mut self,
        lanes: &[Option<Outlet<Item<Arrived>>>],
        control: &Outlet<D::Message>,
    ) -> Result<(), Cause> {
        let meter = self.stage.meter.clone();
        while let Some(deframed) = pending(self.deframer.next(), &meter, Wait::Input).await.map_err(Into::into)? {
            let (lane, item) = match deframed {
                Deframed::Batch { lane, mut arrived, bytes } => {
                    arrived.payload = self.payload(arrived.payload_bytes()).await?;
                    meter.count(u64::from(arrived.mask.count_ones()), bytes);
                    (lane, Item::Batch(arrived))
                }
                Deframed::Mark { lane, mark } => (lane, Item::Mark(mark)),
                Deframed::Message(message) => {
                    control.put(message).await?;
                    continue;
                }
            };
            let outlet = lanes[usize::from(lane)].as_ref().expect("an outlet for each lane of the connection");
            outlet.put(item).await?;
        }
        Ok(())
    }

    async fn payload(&mut self, bytes: usize) -> Result<Option<PooledBuffer>, Cause> {
        if bytes == 0 {
            return Ok(None);
        }
        let mut buffer = self.stage.take_buffer(&self.pool).await;
        let read = self.deframer.payload(&mut buffer.space()[..bytes]);
        pending(read, &self.stage.meter, Wait::Input).await.map_err(Into::into)?;
        buffer.set_filled(bytes);
        Ok(Some(buffer))
    }
}

#[cfg(test)]
mod tests;
