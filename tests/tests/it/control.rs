//! Changes to a running migration: each setting, and its effect; and the switchover on request.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use memferry::control::{Change, Control, ControlError, Status};
use memferry::controller::Decision;
use memferry::controller::reason::Reason;
use memferry::events::{Event, Outcome, Phase, Progress, Role};
use memferry::guest::{RunState, SourceGuest};
use memferry::settings::{
    ConvergenceSettings, EncoderSettings, OnDeadline, OnMiss, SourceSettings, StallStep, SwitchoverBandwidth,
    ThrottleSettings, Verify, XbzrleSettings,
};
use memferry_guests::workload::{Fill, LogChoice, Pattern, Region, Workload, WorkloadSettings, WriterSettings};
use memferry_stages::tally::RoundTally;
use memferry_tests::hot::Hot;
use memferry_tests::{Ends, Recorder, migrate_watched, source_settings};
use memferry_transports::memory::MemoryTransport;

const MIB: u64 = 1 << 20;
const MS: Duration = Duration::from_millis(1);

/// Settings with which it never ends by itself: the guest writes all of its memory faster than the bandwidth.
fn endless() -> SourceSettings {
    SourceSettings {
        encoder: EncoderSettings { compress: None, xbzrle: None },
        max_bandwidth: Some(4 * MIB),
        downtime_limit: MS,
        max_rounds: u32::MAX,
        verify: Verify::Off,
        ..source_settings(2, 2)
    }
}

/// Runs a migration together with a future that controls it. The time limit is for a test that hangs.
fn asked<F: Future<Output = ()>>(
    guest: Arc<dyn SourceGuest>,
    settings: SourceSettings,
    recorder: Recorder,
    ask: impl FnOnce(Control) -> F,
) -> Ends {
    let control = Control::new();
    let transport = Arc::new(MemoryTransport::new(64 << 10));
    let moving = migrate_watched(guest, Workload::destination(), transport, settings, control.clone(), recorder);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let both = async { tokio::join!(moving, ask(control)).0 };
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(120), both).await.expect("it hangs") })
}

fn asked_hot<F: Future<Output = ()>>(settings: SourceSettings, ask: impl FnOnce(Control) -> F) -> (Arc<Hot>, Ends) {
    let guest = Arc::new(Hot::new());
    let ends = asked(guest.clone(), settings, Recorder::default(), ask);
    (guest, ends)
}

/// Waits until the status satisfies a condition.
async fn until(control: &Control, what: &str, holds: impl Fn(&Status) -> bool) -> Status {
    let since = Instant::now();
    loop {
        let status = control.status();
        if holds(&status) {
            return status;
        }
        assert!(since.elapsed() < Duration::from_secs(60), "{what}: {status:#?}");
        tokio::time::sleep(5 * MS).await;
    }
}

async fn rounds_run(control: &Control) {
    until(control, "a round is sent", |status| status.rounds > 0).await;
}

/// A recorder that stores a value of each round that the source has sent.
fn of_rounds<T: Send + 'static>(of: fn(&RoundTally, Duration) -> T) -> (Recorder, Arc<Mutex<Vec<T>>>) {
    let rounds = Arc::new(Mutex::new(Vec::new()));
    let kept = rounds.clone();
    let recorder = Recorder::calling(move |role, event| {
        if let (Role::Source, Event::RoundSent { tally, duration }) = (role, event) {
            kept.lock().unwrap().push(of(tally, *duration));
        }
    });
    (recorder, rounds)
}

/// The most bytes that a bandwidth limit lets pass in a time: those of a full bucket, and the frames in the queues
/// are included.
fn most(cap: u64, time: Duration) -> u64 {
    let time = time + memferry_stages::token_bucket::BURST;
    u64::try_from(u128::from(cap) * time.as_nanos() / 1_000_000_000).unwrap() + (128 << 10)
}

