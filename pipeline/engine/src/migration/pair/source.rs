//! The source's world as a model.

use std::time::Duration;

use memferry_stages::batch::Mark;
use memferry_stages::bitmap_sync::Synced;
use memferry_stages::scanner::{RoundScanned, ScanOrder};
use memferry_stages::sender::Sent;
use memferry_stages::tally::RoundTally;
use memferry_stages::wire::Message;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::link::{Found, Packet, Port};
use super::memory::{Frame, PAGE_BYTES, PAGES, SourceMemory};
use super::script::{Fault, Faults, Scene};
use super::{Checked, Truth, change, guest_error, lie, mistake, silence};
use crate::control::{Ask, Request};
use crate::controller::forecast::Standing;
use crate::events::Role;
use crate::migration::course::source::{Action, Input, SourceCourse};
use crate::migration::driver::World;
use crate::migration::error::{Failure, Loss, MigrationError};

const MS: Duration = Duration::from_millis(1);
/// Pages that are read at once.
const CHUNK: usize = 8;
/// How often figures are taken.
const TICK: Duration = Duration::from_millis(100);

/// What happens by itself after a time.
#[derive(Debug)]
enum Timed {
    Tick,
    Chunk,
    Scanned(u32),
    Sent(Sent),
    Synced(Synced),
    Digested,
    /// The destination has not answered in time.
    NotAnswered,
}

/// How far the destination is reached.
#[derive(Debug, PartialEq)]
enum Reach {
    Accept,
    Ready(Instant),
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

#[derive(Debug)]
pub(super) struct SourceModel {
    pub(super) truth: Truth,
    pub(super) faults: Faults,
    pub(super) port: Port,
    pub(super) memory: SourceMemory,
    scene: Scene,
    begun: Instant,
    timers: Vec<(Instant, Timed)>,
    reach: Reach,
    scan: Option<Scan>,
    /// Pages sent and loaded.
    sent: u64,
    loaded: u64,
    bulk_bytes: u64,
    stop: Option<Duration>,
    paused: bool,
    /// What a paused guest has waited for.
    waited_for: Vec<String>,
    state_sent: bool,
    digests_begun: bool,
}

impl SourceModel {
    pub(super) fn new(truth: Truth, faults: Faults, port: Port, memory: SourceMemory, scene: Scene) -> Self {
        Self {
            truth,
            faults,
            port,
            memory,
            scene,
            begun: Instant::now(),
            timers: Vec::new(),
            reach: Reach::Accept,
            scan: None,
            sent: 0,
            loaded: 0,
            bulk_bytes: 0,
            stop: None,
            paused: false,
            waited_for: Vec::new(),
            state_sent: false,
            digests_begun: false,
        }
    }

    fn after(&mut self, time: Duration, what: Timed) {
        self.timers.push((Instant::now() + time, what));
    }

    fn earliest(&self) -> Option<(usize, Instant)> {
        self.timers.iter().enumerate().map(|(index, (at, _))| (index, *at)).min_by_key(|&(index, at)| (at, index))
    }

    /// The guest writes up to now.
    fn write(&mut self) {
        let (runs, share) = {
            let shared = self.truth.lock().unwrap();
            (shared.source_runs, 1.0 - f64::from(shared.throttled) / 100.0)
        };
        self.memory.write(self.begun.elapsed(), runs, share);
    }

    fn standing(&self) -> Standing {
        Standing {
            elapsed: self.begun.elapsed(),
            dirty_pages: self.memory.dirty_pages(),
            cached_pages: self.memory.cached_pages(),
            in_flight_pages: self.sent.saturating_sub(self.loaded),
            page_rate: 1 << 20,
        }
    }

