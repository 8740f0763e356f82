//! The source's world as a model.

use std::time::Duration;

use memferry_stages::batch::{Mark, RoundKind};
use memferry_stages::bitmap_sync::Synced;
use memferry_stages::geometry::PageAt;
use memferry_stages::scanner::{RoundScanned, ScanOrder};
use memferry_stages::sender::Sent;
use memferry_stages::stage_id::StageId;
use memferry_stages::tally::RoundTally;
use memferry_stages::wire::Message;
use memferry_stages::wire::messages::Resume;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::end::{End, Happened};
use super::link::{Found, Packet, Port};
use super::memory::{PAGES, SourceMemory, count};
use super::requests::Requests;
use super::script::{Fault, Scene};
use super::{Checked, change, lie, make_link, silence};
use crate::control::Request;
use crate::controller::forecast::{Standing, Work};
use crate::events::Role;
use crate::migration::course::source::{Action, Connected, Input, Returned, SourceCourse};
use crate::migration::driver::World;
use crate::migration::error::{Failure, Loss, MigrationError};
use crate::settings::SourceSettings;

const MS: Duration = Duration::from_millis(1);
/// Pages that are read at once.
const CHUNK: usize = 8;
/// How often figures are taken.
const TICK: Duration = Duration::from_millis(100);
/// How long the operator waits for a connection that is lost in postcopy.
pub(super) const PATIENCE: Duration = Duration::from_secs(900);

/// What happens by itself after a time.
#[derive(Debug)]
pub(super) enum Timed {
    Tick,
    Chunk,
    Scanned(u32),
    Sent(Sent),
    Synced(Synced),
    Digested,
    /// A stream that is stored has a place.
    Opened,
    FileComplete,
    /// The destination has not answered in time.
    NotAnswered,
    /// It is not reached again.
    NotReached,
}

/// How far the destination is reached.
#[derive(Debug, PartialEq)]
enum Reach {
    Accept,
    Ready(Instant),
    /// After a lost connection: it is to say what it has, and then that it is ready.
    Resume(Option<Resume>),
    Reached,
}

/// A round that is scanned.
#[derive(Debug)]
struct Scan {
    order: ScanOrder,
    /// The next page of each lane.
    next: usize,
    tallies: Vec<RoundTally>,
    /// Whether the lanes end behind it.
    ends_lanes: bool,
}

/// A switch to postcopy.
#[derive(Debug, Default)]
struct Switch {
    /// The pages that were named to be discarded.
    named: Option<Vec<bool>>,
    /// Are pages served that are asked for?
    serves: bool,
    /// Those that were sent since they were asked for.
    urgent: Vec<usize>,
    /// What a destination that runs the guest says it holds.
    received: Option<Vec<bool>>,
    /// Since when there is no connection.
    lost_since: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct SourceModel {
    pub(super) end: End<Timed>,
    pub(super) memory: SourceMemory,
    scene: Scene,
    reach: Reach,
    scan: Option<Scan>,
    /// Where the destination finds a link that is made again, with its attempt.
    returns: mpsc::UnboundedSender<(u32, Port)>,
    /// The pages of each frame of the attempt, by lane.
    frames: Vec<Vec<Vec<usize>>>,
    /// Pages sent and loaded.
    sent: u64,
    loaded: u64,
    bulk_bytes: u64,
    pause_called: bool,
    paused: bool,
    /// What a paused guest has waited for.
    waited_for: Vec<String>,
    state_sent: bool,
    end_sent: bool,
    digests_begun: bool,
    pub(super) requests: Requests,
    /// Has a call failed that throttles the guest?
    throttle_failed: bool,
    /// May hints come?
    pub(super) window_is_open: bool,
    /// How long the destination waits for this source.
    awaited: Duration,
    /// Was a cancel delivered?
    pub(super) cancelled: bool,
    released: bool,
    switch: Switch,
    /// Were digests measured since the last round began?
    measured: bool,
    /// How often the guest was reported to be elsewhere.
    pub(super) moved: u32,
    /// How often the guest was put to run again.
    pub(super) resumed: u32,
}

impl SourceModel {
    pub(super) fn new(
        end: End<Timed>,
        memory: SourceMemory,
        scene: Scene,
        settings: SourceSettings,
        returns: mpsc::UnboundedSender<(u32, Port)>,
    ) -> Self {
        Self {
            end,
            memory,
            scene,
            reach: Reach::Accept,
            scan: None,
            returns,
            frames: vec![Vec::new(); usize::from(scene.lanes)],
            sent: 0,
            loaded: 0,
            bulk_bytes: 0,
            pause_called: false,
            paused: false,
            waited_for: Vec::new(),
            state_sent: false,
            end_sent: false,
            digests_begun: false,
            requests: Requests::new(settings),
            throttle_failed: false,
            window_is_open: false,
            awaited: Duration::ZERO,
            cancelled: false,
            released: false,
            switch: Switch::default(),
            measured: false,
            moved: 0,
            resumed: 0,
        }
    }

