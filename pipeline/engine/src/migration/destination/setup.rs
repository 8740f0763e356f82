//! Setup: connections are gathered, the stream is accepted, the machine is built, and the stages start.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::geometry::{BlockInfo, Layout, PageSize};
use memferry_stages::queue::Outlet;
use memferry_stages::sender::Control;
use memferry_stages::wire::messages::{Resume, StatePhase};
use memferry_stages::wire::reader::{Incoming, ReadError};
use memferry_stages::wire::{Features, Message, Preface, Secret, bitmap_parts};
use memferry_transports::Listener;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::answers::{Answers, figures, send_answer};
use super::flow::{Arrived, Flow};
use super::postcopy::Switch;
use super::rates::Rates;
use super::verify::Verification;
use super::{Attempt, Build, Built, Destination};
use crate::events::{Event, Observers, Role};
use crate::guest::{GuestError, GuestState};
use crate::migration::course::destination::ended_early;
use crate::migration::course::times::build_message;
use crate::migration::destination_graph::{DestinationGraph, Place, Sinks, Stream};
use crate::migration::error::MigrationError;
use crate::migration::excluded::excluded_ranges;
use crate::migration::session::{Door, Known, Session};
use crate::migration::stage_set::StageSet;
use crate::migration::state::{Assembly, Room};
use crate::migration::{block_facts, blocking, bounds, built_otherwise, ticks};
use crate::settings::DestinationSettings;
use crate::values::whole_ms;

/// How often the source is notified of what is loaded.
const TICK: Duration = Duration::from_millis(20);

/// A destination that is ready for pages.
pub(super) struct Ready {
    pub(super) session: Session,
    /// What was made for the first attempt.
    pub(super) made: Option<Built>,
    /// What guest state may still take.
    pub(super) room: Room,
}

/// A source that returned, and what is sent to it.
struct Return {
    session: Session,
    answers: Option<Outlet<Control>>,
    resume: Resume,
    received: Option<Arc<DirtyBitmap>>,
    room: Room,
}

/// The values needed to accept a stream, separate from the destination, which waits for other things meanwhile.
struct Acceptance {
    session: Session,
    build: Build,
    settings: DestinationSettings,
    observers: Observers,
    known: Arc<Known>,
    room: Room,
    answers: Option<Outlet<Control>>,
}

