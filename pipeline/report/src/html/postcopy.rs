//! A guest that ran at its destination before all of its pages were there: how long its threads waited for them.

use maud::{Markup, html};

use super::chart::{self, as_f64, percent};
use super::{Page, ms, wide};
use crate::postcopy::{FaultsReport, PostcopyReport, WaitsReport};
use memferry::controller::forecast::whole;
use memferry::human;

/// Pixels.
const HEIGHT: u32 = 140;
const ABOVE: u32 = 14;
/// Room for the times under the columns.
const BELOW: u32 = 18;
/// Columns for each doubling of the time: as many as the histogram has bounds.
const STEPS: f64 = 4.0;
/// The most times that are written under the columns.
const LABELS: usize = 8;

pub(super) fn section(page: &Page<'_>) -> Markup {
    let Some(postcopy) = &page.report.end.postcopy else { return html! {} };
    let waits = postcopy.faults.as_ref().map(|faults| &faults.waits).filter(|waits| waits.count > 0);
    html! {
        section aria-labelledby="postcopy" {
            h2 id="postcopy" { "Postcopy: the guest ran before all of its pages were there" }
            @if let Some(waits) = waits {
                figure {
                    p.caption {
                        b { "Waits" } " by their length: from the fault of a thread until it was woken. Half of them took up to "
                        (ms(waits.p50_ms)) ", 99 of 100 up to " (ms(waits.p99_ms)) ", the longest " (ms(waits.max_ms)) "."
                    }
                    (histogram(waits))
                }
            }
            (wide("Figures of postcopy", &table(postcopy)))
        }
    }
}

/// A column for each bucket, over a logarithmic scale of time.
fn histogram(waits: &WaitsReport) -> Markup {
    let steps = Steps::of(waits);
    let most = waits.histogram.iter().map(|(_, count)| *count).max().unwrap_or(0);
    let (scale, ticks) = chart::bytes_scale(as_f64(most), |value| human::count(whole(value)));
    let down = |share: f64| f64::from(ABOVE) + (1.0 - share) * f64::from(HEIGHT - ABOVE);
    let summary = format!("{} waits by their length.", human::count(waits.count));
    html! {
        svg.columns role="img" aria-label=(summary) width="100%" height=(HEIGHT + BELOW) {
            title { (summary) }
            @for (value, _) in &ticks {
                @let y = format!("{:.1}", down(scale.height(*value)));
                line.grid x1="0" x2="100%" y1=(y) y2=(y) {}
            }
            @for (bound_us, count) in &waits.histogram {
                @let height = scale.height(as_f64(*count)).max(0.005);
                rect.busy x=(percent(steps.left(*bound_us))) width=(percent(steps.width())) y=(format!("{:.1}", down(height)))
                    height=(format!("{:.1}", f64::from(HEIGHT) - down(height))) {
                    title { (human::count(*count)) " up to " (ms(bound_us / 1e3)) }
                }
            }
            line.base x1="0" x2="100%" y1=(HEIGHT) y2=(HEIGHT) {}
            @for (value, label) in &ticks {
                text.tick x="0" y=(format!("{:.1}", down(scale.height(*value)) - 3.0)) { (label) }
            }
            @for (share, label) in steps.labels() {
                text.tick x=(percent(share)) y=(HEIGHT + 13) text-anchor="middle" { (label) }
            }
        }
    }
}

/// A scale of time with a column for each quarter of a doubling.
struct Steps {
    first: f64,
    count: f64,
}

impl Steps {
    fn of(waits: &WaitsReport) -> Self {
        let steps = || waits.histogram.iter().map(|(bound_us, _)| step(*bound_us));
        let first = steps().fold(f64::MAX, f64::min);
        let last = steps().fold(0.0, f64::max);
        Self { first: first.min(last), count: (last - first).max(0.0) + 1.0 }
    }

    /// The left edge of the column whose upper bound this is, as a share of the width.
    fn left(&self, bound_us: f64) -> f64 {
        (step(bound_us) - self.first) / self.count
    }

    fn width(&self) -> f64 {
        1.0 / self.count
    }

    /// Times at right edges of columns, with their places: powers of two of a microsecond, as many as there is room for.
    fn labels(&self) -> Vec<(f64, String)> {
        let edges = || (0..64).map(|doubling| f64::from(doubling) * STEPS).filter(|step| *step >= self.first);
        let within: Vec<_> = edges().take_while(|step| *step < self.first + self.count).collect();
        let every = within.len().div_ceil(LABELS).max(1);
        let label = |step: f64| ((step + 1.0 - self.first) / self.count, ms(2_f64.powf(step / STEPS) / 1e3));
        within.into_iter().step_by(every).map(label).filter(|(share, _)| (0.03..0.97).contains(share)).collect()
    }
}

/// The number of the column of an upper bound: 0 is for 1 µs. Bounds lie at quarters of a doubling, evenly between the powers of two.
fn step(bound_us: f64) -> f64 {
    let bound_us = bound_us.max(1.0);
    let doubling = bound_us.log2().floor();
    let start = doubling.exp2();
    doubling * STEPS + ((bound_us - start) * STEPS / start).ceil()
}

fn table(postcopy: &PostcopyReport) -> Markup {
    let mut rows = vec![
        ("Pages missing at the start", human::exact(postcopy.missing_pages)),
        ("Until the last was there", ms(postcopy.time_ms)),
        ("Urgent pages", human::exact(postcopy.urgent_pages)),
    ];
    if let Some(lost) = postcopy.lost_pages().filter(|lost| *lost > 0) {
        rows[1].0 = "Until they were given up";
        rows.push(("Pages lost", human::exact(lost)));
    }
    rows.extend(postcopy.faults.iter().flat_map(|faults| at_destination(postcopy, faults)));
    html! {
        table {
            tbody { @for (name, value) in rows { tr { th scope="row" { (name) } td { (value) } } } }
        }
    }
}

/// What only the destination knows.
fn at_destination(postcopy: &PostcopyReport, faults: &FaultsReport) -> Vec<(&'static str, String)> {
    let mut rows = vec![
        ("Faults", human::exact(faults.faults)),
        ("Requests", human::exact(faults.requests)),
        ("Zero without a request", human::exact(faults.zeros)),
        ("Discarded by the guest", human::exact(faults.discarded)),
    ];
    if faults.waits.count > 0 {
        rows.push(("Threads waited, in all", ms(faults.waits.total_ms)));
    }
    rows.push(("Discards while the guest ran at its source", ms(postcopy.discarded_ahead_ms)));
    rows.push(("Discards while it was paused", ms(postcopy.discarded_paused_ms)));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_for_each_quarter_of_a_doubling() {
        assert_eq!([1.0, 1.25, 1.5, 2.0, 2.5, 4.0, 4096.0].map(step), [0.0, 1.0, 2.0, 4.0, 5.0, 8.0, 48.0]);
        let steps = Steps::of(&crate::postcopy::sample().faults.unwrap().waits);
        assert_eq!((steps.left(160.0), steps.left(256.0)), (0.0, 3.0 / steps.count));
        assert!(steps.labels().len() <= LABELS && steps.labels()[0].1 == "256 µs", "{:?}", steps.labels());
    }
}
