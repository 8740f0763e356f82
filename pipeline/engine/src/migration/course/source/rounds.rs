//! Rounds while the guest runs: scan, measure, sync, decide.

use std::time::Duration;

use memferry_stages::batch::{Mark, RoundKind};
use memferry_stages::bitmap_sync::Synced;
use memferry_stages::scanner::ScanOrder;
use memferry_stages::sender::Sent;
use memferry_stages::tally::RoundTally;
use memferry_stages::wire::messages::RunState;

use super::{Action, Answer, End, Part, SourceCourse, State};
use crate::controller::forecast::{Measured, Standing, Work, WriteBack};
use crate::controller::{Decided, Decision};
use crate::events::{Event, Phase};
use crate::migration::error::{Loss, MigrationError};
use crate::settings::Verify;

/// A destination that has acknowledged nothing for this time is not waited for: it may acknowledge only at the end.
const PATIENCE: Duration = Duration::from_millis(500);

/// What follows a measurement or a drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The stages are started, and the first round is sent.
    FirstRound,
    /// A sync, and a decision.
    Decide,
    /// The guest is paused.
    Pause,
    /// The switch to postcopy.
    Postcopy,
}

/// What follows a sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AfterSync {
    /// The first round, which hints may make smaller.
    FirstRound,
    /// A decision.
    Decide,
    /// What is dirty, after a lost connection was made again.
    Rejoined,
    /// The last round, of a paused guest.
    LastRound,
}

/// A round that is sent.
#[derive(Debug)]
pub(super) struct Round {
    began: Duration,
    pub(super) is_scanned: bool,
    lanes_left: u16,
    tally: RoundTally,
    /// How long the stages have worked on it.
    work: Work,
    /// Since when none of it was sent on the wire, and the bytes sent by then.
    quiet_since: Duration,
    bulk_bytes: u64,
}

impl Round {
    /// A round that is about to be scanned.
    pub(super) fn new(order: ScanOrder, lanes: u16, now: Duration) -> Self {
        Self {
            began: now,
            is_scanned: false,
            lanes_left: lanes,
            tally: RoundTally::new(order.round, order.kind),
            work: Work::default(),
            quiet_since: now,
            bulk_bytes: 0,
        }
    }

    /// Does the guest run?
    pub(super) fn is_live(&self) -> bool {
        self.tally.kind == RoundKind::Live
    }

    /// Its figures and how long it took, once it is scanned and every lane has sent it.
    pub(super) fn complete(&self, now: Duration) -> Option<(RoundTally, Duration)> {
        (self.is_scanned && self.lanes_left == 0).then(|| (self.tally, now.saturating_sub(self.began)))
    }

    /// The guest is paused in the middle of the round: the last sync is still to come.
    pub(super) fn paused(&mut self) {
        if self.tally.kind == RoundKind::Live {
            self.tally.kind = RoundKind::Paused;
        }
    }

    /// Counts a lane's mark. The lanes may complete a small round before the scanner reports its end.
    pub(super) fn note(&mut self, sent: Sent) {
        match sent.mark {
            Mark::RoundComplete(tally) => {
                self.tally += tally;
                // The end of the lane follows in a final round.
                self.lanes_left -= u16::from(!self.tally.kind.is_final());
            }
            Mark::LaneEnds => self.lanes_left -= 1,
            // Precopy orders neither.
            Mark::Checkpoint(_) | Mark::DirectEnds => {}
        }
    }
}

/// Pages in flight are waited for while the guest runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Drain {
    /// The pages in flight.
    in_flight: u64,
    /// The pages that were in flight, and the time for what was not durable, when either last became less.
    left: (u64, Duration),
    /// The wait ends here if nothing arrives before.
    pub(super) give_up: Duration,
    /// The wait ends here in any case.
    end: Option<Duration>,
    pub(super) next: Next,
}

impl SourceCourse {
    pub(super) fn proceed(&mut self, next: Next, now: Duration) -> Vec<Action> {
        match next {
            Next::FirstRound => self.first_round(now),
            Next::Decide => self.sync(AfterSync::Decide, now),
            Next::Pause => self.pause(now),
            Next::Postcopy => self.end_direct(now),
        }
    }

    /// Measures the cost of digests of the whole memory before each decision, because other load on the machine varies. A
    /// paused guest has no decision to wait for, and sums of page hashes cost next to nothing.
    pub(super) fn measure(&mut self, next: Next, now: Duration) -> Vec<Action> {
        if self.settings.verify != Verify::Full {
            return self.proceed(next, now);
        }
        self.state = State::Measuring(next);
        vec![Action::Measure]
    }

    fn first_round(&mut self, now: Duration) -> Vec<Action> {
        let mut actions = vec![Action::StartStages(self.bandwidth()), Self::phase(Phase::Active)];
        // Hints may arrive in the first round already; after it they follow a sync.
        actions.extend(if self.facts.hints {
            self.sync(AfterSync::FirstRound, now)
        } else if self.begins_with_postcopy() {
            self.postcopy_at_once(now)
        } else {
            self.scan(ScanOrder::all(1, RoundKind::Live), now)
        });
        actions
    }

