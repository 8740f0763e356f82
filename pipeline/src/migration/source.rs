//! The source of a migration: its phases, one after another.
//!
//! ```text
//!  connect ─▶ agree ─▶ arm the logs, fill the bitmap, start the stages ─▶ rounds ─▶ pause, send the rest ─▶ hand over
//!     └────────┴────────────────────────┴───────────────────────────────────┴─────────────┴──▶ any failure: the
//!                                                          guest goes on as it was, logs stopped, and the error says why
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::bitmap_sync::{SyncOrder, Synced};
use memferry_stages::dirty_log::DirtyLog;
use memferry_stages::geometry::{Layout, PageAt};
use memferry_stages::memory::GuestMemory;
use memferry_stages::scanner::ScanOrder;
use memferry_stages::sender::{Control, Sent};
use memferry_stages::tally::RoundTally;
use memferry_stages::wire::Message;
use memferry_stages::wire::messages::{Progress as Acknowledged, RunState, StatePhase};
use memferry_transports::Transport;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::convergence::{Decision, FixedCost, Limits, PageRate, Situation, decide};
use super::error::{MigrationError, guarded};
use super::flow::{Flow, Signal};
use super::handshake::{Happening, SourceHandshake, SourceStep, Verdict};
use super::link::Link;
use super::plane::DataPlane;
use super::source_graph::{SourceGraph, SourceParts};
use super::speed::Speed;
use super::{blocking, bounds, digests, state, untouched_pages};
use crate::events::{DowntimeParts, Ended, Event, Observers, Phase, Progress};
use crate::guest::{Guest, GuestState};
use crate::settings::{After, OnDeadline, SourceSettings};

/// How long the destination is given to take the reason of a failure before its connection is dropped.
const FAREWELL: Duration = Duration::from_millis(500);
/// The share of the downtime limit that the backlog may still need when the guest is paused.
const BACKLOG_SHARE: f64 = 0.1;
/// Device state and handshake, until they have been measured: what the forecast assumes.
const HANDOVER_GUESS: Duration = Duration::from_millis(5);

/// Moves a guest to whatever `transport` leads to, and returns when it is decided where the guest is.
///
/// The guest runs on while its memory is sent, is paused for the switchover, and is resumed here if anything fails
/// before the destination may have started it. Cancelling takes effect at once, until the hand-over has begun.
pub async fn send(
    guest: Arc<dyn Guest>,
    transport: Arc<dyn Transport>,
    settings: SourceSettings,
    plane: &DataPlane,
    observers: Observers,
    cancel: CancellationToken,
) -> Ended {
    let mut source = Source::new(guest, transport, settings, plane.handle().clone(), observers, cancel);
    let mut flow = None;
    source.tell_phase(Phase::Setup);
    let verdict = match guarded(source.migrate(plane, &mut flow)).await {
        Ok(verdict) => verdict,
        Err(error) if source.go_said => Verdict::Unconfirmed(error.to_string()),
        Err(MigrationError::Cancelled) => Verdict::Cancelled,
        Err(error) => Verdict::Failed(error.to_string()),
    };
    source.conclude(verdict, flow).await
}

struct Source {
    guest: Arc<dyn Guest>,
    memory: GuestMemory,
    was: RunState,
    transport: Arc<dyn Transport>,
    settings: SourceSettings,
    plane: Handle,
    observers: Observers,
    cancel: CancellationToken,
    started: Instant,
    setup: Duration,
    logs: Vec<Arc<dyn DirtyLog>>,
    bitmap: Option<Arc<DirtyBitmap>>,
    paused: Option<Instant>,
    released: bool,
    /// May Go have left?
    go_said: bool,
    downtime: Option<Duration>,
    parts: DowntimeParts,
    rate: PageRate,
    fixed: FixedCost,
    speed: Speed,
    round: u32,
    dirty_rate: Option<f64>,
    dirty_bytes: u64,
    pages_frames: u64,
    verified: Option<bool>,
    differing_page: Option<String>,
}

