//! The metrics as Prometheus reads them: `http://ADDRESS/metrics`, for as long as the program lives.

use std::net::{SocketAddr, ToSocketAddrs};

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder};

use super::BUCKETS;

/// Makes the recorder of this process one that Prometheus can read at `address` (`127.0.0.1:9464`), from here on. On the
/// control plane's runtime, so that no stage delays a scrape.
///
/// # Errors
/// When the address is none, is in use or may not be had, or when this process has a recorder.
///
/// # Panics
/// Outside a runtime.
pub fn serve(address: &str) -> Result<(), String> {
    let refuse = |why: &dyn std::fmt::Display| format!("--metrics {address}: {why}");
    let socket = resolve(address).map_err(|why| refuse(&why))?;
    let built = builder().with_http_listener(socket).build();
    let (recorder, server) = built.map_err(|error| match error {
        BuildError::FailedToCreateHTTPListener(why) => refuse(&why),
        other => refuse(&other),
    })?;
    metrics::set_global_recorder(recorder).map_err(|error| refuse(&error))?;
    tokio::spawn(server);
    Ok(())
}

/// Histograms have buckets, which can be added up over hosts; summaries cannot.
fn builder() -> PrometheusBuilder {
    BUCKETS.iter().fold(PrometheusBuilder::new(), |builder, (name, buckets)| {
        builder.set_buckets_for_metric(Matcher::Full((*name).to_owned()), buckets).expect("there are buckets")
    })
}

fn resolve(address: &str) -> Result<SocketAddr, String> {
    let hint = "write a host and a port, as in 127.0.0.1:9464";
    let mut found = address.to_socket_addrs().map_err(|error| format!("{error}; {hint}"))?;
    found.next().ok_or_else(|| format!("no such host; {hint}"))
}
