//! A guest whose dirty rate is above the bandwidth, and each possible end of such a migration. Whatever the end, the
//! guest is no longer throttled.

use std::sync::Arc;
use std::time::Duration;

use memferry::controller::reason::Reason;
use memferry::controller::{Decided, Decision};
use memferry::events::{Event, Outcome, Role};
use memferry::guest::{RunState, SourceGuest};
use memferry::settings::{
    ConvergenceSettings, EncoderSettings, OnDeadline, RaiseSettings, SourceSettings, StallStep, ThrottleSettings,
    Verify,
};
use memferry_guests::workload::Workload;
use memferry_tests::hot::Hot;
use memferry_tests::{Ends, Recorder, migrate_watched, source_settings};
use memferry_transports::memory::MemoryTransport;
use tokio_util::sync::CancellationToken;

/// What the guest's memory takes within, once it is throttled, on a busy machine too.
const LIMIT: Duration = Duration::from_millis(400);

/// The most to which the limit is raised.
const MOST: Duration = Duration::from_secs(12);

/// Two seconds for a round of all pages.
fn settings(on_stall: &[StallStep]) -> SourceSettings {
    SourceSettings {
        encoder: EncoderSettings { compress: None, xbzrle: None },
        max_bandwidth: Some(1 << 20),
        downtime_limit: LIMIT,
        max_rounds: 40,
        verify: Verify::Off,
        convergence: ConvergenceSettings {
            on_stall: on_stall.to_vec(),
            stall_rounds: 1,
            cool_down_rounds: 1,
            throttle: ThrottleSettings { start: 60, step: 30, most: 99 },
            raise: RaiseSettings { step: 3 * LIMIT, most: MOST },
        },
        ..source_settings(2, 2)
    }
}

fn moved(guest: &Arc<Hot>, settings: SourceSettings, recorder: Recorder, cancel: CancellationToken) -> Ends {
    let transport = Arc::new(MemoryTransport::new(64 << 10));
    moved_over(guest, transport, settings, recorder, cancel)
}

fn moved_over(
    guest: &Arc<Hot>,
    transport: Arc<MemoryTransport>,
    settings: SourceSettings,
    recorder: Recorder,
    cancel: CancellationToken,
) -> Ends {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let moving = migrate_watched(guest.clone(), Workload::destination(), transport, settings, cancel, recorder);
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), moving).await.expect("it hangs") })
}

fn ended_by(on_stall: &[StallStep]) -> (Arc<Hot>, Ends) {
    let guest = Arc::new(Hot::new());
    let ends = moved(&guest, settings(on_stall), Recorder::default(), CancellationToken::new());
    (guest, ends)
}

fn decided(ends: &Ends) -> Vec<Decided> {
    let decided = |(role, event): &(Role, Event)| match event {
        Event::Decided(decided) if *role == Role::Source => Some(decided.clone()),
        _ => None,
    };
    ends.events.iter().filter_map(decided).collect()
}

/// A recorder that calls a function when the source reports a throttle.
fn at_the_throttle(act: impl Fn() + Send + Sync + 'static) -> Recorder {
    Recorder::calling(move |role, event| {
        let throttles = matches!(event, Event::Decided(Decided { decision: Decision::Throttle(_), .. }));
        if role == Role::Source && throttles {
            act();
        }
    })
}

#[track_caller]
fn completed(ends: &Ends) -> Vec<Decided> {
    assert_eq!(ends.source.outcome, Outcome::Completed, "{:?}: {:#?}", ends.source.error, decided(ends));
    assert_eq!(ends.destination.outcome, Outcome::Completed, "{:?}", ends.destination.error);
    decided(ends)
}

#[test]
fn throttled_it_meets_the_limit_and_the_throttle_is_lifted() {
    let (guest, ends) = ended_by(&[StallStep::Throttle]);
    let decided = completed(&ends);
    let levels = guest.throttled();
    let (lifted, risen) = levels.split_last().unwrap();
    assert_eq!(*lifted, 0, "{levels:?}");
    assert!(risen.first() == Some(&60) && risen.is_sorted(), "{levels:?}");
    let last = decided.last().unwrap();
    assert_eq!(last.limit, LIMIT, "{last}");
    assert!(last.forecast.unwrap().expected() <= LIMIT, "{last:#?}");
}

