//! The answer of a plan for a terminal: a table, a chart for each link, and advice in words. 80 columns.

use std::fmt::Write;

use super::advice::MARGIN;
use super::answer::{AdviceFigures, Answer, AtBandwidth, Figures};
use super::bandwidth::Bandwidth;
use super::index;
use memferry::controller::forecast::{self, whole};
use memferry::human;
use memferry::units::Units;

/// The width of a bar, in columns.
const BAR: usize = 46;
/// The most rounds of a chart; of more, those in the middle are omitted.
const ROUNDS: usize = 12;

/// What a plan does not weigh.
const POSTCOPY: &str = "Postcopy: the guest runs at its destination before all of its pages are there, and losing either\n\
                        end loses it then. A guest of files cannot do that.";

/// The complete picture.
#[must_use]
pub fn draw(answer: &Answer) -> String {
    let mut text = String::new();
    let limit = time(answer.downtime_limit);
    let trace = &answer.trace;
    line(
        &mut text,
        &format!(
            "guest: {} in {} pages, {:.0} % zero; {} pages/s found dirty over {}",
            human::bytes(trace.bytes),
            human::count(trace.pages),
            trace.zero * 100.0,
            human::count(whole(trace.pages_per_second)),
            time(trace.length),
        ),
    );
    line(&mut text, &format!("downtime limit: {limit}\n"));
    line(&mut text, &table(answer));
    for at in answer.bandwidths.iter().filter(|at| !at.foreseen.expected_downtimes.is_empty()) {
        line(&mut text, &chart(at, answer.downtime_limit));
    }
    match answer.smallest_bandwidth {
        Some(bytes) => line(
            &mut text,
            &format!(
                "The smallest bandwidth that meets {limit} without a throttle: {}; with a margin of {:.0} %: {}.",
                rate(bytes, answer.units),
                MARGIN * 100.0,
                rate(answer.bandwidth_with_margin.unwrap_or(bytes), answer.units)
            ),
        ),
        None => line(&mut text, &format!("No bandwidth meets {limit} with these settings.")),
    }
    if answer.switchover_floor > answer.downtime_limit {
        let (floor, digests) = (time(answer.switchover_floor), time(answer.digests));
        let without = "--set migration.verify=true compares hashes of pages instead, which are made as pages are sent";
        let digests =
            if answer.digests > 0.0 { format!(", {digests} of it digests: {without}") } else { String::new() };
        line(&mut text, &format!("A switchover costs {floor} before a page is sent{digests}."));
    }
    answer.bandwidths.iter().for_each(|at| advise(&mut text, at, &limit));
    if let Some(cap) =
        answer.max_bandwidth.filter(|&cap| answer.bandwidths.iter().any(|at| at.bytes_per_second > cap as f64))
    {
        let cap = rate(cap as f64, answer.units);
        line(&mut text, &format!("max_bandwidth is set to {cap}: a link that carries more is used no further."));
    }
    if answer.bandwidths.iter().flat_map(foreseen).any(|figures| figures.postcopy.is_some()) {
        line(&mut text, POSTCOPY);
    }
    if answer.bandwidths.iter().flat_map(foreseen).any(|figures| figures.repeats_trace) {
        let recorded = time(trace.length);
        line(
            &mut text,
            &format!("* longer than the {recorded} that were recorded: the trace was begun again from its start."),
        );
    }
    text
}

fn line(text: &mut String, line: &str) {
    text.push_str(line);
    text.push('\n');
}

fn table(answer: &Answer) -> String {
    let mut table = format!(
        "{:<12} {:<26} {:>6} {:>9} {:>9} {:>10}\n",
        "bandwidth", "outcome", "rounds", "total", "downtime", "sent"
    );
    for at in &answer.bandwidths {
        let figures = &at.foreseen;
        let downtime = if figures.moves { time(figures.downtime) } else { "-".into() };
        writeln!(
            table,
            "{:<12} {:<26} {:>6} {:>9} {:>9} {:>10}",
            name(at),
            outcome(figures),
            figures.rounds,
            total(figures),
            downtime,
            human::bytes(figures.bytes),
        )
        .expect("a string takes it");
    }
    table
}

fn outcome(figures: &Figures) -> String {
    let mut outcome = match (figures.moves, figures.meets) {
        (true, true) if figures.postcopy.is_some() => "moves by postcopy".to_owned(),
        (true, true) => "converges".to_owned(),
        (true, false) => "moves, above the limit".into(),
        (false, _) => "does not converge".into(),
    };
    if figures.throttle > 0 {
        write!(outcome, ", at {} %", 100 - figures.throttle).expect("a string takes it");
    }
    outcome
}

/// The cost of a switchover after each round, beside the limit.
fn chart(at: &AtBandwidth, limit: f64) -> String {
    let expected = &at.foreseen.expected_downtimes;
    let most = expected.iter().copied().fold(limit * 1.25, f64::max);
    let columns = |amount: f64| amount / most * BAR as f64;
    let limit_at = index(columns(limit));
    let mut chart = format!("{}: what a switchover would cost after each round; │ is the limit\n", name(at));
    for (round, &seconds) in expected.iter().enumerate() {
        if expected.len() > ROUNDS && round == ROUNDS / 2 {
            let more = human::counted((expected.len() - ROUNDS) as u64, "round");
            writeln!(chart, "      ⋮ {more} more").expect("a string takes it");
        }
        if expected.len() > ROUNDS && (ROUNDS / 2..expected.len() - ROUNDS / 2).contains(&round) {
            continue;
        }
        let switches = round + 1 == expected.len() && at.foreseen.moves;
        let end = match (switches, at.foreseen.postcopy) {
            (false, _) => "",
            (true, None) => "  switchover",
            (true, Some(_)) => "  postcopy",
        };
        writeln!(chart, "{:>5} {} {:>8}{end}", round + 1, bar(columns(seconds), limit_at), time(seconds))
            .expect("a string takes it");
    }
    chart
}

