//! Both courses against each other in virtual time, driven by the real driver, with models of the guest, its memory and
//! the link. Laws 6 and 7 are checked at every step.
//!
//! A run is a [`Script`]: a scene and the faults that happen in it, each at a step of one end. It is a value that prints
//! as Rust, so that a run that fails can be replayed: see `tests`.

mod destination;
mod end;
mod events;
mod link;
mod memory;
mod requests;
mod script;
mod source;
mod tests;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use memferry_stages::geometry::PageAt;
use memferry_stages::wire::Message;
use memferry_stages::wire::messages::{Resume, RunState};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::course::destination::DestinationCourse;
use super::course::source::{Conclusion, End as SourceEnd, Facts, SourceCourse};
use super::driver::{Course, drive};
use super::error::{MigrationError, Silence};
use crate::controller::forecast::FixedCost;
use crate::events::{DowntimeParts, Role};
use crate::guest::GuestError;
use crate::model::link::Link;
use crate::settings::{
    After, ConvergenceSettings, Mode, OnDeadline, PostcopyAfter, RecoverySettings, SourceSettings, StallStep, Verify,
};
use destination::DestinationModel;
use end::End;
use link::{Port, link};
use memory::SourceMemory;
use script::{Fault, Faults, Postcopy, Scene, Script, Side};
use source::SourceModel;

/// How long a run may take before it counts as one that hangs.
const HANG: Duration = Duration::from_secs(3600);

/// The link, of which each end has two connections.
const LINK: Link = Link::new(2e6);

/// The most steps of a course: more than one takes that waits until [`HANG`].
const MOST_STEPS: u32 = 100_000;

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
    /// No link is made until then.
    refused_until: Option<Instant>,
    /// The destination takes no pages until then.
    stalled_until: Option<Instant>,
    /// Does a peer lie? Then what follows from its words is its own.
    lies: bool,
    lies_to_destination: bool,
    /// Does it claim to the source that it has begun to start the guest?
    claims_start: bool,
    /// Does an end make a mistake?
    mistaken: bool,
    /// Does an observer panic?
    unnotified: bool,
    /// Is the stream stored, and the guest resumed after it? Then one that is started is a copy.
    copies: bool,
    violations: Vec<String>,
}

impl Shared {
    /// Does a panic take actions away from their lists?
    fn is_disturbed(&self) -> bool {
        self.mistaken || self.unnotified
    }
}

type Truth = Arc<Mutex<Shared>>;

/// Changes where the guest runs. Two that run are a violation.
fn change(truth: &Truth, by: impl FnOnce(&mut Shared)) {
    let mut shared = truth.lock().unwrap();
    by(&mut shared);
    // A peer that lies can make both ends run: a source by sending Go early, a destination by denying after Go that it
    // started the guest.
    let is_lied_to = shared.lies && (shared.go_left || shared.lies_to_destination);
    if shared.source_runs && shared.destination_runs && !is_lied_to && !shared.copies {
        shared.violations.push("law 7: two guests run".into());
    }
}

/// A course whose lists of actions are checked: a question is the last of its list. A course that steps without end ends
/// with a panic.
struct Checked<C: Course> {
    course: C,
    steps: u32,
    is_question: fn(&C::Action) -> bool,
    truth: Truth,
}

impl<C: Course> Checked<C>
where
    C::Action: std::fmt::Debug,
{
    fn check(&mut self, actions: Vec<C::Action>) -> Vec<C::Action> {
        self.steps += 1;
        if self.steps == MOST_STEPS {
            self.truth.lock().unwrap().violations.push("a course steps without end".into());
            mistake();
        }
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
    figures: Figures,
    violations: Vec<String>,
}

/// Figures of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Figures {
    rounds: u32,
    /// The downtime, and its parts at either end.
    downtime: Option<Duration>,
    parts: [DowntimeParts; 2],
    verified: [Option<bool>; 2],
    /// The fixed cost in the forecast that the decision to switch over rests on.
    fixed: Option<FixedCost>,
}

