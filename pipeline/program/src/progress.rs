//! Shows a migration while it runs: a bar on a terminal, one line per second elsewhere.
//!
//! Both are observers of one end ([`Role`]) and show the same figures ([`figures`]). They write to standard error, so
//! that standard output contains only the verdict. Both write synchronously: where a writer or a terminal may block,
//! they belong on a thread of their own, or need a writer that does not block.

use std::fmt;
use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use memferry_stages::tally::RoundTally;

use memferry::controller::Decision;
use memferry::events::{Event, Observer, Phase, Progress, Role, TimeLeft};
use memferry::human;
use memferry::outlet::Direct;
use memferry_report::event_json::ProgressJson;

/// How often a line is written without a terminal.
const LINE_EVERY: Duration = Duration::from_secs(1);
/// The share from which a line names the bottleneck.
const HELD_UP: f64 = 0.5;

/// What remains and at what rate, in one line, the most important first. The screen of `watch` uses the same words.
#[must_use]
pub fn figures(now: &ProgressJson) -> String {
    let mut text = format!("{}/s", human::bytes(now.wire_bytes_per_s));
    if let (Some(done), Some(left)) = (now.done_percent, now.remaining_bytes) {
        text = format!("{}, {} left, {text}", human::done(done), human::bytes(left));
    }
    text.extend(time_left(now).map(|time| format!(", {time}")));
    if let Some(rate) = now.dirty_bytes_per_s.filter(|rate| *rate > 0) {
        text.push_str(&format!(", dirtied {}/s", human::bytes(rate)));
    }
    if let Some(expected) = now.expected_downtime_ms {
        let expected = Duration::try_from_secs_f64(expected / 1e3).unwrap_or_default();
        text.push_str(&format!(", expected downtime {}", human::time(expected)));
    }
    if now.throttle_percent > 0 {
        text.push_str(&format!(", throttled {} %", now.throttle_percent));
    }
    text
}

/// Time until nothing remains, if it is known.
pub(crate) fn time_left(now: &ProgressJson) -> Option<TimeLeft> {
    #[expect(clippy::cast_precision_loss, reason = "for the eye")]
    let per_second = |bytes: u64| bytes as f64;
    let dirtied = now.dirty_bytes_per_s.map(per_second);
    let remaining = now.remaining_bytes.filter(|bytes| *bytes > 0)?;
    let time = TimeLeft::at_rates(remaining, per_second(now.page_bytes_per_s), dirtied);
    (time != TimeLeft::Unknown).then_some(time)
}

/// Where the guest is, as far as a source knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Whereabouts {
    /// It runs at the source.
    #[default]
    Source,
    /// Go may have left: only the destination knows where it is to run.
    HandedOver,
    /// It runs at the destination, and pages of it are still at the source.
    Destination,
}

impl Whereabouts {
    /// Where it is after an event: of Go, of postcopy, or of a connection that was made again.
    pub(crate) fn after(self, event: Moves) -> Self {
        match (self, event) {
            (Self::Destination, _) | (_, Moves::Postcopy) => Self::Destination,
            (_, Moves::HandedOver) => Self::HandedOver,
            // An earlier Go was not acted on.
            (_, Moves::Reconnected) => Self::Source,
        }
    }
}

/// What moves a guest, or shows that it has not moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moves {
    HandedOver,
    Postcopy,
    Reconnected,
}

/// The loss of a connection, and what each end does about it.
pub(crate) fn disconnected(role: Role, why: &dyn fmt::Display, guest: Whereabouts) -> String {
    let meanwhile = match (role, guest) {
        (Role::Source, Whereabouts::Source) => "the guest runs here; trying to connect again",
        (Role::Source, Whereabouts::HandedOver) => {
            "the guest is paused until the destination answers; trying to connect again"
        }
        (Role::Source, Whereabouts::Destination) => {
            "the guest runs at the destination and needs what is left here; trying to connect again until a cancel gives the guest up"
        }
        (Role::Destination, Whereabouts::Destination) => {
            "the guest runs here and waits for pages that are missing; waiting for the source to return until a cancel gives the guest up"
        }
        (Role::Destination, _) => "waiting for the source to return",
    };
    format!("disconnected: {why}; {meanwhile}")
}

