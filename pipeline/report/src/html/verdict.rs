//! The verdict in sentences (what happened, where the guest is, what to do), then the main figures.

use maud::{Markup, html};
use memferry_stages::page_hashes::Coverage;

use super::{Page, clean, ms};
use crate::Ends;
use crate::postcopy::PostcopyReport;
use memferry::controller::Decision;
use memferry::events::Outcome;
use memferry::human;
use memferry::settings::After;

const NOTHING: &str = "Nothing.";

/// The severity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tone {
    Good,
    Warn,
    Bad,
}

impl Tone {
    fn class(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Warn => "warn",
            Self::Bad => "bad",
        }
    }
}

/// The verdict in sentences.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Story {
    pub(super) tone: Tone,
    /// What happened.
    pub(super) headline: String,
    /// Where the guest is.
    pub(super) guest: String,
    /// What the operator should do.
    pub(super) todo: String,
}

pub(super) fn section(page: &Page<'_>) -> Markup {
    let story = story(page);
    let report = page.report;
    html! {
        header class=(format!("verdict {}", story.tone.class())) {
            p.status {
                span.pill { (report.status) }
                " memferry " (report.role)
                @if let Some(peer) = &page.account.status.peer { " · " (if page.is_destination() { "from" } else { "to" }) " " (peer) }
            }
            h1 { (story.headline) }
            @if let Some(error) = report.end.error.as_ref().filter(|error| **error != report.status.name()) { p.error { strong { "Why: " } (clean(error.raw())) } }
            p { strong { "The guest: " } (story.guest) }
            p { strong { "To do: " } (story.todo) }
        }
        @if !page.account.status.blocks.is_empty() { dl.figures { @for figure in figures(page) { (figure.card()) } } }
    }
}

/// The verdict in sentences.
pub(super) fn story(page: &Page<'_>) -> Story {
    let ended = page.account.status.ended.as_ref();
    if ended.is_some_and(|ended| ended.resume_failed) {
        return Story {
            tone: Tone::Bad,
            headline: "The guest is paused at its source, and nobody runs it.".into(),
            guest: format!("It is here, whole, and could not be resumed.{}", paused_meanwhile(page)),
            todo: "Resume it here by its own means; then see why that failed.".into(),
        };
    }
    match (page.report.status, page.is_destination()) {
        (Outcome::Completed, false) => with_warnings(with_conclusions(sent(page), page), page),
        (Outcome::Completed, true) => with_warnings(arrived(page), page),
        (Outcome::Unconfirmed, _) => unconfirmed(page),
        (Outcome::Lost, is_destination) => lost(page, is_destination),
        (status, true) => did_not_arrive(status),
        (Outcome::Cancelled, false) => with_conclusions(cancelled(page), page),
        (_, false) => failed(page),
    }
}

fn sent(page: &Page<'_>) -> Story {
    let what = moved(page);
    let (headline, guest, todo) = match (page.report.role, page.settings.after) {
        (Ends::Both, Some(_)) => {
            (format!("The stream was written and read back: {what}."), "It was started here from the file.", NOTHING)
        }
        (_, Some(After::Resume)) => {
            (format!("The snapshot is complete: {what}."), "It continues here, at its source.", NOTHING)
        }
        (_, Some(After::Pause)) => (
            format!("The stream is complete: {what}."),
            "It is paused here, and all of it is in the file.",
            "Start it from the file where it is to run (memferry recv). Resume it here only if it will run nowhere else.",
        ),
        (Ends::Both, None) => (
            format!("The guest has moved: {what}."),
            "It is at its destination, which is in this program too, and continues there as it was.",
            NOTHING,
        ),
        (_, None) => (
            format!("The guest has moved: {what}."),
            "It is at the destination and continues there as it was. Here it is over.",
            NOTHING,
        ),
    };
    let (tone, todo) = match over_limit(page) {
        Some(limit) => {
            let slow = format!("It was paused for longer than the {limit} allowed: below is what that time went to.");
            (Tone::Warn, if todo == NOTHING { format!("Nothing at once. {slow}") } else { format!("{todo} {slow}") })
        }
        None => (Tone::Good, todo.to_owned()),
    };
    Story { tone, headline, guest: guest.to_owned(), todo }
}

fn arrived(page: &Page<'_>) -> Story {
    Story {
        tone: Tone::Good,
        headline: format!("The guest has arrived: {}.", moved(page)),
        guest: "It is here and continues as it was at its source.".into(),
        todo: NOTHING.into(),
    }
}

/// Settings that the figures suggest to change before the next migration.
fn with_conclusions(story: Story, page: &Page<'_>) -> Story {
    let conclusions = page.conclusions.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let todo = match story.todo.as_str() {
        _ if conclusions.is_empty() => story.todo,
        NOTHING => format!("Nothing at once. {conclusions}"),
        todo => format!("{todo} {conclusions}"),
    };
    Story { todo, ..story }
}

/// Points to the warnings: without a pointer nobody reads on below a good end.
fn with_warnings(story: Story, page: &Page<'_>) -> Story {
    let has_some = !page.account.notices.is_empty();
    Story { todo: if has_some { format!("{} Read the warnings below.", story.todo) } else { story.todo }, ..story }
}

