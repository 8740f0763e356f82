//! Faults in the middle of whole migrations, with writers that never rest. After every failure the source guest
//! continues as it was, nothing was started elsewhere, the error says what failed, and the next migration moves every
//! byte.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use memferry::events::{Event, Outcome, Phase, Role};
use memferry::settings::{SourceSettings, Verify};
use memferry_stages::geometry::PageSize;
use memferry_tests::guest::{Fails, GuestCall};
use memferry_tests::{Ends, Recorder, TestGuest, Trouble, migrate_watched, sample, source_settings};
use memferry_transports::memory::{Direction, Faults, MemoryTransport};
use tokio_util::sync::CancellationToken;

/// No migration here takes this long unless it hangs.
const HANG: Duration = Duration::from_secs(60);
/// Two blocks whose lengths are not multiples of a page; two stretches, so that several lanes have work.
const LENGTHS: [u64; 2] = [(5 << 20) + 100, 4097];
/// The number of places at which a stream is cut, in each direction and with each number of lanes, in the sample.
const CUTS: u64 = 24;

fn settings(lanes: u16) -> SourceSettings {
    SourceSettings { max_rounds: 2, ..source_settings(lanes, lanes) }
}

fn source() -> TestGuest {
    TestGuest::source(PageSize::DEFAULT, &LENGTHS).paced(Duration::from_micros(500))
}

/// A migration over an in-memory transport.
struct Trial {
    transport: MemoryTransport,
    settings: SourceSettings,
    cancel: CancellationToken,
    recorder: Recorder,
}

impl Trial {
    fn new(lanes: u16) -> Self {
        Self {
            transport: MemoryTransport::new(64 << 10),
            settings: settings(lanes),
            cancel: CancellationToken::new(),
            recorder: Recorder::default(),
        }
    }

    fn faults(&self) -> Faults {
        self.transport.faults()
    }

    /// Runs it, and checks law 7 at its end.
    #[track_caller]
    fn run(self, source: &Arc<TestGuest>, destination: &Arc<TestGuest>) -> Ends {
        let Self { transport, settings, cancel, recorder } = self;
        drop(source.take_calls());
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let moving =
            migrate_watched(source.clone(), destination.clone(), Arc::new(transport), settings, cancel, recorder);
        let ends = runtime.block_on(async { tokio::time::timeout(HANG, moving).await.expect("it hangs") });
        ends.check_law_seven(source, destination);
        ends
    }
}

/// The same source, without faults: every byte arrives.
#[track_caller]
fn moves_now(source: &Arc<TestGuest>, lanes: u16) {
    let destination = Arc::new(TestGuest::destination());
    let ends = Trial::new(lanes).run(source, &destination);
    assert_eq!(ends.source.outcome, Outcome::Completed, "{:?}, {:?}", ends.source.error, ends.destination.error);
    assert!(source.bytes() == destination.bytes(), "the two memories differ");
    assert_eq!(ends.destination.verified, Some(true));
}

#[track_caller]
fn says(error: Option<&String>, words: &[&str]) {
    let error = error.expect("an error");
    for word in words {
        assert!(error.contains(word), "{word:?} is not in {error:?}");
    }
}

// ---- the connection ----

/// The bytes that an undisturbed migration moves in one direction.
fn bytes_moved(lanes: u16, direction: Direction) -> u64 {
    let trial = Trial::new(lanes);
    let faults = trial.faults();
    let ends = trial.run(&source().running(2), &Arc::new(TestGuest::destination()));
    assert_eq!(ends.source.outcome, Outcome::Completed, "{:?}", ends.source.error);
    faults.delivered(direction)
}