/// A try to connect again that failed, this long after the connection was lost.
pub(crate) fn not_reached(
    lost_for: Option<Duration>,
    why: &dyn fmt::Display,
    again_in: Duration,
    guest: Whereabouts,
) -> String {
    let lost_for = lost_for.map(|time| format!(" for {}", human::time(time))).unwrap_or_default();
    let guest = match guest {
        Whereabouts::Source => "the guest runs here",
        Whereabouts::HandedOver => "the guest is paused",
        Whereabouts::Destination => "the guest needs what is left here",
    };
    format!("disconnected{lost_for}: {why}; {guest}; trying again in {}", human::time(again_in))
}

/// A connection that was made again.
pub(crate) fn reconnected(role: Role, attempt: u32, outage: Duration, put_back_bytes: u64) -> String {
    let again = match (role, put_back_bytes) {
        (Role::Source, 0) => ", nothing is sent again".into(),
        (Role::Source, bytes) => format!(", {} are sent again", human::bytes(bytes)),
        (Role::Destination, _) => String::new(),
    };
    format!("connected again after {} (attempt {attempt}){again}", human::time(outage))
}

/// As in JSON, except for the completed share: 99.97 % must not be shown as 100 %.
fn unrounded(progress: &Progress) -> ProgressJson {
    ProgressJson { done_percent: progress.done().map(|done| done * 100.0), ..progress.into() }
}

/// The figures of a line, with the main bottleneck.
fn line_of_figures(progress: &Progress, guest: Whereabouts) -> String {
    let text = format!("{}: {}", stretch(progress.round, guest), figures(&unrounded(progress)));
    match progress.bottleneck.greatest() {
        Some((cause, share)) if share >= HELD_UP => {
            format!("{text}, held up by: {cause} {:.0} %", share * 100.0)
        }
        _ => text,
    }
}

/// The name of what is in progress.
fn stretch(round: u32, guest: Whereabouts) -> String {
    if guest == Whereabouts::Destination { "postcopy".into() } else { format!("round {round}") }
}

/// Events with a line of their own.
fn milestone(role: Role, event: &Event) -> Option<String> {
    match event {
        Event::Connected { peer } => Some(format!("connected to {peer}")),
        Event::Guest { blocks, pages, .. } => {
            let bytes = blocks.iter().map(|block| block.bytes).sum();
            let plural = if blocks.len() == 1 { "" } else { "s" };
            let (bytes, pages) = (human::bytes(bytes), human::count(*pages));
            Some(format!("{bytes} in {pages} pages, {} RAM block{plural}", blocks.len()))
        }
        Event::Decided(decided) => match decided.decision {
            Decision::Throttle(_) | Decision::RaiseLimit(_) | Decision::SwitchOver | Decision::Postcopy => {
                Some(format!("round {}: {decided}", decided.round))
            }
            // The verdict reports that it gave up.
            Decision::AnotherRound | Decision::Sample(_) | Decision::Drain | Decision::GiveUp => None,
        },
        Event::Changed(changed) => Some(changed.to_string()),
        Event::Paused => Some("the guest is paused at the source".into()),
        Event::Resumed => Some("the guest continues at the source".into()),
        // The source reports why it switches over.
        Event::Phase(Phase::Switchover) if role == Role::Destination => Some("switching over".into()),
        Event::Phase(Phase::Postcopy) => Some(match role {
            Role::Source => "the guest runs at the destination, and what is left follows".into(),
            Role::Destination => "the guest runs here, and what is missing follows".into(),
        }),
        _ => None,
    }
}

/// Rounds that are sent and have no line yet.
#[derive(Debug)]
struct Rounds {
    first: u32,
    last: u32,
    took: Duration,
    pages: u64,
    bytes_in: u64,
    bytes_out: u64,
}

impl Rounds {
    /// These rounds, if there are any, and one more.
    fn and(this: Option<Self>, tally: &RoundTally, took: Duration) -> Self {
        let before = this.unwrap_or(Self {
            first: tally.round,
            last: tally.round,
            took: Duration::ZERO,
            pages: 0,
            bytes_in: 0,
            bytes_out: 0,
        });
        Self {
            first: before.first,
            last: tally.round,
            took: before.took + took,
            pages: before.pages + tally.pages.all,
            bytes_in: before.bytes_in + tally.pages.bytes_in,
            bytes_out: before.bytes_out + tally.pages.bytes_out,
        }
    }
}

impl fmt::Display for Rounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, last, took, pages, bytes_in, bytes_out } = *self;
        if first == last {
            write!(f, "round {last}")?;
        } else {
            write!(f, "rounds {first} to {last}")?;
        }
        let (took, pages) = (human::time(took), human::count(pages));
        write!(f, " done in {took}: {pages} pages, {} became {}", human::bytes(bytes_in), human::bytes(bytes_out))
    }
}

