//! Measures the latency of a cancel while every core is busy: a guest whose writers never rest is compressed at the
//! highest level, and cancelled at a random moment, repeatedly.
//!
//! ```text
//! cargo run --release -p memferry-tests --example cancel_soak [-- RUNS]
//! ```

use std::time::{Duration, Instant};

use memferry_tests::busy::Busy;
use tokio_util::sync::CancellationToken;

fn main() {
    let runs: u32 = std::env::args().nth(1).and_then(|runs| runs.parse().ok()).unwrap_or(40);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads");
    let mut times: Vec<Duration> = (0..runs).map(|run| runtime.block_on(cancel_once(run))).collect();
    times.sort();
    let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
    println!("{runs} cancels with all cores compressing: median {median:.1?}, worst {worst:.1?}");
}

/// From the cancel to the source's verdict.
async fn cancel_once(run: u32) -> Duration {
    let cancel = CancellationToken::new();
    let migration = Busy::begin(cancel.clone());
    tokio::time::sleep(Duration::from_millis(300 + u64::from(run) * 37 % 700)).await;
    let asked = Instant::now();
    cancel.cancel();
    migration.verdict().await.duration_since(asked)
}
