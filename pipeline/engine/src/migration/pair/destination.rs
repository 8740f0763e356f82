//! The destination's world as a model.

use std::time::Duration;

use memferry_stages::wire::Message;
use memferry_stages::wire::messages::{Progress, RunState};
use tokio::time::Instant;

use super::link::{Found, Packet, Port};
use super::memory::{PAGES, apply};
use super::script::{Fault, Faults, Scene};
use super::source::sleep_until;
use super::{Checked, Truth, change, guest_error, lie, mistake, silence};
use crate::events::Role;
use crate::migration::course::destination::{Action, Agreed, DestinationCourse, Input};
use crate::migration::driver::World;
use crate::migration::error::{Failure, Loss, MigrationError};

const MS: Duration = Duration::from_millis(1);
/// How often the source is notified of what is loaded.
const TICK: Duration = Duration::from_millis(20);

/// What happens by itself after a time.
#[derive(Debug)]
enum Timed {
    Tick,
    Built,
    Compared,
    /// The source has not described its guest in time.
    NotDescribed,
}

#[derive(Debug)]
pub(super) struct DestinationModel {
    pub(super) truth: Truth,
    pub(super) faults: Faults,
    pub(super) port: Port,
    /// The versions of the pages.
    pub(super) memory: Vec<u32>,
    scene: Scene,
    begun: Instant,
    timers: Vec<(Instant, Timed)>,
    /// Are pages loaded?
    is_running: bool,
    /// Pages and frames loaded.
    loaded: u64,
    frames: u64,
    digests: Option<Vec<u32>>,
    stop: Option<Duration>,
}

impl DestinationModel {
    pub(super) fn new(truth: Truth, faults: Faults, port: Port, scene: Scene) -> Self {
        Self {
            truth,
            faults,
            port,
            memory: vec![0; PAGES],
            scene,
            begun: Instant::now(),
            timers: Vec::new(),
            is_running: false,
            loaded: 0,
            frames: 0,
            digests: None,
            stop: None,
        }
    }

    fn after(&mut self, time: Duration, what: Timed) {
        self.timers.push((Instant::now() + time, what));
    }

    fn earliest(&self) -> Option<(usize, Instant)> {
        self.timers.iter().enumerate().map(|(index, (at, _))| (index, *at)).min_by_key(|&(index, at)| (at, index))
    }

    fn acknowledge(&mut self) {
        let progress = Progress { bytes: self.loaded, frames: vec![self.frames] };
        self.port.send(0, Packet::Message(Message::Progress(progress)), 30);
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
            Packet::Pages(frames) => {
                self.frames += 1;
                self.loaded += frames.len() as u64;
                for frame in frames {
                    if let Err(violation) = apply(&mut self.memory, frame) {
                        self.truth.lock().unwrap().violations.push(violation);
                    }
                }
                None
            }
            Packet::RoundComplete => {
                self.acknowledge();
                None
            }
            Packet::LaneOver => Some(Input::LaneOver { frames: self.frames }),
            Packet::Digests(versions) => {
                self.digests = Some(versions);
                None
            }
            Packet::Message(message) => self.received(message),
        }
    }

    fn received(&mut self, message: Message) -> Option<Input> {
        let message = match self.faults.lie.take() {
            Some(number) => lie(number),
            None => message,
        };
        match message {
            Message::Blocks(_) if !self.is_running => {
                self.timers.retain(|(_, timed)| !matches!(timed, Timed::NotDescribed));
                self.after(5 * MS, Timed::Built);
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
                self.after(TICK, Timed::Tick);
                if course.is_loading() {
                    self.acknowledge();
                }
                None
            }
            Timed::Built => {
                if let Some(fault) = self.faults.call.take() {
                    let error = if fault == Fault::CallPanics {
                        MigrationError::Mistake("a panic".into())
                    } else {
                        guest_error()
                    };
                    return Some(Input::Failed(error));
                }
                self.port.send(0, Packet::Message(Message::Ready), 20);
                Some(Input::Agreed(Agreed { lanes: self.scene.lanes, verify: self.scene.verify, return_path: true }))
            }
            Timed::Compared => Some(Input::Compared { equal: self.digests.as_ref() == Some(&self.memory) }),
            Timed::NotDescribed => Some(Input::Failed(MigrationError::TimedOut("not described".into()))),
        }
    }

    /// What a fault does. Returns the input if it is one.
    fn fault(&mut self, fault: Fault) -> Option<Input> {
        match fault {
            Fault::Cut => self.port.cut(),
            Fault::Mute => self.port.mute(),
            Fault::Cancel => return Some(Input::Cancel),
            Fault::Stop(seconds) => self.stop = Some(Duration::from_secs(seconds.into())),
            Fault::Stall(seconds) => {
                let until = Instant::now() + Duration::from_secs(seconds.into());
                self.truth.lock().unwrap().stalled_until = Some(until);
            }
            Fault::StageFails => {
                let stage = memferry_stages::stage_id::StageId::loader(0);
                return Some(Input::Broke(Failure::Panicked { stage, panic: "a fault".into() }));
            }
            Fault::Mistake => mistake(),
            Fault::SwitchOver | Fault::CallFails | Fault::CallPanics | Fault::Lie(_) => {}
        }
        None
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
            Action::Notify(_) | Action::Gather | Action::StartDigests => None,
            Action::Agree => {
                self.port.send(0, Packet::Message(Message::Accept), 20);
                self.after(Duration::from_secs(20), Timed::NotDescribed);
                None
            }
            Action::StartStages => {
                self.is_running = true;
                self.after(TICK, Timed::Tick);
                None
            }
            Action::Report => {
                self.acknowledge();
                None
            }
            Action::Compare => {
                self.after(2 * MS, Timed::Compared);
                None
            }
            Action::NameStretch => {
                let hashes = Message::PageHashes {
                    first: memferry_stages::geometry::PageAt { block: 0, page: 0 },
                    hashes: Vec::new(),
                };
                self.port.send(0, Packet::Message(hashes), 100);
                return Err(MigrationError::Differs("a stretch".into()));
            }
            Action::Prepare => {
                self.call(2 * MS).await?;
                self.truth.lock().unwrap().prepared = true;
                Some(Input::Prepared)
            }
            Action::Send(message) => {
                self.port.send(0, Packet::Message(message), 20);
                None
            }
            Action::Start(run_state) => {
                // A start that fails may have run part of the guest.
                change(&self.truth, |shared| {
                    shared.start_begun = true;
                    shared.destination_runs = run_state == RunState::Running;
                });
                let started = self.call(MS).await;
                change(&self.truth, |shared| shared.start_failed = started.is_err());
                Some(Input::Started(started))
            }
            Action::Explain(failure) => Some(Input::Failed(MigrationError::Stage(failure))),
        })
    }
}

impl World<Checked<DestinationCourse>> for DestinationModel {
    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    async fn next(&mut self, course: &Checked<DestinationCourse>) -> Input {
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
                    self.timed(timed, &course.course)
                }
                found = self.port.next() => self.found(found),
            };
            if let Some(input) = input {
                self.faults.stepped();
                return input;
            }
        }
    }

    async fn perform(&mut self, action: Action, _: &Checked<DestinationCourse>) -> Option<Input> {
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

/// Has the action an answer?
pub(super) fn is_question(action: &Action) -> bool {
    matches!(action, Action::NameStretch | Action::Prepare | Action::Start(_) | Action::Explain(_))
}
