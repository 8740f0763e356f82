//! Stage: encoder.

use std::sync::Arc;

use bytes::Bytes;

use crate::batch::{CopiedBatch, Item};
use crate::codec::Codec;
use crate::error::StageError;
use crate::geometry::PageSize;
use crate::meter::Meter;
use crate::pool::{BufferPool, PooledBuffer};
use crate::queue::{Inlet, Outlet};
use crate::stage::Stage;
use crate::tally::RoundTally;

/// How pages are to be encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncoderPlan {
    /// Compressor of the first round; of every round where `delta` is `None`.
    pub compress: Option<Codec>,
    /// Deltas, from the first RoundComplete on.
    pub delta: Option<DeltaPlan>,
    /// Does each payload carry its xxh3-64?
    pub checksum: bool,
}

/// How deltas are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaPlan {
    /// Bytes of the cache: this lane's share.
    pub cache_bytes: u64,
    /// Compressor of pages that miss the cache or whose delta is not smaller; without one they go raw.
    pub on_miss: Option<Codec>,
    /// Do pages enter the cache in the first round already?
    pub cache_first_round: bool,
}

/// A frame for the sender, or as much of one as stands before its payload.
#[derive(Debug)]
pub struct Outgoing {
    /// The lane whose frame it is.
    pub lane: u16,
    /// The frame's head and its body up to the payload; a whole frame where there is no payload.
    pub head: Bytes,
    /// The payload.
    pub payload: Option<PooledBuffer>,
    /// What is reached when this frame is sent.
    pub mark: Option<Mark>,
}

/// What a frame stands for, for the sender to report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// All frames of the round stand before this one in the lane; the figures are complete.
    RoundComplete(RoundTally),
    /// The lane's last frame.
    Switchover,
}

/// The stage: see the module.
#[derive(Debug)]
pub struct Encoder {
    lane: u16,
    page_size: PageSize,
    plan: EncoderPlan,
    pool: BufferPool,
    stage: Stage,
}

impl Encoder {
    /// The encoder of one lane. Buffers of `pool`, which is not the detector's, hold an extent.
    #[must_use]
    pub fn new(lane: u16, page_size: PageSize, plan: EncoderPlan, pool: BufferPool, meter: Arc<Meter>) -> Self {
        Self { lane, page_size, plan, pool, stage: Stage::new("encoder", Some(lane), meter) }
    }

    /// The most bytes that its cache takes.
    #[must_use]
    pub fn bound_bytes(&self) -> u64 {
        todo!()
    }

    /// Runs until the switchover has passed, or there is no more input.
    ///
    /// # Errors
    /// When the next stage has ended.
    pub async fn run(self, input: Inlet<Item<CopiedBatch>>, output: Outlet<Outgoing>) -> Result<(), StageError> {
        todo!()
    }
}
