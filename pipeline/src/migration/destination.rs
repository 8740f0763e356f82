//! The destination of a migration: its phases, one after another.
//!
//! ```text
//!  gather connections ─▶ accept ─▶ build the machine, Ready ─▶ load ─▶ verify ─▶ prepare, Loaded ─▶ Go ─▶ start, Running
//!          └─────────────────┴──────────────────┴────────────────┴─────────┴───────────┴──▶ any failure before Go: nothing
//!                                                                              runs here, and the source is told why
//! ```

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::clears::Spared;
use memferry_stages::geometry::{BlockInfo, Layout};
use memferry_stages::loader::Loaded;
use memferry_stages::memory::GuestMemory;
use memferry_stages::sender::Control;
use memferry_stages::tally::RoundTally;
use memferry_stages::wire::Message;
use memferry_stages::wire::messages::{Progress as Acknowledged, RunState, StatePhase};
use memferry_stages::wire::reader::Incoming;
use memferry_transports::Listener;
use tokio::runtime::Handle;
use tokio::time::{Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::destination_graph::{ANSWERS, DestinationGraph};
use super::digests::{Digests, Pending};
use super::error::{MigrationError, guarded};
use super::handshake::{DestinationStep, Happening, awaiting_go};
use super::link::Writer;
use super::plane::DataPlane;
use super::session::Session;
use super::source::check_ranges;
use super::speed::Speed;
use super::state::Assembly;
use super::{block_facts, blocking, bounds, built_otherwise, digests};
use crate::events::{DowntimeParts, Ended, Event, Observers, Phase, Progress};
use crate::guest::{Guest, GuestError, GuestState};
use crate::settings::DestinationSettings;

/// How often the source is told what is loaded.
const TICK: Duration = Duration::from_millis(20);
/// How many of these make one progress event for whoever watches.
const TICKS_PER_EVENT: u32 = 5;
/// Tallies that are kept of rounds that are not complete in every lane.
const MAX_TALLIES: usize = 4096;
/// How long the source is given to take the reason of a failure before its connections are dropped.
const FAREWELL: Duration = Duration::from_millis(500);

/// Receives a guest from whoever connects to `listener`, and returns when it is decided whether it runs here.
///
/// Strangers and broken peers are turned away and reported as events; the wait goes on. Nothing is started here before the
/// source has said Go.
pub async fn receive(
    guest: Arc<dyn Guest>,
    listener: Box<dyn Listener>,
    settings: DestinationSettings,
    plane: &DataPlane,
    observers: Observers,
    cancel: CancellationToken,
) -> Ended {
    let mut destination = Destination::new(guest, settings, plane.handle().clone(), observers, cancel);
    destination.observers.tell(&Event::Phase(Phase::Setup));
    let (mut answer, mut flow) = (None, None);
    let result = guarded(destination.migrate(plane, listener, &mut answer, &mut flow)).await;
    destination.conclude(result, answer, flow).await
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
    parts: DowntimeParts,
    verified: Option<bool>,
    /// Was the start begun? From here on nothing can be refused.
    start_begun: bool,
}

/// The running destination, as its controller sees it.
struct Flow {
    graph: DestinationGraph,
    cancel: CancellationToken,
    ticks: Interval,
    /// Receivers and loaders that have not ended.
    stages_left: usize,
    speed: Speed,
    tick: u32,
    round: u32,
    round_began: Instant,
    /// Do digests come?
    verify: bool,
    /// May they leave pages out?
    may_leave_out: bool,
    /// Pages that never travel, as this end knows them.
    out_for_good: Arc<DirtyBitmap>,
}

/// One thing that the controller must know.
enum Signal {
    Said(Message),
    Loaded(Loaded),
    /// Every connection has ended between two frames, and everything that came is loaded.
    StreamEnded,
    Tick,
}

/// What arrives beside the pages.
struct Arrival {
    device: Assembly,
    digests: Digests,
    /// Of rounds that are not complete in every lane.
    tallies: Vec<RoundTally>,
    lanes: usize,
    switched_over: u16,
    end: Option<(RunState, u64)>,
    /// This end's digests, begun when every page was there: the source hashes at the same time.
    ours: Option<Pending>,
}

impl Destination {
    fn new(
        guest: Arc<dyn Guest>,
        settings: DestinationSettings,
        plane: Handle,
        observers: Observers,
        cancel: CancellationToken,
    ) -> Self {
        Self {
            guest,
            settings,
            plane,
            observers,
            cancel,
            started: Instant::now(),
            setup: Duration::ZERO,
            layout: None,
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
        answer: &mut Option<Writer>,
        running: &mut Option<Flow>,
    ) -> Result<(), MigrationError> {
        let cancel = self.cancel.clone();
        let setup = async {
            let mut session = self.gather(plane, listener).await?;
            *answer = session.answer.take();
            let (memory, out_for_good) = self.agree(&mut session, answer).await?;
            Ok::<_, MigrationError>((session, memory, out_for_good))
        };
        let (session, memory, out_for_good) = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(MigrationError::Cancelled),
            ready = setup => ready?,
        };
        let stored = answer.is_none();
        let flow = running.insert(self.start_stages(session, &memory, out_for_good, answer.take()));

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

    // ---- setup ----

    async fn gather(&self, plane: &DataPlane, listener: Box<dyn Listener>) -> Result<Session, MigrationError> {
        let gathering = Session::gather(listener, self.settings.clone(), self.observers.clone());
        plane.run(gathering).await
    }

    /// Accepts the stream, learns what the guest is like and builds the machine for it.
    async fn agree(
        &mut self,
        session: &mut Session,
        answer: &mut Option<Writer>,
    ) -> Result<(GuestMemory, DirtyBitmap), MigrationError> {
        self.observers.tell(&Event::Connected { peer: session.peer.clone() });
        say(answer, &Message::Accept(Vec::new())).await?;
        let (blocks, setup) = tokio::time::timeout(self.settings.handover_timeout, read_setup(session))
            .await
            .map_err(|_| MigrationError::TimedOut("the source did not describe its guest in time".into()))??;
        if !session.features.ignored_blocks && blocks.iter().any(|block| block.ignored) {
            return Err(MigrationError::Protocol("blocks are ignored, and that was not agreed".into()));
        }
        let (guest, page_size) = (self.guest.clone(), session.hello.page_size);
        bounds::check_host(bounds::destination_bound(&Layout::new(page_size, blocks.clone())?, session.hello.lanes))?;
        let (memory, out_for_good) = blocking(move || {
            guest.build(page_size, &blocks, &setup)?;
            let memory = guest.memory();
            if let Some(what) = built_otherwise(&memory, page_size, &blocks) {
                return Err(MigrationError::BuiltOtherwise(what));
            }
            check_ignored(&blocks, memory.layout())?;
            let out_for_good = out_for_good(&*guest, memory.layout())?;
            Ok((memory, out_for_good))
        })
        .await?;
        self.layout = Some(memory.layout().clone());
        self.observers.tell(&Event::Guest {
            blocks: block_facts(memory.layout()),
            pages: memory.layout().pages(),
            memory_bound: bounds::destination_bound(memory.layout(), session.hello.lanes),
        });
        say(answer, &Message::Ready).await?;
        Ok((memory, out_for_good))
    }

    fn start_stages(
        &mut self,
        session: Session,
        memory: &GuestMemory,
        out_for_good: DirtyBitmap,
        answer: Option<Writer>,
    ) -> Flow {
        let Session { hello, features, readers, .. } = session;
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let stages_left = readers.len() + usize::from(hello.lanes);
        let graph = DestinationGraph::start(memory, &hello, features, readers, answer, &self.plane);
        self.setup = self.started.elapsed();
        self.observers.tell(&Event::Phase(Phase::Active));
        Flow {
            graph,
            cancel: self.cancel.clone(),
            ticks,
            stages_left,
            speed: Speed::default(),
            tick: 0,
            round: 1,
            round_began: Instant::now(),
            verify: features.verify,
            may_leave_out: features.left_out,
            out_for_good: Arc::new(out_for_good),
        }
    }

    // ---- loading ----

    /// Takes everything that comes until the end mark and every lane's Switchover are there.
    async fn load(&mut self, flow: &mut Flow, memory: &GuestMemory) -> Result<Arrival, MigrationError> {
        let lanes = u16::try_from(flow.graph.progress.len()).expect("at most MAX_LANES");
        let mut arrival = Arrival {
            device: Assembly::new(StatePhase::Device),
            digests: Digests::none(memory.layout()),
            tallies: Vec::new(),
            lanes: usize::from(lanes),
            switched_over: 0,
            end: None,
            ours: None,
        };
        while arrival.end.is_none() || arrival.switched_over < lanes {
            match flow.next().await? {
                Signal::Said(Message::State(chunk)) => arrival.device.add(chunk)?,
                Signal::Said(Message::Digests { block, first, stretches }) => {
                    arrival.digests.add(block, first, stretches, flow.may_leave_out)?;
                }
                Signal::Said(Message::End { run_state, frames }) => arrival.end = Some((run_state, frames)),
                Signal::Said(Message::Abort(why)) => return Err(MigrationError::GivenUp { peer: "source", why }),
                Signal::Said(other) => {
                    return Err(MigrationError::Protocol(format!("{} came out of turn", other.kind().name())));
                }
                Signal::Loaded(loaded) => {
                    self.loaded(flow, &mut arrival, loaded);
                    if arrival.switched_over == lanes && flow.verify {
                        arrival.ours = Some(digests::start(memory, flow.out_for_good.clone()));
                    }
                }
                Signal::StreamEnded => return Err(ended_early()),
                Signal::Tick => self.tick(flow)?,
            }
        }
        let expected = arrival.end.expect("the loop ends with it").1;
        let frames: u64 = flow.graph.progress.iter().map(|lane| lane.frames.load(Ordering::Acquire)).sum();
        if frames != expected {
            let what = format!("{frames} Pages frames came, the end mark says {expected}");
            return Err(MigrationError::Protocol(what));
        }
        flow.acknowledge()?;
        Ok(arrival)
    }

    /// Nothing may follow the end mark of a stored stream: what does is damage.
    async fn reach_end(&self, flow: &mut Flow) -> Result<(), MigrationError> {
        loop {
            match flow.next().await? {
                Signal::StreamEnded => return Ok(()),
                Signal::Said(message) => {
                    let what = format!("{} stands behind the end mark", message.kind().name());
                    return Err(MigrationError::Protocol(what));
                }
                Signal::Loaded(_) | Signal::Tick => {}
            }
        }
    }

    fn loaded(&self, flow: &mut Flow, arrival: &mut Arrival, loaded: Loaded) {
        match loaded {
            Loaded::RoundComplete { tally, .. } => {
                // They are figures for the report: of a source that ends round after round in one lane alone, not all are kept.
                if arrival.tallies.len() < MAX_TALLIES {
                    arrival.tallies.push(tally);
                }
                let of_round = |other: &&RoundTally| other.round == tally.round;
                if arrival.tallies.iter().filter(of_round).count() == arrival.lanes {
                    self.round_loaded(flow, &mut arrival.tallies, tally.round);
                }
            }
            Loaded::Switchover { .. } => {
                if arrival.switched_over == 0 {
                    self.observers.tell(&Event::Phase(Phase::Switchover));
                }
                arrival.switched_over += 1;
            }
        }
    }

    /// Every lane has loaded the round: its figures are added up and told.
    fn round_loaded(&self, flow: &mut Flow, tallies: &mut Vec<RoundTally>, round: u32) {
        let mut whole = RoundTally::new(round, false);
        for tally in tallies.extract_if(.., |tally| tally.round == round) {
            whole.last = tally.last;
            whole += tally;
        }
        flow.round = round.saturating_add(1);
        let duration = flow.round_began.elapsed();
        flow.round_began = Instant::now();
        self.observers.tell(&Event::RoundSent { tally: whole, duration });
    }

    fn tick(&self, flow: &mut Flow) -> Result<(), MigrationError> {
        flow.acknowledge()?;
        flow.tick += 1;
        if !flow.tick.is_multiple_of(TICKS_PER_EVENT) {
            return Ok(());
        }
        let wire_bytes = wire_bytes(flow);
        let total_bytes = self.layout.as_ref().map_or(0, Layout::bytes);
        let loaded: u64 = flow.graph.progress.iter().map(|lane| lane.bytes.load(Ordering::Relaxed)).sum();
        self.observers.tell(&Event::Progress(Progress {
            round: flow.round,
            remaining_bytes: total_bytes.saturating_sub(loaded),
            total_bytes,
            wire_bytes,
            wire_rate: flow.speed.tick(wire_bytes),
            page_rate: 0.0,
            dirty_rate: None,
            expected_downtime: None,
        }));
        Ok(())
    }

    // ---- the end ----

    /// Compares digests; where they differ, sends the page hashes of the first stretch that does, so that the source can
    /// name the page.
    async fn verify(
        &mut self,
        flow: &mut Flow,
        memory: &GuestMemory,
        ours: Pending,
        theirs: &Digests,
    ) -> Result<(), MigrationError> {
        let began = Instant::now();
        let left_out = theirs.left_out().clone();
        let ours = async {
            let ours = ours.finish().await.map_err(MigrationError::Digest)?;
            if let Some(page) = ours.first_left_out_beside(&left_out) {
                let what = format!("{page} is unplugged or ignored here, and not at the source");
                return Err(MigrationError::Differs(what));
            }
            ours.leaving_out(memory, left_out.clone()).await.map_err(MigrationError::Digest)
        };
        let ours = tokio::select! {
            biased;
            () = self.cancel.cancelled() => return Err(MigrationError::Cancelled),
            ours = ours => ours?,
        };
        let differs = theirs.first_difference(memory.layout(), &ours);
        self.parts.verify = began.elapsed();
        self.verified = Some(differs.is_none());
        let Some(stretch) = differs else { return Ok(()) };
        if flow.graph.answer.is_some() {
            let memory = memory.clone();
            let hashes = blocking(move || digests::page_hashes(&memory, &left_out, stretch)).await;
            flow.say(&hashes.map_err(MigrationError::Digest)?).await?;
        }
        let layout = memory.layout();
        let (block, first) = (&layout.blocks()[stretch.block as usize], digests::first_page(layout, stretch));
        let start = first.page * layout.page_size().bytes() as u64;
        let end = block.length.min(start + layout.page_size().stretch_bytes());
        let what = format!("block {:?} differs from the source's between bytes {start:#x} and {end:#x}", block.id);
        Err(MigrationError::Differs(what))
    }

    async fn prepare(&self, device: GuestState) -> Result<(), MigrationError> {
        let guest = self.guest.clone();
        Ok(blocking(move || guest.prepare(&device)).await?)
    }

    /// The last handshake: see [`super::handshake`].
    async fn take_over(&mut self, flow: &mut Flow) -> Result<(), MigrationError> {
        flow.say(&Message::Loaded { verified: self.verified == Some(true) }).await?;
        let give_up = tokio::time::Instant::now() + self.settings.handover_timeout;
        let run_state = loop {
            let happening = match tokio::time::timeout_at(give_up, flow.next()).await {
                Err(_) => Happening::TimedOut,
                Ok(Ok(Signal::Said(message))) => Happening::Said(message),
                Ok(Ok(Signal::StreamEnded)) => Happening::Lost("the source closed it".into()),
                Ok(Ok(Signal::Loaded(_) | Signal::Tick)) => continue,
                Ok(Err(MigrationError::Cancelled)) => Happening::Cancel,
                Ok(Err(error)) => Happening::Broke(error.to_string()),
            };
            match awaiting_go(happening) {
                DestinationStep::Wait => {}
                DestinationStep::Start(run_state) => break run_state,
                DestinationStep::End { cancelled: true, .. } => return Err(MigrationError::Cancelled),
                DestinationStep::End { why, .. } => return Err(MigrationError::Lost(why)),
            }
        };
        let began = Instant::now();
        let started = self.start(run_state).await;
        self.parts.handover = began.elapsed();
        let answer = match &started {
            Ok(()) => Message::Running,
            Err(error) => Message::StartFailed(error.to_string()),
        };
        if flow.say(&answer).await.is_err() {
            let what = "the source could not be told that the guest was started here";
            self.observers.tell(&Event::Warning(what.into()));
        }
        started
    }

    async fn start(&mut self, run_state: RunState) -> Result<(), MigrationError> {
        self.start_begun = true;
        let guest = self.guest.clone();
        Ok(blocking(move || guest.start(run_state)).await?)
    }

    /// Whatever happened: the source is told, and it is reported.
    async fn conclude(self, result: Result<(), MigrationError>, answer: Option<Writer>, flow: Option<Flow>) -> Ended {
        let (result, flow) = match (result, flow) {
            (Err(MigrationError::Stage(failure)), Some(mut flow)) => {
                let cause = flow.graph.stages.root_cause(failure).await;
                (Err(MigrationError::Stage(cause)), Some(flow))
            }
            other => other,
        };
        let farewell = self.farewell(&result);
        let (wire_bytes, memory_peak, stages) = flow.as_ref().map(|flow| self.figures(flow)).unwrap_or_default();
        match flow {
            Some(flow) => flow.close(farewell).await,
            None => close_early(answer, farewell).await,
        }
        let (phase, error) = match result {
            Ok(()) => (Phase::Completed, None),
            Err(MigrationError::Cancelled) => (Phase::Cancelled, Some("cancelled".to_owned())),
            Err(error) => (Phase::Failed, Some(error.to_string())),
        };
        self.observers.tell(&Event::Phase(phase));
        let ended = Ended {
            phase,
            error,
            verified: self.verified,
            total: self.started.elapsed(),
            setup: self.setup,
            downtime: None,
            forecast: None,
            parts: self.parts,
            wire_bytes,
            spared: Spared::default(),
            memory_peak,
            stages,
            resume_failed: false,
        };
        self.observers.tell(&Event::Ended(ended.clone()));
        ended
    }

    fn figures(&self, flow: &Flow) -> (u64, u64, Vec<memferry_stages::meter::Reading>) {
        let layout = self.layout.as_ref().expect("the stages run");
        let keeps = bounds::destination_keeps(layout, self.verified.is_some());
        let peak = bounds::peak(&flow.graph.pools, &flow.graph.meters, keeps);
        (wire_bytes(flow), peak, flow.graph.meters.iter().map(|meter| meter.read()).collect())
    }

    /// What the source must hear when nothing was begun here. After a start was begun it has heard all there is.
    fn farewell(&self, result: &Result<(), MigrationError>) -> Option<Message> {
        match result {
            Ok(()) => None,
            Err(_) if self.start_begun => None,
            Err(MigrationError::Cancelled) => Some(Message::Abort("cancelled at the destination".into())),
            Err(
                error @ (MigrationError::Guest(_)
                | MigrationError::BuiltOtherwise(_)
                | MigrationError::Layout(_)
                | MigrationError::TooLarge(_)
                | MigrationError::Differs(_)),
            ) => Some(Message::Refused(error.to_string())),
            Err(error) => Some(Message::Abort(error.to_string())),
        }
    }
}

impl Flow {
    /// Waits for the next thing to happen. A cancel comes first.
    async fn next(&mut self) -> Result<Signal, MigrationError> {
        loop {
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Err(MigrationError::Cancelled),
                Some(message) = self.graph.said.next() => return Ok(Signal::Said(message)),
                Some(loaded) = self.graph.loaded.next() => return Ok(Signal::Loaded(loaded)),
                end = self.graph.stages.next_end() => {
                    end.result?;
                    self.stages_left -= usize::from(end.name != ANSWERS);
                    if self.stages_left == 0 {
                        return Ok(Signal::StreamEnded);
                    }
                }
                _ = self.ticks.tick() => return Ok(Signal::Tick),
            }
        }
    }

    /// Hands an answer to the return path, if there is one.
    async fn say(&self, message: &Message) -> Result<(), MigrationError> {
        let Some(answer) = &self.graph.answer else { return Ok(()) };
        let said = answer.put(Control::Frame(message.encode(0))).await;
        said.map_err(|_| MigrationError::Lost("the return path is closed".into()))
    }

    /// Tells the source what is loaded.
    fn acknowledge(&self) -> Result<(), MigrationError> {
        let progress = &self.graph.progress;
        let frames: Vec<u64> = progress.iter().map(|lane| lane.frames.load(Ordering::Acquire)).collect();
        let bytes = progress.iter().map(|lane| lane.bytes.load(Ordering::Acquire)).sum();
        let Some(answer) = &self.graph.answer else { return Ok(()) };
        // Where the last figures still wait to be sent, these need not be: later ones will tell the same.
        let offered = answer.offer(Control::Frame(Message::Progress(Acknowledged { bytes, frames }).encode(0)));
        offered.map_err(|_| MigrationError::Lost("the return path is closed".into()))
    }

    /// Says the last word and ends the connections, within [`FAREWELL`].
    async fn close(mut self, last_word: Option<Message>) {
        let closing = async {
            if let Some(message) = last_word {
                self.say(&message).await?;
            }
            if let Some(answer) = self.graph.answer.take() {
                answer.put(Control::Finish).await.ok();
                while self.graph.stages.next_end().await.name != ANSWERS {}
            }
            Ok::<(), MigrationError>(())
        };
        // A source that is gone or does not read needs no farewell.
        drop(tokio::time::timeout(FAREWELL, closing).await);
        self.graph.stages.end().await;
    }
}

/// Reads the state's setup part and the blocks, before the stages run.
async fn read_setup(session: &mut Session) -> Result<(Vec<BlockInfo>, GuestState), MigrationError> {
    let mut setup = Assembly::new(StatePhase::Setup);
    loop {
        match session.readers[0].next().await? {
            Some(Incoming::Message { message: Message::State(chunk), .. }) => setup.add(chunk)?,
            Some(Incoming::Message { message: Message::Blocks(blocks), .. }) => return Ok((blocks, setup.finish()?)),
            Some(Incoming::Message { message: Message::Abort(why), .. }) => {
                return Err(MigrationError::GivenUp { peer: "source", why });
            }
            Some(Incoming::Message { message, .. }) => {
                return Err(MigrationError::Protocol(format!("{} came before the blocks", message.kind().name())));
            }
            Some(Incoming::Pages(_)) => return Err(MigrationError::Protocol("pages came before the blocks".into())),
            None => return Err(ended_early()),
        }
    }
}

/// Both ends ignore the same blocks: what one does not send, the other must have. Id, length and address were compared before.
fn check_ignored(came: &[BlockInfo], own: &Layout) -> Result<(), GuestError> {
    let mut both = came.iter().zip(own.blocks());
    let Some((came, _)) = both.find(|(came, own)| came.ignored != own.ignored) else { return Ok(()) };
    let (there, here) =
        if came.ignored { ("ignored, and so not sent", "does not share it") } else { ("sent", "shares it already") };
    Err(GuestError(format!("block {:?} is {there}, and the guest here {here}", came.id)))
}

/// The pages that this end's guest never gets: unplugged, or of ignored blocks.
fn out_for_good(guest: &dyn Guest, layout: &Layout) -> Result<DirtyBitmap, GuestError> {
    let out = DirtyBitmap::empty(layout);
    let unplugged: Vec<_> = guest.clearers().iter().flat_map(|clearer| clearer.unplugged()).collect();
    check_ranges(layout, unplugged.iter())?;
    unplugged.into_iter().for_each(|(block, pages)| out.set_range(block, pages));
    let ignored = (0..layout.block_count()).filter(|&block| layout.blocks()[block as usize].ignored);
    ignored.for_each(|block| out.set_range(block, 0..layout.block_pages(block)));
    Ok(out)
}

async fn say(answer: &mut Option<Writer>, message: &Message) -> Result<(), MigrationError> {
    use tokio::io::AsyncWriteExt;
    if let Some(writer) = answer {
        writer.write_all(&message.encode(0)).await?;
    }
    Ok(())
}

async fn close_early(mut answer: Option<Writer>, last_word: Option<Message>) {
    use tokio::io::AsyncWriteExt;
    let Some(message) = last_word else { return };
    let closing = async {
        say(&mut answer, &message).await?;
        if let Some(writer) = &mut answer {
            writer.shutdown().await?;
        }
        Ok::<(), MigrationError>(())
    };
    drop(tokio::time::timeout(FAREWELL, closing).await);
}

fn ended_early() -> MigrationError {
    MigrationError::Lost("the stream ends before its end mark, so it is not complete".into())
}

fn wire_bytes(flow: &Flow) -> u64 {
    flow.graph.receiver_meters.iter().map(|meter| meter.bytes()).sum()
}
