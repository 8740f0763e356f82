//! Both courses against each other in virtual time, driven by the real driver, with models of the guest, its memory and
//! the link. Laws 6 and 7 are checked at every step.
//!
//! A run is a [`Script`]: a scene and the faults that happen in it, each at a step of one end. It is a value that prints
//! as Rust, so that a run that fails can be replayed: see `tests`.

mod destination;
mod end;
mod link;
mod memory;
mod script;
mod source;
mod tests;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use memferry_stages::wire::Message;
use memferry_stages::wire::messages::RunState;
use tokio::time::Instant;

use super::course::destination::DestinationCourse;
use super::course::source::{End as SourceEnd, Facts, SourceCourse};
use super::driver::{Course, drive};
use super::error::{MigrationError, Silence};
use crate::events::Role;
use crate::guest::GuestError;
use crate::settings::{ConvergenceSettings, OnDeadline, SourceSettings, StallStep, Verify};
use destination::DestinationModel;
use end::End;
use link::link;
use memory::SourceMemory;
use script::{Fault, Faults, Scene, Script, Side};
use source::SourceModel;

/// How long a run may take before it counts as one that hangs.
const HANG: Duration = Duration::from_secs(3600);

/// What both ends of a run share: where the guest runs, and what went wrong.
#[derive(Debug, Default)]
struct Shared {
    source_runs: bool,
    destination_runs: bool,
    /// Was everything loaded and the device state applied?
    prepared: bool,
    /// Does nothing at the source resume the guest on its own any more?
    committed: bool,
    /// Has Go left?
    go_left: bool,
    /// Was the start begun at the destination?
    start_begun: bool,
    /// Percent of its time that the source's guest is throttled.
    throttled: u8,
    /// The destination takes no pages until then.
    stalled_until: Option<Instant>,
    /// Does a peer lie? Then what follows from its words is its own.
    lies: bool,
    lies_to_destination: bool,
    /// Does an end make a mistake?
    mistaken: bool,
    violations: Vec<String>,
}

type Truth = Arc<Mutex<Shared>>;

/// Changes where the guest runs. Two that run are a violation.
fn change(truth: &Truth, by: impl FnOnce(&mut Shared)) {
    let mut shared = truth.lock().unwrap();
    by(&mut shared);
    // A peer that lies can make both ends run: a source by sending Go early, a destination by denying after Go that it
    // started the guest.
    let is_lied_to = shared.lies && (shared.go_left || shared.lies_to_destination);
    if shared.source_runs && shared.destination_runs && !is_lied_to {
        shared.violations.push("law 7: two guests run".into());
    }
}

/// A course whose lists of actions are checked: a question is the last of its list.
struct Checked<C: Course> {
    course: C,
    is_question: fn(&C::Action) -> bool,
    truth: Truth,
}

impl<C: Course> Checked<C>
where
    C::Action: std::fmt::Debug,
{
    fn check(&self, actions: Vec<C::Action>) -> Vec<C::Action> {
        let before_the_last = actions.iter().rev().skip(1);
        if let Some(question) = before_the_last.into_iter().find(|action| (self.is_question)(action)) {
            self.truth.lock().unwrap().violations.push(format!("{question:?} is not the last of {actions:?}"));
        }
        actions
    }
}

impl<C: Course> Course for Checked<C>
where
    C::Action: std::fmt::Debug,
{
    type Input = C::Input;
    type Action = C::Action;

    fn begin(&mut self) -> Vec<C::Action> {
        let actions = self.course.begin();
        self.check(actions)
    }

    fn failed(error: MigrationError) -> C::Input {
        C::failed(error)
    }

    fn step(&mut self, input: C::Input, now: Duration) -> Vec<C::Action> {
        let actions = self.course.step(input, now);
        self.check(actions)
    }

    fn wake(&mut self, now: Duration) -> Vec<C::Action> {
        let actions = self.course.wake(now);
        self.check(actions)
    }

    fn wakes_at(&self) -> Option<Duration> {
        self.course.wakes_at()
    }

    fn is_over(&self) -> bool {
        self.course.is_over()
    }
}

