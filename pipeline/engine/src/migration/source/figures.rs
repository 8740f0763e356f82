//! The figures of a source for observers: during the migration, and the final ones.

use std::time::Duration;

use memferry_stages::meter::Reading;
use memferry_stages::stage_id::StageKind;
use memferry_stages::wire::messages::Figure;

use super::{Source, wire_bytes};
use crate::controller::forecast::Standing;
use crate::events::{Event, Progress};
use crate::migration::bounds;
use crate::migration::flow::Flow;

/// Figures that only running stages can provide, taken at the end.
#[derive(Default)]
pub(super) struct Figures {
    pub(super) wire_bytes: u64,
    pub(super) memory_peak: u64,
    pub(super) stages: Vec<Reading>,
}

impl Source {
    /// Reports the current figures, with the given remaining work.
    pub(super) fn report_progress(&mut self, flow: &Flow, now: &Standing) {
        let (wire_bytes, stages) = (wire_bytes(flow), flow.graph.readings());
        let expected = match self.paused {
            Some(_) => self.controller.forecast(now),
            None => self.controller.forecast_within(now),
        };
        let dirty_rate = self.controller.forecaster().dirty_bytes_per_second();
        let progress = Progress {
            wire_rate: self.wire_speed.tick(wire_bytes),
            page_rate: self.page_speed.tick(self.page_bytes(read_pages(&stages))),
            dirty_rate: if self.paused.is_some() { Some(0.0) } else { dirty_rate },
            expected_downtime: expected.map(|forecast| forecast.expected()),
            throttle: self.controller.throttle(),
            bottleneck: self.watch.as_mut().map(|watch| watch.latest(&stages)).unwrap_or_default(),
            stages,
            ..self.still(flow, now)
        };
        self.observers.tell(&Event::Progress(progress));
    }

    /// The final figures: no data moves any more, and after a completed migration nothing remains. A guest whose
    /// throttle could not be lifted counts as throttled.
    pub(super) fn report_last_progress(&self, flow: &Flow, completed: bool, is_throttled: bool) {
        let progress = self.still(flow, &self.standing_now(flow));
        self.observers.tell(&Event::Progress(Progress {
            remaining_bytes: if completed { Some(0) } else { progress.remaining_bytes },
            dirty_rate: Some(0.0),
            throttle: if is_throttled { self.controller.throttle() } else { 0 },
            bottleneck: self.watch.as_ref().map(|watch| watch.all(&progress.stages)).unwrap_or_default(),
            ..progress
        }));
    }

    /// The figures that are not rates.
    fn still(&self, flow: &Flow, now: &Standing) -> Progress {
        Progress {
            // Before the first round its order is still queued.
            round: self.round.max(1),
            remaining_bytes: Some(self.page_bytes(now.dirty_pages + now.in_flight_pages)),
            total_bytes: self.layout().bytes(),
            wire_bytes: wire_bytes(flow),
            downtime_limit: self.controller.downtime_limit(),
            stages: flow.graph.readings(),
            cpu: self.cpu(),
            ..Progress::default()
        }
    }

    /// The destination sent a message, which may carry its figures.
    pub(super) fn hear(&mut self, figures: &[Figure]) {
        if let Some(watch) = &mut self.watch {
            watch.hear(figures);
        }
    }

    /// Processor time of the process since the stages began.
    pub(super) fn cpu(&self) -> Duration {
        self.watch.as_ref().map_or(Duration::ZERO, |watch| watch.cpu())
    }

    pub(super) fn figures(&self, flow: Option<&Flow>) -> Figures {
        let Some(flow) = flow else { return Figures::default() };
        let graph = &flow.graph;
        let keeps = bounds::source_keeps(
            self.layout(),
            graph.in_flight.memory_bytes(),
            self.verified.is_some(),
            self.clears.is_some(),
        );
        Figures {
            wire_bytes: wire_bytes(flow),
            memory_peak: bounds::peak(&graph.pools, &graph.meters, keeps)
                + bounds::logs_bytes(&self.logs)
                + bounds::state_bytes(self.state_room.taken(), bounds::STATE_FRAMES),
            stages: graph.readings(),
        }
    }
}

/// Pages that were read, in all lanes.
fn read_pages(stages: &[Reading]) -> u64 {
    stages.iter().filter(|stage| stage.stage.kind == StageKind::ZeroDetector).map(|stage| stage.pages).sum()
}
