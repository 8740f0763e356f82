//! A guest that is started at its destination before all of its pages are there: whole, by command, and lost with either end.

use std::time::Duration;

use memferry_stages::missing;
use rustix::process::Signal;
use serde_json::Value;

use crate::harness::{Running, Scene, until};
use crate::openapi::OpenApi;
use crate::reports::Report;
use crate::skip::skipped;

/// 16 MiB of noise that is written many times faster than it is sent, with a limit that is never met.
const HOT: &str = r#"
[guest.workload]
memory = "16 MiB"
fill = { random = 1.0, zero = 0, text = 0, process = 0 }
dirty_log = "software"

[[guest.workload.writers]]
pattern = "uniform"
pages_per_second = 10_000
bytes = 4000

[encoder]
compress = "none"
delta = "none"

[transport]
address = "tcp:127.0.0.1:0"

[migration]
mode = "hybrid"
max_bandwidth = "8 MiB/s"
downtime_limit = "1us"
max_rounds = 1_000_000

[migration.recovery]
backoff = "50ms"
"#;

/// Whether this host can run these tests.
fn can_run() -> bool {
    missing::supported().map_err(|why| skipped(why.to_string())).is_ok()
}

fn scene() -> Scene {
    let scene = Scene::new();
    scene.write("hot.toml", HOT);
    scene
}

