//! The parts of the downtime, beside the controller's forecast of them.

use std::time::Duration;

use maud::{Markup, html};

use super::chart;
use super::{Page, ms, wide};
use crate::{ForecastReport, Report};
use memferry::controller::Decision;
use memferry::events::DowntimeParts;
use memferry::human;
use memferry::values;

/// A part of the downtime.
struct Part {
    class: &'static str,
    name: &'static str,
    happened_ms: f64,
    /// `None` if the forecast has no such part.
    expected_ms: Option<f64>,
}

/// The downtime limit in force at the end; `None` at a destination.
pub(super) fn limit(page: &Page<'_>) -> Option<Duration> {
    limits(page).last().map(|limit| limit.1)
}

/// The downtime limit over time, as the progress events report it; empty at a destination.
pub(super) fn limits(page: &Page<'_>) -> Vec<(Duration, Duration)> {
    if page.is_destination() {
        return Vec::new();
    }
    let reported = page.account.series.samples().into_iter().map(|sample| (sample.at, sample.downtime_limit));
    let raised = page.decisions().filter_map(|(at, decided)| match decided.decision {
        Decision::RaiseLimit(limit) => Some((at, limit)),
        _ => None,
    });
    let mut limits: Vec<_> = reported.filter(|limit| !limit.1.is_zero()).chain(raised).collect();
    limits.sort_by_key(|limit| limit.0);
    limits.insert(0, (page.zero(), page.settings.downtime_limit));
    limits
}

pub(super) fn section(page: &Page<'_>) -> Markup {
    let report = page.report;
    let Some(downtime) = report.end.downtime_ms else { return html! {} };
    let parts = parts(report);
    let limit = limit(page).map(|limit| limit.as_secs_f64() * 1e3);
    let expected = report.end.forecast.map_or(0.0, |forecast| forecast.expected_ms);
    // A distant limit would leave no room for the parts.
    let limit = limit.filter(|limit| *limit < 4.0 * downtime.max(expected));
    let whole = downtime.max(expected).max(limit.unwrap_or(0.0)) * 1.02;
    html! {
        section aria-labelledby="downtime" {
            h2 id="downtime" { "The downtime and its parts" }
            figure {
                p.caption {
                    @for part in &parts { (chart::key(part.class, part.name)) }
                    @if let Some(limit) = limit { (chart::line_key("limit", &format!("limit {}", ms(limit)))) }
                }
                p.caption {
                    b { "It was " (ms(downtime)) }
                    @if !page.was_handed_over() { ", until the guest was resumed at its source" }
                }
                (bar("The downtime's parts", &parts, whole, limit, |part| Some(part.happened_ms)))
                @if let Some(forecast) = &report.end.forecast {
                    p.caption { b { "The forecast was " (ms(forecast.expected_ms)) } (off(forecast)) }
                    (bar("The forecast's parts", &parts, whole, limit, |part| part.expected_ms))
                }
            }
            (wide("The downtime's parts", &table(&parts, downtime, report.end.forecast.as_ref())))
        }
    }
}

fn off(forecast: &ForecastReport) -> String {
    let rest = human::bytes(forecast.remaining_bytes);
    let error = forecast.error_percent.map(|error| format!(", {error:+.1} % off")).unwrap_or_default();
    format!("{error}; it counted on {rest} to be sent")
}

fn parts(report: &Report) -> Vec<Part> {
    let DowntimeParts {
        pause,
        state,
        final_sync,
        final_transfer,
        load,
        verify,
        durable,
        prepare,
        start,
        handover,
        resume,
    } = report.end.downtime;
    let part = |class, name, happened, of: fn(&ForecastReport) -> f64| Part {
        class,
        name,
        happened_ms: values::ms(happened),
        expected_ms: report.end.forecast.as_ref().map(of),
    };
    let mut parts = vec![
        part("part-pause", "pause", pause, |forecast| forecast.pause_ms),
        part("part-state", "device state", state, |forecast| forecast.state_ms),
        part("part-sync", "last sync", final_sync, |forecast| forecast.sync_ms),
        part("part-transfer", "transfer", final_transfer, |forecast| forecast.transfer_ms),
        part("part-load", "load", load, |forecast| forecast.load_ms),
        part("part-verify", "verify", verify, |forecast| forecast.verify_ms),
        part("part-durable", "durable write", durable, |forecast| forecast.durable_ms),
        part("part-prepare", "prepare", prepare, |forecast| forecast.prepare_ms),
        part("part-start", "start", start, |forecast| forecast.start_ms),
        part("part-handover", "handover", handover, |forecast| forecast.handover_ms),
    ];
    if !resume.is_zero() {
        parts.push(part("part-resume", "resume", resume, |_| 0.0));
    }
    parts
}

fn bar(what: &str, parts: &[Part], whole: f64, limit: Option<f64>, of: impl Fn(&Part) -> Option<f64>) -> Markup {
    let named: Vec<_> = parts
        .iter()
        .filter_map(|part| of(part).map(|time| (part.class, time / whole, format!("{} {}", part.name, ms(time)))))
        .collect();
    let words: Vec<_> = named.iter().map(|part| part.2.as_str()).collect();
    chart::bar(&format!("{what}: {}", words.join(", ")), &named, 26, limit.map(|limit| limit / whole))
}

fn table(parts: &[Part], downtime: f64, forecast: Option<&ForecastReport>) -> Markup {
    let cell =
        |ms_: Option<f64>| html! { td { @match ms_ { Some(time) => data value=(time) { (ms(time)) }, None => "–" } } };
    html! {
        table {
            thead { tr { th scope="col" { "Part" } th scope="col" { "It was" } th scope="col" { "Forecast" } th scope="col" { "Share" } } }
            tbody {
                @for part in parts {
                    tr {
                        th scope="row" { (chart::key(part.class, part.name)) }
                        (cell(Some(part.happened_ms)))
                        (cell(part.expected_ms))
                        td { (format!("{:.0} %", part.happened_ms / downtime.max(1e-9) * 100.0)) }
                    }
                }
                tr.sum {
                    th scope="row" { "Together" }
                    (cell(Some(downtime)))
                    (cell(forecast.map(|forecast| forecast.expected_ms)))
                    td { "100 %" }
                }
            }
        }
    }
}
