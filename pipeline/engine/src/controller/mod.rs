//! When to switch over, and what to do about a guest that does not converge: figures and the time in, decisions out. No
//! I/O, no clock, no tasks. The running migration and the simulation that `plan` uses drive the same controller.
//!
//! ```text
//!  each round sent ──▶ round ─┐
//!  each sync ─────────────────┴▶ synced ──▶ another round │ throttle │ switch over │ give up
//!  at intervals in a round ─────▶ tick ───▶ nothing, or: switch over │ give up, for the deadline
//! ```
//!
//! After each sync it checks, in this order:
//!
//! 1. Is the size of deltas unknown? Then a sample of the dirty pages is sent first, while the budgets have room for
//!    one.
//! 2. Is the expected downtime (`forecast`) at or below the limit, or is nothing dirty? Then it switches over; but
//!    first the pages in flight must have arrived, up to a small share of the limit, and another sync must confirm it.
//! 3. Are the rounds used up, or is there no other way to meet the deadline? Then `on_deadline` applies.
//! 4. Have `stall_rounds` rounds brought no new minimum of what remains, or is it certain that the rounds left will not
//!    reach the limit at their pace? That is a stall: the next of the operator's steps is taken, if the step before has
//!    had its rounds to show its effect (`steps`).
//!
//! `max_downtime` overrides all of them: no decision here switches over with a forecast above it, or without a
//! forecast. Within a round only the deadline and the operator decide, since the dirty pages are unknown between syncs.
//! A sample is so short that only the deadline itself ends it.

mod changes;
// Shared with the other crates of this workspace. Not part of the public interface; changes without notice.
#[doc(hidden)]
pub mod forecast;
pub mod reason;
#[doc(hidden)]
pub mod simulation;
mod stall;
mod steps;
#[cfg(test)]
mod tests;

use std::num::NonZeroU32;
use std::time::Duration;

use memferry_stages::tally::RoundTally;

use crate::settings::{OnDeadline, PostcopyAfter, SourceSettings};
pub use forecast::{FixedCost, Forecast};
use forecast::{Forecaster, Measured, Standing, Work, WriteBack, whole};
use reason::{Met, Reason, UsedUp};
use stall::{Left, Stall};
use steps::{Situation, Steps, Taken};

/// How much of the deadline is reserved for what happens between two checks of it.
const MARGIN: Duration = Duration::from_millis(150);

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Scan again while the guest runs.
    AnotherRound,
    /// Drain the pages in flight, down to a small share of the limit, and what the destination has to write to disk,
    /// while the guest runs; then sync and decide again.
    Drain,
    /// Scan about this number of the dirty pages while the guest runs, to measure the size of deltas.
    Sample(NonZeroU32),
    /// Throttle the guest for this percentage of its time, and scan again.
    Throttle(u8),
    /// Scan again, with the downtime limit raised to this.
    RaiseLimit(Duration),
    /// Pause the guest and send the rest.
    SwitchOver,
    /// Start the guest at the destination, and send the rest while it runs there.
    Postcopy,
    /// Cancel: the limits cannot be met.
    GiveUp,
}

/// A decision and its reason. Its `Display` is one line for an operator.
#[derive(Clone, Debug, PartialEq)]
pub struct Decided {
    /// The round after which, or in which, it was made.
    pub round: u32,
    /// What is done.
    pub decision: Decision,
    /// The reason.
    pub reason: Reason,
    /// The downtime limit at that moment.
    pub limit: Duration,
    /// The forecast that it rests on, if there is one.
    pub forecast: Option<Forecast>,
}

impl Decided {
    /// Is the next round a sample, rather than all dirty pages?
    pub fn asks_for_a_sample(&self) -> bool {
        matches!(self.decision, Decision::Sample(_))
    }
}

/// The state of a migration's convergence: see the [module](self).
#[doc(hidden)]
#[derive(Clone, Debug)]
pub struct Controller {
    forecaster: Forecaster,
    limits: Limits,
    steps: Steps,
    stall: Stall,
    round: u32,
    /// The round after which the pages in flight were to arrive.
    drained: Option<u32>,
    /// Is a sample being sent?
    sampling: bool,
    /// Is the switchover decided already?
    switching: bool,
    postcopy: Postcopy,
    /// See [`Controller::likely`].
    likely: Option<Forecast>,
}

/// When to switch to postcopy.
#[derive(Clone, Copy, Debug)]
struct Postcopy {
    /// As the settings have it.
    after: Option<PostcopyAfter>,
    /// Has the operator asked for it?
    asked: bool,
}

