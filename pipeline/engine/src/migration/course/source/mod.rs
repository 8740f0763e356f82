//! The course of the source in precopy.
//!
//! ```text
//!  Connecting ─▶ Arming ─▶ Measuring ─▶ Sending ─▶ Measuring ─▶ Syncing ─┬─▶ Sending (another round, a sample)
//!                              │           ▲                             ├─▶ Draining ─▶ Syncing
//!                              └─▶ Syncing ┘ (if hints may come)         ├─▶ Throttling ─▶ Sending
//!                                                                        └─▶ Draining ─▶ Pausing
//!  Pausing ─▶ Saving ─▶ Releasing ─▶ Syncing ─▶ SendingSaved ─▶ Sending (the last round) ─▶ Digesting ─▶ Ending
//!                                                         Ending ─┬─▶ HandingOver ─▶ Committing ─▶ HandingOver ─▶ Over
//!                                                                 └─▶ Completing (a file) ─────────────────────▶ Over
//! ```
//!
//! Behind each Syncing comes OpeningHints if hints may come. A deadline or the operator may pause the guest in any state
//! before Pausing: the state completes its work, and Saving follows. Any failure, and a cancel before Go, leads to
//! Resuming if the guest was paused, and to Over. A lost connection leads to Disconnected instead: see `recovery`.
//!
//! | | |
//! |---|---|
//! | `rounds` | rounds while the guest runs, and what is decided between them |
//! | `switchover` | the pause, and what the paused guest waits for |
//! | `handover` | the last handshake, or the end of a file |
//! | `recovery` | a lost connection is made again |
//! | `postcopy` | the guest runs at the destination before its pages are there |
//! | `end` | the guest is put where the result has it |
//! | `requests` | the operator changes a setting or requests the switchover |
//! | `spent` | the parts of the downtime |

mod end;
mod handover;
mod postcopy;
mod recovery;
mod requests;
mod rounds;
mod spent;
mod switchover;

use std::sync::Arc;
use std::time::Duration;

use memferry_stages::bitmap_sync::Synced;
use memferry_stages::scanner::{RoundScanned, ScanOrder};
use memferry_stages::sender::Sent;
use memferry_stages::wire::Message;
use memferry_stages::wire::messages::RunState;
use memferry_transports::Transport;
use tokio::sync::oneshot;

use super::handshake::SourceHandshake;
use super::times::{DestinationTimes, write_back_of};
use crate::change::Change;
use crate::control::{ControlError, Request};
use crate::controller::Controller;
use crate::controller::forecast::{Forecast, Measured, Standing, Work};
use crate::events::{DowntimeParts, Event, Outages, Phase, Role};
use crate::migration::driver::Course;
use crate::migration::error::{Failure, Loss, MigrationError};
use crate::settings::SourceSettings;
pub(in crate::migration) use end::{Conclusion, End, why_cancelled};
use postcopy::Postcopy;
pub(in crate::migration) use recovery::Returned;
use recovery::{Attempts, Outage};
use rounds::{AfterSync, Drain, Next, Round};
use spent::{Part, Spent};

/// The time for device state that the forecast assumes: it is not known before the guest is paused.
const STATE_GUESS: Duration = Duration::from_micros(500);
/// The most that one request and its answer may count as: building a large machine is not part of a handover.
const HANDOVER_MOST: Duration = Duration::from_millis(50);

