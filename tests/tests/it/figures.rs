//! Figures of whole migrations: they name the bottleneck, and after the end no figure keeps its value of the running
//! migration.

use std::sync::Arc;
use std::time::Duration;

use memferry::bottleneck::{Bottleneck, Cause};
use memferry::events::{Event, Outcome, Phase, Progress, Role};
use memferry::guest::SourceGuest;
use memferry::settings::{EncoderSettings, SourceSettings, Verify};
use memferry_guests::workload::{FreeSettings, Workload, WorkloadSettings};
use memferry_stages::geometry::PageSize;
use memferry_tests::run::Expected;
use memferry_tests::{Ends, Recorder, TestGuest, Trouble, migrate_watched, source_settings};
use memferry_transports::memory::{Direction, Faults, MemoryTransport};
use tokio_util::sync::CancellationToken;

const MIB: u64 = 1 << 20;
/// No migration here takes this long unless it hangs.
const HANG: Duration = Duration::from_secs(60);

fn settings() -> SourceSettings {
    SourceSettings {
        encoder: EncoderSettings { compress: None, xbzrle: None },
        max_rounds: 1,
        verify: Verify::Off,
        ..source_settings(1, 1)
    }
}

fn noise() -> TestGuest {
    TestGuest::incompressible(PageSize::DEFAULT, 4 * MIB)
}

fn destination() -> Arc<TestGuest> {
    Arc::new(TestGuest::destination())
}

#[track_caller]
fn moved(
    source: Arc<dyn SourceGuest>,
    destination: impl Expected,
    settings: SourceSettings,
    transport: MemoryTransport,
    recorder: Recorder,
) -> Ends {
    let moving =
        migrate_watched(source, destination, Arc::new(transport), settings, CancellationToken::new(), recorder);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let ends = runtime.block_on(async { tokio::time::timeout(HANG, moving).await.expect("it hangs") });
    assert_eq!(ends.source.outcome, Outcome::Completed, "{:?}", ends.source.error);
    ends
}

fn transport() -> MemoryTransport {
    MemoryTransport::new(64 << 10)
}

/// The greatest share, except the processor's: other tests load it too.
fn cause(bottleneck: &Bottleneck) -> Option<Cause> {
    let shares = bottleneck.shares().filter(|(cause, _)| *cause != Cause::Processor);
    shares.max_by(|a, b| a.1.total_cmp(&b.1)).map(|(cause, _)| cause)
}

fn progress(ends: &Ends, of: Role) -> Vec<Progress> {
    let figures = |(role, event): &(Role, Event)| match event {
        Event::Progress(progress) if *role == of => Some(progress.clone()),
        _ => None,
    };
    ends.events.iter().filter_map(figures).collect()
}

/// Repeats a migration, each time with more of what holds it up, until that has the greatest share at both ends. A busy machine
/// holds it up too.
#[track_caller]
fn named(wanted: [Cause; 2], held_up: impl Fn(u32) -> Ends) {
    let mut last = None;
    for more in [1, 2, 4, 8, 16] {
        let ends = held_up(more);
        if [&ends.source, &ends.destination].map(|end| cause(&end.bottleneck)) == wanted.map(Some) {
            return;
        }
        last = Some((ends.source.bottleneck, ends.destination.bottleneck));
    }
    panic!("{last:?}");
}

#[test]
fn a_bandwidth_limit_is_named() {
    named([Cause::Limit, Cause::Source], |more| {
        let settings = SourceSettings { max_bandwidth: Some(4 * MIB / u64::from(more)), ..settings() };
        moved(Arc::new(noise()), destination(), settings, transport(), Recorder::default())
    });
}

#[test]
fn a_slow_destination_is_named() {
    named([Cause::Destination, Cause::Destination], |more| {
        let slow = TestGuest::destination().troubled(Trouble::WriteTakes(more * Duration::from_millis(50)));
        moved(Arc::new(noise()), Arc::new(slow), settings(), transport(), Recorder::default())
    });
}

#[test]
fn a_guest_that_is_waited_for_is_named() {
    named([Cause::Guest, Cause::Source], |more| {
        let slow = noise().troubled(Trouble::SyncTakes(more * Duration::from_millis(500)));
        moved(Arc::new(slow), destination(), settings(), transport(), Recorder::default())
    });
}

