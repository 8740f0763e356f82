//! Receiver: reads the frames of one connection, and deals them to the lanes that travel on it.
//!
//! ```text
//!                ┌──────────┐ ── Arrived, RoundComplete, Switchover ──▶ loader of each lane (in band)
//! FrameReader ──▶│ receiver │
//!                └──────────┘ ── every other message ──▶ controller
//! ```
//!
//! It takes a [`FrameReader`] behind the first frames (Hello), and promises:
//! - A frame goes on only if it can be: of a lane of this connection, its extent of that lane, its round not below the
//!   lane's, nothing in a lane behind its Switchover, and no kind that belongs to the return path. Anything else ends it
//!   with an error that names the frame's offset.
//! - A payload goes from the transport straight into a pooled buffer. While it waits for one it holds no other.
//! - A Heartbeat goes no further.
//! - The end of the stream between two frames ends it well. Whether everything had come, others know.
//!
//! Its meter counts pages and the bytes of Pages frames.

use std::sync::Arc;

use tokio::io::AsyncRead;

use crate::batch::Item;
use crate::error::{Cause, StageError};
use crate::geometry::{LaneMap, Layout};
use crate::meter::{Meter, Wait};
use crate::pending::pending;
use crate::pool::{BufferPool, PooledBuffer};
use crate::queue::Outlet;
use crate::stage::Stage;
use crate::stage_id::StageId;
use crate::tally::RoundTally;
use crate::wire::error::WireError;
use crate::wire::frame::{HEAD_BYTES, Kind};
use crate::wire::messages::Message;
use crate::wire::pages::PagesHead;
use crate::wire::reader::{FrameReader, Incoming, PagesFrame, ReadError};

/// A Pages frame that was received and checked, but for what its payload holds.
#[derive(Debug)]
pub struct Arrived {
    /// Which pages, and how they are coded; it fits the layout, the lane and the payload.
    pub head: PagesHead,
    /// The pages' bytes; `None` if the frame has none.
    pub payload: Option<PooledBuffer>,
    /// Where the frame began, in bytes from the start of its stream.
    pub offset: u64,
}

/// The stage: see the module.
#[derive(Debug)]
pub struct Receiver<R> {
    connection: u16,
    connections: u16,
    reader: FrameReader<R>,
    layout: Layout,
    lanes: LaneMap,
    pool: BufferPool,
    places: Vec<Place>,
    stage: Stage,
}

/// How far a lane has come.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// The least round that may come.
    round: u32,
    /// Has its Switchover come?
    ended: bool,
}

impl<R: AsyncRead + Unpin + Send> Receiver<R> {
    /// The receiver of connection number `connection` of `connections`. Buffers of `pool` hold an extent.
    #[must_use]
    pub fn new(
        connection: u16,
        connections: u16,
        reader: FrameReader<R>,
        layout: Layout,
        lanes: LaneMap,
        pool: BufferPool,
        meter: Arc<Meter>,
    ) -> Self {
        let places = vec![Place { round: 1, ended: false }; usize::from(lanes.lanes())];
        let stage = Stage::new(StageId::receiver(connection), meter);
        Self { connection, connections, reader, layout, lanes, pool, places, stage }
    }

    /// Runs until the stream ends. `lanes` has an outlet at the index of each lane of this connection, and `None` for the
    /// others.
    ///
    /// # Errors
    /// When the transport fails, a frame cannot be, or a stage behind has ended.
    ///
    /// # Panics
    /// If a lane of this connection has no outlet, or a buffer of the pool is too small for an extent.
    pub async fn run(
        mut self,
        lanes: Vec<Option<Outlet<Item<Arrived>>>>,
        control: Outlet<Message>,
    ) -> Result<(), StageError> {
        let meter = &self.stage.meter;
        let lanes: Vec<_> = lanes.into_iter().map(|lane| lane.map(|outlet| outlet.metered(meter))).collect();
        let control = control.metered(meter);
        self.work(&lanes, &control).await.map_err(|cause| self.stage.fails(cause))
    }