    /// The guest writes up to now.
    fn write(&mut self) {
        let shared = self.end.truth.lock().unwrap();
        self.memory.write(self.end.now(), shared.source_runs, shared.throttled);
    }

    fn standing(&self) -> Standing {
        Standing {
            elapsed: self.end.now(),
            dirty_pages: self.memory.dirty_pages(),
            cached_pages: self.memory.cached_pages(),
            in_flight_pages: self.sent.saturating_sub(self.loaded),
            page_rate: 1 << 20,
        }
    }

    /// A message from the destination.
    fn received(&mut self, message: Message) -> Option<Input> {
        let message = match self.end.faults.lie.take() {
            Some(number) => lie(number),
            None => message,
        };
        match (&self.reach, message) {
            (Reach::Accept, Message::Accept { waits_ms }) => {
                self.awaited = Duration::from_millis(waits_ms);
                self.end.port.send(0, Packet::Message(Message::Blocks(Vec::new())), 100);
                self.reach = Reach::Ready(Instant::now());
                None
            }
            (&Reach::Ready(asked), Message::Ready) => {
                self.reach = Reach::Reached;
                self.end.forget(|timed| matches!(timed, Timed::NotAnswered));
                Some(Input::Connected(Connected { answered_in: asked.elapsed(), awaited: self.awaited }))
            }
            (Reach::Resume(None), Message::Resume(resume)) => {
                self.reach = Reach::Resume(Some(resume));
                None
            }
            (Reach::Resume(Some(resume)), Message::Ready) => {
                let resume = resume.clone();
                self.reach = Reach::Reached;
                self.end.forget(|timed| matches!(timed, Timed::NotReached));
                Some(Input::Returned(self.put_back(&resume)))
            }
            (Reach::Reached, Message::PageRequest(page)) => {
                self.serve(page);
                None
            }
            (Reach::Resume(_), message @ Message::Abort(_)) => Some(Input::Received(message)),
            (Reach::Resume(_), Message::Heartbeat(_)) => None,
            (Reach::Resume(_), other) => Some(self.not_reached(MigrationError::Protocol(format!("{other:?}")))),
            (Reach::Reached, Message::Progress(progress)) => {
                self.loaded = progress.bytes.min(self.sent);
                let frames = progress.frames.iter().sum();
                Some(Input::Acknowledged { in_flight: self.sent - self.loaded, frames })
            }
            (Reach::Reached, message) => Some(Input::Received(message)),
            (_, Message::Refused(why)) => Some(Input::Failed(MigrationError::Refused { peer: Role::Destination, why })),
            (_, Message::Abort(why)) => Some(Input::Failed(MigrationError::GivenUp { peer: Role::Destination, why })),
            (_, other) => Some(Input::Failed(MigrationError::Protocol(format!("{other:?}")))),
        }
    }

    fn found(&mut self, found: Found) -> Option<Input> {
        match found {
            Found::Packet(Packet::Message(message)) => self.received(message),
            Found::Packet(Packet::Received(pages)) => {
                self.switch.received = Some(pages);
                None
            }
            Found::Packet(_) => None,
            Found::Lost | Found::Silent if matches!(self.reach, Reach::Resume(_)) => {
                Some(self.not_reached(MigrationError::Lost(Loss::ReaderEnded)))
            }
            Found::Lost => Some(Input::Failed(MigrationError::Lost(Loss::ReaderEnded))),
            Found::Silent => Some(Input::Failed(MigrationError::Silent(silence(Role::Destination)))),
        }
    }