/// What a run came to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Ran {
    /// How many inputs and actions each end had.
    steps: [u32; 2],
    /// How each end ended.
    source: Ended,
    destination: Ended,
    violations: Vec<String>,
}

/// How an end ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Ended {
    Completed,
    Failed,
    Cancelled,
    Unconfirmed,
    ResumeFailed,
    Hangs,
}

/// Runs a script.
fn run(script: &Script) -> Ran {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async { run_both(script).await })
}

async fn run_both(script: &Script) -> Ran {
    let scene = script.scene;
    let truth = Truth::default();
    {
        let mut shared = truth.lock().unwrap();
        shared.source_runs = scene.was_running;
        let mut lies = script.faults.iter().filter(|(_, _, fault)| matches!(fault, Fault::Lie(_)));
        shared.lies_to_destination = lies.clone().any(|(side, ..)| *side == Side::Destination);
        shared.lies = lies.next().is_some();
        shared.mistaken = script.faults.iter().any(|(_, _, fault)| *fault == Fault::Mistake);
    }
    let settings = settings(&scene);
    let [here, there] = link(Duration::from_millis(1), 2e6, settings.peer_timeout);
    let memory = SourceMemory::new(scene.writes.into(), 7);
    let mut source = SourceModel::new(End::new(truth.clone(), Faults::of(script, Side::Source), here), memory, scene);
    let mut destination =
        DestinationModel::new(End::new(truth.clone(), Faults::of(script, Side::Destination), there), scene);
    let facts = Facts { was: scene.was(), return_path: true, hints: scene.hints, page_bytes: memory::PAGE_BYTES };
    let handover_timeout = settings.handover_timeout;
    let mut source_course =
        Checked { course: SourceCourse::new(settings, facts), is_question: source::is_question, truth: truth.clone() };
    let mut destination_course = Checked {
        course: DestinationCourse::new(handover_timeout),
        is_question: destination::is_question,
        truth: truth.clone(),
    };
    let both = async {
        tokio::join!(
            source_ends(&mut source_course, &mut source),
            destination_ends(&mut destination_course, &mut destination)
        )
    };
    let (source_mistake, destination_mistake) =
        tokio::time::timeout(HANG, both).await.map_or((None, None), |mistakes| mistakes);
    let steps = [source.end.faults.steps(), destination.end.faults.steps()];
    let source_ended = how_source(source_course.course, source_mistake);
    let destination_ended = how_destination(destination_course.course, destination_mistake);
    let equal = destination.memory == source.memory.versions();
    drop((source, destination));
    let violations = judge(&scene, &truth.lock().unwrap(), source_ended, destination_ended, equal);
    Ran { steps, source: source_ended, destination: destination_ended, violations }
}

/// Drives the source to its end, sends its last message and closes its side.
async fn source_ends(course: &mut Checked<SourceCourse>, world: &mut SourceModel) -> Option<MigrationError> {
    let mistake = drive(course, world).await.err();
    let farewell = course.course.conclusion().and_then(|conclusion| conclusion.end.farewell());
    world.end.port.close(farewell);
    mistake
}

/// Drives the destination to its end, sends its last message and closes its side.
async fn destination_ends(
    course: &mut Checked<DestinationCourse>,
    world: &mut DestinationModel,
) -> Option<MigrationError> {
    let mistake = drive(course, world).await.err();
    let farewell = (!course.course.start_begun()).then(|| Message::Abort("over".into()));
    world.end.port.close(farewell);
    mistake
}