#[test]
fn a_guest_that_does_not_converge_moves_and_says_what_it_waited_for() {
    if !can_run() {
        return;
    }
    let (scene, api) = (scene(), OpenApi::read());
    let files = ["--report", "run.json", "--report", "run.html", "--events", "run.jsonl"];
    let run = [&["run", "hot.toml", "--control", "run.sock", "--host-for", "10m"][..], &files].concat();
    let program = scene.start_with(&run, &["migration.postcopy_after=1"]);
    program.until_it_says("once the guest is started at the destination before all of its memory is there (postcopy)");
    program.until_it_says("the guest runs at the destination, and what is left follows");
    until("it has ended", || status(&scene, "run.sock")["phase"] == "completed");
    api.check("Status", &status(&scene, "run.sock"));
    program.signal(Signal::INT);
    let ended = program.end().expect(0);
    let ended = ended.says(&["postcopy: postcopy_after is 1 round", "guest alive: ", " 0 stale pages", ", verified"]);
    for name in ["postcopy  ", "waits  ", "discards  "] {
        assert!(ended.stdout.lines().any(|line| line.starts_with(name)), "{name} is missing: {ended}");
    }
    let report = Report::read(&scene.path("run.json"));
    assert_eq!((report.text("status"), report.verified()), ("completed", Some(true)));
    let figure = |pointer: &str| report.at(&format!("/postcopy/{pointer}")).as_f64().unwrap();
    assert!(figure("missing_pages") > 0.0 && figure("time_ms") > 0.0, "{}", report.at("/postcopy"));
    assert!(figure("faults/placed") >= figure("missing_pages"), "{}", report.at("/postcopy"));
    let (requests, waits) = (figure("faults/requests"), figure("faults/waits/count"));
    assert!(requests > 0.0 && waits > 0.0 && waits <= requests, "{}", report.at("/postcopy"));
    let page = String::from_utf8(scene.read("run.html")).unwrap();
    assert!(page.contains("Postcopy: the guest ran before all of its pages were there"));
    let events = String::from_utf8(scene.read("run.jsonl")).unwrap();
    for role in ["source", "destination"] {
        let phase = format!(r#""role":"{role}","event":"phase","phase":"postcopy""#);
        assert!(events.contains(&phase), "{phase}");
    }
}

#[test]
fn an_operator_has_it_happen_where_the_mode_allows_it() {
    if !can_run() {
        return;
    }
    let scene = scene();
    let begin = |sets: &[&str]| {
        let program = scene.start_with(&["run", "hot.toml", "--control", "run.sock", "--host-for", "0s"], sets);
        until("a page is sent", || status(&scene, "run.sock")["phase"] == "active");
        program
    };
    let program = begin(&[]);
    scene.run(&["postcopy", "run.sock"]).expect(0).says(&["accepted: what is left follows while the guest runs"]);
    program.end().expect(0).says(&["postcopy: the operator asked for it; ", "completed after", "postcopy  "]);
    let program = begin(&["migration.mode=precopy"]);
    scene.run(&["postcopy", "run.sock"]).expect(1).says(&["mode"]);
    scene.run(&["cancel", "run.sock"]).expect(0);
    program.end().expect(130);
}

#[test]
fn a_check_says_what_it_costs_and_a_file_guest_is_refused() {
    let scene = scene();
    scene.run(&["check", "hot.toml"]).expect(0).says(&["mode = \"hybrid\"", "# postcopy: once the guest runs"]);
    let precopy = scene.run(&["check", "hot.toml", "--set", "migration.mode=precopy"]).expect(0);
    assert!(!precopy.stdout.contains("# postcopy"), "{precopy}");
    scene.configure(&["ram"]);
    let sets = ["migration.mode=hybrid", "migration.recovery.attempts=10"];
    let refused = scene.start_with(&["check", "send.toml", "--for", "send"], &sets).end().expect(2);
    refused.says(&["mode \"hybrid\" with a guest of files", "write mode = \"precopy\""]);
}

#[test]
fn every_page_follows_where_the_switch_comes_first() {
    if !can_run() {
        return;
    }
    let scene = scene();
    let sets = ["migration.mode=postcopy", "migration.max_bandwidth=unlimited"];
    let program = scene.start_with(&["run", "hot.toml", "--report", "run.json"], &sets);
    program.end().expect(0).says(&["postcopy: before the first round", "completed after", " 0 stale pages"]);
    assert_eq!(Report::read(&scene.path("run.json")).at("/postcopy/missing_pages"), 4096);
}

/// Two programs, of which the destination runs the guest and the source has most of its pages.
struct Apart {
    scene: Scene,
    source: Running,
    destination: Running,
}

impl Apart {
    fn begin() -> Self {
        let scene = scene();
        let receive = ["recv", "hot.toml", "--report", "recv.json", "--control", "recv.sock", "--host-for", "0s"];
        let destination = scene.start(&receive);
        let line = destination.until_it_says("waiting at ");
        let address = format!("transport.address={}", line.split("waiting at ").nth(1).unwrap());
        // It lasts for longer than any test.
        let slow = ["migration.mode=postcopy", "migration.max_bandwidth=64 KiB/s", address.as_str()];
        let send = ["send", "hot.toml", "--report", "send.json", "--control", "send.sock", "--host-for", "0s"];
        let source = scene.start_with(&send, &slow);
        for socket in ["send.sock", "recv.sock"] {
            until("the guest runs there", || status(&scene, socket)["phase"] == "postcopy");
        }
        Self { scene, source, destination }
    }

    #[track_caller]
    fn until_disconnected(&self, socket: &str) {
        until("it is disconnected", || {
            let status = status(&self.scene, socket);
            status["phase"] == "disconnected" && status["postcopy"] == true
        });
    }
}

fn status(scene: &Scene, socket: &str) -> Value {
    serde_json::from_str(&scene.run(&["status", socket, "--json"]).stdout).unwrap_or_default()
}

#[test]
fn a_destination_whose_source_is_killed_says_what_is_lost() {
    if !can_run() {
        return;
    }
    let apart = Apart::begin();
    apart.scene.run(&["cancel", "recv.sock"]).expect(1).says(&["too late"]);
    // A signal that is too late takes nothing from the next one.
    apart.destination.signal(Signal::INT);
    apart.destination.until_it_says("it can be given up only while there is no connection");
    apart.source.signal(Signal::KILL);
    apart.source.until_it_is_dead();
    apart.until_disconnected("recv.sock");
    apart.destination.until_it_says("the guest runs here and waits for pages that are missing");
    apart.destination.signal(Signal::INT);
    let ended = apart.destination.end().expect(5);
    ended.says(&[
        "lost after",
        "the rest is lost",
        "of its pages",
        "are missing here",
        "end what is left of the guest here",
    ]);
    assert_eq!(Report::read(&apart.scene.path("recv.json")).text("status"), "lost");
}

#[test]
fn a_source_whose_destination_is_killed_tries_again_until_it_is_cancelled() {
    if !can_run() {
        return;
    }
    let apart = Apart::begin();
    apart.scene.run(&["postcopy", "send.sock"]).expect(1).says(&["too late: the guest runs at the destination"]);
    apart.destination.signal(Signal::KILL);
    apart.destination.until_it_is_dead();
    apart.until_disconnected("send.sock");
    apart
        .source
        .until_it_says("the guest runs at the destination and needs what is left here; trying to connect again");
    apart.source.until_it_says("the guest needs what is left here; trying again in");
    apart.source.signal(Signal::INT);
    let ended = apart.source.end().expect(5);
    ended.says(&[
        "lost after",
        "the rest stays here",
        "which may be resumed only if nothing that it did since matters",
    ]);
    assert_eq!(Report::read(&apart.scene.path("send.json")).text("status"), "lost");
}

/// The control API gives a guest up too, and says so.
#[test]
fn a_cancel_gives_up_a_guest_whose_source_is_gone() {
    if !can_run() {
        return;
    }
    let apart = Apart::begin();
    apart.source.signal(Signal::KILL);
    apart.source.until_it_is_dead();
    apart.until_disconnected("recv.sock");
    apart
        .scene
        .run(&["cancel", "recv.sock"])
        .expect(1)
        .says(&["the guest is lost: it was started without all of its memory"]);
    apart.destination.end().expect(5);
}

/// Both connections of it are cut twice while pages follow: nothing is lost.
#[test]
fn a_source_that_returns_brings_the_rest() {
    if !can_run() {
        return;
    }
    let scene = scene();
    let cuts = "transport.faults={ cut_after = [\"6 MiB\", \"10 MiB\"], refuse_for = \"300ms\" }";
    let sets = ["migration.mode=postcopy", "migration.max_bandwidth=20 MiB/s", cuts];
    let program = scene.start_with(&["run", "hot.toml", "--report", "run.json"], &sets);
    program.end().expect(0).says(&["completed after", " 0 stale pages", "made again after"]);
    let report = Report::read(&scene.path("run.json"));
    assert_eq!(report.at("/outages/lost"), 2);
    let gap = Duration::from_millis(600);
    assert!(report.at("/outages/time_ms").as_f64().unwrap() >= gap.as_secs_f64() * 1e3);
}
