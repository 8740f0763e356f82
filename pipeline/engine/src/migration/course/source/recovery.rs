//! A lost connection: the guest is put back where it was, and the destination is reached again.
//!
//! ```text
//!                   ┌───────────────────────────────────────────────────┐ not reached: after a while again
//!                   ▼                                                   │
//!  any state ─┬▶ Disconnected ── Return ─▶ (the destination answers) ───┴─▶ Syncing ─▶ Sending
//!             └▶ Restoring ─▶ Disconnected          │
//!                (the guest was paused)             ├─▶ Restoring ─▶ Syncing   Go had left, and starts nothing any more
//!                                                   └─▶ HandingOver            Go had left, and was acted on
//! ```
//!
//! Until Go is handed to the transport, a lost connection resumes a paused guest at once (law 7). Afterwards the guest stays paused, and
//! only the destination's answer decides. While there is no connection the guest runs without a throttle.

use std::time::Duration;

use memferry_stages::batch::RoundKind;
use memferry_stages::scanner::ScanOrder;
use memferry_stages::wire::Message;
use memferry_stages::wire::messages::RunState;

use super::rounds::AfterSync;
use super::spent::{Part, Spent};
use super::{Action, Done, End, Input, Postcopy, SourceCourse, State};
use crate::control::{Ask, ControlError};
use crate::controller::Decision;
use crate::controller::forecast::Standing;
use crate::events::{Event, Outages, Phase};
use crate::migration::course::handshake::{HandoverError, SourceHandshake};
use crate::migration::course::times::DestinationTimes;
use crate::migration::error::{MigrationError, NotRecovered};

/// The longest wait between two tries.
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);

/// The attempts of a migration: one more each time that the destination is reached, or tried to be reached, again.
#[derive(Debug)]
pub(super) struct Attempts {
    /// The number of the latest, from 1.
    pub(super) number: u32,
    /// How long the destination waits for a source that was lost; zero if it does not.
    pub(super) awaited: Duration,
    pub(super) outages: Outages,
    /// Did the operator cancel when Go may have left? It counts if the destination then starts nothing.
    pub(super) cancelled_late: bool,
}

impl Default for Attempts {
    fn default() -> Self {
        Self { number: 1, awaited: Duration::ZERO, outages: Outages::default(), cancelled_late: false }
    }
}

/// The connection is lost.
#[derive(Debug)]
pub(super) struct Outage {
    /// How it was lost.
    cause: MigrationError,
    since: Duration,
    /// Go may have left: the guest stays paused until the destination has answered.
    is_handed_over: bool,
    /// How many tries to reach the destination have failed.
    tries: u32,
    /// Why the latest try failed.
    last: Option<String>,
    /// When the next try begins; `None` while one is made.
    again_at: Option<Duration>,
}

/// The destination is reached again.
#[derive(Clone, Copy, Debug)]
pub(in crate::migration) struct Returned {
    /// Was the guest started there?
    pub(in crate::migration) started: bool,
    /// Pages that were in flight, and are dirty again.
    pub(in crate::migration) put_back_pages: u64,
}

/// What ends the wait for a destination that runs the guest.
fn lost_while_serving(input: &Input) -> Option<MigrationError> {
    match input {
        Input::Cancel => Some(MigrationError::Cancelled),
        Input::Received(message) => Some(super::unwelcome(message.clone())),
        _ => None,
    }
}

impl SourceCourse {
    /// The migration fails, unless the error is a lost connection that can be made again.
    pub(super) fn fail_or_recover(&mut self, error: MigrationError, now: Duration) -> Vec<Action> {
        if !self.is_recoverable(&error) {
            return self.fail(error, now);
        }
        let attempts = self.settings.recovery.attempts;
        if self.attempts.outages.lost < attempts {
            return self.disconnect(error, now);
        }
        self.give_up(error, NotRecovered::LostTooOften { attempts }, self.is_handed_over(), now)
    }

