//! A migration over time: remaining bytes, rates, forecast and throttle over one time axis, with events marked.

mod panels;

use std::time::Duration;

use maud::{Markup, html};

use super::chart::{self, Backdrop, Time, percent};
use super::{Page, decisions};
use crate::account::Account;
use crate::series::{Happened, Sample};
use memferry::control::Changed;
use memferry::controller::{Decided, Decision};
use memferry::events::Phase;
use memferry::human;

/// The least distance between two flags, or two round numbers, in one row, as a share of the width.
const APART: f64 = 0.065;
const FLAG_ROWS: usize = 3;
/// The least distance at which two round lines, or two dots, are distinguishable on a phone.
const BESIDE: f64 = 0.012;
/// The most flags that the legend explains; the tables have all of them.
const EXPLAINED: usize = 24;

pub(super) fn section(page: &Page<'_>) -> Markup {
    let account = page.account;
    let Some(course) = Course::of(page) else { return html! {} };
    let backdrop = course.backdrop();
    html! {
        section aria-labelledby="course" {
            h2 id="course" { "The course" }
            figure {
                (flags(&course))
                @if !account.rounds.is_empty() { (rounds(&course)) }
                (course.remaining(&backdrop))
                (course.rates(&backdrop))
                (course.downtime(&backdrop))
                (course.throttle(&backdrop))
                (chart::time_axis(course.time))
                figcaption { (course.legend()) }
            }
        }
    }
}

/// The data of the charts.
struct Course<'a> {
    page: &'a Page<'a>,
    account: &'a Account,
    samples: Vec<Sample>,
    time: Time,
}

/// An event with a flag.
struct Flag {
    at: Duration,
    /// The flag's label: a decision's number or a change's letter.
    name: String,
    class: &'static str,
    /// A description of the event.
    what: String,
}

impl<'a> Course<'a> {
    /// `None` if no page ever moved.
    fn of(page: &'a Page<'a>) -> Option<Self> {
        let (account, series) = (page.account, &page.account.series);
        let samples = series.samples();
        series.first(Happened::Phase(Phase::Active))?;
        let last = series.marks().last().map(|mark| mark.at).max(samples.last().map(|sample| sample.at))?;
        let time = Time { from: page.zero(), to: last };
        (time.to > time.from).then_some(Self { page, account, samples, time })
    }

    fn backdrop(&self) -> Backdrop {
        let marks = self.account.series.marks().iter();
        let rounds = marks.filter(|mark| matches!(mark.what, Happened::Round { .. })).map(|mark| mark.at);
        let rounds = chart::apart(BESIDE, rounds, |at| self.time.share(*at));
        let flags = self.flags().into_iter().map(|flag| (flag.at, flag.class)).collect();
        Backdrop { time: self.time, rounds, flags, outages: self.outages(), paused: self.paused() }
    }

    /// Decisions with an effect, and changed settings, in order of time.
    fn flags(&self) -> Vec<Flag> {
        let decided = self.page.decisions().enumerate().filter(|(_, (_, it))| it.decision != Decision::AnotherRound);
        let decided = decided.map(|(index, (at, Decided { decision, .. }))| Flag {
            at,
            name: (index + 1).to_string(),
            class: decisions::class(*decision),
            what: decisions::name(*decision),
        });
        let changed = self.page.changes().enumerate().map(|(index, (at, Changed { to, .. }))| Flag {
            at,
            name: decisions::letter(index),
            class: "flag-change",
            what: format!("{} = {to}", to.key()),
        });
        let mut flags: Vec<_> = decided.chain(changed).collect();
        flags.sort_by_key(|flag| flag.at);
        flags
    }

    /// The ranges in which the guest was paused.
    fn paused(&self) -> Vec<(Duration, Duration)> {
        self.up_to_the_end(self.account.series.paused())
    }

    /// The ranges in which there was no connection.
    fn outages(&self) -> Vec<(Duration, Duration)> {
        self.up_to_the_end(self.account.series.outages())
    }

    fn up_to_the_end(&self, ranges: Vec<(Duration, Option<Duration>)>) -> Vec<(Duration, Duration)> {
        ranges.into_iter().map(|(from, to)| (from, to.unwrap_or(self.time.to))).collect()
    }