    fn timed(&mut self, timed: Timed) -> Option<Input> {
        match timed {
            Timed::Tick => {
                // A long outage takes few steps.
                let is_reached = matches!(self.reach, Reach::Reached);
                self.end.after(if is_reached { TICK } else { 20 * TICK }, Timed::Tick);
                if self.gives_up() {
                    self.cancelled = true;
                    return Some(Input::Cancel);
                }
                Some(Input::Tick { standing: self.standing(), bulk_bytes: self.bulk_bytes })
            }
            Timed::Chunk => {
                self.chunk();
                None
            }
            Timed::Scanned(round) => Some(Input::Scanned(RoundScanned { round, pages: 0 })),
            Timed::Sent(sent) => Some(Input::Sent(sent, Work { busiest: MS, sending: None })),
            Timed::Synced(mut found) => {
                self.write();
                found.dirty_pages = self.memory.sync();
                Some(Input::Synced { found, standing: self.standing() })
            }
            Timed::Digested => Some(Input::Digested),
            Timed::Opened => Some(Input::Connected(Connected { answered_in: Duration::ZERO, awaited: Duration::ZERO })),
            Timed::NotReached => Some(self.not_reached(MigrationError::TimedOut("no answer".into()))),
            Timed::FileComplete => Some(Input::FileComplete),
            Timed::NotAnswered => Some(Input::Failed(MigrationError::TimedOut("no answer".into()))),
        }
    }

    /// Reads and sends the next pages of every lane.
    fn chunk(&mut self) {
        let stalled = self.end.truth.lock().unwrap().stalled_until;
        if let Some(until) = stalled.filter(|until| *until > Instant::now()) {
            return self.end.at(until, Timed::Chunk);
        }
        self.write();
        let Some(mut scan) = self.scan.take() else { return };
        let lanes = self.scene.lanes;
        let deltas = scan.order.round > 1 && self.switch.named.is_none();
        let mut left = Instant::now();
        for lane in 0..lanes {
            let pages = (scan.next..scan.next + CHUNK).filter(|page| page % usize::from(lanes) == usize::from(lane));
            let frames = self.memory.take(pages, deltas);
            if frames.is_empty() {
                continue;
            }
            let tally = &mut scan.tallies[usize::from(lane)];
            tally.batches += 1;
            let bytes = count(&frames, &mut tally.pages);
            self.sent += frames.len() as u64;
            self.bulk_bytes += bytes;
            self.frames[usize::from(lane)].push(frames.iter().map(|frame| frame.page).collect());
            left = left.max(self.end.port.send(usize::from(lane % 2), Packet::Pages(lane, frames), bytes));
        }
        scan.next += CHUNK;
        if scan.next < PAGES {
            self.end.at(left + MS / 4, Timed::Chunk);
            self.scan = Some(scan);
            return;
        }
        self.end.at(left, Timed::Scanned(scan.order.round));
        for (lane, tally) in (0..lanes).zip(scan.tallies) {
            let connection = usize::from(lane % 2);
            let left = self.end.port.send(connection, Packet::RoundComplete, 60);
            self.end.at(left, Timed::Sent(Sent { lane, mark: Mark::RoundComplete(tally) }));
            if scan.ends_lanes {
                let left = self.end.port.send(connection, Packet::LaneOver, 20);
                self.end.at(left, Timed::Sent(Sent { lane, mark: Mark::LaneEnds }));
            }
        }
    }

    /// A try to reach the destination again has failed.
    fn not_reached(&mut self, why: MigrationError) -> Input {
        self.end.forget(|timed| matches!(timed, Timed::NotReached));
        self.end.port.end();
        Input::NotReached(why)
    }

    /// Sends a page that is asked for, unless somebody else has.
    fn serve(&mut self, page: PageAt) {
        if !self.switch.serves {
            return;
        }
        let frames = self.memory.take(usize::try_from(page.page).into_iter(), false);
        if let Some(frame) = frames.first() {
            self.switch.urgent.push(frame.page);
            let bytes = frame.bytes();
            self.end.port.send(1, Packet::Urgent(frames), bytes);
        }
    }

    /// The operator gives a destination up that has not been reached for long.
    fn gives_up(&self) -> bool {
        let waited = self.switch.lost_since.map_or(Duration::ZERO, |since| since.elapsed());
        self.switch.named.is_some() && waited > PATIENCE
    }

