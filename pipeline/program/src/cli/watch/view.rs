//! The screen: a pure function of the [`Model`]. The most important parts come first and are dropped last when space
//! is short.
//!
//! ```text
//!  state, round, time          always
//!  the share that is done, with its bar
//!  three lines over time       wire rate, dirty rate, what remains
//!  downtime, throttle, memory
//!  what holds it up
//!  stages                      one for each lane where they fit, else all lanes as one
//!  rounds                      the latest, pages by encoding
//!  decisions and warnings      the latest, in words
//! ```

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, Sparkline};

use super::model::{End, Model, Remark, RemarkKind, Sample, Shares, greatest, without_lanes};
use super::words;
use crate::progress::{Whereabouts, time_left};
use memferry::events::Phase;
use memferry::human;
use memferry_report::event_json::{ProgressJson, RoundJson};

/// The bar of a stage has its name before it and a percentage after it.
const STAGE_NAME: usize = 16;
const STAGE_PERCENT: usize = 6;
/// Below this width a row has one stage, from it on two.
const TWO_STAGES: u16 = 76;
/// Below this width the total is omitted.
const NARROW: usize = 60;
/// The width of a label before a figure.
const LABEL: usize = 11;
const FIGURE: usize = 14;

/// The style: with colours, or without.
#[derive(Clone, Copy, Debug)]
pub(super) struct Theme {
    pub(super) colours: bool,
}

impl Theme {
    fn of(self, colour: Color) -> Style {
        if self.colours { Style::new().fg(colour) } else { Style::new() }
    }

    fn head() -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }

    fn faint(self) -> Style {
        if self.colours { Style::new().fg(Color::DarkGray) } else { Style::new().add_modifier(Modifier::DIM) }
    }
}

/// Draws the screen in the available space.
pub(super) fn draw(frame: &mut Frame<'_>, model: &Model, theme: Theme) {
    let area = frame.area();
    let mut page = Page { frame, theme, width: usize::from(area.width), left: area };
    let (_, end) = model.shown();
    page.state(model);
    page.done(end);
    page.over_time(end);
    page.limits(end);
    page.bottleneck(end);
    page.stages(&model.stages());
    page.rounds_and_remarks(model, end);
}

/// A screen that is filled from the top.
struct Page<'a, 'b> {
    frame: &'a mut Frame<'b>,
    theme: Theme,
    width: usize,
    left: Rect,
}

impl Page<'_, '_> {
    /// The next row; `None` if there is no more space.
    fn row(&mut self) -> Option<Rect> {
        let row = Rect { height: 1, ..self.left };
        if self.left.height == 0 || self.left.width == 0 {
            return None;
        }
        self.left.y += 1;
        self.left.height -= 1;
        Some(row)
    }

    fn line(&mut self, line: Line<'_>) {
        if let Some(row) = self.row() {
            self.frame.render_widget(Paragraph::new(line), row);
        }
    }

    fn heading(&mut self, text: &str, rest: Vec<Span<'static>>) {
        let mut spans = vec![Span::styled(format!("{text:<LABEL$}"), Theme::head())];
        spans.extend(rest);
        self.line(Line::from(spans));
    }

    fn rows_left(&self) -> usize {
        usize::from(self.left.height)
    }

    /// State and phase, and what they mean for the guest; the time is at the right.
    fn state(&mut self, model: &Model) {
        let (role, end) = model.shown();
        let (name, meaning) = words::phase(end.phase);
        let mut spans = vec![
            Span::styled(format!("{:<LABEL$}", role.name()), Theme::head()),
            Span::styled(name.to_uppercase(), self.theme.of(phase_colour(end.phase)).add_modifier(Modifier::BOLD)),
        ];
        let said = match (&end.ended, &end.now) {
            (Some(ended), _) => format!("  {}", words::verdict(ended)),
            (None, _) if end.lost.is_some() => lost(end, model.ms),
            (None, Some(now)) if end.phase != Some(Phase::Postcopy) => format!("  round {}, {meaning}", now.round),
            (None, _) => format!("  {meaning}"),
        };
        let clock = words::clock(model.ms);
        let used: usize = LABEL + name.len() + 2 + clock.len();
        let said: String = said.chars().take(self.width.saturating_sub(used)).collect();
        let gap = self.width.saturating_sub(LABEL + name.len() + said.chars().count() + clock.len());
        spans.extend([Span::raw(said), Span::raw(" ".repeat(gap)), Span::raw(clock)]);
        self.line(Line::from(spans));
    }

