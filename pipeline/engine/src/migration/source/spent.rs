//! What the time in which the guest is paused is spent on. Each moment counts for one part, so that the parts add up.

use std::time::{Duration, Instant};

use crate::events::DowntimeParts;

/// A part of the downtime.
#[derive(Clone, Copy, Debug, Default)]
pub(super) enum Part {
    #[default]
    Sync,
    Transfer,
    State,
    Verify,
    Handover,
    Resume,
}

/// The parts, and the one that is being spent.
#[derive(Debug, Default)]
pub(super) struct Spent {
    parts: DowntimeParts,
    part: Part,
    /// What is counted up to, once the guest is paused.
    counted: Option<Instant>,
}

impl Spent {
    /// The guest is paused from here on.
    pub(super) fn paused(&mut self, now: Instant) {
        self.counted = Some(now);
    }

    /// What is done from here on, while the guest runs as well: it may be paused in the middle.
    pub(super) fn on(&mut self, part: Part) {
        let before = std::mem::replace(&mut self.part, part);
        let Some(counted) = &mut self.counted else { return };
        let now = Instant::now();
        let time = now - std::mem::replace(counted, now);
        *match before {
            Part::Sync => &mut self.parts.final_sync,
            Part::Transfer => &mut self.parts.final_transfer,
            Part::State => &mut self.parts.state,
            Part::Verify => &mut self.parts.verify,
            Part::Handover => &mut self.parts.handover,
            Part::Resume => &mut self.parts.resume,
        } += time;
    }

    /// The parts that are over.
    pub(super) fn parts(&self) -> DowntimeParts {
        self.parts
    }

    /// All of them together, if the guest was paused.
    pub(super) fn total(&self) -> Option<Duration> {
        self.counted.map(|_| self.parts.total())
    }
}