    /// The connection is not made again.
    fn give_up(
        &mut self,
        cause: MigrationError,
        not_recovered: NotRecovered,
        is_handed_over: bool,
        now: Duration,
    ) -> Vec<Action> {
        let error = MigrationError::NotRecovered { cause: Box::new(cause), not_recovered };
        if is_handed_over { self.end(End::Unconfirmed(error), now) } else { self.fail(error, now) }
    }

    /// Do both ends make a lost connection again?
    pub(super) fn recovers(&self) -> bool {
        self.facts.recovers && !self.attempts.awaited.is_zero()
    }

    /// Is this a lost connection that can be made again?
    pub(super) fn is_recoverable(&self, error: &MigrationError) -> bool {
        self.recovers() && error.is_lost_connection()
    }

    /// Is there no connection, and may the guest run at the destination?
    fn is_waiting_behind_go(&self) -> bool {
        matches!(self.state, State::Disconnected(Outage { is_handed_over: true, .. }))
    }

    fn is_handed_over(&self) -> bool {
        let awaits_running =
            matches!(self.state, State::HandingOver { handshake: SourceHandshake::AwaitingRunning, .. });
        awaits_running || self.is_serving()
    }

    pub(super) fn disconnect(&mut self, cause: MigrationError, now: Duration) -> Vec<Action> {
        let is_handed_over = self.is_handed_over();
        if matches!(self.state, State::Sending(_) | State::Serving(Some(_))) {
            // What is left of the round is sent as the same one.
            self.round = self.round.saturating_sub(1);
        }
        self.attempts.outages.lost += 1;
        let outage = Outage { cause, since: now, is_handed_over, tries: 0, last: None, again_at: None };
        let mut actions = Vec::new();
        if !is_handed_over {
            self.postcopy = Postcopy::No;
            actions.push(Action::CloseHints);
            actions.extend(self.lift_throttle());
        }
        if self.done.paused && !is_handed_over {
            actions.push(self.restore(outage, now));
        } else {
            actions.extend(self.report_outage(&outage));
            self.state = State::Disconnected(outage);
            actions.extend(self.leave(now));
        }
        actions
    }

    fn lift_throttle(&mut self) -> Option<Action> {
        std::mem::take(&mut self.done.throttled).then_some(Action::LiftThrottle)
    }

    /// Puts the guest back where it was.
    fn restore(&mut self, outage: Outage, now: Duration) -> Action {
        self.spent.on(Part::Resume, now);
        self.state = State::Restoring(outage);
        Action::Resume { reacquire: self.done.released, run: self.facts.was == RunState::Running }
    }

    /// The guest is where it was, or cannot be resumed.
    pub(super) fn restored(&mut self, result: Result<(), MigrationError>, now: Duration) -> Vec<Action> {
        let State::Restoring(outage) = std::mem::replace(&mut self.state, State::Connecting) else {
            unreachable!("only a guest that is restored is reported as restored");
        };
        if let Err(error) = result {
            self.over(End::Failed(outage.cause), Some(error), false);
            return Vec::new();
        }
        self.spent.on(Part::Resume, now);
        let was_running = self.facts.was == RunState::Running;
        if was_running {
            self.attempts.outages.paused += self.spent.total().unwrap_or_default();
        }
        self.forget_switchover();
        let resumed = was_running.then(|| Action::notify(Event::Resumed));
        if outage.is_handed_over {
            // The destination is reached already: it has answered that Go was not acted on.
            return resumed.into_iter().chain(self.rejoin(now)).collect();
        }
        let lost = self.report_outage(&outage);
        self.state = State::Disconnected(outage);
        lost.into_iter().chain(resumed).chain(self.leave(now)).collect()
    }

    /// The switchover that a lost connection has interrupted did not happen.
    fn forget_switchover(&mut self) {
        self.done = Done::default();
        self.spent = Spent::default();
        self.times = DestinationTimes::default();
        self.forecast = None;
        self.verified = None;
        self.differing_page = None;
        self.postcopy = Postcopy::No;
        self.controller.interrupted();
    }

    fn report_outage(&self, outage: &Outage) -> [Action; 2] {
        let lost = Event::Disconnected { attempt: self.attempts.outages.lost, why: outage.cause.to_string() };
        [Action::notify(lost), Self::phase(Phase::Disconnected)]
    }

