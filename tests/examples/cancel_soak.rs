//! How soon a cancel takes effect while every core is busy: a guest whose writers never rest is compressed as hard as can be,
//! and cancelled at a random moment, again and again.
//!
//! ```text
//! cargo run --release -p memferry-tests --example cancel_soak [-- RUNS]
//! ```

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use memferry::events::{Event, Phase, Role};
use memferry::settings::{EncoderSettings, SourceSettings};
use memferry_stages::codec::Codec;
use memferry_stages::geometry::PageSize;
use memferry_tests::run::{Recorder, migrate_watched};
use memferry_tests::{TestGuest, source_settings};
use memferry_transports::memory::MemoryTransport;
use tokio_util::sync::CancellationToken;

fn main() {
    let runs: u32 = std::env::args().nth(1).and_then(|runs| runs.parse().ok()).unwrap_or(40);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads");
    let mut times: Vec<Duration> = (0..runs).map(|run| runtime.block_on(cancel_once(run))).collect();
    times.sort();
    let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
    println!("{runs} cancels with all cores compressing: median {median:.1?}, worst {worst:.1?}");
}

/// From the cancel to the source's verdict. (Its stages end a little later, each with the batch it is at.)
async fn cancel_once(run: u32) -> Duration {
    let source = TestGuest::source(PageSize::DEFAULT, &[256 << 20]).running(2);
    let destination = Arc::new(TestGuest::destination());
    let settings = SourceSettings {
        encoder: EncoderSettings { compress: Some(Codec::Zstd { level: 19 }), xbzrle: None },
        max_rounds: u32::MAX,
        downtime_limit: Duration::from_micros(1),
        ..source_settings(4, 4)
    };
    let cancel = CancellationToken::new();
    let verdict = Arc::new(OnceLock::new());
    let told = verdict.clone();
    let recorder = Recorder::calling(move |role, event| {
        if role == Role::Source && matches!(event, Event::Phase(Phase::Cancelled)) {
            told.get_or_init(Instant::now);
        }
    });
    let migration = tokio::spawn(migrate_watched(
        source.clone(),
        destination,
        Arc::new(MemoryTransport::new(1 << 20)),
        settings,
        cancel.clone(),
        recorder,
    ));
    tokio::time::sleep(Duration::from_millis(300 + u64::from(run) * 37 % 700)).await;
    let asked = Instant::now();
    cancel.cancel();
    let ends = migration.await.expect("a migration does not panic");
    assert_eq!(ends.source.phase, Phase::Cancelled, "{:?}", ends.source.error);
    assert!(source.runs(), "the source guest goes on");
    verdict.get().expect("it was told").duration_since(asked)
}
