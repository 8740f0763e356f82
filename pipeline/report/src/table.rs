//! The final summary for people: verdict, rounds, decisions, downtime, bottleneck. At most 100 columns.

use std::fmt::Write;
use std::time::Duration;

use memferry_stages::exclusions::ExcludedPages;
use memferry_stages::page_hashes::Coverage;

use super::account::{Account, Lost, Round};
use super::postcopy::PostcopyReport;
use super::{Ends, busiest, error_percent, held_up, readings, throughput};
use memferry::controller::forecast::Forecast;
use memferry::controller::{Decided, Decision};
use memferry::events::{Ended, Outages, Outcome};
use memferry::human;

const HEADS: [&str; 11] =
    ["round", "time", "pages", "zero", "raw", "compressed", "xbzrle", "unchanged", "in", "out", "dirty after"];

/// The number of rounds, or decisions, that are shown from the start and from the end.
const FIRST: usize = 8;
const LAST: usize = 4;
/// The width of a line, and of the label before it.
const WIDTH: usize = 100;
const NAME: usize = 12;

/// The verdict in one line.
#[must_use]
pub fn verdict(verdict: &Ended, account: &Account) -> String {
    let outcome = verdict.outcome;
    let mut line = outcome.to_string();
    if !verdict.total.is_zero() {
        write!(line, " after {}", human::time(verdict.total)).expect("a string takes it");
    }
    if let Some(error) = verdict.error.as_ref().filter(|error| *error != outcome.name()) {
        write!(line, ": {error}").expect("a string takes it");
    }
    if verdict.outcome == Outcome::Lost {
        line.push_str(&lost_pages(verdict, account));
    }
    if verdict.outcome == Outcome::Completed {
        write!(line, ": {} moved", human::bytes(account.status.total_bytes())).expect("a string takes it");
        if let Some(downtime) = verdict.downtime {
            write!(line, ", downtime {}", human::time(downtime)).expect("a string takes it");
        }
        line.push_str(if verdict.verified == Some(true) { ", verified" } else { ", not verified" });
    } else if let Some(downtime) = verdict.downtime {
        write!(line, "; the guest was paused for {}", human::time(downtime)).expect("a string takes it");
    }
    line
}

/// What is lost at the end that knows, the destination, and what to do there.
fn lost_pages(verdict: &Ended, account: &Account) -> String {
    let postcopy = verdict.postcopy.as_ref().map(PostcopyReport::from);
    let Some(lost) = postcopy.and_then(|postcopy| postcopy.lost_pages()) else { return String::new() };
    let page_bytes = account.status.total_bytes().checked_div(account.status.pages).unwrap_or(0);
    let (pages, bytes) = (human::count(lost), human::bytes(lost * page_bytes));
    format!(
        "; {pages} of its pages ({bytes}) are missing here, and threads that touch one wait for ever: end what is left of the guest \
         here; its source has it as it was at the switchover"
    )
}

/// Everything below the verdict: the table of rounds, then the summary lines. Empty if no stage has run.
#[must_use]
pub fn summary(role: Ends, account: &Account, other: Option<&Account>) -> String {
    let Some(ended) = account.status.ended.as_ref().filter(|ended| !ended.stages.is_empty()) else {
        return String::new();
    };
    let mut text = String::new();
    if !account.rounds.is_empty() {
        text.push_str(&rounds(&account.rounds));
        text.push('\n');
    }
    for (name, line) in lines(role, ended, account, other) {
        for (index, part) in human::wrap(&line, WIDTH - NAME).iter().enumerate() {
            let name = if index == 0 { name } else { "" };
            writeln!(text, "{name:<NAME$}{part}").expect("a string takes it");
        }
    }
    text
}

/// All rounds, or the first and the last ones if there are many.
fn rounds(rounds: &[Round]) -> String {
    let left_out = rounds.len().saturating_sub(FIRST + LAST);
    if left_out < 2 {
        return columns(rounds.iter().map(row)).join("\n") + "\n";
    }
    let last = &rounds[rounds.len() - LAST..];
    let mut lines = columns(rounds[..FIRST].iter().chain(last).map(row));
    lines.insert(1 + FIRST, format!("  ... {} more", human::counted(left_out as u64, "round")));
    lines.join("\n") + "\n"
}

fn row(round: &Round) -> [String; 11] {
    let tally = &round.tally;
    let kind = match (tally.kind.is_final(), round.is_sample) {
        (true, _) => " last",
        (_, true) => " sample",
        _ => "",
    };
    let number = format!("{}{kind}", tally.round);
    let dirty = round.dirty_after.map_or_else(|| "-".into(), human::count);
    [
        number,
        human::time(round.duration),
        human::count(tally.pages.all),
        human::count(tally.pages.zero),
        human::count(tally.pages.raw),
        human::count(tally.pages.compressed),
        human::count(tally.pages.xbzrle),
        human::count(tally.pages.unchanged),
        human::bytes(tally.pages.bytes_in),
        human::bytes(tally.pages.bytes_out),
        dirty,
    ]
}

/// Rows under their headings, each column as wide as its widest cell.
fn columns(rows: impl Iterator<Item = [String; 11]>) -> Vec<String> {
    let rows: Vec<_> = std::iter::once(HEADS.map(str::to_owned)).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 11] = std::array::from_fn(width);
    let line = |row: &[String; 11]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:>width$}"));
        cells.collect::<Vec<_>>().join(" ")
    };
    rows.iter().map(line).collect()
}