/// What happened at the source.
#[derive(Debug)]
pub(in crate::migration) enum Input {
    /// The destination is reached and ready for pages.
    Connected(Connected),
    /// After a lost connection, the destination is reached again and ready for pages.
    Returned(Returned),
    /// After a lost connection, a try to reach the destination failed.
    NotReached(MigrationError),
    /// The logs are started, and the bitmap is filled.
    Armed,
    /// The digests of both ends would take this time.
    Measured(Duration),
    /// The scanner reached the end of the bitmap.
    Scanned(RoundScanned),
    /// A lane's mark was sent. The stages have worked this long since the round began.
    Sent(Sent, Work),
    /// A sync is complete. `standing` is the state after it.
    Synced { found: Synced, standing: Standing },
    /// Page hinters are notified of the sync, and hints count if they can be valid.
    HintsOpen,
    /// The destination acknowledged this number of frames, in all lanes. This number of pages is in flight.
    Acknowledged { in_flight: u64, frames: u64 },
    /// The guest is paused.
    Paused,
    /// The guest is throttled as ordered, or cannot be.
    Throttled(Result<(), MigrationError>),
    /// The guest's device state is saved.
    Saved,
    /// What only one side may hold is released.
    Released,
    /// The saved state is queued.
    StateSent,
    /// This end's digests are computed.
    Digested,
    /// The end mark is queued, and everything before it.
    EndSent,
    /// The page that differs, as text.
    PageNamed(String),
    /// Nothing here resumes the guest on its own any more.
    Committed,
    /// The file is complete and durable.
    FileComplete,
    /// The guest is where it was, or cannot be resumed.
    Resumed(Result<(), MigrationError>),
    /// The destination sent a message that decides something, or a heartbeat with its figures.
    Received(Message),
    /// A stage ended with an error, possibly the consequence of another's.
    Broke(Failure),
    /// The connection or a call failed, or a stage whose failure is explained.
    Failed(MigrationError),
    /// The operator cancelled.
    Cancel,
    /// The operator sent a request.
    Asked { request: Request, standing: Standing },
    /// An interval of time has passed. `bulk_bytes` of pages were sent so far.
    Tick { standing: Standing, bulk_bytes: u64 },
}

/// The destination is reached.
#[derive(Clone, Copy, Debug)]
pub(in crate::migration) struct Connected {
    /// How long one request and its answer took.
    pub(in crate::migration) answered_in: Duration,
    /// How long the destination waits for a source whose connection is lost; zero if it does not.
    pub(in crate::migration) awaited: Duration,
}

/// The channel for the answer to a request.
pub(in crate::migration) type Answer = oneshot::Sender<Result<(), ControlError>>;

/// What is to be done at the source. Those with an answer are questions: see [`Course::step`].
#[derive(Debug)]
pub(in crate::migration) enum Action {
    /// Report an event.
    Notify(Box<Event>),
    /// Find out why a stage failed: the destination's last message if it sent one, else the first failure. Answer:
    /// [`Input::Received`] or [`Input::Failed`].
    Explain(Failure),
    /// Reach the destination and agree, in the background. Then: [`Input::Connected`].
    Connect,
    /// The connection is lost: end what dies with it, the stages and their queues.
    EndAttempt,
    /// Reach the destination again, in the background, as this attempt. An earlier try is given up. Then: [`Input::Returned`] or
    /// [`Input::NotReached`]; where the destination has proven itself and gives up, [`Input::Received`].
    Return { attempt: u32 },
    /// From here on the destination is reached over this transport.
    SetTransport(Arc<dyn Transport>),
    /// Start the logs and fill the bitmap. Answer: [`Input::Armed`].
    Arm,
    /// Measure the cost of digests. Answer: [`Input::Measured`].
    Measure,
    /// Start the stages, at this bandwidth.
    StartStages(Option<u64>),
    /// Scan. Then: [`Input::Scanned`], and [`Input::Sent`] for each lane.
    Scan(ScanOrder),
    /// End the round in progress: what is not scanned stays dirty.
    CutRound,
    /// End every lane behind the round that is scanned.
    EndLanes,
    /// Mark the end of direct writes in every lane, and let the destination discard what is dirty. Then: [`Input::Received`], with
    /// Discarded.
    EndDirect,
    /// Serve pages that the destination asks for. Between End's sync and here no page is taken.
    Serve,
    /// Send which pages the last sync has found besides those that were discarded.
    SendMissing,
    /// Everything sent is stored: nothing is in flight.
    AcknowledgeAll,
    /// Close the window for hints, and sync. Then: [`Input::Synced`].
    Sync { after_round: u32 },
    /// Notify page hinters of the sync; of a running guest, open the window for hints, if hints can be valid. Answer:
    /// [`Input::HintsOpen`].
    OpenHints { runs: bool },
    /// Throttle the guest, and then answer the request for it. Answer: [`Input::Throttled`].
    Throttle(u8, Option<Answer>),
    /// Limit the bandwidth from here on.
    SetBandwidth(Option<u64>),
    /// Give the XBZRLE cache this number of bytes.
    SetCache(u64),
    /// Report a changed setting.
    ReportChange { round: u32, from: Change, to: Change },
    /// Answer a request.
    Answer(Answer, Result<(), ControlError>),
    /// Pause the guest. Answer: [`Input::Paused`].
    Pause,
    /// Save the device state of the paused guest. Answer: [`Input::Saved`].
    Save,
    /// Release what only one side may hold. Answer: [`Input::Released`].
    Release,
    /// Begin to compute digests. The bitmap leaves out no more pages from here on.
    StartDigests,
    /// Send the saved state. Answer: [`Input::StateSent`].
    SendState,
    /// Wait for the digests, in the background. Then: [`Input::Digested`].
    AwaitDigests,
    /// Send the digests.
    SendDigests,
    /// Send the end mark. Answer: [`Input::EndSent`].
    SendEnd { run_state: RunState, frames: u64 },
    /// Find the page that differs. Answer: [`Input::PageNamed`].
    NamePage(Message),
    /// Make sure that nothing here resumes the guest on its own. Answer: [`Input::Committed`].
    Commit,
    /// Hand Go to the transport.
    Go(RunState),
    /// Complete the file. Then: [`Input::FileComplete`].
    Finish,
    /// No hint counts from here on.
    CloseHints,
    /// The guest is not throttled any more.
    LiftThrottle,
    /// Put the guest where it was. Answer: [`Input::Resumed`].
    Resume { reacquire: bool, run: bool },
    /// The guest may run elsewhere: nothing here needs to guard it.
    Moved,
}