    /// The completed share of the guest, what remains, and the time left.
    fn done(&mut self, end: &End) {
        let Some(now) = &end.now else { return };
        let (Some(done), Some(left)) = (now.done_percent, now.remaining_bytes.map(human::bytes)) else {
            return self.line(Line::raw(format!("{:<LABEL$}not known", "done")));
        };
        let mut words = format!("{left} left");
        if self.width >= NARROW {
            words = format!("{left} of {} left", human::bytes(now.total_bytes));
            words.extend(time_left(now).map(|time| format!(", {time}")));
        }
        let done = done.clamp(0.0, 100.0);
        let bar = filled(done / 100.0, self.width.saturating_sub(LABEL + words.len() + 8));
        let percent = format!(" {:>3.0} %  ", done.floor());
        self.line(Line::from(vec![
            Span::raw(format!("{:<LABEL$}", "done")),
            Span::styled(bar, self.theme.of(Color::Cyan)),
            Span::raw(percent),
            Span::raw(words),
        ]));
    }

    /// Three small charts, from the migration's beginning to this moment.
    fn over_time(&mut self, end: &End) {
        let Some(now) = &end.now else { return };
        let rate = |rate: u64| format!("{}/s", human::bytes(rate));
        let dirtied = now.dirty_bytes_per_s.map_or("not known".into(), rate);
        self.picture("wire", rate(now.wire_bytes_per_s), end, |sample| sample.wire_rate, Color::Green);
        self.picture("dirtied", dirtied, end, |sample| sample.dirty_rate, Color::Magenta);
        let left = now.remaining_bytes.map_or("not known".into(), human::bytes);
        self.picture("left", left, end, |sample| sample.remaining, Color::Cyan);
    }

    fn picture(&mut self, name: &str, figure: String, end: &End, of: fn(&Sample) -> u64, colour: Color) {
        let Some(row) = self.row() else { return };
        let text = format!("{name:<LABEL$}{figure:<FIGURE$}");
        self.frame.render_widget(Paragraph::new(text), row);
        let taken = u16::try_from(LABEL + FIGURE).unwrap_or(u16::MAX).min(row.width);
        let rest = Rect { x: row.x + taken, width: row.width - taken, ..row };
        let columns = greatest(end.history.samples(), usize::from(rest.width), of);
        self.frame.render_widget(Sparkline::default().data(columns).style(self.theme.of(colour)), rest);
    }

    /// The forecast against the limit, the throttle of the guest, and the memory.
    fn limits(&mut self, end: &End) {
        let Some(now) = &end.now else { return };
        let mut spans = vec![Span::raw(format!("{:<LABEL$}", "downtime"))];
        spans.extend(self.downtime(end, now));
        if now.throttle_percent > 0 {
            let style = self.theme.of(Color::Yellow);
            spans.push(Span::styled(format!("   throttled {} %", now.throttle_percent), style));
        }
        let memory = end.guest.as_ref().map(|guest| format!("memory ≤ {}", human::bytes(guest.memory_bound_bytes)));
        let peer = end.peer.as_ref().map(|peer| format!("peer {peer}"));
        for more in [memory, peer].into_iter().flatten() {
            let used: usize = spans.iter().map(Span::width).sum();
            if used + 3 + more.chars().count() <= self.width {
                spans.push(Span::raw(format!("   {more}")));
            }
        }
        self.line(Line::from(spans));
    }

    /// The shares of the time, the greatest first, as many as fit.
    fn bottleneck(&mut self, end: &End) {
        let Some(now) = &end.now else { return };
        let shares = now.bottleneck_percent.to_string();
        if !shares.is_empty() {
            let width = self.width.saturating_sub(LABEL);
            let fits = human::wrap(&shares, width).into_iter().next().unwrap_or_default();
            let fits = fits.trim_end_matches(',').to_owned();
            self.line(Line::from(format!("{:<LABEL$}{fits}", "held up")));
        }
    }