#[track_caller]
fn completed(ends: &Ends) {
    assert_eq!(ends.source.outcome, Outcome::Completed, "{:?}", ends.source.error);
    assert_eq!(ends.destination.outcome, Outcome::Completed, "{:?}", ends.destination.error);
}

fn changes(ends: &Ends) -> Vec<String> {
    let changed = |(_, event): &(Role, Event)| match event {
        Event::Changed(changed) => Some(changed.to_string()),
        _ => None,
    };
    ends.events.iter().filter_map(changed).collect()
}

#[test]
fn a_migration_gets_a_cap_another_one_and_none_again() {
    // Without a bandwidth limit a round may leave nothing dirty, which must not cause a switchover either.
    let least = Duration::from_nanos(1);
    let uncapped =
        SourceSettings { max_bandwidth: None, downtime_limit: least, max_downtime: Some(least), ..endless() };
    let (recorder, rounds) = of_rounds(|tally, time| (tally.pages.bytes_out, time));
    let ends = asked(Arc::new(Hot::new()), uncapped, recorder, |control| async move {
        rounds_run(&control).await;
        let mut before = None;
        for cap in [Some(2 * MIB), Some(8 * MIB), None] {
            control.set([Change::MaxBandwidth(cap)]).await.unwrap();
            // The round in progress began before the change.
            let first = rounds.lock().unwrap().len() + 1;
            let since = || rounds.lock().unwrap().get(first..).unwrap_or_default().to_vec();
            // With more bandwidth there is a round that the previous limit would not let pass.
            let is_faster = |(bytes, time): &(u64, Duration)| before.is_none_or(|before| *bytes > most(before, *time));
            until(&control, "a round at another bandwidth", |_| since().iter().any(is_faster)).await;
            let keeps = |(bytes, time): &(u64, Duration)| cap.is_none_or(|cap| *bytes <= most(cap, *time));
            assert!(since().iter().all(keeps), "{cap:?}: {:?}", since());
            before = cap;
        }
        control.cancel();
    });
    assert_eq!(ends.source.outcome, Outcome::Cancelled, "{:?}", ends.source.error);
    let reported = changes(&ends);
    assert_eq!(reported[0], "max_bandwidth is changed from unlimited to 2 MiB/s");
    assert_eq!(reported.len(), 3, "{reported:?}");
}

#[test]
fn a_higher_limit_ends_it() {
    let (_, ends) = asked_hot(endless(), |control| async move {
        rounds_run(&control).await;
        control.set([Change::DowntimeLimit(Duration::from_secs(20))]).await.unwrap();
    });
    completed(&ends);
    assert_eq!(changes(&ends), ["downtime_limit is changed from 1ms to 20s"]);
}

#[test]
fn a_deadline_ends_it() {
    let (_, ends) = asked_hot(endless(), |control| async move {
        rounds_run(&control).await;
        let past = control.set([Change::Deadline(Some(MS))]).await.unwrap_err();
        assert!(matches!(&past, ControlError::Invalid { key: "deadline", why } if why.contains("gone")), "{past}");
        // A deadline that has already passed is refused.
        let soon = || [Change::Deadline(Some(control.status().elapsed + Duration::from_secs(1)))];
        while control.set(soon()).await.is_err() {}
    });
    completed(&ends);
    assert!(changes(&ends)[0].starts_with("deadline is changed from none to "), "{:?}", changes(&ends));
}

#[test]
fn a_deadline_that_is_taken_away_ends_nothing() {
    // A machine that is too busy to remove the deadline in time gets more time.
    let mut deadline = 1000 * MS;
    while !is_taken_away(deadline) {
        deadline *= 2;
    }
}

