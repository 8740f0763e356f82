//! Cancels migrations in every phase and over every kind of transport, repeatedly: the source guest always continues,
//! and no resources leak.
//!
//! A binary of its own, with one test: it counts the threads and descriptors of the whole process.

use std::sync::Arc;
use std::time::Duration;

use memferry::events::{Event, Outcome, Phase, Role};
use memferry::settings::{After, SourceSettings};
use memferry_stages::geometry::PageSize;
use memferry_tests::guest::GuestCall;
use memferry_tests::leftovers::Census;
use memferry_tests::{Recorder, TestGuest, Trouble, migrate_watched, run, source_settings};
use memferry_transports::memory::MemoryTransport;
use memferry_transports::{Address, Transport, open};
use tokio_util::sync::CancellationToken;

/// No migration here takes this long unless it hangs.
const HANG: Duration = Duration::from_secs(60);
const LENGTHS: [u64; 2] = [(3 << 20) + 100, 4097];

/// The event of the source at which it is cancelled.
const POINTS: [fn(&Event) -> bool; 10] = [
    |event| *event == Event::Phase(Phase::Setup),
    |event| matches!(event, Event::Connected { .. }),
    |event| matches!(event, Event::Guest { .. }),
    |event| *event == Event::Phase(Phase::Active),
    |event| matches!(event, Event::RoundScanned { round: 1 }),
    |event| matches!(event, Event::RoundSent { .. }),
    |event| matches!(event, Event::Synced { .. }),
    |event| matches!(event, Event::Decided(_)),
    |event| *event == Event::Phase(Phase::Switchover),
    |event| *event == Event::Paused,
];

fn settings(address: &str) -> SourceSettings {
    let after = address.starts_with("file").then_some(After::Resume);
    let connections = if after.is_some() { 1 } else { 2 };
    SourceSettings { max_rounds: 2, after, ..source_settings(2, connections) }
}

fn transport(address: &str) -> Arc<dyn Transport> {
    match address.parse::<Address>() {
        Ok(address) => open(&address, Duration::from_secs(5)).into(),
        Err(_) => Arc::new(MemoryTransport::new(64 << 10)),
    }
}

/// Migrates and cancels at an event of the source; the guest continues.
fn cancelled_at(source: &Arc<TestGuest>, address: &str, when: fn(&Event) -> bool) {
    let cancel = CancellationToken::new();
    let token = cancel.clone();
    let recorder = Recorder::calling(move |role, event| {
        if role == Role::Source && when(event) {
            token.cancel();
        }
    });
    cancelled(source, address, cancel, recorder);
}

/// Migrates and cancels while the guest's log blocks; the log is then released, and stopped after that.
fn cancelled_while_the_log_waits(source: &Arc<TestGuest>, trouble: Trouble) {
    source.trouble(trouble);
    let (cancel, guest) = (CancellationToken::new(), source.clone());
    let token = cancel.clone();
    let canceller = std::thread::spawn(move || {
        guest.until_the_log_waits();
        token.cancel();
        // Time for a faulty source to proceed.
        std::thread::sleep(Duration::from_millis(50));
        guest.repair();
    });
    cancelled(source, "memory", cancel, Recorder::default());
    canceller.join().unwrap();
}

/// Migrates until `cancel`; the guest continues.
fn cancelled(source: &Arc<TestGuest>, address: &str, cancel: CancellationToken, recorder: Recorder) {
    let (calls_before, settings) = (source.take_calls(), settings(address));
    let destination = Arc::new(TestGuest::destination());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let moving = async {
        if settings.after.is_some() {
            return run::source(source.clone(), transport(address), settings, Arc::new(recorder), cancel).await;
        }
        let (to, way) = (destination.clone(), transport(address));
        let ends = migrate_watched(source.clone(), to, way, settings, cancel, recorder).await;
        ends.check_law_seven(source, &destination);
        ends.source
    };
    let ended = runtime.block_on(async { tokio::time::timeout(HANG, moving).await.expect("it hangs") });
    assert_eq!(ended.outcome, Outcome::Cancelled, "{address}: {:?}, before it {calls_before:?}", ended.error);
    assert_eq!(source.was_called(GuestCall::Pause), source.was_called(GuestCall::Resume));
    assert_eq!(source.was_called(GuestCall::Pause), ended.downtime.is_some());
    assert_eq!(ended.downtime.unwrap_or_default(), ended.parts.total(), "{:?}", ended.parts);
    assert_eq!(source.was_called(GuestCall::Release), source.was_called(GuestCall::Reacquire));
    assert!(!source.was_called(GuestCall::Committed) && !destination.was_called(GuestCall::Start));
    assert!(!source.log().is_armed(), "{address}: the log was not stopped");
    assert_eq!(source.log().misused(), None, "{address}");
    source.wait_for_writes();
}

#[test]
fn cancelled_thirty_times_in_a_row_it_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let file = format!("file:{}", dir.path().join("stream").display());
    let source = TestGuest::source(PageSize::DEFAULT, &LENGTHS).paced(Duration::from_micros(500)).running(2);
    // The first run of all opens resources that the runtime retains for the whole process.
    cancelled_at(&source, "tcp:127.0.0.1:0", POINTS[0]);
    let before = Census::take();

    for address in ["memory", "tcp:127.0.0.1:0", &file] {
        for when in POINTS {
            cancelled_at(&source, address, when);
        }
    }
    // Within an operation that cannot be interrupted: the log is still stopped after it.
    for trouble in [Trouble::LogStartWaits, Trouble::SyncWaits] {
        cancelled_while_the_log_waits(&source, trouble);
    }

    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "a file was left behind");
    before.wait_until_as_before();

    drop(source.take_calls());
    let destination = Arc::new(TestGuest::destination());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let way = transport("memory");
    let (cancel, recorder) = (CancellationToken::new(), Recorder::default());
    let moving = migrate_watched(source.clone(), destination.clone(), way, settings("memory"), cancel, recorder);
    let ends = runtime.block_on(moving);
    assert_eq!(ends.source.outcome, Outcome::Completed, "{:?}", ends.source.error);
    assert!(source.bytes() == destination.bytes(), "the two memories differ");
}
