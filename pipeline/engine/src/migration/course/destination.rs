//! The course of the destination in precopy.
//!
//! ```text
//!  Gathering ─▶ Agreeing ─▶ Loading ─┬─────────────────────────▶ Comparing ─▶ Writing ─▶ Preparing ─┐
//!                                    └▶ ReachingEnd (a file) ─▶                                     │
//!                                       ┌───────────────────────────────────────────────────────────┘
//!                                       ├─▶ AwaitingGo ─▶ Starting ─▶ Over
//!                                       └─▶ Starting (a file) ──────▶ Over
//! ```
//!
//! Any failure before Go leads to Over: nothing runs here, and the source gets the reason.

use std::time::Duration;

use memferry_stages::wire::Message;
use memferry_stages::wire::messages::RunState;

use super::handshake::{DestinationStep, Happening, NotStarted, awaiting_go};
use super::times::DestinationTimes;
use crate::events::{DowntimeParts, Event, Phase, Role};
use crate::migration::driver::Course;
use crate::migration::error::{Failure, Loss, MigrationError};

/// What happened at the destination.
#[derive(Debug)]
pub(in crate::migration) enum Input {
    /// All connections of one migration have arrived.
    Gathered,
    /// The guest is built, and the source was sent Ready.
    Agreed(Agreed),
    /// A lane has loaded its last frame. This number of frames is loaded by now, in all lanes.
    LaneOver { frames: u64 },
    /// The source sent a message besides state and digests.
    Received(Message),
    /// Every connection has ended at a frame boundary, and everything received is loaded.
    StreamEnded,
    /// The digests are compared.
    Compared { equal: bool },
    /// The guest's memory is durable.
    Durable,
    /// The device state is applied to the guest.
    Prepared,
    /// The guest was started, or could not be.
    Started(Result<(), MigrationError>),
    /// A stage ended with an error, possibly the consequence of another's.
    Broke(Failure),
    /// The connection or a call failed, or a stage whose failure is explained.
    Failed(MigrationError),
    /// The operator cancelled.
    Cancel,
}

/// What the ends have agreed on.
#[derive(Clone, Copy, Debug)]
pub(in crate::migration) struct Agreed {
    /// Lanes of the stream.
    pub(in crate::migration) lanes: u16,
    /// Does the stream carry digests?
    pub(in crate::migration) verify: bool,
    /// Does the transport carry answers? Where it does not, the stream is stored.
    pub(in crate::migration) return_path: bool,
}

/// What is to be done at the destination. Those with an answer are questions: see [`Course::step`].
#[derive(Debug)]
pub(in crate::migration) enum Action {
    /// Report an event.
    Notify(Box<Event>),
    /// Gather the connections of one migration, in the background. Then: [`Input::Gathered`].
    Gather,
    /// Accept the stream and build the guest, in the background. Then: [`Input::Agreed`].
    Agree,
    /// Start the stages.
    StartStages,
    /// Begin to compute digests: every page has arrived, and the source computes them at the same time.
    StartDigests,
    /// Report to the source what is loaded, at once.
    Report,
    /// Compare the digests, in the background. Then: [`Input::Compared`].
    Compare,
    /// Send the page hashes of the first stretch that differs. Answer: [`Input::Failed`], with that stretch.
    NameStretch,
    /// Make the guest's memory durable. Answer: [`Input::Durable`].
    MakeDurable,
    /// Apply the device state to the guest. Answer: [`Input::Prepared`].
    Prepare,
    /// Send a message.
    Send(Message),
    /// Start the guest. Answer: [`Input::Started`].
    Start(RunState),
    /// Find out why a stage failed. Answer: [`Input::Failed`].
    Explain(Failure),
}

impl Action {
    fn notify(event: Event) -> Self {
        Self::Notify(Box::new(event))
    }
}

/// What has arrived.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    agreed: Agreed,
    lanes_left: u16,
    frames: u64,
    /// The end mark: the guest's state at its source, and the number of frames.
    end: Option<(RunState, u64)>,
}

