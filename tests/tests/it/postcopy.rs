//! Postcopy: a guest is started at the destination before all of its pages are there, over every transport, with connections that are
//! cut. What arrives equals what the source held, to the last byte.

use std::sync::Arc;
use std::time::Duration;

use memferry::events::{Event, Outcome, Phase, Postcopy, Role};
use memferry::settings::{Mode, PostcopyAfter, SourceSettings};
use memferry_stages::geometry::PageSize;
use memferry_stages::missing;
use memferry_tests::crossing::{Crossed, Crossing, Way};
use memferry_tests::guest::GuestCall;
use memferry_tests::proxy::{Fault, Plan, Step, When};
use memferry_tests::{TestGuest, skipped};
use memferry_transports::memory::Direction;

/// No test here takes this long unless something hangs.
const HANG: Duration = Duration::from_secs(120);
/// Two blocks whose lengths are not multiples of a page, with work for four lanes.
const LENGTHS: [u64; 2] = [(9 << 20) + 100, 4097];
const WAYS: [(Way, u16); 6] =
    [(Way::Tcp, 1), (Way::Tcp, 4), (Way::Unix, 1), (Way::Unix, 4), (Way::TlsTcp, 1), (Way::TlsUnix, 4)];

/// Whether this host can run these tests.
fn can_run() -> bool {
    missing::supported().map_err(|why| skipped(why.to_string())).is_ok()
}

fn block_on<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async { tokio::time::timeout(HANG, test).await.expect("it hangs") })
}

fn guests() -> (Arc<TestGuest>, Arc<TestGuest>) {
    let source = TestGuest::source(PageSize::DEFAULT, &LENGTHS).paced(Duration::from_micros(100)).running(2);
    (source, Arc::new(TestGuest::destination()))
}

/// A migration that does not converge by itself: the limit is never met.
async fn crossing(way: Way, lanes: u16, steps: &[Step], change: impl FnOnce(&mut SourceSettings)) -> Crossing {
    let mut crossing = Crossing::new(way, lanes, Plan(steps.to_vec())).await;
    crossing.source.downtime_limit = Duration::from_nanos(1);
    crossing.source.max_rounds = 1000;
    crossing.source.mode = Mode::Hybrid;
    crossing.source.postcopy_after = Some(PostcopyAfter::Rounds(2));
    change(&mut crossing.source);
    crossing
}

fn run(way: Way, lanes: u16, steps: &[Step], change: impl FnOnce(&mut SourceSettings)) -> Crossed {
    let (source, destination) = guests();
    let crossed =
        block_on(async { crossing(way, lanes, steps, change).await.run(source.clone(), destination.clone()).await });
    crossed.check_completed(&source, &destination);
    assert!(destination.calls().contains(&GuestCall::Start), "{crossed:?}");
    crossed
}

/// What happened to a guest at its destination.
#[track_caller]
fn there(crossed: &Crossed) -> Postcopy {
    let ended = crossed.destination.as_ref().expect("the destination ended");
    ended.postcopy.clone().unwrap_or_else(|| panic!("no postcopy: {crossed:?}"))
}

#[test]
fn a_guest_that_does_not_converge_arrives_with_pages_missing_that_follow() {
    if !can_run() {
        return;
    }
    for (way, lanes) in WAYS {
        let crossed = run(way, lanes, &[], |_| ());
        let here = crossed.source.postcopy.clone().expect("postcopy");
        let there = there(&crossed);
        let counts = there.faults.expect("the destination counts");
        assert!(here.missing_pages > 0 && here.missing_pages == there.missing_pages, "{crossed:?}");
        assert_eq!(counts.placed + counts.discarded, there.missing_pages, "each page once: {counts:?}");
        assert_eq!(counts.duplicates, 0, "{counts:?}");
        let phase = |(role, event): &(Role, Event)| *role == Role::Source && *event == Event::Phase(Phase::Postcopy);
        assert!(crossed.events.iter().any(phase));
        assert_eq!(crossed.source.verified, Some(true));
    }
}

#[test]
fn a_guest_is_started_before_any_page_is_sent() {
    if !can_run() {
        return;
    }
    for (way, lanes) in WAYS {
        let all = |settings: &mut SourceSettings| (settings.mode, settings.postcopy_after) = (Mode::Postcopy, None);
        let crossed = run(way, lanes, &[], all);
        let pages: u64 = LENGTHS.iter().map(|length| length.div_ceil(4096)).sum();
        assert_eq!(there(&crossed).missing_pages, pages);
    }
}

#[test]
fn a_connection_that_is_cut_while_pages_follow_is_made_again() {
    if !can_run() {
        return;
    }
    // The first page is sent after Go: nothing else is that large.
    let at = |bytes| Step::new(When::Bytes(Direction::ToDestination, bytes), Fault::Cut);
    for (way, lanes) in WAYS {
        let all = |settings: &mut SourceSettings| (settings.mode, settings.postcopy_after) = (Mode::Postcopy, None);
        let crossed = run(way, lanes, &[at(500_000), at(700_000), at(900_000)], all);
        assert_eq!(crossed.proxy.breaks(), 3, "{crossed:?}");
        assert_eq!(crossed.source.outages.lost, 3, "{crossed:?}");
        assert_eq!(crossed.source.outcome, Outcome::Completed);
    }
}
