use super::*;
use memferry::events::Outages;
use memferry::samples::{ended, every_event, script};
use memferry::stage_id::StageId;
use metrics_util::MetricKind;
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use std::collections::BTreeSet;

/// The metrics recorded while `run` runs.
fn recorded(run: impl FnOnce(&MetricsObserver)) -> Snapshotter {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    metrics::with_local_recorder(&recorder, || run(&MetricsObserver::new()));
    snapshotter
}

/// Every recorded metric, by name and labels without the role.
fn figures(run: impl FnOnce(&MetricsObserver)) -> HashMap<String, DebugValue> {
    let entry = |(key, _, _, value): (metrics_util::CompositeKey, _, _, _)| {
        let labels = key.key().labels().filter(|label| label.key() != "role").map(|label| label.value().to_owned());
        (std::iter::once(key.key().name().to_owned()).chain(labels).collect::<Vec<_>>().join(" "), value)
    };
    recorded(run).snapshot().into_vec().into_iter().map(entry).collect()
}

fn play(observer: &MetricsObserver, events: &[Event]) {
    events.iter().for_each(|event| observer.event(Role::Source, event));
}

fn counter(figures: &HashMap<String, DebugValue>, name: &str) -> u64 {
    match figures[name] {
        DebugValue::Counter(count) => count,
        ref other => panic!("{name} is {other:?}"),
    }
}

fn gauge(figures: &HashMap<String, DebugValue>, name: &str) -> f64 {
    match figures[name] {
        DebugValue::Gauge(value) => value.into_inner(),
        ref other => panic!("{name} is {other:?}"),
    }
}

#[test]
fn a_migration_leaves_its_figures() {
    let recorded = figures(|observer| play(observer, &script(Role::Source)));
    assert_eq!(counter(&recorded, "memferry_rounds_total"), 2);
    assert_eq!(counter(&recorded, "memferry_pages_total compressed"), 150_000);
    assert_eq!(counter(&recorded, "memferry_pages_total xbzrle"), 890);
    assert_eq!(counter(&recorded, "memferry_wire_bytes_total"), 512 << 20);
    assert_eq!(counter(&recorded, "memferry_excluded_pages_total hinted"), 5000);
    assert_eq!(counter(&recorded, "memferry_migrations_total completed"), 1);
    assert_eq!(counter(&recorded, "memferry_decisions_total switch-over"), 1);
    assert!((gauge(&recorded, "memferry_stage_seconds_total encoder 0 busy") - 2.2).abs() < 1e-9);
    assert_eq!(recorded["memferry_phase completed"], DebugValue::Gauge(1.0.into()));
    assert_eq!(recorded["memferry_phase active"], DebugValue::Gauge(0.0.into()));
    assert_eq!(recorded["memferry_dirty_pages"], DebugValue::Gauge(0.0.into()), "it is completed");
    assert_eq!(recorded["memferry_downtime_seconds"], DebugValue::Histogram(vec![0.213.into()]));
}

fn progress(wire_bytes: u64, busy_ms: u64) -> Event {
    let reading = |lane| Reading {
        stage: StageId::encoder(lane),
        busy: Duration::from_millis(busy_ms),
        input_wait: Duration::ZERO,
        output_wait: Duration::ZERO,
        limit_wait: Duration::ZERO,
        batches: 1,
        pages: 64,
        bytes: 0,
    };
    let stages = vec![reading(0), reading(1)];
    Event::Progress(Progress { wire_bytes, stages, throttle: 25, ..Progress::default() })
}

#[test]
fn what_rises_counts_nothing_twice_while_it_runs() {
    let recorded = figures(|observer| play(observer, &[progress(100, 10), progress(250, 30), progress(250, 30)]));
    assert_eq!(counter(&recorded, "memferry_wire_bytes_total"), 250);
    assert!((gauge(&recorded, "memferry_stage_seconds_total encoder 1 busy") - 0.030).abs() < 1e-9);
    assert!((gauge(&recorded, "memferry_throttle_ratio") - 0.25).abs() < 1e-9);
}

#[test]
fn what_is_known_no_more_is_not_shown_as_it_was() {
    let known = Progress {
        dirty_rate: Some(7.0),
        expected_downtime: Some(Duration::from_secs(1)),
        bottleneck: ended(Role::Source).bottleneck,
        ..Progress::default()
    };
    let recorded = figures(|observer| play(observer, &[Event::Progress(known), progress(1, 1)]));
    for name in
        ["memferry_dirty_bytes_per_second", "memferry_expected_downtime_seconds", "memferry_bottleneck_ratio wire"]
    {
        assert!(gauge(&recorded, name).is_nan(), "{name}");
    }
}