/// Removes a deadline, and checks that nothing ends when it passes; false if it had already ended the migration.
fn is_taken_away(deadline: Duration) -> bool {
    let settings = SourceSettings { deadline: Some(deadline), on_deadline: OnDeadline::Cancel, ..endless() };
    let is_taken = &AtomicBool::new(false);
    let (_, ends) = asked_hot(settings, |control| async move {
        until(&control, "it has begun", |status| status.role.is_some()).await;
        if control.set([Change::Deadline(None)]).await.is_err() {
            return;
        }
        is_taken.store(true, Ordering::Relaxed);
        until(&control, "more time than the deadline", |status| status.elapsed > deadline + 500 * MS).await;
        assert_eq!(control.status().phase, Phase::Active);
        control.set([Change::DowntimeLimit(Duration::from_secs(20))]).await.unwrap();
    });
    let taken = is_taken.load(Ordering::Relaxed);
    if taken {
        completed(&ends);
    }
    taken
}

/// The last figures that an end reports, before its end.
fn last_progress(ends: &Ends, of: Role) -> Progress {
    let figures = |(role, event): &(Role, Event)| match event {
        Event::Progress(progress) if *role == of => Some(progress.clone()),
        _ => None,
    };
    ends.events.iter().rev().find_map(figures).expect("figures")
}

#[test]
fn a_throttle_above_its_ceiling_is_lowered_at_once() {
    let settings = SourceSettings {
        convergence: ConvergenceSettings {
            on_stall: vec![StallStep::Throttle],
            stall_rounds: 1,
            cool_down_rounds: 1,
            throttle: ThrottleSettings { start: 30, step: 1, most: 60 },
            ..ConvergenceSettings::default()
        },
        ..endless()
    };
    let (guest, ends) = asked_hot(settings, |control| async move {
        let throttled = |status: &Status| {
            matches!(status.decision.as_ref().map(|decided| decided.decision), Some(Decision::Throttle(_)))
        };
        until(&control, "it throttles", throttled).await;
        control.set([Change::ThrottleMost(10)]).await.unwrap();
        let reported = |status: &Status| status.progress.as_ref().is_some_and(|progress| progress.throttle == 10);
        until(&control, "it is reported", reported).await;
        control.cancel();
    });
    assert_eq!(ends.source.outcome, Outcome::Cancelled);
    let last = last_progress(&ends, Role::Source);
    assert_eq!((last.throttle, last.wire_rate, last.page_rate, last.dirty_rate), (0, 0.0, 0.0, Some(0.0)));
    assert!(last.expected_downtime.is_none() && last.remaining_bytes > Some(0));
    let levels = guest.throttled();
    let lowered = levels.iter().position(|&percent| percent == 10).unwrap_or_else(|| panic!("{levels:?}"));
    assert!(levels[..lowered].iter().all(|&percent| (30..=60).contains(&percent)), "{levels:?}");
    assert_eq!(levels[lowered..], [10, 0], "at the ceiling nothing rises, and the end lifts it");
}

/// 16 MiB, with a set of 1500 pages that is written continuously, a little each time.
fn warm() -> Arc<Workload> {
    let writer = WriterSettings {
        pattern: Pattern::Uniform,
        pages_per_second: 20_000.0,
        bytes: 16,
        region: Region { from: 0.0, to: 1500.0 / 4096.0 },
    };
    let settings = WorkloadSettings {
        memory: 16 << 20,
        dirty_log: LogChoice::Software,
        fill: Fill { zero: 0.0, text: 0.0, random: 1.0, process: 0.0 },
        writers: vec![writer],
        ..WorkloadSettings::default()
    };
    Workload::source(settings).expect("a workload of 16 MiB")
}