#[test]
fn it_is_moved_under_a_limit_that_is_raised() {
    let (guest, ends) = ended_by(&[StallStep::RaiseDowntimeLimit]);
    let decided = completed(&ends);
    assert!(guest.throttled().is_empty());
    assert!(matches!(decided.last().unwrap().reason, Reason::Raised { .. }), "{decided:#?}");
    let expected = decided.last().unwrap().forecast.unwrap().expected();
    assert!(expected > LIMIT && expected <= MOST, "{expected:?}");
}

#[test]
fn it_is_switched_over_above_its_limit_and_under_the_ceiling() {
    let (_, ends) = ended_by(&[StallStep::SwitchOver]);
    let decided = completed(&ends);
    assert!(matches!(decided.last().unwrap().reason, Reason::Minimum { .. }), "{decided:#?}");
    assert!(decided.last().unwrap().forecast.unwrap().expected() > LIMIT);
}

#[test]
fn it_is_cancelled_and_continues() {
    let (guest, ends) = ended_by(&[StallStep::Cancel]);
    assert_eq!(ends.source.outcome, Outcome::Cancelled, "{:?}", ends.source.error);
    let why = ends.source.error.clone().unwrap();
    // Where all pages are dirty, it is random whether a round leaves one page fewer than the round before.
    let stall =
        why.contains("brought no new least of what remains") || why.contains("at the pace of the last 1 rounds");
    assert!(stall && why.contains("; expected downtime "), "{why}");
    assert_eq!(ends.source.forecast, None);
    assert_eq!(guest.run_state(), RunState::Running);
}

#[test]
fn under_a_ceiling_that_it_cannot_keep_nothing_moves_it() {
    let guest = Arc::new(Hot::new());
    let ceiling = SourceSettings {
        max_downtime: Some(LIMIT * 3 / 2),
        ..settings(&[StallStep::RaiseDowntimeLimit, StallStep::SwitchOver, StallStep::Cancel])
    };
    let ends = moved(&guest, ceiling, Recorder::default(), CancellationToken::new());
    assert_eq!(ends.source.outcome, Outcome::Cancelled, "{:?}", decided(&ends));
    assert_eq!(guest.run_state(), RunState::Running);
}

#[test]
fn a_guest_that_cannot_be_throttled_gets_the_next_step() {
    let guest = Arc::new(Hot::refusing());
    let steps = settings(&[StallStep::Throttle, StallStep::Cancel]);
    let ends = moved(&guest, steps, Recorder::default(), CancellationToken::new());
    assert_eq!(ends.source.outcome, Outcome::Cancelled, "{:?}", ends.source.error);
    assert_eq!(guest.throttled(), [60, 0]);
    let warned = |(_, event): &(Role, Event)| matches!(event, Event::Warning(what) if what.contains("throttled"));
    assert!(ends.events.iter().any(warned));
}

#[test]
fn the_throttle_is_lifted_when_it_is_cancelled() {
    let (guest, cancel) = (Arc::new(Hot::new()), CancellationToken::new());
    let recorder = at_the_throttle({
        let cancel = cancel.clone();
        move || cancel.cancel()
    });
    let ends = moved(&guest, settings(&[StallStep::Throttle]), recorder, cancel);
    assert_eq!(ends.source.outcome, Outcome::Cancelled, "{:?}", ends.source.error);
    assert_eq!(guest.throttled(), [60, 0]);
    assert_eq!(guest.run_state(), RunState::Running);
}

#[test]
fn the_throttle_is_lifted_when_it_fails() {
    let (guest, transport) = (Arc::new(Hot::new()), Arc::new(MemoryTransport::new(64 << 10)));
    let faults = transport.faults();
    let recorder = at_the_throttle(move || faults.cut());
    let steps = settings(&[StallStep::Throttle]);
    let ends = moved_over(&guest, transport, steps, recorder, CancellationToken::new());
    assert_eq!(ends.source.outcome, Outcome::Failed, "{:?}", ends.source.error);
    assert_eq!(guest.throttled(), [60, 0]);
    assert_eq!(guest.run_state(), RunState::Running);
}

#[test]
fn the_switchover_has_a_bandwidth_of_its_own() {
    let guest = Arc::new(Hot::new());
    // The deadline pauses the guest in the first round, which would take more than two minutes at this bandwidth.
    let faster = SourceSettings {
        max_bandwidth: Some(16 << 10),
        switchover_bandwidth: memferry::settings::SwitchoverBandwidth::AtMost(160 << 20),
        deadline: Some(Duration::from_secs(1)),
        on_deadline: OnDeadline::SwitchOver,
        ..settings(&[])
    };
    let ends = moved(&guest, faster, Recorder::default(), CancellationToken::new());
    completed(&ends);
}
