//! The course of the destination in precopy.
//!
//! ```text
//!  Gathering ─▶ Agreeing ─▶ Loading ─┬─────────────────────────▶ Comparing ─▶ Writing ─▶ Preparing ─┐
//!                                    └▶ ReachingEnd (a file) ─▶                                     │
//!                                       ┌───────────────────────────────────────────────────────────┘
//!                                       ├─▶ AwaitingGo ─▶ Starting ─▶ Settling ─▶ Over
//!                                       └─▶ Starting (a file) ──────────────────▶ Over
//!
//!  a lost connection before the start ─▶ Disconnected ─▶ Agreeing ─▶ Loading (the source returns)
//!                    after the start  ─▶ Settling ─────▶ Agreeing ─▶ Settling
//! ```
//!
//! `postcopy` has what a switch to postcopy adds.
//!
//! Any failure before Go leads to Over: nothing runs here, and the source gets the reason. So does a lost connection, if it is not to be
//! made again. A source that returns ends what is left of the attempt before, so that no Go of that is ever acted on.
//!
//! Settling: the guest was started, and the source may not know. Until it says that it does, this end answers a source that returns.

mod handover;
mod postcopy;
mod recovery;

use std::time::Duration;

use memferry_stages::wire::Message;
use memferry_stages::wire::messages::RunState;

use super::handshake::Happening;
use super::times::DestinationTimes;
use crate::events::{DowntimeParts, Event, Outages, Phase, Role};
use crate::migration::driver::Course;
use crate::migration::error::{Failure, Loss, MigrationError};
use crate::settings::RecoverySettings;
use handover::answer;
use postcopy::Postcopy;

/// What happened at the destination.
#[derive(Debug)]
pub(in crate::migration) enum Input {
    /// All connections of one migration have arrived.
    Gathered,
    /// The guest is built, and the source was sent Ready.
    Agreed(Agreed),
    /// The source has returned after a lost connection, and has proven itself.
    Returned,
    /// A lane writes directly no more. This number of frames is loaded by now, in all lanes.
    DirectEnded { frames: u64 },
    /// The pages that the source has named are discarded.
    Discarded,
    /// Pages that are missing can be asked for.
    Registered,
    /// Every page is there.
    Filled,
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
    /// That is taken back.
    Unprepared,
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
    /// Is a lost connection made again?
    pub(in crate::migration) recovers: bool,
    /// How long the source tries to return.
    pub(in crate::migration) awaited: Duration,
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
    /// The connection is lost, or another one takes its place: stop to read, load what has arrived, and end the stages.
    EndAttempt,
    /// Report to the source that returned what is loaded, and whether the start was begun, in the background. Then: [`Input::Agreed`].
    Rejoin { started: bool },
    /// Start the stages.
    StartStages,
    /// Discard the pages that the source has named. Answer: [`Input::Discarded`].
    Discard,
    /// Discard what the last sync has found besides, and ask for pages that are missing from here on. Answer: [`Input::Registered`].
    Register,
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
    /// Take back that the device state was applied. Answer: [`Input::Unprepared`].
    Unprepare,
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
    /// Lanes whose DirectEnds has not come.
    direct_left: u16,
    /// Has Discard come?
    discards: bool,
}

/// The state, with its data.
#[derive(Debug)]
enum State {
    Gathering,
    /// Since when there was no connection, if one was lost.
    Agreeing {
        lost: Option<Duration>,
    },
    Disconnected {
        since: Duration,
        cause: MigrationError,
    },
    Loading(Arrival),
    Discarding(Arrival),
    Registering(Arrival, RunState),
    ReachingEnd(Arrival, RunState),
    Comparing {
        return_path: bool,
        run_state: RunState,
        began: Duration,
    },
    Writing {
        return_path: bool,
        run_state: RunState,
        began: Duration,
    },
    Preparing {
        return_path: bool,
        run_state: RunState,
        began: Duration,
    },
    AwaitingGo {
        give_up: Duration,
    },
    Starting {
        began: Duration,
        return_path: bool,
    },
    /// The guest runs, and pages are missing.
    Filling,
    Settling,
    Over(Result<(), MigrationError>),
}

/// See the [module](self).
#[derive(Debug)]
pub(in crate::migration) struct DestinationCourse {
    state: State,
    handover_timeout: Duration,
    recovery: RecoverySettings,
    agreed: Option<Agreed>,
    verified: Option<bool>,
    parts: DowntimeParts,
    outages: Outages,
    /// Is the device state applied to the guest?
    prepared: bool,
    /// Why a source that returns is refused.
    refusal: Option<MigrationError>,
    /// Was the start begun? After that nothing can be refused.
    start_begun: bool,
    started: Option<Started>,
    postcopy: Postcopy,
}

/// The guest was started, or could not be, and the source may not know.
#[derive(Debug)]
struct Started {
    result: Result<(), MigrationError>,
    /// A source that returns is answered until then.
    until: Duration,
}

impl DestinationCourse {
    pub(in crate::migration) fn new(handover_timeout: Duration, recovery: RecoverySettings) -> Self {
        Self {
            state: State::Gathering,
            handover_timeout,
            recovery,
            agreed: None,
            verified: None,
            parts: DowntimeParts::default(),
            outages: Outages::default(),
            prepared: false,
            refusal: None,
            start_begun: false,
            started: None,
            postcopy: Postcopy::default(),
        }
    }