#[test]
fn a_cache_grows_and_shrinks_and_the_destination_stays_exact() {
    const SMALL: u64 = 1 << 20;
    const LARGE: u64 = 16 << 20;
    let xbzrle = XbzrleSettings { cache_bytes: SMALL, on_miss: OnMiss::Raw, cache_first_round: true };
    let settings = SourceSettings {
        encoder: EncoderSettings { compress: None, xbzrle: Some(xbzrle) },
        max_bandwidth: Some(16 * MIB),
        downtime_limit: Duration::from_nanos(1),
        verify: Verify::Full,
        ..endless()
    };
    let (recorder, rounds) = of_rounds(|tally, _| (tally.pages.xbzrle_misses, tally.pages.all));
    let ends = asked(warm(), settings, recorder, |control| async move {
        // The share of misses among the latest 1000 pages, in percent. The rounds after a change fill the cache over
        // time.
        let come_to = |what: &'static str, is_so: fn(u64) -> bool| {
            let (from, rounds) = (rounds.lock().unwrap().len(), rounds.clone());
            let control = control.clone();
            async move {
                let share = |_: &Status| {
                    let rounds = rounds.lock().unwrap();
                    let (mut misses, mut pages) = (0, 0);
                    for round in rounds[from..].iter().rev() {
                        (misses, pages) = (misses + round.0, pages + round.1);
                        if pages >= 1000 {
                            break;
                        }
                    }
                    pages >= 1000 && is_so(misses * 100 / pages)
                };
                until(&control, what, share).await;
            }
        };
        rounds_run(&control).await;
        come_to("most pages are missed", |misses| misses > 60).await;
        let bound = control.status().memory_bound;
        control.set([Change::XbzrleCache(LARGE)]).await.unwrap();
        assert_eq!(control.status().memory_bound, bound + LARGE - SMALL);
        come_to("few pages are missed", |misses| misses < 20).await;
        control.set([Change::XbzrleCache(SMALL)]).await.unwrap();
        assert_eq!(control.status().memory_bound, bound);
        come_to("most pages are missed again", |misses| misses > 60).await;

        let refused = control.set([Change::XbzrleCache(4096)]).await.unwrap_err();
        assert!(refused.to_string().contains("holds no pages"), "{refused}");
        let refused = control.set([Change::XbzrleCache(1 << 50)]).await.unwrap_err();
        assert!(refused.to_string().contains("larger than the guest's memory"), "{refused}");
        assert_eq!(control.status().memory_bound, bound, "nothing has changed");
        control.set([Change::DowntimeLimit(Duration::from_secs(20))]).await.unwrap();
    });
    completed(&ends);
    assert_eq!((ends.source.verified, changes(&ends).len()), (Some(true), 3));
}

#[test]
fn it_switches_over_on_request() {
    let (_, ends) = asked_hot(endless(), |control| async move {
        rounds_run(&control).await;
        control.switch_over().await.unwrap();
        let again = control.switch_over().await.unwrap_err();
        assert!(matches!(again, ControlError::TooLate(_) | ControlError::Over), "{again}");
        until(&control, "it has ended", |status| status.ended.is_some()).await;
        assert_eq!(control.switch_over().await, Err(ControlError::Over));
        assert_eq!(control.set([Change::MaxBandwidth(None)]).await, Err(ControlError::Over));
    });
    completed(&ends);
    let decided =
        |(_, event): &(Role, Event)| matches!(event, Event::Decided(decided) if decided.reason == Reason::Operator);
    assert!(ends.events.iter().any(decided));
}

#[test]
fn in_the_first_round_it_switches_over_at_once_and_sends_the_round_at_the_bandwidth_of_the_switchover() {
    let settings = SourceSettings { max_bandwidth: Some(64 << 10), ..endless() };
    let (_, ends) = asked_hot(settings, |control| async move {
        until(&control, "it is active", |status| status.phase == Phase::Active).await;
        control.switch_over().await.unwrap();
        until(&control, "it is paused", |status| status.phase == Phase::Switchover).await;
        // Two minutes remain at that rate. Only settings that help the paused guest can be changed.
        let late = control.set([Change::DowntimeLimit(2 * MS)]).await.unwrap_err();
        assert!(matches!(&late, ControlError::TooLate(why) if why.contains("downtime_limit")), "{late}");
        control.set([Change::SwitchoverBandwidth(SwitchoverBandwidth::Unlimited)]).await.unwrap();
    });
    completed(&ends);
    let rounds =
        ends.events.iter().filter(|(role, event)| *role == Role::Source && matches!(event, Event::RoundSent { .. }));
    assert_eq!(rounds.count(), 2, "the one that was begun, and the last");
}

