//! The destination of a migration: its phases, one after another.
//!
//! ```text
//!  gather connections ─▶ accept ─▶ build the machine, Ready ─▶ load ─▶ verify ─▶ prepare, Loaded ─▶ Go ─▶ start, Running
//!          └─────────────────┴──────────────────┴────────────────┴─────────┴───────────┴──▶ any failure before Go: nothing
//!                                                                              runs here, and the source is told why
//! ```

mod answers;
mod end;
mod flow;
mod handover;
mod loading;
mod setup;

use std::sync::Arc;
use std::time::{Duration, Instant};

use memferry_stages::geometry::Layout;
use memferry_transports::Listener;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::alive::check_peer_timeout;
use super::error::{MigrationError, guarded};
use super::plane::DataPlane;
use super::state::Room;
use super::turned_away::TurnedAways;
use crate::control::Control;
use crate::events::{DowntimeParts, Ended, Event, Observers, Phase};
use crate::guest::Guest;
use crate::settings::DestinationSettings;
use answers::Answers;
use flow::Flow;

/// Receives a guest from whoever connects to `listener`, and returns when it is decided whether it runs here.
///
/// Strangers and broken peers are turned away and reported as events; the wait goes on. Nothing is started here before the
/// source has said Go. `control` is a [`Control`], or the token that cancels it.
pub async fn receive(
    guest: Arc<dyn Guest>,
    listener: Box<dyn Listener>,
    settings: DestinationSettings,
    plane: &DataPlane,
    observers: Observers,
    control: impl Into<Control>,
) -> Ended {
    let control = control.into();
    let observers = control.destination_begins(&observers);
    run(Destination::new(guest, settings, plane.handle().clone(), observers, control.token()), plane, listener).await
}

async fn run(mut destination: Destination, plane: &DataPlane, listener: Box<dyn Listener>) -> Ended {
    destination.observers.tell(&Event::Phase(Phase::Setup));
    let (mut answers, mut flow) = (None, None);
    let result = guarded(destination.migrate(plane, listener, &mut answers, &mut flow)).await;
    destination.conclude(result, answers, flow).await
}

struct Destination {
    guest: Arc<dyn Guest>,
    settings: DestinationSettings,
    plane: Handle,
    observers: Observers,
    cancel: CancellationToken,
    started: Instant,
    setup: Duration,
    layout: Option<Layout>,
    /// What guest state may take, and takes.
    state_room: Room,
    parts: DowntimeParts,
    verified: Option<bool>,
    turned_away: Arc<TurnedAways>,
    /// Was the start begun? From here on nothing can be refused.
    start_begun: bool,
}

impl Destination {
    fn new(
        guest: Arc<dyn Guest>,
        settings: DestinationSettings,
        plane: Handle,
        observers: Observers,
        cancel: CancellationToken,
    ) -> Self {
        let state_room = Room::new(settings.max_state_bytes);
        Self {
            guest,
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
        answers: &mut Option<Answers>,
        running: &mut Option<Flow>,
    ) -> Result<(), MigrationError> {
        check_peer_timeout(self.settings.peer_timeout)?;
        let cancel = self.cancel.clone();
        let setup = async {
            let mut session = self.gather(plane, listener).await?;
            self.turned_away.finish();
            *answers = session.answer.take().map(|writer| {
                let (peer, ears) = (session.peer.clone(), session.ears.clone());
                Answers::start(writer, peer, ears, self.settings.peer_timeout, &self.plane)
            });
            let (memory, out_for_good) = self.agree(&mut session, answers.as_ref()).await?;
            Ok::<_, MigrationError>((session, memory, out_for_good))
        };
        let (session, memory, out_for_good) = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(MigrationError::Cancelled),
            ready = setup => ready?,
        };
        let stored = answers.is_none();
        let flow = running.insert(self.start_stages(session, &memory, out_for_good, answers.take()));

        let arrival = self.load(flow, &memory).await?;
        let run_state = arrival.end.expect("loading ends with it").0;
        if stored {
            self.reach_end(flow).await?;
        }
        if let Some(ours) = arrival.ours {
            self.verify(flow, &memory, ours, &arrival.digests).await?;
        }
        self.prepare(arrival.device.finish()?).await?;
        if stored { self.start(run_state).await } else { self.take_over(flow).await }
    }
}