fn cut_everywhere(lanes: u16, direction: Direction) {
    let mut all = bytes_moved(lanes, direction);
    let mut source = self::source().running(2);
    let (mut failed, cuts) = (0, sample::count(CUTS));
    for cut in 0..cuts {
        // Both ends of the stream, with the handshakes, are cut byte by byte; the rest is cut evenly.
        let after = match cut {
            0..5 => 1 + 40 * cut,
            _ if cut + 5 >= cuts => all.saturating_sub((cuts - cut) * 7).max(1),
            _ => (all * cut / cuts).max(1),
        };
        let trial = Trial::new(lanes);
        let faults = trial.faults();
        faults.cut_after(direction, after);
        let destination = Arc::new(TestGuest::destination());
        let ends = trial.run(&source, &destination);
        if ends.source.outcome == Outcome::Failed {
            failed += 1;
            if cut % 8 != 7 {
                continue;
            }
            moves_now(&source, lanes);
        } else {
            // The amount and frequency of acknowledgements depend on the machine's speed.
            all = all.min(faults.delivered(direction));
        }
        source = self::source().running(2);
    }
    println!("{failed} of {cuts} cuts were in time");
    assert!(failed >= 5, "not even the cuts in the greeting were in time: {failed}");
}

#[test]
fn cut_on_the_way_to_the_destination() {
    cut_everywhere(1, Direction::ToDestination);
}

#[test]
fn cut_on_the_way_to_the_destination_with_three_lanes() {
    cut_everywhere(3, Direction::ToDestination);
}

#[test]
fn cut_on_the_return_path() {
    cut_everywhere(1, Direction::ToSource);
}

#[test]
fn cut_on_the_return_path_with_three_lanes() {
    cut_everywhere(3, Direction::ToSource);
}

/// Stalls the direction when the source enters a phase, and calls `then` a little later. When the source has ended,
/// the connection is cut, so that the destination notices.
fn stalled(
    lanes: u16,
    direction: Direction,
    at: Phase,
    then: fn(&Faults, &CancellationToken),
) -> (Ends, Arc<TestGuest>) {
    let mut trial = Trial::new(lanes);
    let (faults, cancel) = (trial.faults(), trial.cancel.clone());
    let once = Mutex::new(Some((faults.clone(), cancel)));
    trial.recorder = Recorder::calling(move |role, event| {
        if let (Role::Source, Event::Ended(ended)) = (role, event)
            && ended.outcome != Outcome::Completed
        {
            faults.cut();
        }
        if (role, event) == (Role::Source, &Event::Phase(at))
            && let Some((faults, cancel)) = once.lock().unwrap().take()
        {
            faults.stall(direction);
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(150)).await;
                then(&faults, &cancel);
            });
        }
    });
    let source = source().running(2);
    let destination = Arc::new(TestGuest::destination());
    let ends = trial.run(&source, &destination);
    if ends.source.outcome == Outcome::Completed {
        assert!(source.bytes() == destination.bytes(), "the two memories differ");
    }
    (ends, source)
}

#[test]
fn a_stall_that_ends_costs_time_only() {
    for direction in [Direction::ToDestination, Direction::ToSource] {
        for (lanes, at) in [(1, Phase::Setup), (1, Phase::Active), (3, Phase::Active), (1, Phase::Switchover)] {
            let (ends, _) = stalled(lanes, direction, at, |faults, _| faults.release(direction_of(faults)));
            assert_eq!(ends.source.outcome, Outcome::Completed, "{direction:?} at {at:?}: {:?}", ends.source.error);
        }
    }
}

/// Releases both directions; a direction that is not stalled is unaffected.
fn direction_of(faults: &Faults) -> Direction {
    faults.release(Direction::ToSource);
    Direction::ToDestination
}

#[test]
fn a_stall_does_not_hold_up_a_cancel() {
    for direction in [Direction::ToDestination, Direction::ToSource] {
        for (lanes, at) in [(1, Phase::Setup), (3, Phase::Active), (1, Phase::Switchover)] {
            // A source that waits for the stall to end would hang.
            let (ends, source) = stalled(lanes, direction, at, |_, cancel| cancel.cancel());
            assert_eq!(ends.source.outcome, Outcome::Cancelled, "{direction:?} at {at:?}: {:?}", ends.source.error);
            if at == Phase::Switchover {
                moves_now(&source, lanes);
            }
        }
    }
}

// ---- the guests ----

#[test]
fn a_guest_that_fails_at_any_call_continues_at_the_source() {
    let source_fails = [
        (Fails { pause: true, ..Fails::default() }, "at pause"),
        (Fails { save: true, ..Fails::default() }, "at save"),
        (Fails { release: true, ..Fails::default() }, "at release"),
    ];
    for (fails, word) in source_fails {
        let source = source().failing(fails).running(2);
        let ends = Trial::new(2).run(&source, &Arc::new(TestGuest::destination()));
        assert_eq!(ends.source.outcome, Outcome::Failed);
        says(ends.source.error.as_ref(), &["the guest failed", word]);
        says(ends.destination.error.as_ref(), &["the source gave up", word]);
    }
}

