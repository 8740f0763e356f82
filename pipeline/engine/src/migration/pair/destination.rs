//! The destination's world as a model.

use std::time::Duration;

use fastrand::Rng;
use memferry_stages::geometry::PageAt;
use memferry_stages::stage_id::StageId;
use memferry_stages::wire::Message;
use memferry_stages::wire::messages::{Progress, Resume, RunState};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::end::{End, Happened};
use super::link::{Found, Packet, Port};
use super::memory::{Frame, PAGES, apply};
use super::script::{Fault, Scene};
use super::source::PATIENCE;
use super::{Checked, change, lie, silence};
use crate::events::Role;
use crate::migration::course::destination::{Action, Agreed, DestinationCourse, Input};
use crate::migration::driver::World;
use crate::migration::error::{Failure, Loss, MigrationError};

const MS: Duration = Duration::from_millis(1);
/// How often the source is notified of what is loaded.
const TICK: Duration = Duration::from_millis(20);

/// What happens by itself after a time.
#[derive(Debug)]
pub(super) enum Timed {
    Tick,
    Built,
    Compared,
    /// The source has not described its guest in time.
    NotDescribed,
    /// The source that returned knows what is loaded.
    Rejoined,
    /// A thread of the guest touches memory.
    Touch,
    /// Every page is there.
    Filled,
}

#[derive(Debug)]
pub(super) struct DestinationModel {
    pub(super) end: End<Timed>,
    /// The versions of the pages.
    pub(super) memory: Vec<u32>,
    scene: Scene,
    /// Where a link that is made again comes from, with its attempt; the latest that came; and the attempt that runs.
    returns: mpsc::UnboundedReceiver<(u32, Port)>,
    returned: Option<(u32, Port)>,
    attempt: u32,
    /// Are pages loaded?
    is_running: bool,
    /// Pages and frames loaded.
    loaded: u64,
    frames: Vec<u64>,
    digests: Option<Vec<Option<u32>>>,
    digests_begun: bool,
    /// Were the digests found equal?
    compared: bool,
    switch: Switch,
}

/// A switch to postcopy.
#[derive(Debug)]
struct Switch {
    /// Pages that the source has named, until they are discarded.
    named: Vec<bool>,
    /// Pages that are discarded.
    discarded: Vec<bool>,
    /// Those of them that have not come; set from the registration on.
    missing: Option<Vec<bool>>,
    /// Those that were asked for over this connection.
    asked: Vec<bool>,
    direct_ended: bool,
    is_filled: bool,
    lost_since: Option<Instant>,
    touches: Rng,
}

impl Default for Switch {
    fn default() -> Self {
        let none = || vec![false; PAGES];
        Self {
            named: none(),
            discarded: none(),
            missing: None,
            asked: none(),
            direct_ended: false,
            is_filled: false,
            lost_since: None,
            touches: Rng::with_seed(17),
        }
    }
}

impl DestinationModel {
    pub(super) fn new(end: End<Timed>, scene: Scene, returns: mpsc::UnboundedReceiver<(u32, Port)>) -> Self {
        Self {
            end,
            memory: vec![0; PAGES],
            scene,
            returns,
            returned: None,
            attempt: 1,
            is_running: false,
            loaded: 0,
            frames: vec![0; usize::from(scene.lanes)],
            digests: None,
            digests_begun: false,
            compared: false,
            switch: Switch::default(),
        }
    }

    /// Sends a message, if there is a return path.
    fn send(&mut self, message: Message, bytes: u64) {
        if self.scene.return_path {
            self.end.port.send(0, Packet::Message(message), bytes);
        }
    }

    fn acknowledge(&mut self) {
        let progress = Progress { bytes: self.loaded, frames: self.frames.clone() };
        self.send(Message::Progress(progress), 30);
    }