#[derive(Clone, Debug)]
struct Limits {
    downtime: Duration,
    max_downtime: Option<Duration>,
    rounds: u32,
    deadline: Option<Duration>,
    on_deadline: OnDeadline,
}

impl Controller {
    /// For a migration that begins, of a guest with pages of the given size.
    #[must_use]
    pub fn new(settings: &SourceSettings, page_bytes: u64) -> Self {
        Self {
            forecaster: Forecaster::new(settings, page_bytes),
            limits: Limits {
                downtime: settings.downtime_limit,
                max_downtime: settings.max_downtime,
                rounds: settings.max_rounds,
                deadline: settings.deadline,
                on_deadline: settings.on_deadline,
            },
            steps: Steps::new(&settings.convergence),
            stall: Stall::new(settings.convergence.stall_rounds),
            round: 0,
            drained: None,
            sampling: false,
            switching: false,
            postcopy: Postcopy { after: settings.postcopy_after, asked: false },
            likely: None,
        }
    }

    /// The fixed cost of a switchover, for the parts that are not measured repeatedly.
    pub fn fixed(&mut self) -> &mut FixedCost {
        &mut self.forecaster.fixed
    }

    /// The measurements of the rounds.
    #[must_use]
    pub fn forecaster(&self) -> &Forecaster {
        &self.forecaster
    }

    /// The downtime limit, with any raise.
    #[must_use]
    pub fn downtime_limit(&self) -> Duration {
        let limit = self.steps.raised().unwrap_or(self.limits.downtime);
        self.limits.max_downtime.map_or(limit, |most| limit.min(most))
    }

    /// Percent of its time that the guest is to be throttled.
    #[must_use]
    pub fn throttle(&self) -> u8 {
        self.steps.throttling()
    }

    /// The cost of a switchover at this moment.
    #[must_use]
    pub fn forecast(&self, now: &Standing) -> Option<Forecast> {
        self.forecaster.forecast(now, self.downtime_limit())
    }

    /// The same within a round: includes the estimate of pages written since the last sync, which has not found them.
    #[must_use]
    pub fn forecast_within(&self, now: &Standing) -> Option<Forecast> {
        self.with_unseen(now).map_or_else(|| self.forecast(now), |now| self.forecast(&now))
    }

    /// The likely cost of a switchover where the last decision was made, by the medians of what was measured. Decisions rest on high
    /// quantiles instead.
    #[must_use]
    pub fn likely(&self) -> Option<Forecast> {
        self.likely
    }

    fn note_likely(&mut self, now: &Standing) {
        self.likely = self.forecaster.likely(now, self.downtime_limit());
    }

    /// The pages that may still be in flight when the guest is paused.
    #[must_use]
    pub fn backlog_pages(&self) -> u64 {
        self.forecaster.backlog_pages(self.downtime_limit()).unwrap_or(0)
    }

    /// How long the destination needs to write to disk what is to be written before the guest is paused, if anything is.
    #[must_use]
    pub fn write_backlog(&self) -> Option<Duration> {
        self.forecaster.write_backlog(self.downtime_limit())
    }

    /// The destination's forecast of what it writes to disk.
    pub fn write_back(&mut self, times: WriteBack) {
        self.forecaster.write_back(times);
    }

    /// The logs are armed, at a time since the migration began.
    pub fn armed(&mut self, elapsed: Duration) {
        self.forecaster.armed(elapsed);
    }

    /// A part of the fixed cost was measured.
    pub fn measured(&mut self, part: Measured, time: Duration) {
        self.forecaster.measured(part, time);
    }

    /// A round was sent, or the sample that was decided on, from its first batch to its last byte, in the given time.
    pub fn round(&mut self, tally: &RoundTally, time: Duration, work: Work) {
        self.round = tally.round;
        if std::mem::take(&mut self.sampling) {
            self.forecaster.sample(tally, time, work);
        } else {
            self.forecaster.round(tally, time, work);
        }
    }

    /// The guest cannot be throttled: that step is skipped from here on.
    pub fn cannot_throttle(&mut self) {
        self.steps.cannot_throttle();
    }

    /// The operator asks for postcopy: it is decided on after the round in progress.
    pub fn ask_for_postcopy(&mut self) {
        self.postcopy.asked = true;
    }

    /// Is it time for postcopy, in the middle of a round too?
    #[must_use]
    pub fn is_postcopy_due(&self, elapsed: Duration) -> bool {
        let is_late = matches!(self.postcopy.after, Some(PostcopyAfter::Time(time)) if elapsed >= time);
        !self.switching && (self.postcopy.asked || is_late)
    }