impl Source {
    fn new(
        guest: Arc<dyn Guest>,
        transport: Arc<dyn Transport>,
        settings: SourceSettings,
        plane: Handle,
        observers: Observers,
        cancel: CancellationToken,
    ) -> Self {
        let memory = guest.memory();
        Self {
            was: guest.run_state(),
            fixed: FixedCost { handover: HANDOVER_GUESS, ..FixedCost::default() },
            dirty_bytes: memory.layout().bytes(),
            guest,
            memory,
            transport,
            settings,
            plane,
            observers,
            cancel,
            started: Instant::now(),
            setup: Duration::ZERO,
            logs: Vec::new(),
            bitmap: None,
            paused: None,
            released: false,
            go_said: false,
            downtime: None,
            parts: DowntimeParts::default(),
            rate: PageRate::default(),
            speed: Speed::default(),
            round: 0,
            dirty_rate: None,
            pages_frames: 0,
            verified: None,
            differing_page: None,
        }
    }

    /// The migration as the list of its phases.
    async fn migrate(&mut self, plane: &DataPlane, running: &mut Option<Flow>) -> Result<Verdict, MigrationError> {
        let cancel = self.cancel.clone();
        let agreed = async {
            let mut link = self.connect(plane).await?;
            self.agree(&mut link).await?;
            Ok::<_, MigrationError>(link)
        };
        let link = tokio::select! {
            biased;
            () = cancel.cancelled() => return Err(MigrationError::Cancelled),
            agreed = agreed => agreed?,
        };
        // A cancel waits for this: a log that is being started cannot be stopped.
        let (bitmap, untouched) = self.arm().await?;
        self.estimate_verify().await?;
        let flow = running.insert(self.start_stages(link, bitmap, untouched));
        self.rounds(flow).await?;
        self.send_the_rest(flow).await?;
        if self.transport.capabilities().return_path {
            self.hand_over(flow).await
        } else {
            self.complete_file(flow).await
        }
    }

    fn layout(&self) -> &Layout {
        self.memory.layout()
    }

    fn tell_phase(&self, phase: Phase) {
        self.observers.tell(&Event::Phase(phase));
    }

    // ---- setup ----

    async fn connect(&mut self, plane: &DataPlane) -> Result<Link, MigrationError> {
        let (transport, settings) = (self.transport.clone(), self.settings.clone());
        let page_size = self.memory.page_size();
        plane.run(async move { Link::open(transport, settings, page_size).await }).await
    }

    /// The destination accepts the stream, builds its machine and is ready for pages, before any is sent.
    async fn agree(&mut self, link: &mut Link) -> Result<(), MigrationError> {
        link.expect(|message| matches!(message, Message::Accept(_))).await?;
        let guest = self.guest.clone();
        let setup = blocking(move || guest.setup_state()).await?;
        for chunk in state::chunks(StatePhase::Setup, setup)? {
            link.say(&Message::State(chunk)).await?;
        }
        link.say(&Message::Blocks(self.layout().blocks().to_vec())).await?;
        let asked = Instant::now();
        link.expect(|message| *message == Message::Ready).await?;
        // Two one-way trips make the hand-over, as they make this question and its answer.
        self.fixed.handover = self.fixed.handover.max(asked.elapsed().min(HANDOVER_GUESS * 10));
        self.observers.tell(&Event::Connected { peer: link.peer.clone() });
        self.observers.tell(&Event::Guest {
            blocks: super::block_facts(self.layout()),
            pages: self.layout().pages(),
            memory_bound: bounds::source_bound(self.layout(), &self.settings),
        });
        Ok(())
    }

    /// Starts the logs, and only then asks which pages were never touched: a write that comes later is in a log. All bits
    /// are set: the bitmap is the truth from here on (law 1).
    async fn arm(&mut self) -> Result<(Arc<DirtyBitmap>, Arc<DirtyBitmap>), MigrationError> {
        let (guest, memory) = (self.guest.clone(), self.memory.clone());
        self.logs = blocking(move || guest.dirty_logs()).await?;
        let logs = self.logs.clone();
        let (bitmap, untouched) = blocking(move || {
            for log in &logs {
                log.start().map_err(|error| MigrationError::Log { doing: "start", error })?;
            }
            let untouched = untouched_pages(&memory);
            Ok::<_, MigrationError>((Arc::new(DirtyBitmap::filled(memory.layout())), Arc::new(untouched)))
        })
        .await?;
        self.bitmap = Some(bitmap.clone());
        Ok((bitmap, untouched))
    }

