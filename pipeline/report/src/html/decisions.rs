//! The controller's decisions with their reasons, and the warnings for the operator.

use maud::{Markup, html};

use super::{Page, clean, long};
use memferry::controller::Decision;
use memferry::human;

/// The colour class of a decision.
pub(super) fn class(decision: Decision) -> &'static str {
    match decision {
        Decision::AnotherRound | Decision::Sample(_) | Decision::Drain => "flag-round",
        Decision::Throttle(_) => "flag-throttle",
        Decision::RaiseLimit(_) => "flag-limit",
        Decision::SwitchOver | Decision::Postcopy => "flag-switch",
        Decision::GiveUp => "flag-give-up",
    }
}

/// The name of a decision.
pub(super) fn name(decision: Decision) -> String {
    match decision {
        Decision::AnotherRound => "another round".into(),
        Decision::Sample(_) => "a sample of the deltas".into(),
        Decision::Drain => "let the backlog arrive".into(),
        Decision::Throttle(percent) => format!("throttle to {percent} %"),
        Decision::RaiseLimit(limit) => format!("limit raised to {}", human::time(limit)),
        Decision::SwitchOver => "switch over".into(),
        Decision::Postcopy => "postcopy".into(),
        Decision::GiveUp => "give up".into(),
    }
}

pub(super) fn section(page: &Page<'_>) -> Markup {
    if page.account.decided.is_empty() {
        return html! {};
    }
    let table = html! {
        table.prose {
            thead { tr { @for head in ["No.", "At", "Round", "Decision", "Expected downtime", "Why"] { th scope="col" { (head) } } } }
            tbody {
                @for (index, (at, decided)) in page.decisions().enumerate() {
                    tr {
                        th scope="row" { span class=(format!("number {}", class(decided.decision))) { (index + 1) } }
                        td { (page.clock(at)) }
                        td { (decided.round) }
                        td { (name(decided.decision)) }
                        td { (decided.forecast.map_or_else(|| "–".to_owned(), |forecast| human::time(forecast.expected()))) }
                        td.why { (clean(&decided.to_string())) }
                    }
                }
            }
        }
    };
    html! {
        section aria-labelledby="decisions" {
            h2 id="decisions" { "What was decided, and why" }
            (long("Decisions of the controller", page.account.decided.len(), &table))
        }
    }
}

/// The label of a change: a, b, … z, aa, ab, …
pub(super) fn letter(index: usize) -> String {
    let last = char::from(b'a' + u8::try_from(index % 26).expect("a letter"));
    if index < 26 { last.into() } else { format!("{}{last}", letter(index / 26 - 1)) }
}

/// Settings that the operator changed during the migration.
pub(super) fn changes(page: &Page<'_>) -> Markup {
    if page.account.changed.is_empty() {
        return html! {};
    }
    let table = html! {
        table.prose {
            thead { tr { @for head in ["No.", "At", "Round", "Setting", "From", "To"] { th scope="col" { (head) } } } }
            tbody {
                @for (index, (at, change)) in page.changes().enumerate() {
                    tr {
                        th scope="row" { span.number.flag-change { (letter(index)) } }
                        td { (page.clock(at)) }
                        td { (change.round) }
                        td { (change.to.key()) }
                        td { (change.from) }
                        td { (change.to) }
                    }
                }
            }
        }
    };
    html! {
        section aria-labelledby="changes" {
            h2 id="changes" { "Settings that were changed while it ran" }
            (long("Settings that were changed while it ran", page.account.changed.len(), &table))
        }
    }
}

/// Warnings and refused peers.
pub(super) fn notices(page: &Page<'_>) -> Markup {
    let account = page.account;
    html! {
        section aria-labelledby="warnings" {
            h2 id="warnings" { "Warnings" }
            @if account.notices.is_empty() { p { "None." } } @else {
                ul.notices { @for notice in &account.notices { li { (clean(&notice.text)) } } }
            }
            @if account.more_notices > 0 { p { "And " (human::exact(account.more_notices)) " more." } }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_continue_behind_z() {
        assert_eq!(
            [0, 1, 25, 26, 27, 51, 52, 701, 702].map(letter),
            ["a", "b", "z", "aa", "ab", "az", "ba", "zz", "aaa"]
        );
    }
}
