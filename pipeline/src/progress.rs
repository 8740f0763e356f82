//! Shows a migration while it runs: a bar on a terminal, a line a second elsewhere.
//!
//! Both are observers of one end ([`Role`]) and show the same figures ([`figures`]). They write to standard error, so
//! that standard output holds the verdict alone. Both write as they are called: where a writer or a terminal may block, they belong
//! on a thread of their own, or in front of a writer that does not.

use std::fmt;
use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::events::{Event, Observer, Phase, Progress, Role};
use crate::outlet::Direct;
use crate::report::human;

/// How often a line is written where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(1);

/// What remains and how fast it goes, in one line of at most 90 columns.
#[must_use]
pub fn figures(progress: &Progress) -> String {
    let mut text = format!("{} left, {}", human::bytes(progress.remaining_bytes), human::rate(progress.wire_rate));
    if let Some(rate) = progress.dirty_rate {
        text.push_str(&format!(", dirtied {}", human::rate(rate)));
    }
    if let Some(downtime) = progress.expected_downtime {
        text.push_str(&format!(", expected downtime {}", human::time(downtime)));
    }
    text
}

/// What is worth a line of its own besides the figures.
fn milestone(event: &Event) -> Option<String> {
    match event {
        Event::Connected { peer } => Some(format!("connected to {peer}")),
        Event::Guest { blocks, pages, .. } => {
            let bytes = blocks.iter().map(|block| block.bytes).sum();
            let plural = if blocks.len() == 1 { "" } else { "s" };
            let (bytes, pages) = (human::bytes(bytes), human::count(*pages));
            Some(format!("{bytes} in {pages} pages, {} RAM block{plural}", blocks.len()))
        }
        Event::RoundSent { tally, duration } => Some(format!(
            "round {} done in {}: {} pages, {} became {}",
            tally.round,
            human::time(*duration),
            human::count(tally.pages),
            human::bytes(tally.bytes_in),
            human::bytes(tally.bytes_out),
        )),
        Event::Changed(changed) => Some(changed.to_string()),
        Event::Paused => Some("the guest is paused at the source".into()),
        Event::Resumed => Some("the guest goes on at the source".into()),
        Event::Phase(Phase::Switchover) => Some("switching over".into()),
        _ => None,
    }
}

/// A line for each milestone and at most one a second in between (short rounds among them), for logs and pipes.
pub struct ProgressLines<W> {
    role: Role,
    out: Mutex<(W, Option<Instant>)>,
}

impl<W> fmt::Debug for ProgressLines<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "progress lines of the {:?}", self.role)
    }
}

impl<W: Write + Send> ProgressLines<W> {
    /// Lines about the end `role`, written to `out`.
    pub fn new(role: Role, out: W) -> Self {
        Self { role, out: Mutex::new((out, None)) }
    }

    fn show(&self, event: &Event, at: Instant) {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        let due = out.1.is_none_or(|last| at.duration_since(last) >= LINE_EVERY);
        let line = match event {
            Event::Progress(progress) => Some(format!("round {}: {}", progress.round, figures(progress))),
            other => milestone(other),
        };
        let frequent = match event {
            Event::Progress(_) => true,
            Event::RoundSent { tally, duration } => *duration < LINE_EVERY && !tally.last,
            _ => false,
        };
        if frequent && !due {
            return;
        }
        if frequent {
            out.1 = Some(at);
        }
        if let Some(line) = line {
            // Nobody may be reading; the migration goes on.
            drop(writeln!(out.0, "{line}"));
        }
    }
}

impl<W: Write + Send> Observer for ProgressLines<W> {
    fn event(&self, role: Role, event: &Event) {
        if role == self.role {
            self.show(event, Instant::now());
        }
    }
}

/// The part of the terminal that the bar lives in; other lines go above it. Clones share it.
#[derive(Clone, Debug)]
pub struct Screen(MultiProgress);

impl Default for Screen {
    fn default() -> Self {
        Self(MultiProgress::with_draw_target(ProgressDrawTarget::stderr()))
    }
}

impl Screen {
    /// Writes to standard error above the bar, if there is one.
    pub fn write(&self, bytes: &[u8]) -> std::io::Result<()> {
        self.0.suspend(|| Direct(std::io::stderr()).write_all(bytes))
    }
}

/// A bar for the round with the figures beside it.
pub struct ProgressDisplay {
    role: Role,
    bar: ProgressBar,
    round: Mutex<u32>,
}

