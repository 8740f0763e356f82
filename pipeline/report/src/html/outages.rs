//! The connections that were lost: when, why, for how long, and at what cost.

use maud::{Markup, html};

use super::{Page, clean, long};
use crate::account::Lost;
use memferry::human;

const TITLE: &str = "Lost connections";
const HEADS: [&str; 7] = ["Attempt", "Lost at", "Without one", "Failed tries", "Sent again", "Guest paused", "Why"];

pub(super) fn section(page: &Page<'_>) -> Markup {
    let lost = &page.account.lost;
    if lost.is_empty() {
        return html! {};
    }
    let table = html! {
        table.prose {
            thead { tr { @for head in HEADS { th scope="col" { (head) } } } }
            tbody { @for lost in lost { (row(page, lost)) } }
        }
    };
    html! {
        section aria-labelledby="outages" {
            h2 id="outages" { (TITLE) }
            p.note {
                "The guest ran at its source meanwhile, unless Go had left. \u{201c}Guest paused\u{201d} is the time of a switchover \
                 that a lost connection interrupted; it is no part of the downtime."
            }
            (long(TITLE, lost.len(), &table))
        }
    }
}

fn row(page: &Page<'_>, lost: &Lost) -> Markup {
    html! {
        tr {
            th scope="row" { (lost.attempt) }
            td { (page.clock(lost.at)) }
            td { (lost.outage.map_or_else(|| "up to the end".into(), human::time)) }
            td { (lost.tries) }
            td { (human::bytes(lost.put_back_bytes)) }
            td { (lost.paused.map_or_else(|| "no".into(), human::time)) }
            td { (clean(&lost.why)) }
        }
    }
}