    /// What the destination has not loaded is dirty again.
    fn put_back(&mut self, resume: &Resume) -> Returned {
        self.switch.lost_since = None;
        if resume.started && self.switch.named.is_some() {
            let received = self.switch.received.take().unwrap_or_default();
            self.frames.iter_mut().for_each(Vec::clear);
            self.memory.set_dirty((0..PAGES).map(|page| !received.get(page).copied().unwrap_or(true)).collect());
            return Returned { started: true, put_back_pages: 0 };
        }
        self.switch.named = None;
        let urgent = std::mem::take(&mut self.switch.urgent);
        self.memory.put_back(urgent.into_iter());
        let mut put_back_pages = 0;
        for (lane, frames) in self.frames.iter_mut().enumerate() {
            let loaded = resume.frames.get(lane).and_then(|&frames| usize::try_from(frames).ok());
            let loaded = loaded.unwrap_or(0).min(frames.len());
            let lost: Vec<_> = frames.split_off(loaded).into_iter().flatten().collect();
            put_back_pages += lost.len() as u64;
            self.memory.put_back(lost.into_iter());
            frames.clear();
        }
        Returned { started: resume.started, put_back_pages }
    }

    /// The connection is lost: what was begun is over.
    fn end_attempt(&mut self) {
        self.end.port.end();
        self.end.forget(|timed| !matches!(timed, Timed::Tick));
        self.scan = None;
        self.sent = 0;
        self.loaded = 0;
        self.state_sent = false;
        self.end_sent = false;
        self.digests_begun = false;
        self.waited_for.clear();
        self.switch.serves = false;
        self.switch.received = None;
        self.switch.lost_since.get_or_insert_with(Instant::now);
        // No decision follows the sync of a source that returns.
        self.measured = true;
    }

    /// Makes a link again.
    fn reach_again(&mut self, attempt: u32) {
        self.end.forget(|timed| matches!(timed, Timed::NotReached));
        let refused_until = self.end.truth.lock().unwrap().refused_until;
        self.reach = Reach::Resume(None);
        if refused_until.is_some_and(|until| until > Instant::now()) {
            self.end.port.end();
            return self.end.after(MS, Timed::NotReached);
        }
        let [here, there] = make_link(&self.scene);
        self.end.port = here;
        // The destination may be gone: then no answer comes.
        drop(self.returns.send((attempt, there)));
        self.end.after(Duration::from_secs(20), Timed::NotReached);
    }

    /// The input for a fault.
    fn fault(&mut self, fault: Fault) -> Option<Input> {
        match fault {
            Fault::Cancel => {
                self.cancelled = true;
                Some(Input::Cancel)
            }
            Fault::SwitchOver => Some(self.asked(|requests| requests.switch_over())),
            Fault::Set(number) => Some(self.asked(|requests| requests.set(number))),
            _ => Some(Input::Broke(Failure::Panicked { stage: StageId::SCANNER, panic: "a fault".into() })),
        }
    }

    fn asked(&mut self, ask: impl FnOnce(&mut Requests) -> Request) -> Input {
        Input::Asked { request: ask(&mut self.requests), standing: self.standing() }
    }

    /// The answers of the operator, and what must be in force.
    fn check_requests(&mut self, action: &Action, course: &SourceCourse) {
        let settled = self.requests.settle();
        self.end.require_reported(settled);
        if matches!(action, Action::Scan(_) | Action::Save | Action::SendEnd { .. }) {
            let throttled = if self.throttle_failed { 0 } else { self.end.truth.lock().unwrap().throttled };
            self.end.require_reported(self.requests.check(course, throttled));
        }
    }

    /// A paused guest waits for one sync, and for no measurement.
    fn note_waste(&mut self, what: &str) {
        if !self.paused {
            return;
        }
        self.waited_for.push(what.to_owned());
        let what = format!("the paused guest waits while the source {:?}", self.waited_for);
        self.end.require(self.waited_for == ["syncs"], &what);
    }

