//! The outputs of a running migration: lines of events, metrics for Prometheus.

use std::io::{Read, Write};

use memferry::events::{Outcome, Role};
use memferry_report::event_json::{EventJson, EventLine};
use rustix::process::Signal;

use crate::exposition::Exposition;
use crate::harness::{Scene, free_port, until};

/// A migration of almost a second in one process, with a limit that a busy machine meets.
const GUEST: &str = r#"
[guest.workload]
memory = "32 MiB"
fill = { random = 1.0, zero = 0, text = 0, process = 0 }

[[guest.workload.writers]]
pattern = "uniform"
pages_per_second = 1000
bytes = 64

[transport]
address = "tcp:127.0.0.1:0"

[migration]
max_bandwidth = "40 MiB/s"
downtime_limit = "20s"
"#;

fn scene() -> Scene {
    let scene = Scene::new();
    scene.write("run.toml", GUEST);
    scene
}

/// A migration that takes half a minute, until [`hurry`] ends it.
const SLOWLY: [&str; 4] = ["--set", "migration.max_bandwidth=1 MiB/s", "--control", "control.sock"];

/// Lets a slow migration complete.
fn hurry(scene: &Scene) {
    scene.run(&["set", "control.sock", "max_bandwidth=unlimited"]).expect(0);
}

fn lines(text: &[u8]) -> Vec<EventLine> {
    let text = std::str::from_utf8(text).unwrap();
    text.lines().map(|line| EventLine::from_json(line).unwrap_or_else(|error| panic!("{line}: {error}"))).collect()
}

/// A migration that completed: all required events are present, in a valid order.
#[track_caller]
fn are_of_a_whole_migration(lines: &[EventLine]) {
    assert!(matches!(lines[0], EventLine { role: None, event: EventJson::Started { schema: 1, .. }, .. }));
    for role in [Role::Source, Role::Destination] {
        let of: Vec<_> = lines.iter().filter(|line| line.role == Some(role)).collect();
        assert!(of.windows(2).all(|pair| pair[0].ms <= pair[1].ms));
        let Some(EventJson::Ended(ended)) = of.last().map(|line| &line.event) else { panic!("{:?}", of.last()) };
        assert_eq!(ended.outcome, Outcome::Completed);
        let rounds = of.iter().filter(|line| matches!(line.event, EventJson::RoundSent(_))).count();
        assert!(rounds >= 2, "{role:?} has {rounds} rounds");
        let progress = of.iter().filter(|line| matches!(line.event, EventJson::Progress(_))).count();
        assert!(progress >= 1, "{role:?} has {progress} figures on the way");
    }
    let source = |kind: fn(&EventJson) -> bool| lines.iter().any(|line| kind(&line.event));
    assert!(source(|event| matches!(event, EventJson::Paused)));
    assert!(source(|event| matches!(event, EventJson::Decided(decided) if decided.decision.decision == "switch-over")));
}

#[test]
fn events_are_written_to_a_file() {
    let scene = scene();
    scene.run(&["run", "run.toml", "--host-for", "0s", "--events", "events.jsonl"]).expect(0);
    are_of_a_whole_migration(&lines(&scene.read("events.jsonl")));
    let watched = scene.run(&["watch", "events.jsonl"]).expect(0);
    watched.says(&[
        "source: round 1 done in ",
        "source: the guest is paused at the source",
        "source: completed after ",
    ]);
}

#[test]
fn a_running_migration_is_watched_to_its_end() {
    let scene = scene();
    let running = scene.start(&["run", "run.toml", "--host-for", "10m", "--control", "unix:control.sock"]);
    until("it can be asked", || scene.path("control.sock").exists());
    let watched = scene.run(&["watch", "unix:control.sock"]).expect(0);
    watched.says(&["source: active", "source: round 1 done in ", "source: completed after "]);
    // A late reader receives the past events, too; the path alone is a valid address.
    scene.run(&["watch", "control.sock"]).expect(0).says(&["source: completed after "]);
    drop(running);
}

#[test]
fn a_watch_without_a_target_is_an_error() {
    let scene = Scene::new();
    scene.run(&["watch", "unix:absent.sock"]).expect(1).says(&["absent.sock", "--control"]);
    scene.run(&["watch", "-"]).expect(1).says(&["the events of standard input ended before the migration did"]);
    scene.write("strange", "what is this\n");
    scene.run(&["watch", "strange"]).expect(1).says(&["strange holds no events of a migration"]);
    scene.run(&["watch", "/dev/zero"]).expect(1).says(&["/dev/zero holds no lines of events", "at byte 0 is longer"]);
}

#[test]
fn events_have_standard_output_to_themselves() {
    let scene = scene();
    let ended = scene.run(&["run", "run.toml", "--host-for", "0s", "--events", "-"]).expect(0);
    are_of_a_whole_migration(&lines(ended.stdout.as_bytes()));
    assert!(ended.stderr.contains("completed after"), "{ended}");
}