/// The state, with its data.
#[derive(Debug)]
enum State {
    Gathering,
    Agreeing,
    Loading(Arrival),
    ReachingEnd(Arrival, RunState),
    Comparing { return_path: bool, run_state: RunState, began: Duration },
    Writing { return_path: bool, run_state: RunState, began: Duration },
    Preparing { return_path: bool, run_state: RunState, began: Duration },
    AwaitingGo { give_up: Duration },
    Starting { began: Duration, return_path: bool },
    Over(Result<(), MigrationError>),
}

/// See the [module](self).
#[derive(Debug)]
pub(in crate::migration) struct DestinationCourse {
    state: State,
    handover_timeout: Duration,
    verified: Option<bool>,
    parts: DowntimeParts,
    /// Was the start begun? After that nothing can be refused.
    start_begun: bool,
}

impl DestinationCourse {
    pub(in crate::migration) fn new(handover_timeout: Duration) -> Self {
        Self {
            state: State::Gathering,
            handover_timeout,
            verified: None,
            parts: DowntimeParts::default(),
            start_begun: false,
        }
    }

    /// Are pages still loaded?
    pub(in crate::migration) fn is_loading(&self) -> bool {
        matches!(self.state, State::Loading(_))
    }

    /// Were the digests found equal? `None` if they were not compared.
    pub(in crate::migration) fn verified(&self) -> Option<bool> {
        self.verified
    }

    /// The parts of the downtime that this end measures.
    pub(in crate::migration) fn parts(&self) -> DowntimeParts {
        self.parts
    }

    /// Was the start begun?
    pub(in crate::migration) fn start_begun(&self) -> bool {
        self.start_begun
    }

    /// The outcome. With a mistake the course did not end by itself.
    pub(in crate::migration) fn into_outcome(self, mistake: Option<MigrationError>) -> Result<(), MigrationError> {
        match (self.state, mistake) {
            (State::Over(outcome), _) => outcome,
            (_, Some(mistake)) => Err(mistake),
            (state, None) => Err(MigrationError::Mistake(format!("the course ended as {state:?}"))),
        }
    }
}

impl Course for DestinationCourse {
    type Input = Input;
    type Action = Action;

    fn begin(&mut self) -> Vec<Action> {
        vec![Action::notify(Event::Phase(Phase::Setup)), Action::Gather]
    }

    fn failed(error: MigrationError) -> Input {
        Input::Failed(error)
    }

    fn step(&mut self, input: Input, now: Duration) -> Vec<Action> {
        match (input, &mut self.state) {
            (_, State::Over(_)) => Vec::new(),
            (Input::Broke(failure), _) => vec![Action::Explain(failure)],
            (Input::Started(result), &mut State::Starting { began, return_path }) => {
                self.started(result, return_path, now.saturating_sub(began))
            }
            (Input::Failed(error), &mut State::Starting { began, return_path }) => {
                self.started(Err(error), return_path, now.saturating_sub(began))
            }
            (input, State::AwaitingGo { .. }) => self.awaiting_go(input, now),
            (Input::Failed(error), _) => self.over(Err(error)),
            (Input::Cancel, _) => self.over(Err(MigrationError::Cancelled)),
            (Input::Gathered, State::Gathering) => {
                self.state = State::Agreeing;
                vec![Action::Agree]
            }
            (Input::Agreed(agreed), State::Agreeing) => self.agreed(agreed),
            (Input::LaneOver { frames }, State::Loading(arrival)) => {
                arrival.frames = frames;
                arrival.lanes_left -= 1;
                self.lane_over(now)
            }
            (Input::Received(Message::End { run_state, frames }), State::Loading(arrival)) if arrival.end.is_none() => {
                arrival.end = Some((run_state, frames));
                self.loaded(now)
            }
            (Input::StreamEnded, &mut State::ReachingEnd(arrival, run_state)) => self.compare(arrival, run_state, now),
            // Everything has arrived, and the source is gone.
            (Input::StreamEnded, State::Comparing { .. }) => self.over(Err(MigrationError::Lost(closed()))),
            (Input::StreamEnded, _) => self.over(Err(ended_early())),
            (Input::Received(message), State::ReachingEnd(..)) => self.over(Err(behind_the_end(&message))),
            (Input::Received(message), _) => self.over(Err(unwelcome(message))),
            (Input::Compared { equal }, &mut State::Comparing { return_path, run_state, began }) => {
                self.parts.verify = now.saturating_sub(began);
                self.verified = Some(equal);
                if equal { self.make_durable(return_path, run_state, now) } else { vec![Action::NameStretch] }
            }
            (Input::Durable, &mut State::Writing { return_path, run_state, began }) => {
                self.parts.durable = now.saturating_sub(began);
                self.state = State::Preparing { return_path, run_state, began: now };
                vec![Action::Prepare]
            }
            (Input::Prepared, &mut State::Preparing { return_path, run_state, began }) => {
                self.parts.prepare = now.saturating_sub(began);
                if return_path { self.report_loaded(now) } else { self.start(run_state, false, now) }
            }
            (input, state) => {
                let what = format!("{input:?} where the destination is {state:?}");
                self.over(Err(MigrationError::Mistake(what)))
            }
        }
    }

