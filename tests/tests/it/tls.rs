//! Migrations over TLS: both kinds of sockets, one lane and several, connections that are lost and made again, and streams that somebody
//! truncates.
//!
//! Which certificates are refused, and in which words, is tested in `transports/tls/tests`; a peer that shows another certificate in
//! the middle of a migration in `pipeline/engine/src/migration/session/tests.rs` and `link.rs`; hostile clients in `tls_hostile`.

use std::sync::Arc;
use std::time::Duration;

use memferry::events::Outcome;
use memferry::settings::RecoverySettings;
use memferry_stages::geometry::PageSize;
use memferry_tests::TestGuest;
use memferry_tests::crossing::{Crossed, Crossing, Way};
use memferry_tests::guest::GuestCall;
use memferry_tests::proxy::{Fault, Plan, Step, When};
use memferry_transports::memory::Direction;

/// No test here takes this long unless something hangs.
const HANG: Duration = Duration::from_secs(120);
/// Two blocks whose lengths are not multiples of a page, with work for four lanes.
const LENGTHS: [u64; 2] = [(9 << 20) + 100, 4097];
/// Bytes after which the first round is on its way, and far from its end.
const EARLY: u64 = 500_000;
/// The kinds of connections, and the number of lanes, each with a connection of its own.
const WAYS: [(Way, u16); 4] = [(Way::TlsTcp, 1), (Way::TlsTcp, 4), (Way::TlsUnix, 1), (Way::TlsUnix, 4)];

fn block_on<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async { tokio::time::timeout(HANG, test).await.expect("it hangs") })
}

/// A source with writers that never rest, and a destination.
fn guests() -> (Arc<TestGuest>, Arc<TestGuest>) {
    let source = TestGuest::source(PageSize::DEFAULT, &LENGTHS).paced(Duration::from_micros(500)).running(2);
    (source, Arc::new(TestGuest::destination()))
}

fn early(fault: Fault) -> Step {
    Step::new(When::Bytes(Direction::ToDestination, EARLY), fault)
}

fn migrate(way: Way, lanes: u16, steps: &[Step], change: impl FnOnce(&mut Crossing)) -> Crossed {
    let (source, destination) = guests();
    let crossed = block_on(async {
        let mut crossing = Crossing::new(way, lanes, Plan(steps.to_vec())).await;
        crossing.source.max_rounds = 3;
        change(&mut crossing);
        crossing.run(source.clone(), destination.clone()).await
    });
    crossed.check_completed(&source, &destination);
    crossed
}

#[test]
fn migrations_complete_and_need_no_checksums_of_their_own() {
    for (way, lanes) in WAYS {
        for checksum in [true, false] {
            let crossed = migrate(way, lanes, &[], |crossing| crossing.source.checksum = checksum);
            assert_eq!((crossed.source.verified, crossed.source.outages.lost), (Some(true), 0), "{crossed:?}");
        }
    }
}

/// Cuts, and the end of a direction without TLS's notice, which is how an attacker truncates a stream: each is a lost connection that is
/// made again, without checksums too, because TLS authenticates what arrived.
#[test]
fn lost_and_truncated_connections_are_made_again() {
    for (way, lanes) in WAYS {
        for (fault, checksum) in [(Fault::Cut, false), (Fault::HalfClose, false), (Fault::CutOne, true)] {
            let crossed = migrate(way, lanes, &[early(fault)], |crossing| crossing.source.checksum = checksum);
            crossed.check_outages();
            assert_eq!((crossed.source.verified, crossed.source.outages.lost), (Some(true), 1), "{crossed:?}");
        }
    }
}

#[test]
fn a_truncated_stream_is_never_taken_for_its_end() {
    for (way, lanes) in WAYS {
        let (source, destination) = guests();
        let crossed = block_on(async {
            let crossing = Crossing::new(way, lanes, Plan(vec![early(Fault::HalfClose)])).await;
            let crossing = crossing.recovering(RecoverySettings::OFF);
            crossing.run(source.clone(), destination.clone()).await
        });
        crossed.check_law_seven(&source, &destination);
        assert_eq!(crossed.source.outcome, Outcome::Failed, "{crossed:?}");
        assert!(source.runs() && !destination.was_called(GuestCall::Start), "{crossed:?}");
        let there = crossed.destination.as_ref().and_then(|ended| ended.error.clone()).expect("an error");
        assert!(there.contains("close_notify"), "{there}");
    }
}
