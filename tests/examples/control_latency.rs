//! Measures the latency of the control API, and of a cancel over it, while every core is busy. A guest whose writers
//! never rest is compressed at the highest level, receives requests for its status and changes of settings, and is
//! cancelled at a different moment each time.
//!
//! ```text
//! cargo run --release -p memferry-tests --example control_latency [-- RUNS]
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use memferry::control::Control;
use memferry_cli::api::{Server, client};
use memferry_tests::busy::Busy;
use memferry_transports::{Address, open};

/// The duration of each request.
#[derive(Default)]
struct Times {
    get: Vec<Duration>,
    patch: Vec<Duration>,
    /// The answer to a cancel.
    cancel: Vec<Duration>,
    /// From the request to the source's verdict.
    verdict: Vec<Duration>,
}

fn main() {
    let runs: u64 = std::env::args().nth(1).and_then(|runs| runs.parse().ok()).unwrap_or(20);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads");
    let dir = tempfile::tempdir().expect("a folder");
    let socket = format!("unix:{}", dir.path().join("control.sock").display()).parse().expect("an address");
    let mut times = Times::default();
    (0..runs).for_each(|run| runtime.block_on(one(run, &socket, &mut times)));
    let Times { get, patch, cancel, verdict } = times;
    for (what, mut times) in [("GET", get), ("PATCH", patch), ("cancel answered", cancel), ("cancelled", verdict)] {
        times.sort();
        let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
        println!("{what}: {} times with all cores compressing: median {median:.1?}, worst {worst:.1?}", times.len());
    }
}

async fn one(run: u64, socket: &Address, times: &mut Times) {
    let control = Control::new();
    let server = Server::listen(socket, control.clone(), Arc::new(|address| open(address, Duration::ZERO).into()))
        .await
        .expect("a socket");
    let migration = Busy::begin(control);
    tokio::time::sleep(Duration::from_millis(200 + run * 37 % 300)).await;
    for number in 0..20_u64 {
        let asked = Instant::now();
        client::status(socket).await.expect("an answer");
        times.get.push(asked.elapsed());
        let limit = serde_json::json!({ "downtime_limit": 0.001 + 0.001 * f64::from(u32::try_from(number % 2).expect("0 or 1")) });
        let asked = Instant::now();
        client::set(socket, limit.as_object().expect("an object")).await.expect("an answer");
        times.patch.push(asked.elapsed());
        tokio::time::sleep(Duration::from_millis(7)).await;
    }
    let asked = Instant::now();
    client::cancel(socket).await.expect("an answer");
    times.cancel.push(asked.elapsed());
    times.verdict.push(migration.verdict().await.duration_since(asked));
    server.close().await;
}