    /// What the digests will cost: measured on a sample, counted for both ends, which may share a machine.
    async fn estimate_verify(&mut self) -> Result<(), MigrationError> {
        if self.settings.verify {
            let memory = self.memory.clone();
            let one_end = blocking(move || digests::estimate(&memory)).await.map_err(MigrationError::Digest)?;
            self.fixed.verify = one_end * 2;
        }
        Ok(())
    }

    fn start_stages(&mut self, link: Link, bitmap: Arc<DirtyBitmap>, untouched: Arc<DirtyBitmap>) -> Flow {
        let parts = SourceParts {
            memory: self.memory.clone(),
            logs: self.logs.clone(),
            bitmap,
            untouched: Some(untouched),
            writers: link.writers,
            durable_rounds: self.transport.capabilities().stored,
        };
        let graph = SourceGraph::start(parts, &self.settings, &self.plane);
        self.setup = self.started.elapsed();
        self.tell_phase(Phase::Active);
        Flow::new(graph, link.said, self.cancel.clone())
    }

    // ---- rounds ----

    /// Rounds while the guest runs, until what is left can be sent within the downtime limit.
    async fn rounds(&mut self, flow: &mut Flow) -> Result<(), MigrationError> {
        let limits = Limits::from(&self.settings);
        loop {
            self.scan(flow, false).await?;
            let found = self.sync(flow).await?;
            let (decision, why) = decide(&limits, &self.situation(flow, &found));
            self.observers.tell(&Event::Decided { what: why.clone() });
            match decision {
                Decision::AnotherRound => {}
                Decision::SwitchOver => return Ok(()),
                Decision::GiveUp => return Err(MigrationError::GaveUp(why)),
            }
        }
    }

    /// One round: everything that is dirty now, until its last byte is handed to the transport.
    async fn scan(&mut self, flow: &mut Flow, last: bool) -> Result<(), MigrationError> {
        self.round += 1;
        let began = Instant::now();
        if flow.graph.scan.put(ScanOrder { round: self.round, last }).await.is_err() {
            return Err(self.broken(flow).await);
        }
        let mut tally = RoundTally::new(self.round, last);
        let mut lanes_left = self.settings.lanes;
        while lanes_left > 0 {
            match self.next(flow).await? {
                Signal::Scanned(scanned) => self.observers.tell(&Event::RoundScanned { round: scanned.round }),
                Signal::Sent(Sent::RoundComplete { tally: of_lane, .. }) => {
                    tally += of_lane;
                    lanes_left -= u16::from(!last);
                }
                Signal::Sent(Sent::Switchover { .. }) => lanes_left -= 1,
                other => return Err(unexpected(&other)),
            }
        }
        let duration = began.elapsed();
        self.pages_frames += tally.batches;
        self.rate.round(tally.bytes_in, duration);
        self.observers.tell(&Event::RoundSent { tally, duration });
        Ok(())
    }

    async fn sync(&mut self, flow: &mut Flow) -> Result<Synced, MigrationError> {
        let since_last = self.speed.since_sync();
        if flow.graph.sync.put(SyncOrder { after_round: self.round }).await.is_err() {
            return Err(self.broken(flow).await);
        }
        let found = loop {
            match self.next(flow).await? {
                Signal::Synced(found) => break found,
                Signal::Scanned(_) => {}
                other => return Err(unexpected(&other)),
            }
        };
        self.fixed.sync = self.fixed.sync.max(found.duration);
        self.dirty_bytes = found.dirty_pages * self.memory.page_size().bytes() as u64;
        self.dirty_rate = since_last.map(|time| self.dirty_bytes as f64 / time.as_secs_f64());
        let Synced { after_round, dirty_pages, duration } = found;
        self.observers.tell(&Event::Synced { after_round, dirty_pages, duration });
        Ok(found)
    }

    fn situation(&self, flow: &Flow, found: &Synced) -> Situation {
        let page = self.memory.page_size().bytes() as u64;
        Situation {
            round: self.round,
            elapsed: self.started.elapsed(),
            dirty_bytes: found.dirty_pages * page,
            in_flight_bytes: flow.graph.in_flight.pages() * page,
            rate: self.rate.bytes_per_second(),
            fixed: self.fixed,
        }
    }