    fn found(&mut self, found: Found) -> Option<Input> {
        let packet = match found {
            Found::Packet(packet) => packet,
            Found::Lost if self.is_running => return Some(Input::StreamEnded),
            Found::Lost => return Some(Input::Failed(MigrationError::Lost(Loss::ReaderEnded))),
            Found::Silent => return Some(Input::Failed(MigrationError::Silent(silence(Role::Source)))),
        };
        match packet {
            Packet::Hello => Some(Input::Gathered),
            Packet::Pages(lane, frames) => {
                self.frames[usize::from(lane)] += 1;
                self.loaded += frames.len() as u64;
                frames.into_iter().for_each(|frame| self.load(frame));
                None
            }
            Packet::Urgent(frames) => {
                frames.into_iter().for_each(|frame| self.load(frame));
                None
            }
            Packet::DirectEnds => {
                self.switch.direct_ended = true;
                Some(Input::DirectEnded { frames: self.frames.iter().sum() })
            }
            Packet::Missing(pages) => {
                pages.iter().zip(&mut self.switch.named).for_each(|(missing, named)| *named |= missing);
                None
            }
            Packet::Received(_) => None,
            Packet::RoundComplete => {
                self.acknowledge();
                None
            }
            Packet::LaneOver => Some(Input::LaneOver { frames: self.frames.iter().sum() }),
            Packet::Digests(versions) => {
                self.digests = Some(versions);
                None
            }
            Packet::Message(message) => self.received(message),
        }
    }

    /// Writes a page, or places it where it is missing.
    fn load(&mut self, frame: Frame) {
        let loaded = match &mut self.switch.missing {
            None if self.switch.direct_ended => Err("a page follows the end of direct writes".into()),
            None => apply(&mut self.memory, frame),
            Some(_) if !self.switch.discarded[frame.page] => Err(format!("page {} was not missing", frame.page)),
            Some(missing) => {
                // Where it is not, somebody else was faster.
                let is_missing = std::mem::take(&mut missing[frame.page]);
                if is_missing { apply(&mut self.memory, frame) } else { Ok(()) }
            }
        };
        if let Err(violation) = loaded {
            self.end.truth.lock().unwrap().violations.push(violation);
        }
        self.note_filled();
    }

    fn note_filled(&mut self) {
        let is_complete = self.switch.missing.as_ref().is_some_and(|missing| !missing.contains(&true));
        if is_complete && self.is_running && !std::mem::replace(&mut self.switch.is_filled, true) {
            self.end.after(Duration::ZERO, Timed::Filled);
        }
    }

    /// Threads of the guest touch a page, and wait for it if it is missing.
    fn touch(&mut self) {
        let page = self.switch.touches.usize(..PAGES);
        let is_missing = self.switch.missing.as_ref().is_some_and(|missing| missing[page]);
        if is_missing && self.is_running && !std::mem::replace(&mut self.switch.asked[page], true) {
            self.send(Message::PageRequest(PageAt { block: 0, page: page as u64 }), 20);
        }
        if self.switch.missing.is_some() && self.is_running && !self.switch.is_filled {
            self.end.after(MS, Timed::Touch);
        }
    }

    /// Named pages are dropped.
    fn discard(&mut self) {
        for page in 0..PAGES {
            if std::mem::take(&mut self.switch.named[page]) {
                self.switch.discarded[page] = true;
                self.memory[page] = 0;
            }
        }
    }

    /// The operator gives a source up that has not returned for long.
    fn gives_up(&self, course: &DestinationCourse) -> bool {
        let waited = self.switch.lost_since.map_or(Duration::ZERO, |since| since.elapsed());
        course.is_filling() && waited > PATIENCE
    }

    fn received(&mut self, message: Message) -> Option<Input> {
        let message = match self.end.faults.lie.take() {
            Some(number) => lie(number),
            None => message,
        };
        match message {
            Message::Blocks(_) if !self.is_running => {
                self.end.forget(|timed| matches!(timed, Timed::NotDescribed));
                // A stored stream continues at once.
                self.end.reads = self.scene.return_path;
                self.end.after(5 * MS, Timed::Built);
                None
            }
            Message::Abort(why) if !self.is_running => {
                Some(Input::Failed(MigrationError::GivenUp { peer: Role::Source, why }))
            }
            other if !self.is_running => Some(Input::Failed(MigrationError::Protocol(format!("{other:?}")))),
            other => Some(Input::Received(other)),
        }
    }

