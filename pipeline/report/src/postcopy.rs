//! What happened to a guest that was started at the destination before all of its pages were there.

use std::fmt::Write;
use std::time::Duration;

use memferry_stages::missing::MissingCounts;
use serde::{Deserialize, Serialize};

use memferry::events::Postcopy;
use memferry::human;
use memferry::values::ms;

/// The figures of [`Postcopy`]. Each end knows a part of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PostcopyReport {
    /// Pages that were missing when the guest was handed over.
    pub missing_pages: u64,
    /// From the start of the guest until the last page was there, or was given up.
    pub time_ms: f64,
    /// Pages that were sent, or asked for, because threads waited for them.
    pub urgent_pages: u64,
    /// How long the destination discarded pages before the guest was paused; 0 at the source.
    pub discarded_ahead_ms: f64,
    /// The same while it was paused; 0 at the source.
    pub discarded_paused_ms: f64,
    /// What happened to the pages that were missing; null at the source.
    pub faults: Option<FaultsReport>,
}

/// What happened to missing pages, and how long threads waited for them: [`MissingCounts`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FaultsReport {
    /// Faults that the kernel reported.
    pub faults: u64,
    /// Requests that were made for them.
    pub requests: u64,
    /// Pages of the host that were resolved as zero without a request.
    pub zeros: u64,
    /// Pages that were placed, zero or not.
    pub placed: u64,
    /// Pages that arrived when they were placed already, or discarded.
    pub duplicates: u64,
    /// Pages that the guest discarded before they arrived.
    pub discarded: u64,
    /// Calls of the kernel that were repeated since a discard was under way.
    pub retries: u64,
    /// From the report of a fault until the thread was woken, for each page that was requested.
    pub waits: WaitsReport,
}

/// How long threads waited.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WaitsReport {
    /// How many waits there were.
    pub count: u64,
    /// All of them together.
    pub total_ms: f64,
    /// The time that half of them do not exceed, at most a quarter too long, as the next.
    pub p50_ms: f64,
    /// The time that 99 of 100 do not exceed.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
    /// Upper bounds in microseconds, ascending, each with the number of waits below it that are above the bound before.
    pub histogram: Vec<(f64, u64)>,
}

impl From<&Postcopy> for PostcopyReport {
    fn from(postcopy: &Postcopy) -> Self {
        Self {
            missing_pages: postcopy.missing_pages,
            time_ms: ms(postcopy.time),
            urgent_pages: postcopy.urgent_pages,
            discarded_ahead_ms: ms(postcopy.discarded_ahead),
            discarded_paused_ms: ms(postcopy.discarded_paused),
            faults: postcopy.faults.as_ref().map(FaultsReport::from),
        }
    }
}

impl From<&MissingCounts> for FaultsReport {
    fn from(counts: &MissingCounts) -> Self {
        let waits = &counts.waits;
        Self {
            faults: counts.faults,
            requests: counts.requests,
            zeros: counts.zeros,
            placed: counts.placed,
            duplicates: counts.duplicates,
            discarded: counts.discarded,
            retries: counts.retries,
            waits: WaitsReport {
                count: waits.count(),
                total_ms: ms(waits.total()),
                p50_ms: ms(waits.quantile(0.5)),
                p99_ms: ms(waits.quantile(0.99)),
                max_ms: ms(waits.max()),
                histogram: waits.buckets().map(|(bound, count)| (ms(bound) * 1e3, count)).collect(),
            },
        }
    }
}

impl PostcopyReport {
    /// The figures of a source, supplemented by those that only its destination has.
    #[must_use]
    pub fn joined(source: Option<&Postcopy>, destination: Option<&Postcopy>) -> Option<Self> {
        let there = destination.map(Self::from);
        match (source.map(Self::from), there) {
            (Some(source), Some(there)) => {
                let Self { discarded_ahead_ms, discarded_paused_ms, faults, .. } = there;
                Some(Self { discarded_ahead_ms, discarded_paused_ms, faults, ..source })
            }
            (source, there) => source.or(there),
        }
    }

    /// Pages that never reached the guest; `None` where this end does not know.
    #[must_use]
    pub fn lost_pages(&self) -> Option<u64> {
        let faults = self.faults.as_ref()?;
        Some(self.missing_pages.saturating_sub(faults.placed + faults.discarded))
    }