/// What is shown, and what is yet to be shown.
#[derive(Debug, Default)]
struct Shown {
    /// The time of the latest of the lines that are written once a second.
    last: Option<Instant>,
    /// Short rounds share a line.
    rounds: Option<Rounds>,
    lost: Lost,
}

/// What the words about a lost connection depend on.
#[derive(Debug, Default)]
struct Lost {
    since: Option<Instant>,
    guest: Whereabouts,
}

impl Lost {
    /// The line for an event about a lost connection.
    fn line(&mut self, role: Role, event: &Event, at: Instant) -> Option<String> {
        match event {
            Event::HandedOver => self.guest = self.guest.after(Moves::HandedOver),
            Event::Phase(Phase::Postcopy) => self.guest = self.guest.after(Moves::Postcopy),
            Event::Disconnected { why, .. } => {
                self.since = Some(at);
                return Some(disconnected(role, why, self.guest));
            }
            Event::NotReached { why, again_in, .. } => {
                let lost_for = self.since.map(|since| at.duration_since(since));
                return Some(not_reached(lost_for, why, *again_in, self.guest));
            }
            Event::Reconnected { attempt, outage, put_back_bytes } => {
                *self = Self { since: None, guest: self.guest.after(Moves::Reconnected) };
                return Some(reconnected(role, *attempt, *outage, *put_back_bytes));
            }
            _ => {}
        }
        None
    }
}

impl Shown {
    /// The lines for an event at this time.
    fn lines(&mut self, role: Role, event: &Event, at: Instant) -> Vec<String> {
        let due = self.last.is_none_or(|last| at.duration_since(last) >= LINE_EVERY);
        let line = match event {
            Event::Progress(progress) => {
                if !due {
                    return Vec::new();
                }
                self.last = Some(at);
                Some(line_of_figures(progress, self.lost.guest))
            }
            Event::RoundSent { tally, duration } => {
                self.rounds = Some(Rounds::and(self.rounds.take(), tally, *duration));
                let long = *duration >= LINE_EVERY || tally.kind.is_final();
                if !due && !long {
                    return Vec::new();
                }
                self.last = if long { self.last } else { Some(at) };
                None
            }
            Event::Ended(_) => None,
            other => {
                let lost = self.lost.line(role, other, at);
                match milestone(role, other).or(lost) {
                    None => return Vec::new(),
                    line => line,
                }
            }
        };
        let rounds = self.rounds.take().map(|rounds| rounds.to_string());
        rounds.into_iter().chain(line).collect()
    }
}

/// A line for each milestone and at most one per second in between, for logs and pipes. Short rounds share a line:
/// none is skipped.
pub struct ProgressLines<W> {
    role: Role,
    out: Mutex<(W, Shown)>,
}

impl<W> fmt::Debug for ProgressLines<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "progress lines of the {:?}", self.role)
    }
}

impl<W: Write + Send> ProgressLines<W> {
    /// Lines about the end `role`, written to `out`.
    pub fn new(role: Role, out: W) -> Self {
        Self { role, out: Mutex::new((out, Shown::default())) }
    }

