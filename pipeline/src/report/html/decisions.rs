//! What the controller decided and why, and what the operator was warned of.

use maud::{Markup, html};

use super::{Page, clean, wide};
use crate::controller::Decision;
use crate::report::human;

/// How a decision is coloured.
pub(super) fn class(decision: Decision) -> &'static str {
    match decision {
        Decision::AnotherRound | Decision::Sample(_) | Decision::Drain => "flag-round",
        Decision::Throttle(_) => "flag-throttle",
        Decision::RaiseLimit(_) => "flag-limit",
        Decision::SwitchOver => "flag-switch",
        Decision::GiveUp => "flag-give-up",
    }
}

/// What a decision is called.
pub(super) fn name(decision: Decision) -> String {
    match decision {
        Decision::AnotherRound => "another round".into(),
        Decision::Sample(_) => "a sample of the deltas".into(),
        Decision::Drain => "let the backlog arrive".into(),
        Decision::Throttle(percent) => format!("throttle to {percent} %"),
        Decision::RaiseLimit(limit) => format!("limit raised to {}", human::time(limit)),
        Decision::SwitchOver => "switch over".into(),
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
                        td.why { (clean(&decided.why)) }
                    }
                }
            }
        }
    };
    html! {
        section aria-labelledby="decisions" {
            h2 id="decisions" { "What was decided, and why" }
            (wide("Decisions of the controller", &table))
        }
    }
}

/// Settings that the operator changed on the way.
pub(super) fn changes(page: &Page<'_>) -> Markup {
    let changes = &page.report.changes;
    if changes.is_empty() {
        return html! {};
    }
    let table = html! {
        table.prose {
            thead { tr { @for head in ["Setting", "In round", "From", "To"] { th scope="col" { (head) } } } }
            tbody {
                @for change in changes {
                    tr {
                        th scope="row" { (change.key) }
                        td { (change.round) }
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
            (wide("Settings that were changed while it ran", &table))
        }
    }
}

/// Warnings, and who was turned away.
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