    /// The next signal that a phase must act on: failures become errors, and what concerns every phase is done here.
    async fn next(&mut self, flow: &mut Flow) -> Result<Signal, MigrationError> {
        loop {
            match flow.next().await {
                Signal::Cancel => return Err(MigrationError::Cancelled),
                Signal::Said(Message::Progress(acknowledged)) => self.acknowledge(flow, &acknowledged)?,
                Signal::Said(Message::Refused(why)) => {
                    return Err(MigrationError::Refused { peer: "destination", why });
                }
                Signal::Said(Message::Abort(why)) => return Err(MigrationError::GivenUp { peer: "destination", why }),
                Signal::Said(other) => {
                    return Err(MigrationError::Protocol(format!("{} came out of turn", other.kind().name())));
                }
                Signal::Lost(why) => return Err(MigrationError::Lost(why)),
                Signal::Broke(failure) => return Err(flow.explain(failure).await),
                Signal::StageDone(_) => {}
                Signal::Tick => self.tick(flow).await?,
                signal => return Ok(signal),
            }
        }
    }

    fn acknowledge(&self, flow: &Flow, acknowledged: &Acknowledged) -> Result<(), MigrationError> {
        for (lane, &frames) in (0..self.settings.lanes).zip(&acknowledged.frames) {
            flow.graph.in_flight.acknowledge(lane, frames).map_err(|sent| {
                MigrationError::Protocol(format!("lane {lane}: {frames} frames acknowledged of {sent} sent"))
            })?;
        }
        Ok(())
    }

    /// A queue was found closed: some stage has failed, and its failure is on its way.
    async fn broken(&mut self, flow: &mut Flow) -> MigrationError {
        let failure = async {
            loop {
                if let Err(error) = self.next(flow).await {
                    break error;
                }
            }
        };
        let failure = tokio::time::timeout(Duration::from_secs(1), failure).await;
        failure.unwrap_or_else(|_| MigrationError::Lost("a stage ended without saying why".into()))
    }

    /// Figures for whoever watches, and the deadline.
    async fn tick(&mut self, flow: &Flow) -> Result<(), MigrationError> {
        let wire_bytes = wire_bytes(flow);
        let page = self.memory.page_size().bytes() as u64;
        let dirty_bytes = self.bitmap.as_ref().map_or(0, |bitmap| bitmap.count()) * page;
        let remaining_bytes = dirty_bytes + flow.graph.in_flight.pages() * page;
        let speed = self.speed.tick(wire_bytes);
        let forecast = Situation {
            round: self.round,
            elapsed: self.started.elapsed(),
            dirty_bytes,
            in_flight_bytes: remaining_bytes - dirty_bytes,
            rate: self.rate.bytes_per_second(),
            fixed: self.fixed,
        };
        self.observers.tell(&Event::Progress(Progress {
            round: self.round,
            remaining_bytes,
            total_bytes: self.layout().bytes(),
            wire_bytes,
            wire_rate: speed,
            page_rate: self.rate.bytes_per_second().unwrap_or(0.0),
            dirty_rate: self.dirty_rate,
            expected_downtime: forecast.expected_downtime(),
        }));
        self.mind_the_deadline().await
    }

    /// The deadline may pass in the middle of a round: then the migration ends at once, or the guest is paused at once and
    /// the round goes on without it.
    async fn mind_the_deadline(&mut self) -> Result<(), MigrationError> {
        let Some(deadline) = self.settings.deadline.filter(|&deadline| self.started.elapsed() >= deadline) else {
            return Ok(());
        };
        if self.paused.is_some() {
            return Ok(());
        }
        let why = format!("the deadline of {deadline:.1?} has passed in round {}", self.round);
        match self.settings.on_deadline {
            OnDeadline::Cancel => Err(MigrationError::GaveUp(why)),
            OnDeadline::SwitchOver => {
                self.observers.tell(&Event::Decided { what: format!("switch over: {why}") });
                self.pause().await
            }
        }
    }

    // ---- switchover ----