    async fn work(&mut self, lanes: &[Option<Outlet<Item<Arrived>>>], control: &Outlet<Message>) -> Result<(), Cause> {
        let meter = self.stage.meter.clone();
        while let Some(incoming) = pending(self.reader.next(), &meter, Wait::Input).await? {
            let (lane, item) = match incoming {
                Incoming::Pages(frame) => (frame.lane, Item::Batch(self.pages(&frame).await?)),
                Incoming::Message { lane, message: Message::RoundComplete(tally) } => (lane, self.round(lane, tally)?),
                Incoming::Message { lane, message: Message::Switchover } => (lane, self.switchover(lane)?),
                // Its bytes have shown that the source is alive; it says no more.
                Incoming::Message { message: Message::Heartbeat(_), .. } => continue,
                Incoming::Message { message, .. } => {
                    self.check_direction(message.kind())?;
                    control.put(message).await?;
                    continue;
                }
            };
            let outlet = lanes[usize::from(lane)].as_ref().expect("an outlet for each lane of the connection");
            outlet.put(item).await?;
        }
        Ok(())
    }

    /// Checks a Pages frame and reads its payload.
    async fn pages(&mut self, frame: &PagesFrame) -> Result<Arrived, Cause> {
        self.check_lane(Kind::Pages, frame.lane)?;
        let head = self.reader.parse_pages(frame, &self.layout)?;
        let right = self.lanes.lane(head.at);
        if frame.lane != right {
            return Err(self.refuse(WireError::WrongLane { at: head.at, lane: frame.lane, right }));
        }
        self.reach(frame.lane, head.round)?;
        let payload = self.payload(head.payload_bytes()).await?;
        let bytes = HEAD_BYTES as u64 + u64::from(frame.frame_length);
        self.stage.meter.count(u64::from(head.mask.count_ones()), bytes);
        Ok(Arrived { head, payload, offset: frame.offset })
    }

    async fn payload(&mut self, bytes: usize) -> Result<Option<PooledBuffer>, ReadError> {
        if bytes == 0 {
            return Ok(None);
        }
        let mut buffer = self.stage.take_buffer(&self.pool).await;
        let read = self.reader.read_payload(&mut buffer.space()[..bytes]);
        pending(read, &self.stage.meter, Wait::Input).await?;
        buffer.set_filled(bytes);
        Ok(Some(buffer))
    }

    fn round(&mut self, lane: u16, tally: RoundTally) -> Result<Item<Arrived>, Cause> {
        self.check_lane(Kind::RoundComplete, lane)?;
        self.reach(lane, tally.round)?;
        self.places[usize::from(lane)].round = tally.round.saturating_add(1);
        Ok(Item::RoundComplete(tally))
    }

    fn switchover(&mut self, lane: u16) -> Result<Item<Arrived>, Cause> {
        self.check_lane(Kind::Switchover, lane)?;
        self.places[usize::from(lane)].ended = true;
        Ok(Item::Switchover)
    }

    /// May a frame of this kind come in this lane, on this connection, at this point?
    fn check_lane(&self, kind: Kind, lane: u16) -> Result<(), Cause> {
        let right = lane % self.connections;
        if lane >= self.lanes.lanes() {
            return Err(self.refuse(WireError::NoLane { lane, lanes: self.lanes.lanes() }));
        }
        if right != self.connection {
            return Err(self.refuse(WireError::WrongConnection { lane, connection: self.connection, right }));
        }
        if self.places[usize::from(lane)].ended {
            return Err(self.refuse(WireError::OutOfPlace { kind, why: "the lane has ended with its Switchover" }));
        }
        Ok(())
    }

    /// Rounds of a lane never go down.
    fn reach(&mut self, lane: u16, round: u32) -> Result<(), Cause> {
        let current = self.places[usize::from(lane)].round;
        if round < current {
            return Err(self.refuse(WireError::WrongRound { lane, round, current }));
        }
        self.places[usize::from(lane)].round = round;
        Ok(())
    }

    fn check_direction(&self, kind: Kind) -> Result<(), Cause> {
        match kind {
            Kind::Accept
            | Kind::Ready
            | Kind::Progress
            | Kind::PageHashes
            | Kind::Loaded
            | Kind::Running
            | Kind::Refused
            | Kind::StartFailed => {
                Err(self.refuse(WireError::OutOfPlace { kind, why: "it belongs to the return path" }))
            }
            _ => Ok(()),
        }
    }

    /// The error of a fault in the current frame.
    fn refuse(&self, error: WireError) -> Cause {
        Cause::Frame(self.reader.fail(error))
    }
}

#[cfg(test)]
mod tests;
