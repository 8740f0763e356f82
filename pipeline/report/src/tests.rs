//! Report and table of a made-up migration.

use std::time::Duration;

use super::account::Accountant;
use super::*;
use memferry::bottleneck::Cause;
use memferry::controller::forecast::{FixedCost, Forecast};
use memferry::controller::reason::{Reason, Stalled};
use memferry::events::{Event, Observer, Outcome, Role};
use memferry::samples::{ended, script};

fn accountant() -> Accountant {
    let accountant = Accountant::default();
    for role in [Role::Source, Role::Destination] {
        script(role).iter().for_each(|event| accountant.event(role, event));
    }
    accountant
}

fn report() -> Report {
    let accountant = accountant();
    let (source, destination) = (accountant.account(Role::Source), accountant.account(Role::Destination));
    Report::new(Ends::Both, &ended(Role::Source), &source, Some(&destination))
}

fn names(value: &serde_json::Value) -> String {
    value.as_object().unwrap().keys().map(String::as_str).collect::<Vec<_>>().join(" ")
}

#[test]
fn the_report_has_exactly_the_names_that_were_agreed() {
    let json = serde_json::to_value(report()).unwrap();
    let sorted = |text: &str| {
        let mut words: Vec<_> = text.split_whitespace().collect();
        words.sort_unstable();
        words.join(" ")
    };
    let top = "schema role status error verified checked guest total_ms setup_ms downtime_ms downtime forecast decisions changes \
               wire_bytes excluded throughput_bytes_per_s memory_bound_bytes memory_peak_bytes bottleneck \
               bottleneck_percent cpu_ms rounds stages lost_connections outages postcopy";
    let round = "round ms sample pages zero raw compressed xbzrle unchanged xbzrle_misses xbzrle_overflows bytes_in bytes_out \
                 dirty_after";
    let stage = "name lane busy_ms input_wait_ms output_wait_ms limit_wait_ms batches pages";
    assert_eq!(sorted(&names(&json)), sorted(top));
    assert_eq!(sorted(&names(&json["guest"])), "blocks bytes pages");
    assert_eq!(sorted(&names(&json["guest"]["blocks"][0])), "bytes id page_size");
    assert_eq!(
        sorted(&names(&json["downtime"])),
        "durable_ms final_sync_ms final_transfer_ms handover_ms load_ms pause_ms prepare_ms resume_ms start_ms state_ms \
         verify_ms"
    );
    assert_eq!(sorted(&names(&json["excluded"])), "hinted hints_dropped ignored unplugged");
    assert_eq!(
        sorted(&names(&json["forecast"])),
        "durable_ms error_percent expected_ms handover_ms load_ms pause_ms prepare_ms remaining_bytes start_ms state_ms \
         sync_ms transfer_ms verify_ms"
    );
    let shares = "processor limit destination wire guest source";
    assert_eq!(sorted(&names(&json["bottleneck_percent"])), sorted(shares));
    assert_eq!(sorted(&names(&json["decisions"][0])), "decision expected_ms reason round why");
    assert_eq!(sorted(&names(&json["rounds"][0])), sorted(round));
    assert_eq!(sorted(&names(&json["stages"][0])), sorted(stage));
    let json = serde_json::to_value(postcopy::sample()).unwrap();
    let top = "missing_pages time_ms urgent_pages discarded_ahead_ms discarded_paused_ms faults";
    assert_eq!(sorted(&names(&json)), sorted(top));
    let faults = "faults requests zeros placed duplicates discarded retries waits";
    assert_eq!(sorted(&names(&json["faults"])), sorted(faults));
    let waits = "count total_ms p50_ms p99_ms max_ms histogram";
    assert_eq!(sorted(&names(&json["faults"]["waits"])), sorted(waits));
    assert_eq!(json["faults"]["waits"]["histogram"][0], serde_json::json!([160.0, 400]));
}

