//! Every configuration that ships runs as it is, in a folder that looks like the project's after a build. Only sizes
//! and times are reduced.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::harness::{Ended, Scene, free_port};
use crate::reports::Report;

/// A limit that is never met on any machine: all rounds are run, and each brings a stall nearer.
const NEVER: &str = "migration.downtime_limit=1us";
/// How each configuration is reduced. One that is missing here, and has a table for workloads, gets the default.
const SMALL: [(&str, &[&str]); 7] = [
    (
        "quickstart",
        &["guest.workload.memory=32 MiB", "migration.max_bandwidth=20 MiB/s", NEVER, "migration.max_rounds=3"],
    ),
    ("hot", &["guest.workload.memory=64 MiB", "migration.deadline=2s", NEVER]),
    // In this time the balloon reports free pages before the scanner reaches them.
    ("hints", &["guest.workload.memory=48 MiB", "migration.max_bandwidth=20 MiB/s", FEW]),
    (
        "throttle",
        &[
            "guest.workload.memory=16 MiB",
            "migration.max_bandwidth=40 MiB/s",
            NEVER,
            "migration.max_rounds=8",
            "convergence.stall_rounds=1",
            "convergence.throttle={ start = 50, step = 49, most = 99 }",
        ],
    ),
    (
        "recover",
        &[
            "guest.workload.memory=32 MiB",
            "transport.faults.cut_after=[\"4 MiB\", \"10 MiB\"]",
            "transport.faults.refuse_for=300ms",
            "migration.recovery.backoff=50ms",
            FEW,
        ],
    ),
    (
        "postcopy",
        &["guest.workload.memory=32 MiB", "migration.max_bandwidth=20 MiB/s", NEVER, "migration.postcopy_after=1"],
    ),
    (
        "xbzrle-only",
        &[
            "guest.workload.memory=32 MiB",
            "encoder.xbzrle_cache=4 MiB",
            "migration.max_bandwidth=40 MiB/s",
            NEVER,
            "migration.max_rounds=3",
        ],
    ),
];
const DEFAULT: &[&str] = &["guest.workload.memory=48 MiB", FEW];
/// A busy machine that does not converge completes with these in less than a minute.
const FEW: &str = "migration.max_rounds=5";
/// When the rounds are used up, the guest is moved all the same.
const MOVED: &str = "migration.on_deadline=switch-over";

fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
}

/// The names of the configurations, without `.toml`, in order.
fn configs() -> Vec<String> {
    let files = fs::read_dir(project().join("configs")).unwrap().map(|entry| entry.unwrap().path());
    let configs = files.filter(|file| file.extension().is_some_and(|extension| extension == "toml"));
    let mut names: Vec<_> = configs.map(|file| file.file_stem().unwrap().to_str().unwrap().to_owned()).collect();
    names.sort();
    assert!(names.len() >= 10, "{names:?}");
    names
}

fn file(name: &str) -> String {
    project().join(format!("configs/{name}.toml")).display().to_string()
}

/// A folder with the files that the configurations expect of a build.
fn built() -> Scene {
    let scene = Scene::new();
    fs::create_dir_all(scene.path("target/release")).unwrap();
    symlink(env!("CARGO_BIN_EXE_memferry"), scene.path("target/release/memferry")).unwrap();
    symlink(project().join("Cargo.lock"), scene.path("Cargo.lock")).unwrap();
    scene
}

fn run(scene: &Scene, name: &str, more: &[&str]) -> Ended {
    let small = SMALL.iter().find(|(small, _)| *small == name).map_or(DEFAULT, |(_, sets)| sets);
    let sets = [small, more].concat();
    scene.start_with(&["run", &file(name), "--host-for", "100ms", "--report", "report.json"], &sets).end()
}

#[test]
fn each_says_what_it_shows_and_is_accepted() {
    let scene = built();
    for name in configs() {
        let text = fs::read_to_string(file(&name)).unwrap();
        assert!(text.lines().take(2).all(|line| line.starts_with("# ") && line.len() > 20), "{name}");
        let check = |more: &[&str]| scene.run(&[&["check", &file(&name)], more].concat());
        match name.as_str() {
            // The files to receive do not exist yet.
            "image-recv" => drop(check(&["--for", "recv"]).expect(0).says(&["# no figures, "])),
            // Nor does the memory of a guest that does not run.
            "memcached" => drop(check(&[]).expect(1).says(&["target/memcached/from", "No such file"])),
            "kvm" if memferry_stages::host::kvm().is_err() => drop(check(&[]).expect(1).says(&["KVM"])),
            _ => drop(check(&[]).expect(0).says(&["# memory at the source: at most "])),
        }
    }
}

/// Each configuration except those that have a test of their own, here or in another module.
#[test]
fn each_runs_as_it_is() {
    let others = ["quickstart", "hot", "image-send", "image-recv", "kvm", "memcached"];
    for name in configs().iter().filter(|name| !others.contains(&name.as_str())) {
        if name == "postcopy"
            && let Err(why) = memferry_stages::missing::supported()
        {
            crate::skip::skipped(why.to_string());
            continue;
        }
        let scene = built();
        run(&scene, name, &[MOVED]).expect(0).says(&["completed after", "guest alive: ", " 0 stale pages"]);
        let report = Report::read(&scene.path("report.json"));
        report.is_of_a_whole_migration();
        assert_eq!(report.verified(), Some(true), "{name}");
        shows_what_it_says(name, &report, &scene);
    }
}