/// Laws 6 and 7, and what an operator may rely on.
fn judge(scene: &Scene, shared: &Shared, source: Ended, destination: Ended, equal: bool) -> Vec<String> {
    let mut violations = shared.violations.clone();
    let mut require = |holds: bool, what: &str| {
        if !holds {
            violations.push(what.into());
        }
    };
    let as_it_was = shared.source_runs == scene.was_running;
    require(source != Ended::Hangs && destination != Ended::Hangs, "an end hangs");
    require(!shared.start_begun || shared.prepared, "law 7: a guest was started that was not prepared");
    require(!shared.start_begun || shared.go_left || shared.lies, "law 7: a guest was started before Go");
    match source {
        Ended::Completed => {
            require(!shared.source_runs, "law 7: a guest that has moved runs at its source");
            require(shared.lies || shared.start_begun, "law 7: completed, and nothing was started");
            require(shared.lies || equal, "the memories differ");
        }
        Ended::Failed | Ended::Cancelled => {
            require(as_it_was, "law 7: the source guest is not as it was");
            require(
                shared.lies || !shared.start_begun,
                "law 7: the source guest continues beside one that was started",
            );
        }
        Ended::Unconfirmed => {
            require(!shared.source_runs, "law 7: unconfirmed, and the source guest runs");
            require(shared.committed || shared.lies, "law 7: unconfirmed before the source committed");
        }
        // A guest whose pause and resume both failed may run or not.
        Ended::ResumeFailed | Ended::Hangs => {}
    }
    require(destination != Ended::Completed || shared.start_begun, "completed, and nothing was started");
    // A mistake in the very call that lifts the throttle is not mended.
    require(shared.mistaken || shared.throttled == 0, "the guest is still throttled");
    violations
}

fn how_source(course: SourceCourse, mistake: Option<MigrationError>) -> Ended {
    if !course.is_over() && mistake.is_none() {
        return Ended::Hangs;
    }
    let conclusion = course.into_conclusion(mistake);
    match conclusion.end {
        _ if conclusion.resume_error.is_some() => Ended::ResumeFailed,
        SourceEnd::Completed => Ended::Completed,
        SourceEnd::Failed(_) => Ended::Failed,
        SourceEnd::Cancelled(_) => Ended::Cancelled,
        SourceEnd::Unconfirmed(_) => Ended::Unconfirmed,
    }
}

fn how_destination(course: DestinationCourse, mistake: Option<MigrationError>) -> Ended {
    if !course.is_over() && mistake.is_none() {
        return Ended::Hangs;
    }
    match course.into_outcome(mistake) {
        Ok(()) => Ended::Completed,
        Err(MigrationError::Cancelled) => Ended::Cancelled,
        Err(_) => Ended::Failed,
    }
}

fn settings(scene: &Scene) -> SourceSettings {
    let on_stall = if scene.throttles { vec![StallStep::Throttle] } else { Vec::new() };
    SourceSettings {
        verify: if scene.verify { Verify::Full } else { Verify::Off },
        lanes: scene.lanes,
        connections: scene.lanes.min(2),
        downtime_limit: Duration::from_millis(scene.limit.into()),
        deadline: scene.deadline.map(|ms| Duration::from_millis(ms.into())),
        on_deadline: if scene.switches_at_deadline { OnDeadline::SwitchOver } else { OnDeadline::Cancel },
        max_rounds: 20,
        handover_timeout: Duration::from_secs(20),
        peer_timeout: Duration::from_secs(30),
        convergence: ConvergenceSettings { on_stall, stall_rounds: 2, ..ConvergenceSettings::default() },
        ..SourceSettings::default()
    }
}

/// The message of a peer that lies.
fn lie(number: u8) -> Message {
    let lies = [
        Message::Accept,
        Message::Ready,
        Message::Loaded { verified: true },
        Message::Loaded { verified: false },
        Message::Running,
        Message::Refused("a lie".into()),
        Message::Abort("a lie".into()),
        Message::StartFailed("a lie".into()),
        Message::Go(RunState::Running),
        Message::End { run_state: RunState::Running, frames: 3 },
    ];
    lies[usize::from(number) % lies.len()].clone()
}

/// How many lies there are.
const LIES: u8 = 10;

fn guest_error() -> MigrationError {
    MigrationError::Guest(GuestError("the guest fails".into()))
}

fn silence(role: Role) -> Silence {
    Silence { role, peer: "peer".into(), limit: Duration::from_secs(30) }
}

/// A panic that prints nothing.
fn mistake() {
    std::panic::resume_unwind(Box::new("a mistake".to_owned()));
}
