//! Building blocks of charts: scales, ticks, paths, and panels over one time axis.
//!
//! A panel is an SVG of fixed height and any width. Its curves lie in an inner SVG, which is stretched to that width.
//! Its text, dots and horizontal lines lie outside the inner SVG and are placed in percent, so that they are not
//! distorted.

use std::fmt::Write;
use std::time::Duration;

use maud::{Markup, html};

use memferry::human;

/// The width of the stretched part, in its own units; its height is 100.
const WIDE: f64 = 1000.0;
/// Pixels above a panel's plot, for the text of its topmost line.
const ABOVE: u32 = 14;

/// Steps of a time axis of minutes and hours, in seconds.
const MINUTES: [f64; 10] = [30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0, 14_400.0];

/// A range of time, as wide as a chart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Time {
    /// Its left edge.
    pub(super) from: Duration,
    /// Its right edge.
    pub(super) to: Duration,
}

impl Time {
    /// The position of a moment, from 0 to 1.
    pub(super) fn share(&self, at: Duration) -> f64 {
        let width = self.to.saturating_sub(self.from).as_secs_f64();
        if width > 0.0 { (at.saturating_sub(self.from).as_secs_f64() / width).min(1.0) } else { 0.0 }
    }

    fn ticks(&self) -> Vec<(f64, String)> {
        let width = self.to.saturating_sub(self.from).as_secs_f64();
        let round = round_step(width, 5.0);
        // From minutes on, tens and hundreds of seconds are not round figures.
        let step = MINUTES.into_iter().find(|step| round > 20.0 && step * 5.0 >= width).unwrap_or(round);
        let label = |seconds: f64| match seconds {
            0.0 => "0".to_owned(),
            s if step < 1.0 && width < 2.0 => format!("{:.0} ms", s * 1e3),
            s if step < 1.0 => format!("{s:.1} s"),
            s if s < 120.0 => format!("{s:.0} s"),
            s => human::time(Duration::from_secs_f64(s)),
        };
        let ticks = (0..).map(|n| f64::from(n) * step).take_while(|seconds| *seconds <= width && step > 0.0);
        ticks.map(|seconds| (seconds / width, label(seconds))).collect()
    }
}

/// A vertical scale.
#[derive(Clone, Copy, Debug)]
pub(super) enum Scale {
    /// Linear, from 0 to this value.
    Linear(f64),
    /// Logarithmic, by decades, from one value to the other; smaller values are drawn at the bottom.
    Decades(f64, f64),
}

impl Scale {
    /// The height of a value, from 0 at the bottom to 1.
    pub(super) fn height(self, value: f64) -> f64 {
        let share = match self {
            Self::Linear(top) => value / top,
            Self::Decades(low, high) => (value.max(low) / low).log10() / (high / low).log10(),
        };
        if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 }
    }
}

/// A scale of bytes, or bytes per second, from 0 to `most`, with lines at halves and quarters of a power of two.
pub(super) fn bytes_scale(most: f64, label: impl Fn(f64) -> String) -> (Scale, Vec<(f64, String)>) {
    let top = most.max(1.0) * 1.05;
    let step = (top / 2.0).log2().floor().exp2().max(1.0);
    let ticks = (1..=4).map(|n| f64::from(n) * step).take_while(|value| *value <= top);
    (Scale::Linear(top), ticks.map(|value| (value, label(value))).collect())
}

/// A logarithmic scale of times that includes all of them.
pub(super) fn decades(times: impl Iterator<Item = Duration>) -> (Scale, Vec<(f64, String)>) {
    let seconds = times.map(|time| time.as_secs_f64().max(1e-3));
    let (least, most) = seconds.fold((f64::MAX, 1e-3_f64), |(least, most), s| (least.min(s), most.max(s)));
    let low = least.min(most).log10().floor();
    let high = most.log10().ceil().max(low + 1.0);
    let label = |power: f64| {
        if power < 0.0 { format!("{:.0} ms", 1e3 * 10_f64.powf(power)) } else { format!("{:.0} s", 10_f64.powf(power)) }
    };
    let ticks = (0..10).map(|n| low + f64::from(n)).take_while(|power| *power <= high);
    let ticks = ticks.map(|power| (10_f64.powf(power), label(power))).collect();
    (Scale::Decades(10_f64.powf(low), 10_f64.powf(high)), ticks)
}

