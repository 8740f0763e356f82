//! The signals that reach the source's controller while the stages run. Every wait of the controller is a wait for the
//! next signal.

use std::time::Duration;

use memferry_stages::bitmap_sync::Synced;
use memferry_stages::queue::{Closed, Inlet};
use memferry_stages::scanner::RoundScanned;
use memferry_stages::sender::{Control, Sent};
use memferry_stages::stage_id::StageId;
use memferry_stages::wire::Message;
use tokio::time::{Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::alive::{Alive, silenced};
use super::error::{Failure, Loss, MigrationError, Silence};
use super::link::Said;
use super::senders;
use super::source_graph::SourceGraph;
use crate::control::{Request, Requests};
use crate::events::Role;

/// How often figures are taken and the deadline is checked.
const TICK: Duration = Duration::from_millis(100);
/// How long the engine waits for the peer's reason after a connection has failed.
const PATIENCE: Duration = Duration::from_millis(500);

/// An event for the controller.
#[derive(Debug)]
pub(super) enum Signal {
    /// The scanner reached the end of the bitmap.
    Scanned(RoundScanned),
    /// A bitmap sync is done.
    Synced(Synced),
    /// A mark was sent over a connection.
    Sent(Sent),
    /// The destination sent a message.
    Said(Message),
    /// The return path ended.
    Lost(Loss),
    /// The destination was silent for too long.
    Silent(Silence),
    /// A stage ended without error.
    StageDone(StageId),
    /// A stage failed.
    Broke(Failure),
    /// The operator cancelled.
    Cancel,
    /// The operator sent a request.
    Asked(Request),
    /// The tick interval has passed.
    Tick,
}

/// The running source, as its controller sees it.
pub(super) struct Flow {
    pub(super) graph: SourceGraph,
    said: Option<Said>,
    /// Set if there is a return path.
    pub(super) alive: Option<Alive>,
    cancel: CancellationToken,
    cancel_told: bool,
    /// The request queue, while requests are accepted.
    requests: Option<Requests>,
    ticks: Interval,
}

impl Flow {
    pub(super) fn new(
        graph: SourceGraph,
        said: Option<Said>,
        alive: Option<Alive>,
        cancel: CancellationToken,
        requests: Option<Requests>,
    ) -> Self {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { graph, said, alive, cancel, cancel_told: false, requests, ticks }
    }

    /// Waits for the next event. A cancel comes first and is reported once.
    pub(super) async fn next(&mut self) -> Signal {
        let cancel_told = self.cancel_told;
        tokio::select! {
            biased;
            () = self.cancel.cancelled(), if !cancel_told => {
                self.cancel_told = true;
                Signal::Cancel
            }
            said = heard(&mut self.said) => said.map_or_else(Signal::Lost, Signal::Said),
            sent = item(&self.graph.sent) => Signal::Sent(sent),
            scanned = item(&self.graph.scanned) => Signal::Scanned(scanned),
            synced = item(&self.graph.synced) => Signal::Synced(synced),
            request = asked(&mut self.requests) => Signal::Asked(request),
            end = self.graph.stages.next_end() => match end.result {
                Ok(()) => Signal::StageDone(end.stage),
                Err(failure) => Signal::Broke(failure),
            },
            silence = silenced(self.alive.as_ref()) => Signal::Silent(silence),
            _ = self.ticks.tick() => Signal::Tick,
        }
    }

    /// From here on, requests are answered with an error: the migration is over.
    pub(super) fn close_requests(&mut self) {
        self.requests = None;
    }

    /// Queues a message on connection 0, ahead of queued pages.
    pub(super) async fn say(&self, message: &Message) -> Result<(), Closed> {
        self.graph.control[0].put(Control::Frame(message.encode(0))).await
    }

    /// Why a stage failed: the destination's reason if it gave one, else the first failure in order of time.
    pub(super) async fn explain(&mut self, failure: Failure) -> MigrationError {
        match self.last_words(failure).await {
            Ok(Message::Refused(why)) => MigrationError::Refused { peer: Role::Destination, why },
            Ok(Message::Abort(why)) => MigrationError::GivenUp { peer: Role::Destination, why },
            Ok(other) => MigrationError::Protocol(format!("{} came out of turn", other.kind().name())),
            Err(cause) => MigrationError::Stage(cause),
        }
    }

    /// The destination's message that decides where the guest is; else the first failure in order of time.
    pub(super) async fn last_words(&mut self, failure: Failure) -> Result<Message, Failure> {
        let cause = self.graph.stages.root_cause(failure).await;
        if self.said.is_none() {
            return Err(cause);
        }
        let last_words = async {
            loop {
                match heard(&mut self.said).await {
                    Ok(
                        words @ (Message::Refused(_) | Message::Abort(_) | Message::Running | Message::StartFailed(_)),
                    ) => break Some(words),
                    Ok(_) => {}
                    Err(_) => break None,
                }
            }
        };
        let said = tokio::time::timeout(PATIENCE, last_words).await.ok().flatten();
        said.ok_or(cause)
    }

    /// Sends the last message on every connection and ends them, within the time given.
    pub(super) async fn close(&mut self, last_word: Option<Message>, within: Duration) {
        senders::close(&mut self.graph.stages, &self.graph.control, last_word, within).await;
    }
}

/// The next item of a queue. Never returns once its stage has ended: the stage's end carries the reason.
async fn item<T>(inlet: &Inlet<T>) -> T {
    match inlet.next().await {
        Some(item) => item,
        None => std::future::pending().await,
    }
}

/// The next request.
pub(super) async fn asked(requests: &mut Option<Requests>) -> Request {
    match requests {
        Some(requests) => requests.next().await,
        None => std::future::pending().await,
    }
}

/// The next message of the return path, if there is one.
async fn heard(said: &mut Option<Said>) -> Result<Message, Loss> {
    match said {
        Some(said) => said.next().await,
        None => std::future::pending().await,
    }
}
