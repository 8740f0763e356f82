//! The bottleneck, and how every stage in every lane spent its time.

use maud::{Markup, html};

use super::chart;
use super::{FOLDED, Page, long, ms, wide};
use crate::{busiest, readings};
use memferry::human;
use memferry::meter::Reading;
use memferry::stage_id::{StageAt, StageId};

/// A stage that works at least this share of its time is highlighted.
const MARKED: f64 = 0.5;

pub(super) fn section(page: &Page<'_>) -> Markup {
    let report = page.report;
    let mut readings = readings(page.account, page.other);
    if readings.is_empty() {
        return html! {};
    }
    // Kinds are ordered as a page passes them.
    readings.sort_by_key(|reading| reading.stage);
    let blamed = busiest(&readings).filter(|(_, share)| *share >= MARKED).map(|(reading, _)| reading.stage);
    html! {
        section aria-labelledby="stages" {
            h2 id="stages" { "How the stages spent their time" }
            p.finding { strong { "Bottleneck: " } (report.bottleneck) "." }
            p.note {
                "Shares of the time. Those of max_bandwidth, destination, wire and guest (nothing to send) are parts of the senders' time; \
                 the processor's is what the stages used of all cores. Processor time of the whole process: " (ms(report.end.cpu_ms)) "."
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
            @if readings.len() > FOLDED {
                @let joined = joined(&readings, blamed);
                p.note { "All lanes and connections of a stage together, and the busiest by itself; below is each by itself." }
                (wide("How the stages spent their time, all lanes together", &table(&joined, blamed)))
            }
            (long("How every stage spent its time in every lane", readings.len(), &table(&readings, blamed)))
        }
    }
}

/// Each stage with all its lanes combined; the bottleneck stage is also shown separately.
fn joined(readings: &[Reading], blamed: Option<StageId>) -> Vec<Reading> {
    let mut joined: Vec<Reading> = Vec::new();
    for reading in readings {
        let all = StageId { at: StageAt::Alone, ..reading.stage };
        if blamed == Some(reading.stage) {
            joined.push(reading.clone());
            if reading.stage == all {
                continue;
            }
        }
        match joined.iter_mut().find(|of| of.stage == all) {
            Some(all) => {
                all.busy += reading.busy;
                all.output_wait += reading.output_wait;
                all.limit_wait += reading.limit_wait;
                all.input_wait += reading.input_wait;
                all.batches += reading.batches;
                all.pages += reading.pages;
            }
            None => joined.push(Reading { stage: all, ..reading.clone() }),
        }
    }
    joined
}

fn table(readings: &[Reading], blamed: Option<StageId>) -> Markup {
    html! {
        table.stages {
            thead {
                tr {
                    th scope="col" { "Stage" }
                    th.picture scope="col" { "Its time" }
                    @for head in ["Busy", "Waiting for room", "Waiting for the limit", "Waiting for input", "Batches", "Pages"] { th scope="col" { (head) } }
                }
            }
            tbody { @for reading in readings { (row(reading, blamed == Some(reading.stage))) } }
        }
    }
}

fn row(reading: &Reading, is_blamed: bool) -> Markup {
    let parts = [
        ("busy", "busy", crate::ms(reading.busy)),
        ("output-wait", "waiting for room", crate::ms(reading.output_wait)),
        ("limit-wait", "waiting for max_bandwidth", crate::ms(reading.limit_wait)),
        ("input-wait", "waiting for input", crate::ms(reading.input_wait)),
    ];
    let life: f64 = parts.iter().map(|part| part.2).sum();
    let share = |time: f64| if life > 0.0 { time / life } else { 0.0 };
    let named = parts.map(|(class, what, time)| (class, share(time), format!("{what} {}", ms(time))));
    let words = named.iter().map(|part| format!("{} ({:.0} %)", part.2, part.1 * 100.0)).collect::<Vec<_>>().join(", ");
    html! {
        tr.blamed[is_blamed] {
            th scope="row" {
                (reading.stage.kind)
                @if reading.stage.at != StageAt::Alone { " " span.lane { (reading.stage.at) } }
                @if is_blamed { " " span.pill { "busiest" } }
            }
            td.picture { (chart::bar(&words, &named, 14, None)) }
            @for (_, _, time) in parts { td { data value=(time) { (format!("{:.0} %", share(time) * 100.0)) } " " span.note { (ms(time)) } } }
            td { data value=(reading.batches) { (human::exact(reading.batches)) } }
            td { data value=(reading.pages) { (human::exact(reading.pages)) } }
        }
    }
}