    /// Performs a question, and returns its answer.
    async fn ask(&mut self, question: Action) -> Result<Input, MigrationError> {
        Ok(match question {
            Action::Arm => {
                self.end.call(3 * MS).await?;
                Input::Armed
            }
            Action::Measure => {
                self.end.require(self.scene.verify, "digests are measured that are not compared");
                self.measured = true;
                self.note_waste("measures digests");
                tokio::time::sleep(MS).await;
                Input::Measured(MS)
            }
            Action::OpenHints { runs } => {
                let guest_runs = self.end.truth.lock().unwrap().source_runs;
                self.end.require(self.scene.hints, "hints are taken of a guest that has none");
                self.end.require(runs == guest_runs, "hints are taken of a paused guest, or not of one that runs");
                self.end.call(MS).await?;
                self.window_is_open = runs;
                Input::HintsOpen
            }
            Action::Throttle(percent, answer) => {
                let throttled = self.end.call(MS).await;
                match throttled {
                    Ok(()) => self.throttle(percent),
                    Err(_) => self.throttle_failed = true,
                }
                answer.map(|answer| answer.send(Ok(())));
                Input::Throttled(throttled)
            }
            Action::Pause => {
                self.pause_called = true;
                self.end.call(2 * MS).await?;
                self.write();
                change(&self.end.truth, |shared| shared.source_runs = false);
                self.paused = true;
                Input::Paused
            }
            Action::Save => {
                let runs = self.end.truth.lock().unwrap().source_runs;
                self.end.require(!runs, "the state of a guest is saved that runs");
                self.end.call(MS).await?;
                Input::Saved
            }
            Action::Release => {
                self.released = true;
                self.end.call(MS).await?;
                Input::Released
            }
            Action::SendState => {
                self.state_sent = true;
                Input::StateSent
            }
            Action::SendEnd { run_state, frames } => {
                self.end.require(run_state == self.scene.was(), "the end mark has another state of the guest");
                self.end.require(self.state_sent, "the stream ends without device state");
                self.end.port.send(0, Packet::Message(Message::End { run_state, frames }), 20);
                self.end_sent = true;
                Input::EndSent
            }
            Action::NamePage(_) => Input::PageNamed("page 7".into()),
            Action::Commit => {
                self.end.call(MS).await?;
                self.end.truth.lock().unwrap().committed = true;
                Input::Committed
            }
            Action::Resume { run, reacquire } => {
                let disturbed = self.end.truth.lock().unwrap().is_disturbed();
                self.end.require(reacquire == self.released || disturbed, "what was released is not reacquired");
                self.end.require(self.pause_called || !run || disturbed, "a guest is resumed that was never paused");
                let resumed = self.end.call(MS).await;
                if resumed.is_ok() && run {
                    self.resumed += 1;
                    change(&self.end.truth, |shared| shared.source_runs = true);
                }
                if resumed.is_ok() {
                    self.pause_called = false;
                    self.paused = false;
                    self.released = false;
                }
                Input::Resumed(resumed)
            }
            Action::Explain(failure) => Input::Failed(MigrationError::Stage(failure)),
            order => unreachable!("{order:?} is no question"),
        })
    }