    /// What lost connections have cost.
    pub(in crate::migration) fn outages(&self) -> Outages {
        self.outages
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
        let is_filling = self.is_filling();
        match (input, &mut self.state) {
            (_, State::Over(_)) => Vec::new(),
            (Input::Broke(failure), _) => vec![Action::Explain(failure)],
            (Input::Started(result), &mut State::Starting { began, return_path }) => {
                self.started(result, return_path, began, now)
            }
            (Input::Failed(error), &mut State::Starting { began, return_path }) => {
                self.started(Err(error), return_path, began, now)
            }
            (Input::Returned, State::Gathering | State::Agreeing { lost: None }) => {
                let what = "the source returns before it has described its guest";
                self.over(Err(MigrationError::Protocol(what.into())))
            }
            (Input::Returned, _) => self.returned(now),
            (Input::Filled, _) => self.filled(now),
            (input, State::Settling) => self.settling(input),
            (input, State::Filling) => self.filling(input, now),
            (input @ (Input::Cancel | Input::Failed(_)), State::Disconnected { .. } | State::Agreeing { .. })
                if is_filling =>
            {
                self.waiting_for_pages(input, now)
            }
            (input, State::AwaitingGo { .. }) => self.awaiting_go(input, now),
            // The source cannot be notified before it returns.
            (Input::Failed(error), State::Disconnected { .. }) => {
                self.refusal = Some(error);
                Vec::new()
            }
            (Input::Failed(error), _) => self.fail_or_wait(error, now),
            (Input::Cancel, _) => self.over(Err(MigrationError::Cancelled)),
            (Input::Gathered, State::Gathering) => {
                self.state = State::Agreeing { lost: None };
                vec![Action::Agree]
            }
            (Input::Unprepared, State::Agreeing { .. }) => vec![Action::Rejoin { started: false }],
            (Input::Unprepared, State::Disconnected { .. }) => Vec::new(),
            (Input::Agreed(agreed), &mut State::Agreeing { lost }) => self.agreed(agreed, lost, now),
            (Input::DirectEnded { frames }, State::Loading(arrival)) if arrival.direct_left > 0 => {
                arrival.frames = frames;
                arrival.direct_left -= 1;
                self.discard_if_named()
            }
            (Input::Received(Message::Discard), State::Loading(arrival)) => {
                arrival.discards = true;
                self.discard_if_named()
            }
            (Input::Discarded, State::Discarding(arrival)) => {
                self.state = State::Loading(*arrival);
                vec![Action::Send(Message::Discarded)]
            }
            (Input::Registered, &mut State::Registering(arrival, run_state)) => {
                let mut actions = if arrival.agreed.verify { vec![Action::StartDigests] } else { Vec::new() };
                actions.extend(self.compare(arrival, run_state, now));
                actions
            }
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
            (Input::StreamEnded, State::Comparing { .. }) => self.fail_or_wait(MigrationError::Lost(closed()), now),
            (Input::StreamEnded, _) => self.fail_or_wait(ended_early(), now),
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
                self.prepared = true;
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
        match self.state {
            State::AwaitingGo { .. } => self.happened(Happening::TimedOut, now),
            State::Disconnected { .. } => self.not_returned(now),
            State::Settling => {
                let what = "the source has not confirmed that it knows that the guest was started here: look there";
                let warning = Action::notify(Event::Warning(what.into()));
                self.settled();
                vec![warning]
            }
            _ => Vec::new(),
        }
    }

    fn wakes_at(&self) -> Option<Duration> {
        match self.state {
            State::AwaitingGo { give_up } => Some(give_up),
            // Only the operator gives a guest up that runs here.
            State::Disconnected { .. } if self.is_filling() => None,
            State::Disconnected { since, .. } => Some(since + self.recovery.give_up),
            State::Settling => self.started.as_ref().map(|started| started.until),
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

    fn agreed(&mut self, agreed: Agreed, lost: Option<Duration>, now: Duration) -> Vec<Action> {
        self.agreed = Some(agreed);
        // Neither end waits for one that has given up.
        self.recovery.give_up = self.recovery.give_up.min(agreed.awaited);
        let mut actions = vec![Action::StartStages];
        if let Some(since) = lost {
            let outage = now.saturating_sub(since);
            self.outages.time += outage;
            let attempt = self.outages.lost + 1;
            actions.push(Action::notify(Event::Reconnected { attempt, outage, put_back_bytes: 0 }));
        }
        if let Some(started) = &self.started {
            actions.extend([self.times(), Action::Send(answer(&started.result))]);
            actions.extend(self.fill());
            return actions;
        }
        let (lanes_left, direct_left) = (agreed.lanes, agreed.lanes);
        self.state = State::Loading(Arrival { agreed, lanes_left, frames: 0, end: None, direct_left, discards: false });
        actions.push(Action::notify(Event::Phase(Phase::Active)));
        actions
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
        if self.postcopy == Postcopy::Switching {
            return self.switched();
        }
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

    /// The end mark of a switch to postcopy: everything that is sent before Go is here.
    fn switched(&mut self) -> Vec<Action> {
        let State::Loading(arrival @ Arrival { end: Some((run_state, expected)), .. }) = self.state else {
            return Vec::new();
        };
        if arrival.frames != expected {
            let what = format!("{} Pages frames came, the end mark has {expected}", arrival.frames);
            return self.over(Err(MigrationError::Protocol(what)));
        }
        self.state = State::Registering(arrival, run_state);
        vec![Action::notify(Event::Phase(Phase::Switchover)), Action::Report, Action::Register]
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
        let mut course = DestinationCourse::new(Duration::from_secs(20), RecoverySettings::OFF);
        let end = Message::End { run_state: RunState::Running, frames: 3 };
        let agreed = Agreed { lanes: 1, verify: true, return_path: true, recovers: false, awaited: Duration::ZERO };
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