/// How an end ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Ended {
    Completed,
    Failed,
    Cancelled,
    Unconfirmed,
    Lost,
    ResumeFailed,
    Hangs,
    /// It did not begin: no complete stream was stored.
    NotBegun,
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
        let claims = |number| {
            matches!(
                lie(number),
                Message::Running | Message::StartFailed(_) | Message::Resume(Resume { started: true, .. })
            )
        };
        shared.claims_start = lies.clone().any(|&(_, _, fault)| matches!(fault, Fault::Lie(number) if claims(number)));
        shared.lies = lies.next().is_some();
        let has = |wanted| script.faults.iter().any(|(_, _, fault)| *fault == wanted);
        shared.mistaken = has(Fault::Mistake);
        shared.unnotified = has(Fault::NotifyPanics);
        shared.copies = !scene.return_path && scene.resumes;
    }
    let settings = settings(&scene);
    let [here, there] = make_link(&scene);
    let here = End::new(truth.clone(), Faults::of(script, Side::Source), here);
    let (returns, returned) = mpsc::unbounded_channel();
    let mut source = SourceModel::new(here, guest(&scene), scene, settings.clone(), returns);
    let there = End::new(truth.clone(), Faults::of(script, Side::Destination), there);
    let mut destination = DestinationModel::new(there, scene, returned);
    let facts = Facts {
        was: scene.was(),
        return_path: scene.return_path,
        recovers: scene.recovers,
        hints: scene.hints,
        page_bytes: memory::PAGE_BYTES,
    };
    let (handover_timeout, recovery) = (settings.handover_timeout, settings.recovery);
    let mut source_course = Checked {
        course: SourceCourse::new(settings, facts),
        steps: 0,
        is_question: source::is_question,
        truth: truth.clone(),
    };
    let mut destination_course = Checked {
        course: DestinationCourse::new(handover_timeout, recovery),
        steps: 0,
        is_question: destination::is_question,
        truth: truth.clone(),
    };
    let both = async {
        if scene.return_path {
            let sending = source_ends(&mut source_course, &mut source);
            return tokio::join!(sending, destination_ends(&mut destination_course, &mut destination));
        }
        let mistake = source_ends(&mut source_course, &mut source).await;
        // What is not complete is no file.
        if !is_complete(&source_course.course) {
            return (mistake, None);
        }
        (mistake, destination_ends(&mut destination_course, &mut destination).await)
    };
    let (source_mistake, destination_mistake) =
        tokio::time::timeout(HANG, both).await.map_or((None, None), |mistakes| mistakes);
    let steps = [source.end.faults.steps(), destination.end.faults.steps()];
    let figures = figures(&source_course.course, &destination_course.course);
    let is_read = scene.return_path || is_complete(&source_course.course);
    judge_conclusion(&scene, &source, source_course.course.conclusion());
    let source_ended = how_source(source_course.course, source_mistake);
    let destination_ended =
        if is_read { how_destination(destination_course.course, destination_mistake) } else { Ended::NotBegun };
    judge_reports(&mut source, &destination, source_ended, destination_ended);
    let equal = destination.memory == source.memory.versions();
    drop((source, destination));
    let violations = judge(&scene, &truth.lock().unwrap(), source_ended, destination_ended, equal);
    Ran { steps, source: source_ended, destination: destination_ended, figures, violations }
}

/// Did the source complete its stream?
fn is_complete(course: &SourceCourse) -> bool {
    course.conclusion().is_some_and(|conclusion| matches!(conclusion.end, SourceEnd::Completed))
}

fn figures(source: &SourceCourse, destination: &DestinationCourse) -> Figures {
    Figures {
        rounds: source.round(),
        downtime: source.downtime(),
        parts: [source.parts(), destination.parts()],
        verified: [source.verified(), destination.verified()],
        fixed: source.forecast().map(|forecast| forecast.fixed),
    }
}

/// What follows from how the source ended: the guest stays here or not, and a cancel that comes too late is reported.
fn judge_conclusion(scene: &Scene, source: &SourceModel, conclusion: Option<&Conclusion>) {
    let Some(conclusion) = conclusion else { return };
    let report = |holds: bool, what: &str| {
        source.end.require_reported(if holds { Ok(()) } else { Err(what.into()) });
    };
    let completed = matches!(conclusion.end, SourceEnd::Completed);
    let stays = match conclusion.end {
        SourceEnd::Completed => scene.return_path || !scene.resumes,
        SourceEnd::Unconfirmed(_) | SourceEnd::Lost(_) => true,
        SourceEnd::Failed(_) | SourceEnd::Cancelled(_) => false,
    };
    report(conclusion.stays_paused == stays, "the source does not know whether its guest stays paused");
    report((source.moved == 1) == (completed && stays), "a guest has moved and is still guarded, or it has not");
    report(
        !completed || !source.cancelled || source.end.events.warnings > 0,
        "a cancel came too late without a report",
    );
}

/// Each end reports its phases, and where the guest is; each request is answered; no hint counts at the end.
fn judge_reports(source: &mut SourceModel, destination: &DestinationModel, here: Ended, there: Ended) {
    if here == Ended::Hangs || there == Ended::Hangs {
        return;
    }
    let report = |holds: bool, what: &str| {
        source.end.require_reported(if holds { Ok(()) } else { Err(what.into()) });
    };
    let events = &source.end.events;
    let completed = here == Ended::Completed;
    let interrupted = events.disconnected;
    report(
        !completed || (events.are_complete() && (1..=1 + interrupted).contains(&events.paused)),
        "a source completed without its phases",
    );
    report(events.resumed == source.resumed, "a guest runs here again and it is not reported, or it does not");
    report(!source.window_is_open, "hints may come when the source is over");
    let is_handed_over = source.end.truth.lock().unwrap().go_left;
    report((events.handed_over > 0) == is_handed_over, "Go has left and it is not reported, or it has not");
    let events = &destination.end.events;
    report(there != Ended::Completed || events.are_complete(), "a destination completed without its phases");
    let start_begun = destination.end.truth.lock().unwrap().start_begun;
    report((events.handed_over == 1) == start_begun, "the start is begun and it is not reported, or it is not");
    let settled = source.requests.settle();
    source.end.require_reported(settled);
    source.end.require_reported(if source.requests.are_settled() {
        Ok(())
    } else {
        Err("a request has no answer".into())
    });
}

