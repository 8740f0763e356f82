//! One panel for each quantity, over a common time axis.

use std::time::Duration;

use maud::{Markup, html};

use super::{BESIDE, Course};
use crate::html::chart::{self, Backdrop, Panel, Point, Scale, as_f64};
use crate::html::{downtime, duration};
use memferry::control::Change;
use memferry::controller::Decision;
use memferry::controller::forecast::whole;
use memferry::events::Outcome;
use memferry::human;

/// Two figures closer than this do not give a rate.
const LEAST_SPAN: Duration = Duration::from_millis(30);

impl Course<'_> {
    fn point(&self, scale: Scale, at: Duration, value: f64) -> Point {
        (self.time.share(at), scale.height(value))
    }

    /// The remaining bytes, from samples and syncs.
    pub(super) fn remaining(&self, backdrop: &Backdrop) -> Markup {
        let found: Vec<_> = self.page.found().map(|(at, bytes)| (at, as_f64(bytes))).collect();
        let mut knots = vec![(self.time.from, as_f64(self.account.status.total_bytes()))];
        knots.extend(self.page.remaining().into_iter().map(|(at, bytes)| (at, as_f64(bytes))));
        let left =
            if self.page.report.status == Outcome::Completed { 0.0 } else { knots.last().map_or(0.0, |knot| knot.1) };
        knots.push((self.time.to, left));
        let (scale, ticks) = chart::bytes_scale(greatest(knots.iter().map(|knot| knot.1)), bytes);
        let points: Vec<_> = knots.iter().map(|(at, value)| self.point(scale, *at, *value)).collect();
        let line = chart::line(&points);
        let dots = dots("found", found.iter().map(|(at, value)| self.point(scale, *at, *value)));
        let least = found.iter().map(|knot| knot.1).fold(f64::INFINITY, f64::min);
        let found_least = if least.is_finite() {
            format!("; the least that a sync found is {}", bytes(least))
        } else {
            String::new()
        };
        let panel = Panel {
            summary: format!("Bytes remaining over time, from {} to {}{found_least}.", bytes(knots[0].1), bytes(left)),
            height: 150,
            scale,
            ticks,
            paths: vec![("remaining-area", chart::area(&line, &points)), ("remaining", line)],
            dots,
        };
        html! {
            p.caption {
                b { "Remaining" } " dirty, or sent and not acknowledged "
                @if !found.is_empty() { (chart::dot_key("found", "found by a sync")) }
            }
            (panel.svg(backdrop))
        }
    }

    /// The wire rate and the guest's dirty rate.
    pub(super) fn rates(&self, backdrop: &Backdrop) -> Markup {
        let wire = self.wire_rates();
        let mut dirty: Vec<_> = self.running().filter_map(|sample| Some((sample.at, sample.dirty_rate?))).collect();
        let most_dirty = greatest(dirty.iter().map(|knot| knot.1));
        dirty.extend(dirty.last().map(|(_, rate)| (self.paused_last().unwrap_or(self.time.to), *rate)));
        let most_wire = greatest(wire.iter().map(|knot| knot.1));
        let mut caps = self.caps();
        caps.retain(|cap| cap.2 <= 3.0 * most_wire.max(most_dirty));
        let most_cap = greatest(caps.iter().map(|cap| cap.2));
        let (scale, ticks) = chart::bytes_scale(most_wire.max(most_dirty).max(most_cap), human::rate);
        let points = |knots: &[(Duration, f64)]| {
            knots.iter().map(|(at, rate)| self.point(scale, *at, *rate)).collect::<Vec<_>>()
        };
        let (wire_points, dirty_points) = (points(&wire), points(&dirty));
        let line = chart::steps(&wire_points);
        let mut paths = vec![
            ("wire-area", chart::area(&line, &wire_points)),
            ("wire", line),
            ("dirty", chart::steps(&dirty_points)),
        ];
        let share = |at: &Duration| self.time.share(*at);
        let levels: Vec<_> = caps.iter().map(|(from, to, cap)| (share(from), share(to), scale.height(*cap))).collect();
        paths.push(("cap", chart::levels(&levels)));
        let panel = Panel {
            summary: format!(
                "Rates over time: at most {} on the wire{}.",
                human::rate(most_wire),
                if dirty.is_empty() {
                    String::new()
                } else {
                    format!(", at most {} dirtied by the guest", human::rate(most_dirty))
                },
            ),
            height: 130,
            scale,
            ticks,
            paths,
            dots: Vec::new(),
        };
        html! {
            p.caption {
                b { "Rates " }
                (chart::line_key("wire", "on the wire"))
                @if !dirty.is_empty() { (chart::line_key("dirty", "dirtied by the guest")) }
                @if !caps.is_empty() { (chart::line_key("cap", &cap_key(&caps))) }
            }
            (panel.svg(backdrop))
        }
    }

    /// The values of `max_bandwidth` over time, in bytes per second; empty while there is no limit.
    fn caps(&self) -> Vec<(Duration, Duration, f64)> {
        if self.page.is_destination() {
            return Vec::new();
        }
        let changed = self.page.changes().filter_map(|(at, changed)| match changed.to {
            Change::MaxBandwidth(cap) => Some((at, cap)),
            _ => None,
        });
        let mut knots = vec![(self.time.from, self.page.settings.max_bandwidth)];
        knots.extend(changed);
        knots.push((self.time.to, None));
        let held = |pair: &[(Duration, Option<u64>)]| Some((pair[0].0, pair[1].0, as_f64(pair[0].1?)));
        knots
            .windows(2)
            .filter_map(held)
            .filter(|(from, to, _)| self.time.share(*from) < self.time.share(*to))
            .collect()
    }

    /// Bytes per second between consecutive figures, drawn from each point to the next; 0 while there was no connection.
    pub(super) fn wire_rates(&self) -> Vec<(Duration, f64)> {
        let end = self.account.status.ended.as_ref().map(|ended| (self.time.to, ended.wire_bytes));
        let mut knots = vec![(self.time.from, 0)];
        for (at, bytes) in self.samples.iter().map(|sample| (sample.at, sample.wire_bytes)) {
            if knots.last().is_some_and(|(last, _)| at.saturating_sub(*last) >= LEAST_SPAN) {
                knots.push((at, bytes));
            }
        }
        if let Some((at, bytes)) = end {
            if knots.len() > 1 && knots.last().is_some_and(|(last, _)| at.saturating_sub(*last) < LEAST_SPAN) {
                knots.pop();
            }
            knots.push((at, bytes));
        }
        let outages = self.outages();
        let mut rates: Vec<_> = knots.windows(2).flat_map(|pair| rates(pair[0], pair[1], &outages)).collect();
        if let (Some((_, rate)), Some((at, _))) = (rates.last().copied(), knots.last()) {
            rates.push((*at, rate));
        }
        rates
    }

    /// The expected downtime against its limit.
    pub(super) fn downtime(&self, backdrop: &Backdrop) -> Markup {
        let expected: Vec<_> =
            self.running().filter_map(|sample| Some((sample.at, sample.expected_downtime?))).collect();
        let decided: Vec<_> =
            self.page.decisions().filter_map(|(at, decided)| Some((at, decided.forecast?.expected()))).collect();
        if self.page.is_destination() || expected.is_empty() && decided.is_empty() {
            return html! {};
        }
        let mut limits = downtime::limits(self.page);
        limits.extend(limits.last().map(|limit| (self.time.to, limit.1)));
        let was = self.page.report.end.downtime_ms.map(duration).zip(self.paused_last());
        let all = expected.iter().chain(&decided).chain(&limits).map(|knot| knot.1);
        let (scale, ticks) = chart::decades(all.chain(was.map(|was| was.0)));
        let points = |knots: &[(Duration, Duration)]| {
            knots.iter().map(|(at, time)| self.point(scale, *at, time.as_secs_f64())).collect::<Vec<_>>()
        };
        let mut dots = dots("decided", points(&decided));
        dots.extend(was.map(|(time, at)| ("was", self.point(scale, at, time.as_secs_f64()))));
        let now = limits.last().map_or(Duration::ZERO, |limit| limit.1);
        let panel = Panel {
            summary: format!(
                "Expected downtime over time on a scale of decades; the limit at the end is {}.",
                human::time(now)
            ),
            height: 130,
            scale,
            ticks,
            paths: vec![("expected", chart::line(&points(&expected))), ("limit", chart::steps(&points(&limits)))],
            dots,
        };
        html! {
            p.caption {
                b { "Expected downtime" } " (each line is ten times the one below) "
                (chart::dot_key("decided", "after a sync, to decide by"))
                (chart::line_key("expected", "on the way, of what is known to be dirty"))
                (chart::line_key("limit", &format!("limit, {} at the end", human::time(now))))
                @if let Some((was, _)) = was { (chart::dot_key("was", &format!("what it was: {}", human::time(was)))) }
            }
            (panel.svg(backdrop))
        }
    }

    /// The throttle of the guest over time; empty if it was never throttled.
    pub(super) fn throttle(&self, backdrop: &Backdrop) -> Markup {
        let mut levels: Vec<_> = self.samples.iter().map(|sample| (sample.at, f64::from(sample.throttle))).collect();
        levels.extend(self.page.decisions().filter_map(|(at, decided)| match decided.decision {
            Decision::Throttle(percent) => Some((at, f64::from(percent))),
            _ => None,
        }));
        levels.sort_by_key(|level| level.0);
        let most = greatest(levels.iter().map(|level| level.1));
        if most == 0.0 {
            return html! {};
        }
        levels.insert(0, (self.time.from, 0.0));
        levels.extend(levels.last().map(|level| (self.time.to, level.1)));
        let scale = Scale::Linear(105.0);
        let points: Vec<_> = levels.iter().map(|(at, level)| self.point(scale, *at, *level)).collect();
        let line = chart::steps(&points);
        let panel = Panel {
            summary: format!("How far the guest was throttled over time: at most {most:.0} percent of its time."),
            height: 80,
            scale,
            ticks: vec![(50.0, "50 %".into()), (100.0, "100 %".into())],
            paths: vec![("throttle-area", chart::area(&line, &points)), ("throttle-line", line)],
            dots: Vec::new(),
        };
        html! {
            p.caption { b { "Throttle" } " percent of its time for which the guest was throttled" }
            (panel.svg(backdrop))
        }
    }
}

