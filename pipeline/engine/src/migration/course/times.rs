//! The parts of the downtime that are work of the destination, as it reports them to the source in heartbeats.

use std::time::Duration;

use memferry_stages::wire::Message;
use memferry_stages::wire::messages::Figure;

use crate::controller::forecast::WriteBack;

/// Names of the figures: nanoseconds.
const BUILD: &str = "build_ns";
const BACKLOG: &str = "write_backlog_ns";
const CALL: &str = "write_call_ns";
const PER_MIB: &str = "write_mib_ns";
const VERIFY: &str = "verify_ns";
const DURABLE: &str = "durable_ns";
const PREPARE: &str = "prepare_ns";
const START: &str = "start_ns";

/// How long the destination has worked on each part. At the source these are claims of the peer, which count only as
/// far as the source waited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct DestinationTimes {
    pub(super) verify: Duration,
    pub(super) durable: Duration,
    pub(super) prepare: Duration,
    pub(super) start: Duration,
}

impl DestinationTimes {
    /// The message that reports them.
    pub(super) fn message(&self) -> Message {
        Message::Heartbeat(vec![
            figure(VERIFY, self.verify),
            figure(DURABLE, self.durable),
            figure(PREPARE, self.prepare),
            figure(START, self.start),
        ])
    }

    /// Takes the figures of a heartbeat that are about them.
    pub(super) fn hear(&mut self, figures: &[Figure]) {
        for figure in figures {
            let time = match figure.name.raw() {
                VERIFY => &mut self.verify,
                DURABLE => &mut self.durable,
                PREPARE => &mut self.prepare,
                START => &mut self.start,
                _ => continue,
            };
            *time = Duration::from_nanos(figure.value);
        }
    }
}

/// The message that reports, before Ready, how long the destination took to build the guest.
pub(in crate::migration) fn build_message(time: Duration) -> Message {
    Message::Heartbeat(vec![figure(BUILD, time)])
}

/// What it reports; zero if the figures are about something else.
pub(in crate::migration) fn build_of(figures: &[Figure]) -> Duration {
    let figure = figures.iter().find(|figure| figure.name.raw() == BUILD);
    figure.map_or(Duration::ZERO, |figure| Duration::from_nanos(figure.value))
}

/// The figures that report how long the destination needs to make its memory durable.
pub(in crate::migration) fn write_back_figures(times: &WriteBack) -> [Figure; 3] {
    [figure(BACKLOG, times.backlog), figure(CALL, times.call), figure(PER_MIB, times.per_mib)]
}

/// What they report; `None` if the figures are about something else.
pub(super) fn write_back_of(figures: &[Figure]) -> Option<WriteBack> {
    let time = |name| {
        let figure = figures.iter().find(|figure| figure.name.raw() == name)?;
        Some(Duration::from_nanos(figure.value))
    };
    Some(WriteBack { backlog: time(BACKLOG)?, call: time(CALL)?, per_mib: time(PER_MIB)? })
}

fn figure(name: &str, time: Duration) -> Figure {
    Figure { name: name.into(), value: u64::try_from(time.as_nanos()).unwrap_or(u64::MAX) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_the_build_is_heard() {
        let Message::Heartbeat(figures) = build_message(Duration::from_millis(7)) else { unreachable!("a heartbeat") };
        assert_eq!((build_of(&figures), build_of(&[])), (Duration::from_millis(7), Duration::ZERO));
    }

    #[test]
    fn the_times_of_the_write_back_are_heard_together_or_not_at_all() {
        let ms = Duration::from_millis;
        let times = WriteBack { backlog: ms(1), call: ms(2), per_mib: ms(3) };
        assert_eq!(write_back_of(&write_back_figures(&times)), Some(times));
        assert_eq!(write_back_of(&write_back_figures(&times)[1..]), None);
    }

    #[test]
    fn what_is_reported_is_heard_and_other_figures_change_nothing() {
        let ms = Duration::from_millis;
        let times = DestinationTimes { verify: ms(1), durable: ms(2), prepare: ms(3), start: ms(4) };
        let Message::Heartbeat(mut figures) = times.message() else { unreachable!("it is a heartbeat") };
        figures.push(Figure { name: "another_ns".into(), value: 5 });
        let mut heard = DestinationTimes::default();
        heard.hear(&figures);
        assert_eq!(heard, times);
        heard.hear(&[Figure { name: START.into(), value: u64::MAX }]);
        assert_eq!(heard, DestinationTimes { start: Duration::from_nanos(u64::MAX), ..times });
    }
}
