//! The destination of a migration, as the world that its [course](super::course::destination) acts on.
//!
//! | | |
//! |---|---|
//! | `world` | inputs are awaited, actions performed |
//! | `setup` | connections are gathered, and the guest is built |
//! | `answers` | the return path |
//! | `flow` | the stages, and what they report |
//! | `rates` | the rounds that have arrived, and the rates |
//! | `figures` | figures for observers |
//! | `verify` | digests are compared |
//! | `postcopy` | pages are discarded, and missing from then on |
//! | `write_back` | loaded memory is made durable |
//! | `end` | the source is notified of the outcome, and everything is closed |

mod answers;
mod end;
mod figures;
mod flow;
mod postcopy;
mod rates;
mod setup;
mod verify;
mod world;
mod write_back;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use memferry_stages::geometry::{BlockInfo, Layout, PageSize};
use memferry_stages::memory::GuestMemory;
use memferry_stages::wire::Features;
use memferry_transports::Listener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::cancel::Cancel;
use super::course::destination::DestinationCourse;
use super::destination_graph::Place;
use super::digests::LeftOut;
use super::driver::drive;
use super::error::MigrationError;
use super::outcome::{ReceiveError, Received};
use super::plane::DataPlane;
use super::session::{Door, Known, Session};
use super::state::Room;
use super::turned_away::TurnedAways;
use crate::control::Control;
use crate::events::{Ended, Observers};
use crate::guest::{DestinationGuest, GuestBuilder, GuestError, GuestState};
use crate::settings::DestinationSettings;
use answers::Answers;
use flow::Flow;
use postcopy::Switch;
use rates::Rates;
use verify::{Comparison, Verification};
use write_back::Writer;

/// Receives a guest from the first valid source that connects to `listener`: `builder` builds it for the blocks that
/// arrive. Returns the guest when it is decided that it runs here, or is paused here as it was at its source.
///
/// Other clients and broken peers are refused and reported as events; the wait continues. Nothing is started here
/// before the source has sent Go. `control` is a [`Control`], or the token that cancels it.
///
/// # Errors
/// Why no guest was received: see [`ReceiveError`].
pub fn receive<B: GuestBuilder>(
    builder: B,
    listener: Box<dyn Listener>,
    settings: DestinationSettings,
    plane: &DataPlane,
    observers: Observers,
    control: impl Into<Control>,
) -> impl Future<Output = Result<Received<B::Built>, ReceiveError>> + Send {
    let control = control.into();
    let (build, built) = erased(builder);
    // The bound `Send` is spelled out: the compiler does not always infer it for a closure that takes references.
    async move {
        settings.check()?;
        let observers = control.destination_begins(&observers);
        let course = DestinationCourse::new(settings.handover_timeout, settings.recovery);
        let destination = Destination::new(settings, plane, listener, build, observers, control.token());
        let ended = boxed(destination, course).await?;
        let guest = built.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(Received { guest: guest.expect("what was started was built"), ended })
    }
}

/// Builds the guest; called once.
type Build =
    Box<dyn FnOnce(PageSize, &[BlockInfo], &GuestState) -> Result<Arc<dyn DestinationGuest>, GuestError> + Send>;

/// Where a builder stores the guest that it has built.
type Slot<G> = Arc<Mutex<Option<Arc<G>>>>;

/// A type-erased builder, so that the phases are compiled once, and the slot for the guest that it builds.
fn erased<B: GuestBuilder>(builder: B) -> (Build, Slot<B::Built>) {
    let built = Arc::new(Mutex::new(None));
    let place = built.clone();
    let build = move |page_size: PageSize, blocks: &[BlockInfo], setup: &GuestState| {
        let guest = builder.build(page_size, blocks, setup)?;
        *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(guest.clone());
        Ok(guest as Arc<dyn DestinationGuest>)
    };
    (Box::new(build), built)
}

