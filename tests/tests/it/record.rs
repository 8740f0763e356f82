//! Records a guest with each log that it may have: writes are found, and no resources leak.

use std::collections::BTreeSet;
use std::time::Duration;

use memferry::guest::{RunState, SourceGuest};
use memferry_guests::workload::{Fill, FreeSettings, LogChoice, Pattern, Workload, WorkloadSettings};
use memferry_plan::record::{RecordError, RecordSettings, Recorded, record, record_watched};
use memferry_plan::trace::{Trace, read};
use memferry_tests::foreseen::writer;
use memferry_tests::skipped;
use tokio_util::sync::CancellationToken;

const PAGES: u64 = 4096;

fn settings(length: Option<Duration>) -> RecordSettings {
    RecordSettings { interval: Duration::from_millis(50), length, zstd_level: 1, settings: "# none".into() }
}

/// 16 MiB, of which pages 1024 to 1536 are written one after another, each eight times per second.
fn workload(dirty_log: LogChoice) -> WorkloadSettings {
    WorkloadSettings {
        memory: PAGES << 12,
        dirty_log,
        fill: Fill { zero: 0.5, text: 0.5, random: 0.0, process: 0.0 },
        writers: vec![writer(Pattern::Sequential, 4096.0, 128, (0.25, 0.375))],
        ..WorkloadSettings::default()
    }
}

fn written(trace: &Trace) -> BTreeSet<u64> {
    trace.intervals.iter().flat_map(|interval| interval.written.runs()).flatten().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_log_finds_what_is_written_and_nothing_else_and_can_be_used_again() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("trace");
    for log in [LogChoice::Software, LogChoice::Userfault, LogChoice::Hash] {
        let guest = match Workload::source(workload(log)) {
            Ok(guest) => guest,
            Err(why) => {
                skipped(format_args!("{log:?}: {why}"));
                continue;
            }
        };
        for _ in 0..2 {
            // Until each page is written four times, counted from a recorded interval.
            let (cancel, writer) = (CancellationToken::new(), guest.clone());
            let (enough, mut end) = (cancel.clone(), None);
            let watch = move |_: &Recorded| {
                let writes = writer.status().writes;
                if writes >= *end.get_or_insert(writes + 4 * 512) {
                    enough.cancel();
                }
            };
            let recorded = record_watched(guest.clone(), settings(None), &file, cancel, watch).await;
            let recorded = match recorded {
                Err(RecordError::Guest(why)) if log == LogChoice::Userfault => {
                    skipped(format_args!("{log:?}: {why}"));
                    break;
                }
                recorded => recorded.unwrap(),
            };
            let trace = read(&file).unwrap();
            assert_eq!(trace.intervals.len() as u64, recorded.intervals);
            assert_eq!(written(&trace), (1024..1536).collect(), "{log:?}");
            assert_eq!(trace.guest.pages(), PAGES);
            assert_eq!(trace.guest.rearms_late, log == LogChoice::Hash);
            assert!(trace.samples.whole[1].pages > 0 && trace.samples.read.pages > 0, "{log:?}");
            let deltas = trace.samples.deltas.iter().map(|deltas| deltas.again.deltas + deltas.rested.deltas);
            let deltas: u64 = deltas.sum();
            assert!(deltas > 0, "{log:?}: {:?}", trace.samples.deltas);
            assert_eq!(guest.run_state(), RunState::Running);
        }
        assert_eq!(guest.check_all().stale_pages, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_ends_a_recording_that_is_kept_unless_nothing_was_recorded() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("trace");
    let guest = Workload::source(workload(LogChoice::Software)).unwrap();
    let cancel = CancellationToken::new();
    cancel.cancel();
    let nothing = record(guest.clone(), settings(None), &file, cancel).await;
    assert!(matches!(nothing, Err(RecordError::Nothing)), "{nothing:?}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);

    let cancel = CancellationToken::new();
    let soon = cancel.clone();
    let watch = move |recorded: &Recorded| {
        if recorded.intervals == 3 {
            soon.cancel();
        }
    };
    let recorded = record_watched(guest, settings(None), &file, cancel, watch).await.unwrap();
    assert_eq!(recorded.intervals, 3);
    assert_eq!(read(&file).unwrap().length(), recorded.length);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_unplugged_is_no_part_of_it_and_the_balloon_is_given_back() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("trace");
    let free = FreeSettings { share: 0.25, turns_per_second: 20.0, range_pages: 16 };
    let settings_of_guest = WorkloadSettings { unplugged: 0.25, free: Some(free), ..workload(LogChoice::Software) };
    let guest = Workload::source(settings_of_guest).unwrap();
    let length = Some(Duration::from_millis(300));
    for _ in 0..2 {
        record(guest.clone(), settings(length), &file, CancellationToken::new()).await.unwrap();
        let trace = read(&file).unwrap();
        assert_eq!((trace.guest.pages(), trace.guest.excluded), (PAGES / 4 * 3, PAGES / 4));
        assert!(written(&trace).iter().all(|&page| page < PAGES / 4 * 3));
    }
    assert_eq!(guest.check_all().stale_pages, 0);
}
