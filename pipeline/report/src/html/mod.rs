//! The report as a page for people: one self-contained HTML file without scripts.
//!
//! A [`Page`] (the report, the account behind it, settings and configuration) is rendered to text without access to
//! files or clocks. Each section is a module. Text from outside (errors, addresses, ids, the configuration) is
//! escaped by the templates, and control and direction characters in it are escaped too.
//!
//! Charts are inline SVG that fits any width: horizontal positions are in percent, text keeps its size.

mod chart;
mod decisions;
mod downtime;
mod outages;
mod postcopy;
mod rounds;
mod stages;
mod timeline;
mod verdict;

use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use maud::{DOCTYPE, Markup, PreEscaped, html};
use memferry_stages::untrusted::is_unsafe;

use super::account::Account;
use super::series::Happened;
use super::todo::Conclusion;
use super::{Ends, GuestReport, Report, file};
use memferry::control::Changed;
use memferry::controller::Decided;
use memferry::events::{Outcome, Phase};
use memferry::human;
use memferry::settings::SourceSettings;

const STYLE: &str = include_str!("style.css");
/// A table with more rows than this is collapsed.
const FOLDED: usize = 40;

/// The contents of a page.
#[derive(Clone, Copy, Debug)]
pub struct Page<'a> {
    /// The figures.
    pub report: &'a Report,
    /// The account of the same end, from which the figures are computed.
    pub account: &'a Account,
    /// The account of the other end, if the report includes its stages.
    pub other: Option<&'a Account>,
    /// The migration's settings.
    pub settings: &'a SourceSettings,
    /// The configuration, as the operator writes it.
    pub configuration: &'a str,
    /// Settings that the figures suggest to change.
    pub conclusions: &'a [Conclusion],
    /// The time of writing.
    pub written: SystemTime,
}

impl Page<'_> {
    /// The page as HTML.
    #[must_use]
    pub fn render(&self) -> String {
        let title = format!("memferry {}: {}", self.report.role, self.report.status);
        html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta name="color-scheme" content="light dark";
                    title { (title) }
                    style { (PreEscaped(STYLE)) }
                }
                body {
                    (chart::patterns())
                    main {
                        (verdict::section(self))
                        (timeline::section(self))
                        (rounds::section(self))
                        (downtime::section(self))
                        (postcopy::section(self))
                        (outages::section(self))
                        (stages::section(self))
                        (decisions::section(self))
                        (decisions::changes(self))
                        (decisions::notices(self))
                        (blocks(&self.report.guest))
                        (configuration(self.configuration))
                    }
                    (self.footer())
                }
            }
        }
        .into_string()
    }

    /// Writes the page, completely or not at all. A target that is not a regular file (`/dev/stdout`, a pipe, a link)
    /// is written to directly, never replaced.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, file: &Path) -> io::Result<()> {
        file::write(file, self.render().as_bytes())
    }

    fn footer(&self) -> Markup {
        let written = humantime::format_rfc3339_seconds(self.written);
        html! {
            footer {
                p {
                    "Written " (written) " by memferry " (env!("CARGO_PKG_VERSION")) ". Times of the course are counted from the \
                     first page. The same figures for programs: " code { "--report FILE.json" } "."
                }
            }
        }
    }

    fn is_destination(&self) -> bool {
        self.report.role == Ends::Destination
    }

    /// Did the guest run at the destination?
    fn was_handed_over(&self) -> bool {
        matches!(self.report.status, Outcome::Completed | Outcome::Lost)
    }

    /// The origin of the page's time axis: when pages began to move.
    fn zero(&self) -> Duration {
        self.account.series.first(Happened::Phase(Phase::Active)).unwrap_or_default()
    }

    /// The controller's decisions, with their times.
    fn decisions(&self) -> impl Iterator<Item = (Duration, &Decided)> {
        let account = self.account;
        account.series.marks().iter().filter_map(|mark| match mark.what {
            Happened::Decided(index) => Some((mark.at, account.decided.get(index)?)),
            _ => None,
        })
    }

    /// The changed settings, with their times.
    fn changes(&self) -> impl Iterator<Item = (Duration, &Changed)> {
        let account = self.account;
        account.series.marks().iter().filter_map(|mark| match mark.what {
            Happened::Changed(index) => Some((mark.at, account.changed.get(index)?)),
            _ => None,
        })
    }

    /// Dirty bytes that the syncs found, with their times.
    fn found(&self) -> impl Iterator<Item = (Duration, u64)> {
        let page_bytes = self.account.status.total_bytes().checked_div(self.account.status.pages).unwrap_or(0);
        self.account.series.marks().iter().filter_map(move |mark| match mark.what {
            Happened::Synced(pages) => Some((mark.at, pages.saturating_mul(page_bytes))),
            _ => None,
        })
    }

    /// The remaining bytes, from samples and syncs, in order.
    fn remaining(&self) -> Vec<(Duration, u64)> {
        let samples = self.account.series.samples().into_iter();
        let sampled = samples.filter_map(|sample| Some((sample.at, sample.remaining_bytes?)));
        let mut knots: Vec<_> = sampled.chain(self.found()).collect();
        knots.sort_by_key(|knot| knot.0);
        knots
    }

    /// A time on the page's time axis.
    fn clock(&self, at: Duration) -> String {
        human::time(at.saturating_sub(self.zero()))
    }
}

fn blocks(guest: &GuestReport) -> Markup {
    if guest.blocks.is_empty() {
        return html! {};
    }
    let table = html! {
        table {
            thead { tr { @for head in ["RAM block", "Length", "Page size"] { th scope="col" { (head) } } } }
            tbody {
                @for block in &guest.blocks {
                    tr {
                        th scope="row" { (block.id) }
                        @for bytes in [block.bytes, block.page_size] { td { data value=(bytes) { (human::bytes(bytes)) } } }
                    }
                }
            }
        }
    };
    html! {
        section aria-labelledby="guest" {
            h2 id="guest" { "The guest" }
            (wide("RAM blocks of the guest", &table))
        }
    }
}

fn configuration(text: &str) -> Markup {
    html! {
        section aria-labelledby="configuration" {
            h2 id="configuration" { "The configuration used" }
            p.note { "With every default filled in, as " code { "memferry check" } " prints it." }
            (wide("The configuration", &html! { pre { code { (clean(text)) } } }))
        }
    }
}

/// Wraps content that may be wider than a phone in a box that scrolls.
fn wide(label: &str, content: &Markup) -> Markup {
    html! { div.wide role="region" aria-label=(label) tabindex="0" { (content) } }
}

/// A table of `rows` rows. A long one is collapsed.
fn long(label: &str, rows: usize, table: &Markup) -> Markup {
    if rows <= FOLDED {
        return wide(label, table);
    }
    html! { details { summary { (label) ", " (human::exact(rows as u64)) " lines" } (wide(label, table)) } }
}

/// Makes text from outside harmless to the text around it: control characters and characters that change the
/// direction of writing are escaped.
fn clean(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for character in text.chars() {
        if is_unsafe(character) && !matches!(character, '\n' | '\t') {
            clean.extend(character.escape_unicode());
        } else {
            clean.push(character);
        }
    }
    clean
}

/// Formats a time of the report.
fn ms(ms: f64) -> String {
    human::time(duration(ms))
}

fn duration(ms: f64) -> Duration {
    Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default()
}

#[cfg(test)]
mod tests;