    /// The guest stands still: its device state, the last sync, the last round, digests, and the end mark.
    async fn send_the_rest(&mut self, flow: &mut Flow) -> Result<(), MigrationError> {
        self.drain(flow).await?;
        self.pause().await?;
        let device = self.save().await?;
        self.sync(flow).await.map(|found| self.parts.final_sync = found.duration)?;

        let began = Instant::now();
        let digests = self.settings.verify.then(|| digests::start(&self.memory));
        self.say_state(flow, device).await?;
        self.scan(flow, true).await?;
        self.parts.final_transfer = began.elapsed();

        if let Some(digests) = digests {
            self.say_digests(flow, digests).await?;
        }
        self.say(flow, &Message::End { run_state: self.was, frames: self.pages_frames }).await
    }

    /// Lets the backlog run down to a small share of the downtime limit before the guest is paused.
    async fn drain(&mut self, flow: &mut Flow) -> Result<(), MigrationError> {
        let limit = self.settings.downtime_limit;
        let share = limit.as_secs_f64() * BACKLOG_SHARE * self.rate.bytes_per_second().unwrap_or(0.0);
        let give_up = tokio::time::Instant::now() + limit;
        let page = self.memory.page_size().bytes() as u64;
        while self.transport.capabilities().return_path
            && self.paused.is_none()
            && (flow.graph.in_flight.pages() * page) as f64 > share
        {
            match tokio::time::timeout_at(give_up, self.next(flow)).await {
                Ok(signal) => drop(signal?),
                Err(_) => break,
            }
        }
        Ok(())
    }

    async fn pause(&mut self) -> Result<(), MigrationError> {
        if self.paused.is_none() {
            self.tell_phase(Phase::Switchover);
            self.paused = Some(Instant::now());
            if self.was == RunState::Running {
                let guest = self.guest.clone();
                blocking(move || guest.pause()).await?;
            }
            self.observers.tell(&Event::Paused);
        }
        Ok(())
    }

    async fn save(&mut self) -> Result<GuestState, MigrationError> {
        let began = Instant::now();
        let guest = self.guest.clone();
        let device = blocking(move || guest.save()).await?;
        self.released = true;
        let guest = self.guest.clone();
        blocking(move || guest.release()).await?;
        self.parts.state = began.elapsed();
        Ok(device)
    }

    /// Sends a control message. A destination that does not read cannot hold up a cancel.
    async fn say(&mut self, flow: &mut Flow, message: &Message) -> Result<(), MigrationError> {
        let said = tokio::select! {
            biased;
            () = self.cancel.cancelled() => return Err(MigrationError::Cancelled),
            said = flow.say(message) => said,
        };
        if said.is_err() {
            return Err(self.broken(flow).await);
        }
        Ok(())
    }

    async fn say_state(&mut self, flow: &mut Flow, device: GuestState) -> Result<(), MigrationError> {
        let began = Instant::now();
        for chunk in state::chunks(StatePhase::Device, device)? {
            self.say(flow, &Message::State(chunk)).await?;
        }
        self.parts.state += began.elapsed();
        Ok(())
    }

    async fn say_digests(&mut self, flow: &mut Flow, digests: digests::Pending) -> Result<(), MigrationError> {
        let began = Instant::now();
        let digests = digests.finish().await.map_err(MigrationError::Digest)?;
        for message in digests.messages() {
            self.say(flow, &message).await?;
        }
        self.parts.verify = began.elapsed();
        Ok(())
    }

    // ---- the end ----

    /// The last handshake: see [`super::handshake`].
    async fn hand_over(&mut self, flow: &mut Flow) -> Result<Verdict, MigrationError> {
        let mut handshake = SourceHandshake::AwaitingLoaded { verify: self.settings.verify };
        let mut phase_began = Instant::now();
        let mut give_up = tokio::time::Instant::now() + self.settings.handover_timeout;
        loop {
            let happening = match tokio::time::timeout_at(give_up, flow.next()).await {
                Err(_) => Happening::TimedOut,
                Ok(signal) => match self.happening(flow, signal).await {
                    Some(happening) => happening,
                    None => continue,
                },
            };
            match handshake.step(happening) {
                SourceStep::Wait => {}
                SourceStep::NamePage(message) => self.name_page(&message).await,
                SourceStep::HandOver => {
                    self.parts.verify += phase_began.elapsed();
                    phase_began = Instant::now();
                    self.verified = self.settings.verify.then_some(true);
                    let guest = self.guest.clone();
                    blocking(move || guest.committed()).await;
                    give_up = tokio::time::Instant::now() + self.settings.handover_timeout;
                    self.go_said = true;
                    // A queue that is closed tells itself: the sender's failure follows, and counts as after Go.
                    let _told_by_its_failure = flow.say(&Message::Go(self.was)).await;
                }
                SourceStep::TooLate => {
                    let what = "cancel comes too late: the destination may run the guest already";
                    self.observers.tell(&Event::Warning(what.into()));
                }
                SourceStep::End(verdict) => {
                    self.parts.handover = phase_began.elapsed();
                    return Ok(verdict);
                }
            }
        }
    }

