//! Hints of free pages: later writes arrive, late hints are dropped, the digests agree.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use memferry::events::{Event, Outcome, Role};
use memferry::guest::hints::{Hints, PageHinter, Point};
use memferry::guest::{Guest, GuestError};
use memferry::settings::SourceSettings;
use memferry_stages::geometry::PageSize;
use memferry_tests::run::Ends;
use memferry_tests::{Recorder, TestGuest, source_settings};
use tokio_util::sync::CancellationToken;

use super::guest::{Notes, Noting, move_guest};

const PAGE: usize = 4096;
const PAGES: usize = 2048;

/// Runs a script at each point, with the number of syncs before it and the window.
struct Script<F> {
    syncs: Mutex<u32>,
    act: F,
}

impl<F> std::fmt::Debug for Script<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a script")
    }
}

enum At<'a> {
    Before(u32),
    After(u32, Option<&'a Hints>),
    Complete,
    Cleanup,
}

impl<F: Fn(At<'_>) + Send + Sync> PageHinter for Script<F> {
    fn reached(&self, point: &Point) -> Result<(), GuestError> {
        let mut syncs = self.syncs.lock().unwrap();
        match point {
            Point::BeforeSync => (self.act)(At::Before(*syncs)),
            Point::AfterSync { hints } => {
                (self.act)(At::After(*syncs, hints.as_ref()));
                *syncs += 1;
            }
            Point::Complete => (self.act)(At::Complete),
            Point::Cleanup => (self.act)(At::Cleanup),
            _ => {}
        }
        Ok(())
    }
}

/// A guest without writers of its own that counts as running: the script writes.
fn guest() -> Arc<TestGuest> {
    TestGuest::incompressible(PageSize::DEFAULT, (PAGES * PAGE) as u64).running(0)
}

fn settings() -> SourceSettings {
    source_settings(2, 1)
}

