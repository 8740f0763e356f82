//! Keeps what the events of a migration said, for the report and the table at its end.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use memferry_stages::tally::RoundTally;

use crate::controller::Decided;
use crate::events::{BlockFacts, Ended, Event, Observer, Role};

/// An observer that keeps what it hears from both ends.
#[derive(Debug, Default)]
pub struct Accountant {
    source: Mutex<Account>,
    destination: Mutex<Account>,
}

/// What one end said.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Account {
    /// Who is at the other end.
    pub peer: Option<String>,
    /// The guest's blocks.
    pub blocks: Vec<BlockFacts>,
    /// Its pages.
    pub pages: u64,
    /// The bound of the memory that the engine takes.
    pub memory_bound: u64,
    /// Rounds that are complete.
    pub rounds: Vec<Round>,
    /// What the controller decided, in order.
    pub decided: Vec<Decided>,
    /// How it ended.
    pub ended: Option<Ended>,
}

/// One round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Round {
    /// Its figures.
    pub tally: RoundTally,
    /// How long it took.
    pub duration: Duration,
    /// Dirty pages that the next sync found: `None` before it, 0 after the last round.
    pub dirty_after: Option<u64>,
}

impl Accountant {
    /// What an end said up to here.
    #[must_use]
    pub fn account(&self, role: Role) -> Account {
        self.of(role).lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn of(&self, role: Role) -> &Mutex<Account> {
        match role {
            Role::Source => &self.source,
            Role::Destination => &self.destination,
        }
    }
}

impl Observer for Accountant {
    fn event(&self, role: Role, event: &Event) {
        self.of(role).lock().unwrap_or_else(PoisonError::into_inner).enter(event);
    }
}

impl Account {
    fn enter(&mut self, event: &Event) {
        match event {
            Event::Connected { peer } => self.peer = Some(peer.clone()),
            Event::Guest { blocks, pages, memory_bound } => {
                self.blocks.clone_from(blocks);
                self.pages = *pages;
                self.memory_bound = *memory_bound;
            }
            Event::RoundSent { tally, duration } => {
                let dirty_after = tally.last.then_some(0);
                self.rounds.push(Round { tally: *tally, duration: *duration, dirty_after });
            }
            Event::Synced { after_round, dirty_pages, .. } => self.synced(*after_round, *dirty_pages),
            Event::Decided(decided) => self.decided.push(decided.clone()),
            Event::Ended(ended) => self.ended = Some(ended.clone()),
            _ => {}
        }
    }

    /// The first sync after a round tells what it left dirty; the one in the switchover comes on top.
    fn synced(&mut self, after_round: u32, dirty_pages: u64) {
        let round = self.rounds.iter_mut().find(|round| round.tally.round == after_round);
        if let Some(round) = round {
            round.dirty_after.get_or_insert(dirty_pages);
        }
    }

    /// Bytes of the guest.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.bytes).sum()
    }
}
