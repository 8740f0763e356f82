//! The running stages of a destination: what they report, and what has arrived besides the pages.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use memferry_stages::geometry::Layout;
use memferry_stages::loader::Loaded;
use memferry_stages::missing::MissingMemory;
use memferry_stages::sender::Control;
use memferry_stages::stage_id::{StageId, StageKind};
use memferry_stages::untrusted::Untrusted;
use memferry_stages::wire::Message;
use memferry_stages::wire::hello::Features;
use memferry_stages::wire::messages::{Progress as Acknowledged, StatePhase};
use tokio::time::Interval;

use super::answers::{figures, finish, send_answer};
use super::rates::Rates;
use crate::controller::forecast::WriteBack;
use crate::events::Role;
use crate::migration::alive::{Alive, silenced};
use crate::migration::course::destination::ended_early;
use crate::migration::course::times::write_back_figures;
use crate::migration::destination_graph::{DestinationGraph, Stream};
use crate::migration::digests::Digests;
use crate::migration::error::{Failure, Loss, MigrationError, Silence};
use crate::migration::session::Urgent;
use crate::migration::state::{Assembly, Room};
use crate::migration::{FAREWELL, PATIENCE};

/// See the [module](self).
pub(super) struct Flow {
    /// Set if there is a return path.
    pub(super) alive: Option<Alive>,
    pub(super) graph: DestinationGraph,
    pub(super) arrived: Arrived,
    pub(super) ticks: Interval,
    /// Receivers and loaders that have not ended.
    pub(super) stages_left: usize,
    pub(super) rates: Rates,
    /// Page bytes loaded, and bytes received from the wire, in the attempts before.
    pub(super) loaded_before: u64,
    pub(super) wire_before: u64,
    pub(super) stream: Stream,
    /// Until pages are asked for.
    pub(super) urgent: Mutex<Option<Urgent>>,
    /// Signals that came while something else was waited for.
    pub(super) later: VecDeque<Signal>,
}

/// Messages that arrive besides the pages.
pub(super) struct Arrived {
    /// The device state, until the guest is prepared.
    pub(super) device: Option<Assembly>,
    pub(super) digests: Digests,
    /// May the digests leave pages out?
    pub(super) may_leave_out: bool,
}

impl Arrived {
    pub(super) fn new(layout: &Layout, room: Room, features: Features) -> Self {
        Self {
            device: Some(Assembly::new(StatePhase::Device, room)),
            digests: Digests::none(layout, features.left_out),
            may_leave_out: features.left_out,
        }
    }

    /// The digests that have arrived; none are left.
    pub(super) fn take_digests(&mut self, layout: &Layout) -> Digests {
        std::mem::replace(&mut self.digests, Digests::none(layout, false))
    }
}

/// What the stages, or the source, report.
pub(super) enum Signal {
    Received(Message),
    Loaded(Loaded),
    /// This connection has ended at a frame boundary, and others have not. Where there is a return path, a source closes all of them, and
    /// only when it is over.
    ConnectionEnded(StageId),
    /// Every connection has ended at a frame boundary, and everything received is loaded.
    StreamEnded,
    /// No page is missing.
    Filled,
    /// A stage failed.
    Broke(Failure),
    /// The source was silent for too long.
    Silent(Silence),
    Tick,
}

impl Flow {
    /// Waits for the next signal. Safe to race in a `select!`.
    pub(super) async fn next(&mut self) -> Signal {
        match self.later.pop_front() {
            Some(signal) => signal,
            None => self.arriving().await,
        }
    }

    /// Waits for a signal that was not there before. Safe to race in a `select!`.
    async fn arriving(&mut self) -> Signal {
        loop {
            tokio::select! {
                biased;
                Some(message) = self.graph.messages.next() => return Signal::Received(message),
                Some(loaded) = self.graph.loaded.next() => return Signal::Loaded(loaded),
                end = self.graph.stages.next_end() => {
                    if let Err(failure) = end.result {
                        return Signal::Broke(failure);
                    }
                    self.stages_left -= usize::from(end.stage != StageId::ANSWERS);
                    if end.stage == StageId::PAGE_REQUESTER {
                        return Signal::Filled;
                    }
                    if self.stages_left == 0 {
                        return Signal::StreamEnded;
                    }
                    if end.stage.kind == StageKind::Receiver && self.alive.is_some() {
                        return Signal::ConnectionEnded(end.stage);
                    }
                }
                silence = silenced(self.alive.as_ref()) => return Signal::Silent(silence),
                _ = self.ticks.tick() => return Signal::Tick,
            }
        }
    }