    fn downtime(&self, end: &End, now: &ProgressJson) -> Vec<Span<'static>> {
        if let Some(downtime) = end.ended.as_ref().and_then(|ended| ended.end.downtime_ms) {
            return vec![Span::raw(format!("{} in all", words::time(downtime)))];
        }
        let limit = now.downtime_limit_ms.map(words::time).map_or(String::new(), |limit| format!(", limit {limit}"));
        if end.guest_at == Whereabouts::Destination {
            return vec![Span::raw("over: what is left follows while the guest runs")];
        }
        let Some(expected) = now.expected_downtime_ms else {
            return vec![Span::raw(format!("not known yet{limit}"))];
        };
        let fits = now.downtime_limit_ms.is_none_or(|limit| expected <= limit);
        let style = self.theme.of(if fits { Color::Green } else { Color::Red });
        let verdict = if now.downtime_limit_ms.is_none() {
            ""
        } else if fits {
            ": fits"
        } else {
            ": too long"
        };
        vec![Span::styled(format!("{} expected", words::time(expected)), style), Span::raw(format!("{limit}{verdict}"))]
    }

    /// A bar for each stage: how it spent the last second.
    fn stages(&mut self, stages: &[Shares]) {
        if stages.is_empty() || self.rows_left() < 2 {
            return;
        }
        let columns = if self.left.width >= TWO_STAGES { 2 } else { 1 };
        let rest = self.rows_left() - 1;
        // At least half of the remaining space is for rounds and decisions, unless that is too little for anything.
        let room = if rest >= 8 { rest / 2 } else { rest };
        let joined;
        let shown = if stages.len().div_ceil(columns) <= room {
            stages
        } else {
            joined = without_lanes(stages);
            &joined
        };
        let legend =
            [("█", Color::Green, "busy"), ("░", Color::Blue, "no input"), ("▒", Color::Yellow, "no room behind")];
        let legend = legend.iter().flat_map(|&(sign, colour, what)| {
            [Span::styled(sign, self.theme.of(colour)), Span::raw(format!(" {what}   "))]
        });
        let legend: Vec<_> = legend.collect();
        self.heading("stages", legend);
        let cell = self.width / columns;
        for row in shown.chunks(columns).take(room) {
            let spans = row.iter().flat_map(|stage| self.stage(stage, cell));
            let line = Line::from(spans.collect::<Vec<_>>());
            self.line(line);
        }
    }

    fn stage(&self, stage: &Shares, cell: usize) -> Vec<Span<'static>> {
        let name = stage.lane.map_or_else(|| stage.name.to_string(), |lane| format!("{} {lane}", stage.name));
        let name: String = name.chars().take(STAGE_NAME - 1).collect();
        let width = cell.saturating_sub(STAGE_NAME + STAGE_PERCENT + 2);
        let [busy, input, output] = split([stage.busy, stage.input_wait, stage.output_wait], width);
        vec![
            Span::raw(format!("{name:<STAGE_NAME$}")),
            Span::styled("█".repeat(busy), self.theme.of(Color::Green)),
            Span::styled("░".repeat(input), self.theme.of(Color::Blue)),
            Span::styled("▒".repeat(output), self.theme.of(Color::Yellow)),
            Span::raw(" ".repeat(width - busy - input - output)),
            Span::raw(format!(" {:>3.0} %  ", stage.busy * 100.0)),
        ]
    }

    /// The latest remark has priority over the table; beyond that they share the space.
    fn rounds_and_remarks(&mut self, model: &Model, end: &End) {
        let room = self.rows_left();
        let table = (end.rounds.len() + 1).min(room / 2);
        let remarks = self.remarks(model, end, room.saturating_sub(1 + if room < 4 { 0 } else { table }));
        let heading = usize::from(!remarks.is_empty());
        self.rounds(end, room - remarks.len() - heading);
        if !remarks.is_empty() {
            self.heading("decisions", Vec::new());
            remarks.into_iter().for_each(|line| self.line(line));
        }
    }

    fn rounds(&mut self, end: &End, rows: usize) {
        if end.rounds.is_empty() || rows < 2 {
            return;
        }
        let head = format!(
            "{:<5}{:>6}{:>8}{:>8}{:>8}{:>8}{:>8}{:>8}{:>9}{:>9}",
            "round", "time", "pages", "zero", "raw", "compr.", "xbzrle", "same", "in", "out"
        );
        self.line(Line::styled(head, Theme::head()));
        let first = end.rounds.len().saturating_sub(rows - 1);
        end.rounds.iter().skip(first).for_each(|round| self.round(round));
    }

    fn round(&mut self, round: &RoundJson) {
        let became = &round.pages;
        let pages = [became.all, became.zero, became.raw, became.compressed, became.xbzrle, became.unchanged];
        let pages: String = pages.map(|pages| format!("{:>8}", human::count(pages))).concat();
        let (into, out) = (human::bytes(became.bytes_in), human::bytes(became.bytes_out));
        self.line(Line::raw(format!(
            "{:<3}{:>8}{pages}{into:>9}{out:>9}",
            round.round,
            words::time(round.duration_ms)
        )));
    }

    /// The latest remarks that fit completely, and notes about the stream itself.
    fn remarks(&self, model: &Model, end: &End, rows: usize) -> Vec<Line<'static>> {
        let mut lines = Vec::new();
        if model.lost > 0 {
            let text = format!("{:LABEL$}{} events were lost on the way here", "", model.lost);
            lines.push(Line::styled(text, self.theme.of(Color::Yellow)));
        }
        for remark in end.remarks.iter().rev() {
            let own = self.remark(remark);
            if !lines.is_empty() && lines.len() + own.len() > rows {
                break;
            }
            lines.splice(0..0, own);
        }
        lines.truncate(rows);
        lines
    }

    /// One remark, wrapped to the width.
    fn remark(&self, remark: &Remark) -> Vec<Line<'static>> {
        let (sign, style) = match remark.kind {
            RemarkKind::Warning => ("warning: ", self.theme.of(Color::Yellow)),
            RemarkKind::Decision => ("", Theme::head()),
            RemarkKind::AnotherRound => ("", Style::new()),
        };
        let text = words::printable(&format!("{sign}{}", remark.text));
        let line = |(index, piece)| {
            let at = if index == 0 { words::clock(remark.ms) } else { String::new() };
            let at = Span::styled(format!("{at:>9}  "), self.theme.faint());
            Line::from(vec![at, Span::styled(piece, style)])
        };
        human::wrap(&text, self.width.saturating_sub(LABEL)).into_iter().enumerate().map(line).collect()
    }
}

