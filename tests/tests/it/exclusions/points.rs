//! The points that page hinters are notified of: their order relative to the syncs and the scanner's swaps, at both ends.

use std::sync::Arc;
use std::time::Duration;

use memferry::events::{Event, Outcome, Phase, Role};
use memferry::guest::GuestError;
use memferry::guest::hints::{PageHinter, Point};
use memferry::settings::SourceSettings;
use memferry_stages::geometry::PageSize;
use memferry_tests::guest::{Fails, GuestCall};
use memferry_tests::{Recorder, TestGuest, Trouble, source_settings};
use tokio_util::sync::CancellationToken;

use super::guest::{Notes, Noting, move_guest};

const LENGTHS: [u64; 2] = [(3 << 20) + 100, 4097];

/// Records its notifications, and fails at one of them on request.
#[derive(Debug)]
struct Notified {
    name: &'static str,
    notes: Notes,
    fails_at: Option<&'static str>,
    panics: bool,
}

fn name(point: &Point) -> &'static str {
    match point {
        Point::Setup => "setup",
        Point::BeforeSync => "before sync",
        Point::AfterSync { hints: Some(_) } => "after sync, open",
        Point::AfterSync { hints: None } => "after sync",
        Point::Complete => "complete",
        Point::Cleanup => "cleanup",
        _ => "another",
    }
}

impl PageHinter for Notified {
    fn reached(&self, point: &Point) -> Result<(), GuestError> {
        self.notes.add(format!("{}{}", self.name, name(point)));
        let fails = self.fails_at == Some(name(point));
        assert!(!(fails && self.panics), "made to panic");
        if fails { Err(GuestError("made to fail".into())) } else { Ok(()) }
    }
}

fn hinter(notes: &Notes) -> Arc<dyn PageHinter> {
    Arc::new(Notified { name: "", notes: notes.clone(), fails_at: None, panics: false })
}

fn settings() -> SourceSettings {
    SourceSettings { max_rounds: 3, downtime_limit: Duration::from_micros(1), ..source_settings(2, 2) }
}

fn source(paused: bool) -> TestGuest {
    let guest = TestGuest::source(PageSize::DEFAULT, &LENGTHS);
    if paused { guest } else { guest.paced(Duration::from_millis(1)) }
}

/// A point follows only valid predecessors; the scanner swaps only where it may.
fn check_order(notes: &[String], completed: bool) {
    let follows: [(&str, &[&str]); 9] = [
        // The controller may let pages in flight arrive first: then a sync follows a sync.
        ("before sync", &["setup", "swap", "after sync, open", "after sync", "save"]),
        ("arm", &["setup", "sync"]),
        ("sync", &["before sync"]),
        ("after sync, open", &["arm"]),
        ("after sync", &["sync"]),
        ("swap", &["after sync, open", "after sync", "pause"]),
        ("pause", &["swap", "after sync, open"]),
        ("complete", &["pause", "after sync", "after sync, open", "swap"]),
        ("save", &["complete"]),
    ];
    assert_eq!(notes[0], "setup", "{notes:?}");
    for pair in notes.windows(2) {
        let [before, after] = pair else { unreachable!() };
        if after == "cleanup" {
            continue;
        }
        // Setup arms the log for untouched pages, before the first point.
        let may =
            follows.iter().find(|(name, _)| name == after).unwrap_or_else(|| panic!("{after} came again: {notes:?}"));
        let armed_at_setup = before == "arm" && after == "before sync";
        assert!(may.1.contains(&before.as_str()) || armed_at_setup, "{before} before {after}: {notes:?}");
    }
    assert_eq!(notes.iter().filter(|note| *note == "cleanup").count(), 1, "{notes:?}");
    assert_eq!(notes.last().unwrap(), "cleanup", "{notes:?}");
    if completed {
        let at = notes.iter().position(|note| note == "complete").expect("complete is notified");
        let rest: Vec<_> = notes[at..].iter().map(String::as_str).collect();
        assert_eq!(rest, ["complete", "save", "before sync", "sync", "after sync", "swap", "cleanup"]);
    }
}

#[test]
fn a_migration_that_completes_notifies_of_all_points_around_its_syncs_and_swaps() {
    for paused in [false, true] {
        let notes = Notes::default();
        let guest = if paused { Arc::new(source(true)) } else { source(false).running(1) };
        let source = Arc::new(Noting::new(guest, vec![hinter(&notes)], &notes));
        let destination = Arc::new(TestGuest::destination());
        let ends = move_guest(source, destination, settings(), CancellationToken::new(), Recorder::default());
        assert_eq!(ends.source.outcome, Outcome::Completed, "{:?}", ends.source.error);
        let notes = notes.read();
        check_order(&notes, true);
        let open = notes.iter().any(|note| note == "after sync, open");
        assert_eq!(open, !paused, "a window is open while the guest runs, and only then: {notes:?}");
    }
}

