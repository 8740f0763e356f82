//! Setup: connections are gathered, the stream is accepted, the machine is built, and the stages start.

use std::sync::Arc;
use std::time::{Duration, Instant};

use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::geometry::{BlockInfo, Layout};
use memferry_stages::memory::GuestMemory;
use memferry_stages::wire::Message;
use memferry_stages::wire::messages::StatePhase;
use memferry_stages::wire::reader::Incoming;
use memferry_transports::Listener;
use tokio::time::MissedTickBehavior;

use super::answers::{Answers, figures, say};
use super::flow::{Flow, ended_early};
use super::{Build, Built, Destination};
use crate::bottleneck::Watch;
use crate::events::{Event, Phase, Role};
use crate::guest::{GuestError, GuestState};
use crate::migration::alive::silenced;
use crate::migration::destination_graph::DestinationGraph;
use crate::migration::digests::LeftOut;
use crate::migration::error::MigrationError;
use crate::migration::out_for_good::out_for_good;
use crate::migration::plane::DataPlane;
use crate::migration::session::Session;
use crate::migration::speed::Speed;
use crate::migration::stage_set::StageSet;
use crate::migration::state::{Assembly, Room};
use crate::migration::{block_facts, blocking, bounds, built_otherwise};

/// How often the source is notified of what is loaded.
const TICK: Duration = Duration::from_millis(20);

impl Destination {
    pub(super) async fn gather(
        &self,
        plane: &DataPlane,
        listener: Box<dyn Listener>,
    ) -> Result<Session, MigrationError> {
        plane.run(Session::gather(listener, self.settings.clone(), self.turned_away.clone())).await
    }

    /// Accepts the stream, reads the guest's description and builds the machine for it.
    pub(super) async fn agree(
        &mut self,
        session: &mut Session,
        build: Build,
        answers: Option<&Answers>,
    ) -> Result<Built, MigrationError> {
        self.observers.tell(&Event::Connected { peer: session.peer.clone() });
        say(answers, &Message::Accept).await?;
        let reading = read_setup(session, &mut self.state_room);
        let described = tokio::select! {
            described = tokio::time::timeout(self.settings.handover_timeout, reading) => described,
            silence = silenced(answers.map(|answers| &answers.alive)) => return Err(MigrationError::Silent(silence)),
        };
        let (blocks, setup) = described
            .map_err(|_| MigrationError::TimedOut("the source did not describe its guest in time".into()))??;
        if !session.features.ignored_blocks && blocks.iter().any(|block| block.ignored) {
            return Err(MigrationError::Protocol("blocks are ignored, and that was not agreed".into()));
        }
        let page_size = session.hello.page_size;
        let layout = Layout::new(page_size, blocks.clone())?;
        bounds::check_host(bounds::destination_bound(&layout, session.hello.lanes, self.settings.max_state_bytes))?;
        let built = blocking(move || {
            let guest = build(page_size, &blocks, &setup)?;
            let memory = guest.memory();
            if let Some(what) = built_otherwise(&memory, page_size, &blocks) {
                return Err(MigrationError::BuiltOtherwise(what));
            }
            check_ignored(&blocks, memory.layout())?;
            let unplugged = guest.clearers().iter().flat_map(|clearer| clearer.unplugged()).collect();
            let ranges = out_for_good(memory.layout(), unplugged)?;
            let out_for_good = (!ranges.is_empty()).then(|| {
                let out = DirtyBitmap::empty(memory.layout());
                ranges.into_iter().for_each(|(_, block, pages)| out.set_range(block, pages));
                Arc::new(out)
            });
            Ok(Built { guest, memory, out_for_good })
        })
        .await?;
        let layout = built.memory.layout();
        self.layout = Some(layout.clone());
        self.observers.tell(&Event::Guest {
            blocks: block_facts(layout),
            pages: layout.pages(),
            memory_bound: bounds::destination_bound(layout, session.hello.lanes, self.settings.max_state_bytes),
        });
        say(answers, &Message::Ready).await?;
        Ok(built)
    }

    pub(super) fn start_stages(
        &mut self,
        session: Session,
        memory: &GuestMemory,
        out_for_good: LeftOut,
        answers: Option<Answers>,
    ) -> Flow {
        let Session { hello, features, readers, .. } = session;
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let stages_left = readers.len() + usize::from(hello.lanes);
        let (stages, answer, mut alive) = match answers {
            Some(Answers { stages, outlet, alive }) => (stages, Some(outlet), Some(alive)),
            None => (StageSet::new(&self.plane), None, None),
        };
        let graph = DestinationGraph::start(memory, &hello, features, readers, stages, answer);
        if let (Some(alive), Some(answer)) = (&mut alive, &graph.answer) {
            let meters = graph.receiver_meters.clone();
            alive.report(answer.clone(), move || figures(&meters));
        }
        self.setup = self.started.elapsed();
        self.observers.tell(&Event::Phase(Phase::Active));
        Flow {
            alive,
            graph,
            cancel: self.cancel.clone(),
            ticks,
            stages_left,
            wire_speed: Speed::default(),
            page_speed: Speed::default(),
            watch: Watch::begin(false),
            tick: 0,
            round: 1,
            round_began: Instant::now(),
            verify: features.verify,
            may_leave_out: features.left_out,
            out_for_good,
        }
    }
}

/// Reads the state's setup part and the blocks, before the stages run.
async fn read_setup(session: &mut Session, room: &mut Room) -> Result<(Vec<BlockInfo>, GuestState), MigrationError> {
    let mut setup = Assembly::new(StatePhase::Setup, *room);
    loop {
        match session.readers[0].next().await? {
            Some(Incoming::Message { message: Message::State(chunk), .. }) => {
                setup.add(chunk)?;
                *room = setup.room();
            }
            Some(Incoming::Message { message: Message::Blocks(blocks), .. }) => return Ok((blocks, setup.finish()?)),
            Some(Incoming::Message { message: Message::Heartbeat(_), .. }) => {}
            Some(Incoming::Message { message: Message::Abort(why), .. }) => {
                return Err(MigrationError::GivenUp { peer: Role::Source, why });
            }
            Some(Incoming::Message { message, .. }) => {
                return Err(MigrationError::Protocol(format!("{} came before the blocks", message.kind().name())));
            }
            Some(Incoming::Pages(_)) => return Err(MigrationError::Protocol("pages came before the blocks".into())),
            None => return Err(ended_early()),
        }
    }
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