    /// What a signal means to the last handshake; `None` if nothing.
    async fn happening(&mut self, flow: &mut Flow, signal: Signal) -> Option<Happening> {
        match signal {
            Signal::Said(Message::Progress(acknowledged)) => match self.acknowledge(flow, &acknowledged) {
                Ok(()) => None,
                Err(error) => Some(Happening::Broke(error.to_string())),
            },
            Signal::Said(message) => Some(Happening::Said(message)),
            Signal::Lost(why) => Some(Happening::Lost(why)),
            Signal::Broke(failure) => Some(match flow.last_words(failure).await {
                Ok(words) => Happening::Said(words),
                Err(cause) => Happening::Broke(cause.to_string()),
            }),
            Signal::Cancel => Some(Happening::Cancel),
            Signal::Scanned(_) | Signal::Synced(_) | Signal::Sent(_) | Signal::StageDone(_) | Signal::Tick => None,
        }
    }

    /// The destination sent its hashes of a stretch that differs: finds the first page that does.
    async fn name_page(&mut self, message: &Message) {
        let Message::PageHashes { first, hashes } = message else { return };
        let (memory, first, hashes) = (self.memory.clone(), *first, hashes.clone());
        let found = blocking(move || digests::first_differing_page(&memory, first, &hashes)).await;
        let layout = self.layout();
        self.differing_page = Some(match found {
            Ok(Some(at)) => describe_page(layout, at),
            Ok(None) => "no page differs any more: the memory of one side changes while it is paused".into(),
            Err(error) => format!("the differing page cannot be named: {error}"),
        });
    }

    /// A file has no return path: its end mark on disk and its rename stand for Go.
    async fn complete_file(&mut self, flow: &mut Flow) -> Result<Verdict, MigrationError> {
        let began = Instant::now();
        if self.settings.after == Some(After::Pause) {
            let guest = self.guest.clone();
            blocking(move || guest.committed()).await;
        }
        if flow.graph.control[0].put(Control::Finish).await.is_err() {
            return Err(self.broken(flow).await);
        }
        loop {
            match flow.next().await {
                Signal::StageDone(name) if name.starts_with("sender") => break,
                Signal::Broke(failure) => return Err(flow.explain(failure).await),
                Signal::Cancel => {
                    let what = "cancel comes too late: the file is being completed";
                    self.observers.tell(&Event::Warning(what.into()));
                }
                _ => {}
            }
        }
        self.parts.handover = began.elapsed();
        Ok(Verdict::Completed)
    }

    /// Whatever happened: the guest is where the verdict says, the logs are stopped, the peer is told, and it is reported.
    async fn conclude(mut self, mut verdict: Verdict, flow: Option<Flow>) -> Ended {
        let stays_paused = match verdict {
            Verdict::Completed => self.settings.after != Some(After::Resume),
            Verdict::Unconfirmed(_) => true,
            Verdict::Failed(_) | Verdict::Cancelled => false,
        };
        self.downtime = self.paused.filter(|_| verdict == Verdict::Completed).map(|paused| paused.elapsed());
        let resume_error = if stays_paused { None } else { self.let_go_on().await };
        if let (Verdict::Failed(why), Some(page)) = (&mut verdict, &self.differing_page) {
            *why = format!("{why}: {page}");
            self.verified = Some(false);
        }
        let figures = self.figures(flow.as_ref());
        if let Some(mut flow) = flow {
            self.say_farewell(&mut flow, &verdict).await;
            flow.graph.end().await;
        }
        self.stop_logs().await;
        self.ended(verdict, resume_error, figures)
    }

