//! The rounds that have arrived, and figures for observers.

use std::time::Instant;

use memferry_stages::meter::Reading;
use memferry_stages::tally::RoundTally;

use super::flow::Flow;
use super::{Attempt, Destination};
use crate::bottleneck::Watch;
use crate::events::{Event, Progress};
use crate::migration::bounds;
use crate::migration::speed::Speed;

/// How many ticks make one progress event for observers.
const TICKS_PER_EVENT: u32 = 5;
/// The most tallies that are stored for rounds that are not complete in every lane.
const MAX_TALLIES: usize = 4096;

/// The rounds so far, the recent rates, and what limits them.
pub(super) struct Rates {
    /// Bytes received from the wire.
    wire: Speed,
    /// Page bytes that are loaded.
    pages: Speed,
    pub(super) watch: Watch,
    tick: u32,
    round: u32,
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

impl Destination<'_> {
    /// Time has passed: figures are reported every few intervals.
    pub(super) fn watch_progress(&mut self) {
        let total_bytes = self.total_bytes();
        let Attempt::Running(flow) = &mut self.attempt else { return };
        flow.rates.tick += 1;
        if !flow.rates.tick.is_multiple_of(TICKS_PER_EVENT) {
            return;
        }
        let (still, loaded) = (still(flow, total_bytes), flow.loaded_bytes());
        let progress = Progress {
            wire_rate: flow.rates.wire.tick(still.wire_bytes),
            page_rate: flow.rates.pages.tick(loaded),
            bottleneck: flow.rates.watch.latest(&still.stages),
            ..still
        };
        self.observers.notify(&Event::Progress(progress));
    }

    /// The final figures: no data moves any more, and after a completed migration nothing remains.
    pub(super) fn report_last_progress(&self, completed: bool) {
        let Attempt::Running(flow) = &self.attempt else { return };
        let still = still(flow, self.total_bytes());
        self.observers.notify(&Event::Progress(Progress {
            remaining_bytes: if completed { Some(0) } else { still.remaining_bytes },
            bottleneck: flow.rates.watch.all(&still.stages),
            ..still
        }));
    }

    fn total_bytes(&self) -> u64 {
        self.layout().map_or(0, |layout| layout.bytes())
    }

    /// Bytes on the wire, the peak of memory, and how every stage has spent its time.
    pub(super) fn figures(&self, flow: &Flow) -> (u64, u64, Vec<Reading>) {
        let Some(layout) = self.layout() else { return Default::default() };
        let keeps = bounds::destination_keeps(layout, self.verification.kind(), flow.arrived.may_leave_out);
        let state =
            bounds::state_bytes(self.state_room.taken(), bounds::state_messages(flow.graph.progress.len() as u64));
        let peak = bounds::peak(&flow.graph.pools, &flow.graph.meters, keeps) + state;
        (flow.wire_bytes(), peak, flow.graph.readings())
    }
}

/// The figures that are not rates.
fn still(flow: &Flow, total_bytes: u64) -> Progress {
    let round = flow.rates.round;
    Progress {
        round,
        // Only the source knows what the guest has written since.
        remaining_bytes: (round == 1).then(|| total_bytes.saturating_sub(flow.loaded_bytes())),
        total_bytes,
        wire_bytes: flow.wire_bytes(),
        stages: flow.graph.readings(),
        cpu: flow.rates.watch.cpu(),
        ..Progress::default()
    }
}
