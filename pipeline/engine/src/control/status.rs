//! What an end of a migration is doing: the one fold of its events. Whoever shows how things are reads it from here, and keeps of the
//! events itself only what came before.

use std::time::Duration;

use memferry_stages::untrusted::Untrusted;

use crate::controller::Decided;
use crate::controller::forecast::Forecast;
use crate::events::{BlockFacts, Ended, Event, Phase, Progress, Role};
use crate::settings::SourceSettings;

/// Warnings that are kept.
const WARNINGS: usize = 16;

/// What an end of a migration is doing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// Which end; `None` before it has begun.
    pub role: Option<Role>,
    /// Where it stands.
    pub phase: Phase,
    /// Since it began; once it has ended, how long it took.
    pub elapsed: Duration,
    /// Who is at the other end, or which file.
    pub peer: Option<Untrusted>,
    /// The guest's blocks, once they are known.
    pub blocks: Vec<BlockFacts>,
    /// Its pages.
    pub pages: u64,
    /// Bound of the memory that the engine takes for itself, in bytes.
    pub memory_bound: u64,
    /// Rounds that are complete.
    pub rounds: u32,
    /// The latest figures: what remains, rates, throttle, stages.
    pub progress: Option<Progress>,
    /// The settings as they are, with what was changed (source).
    pub settings: Option<SourceSettings>,
    /// The latest forecast that a decision rests on, in its parts (source).
    pub forecast: Option<Forecast>,
    /// The latest decision (source).
    pub decision: Option<Decided>,
    /// What the operator should know, the latest last.
    pub warnings: Vec<String>,
    /// May the destination have been told to run the guest? A cancel is too late then.
    pub is_handed_over: bool,
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

    /// Takes what an event says.
    #[doc(hidden)]
    pub fn note(&mut self, event: &Event) {
        match event {
            Event::Phase(phase) => self.phase = *phase,
            Event::Connected { peer } => self.peer = Some(peer.clone()),
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
            Event::Ended(ended) => (self.phase, self.ended) = (ended.phase, Some(ended.clone())),
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