    fn timed(&mut self, timed: Timed, course: &DestinationCourse) -> Option<Input> {
        match timed {
            Timed::Tick => {
                // A long outage takes few steps.
                self.end.after(if self.is_running { TICK } else { 100 * TICK }, Timed::Tick);
                if course.is_loading() || (course.is_filling() && self.is_running) {
                    self.acknowledge();
                }
                self.gives_up(course).then_some(Input::Cancel)
            }
            Timed::Touch => {
                self.touch();
                None
            }
            Timed::Filled => Some(Input::Filled),
            Timed::Built => {
                if let Err(error) = self.end.called() {
                    return Some(Input::Failed(error));
                }
                self.send(Message::Ready, 20);
                Some(Input::Agreed(self.agreed()))
            }
            Timed::Rejoined => Some(Input::Agreed(self.agreed())),
            Timed::Compared => {
                let equal = self.digests.as_ref() == Some(&self.versions());
                self.compared = equal;
                Some(Input::Compared { equal })
            }
            Timed::NotDescribed => Some(Input::Failed(MigrationError::TimedOut("not described".into()))),
        }
    }

    /// The versions of the pages that are here.
    fn versions(&self) -> Vec<Option<u32>> {
        let is_missing = |page| self.switch.missing.as_ref().is_some_and(|missing| missing[page]);
        // Pages that were placed before Go are not compared either.
        let is_compared = |page: usize| !is_missing(page) && !self.switch.discarded[page];
        self.memory.iter().enumerate().map(|(page, version)| is_compared(page).then_some(*version)).collect()
    }

    fn agreed(&self) -> Agreed {
        let Scene { lanes, verify, return_path, recovers, .. } = self.scene;
        Agreed { lanes, verify, return_path, recovers, awaited: Duration::from_secs(300) }
    }

    /// The connection is lost, or another one takes its place: what was begun is over.
    fn end_attempt(&mut self) {
        self.end.port.end();
        self.end.forget(|timed| !matches!(timed, Timed::Tick));
        self.is_running = false;
        self.digests = None;
        self.digests_begun = false;
        self.compared = false;
        self.switch.lost_since.get_or_insert_with(Instant::now);
        self.switch.asked.fill(false);
        self.switch.is_filled = false;
        if !self.end.truth.lock().unwrap().start_begun {
            self.switch = Switch::default();
        }
    }

    /// The source has returned: what is loaded is reported to it.
    fn rejoin(&mut self, started: bool) {
        let (attempt, port) = self.returned.take().expect("the source has returned");
        self.end.require(attempt > self.attempt, "an earlier attempt takes the place of a later one");
        self.attempt = attempt;
        self.end.port = port;
        let frames = std::mem::replace(&mut self.frames, vec![0; usize::from(self.scene.lanes)]);
        self.loaded = 0;
        self.switch.lost_since = None;
        self.send(Message::Resume(Resume { started, frames }), 60);
        if let Some(missing) = &self.switch.missing {
            let received = missing.iter().map(|missing| !missing).collect();
            self.end.port.send(0, Packet::Received(received), 60);
        }
        self.send(Message::Ready, 20);
        self.end.after(MS, Timed::Rejoined);
    }

    /// The input for a fault. No switchover is requested here.
    fn fault(fault: Fault) -> Option<Input> {
        match fault {
            Fault::Cancel => Some(Input::Cancel),
            Fault::StageFails => {
                Some(Input::Broke(Failure::Panicked { stage: StageId::loader(0), panic: "a fault".into() }))
            }
            _ => None,
        }
    }

