//! How the time is spent in which the guest is paused. Each moment counts for one part, so that the parts add up.

use std::time::Duration;

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

/// The parts, and the current one.
#[derive(Debug, Default)]
pub(super) struct Spent {
    parts: DowntimeParts,
    part: Part,
    /// The moment up to which time is counted, once the guest is paused.
    counted: Option<Duration>,
}

impl Spent {
    /// The guest is paused from here on.
    pub(super) fn paused(&mut self, now: Duration) {
        self.counted = Some(now);
    }

    /// The current work from here on. It may begin while the guest runs, and the guest may be paused in the middle of
    /// it.
    pub(super) fn on(&mut self, part: Part, now: Duration) {
        let before = std::mem::replace(&mut self.part, part);
        let Some(counted) = &mut self.counted else { return };
        let time = now.saturating_sub(std::mem::replace(counted, now));
        *match before {
            Part::Sync => &mut self.parts.final_sync,
            Part::Transfer => &mut self.parts.final_transfer,
            Part::State => &mut self.parts.state,
            Part::Verify => &mut self.parts.verify,
            Part::Handover => &mut self.parts.handover,
            Part::Resume => &mut self.parts.resume,
        } += time;
    }

    /// The completed parts.
    pub(super) fn parts(&self) -> DowntimeParts {
        self.parts
    }

    /// The sum of all parts, if the guest was paused.
    pub(super) fn total(&self) -> Option<Duration> {
        self.counted.map(|_| self.parts.total())
    }
}
