//! The running destination, as its controller sees it: the stages joined, and the next event for the controller.

use std::sync::atomic::Ordering;
use std::time::Instant;

use memferry_stages::loader::Loaded;
use memferry_stages::sender::Control;
use memferry_stages::stage_id::StageId;
use memferry_stages::wire::Message;
use memferry_stages::wire::messages::Progress as Acknowledged;
use tokio::time::Interval;
use tokio_util::sync::CancellationToken;

use super::answers::{figures, finish};
use crate::bottleneck::Watch;
use crate::migration::FAREWELL;
use crate::migration::alive::{Alive, silenced};
use crate::migration::destination_graph::DestinationGraph;
use crate::migration::digests::LeftOut;
use crate::migration::error::{Loss, MigrationError};
use crate::migration::speed::Speed;

/// The running destination, as its controller sees it.
pub(super) struct Flow {
    /// Set if there is a return path.
    pub(super) alive: Option<Alive>,
    pub(super) graph: DestinationGraph,
    pub(super) cancel: CancellationToken,
    pub(super) ticks: Interval,
    /// Receivers and loaders that have not ended.
    pub(super) stages_left: usize,
    /// Bytes received from the wire.
    pub(super) wire_speed: Speed,
    /// Page bytes that are loaded.
    pub(super) page_speed: Speed,
    pub(super) watch: Watch,
    pub(super) tick: u32,
    pub(super) round: u32,
    pub(super) round_began: Instant,
    /// Does the stream carry digests?
    pub(super) verify: bool,
    /// May the digests leave pages out?
    pub(super) may_leave_out: bool,
    /// Pages that never travel, as this end knows them.
    pub(super) out_for_good: LeftOut,
}

/// An event for the controller.
pub(super) enum Signal {
    Said(Message),
    Loaded(Loaded),
    /// Every connection has ended at a frame boundary, and everything received is loaded.
    StreamEnded,
    Tick,
}

impl Flow {
    /// Waits for the next event. A cancel comes first.
    pub(super) async fn next(&mut self) -> Result<Signal, MigrationError> {
        loop {
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Err(MigrationError::Cancelled),
                Some(message) = self.graph.said.next() => return Ok(Signal::Said(message)),
                Some(loaded) = self.graph.loaded.next() => return Ok(Signal::Loaded(loaded)),
                end = self.graph.stages.next_end() => {
                    end.result?;
                    self.stages_left -= usize::from(end.stage != StageId::ANSWERS);
                    if self.stages_left == 0 {
                        return Ok(Signal::StreamEnded);
                    }
                }
                silence = silenced(self.alive.as_ref()) => return Err(MigrationError::Silent(silence)),
                _ = self.ticks.tick() => return Ok(Signal::Tick),
            }
        }
    }

    /// Hands an answer to the return path, if there is one.
    pub(super) async fn say(&self, message: &Message) -> Result<(), MigrationError> {
        let Some(answer) = &self.graph.answer else { return Ok(()) };
        let said = answer.put(Control::Frame(message.encode(0))).await;
        said.map_err(|_| MigrationError::Lost(Loss::ReturnPathClosed))
    }

    /// Reports to the source what is loaded.
    pub(super) fn acknowledge(&self) -> Result<(), MigrationError> {
        let progress = &self.graph.progress;
        let frames: Vec<u64> = progress.iter().map(|lane| lane.frames.load(Ordering::Acquire)).collect();
        let bytes = self.loaded_bytes();
        let Some(answer) = &self.graph.answer else { return Ok(()) };
        // If the previous figures are still queued, these are dropped: later figures replace them.
        let offered = answer.offer(Control::Frame(Message::Progress(Acknowledged { bytes, frames }).encode(0)));
        offered.map_err(|_| MigrationError::Lost(Loss::ReturnPathClosed))
    }

    /// Sends the last message and ends the connections, within [`FAREWELL`].
    pub(super) async fn close(mut self, last_word: Option<Message>) {
        let closing = async {
            if let Some(message) = last_word {
                self.say(&message).await?;
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

    /// Sends the source this end's figures at once, without waiting for the next heartbeat.
    pub(super) fn report(&self) -> Result<(), MigrationError> {
        let Some(answer) = &self.graph.answer else { return Ok(()) };
        let figures = Message::Heartbeat(figures(&self.graph.receiver_meters));
        let offered = answer.offer(Control::Frame(figures.encode(0)));
        offered.map_err(|_| MigrationError::Lost(Loss::ReturnPathClosed))
    }

    /// Page bytes that are loaded.
    pub(super) fn loaded_bytes(&self) -> u64 {
        self.graph.progress.iter().map(|lane| lane.bytes.load(Ordering::Acquire)).sum()
    }

    /// Bytes received from the wire.
    pub(super) fn wire_bytes(&self) -> u64 {
        self.graph.receiver_meters.iter().map(|meter| meter.bytes()).sum()
    }
}

pub(super) fn ended_early() -> MigrationError {
    MigrationError::Lost(Loss::Incomplete)
}