#[test]
fn a_full_disk_costs_the_events_and_not_the_migration() {
    let ended = scene().run(&["run", "run.toml", "--host-for", "0s", "--events", "/dev/full"]).expect(0);
    ended.says(&["completed after", "the migration continues", "LOST: the events in /dev/full, of which "]);
}

/// A script that resumes the source after a failed migration must not do so because a report is missing.
#[test]
fn a_report_that_is_lost_is_reported_last_and_changes_no_exit_code() {
    let scene = scene();
    let options = ["--report", "/dev/full", "--report", "gone/run.html", "--events", "gone/events.jsonl"];
    std::fs::create_dir(scene.path("gone")).unwrap();
    let running = scene.start(&[&["run", "run.toml", "--host-for", "0s"], &options[..], &SLOWLY].concat());
    until("it has begun", || {
        let begun = scene.names("gone").contains(&"events.jsonl".to_owned());
        begun && scene.run(&["status", "control.sock"]).stdout.starts_with("active, ")
    });
    std::fs::remove_dir_all(scene.path("gone")).unwrap();
    hurry(&scene);
    let ended = running.end().expect(0);
    let last = ended.stderr.lines().last().unwrap();
    for words in [
        "memferry: LOST: the report /dev/full: No space left on device",
        "; the report gone/run.html: No such file",
        "; the events in gone/events.jsonl: the file was removed",
        "; the verdict stands: completed",
    ] {
        assert!(last.contains(words), "{words:?} in {last}");
    }
}

#[test]
fn what_cannot_be_opened_is_refused_before_anything_begins() {
    let scene = scene();
    let address = format!("127.0.0.1:{}", free_port());
    let _holds = std::net::TcpListener::bind(&address).unwrap();
    let refused = scene.run(&["run", "run.toml", "--metrics", &address, "--events", "events.jsonl"]).expect(2);
    refused.says(&["--metrics", "in use"]);
    assert!(!scene.path("events.jsonl").exists());
    for (address, words) in [
        ("nonsense", "the port is missing"),
        (":9464", "the host is missing"),
        ("127.0.0.1:99999", "\"99999\" is no port"),
    ] {
        let refused = scene.run(&["run", "run.toml", "--metrics", address]).expect(2);
        refused.says(&[&format!("--metrics {address}: {words}"), "as in 127.0.0.1:9464"]);
    }
    let folder = "there is no folder absent: make it first";
    for (option, name) in [("--events", "absent/events.jsonl"), ("--control", "absent/control.sock")] {
        let refused = scene.run(&["run", "run.toml", option, name]).expect(2);
        refused.says(&[&format!("{option} {name}: {folder}")]);
    }
    scene.run(&["run", "run.toml", "--events", ""]).expect(2).says(&["--events", "there is no name"]);
}