    /// The lines of the summary, with their names.
    pub(crate) fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = vec![("postcopy", self.to_line())];
        let Some(faults) = &self.faults else { return lines };
        if faults.waits.count > 0 {
            lines.push(("waits", faults.waits.to_line()));
        }
        lines.push(("discards", self.discards()));
        lines
    }

    fn to_line(&self) -> String {
        let (missing, urgent) = (human::count(self.missing_pages), human::count(self.urgent_pages));
        let mut line = match self.lost_pages() {
            Some(lost) if lost > 0 => {
                let time = human::time(duration(self.time_ms));
                format!("{missing} pages missing at the start, {} of them still after {time}", human::count(lost))
            }
            _ => format!("{missing} pages missing at the start, the last for {}", human::time(duration(self.time_ms))),
        };
        write!(line, "; {urgent} urgent").expect("a string takes it");
        if let Some(faults) = &self.faults {
            let (requests, faults) = (human::count(faults.requests), human::count(faults.faults));
            write!(line, " ({requests} requests for {faults} faults)").expect("a string takes it");
        }
        line
    }

    fn discards(&self) -> String {
        let [ahead, paused] = [self.discarded_ahead_ms, self.discarded_paused_ms].map(|ms| human::time(duration(ms)));
        let mut line = format!("{ahead} while the guest ran at its source, {paused} while it was paused");
        if let Some(faults) = self.faults.as_ref().filter(|faults| faults.discarded > 0) {
            write!(line, ", {} pages by the guest", human::count(faults.discarded)).expect("a string takes it");
        }
        line
    }
}

impl WaitsReport {
    fn to_line(&self) -> String {
        let [p50, p99, max, total] =
            [self.p50_ms, self.p99_ms, self.max_ms, self.total_ms].map(|ms| human::time(duration(ms)));
        format!("from a fault until its thread was woken: p50 {p50}, p99 {p99}, longest {max}, {total} in all")
    }
}

fn duration(ms: f64) -> Duration {
    Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default()
}

/// Figures for tests of views.
#[cfg(test)]
pub(crate) fn sample() -> PostcopyReport {
    let waits = WaitsReport {
        count: 5678,
        total_ms: 1812.5,
        p50_ms: 0.256,
        p99_ms: 1.28,
        max_ms: 4.125,
        histogram: vec![(160.0, 400), (256.0, 2600), (320.0, 2100), (1280.0, 530), (4096.0, 40), (4125.0, 8)],
    };
    let faults = FaultsReport {
        faults: 6001,
        requests: 5678,
        zeros: 12,
        placed: 24_683,
        duplicates: 0,
        discarded: 8,
        retries: 1,
        waits,
    };
    PostcopyReport {
        missing_pages: 24_691,
        time_ms: 4210.0,
        urgent_pages: 5678,
        discarded_ahead_ms: 3.2,
        discarded_paused_ms: 0.41,
        faults: Some(faults),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_say_what_was_missing_and_how_long_threads_waited() {
        let text = |report: PostcopyReport| {
            let lines = report.lines();
            lines.iter().map(|(name, line)| format!("{name}: {line}")).collect::<Vec<_>>().join("\n")
        };
        let expected = "\
postcopy: 24,691 pages missing at the start, the last for 4.21 s; 5,678 urgent (5,678 requests for 6,001 faults)
waits: from a fault until its thread was woken: p50 256 µs, p99 1.28 ms, longest 4.12 ms, 1.81 s in all
discards: 3.20 ms while the guest ran at its source, 410 µs while it was paused, 8 pages by the guest";
        assert_eq!(text(sample()), expected);
        let mut lost = sample();
        lost.faults.as_mut().unwrap().placed -= 100;
        assert_eq!(lost.lost_pages(), Some(100));
        assert!(
            text(lost).starts_with("postcopy: 24,691 pages missing at the start, 100 of them still after 4.21 s; ")
        );
        let source = PostcopyReport { faults: None, ..sample() };
        assert_eq!(text(source), "postcopy: 24,691 pages missing at the start, the last for 4.21 s; 5,678 urgent");
    }

    #[test]
    fn the_source_has_the_time_and_the_destination_the_waits() {
        let at = |seconds, faults| Postcopy { time: Duration::from_secs(seconds), faults, ..Postcopy::default() };
        let (here, there) = (at(3, None), at(2, Some(MissingCounts::default())));
        let both = PostcopyReport::joined(Some(&here), Some(&there)).unwrap();
        assert!(both.time_ms == 3000.0 && both.faults.is_some());
        assert_eq!(PostcopyReport::joined(None, None), None);
        assert_eq!(PostcopyReport::joined(Some(&here), None), Some((&here).into()));
    }
}