impl<'a> Destination<'a> {
    /// Begins to gather connections.
    pub(super) fn gather(
        &self,
        listener: Box<dyn Listener>,
    ) -> BoxFuture<'a, Result<Box<(Session, Door)>, MigrationError>> {
        let door = Door::open(listener, self.settings.clone(), self.gate.turned_away.clone(), self.gate.known.clone());
        Box::pin(self.plane.run(door.gather()))
    }

    /// The connections have arrived: a source that connects from here on is refused: this destination is busy. The one that is received
    /// may return. A file has no second reader.
    pub(super) fn gathered(&mut self, session: Session, door: Door) {
        if session.answer.is_some() {
            let (returned, returning) = mpsc::channel(1);
            self.gate.returning = Some(returning);
            self.gate.door = Some(AbortOnDropHandle::new(self.plane.handle().spawn(door.await_return(returned))));
        }
        self.attempt = Attempt::Gathered(Box::new(session));
    }

    /// The connections have arrived: starts the return path, and begins to accept.
    pub(super) fn agree(&mut self, mut session: Session, build: Build) {
        self.gate.turned_away.finish();
        self.observers.notify(&Event::Connected { peer: session.peer.clone() });
        let answers = self.answers(&mut session);
        let acceptance = Acceptance {
            session,
            build,
            settings: self.settings.clone(),
            observers: self.observers.clone(),
            known: self.gate.known.clone(),
            room: self.state_room.left,
            answers: answers.as_ref().map(|answers| answers.outlet.clone()),
        };
        self.attempt = Attempt::Agreeing(Box::pin(acceptance.make()), answers);
    }

    /// Starts the return path of a session.
    fn answers(&self, session: &mut Session) -> Option<Answers> {
        let (peer, ears) = (session.peer.clone(), session.ears.clone());
        let writer = session.answer.take()?;
        Some(Answers::start(writer, peer, ears, self.settings.peer_timeout, self.plane.handle()))
    }

    /// The source has returned: starts the return path, and begins to report what is loaded.
    pub(super) fn rejoin(&mut self, mut session: Session, started: bool) {
        self.observers.notify(&Event::Connected { peer: session.peer.clone() });
        let answers = self.answers(&mut session);
        // The state of a switchover that did not happen takes no room.
        self.state_room.left = self.state_room.behind_setup;
        let rejoining = Return {
            session,
            answers: answers.as_ref().map(|answers| answers.outlet.clone()),
            resume: Resume { started, frames: self.before.frames.clone() },
            received: self.here(),
            room: self.state_room.left,
        };
        self.attempt = Attempt::Agreeing(Box::pin(rejoining.make()), answers);
    }

    /// The pages that the source need not send again, unless they are dirty.
    fn here(&self) -> Option<Arc<DirtyBitmap>> {
        let of_running = self.switch.as_ref().and_then(Switch::here);
        of_running.or_else(|| self.built.as_ref().map(|built| built.place.received.clone()))
    }

    pub(super) fn start_stages(&mut self, ready: Ready, answers: Option<Answers>) -> Result<(), MigrationError> {
        let Ready { session: Session { hello, features, readers, urgent, .. }, made, .. } = ready;
        if let Some(built) = made {
            self.built = Some(built);
            self.setup = self.started.elapsed();
            self.state_room.behind_setup = self.state_room.left;
        } else if let Some(Built { place, verification, .. }) = self.built.as_mut().filter(|_| self.switch.is_none()) {
            verification.go_on(&place.memory)?;
        }
        let sinks = self.sinks(features);
        let place = &self.built.as_ref().expect("the guest is built").place;
        let stages_left = readers.len() + usize::from(hello.lanes);
        let (stages, answer, mut alive) = match answers {
            Some(Answers { stages, outlet, alive }) => (stages, Some(outlet), Some(alive)),
            None => (StageSet::new(self.plane.handle()), None, None),
        };
        let graph = DestinationGraph::start(&hello, features, readers, stages, answer, place, &sinks);
        if let (Some(alive), Some(answer)) = (&mut alive, &graph.answer) {
            let meters = graph.receiver_meters.clone();
            alive.report(answer.clone(), move || figures(&meters));
        }
        self.attempt = Attempt::Running(Box::new(Flow {
            alive,
            arrived: Arrived::new(place.memory.layout(), self.state_room.left, features),
            graph,
            ticks: ticks(TICK),
            stages_left,
            rates: Rates::begin(self.before.rates.take()),
            loaded_before: self.before.loaded_bytes,
            wire_before: self.before.wire_bytes,
            stream: Stream { lanes: hello.lanes, bulk: hello.bulk, features },
            urgent: Mutex::new(urgent),
            later: VecDeque::new(),
        }));
        if matches!(sinks, Sinks::Place(_)) {
            self.start_urgent()?;
        }
        Ok(())
    }

    /// How the lanes write: where the guest runs already, only what is missing.
    fn sinks(&mut self, features: Features) -> Sinks {
        if let Some(missing) = self.switch.as_ref().and_then(|switch| switch.missing.clone()) {
            return Sinks::Place(missing);
        }
        let layout = self.built.as_ref().map(|built| built.memory().layout().clone());
        let Some(layout) = layout.filter(|_| features.postcopy) else { return Sinks::Direct };
        let switch = Switch::new(&layout);
        let switched = switch.switched.clone();
        self.switch = Some(switch);
        Sinks::Hybrid(switched)
    }
}

impl Acceptance {
    /// Accepts the stream, reads the guest's description and builds the machine for it.
    async fn make(mut self) -> Result<Ready, MigrationError> {
        let recovery = self.settings.recovery;
        let waits_ms = if recovery.attempts > 0 { whole_ms(recovery.give_up) } else { 0 };
        send_answer(self.answers.as_ref(), &Message::Accept { waits_ms }).await?;
        let reading = read_setup(&mut self.session, &mut self.room);
        let described = tokio::time::timeout(self.settings.handover_timeout, reading).await;
        let Described { blocks, setup, returns } = described
            .map_err(|_| MigrationError::TimedOut("the source did not describe its guest in time".into()))??;
        let (page_size, lanes) = (self.session.hello.page_size, self.session.hello.lanes);
        let bound = |layout: &Layout| bounds::destination_bound(layout, lanes, self.settings.max_state_bytes);
        bounds::check_host(bound(&Layout::new(page_size, blocks.clone())?))?;
        let began = Instant::now();
        let build = self.build;
        let mut built = blocking(move || built(build, page_size, &blocks, &setup)).await?;
        let layout = built.memory().layout();
        self.observers.notify(&Event::Guest {
            blocks: block_facts(layout),
            pages: layout.pages(),
            memory_bound: bound(layout),
        });
        if self.session.features.postcopy {
            super::postcopy::check(&*built.guest, built.memory())?;
        }
        send_answer(self.answers.as_ref(), &build_message(began.elapsed())).await?;
        built.verify(self.session.features)?;
        if let Some((secret, awaited)) = returns.filter(|_| recovery.attempts > 0) {
            self.known.learn(&self.session.hello, self.session.identity, secret, awaited);
        }
        send_answer(self.answers.as_ref(), &Message::Ready).await?;
        Ok(Ready { session: self.session, made: Some(built), room: self.room })
    }
}