/// The step (1, 2 or 5 times a power of ten) that divides `width` into at most `parts` parts, or one more.
fn round_step(width: f64, parts: f64) -> f64 {
    let least = width / parts;
    if least <= 0.0 {
        return 0.0;
    }
    let power = 10_f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .map(|digit| digit * power)
        .into_iter()
        .find(|step| *step >= least * 0.999)
        .unwrap_or(power * 10.0)
}

/// A point of a curve: horizontal and vertical position, each from 0 to 1.
pub(super) type Point = (f64, f64);

/// A line from point to point, as a path.
pub(super) fn line(points: &[Point]) -> String {
    path(points, |text, (x, y)| write!(text, "L{x:.1} {y:.1}"))
}

/// A line that keeps each point's height until the next one.
pub(super) fn steps(points: &[Point]) -> String {
    path(points, |text, (x, y)| write!(text, "H{x:.1}V{y:.1}"))
}

fn path(points: &[Point], mut to: impl FnMut(&mut String, Point) -> std::fmt::Result) -> String {
    let mut points = points.iter().map(|(x, y)| (x * WIDE, (1.0 - y) * 100.0));
    let Some((x, y)) = points.next() else { return String::new() };
    let mut text = format!("M{x:.1} {y:.1}");
    points.for_each(|point| to(&mut text, point).expect("a string takes it"));
    text
}

/// Levels that are constant over ranges, with gaps where there is none.
pub(super) fn levels(levels: &[(f64, f64, f64)]) -> String {
    let mut text = String::new();
    let mut end = None;
    for &(from, to, height) in levels {
        let y = (1.0 - height) * 100.0;
        let begin = if end == Some(from) { format!("V{y:.1}") } else { format!("M{:.1} {y:.1}", from * WIDE) };
        text.push_str(&begin);
        text.push_str(&format!("H{:.1}", to * WIDE));
        end = Some(to);
    }
    text
}

/// The marks that are at least this far apart, and the last one.
pub(super) fn apart<T>(least: f64, all: impl IntoIterator<Item = T>, share: impl Fn(&T) -> f64) -> Vec<T> {
    let mut chosen: Vec<T> = Vec::new();
    let mut passed = None;
    for item in all {
        if chosen.last().is_some_and(|chosen| share(&item) - share(chosen) < least) {
            passed = Some(item);
        } else {
            passed = None;
            chosen.push(item);
        }
    }
    if let Some(last) = passed {
        chosen.truncate(chosen.len().max(2) - 1);
        chosen.push(last);
    }
    chosen
}

/// The area under a path through these points, from left to right.
pub(super) fn area(path: &str, points: &[Point]) -> String {
    match points {
        [(first, _), .., (last, _)] => format!("{path}L{:.1} 100L{:.1} 100Z", last * WIDE, first * WIDE),
        _ => String::new(),
    }
}

/// A horizontal position, as an attribute.
pub(super) fn percent(share: f64) -> String {
    format!("{:.2}%", share * 100.0)
}

/// The background that all panels of one chart share.
#[derive(Debug)]
pub(super) struct Backdrop {
    /// The axis.
    pub(super) time: Time,
    /// The ends of rounds.
    pub(super) rounds: Vec<Duration>,
    /// The decisions, with the class of each.
    pub(super) flags: Vec<(Duration, &'static str)>,
    /// The ranges in which there was no connection.
    pub(super) outages: Vec<(Duration, Duration)>,
    /// The ranges in which the guest was paused.
    pub(super) paused: Vec<(Duration, Duration)>,
}

impl Backdrop {
    fn svg(&self, height: u32) -> Markup {
        html! {
            @for range in &self.outages { (self.band("outage", range, height)) }
            @for range in &self.paused { (self.band("paused", range, height)) }
            @for at in &self.rounds { (upright("round", self.time.share(*at), height)) }
            @for (at, class) in &self.flags { (upright(class, self.time.share(*at), height)) }
        }
    }