    /// Performs what has no answer.
    fn order(&mut self, order: Action, course: &SourceCourse) {
        match order {
            Action::Answer(answer, result) => drop(answer.send(result)),
            Action::EndAttempt => self.end_attempt(),
            Action::Return { attempt } => self.reach_again(attempt),
            Action::Connect if !self.scene.return_path => {
                self.end.port.send(0, Packet::Hello, 100);
                self.end.port.send(0, Packet::Message(Message::Blocks(Vec::new())), 100);
                self.end.after(MS, Timed::Opened);
            }
            Action::Connect => {
                self.end.port.send(0, Packet::Hello, 100);
                self.end.after(Duration::from_secs(20), Timed::NotAnswered);
            }
            Action::StartStages(bandwidth) => {
                self.requests.stages_start(bandwidth, course.settings());
                self.end.port.set_cap(bandwidth);
                if course.outages().lost == 0 {
                    self.end.after(Duration::ZERO, Timed::Tick);
                }
            }
            Action::SetBandwidth(bandwidth) => {
                self.requests.set_bandwidth(bandwidth);
                self.end.port.set_cap(bandwidth);
            }
            Action::SetCache(bytes) => self.requests.set_cache(bytes),
            Action::ReportChange { round, from, to } => {
                self.end.require(round == course.round(), "a change is reported for another round");
                self.requests.report(from, to);
            }
            Action::AcknowledgeAll => self.loaded = self.sent,
            Action::Moved => self.moved += 1,
            Action::CloseHints => self.window_is_open = false,
            Action::Finish => {
                let is_stored = !self.scene.return_path && self.end_sent;
                self.end.require(is_stored, "a stream is completed that is not stored, or has no end");
                self.end.after(2 * MS, Timed::FileComplete);
            }
            Action::Scan(order) => {
                let acknowledged = self.scene.return_path || self.loaded == self.sent;
                let is_live = order.kind == RoundKind::Live;
                let guest_runs = self.end.truth.lock().unwrap().source_runs;
                self.end
                    .require(!is_live || guest_runs == self.scene.was_running, "a round is live, and the guest paused");
                let open = self.scene.hints && guest_runs && order.round > 0;
                self.end.require(!is_live || self.window_is_open == open, "hints are not taken in a live round");
                self.measured = false;
                self.end.require(acknowledged, "what is stored counts as in flight");
                let tallies = vec![RoundTally::new(order.round, order.kind); usize::from(self.scene.lanes)];
                self.scan = Some(Scan { order, next: 0, tallies, ends_lanes: false });
                self.end.after(MS / 10, Timed::Chunk);
            }
            Action::CutRound => self.scan.iter_mut().for_each(|scan| scan.next = PAGES),
            Action::EndDirect => {
                self.end.require(self.sent == self.loaded, "a switch begins with pages in flight");
                self.memory.forget();
                for lane in 0..self.scene.lanes {
                    self.end.port.send(usize::from(lane % 2), Packet::DirectEnds, 20);
                }
                let named = self.memory.dirty().to_vec();
                self.switch.named = Some(named.clone());
                self.end.port.send(0, Packet::Missing(named), 60);
                self.end.port.send(0, Packet::Message(Message::Discard), 20);
            }
            Action::Serve => {
                let guest_runs = self.end.truth.lock().unwrap().source_runs;
                self.end.require(!guest_runs, "pages of a guest are served that runs here");
                self.switch.serves = true;
            }
            Action::SendMissing => {
                let named = self.switch.named.clone().unwrap_or_default();
                let more = self.memory.dirty().iter().zip(&named).map(|(dirty, named)| *dirty && !named).collect();
                self.end.port.send(0, Packet::Missing(more), 60);
            }
            Action::EndLanes => self.scan.as_mut().expect("a round is scanned").ends_lanes = true,
            Action::Sync { after_round } => {
                let measured = !self.scene.verify || self.measured || self.paused;
                self.end.require(measured || !self.scene.was_running, "digests were not measured before a decision");
                self.note_waste("syncs");
                self.window_is_open = false;
                let found = Synced { after_round, dirty_pages: 0, duration: MS };
                self.end.after(MS, Timed::Synced(found));
            }
            Action::StartDigests => self.digests_begun = true,
            Action::AwaitDigests => {
                self.end.require(self.digests_begun, "digests are awaited that were not begun");
                self.end.after(2 * MS, Timed::Digested);
            }
            Action::SendDigests => {
                let versions = match self.switch.named {
                    Some(_) => self.memory.clean_versions(),
                    None => self.memory.versions().iter().copied().map(Some).collect(),
                };
                self.end.port.send(0, Packet::Digests(versions), 200);
            }
            Action::Go(run_state) => {
                self.end.require(run_state == self.scene.was(), "Go has another state of the guest");
                self.end.truth.lock().unwrap().go_left = true;
                self.end.port.send(0, Packet::Message(Message::Go(run_state)), 20);
            }
            Action::LiftThrottle => self.throttle(0),
            // What is left is nothing in this model.
            _ => {}
        }
    }

    fn throttle(&mut self, percent: u8) {
        self.write();
        self.end.truth.lock().unwrap().throttled = percent;
    }
}

impl World<Checked<SourceCourse>> for SourceModel {
    fn now(&self) -> Duration {
        self.end.now()
    }

    async fn next(&mut self, _: &Checked<SourceCourse>) -> Input {
        loop {
            let input = match self.end.next().await {
                Happened::Fault(fault) => self.fault(fault),
                Happened::Timed(timed) => self.timed(timed),
                Happened::Found(found) => self.found(found),
            };
            if let Some(input) = input {
                self.end.faults.stepped();
                return input;
            }
        }
    }

    async fn perform(&mut self, action: Action, course: &Checked<SourceCourse>) -> Option<Input> {
        self.end.before_action().await;
        self.check_requests(&action, &course.course);
        if let Action::Notify(event) = &action {
            return self.end.notify(event).err().map(Input::Failed);
        }
        if is_question(&action) {
            return Some(self.ask(action).await.unwrap_or_else(Input::Failed));
        }
        self.order(action, &course.course);
        None
    }
}

/// Has the action an answer?
pub(super) fn is_question(action: &Action) -> bool {
    matches!(
        action,
        Action::Arm
            | Action::Measure
            | Action::OpenHints { .. }
            | Action::Throttle(..)
            | Action::Pause
            | Action::Save
            | Action::Release
            | Action::SendState
            | Action::SendEnd { .. }
            | Action::NamePage(_)
            | Action::Commit
            | Action::Resume { .. }
            | Action::Explain(_)
    )
}