    fn wake(&mut self, now: Duration) -> Vec<Action> {
        self.happened(Happening::TimedOut, now)
    }

    fn wakes_at(&self) -> Option<Duration> {
        match self.state {
            State::AwaitingGo { give_up } => Some(give_up),
            _ => None,
        }
    }

    fn is_over(&self) -> bool {
        matches!(self.state, State::Over(_))
    }
}

impl DestinationCourse {
    fn over(&mut self, outcome: Result<(), MigrationError>) -> Vec<Action> {
        self.state = State::Over(outcome);
        Vec::new()
    }

    fn agreed(&mut self, agreed: Agreed) -> Vec<Action> {
        self.state = State::Loading(Arrival { agreed, lanes_left: agreed.lanes, frames: 0, end: None });
        vec![Action::StartStages, Action::notify(Event::Phase(Phase::Active))]
    }

    fn lane_over(&mut self, now: Duration) -> Vec<Action> {
        let State::Loading(arrival) = self.state else { return Vec::new() };
        let mut actions = Vec::new();
        if arrival.lanes_left + 1 == arrival.agreed.lanes {
            actions.push(Action::notify(Event::Phase(Phase::Switchover)));
        }
        if arrival.lanes_left == 0 && arrival.agreed.verify {
            actions.push(Action::StartDigests);
        }
        actions.extend(self.loaded(now));
        actions
    }

    /// Continues once the end mark and every lane's last frame have arrived.
    fn loaded(&mut self, now: Duration) -> Vec<Action> {
        let State::Loading(arrival @ Arrival { lanes_left: 0, end: Some((run_state, expected)), .. }) = self.state
        else {
            return Vec::new();
        };
        if arrival.frames != expected {
            let what = format!("{} Pages frames came, the end mark has {expected}", arrival.frames);
            return self.over(Err(MigrationError::Protocol(what)));
        }
        let mut actions = vec![Action::Report];
        if arrival.agreed.return_path {
            actions.extend(self.compare(arrival, run_state, now));
        } else {
            // Nothing may follow the end mark of a stored stream: further bytes mean a damaged file.
            self.state = State::ReachingEnd(arrival, run_state);
        }
        actions
    }

    fn compare(&mut self, arrival: Arrival, run_state: RunState, now: Duration) -> Vec<Action> {
        let return_path = arrival.agreed.return_path;
        if !arrival.agreed.verify {
            return self.make_durable(return_path, run_state, now);
        }
        self.state = State::Comparing { return_path, run_state, began: now };
        vec![Action::Compare]
    }