impl Action {
    fn notify(event: Event) -> Self {
        Self::Notify(Box::new(event))
    }
}

/// The facts of a migration that do not change.
#[derive(Clone, Copy, Debug)]
pub(in crate::migration) struct Facts {
    /// Did the guest run before the migration?
    pub(in crate::migration) was: RunState,
    /// Does the transport carry the destination's answers? Where it does not, it stores the stream.
    pub(in crate::migration) return_path: bool,
    /// Is a lost connection made again, if the destination agrees?
    pub(in crate::migration) recovers: bool,
    /// May the guest give hints?
    pub(in crate::migration) hints: bool,
    /// Bytes of a page.
    pub(in crate::migration) page_bytes: u64,
}

/// The state, with its data.
#[derive(Debug)]
enum State {
    Connecting,
    Arming,
    Measuring(Next),
    Sending(Round),
    Syncing(AfterSync),
    /// The destination discards pages, until it is waited for no longer.
    Discarding(Duration),
    OpeningHints {
        then: AfterSync,
        standing: Standing,
    },
    Draining(Drain),
    Throttling,
    Pausing,
    Saving,
    Releasing,
    SendingSaved,
    Digesting,
    Ending,
    HandingOver {
        handshake: SourceHandshake,
        give_up: Duration,
    },
    Committing,
    Completing,
    /// The guest runs at the destination. The round that is sent, if it is not complete.
    Serving(Option<Round>),
    Restoring(Outage),
    Disconnected(Outage),
    Resuming(End),
    Over(Box<Conclusion>),
}

/// What the migration has done to the guest.
#[derive(Clone, Copy, Debug, Default)]
struct Done {
    paused: bool,
    released: bool,
    throttled: bool,
}

/// See the [module](self).
#[derive(Debug)]
pub(in crate::migration) struct SourceCourse {
    settings: SourceSettings,
    facts: Facts,
    controller: Controller,
    state: State,
    done: Done,
    spent: Spent,
    /// What the destination has reported.
    times: DestinationTimes,
    downtime: Option<Duration>,
    /// The likely cost of the switchover when the controller decided on it, if that had a forecast.
    forecast: Option<Forecast>,
    round: u32,
    /// Frames of pages sent in complete rounds.
    frames: u64,
    /// When the last of them was sent, until the destination has acknowledged it.
    not_loaded: Option<Duration>,
    verified: Option<bool>,
    differing_page: Option<String>,
    attempts: Attempts,
    postcopy: Postcopy,
}

impl SourceCourse {
    pub(in crate::migration) fn new(settings: SourceSettings, facts: Facts) -> Self {
        let mut controller = Controller::new(&settings, facts.page_bytes);
        let fixed = controller.fixed();
        fixed.pause = settings.expected_pause;
        fixed.state = STATE_GUESS;
        fixed.prepare = settings.expected_prepare;
        fixed.start = settings.expected_start;
        Self {
            settings,
            facts,
            controller,
            state: State::Connecting,
            done: Done::default(),
            spent: Spent::default(),
            times: DestinationTimes::default(),
            downtime: None,
            forecast: None,
            round: 0,
            frames: 0,
            not_loaded: None,
            verified: None,
            differing_page: None,
            attempts: Attempts::default(),
            postcopy: Postcopy::default(),
        }
    }