fn did_not_arrive(status: Outcome) -> Story {
    let (tone, headline, todo) = match status {
        Outcome::Cancelled => (
            Tone::Warn,
            "The migration was cancelled before the guest was here.",
            "Nothing, if that was meant. Both ends can be started again at any time.",
        ),
        _ => (
            Tone::Bad,
            "The guest did not arrive.",
            "Put right what is named here, or at the source, then start both ends again.",
        ),
    };
    let guest = "It does not run here. Its source has it: the report there says in what state.";
    Story { tone, headline: headline.into(), guest: guest.into(), todo: todo.into() }
}

fn lost(page: &Page<'_>, is_destination: bool) -> Story {
    let missing = page.report.end.postcopy.as_ref().and_then(PostcopyReport::lost_pages);
    let missing = missing.map_or("Pages of it".to_owned(), |pages| human::counted(pages, "page") + " of it");
    let (guest, todo) = if is_destination {
        (
            format!("It was started here. {missing} are missing, and threads that touch one wait for ever."),
            "End what is left of the guest here. Its source has it as it was at the switchover.",
        )
    } else {
        (
            format!(
                "It was started at the destination. {missing} did not reach it. Here it is paused as it was at the switchover."
            ),
            "End what is left of the guest at the destination. Resume it here only if nothing that it did since matters.",
        )
    };
    Story {
        tone: Tone::Bad,
        headline: "The guest is lost: it was started without all of its memory, and the rest did not come.".into(),
        guest,
        todo: todo.into(),
    }
}

fn unconfirmed(page: &Page<'_>) -> Story {
    Story {
        tone: Tone::Bad,
        headline: "The guest was handed over, and nobody confirmed that it runs.".into(),
        guest: format!(
            "It is paused here. It may run at the destination{}.",
            page.account.status.peer.as_ref().map(|peer| format!(", {peer}")).unwrap_or_default()
        ),
        todo: "Look at the destination. If the guest runs there, all is done: end it here. Only if it does not run there, and \
               cannot start any more, resume it here."
            .into(),
    }
}

fn cancelled(page: &Page<'_>) -> Story {
    let gave_up = page.account.decided.last().is_some_and(|decided| decided.decision == Decision::GiveUp);
    let (headline, todo) = if gave_up {
        (
            "The guest did not converge within its limits: the migration gave up, and the guest continues at its source.",
            "To move it all the same, allow more: a higher downtime_limit or max_bandwidth, a later deadline, steps in \
             [convergence] on_stall, or on_deadline = \"switch-over\". Nothing has to be cleaned up.",
        )
    } else {
        (
            "The migration was cancelled, and the guest continues at its source.",
            "Nothing. It can be started again at any time.",
        )
    };
    Story { tone: Tone::Warn, headline: headline.into(), guest: at_source(page), todo: todo.into() }
}

fn failed(page: &Page<'_>) -> Story {
    let done_here = page.account.status.ended.as_ref().is_some_and(|ended| ended.outcome == Outcome::Completed);
    if done_here {
        return Story {
            tone: Tone::Bad,
            headline: "The source was done, and the destination failed.".into(),
            guest: "The source's part was complete; what was to continue at the destination does not.".into(),
            todo: "See what the destination says went wrong. A file that was written is still there.".into(),
        };
    }
    let headline = if page.account.status.blocks.is_empty() {
        "The migration did not begin; the guest is at its source."
    } else {
        "The migration failed; the guest is at its source."
    };
    Story {
        tone: Tone::Bad,
        headline: headline.into(),
        guest: at_source(page),
        todo: "Put right what is named above, then start it again. Nothing has to be cleaned up.".into(),
    }
}

fn at_source(page: &Page<'_>) -> String {
    format!("It is at its source, whole, in the state that it had.{}", paused_meanwhile(page))
}

/// How long the guest was paused before it was resumed at the source, if it was.
fn paused_meanwhile(page: &Page<'_>) -> String {
    let paused = page.account.series.paused().into_iter();
    let times: Vec<_> = paused.filter_map(|(from, to)| Some(to?.saturating_sub(from))).collect();
    if times.is_empty() {
        return String::new();
    }
    format!(" It was paused for {} meanwhile.", human::time(times.iter().sum()))
}

/// An amount and its duration; numbers and their units are not broken across lines.
fn moved(page: &Page<'_>) -> String {
    let report = page.report;
    let figure = |text: String| text.replace(' ', "\u{a0}");
    let [bytes, total] = [human::bytes(report.guest.bytes), ms(report.end.total_ms)].map(figure);
    let paused =
        report.end.downtime_ms.map(|downtime| format!(", of which it was paused for {}", figure(ms(downtime))));
    format!("{bytes} in {total}{}", paused.unwrap_or_default())
}

/// The downtime limit, if the downtime was above it.
fn over_limit(page: &Page<'_>) -> Option<String> {
    let limit = super::downtime::limit(page)?;
    let downtime = super::duration(page.report.end.downtime_ms?);
    (downtime > limit).then(|| human::time(limit))
}

