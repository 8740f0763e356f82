//! The pages of each round by encoding: as counts, as shares, and as figures.

use maud::{Markup, html};
use memferry_stages::tally::PageTally;

use super::chart::{self, as_f64, percent};
use super::{Page, long, ms};
use crate::RoundReport;
use memferry::controller::forecast::whole;
use memferry::human;

/// One encoding: its class, its name, and the number of a round's pages that used it.
type Encoding = (&'static str, &'static str, fn(&PageTally) -> u64);

/// From the bottom of a column to its top.
const ENCODINGS: [Encoding; 5] = [
    ("raw", "raw", |pages| pages.raw),
    ("compressed", "compressed", |pages| pages.compressed),
    ("xbzrle", "xbzrle", |pages| pages.xbzrle),
    ("unchanged", "unchanged (not sent)", |pages| pages.unchanged),
    ("zero", "zero", |pages| pages.zero),
];

/// Fewer rounds than this do not fill the width.
const FULL: usize = 6;
/// The most rounds that are labelled with their number.
const NUMBERED: usize = 14;
/// The most columns that are distinguishable on a phone.
const COLUMNS: usize = 60;
/// Pixels.
const HEIGHT: u32 = 140;
const ABOVE: u32 = 14;

pub(super) fn section(page: &Page<'_>) -> Markup {
    let rounds = &page.report.rounds;
    if rounds.is_empty() {
        return html! {};
    }
    let used: Vec<_> =
        ENCODINGS.into_iter().filter(|(_, _, of)| rounds.iter().any(|round| of(&round.pages) > 0)).collect();
    let together = rounds.len().div_ceil(COLUMNS);
    let shown: Vec<_> = rounds.chunks(together).map(Column::of).collect();
    let most = shown.iter().map(|column| column.pages.all).max().unwrap_or(0);
    let (scale, ticks) = chart::bytes_scale(as_f64(most), |value| human::count(whole(value)));
    let of_pages: Vec<_> = ticks.into_iter().map(|(value, label)| (scale.height(value), label)).collect();
    let of_share = [(0.5, "50 %".to_owned()), (1.0, "100 %".to_owned())];
    html! {
        section aria-labelledby="rounds" {
            h2 id="rounds" { "Pages by encoding in each round" }
            figure {
                p.caption {
                    @for (class, name, _) in &used { (chart::key(class, name)) }
                    @if together > 1 { "A column is the mean of " (together) " rounds." }
                }
                div.pair {
                    div {
                        p.caption { b { "Pages" } }
                        (columns("Pages of each round by encoding.", &shown, &used, &of_pages, |pages, _| scale.height(as_f64(pages))))
                    }
                    div {
                        p.caption { b { "Share" } " of the round's pages" }
                        (columns("Share of each encoding in each round.", &shown, &used, &of_share, share))
                    }
                }
            }
            (long("Figures of each round", rounds.len(), &table(rounds)))
        }
    }
}

fn share(pages: u64, of: u64) -> f64 {
    as_f64(pages) / as_f64(of.max(1))
}

/// Consecutive rounds that share one column.
struct Column {
    first: u32,
    last: u32,
    /// The mean of these rounds.
    pages: PageTally,
}

impl Column {
    fn of(rounds: &[RoundReport]) -> Self {
        let mean =
            |of: fn(&PageTally) -> u64| rounds.iter().map(|round| of(&round.pages)).sum::<u64>() / rounds.len() as u64;
        let [first, .., last] = rounds else {
            return Self { first: rounds[0].round, last: rounds[0].round, pages: rounds[0].pages };
        };
        let (zero, raw, compressed) = (mean(|of| of.zero), mean(|of| of.raw), mean(|of| of.compressed));
        let (xbzrle, unchanged) = (mean(|of| of.xbzrle), mean(|of| of.unchanged));
        let all = zero + raw + compressed + xbzrle + unchanged;
        let pages = PageTally { all, zero, raw, compressed, xbzrle, unchanged, ..first.pages };
        Self { first: first.round, last: last.round, pages }
    }