fn shows_what_it_says(name: &str, report: &Report, scene: &Scene) {
    let [compressed, xbzrle] = ["compressed", "xbzrle"].map(|kind| report.in_rounds(kind));
    match name {
        "compression-only" => assert!(compressed > 0 && xbzrle == 0),
        "raw" => assert_eq!((compressed, xbzrle), (0, 0)),
        "xbzrle-only" => assert!(compressed == 0 && xbzrle > 0),
        "tcp-lanes" => assert_eq!(report.at("/guest/blocks").as_array().unwrap().len(), 2),
        "throttle" => assert!(report.decided("throttle"), "{}", report.at("/decisions")),
        "unix" => assert!(!scene.path("target/memferry.sock").exists(), "the socket is removed"),
        "file" => drop(scene.run(&["inspect", "target/guest.memferry"]).expect(0)),
        "hints" => shows_what_was_excluded(report),
        "recover" => shows_what_was_lost(report),
        "postcopy" => {
            assert!(report.decided("postcopy"), "{}", report.at("/decisions"));
            assert!(report.at("/postcopy/faults/placed").as_u64() > Some(0), "{}", report.at("/postcopy"));
        }
        other => panic!("{other} is new: say here what it shows"),
    }
}

fn shows_what_was_lost(report: &Report) {
    assert_eq!(report.at("/outages/lost"), 2);
    let lost = report.at("/lost_connections").as_array().unwrap();
    assert_eq!(lost.len(), 2, "{lost:#?}");
    for (lost, attempt) in lost.iter().zip(1..) {
        assert_eq!(lost["attempt"], attempt);
        assert!(lost["outage_ms"].as_f64().is_some_and(|ms| ms >= 300.0), "{lost:#}");
    }
}

fn shows_what_was_excluded(report: &Report) {
    let excluded = |why: &str| report.at(&format!("/excluded/{why}")).as_u64().unwrap();
    let pages = report.at("/guest/pages").as_u64().unwrap();
    let in_all = pages - excluded("ignored");
    assert_eq!(excluded("ignored"), 8192, "32 MiB");
    assert!(excluded("unplugged").abs_diff(in_all / 10) <= 1, "a tenth of {in_all} pages");
    assert!(excluded("hinted") > in_all / 4, "half of {in_all} pages is free: {}", excluded("hinted"));
}

#[test]
fn the_quickstart_compresses_in_round_1_and_sends_deltas_after_it() {
    let scene = built();
    run(&scene, "quickstart", &[]).expect(0).says(&["completed after", ", verified", "guest alive: ", " 0 stale"]);
    let report = Report::read(&scene.path("report.json"));
    report.is_of_a_whole_migration();
    assert_eq!((report.text("status"), report.verified()), ("completed", Some(true)));
    let of = |round: &Value, kind: &str| round[kind].as_u64().unwrap();
    let (first, rest) = report.rounds().split_first().unwrap();
    assert!(rest.len() >= 2, "{rest:#?}");
    assert!(of(first, "compressed") > 0 && of(first, "xbzrle") == 0, "{first:#}");
    // After round 1 only pages for which a delta is not possible are compressed.
    let helpless = |round: &Value| of(round, "xbzrle_misses") + of(round, "xbzrle_overflows");
    assert!(rest.iter().all(|round| of(round, "compressed") <= helpless(round)), "{rest:#?}");
    assert!(rest.iter().any(|round| of(round, "xbzrle") > 0), "{rest:#?}");
}

#[test]
fn the_hot_guest_is_cancelled_at_its_deadline_or_moved_all_the_same() {
    let scene = built();
    run(&scene, "hot", &[]).expect(130).says(&["cancelled after", "the deadline of 2.00 s", "guest alive: "]);
    assert_eq!(Report::read(&scene.path("report.json")).text("status"), "cancelled");
    run(&scene, "hot", &[MOVED]).expect(0).says(&["completed after", ", verified", "guest alive: ", " 0 stale"]);
}

#[test]
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
fn the_machine_lives_through_its_move() {
    if let Err(why) = memferry_stages::host::kvm() {
        return crate::skip::skipped(why);
    }
    let scene = built();
    let small = ["guest.kvm.memory=32 MiB", "guest.kvm.region=4 MiB", NEVER, "migration.max_rounds=4"];
    let sets = [&small[..], &[MOVED]].concat();
    // Longer if the host is too busy for the machine to make progress.
    let is_alive = |seconds: u32| {
        let host_for = format!("{seconds}s");
        let options = ["run", &file("kvm"), "--report", "report.json", "--host-for", &host_for];
        let ended = scene.start_with(&options, &sets).end();
        let ended = ended.expect(0).says(&["completed after", ", verified", "guest alive: ", " 0 wrong pages"]);
        !ended.stdout.contains("alive: 0 heartbeats")
    };
    assert!([1, 4, 16, 40].into_iter().any(is_alive));
    let report = Report::read(&scene.path("report.json"));
    report.is_of_a_whole_migration();
    assert!(report.in_rounds("compressed") > 0 && report.in_rounds("xbzrle") > 0);
}

#[test]
fn the_images_are_sent_and_received_by_the_pair() {
    let scene = built();
    let address = format!("transport.address=tcp:127.0.0.1:{}", free_port());
    let source = scene.start_with(&["send", &file("image-send")], &[&address]);
    scene.start_with(&["recv", &file("image-recv")], &[&address]).end().expect(0);
    source.end().expect(0);
    for (sent, received) in [("target/release/memferry", "program"), ("Cargo.lock", "versions")] {
        assert!(scene.read(sent) == scene.read(&format!("target/received.{received}")), "{sent}");
    }
}
