//! The course of a migration: remaining, rates, forecast and throttle over one axis of time, with what happened marked.

mod panels;

use std::time::Duration;

use maud::{Markup, html};

use super::chart::{self, Backdrop, Time, percent};
use super::{Page, decisions};
use crate::controller::Decision;
use crate::events::Phase;
use crate::report::account::Account;
use crate::report::human;
use crate::report::series::{Happened, Sample};

/// How far two flags, or two numbers of rounds, must be from each other to stand in one row, as a share of the width.
const APART: f64 = 0.065;
const FLAG_ROWS: usize = 3;

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
                (course.rates(&backdrop, page.settings.max_bandwidth))
                (course.downtime(&backdrop))
                (course.throttle(&backdrop))
                (chart::time_axis(course.time))
                figcaption { (course.legend()) }
            }
        }
    }
}

/// What the pictures are drawn of.
struct Course<'a> {
    page: &'a Page<'a>,
    account: &'a Account,
    samples: Vec<Sample>,
    time: Time,
}

impl<'a> Course<'a> {
    /// Nothing, if no page ever moved.
    fn of(page: &'a Page<'a>) -> Option<Self> {
        let (account, series) = (page.account, &page.account.series);
        let samples = series.samples();
        series.first(Happened::Phase(Phase::Active))?;
        let last = series.marks().last().map(|mark| mark.at).max(samples.last().map(|sample| sample.at))?;
        let time = Time { from: page.zero(), to: last };
        (time.to > time.from).then_some(Self { page, account, samples, time })
    }

    fn backdrop(&self) -> Backdrop {
        let mut rounds = Vec::new();
        let mut flags = Vec::new();
        for mark in self.account.series.marks() {
            match mark.what {
                Happened::Round { .. } => rounds.push(mark.at),
                Happened::Decided(index) => flags.extend(self.flag(index).map(|class| (mark.at, class))),
                _ => {}
            }
        }
        Backdrop { time: self.time, rounds, flags, paused: self.paused() }
    }

    fn paused(&self) -> Option<(Duration, Duration)> {
        let series = &self.account.series;
        let paused = series.first(Happened::Paused)?;
        Some((paused, series.first(Happened::Resumed).unwrap_or(self.time.to)))
    }

    /// What was sampled while the guest was not paused.
    fn running(&self) -> impl Iterator<Item = &Sample> {
        let paused = self.paused();
        let is_paused = move |at| paused.is_some_and(|(from, to)| at >= from && at <= to);
        self.samples.iter().filter(move |sample| !is_paused(sample.at))
    }

    /// How a decision is marked; another round is none worth a flag.
    fn flag(&self, index: usize) -> Option<&'static str> {
        let decision = self.account.decided.get(index)?.decision;
        (decision != Decision::AnotherRound).then(|| decisions::class(decision))
    }

    fn legend(&self) -> Markup {
        let flagged =
            self.page.decisions().enumerate().filter(|(_, (_, decided))| decided.decision != Decision::AnotherRound);
        html! {
            @if !self.account.rounds.is_empty() { (chart::upright_key("round", "a round was sent")) }
            @if self.paused().is_some() { (chart::key("paused", "the guest stood still")) }
            @for (index, (at, decided)) in flagged {
                span.key {
                    span class=(format!("number {}", decisions::class(decided.decision))) { (index + 1) }
                    (decisions::name(decided.decision)) " at " (self.page.clock(at))
                }
            }
        }
    }
}

/// The numbers of decisions, above where they fell.
fn flags(course: &Course<'_>) -> Markup {
    let mut ends = [f64::NEG_INFINITY; FLAG_ROWS];
    let mut placed = Vec::new();
    for (index, (at, decided)) in course.page.decisions().enumerate() {
        if decided.decision == Decision::AnotherRound {
            continue;
        }
        let share = course.time.share(at);
        let row = ends.iter().position(|end| share - end >= APART).unwrap_or(FLAG_ROWS - 1);
        ends[row] = share;
        placed.push((index + 1, share.clamp(0.03, 0.97), row, decisions::class(decided.decision)));
    }
    let rows = placed.iter().map(|flag| flag.2 + 1).max().unwrap_or(0);
    if rows == 0 {
        return html! {};
    }
    html! {
        svg.flags width="100%" height=(rows * 22) aria-hidden="true" {
            @for (number, share, row, class) in placed {
                @let y = row * 22 + 11;
                circle class=(class) cx=(percent(share)) cy=(y) r="9" {}
                text.flag x=(percent(share)) y=(y + 4) text-anchor="middle" { (number) }
            }
        }
    }
}

/// The rounds as stretches of time, numbered where there is room.
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
            @for (round, from, to, middle) in spans {
                rect class=(if round % 2 == 1 { "odd" } else { "even" }) x=(percent(from)) width=(percent((to - from).max(0.001))) y="0" height="22" {}
                @if let Some(middle) = middle { text.tick x=(percent(middle)) y="15" text-anchor="middle" { (round) } }
            }
        }
    }
}