/// Drives the source to its end, sends its last message and closes its side.
async fn source_ends(course: &mut Checked<SourceCourse>, world: &mut SourceModel) -> Option<MigrationError> {
    let mistake = drive(course, world).await.err();
    let farewell = course.course.farewell();
    world.end.port.close(farewell);
    mistake
}

/// Drives the destination to its end, sends its last message and closes its side.
async fn destination_ends(
    course: &mut Checked<DestinationCourse>,
    world: &mut DestinationModel,
) -> Option<MigrationError> {
    let mistake = drive(course, world).await.err();
    let is_sent = !course.course.start_begun() || course.course.is_lost();
    let farewell = is_sent.then(|| Message::Abort("over".into()));
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
    let may_start = if scene.return_path { shared.go_left } else { source == Ended::Completed || scene.resumes };
    require(!shared.start_begun || may_start || shared.lies, "law 7: a guest was started before Go");
    match source {
        Ended::Completed if !scene.return_path => {
            let runs = scene.resumes && scene.was_running;
            require(
                shared.source_runs == runs,
                "the source guest is not as its settings want it after a stored stream",
            );
            require(scene.resumes || shared.committed, "law 7: a stream is complete before the source committed");
            require(destination != Ended::Completed || equal || scene.resumes, "the memories differ");
        }
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
            require(shared.committed || shared.claims_start, "law 7: unconfirmed before the source committed");
        }
        Ended::Lost => {
            require(!shared.source_runs, "law 7: the guest was started elsewhere, and the source guest runs");
            require(shared.lies || shared.start_begun, "a guest is lost that was not started");
        }
        // A guest whose pause and resume both failed may run or not.
        Ended::ResumeFailed | Ended::Hangs | Ended::NotBegun => {}
    }
    require(destination != Ended::Completed || shared.start_begun, "completed, and nothing was started");
    // A mistake in the very call that lifts the throttle is not mended.
    require(shared.mistaken || shared.throttled == 0, "the guest is still throttled");
    require(scene.return_path || !shared.go_left, "Go is in a stored stream");
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
        SourceEnd::Lost(_) => Ended::Lost,
    }
}

fn how_destination(course: DestinationCourse, mistake: Option<MigrationError>) -> Ended {
    if !course.is_over() && mistake.is_none() {
        return Ended::Hangs;
    }
    match course.into_outcome(mistake) {
        Ok(()) => Ended::Completed,
        Err(MigrationError::Cancelled) => Ended::Cancelled,
        Err(MigrationError::PagesLost(_)) => Ended::Lost,
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
        after: (!scene.return_path).then_some(if scene.resumes { After::Resume } else { After::Pause }),
        handover_timeout: Duration::from_secs(20),
        peer_timeout: Duration::from_secs(30),
        recovery: if scene.recovers { RecoverySettings::default() } else { RecoverySettings::OFF },
        mode: match scene.postcopy {
            Postcopy::No => Mode::Precopy,
            Postcopy::AfterRound | Postcopy::After(_) => Mode::Hybrid,
            Postcopy::AtOnce => Mode::Postcopy,
        },
        postcopy_after: match scene.postcopy {
            Postcopy::AfterRound => Some(PostcopyAfter::Rounds(1)),
            Postcopy::After(ms) => Some(PostcopyAfter::Time(Duration::from_millis(ms.into()))),
            Postcopy::No | Postcopy::AtOnce => None,
        },
        convergence: ConvergenceSettings { on_stall, stall_rounds: 2, ..ConvergenceSettings::default() },
        ..SourceSettings::default()
    }
}

fn guest(scene: &Scene) -> SourceMemory {
    SourceMemory::new(scene.writes.into(), 7)
}

/// The link of an attempt.
fn make_link(scene: &Scene) -> [Port; 2] {
    let settings = settings(scene);
    link(LINK, settings.peer_timeout, !scene.return_path)
}

/// The message of a peer that lies.
fn lie(number: u8) -> Message {
    let lies = [
        Message::Accept { waits_ms: 0 },
        Message::Ready,
        Message::Loaded { verified: true },
        Message::Loaded { verified: false },
        Message::Running,
        Message::Refused("a lie".into()),
        Message::Abort("a lie".into()),
        Message::StartFailed("a lie".into()),
        Message::Go(RunState::Running),
        Message::End { run_state: RunState::Running, frames: 3 },
        Message::Heartbeat(Vec::new()),
        Message::Resume(Resume { started: true, frames: Vec::new() }),
        Message::Resume(Resume::default()),
        Message::Settled,
        Message::Discard,
        Message::Discarded,
        Message::PageRequest(PageAt { block: 0, page: 3 }),
        Message::Complete,
    ];
    lies[usize::from(number) % lies.len()].clone()
}

/// How many lies there are.
const LIES: u8 = 18;

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
