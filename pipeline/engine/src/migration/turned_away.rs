//! Reports of refused peers, limited in rate: the first of a kind at once, then a count at a growing interval, and the
//! remaining count at the end.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use memferry_stages::untrusted::Untrusted;
use tokio::time::{Instant, sleep_until};

use crate::events::{Event, Observers, TurnedAwayKind};

/// The time after the first of a kind in which others are only counted. Each further interval is twice as long.
const FIRST_WAIT: Duration = Duration::from_secs(10);
/// The longest of these intervals.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// Counts refused peers, by kind, and reports them.
#[derive(Debug)]
pub(super) struct TurnedAways {
    observers: Observers,
    tallies: Mutex<[Tally; TurnedAwayKind::ALL.len()]>,
}

/// The refused peers of one kind.
#[derive(Debug, Default)]
struct Tally {
    /// How many are not reported.
    count: u64,
    /// The latest of them: its name, and the reason.
    last: (Untrusted, String),
    /// The time until which they are only counted, and the length of that interval, once one was reported.
    quiet: Option<(Instant, Duration)>,
}

impl Tally {
    /// When the counted ones are due to be reported, if there are any.
    fn due(&self) -> Option<Instant> {
        self.quiet.filter(|_| self.count > 0).map(|(until, _)| until)
    }

    /// The report that is due at this time, if any.
    fn take(&mut self, kind: TurnedAwayKind, now: Instant) -> Option<Event> {
        let is_quiet = self.quiet.is_some_and(|(until, _)| now < until);
        if self.count == 0 || is_quiet {
            return None;
        }
        let wait = self.quiet.map_or(FIRST_WAIT, |(_, wait)| LONGEST_WAIT.min(wait * 2));
        self.quiet = Some((now + wait, wait));
        let (peer, why) = std::mem::take(&mut self.last);
        Some(Event::TurnedAway { kind, peer, why, count: std::mem::take(&mut self.count) })
    }
}

impl TurnedAways {
    pub(super) fn new(observers: Observers) -> Self {
        Self { observers, tallies: Mutex::default() }
    }

    /// Counts one more refused peer.
    pub(super) fn note(&self, kind: TurnedAwayKind, peer: Untrusted, why: String) {
        let event = {
            let tally = &mut self.tallies()[kind as usize];
            tally.count += 1;
            tally.last = (peer, why);
            tally.take(kind, Instant::now())
        };
        event.iter().for_each(|event| self.observers.notify(event));
    }

    /// Waits until a count is due, and reports it. Safe to race in a `select!`.
    pub(super) async fn report_next(&self) {
        let due = self.tallies().iter().filter_map(Tally::due).min();
        match due {
            Some(due) => sleep_until(due).await,
            None => std::future::pending().await,
        }
        self.report(Instant::now());
    }

    /// Reports every remaining count.
    pub(super) fn finish(&self) {
        self.tallies().iter_mut().for_each(|tally| tally.quiet = tally.quiet.map(|(_, wait)| (Instant::now(), wait)));
        self.report(Instant::now());
    }

    fn report(&self, now: Instant) {
        let events: Vec<_> = TurnedAwayKind::ALL
            .into_iter()
            .zip(self.tallies().iter_mut())
            .filter_map(|(kind, tally)| tally.take(kind, now))
            .collect();
        events.iter().for_each(|event| self.observers.notify(event));
    }

    /// Plain figures that are consistent after every step.
    fn tallies(&self) -> MutexGuard<'_, [Tally; TurnedAwayKind::ALL.len()]> {
        self.tallies.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts one that arrives at this time, and returns the count that is reported then.
    fn comes(tally: &mut Tally, at: Instant) -> Option<u64> {
        tally.count += 1;
        tally.last = ("peer".into(), "why".into());
        count(tally.take(TurnedAwayKind::Protocol, at))
    }

    fn count(event: Option<Event>) -> Option<u64> {
        event.map(|event| match event {
            Event::TurnedAway { kind: TurnedAwayKind::Protocol, peer, why, count } => {
                assert_eq!((peer.raw(), &why[..]), ("peer", "why"));
                count
            }
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn the_first_is_reported_at_once_and_then_a_count_at_a_growing_interval() {
        let (mut tally, began) = (Tally::default(), Instant::now());
        let seconds = |seconds| began + Duration::from_secs(seconds);
        let reported: Vec<_> =
            (0..300).map(|at| (at, comes(&mut tally, seconds(at)))).filter(|(_, count)| count.is_some()).collect();
        let expected = [(0, 1), (10, 10), (30, 20), (70, 40), (150, 80)];
        assert_eq!(reported, expected.map(|(at, count)| (at, Some(count))));
    }

    #[test]
    fn a_count_that_nobody_follows_is_due_at_the_end_of_the_interval() {
        let (mut tally, began) = (Tally::default(), Instant::now());
        assert_eq!((tally.due(), comes(&mut tally, began), tally.due()), (None, Some(1), None));
        assert_eq!(comes(&mut tally, began + Duration::from_secs(1)), None);
        assert_eq!(tally.due(), Some(began + FIRST_WAIT));
        assert_eq!(count(tally.take(TurnedAwayKind::Protocol, began + FIRST_WAIT)), Some(1));
        assert_eq!(tally.due(), None);
    }

    #[test]
    fn a_flood_of_a_day_is_a_few_lines() {
        let (mut tally, began) = (Tally::default(), Instant::now());
        let lines = (0..86_400).filter_map(|at| comes(&mut tally, began + Duration::from_secs(at))).count();
        assert!(lines < 40, "{lines} lines");
    }

    #[tokio::test]
    async fn kinds_do_not_hide_each_other_and_the_end_reports_what_is_left() {
        use std::sync::Arc;

        use crate::events::{Observer, Role};

        let reported: Arc<Mutex<Vec<(TurnedAwayKind, u64)>>> = Arc::default();
        let listening = reported.clone();
        let observer = move |_: Role, event: &Event| {
            let Event::TurnedAway { kind, count, .. } = event else { panic!("{event:?}") };
            listening.lock().unwrap().push((*kind, *count));
        };
        let observer: Arc<dyn Observer> = Arc::new(observer);
        let away = TurnedAways::new(Observers::new(Role::Destination, vec![observer]));
        for _ in 0..1000 {
            away.note(TurnedAwayKind::Protocol, "a".into(), "b".into());
        }
        away.note(TurnedAwayKind::Version, "a".into(), "b".into());
        away.finish();
        away.finish();
        let (protocol, version) = (TurnedAwayKind::Protocol, TurnedAwayKind::Version);
        assert_eq!(*reported.lock().unwrap(), [(protocol, 1), (version, 1), (protocol, 999)]);
    }
}