/// A bar of this many columns, drawn to an eighth of a column, and the limit behind or in it.
fn bar(columns: f64, limit_at: usize) -> String {
    const EIGHTHS: [char; 8] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];
    let eighths = index((columns * 8.0).round());
    let column = |at: usize| match (at * 8).cmp(&eighths) {
        std::cmp::Ordering::Less if at * 8 + 8 <= eighths => '█',
        _ if at == limit_at => '│',
        std::cmp::Ordering::Less => EIGHTHS[eighths % 8],
        _ => ' ',
    };
    (0..BAR).map(column).collect()
}

fn advise(text: &mut String, at: &AtBandwidth, limit: &str) {
    let name = name(at);
    let Figures { meets, throttle, .. } = at.foreseen;
    if meets && let Some(seconds) = at.foreseen.postcopy {
        return advise_postcopy(text, at, seconds, limit);
    }
    if at.advice.is_empty() {
        let words = match (meets, throttle) {
            (true, 0) => return advise_met(text, at, limit),
            (true, _) => format!("At {name} they meet {limit} by a throttle, and nothing gentler does."),
            (false, _) => {
                format!("At {name} nothing that can be set meets {limit}, a longer downtime or a throttle included.")
            }
        };
        return line(text, &words);
    }
    let how =
        if meets { "the guest is throttled; this would do without" } else { "the settings do not meet it; this would" };
    line(text, &format!("At {name} {how}:"));
    at.advice.iter().for_each(|advice| line(text, &sentence(advice)));
}

/// The settings meet the limit by postcopy: what that costs, and what would do without.
fn advise_postcopy(text: &mut String, at: &AtBandwidth, seconds: f64, limit: &str) {
    let (name, seconds) = (name(at), time(seconds));
    let without = if at.advice.is_empty() { "nothing gentler does" } else { "this would do without" };
    line(text, &format!("At {name} they meet {limit} by postcopy, for {seconds}; {without}."));
    at.advice.iter().for_each(|advice| line(text, &sentence(advice)));
}

/// The settings meet the limit: by what margin, and cheaper settings that also meet it.
fn advise_met(text: &mut String, at: &AtBandwidth, limit: &str) {
    let name = name(at);
    match at.margin.filter(|&margin| margin < MARGIN) {
        None => line(text, &format!("At {name} the settings meet {limit} as they are.")),
        Some(margin) => line(
            text,
            &format!(
                "At {name} the settings meet {limit} with {:.0} % of the bandwidth to spare: if the guest writes more, they may not.",
                margin * 100.0
            ),
        ),
    }
    if let Some(cheaper) = &at.cheaper {
        line(text, "  These meet it too, and take less memory or processor time:");
        line(text, &sentence(cheaper));
    }
}

fn sentence(AdviceFigures { set, foreseen }: &AdviceFigures) -> String {
    let sets: Vec<_> = set.iter().map(|set| format!("--set {set}")).collect();
    let mut words = format!(
        "  {}\n      downtime {}, total {}, {}, {} sent",
        sets.join(" "),
        time(foreseen.downtime),
        total(foreseen),
        human::counted(foreseen.rounds.into(), "round"),
        human::bytes(foreseen.bytes)
    );
    if foreseen.throttle > 0 {
        write!(words, "; the guest runs at {} % near the end", 100 - foreseen.throttle).expect("a string takes it");
    }
    if let Some(seconds) = foreseen.postcopy {
        write!(words, "; {} of it in postcopy", time(seconds)).expect("a string takes it");
    }
    words
}

/// All forecasts over one link: with the settings as they are, and with each change.
fn foreseen(at: &AtBandwidth) -> impl Iterator<Item = &Figures> {
    std::iter::once(&at.foreseen).chain(at.advice.iter().chain(&at.cheaper).map(|advice| &advice.foreseen))
}

/// Marked if the trace was too short for it.
fn total(figures: &Figures) -> String {
    format!("{}{}", time(figures.total), if figures.repeats_trace { "*" } else { "" })
}

fn name(at: &AtBandwidth) -> String {
    rate(at.bytes_per_second, at.units).to_string()
}

fn rate(bytes_per_second: f64, units: Units) -> Bandwidth {
    Bandwidth { bytes_per_second, units }
}

fn time(seconds: f64) -> String {
    human::time(forecast::seconds(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_as_long_as_they_say_with_the_limit_in_them_or_behind() {
        assert_eq!(bar(2.5, 6), format!("██▌   │{}", " ".repeat(BAR - 7)));
        assert_eq!(bar(8.0, 3), format!("████████{}", " ".repeat(BAR - 8)));
        assert_eq!(bar(0.0, 0), format!("│{}", " ".repeat(BAR - 1)));
        assert_eq!(bar(BAR as f64, 5).chars().filter(|&column| column == '█').count(), BAR);
    }
}
