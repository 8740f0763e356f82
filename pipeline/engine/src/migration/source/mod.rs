//! The source of a migration: its phases, one after another.
//!
//! ```text
//!  setup: connect, agree, arm the logs, start the stages ─▶ rounds ─▶ switchover: pause, send the rest ─▶ hand over
//!     └───────────────────────────────────────────────────────┴──────────────┴──▶ any failure: the guest runs on as it
//!                                                                                 was, logs stopped, the error says why
//! ```

mod clears;
mod control;
mod end;
mod figures;
mod handover;
mod rounds;
mod setup;
mod spent;
mod switchover;

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::clears::Clears;
use memferry_stages::dirty_log::DirtyLog;
use memferry_stages::geometry::Layout;
use memferry_stages::memory::GuestMemory;
use memferry_transports::Transport;
use tokio_util::sync::CancellationToken;

use super::bounds;
use super::digests::LeftOut;
use super::error::{MigrationError, guarded};
use super::flow::Flow;
use super::handshake::Verdict;
use super::outcome::{SendError, Sent};
use super::plane::DataPlane;
use super::speed::Speed;
use super::state::Room;
use crate::bottleneck::Watch;
use crate::control::{Control, Requests};
use crate::controller::Controller;
use crate::controller::forecast::Forecast;
use crate::events::{Event, Observers, Phase};
use crate::guest::clearer::Clearer;
use crate::guest::{RunState, SourceGuest};
use crate::settings::SourceSettings;
use spent::Spent;

/// The cost of device state and handshake that the forecast assumes until they have been measured.
const HANDOVER_GUESS: Duration = Duration::from_millis(1);
/// The most that one request and its answer may count as: building a large machine is not part of a handover.
const HANDOVER_MOST: Duration = Duration::from_millis(50);

/// Moves a guest to the other end of `transport`, and returns when it is decided where the guest is.
///
/// The guest runs while its memory is sent, is paused for the switchover, and is resumed here if anything fails before
/// the destination may have started it. `control` is a [`Control`], or the token that cancels it: cancelling takes
/// effect at once, until the handover has begun.
///
/// # Errors
/// Why the guest was not sent, and where it is: see [`SendError`].
pub async fn send(
    guest: Arc<dyn SourceGuest>,
    transport: Arc<dyn Transport>,
    settings: SourceSettings,
    plane: &DataPlane,
    observers: Observers,
    control: impl Into<Control>,
) -> Result<Sent, SendError> {
    let memory = guest.memory();
    settings.check(memory.page_size().bytes() as u64)?;
    let source = Source::new(guest, memory, transport, settings, &observers, &control.into());
    boxed(source, plane).await
}

/// Boxed in a function that is not async, so that the phases are compiled once: the body of an async function is compiled in each
/// program that awaits it.
fn boxed(source: Source, plane: &DataPlane) -> BoxFuture<'_, Result<Sent, SendError>> {
    Box::pin(run(source, plane))
}

/// The result, and the reason if it is not success.
#[derive(Debug)]
enum End {
    Completed,
    Failed(MigrationError),
    Cancelled(MigrationError),
    Unconfirmed(MigrationError),
}

async fn run(mut source: Source, plane: &DataPlane) -> Result<Sent, SendError> {
    let mut flow = None;
    source.tell_phase(Phase::Setup);
    let end = match guarded(source.migrate(plane, &mut flow)).await {
        Ok(Verdict::Completed) => End::Completed,
        Ok(Verdict::Cancelled) => End::Cancelled(MigrationError::Cancelled),
        Ok(Verdict::Failed(why)) => End::Failed(why.into()),
        Ok(Verdict::Unconfirmed(why)) => End::Unconfirmed(why.into()),
        Err(error) if source.go_said => End::Unconfirmed(error),
        Err(error @ (MigrationError::Cancelled | MigrationError::GaveUp(_))) => End::Cancelled(error),
        Err(error) => End::Failed(error),
    };
    source.conclude(end, flow).await
}