    /// The guest is where it must be: what dies with the connection ends, and the destination is reached again.
    fn leave(&mut self, now: Duration) -> Vec<Action> {
        let mut actions = vec![Action::EndAttempt];
        actions.extend(self.try_again(now));
        actions
    }

    /// Begins to reach the destination, or gives up.
    pub(super) fn try_again(&mut self, now: Duration) -> Vec<Action> {
        let give_up = self.waits_for();
        let State::Disconnected(outage) = &mut self.state else { return Vec::new() };
        if now < outage.since.saturating_add(give_up) {
            outage.again_at = None;
            // A number is used once: the destination may have seen it, though its answer was lost.
            self.attempts.number += 1;
            return vec![Action::Return { attempt: self.attempts.number }];
        }
        let State::Disconnected(outage) = std::mem::replace(&mut self.state, State::Connecting) else { unreachable!() };
        let waited = now.saturating_sub(outage.since);
        let last = outage.last.unwrap_or_else(|| "it did not answer".into());
        let not_recovered = NotRecovered::NotReached { tries: outage.tries.max(1), waited, last };
        self.attempts.outages.time += waited;
        self.give_up(outage.cause, not_recovered, outage.is_handed_over, now)
    }

    /// When the course waits no longer for the destination, or tries again to reach it.
    pub(super) fn outage_wakes_at(&self, outage: &Outage) -> Duration {
        let give_up = outage.since.saturating_add(self.waits_for());
        outage.again_at.map_or(give_up, |again| again.min(give_up))
    }

    /// How long an outage may last: neither end waits for an end that is gone. Once the guest runs there, giving up loses it: only the
    /// operator does that.
    fn waits_for(&self) -> Duration {
        let is_lost_by_giving_up = self.is_switching() && self.is_waiting_behind_go();
        if is_lost_by_giving_up {
            return Duration::MAX;
        }
        self.settings.recovery.give_up.min(self.attempts.awaited)
    }

    /// Handles an input while there is no connection.
    pub(super) fn while_disconnected(&mut self, input: Input, now: Duration) -> Vec<Action> {
        if self.is_serving()
            && let Some(lost) = lost_while_serving(&input)
        {
            return self.end(End::Lost(lost), now);
        }
        let is_serving = self.is_serving();
        let is_switching = self.is_switching();
        let State::Disconnected(outage) = &mut self.state else { return Vec::new() };
        let is_handed_over = outage.is_handed_over;
        match input {
            Input::Returned(returned) => self.returned(returned, now),
            Input::NotReached(why) => {
                let wait = self.settings.recovery.backoff.saturating_mul(2_u32.saturating_pow(outage.tries));
                let again_in = wait.min(LONGEST_BACKOFF);
                let why = why.to_string();
                outage.tries += 1;
                outage.last = Some(why.clone());
                outage.again_at = Some(now + again_in);
                vec![Action::notify(Event::NotReached { tries: outage.tries, why, again_in })]
            }
            Input::Cancel if is_handed_over && is_switching => {
                self.end(End::Unconfirmed(MigrationError::Cancelled), now)
            }
            Input::Cancel if is_handed_over => vec![self.too_late()],
            Input::Cancel => self.end(End::Cancelled(MigrationError::Cancelled), now),
            // The destination, which has proven itself, gives up: after Go too it starts nothing any more.
            Input::Received(Message::Abort(why)) if is_handed_over => {
                self.end(End::Failed(HandoverError::NotStarted(why).into()), now)
            }
            Input::Received(message) if is_handed_over => self.end(End::Unconfirmed(super::unwelcome(message)), now),
            Input::Received(message) => self.fail(super::unwelcome(message), now),
            // What failed here is tried again: giving up would lose the guest.
            Input::Failed(_) if is_serving => {
                outage.again_at = Some(now + self.settings.recovery.backoff);
                vec![Action::EndAttempt]
            }
            Input::Failed(error) if is_handed_over => self.end(End::Unconfirmed(error), now),
            Input::Failed(error) => self.fail(error, now),
            Input::Asked { request, standing } => match request.ask {
                Ask::SetAddress(_) => self.asked(request, standing, now),
                _ if is_handed_over => self.handing_over(Input::Asked { request, standing }, now),
                Ask::SwitchOver | Ask::Postcopy => {
                    let why = "the connection is lost: ask again once it is made again".into();
                    vec![Action::Answer(request.answer, Err(ControlError::Refused(why)))]
                }
                Ask::Set(_) => self.asked(request, standing, now),
            },
            Input::Tick { standing, .. } if !is_handed_over => self.tick_disconnected(&standing, now),
            // What a stage of the attempt that ended has reported.
            _ => Vec::new(),
        }
    }

