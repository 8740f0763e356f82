//! A workload whose memory is mostly free: hinted pages are not sent, and pages that are continuously allocated,
//! written and freed arrive.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use memferry::events::{Event, Outcome, Role};
use memferry::guest::SourceGuest;
use memferry::settings::{EncoderSettings, SourceSettings};
use memferry_guests::workload::{
    Fill, FreeSettings, LogChoice, Pattern, Region, SharedSettings, Workload, WorkloadSettings, WriterSettings,
};
use memferry_stages::dirty_log::UserfaultLog;
use memferry_tests::run::Ends;
use memferry_tests::run::keeping;
use memferry_tests::{Recorder, sample, skipped, source_settings};
use tokio_util::sync::CancellationToken;

use super::guest::move_guest;

/// The number of runs in the sample.
const RUNS: u64 = 3;

fn move_workload(settings: WorkloadSettings, sending: SourceSettings, recorder: Recorder) -> (Ends, Arc<Workload>) {
    let shared = settings.shared.as_ref().map(|shared| shared.path.clone());
    let source = Workload::source(settings).unwrap();
    let (builder, built) = keeping(shared.map_or_else(Workload::destination, Workload::destination_sharing));
    let ends = move_guest(source, builder, sending, CancellationToken::new(), recorder);
    assert_eq!(ends.source.outcome, Outcome::Completed, "{:?}, {:?}", ends.source.error, ends.destination.error);
    assert_eq!((ends.source.verified, ends.destination.verified), (Some(true), Some(true)));
    (ends, built.get().expect("it has arrived").clone())
}

fn free(share: f64, turns_per_second: f64, range_pages: u32) -> Option<FreeSettings> {
    Some(FreeSettings { share, turns_per_second, range_pages })
}

fn random_fill() -> Fill {
    Fill { zero: 0.0, text: 0.0, random: 1.0, process: 0.0 }
}

#[test]
fn a_guest_with_80_percent_free_sends_about_20() {
    let memory = 64 << 20;
    let settings = WorkloadSettings {
        memory,
        blocks: 2,
        dirty_log: LogChoice::Software,
        fill: random_fill(),
        free: free(0.8, 0.0, 64),
        ..WorkloadSettings::default()
    };
    // The memory in use comes first, and takes long enough for the balloon's first walk on a busy machine.
    let sending = SourceSettings {
        encoder: EncoderSettings { compress: None, xbzrle: None },
        max_bandwidth: Some(16 << 20),
        ..source_settings(2, 2)
    };
    let (ends, destination) = move_workload(settings, sending, Recorder::default());
    #[expect(clippy::cast_precision_loss, reason = "a share")]
    let share = ends.source.wire_bytes as f64 / memory as f64;
    println!("{:.1} % of the memory went over the wire", share * 100.0);
    assert!((0.2..0.25).contains(&share), "{share} of the memory was sent");
    assert!(ends.source.excluded.hinted > 75 * memory / 4096 / 100, "{:?}", ends.source.excluded);
    destination.pause().unwrap();
    assert_eq!(destination.check_all().first_stale, None);
}

/// One run: threads hint, allocate, write and free small ranges as fast as they can, in rounds that a bandwidth limit
/// makes long. If the machine is too busy to hint much, the rounds are made longer.
fn torture(seed: u64) {
    let mut cap = 60 << 20;
    while !torture_over(seed, cap) {
        cap /= 2;
    }
}

/// As [`torture`], over this many bytes per second; false if too few pages were hinted for a valid run.
fn torture_over(seed: u64, cap: u64) -> bool {
    let logs = [LogChoice::Software, LogChoice::Userfault];
    let dirty_log = logs[usize::try_from(seed).unwrap() % logs.len()];
    if dirty_log == LogChoice::Userfault
        && let Err(why) = UserfaultLog::supported()
    {
        skipped(format_args!("userfault log: {why}"));
        return true;
    }
    let writer = WriterSettings { pattern: Pattern::Uniform, pages_per_second: 20e3, bytes: 64, region: Region::ALL };
    let settings = WorkloadSettings {
        memory: 24 << 20,
        blocks: 3,
        dirty_log,
        fill: Fill::default(),
        free: free(0.7, 0.0, [1, 3, 16, 100][usize::try_from(seed).unwrap() % 4]),
        writers: vec![writer],
        seed,
        ..WorkloadSettings::default()
    };
    let settings = WorkloadSettings {
        free: settings.free.map(|free| FreeSettings { turns_per_second: f64::INFINITY, ..free }),
        ..settings
    };
    let sending = SourceSettings {
        max_rounds: 8,
        max_bandwidth: Some(cap),
        downtime_limit: Duration::from_micros(1),
        ..source_settings(2, 2)
    };
    let (ends, destination) = move_workload(settings, sending, Recorder::default());
    let hinted = ends.source.excluded.hinted;
    // The guest continues at the destination, checks its own writes there, and checks all pages at the end.
    let arrived = destination.status().writes_since_start_here;
    while destination.status().writes_since_start_here < arrived + 2000 {
        std::thread::sleep(Duration::from_millis(1));
    }
    destination.pause().unwrap();
    let status = destination.check_all();
    assert_eq!(status.first_stale, None, "run {seed}: {} stale pages", status.stale_pages);
    assert!(cap > 1 << 20 || hinted > 1000, "run {seed}: the torture hinted only {hinted} pages");
    hinted > 1000
}