struct Source {
    guest: Arc<dyn SourceGuest>,
    memory: GuestMemory,
    was: RunState,
    transport: Arc<dyn Transport>,
    settings: SourceSettings,
    observers: Observers,
    cancel: CancellationToken,
    /// Set until the stages run; then the flow has them.
    requests: Option<Requests>,
    started: Instant,
    setup: Duration,
    logs: Vec<Arc<dyn DirtyLog>>,
    bitmap: Option<Arc<DirtyBitmap>>,
    clearers: Vec<Arc<dyn Clearer>>,
    /// How many of them were notified of Setup.
    set_up: usize,
    /// Set once the logs are armed, if there can be pages that do not travel.
    clears: Option<Arc<Clears>>,
    /// The pages that the digests leave out, once the digests are computed.
    left_out: LeftOut,
    /// The limit for guest state, and how much of it is used.
    state_room: Room,
    paused: Option<Instant>,
    released: bool,
    /// May Go have left?
    go_said: bool,
    downtime: Option<Duration>,
    spent: Spent,
    controller: Controller,
    /// The forecast on which the controller decided to switch over.
    forecast: Option<Forecast>,
    /// Is the guest throttled?
    throttled: bool,
    /// Bytes on the wire.
    wire_speed: Speed,
    /// Page bytes that were read.
    page_speed: Speed,
    /// Set once the stages run.
    watch: Option<Watch>,
    /// While a round is sent: the time since which none of it was sent on the wire.
    quiet_since: Option<Instant>,
    last_bulk_bytes: u64,
    round: u32,
    pages_frames: u64,
    verified: Option<bool>,
    differing_page: Option<String>,
}

impl Source {
    fn new(
        guest: Arc<dyn SourceGuest>,
        memory: GuestMemory,
        transport: Arc<dyn Transport>,
        mut settings: SourceSettings,
        observers: &Observers,
        control: &Control,
    ) -> Self {
        let cache_bytes = bounds::cache_bytes(memory.layout(), &settings);
        settings.encoder.xbzrle.iter_mut().for_each(|xbzrle| xbzrle.cache_bytes = cache_bytes);
        let (observers, requests) = control.source_begins(&settings, observers);
        let mut controller = Controller::new(&settings, memory.page_size().bytes() as u64);
        controller.fixed().handover = HANDOVER_GUESS;
        let state_room = Room::new(settings.max_state_bytes);
        Self {
            was: guest.run_state(),
            clearers: guest.clearers(),
            controller,
            forecast: None,
            throttled: false,
            guest,
            memory,
            transport,
            settings,
            observers,
            cancel: control.token(),
            requests: Some(requests),
            started: Instant::now(),
            setup: Duration::ZERO,
            logs: Vec::new(),
            bitmap: None,
            set_up: 0,
            clears: None,
            left_out: None,
            state_room,
            paused: None,
            released: false,
            go_said: false,
            downtime: None,
            spent: Spent::default(),
            wire_speed: Speed::default(),
            page_speed: Speed::default(),
            watch: None,
            quiet_since: None,
            last_bulk_bytes: 0,
            round: 0,
            pages_frames: 0,
            verified: None,
            differing_page: None,
        }
    }

    /// The migration as the list of its phases.
    async fn migrate(&mut self, plane: &DataPlane, running: &mut Option<Flow>) -> Result<Verdict, MigrationError> {
        bounds::check_source(self.bound(), self.layout(), &self.settings)?;
        let link = self.reach(plane).await?;
        // A cancel waits for this: a log that is being started cannot be interrupted.
        let (bitmap, untouched) = match self.make_ready().await {
            Ok(ready) => ready,
            Err(error) => {
                self.take_leave(link, &error).await;
                return Err(error);
            }
        };
        let flow = running.insert(self.start_stages(link, bitmap, untouched));
        self.rounds(flow).await?;
        self.send_the_rest(flow).await?;
        if self.transport.capabilities().return_path {
            self.hand_over(flow).await
        } else {
            self.complete_file(flow).await
        }
    }

    /// The most memory that the source takes for itself, without the dirty logs.
    fn bound(&self) -> u64 {
        bounds::source_bound(self.layout(), &self.settings, self.may_leave_out())
    }

    fn layout(&self) -> &Layout {
        self.memory.layout()
    }

    fn tell_phase(&self, phase: Phase) {
        self.observers.tell(&Event::Phase(phase));
    }
}

fn wire_bytes(flow: &Flow) -> u64 {
    flow.graph.sender_meters.iter().map(|meter| meter.bytes()).sum()
}
