//! Memory that never travels: unplugged memory is neither read nor written, ignored blocks are only compared.

use std::sync::Arc;

use memferry::events::Outcome;
use memferry::guest::GuestError;
use memferry::guest::hints::{BlockPages, PageHinter, Point};
use memferry::settings::{After, SourceSettings};
use memferry_stages::geometry::PageSize;
use memferry_tests::run::Ends;
use memferry_tests::{Recorder, TestGuest, source_settings};
use tokio_util::sync::CancellationToken;

use super::guest::{Notes, Noting, move_guest};

const PAGE: usize = 4096;
const UNPLUGGED: std::ops::Range<u64> = 300..1000;

#[derive(Debug)]
struct Unplugs(Vec<BlockPages>);

impl PageHinter for Unplugs {
    fn reached(&self, _point: &Point) -> Result<(), GuestError> {
        Ok(())
    }

    fn gives_hints(&self) -> bool {
        false
    }

    fn unplugged(&self) -> Vec<BlockPages> {
        self.0.clone()
    }
}

fn run(source: Noting, destination: Noting, settings: SourceSettings) -> Ends {
    move_guest(Arc::new(source), Arc::new(destination), settings, CancellationToken::new(), Recorder::default())
}

/// Both ends of a guest with unplugged memory, and the guests behind them.
fn unplugged(hashes: bool, ranges: [Vec<BlockPages>; 2], notes: &Notes) -> [(Noting, Arc<TestGuest>); 2] {
    let source = TestGuest::incompressible(PageSize::DEFAULT, 2048 * PAGE as u64).running(0);
    let guests = [source, Arc::new(TestGuest::destination())];
    let mut ends = guests.into_iter().zip(ranges).map(|(guest, ranges)| {
        let forbidden = if ranges.is_empty() { 0..0 } else { UNPLUGGED };
        let hinters: Vec<Arc<dyn PageHinter>> =
            if ranges.is_empty() { Vec::new() } else { vec![Arc::new(Unplugs(ranges))] };
        (Noting { hashes, forbidden, ..Noting::new(guest.clone(), hinters, notes) }, guest)
    });
    [ends.next().unwrap(), ends.next().unwrap()]
}

#[test]
fn unplugged_memory_is_touched_at_neither_end() {
    for hashes in [false, true] {
        let notes = Notes::default();
        let ranges = || vec![(0, UNPLUGGED.start..500), (0, 500..UNPLUGGED.end)];
        let [(source, from), (destination, to)] = unplugged(hashes, [ranges(), ranges()], &notes);
        let ends = run(source, destination, source_settings(2, 1));
        assert_eq!(ends.source.outcome, Outcome::Completed, "{:?}", ends.source.error);
        assert_eq!(ends.destination.verified, Some(true));
        assert!(!notes.read().contains(&"TOUCHED".to_owned()), "hashes: {hashes}, {:?}", notes.read());
        assert_eq!(ends.source.excluded.unplugged, UNPLUGGED.end - UNPLUGGED.start);
        let (ours, theirs) = (from.bytes(), to.bytes());
        let at = |page: u64| usize::try_from(page).unwrap() * PAGE;
        let (start, end) = (at(UNPLUGGED.start), at(UNPLUGGED.end));
        assert!(ours[0][..start] == theirs[0][..start] && ours[0][end..] == theirs[0][end..]);
        assert!(theirs[0][start..end].iter().all(|&byte| byte == 0));
    }
}

#[test]
fn ends_that_do_not_agree_on_what_is_unplugged_are_found_out() {
    let notes = Notes::default();
    let [(source, _), (destination, _)] = unplugged(false, [vec![(0, 300..900)], vec![(0, UNPLUGGED)]], &notes);
    let ends = run(source, destination, source_settings(2, 1));
    assert_eq!(ends.source.outcome, Outcome::Failed);
    let error = ends.source.error.unwrap();
    assert!(error.contains("page 900 of block 0 is unplugged or ignored here, and not at the source"), "{error}");
}

#[test]
fn ranges_beyond_the_guest_are_its_own_mistake() {
    for ranges in [vec![(0, 2000..2049)], vec![(1, 0..1)]] {
        let notes = Notes::default();
        let [(source, _), (destination, _)] = unplugged(false, [ranges.clone(), vec![]], &notes);
        let error = run(source, destination, source_settings(2, 1)).source.error.unwrap();
        assert!(error.contains("are unplugged, and it has"), "{error}");
        let [(source, _), (destination, _)] = unplugged(false, [vec![], ranges], &notes);
        let error = run(source, destination, source_settings(2, 1)).source.error.unwrap();
        assert!(error.contains("the destination refused") && error.contains("are unplugged, and it has"), "{error}");
    }
}

/// A guest of two blocks, the second ignored, at either end.
fn ignoring(notes: &Notes) -> (Noting, Arc<TestGuest>) {
    let guest = TestGuest::source(PageSize::DEFAULT, &[4 << 20, (2 << 20) + 5]).ignoring(1).running(1);
    (Noting::new(guest.clone(), vec![], notes), guest)
}

#[test]
fn an_ignored_block_never_travels() {
    let notes = Notes::default();
    let ((source, from), to) = (ignoring(&notes), Arc::new(TestGuest::destination()));
    let ends = run(source, Noting::new(to.clone(), vec![], &notes), source_settings(2, 1));
    assert_eq!(ends.source.outcome, Outcome::Completed, "{:?}", ends.source.error);
    assert_eq!(ends.destination.verified, Some(true));
    assert!(from.bytes()[0] == to.bytes()[0]);
    assert!(to.bytes()[1].iter().all(|&byte| byte == 0), "the ignored block was written");
    assert_eq!(ends.source.excluded.ignored, 513);
}

#[test]
fn a_block_that_is_ignored_at_one_end_only_is_refused() {
    let notes = Notes::default();
    let (source, _) = ignoring(&notes);
    // Its own memory, whatever the source's content.
    let destination = Noting { sends_all: true, ..Noting::new(Arc::new(TestGuest::destination()), vec![], &notes) };
    let ends = run(source, destination, source_settings(2, 1));
    assert_eq!(ends.source.outcome, Outcome::Failed);
    let error = ends.source.error.unwrap();
    let expected = "block \"ram1\" is ignored, and so not sent, and the guest here does not share it";
    assert!(error.contains("the destination refused") && error.contains(expected), "{error}");
}

#[test]
fn a_snapshot_of_a_guest_that_continues_must_hold_all_of_it() {
    let notes = Notes::default();
    let ((source, from), destination) = (ignoring(&notes), Arc::new(TestGuest::destination()));
    let settings = SourceSettings { after: Some(After::Resume), ..source_settings(2, 1) };
    let error = run(source, Noting::new(destination, vec![], &notes), settings).source.error.unwrap();
    assert!(error.contains("block \"ram1\" is ignored, so a snapshot does not hold it"), "{error}");
    from.wait_for_writes();
}
