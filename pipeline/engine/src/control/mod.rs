//! Control of one end of a migration while it runs: what it is doing, what is to be different, and its end before its time.
//!
//! A [`Control`] is a handle, cheap to clone, that [`send`](crate::migration::send) or
//! [`receive`](crate::migration::receive) is given; whoever keeps a clone asks through it. The HTTP API ([`crate::api`]) is
//! one who does.
//!
//! ```text
//!  set, switch_over ──▶ requests ──▶ the source's flow: a signal among its others, acted on and answered there
//!  cancel ────────────▶ token ─────▶ both ends, before anything else
//!  status, events ◀──── an observer of the end's events
//! ```
//!
//! What is asked is answered between two things that the source waits for: at once while rounds run, and after a call of the
//! guest's own (a pause, saving its state) that is under way.
//!
//! # Example
//! ```
//! use std::sync::Arc;
//! use std::time::Duration;
//! use memferry::control::{Change, Control, Happened};
//! use memferry::events::{Event, Observers, Phase, Role};
//! use memferry::region::Region;
//! use memferry::settings::{DestinationSettings, SourceSettings};
//! use memferry::transports::{Transport, memory::MemoryTransport};
//!
//! # tokio::runtime::Runtime::new()?.block_on(async {
//! let region = Region::new(1 << 20)?;
//! region.access()?.write(0, &(0..1 << 20).map(|n: u32| (n.wrapping_mul(n) >> 7) as u8).collect::<Vec<_>>());
//! let transport = Arc::new(MemoryTransport::new(1 << 16));
//! let listener = transport.listen().await?;
//! // Far too slow: a quarter of a minute for a megabyte.
//! let settings = SourceSettings { max_bandwidth: Some(64 << 10), ..SourceSettings::default() };
//! let (control, unwatched) = (Control::new(), Observers::none);
//! let sending = region.send(transport, settings, unwatched(Role::Source), control.clone());
//! let other_end = Control::new();
//! let receiving =
//!     Region::receive(listener, 1 << 30, DestinationSettings::default(), unwatched(Role::Destination), other_end);
//! let speeding_up = async {
//!     let mut events = control.events();
//!     while let Some(happened) = events.next().await {
//!         if let Happened::Event { event, .. } = happened
//!             && *event == Event::Phase(Phase::Active)
//!         {
//!             control.set([Change::MaxBandwidth(None), Change::DowntimeLimit(Duration::from_secs(1))]).await?;
//!         }
//!     }
//!     Ok::<_, memferry::control::ControlError>(())
//! };
//! let (sent, received, sped_up) = tokio::join!(sending, receiving, speeding_up);
//! sped_up?;
//! assert_eq!(sent?.phase, Phase::Completed);
//! assert!(received.is_ok() && control.status().ended.is_some());
//! # Ok::<(), Box<dyn std::error::Error>>(()) })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod events;
mod requests;
mod status;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{broadcast, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

pub use crate::change::{Change, ChangeError, Changed};
pub(crate) use crate::change::{differences, with_all};
use events::Past;
pub use events::{Events, Happened};
pub(crate) use requests::{Ask, Request, Requests};
pub use status::Status;

use crate::controller::reason::AboveMaxDowntime;
use crate::events::{Event, Observer, Observers, Role};
use crate::settings::SourceSettings;

/// Requests that wait to be taken up.
const REQUESTS: usize = 16;
/// Events that a reader may lag behind.
const EVENTS: usize = 256;

/// Why what was asked of a migration is not done. Nothing has changed then.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ControlError {
    /// Nothing runs with this handle yet.
    #[error("the migration has not begun")]
    NotBegun,
    /// It has ended, or is about to.
    #[error("the migration is over")]
    Over,
    /// A destination takes what comes.
    #[error("this is the destination: what it takes in and when is decided at the source, so ask there")]
    WrongEnd,
    /// There is no such value.
    #[error("{key}: {why}")]
    Invalid {
        /// Of which setting.
        key: &'static str,
        /// What is wrong, and what would be right.
        why: String,
    },
    /// The switchover is forbidden by `max_downtime`.
    #[error(transparent)]
    AboveMaxDowntime(#[from] Box<AboveMaxDowntime>),
    /// It cannot be done as things are.
    #[error("{0}")]
    Refused(String),
    /// The guest is paused already, or elsewhere.
    #[error("too late: {0}")]
    TooLate(String),
}

impl From<ChangeError> for ControlError {
    fn from(error: ChangeError) -> Self {
        match error {
            ChangeError::Invalid { key, why } => Self::Invalid { key, why },
            ChangeError::Absent(what) => Self::Refused(what.into()),
        }
    }
}

/// The handle of one end of a migration: see the [module](self). Clones share it. It may serve one migration after another.
#[derive(Clone, Debug)]
pub struct Control {
    shared: Arc<Shared>,
    cancel: CancellationToken,
}

#[derive(Debug)]
struct Shared(Mutex<State>);

#[derive(Debug)]
struct State {
    status: Status,
    began: Option<Instant>,
    /// Where a source takes requests; of one that has ended it is closed.
    requests: Option<mpsc::Sender<Request>>,
    past: Past,
    events: broadcast::Sender<Happened>,
}

impl Default for Control {
    fn default() -> Self {
        Self::new()
    }
}

impl From<CancellationToken> for Control {
    /// A handle that cancels by this token, and is cancelled by whoever else does.
    fn from(cancel: CancellationToken) -> Self {
        let events = broadcast::Sender::new(EVENTS);
        let (status, past) = (Status::default(), Past::default());
        let state = State { status, began: None, requests: None, past, events };
        Self { shared: Arc::new(Shared(Mutex::new(state))), cancel }
    }
}

impl Control {
    /// The handle of an end that does not run yet.
    #[must_use]
    pub fn new() -> Self {
        CancellationToken::new().into()
    }