    fn make_durable(&mut self, return_path: bool, run_state: RunState, now: Duration) -> Vec<Action> {
        self.state = State::Writing { return_path, run_state, began: now };
        vec![Action::MakeDurable]
    }

    /// The report of the parts that this end has worked on.
    fn times(&self) -> Action {
        let DowntimeParts { verify, durable, prepare, start, .. } = self.parts;
        Action::Send(DestinationTimes { verify, durable, prepare, start }.message())
    }

    /// From here on this end waits for Go or the end.
    fn report_loaded(&mut self, now: Duration) -> Vec<Action> {
        self.state = State::AwaitingGo { give_up: now + self.handover_timeout };
        vec![self.times(), Action::Send(Message::Loaded { verified: self.verified == Some(true) })]
    }

    fn awaiting_go(&mut self, input: Input, now: Duration) -> Vec<Action> {
        let happening = match input {
            Input::Received(message) => Happening::Received(message),
            Input::StreamEnded => Happening::Lost(closed()),
            Input::Cancel => Happening::Cancel,
            Input::Failed(error) => error.into(),
            _ => return Vec::new(),
        };
        self.happened(happening, now)
    }

    /// One step of the last handshake: see [`handshake`](super::handshake).
    fn happened(&mut self, happening: Happening, now: Duration) -> Vec<Action> {
        match awaiting_go(happening) {
            DestinationStep::Wait => Vec::new(),
            DestinationStep::Start(run_state) => self.start(run_state, true, now),
            DestinationStep::End(NotStarted::Cancelled) => self.over(Err(MigrationError::Cancelled)),
            DestinationStep::End(why) => self.over(Err(why.into())),
        }
    }

    fn start(&mut self, run_state: RunState, return_path: bool, now: Duration) -> Vec<Action> {
        self.start_begun = true;
        self.state = State::Starting { began: now, return_path };
        vec![Action::notify(Event::HandedOver), Action::Start(run_state)]
    }

    fn started(&mut self, result: Result<(), MigrationError>, return_path: bool, took: Duration) -> Vec<Action> {
        if !return_path {
            return self.over(result);
        }
        self.parts.start = took;
        let answer = match &result {
            Ok(()) => Message::Running,
            Err(error) => Message::StartFailed(error.to_string().into()),
        };
        self.over(result);
        vec![self.times(), Action::Send(answer)]
    }
}

/// The stream ended where nothing more had to come.
fn closed() -> Loss {
    Loss::Closed(Role::Source)
}

/// The stream ended where more had to come.
pub(in crate::migration) fn ended_early() -> MigrationError {
    MigrationError::Lost(Loss::Incomplete)
}

fn behind_the_end(message: &Message) -> MigrationError {
    MigrationError::Protocol(format!("{} stands behind the end mark", message.kind().name()))
}

fn unwelcome(message: Message) -> MigrationError {
    match message {
        Message::Abort(why) => MigrationError::GivenUp { peer: Role::Source, why },
        other => MigrationError::Protocol(format!("unexpected message: {}", other.kind().name())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A course whose pages are loaded, and whose digests are compared.
    fn comparing() -> DestinationCourse {
        let mut course = DestinationCourse::new(Duration::from_secs(20));
        let end = Message::End { run_state: RunState::Running, frames: 3 };
        let agreed = Agreed { lanes: 1, verify: true, return_path: true };
        for input in [Input::Gathered, Input::Agreed(agreed), Input::LaneOver { frames: 3 }, Input::Received(end)] {
            course.step(input, Duration::ZERO);
        }
        course
    }

    #[test]
    fn a_source_that_ends_while_digests_are_compared_has_closed_a_complete_stream() {
        let mut course = comparing();
        assert!(course.step(Input::StreamEnded, Duration::ZERO).is_empty());
        let error = course.into_outcome(None).unwrap_err();
        assert!(matches!(error, MigrationError::Lost(Loss::Closed(Role::Source))), "{error:?}");
    }
}