/// Stalls these directions until the latest figures name this cause for more than half of their time.
fn stalled(directions: &'static [Direction], wanted: Cause) {
    let transport = transport();
    let faults: Faults = transport.faults();
    let recorder = Recorder::calling(move |role, event| match (role, event) {
        (Role::Source, Event::Phase(Phase::Active)) => directions.iter().for_each(|way| faults.stall(*way)),
        (Role::Source, Event::Progress(now)) if now.bottleneck.share(wanted) > Some(0.5) => {
            directions.iter().for_each(|way| faults.release(*way));
        }
        _ => {}
    });
    let ends = moved(Arc::new(noise()), destination(), settings(), transport, recorder);
    let named = progress(&ends, Role::Source).into_iter().any(|now| cause(&now.bottleneck) == Some(wanted));
    assert!(named, "{}", ends.source.bottleneck);
}

#[test]
fn a_wire_on_which_nothing_moves_is_named() {
    stalled(&[Direction::ToDestination], Cause::Wire);
}

#[test]
fn a_destination_that_is_silent_is_named() {
    stalled(&[Direction::ToDestination, Direction::ToSource], Cause::Destination);
}

#[test]
fn after_completion_nothing_remains_and_nothing_moves() {
    let ends = moved(Arc::new(noise()), destination(), settings(), transport(), Recorder::default());
    for role in [Role::Source, Role::Destination] {
        let last = progress(&ends, role).pop().unwrap();
        let rates = (last.wire_rate, last.page_rate, last.dirty_rate.unwrap_or(0.0));
        assert_eq!((last.remaining_bytes, rates, last.throttle), (Some(0), (0.0, 0.0, 0.0), 0), "{role:?}");
        assert_eq!(last.expected_downtime, None, "{role:?}");
        assert_eq!(last.done(), Some(1.0), "{role:?}");
        let of_role = ends.events.iter().filter(|(of, _)| *of == role).map(|(_, event)| event);
        let place = |found: fn(&Event) -> bool| of_role.clone().position(found);
        let over = place(|event| matches!(event, Event::Phase(Phase::Completed))).unwrap();
        assert!(of_role.clone().skip(over).all(|event| !matches!(event, Event::Progress(_))), "{role:?}");
    }
    assert!(ends.source.cpu > Duration::ZERO && ends.destination.cpu > Duration::ZERO);
}

#[test]
fn a_destination_counts_the_rounds_there_are_and_what_remains_of_the_first() {
    // The first sync waits until the destination has reported figures of the second round.
    let source = Arc::new(noise().troubled(Trouble::SyncWaits));
    let waiting = source.clone();
    let recorder = Recorder::calling(move |role, event| match event {
        Event::Progress(now) if role == Role::Destination && now.round == 2 => waiting.repair(),
        _ => {}
    });
    let ends = moved(source, destination(), settings(), transport(), recorder);
    let is_sent = |(role, event): &(Role, Event)| match event {
        Event::RoundSent { tally, .. } if *role == Role::Destination => Some(tally.round),
        _ => None,
    };
    let rounds = ends.events.iter().filter_map(is_sent).max();
    let figures = progress(&ends, Role::Destination);
    assert_eq!(figures.last().map(|now| now.round), rounds);
    let (last, before) = figures.split_last().unwrap();
    assert_eq!(last.remaining_bytes, Some(0));
    assert!(before.iter().any(|now| now.round == 2));
    assert!(before.iter().all(|now| now.remaining_bytes.is_some() == (now.round == 1)), "{before:?}");
}

#[test]
fn no_figures_are_of_a_round_0() {
    // A guest with hints has a sync before the first round, while figures are already taken.
    let free = Some(FreeSettings { share: 0.5, turns_per_second: 0.0, range_pages: 16 });
    let source = Workload::source(WorkloadSettings { memory: 4 * MIB, free, ..WorkloadSettings::default() }).unwrap();
    let ends = moved(source, Workload::destination(), settings(), transport(), Recorder::default());
    let synced = ends.events.iter().position(|(_, event)| matches!(event, Event::Synced { after_round: 0, .. }));
    assert!(synced.is_some());
    assert!(progress(&ends, Role::Source).iter().all(|now| now.round >= 1));
}

/// The source's clock cuts the downtime into parts, with those that are work of the destination.
#[test]
fn each_part_of_the_downtime_is_in_its_place() {
    let takes = Duration::from_millis(50);
    let slow = Arc::new(TestGuest::destination().preparing_for(takes));
    let ends = moved(Arc::new(noise()), slow.clone(), settings(), transport(), Recorder::default());
    assert!(slow.durable_calls() >= 2, "beside the first round, and at the end");
    let (source, destination) = (ends.source.parts, ends.destination.parts);
    assert_eq!(Some(source.total()), ends.source.downtime, "{source:?}");
    assert!(source.prepare >= takes && destination.prepare >= takes, "{source:?}, {destination:?}");
    assert_eq!(source.verify, Duration::ZERO, "nothing is compared: {source:?}");
    assert!(!source.start.is_zero() && source.start == destination.start, "{source:?}, {destination:?}");
}