#[test]
fn prometheus_reads_the_figures_while_it_runs_and_after_it() {
    let scene = scene();
    let address = format!("127.0.0.1:{}", free_port());
    let running =
        scene.start(&[&["run", "run.toml", "--host-for", "10m", "--metrics", &address], &SLOWLY[..]].concat());
    let value = |series: &str| Exposition::scrape(&address).and_then(|page| page.value(series)).unwrap_or(0.0);
    until("pages are on their way", || {
        let page = Exposition::scrape(&address);
        page.is_some_and(|page| {
            page.value(r#"memferry_phase{role="source",phase="active"}"#) == Some(1.0)
                && page.sum("memferry_wire_bytes_total", &["role=\"source\""]) > 0.0
                && page.sum("memferry_stage_seconds_total", &["role=\"source\"", "lane=\"0\"", "state=\"output_wait\""])
                    > 0.0
        })
    });
    hurry(&scene);
    for end in ["source", "destination"] {
        let completed = format!(r#"memferry_migrations_total{{role="{end}",status="completed"}}"#);
        until("it is done", || value(&completed) == 1.0);
    }
    let page = Exposition::scrape(&address).unwrap();
    assert_eq!(page.kind("memferry_downtime_seconds"), Some("histogram"));
    assert_eq!(page.value(r#"memferry_downtime_seconds_count{role="source"}"#), Some(1.0));
    assert!(page.sum("memferry_wire_bytes_total", &["role=\"source\""]) >= f64::from(32 << 20));
    for end in ["source", "destination"] {
        for still in ["wire_bytes_per_second", "page_bytes_per_second", "remaining_bytes", "throttle_ratio"] {
            assert_eq!(page.value(&format!("memferry_{still}{{role=\"{end}\"}}")), Some(0.0), "{still} of the {end}");
        }
    }
    assert_eq!(page.kind("memferry_stage_seconds_total"), Some("counter"));
    assert!(page.sum("memferry_bottleneck_ratio", &["role=\"source\"", "cause=\"processor\""]) > 0.0);
    assert_eq!(page.sum("memferry_build_info", &[concat!("version=\"", env!("CARGO_PKG_VERSION"), "\"")]), 1.0);
    for process in
        ["process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds", "process_start_time_seconds"]
    {
        assert!(page.value(process) > Some(0.0), "{process}");
    }
    let pages = page.sum("memferry_pages_total", &["role=\"source\""]);
    assert!(
        (pages * 4096.0 - page.sum("memferry_page_bytes_total", &["role=\"source\""])).abs() < 1.0,
        "{pages} pages"
    );
    // Otherwise it would continue to host its guest, and to serve.
    drop(running);
}

#[test]
fn figures_are_at_their_place_only_and_a_port_that_was_chosen_is_reported() {
    let scene = scene();
    let running = scene.start(&["run", "run.toml", "--host-for", "10m", "--metrics", "127.0.0.1:0", "--quiet"]);
    let line = running.until_it_says("figures for Prometheus at http://127.0.0.1:");
    let address = line.split("http://").nth(1).unwrap().strip_suffix("/metrics").unwrap();
    assert!(Exposition::scrape(address).is_some());
    let ask = |request: &str| {
        let mut connection = std::net::TcpStream::connect(address).unwrap();
        write!(connection, "{request} HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        answer
    };
    for path in ["/", "/health", "/metrics/"] {
        let answer = ask(&format!("GET {path}"));
        assert!(answer.starts_with("HTTP/1.1 404 ") && answer.contains("the figures are at /metrics"), "{answer}");
    }
    assert!(ask("POST /metrics").starts_with("HTTP/1.1 405 "));
}

#[test]
fn the_figures_of_a_cancelled_migration_can_still_be_read() {
    let scene = scene();
    let address = format!("127.0.0.1:{}", free_port());
    let running =
        scene.start(&[&["run", "run.toml", "--host-for", "10m", "--metrics", &address], &SLOWLY[..]].concat());
    let sum = |name: &str, labels: &[&str]| Exposition::scrape(&address).map_or(0.0, |page| page.sum(name, labels));
    until("pages are on their way", || sum("memferry_wire_bytes_total", &["role=\"source\""]) > 0.0);
    running.signal(Signal::INT);
    until("it is cancelled", || sum("memferry_migrations_total", &["role=\"source\"", "status=\"cancelled\""]) == 1.0);
    assert!(sum("memferry_wire_bytes_total", &["role=\"source\""]) > 0.0);
    assert!(sum("memferry_stage_seconds_total", &["role=\"source\""]) > 0.0);
    running.signal(Signal::INT);
    running.end().expect(130);
}

#[test]
fn a_program_whose_words_nobody_reads_still_heeds_a_signal() {
    let scene = scene();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut program = std::process::Command::new(env!("CARGO_BIN_EXE_memferry"))
        .args([
            "run",
            "run.toml",
            "--host-for",
            "0s",
            "--events",
            "events.jsonl",
            "--set",
            "migration.max_bandwidth=1 MiB/s",
        ])
        .current_dir(scene.path("."))
        .stdout(std::process::Stdio::null())
        .stderr(full)
        .spawn()
        .unwrap();
    until("a page has gone", || scene.path("events.jsonl").exists() && scene.read("events.jsonl").len() > 1000);
    let id = rustix::process::Pid::from_child(&program);
    rustix::process::kill_process(id, Signal::TERM).unwrap();
    assert_eq!(program.wait().unwrap().code(), Some(130));
}

/// A pipe without a reader delays the report, and the hosting with it.
#[test]
fn a_signal_between_the_verdict_and_the_hosting_ends_the_hosting() {
    let scene = scene();
    rustix::fs::mknodat(rustix::fs::CWD, scene.path("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let running = scene.start(&["run", "run.toml", "--host-for", "10m", "--report", "a.json", "--report", "pipe"]);
    until("the first report is written", || scene.path("a.json").exists());
    running.signal(Signal::TERM);
    running.until_it_says("memferry: ending");
    assert!(!std::fs::read(scene.path("pipe")).unwrap().is_empty());
    running.end().expect(0).says(&["completed after", "guest alive: "]);
}

#[test]
fn a_start_that_is_refused_writes_over_nothing() {
    let scene = scene();
    scene.write("events.jsonl", "of another");
    let socket = format!("unix:{}", scene.path("control.sock").display());
    let _listens = std::os::unix::net::UnixListener::bind(scene.path("control.sock")).unwrap();
    scene.run(&["run", "run.toml", "--events", "events.jsonl", "--control", &socket]).expect(2);
    assert_eq!(scene.read("events.jsonl"), b"of another");
    scene.run(&["run", "run.toml", "--events", "run.toml"]).expect(2).says(&["run.toml is named twice"]);
    scene.run(&["run", "run.toml", "--report", "a.html", "--events", "./a.html"]).expect(2);
    assert_eq!(scene.read("run.toml"), GUEST.as_bytes());
}
