//! Accumulates the events of a migration for the report, its page and its final table: the latest [`Status`], and
//! what the status does not retain.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use memferry_stages::tally::RoundTally;

use super::series::{Happened, Series};
use memferry::control::{Changed, Status};
use memferry::controller::Decided;
use memferry::events::{Event, Observer, Role};

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
            _ => {}
        }
        if let Some(text) = event.warning() {
            self.notice(text, at);
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
