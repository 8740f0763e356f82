//! Accumulates the events of a migration for the report, its page and its final table: the latest [`Status`], and
//! what the status does not retain.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use memferry_stages::tally::RoundTally;

use super::series::{Happened, Series};
use memferry::control::{Changed, Status};
use memferry::controller::Decided;
use memferry::events::{Event, Observer, Role};
use memferry::human;

/// The most notices that are stored: peers may be refused for as long as the destination waits.
const MOST_NOTICES: usize = 100;

/// An observer that records the events of both ends.
#[derive(Debug, Default)]
pub struct Accountant {
    source: Mutex<Book>,
    destination: Mutex<Book>,
}

/// An account, and the instant from which its times are counted.
#[derive(Debug, Default)]
struct Book {
    account: Account,
    began: Option<Instant>,
}

/// The events of one end.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Account {
    /// The status at the latest event.
    pub status: Status,
    /// The engine's memory bound: the highest value, if it changed.
    pub memory_bound: u64,
    /// Rounds that are complete.
    pub rounds: Vec<Round>,
    /// The controller's decisions, in order.
    pub decided: Vec<Decided>,
    /// Settings that were changed during the migration, in order.
    pub changed: Vec<Changed>,
    /// Connections that were lost, in order.
    pub lost: Vec<Lost>,
    /// Progress samples and marks over time.
    pub series: Series,
    /// The first warnings and refused peers.
    pub notices: Vec<Notice>,
    /// The number of notices after those.
    pub more_notices: u64,
}

/// Something the operator should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// When it was reported.
    pub at: Duration,
    /// The message.
    pub text: String,
}

/// A connection that was lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// The attempt that ended, from 1.
    pub attempt: u32,
    /// When.
    pub at: Duration,
    /// Why.
    pub why: String,
    /// How long there was no connection; `None` if it was not made again.
    pub outage: Option<Duration>,
    /// How often the source tried to make it again and failed.
    pub tries: u32,
    /// Page bytes that were in flight, and were sent again.
    pub put_back_bytes: u64,
    /// How long the guest was paused in the switchover that it interrupted, if there was one.
    pub paused: Option<Duration>,
}

/// One round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Round {
    /// Its figures.
    pub tally: RoundTally,
    /// How long it took.
    pub duration: Duration,
    /// Was it a sample round, which sends a part of the dirty pages to measure their deltas?
    pub is_sample: bool,
    /// Dirty pages that the next sync found: `None` before it, 0 after the last round.
    pub dirty_after: Option<u64>,
}

/// In words, for a line of the summary.
impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "connection {} after {}", self.attempt, human::time(self.at))?;
        match self.outage {
            Some(outage) => write!(f, ", made again after {}", human::time(outage))?,
            None => f.write_str(", not made again")?,
        }
        if self.put_back_bytes > 0 {
            write!(f, ", {} sent again", human::bytes(self.put_back_bytes))?;
        }
        if let Some(paused) = self.paused {
            write!(f, ", the guest was paused for {}", human::time(paused))?;
        }
        write!(f, ": {}", self.why)
    }
}

impl Accountant {
    /// The record of one end so far.
    #[must_use]
    pub fn account(&self, role: Role) -> Account {
        self.of(role).lock().unwrap_or_else(PoisonError::into_inner).account.clone()
    }

    fn of(&self, role: Role) -> &Mutex<Book> {
        match role {
            Role::Source => &self.source,
            Role::Destination => &self.destination,
        }
    }
}

impl Observer for Accountant {
    fn event(&self, role: Role, event: &Event) {
        let mut book = self.of(role).lock().unwrap_or_else(PoisonError::into_inner);
        let began = *book.began.get_or_insert_with(Instant::now);
        book.account.enter(event, began.elapsed());
    }
}

impl Account {
    /// Records an event at this time since the first one.
    pub(crate) fn enter(&mut self, event: &Event, at: Duration) {
        self.place(event, at);
        self.status.note(event);
        self.memory_bound = self.memory_bound.max(self.status.memory_bound);
        match event {
            Event::RoundSent { tally, duration } => {
                let dirty_after = tally.kind.is_final().then_some(0);
                let is_sample = self.decided.last().is_some_and(Decided::asks_for_a_sample) && !tally.kind.is_final();
                self.rounds.push(Round { tally: *tally, duration: *duration, is_sample, dirty_after });
            }
            Event::Synced { after_round, dirty_pages, .. } => self.synced(*after_round, *dirty_pages),
            Event::Decided(decided) => self.decided.push(decided.clone()),
            Event::Changed(changed) => self.changed.push(*changed),
            _ => self.recovery(event, at),
        }
        if let Some(text) = event.warning() {
            self.notice(text, at);
        }
    }

    /// Records what an event says about a lost connection. One is lost at most as often as the settings allow.
    fn recovery(&mut self, event: &Event, at: Duration) {
        if let Event::Disconnected { attempt, why } = event {
            let (attempt, why) = (*attempt, why.clone());
            self.lost.push(Lost { attempt, at, why, outage: None, tries: 0, put_back_bytes: 0, paused: None });
        }
        let Some(lost) = self.lost.last_mut() else { return };
        match event {
            Event::NotReached { tries, .. } => lost.tries = *tries,
            Event::Reconnected { outage, put_back_bytes, .. } => {
                (lost.outage, lost.put_back_bytes) = (Some(*outage), *put_back_bytes);
            }
            // Its switchover is taken back at once or, after Go, once the destination has answered.
            Event::Resumed if lost.paused.is_none() => {
                let paused = self.series.last(Happened::Paused).filter(|paused| *paused <= lost.at);
                lost.paused = paused.map(|paused| at.saturating_sub(paused));
            }
            _ => {}
        }
    }

    /// Adds an event to the series; called before its figures are entered.
    fn place(&mut self, event: &Event, at: Duration) {
        let what = match event {
            Event::Progress(progress) => return self.series.sample(progress, at),
            Event::Phase(phase) => Happened::Phase(*phase),
            Event::RoundSent { tally, duration } => Happened::Round { round: tally.round, took: *duration },
            Event::Synced { dirty_pages, .. } => Happened::Synced(*dirty_pages),
            Event::Decided(_) => Happened::Decided(self.decided.len()),
            Event::Changed(_) => Happened::Changed(self.changed.len()),
            Event::Paused => Happened::Paused,
            Event::Resumed => Happened::Resumed,
            Event::Disconnected { .. } => Happened::Disconnected(self.lost.len()),
            Event::Reconnected { .. } => Happened::Reconnected,
            Event::Ended(_) => Happened::Ended,
            _ => return,
        };
        self.series.mark(what, at);
    }

    fn notice(&mut self, text: String, at: Duration) {
        if self.notices.len() < MOST_NOTICES {
            self.notices.push(Notice { at, text });
        } else {
            self.more_notices += 1;
        }
    }

    /// The first sync after a round reports the pages that the round left dirty; the sync in the switchover adds to
    /// them.
    fn synced(&mut self, after_round: u32, dirty_pages: u64) {
        let round = self.rounds.iter_mut().find(|round| round.tally.round == after_round);
        if let Some(round) = round {
            round.dirty_after.get_or_insert(dirty_pages);
        }
    }
}
