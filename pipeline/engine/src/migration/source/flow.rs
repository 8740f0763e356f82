//! The signals of the source's stages and of the destination while the stages run.

use std::sync::Mutex;
use std::time::Duration;

use memferry_stages::bitmap_sync::Synced;
use memferry_stages::meter::Reading;
use memferry_stages::queue::{Closed, Inlet};
use memferry_stages::scanner::RoundScanned;
use memferry_stages::sender::{Control, Sent};
use memferry_stages::stage_id::StageId;
use memferry_stages::wire::Message;
use memferry_stages::wire::messages::Progress as Acknowledged;

use crate::controller::forecast::Work;
use crate::migration::PATIENCE;
use crate::migration::alive::{Alive, silenced};
use crate::migration::course::source::Input;
use crate::migration::error::{Failure, Loss, MigrationError, Silence};
use crate::migration::link::{ReturnPath, Urgent};
use crate::migration::senders;
use crate::migration::source_graph::SourceGraph;

/// What the stages, or the destination, report.
#[derive(Debug)]
pub(super) enum Signal {
    /// The scanner reached the end of the bitmap.
    Scanned(RoundScanned),
    /// A bitmap sync is done.
    Synced(Synced),
    /// A mark was sent over a connection.
    Sent(Sent),
    /// The destination sent a message.
    Received(Message),
    /// The return path ended.
    Lost(Loss),
    /// The destination was silent for too long.
    Silent(Silence),
    /// A stage ended without error.
    StageDone(StageId),
    /// A stage failed.
    Broke(Failure),
}

/// The running stages of a source, as its course sees them.
pub(super) struct Flow {
    pub(super) graph: SourceGraph,
    return_path: Option<ReturnPath>,
    /// Set if there is a return path.
    pub(super) alive: Option<Alive>,
    /// Until pages are served.
    pub(super) urgent: Mutex<Option<Urgent>>,
    /// How every stage had spent its time when the round began.
    round_began: Vec<Reading>,
}

impl Flow {
    pub(super) fn new(
        graph: SourceGraph,
        return_path: Option<ReturnPath>,
        alive: Option<Alive>,
        urgent: Option<Urgent>,
    ) -> Self {
        Self { graph, return_path, alive, urgent: Mutex::new(urgent), round_began: Vec::new() }
    }

    /// Waits for the next signal. Safe to race in a `select!`.
    pub(super) async fn next(&mut self) -> Signal {
        tokio::select! {
            biased;
            message = received(&mut self.return_path) => message.map_or_else(Signal::Lost, Signal::Received),
            sent = item(&self.graph.sent) => Signal::Sent(sent),
            scanned = item(&self.graph.scanned) => Signal::Scanned(scanned),
            synced = item(&self.graph.synced) => Signal::Synced(synced),
            end = self.graph.stages.next_end() => match end.result {
                Ok(()) => Signal::StageDone(end.stage),
                Err(failure) => Signal::Broke(failure),
            },
            silence = silenced(self.alive.as_ref()) => Signal::Silent(silence),
        }
    }

    /// A round is about to be scanned.
    pub(super) fn round_begins(&mut self) {
        self.round_began = self.graph.readings();
    }

    /// How long the stages have worked since the round began.
    pub(super) fn work(&self) -> Work {
        self.graph.work_since(&self.round_began)
    }

    /// The destination has loaded this.
    ///
    /// # Errors
    /// When it cannot be true.
    pub(super) fn acknowledge(&self, acknowledged: &Acknowledged) -> Result<Input, MigrationError> {
        let in_flight = &self.graph.lanes.in_flight;
        for (lane, &frames) in (0..).zip(&acknowledged.frames).take(self.graph.lanes()) {
            in_flight.acknowledge(lane, frames).map_err(|sent| {
                MigrationError::Protocol(format!("lane {lane}: {frames} frames acknowledged of {sent} sent"))
            })?;
        }
        let frames = acknowledged.frames.iter().fold(0, |sum: u64, &frames| sum.saturating_add(frames));
        Ok(Input::Acknowledged { in_flight: in_flight.pages(), frames })
    }

    /// Bytes handed to the transport so far.
    pub(super) fn wire_bytes(&self) -> u64 {
        self.graph.sender_meters.iter().map(|meter| meter.bytes()).sum()
    }

    /// Bytes of frames of pages among them.
    pub(super) fn bulk_bytes(&self) -> u64 {
        self.graph.sender_meters.iter().map(|meter| meter.bulk_bytes()).sum()
    }

    /// Pages that were sent since the destination asked for them.
    pub(super) fn urgent_pages(&self) -> u64 {
        let readings = self.graph.readings();
        readings.iter().filter(|stage| stage.stage == StageId::PAGE_SERVER).map(|stage| stage.pages).sum()
    }

    /// Queues a message on connection 0, ahead of queued pages.
    pub(super) async fn send(&self, message: &Message) -> Result<(), Closed> {
        self.graph.control[0].put(Control::Frame(message.encode(0))).await
    }

    /// The destination's message that decides where the guest is; else the first failure in order of time.
    pub(super) async fn last_message(&mut self, failure: Failure) -> Result<Message, Failure> {
        let cause = self.graph.stages.root_cause(failure).await;
        if self.return_path.is_none() {
            return Err(cause);
        }
        let last_message = async {
            loop {
                match received(&mut self.return_path).await {
                    Ok(message) if decides(&message) => break Some(message),
                    Ok(_) => {}
                    Err(_) => break None,
                }
            }
        };
        let message = tokio::time::timeout(PATIENCE, last_message).await.ok().flatten();
        message.ok_or(cause)
    }

    /// Sends the last message on every connection and ends them, within the time given.
    pub(super) async fn close(&mut self, farewell: Option<Message>, within: Duration) {
        let Self { graph, return_path, .. } = self;
        let is_answered = farewell.is_some();
        let closing = senders::close(&mut graph.stages, &graph.control, farewell, within);
        // A socket that is closed with messages unread is reset, and the destination may lose the last one to it.
        let reading = async {
            if let Some(return_path) = return_path.as_mut().filter(|_| is_answered) {
                return_path.read_to_end(within).await;
            }
        };
        tokio::join!(closing, reading);
    }
}

/// The next item of a queue. Never returns once its stage has ended: the stage's end carries the reason.
async fn item<T>(inlet: &Inlet<T>) -> T {
    match inlet.next().await {
        Some(item) => item,
        None => std::future::pending().await,
    }
}

/// The next message of the return path, if there is one.
async fn received(return_path: &mut Option<ReturnPath>) -> Result<Message, Loss> {
    match return_path {
        Some(return_path) => return_path.next().await,
        None => std::future::pending().await,
    }
}

/// Does the message decide where the guest is?
pub(super) fn decides(message: &Message) -> bool {
    matches!(message, Message::Refused(_) | Message::Abort(_) | Message::Running | Message::StartFailed(_))
}
