//! What an end of a migration is doing, kept from its events.

use std::time::Duration;

use memferry_stages::untrusted::Untrusted;

use super::InForce;
use crate::controller::Decided;
use crate::controller::forecast::Forecast;
use crate::events::{Ended, Event, Phase, Progress, Role};
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
    /// Bytes of the guest, once they are known.
    pub total_bytes: u64,
    /// Bound of the memory that the engine takes for itself, in bytes.
    pub memory_bound: u64,
    /// Rounds that are complete.
    pub rounds: u32,
    /// The latest figures: what remains, rates, throttle, stages.
    pub progress: Option<Progress>,
    /// The settings that may be changed, as they are (source).
    pub in_force: Option<InForce>,
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
        Self { role: Some(Role::Source), in_force: Some(InForce::of(settings)), ..Self::default() }
    }

    pub(super) fn note(&mut self, event: &Event) {
        match event {
            Event::Phase(phase) => self.phase = *phase,
            Event::Connected { peer } => self.peer = Some(peer.clone()),
            Event::Guest { blocks, memory_bound, .. } => {
                self.total_bytes = blocks.iter().map(|block| block.bytes).sum();
                self.memory_bound = *memory_bound;
            }
            Event::RoundSent { tally, .. } => self.rounds = tally.round,
            Event::Decided(decided) => {
                self.forecast = decided.forecast.or(self.forecast);
                self.decision = Some(decided.clone());
            }
            Event::Progress(progress) => self.progress = Some(progress.clone()),
            Event::Changed(changed) => {
                self.in_force = self.in_force.map(|in_force| in_force.with(changed.to));
                self.memory_bound = changed.memory_bound;
            }
            Event::HandedOver => self.is_handed_over = true,
            Event::Ended(ended) => (self.phase, self.ended) = (ended.phase, Some(ended.clone())),
            Event::RoundScanned { .. }
            | Event::Synced { .. }
            | Event::Spared(_)
            | Event::Warning(_)
            | Event::TurnedAway { .. }
            | Event::Paused
            | Event::Resumed => {}
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