#[test]
fn the_report_says_what_the_events_said() {
    let report = report();
    assert_eq!((report.schema, report.role, report.status), (1, Ends::Both, Outcome::Completed));
    assert_eq!(report.end.verified, Some(true));
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!((&json["role"], &json["status"]), (&"run".into(), &"completed".into()));
    assert_eq!((report.end.total_ms, report.end.setup_ms, report.end.downtime_ms), (2500.0, 100.0, Some(213.0)));
    // 212 ms were expected, 213 ms was the result.
    let forecast = report.end.forecast.unwrap();
    assert_eq!((forecast.expected_ms, forecast.error_percent), (212.0, Some(-0.5)));
    assert_eq!(report.decisions[0].decision, "switch-over");
    assert_eq!(report.guest.bytes, 1 << 30);
    let ExcludedPages { hinted, dropped, unplugged, ignored } = report.end.excluded;
    assert_eq!((hinted, dropped, unplugged, ignored), (5000, 3, 2048, 0));
    assert_eq!(report.rounds.iter().map(|round| round.dirty_after).collect::<Vec<_>>(), [Some(900), Some(0)]);
    for round in &report.rounds {
        assert_eq!(
            round.pages.zero + round.pages.raw + round.pages.compressed + round.pages.xbzrle + round.pages.unchanged,
            round.pages.all
        );
    }
    assert_eq!(
        report.end.stages.iter().map(|stage| stage.name.raw()).collect::<Vec<_>>(),
        ["scanner", "encoder", "loader"]
    );
    assert_eq!((report.memory_bound_bytes, report.end.memory_peak_bytes), (128 << 20, 20 << 20));
    assert_eq!(report.bottleneck, "processor 96 %, wire 25 %, destination 12 %, max_bandwidth 0 %");
    assert_eq!(
        (report.end.bottleneck_percent.share(Cause::Destination), report.end.bottleneck_percent.share(Cause::Guest)),
        (Some(0.125), None)
    );
    assert_eq!(report.end.cpu_ms, 4600.0);
    // 2.5 s, of which 100 ms are setup, and there was no connection for 2.3 s.
    assert!((report.throughput_bytes_per_s - f64::from(512 << 20) / 0.1).abs() < 1.0);
}

#[test]
fn the_report_is_written_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("report.json");
    report().write(&file).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(json["status"], "completed");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    assert!(report().write(&folder.path().join("absent/report.json")).is_err());
}

#[test]
fn a_report_goes_through_a_link_and_leaves_it_there() {
    let folder = tempfile::tempdir().unwrap();
    let (file, link) = (folder.path().join("report.json"), folder.path().join("link"));
    std::fs::write(&file, "old").unwrap();
    std::os::unix::fs::symlink(&file, &link).unwrap();
    report().write(&link).unwrap();
    assert!(link.symlink_metadata().unwrap().is_symlink());
    serde_json::from_slice::<serde_json::Value>(&std::fs::read(&file).unwrap()).unwrap();
}

