//! The reading end of memferry's dialect, for one connection: see [`Deframer`] for what it promises.
//!
//! The rounds of a lane never decrease, nothing follows a lane's end, End follows the ends of all lanes of its connection, a mark was
//! agreed on, and the messages of no lane come in [order](super::order). A Heartbeat is not given.

use tokio::io::AsyncRead;

use super::encoding::is_agreed;
use super::error::WireError;
use super::frame::HEAD_BYTES;
use super::hello::Features;
use super::kind::Kind;
use super::messages::Message;
use super::order::{Order, misplaced};
use super::pages::PagesHead;
use super::reader::{FrameReader, Incoming, PagesFrame, ReadError};
use crate::batch::{Arrived, Mark};
use crate::dialect::{Deframed, Deframer};
use crate::geometry::{BulkMap, LaneMap, Layout, bits};

/// See the module.
#[derive(Debug)]
pub struct WireDeframer<R> {
    reader: FrameReader<R>,
    rules: Rules,
}

impl<R: AsyncRead + Unpin> WireDeframer<R> {
    /// The deframer of connection number `connection`, which carries its lanes of `bulk`. Its reader is behind Hello, and behind
    /// Blocks on connection 0. The stream uses these features.
    #[must_use]
    pub fn new(
        connection: u16,
        bulk: BulkMap,
        reader: FrameReader<R>,
        layout: Layout,
        lanes: LaneMap,
        features: Features,
    ) -> Self {
        let places = vec![Place { round: 1, ended: false }; usize::from(lanes.lanes())];
        let order = Order::new(&layout, &features);
        Self { reader, rules: Rules { connection, bulk, layout, lanes, features, places, order } }
    }

    /// The reader, for its position.
    #[must_use]
    pub fn reader(&self) -> &FrameReader<R> {
        &self.reader
    }
}

impl<R: AsyncRead + Unpin + Send> Deframer for WireDeframer<R> {
    type Message = Message;
    type Error = ReadError;

    async fn next(&mut self) -> Result<Option<Deframed<Message>>, ReadError> {
        while let Some(incoming) = self.reader.next().await? {
            if let Some(deframed) = self.rules.take(incoming).map_err(|error| self.reader.fail(error))? {
                return Ok(Some(deframed));
            }
        }
        Ok(None)
    }

    async fn payload(&mut self, buffer: &mut [u8]) -> Result<(), ReadError> {
        self.reader.read_payload(buffer).await
    }
}

/// What a frame must be to be taken.
#[derive(Debug)]
struct Rules {
    connection: u16,
    bulk: BulkMap,
    layout: Layout,
    lanes: LaneMap,
    features: Features,
    places: Vec<Place>,
    order: Order,
}

/// The progress of a lane.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// The lowest round that may come.
    round: u32,
    /// Whether its end has come.
    ended: bool,
}

impl Rules {
    /// What a frame brings; `None` if it only shows that the source is alive.
    fn take(&mut self, incoming: Incoming) -> Result<Option<Deframed<Message>>, WireError> {
        Ok(Some(match incoming {
            Incoming::Pages(frame) => {
                let arrived = self.pages(&frame)?;
                let bytes = HEAD_BYTES as u64 + u64::from(frame.frame_length);
                Deframed::Batch { lane: frame.lane, arrived, bytes }
            }
            Incoming::Message { message: Message::Heartbeat(_), .. } => return Ok(None),
            Incoming::Message { lane, message } => match message.into_mark() {
                Ok(mark) => {
                    self.mark(lane, mark)?;
                    Deframed::Mark { lane, mark }
                }
                Err(message) => {
                    self.order.message(&message, &self.layout)?;
                    if matches!(message, Message::End { .. }) {
                        self.check_all_ended()?;
                    }
                    Deframed::Message(message)
                }
            },
        }))
    }

    fn mark(&mut self, lane: u16, mark: Mark) -> Result<(), WireError> {
        let kind = Message::from(mark).kind();
        self.check_lane(kind, lane)?;
        if !self.features.allow(mark) {
            return Err(WireError::MarkNotAgreed { kind, lane });
        }
        match mark {
            Mark::RoundComplete(tally) => {
                self.reach(lane, tally.round)?;
                self.places[usize::from(lane)].round = tally.round.saturating_add(1);
            }
            Mark::LaneEnds => self.places[usize::from(lane)].ended = true,
            Mark::Checkpoint(_) | Mark::DirectEnds => {}
        }
        Ok(())
    }

    fn pages(&mut self, frame: &PagesFrame) -> Result<Arrived, WireError> {
        self.check_lane(Kind::Pages, frame.lane)?;
        let head = PagesHead::parse(&frame.body, frame.frame_length, &self.layout)?;
        let right = self.lanes.lane(head.at);
        if frame.lane != right {
            return Err(WireError::WrongLane { at: head.at, lane: frame.lane, right });
        }
        self.reach(frame.lane, head.round)?;
        self.check_agreed(&head)?;
        Ok(head.into_arrived(self.features.checksum, frame.offset))
    }

    /// Checks that the pages are coded as Hello allows.
    fn check_agreed(&self, head: &PagesHead) -> Result<(), WireError> {
        let mut pages = bits(head.mask & !head.zero).zip(&head.pages);
        match pages.find(|(_, (encoding, _))| !is_agreed(*encoding, &self.features)) {
            Some((bit, &(encoding, _))) => Err(WireError::NotAgreed { page: head.at.page(bit), encoding }),
            None => Ok(()),
        }
    }

    /// Checks that a frame of this kind may come in this lane, on this connection, at this point.
    fn check_lane(&self, kind: Kind, lane: u16) -> Result<(), WireError> {
        self.order.check_place(kind)?;
        if lane >= self.lanes.lanes() {
            return Err(WireError::NoLane { lane, lanes: self.lanes.lanes() });
        }
        let right = self.bulk.connection(lane);
        if right != self.connection {
            return Err(WireError::WrongConnection { lane, connection: self.connection, right });
        }
        if self.places[usize::from(lane)].ended {
            return misplaced(kind, "the lane has ended");
        }
        Ok(())
    }

    /// Checks that the rounds of a lane never decrease.
    fn reach(&mut self, lane: u16, round: u32) -> Result<(), WireError> {
        let current = self.places[usize::from(lane)].round;
        if round < current {
            return Err(WireError::WrongRound { lane, round, current });
        }
        self.places[usize::from(lane)].round = round;
        Ok(())
    }

    /// Checks that all lanes of this connection are over, as they are before the source ends its stream.
    fn check_all_ended(&self) -> Result<(), WireError> {
        let mut here = (0..).zip(&self.places).filter(|(lane, _)| self.bulk.connection(*lane) == self.connection);
        if here.all(|(_, place)| place.ended) { Ok(()) } else { misplaced(Kind::End, "a lane has not ended") }
    }
}