    /// Postcopy before any page is sent.
    #[must_use]
    pub fn postcopy_at_once(&self) -> Decided {
        let reason = Reason::PostcopyDue(PostcopyAfter::Rounds(0));
        Decided {
            round: self.round,
            decision: Decision::Postcopy,
            reason,
            limit: self.downtime_limit(),
            forecast: None,
        }
    }

    /// Why it is time for postcopy between two rounds, if it is.
    fn postcopy_due(&self, now: &Standing) -> Option<Reason> {
        if self.postcopy.asked {
            return Some(Reason::Operator);
        }
        let after = self.postcopy.after?;
        let is_due = match after {
            PostcopyAfter::Rounds(rounds) => self.round >= rounds,
            PostcopyAfter::Time(time) => now.elapsed >= time,
        };
        is_due.then_some(Reason::PostcopyDue(after))
    }

    /// A lost connection has interrupted what was decided: the rounds continue.
    pub fn interrupted(&mut self) {
        self.sampling = false;
        self.switching = false;
        self.drained = None;
    }

    /// A sync between rounds has found the dirty pages: decides.
    pub fn synced(&mut self, now: &Standing) -> Decided {
        self.forecaster.synced(now);
        self.note_likely(now);
        let forecast = self.forecast(now);
        let (decision, reason) = if self.switching {
            (Decision::SwitchOver, Reason::AlreadyPaused)
        } else {
            self.decide(now, forecast.as_ref())
        };
        self.switching = decision == Decision::SwitchOver;
        let decided = Decided { round: self.round, decision, reason, limit: self.downtime_limit(), forecast };
        self.sampling = decided.asks_for_a_sample();
        decided
    }

    fn decide(&mut self, now: &Standing, forecast: Option<&Forecast>) -> (Decision, Reason) {
        let postcopy = self.postcopy_due(now);
        let samples = postcopy.is_none() && self.has_room(now);
        if let Some(pages) = self.forecaster.sample_wanted(now).filter(|_| samples) {
            return (Decision::Sample(pages), Reason::DeltasUnknown);
        }
        let left = Left {
            rounds: self.limits.rounds.saturating_sub(self.round),
            time: self.limits.deadline.map(|deadline| deadline.saturating_sub(now.elapsed)),
        };
        let stalled = self.stall.note(forecast, self.downtime_limit(), left);
        if let Some(met) = self.is_met(now, forecast) {
            return self.drain_or_switch(now, met);
        }
        if let Some(due) = postcopy {
            return (Decision::Postcopy, due);
        }
        if let Some(used_up) = self.used_up(now, forecast) {
            return self.end(used_up, forecast);
        }
        let situation = Situation {
            stalled,
            forecast,
            may_switch: self.is_allowed(forecast),
            dirty_ratio: self.forecaster.dirty_ratio(),
            limit: self.downtime_limit(),
            highest: self.limits.max_downtime.unwrap_or(Duration::MAX),
        };
        let Some(taken) = self.steps.next(&situation) else { return (Decision::AnotherRound, Reason::AboveLimit) };
        self.stall.forget_pace();
        match taken {
            Taken::Throttle { percent, stalled } => (Decision::Throttle(percent), Reason::Stall(stalled)),
            Taken::Raise { limit, stalled } => match self.is_met(now, forecast) {
                // A raised limit may be met at once.
                Some(met) => (Decision::SwitchOver, Reason::Raised { limit, stalled, met }),
                None => (Decision::RaiseLimit(limit), Reason::Stall(stalled)),
            },
            Taken::SwitchOver { waited, stalled } => (Decision::SwitchOver, Reason::Minimum { stalled, waited }),
            Taken::Postcopy { stalled } => (Decision::Postcopy, Reason::Stall(stalled)),
            Taken::Cancel { stalled } => (Decision::GiveUp, Reason::Stall(stalled)),
        }
    }

    /// The limit is met: the pages in flight arrive first, if they exceed the room that the limit has for them.
    fn drain_or_switch(&mut self, now: &Standing, met: Met) -> (Decision, Reason) {
        // Only once: a destination may be slow to report what has arrived.
        let is_behind = now.in_flight_pages > self.backlog_pages() || self.write_backlog().is_some();
        if is_behind && self.drained != Some(self.round) {
            self.drained = Some(self.round);
            self.forecaster.drained();
            let unwritten = self.write_backlog();
            return (Decision::Drain, Reason::Backlog { pages: now.in_flight_pages, unwritten, met });
        }
        (Decision::SwitchOver, Reason::Met(met))
    }

    /// Do the budgets have room for a sample, and for acting on its result?
    fn has_room(&self, now: &Standing) -> bool {
        let in_time = self.limits.deadline.is_none_or(|deadline| now.elapsed.saturating_add(MARGIN) < deadline);
        in_time && self.limits.rounds.saturating_sub(self.round) >= 2
    }

