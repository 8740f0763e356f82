//! Figures for observers.

use memferry_stages::meter::Reading;

use super::flow::Flow;
use super::postcopy::Switch;
use super::{Attempt, Destination};
use crate::events::{Event, Progress};
use crate::migration::bounds;

/// How many ticks make one progress event for observers.
const TICKS_PER_EVENT: u32 = 5;

impl Destination<'_> {
    /// Time has passed: figures are reported every few intervals.
    pub(super) fn watch_progress(&mut self) {
        let total_bytes = self.total_bytes();
        let Attempt::Running(flow) = &mut self.attempt else { return };
        flow.rates.tick += 1;
        if !flow.rates.tick.is_multiple_of(TICKS_PER_EVENT) {
            return;
        }
        let missing = self.switch.as_ref().and_then(Switch::left);
        let page_bytes = self.built.as_ref().map_or(0, |built| built.memory().page_size().bytes() as u64);
        let (mut still, loaded) = (still(flow, total_bytes), flow.loaded_bytes());
        still.remaining_bytes = missing.map(|pages| pages * page_bytes).or(still.remaining_bytes);
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
        let Some(built) = &self.built else { return Default::default() };
        let layout = built.memory().layout();
        let keeps = bounds::destination_keeps(layout, built.verification.kind(), flow.arrived.may_leave_out);
        let state =
            bounds::state_bytes(self.state_room.left.taken(), bounds::state_messages(flow.graph.progress.len() as u64));
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
