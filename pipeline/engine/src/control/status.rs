//! The status of an end of a migration, computed from its events in this one place. Displays read it from here, and
//! need the events themselves only for history.

use std::time::Duration;

use memferry_stages::untrusted::Untrusted;

use crate::controller::Decided;
use crate::controller::forecast::Forecast;
use crate::events::{BlockFacts, Ended, Event, Outages, Phase, Progress, Role};
use crate::settings::SourceSettings;

/// The most warnings that are stored.
const WARNINGS: usize = 16;

/// The status of an end of a migration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// Which end; `None` before it begins.
    pub role: Option<Role>,
    /// The phase.
    pub phase: Phase,
    /// Time since it began; once it has ended, how long it took.
    pub elapsed: Duration,
    /// The peer's name, or the file.
    pub peer: Option<Untrusted>,
    /// The guest's blocks, once they are known.
    pub blocks: Vec<BlockFacts>,
    /// The guest's pages.
    pub pages: u64,
    /// The bound of the memory that the engine takes for itself, in bytes.
    pub memory_bound: u64,
    /// Completed rounds.
    pub rounds: u32,
    /// The latest figures: remaining bytes, rates, throttle, stages.
    pub progress: Option<Progress>,
    /// The current settings, with any changes (source).
    pub settings: Option<SourceSettings>,
    /// The latest forecast that a decision rests on, with its parts (source).
    pub forecast: Option<Forecast>,
    /// The latest decision (source).
    pub decision: Option<Decided>,
    /// Warnings for the operator, the latest last.
    pub warnings: Vec<String>,
    /// May the destination have received Go? A cancel is too late then.
    pub is_handed_over: bool,
    /// Does the guest run at the destination, with pages of it still at the source? It stays so while the connection is lost.
    pub is_postcopy: bool,
    /// The attempt, from 1: one more for each connection that was lost and made again.
    pub attempt: u32,
    /// Why there is no connection, while the phase is [`Phase::Disconnected`]: the reason of the loss, or of the latest try.
    pub disconnected: Option<String>,
    /// What lost connections have cost so far.
    pub outages: Outages,
    /// How it ended.
    pub ended: Option<Ended>,
}

impl Status {
    pub(super) fn of_source(settings: &SourceSettings) -> Self {
        Self { role: Some(Role::Source), settings: Some(settings.clone()), ..Self::default() }
    }

    /// Bytes of the guest; 0 before they are known.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.bytes).sum()
    }

    /// Applies an event.
    #[doc(hidden)]
    pub fn note(&mut self, event: &Event) {
        match event {
            Event::Phase(phase) => {
                self.phase = *phase;
                self.is_postcopy |= *phase == Phase::Postcopy;
            }
            Event::Connected { peer } => {
                self.peer = Some(peer.clone());
                self.attempt = self.attempt.max(1);
            }
            Event::Guest { blocks, pages, memory_bound } => {
                self.blocks.clone_from(blocks);
                self.pages = *pages;
                self.memory_bound = *memory_bound;
            }
            Event::RoundSent { tally, .. } => self.rounds = tally.round,
            Event::Decided(decided) => {
                self.forecast = decided.forecast.or(self.forecast);
                self.decision = Some(decided.clone());
            }
            Event::Progress(progress) => self.progress = Some(progress.clone()),
            Event::Changed(changed) => {
                self.settings.iter_mut().for_each(|settings| changed.to.put_into(settings));
                self.memory_bound = changed.memory_bound;
            }
            Event::HandedOver => self.is_handed_over = true,
            Event::Disconnected { attempt, why } => {
                self.attempt = *attempt;
                self.outages.lost += 1;
                self.disconnected = Some(why.clone());
            }
            Event::NotReached { why, .. } => self.disconnected = Some(why.clone()),
            Event::Reconnected { attempt, outage, put_back_bytes } => {
                self.attempt = *attempt;
                self.disconnected = None;
                self.outages.time += *outage;
                self.outages.put_back_bytes += put_back_bytes;
                // An earlier Go of this migration was not acted on, unless the guest runs there.
                self.is_handed_over = self.is_postcopy;
            }
            Event::Ended(ended) => {
                self.phase = ended.outcome.into();
                self.is_postcopy = false;
                self.outages = ended.outages;
                self.ended = Some((**ended).clone());
            }
            _ => {}
        }
        if let Some(what) = event.warning() {
            self.warn(what);
        }
    }

    fn warn(&mut self, what: String) {
        if self.warnings.len() == WARNINGS {
            self.warnings.remove(0);
        }
        self.warnings.push(what);
    }
}