#[test]
fn a_destination_that_cannot_prepare_is_survived() {
    let source = source().running(2);
    let fails = Fails { prepare: true, ..Fails::default() };
    let ends = Trial::new(2).run(&source, &Arc::new(TestGuest::destination().failing(fails)));
    says(ends.source.error.as_ref(), &["the destination refused", "at prepare"]);
    says(ends.destination.error.as_ref(), &["at prepare"]);
    moves_now(&source, 2);
}

#[test]
fn a_destination_whose_disk_fails_beside_the_rounds_is_survived() {
    let source = source().running(2);
    let fails = Fails { durable: true, ..Fails::default() };
    let destination = Arc::new(TestGuest::destination().failing(fails));
    let ends = Trial::new(2).run(&source, &destination);
    says(ends.source.error.as_ref(), &["the destination refused", "at make_durable"]);
    says(ends.destination.error.as_ref(), &["at make_durable"]);
    assert_eq!(destination.durable_calls(), 1, "the first error ends it");
    moves_now(&source, 2);
}

#[test]
fn a_start_that_fails_leaves_both_paused_and_both_say_so() {
    let source = source().running(2);
    let fails = Fails { start: true, ..Fails::default() };
    let destination = Arc::new(TestGuest::destination().failing(fails));
    let ends = Trial::new(2).run(&source, &destination);
    assert_eq!((ends.source.outcome, ends.destination.outcome), (Outcome::Unconfirmed, Outcome::Failed));
    says(ends.source.error.as_ref(), &["at start", "look at the destination"]);
    says(ends.destination.error.as_ref(), &["at start"]);
    assert!(!source.runs() && !destination.runs());
}

#[test]
fn a_source_that_cannot_continue_says_so() {
    for fails in [Fails { resume: true, ..Fails::default() }, Fails { reacquire: true, ..Fails::default() }] {
        let source = source().failing(fails).running(2);
        let fails = Fails { prepare: true, ..Fails::default() };
        let destination = Arc::new(TestGuest::destination().failing(fails));
        let transport = Arc::new(MemoryTransport::new(64 << 10));
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let moving = migrate_watched(
            source.clone(),
            destination.clone(),
            transport,
            settings(1),
            CancellationToken::new(),
            Recorder::default(),
        );
        let ends = runtime.block_on(moving);
        assert!(ends.source.resume_failed && !source.runs() && !destination.runs());
        says(ends.source.error.as_ref(), &["at prepare", "could not be resumed", "stays paused"]);
        assert!(!source.log().is_armed());
    }
}

// ---- memory and logs ----

#[test]
fn a_page_that_is_damaged_at_the_destination_is_found_and_named() {
    for (block, offset) in [(0, 3 * 4096 + 5), (0, (5 << 20) + 99), (1, 4096)] {
        let destination = Arc::new(TestGuest::destination());
        let mut trial = Trial::new(1);
        trial.settings.verify = Verify::Full;
        let victim = destination.clone();
        // With one lane, Switchover is reported when every page is in place, before digests are compared.
        trial.recorder = Recorder::calling(move |role, event| {
            if (role, event) == (Role::Destination, &Event::Phase(Phase::Switchover)) {
                victim.corrupt(block, offset);
            }
        });
        let source = source().running(2);
        let ends = trial.run(&source, &destination);
        assert_eq!((ends.source.verified, ends.destination.verified), (Some(false), Some(false)));
        let (id, page) = (format!("{:?}", format!("ram{block}")), format!("page {} of block", offset / 4096));
        says(ends.source.error.as_ref(), &["verification failed", &id, &page]);
        says(ends.destination.error.as_ref(), &["verification failed", &id]);
        moves_now(&source, 1);
    }
}