    /// When the guest was paused last.
    fn paused_last(&self) -> Option<Duration> {
        self.account.series.last(Happened::Paused)
    }

    /// The samples taken while the guest was not paused.
    fn running(&self) -> impl Iterator<Item = &Sample> {
        let paused = self.paused();
        let is_paused = move |at| paused.iter().any(|(from, to)| at >= *from && at <= *to);
        self.samples.iter().filter(move |sample| !is_paused(sample.at))
    }

    fn legend(&self) -> Markup {
        let mut flags = self.flags();
        let more = flags.len().saturating_sub(EXPLAINED);
        flags.truncate(EXPLAINED);
        html! {
            @if !self.account.rounds.is_empty() { (chart::upright_key("round", "a round was sent")) }
            @if self.paused_last().is_some() { (chart::key("paused", "the guest was paused")) }
            @if !self.account.lost.is_empty() { (chart::key("outage", "there was no connection")) }
            @for flag in flags {
                span.key {
                    span class=(format!("number {}", flag.class)) { (flag.name) }
                    (flag.what) " at " (self.page.clock(flag.at))
                }
            }
            @if more > 0 { span.key { "and " (more) " more, in the tables below" } }
        }
    }
}

/// The rates on the wire as they are drawn.
#[cfg(test)]
pub(super) fn rates_of(page: &Page<'_>) -> Vec<(Duration, f64)> {
    Course::of(page).map(|course| course.wire_rates()).unwrap_or_default()
}

/// The flags' labels, above the flags. If the rows have no room for all labels, some flags have a line only.
fn flags(course: &Course<'_>) -> Markup {
    let mut ends = [f64::NEG_INFINITY; FLAG_ROWS];
    let mut placed = Vec::new();
    for flag in course.flags() {
        let share = course.time.share(flag.at);
        let Some(row) = ends.iter().position(|end| share - end >= APART) else { continue };
        ends[row] = share;
        placed.push((flag.name, share.clamp(0.03, 0.97), row, flag.class));
    }
    let rows = placed.iter().map(|flag| flag.2 + 1).max().unwrap_or(0);
    if rows == 0 {
        return html! {};
    }
    html! {
        svg.flags width="100%" height=(rows * 22) aria-hidden="true" {
            @for (name, share, row, class) in placed {
                @let y = row * 22 + 11;
                circle class=(class) cx=(percent(share)) cy=(y) r="9" {}
                text.flag.narrow[name.len() > 2] x=(percent(share)) y=(y + 4) text-anchor="middle" { (name) }
            }
        }
    }
}

/// The rounds as ranges of time, numbered where there is room.
fn rounds(course: &Course<'_>) -> Markup {
    let mut last = f64::NEG_INFINITY;
    let mut spans = Vec::new();
    for mark in course.account.series.marks() {
        let Happened::Round { round, took } = mark.what else { continue };
        let (from, to) = (course.time.share(mark.at.saturating_sub(took)), course.time.share(mark.at));
        let middle = f64::midpoint(from, to).clamp(0.015, 0.985);
        let is_named = middle - last >= APART * 0.8;
        if is_named {
            last = middle;
        }
        spans.push((round, from, to, is_named.then_some(middle)));
    }
    let longest = course.account.rounds.iter().max_by_key(|round| round.duration);
    let summary = longest.map_or(String::new(), |round| {
        format!(
            "{}; the longest was round {} with {}",
            human::counted(spans.len() as u64, "round"),
            round.tally.round,
            human::time(round.duration)
        )
    });
    html! {
        p.caption { b { "Rounds" } }
        svg.rounds role="img" aria-label=(summary) width="100%" height="22" {
            title { (summary) }
            @for (round, from, to, _) in &spans {
                rect class=(if round % 2 == 1 { "odd" } else { "even" }) x=(percent(*from)) width=(percent((to - from).max(0.001))) y="0" height="22" {}
            }
            @for (round, _, _, middle) in &spans {
                @if let Some(middle) = middle { text.tick x=(percent(*middle)) y="15" text-anchor="middle" { (round) } }
            }
        }
    }
}