    /// The settings in force.
    pub(in crate::migration) fn settings(&self) -> &SourceSettings {
        &self.settings
    }

    pub(in crate::migration) fn controller(&self) -> &Controller {
        &self.controller
    }

    /// Is the guest paused by the migration?
    pub(in crate::migration) fn is_paused(&self) -> bool {
        self.done.paused
    }

    /// The round that is sent, or was sent last; 0 before the first.
    pub(in crate::migration) fn round(&self) -> u32 {
        self.round
    }

    /// Were the digests found equal? `None` if they were not compared.
    pub(in crate::migration) fn verified(&self) -> Option<bool> {
        self.verified
    }

    pub(in crate::migration) fn forecast(&self) -> Option<Forecast> {
        self.forecast
    }

    /// The downtime, once it is over.
    pub(in crate::migration) fn downtime(&self) -> Option<Duration> {
        self.downtime
    }

    pub(in crate::migration) fn parts(&self) -> DowntimeParts {
        self.spent.parts()
    }

    /// What lost connections have cost.
    pub(in crate::migration) fn outages(&self) -> Outages {
        self.attempts.outages
    }

    /// Is there no connection?
    pub(in crate::migration) fn is_disconnected(&self) -> bool {
        matches!(self.state, State::Disconnected(_))
    }

    /// The last message to the destination.
    pub(in crate::migration) fn farewell(&self) -> Option<Message> {
        self.conclusion().and_then(|conclusion| conclusion.end.farewell(self.recovers()))
    }

    /// How it ended, once the course is over.
    pub(in crate::migration) fn conclusion(&self) -> Option<&Conclusion> {
        match &self.state {
            State::Over(conclusion) => Some(conclusion),
            _ => None,
        }
    }

    /// How it ended. With a mistake a course that is not over did not end by itself: what was done to the guest is not
    /// undone then.
    pub(in crate::migration) fn into_conclusion(self, mistake: Option<MigrationError>) -> Conclusion {
        let cause = |state: &State| MigrationError::Mistake(format!("the course ended as {state:?}"));
        let failed = |cause| Conclusion { end: End::Failed(cause), resume_error: None, stays_paused: false };
        match (self.state, mistake) {
            (State::Over(conclusion), _) => *conclusion,
            (State::HandingOver { handshake: SourceHandshake::AwaitingRunning, .. }, Some(mistake)) => {
                Conclusion { end: End::Unconfirmed(mistake), resume_error: None, stays_paused: true }
            }
            (State::Resuming(end), resume_error @ Some(_)) => Conclusion { end, resume_error, stays_paused: false },
            (state, resume_error @ Some(_)) if self.done.paused => Conclusion { resume_error, ..failed(cause(&state)) },
            (state, mistake) => failed(mistake.unwrap_or_else(|| cause(&state))),
        }
    }
}

impl Course for SourceCourse {
    type Input = Input;
    type Action = Action;

    fn begin(&mut self) -> Vec<Action> {
        let mut actions = vec![Action::notify(Event::Phase(Phase::Setup))];
        actions.extend(self.warn_of_postcopy());
        actions.push(Action::Connect);
        actions
    }

    fn failed(error: MigrationError) -> Input {
        Input::Failed(error)
    }

