//! The reading end of memferry's dialect, for one connection: see [`Deframer`] for what it promises.
//!
//! The rounds of a lane never decrease, nothing follows a lane's end, End follows the end or the DirectEnds of each lane of its
//! connection, a mark was agreed on, and the messages of no lane come in [order](super::order). An urgent connection carries pages of
//! all lanes, and nothing else. A Heartbeat is not given.

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
        Self { reader, rules: Rules::new(Carries::Lanes { connection, bulk }, layout, lanes, features) }
    }

    /// The deframer of the urgent connection. Its reader is behind Hello.
    #[must_use]
    pub fn urgent(reader: FrameReader<R>, layout: Layout, lanes: LaneMap, features: Features) -> Self {
        Self { reader, rules: Rules::new(Carries::Urgent, layout, lanes, features) }
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
    carries: Carries,
    layout: Layout,
    lanes: LaneMap,
    features: Features,
    places: Vec<Place>,
    order: Order,
}

/// What a connection carries.
#[derive(Clone, Copy, Debug)]
enum Carries {
    /// Its lanes of these.
    Lanes { connection: u16, bulk: BulkMap },
    /// Urgent pages of all lanes.
    Urgent,
}

impl Carries {
    /// Whether it carries the frames of a lane, and else what is wrong.
    fn check_lane(self, lane: u16) -> Result<(), WireError> {
        match self {
            Self::Lanes { connection, bulk } if bulk.connection(lane) != connection => {
                Err(WireError::WrongConnection { lane, connection, right: bulk.connection(lane) })
            }
            Self::Lanes { .. } | Self::Urgent => Ok(()),
        }
    }

    fn check_message(self, kind: Kind) -> Result<(), WireError> {
        match self {
            Self::Lanes { .. } => Ok(()),
            Self::Urgent => misplaced(kind, "an urgent connection carries pages"),
        }
    }
}

/// The progress of a lane.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// The lowest round that may come.
    round: u32,
    /// Whether its DirectEnds has come: its other pages follow Go.
    switched: bool,
    /// Whether its end has come.
    ended: bool,
}

impl Rules {
    fn new(carries: Carries, layout: Layout, lanes: LaneMap, features: Features) -> Self {
        let places = vec![Place { round: 1, switched: false, ended: false }; usize::from(lanes.lanes())];
        let order = Order::new(&layout, &features);
        Self { carries, layout, lanes, features, places, order }
    }

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
                    self.carries.check_message(message.kind())?;
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
        self.carries.check_message(kind)?;
        self.check_lane(kind, lane)?;
        if !self.features.allow(mark) {
            return Err(WireError::MarkNotAgreed { kind, lane });
        }
        let place = &mut self.places[usize::from(lane)];
        match mark {
            Mark::RoundComplete(tally) => {
                self.reach(lane, tally.round)?;
                self.places[usize::from(lane)].round = tally.round.saturating_add(1);
            }
            Mark::LaneEnds => place.ended = true,
            Mark::DirectEnds if place.switched => return misplaced(kind, "it came twice in its lane"),
            Mark::DirectEnds => place.switched = true,
            Mark::Checkpoint(_) => {}
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
        let Some(place) = self.places.get(usize::from(lane)) else {
            return Err(WireError::NoLane { lane, lanes: self.lanes.lanes() });
        };
        self.carries.check_lane(lane)?;
        if !place.switched {
            self.order.check_place(kind)?;
        }
        if place.ended { misplaced(kind, "the lane has ended") } else { Ok(()) }
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

    /// Checks that all lanes of this connection are over, or have switched to postcopy, as they have before the source ends its stream.
    fn check_all_ended(&self) -> Result<(), WireError> {
        let mut here = (0..).zip(&self.places).filter(|(lane, _)| self.carries.check_lane(*lane).is_ok());
        let is_over = |(_, place): (u16, &Place)| place.ended || place.switched;
        if here.all(is_over) { Ok(()) } else { misplaced(Kind::End, "a lane has not ended") }
    }
}