#[test]
fn migrations_add_up_and_a_failed_one_is_still_there() {
    let failed =
        Ended { outcome: Outcome::Failed, wire_bytes: 300, stages: Vec::new(), downtime: None, ..ended(Role::Source) };
    let recorded = figures(|observer| {
        play(observer, &[progress(250, 30), Event::Ended(Box::new(failed))]);
        play(observer, &[progress(40, 5)]);
    });
    assert_eq!(counter(&recorded, "memferry_wire_bytes_total"), 340);
    assert!((gauge(&recorded, "memferry_stage_seconds_total encoder 1 busy") - 0.035).abs() < 1e-9);
    assert_eq!(counter(&recorded, "memferry_migrations_total failed"), 1);
    assert!(!recorded.contains_key("memferry_downtime_seconds"));
}

#[test]
fn outages_add_up_and_one_without_an_end_counts() {
    let outages = |lost, secs| Outages { lost, time: Duration::from_secs(secs), ..Outages::default() };
    let end = |outages| Event::Ended(Box::new(Ended { outages, ..ended(Role::Source) }));
    let lost = |attempt| Event::Disconnected { attempt, why: "closed".into() };
    let again = |attempt, secs| Event::Reconnected { attempt, outage: Duration::from_secs(secs), put_back_bytes: 4096 };
    let recorded = figures(|observer| {
        play(observer, &[lost(1), again(2, 3), lost(2), again(3, 4), lost(3), end(outages(3, 17))]);
        play(observer, &[lost(1), again(2, 5), end(outages(1, 5))]);
    });
    assert_eq!(counter(&recorded, "memferry_connections_lost_total"), 4);
    assert_eq!(counter(&recorded, "memferry_sent_again_bytes_total"), 3 * 4096);
    assert!((gauge(&recorded, "memferry_outage_seconds_total") - 22.0).abs() < 1e-9);
}

#[test]
fn postcopy_leaves_its_figures() {
    let lost = Ended { outcome: Outcome::Lost, postcopy: Some(memferry::samples::postcopy()), ..ended(Role::Source) };
    let recorded = figures(|observer| play(observer, &[Event::Ended(Box::new(lost))]));
    assert_eq!(counter(&recorded, "memferry_migrations_total lost"), 1);
    assert_eq!(counter(&recorded, "memferry_postcopy_missing_pages_total"), 24_691);
    assert_eq!(counter(&recorded, "memferry_postcopy_faults_total"), 6001);
    assert_eq!(recorded["memferry_postcopy_seconds"], DebugValue::Histogram(vec![4.21.into()]));
    assert_eq!(recorded["memferry_postcopy_discard_seconds paused"], DebugValue::Histogram(vec![0.00041.into()]));
    assert!(recorded.contains_key("memferry_postcopy_wait_seconds 0.99"));
}

/// The rows of the module's table: name, kind, labels.
fn table() -> BTreeSet<(String, String, String)> {
    let source = include_str!("mod.rs");
    let rows = source.lines().filter_map(|line| line.strip_prefix("//! | `memferry_"));
    rows.map(|row| {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        (format!("memferry_{}", cells[0].trim_end_matches('`')), cells[1].to_owned(), cells[2].to_owned())
    })
    .collect()
}

#[test]
fn the_table_lists_what_is_described_and_left_and_nothing_else() {
    let snapshot = recorded(|observer| play(observer, &every_event())).snapshot().into_vec();
    let mut left = BTreeSet::new();
    for (key, unit, description, _) in snapshot {
        let name = key.key().name().to_owned();
        assert!(description.is_some(), "{name} is not described");
        for (ending, expected) in [
            ("_seconds", Unit::Seconds),
            ("_seconds_total", Unit::Seconds),
            ("_bytes", Unit::Bytes),
            ("_bytes_total", Unit::Bytes),
        ] {
            assert!(!name.ends_with(ending) || unit == Some(expected), "{name} is in {unit:?}");
        }
        // Seconds that only rise: see the module.
        let is_counter = key.kind() == MetricKind::Counter || name.ends_with("_seconds_total");
        assert_eq!(is_counter, name.ends_with("_total"), "{name}");
        assert_eq!(key.kind() == MetricKind::Histogram, BUCKETS.iter().any(|(known, _)| *known == name), "{name}");
        let kind = if is_counter { "counter".into() } else { format!("{:?}", key.kind()).to_lowercase() };
        let labels = key.key().labels().map(metrics::Label::key).collect::<Vec<_>>().join(", ");
        left.insert((name, kind, labels));
    }
    assert_eq!(left, table());
}
