//! Migrations whose connections are cut, stalled, half-closed and refused at random, over TCP and Unix sockets, with one
//! lane and with four, in precopy and in postcopy: each completes, verified, and no thread, descriptor or file is left.
//!
//! A binary of its own, with one test: it counts the threads and descriptors of the whole process.

use std::sync::Arc;
use std::time::Duration;

use memferry::events::Outcome;
use memferry::settings::{Mode, PostcopyAfter};
use memferry_guests::workload::{Fill, LogChoice, Pattern, Region, Workload, WorkloadSettings, WriterSettings};
use memferry_stages::geometry::PageSize;
use memferry_stages::missing;
use memferry_tests::crossing::{Crossed, Crossing, Way};
use memferry_tests::leftovers::Census;
use memferry_tests::proxy::Plan;
use memferry_tests::run::keeping;
use memferry_tests::{TestGuest, sample};
use memferry_transports::memory::Direction;
use tokio::runtime::Runtime;

/// The number of migrations in the sample.
const PLANS: u64 = 24;
/// No migration here takes this long unless it hangs.
const HANG: Duration = Duration::from_secs(120);
const LENGTHS: [u64; 2] = [(9 << 20) + 100, 4097];
/// The kinds of connections, and the number of lanes, each with a connection of its own.
const WAYS: [(Way, u16); 4] = [(Way::Tcp, 1), (Way::Unix, 4), (Way::Unix, 1), (Way::Tcp, 4)];

async fn crossing(number: u64, plan: Plan) -> Crossing {
    let (way, lanes) = WAYS[usize::try_from(number).unwrap() % WAYS.len()];
    let mut crossing = Crossing::new(way, lanes, plan).await;
    crossing.source.max_rounds = 3;
    // Of three migrations, two start the guest before its pages are there, where the host can.
    match number % 3 {
        1 if missing::supported().is_ok() => {
            crossing.source.mode = Mode::Hybrid;
            crossing.source.postcopy_after = Some(PostcopyAfter::Rounds(1));
            crossing.source.downtime_limit = Duration::from_nanos(1);
        }
        2 if missing::supported().is_ok() => crossing.source.mode = Mode::Postcopy,
        _ => {}
    }
    crossing
}

fn block_on<T>(test: impl Future<Output = T>) -> T {
    Runtime::new().unwrap().block_on(async { tokio::time::timeout(HANG, test).await.expect("it hangs") })
}

/// A guest whose memory is compared, byte by byte.
fn every_byte_arrives(number: u64, plan: Plan) -> Crossed {
    let source = TestGuest::source(PageSize::DEFAULT, &LENGTHS).paced(Duration::from_micros(500)).running(2);
    let destination = Arc::new(TestGuest::destination());
    let crossed = block_on(async { crossing(number, plan).await.run(source.clone(), destination.clone()).await });
    crossed.check_completed(&source, &destination);
    crossed
}

/// A guest that compares its pages with its last writes to them, and runs on at the destination.
fn no_page_is_stale(number: u64, plan: Plan) -> Crossed {
    let writer =
        WriterSettings { pattern: Pattern::Uniform, pages_per_second: 20_000.0, bytes: 64, region: Region::ALL };
    let settings = WorkloadSettings {
        memory: 9 << 20,
        blocks: 2,
        dirty_log: LogChoice::Software,
        fill: Fill { zero: 0.3, text: 0.3, random: 0.4, process: 0.0 },
        writers: vec![writer],
        ..WorkloadSettings::default()
    };
    let source = Workload::source(settings).unwrap();
    let (builder, built) = keeping(Workload::destination());
    let crossed = block_on(async { crossing(number, plan).await.run(source.clone(), builder).await });
    assert_eq!((crossed.source.outcome, crossed.source.verified), (Outcome::Completed, Some(true)), "{crossed:?}");
    crossed.check_outages();
    let arrived = built.get().expect("built").check_all();
    assert!(arrived.running && !source.status().running, "{crossed:?}");
    assert_eq!((arrived.stale_pages, arrived.first_stale), (0, None), "{crossed:?}");
    crossed
}

fn migrate(number: u64, plan: Plan) -> Crossed {
    // Each kind of guest over each kind of connection.
    let crossed = if (number / WAYS.len() as u64).is_multiple_of(2) {
        every_byte_arrives(number, plan)
    } else {
        no_page_is_stale(number, plan)
    };
    assert!(crossed.destination.is_none() || crossed.left().is_empty(), "{:?}", crossed.left());
    crossed
}

#[test]
fn random_faults_lose_nothing_and_leave_nothing() {
    let seed = sample::seed();
    // The first run of all opens resources that the runtime retains for the whole process, and measures a run.
    let undisturbed = migrate(0, Plan::default());
    assert_eq!(undisturbed.source.outages.lost, 0);
    let bytes = undisturbed.proxy.forwarded(Direction::ToDestination);
    drop(undisturbed);
    let before = Census::take();

    let (mut lost, mut breaks) = (0, 0);
    for number in 0..sample::count(PLANS) {
        let plan = Plan::drawn(seed.wrapping_add(number), bytes);
        println!("migration {number}: {plan:?}");
        let crossed = migrate(number, plan);
        lost += crossed.source.outages.lost as usize;
        breaks += crossed.proxy.breaks();
    }
    println!("{breaks} faults, {lost} connections lost");
    assert!(lost <= breaks && lost > 0, "{lost} of {breaks}");
    before.wait_until_as_before();
}
