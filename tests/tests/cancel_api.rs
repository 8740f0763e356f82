//! A hundred consecutive migrations in one process, each cancelled over its control API at a different event: no
//! resources leak. A binary of its own, with one test: it counts the threads and
//! descriptors of the whole process.

use std::sync::Arc;
use std::time::Duration;

use memferry::control::Control;
use memferry::events::Outcome;
use memferry::guest::{RunState, SourceGuest};
use memferry::settings::{ConvergenceSettings, EncoderSettings, SourceSettings, StallStep};
use memferry_cli::api::{Server, client};
use memferry_guests::workload::Workload;
use memferry_tests::hot::Hot;
use memferry_tests::leftovers::Census;
use memferry_tests::{migrate, source_settings};
use memferry_transports::memory::MemoryTransport;
use memferry_transports::{Address, open};

fn settings() -> SourceSettings {
    SourceSettings {
        encoder: EncoderSettings { compress: None, xbzrle: None },
        max_bandwidth: Some(32 << 20),
        downtime_limit: Duration::from_nanos(1),
        // Nothing triggers a switchover, not even a round that leaves no dirty page.
        max_downtime: Some(Duration::from_nanos(1)),
        max_rounds: u32::MAX,
        convergence: ConvergenceSettings {
            on_stall: vec![StallStep::Throttle],
            stall_rounds: 1,
            cool_down_rounds: 1,
            ..ConvergenceSettings::default()
        },
        ..source_settings(2, 2)
    }
}

/// When a migration is cancelled.
#[derive(Clone, Copy, Debug, PartialEq)]
enum When {
    /// After this number of event lines.
    Lines(u64),
    /// At the decision to throttle.
    Throttles,
}

/// Cancels a migration of the guest over its control API.
fn cancelled(guest: &Arc<Hot>, socket: &Address, when: When) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let control = Control::new();
        let server = Server::listen(socket, control.clone(), Arc::new(|address| open(address, Duration::ZERO).into()))
            .await
            .unwrap();
        let transport = Arc::new(MemoryTransport::new(64 << 10));
        let moving = migrate(guest.clone(), Workload::destination(), transport, settings(), control.clone());
        let cancelling = async {
            // A client that reads the events to the end.
            let mut lines = client::events(socket).await.unwrap();
            let (mut read, mut last) = (0, String::new());
            let is_now = |read: u64, line: &str| match when {
                When::Lines(lines) => read >= lines,
                When::Throttles => line.contains(r#""decision":"throttle""#),
            };
            while !is_now(read, &last) {
                last = lines.next().await.unwrap().expect("it does not end by itself");
                read += 1;
            }
            client::cancel(socket).await.unwrap();
            while let Some(line) = lines.next().await.unwrap() {
                last = line;
            }
            assert!(last.contains(r#""event":"ended""#) && last.contains("cancelled"), "{last}");
        };
        let both = async { tokio::join!(moving, cancelling).0 };
        let ends = tokio::time::timeout(Duration::from_secs(60), both).await.expect("it hangs");
        assert_eq!(ends.source.outcome, Outcome::Cancelled, "{:?}", ends.source.error);
        let status = client::status(socket).await.unwrap();
        assert_eq!(status["ended"]["phase"], "cancelled");
        assert!(client::cancel(socket).await.unwrap_err().to_string().contains("over"));
        server.close().await;
    });
}

#[test]
fn a_hundred_cancels_leave_no_thread_descriptor_throttle_or_socket_behind() {
    let dir = tempfile::tempdir().unwrap();
    let socket = format!("unix:{}", dir.path().join("control.sock").display()).parse().unwrap();
    let guest = Arc::new(Hot::new());
    // The first run of all opens resources that the runtime retains for the whole process.
    cancelled(&guest, &socket, When::Lines(5));
    let before = Census::take();
    for run in 0..100_u64 {
        cancelled(&guest, &socket, if run % 10 == 9 { When::Throttles } else { When::Lines(run * 37 % 25) });
        assert_eq!(guest.run_state(), RunState::Running, "cancel {run}");
        let throttled = guest.throttled();
        assert_eq!(throttled.last().copied().unwrap_or(0), 0, "cancel {run}: {throttled:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "cancel {run} left its socket");
    }
    assert!(guest.throttled().iter().any(|&percent| percent > 0), "none of them throttled");
    before.wait_until_as_before();
}