#[test]
fn the_table_fits_a_terminal() {
    let accountant = accountant();
    let (source, destination) = (accountant.account(Role::Source), accountant.account(Role::Destination));
    let verdict = table::verdict(&ended(Role::Source), &source);
    let text = format!("{verdict}\n\n{}", table::summary(Ends::Both, &source, Some(&destination)));
    insta::assert_snapshot!(text, @r"
    completed after 2.50 s: 1.00 GiB moved, downtime 213 ms, verified

     round    time   pages    zero    raw compressed xbzrle unchanged       in      out dirty after
         1  2.10 s 262,144 100,000 12,144    150,000      0         0 1.00 GiB  512 MiB         900
    2 last 90.0 ms   1,000       0     10          0    890       100 3.91 MiB 66.4 KiB           0

    decided     round 1: switch over: expected downtime 212 ms for 87.9 KiB (pause 1.00 ms, state 1.00
                ms, sync 2.00 ms, transfer 91.0 ms, load 1.00 ms, verify 110 ms, durable 1.00 ms,
                prepare 1.00 ms, start 2.00 ms, handover 2.00 ms), limit 300 ms
    downtime    213 ms: pause 2.00 ms, state 5.00 ms, sync 3.00 ms, transfer 88.0 ms, load 2.00 ms,
                verify 100 ms, durable 1.00 ms, prepare 3.00 ms, start 4.00 ms, handover 5.00 ms
    forecast    212 ms (-0 %): pause 1.00 ms, state 1.00 ms, sync 2.00 ms, transfer 91.0 ms, load 1.00
                ms, verify 110 ms, durable 1.00 ms, prepare 1.00 ms, start 2.00 ms, handover 2.00 ms
    wire        512 MiB at 5.00 GiB/s, setup 100 ms
    checked     196,608 of 262,144 pages read again as sent, 196,608 of 262,144 pages as loaded
    excluded    5,000 pages hinted free, 2,048 pages unplugged
    memory      20.0 MiB at most, 128 MiB allowed
    bottleneck  processor 96 %, wire 25 %, destination 12 %, max_bandwidth 0 %
    busiest     the encoder of lane 0: 96 % of the time
    processor   4.60 s of the whole process
    ");
    assert!(text.lines().all(|line| line.chars().count() <= 100));
}

#[test]
fn of_many_rounds_the_first_and_the_last_are_shown() {
    let mut account = accountant().account(Role::Source);
    let last = account.rounds.pop().unwrap();
    account.rounds.extend(vec![account.rounds[0].clone(); 29]);
    account.rounds.push(last);
    let text = table::summary(Ends::Source, &account, None);
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[9], "  ... 19 rounds more");
    assert!(lines[13].starts_with("2 last") && lines[14].is_empty(), "{text}");
}