    /// One round: all dirty pages, or a sample of them, until the last byte is handed to the transport.
    pub(super) fn scan(&mut self, mut order: ScanOrder, now: Duration) -> Vec<Action> {
        self.round = order.round;
        if self.done.paused && !order.kind.is_final() {
            order.kind = RoundKind::Paused;
        }
        self.spent.on(Part::Transfer, now);
        self.state = State::Sending(Round::new(order, self.settings.lanes, now));
        vec![Action::Scan(order)]
    }

    /// Ends the round once it is scanned and every lane has sent it.
    pub(super) fn round_complete(&mut self, work: Work, now: Duration) -> Vec<Action> {
        let State::Sending(round) = &mut self.state else { return Vec::new() };
        round.work.busiest = round.work.busiest.max(work.busiest);
        round.work.sending = round.work.sending.max(work.sending);
        let Some((tally, duration)) = round.complete(now) else { return Vec::new() };
        self.frames += tally.batches;
        let work = round.work;
        self.controller.round(&tally, duration, work);
        self.not_loaded = Some(now);
        let mut actions = Vec::new();
        if !self.facts.return_path {
            // Written and flushed: without a return path this is the only acknowledgement.
            actions.push(Action::AcknowledgeAll);
        }
        actions.push(Action::notify(Event::RoundSent { tally, duration }));
        actions.extend(match tally.kind {
            RoundKind::Final => self.last_round_sent(now),
            RoundKind::Paused => self.save(now),
            RoundKind::Live => self.measure(Next::Decide, now),
        });
        actions
    }

    pub(super) fn sync(&mut self, then: AfterSync, now: Duration) -> Vec<Action> {
        self.spent.on(Part::Sync, now);
        self.state = State::Syncing(then);
        vec![Action::Sync { after_round: self.round }]
    }

    pub(super) fn synced(&mut self, found: Synced, standing: Standing, then: AfterSync, now: Duration) -> Vec<Action> {
        let Synced { after_round, dirty_pages, duration } = found;
        self.controller.measured(Measured::Sync, duration);
        let mut actions = vec![Action::notify(Event::Synced { after_round, dirty_pages, duration })];
        if self.facts.hints {
            self.state = State::OpeningHints { then, standing };
            actions.push(Action::OpenHints { runs: self.facts.was == RunState::Running && !self.done.paused });
        } else {
            actions.extend(self.after_sync(then, &standing, now));
        }
        actions
    }

    /// The sync and what page hinters do about it are complete: both may take time, in which the guest runs.
    pub(super) fn after_sync(&mut self, then: AfterSync, standing: &Standing, now: Duration) -> Vec<Action> {
        match then {
            AfterSync::LastRound => self.send_state(now),
            _ if self.done.paused => self.save(now),
            AfterSync::FirstRound => {
                self.controller.armed(now);
                if self.begins_with_postcopy() {
                    return self.postcopy_at_once(now);
                }
                self.scan(ScanOrder::all(1, RoundKind::Live), now)
            }
            AfterSync::Decide => self.decide(standing, now),
            AfterSync::Rejoined => self.rejoined(now),
        }
    }

    fn decide(&mut self, standing: &Standing, now: Duration) -> Vec<Action> {
        let decided = self.controller.synced(&Standing { elapsed: now, ..*standing });
        let mut actions = self.report(&decided);
        let round = self.round + 1;
        actions.extend(match decided.decision {
            Decision::AnotherRound | Decision::RaiseLimit(_) => self.scan(ScanOrder::all(round, RoundKind::Live), now),
            Decision::Sample(pages) => self.scan(ScanOrder::sample(round, pages), now),
            Decision::Drain => self.drain(None, Next::Decide, standing.in_flight_pages, now),
            Decision::Throttle(percent) => {
                self.state = State::Throttling;
                vec![self.throttle(percent, None)]
            }
            // If another reason than the limit decided, the backlog has not been waited for yet, and the switchover may
            // be urgent.
            Decision::SwitchOver => {
                self.drain(Some(self.controller.downtime_limit()), Next::Pause, standing.in_flight_pages, now)
            }
            Decision::Postcopy => self.drain(None, Next::Postcopy, standing.in_flight_pages, now),
            Decision::GiveUp => self.end(End::Cancelled(MigrationError::GaveUp(Box::new(decided))), now),
        });
        actions
    }

    /// Reports a decision, and stores the forecast of a switchover.
    pub(super) fn report(&mut self, decided: &Decided) -> Vec<Action> {
        if decided.decision == Decision::SwitchOver {
            self.forecast = decided.forecast.and(self.controller.likely());
        }
        vec![Action::notify(Event::Decided(decided.clone()))]
    }

    pub(super) fn throttle(&mut self, percent: u8, request: Option<Answer>) -> Action {
        self.done.throttled = true;
        Action::Throttle(percent, request)
    }

