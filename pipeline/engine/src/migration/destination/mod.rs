//! The destination of a migration: its phases, one after another.
//!
//! ```text
//!  gather connections ─▶ accept ─▶ build the machine, Ready ─▶ load ─▶ verify ─▶ prepare, Loaded ─▶ Go ─▶ start, Running
//!          └─────────────────┴──────────────────┴────────────────┴─────────┴───────────┴──▶ any failure before Go: nothing
//!                                                                              runs here, the source gets the reason
//! ```

mod answers;
mod end;
mod flow;
mod handover;
mod loading;
mod setup;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use memferry_stages::geometry::{BlockInfo, Layout, PageSize};
use memferry_stages::memory::GuestMemory;
use memferry_transports::Listener;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::digests::LeftOut;
use super::error::{MigrationError, guarded};
use super::outcome::{ReceiveError, Received};
use super::plane::DataPlane;
use super::state::Room;
use super::turned_away::TurnedAways;
use crate::control::Control;
use crate::events::{DowntimeParts, Ended, Event, Observers, Phase};
use crate::guest::{DestinationGuest, GuestBuilder, GuestError, GuestState};
use crate::settings::DestinationSettings;
use answers::Answers;
use flow::Flow;
use handover::prepare;

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
        let destination = Destination::new(settings, plane.handle().clone(), observers, control.token());
        let ended = boxed(destination, plane, listener, build).await?;
        let guest = built.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(Received { guest: guest.expect("what was started was built"), ended })
    }
}

/// Builds the guest; called once.
type Build =
    Box<dyn FnOnce(PageSize, &[BlockInfo], &GuestState) -> Result<Arc<dyn DestinationGuest>, GuestError> + Send>;

/// Where a builder stores the guest that it has built.
type Place<G> = Arc<Mutex<Option<Arc<G>>>>;

/// A type-erased builder, so that the phases are compiled once, and the slot for the guest that it builds.
fn erased<B: GuestBuilder>(builder: B) -> (Build, Place<B::Built>) {
    let built = Arc::new(Mutex::new(None));
    let place = built.clone();
    let build = move |page_size: PageSize, blocks: &[BlockInfo], setup: &GuestState| {
        let guest = builder.build(page_size, blocks, setup)?;
        *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(guest.clone());
        Ok(guest as Arc<dyn DestinationGuest>)
    };
    (Box::new(build), built)
}

/// Boxed in a function that is not async, so that the phases are compiled once: the body of an async function is compiled in each
/// program that awaits it.
fn boxed(
    destination: Destination,
    plane: &DataPlane,
    listener: Box<dyn Listener>,
    build: Build,
) -> BoxFuture<'_, Result<Ended, ReceiveError>> {
    Box::pin(run(destination, plane, listener, build))
}

async fn run(
    mut destination: Destination,
    plane: &DataPlane,
    listener: Box<dyn Listener>,
    build: Build,
) -> Result<Ended, ReceiveError> {
    destination.observers.tell(&Event::Phase(Phase::Setup));
    let (mut answers, mut flow) = (None, None);
    let result = guarded(destination.migrate(plane, listener, build, &mut answers, &mut flow)).await;
    destination.conclude(result, answers, flow).await
}

/// A built guest, and the answers that the engine got from it.
struct Built {
    guest: Arc<dyn DestinationGuest>,
    memory: GuestMemory,
    /// Pages that never travel, as this end knows them.
    out_for_good: LeftOut,
}

struct Destination {
    settings: DestinationSettings,
    plane: Handle,
    observers: Observers,
    cancel: CancellationToken,
    started: Instant,
    setup: Duration,
    layout: Option<Layout>,
    /// The limit for guest state, and how much of it is used.
    state_room: Room,
    parts: DowntimeParts,
    verified: Option<bool>,
    turned_away: Arc<TurnedAways>,
    /// Was the start begun? After that nothing can be refused.
    start_begun: bool,
}

impl Destination {
    fn new(settings: DestinationSettings, plane: Handle, observers: Observers, cancel: CancellationToken) -> Self {
        let state_room = Room::new(settings.max_state_bytes);
        Self {
            settings,
            plane,
            turned_away: Arc::new(TurnedAways::new(observers.clone())),
            observers,
            cancel,
            started: Instant::now(),
            setup: Duration::ZERO,
            layout: None,
            state_room,
            parts: DowntimeParts::default(),
            verified: None,
            start_begun: false,
        }
    }

    /// The migration as the list of its phases.
    async fn migrate(
        &mut self,
        plane: &DataPlane,
        listener: Box<dyn Listener>,
        build: Build,
        answers: &mut Option<Answers>,
        running: &mut Option<Flow>,
    ) -> Result<(), MigrationError> {
        let cancel = self.cancel.clone();
        let setup = async {
            let mut session = self.gather(plane, listener).await?;
            self.turned_away.finish();
            *answers = session.answer.take().map(|writer| {
                let (peer, ears) = (session.peer.clone(), session.ears.clone());
                Answers::start(writer, peer, ears, self.settings.peer_timeout, &self.plane)
            });
            let built = self.agree(&mut session, build, answers.as_ref()).await?;
            Ok::<_, MigrationError>((session, built))
        };
        let (session, built) = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(MigrationError::Cancelled),
            ready = setup => ready?,
        };
        let stored = answers.is_none();
        let Built { guest, memory, out_for_good } = built;
        let flow = running.insert(self.start_stages(session, &memory, out_for_good, answers.take()));

        let arrival = self.load(flow, &memory).await?;
        let run_state = arrival.end.expect("loading ends with it").0;
        if stored {
            self.reach_end(flow).await?;
        }
        if let Some(ours) = arrival.ours {
            self.verify(flow, &memory, ours, &arrival.digests).await?;
        }
        prepare(&guest, arrival.device.finish()?).await?;
        if stored { self.start(&guest, run_state).await } else { self.take_over(flow, &guest).await }
    }
}