    /// The deadline runs on. A switchover that it requires has to wait for the connection.
    fn tick_disconnected(&mut self, standing: &Standing, now: Duration) -> Vec<Action> {
        let Some(decided) = self.controller.tick(&Standing { elapsed: now, ..*standing }) else { return Vec::new() };
        if decided.decision != Decision::GiveUp {
            self.controller.interrupted();
            return Vec::new();
        }
        let mut actions = self.report(&decided);
        actions.extend(self.end(End::Cancelled(MigrationError::GaveUp(Box::new(decided))), now));
        actions
    }

    fn returned(&mut self, returned: Returned, now: Duration) -> Vec<Action> {
        let State::Disconnected(outage) = std::mem::replace(&mut self.state, State::Connecting) else {
            unreachable!("only what is lost is reached again");
        };
        let time = now.saturating_sub(outage.since);
        let put_back_bytes = returned.put_back_pages * self.facts.page_bytes;
        self.attempts.outages.time += time;
        self.attempts.outages.put_back_bytes += put_back_bytes;
        let attempt = self.attempts.outages.lost + 1;
        let mut actions = vec![Action::notify(Event::Reconnected { attempt, outage: time, put_back_bytes })];
        match (outage.is_handed_over, returned.started) {
            (true, true) if self.is_serving() => actions.extend(self.serve_again(now)),
            (true, false) if self.is_serving() => {
                let what = "the destination has started the guest, and reports that it has not";
                actions.extend(self.end(End::Lost(MigrationError::Protocol(what.into())), now));
            }
            (true, true) => {
                // It answers Go once more.
                let give_up = self.gives_up_running(now);
                self.state = State::HandingOver { handshake: SourceHandshake::AwaitingRunning, give_up };
                actions.extend([Self::phase(Phase::Switchover), Action::StartStages(self.bandwidth())]);
                if self.is_switching() {
                    actions.push(Action::Serve);
                }
            }
            (true, false) if self.attempts.cancelled_late => {
                actions.extend(self.end(End::Cancelled(MigrationError::Cancelled), now));
            }
            (true, false) => {
                actions.extend(self.lift_throttle());
                actions.push(self.restore(outage, now));
            }
            (false, true) => actions.extend(self.fail(HandoverError::StartedBeforeGo.into(), now)),
            (false, false) => actions.extend(self.rejoin(now)),
        }
        actions
    }

    /// Both ends know what the destination holds: the rounds continue, behind a sync that finds what was written meanwhile.
    fn rejoin(&mut self, now: Duration) -> Vec<Action> {
        self.frames = 0;
        self.not_loaded = None;
        let mut actions = vec![Action::StartStages(self.bandwidth()), Self::phase(Phase::Active)];
        actions.extend(self.sync(AfterSync::Rejoined, now));
        actions
    }

    /// The sync behind a reconnect is complete: the guest is throttled as before, and what is dirty is sent.
    pub(super) fn rejoined(&mut self, now: Duration) -> Vec<Action> {
        // The next sync finds what is written from here on.
        self.controller.armed(now);
        let percent = self.controller.throttle();
        if percent > 0 {
            self.state = State::Throttling;
            return vec![self.throttle(percent, None)];
        }
        if self.begins_with_postcopy() {
            return self.postcopy_at_once(now);
        }
        self.scan(ScanOrder::all(self.round + 1, RoundKind::Live), now)
    }
}
