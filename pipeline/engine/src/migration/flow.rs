//! What reaches the source's controller while the stages run, in one place: every wait of the controller is a wait for
//! the next signal.

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
use super::error::{Failure, MigrationError, Silence};
use super::link::Said;
use super::senders;
use super::source_graph::SourceGraph;
use crate::control::{Request, Requests};
use crate::events::Role;

/// How often figures are taken and the deadline is looked at.
const TICK: Duration = Duration::from_millis(100);
/// How long a failed connection is given to deliver the peer's reason.
const PATIENCE: Duration = Duration::from_millis(500);

/// One thing that the controller must know.
#[derive(Debug)]
pub(super) enum Signal {
    /// The scanner reached the end of the bitmap.
    Scanned(RoundScanned),
    /// A bitmap sync is done.
    Synced(Synced),
    /// A mark went over a connection.
    Sent(Sent),
    /// The destination said something.
    Said(Message),
    /// The return path ended.
    Lost(String),
    /// The destination was silent for too long.
    Silent(Silence),
    /// A stage ended well.
    StageDone(StageId),
    /// A stage failed.
    Broke(Failure),
    /// The operator wants to stop.
    Cancel,
    /// The operator wants something else.
    Asked(Request),
    /// Time passed.
    Tick,
}

/// The running source, as its controller sees it.
pub(super) struct Flow {
    pub(super) graph: SourceGraph,
    said: Option<Said>,
    /// Where there is a return path.
    pub(super) alive: Option<Alive>,
    cancel: CancellationToken,
    cancel_told: bool,
    /// While anything can be asked.
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

    /// Waits for the next thing to happen. A cancel comes first and is told once.
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

    /// Whoever asks from here on is told that it is over.
    pub(super) fn close_requests(&mut self) {
        self.requests = None;
    }

    /// Hands a message to connection 0, ahead of queued pages.
    pub(super) async fn say(&self, message: &Message) -> Result<(), Closed> {
        self.graph.control[0].put(Control::Frame(message.encode(0))).await
    }

    /// Why a stage failed: in the destination's words if it gave any, else the first failure in truth.
    pub(super) async fn explain(&mut self, failure: Failure) -> MigrationError {
        match self.last_words(failure).await {
            Ok(Message::Refused(why)) => MigrationError::Refused { peer: Role::Destination, why },
            Ok(Message::Abort(why)) => MigrationError::GivenUp { peer: Role::Destination, why },
            Ok(other) => MigrationError::Protocol(format!("{} came out of turn", other.kind().name())),
            Err(cause) => MigrationError::Stage(cause),
        }
    }

    /// What the destination said to the end, that decides where the guest is; else the first failure in truth.
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

    /// Says the last word on every connection and ends them, within the time given.
    pub(super) async fn close(&mut self, last_word: Option<Message>, within: Duration) {
        senders::close(&mut self.graph.stages, &self.graph.control, last_word, within).await;
    }
}

/// The next item of a queue; for ever none once its stage has ended, for then the stage's end says why.
async fn item<T>(inlet: &Inlet<T>) -> T {
    match inlet.next().await {
        Some(item) => item,
        None => std::future::pending().await,
    }
}

/// What is asked next.
pub(super) async fn asked(requests: &mut Option<Requests>) -> Request {
    match requests {
        Some(requests) => requests.next().await,
        None => std::future::pending().await,
    }
}

/// What the return path says next, if there is one.
async fn heard(said: &mut Option<Said>) -> Result<Message, String> {
    match said {
        Some(said) => said.next().await,
        None => std::future::pending().await,
    }
}