    /// Ends it before its time: the guest goes on at the source as it was. Takes effect at once, until the hand-over has
    /// begun; then it is too late, which the end tells as a warning. Asked before the beginning, nothing begins.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Has somebody cancelled it?
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }

    /// Switches over at once, whatever the downtime limit says: a guest that runs is paused, and what remains of the round
    /// is sent without it. Returns when it is decided.
    ///
    /// # Errors
    /// When the forecast is above `max_downtime`, or none can be made and there is one: with the figures. When it switches over
    /// already, is over, or has not sent a page yet; at a destination.
    pub async fn switch_over(&self) -> Result<(), ControlError> {
        self.ask(Ask::SwitchOver).await
    }

    /// Changes settings while it runs: all of them or, after an error, none. Each takes effect at once: a limit at the next
    /// decision, a bandwidth at the next write, a cache at each lane's next batch.
    ///
    /// # Errors
    /// When a value cannot be, does not go with the others, or needs what this migration or host has not; when it comes too
    /// late; at a destination.
    pub async fn set(&self, changes: impl IntoIterator<Item = Change>) -> Result<(), ControlError> {
        let changes = changes.into_iter().collect();
        self.ask(Ask::Set(changes)).await
    }

    /// What it is doing.
    #[must_use]
    pub fn status(&self) -> Status {
        self.shared.state().status_now()
    }

    /// What happens from here on.
    #[must_use]
    pub fn events(&self) -> Events {
        self.watch().1
    }

    /// What has happened so far, and what happens from exactly there on.
    pub fn watch(&self) -> (Vec<Happened>, Events) {
        let state = self.shared.state();
        let receiver = state.status.ended.is_none().then(|| state.events.subscribe());
        (state.past.list(), Events::new(receiver))
    }

    async fn ask(&self, ask: Ask) -> Result<(), ControlError> {
        let requests = self.shared.state().requests()?;
        let (answer, answered) = oneshot::channel();
        requests.send(Request { ask, answer }).await.map_err(|_| ControlError::Over)?;
        answered.await.unwrap_or(Err(ControlError::Over))
    }

    /// The same handle for an end that `cancel` ends too, which a cancel through this handle must reach.
    pub fn also_ended_by(&self, cancel: CancellationToken) -> Self {
        Self { shared: self.shared.clone(), cancel }
    }

    /// Ends whatever runs with this handle.
    pub fn token(&self) -> CancellationToken {
        self.cancel.clone()
    }

    /// A source begins: its events are listened to, and requests reach it from here on.
    pub(crate) fn source_begins(&self, settings: &SourceSettings, observers: &Observers) -> (Observers, Requests) {
        let (requests, taken) = mpsc::channel(REQUESTS);
        self.begins(Status::of_source(settings), Some(requests));
        (observers.and(self.shared.clone()), Requests::new(taken))
    }

    /// A destination begins.
    pub(crate) fn destination_begins(&self, observers: &Observers) -> Observers {
        self.begins(Status { role: Some(Role::Destination), ..Status::default() }, None);
        observers.and(self.shared.clone())
    }

    fn begins(&self, status: Status, requests: Option<mpsc::Sender<Request>>) {
        let mut state = self.shared.state();
        (state.status, state.requests, state.began) = (status, requests, Some(Instant::now()));
        state.past = Past::default();
    }
}

impl Shared {
    /// Plain values, whole after every step: a panic elsewhere cannot have left them half changed.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for Shared {
    fn event(&self, role: Role, event: &Event) {
        let mut state = self.state();
        state.status.note(event);
        let happened = Happened::Event { at: state.elapsed(), role, event: Arc::new(event.clone()) };
        state.past.note(happened.clone());
        // Nobody may listen.
        drop(state.events.send(happened));
    }
}

impl State {
    fn status_now(&self) -> Status {
        let elapsed = self.status.ended.as_ref().map_or_else(|| self.elapsed(), |ended| ended.total);
        Status { elapsed, ..self.status.clone() }
    }

    fn elapsed(&self) -> Duration {
        self.began.map_or(Duration::ZERO, |began| began.elapsed())
    }

    fn requests(&self) -> Result<mpsc::Sender<Request>, ControlError> {
        match (self.status.role, &self.requests) {
            (Some(Role::Destination), _) => Err(ControlError::WrongEnd),
            _ if self.status.ended.is_some() => Err(ControlError::Over),
            (_, Some(requests)) => Ok(requests.clone()),
            (_, None) => Err(ControlError::NotBegun),
        }
    }
}

#[cfg(test)]
mod tests;