/// Pages that were not sent, with the reasons; `None` if all were sent.
fn excluded(excluded: &ExcludedPages) -> Option<String> {
    let whys =
        [(excluded.hinted, "hinted free"), (excluded.unplugged, "unplugged"), (excluded.ignored, "of ignored blocks")];
    let parts: Vec<_> = whys
        .into_iter()
        .filter(|(pages, _)| *pages > 0)
        .map(|(pages, why)| format!("{} pages {why}", human::count(pages)))
        .collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// The controller's decisions other than further rounds, in words and figures: all of them, or the first and the last ones
/// if there are many. The decision to give up is left to the verdict.
fn decisions(decided: &[Decided]) -> Vec<(&'static str, String)> {
    let shown = |decided: &&Decided| {
        let Decided { decision, .. } = decided;
        matches!(decision, Decision::Throttle(_) | Decision::RaiseLimit(_) | Decision::SwitchOver | Decision::Postcopy)
    };
    let mut lines: Vec<_> =
        decided.iter().filter(shown).map(|decided| format!("round {}: {decided}", decided.round)).collect();
    let left_out = lines.len().saturating_sub(FIRST + LAST);
    if left_out > 1 {
        lines.splice(FIRST..FIRST + left_out, [format!("... {} more", human::counted(left_out as u64, "decision"))]);
    }
    let names = std::iter::once("decided").chain(std::iter::repeat(""));
    names.zip(lines).collect()
}

/// What was compared: all memory, or page hashes, and how much of each end's memory was read again besides. `None` if the
/// memories were not found equal.
fn checked(role: Ends, ended: &Ended, far: Option<&Ended>) -> Option<String> {
    ended.verified.filter(|equal| *equal)?;
    let Some(own) = ended.checked else { return Some("all memory of both ends, while the guest was paused".into()) };
    let of = |coverage: Coverage| format!("{} of {} pages", human::count(coverage.checked), human::count(coverage.of));
    let destination = far.and_then(|far| far.checked).map(|coverage| format!(", {} as loaded", of(coverage)));
    Some(match role {
        Ends::Destination => format!("{} read again as loaded", of(own)),
        _ => format!("{} read again as sent{}", of(own), destination.unwrap_or_default()),
    })
}

/// The connections that were lost: all of them, or the first and the last ones if there are many, then what they have cost.
fn outages(lost: &[Lost], cost: &Outages) -> Vec<(&'static str, String)> {
    let mut lines: Vec<_> = lost.iter().map(ToString::to_string).collect();
    let left_out = lines.len().saturating_sub(FIRST + LAST);
    if left_out > 1 {
        lines.splice(FIRST..FIRST + left_out, [format!("... {} more", human::counted(left_out as u64, "connection"))]);
    }
    if cost.lost > 1 {
        let paused = match cost.paused {
            Duration::ZERO => String::new(),
            paused => format!(", the guest paused for {} in interrupted switchovers", human::time(paused)),
        };
        let (time, bytes) = (human::time(cost.time), human::bytes(cost.put_back_bytes));
        lines.push(format!("{} connections in all: none for {time}, {bytes} sent again{paused}", cost.lost));
    }
    let names = std::iter::once("lost").chain(std::iter::repeat(""));
    names.zip(lines).collect()
}

fn lines(role: Ends, ended: &Ended, account: &Account, other: Option<&Account>) -> Vec<(&'static str, String)> {
    let far = other.and_then(|account| account.status.ended.as_ref());
    let mut lines = decisions(&account.decided);
    if let Some(downtime) = ended.downtime {
        let resumed = if ended.switchover().is_none() { " until it was resumed at the source" } else { "" };
        lines.push(("downtime", format!("{}{resumed}: {}", human::time(downtime), ended.parts)));
    }
    // A forecast is of what sends the rest with the guest paused.
    if let (Some(forecast), Some(downtime), None) = (&ended.forecast, ended.switchover(), &ended.postcopy) {
        lines.push(("forecast", forecast_line(forecast, downtime)));
    }
    let postcopy = PostcopyReport::joined(ended.postcopy.as_ref(), far.and_then(|far| far.postcopy.as_ref()));
    lines.extend(postcopy.iter().flat_map(PostcopyReport::lines));
    lines.extend(outages(&account.lost, &ended.outages));
    let rate = human::rate(throughput(ended));
    lines.push(("wire", format!("{} at {rate}, setup {}", human::bytes(ended.wire_bytes), human::time(ended.setup))));
    lines.extend(checked(role, ended, far).map(|line| ("checked", line)));
    lines.extend(excluded(&ended.excluded).map(|line| ("excluded", line)));
    let peak = ended.memory_peak + far.map_or(0, |far| far.memory_peak);
    let bound = account.memory_bound + other.map_or(0, |other| other.memory_bound);
    lines.push(("memory", format!("{} at most, {} allowed", human::bytes(peak), human::bytes(bound))));
    let stages = readings(account, other);
    if let Some((reading, share)) = busiest(&stages) {
        lines.push(("bottleneck", held_up(ended, far).to_string()));
        lines.push(("busiest", format!("the {}: {:.0} % of the time", reading.stage, share * 100.0)));
    }
    let cpu = human::time(ended.cpu);
    lines.push(("processor", format!("{cpu} of the whole process")));
    lines
}

/// The forecast of the downtime, and its error.
fn forecast_line(forecast: &Forecast, downtime: Duration) -> String {
    let (expected, off) = (human::time(forecast.expected()), error_percent(forecast, downtime));
    format!("{expected} ({off:+.0} %): {}", forecast.parts())
}