    fn step(&mut self, input: Input, now: Duration) -> Vec<Action> {
        let input = match input {
            Input::Broke(failure) => return vec![Action::Explain(failure)],
            Input::Received(Message::Heartbeat(figures)) => {
                self.times.hear(&figures);
                return write_back_of(&figures).map_or_else(Vec::new, |times| self.write_back(times, now));
            }
            input => input,
        };
        match self.state {
            State::HandingOver { .. } | State::Committing | State::Completing => return self.handing_over(input, now),
            State::Disconnected(_) => return self.while_disconnected(input, now),
            State::Serving(_) => return self.serving(input, now),
            _ => {}
        }
        match (input, &mut self.state) {
            (_, State::Over(_)) => Vec::new(),
            (Input::Failed(error), State::Resuming(_)) => self.resumed(Err(error), now),
            (Input::Failed(error), State::Restoring(_)) => self.restored(Err(error), now),
            (Input::Resumed(result), State::Restoring(_)) => self.restored(result, now),
            (Input::Cancel, _) => self.end(End::Cancelled(MigrationError::Cancelled), now),
            (Input::Failed(error), _) => self.fail_or_recover(error, now),
            (Input::Received(Message::Discarded), State::Discarding(_)) => self.discarded(now),
            (Input::Received(message), _) => self.fail(unwelcome(message), now),
            (Input::Asked { request, standing }, _) => self.asked(request, standing, now),
            (Input::Tick { standing, bulk_bytes }, _) => self.tick(standing, bulk_bytes, now),
            (Input::Paused, _) => self.paused(now),
            (Input::Throttled(result), _) => self.throttled(result, now),
            (Input::Acknowledged { in_flight, frames }, _) => self.acknowledged(in_flight, frames, now),
            (Input::Connected(connected), State::Connecting) => self.connected(connected),
            (Input::Armed, State::Arming) => self.armed(now),
            (Input::Measured(time), State::Measuring(next)) => {
                self.controller.measured(Measured::Verify, time);
                let next = *next;
                self.proceed(next, now)
            }
            (Input::Scanned(scanned), State::Sending(round)) => {
                round.is_scanned = true;
                let mut actions = vec![Action::notify(Event::RoundScanned { round: scanned.round })];
                actions.extend(self.round_complete(Work::default(), now));
                actions
            }
            (Input::Sent(sent, work), State::Sending(round)) => {
                round.note(sent);
                self.round_complete(work, now)
            }
            // The marks of the switch.
            (Input::Sent(..), _) if self.postcopy == Postcopy::Switching => Vec::new(),
            (Input::Synced { found, standing }, State::Syncing(then)) => {
                let then = *then;
                self.synced(found, standing, then, now)
            }
            (Input::HintsOpen, &mut State::OpeningHints { then, standing }) => self.after_sync(then, &standing, now),
            (Input::Saved, State::Saving) => self.saved(),
            (Input::Released, State::Releasing) => self.sync(AfterSync::LastRound, now),
            (Input::StateSent, State::SendingSaved) => self.state_sent(now),
            (Input::Digested, State::Digesting) => self.digested(),
            (Input::EndSent, State::Ending) => self.end_sent(now),
            (Input::Resumed(result), State::Resuming(_)) => self.resumed(result, now),
            (input, state) => {
                let what = format!("{input:?} where the source is {state:?}");
                self.fail(MigrationError::Mistake(what), now)
            }
        }
    }

    fn wake(&mut self, now: Duration) -> Vec<Action> {
        match self.state {
            State::Draining(Drain { next: Next::Postcopy, .. }) => {
                let limit = self.settings.handover_timeout;
                self.fail_or_recover(MigrationError::Lost(Loss::NothingTaken(limit)), now)
            }
            State::Draining(drain) => self.proceed(drain.next, now),
            State::Discarding(_) => self.not_discarded(now),
            State::HandingOver { .. } => self.handover_timed_out(now),
            State::Disconnected(_) => self.try_again(now),
            _ => Vec::new(),
        }
    }

    fn wakes_at(&self) -> Option<Duration> {
        match &self.state {
            State::Draining(drain) => Some(drain.give_up),
            State::Discarding(give_up) => Some(*give_up),
            State::HandingOver { give_up, .. } => Some(*give_up),
            State::Disconnected(outage) => Some(self.outage_wakes_at(outage)),
            _ => None,
        }
    }

    fn is_over(&self) -> bool {
        matches!(self.state, State::Over(_))
    }
}

impl SourceCourse {
    fn connected(&mut self, connected: Connected) -> Vec<Action> {
        let Connected { answered_in, awaited } = connected;
        self.attempts.awaited = awaited;
        // The handover takes two one-way trips, as this request and its answer do.
        let fixed = self.controller.fixed();
        fixed.handover = answered_in.min(HANDOVER_MOST);
        self.state = State::Arming;
        vec![Action::Arm]
    }

    fn armed(&mut self, now: Duration) -> Vec<Action> {
        self.controller.armed(now);
        self.measure(Next::FirstRound, now)
    }

    /// Reports a phase.
    fn phase(phase: Phase) -> Action {
        Action::notify(Event::Phase(phase))
    }
}

/// Why a message of the destination that is expected only in the last handshake ends the migration.
fn unwelcome(message: Message) -> MigrationError {
    let peer = Role::Destination;
    match message {
        Message::Refused(why) => MigrationError::Refused { peer, why },
        Message::Abort(why) => MigrationError::GivenUp { peer, why },
        other => MigrationError::Protocol(format!("unexpected message: {}", other.kind().name())),
    }
}
