//! The rounds that have arrived, and the rates at which they do.

use std::time::Instant;

use memferry_stages::tally::RoundTally;

use crate::bottleneck::Watch;
use crate::events::Event;
use crate::migration::speed::Speed;

/// The most tallies that are stored for rounds that are not complete in every lane.
const MAX_TALLIES: usize = 4096;

/// The rounds so far, the recent rates, and what limits them.
pub(super) struct Rates {
    /// Bytes received from the wire.
    pub(super) wire: Speed,
    /// Page bytes that are loaded.
    pub(super) pages: Speed,
    pub(super) watch: Watch,
    pub(super) tick: u32,
    pub(super) round: u32,
    round_began: Instant,
    /// Tallies of rounds that are not complete in every lane.
    tallies: Vec<RoundTally>,
}

impl Rates {
    /// The stages run from here on, possibly after those of an attempt before.
    pub(super) fn begin(before: Option<Self>) -> Self {
        let (wire, pages, round) = before.map_or_else(
            || (Speed::default(), Speed::default(), 1),
            |before| (before.wire, before.pages, before.round),
        );
        Self {
            wire,
            pages,
            watch: Watch::begin(false),
            tick: 0,
            round,
            round_began: Instant::now(),
            tallies: Vec::new(),
        }
    }

    /// A lane has loaded a round. Returns the event for the round if every lane has.
    pub(super) fn loaded(&mut self, tally: RoundTally, lanes: usize) -> Option<Event> {
        // These are figures for the report. They are bounded, in case a source ends round after round in one lane only.
        if self.tallies.len() < MAX_TALLIES {
            self.tallies.push(tally);
        }
        let round = tally.round;
        if self.tallies.iter().filter(|tally| tally.round == round).count() < lanes {
            return None;
        }
        let mut whole = RoundTally::new(round, tally.kind);
        for tally in self.tallies.extract_if(.., |tally| tally.round == round) {
            whole += tally;
        }
        self.round = if whole.kind.is_final() { round } else { round.saturating_add(1) };
        let duration = self.round_began.elapsed();
        self.round_began = Instant::now();
        Some(Event::RoundSent { tally: whole, duration })
    }
}