    /// If the guest cannot be throttled, it runs at full speed, and the controller continues without this step.
    pub(super) fn throttled(&mut self, result: Result<(), MigrationError>, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        if let Err(error) = result {
            self.controller.cannot_throttle();
            actions.push(Action::notify(Event::Warning(error.to_string())));
        }
        if matches!(self.state, State::Throttling) {
            actions.extend(self.scan(ScanOrder::all(self.round + 1, RoundKind::Live), now));
        }
        actions
    }

    /// Waits until the backlog is down to a small share of the downtime limit, before the guest is paused. It waits
    /// while anything arrives, and no longer than `at_most`.
    fn drain(&mut self, at_most: Option<Duration>, next: Next, in_flight: u64, now: Duration) -> Vec<Action> {
        if !self.facts.return_path {
            return self.proceed(next, now);
        }
        let end = at_most.and_then(|most| now.checked_add(most));
        self.state = State::Draining(Drain { in_flight, left: (u64::MAX, Duration::MAX), give_up: now, end, next });
        self.drained(in_flight, now)
    }

    /// The destination acknowledged this number of frames.
    pub(super) fn acknowledged(&mut self, in_flight: u64, frames: u64, now: Duration) -> Vec<Action> {
        if frames >= self.frames
            && let Some(sent) = self.not_loaded.take()
        {
            self.controller.measured(Measured::Load, now.saturating_sub(sent));
        }
        self.drained(in_flight, now)
    }

    /// The destination reports how long it needs to make its memory durable.
    pub(super) fn write_back(&mut self, times: WriteBack, now: Duration) -> Vec<Action> {
        self.controller.write_back(times);
        let State::Draining(drain) = &self.state else { return Vec::new() };
        self.drained(drain.in_flight, now)
    }

    /// This number of pages is still in flight.
    pub(super) fn drained(&mut self, in_flight: u64, now: Duration) -> Vec<Action> {
        let State::Draining(drain) = &mut self.state else { return Vec::new() };
        if drain.next == Next::Postcopy {
            return self.drained_wholly(in_flight, now);
        }
        let enough = self.controller.backlog_pages();
        let writing = self.controller.write_backlog();
        drain.in_flight = in_flight;
        if in_flight <= enough && writing.is_none() {
            let next = drain.next;
            return self.proceed(next, now);
        }
        let left = (in_flight, writing.unwrap_or_default());
        if left.0 < drain.left.0 || left.1 < drain.left.1 {
            let patience = now + PATIENCE.max(left.1.saturating_mul(2).min(self.settings.handover_timeout));
            drain.left = left;
            drain.give_up = drain.end.map_or(patience, |end| patience.min(end));
        }
        Vec::new()
    }

    /// A page must not overtake an earlier version of itself: the switch to postcopy waits until nothing is in flight.
    fn drained_wholly(&mut self, in_flight: u64, now: Duration) -> Vec<Action> {
        let State::Draining(drain) = &mut self.state else { return Vec::new() };
        if in_flight == 0 {
            return self.proceed(Next::Postcopy, now);
        }
        if in_flight < drain.left.0 {
            drain.left.0 = in_flight;
            drain.give_up = now + self.settings.handover_timeout;
        }
        Vec::new()
    }

    pub(super) fn tick(&mut self, standing: Standing, bulk_bytes: u64, now: Duration) -> Vec<Action> {
        if let Some(why) = self.stalled(bulk_bytes, now) {
            return self.fail_or_recover(MigrationError::Lost(why), now);
        }
        let within_deadline = self.check_deadline(&Standing { elapsed: now, ..standing }, now);
        if !within_deadline.is_empty() {
            return within_deadline;
        }
        let mut actions = self.cut_if_due(now);
        actions.extend(self.drained(standing.in_flight_pages, now));
        actions
    }

    /// A destination that accepts no more data would block a round, and perhaps a paused guest, forever. Heartbeats may
    /// continue meanwhile, on another connection. Where they do not, this may be noticed before the silence is.
    pub(super) fn stalled(&mut self, bulk_bytes: u64, now: Duration) -> Option<Loss> {
        let (State::Sending(round) | State::Serving(Some(round))) = &mut self.state else { return None };
        if round.bulk_bytes != bulk_bytes {
            round.bulk_bytes = bulk_bytes;
            round.quiet_since = now;
        }
        let limit = self.settings.handover_timeout;
        (now.saturating_sub(round.quiet_since) >= limit).then_some(Loss::NothingTaken(limit))
    }

    /// The deadline may end the rounds in the middle of one. Then the migration ends at once, or the guest is paused at
    /// once and the rest of the round is sent without it.
    fn check_deadline(&mut self, standing: &Standing, now: Duration) -> Vec<Action> {
        let is_set_up = !matches!(self.state, State::Connecting | State::Arming);
        if self.done.paused || !is_set_up {
            return Vec::new();
        }
        let Some(decided) = self.controller.tick(standing) else { return Vec::new() };
        let mut actions = self.report(&decided);
        actions.extend(match decided.decision {
            Decision::GiveUp => self.end(End::Cancelled(MigrationError::GaveUp(Box::new(decided))), now),
            _ => self.pause_at_once(now),
        });
        actions
    }
}