/// The event at which it is cancelled: those of every migration, before it is too late. (The event that a round is
/// scanned may be missing.)
const POINTS: [fn(&Event) -> bool; 8] = [
    |event| matches!(event, Event::Guest { .. }),
    |event| *event == Event::Phase(Phase::Active),
    |event| matches!(event, Event::Decided { .. }),
    |event| matches!(event, Event::RoundSent { .. }),
    |event| matches!(event, Event::Synced { after_round: 0, .. }),
    |event| matches!(event, Event::Synced { after_round: 1, .. }),
    |event| *event == Event::Phase(Phase::Switchover),
    |event| *event == Event::Paused,
];

#[test]
fn a_cancelled_migration_cleans_up_once_wherever_it_was() {
    for when in POINTS {
        let (notes, cancel) = (Notes::default(), CancellationToken::new());
        let guest = source(false).running(1);
        let source = Arc::new(Noting::new(guest.clone(), vec![hinter(&notes)], &notes));
        let token = cancel.clone();
        let recorder = Recorder::calling(move |role, event| {
            if role == Role::Source && when(event) {
                token.cancel();
            }
        });
        let destination = Arc::new(TestGuest::destination());
        let ends = move_guest(source, destination.clone(), settings(), cancel, recorder);
        assert_eq!(ends.source.outcome, Outcome::Cancelled, "{:?}", ends.source.error);
        check_order(&notes.read(), false);
        ends.check_law_seven(&guest, &destination);
    }
}

#[test]
fn a_failed_migration_cleans_up_once() {
    let troubles = [Trouble::SyncFails, Trouble::SyncPanics, Trouble::LogStartFails];
    let troubled = troubles.map(|trouble| source(false).troubled(trouble));
    let fails = [Fails { pause: true, ..Fails::default() }, Fails { save: true, ..Fails::default() }];
    let failing = fails.map(|fails| source(false).failing(fails));
    for guest in troubled.into_iter().chain(failing) {
        let notes = Notes::default();
        let (guest, destination) = (guest.running(1), Arc::new(TestGuest::destination()));
        let source = Arc::new(Noting::new(guest.clone(), vec![hinter(&notes)], &notes));
        let ends = move_guest(source, destination.clone(), settings(), CancellationToken::new(), Recorder::default());
        assert_eq!(ends.source.outcome, Outcome::Failed);
        check_order(&notes.read(), false);
        ends.check_law_seven(&guest, &destination);
    }
    let destination = TestGuest::destination().failing(Fails { prepare: true, ..Fails::default() });
    let notes = Notes::default();
    let source = Arc::new(Noting::new(source(false).running(1), vec![hinter(&notes)], &notes));
    let ends = move_guest(source, Arc::new(destination), settings(), CancellationToken::new(), Recorder::default());
    assert_eq!(ends.source.outcome, Outcome::Failed);
    check_order(&notes.read(), true);
}

#[test]
fn a_page_hinter_that_fails_at_setup_ends_it_and_later_only_warns() {
    for panics in [false, true] {
        let notes = Notes::default();
        let named = |name, fails_at| -> Arc<dyn PageHinter> {
            Arc::new(Notified { name, notes: notes.clone(), fails_at, panics })
        };
        let hinters = vec![named("a ", None), named("b ", Some("setup")), named("c ", None)];
        let guest = source(false).running(1);
        let destination = Arc::new(TestGuest::destination());
        let source = Arc::new(Noting::new(guest.clone(), hinters, &Notes::default()));
        let ends = move_guest(source, destination.clone(), settings(), CancellationToken::new(), Recorder::default());
        assert_eq!(ends.source.outcome, Outcome::Failed);
        assert!(ends.source.error.as_ref().unwrap().contains("made to"), "{:?}", ends.source.error);
        assert_eq!(notes.read(), ["a setup", "b setup", "a cleanup", "b cleanup"]);
        ends.check_law_seven(&guest, &destination);
        assert!(!guest.was_called(GuestCall::Pause));
    }
    for fails_at in ["before sync", "after sync, open", "after sync", "complete", "cleanup"] {
        for panics in [false, true] {
            let notes = Notes::default();
            let hinter = Notified { name: "", notes: notes.clone(), fails_at: Some(fails_at), panics };
            let source = Arc::new(Noting::new(source(false).running(1), vec![Arc::new(hinter)], &notes));
            let destination = Arc::new(TestGuest::destination());
            let ends = move_guest(source, destination, settings(), CancellationToken::new(), Recorder::default());
            assert_eq!(ends.source.outcome, Outcome::Completed, "{:?}", ends.source.error);
            check_order(&notes.read(), true);
            let warned = |(_, event): &(Role, Event)| matches!(event, Event::Warning(what) if what.contains("made to"));
            assert!(ends.events.iter().any(warned), "{fails_at}: nobody was warned");
        }
    }
}