/// The rate from one figure to the next, of the time in which there was a connection, and 0 from the beginning of an outage to
/// its end.
fn rates(from: (Duration, u64), to: (Duration, u64), outages: &[(Duration, Duration)]) -> Vec<(Duration, f64)> {
    let within = |(begin, end): &(Duration, Duration)| ((*begin).max(from.0), (*end).min(to.0));
    let outages: Vec<_> = outages.iter().map(within).filter(|(begin, end)| begin < end).collect();
    let without: Duration = outages.iter().map(|(begin, end)| *end - *begin).sum();
    let seconds = to.0.saturating_sub(from.0).saturating_sub(without).as_secs_f64().max(1e-6);
    let rate = as_f64(to.1.saturating_sub(from.1)) / seconds;
    let mut rates = vec![(from.0, rate)];
    rates.extend(outages.iter().flat_map(|(begin, end)| [(*begin, 0.0), (*end, rate)]));
    rates
}

/// At most as many dots as are distinguishable.
fn dots(class: &'static str, points: impl IntoIterator<Item = Point>) -> Vec<(&'static str, Point)> {
    chart::apart(BESIDE, points, |point| point.0).into_iter().map(|point| (class, point)).collect()
}

fn cap_key(caps: &[(Duration, Duration, f64)]) -> String {
    let mut rates: Vec<_> = caps.iter().map(|cap| human::rate(cap.2)).collect();
    rates.dedup();
    match &rates[..] {
        [only] => format!("max_bandwidth, {only}"),
        [first, .., last] => format!("max_bandwidth, first {first}, last {last}"),
        [] => String::new(),
    }
}

fn greatest(values: impl Iterator<Item = f64>) -> f64 {
    values.filter(|value| value.is_finite()).fold(0.0, f64::max)
}

fn bytes(bytes: f64) -> String {
    human::bytes(whole(bytes))
}