    /// Performs a question, and returns its answer.
    async fn ask(&mut self, question: Action) -> Result<Input, MigrationError> {
        match question {
            Action::NameStretch => {
                let first = PageAt { block: 0, page: 0 };
                let hashes = Message::PageHashes { first, hashes: Vec::new() };
                self.send(hashes, 100);
                Err(MigrationError::Differs("a stretch".into()))
            }
            Action::Discard => {
                self.end.require(self.switch.direct_ended, "pages are discarded that lanes may write");
                tokio::time::sleep(MS).await;
                self.discard();
                Ok(Input::Discarded)
            }
            Action::Register => {
                tokio::time::sleep(MS).await;
                self.discard();
                self.switch.missing = Some(self.switch.discarded.clone());
                self.end.after(MS, Timed::Touch);
                self.note_filled();
                Ok(Input::Registered)
            }
            Action::MakeDurable => {
                self.end.call(MS).await?;
                Ok(Input::Durable)
            }
            Action::Prepare => {
                self.end.require(self.compared || !self.scene.verify, "a guest is prepared that was not compared");
                let is_prepared = self.end.truth.lock().unwrap().prepared;
                self.end.require(!is_prepared, "a guest is prepared twice");
                self.end.call(2 * MS).await?;
                self.end.truth.lock().unwrap().prepared = true;
                Ok(Input::Prepared)
            }
            Action::Unprepare => {
                self.end.require(self.end.truth.lock().unwrap().prepared, "what was not prepared is taken back");
                self.end.call(MS).await?;
                self.end.truth.lock().unwrap().prepared = false;
                Ok(Input::Unprepared)
            }
            Action::Start(run_state) => {
                let lies = self.end.truth.lock().unwrap().lies;
                self.end.require(lies || run_state == self.scene.was(), "the guest is started otherwise than it was");
                // A start that fails may have run part of the guest.
                change(&self.end.truth, |shared| {
                    shared.start_begun = true;
                    shared.destination_runs = run_state == RunState::Running;
                });
                Ok(Input::Started(self.end.call(MS).await))
            }
            Action::Explain(failure) => Err(MigrationError::Stage(failure)),
            order => unreachable!("{order:?} is no question"),
        }
    }

    /// Performs what has no answer.
    fn order(&mut self, order: Action) {
        match order {
            Action::Agree => {
                let waits_ms = if self.scene.recovers { 300_000 } else { 0 };
                self.send(Message::Accept { waits_ms }, 20);
                self.end.after(Duration::from_secs(20), Timed::NotDescribed);
            }
            Action::EndAttempt => self.end_attempt(),
            Action::Rejoin { started } => self.rejoin(started),
            Action::StartStages => {
                self.is_running = true;
                self.end.reads = true;
                if self.switch.missing.is_some() {
                    self.end.after(MS, Timed::Touch);
                    self.note_filled();
                }
                if self.attempt == 1 {
                    self.end.after(TICK, Timed::Tick);
                }
            }
            Action::Report => self.acknowledge(),
            Action::StartDigests => self.digests_begun = true,
            Action::Compare => {
                self.end.require(self.digests_begun, "digests are compared that were not begun");
                self.memory[0] += u32::from(self.end.faults.corrupt);
                self.end.after(2 * MS, Timed::Compared);
            }
            Action::Send(message) => {
                self.end.require(self.scene.return_path, "a message is sent where there is no return path");
                self.send(message, 20);
            }
            // What is left is nothing in this model.
            _ => {}
        }
    }
}

impl World<Checked<DestinationCourse>> for DestinationModel {
    fn now(&self) -> Duration {
        self.end.now()
    }

    async fn next(&mut self, course: &Checked<DestinationCourse>) -> Input {
        loop {
            let happened = tokio::select! {
                biased;
                happened = self.end.next() => happened,
                Some(returned) = self.returns.recv() => {
                    self.end.faults.stepped();
                    if std::mem::take(&mut self.end.faults.refuse) {
                        refuse(returned.1);
                        continue;
                    }
                    self.returned = Some(returned);
                    return Input::Returned;
                }
            };
            let input = match happened {
                Happened::Fault(fault) => Self::fault(fault),
                Happened::Timed(timed) => self.timed(timed, &course.course),
                Happened::Found(found) => self.found(found),
            };
            if let Some(input) = input {
                self.end.faults.stepped();
                return input;
            }
        }
    }

    async fn perform(&mut self, action: Action, _: &Checked<DestinationCourse>) -> Option<Input> {
        self.end.before_action().await;
        if let Action::Notify(event) = &action {
            return self.end.notify(event).err().map(Input::Failed);
        }
        if is_question(&action) {
            return Some(self.ask(action).await.unwrap_or_else(Input::Failed));
        }
        self.order(action);
        None
    }
}

/// The listener refuses an attempt. The course is not asked.
fn refuse(mut port: Port) {
    port.send(0, Packet::Message(Message::Refused("not all of its connections came".into())), 60);
    port.end();
}

/// Has the action an answer?
pub(super) fn is_question(action: &Action) -> bool {
    matches!(
        action,
        Action::NameStretch
            | Action::Discard
            | Action::Register
            | Action::MakeDurable
            | Action::Prepare
            | Action::Unprepare
            | Action::Start(_)
            | Action::Explain(_)
    )
}