    /// Resumes the guest if we paused it: what went wrong, if it does not go on.
    async fn let_go_on(&mut self) -> Option<String> {
        self.paused?;
        let (guest, released, run) = (self.guest.clone(), self.released, self.was == RunState::Running);
        let go_on = move || {
            if released {
                guest.reacquire()?;
            }
            if run { guest.resume() } else { Ok(()) }
        };
        let went_on = guarded(async { Ok(blocking(go_on).await?) }).await;
        match went_on {
            Ok(()) => {
                self.observers.tell(&Event::Resumed);
                None
            }
            Err(error) => Some(format!("the guest could not be resumed here and stays paused: {error}")),
        }
    }

    async fn stop_logs(&self) {
        let logs = self.logs.clone();
        // Each of them, whatever becomes of the others.
        for log in logs {
            let stop = move || log.stop().map_err(|error| MigrationError::Log { doing: "stop", error });
            if let Err(error) = guarded(blocking(stop)).await {
                self.observers.tell(&Event::Warning(error.to_string()));
            }
        }
    }

    /// Tells the destination why there will be no Go, if there will be none.
    async fn say_farewell(&self, flow: &mut Flow, verdict: &Verdict) {
        let reason = match verdict {
            Verdict::Completed | Verdict::Unconfirmed(_) => None,
            Verdict::Failed(why) => Some(why.clone()),
            Verdict::Cancelled => Some("cancelled at the source".into()),
        };
        if self.transport.capabilities().return_path {
            flow.close(reason.map(Message::Abort), FAREWELL).await;
        }
    }

    fn figures(&self, flow: Option<&Flow>) -> Figures {
        let Some(flow) = flow else { return Figures::default() };
        let bitmaps: Vec<_> = self.bitmap.iter().map(Arc::as_ref).collect();
        Figures {
            wire_bytes: wire_bytes(flow),
            memory_peak: bounds::peak(&flow.graph.pools, 0, &bitmaps),
            stages: flow.graph.meters.iter().map(|meter| meter.read()).collect(),
        }
    }

    fn ended(self, verdict: Verdict, resume_error: Option<String>, figures: Figures) -> Ended {
        let resume_failed = resume_error.is_some();
        let (phase, error) = match verdict {
            Verdict::Completed => (Phase::Completed, None),
            Verdict::Failed(why) => (Phase::Failed, Some(why)),
            Verdict::Cancelled => (Phase::Cancelled, Some("cancelled".into())),
            Verdict::Unconfirmed(why) => (Phase::Unconfirmed, Some(format!("{why}; {LOOK}"))),
        };
        let error = [error, resume_error].into_iter().flatten().reduce(|all, more| format!("{all}; {more}"));
        self.tell_phase(phase);
        let ended = Ended {
            phase,
            error,
            verified: self.verified,
            total: self.started.elapsed(),
            setup: self.setup,
            downtime: self.downtime,
            parts: self.parts,
            wire_bytes: figures.wire_bytes,
            memory_peak: figures.memory_peak,
            stages: figures.stages,
            resume_failed,
        };
        self.observers.tell(&Event::Ended(ended.clone()));
        ended
    }
}

/// What an operator does about a hand-over that nobody confirmed.
const LOOK: &str = "the guest stays paused here: look at the destination; resume it here only if it does not run there";

#[derive(Default)]
struct Figures {
    wire_bytes: u64,
    memory_peak: u64,
    stages: Vec<memferry_stages::meter::Reading>,
}

fn wire_bytes(flow: &Flow) -> u64 {
    flow.graph.sender_meters.iter().map(|meter| meter.bytes()).sum()
}

fn unexpected(signal: &Signal) -> MigrationError {
    MigrationError::Protocol(format!("{signal:?} came out of turn"))
}

fn describe_page(layout: &Layout, at: PageAt) -> String {
    let block = &layout.blocks()[at.block as usize];
    let offset = at.page * layout.page_size().bytes() as u64;
    format!("the first page that differs is page {} of block {:?}, at byte {offset:#x}", at.page, block.id)
}