/// How long there has been no connection, and where the guest is.
fn lost(end: &End, ms: f64) -> String {
    let Some((since, why)) = &end.lost else { return String::new() };
    let guest = match end.guest_at {
        Whereabouts::Source => "the guest runs at the source",
        Whereabouts::HandedOver => "the guest is paused",
        Whereabouts::Destination => "the guest runs at the destination and needs both ends",
    };
    format!("  for {}, {guest}: {why}", words::clock(ms - since))
}

fn phase_colour(phase: Option<Phase>) -> Color {
    match phase {
        None | Some(Phase::Setup) => Color::Blue,
        Some(Phase::Active) => Color::Cyan,
        Some(Phase::Switchover | Phase::Postcopy | Phase::Disconnected | Phase::Cancelled) => Color::Yellow,
        Some(Phase::Completed) => Color::Green,
        Some(Phase::Failed | Phase::Unconfirmed | Phase::Lost) => Color::Red,
    }
}

/// A bar of `width` columns that is filled to a share.
fn filled(share: f64, width: usize) -> String {
    let [full, ..] = split([share, 0.0, 0.0], width);
    format!("{}{}", "█".repeat(full), "░".repeat(width - full))
}

/// Splits `width` columns by shares. The sum never exceeds `width`, and a non-zero share is rounded, not truncated.
fn split(shares: [f64; 3], width: usize) -> [usize; 3] {
    let mut before = 0;
    let mut sum = 0.0;
    shares.map(|share| {
        sum += share;
        let upto = columns(sum, width);
        let own = upto - before;
        before = upto;
        own
    })
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "columns")]
fn columns(share: f64, width: usize) -> usize {
    (share.clamp(0.0, 1.0) * width as f64).round() as usize
}