#[test]
fn each_decision_is_reported_once_with_its_figures() {
    let mut account = accountant().account(Role::Source);
    let decided = |round, decision| {
        let reason = Reason::Stall(Stalled::NoNewLeast { rounds: 2 });
        Decided { round, decision, reason, limit: Duration::from_millis(300), forecast: None }
    };
    let us = Duration::from_micros;
    let fixed = FixedCost { sync: us(2160), verify: us(280_000), handover: us(1010), ..FixedCost::default() };
    let forecast = Forecast { remaining_bytes: 139.0 * 1024.0 * 1024.0, transfer: us(1_390_000), fixed };
    account.decided = vec![
        decided(1, Decision::AnotherRound),
        Decided { forecast: Some(forecast), ..decided(2, Decision::Throttle(50)) },
        decided(4, Decision::RaiseLimit(Duration::from_millis(800))),
        decided(5, Decision::GiveUp),
    ];
    let text = table::summary(Ends::Source, &account, None);
    let lines: Vec<_> = text.lines().skip_while(|line| !line.starts_with("decided")).take(4).collect();
    insta::assert_snapshot!(lines.join("\n"), @r"
    decided     round 2: throttle the guest to 50 %: 2 rounds brought no new least of what remains;
                expected downtime 1.67 s for 139 MiB (sync 2.16 ms, transfer 1.39 s, verify 280 ms,
                handover 1.01 ms), limit 300 ms
                round 4: the downtime limit is raised to 800 ms, for 2 rounds brought no new least of
    ");
    account.decided = (0..40).map(|round| decided(round, Decision::Throttle(50))).collect();
    let text = table::summary(Ends::Source, &account, None);
    assert_eq!(text.lines().filter(|line| line.contains(": throttle the guest to 50 %")).count(), 12, "{text}");
    assert!(text.contains("... 28 decisions more"), "{text}");
}

/// Two connections are lost: the first in a switchover, the second for good.
fn disconnected() -> account::Account {
    let mut account = account::Account::default();
    let (s, why) = (Duration::from_secs, || "the destination closed it".to_owned());
    for (at, event) in [
        (3, Event::Paused),
        (4, Event::Disconnected { attempt: 1, why: why() }),
        (4, Event::Resumed),
        (5, Event::NotReached { tries: 1, why: "refused".into(), again_in: s(1) }),
        (6, Event::NotReached { tries: 2, why: "refused".into(), again_in: s(2) }),
        (8, Event::Reconnected { attempt: 2, outage: s(4), put_back_bytes: 3 << 20 }),
        (9, Event::Paused),
        (10, Event::Resumed),
        (12, Event::Disconnected { attempt: 2, why: why() }),
        (12, Event::Ended(Box::new(ended(Role::Source)))),
    ] {
        account.enter(&event, s(at));
    }
    account
}

#[test]
fn lost_connections_are_reported_with_what_they_cost() {
    let account = disconnected();
    let report = Report::new(Ends::Source, &ended(Role::Source), &account, None);
    let lost = |attempt, at_ms, outage_ms, failed_tries, put_back_bytes, paused_ms| LostConnectionReport {
        attempt,
        at_ms,
        why: "the destination closed it".into(),
        outage_ms,
        failed_tries,
        put_back_bytes,
        paused_ms,
    };
    let expected = [lost(1, 4000.0, Some(4000.0), 2, 3 << 20, Some(1000.0)), lost(2, 12_000.0, None, 0, 0, None)];
    assert_eq!(report.lost_connections, expected);
    let s = Duration::from_secs;
    assert_eq!(account.series.outages(), [(s(4), Some(s(8))), (s(12), None)]);
    assert_eq!(account.series.paused(), [(s(3), Some(s(4))), (s(9), Some(s(10)))]);
    let text = table::summary(Ends::Source, &account, None);
    let lines: Vec<_> = text.lines().skip_while(|line| !line.starts_with("lost ")).take(3).collect();
    insta::assert_snapshot!(lines.join("\n"), @r"
    lost        connection 1 after 4.00 s, made again after 4.00 s, 3.00 MiB sent again, the guest was
                paused for 1.00 s: the destination closed it
                connection 2 after 12.0 s, not made again: the destination closed it
    ");
    assert!(!table::summary(Ends::Source, &accountant().account(Role::Source), None).contains("lost "));
}

#[test]
fn a_guest_that_was_lost_in_postcopy_says_what_is_missing_and_what_to_do() {
    let lost = Ended {
        outcome: Outcome::Lost,
        error: Some("the rest is lost: cancelled".into()),
        postcopy: Some(memferry::samples::postcopy()),
        ..ended(Role::Destination)
    };
    let mut account = accountant().account(Role::Destination);
    account.enter(&Event::Ended(Box::new(lost.clone())), Duration::from_secs(1));
    insta::assert_snapshot!(table::verdict(&lost, &account), @"lost after 2.50 s: the rest is lost: cancelled; 100 of its pages (400 KiB) are missing here, and threads that touch one wait for ever: end what is left of the guest here; its source has it as it was at the switchover; the guest was paused for 213 ms");
    let text = table::summary(Ends::Destination, &account, None);
    let lines: Vec<_> =
        text.lines().filter(|line| line.starts_with("postcopy") || line.starts_with("discards")).collect();
    insta::assert_snapshot!(lines.join("\n"), @r"
    postcopy    24,691 pages missing at the start, 100 of them still after 4.21 s; 5,678 urgent (5,678
    discards    3.20 ms while the guest ran at its source, 410 µs while it was paused, 8 pages by the
    ");
    assert!(!text.contains("forecast") && !text.contains("until it was resumed"), "{text}");
}

#[test]
fn a_failure_says_why_and_claims_nothing() {
    let failed =
        Ended { outcome: Outcome::Failed, error: Some("disk full".into()), verified: None, ..ended(Role::Source) };
    let verdict = |ended: &Ended| table::verdict(ended, &account::Account::default());
    assert_eq!(verdict(&failed), "failed after 2.50 s: disk full; the guest was paused for 213 ms");
    assert_eq!(verdict(&Ended { downtime: None, ..failed.clone() }), "failed after 2.50 s: disk full");
    let mut account = account::Account::default();
    account.enter(&Event::Ended(Box::new(failed)), Duration::from_secs(1));
    let table = table::summary(Ends::Source, &account, None);
    assert!(table.contains("downtime    213 ms until it was resumed at the source: pause "), "{table}");
    assert!(!table.contains("forecast"), "a forecast is measured by a switchover that came to its end: {table}");
}
