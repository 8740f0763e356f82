//! The metrics in Prometheus's format: `http://ADDRESS/metrics`, for as long as the program lives.
//! They are those of [`MetricsObserver`](super::MetricsObserver), and the process's own ([`process`]).

use std::time::Duration;

use hyper::header::ALLOW;
use hyper::{Method, StatusCode};
use memferry_transports::{Address, open};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio_util::sync::CancellationToken;

use super::{BUCKETS, process};
use crate::http::{self, Answer, Answerer, Asked, whole};

/// The path of the metrics.
const PATH: &str = "/metrics";
/// The text format of Prometheus.
const FIGURES: &str = "text/plain; version=0.0.4";
const WORDS: &str = "text/plain";
/// The time limit for resolving a name.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often the values of histograms are merged, whether or not they are read.
const UPKEEP: Duration = Duration::from_secs(5);

/// Installs a recorder in this process that Prometheus can scrape at `address` (`127.0.0.1:9464`; port 0 chooses a
/// free port), and returns the URL. It runs on the control plane's runtime, so that no stage delays a scrape.
///
/// # Errors
/// If the address is invalid, in use or not permitted, or if this process already has a recorder.
///
/// # Panics
/// Outside a runtime.
pub async fn serve(address: &str) -> Result<String, String> {
    let refuse = |why: &dyn std::fmt::Display| format!("--metrics {address}: {why}");
    let socket = parse(address).map_err(|why| refuse(&why))?;
    let listener = open(&socket, PATIENCE).listen().await.map_err(|error| refuse(&error))?;
    let recorder = builder().build_recorder();
    let figures = Figures(recorder.handle());
    metrics::set_global_recorder(recorder).map_err(|error| refuse(&error))?;
    process::describe();
    let url = format!("http://{}{PATH}", listener.local_address().trim_start_matches("tcp:"));
    tokio::spawn(keep_up(figures.0.clone()));
    tokio::spawn(http::serve(listener, figures, CancellationToken::new()));
    Ok(url)
}

fn parse(text: &str) -> Result<Address, String> {
    let parsed = format!("tcp:{text}").parse::<Address>();
    parsed.map_err(|error| format!("{}; write a host and a port, as in 127.0.0.1:9464", error.why))
}

/// Histograms have buckets, which can be added up over hosts; summaries cannot.
fn builder() -> PrometheusBuilder {
    BUCKETS.iter().fold(PrometheusBuilder::new(), |builder, (name, buckets)| {
        builder.set_buckets_for_metric(Matcher::Full((*name).to_owned()), buckets).expect("there are buckets")
    })
}

async fn keep_up(handle: PrometheusHandle) {
    loop {
        tokio::time::sleep(UPKEEP).await;
        handle.run_upkeep();
    }
}

/// The page of metrics.
#[derive(Clone)]
struct Figures(PrometheusHandle);

impl Figures {
    /// The current page.
    fn render(&self) -> String {
        process::collect();
        with_counters(&self.0.render())
    }
}

/// Seconds that only increase are recorded as gauges, because counters are integers: here each is declared as a
/// counter.
fn with_counters(page: &str) -> String {
    let line = |line: &str| match line.strip_suffix("_total gauge").filter(|line| line.starts_with("# TYPE ")) {
        Some(name) => format!("{name}_total counter\n"),
        None => format!("{line}\n"),
    };
    page.lines().map(line).collect()
}

impl Answerer for Figures {
    async fn answer(&self, asked: Asked) -> Answer {
        match (asked.uri().path(), asked.method()) {
            (PATH, &Method::GET | &Method::HEAD) => whole(StatusCode::OK, FIGURES, self.render()),
            (PATH, _) => {
                let mut answer = whole(StatusCode::METHOD_NOT_ALLOWED, WORDS, "figures are only to be read: GET\n");
                answer.headers_mut().insert(ALLOW, "GET, HEAD".parse().expect("a header's value"));
                answer
            }
            _ => whole(StatusCode::NOT_FOUND, WORDS, format!("there is nothing here; the figures are at {PATH}\n")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_every_figure_of_the_process_and_counters_are_counters() {
        let recorder = builder().build_recorder();
        let figures = Figures(recorder.handle());
        let page = metrics::with_local_recorder(&recorder, || {
            process::describe();
            metrics::gauge!("test_seconds_total").increment(0.25);
            figures.render()
        });
        let rows = include_str!("process.rs").lines().filter_map(|line| line.strip_prefix("//! | `process_"));
        let listed: Vec<_> =
            rows.map(|row| row.split('|').map(|cell| cell.trim_matches([' ', '`'])).collect::<Vec<_>>()).collect();
        let shown = page.lines().filter(|line| line.starts_with("# TYPE process_")).count();
        assert_eq!(listed.len(), shown, "{page}");
        for row in listed {
            assert!(page.contains(&format!("# TYPE process_{} {}\n", row[0], row[1])), "{row:?} in {page}");
            assert!(page.contains(&format!("\nprocess_{} ", row[0])), "{row:?} in {page}");
        }
        assert!(
            page.contains("# TYPE test_seconds_total counter\n") && page.contains("test_seconds_total 0.25\n"),
            "{page}"
        );
    }
}
