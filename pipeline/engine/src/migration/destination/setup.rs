//! Setup: connections are gathered, the stream is accepted, the machine is built, and the stages start.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::geometry::{BlockInfo, Layout, PageSize};
use memferry_stages::queue::Outlet;
use memferry_stages::sender::Control;
use memferry_stages::wire::messages::StatePhase;
use memferry_stages::wire::reader::{Incoming, ReadError};
use memferry_stages::wire::{Message, Preface};
use memferry_transports::Listener;
use tokio::time::MissedTickBehavior;
use tokio_util::task::AbortOnDropHandle;

use super::answers::{Answers, figures, send_answer};
use super::flow::{Arrived, Flow};
use super::rounds::Rates;
use super::verify::Verification;
use super::{Attempt, Build, Built, Destination};
use crate::events::{Event, Observers, Role};
use crate::guest::{GuestError, GuestState};
use crate::migration::course::destination::ended_early;
use crate::migration::course::times::build_message;
use crate::migration::destination_graph::DestinationGraph;
use crate::migration::error::MigrationError;
use crate::migration::excluded::excluded_ranges;
use crate::migration::session::{Door, Session};
use crate::migration::stage_set::StageSet;
use crate::migration::state::{Assembly, Room};
use crate::migration::{block_facts, blocking, bounds, built_otherwise};
use crate::settings::DestinationSettings;

/// How often the source is notified of what is loaded.
const TICK: Duration = Duration::from_millis(20);

/// A destination that is ready for pages.
pub(super) struct Ready {
    pub(super) session: Session,
    pub(super) built: Built,
    pub(super) verification: Verification,
    /// What guest state may still take.
    pub(super) room: Room,
}

/// The values needed to accept a stream, separate from the destination, which waits for other things meanwhile.
struct Acceptance {
    session: Session,
    build: Build,
    settings: DestinationSettings,
    observers: Observers,
    room: Room,
    answers: Option<Outlet<Control>>,
}

impl<'a> Destination<'a> {
    /// Begins to gather connections.
    pub(super) fn gather(
        &self,
        listener: Box<dyn Listener>,
    ) -> BoxFuture<'a, Result<Box<(Session, Door)>, MigrationError>> {
        let door = Door::open(listener, self.settings.clone(), self.turned_away.clone());
        Box::pin(self.plane.run(door.gather()))
    }

    /// The connections have arrived: a source that connects from here on is refused: this destination is busy. A file has no
    /// second reader.
    pub(super) fn gathered(&mut self, session: Session, door: Door) {
        if session.answer.is_some() {
            self.door = Some(AbortOnDropHandle::new(self.plane.handle().spawn(door.refuse_everybody())));
        }
        self.attempt = Attempt::Gathered(Box::new(session));
    }

    /// The connections have arrived: starts the return path, and begins to accept.
    pub(super) fn agree(&mut self, mut session: Session, build: Build) {
        self.turned_away.finish();
        self.observers.notify(&Event::Connected { peer: session.peer.clone() });
        let answers = session.answer.take().map(|writer| {
            let (peer, ears) = (session.peer.clone(), session.ears.clone());
            Answers::start(writer, peer, ears, self.settings.peer_timeout, self.plane.handle())
        });
        let acceptance = Acceptance {
            session,
            build,
            settings: self.settings.clone(),
            observers: self.observers.clone(),
            room: self.state_room,
            answers: answers.as_ref().map(|answers| answers.outlet.clone()),
        };
        self.attempt = Attempt::Agreeing(Box::pin(acceptance.make()), answers);
    }

    pub(super) fn start_stages(&mut self, ready: Ready, answers: Option<Answers>) {
        let Ready { session: Session { hello, features, readers, .. }, built, verification, .. } = ready;
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let stages_left = readers.len() + usize::from(hello.lanes);
        let (stages, answer, mut alive) = match answers {
            Some(Answers { stages, outlet, alive }) => (stages, Some(outlet), Some(alive)),
            None => (StageSet::new(self.plane.handle()), None, None),
        };
        let graph = DestinationGraph::start(
            &built.memory,
            &hello,
            features,
            readers,
            stages,
            answer,
            verification.page_hashes(),
        );
        if let (Some(alive), Some(answer)) = (&mut alive, &graph.answer) {
            let meters = graph.receiver_meters.clone();
            alive.report(answer.clone(), move || figures(&meters));
        }
        self.setup = self.started.elapsed();
        self.attempt = Attempt::Running(Box::new(Flow {
            alive,
            arrived: Arrived::new(built.memory.layout(), self.state_room, features),
            graph,
            ticks,
            stages_left,
            rates: Rates::begin(),
            verification,
        }));
        self.built = Some(built);
    }
}

impl Acceptance {
    /// Accepts the stream, reads the guest's description and builds the machine for it.
    async fn make(mut self) -> Result<Ready, MigrationError> {
        send_answer(self.answers.as_ref(), &Message::Accept).await?;
        let reading = read_setup(&mut self.session, &mut self.room);
        let described = tokio::time::timeout(self.settings.handover_timeout, reading).await;
        let (blocks, setup) = described
            .map_err(|_| MigrationError::TimedOut("the source did not describe its guest in time".into()))??;
        let (page_size, lanes) = (self.session.hello.page_size, self.session.hello.lanes);
        let bound = |layout: &Layout| bounds::destination_bound(layout, lanes, self.settings.max_state_bytes);
        bounds::check_host(bound(&Layout::new(page_size, blocks.clone())?))?;
        let began = Instant::now();
        let build = self.build;
        let built = blocking(move || built(build, page_size, &blocks, &setup)).await?;
        let layout = built.memory.layout();
        self.observers.notify(&Event::Guest {
            blocks: block_facts(layout),
            pages: layout.pages(),
            memory_bound: bound(layout),
        });
        send_answer(self.answers.as_ref(), &build_message(began.elapsed())).await?;
        let verification = Verification::start(&built.memory, self.session.features)?;
        send_answer(self.answers.as_ref(), &Message::Ready).await?;
        Ok(Ready { session: self.session, built, verification, room: self.room })
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
    Ok(Built { guest, memory, excluded })
}

/// Reads the state's setup part and the blocks, before the stages run.
async fn read_setup(session: &mut Session, room: &mut Room) -> Result<(Vec<BlockInfo>, GuestState), MigrationError> {
    let mut setup = Assembly::new(StatePhase::Setup, *room);
    let mut preface = Preface::after_hello(session.features);
    let reader = &mut session.readers[0];
    while let Some(incoming) = reader.next().await? {
        preface.check(&incoming).map_err(|error| ReadError::from(reader.fail(error)))?;
        match incoming {
            Incoming::Message { message: Message::State(chunk), .. } => {
                setup.add(chunk)?;
                *room = setup.room();
            }
            Incoming::Message { message: Message::Blocks(blocks), .. } => return Ok((blocks, setup.finish()?)),
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