    /// Time has passed within a round that has this much left. Returns what the deadline requires, if it must be done
    /// now.
    pub fn tick(&mut self, now: &Standing) -> Option<Decided> {
        let deadline = self.limits.deadline.filter(|_| !self.switching)?;
        let found = self.with_unseen(now);
        let forecast = found.and_then(|now| self.forecast(&now));
        let used_up = if now.elapsed >= deadline {
            UsedUp::Deadline { deadline, in_round: Some(self.round + 1) }
        } else {
            let may_switch = !self.sampling && self.switches_for_a_budget(forecast.as_ref());
            let late = self.now_or_never(now.elapsed, forecast.as_ref()).filter(|_| may_switch)?;
            UsedUp::NowOrNever { deadline, late: late.0, elapsed: Some(now.elapsed) }
        };
        let (decision, reason) = self.end(used_up, forecast.as_ref());
        self.switching = decision == Decision::SwitchOver;
        found.iter().for_each(|now| self.note_likely(now));
        Some(Decided { round: self.round + 1, decision, reason, limit: self.downtime_limit(), forecast })
    }

    /// The dirty pages of the last sync and the estimate of those written since. In the first round there is no
    /// estimate.
    fn with_unseen(&self, now: &Standing) -> Option<Standing> {
        let unseen = whole(self.forecaster.unseen_pages(now.elapsed)?);
        Some(Standing { dirty_pages: now.dirty_pages.saturating_add(unseen), ..*now })
    }

    /// Why the limit allows a switchover, if it does.
    fn is_met(&self, now: &Standing, forecast: Option<&Forecast>) -> Option<Met> {
        let forecast = forecast.filter(|_| self.is_allowed(forecast))?;
        if now.dirty_pages == 0 {
            return Some(Met::NothingDirty);
        }
        (forecast.expected() <= self.downtime_limit()).then_some(Met::WithinLimit)
    }

    /// Does `max_downtime` allow it?
    fn is_allowed(&self, forecast: Option<&Forecast>) -> bool {
        self.limits.max_downtime.is_none_or(|most| forecast.is_some_and(|forecast| forecast.expected() <= most))
    }

    /// Does it switch over when a budget is used up?
    fn switches_for_a_budget(&self, forecast: Option<&Forecast>) -> bool {
        self.limits.on_deadline == OnDeadline::SwitchOver && self.is_allowed(forecast)
    }

    /// Would a switchover that begins later miss the deadline? If so, by how much one that begins at once misses it.
    fn now_or_never(&self, elapsed: Duration, forecast: Option<&Forecast>) -> Option<Late> {
        let (deadline, end) = (self.limits.deadline?, elapsed.saturating_add(forecast?.expected()));
        let late = end.checked_sub(deadline).filter(|late| !late.is_zero());
        (end.saturating_add(MARGIN) >= deadline).then_some(Late(late))
    }

    /// Which budget is used up, or will be before anything better than an immediate switchover can be done.
    fn used_up(&self, now: &Standing, forecast: Option<&Forecast>) -> Option<UsedUp> {
        if self.round >= self.limits.rounds {
            return Some(UsedUp::Rounds(self.limits.rounds));
        }
        let deadline = self.limits.deadline?;
        let elapsed = now.elapsed;
        if elapsed >= deadline {
            return Some(UsedUp::Deadline { deadline, in_round: None });
        }
        if self.switches_for_a_budget(forecast) {
            let Late(late) = self.now_or_never(elapsed, forecast)?;
            return Some(UsedUp::NowOrNever { deadline, late, elapsed: None });
        }
        // At best another round leaves nothing: even that would be too late.
        let round = self.forecaster.round_time(now)?;
        let at_best = elapsed.saturating_add(round).saturating_add(self.forecaster.fixed.total());
        (at_best > deadline).then_some(UsedUp::RoundTooLong { round, elapsed, deadline })
    }

    /// A budget is used up: does what the operator configured, unless it would exceed `max_downtime`.
    fn end(&self, budget: UsedUp, forecast: Option<&Forecast>) -> (Decision, Reason) {
        let used_up = |forbidden_by| Reason::UsedUp { budget, forbidden_by };
        match self.limits.on_deadline {
            OnDeadline::Cancel => (Decision::GiveUp, used_up(None)),
            OnDeadline::SwitchOver if self.is_allowed(forecast) => (Decision::SwitchOver, used_up(None)),
            OnDeadline::SwitchOver => (Decision::GiveUp, used_up(self.limits.max_downtime)),
        }
    }
}

/// By how much a deadline is missed, if it is.
struct Late(Option<Duration>);