    /// A message from the destination.
    fn received(&mut self, message: Message) -> Option<Input> {
        let message = match self.faults.lie.take() {
            Some(number) => lie(number),
            None => message,
        };
        match (&self.reach, message) {
            (Reach::Accept, Message::Accept) => {
                self.port.send(0, Packet::Message(Message::Blocks(Vec::new())), 100);
                self.reach = Reach::Ready(Instant::now());
                None
            }
            (&Reach::Ready(asked), Message::Ready) => {
                self.reach = Reach::Reached;
                self.timers.retain(|(_, timed)| !matches!(timed, Timed::NotAnswered));
                Some(Input::Connected(asked.elapsed()))
            }
            (Reach::Reached, Message::Progress(progress)) => {
                self.loaded = progress.bytes.min(self.sent);
                Some(Input::Acknowledged(self.sent - self.loaded))
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
            Found::Packet(_) => None,
            Found::Lost => Some(Input::Failed(MigrationError::Lost(Loss::ReaderEnded))),
            Found::Silent => Some(Input::Failed(MigrationError::Silent(silence(Role::Destination)))),
        }
    }

    fn timed(&mut self, timed: Timed) -> Option<Input> {
        match timed {
            Timed::Tick => {
                self.after(TICK, Timed::Tick);
                Some(Input::Tick { standing: self.standing(), bulk_bytes: self.bulk_bytes })
            }
            Timed::Chunk => {
                self.chunk();
                None
            }
            Timed::Scanned(round) => Some(Input::Scanned(RoundScanned { round, pages: 0 })),
            Timed::Sent(sent) => Some(Input::Sent(sent, MS)),
            Timed::Synced(mut found) => {
                self.write();
                found.dirty_pages = self.memory.sync();
                Some(Input::Synced { found, standing: self.standing() })
            }
            Timed::Digested => Some(Input::Digested),
            Timed::NotAnswered => Some(Input::Failed(MigrationError::TimedOut("no answer".into()))),
        }
    }

    /// Reads and sends the next pages of every lane.
    fn chunk(&mut self) {
        let stalled = self.truth.lock().unwrap().stalled_until;
        if let Some(until) = stalled.filter(|until| *until > Instant::now()) {
            return self.timers.push((until, Timed::Chunk));
        }
        self.write();
        let Some(mut scan) = self.scan.take() else { return };
        let (lanes, deltas) = (self.scene.lanes, scan.order.round > 1);
        let mut left = Instant::now();
        for lane in 0..lanes {
            let pages = (scan.next..scan.next + CHUNK).filter(|page| page % usize::from(lanes) == usize::from(lane));
            let frames = self.memory.take(pages, deltas);
            if frames.is_empty() {
                continue;
            }
            let bytes = frames.iter().map(Frame::bytes).sum();
            let tally = &mut scan.tallies[usize::from(lane)];
            tally.batches += 1;
            tally.pages.all += frames.len() as u64;
            tally.pages.xbzrle += frames.iter().filter(|frame| frame.reference.is_some()).count() as u64;
            tally.pages.raw += frames.iter().filter(|frame| frame.reference.is_none()).count() as u64;
            tally.pages.bytes_in += frames.len() as u64 * PAGE_BYTES;
            tally.pages.bytes_out += bytes;
            self.sent += frames.len() as u64;
            self.bulk_bytes += bytes;
            left = left.max(self.port.send(usize::from(lane % 2), Packet::Pages(frames), bytes));
        }
        scan.next += CHUNK;
        if scan.next < PAGES {
            self.timers.push((left + MS / 4, Timed::Chunk));
            self.scan = Some(scan);
            return;
        }
        self.timers.push((left, Timed::Scanned(scan.order.round)));
        for (lane, tally) in (0..lanes).zip(scan.tallies) {
            let connection = usize::from(lane % 2);
            let left = self.port.send(connection, Packet::RoundComplete, 60);
            self.timers.push((left, Timed::Sent(Sent { lane, mark: Mark::RoundComplete(tally) })));
            if scan.ends_lanes {
                let left = self.port.send(connection, Packet::LaneOver, 20);
                self.timers.push((left, Timed::Sent(Sent { lane, mark: Mark::LaneEnds })));
            }
        }
    }

    /// What a fault does. Returns the input if it is one.
    fn fault(&mut self, fault: Fault) -> Option<Input> {
        match fault {
            Fault::Cut => self.port.cut(),
            Fault::Mute => self.port.mute(),
            Fault::Cancel => return Some(Input::Cancel),
            Fault::SwitchOver => {
                let (answer, _) = oneshot::channel();
                let request = Request { ask: Ask::SwitchOver, answer };
                return Some(Input::Asked { request, standing: self.standing() });
            }
            Fault::Stop(seconds) => self.stop = Some(Duration::from_secs(seconds.into())),
            Fault::StageFails => {
                let stage = memferry_stages::stage_id::StageId::SCANNER;
                return Some(Input::Broke(Failure::Panicked { stage, panic: "a fault".into() }));
            }
            Fault::Mistake => mistake(),
            Fault::Stall(_) | Fault::CallFails | Fault::CallPanics | Fault::Lie(_) => {}
        }
        None
    }

    fn require(&self, holds: bool, what: &str) {
        if !holds {
            self.truth.lock().unwrap().violations.push(what.into());
        }
    }

    /// A paused guest waits for one sync, and for no measurement.
    fn note_waste(&mut self, what: &str) {
        if !self.paused {
            return;
        }
        self.waited_for.push(what.to_owned());
        let what = format!("the paused guest waits while the source {:?}", self.waited_for);
        self.require(self.waited_for == ["syncs"], &what);
    }

    /// The guest is called: it takes a while, or fails.
    async fn call(&mut self, takes: Duration) -> Result<(), MigrationError> {
        tokio::time::sleep(takes).await;
        match self.faults.call.take() {
            Some(Fault::CallPanics) => Err(MigrationError::Mistake("the guest panics".into())),
            Some(_) => Err(guest_error()),
            None => Ok(()),
        }
    }

    async fn act(&mut self, action: Action) -> Result<Option<Input>, MigrationError> {
        Ok(match action {
            Action::Notify(_) | Action::ReportChange { .. } => None,
            Action::Answer(answer, result) => {
                drop(answer.send(result));
                None
            }
            Action::Connect => {
                self.port.send(0, Packet::Hello, 100);
                self.after(Duration::from_secs(20), Timed::NotAnswered);
                None
            }
            Action::Arm => {
                self.call(3 * MS).await?;
                Some(Input::Armed)
            }
            Action::Measure => {
                self.note_waste("measures digests");
                tokio::time::sleep(MS).await;
                Some(Input::Measured(MS))
            }
            Action::StartStages(_) => {
                self.after(Duration::ZERO, Timed::Tick);
                None
            }
            Action::Scan(order) => {
                let tallies = vec![RoundTally::new(order.round, order.kind); usize::from(self.scene.lanes)];
                self.scan = Some(Scan { order, next: 0, tallies, ends_lanes: false });
                self.after(MS / 10, Timed::Chunk);
                None
            }
            Action::EndLanes => {
                self.scan.as_mut().expect("a round is scanned").ends_lanes = true;
                None
            }
            Action::Sync { after_round } => {
                self.note_waste("syncs");
                let found = Synced { after_round, dirty_pages: 0, duration: MS };
                self.after(MS, Timed::Synced(found));
                None
            }
            Action::Throttle(percent, answer) => {
                let throttled = self.call(MS).await;
                if throttled.is_ok() {
                    self.write();
                    self.truth.lock().unwrap().throttled = percent;
                }
                answer.map(|answer| answer.send(Ok(())));
                Some(Input::Throttled(throttled))
            }
            Action::Pause => {
                self.call(2 * MS).await?;
                self.write();
                change(&self.truth, |shared| shared.source_runs = false);
                self.paused = true;
                Some(Input::Paused)
            }
            Action::Save => {
                self.call(MS).await?;
                Some(Input::Saved)
            }
            Action::Release => {
                self.call(MS).await?;
                Some(Input::Released)
            }
            Action::SendState => {
                self.state_sent = true;
                None
            }
            Action::StartDigests => {
                self.digests_begun = true;
                None
            }
            Action::AwaitDigests => {
                self.require(self.digests_begun, "digests are awaited that were not begun");
                self.after(2 * MS, Timed::Digested);
                None
            }
            Action::SendDigests => {
                self.port.send(0, Packet::Digests(self.memory.versions().to_vec()), 200);
                None
            }
            Action::SendEnd { run_state, frames } => {
                self.require(self.state_sent, "the stream ends without device state");
                self.port.send(0, Packet::Message(Message::End { run_state, frames }), 20);
                Some(Input::EndSent)
            }
            Action::NamePage(_) => Some(Input::PageNamed("page 7".into())),
            Action::Commit => {
                self.call(MS).await?;
                self.truth.lock().unwrap().committed = true;
                Some(Input::Committed)
            }
            Action::Go(run_state) => {
                self.truth.lock().unwrap().go_left = true;
                self.port.send(0, Packet::Message(Message::Go(run_state)), 20);
                None
            }
            Action::Resume { run, .. } => {
                let resumed = self.call(MS).await;
                if resumed.is_ok() && run {
                    change(&self.truth, |shared| shared.source_runs = true);
                }
                Some(Input::Resumed(resumed))
            }
            Action::LiftThrottle => {
                self.write();
                self.truth.lock().unwrap().throttled = 0;
                None
            }
            Action::Explain(failure) => Some(Input::Failed(MigrationError::Stage(failure))),
            Action::AcknowledgeAll
            | Action::OpenHints { .. }
            | Action::CloseHints
            | Action::SetBandwidth(_)
            | Action::SetCache(_)
            | Action::Finish
            | Action::Moved => None,
        })
    }
}

impl World<Checked<SourceCourse>> for SourceModel {
    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    async fn next(&mut self, _: &Checked<SourceCourse>) -> Input {
        loop {
            if let Some(fault) = self.faults.due() {
                if let Some(input) = self.fault(fault) {
                    self.faults.stepped();
                    return input;
                }
                continue;
            }
            let earliest = self.earliest();
            let input = tokio::select! {
                biased;
                () = sleep_until(earliest) => {
                    let (index, _) = earliest.expect("it is what was waited for");
                    let (_, timed) = self.timers.remove(index);
                    self.timed(timed)
                }
                found = self.port.next() => self.found(found),
            };
            if let Some(input) = input {
                self.faults.stepped();
                return input;
            }
        }
    }

    async fn perform(&mut self, action: Action, _: &Checked<SourceCourse>) -> Option<Input> {
        while let Some(fault) = self.faults.due_in_action() {
            drop(self.fault(fault));
        }
        self.faults.stepped();
        if let Some(time) = self.stop.take() {
            self.port.stands_still(time);
            tokio::time::sleep(time).await;
        }
        self.act(action).await.unwrap_or_else(|error| Some(Input::Failed(error)))
    }
}

/// Never returns without a moment.
pub(super) async fn sleep_until(moment: Option<(usize, Instant)>) {
    match moment {
        Some((_, at)) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Has the action an answer?
pub(super) fn is_question(action: &Action) -> bool {
    matches!(
        action,
        Action::Arm
            | Action::Measure
            | Action::Throttle(..)
            | Action::Pause
            | Action::Save
            | Action::Release
            | Action::SendEnd { .. }
            | Action::NamePage(_)
            | Action::Commit
            | Action::Resume { .. }
            | Action::Explain(_)
    )
}