/// Boxed in a function that is not async, so that the migration is compiled once: the body of an async function is
/// compiled in each program that awaits it.
fn boxed(destination: Destination<'_>, course: DestinationCourse) -> BoxFuture<'_, Result<Ended, ReceiveError>> {
    Box::pin(run(destination, course))
}

async fn run(mut destination: Destination<'_>, mut course: DestinationCourse) -> Result<Ended, ReceiveError> {
    let mistake = drive(&mut course, &mut destination).await.err();
    destination.conclude(course, mistake).await
}

/// A built guest, and what is made for it once.
struct Built {
    guest: Arc<dyn DestinationGuest>,
    /// Where its pages are loaded.
    place: Place,
    /// Pages that never travel, as this end knows them.
    excluded: LeftOut,
    verification: Verification,
}

impl Built {
    fn memory(&self) -> &GuestMemory {
        &self.place.memory
    }

    /// Verifies as the stream's features have it.
    ///
    /// # Errors
    /// When the check of memory cannot start.
    fn verify(&mut self, features: Features) -> Result<(), MigrationError> {
        self.verification = Verification::start(self.memory(), features)?;
        self.place.page_hashes = self.verification.page_hashes().cloned();
        Ok(())
    }
}

/// Where sources come from.
struct Gate {
    turned_away: Arc<TurnedAways>,
    /// Until connections are gathered.
    listener: Option<Box<dyn Listener>>,
    /// Refuses other sources, once connections are gathered, and lets the own one return.
    door: Option<AbortOnDropHandle<()>>,
    /// How the source proves itself if it returns.
    known: Arc<Known>,
    /// Where a source that returned comes from, once connections are gathered.
    returning: Option<mpsc::Receiver<Session>>,
    /// The source that has returned last.
    returned: Option<Box<Session>>,
}

/// The limit for guest state, and how much of it is used.
struct StateRoom {
    /// By all of it so far.
    left: Room,
    /// By the setup part alone.
    behind_setup: Room,
}

/// See the [module](self).
struct Destination<'a> {
    settings: DestinationSettings,
    plane: &'a DataPlane,
    observers: Observers,
    cancel: Cancel,
    started: Instant,
    /// The time before the first page.
    setup: Duration,
    state_room: StateRoom,
    gate: Gate,
    /// Until the guest is built.
    build: Option<Build>,
    built: Option<Built>,
    before: Before,
    attempt: Attempt<'a>,
    comparison: Comparison,
    writer: Writer,
    /// Set where the guest may be started before all of its memory is here.
    switch: Option<Switch>,
}

/// What attempts that ended have come to.
#[derive(Default)]
struct Before {
    /// Pages frames of the latest one that were loaded, by lane.
    frames: Vec<u64>,
    /// Page bytes loaded, in all.
    loaded_bytes: u64,
    /// Bytes received from the wire, in all.
    wire_bytes: u64,
    rates: Option<Rates>,
}

/// What dies with a connection.
enum Attempt<'a> {
    None,
    /// The connections are gathered.
    Gathering(BoxFuture<'a, Result<Box<(Session, Door)>, MigrationError>>),
    Gathered(Box<Session>),
    /// The guest is described and built. The return path is here, so that a failure can be reported.
    Agreeing(BoxFuture<'a, Result<setup::Ready, MigrationError>>, Option<Answers>),
    Ready(Box<setup::Ready>, Option<Answers>),
    Running(Box<Flow>),
}

impl Attempt<'_> {
    /// The stages.
    ///
    /// # Errors
    /// If they do not run: a mistake of this end.
    fn running(&mut self) -> Result<&mut Flow, MigrationError> {
        match self {
            Self::Running(flow) => Ok(flow),
            _ => Err(MigrationError::Mistake("the stages of the destination do not run".into())),
        }
    }
}

impl<'a> Destination<'a> {
    fn new(
        settings: DestinationSettings,
        plane: &'a DataPlane,
        listener: Box<dyn Listener>,
        build: Build,
        observers: Observers,
        cancel: CancellationToken,
    ) -> Self {
        let room = Room::new(settings.max_state_bytes);
        let gate = Gate {
            turned_away: Arc::new(TurnedAways::new(observers.clone())),
            listener: Some(listener),
            door: None,
            known: Arc::default(),
            returning: None,
            returned: None,
        };
        Self {
            state_room: StateRoom { left: room, behind_setup: room },
            gate,
            settings,
            plane,
            observers,
            cancel: Cancel::new(cancel),
            started: Instant::now(),
            setup: Duration::ZERO,
            build: Some(build),
            built: None,
            before: Before::default(),
            attempt: Attempt::None,
            comparison: Comparison::None,
            writer: Writer::default(),
            switch: None,
        }
    }

    /// The layout of the guest, once it is built.
    fn layout(&self) -> Option<&Layout> {
        self.built.as_ref().map(|built| built.memory().layout())
    }
}