/// One of the main figures.
struct Figure {
    name: &'static str,
    value: String,
    note: String,
    tone: Option<Tone>,
}

impl Figure {
    fn card(&self) -> Markup {
        html! {
            div class=(self.tone.map_or("", Tone::class)) {
                dt { (self.name) }
                dd { b { (self.value) } @if !self.note.is_empty() { span.note { (self.note) } } }
            }
        }
    }
}

fn figures(page: &Page<'_>) -> Vec<Figure> {
    let report = page.report;
    let plain = |name, value: String, note: String| Figure { name, value, note, tone: None };
    let mut figures = vec![plain("Total time", ms(report.end.total_ms), format!("setup {}", ms(report.end.setup_ms)))];
    if let Some(downtime) = report.end.downtime_ms {
        let limit = || super::downtime::limit(page).map(|limit| format!("limit {}", human::time(limit)));
        let tone = if over_limit(page).is_some() { Tone::Warn } else { Tone::Good };
        figures.push(if page.was_handed_over() {
            Figure { name: "Downtime", value: ms(downtime), note: limit().unwrap_or_default(), tone: Some(tone) }
        } else {
            plain("Paused", ms(downtime), "until it was resumed at its source".into())
        });
    }
    if let Some(forecast) = &report.end.forecast {
        let note = forecast.error_percent.map(|error| format!("{error:+.0} % off")).unwrap_or_default();
        figures.push(plain("Forecast of it", ms(forecast.expected_ms), note));
    }
    figures.extend(left_over(page));
    let blocks = report.guest.blocks.len();
    let plural = if blocks == 1 { "" } else { "s" };
    let of_guest = format!("{} pages, {blocks} RAM block{plural}", human::count(report.guest.pages));
    figures.push(plain("Guest", human::bytes(report.guest.bytes), of_guest));
    let rate = human::rate(report.throughput_bytes_per_s);
    figures.push(plain("On the wire", human::bytes(report.end.wire_bytes), format!("{rate} on average")));
    let pages = report.rounds.iter().map(|round| round.pages.all).sum();
    figures.push(plain("Rounds", report.rounds.len().to_string(), format!("{} pages scanned", human::count(pages))));
    figures.extend(postcopy(page));
    figures.extend(outages(page));
    figures.push(verified(page));
    let bound = human::bytes(report.memory_bound_bytes);
    figures.push(plain("Engine's memory", human::bytes(report.end.memory_peak_bytes), format!("{bound} allowed")));
    let excluded = report.end.excluded;
    let excluded_pages = excluded.hinted + excluded.unplugged + excluded.ignored;
    if excluded_pages > 0 {
        let [hinted, unplugged, ignored] = [excluded.hinted, excluded.unplugged, excluded.ignored].map(human::count);
        let note = format!("pages: {hinted} hinted free, {unplugged} unplugged, {ignored} of ignored blocks");
        figures.push(plain("Excluded", human::count(excluded_pages), note));
    }
    figures
}

/// How long the guest ran without all of its pages.
fn postcopy(page: &Page<'_>) -> Option<Figure> {
    let postcopy = page.report.end.postcopy.as_ref()?;
    let (missing, urgent) = (human::count(postcopy.missing_pages), human::count(postcopy.urgent_pages));
    let is_whole = page.report.status == Outcome::Completed;
    Some(Figure {
        name: "Postcopy",
        value: ms(postcopy.time_ms),
        note: format!("{missing} pages missing at the start, {urgent} urgent"),
        tone: (!is_whole).then_some(Tone::Bad),
    })
}

/// What lost connections have cost.
fn outages(page: &Page<'_>) -> Option<Figure> {
    let outages = page.report.end.outages;
    (outages.lost > 0).then(|| Figure {
        name: "Lost connections",
        value: human::count(outages.lost.into()),
        note: format!("none for {}; {} sent again", human::time(outages.time), human::bytes(outages.put_back_bytes)),
        tone: Some(Tone::Warn),
    })
}

/// The progress of a migration that did not complete.
fn left_over(page: &Page<'_>) -> Option<Figure> {
    let (_, left) = *page.remaining().last().filter(|_| page.report.status != Outcome::Completed)?;
    Some(Figure {
        name: "Left to send",
        value: human::bytes(left),
        note: format!("when last looked at, after {}", human::counted(page.report.rounds.len() as u64, "round")),
        tone: None,
    })
}

fn verified(page: &Page<'_>) -> Figure {
    let end = &page.report.end;
    let (value, note, tone) = match (end.verified, end.checked) {
        (Some(true), Some(Coverage { checked, of })) => {
            let percent = checked * 100 / of.max(1);
            let end = if page.is_destination() { "destination" } else { "source" };
            let note = format!("each page was loaded as it was sent; {percent} % of the {end}'s were read again");
            ("yes", note, Some(Tone::Good))
        }
        (Some(true), None) => ("yes", "both memories were compared as a whole".into(), Some(Tone::Good)),
        (Some(false), _) => ("differs", "a digest did not match".into(), Some(Tone::Bad)),
        (None, _) => ("no", "pages were not compared".into(), None),
    };
    Figure { name: "Verified", value: value.into(), note, tone }
}