fn play(
    guest: &Arc<TestGuest>,
    hashes: bool,
    settings: SourceSettings,
    act: impl Fn(At<'_>) + Send + Sync + 'static,
) -> (Ends, Arc<TestGuest>) {
    let hinter = Arc::new(Script { syncs: Mutex::new(0), act });
    let source = Arc::new(Noting { hashes, ..Noting::new(guest.clone(), vec![hinter], &Notes::default()) });
    let destination = Arc::new(TestGuest::destination());
    let ends = move_guest(source, destination.clone(), settings, CancellationToken::new(), Recorder::default());
    assert_eq!(ends.source.outcome, Outcome::Completed, "{:?}, {:?}", ends.source.error, ends.destination.error);
    assert_eq!((ends.source.verified, ends.destination.verified), (Some(true), Some(true)));
    (ends, destination)
}

fn page(bytes: &[Vec<u8>], page: usize) -> &[u8] {
    &bytes[0][page * PAGE..(page + 1) * PAGE]
}

fn sent(ends: &Ends) -> u64 {
    let pages = |(role, event): &(Role, Event)| match event {
        Event::RoundSent { tally, .. } if *role == Role::Source => tally.pages.all,
        _ => 0,
    };
    ends.events.iter().map(pages).sum()
}

#[test]
fn hinted_pages_are_not_sent_and_those_that_are_written_afterwards_are() {
    let source = guest();
    let writer = source.clone();
    let (ends, destination) = play(&source, false, settings(), move |at| match at {
        At::After(0, Some(hints)) => {
            assert_eq!(hints.free(0, 100..1100), 1000);
            assert_eq!(hints.free(0, 100..1100), 0, "they are clear already");
            // Reused at once, within the window; one at the end of a word, one before the next.
            for page in [100, 127, 128, 1099] {
                writer.write(0, page * PAGE + 7, b"in use");
            }
        }
        // Reused between two windows.
        At::Before(1) => writer.write(0, 500 * PAGE, b"later"),
        At::Complete => writer.write(0, 600 * PAGE, b"last"),
        _ => {}
    });
    let (ours, theirs) = (source.bytes(), destination.bytes());
    for at in (0..100).chain(1100..PAGES).chain([100, 127, 128, 500, 600, 1099]) {
        assert!(page(&ours, at) == page(&theirs, at), "page {at} was lost");
    }
    assert!((101..127).all(|at| page(&theirs, at).iter().all(|&byte| byte == 0)), "a free page travelled");
    assert_eq!(ends.source.excluded.hinted, 1000);
    // All others once, the reused ones once, and the page that the save writes.
    assert_eq!(sent(&ends), (PAGES - 1000 + 6 + 1) as u64);
}

#[test]
fn a_page_that_was_sent_then_hinted_then_written_comes_as_a_delta_to_what_the_destination_has() {
    let source = guest();
    let writer = source.clone();
    // A limit that is never met: five rounds, whatever is dirty.
    let settings = SourceSettings { max_rounds: 5, downtime_limit: Duration::from_nanos(1), ..settings() };
    let (ends, destination) = play(&source, false, settings, move |at| match at {
        At::Before(syncs) => {
            writer.write(0, 40 * PAGE + 100 * syncs as usize, b"changed");
            writer.write(0, 41 * PAGE + 100 * syncs as usize, b"changed");
        }
        // Dirty, hinted, and written and sent in the next window.
        At::After(2 | 4, Some(hints)) => assert_eq!(hints.free(0, 40..41), 1),
        _ => {}
    });
    let (ours, theirs) = (source.bytes(), destination.bytes());
    assert!([40, 41].iter().all(|&at| page(&ours, at) == page(&theirs, at)));
    assert_eq!(ends.source.excluded.hinted, 2);
    let deltas = ends.events.iter().map(|(_, event)| match event {
        Event::RoundSent { tally, .. } => tally.pages.xbzrle,
        _ => 0,
    });
    assert!(deltas.sum::<u64>() > 0);
}

#[test]
fn a_page_that_is_hinted_when_its_old_content_has_travelled_is_left_out_of_the_digests() {
    let source = guest();
    let writer = source.clone();
    let settings = SourceSettings { max_rounds: 3, downtime_limit: Duration::from_nanos(1), ..settings() };
    let (ends, destination) = play(&source, false, settings, move |at| match at {
        At::Before(1) => writer.write(0, 40 * PAGE, b"written, freed"),
        // 41 has travelled with its content: the hint clears nothing, and the page stays in the digests.
        At::After(1, Some(hints)) => assert_eq!(hints.free(0, 40..42), 1),
        _ => {}
    });
    let (ours, theirs) = (source.bytes(), destination.bytes());
    assert!(page(&ours, 40) != page(&theirs, 40) && page(&ours, 41) == page(&theirs, 41));
    assert_eq!(ends.source.excluded.hinted, 1);
}

#[test]
fn hints_outside_of_their_window_are_dropped() {
    let source = guest();
    let kept: Arc<Mutex<Vec<Hints>>> = Arc::default();
    let keeps = kept.clone();
    let late = Arc::new(AtomicU64::new(0));
    let counts = late.clone();
    let (ends, destination) = play(&source, false, settings(), move |at| {
        let old = |pages| keeps.lock().unwrap().first().map_or(0, |hints| hints.free(0, pages));
        match at {
            // The window of the first sync is open.
            At::After(0, Some(hints)) => keeps.lock().unwrap().push(hints.clone()),
            // Later syncs have windows of their own, or none if the guest is paused: a hint that was reported in the first comes too
            // late. A slow machine needs more of them.
            At::After(_, hints) => {
                assert!(hints.is_none_or(|hints| hints.are_wanted()));
                assert_eq!(old(0..64), 0);
                counts.fetch_add(1, Ordering::Relaxed);
            }
            At::Cleanup => assert_eq!(old(0..64), 0),
            _ => {}
        }
    });
    assert_eq!(kept.lock().unwrap()[0].free(0, 0..1 << 40), 0, "the migration is over");
    assert!(!kept.lock().unwrap()[0].are_wanted());
    assert!(source.bytes() == destination.bytes());
    // Hints after the verdict are not in it.
    assert_eq!((ends.source.excluded.hinted, ends.source.excluded.dropped), (0, 64 * late.load(Ordering::Relaxed)));
    assert!(late.load(Ordering::Relaxed) >= 2);
}

#[test]
fn ranges_that_a_guest_makes_up_do_no_harm() {
    let source = guest();
    let (ends, destination) = play(&source, false, settings(), |at| {
        if let At::After(0, Some(hints)) = at {
            for (block, pages) in [(7, 0..9), (0, 4000..5000), (0, u64::MAX - 1..u64::MAX), (u32::MAX, 0..u64::MAX)] {
                assert_eq!(hints.free(block, pages), 0);
            }
            assert_eq!(hints.free(0, PAGES as u64 - 1..u64::MAX), 1);
        }
    });
    let (ours, theirs) = (source.bytes(), destination.bytes());
    assert!((0..PAGES - 1).all(|at| page(&ours, at) == page(&theirs, at)));
    assert_eq!(ends.source.excluded.hinted, 1);
}

#[test]
fn a_log_that_compares_takes_no_hints_and_says_so() {
    let source = guest();
    let (ends, destination) = play(&source, true, settings(), |at| {
        if let At::After(_, hints) = at {
            assert!(hints.is_none());
        }
    });
    assert!(source.bytes() == destination.bytes());
    let warned =
        |(_, event): &(Role, Event)| matches!(event, Event::Warning(what) if what.contains("hints are not taken"));
    assert!(ends.events.iter().any(warned));
    assert!(source.memory().page_size() == PageSize::DEFAULT);
}