#[test]
fn ranges_that_are_hinted_taken_and_written_all_the_time_lose_no_page() {
    let (runs, first) = (sample::count(RUNS), sample::seed());
    for run in 0..runs {
        torture(first.wrapping_add(run));
    }
    println!("{runs} runs without a stale page");
}

fn shared(folder: &Path) -> WorkloadSettings {
    WorkloadSettings {
        memory: 16 << 20,
        blocks: 2,
        fill: random_fill(),
        free: free(0.25, 100.0, 16),
        unplugged: 0.25,
        shared: Some(SharedSettings { path: folder.join("shared"), bytes: 1 << 20 }),
        ..WorkloadSettings::default()
    }
}

#[test]
fn all_three_together_in_every_log() {
    for dirty_log in [LogChoice::Software, LogChoice::Userfault, LogChoice::Hash] {
        if dirty_log == LogChoice::Userfault
            && let Err(why) = UserfaultLog::supported()
        {
            skipped(format_args!("userfault log: {why}"));
            continue;
        }
        let folder = tempfile::tempdir().unwrap();
        let settings = WorkloadSettings { dirty_log, ..shared(folder.path()) };
        // One lane's queues hold less than the memory before the free memory. Without a pace, the scanner on a busy
        // host may reach the end before the balloon's first report; a slower pace gives it more time.
        let mut cap = 32 << 20;
        loop {
            let sending = SourceSettings { max_bandwidth: Some(cap), ..source_settings(1, 1) };
            let (ends, destination) = move_workload(settings.clone(), sending, Recorder::default());
            let excluded = ends.source.excluded;
            assert_eq!((excluded.unplugged, excluded.ignored), (1024, 256), "{dirty_log:?}");
            destination.pause().unwrap();
            let status = destination.check_all();
            assert_eq!((status.first_stale, status.pages_checked >= 256), (None, true));
            if (excluded.hinted > 0) == (dirty_log != LogChoice::Hash) {
                break;
            }
            assert!(dirty_log != LogChoice::Hash && cap > 1 << 20, "{dirty_log:?}: {excluded:?}");
            cap /= 2;
        }
    }
}

#[test]
fn memory_is_plugged_before_or_after_a_migration_and_not_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let source = Workload::source(shared(folder.path())).unwrap();
    let tried = Arc::new(std::sync::Mutex::new(None));
    let (guest, result) = (source.clone(), tried.clone());
    let recorder = Recorder::calling(move |role, event| {
        if role == Role::Source && matches!(event, Event::RoundScanned { round: 1 }) {
            *result.lock().unwrap() = Some(guest.plug());
        }
    });
    let (builder, built) = keeping(Workload::destination_sharing(folder.path().join("shared")));
    let ends = move_guest(source.clone(), builder, source_settings(1, 1), CancellationToken::new(), recorder);
    assert_eq!(ends.source.outcome, Outcome::Completed, "{:?}", ends.source.error);
    let error = tried.lock().unwrap().take().unwrap().unwrap_err().to_string();
    assert!(error.contains("memory cannot be plugged while the guest is migrated"), "{error}");
    let destination = built.get().unwrap().clone();
    destination.plug().unwrap();

    // Continues from there, with all of the memory.
    let next = Workload::destination_sharing(folder.path().join("shared"));
    let ends = move_guest(destination, next, source_settings(1, 1), CancellationToken::new(), Recorder::default());
    assert_eq!(ends.source.outcome, Outcome::Completed, "{:?}", ends.source.error);
    assert_eq!((ends.source.excluded.unplugged, ends.source.excluded.ignored), (0, 256));
}

#[test]
fn a_shared_block_of_another_length_is_refused_with_both_lengths() {
    let folder = tempfile::tempdir().unwrap();
    let other = folder.path().join("other");
    std::fs::write(&other, [0; 4096]).unwrap();
    let source = Workload::source(shared(folder.path())).unwrap();
    for (destination, expected) in [
        (Workload::destination_sharing(other), "the shared block has 1048576 bytes, and"),
        (Workload::destination(), "a shared block of 1048576 bytes came, and no file for it is named here"),
    ] {
        let ends = move_guest(
            source.clone(),
            destination,
            source_settings(1, 1),
            CancellationToken::new(),
            Recorder::default(),
        );
        let error = ends.source.error.unwrap();
        assert!(error.contains(expected), "{error}");
    }
}