impl Return {
    /// Reports what is loaded, and that pages may come.
    async fn make(self) -> Result<Ready, MigrationError> {
        send_answer(self.answers.as_ref(), &Message::Resume(self.resume)).await?;
        for part in self.received.iter().flat_map(|received| bitmap_parts(received)) {
            send_answer(self.answers.as_ref(), &Message::Received(part)).await?;
        }
        send_answer(self.answers.as_ref(), &Message::Ready).await?;
        Ok(Ready { session: self.session, made: None, room: self.room })
    }
}

/// Builds the guest, and checks that it is the one that was described. May block.
fn built(build: Build, page_size: PageSize, blocks: &[BlockInfo], setup: &GuestState) -> Result<Built, MigrationError> {
    let guest = build(page_size, blocks, setup)?;
    let memory = guest.memory();
    if let Some(what) = built_otherwise(&memory, page_size, blocks) {
        return Err(MigrationError::BuiltOtherwise(what));
    }
    check_ignored(blocks, memory.layout())?;
    let unplugged = guest.page_hinters().iter().flat_map(|hinter| hinter.unplugged()).collect();
    let ranges = excluded_ranges(memory.layout(), unplugged)?;
    let excluded = (!ranges.is_empty()).then(|| {
        let out = DirtyBitmap::empty(memory.layout());
        ranges.into_iter().for_each(|(_, block, pages)| out.set_range(block, pages));
        Arc::new(out)
    });
    let received = Arc::new(DirtyBitmap::empty(memory.layout()));
    let place = Place { memory, received, page_hashes: None };
    Ok(Built { guest, place, excluded, verification: Verification::Off })
}

/// The guest, as its source describes it.
struct Described {
    blocks: Vec<BlockInfo>,
    setup: GuestState,
    /// By which secret the source returns after a lost connection, and how long it tries.
    returns: Option<(Secret, Duration)>,
}

/// Reads the state's setup part and the blocks, before the stages run.
async fn read_setup(session: &mut Session, room: &mut Room) -> Result<Described, MigrationError> {
    let mut setup = Assembly::new(StatePhase::Setup, *room);
    let mut returns = None;
    let mut preface = Preface::after_hello(session.features);
    let reader = &mut session.readers[0];
    while let Some(incoming) = reader.next().await? {
        preface.check(&incoming).map_err(|error| ReadError::from(reader.fail(error)))?;
        match incoming {
            Incoming::Message { message: Message::Secret { secret, waits_ms }, .. } => {
                returns = Some((secret, Duration::from_millis(waits_ms)));
            }
            Incoming::Message { message: Message::State(chunk), .. } => {
                setup.add(chunk)?;
                *room = setup.room();
            }
            Incoming::Message { message: Message::Blocks(blocks), .. } => {
                return Ok(Described { blocks, setup: setup.finish()?, returns });
            }
            Incoming::Message { message: Message::Abort(why), .. } => {
                return Err(MigrationError::GivenUp { peer: Role::Source, why });
            }
            // A Heartbeat.
            _ => {}
        }
    }
    Err(ended_early())
}

/// Both ends must ignore the same blocks: a block that one does not send must exist at the other. Id, length and
/// address were compared before.
fn check_ignored(came: &[BlockInfo], own: &Layout) -> Result<(), GuestError> {
    let mut both = came.iter().zip(own.blocks());
    let Some((came, _)) = both.find(|(came, own)| came.ignored != own.ignored) else { return Ok(()) };
    let (there, here) =
        if came.ignored { ("ignored, and so not sent", "does not share it") } else { ("sent", "shares it already") };
    Err(GuestError(format!("block {:?} is {there}, and the guest here {here}", came.id)))
}