    fn show(&self, event: &Event, at: Instant) {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        for line in out.1.lines(self.role, event, at) {
            // There may be no reader; the migration continues.
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

/// The region of the terminal that contains the bar; other lines go above it. Clones share it.
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
    lost: Mutex<Lost>,
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
        let style = ProgressStyle::with_template("{prefix:>12} {bar:16} {wide_msg}").expect("a right template");
        let bar = screen.0.add(ProgressBar::no_length()).with_style(style.progress_chars("█▌ "));
        Self { role, bar, round: Mutex::new(0), lost: Mutex::new(Lost::default()) }
    }

    /// The length of a round's bar is what the round began with.
    fn progress(&self, progress: &Progress, guest: Whereabouts) {
        let mut round = self.round.lock().unwrap_or_else(PoisonError::into_inner);
        if *round != progress.round {
            *round = progress.round;
            self.bar.set_length(progress.remaining_bytes.unwrap_or(0).max(1));
            self.bar.set_prefix(stretch(progress.round, guest));
        }
        let length = self.bar.length().unwrap_or(0);
        self.bar.set_position(length.saturating_sub(progress.remaining_bytes.unwrap_or(length)));
        self.bar.set_message(figures(&unrounded(progress)));
    }

    fn show(&self, event: &Event) {
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(line) = lost.line(self.role, event, Instant::now()) {
            self.bar.set_message(line);
        }
        match event {
            // The line about the lost connection stays.
            Event::Progress(_) if lost.since.is_some() => {}
            Event::Progress(progress) => self.progress(progress, lost.guest),
            Event::Phase(Phase::Postcopy) => {
                *self.round.lock().unwrap_or_else(PoisonError::into_inner) = 0;
                self.bar.set_prefix("postcopy");
            }
            Event::Reconnected { .. } => *self.round.lock().unwrap_or_else(PoisonError::into_inner) = 0,
            Event::Phase(Phase::Disconnected) => self.bar.set_prefix("disconnected"),
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
    use memferry_stages::tally::PageTally;

    use super::*;
    use memferry::bottleneck::{Bottleneck, Cause};
    use memferry::controller::Decided;
    use memferry::controller::reason::{Reason, Stalled};
    use memferry::samples::script;

    fn progress(round: u32) -> Event {
        Event::Progress(Progress {
            round,
            remaining_bytes: Some(123 << 20),
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
        insta::assert_snapshot!(written(lines), @r"
        round 1: 87 % done, 123 MiB left, 98.2 MiB/s, 645 ms to go
        the guest is paused at the source
        round 2: 87 % done, 123 MiB left, 98.2 MiB/s, 785 ms to go, dirtied 34.0 MiB/s, expected downtime 1.24 s
        ");
    }

    fn written(lines: ProgressLines<Vec<u8>>) -> String {
        String::from_utf8(lines.out.into_inner().unwrap().0).unwrap()
    }

    #[test]
    fn short_rounds_share_a_line_and_none_is_left_out() {
        let lines = ProgressLines::new(Role::Source, Vec::new());
        let start = Instant::now();
        let sent = |round| {
            let tally = RoundTally {
                round,
                pages: PageTally { all: 10, bytes_in: 40_960, bytes_out: 4096, ..PageTally::default() },
                ..RoundTally::default()
            };
            Event::RoundSent { tally, duration: Duration::from_millis(200) }
        };
        let throttle = Event::Decided(Decided {
            round: 7,
            decision: Decision::Throttle(50),
            reason: Reason::Stall(Stalled::NoNewLeast { rounds: 2 }),
            limit: Duration::from_millis(300),
            forecast: None,
        });
        for (ms, event) in [
            (0, sent(1)),
            (200, sent(2)),
            (400, sent(3)),
            (1000, progress(4)),
            (1200, sent(4)),
            (1400, throttle),
            (1600, sent(5)),
            (1700, Event::Ended(Box::new(memferry::samples::ended(Role::Source)))),
        ] {
            lines.show(&event, start + Duration::from_millis(ms));
        }
        insta::assert_snapshot!(written(lines), @r"
        round 1 done in 200 ms: 10 pages, 40.0 KiB became 4.00 KiB
        rounds 2 to 3 done in 400 ms: 20 pages, 80.0 KiB became 8.00 KiB
        round 4: 87 % done, 123 MiB left, 98.2 MiB/s, 785 ms to go, dirtied 34.0 MiB/s, expected downtime 1.24 s
        round 4 done in 200 ms: 10 pages, 40.0 KiB became 4.00 KiB
        round 7: throttle the guest to 50 %: 2 rounds brought no new least of what remains; no forecast can be made yet
        round 5 done in 200 ms: 10 pages, 40.0 KiB became 4.00 KiB
        ");
    }

    #[test]
    fn a_line_says_what_holds_it_up_and_how_long_it_takes() {
        let Event::Progress(now) = progress(2) else { unreachable!() };
        let held_up =
            |share| Progress { bottleneck: Bottleneck::made_up(&[(Cause::Destination, share)]), ..now.clone() };
        assert!(line_of_figures(&held_up(0.97), Whereabouts::Source).ends_with(", held up by: destination 97 %"));
        assert!(!line_of_figures(&held_up(0.4), Whereabouts::Source).contains("held up"));
        let text = |page_rate, dirty_rate| {
            let now = Progress { page_rate, dirty_rate, throttle: 50, expected_downtime: None, ..now.clone() };
            figures(&unrounded(&now))
        };
        insta::assert_snapshot!([text(0.0, None), text(1e8, Some(0.0)), text(1e8, Some(1e8))].join("\n"), @r"
        87 % done, 123 MiB left, 98.2 MiB/s, throttled 50 %
        87 % done, 123 MiB left, 98.2 MiB/s, 1.29 s to go, throttled 50 %
        87 % done, 123 MiB left, 98.2 MiB/s, does not converge, dirtied 95.4 MiB/s, throttled 50 %
        ");
        let unknown = Progress { remaining_bytes: None, page_rate: 1e8, ..Progress::default() };
        assert_eq!(figures(&(&Progress { wire_rate: 1e8, ..unknown }).into()), "95.4 MiB/s");
    }

    #[test]
    fn a_lost_connection_says_why_where_the_guest_is_and_when_it_tries_again() {
        let told = |role, events: Vec<(u64, Event)>| {
            let (lines, start) = (ProgressLines::new(role, Vec::new()), Instant::now());
            events.iter().for_each(|(ms, event)| lines.show(event, start + Duration::from_millis(*ms)));
            written(lines)
        };
        let lost = || Event::Disconnected { attempt: 1, why: "it closed".into() };
        let tried = || Event::NotReached { tries: 3, why: "refused".into(), again_in: Duration::from_secs(1) };
        let again = |put_back_bytes| Event::Reconnected { attempt: 2, outage: Duration::from_secs(12), put_back_bytes };
        insta::assert_snapshot!(told(Role::Source, vec![(0, lost()), (4000, tried()), (5000, again(3 << 20))]), @r"
        disconnected: it closed; the guest runs here; trying to connect again
        disconnected for 4.00 s: refused; the guest runs here; trying again in 1.00 s
        connected again after 12.0 s (attempt 2), 3.00 MiB are sent again
        ");
        insta::assert_snapshot!(
            told(Role::Source, vec![(0, Event::HandedOver), (1, lost()), (4001, tried()), (9000, again(0)), (9500, lost())]),
            @r"
        disconnected: it closed; the guest is paused until the destination answers; trying to connect again
        disconnected for 4.00 s: refused; the guest is paused; trying again in 1.00 s
        connected again after 12.0 s (attempt 2), nothing is sent again
        disconnected: it closed; the guest runs here; trying to connect again
        "
        );
        let postcopy =
            || vec![(0, Event::HandedOver), (1, Event::Phase(Phase::Postcopy)), (2, progress(3)), (10, lost())];
        let source = [postcopy(), vec![(4010, tried()), (9000, again(0)), (9500, lost())]].concat();
        insta::assert_snapshot!(told(Role::Source, source), @r"
        the guest runs at the destination, and what is left follows
        postcopy: 87 % done, 123 MiB left, 98.2 MiB/s, 785 ms to go, dirtied 34.0 MiB/s, expected downtime 1.24 s
        disconnected: it closed; the guest runs at the destination and needs what is left here; trying to connect again until a cancel gives the guest up
        disconnected for 4.00 s: refused; the guest needs what is left here; trying again in 1.00 s
        connected again after 12.0 s (attempt 2), nothing is sent again
        disconnected: it closed; the guest runs at the destination and needs what is left here; trying to connect again until a cancel gives the guest up
        ");
        insta::assert_snapshot!(told(Role::Destination, postcopy()), @r"
        the guest runs here, and what is missing follows
        postcopy: 87 % done, 123 MiB left, 98.2 MiB/s, 785 ms to go, dirtied 34.0 MiB/s, expected downtime 1.24 s
        disconnected: it closed; the guest runs here and waits for pages that are missing; waiting for the source to return until a cancel gives the guest up
        ");
        insta::assert_snapshot!(told(Role::Destination, vec![(0, lost()), (5000, again(0))]), @r"
        disconnected: it closed; waiting for the source to return
        connected again after 12.0 s (attempt 2)
        ");
    }

    #[test]
    fn a_migration_leaves_lines_of_its_own_end_only() {
        let lines = ProgressLines::new(Role::Source, Vec::new());
        script(Role::Source).iter().for_each(|event| lines.event(Role::Source, event));
        script(Role::Destination).iter().for_each(|event| lines.event(Role::Destination, event));
        insta::assert_snapshot!(written(lines), @r"
        connected to 127.0.0.1:41234
        1.00 GiB in 262,144 pages, 1 RAM block
        round 1 done in 2.10 s: 262,144 pages, 1.00 GiB became 512 MiB
        round 1: switch over: expected downtime 212 ms for 87.9 KiB (pause 1.00 ms, state 1.00 ms, sync 2.00 ms, transfer 91.0 ms, load 1.00 ms, verify 110 ms, durable 1.00 ms, prepare 1.00 ms, start 2.00 ms, handover 2.00 ms), limit 300 ms
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