    fn band(&self, class: &str, (from, to): &(Duration, Duration), height: u32) -> Markup {
        let (left, right) = (self.time.share(*from), self.time.share(*to));
        let width = percent((right - left).max(0.005));
        html! { rect class=(class) x=(percent(left.min(0.995))) width=(width) y="0" height=(height) {} }
    }
}

fn upright(class: &str, share: f64, height: u32) -> Markup {
    let x = percent(share);
    html! { line class=(class) x1=(x) x2=(x) y1="0" y2=(height) {} }
}

/// One quantity over time.
#[derive(Debug)]
pub(super) struct Panel {
    /// A description of the chart in words.
    pub(super) summary: String,
    /// The height in pixels.
    pub(super) height: u32,
    /// The scale of its axis.
    pub(super) scale: Scale,
    /// The tick values of its axis, with their labels.
    pub(super) ticks: Vec<(f64, String)>,
    /// Paths with their classes, in the order of drawing.
    pub(super) paths: Vec<(&'static str, String)>,
    /// Dots with their classes.
    pub(super) dots: Vec<(&'static str, Point)>,
}

impl Panel {
    /// The panel as markup.
    pub(super) fn svg(&self, backdrop: &Backdrop) -> Markup {
        let plot = self.height - ABOVE;
        let down = |share: f64| f64::from(ABOVE) + (1.0 - share) * f64::from(plot);
        html! {
            svg.panel role="img" aria-label=(self.summary) width="100%" height=(self.height) {
                title { (self.summary) }
                (backdrop.svg(self.height))
                @for (value, _) in &self.ticks {
                    @let y = format!("{:.1}", down(self.scale.height(*value)));
                    line.grid x1="0" x2="100%" y1=(y) y2=(y) {}
                }
                svg x="0" y=(ABOVE) width="100%" height=(plot) viewBox="0 0 1000 100" preserveAspectRatio="none" overflow="visible" {
                    @for (class, path) in &self.paths { path class=(class) d=(path) {} }
                }
                @for (class, (x, y)) in &self.dots {
                    circle class=(class) cx=(percent(*x)) cy=(format!("{:.1}", down(*y))) r="3.5" {}
                }
                line.base x1="0" x2="100%" y1=(self.height) y2=(self.height) {}
                @for (value, label) in &self.ticks {
                    text.tick x="0" y=(format!("{:.1}", down(self.scale.height(*value)) - 3.0)) { (label) }
                }
            }
        }
    }
}

/// The axis of time under the panels.
pub(super) fn time_axis(time: Time) -> Markup {
    html! {
        svg.axis width="100%" height="18" aria-hidden="true" {
            @for (share, label) in time.ticks() {
                @let anchor = if share < 0.03 { "start" } else if share > 0.95 { "end" } else { "middle" };
                text.tick x=(percent(share)) y="13" text-anchor=(anchor) { (label) }
            }
        }
    }
}

/// Parts of a whole, side by side from left to right, each with its class and its description.
pub(super) fn bar(summary: &str, parts: &[(&'static str, f64, String)], height: u32, limit: Option<f64>) -> Markup {
    let lefts = parts.iter().scan(0.0, |left, part| {
        let here = *left;
        *left += part.1;
        Some(here)
    });
    html! {
        svg.bar role="img" aria-label=(summary) width="100%" height=(height) {
            title { (summary) }
            rect.empty x="0" y="0" width="100%" height=(height) {}
            @for ((class, share, what), left) in parts.iter().zip(lefts).filter(|(part, _)| part.1 > 0.0) {
                rect class=(class) x=(percent(left)) y="0" width=(percent(*share)) height=(height) { title { (what) } }
            }
            @if let Some(limit) = limit { (upright("limit", limit, height)) }
        }
    }
}

/// Formats a count or an amount as a chart shows it.
#[expect(clippy::cast_precision_loss, reason = "it is drawn")]
pub(super) fn as_f64(number: u64) -> f64 {
    number as f64
}

/// A legend entry for a colour.
pub(super) fn key(class: &str, name: &str) -> Markup {
    html! {
        span.key { svg.swatch aria-hidden="true" width="14" height="10" { rect class=(class) width="14" height="10" {} } (name) }
    }
}

/// A legend entry for a line.
pub(super) fn line_key(class: &str, name: &str) -> Markup {
    html! {
        span.key {
            svg.swatch aria-hidden="true" width="18" height="10" { path class=(class) d="M0 5H18" {} }
            (name)
        }
    }
}

/// A legend entry for a horizontal line.
pub(super) fn upright_key(class: &str, name: &str) -> Markup {
    html! {
        span.key { svg.swatch aria-hidden="true" width="8" height="12" { (upright(class, 0.5, 12)) } (name) }
    }
}

/// A legend entry for a dot.
pub(super) fn dot_key(class: &str, name: &str) -> Markup {
    html! {
        span.key {
            svg.swatch aria-hidden="true" width="10" height="10" { circle class=(class) cx="5" cy="5" r="3.5" {} }
            (name)
        }
    }
}

/// Fill classes that the style sheet defines.
pub(super) fn patterns() -> Markup {
    html! {
        svg.patterns aria-hidden="true" width="0" height="0" {
            defs {
                pattern id="stripes" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)" {
                    rect.stripe-ground width="6" height="6" {}
                    rect.stripe width="2.5" height="6" {}
                }
                pattern id="dots" width="5" height="5" patternUnits="userSpaceOnUse" {
                    rect.stripe-ground width="5" height="5" {}
                    circle.dot-mark cx="2.5" cy="2.5" r="1" {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memferry::controller::forecast::whole;

    fn axis(ms: u64) -> Vec<String> {
        let time = Time { from: Duration::from_millis(40), to: Duration::from_millis(40 + ms) };
        time.ticks().into_iter().map(|(_, label)| label).collect()
    }

    #[test]
    fn ticks_of_time_are_round_and_few() {
        assert_eq!(axis(83), ["0", "20 ms", "40 ms", "60 ms", "80 ms"]);
        assert_eq!(axis(3250), ["0", "1 s", "2 s", "3 s"]);
        assert_eq!(axis(2100), ["0", "0.5 s", "1.0 s", "1.5 s", "2.0 s"]);
        assert_eq!(axis(600_000), ["0", "2m 00s", "4m 00s", "6m 00s", "8m 00s", "10m 00s"]);
        assert_eq!(axis(30_000_000), ["0", "120m 00s", "240m 00s", "360m 00s", "480m 00s"]);
        assert!(axis(0).is_empty());
    }

    #[test]
    fn bytes_have_lines_at_powers_of_two() {
        let labels = |most: f64| {
            bytes_scale(most, |value| human::bytes(whole(value)))
                .1
                .into_iter()
                .map(|(_, label)| label)
                .collect::<Vec<_>>()
        };
        assert_eq!(labels(1_073_741_824.0), ["512 MiB", "1.00 GiB"]);
        assert_eq!(labels(400e6), ["128 MiB", "256 MiB", "384 MiB"]);
        assert_eq!(labels(0.0), ["1 B"]);
    }

    #[test]
    fn decades_hold_what_they_are_made_of() {
        let (scale, ticks) = decades([30, 300, 4200].map(Duration::from_millis).into_iter());
        assert_eq!(
            ticks.iter().map(|(_, label)| label.as_str()).collect::<Vec<_>>(),
            ["10 ms", "100 ms", "1 s", "10 s"]
        );
        let heights = [0.0, 0.01, 0.1, 10.0, 1e9, f64::NAN].map(|value| (scale.height(value) * 100.0).round());
        assert_eq!(heights, [0.0, 0.0, 33.0, 100.0, 100.0, 0.0]);
        assert_eq!(decades(std::iter::empty()).1.len(), 2);
    }

    #[test]
    fn curves_are_paths_over_the_whole_width() {
        let points = [(0.0, 0.0), (0.5, 1.0), (1.0, 0.25)];
        assert_eq!(line(&points), "M0.0 100.0L500.0 0.0L1000.0 75.0");
        assert_eq!(steps(&points), "M0.0 100.0H500.0V0.0H1000.0V75.0");
        assert_eq!(area("M0 0", &points), "M0 0L1000.0 100L0.0 100Z");
        assert_eq!((line(&[]), area("", &points[..1])), (String::new(), String::new()));
        let held = [(0.0, 0.25, 0.5), (0.25, 0.5, 1.0), (0.75, 1.0, 0.5)];
        assert_eq!(levels(&held), "M0.0 50.0H250.0V0.0H500.0M750.0 50.0H1000.0");
    }

    #[test]
    fn what_lies_too_close_is_left_out_but_not_the_last() {
        let chosen = |all: &[f64]| apart(0.1, all.iter().copied(), |share| *share);
        assert_eq!(chosen(&[0.0, 0.05, 0.1, 0.25, 0.3]), [0.0, 0.1, 0.3]);
        assert_eq!(chosen(&[0.0, 0.01]), [0.0, 0.01]);
        assert_eq!(chosen(&[0.5]), [0.5]);
        assert_eq!(apart(0.012, (0..=300).map(|n| f64::from(n) / 300.0), |share| *share).len(), 76);
    }
}
