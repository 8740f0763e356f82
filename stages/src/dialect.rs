//! The seam between what flows and the bytes of a stream.
//!
//! ```text
//! encoder ── EncodedBatch, Mark ──▶ Framer ── Framed ──▶ sender ═══▶ Deframer ── Arrived, Mark, message ──▶ receiver ─▶ loader
//! ```
//!
//! A dialect is a pair of a [`Framer`] and a [`Deframer`]: memferry's is in [`wire`](crate::wire). Encoder and loader know no
//! dialect, and a dialect knows neither cache nor guest memory. The choice is a type parameter of [`Encoder`](crate::encoder::Encoder)
//! and [`Receiver`](crate::receiver::Receiver), so nothing is dispatched at run time.
//!
//! A framer that writes only which pages a batch has:
//!
//! ```
//! use bytes::Bytes;
//! use memferry_stages::batch::{EncodedBatch, Mark};
//! use memferry_stages::dialect::{Framed, Framer};
//!
//! #[derive(Debug)]
//! struct MasksOnly;
//!
//! impl Framer for MasksOnly {
//!     fn batch(&mut self, _lane: u16, encoded: EncodedBatch) -> Framed {
//!         let head = Bytes::copy_from_slice(&encoded.batch.mask.to_le_bytes());
//!         Framed { head, payload: encoded.payload }
//!     }
//!
//!     fn mark(&mut self, _lane: u16, _mark: &Mark) -> Bytes {
//!         Bytes::from_static(b"mark")
//!     }
//! }
//! # use memferry_stages::{codec, encoder, geometry::PageSize, meter::Meter, pool::BufferPool, stage_id::StageId};
//! # let (size, meter) = (PageSize::DEFAULT, Meter::start(StageId::encoder(0)));
//! # let pool = BufferPool::new(1, size.extent_bytes());
//! let encoder = encoder::Encoder::new(0, size, encoder::EncoderPlan::default(), MasksOnly, pool, meter);
//! # drop(encoder);
//! ```

use std::fmt::Debug;

use bytes::Bytes;

use crate::batch::{Arrived, EncodedBatch, Mark};
use crate::error::Cause;
use crate::pool::PooledBuffer;

/// The bytes of a batch, in two parts so that its pages need not be copied.
#[derive(Debug)]
pub struct Framed {
    /// What precedes the payload; never empty.
    pub head: Bytes,
    /// The payload, if there is one.
    pub payload: Option<PooledBuffer>,
}

/// Makes the bytes of a lane's batches and marks. One for each lane, in the encoder's task.
pub trait Framer: Debug + Send {
    /// Frames a batch. Each batch gives one frame, even one of no pages: the destination acknowledges the count of frames in a
    /// lane.
    fn batch(&mut self, lane: u16, encoded: EncodedBatch) -> Framed;

    /// Frames a mark.
    fn mark(&mut self, lane: u16, mark: &Mark) -> Bytes;
}

/// What a [`Deframer`] reads.
#[derive(Debug)]
pub enum Deframed<M> {
    /// A batch, up to its payload: [`Arrived::payload_bytes`] bytes of it must be read before anything else, where they are not 0.
    Batch {
        /// The lane that carries it.
        lane: u16,
        /// The batch, whose `payload` is not set yet.
        arrived: Arrived,
        /// Bytes of its frame, payload included.
        bytes: u64,
    },
    /// A mark of a lane.
    Mark {
        /// The lane.
        lane: u16,
        /// The mark.
        mark: Mark,
    },
    /// What belongs to no lane.
    Message(M),
}

/// Reads batches, marks and messages off one connection, and checks all of them (law 8: the peer is not trusted): what it gives
/// lies in the layout, is of a lane of its connection, comes in order, and uses only encodings that were agreed on. Only the
/// payload's content is left to be checked.
pub trait Deframer: Send {
    /// What belongs to no lane.
    type Message: Send;
    /// Why nothing more can be read, with the offset.
    type Error: Into<Cause>;

    /// The next batch, mark or message, or `None` at the end of the stream. Must not be raced in a `select!`.
    fn next(&mut self) -> impl Future<Output = Result<Option<Deframed<Self::Message>>, Self::Error>> + Send;

    /// Reads the payload of the last batch into the whole of `buffer`.
    fn payload(&mut self, buffer: &mut [u8]) -> impl Future<Output = Result<(), Self::Error>> + Send;
}
