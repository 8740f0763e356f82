//! What held it up, and how every stage spent its time in every lane.

use maud::{Markup, html};

use super::chart;
use super::{FOLDED, Page, long, ms, wide};
use crate::{StageReport, busiest, readings};
use memferry::human;

/// The share of its time from which a stage that works is marked.
const MARKED: f64 = 0.5;
/// The way of a page through the stages, by which they are listed.
const WAY: [&str; 7] = ["bitmap sync", "scanner", "zero detector", "encoder", "sender", "receiver", "loader"];

pub(super) fn section(page: &Page<'_>) -> Markup {
    let report = page.report;
    if report.stages.is_empty() {
        return html! {};
    }
    let mut stages: Vec<_> = report.stages.iter().collect();
    stages.sort_by_key(|stage| (WAY.iter().position(|name| stage.name == *name).unwrap_or(WAY.len()), stage.lane));
    let readings = readings(page.account, page.other);
    let busiest = busiest(&readings).filter(|(_, share)| *share >= MARKED);
    let blamed = busiest.map(|(reading, _)| (reading.name, reading.lane));
    html! {
        section aria-labelledby="stages" {
            h2 id="stages" { "How the stages spent their time" }
            p.finding { strong { "Bottleneck: " } (report.bottleneck) "." }
            p.note {
                "Shares of the time. Those of max_bandwidth, destination, wire and guest (nothing to send) are parts of the senders' time; \
                 the processor's is what the stages used of all cores. Processor time of the whole process: " (ms(report.cpu_ms)) "."
            }
            p.note {
                "The stages stand in the order in which a page passes them. One that holds up the others works nearly all the time: those \
                 before it wait for room, those behind it wait for input. A sender that waits for room waits for the transport."
            }
            p.caption {
                (chart::key("busy", "busy"))
                (chart::key("output-wait", "waiting for room behind it"))
                (chart::key("limit-wait", "waiting for max_bandwidth"))
                (chart::key("input-wait", "waiting for input"))
            }
            @if stages.len() > FOLDED {
                @let joined = joined(&stages, blamed);
                p.note { "All lanes and connections of a stage together, and the busiest by itself; below is each by itself." }
                (wide("How the stages spent their time, all lanes together", &table(&joined.iter().collect::<Vec<_>>(), blamed)))
            }
            (long("How every stage spent its time in every lane", stages.len(), &table(&stages, blamed)))
        }
    }
}

/// Each stage with all its lanes together, and the one that is blamed by itself.
fn joined(stages: &[&StageReport], blamed: Option<(&str, Option<u16>)>) -> Vec<StageReport> {
    let mut joined: Vec<StageReport> = Vec::new();
    for stage in stages {
        if blamed == Some((stage.name.raw(), stage.lane)) {
            joined.push((*stage).clone());
        }
        match joined.iter_mut().find(|of| of.name == stage.name && of.lane.is_none()) {
            Some(all) => {
                all.busy_ms += stage.busy_ms;
                all.output_wait_ms += stage.output_wait_ms;
                all.limit_wait_ms += stage.limit_wait_ms;
                all.input_wait_ms += stage.input_wait_ms;
                all.batches += stage.batches;
                all.pages += stage.pages;
            }
            None if blamed == Some((stage.name.raw(), None)) => {}
            None => joined.push(StageReport { lane: None, ..(*stage).clone() }),
        }
    }
    joined
}

fn table(stages: &[&StageReport], blamed: Option<(&str, Option<u16>)>) -> Markup {
    html! {
        table.stages {
            thead {
                tr {
                    th scope="col" { "Stage" }
                    th.picture scope="col" { "Its time" }
                    @for head in ["Busy", "Waiting for room", "Waiting for the limit", "Waiting for input", "Batches", "Pages"] { th scope="col" { (head) } }
                }
            }
            tbody { @for stage in stages { (row(stage, blamed == Some((stage.name.raw(), stage.lane)))) } }
        }
    }
}

fn row(stage: &StageReport, is_blamed: bool) -> Markup {
    let parts = [
        ("busy", "busy", stage.busy_ms),
        ("output-wait", "waiting for room", stage.output_wait_ms),
        ("limit-wait", "waiting for max_bandwidth", stage.limit_wait_ms),
        ("input-wait", "waiting for input", stage.input_wait_ms),
    ];
    let life: f64 = parts.iter().map(|part| part.2).sum();
    let share = |time: f64| if life > 0.0 { time / life } else { 0.0 };
    let named = parts.map(|(class, what, time)| (class, share(time), format!("{what} {}", ms(time))));
    let words = named.iter().map(|part| format!("{} ({:.0} %)", part.2, part.1 * 100.0)).collect::<Vec<_>>().join(", ");
    html! {
        tr.blamed[is_blamed] {
            th scope="row" {
                (stage.name)
                @if let Some(lane) = stage.lane { " " span.lane { (place(stage.name.raw())) " " (lane) } }
                @if is_blamed { " " span.pill { "busiest" } }
            }
            td.picture { (chart::bar(&words, &named, 14, None)) }
            @for (_, _, time) in parts { td { data value=(time) { (format!("{:.0} %", share(time) * 100.0)) } " " span.note { (ms(time)) } } }
            td { data value=(stage.batches) { (human::exact(stage.batches)) } }
            td { data value=(stage.pages) { (human::exact(stage.pages)) } }
        }
    }
}

/// What a stage's number counts.
fn place(stage: &str) -> &'static str {
    if matches!(stage, "sender" | "receiver") { "connection" } else { "lane" }
}