impl fmt::Debug for ProgressDisplay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "progress display of the {:?}", self.role)
    }
}

impl ProgressDisplay {
    /// A bar about the end `role` on `screen`.
    ///
    /// # Panics
    /// Never: the template is a constant.
    #[must_use]
    pub fn new(role: Role, screen: &Screen) -> Self {
        let style = ProgressStyle::with_template("{prefix:>10} {bar:16} {wide_msg}").expect("a right template");
        let bar = screen.0.add(ProgressBar::no_length()).with_style(style.progress_chars("█▌ "));
        Self { role, bar, round: Mutex::new(0) }
    }

    /// The bar of a round is as long as what it began with.
    fn progress(&self, progress: &Progress) {
        let mut round = self.round.lock().unwrap_or_else(PoisonError::into_inner);
        if *round != progress.round {
            *round = progress.round;
            self.bar.set_length(progress.remaining_bytes.max(1));
            self.bar.set_prefix(format!("round {}", progress.round));
        }
        let length = self.bar.length().unwrap_or(0);
        self.bar.set_position(length.saturating_sub(progress.remaining_bytes));
        self.bar.set_message(figures(progress));
    }

    fn show(&self, event: &Event) {
        match event {
            Event::Progress(progress) => self.progress(progress),
            Event::Ended(_) => self.bar.finish_and_clear(),
            Event::Phase(Phase::Setup) => self.bar.set_prefix("setup"),
            Event::Phase(Phase::Switchover) => self.bar.set_prefix("switchover"),
            _ => {}
        }
    }
}

impl Observer for ProgressDisplay {
    fn event(&self, role: Role, event: &Event) {
        if role == self.role {
            self.show(event);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::script;

    fn progress(round: u32) -> Event {
        Event::Progress(Progress {
            round,
            remaining_bytes: 123 << 20,
            total_bytes: 1 << 30,
            wire_bytes: 0,
            wire_rate: 103_000_000.0,
            page_rate: 200_000_000.0,
            dirty_rate: (round > 1).then_some(35_700_000.0),
            expected_downtime: (round > 1).then_some(Duration::from_millis(1240)),
            ..Progress::default()
        })
    }

    #[test]
    fn lines_come_once_a_second_and_milestones_at_once() {
        let lines = ProgressLines::new(Role::Source, Vec::new());
        let start = Instant::now();
        for (ms, event) in
            [(0, progress(1)), (400, progress(1)), (900, Event::Paused), (1000, progress(2)), (1999, progress(2))]
        {
            lines.show(&event, start + Duration::from_millis(ms));
        }
        let text = String::from_utf8(lines.out.into_inner().unwrap().0).unwrap();
        insta::assert_snapshot!(text, @r"
        round 1: 123 MiB left, 98.2 MiB/s
        the guest is paused at the source
        round 2: 123 MiB left, 98.2 MiB/s, dirtied 34.0 MiB/s, expected downtime 1.24 s
        ");
    }

    #[test]
    fn a_migration_leaves_lines_of_its_own_end_only() {
        let lines = ProgressLines::new(Role::Source, Vec::new());
        script(Role::Source).iter().for_each(|event| lines.event(Role::Source, event));
        script(Role::Destination).iter().for_each(|event| lines.event(Role::Destination, event));
        let text = String::from_utf8(lines.out.into_inner().unwrap().0).unwrap();
        insta::assert_snapshot!(text, @r"
        connected to 127.0.0.1:41234
        1.00 GiB in 262,144 pages, 1 RAM block
        round 1 done in 2.10 s: 262,144 pages, 1.00 GiB became 512 MiB
        switching over
        the guest is paused at the source
        round 2 done in 90.0 ms: 1,000 pages, 3.91 MiB became 66.4 KiB
        ");
    }

    #[test]
    fn a_bar_takes_every_event_of_a_migration() {
        let screen = Screen(MultiProgress::with_draw_target(ProgressDrawTarget::hidden()));
        let display = ProgressDisplay::new(Role::Source, &screen);
        display.event(Role::Source, &progress(1));
        assert_eq!((display.bar.length(), display.bar.position()), (Some(123 << 20), 0));
        assert_eq!(display.bar.prefix(), "round 1");
        script(Role::Source).iter().for_each(|event| display.event(Role::Source, event));
        assert!(display.bar.is_finished());
    }
}