    /// Waits until the connection is lost, or an end gives up, while pages of `missing` may be waited for. All signals are kept for later.
    /// Safe to race in a `select!`.
    pub(super) async fn lost(&mut self, missing: &MissingMemory) {
        // Once every page is there the source serves none any more.
        let is_served = |receiver, urgent| receiver == urgent && missing.left() == 0;
        loop {
            let signal = self.arriving().await;
            let is_over = match signal {
                Signal::Tick => continue,
                Signal::ConnectionEnded(receiver) => !is_served(receiver, StageId::receiver(self.stream.bulk)),
                Signal::Broke(_) | Signal::StreamEnded | Signal::Silent(_) | Signal::Received(Message::Abort(_)) => {
                    true
                }
                Signal::Received(_) | Signal::Loaded(_) | Signal::Filled => false,
            };
            self.later.push_back(signal);
            if is_over {
                return;
            }
        }
    }

    /// Why a stage failed: what the source says, if its connection was lost; else the first failure in order of time.
    pub(super) async fn explain(&mut self, failure: Failure) -> MigrationError {
        let cause = self.graph.stages.root_cause(failure).await;
        if cause.is_lost_connection() {
            // A source that gives up says so on connection 0, and closes the others at the same time.
            if let Ok(Some(why)) = tokio::time::timeout(PATIENCE, self.given_up()).await {
                return MigrationError::GivenUp { peer: Role::Source, why };
            }
        }
        match cause {
            Failure::Ended(_) => ended_early(),
            cause => MigrationError::Stage(cause),
        }
    }

    /// The source's reason to give up. `None` if it says none.
    async fn given_up(&mut self) -> Option<Untrusted> {
        loop {
            if let Message::Abort(why) = self.graph.messages.next().await? {
                return Some(why);
            }
        }
    }

    /// Hands an answer to the return path, if there is one.
    pub(super) async fn send(&self, message: &Message) -> Result<(), MigrationError> {
        send_answer(self.graph.answer.as_ref(), message).await
    }

    /// Reports to the source what is loaded.
    pub(super) fn acknowledge(&self) -> Result<(), MigrationError> {
        let frames = self.loaded_by_lane();
        // If the previous figures are still queued, these are dropped: later figures replace them.
        self.offer(&Message::Progress(Acknowledged { bytes: self.loaded_bytes(), frames }))
    }

    /// Sends the source this end's figures at once, without waiting for the next heartbeat, and what is loaded.
    pub(super) fn report(&self, write_back: &WriteBack) -> Result<(), MigrationError> {
        let mut figures = figures(&self.graph.receiver_meters);
        figures.extend(write_back_figures(write_back));
        self.offer(&Message::Heartbeat(figures))?;
        self.acknowledge()
    }

    fn offer(&self, message: &Message) -> Result<(), MigrationError> {
        let Some(answer) = &self.graph.answer else { return Ok(()) };
        let offered = answer.offer(Control::Frame(message.encode(0)));
        offered.map(drop).map_err(|_| MigrationError::Lost(Loss::ReturnPathClosed))
    }

    /// Sends the last message and ends the connections, within [`FAREWELL`].
    pub(super) async fn close(mut self, farewell: Option<Message>) {
        let closing = async {
            if let Some(message) = farewell {
                self.send(&message).await?;
            }
            if let Some(answer) = self.graph.answer.take() {
                finish(&answer, &mut self.graph.stages).await;
            }
            Ok::<(), MigrationError>(())
        };
        // A source that is gone or does not read needs no last message.
        drop(tokio::time::timeout(FAREWELL, closing).await);
        self.graph.stages.end().await;
    }

    /// Page bytes that are loaded.
    pub(super) fn loaded_bytes(&self) -> u64 {
        let loaded: u64 = self.graph.progress.iter().map(|lane| lane.bytes.load(Ordering::Acquire)).sum();
        self.loaded_before + loaded
    }

    /// Frames of pages that are loaded, by lane.
    fn loaded_by_lane(&self) -> Vec<u64> {
        self.graph.progress.iter().map(|lane| lane.frames.load(Ordering::Acquire)).collect()
    }

    /// Reads no more, loads what has arrived, and ends the stages. Returns the frames that are loaded, by lane: from here on nothing of
    /// this attempt changes memory.
    pub(super) async fn end(&mut self) -> Vec<u64> {
        let Self { graph, .. } = self;
        let DestinationGraph { stages, loaded, messages, .. } = graph;
        stages.abort(StageKind::Receiver);
        // The marks and messages that are left have no effect any more, but hold up the stages that send them.
        let drained = async {
            let marks = async { while loaded.next().await.is_some() {} };
            let rest = async { while messages.next().await.is_some() {} };
            tokio::join!(marks, rest);
        };
        tokio::select! {
            () = drained => {}
            () = stages.all_ended(StageKind::Loader) => {}
        }
        stages.end().await;
        self.loaded_by_lane()
    }

    /// Frames of pages that are loaded.
    pub(super) fn loaded_frames(&self) -> u64 {
        self.graph.progress.iter().map(|lane| lane.frames.load(Ordering::Acquire)).sum()
    }

    /// Bytes received from the wire.
    pub(super) fn wire_bytes(&self) -> u64 {
        self.wire_before + self.graph.receiver_meters.iter().map(|meter| meter.bytes()).sum::<u64>()
    }
}
