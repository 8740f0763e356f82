//! The figures of a source for observers: during the migration, and the final ones.

use std::time::Duration;

use memferry_stages::meter::Reading;
use memferry_stages::stage_id::StageKind;
use memferry_stages::wire::messages::Figure;

use super::Source;
use super::flow::Flow;
use crate::bottleneck::{Bottleneck, Watch};
use crate::controller::forecast::Standing;
use crate::events::{Event, Progress};
use crate::migration::bounds;
use crate::migration::course::source::SourceCourse;
use crate::migration::speed::Speed;
use crate::settings::Verify;

/// The recent rates, and what limits them.
#[derive(Default)]
pub(super) struct Rates {
    /// Bytes on the wire.
    wire: Speed,
    /// Page bytes that were read.
    pages: Speed,
    /// Set once the stages run.
    watch: Option<Watch>,
}

impl Rates {
    /// The stages run from here on. Rates count from this moment: a small guest may be read before the first tick.
    pub(super) fn begin(&mut self, watch: Watch, wire_bytes: u64) {
        self.wire.tick(wire_bytes);
        // Those of an attempt before were counted by other stages.
        self.pages = Speed::default();
        self.pages.tick(0);
        self.watch = Some(watch);
    }

    /// The destination sent a message, which may carry its figures.
    pub(super) fn hear(&mut self, figures: &[Figure]) {
        if let Some(watch) = &mut self.watch {
            watch.hear(figures);
        }
    }

    /// Page bytes a second that were read lately.
    pub(super) fn pages_latest(&self) -> f64 {
        self.pages.latest()
    }

    /// Processor time of the process since the stages began.
    pub(super) fn cpu(&self) -> Duration {
        self.watch.as_ref().map_or(Duration::ZERO, Watch::cpu)
    }

    /// What limited the speed since the stages began.
    pub(super) fn bottleneck(&self, stages: &[Reading]) -> Bottleneck {
        self.watch.as_ref().map(|watch| watch.all(stages)).unwrap_or_default()
    }
}

/// Figures that only running stages can provide, taken at the end.
#[derive(Default)]
pub(super) struct Figures {
    pub(super) wire_bytes: u64,
    pub(super) memory_peak: u64,
    pub(super) stages: Vec<Reading>,
}

impl Source<'_> {
    /// Reports the current figures, with the given remaining work.
    pub(super) fn report_progress(&mut self, course: &SourceCourse, now: &Standing) {
        let Some(still) = self.still(course, now) else { return };
        let (controller, is_paused) = (course.controller(), course.is_paused());
        let serving = course.is_serving();
        let expected = if serving {
            None
        } else if is_paused {
            controller.forecast(now)
        } else {
            controller.forecast_within(now)
        };
        let dirty_rate = controller.forecaster().dirty_bytes_per_second();
        let read_bytes = self.transfer.page_bytes(read_pages(&still.stages));
        let progress = Progress {
            wire_rate: self.rates.wire.tick(still.wire_bytes),
            page_rate: self.rates.pages.tick(read_bytes),
            dirty_rate: if is_paused { Some(0.0) } else { dirty_rate },
            expected_downtime: expected.map(|forecast| forecast.expected()),
            throttle: controller.throttle(),
            bottleneck: self.rates.watch.as_mut().map(|watch| watch.latest(&still.stages)).unwrap_or_default(),
            ..still
        };
        self.observers.notify(&Event::Progress(progress));
    }

    /// The final figures: no data moves any more, and after a completed migration nothing remains. A guest whose
    /// throttle could not be lifted counts as throttled.
    pub(super) fn report_last_progress(&self, course: &SourceCourse, completed: bool) {
        let Some(progress) = self.still(course, &self.standing()) else { return };
        self.observers.notify(&Event::Progress(Progress {
            remaining_bytes: if completed { Some(0) } else { progress.remaining_bytes },
            dirty_rate: Some(0.0),
            throttle: if self.is_throttled { course.controller().throttle() } else { 0 },
            bottleneck: self.rates.bottleneck(&progress.stages),
            ..progress
        }));
    }

    /// The figures that are not rates; `None` if the stages do not run.
    fn still(&self, course: &SourceCourse, now: &Standing) -> Option<Progress> {
        let flow = self.attempt.flow()?;
        Some(Progress {
            // Before the first round its order is still queued.
            round: course.round().max(1),
            remaining_bytes: Some(self.transfer.page_bytes(now.dirty_pages + now.in_flight_pages)),
            total_bytes: self.transfer.layout().bytes(),
            wire_bytes: self.earlier_bytes + flow.wire_bytes(),
            downtime_limit: course.controller().downtime_limit(),
            stages: flow.graph.readings(),
            cpu: self.rates.cpu(),
            ..Progress::default()
        })
    }

    /// Pages that were sent since the destination asked for them.
    pub(super) fn urgent_pages(&self) -> u64 {
        self.earlier_urgent + self.attempt.flow().map_or(0, Flow::urgent_pages)
    }

    pub(super) fn figures(&self, verify: Verify) -> Figures {
        let ended = || Figures { wire_bytes: self.earlier_bytes, ..Figures::default() };
        self.attempt.flow().map_or_else(ended, |flow| self.figures_of(flow, verify))
    }

    fn figures_of(&self, flow: &Flow, verify: Verify) -> Figures {
        let (graph, transfer) = (&flow.graph, &self.transfer);
        let keeps = bounds::source_keeps(
            transfer.layout(),
            graph.lanes.in_flight.memory_bytes(),
            verify,
            transfer.hints.exclusions().is_some(),
        );
        Figures {
            wire_bytes: self.earlier_bytes + flow.wire_bytes(),
            memory_peak: bounds::peak(&graph.pools, &graph.meters, keeps)
                + bounds::logs_bytes(&transfer.logs)
                + bounds::state_bytes(transfer.state_room.taken(), bounds::STATE_FRAMES),
            stages: graph.readings(),
        }
    }
}

/// Pages that were read, in all lanes.
fn read_pages(stages: &[Reading]) -> u64 {
    stages.iter().filter(|stage| stage.stage.kind == StageKind::ZeroDetector).map(|stage| stage.pages).sum()
}