#[test]
fn it_does_not_switch_over_above_max_downtime() {
    let settings = SourceSettings { max_downtime: Some(2 * MS), ..endless() };
    let (guest, ends) = asked_hot(settings, |control| async move {
        rounds_run(&control).await;
        until(&control, "a decision", |status| status.decision.is_some()).await;
        let refused = control.switch_over().await.unwrap_err();
        let is_expected = matches!(
            &refused,
            ControlError::AboveMaxDowntime(above) if above.max_downtime == 2 * MS && above.forecast.is_some()
        );
        assert!(is_expected, "{refused}");
        let refused = control.set([Change::DowntimeLimit(3 * MS)]).await.unwrap_err();
        assert_eq!(refused.to_string(), "max_downtime: a downtime_limit of 3ms above a max_downtime of 2ms");
        control.set([Change::MaxDowntime(None)]).await.unwrap();
        control.switch_over().await.unwrap();
    });
    completed(&ends);
    assert_eq!(guest.run_state(), RunState::Paused);
}

#[test]
fn in_the_first_round_a_refusal_names_the_rate_that_is_shown() {
    let settings = SourceSettings { max_bandwidth: Some(64 << 10), max_downtime: Some(2 * MS), ..endless() };
    let (_, ends) = asked_hot(settings, |control| async move {
        let has_rate = |status: &Status| status.progress.as_ref().is_some_and(|now| now.page_rate >= 1.0);
        until(&control, "a rate", has_rate).await;
        let refused = control.switch_over().await.unwrap_err();
        assert!(refused.to_string().contains("are left, which take "), "{refused}");
        control.cancel();
    });
    assert_eq!(ends.source.outcome, Outcome::Cancelled, "{:?}", ends.source.error);
}

#[test]
fn all_of_several_changes_are_made_or_none() {
    let (_, ends) = asked_hot(endless(), |control| async move {
        rounds_run(&control).await;
        let before = control.status().settings;
        let wrong = [Change::MaxBandwidth(Some(20 * MIB)), Change::ThrottleMost(5)];
        let refused = control.set(wrong).await.unwrap_err();
        assert!(refused.to_string().contains("not among the steps of on_stall"), "{refused}");
        assert_eq!(control.status().settings, before);
        let right =
            [Change::MaxDowntime(Some(Duration::from_secs(30))), Change::DowntimeLimit(Duration::from_secs(20))];
        control.set(right).await.unwrap();
    });
    completed(&ends);
    assert_eq!(changes(&ends).len(), 2);
}

#[test]
fn before_the_destination_is_there_settings_can_be_changed_already() {
    let control = Control::new();
    let address = "tcp:127.0.0.1:1".parse().unwrap();
    let transport = Arc::from(memferry_transports::open(&address, Duration::from_secs(30)));
    let guest: Arc<dyn SourceGuest> = Arc::new(Hot::new());
    let sending = memferry_tests::run::source(guest, transport, endless(), Arc::default(), control.clone());
    let asking = async {
        until(&control, "it has begun", |status| status.role.is_some()).await;
        control.set([Change::MaxBandwidth(Some(7 * MIB))]).await.unwrap();
        assert_eq!(control.status().settings.unwrap().max_bandwidth, Some(7 * MIB));
        let slow = control.set([Change::MaxBandwidth(Some(7))]).await.unwrap_err();
        assert!(matches!(&slow, ControlError::Invalid { key: "max_bandwidth", .. }), "{slow}");
        let early = control.switch_over().await.unwrap_err();
        assert!(matches!(&early, ControlError::Refused(why) if why.contains("being set up")), "{early}");
        control.cancel();
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (ended, ()) = runtime.block_on(async { tokio::join!(sending, asking) });
    assert_eq!(ended.outcome, Outcome::Cancelled);
}
