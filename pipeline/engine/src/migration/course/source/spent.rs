//! How the time is spent in which the guest is paused. Each moment counts for one part, so that the parts add up.

use std::time::Duration;

use crate::events::DowntimeParts;

/// A part of the downtime.
#[derive(Clone, Copy, Debug, Default)]
pub(super) enum Part {
    Pause,
    State,
    #[default]
    Sync,
    Transfer,
    Load,
    Verify,
    Durable,
    Prepare,
    Start,
    Handover,
    Resume,
}

/// The parts, and the current one.
#[derive(Debug, Default)]
pub(super) struct Spent {
    parts: DowntimeParts,
    part: Part,
    /// The part that was current before the pause.
    before_pause: Part,
    /// The moment up to which time is counted, once the guest is paused.
    counted: Option<Duration>,
}

impl Spent {
    /// The guest is being paused from here on.
    pub(super) fn pausing(&mut self, now: Duration) {
        self.counted = Some(now);
        self.before_pause = std::mem::replace(&mut self.part, Part::Pause);
    }

    /// The guest is paused: the work in whose middle that happened continues.
    pub(super) fn paused(&mut self, now: Duration) {
        self.on(self.before_pause, now);
    }

    /// The current work from here on. It may begin while the guest runs, and the guest may be paused in the middle of
    /// it.
    pub(super) fn on(&mut self, part: Part, now: Duration) {
        let before = std::mem::replace(&mut self.part, part);
        let Some(counted) = &mut self.counted else { return };
        let time = now.saturating_sub(std::mem::replace(counted, now));
        *self.time_of(before) += time;
    }

    /// Of the time that counts for a part, the destination reports that it has spent this much on another one: it counts
    /// for that, as far as there is so much.
    pub(super) fn reported(&mut self, part: Part, reported: Duration, from: Part) {
        let waited = self.time_of(from);
        let time = reported.min(*waited);
        *waited -= time;
        *self.time_of(part) += time;
    }

    fn time_of(&mut self, part: Part) -> &mut Duration {
        match part {
            Part::Pause => &mut self.parts.pause,
            Part::State => &mut self.parts.state,
            Part::Sync => &mut self.parts.final_sync,
            Part::Transfer => &mut self.parts.final_transfer,
            Part::Load => &mut self.parts.load,
            Part::Verify => &mut self.parts.verify,
            Part::Durable => &mut self.parts.durable,
            Part::Prepare => &mut self.parts.prepare,
            Part::Start => &mut self.parts.start,
            Part::Handover => &mut self.parts.handover,
            Part::Resume => &mut self.parts.resume,
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn each_moment_of_the_pause_counts_for_one_part() {
        let mut spent = Spent::default();
        spent.on(Part::Transfer, ms(5));
        assert_eq!(spent.total(), None, "the guest runs");
        // It is paused in the middle of a round.
        spent.pausing(ms(10));
        spent.paused(ms(12));
        spent.on(Part::State, ms(20));
        spent.on(Part::Load, ms(21));
        spent.on(Part::Handover, ms(31));
        let expected = DowntimeParts {
            pause: ms(2),
            final_transfer: ms(8),
            state: ms(1),
            load: ms(10),
            ..DowntimeParts::default()
        };
        assert_eq!((spent.parts(), spent.total()), (expected, Some(ms(21))));
    }

    #[test]
    fn what_the_destination_reports_is_taken_from_the_time_that_it_was_waited_for() {
        let mut spent = Spent::default();
        spent.pausing(ms(0));
        spent.paused(ms(0));
        spent.on(Part::Load, ms(0));
        spent.on(Part::Handover, ms(10));
        spent.reported(Part::Durable, ms(4), Part::Load);
        spent.reported(Part::Prepare, ms(40), Part::Load);
        let expected = DowntimeParts { durable: ms(4), prepare: ms(6), ..DowntimeParts::default() };
        assert_eq!(spent.parts(), expected);
    }
}
