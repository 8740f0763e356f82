//! Control of one end of a migration while it runs: read its status, change its settings, or cancel it.
//!
//! A [`Control`] is a handle, cheap to clone, that is passed to [`send`](crate::migration::send) or
//! [`receive`](crate::migration::receive). Every clone can make requests. The program's HTTP API holds one.
//!
//! ```text
//!  set, switch_over ──▶ requests ──▶ the source's course: an input among its others, acted on and answered there
//!  cancel ────────────▶ token ─────▶ both ends, before anything else
//!  status, events ◀──── an observer of the end's events
//! ```
//!
//! The source answers requests between two waits: at once while rounds run, and otherwise after the current call into
//! the guest (a pause, saving its state).
//!
//! # Example
//! ```
//! use std::sync::Arc;
//! use std::time::Duration;
//! use memferry::control::{Change, Control, Happened};
//! use memferry::events::{Event, Observers, Outcome, Phase, Role};
//! use memferry::settings::{DestinationSettings, SourceSettings};
//! use memferry::transports::{Transport, memory::MemoryTransport};
//! use memferry_guests::region::Region;
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
//! assert_eq!(sent?.ended.outcome, Outcome::Completed);
//! assert!(received.is_ok() && control.status().ended.is_some());
//! # Ok::<(), Box<dyn std::error::Error>>(()) })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod events;
mod requests;
mod status;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use memferry_transports::Transport;
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

/// Requests that may be queued.
const REQUESTS: usize = 16;
/// Events that a reader may lag behind.
const EVENTS: usize = 256;

/// Why a request to a migration is refused. Nothing was changed then.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ControlError {
    /// No migration runs with this handle yet.
    #[error("the migration has not begun")]
    NotBegun,
    /// The migration has ended, or is about to.
    #[error("the migration is over")]
    Over,
    /// The handle is a destination's, which has no settings to change.
    #[error("this is the destination: what it takes in and when is decided at the source, so ask there")]
    WrongEnd,
    /// The value is not valid.
    #[error("{key}: {why}")]
    Invalid {
        /// The setting.
        key: &'static str,
        /// What is wrong, and which value is accepted.
        why: String,
    },
    /// `max_downtime` forbids the switchover.
    #[error(transparent)]
    AboveMaxDowntime(#[from] Box<AboveMaxDowntime>),
    /// It is not possible in the current state.
    #[error("{0}")]
    Refused(String),
    /// The guest is paused already, or no longer here.
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

/// The handle of one end of a migration: see the [module](self). Clones share it. It may serve several migrations, one
/// after another.
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
    /// The request queue of a source; closed once the source has ended.
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
    /// A handle that cancels through this token, and that another holder of the token can cancel.
    fn from(cancel: CancellationToken) -> Self {
        let events = broadcast::Sender::new(EVENTS);
        let (status, past) = (Status::default(), Past::default());
        let state = State { status, began: None, requests: None, past, events };
        Self { shared: Arc::new(Shared(Mutex::new(state))), cancel }
    }
}

impl Control {
    /// A handle of an end that does not run yet.
    #[must_use]
    pub fn new() -> Self {
        CancellationToken::new().into()
    }

    /// Cancels the migration: the guest continues at the source as it was. Takes effect at once, until the handover has
    /// begun; after that it is too late, and the end reports a warning. If called before the migration begins, nothing
    /// begins.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Was it cancelled?
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }

    /// Switches over at once, whatever the downtime limit is: a running guest is paused, and the rest of the round is
    /// sent while it is paused. Returns when it is decided.
    ///
    /// # Errors
    /// If the forecast is above `max_downtime`, or `max_downtime` is set and no forecast can be made; the error carries
    /// the figures. If the source is already switching over, has ended, or has not sent a page yet. At a destination.
    pub async fn switch_over(&self) -> Result<(), ControlError> {
        self.ask(Ask::SwitchOver).await
    }

    /// Switches to postcopy: what is left of the round in progress, and all that is dirty then, is sent while the guest runs at the
    /// destination. If little enough is left, the guest is switched over as in precopy instead. Returns when it is accepted.
    ///
    /// # Errors
    /// If the [mode](crate::settings::Mode) does not allow it, if the guest is paused or moved already, and at a destination.
    pub async fn postcopy(&self) -> Result<(), ControlError> {
        self.ask(Ask::Postcopy).await
    }

    /// Changes settings while it runs: all of them or, on an error, none. Each takes effect at once: a limit at the
    /// next decision, a bandwidth at the next write, a cache at each lane's next batch.
    ///
    /// # Errors
    /// If a value is invalid, conflicts with the others, or needs a feature that this migration or host does not have.
    /// If it is too late. At a destination.
    pub async fn set(&self, changes: impl IntoIterator<Item = Change>) -> Result<(), ControlError> {
        let changes = changes.into_iter().collect();
        self.ask(Ask::Set(changes)).await
    }

    /// From here on the source looks for its destination over `transport`: the destination has another address, or is reached another
    /// way. An open connection stays. While the connection is lost, the source tries the new one at once.
    ///
    /// # Errors
    /// If lost connections of this migration are not made again, if it has ended, and at a destination.
    pub async fn set_address(&self, transport: Arc<dyn Transport>) -> Result<(), ControlError> {
        if !transport.capabilities().return_path {
            return Err(ControlError::Refused("no destination answers there".into()));
        }
        self.ask(Ask::SetAddress(transport)).await
    }

    /// The current status.
    #[must_use]
    pub fn status(&self) -> Status {
        self.shared.state().status_now()
    }

    /// The events from here on.
    #[must_use]
    pub fn events(&self) -> Events {
        self.watch().1
    }

    /// The past events, and the stream of events that continues exactly after them.
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

    /// The same handle for an end that `cancel` ends too. A cancel through this handle must reach that end.
    pub fn also_ended_by(&self, cancel: CancellationToken) -> Self {
        Self { shared: self.shared.clone(), cancel }
    }

    /// Cancels the migration that runs with this handle.
    pub fn token(&self) -> CancellationToken {
        self.cancel.clone()
    }

    /// A source begins: its events are recorded, and requests reach it from here on.
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
    /// Plain values that are consistent after every step: a panic elsewhere cannot have left them half changed.
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
        // There may be no reader.
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