    fn name(&self) -> String {
        if self.first == self.last {
            format!("round {}", self.first)
        } else {
            format!("rounds {} to {}, in the mean", self.first, self.last)
        }
    }
}

/// A column of stacked encodings for each group of rounds. `height` maps a number of pages and the column's total to
/// a share of the chart's height, and each tick is at such a share.
fn columns(
    summary: &str,
    shown: &[Column],
    encodings: &[Encoding],
    ticks: &[(f64, String)],
    height: impl Fn(u64, u64) -> f64,
) -> Markup {
    let slot = 1.0 / as_f64(shown.len().max(FULL) as u64);
    let plot = f64::from(HEIGHT - ABOVE);
    let every = shown.len().div_ceil(NUMBERED);
    let down = |share: f64| format!("{:.1}", f64::from(HEIGHT) - share * plot);
    html! {
        svg.columns role="img" aria-label=(summary) width="100%" height=(HEIGHT + 18) {
            title { (summary) }
            @for (index, column) in shown.iter().enumerate() {
                @let left = slot * (as_f64(index as u64) + 0.12);
                @for (class, low, part, name) in stack(&column.pages, encodings) {
                    @let (low, part) = (height(low, column.pages.all), height(part, column.pages.all));
                    rect class=(class) x=(percent(left)) width=(percent(slot * 0.76)) y=(down(low + part)) height=(format!("{:.1}", part * plot)) {
                        title { (column.name()) ": " (name) }
                    }
                }
                @if index % every == 0 {
                    text.tick x=(percent(slot * (as_f64(index as u64) + 0.5))) y=(HEIGHT + 13) text-anchor="middle" { (column.first) }
                }
            }
            line.base x1="0" x2="100%" y1=(HEIGHT) y2=(HEIGHT) {}
            @for (top, label) in ticks {
                line.grid x1="0" x2="100%" y1=(down(*top)) y2=(down(*top)) {}
                text.tick x="100%" y=(down(*top)) dy="-3" text-anchor="end" { (label) }
            }
        }
    }
}

/// The parts of a column from the bottom: class, pages below it, its pages, and its description.
fn stack(pages: &PageTally, encodings: &[Encoding]) -> Vec<(&'static str, u64, u64, String)> {
    let mut low = 0;
    let mut parts = Vec::new();
    for (class, name, of) in encodings {
        let part = of(pages);
        if part > 0 {
            parts.push((*class, low, part, format!("{} pages {name}", human::exact(part))));
        }
        low += part;
    }
    parts
}

fn table(rounds: &[RoundReport]) -> Markup {
    const HEADS: [&str; 13] = [
        "Time",
        "Pages",
        "Zero",
        "Raw",
        "Compressed",
        "XBZRLE",
        "Unchanged",
        "Cache misses",
        "Overflows",
        "Bytes in",
        "Bytes out",
        "Out of in",
        "Dirty after",
    ];
    html! {
        table {
            thead { tr { th scope="col" { "Round" } @for head in HEADS { th scope="col" { (head) } } } }
            tbody { @for round in rounds { (row(round)) } }
        }
    }
}

fn row(round: &RoundReport) -> Markup {
    let pages = &round.pages;
    let counts = [
        pages.all,
        pages.zero,
        pages.raw,
        pages.compressed,
        pages.xbzrle,
        pages.unchanged,
        pages.xbzrle_misses,
        pages.xbzrle_overflows,
    ];
    html! {
        tr {
            th scope="row" { (round.round) }
            td { data value=(round.ms) { (ms(round.ms)) } }
            @for count in counts { td { data value=(count) { (human::exact(count)) } } }
            @for bytes in [pages.bytes_in, pages.bytes_out] { td { data value=(bytes) { (human::bytes(bytes)) } } }
            td { (format!("{:.1} %", share(pages.bytes_out, pages.bytes_in) * 100.0)) }
            td { @match round.dirty_after { Some(dirty) => data value=(dirty) { (human::exact(dirty)) }, None => "–" } }
        }
    }
}