#[test]
fn memory_that_fails_or_panics_at_the_source_is_named() {
    let words: [(Trouble, &[&str]); 2] = [
        (Trouble::ReadFails(70), &["zero detector", "page", "made to fail at reading"]),
        (Trouble::ReadPanics(70), &["mistake in memferry", "made to panic when page 70 is read"]),
    ];
    for (trouble, words) in words {
        let no_verify = |mut trial: Trial| {
            trial.settings.verify = Verify::Off;
            trial
        };
        let source = source().troubled(trouble).running(2);
        let ends = no_verify(Trial::new(2)).run(&source, &Arc::new(TestGuest::destination()));
        assert_eq!(ends.source.outcome, Outcome::Failed);
        says(ends.source.error.as_ref(), words);
        source.repair();
        moves_now(&source, 2);
    }
}

#[test]
fn memory_that_panics_under_the_digests_is_survived_at_both_ends() {
    // Before the first page, and in the pause: there are no writes then, so that only the digests read the page.
    let troubled =
        [source().troubled(Trouble::ReadPanics(70)), source().troubled_from(GuestCall::Save, Trouble::ReadPanics(70))];
    for source in troubled {
        let source = source.running(0);
        let destination = Arc::new(TestGuest::destination());
        let ends = migrate_once(&source, &destination);
        assert_eq!(ends.source.outcome, Outcome::Failed);
        assert!(source.runs() && !source.log().is_armed());
        assert_eq!(source.was_called(GuestCall::Pause), source.was_called(GuestCall::Resume));
        says(ends.source.error.as_ref(), &["page 70 is read"]);
        assert!(!destination.was_called(GuestCall::Start));
    }
    let source = source().running(0);
    let destination = Arc::new(TestGuest::destination().troubled(Trouble::ReadPanics(70)));
    let ends = migrate_once(&source, &destination);
    assert!(ends.source.outcome == Outcome::Failed && ends.destination.outcome == Outcome::Failed);
    says(ends.destination.error.as_ref(), &["page 70 is read"]);
    says(ends.source.error.as_ref(), &["page 70 is read"]);
    assert!(source.runs() && !destination.was_called(GuestCall::Start));
}

/// A guest without writers to wait for.
fn migrate_once(source: &Arc<TestGuest>, destination: &Arc<TestGuest>) -> Ends {
    let transport = Arc::new(MemoryTransport::new(64 << 10));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (cancel, recorder) = (CancellationToken::new(), Recorder::default());
    let settings = SourceSettings { verify: Verify::Full, ..settings(2) };
    let moving = migrate_watched(source.clone(), destination.clone(), transport, settings, cancel, recorder);
    runtime.block_on(async { tokio::time::timeout(HANG, moving).await.expect("it hangs") })
}

#[test]
fn a_full_disk_at_the_destination_is_named_at_both_ends() {
    for room in [0, 100, 700] {
        let source = source().running(2);
        let destination = Arc::new(TestGuest::destination().troubled(Trouble::DiskFull(room)));
        let ends = Trial::new(2).run(&source, &destination);
        assert_eq!(ends.source.outcome, Outcome::Failed);
        says(ends.destination.error.as_ref(), &["loader", "cannot write", "page"]);
        says(ends.source.error.as_ref(), &["the destination gave up", "loader", "cannot write"]);
        moves_now(&source, 2);
    }
}

#[test]
fn a_log_that_fails_is_named() {
    let words: [(Trouble, &[&str]); 3] = [
        (Trouble::LogStartFails, &["the dirty log cannot start", "made to fail at start"]),
        (Trouble::SyncFails, &["bitmap sync", "the dirty log cannot sync", "made to fail at sync"]),
        (Trouble::SyncPanics, &["bitmap sync", "mistake in memferry", "made to panic at sync"]),
    ];
    for (trouble, words) in words {
        let source = source().troubled(trouble).running(2);
        let ends = Trial::new(1).run(&source, &Arc::new(TestGuest::destination()));
        assert_eq!(ends.source.outcome, Outcome::Failed);
        says(ends.source.error.as_ref(), words);
        source.repair();
        moves_now(&source, 1);
    }
    // In the pause.
    let source = source().troubled_from(GuestCall::Save, Trouble::SyncFails).running(2);
    let ends = Trial::new(1).run(&source, &Arc::new(TestGuest::destination()));
    says(ends.source.error.as_ref(), &["made to fail at sync"]);
    assert!(source.was_called(GuestCall::Resume));
    source.repair();
    moves_now(&source, 1);
}
