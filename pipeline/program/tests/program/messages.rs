//! The program's exit codes, and its messages: they state the place and the remedy.

use std::os::unix::net::UnixListener;

use crate::harness::{Ended, Scene, noise};
use crate::reports::Report;

/// A valid configuration; each test makes one change that is wrong.
const RIGHT: &str = "\
[guest.workload]
memory = \"4 MiB\"

[encoder]
xbzrle_cache = \"1 MiB\"

[pipeline]
lanes = 2

[transport]
address = \"tcp:127.0.0.1:0\"

[migration]
downtime_limit = \"300ms\"
";

#[test]
fn mistakes_in_a_configuration_are_shown_with_their_line_and_what_to_write() {
    let scene = Scene::new();
    let mistakes: [(&str, &str, &[&str]); 18] = [
        ("memory =", "memmory =", &["wrong.toml:2:1", "unknown key `memmory`", "did you mean `memory`?"]),
        ("[encoder]", "[encodre]", &["wrong.toml:4:2", "did you mean `encoder`?"]),
        ("4 MiB", "4 MibiBytes", &["wrong.toml:2:10", "\"4 MibiBytes\" is not a size", "64 MiB"]),
        ("300ms", "300", &["wrong.toml:14:18", "\"300\" is not a length of time", "300ms"]),
        ("\"300ms\"", "300", &["wrong.toml:14:18", "300 has no unit", "300ms"]),
        ("lanes = 2", "lanes = \"2\"", &["wrong.toml:8:9", "without quotes"]),
        ("lanes = 2", "lanes = 0", &["wrong.toml:8:9", "write a number from 1 to"]),
        ("lanes = 2", "connections = 3", &["wrong.toml:8:15", "write a number from 1 to 2"]),
        ("1 MiB", "0 B", &["wrong.toml:5:16", "holds no pages", "delta = \"none\""]),
        ("tcp:127.0.0.1:0", "tpc:127.0.0.1:0", &["wrong.toml:11:11", "no transport \"tpc\"", "tcp:HOST:PORT"]),
        ("tcp:127.0.0.1:0", "file:x", &["wrong.toml:11:11", "after = \"resume\""]),
        ("300ms\"", "1s\"\nmax_bandwidth = \"1 GiB\"", &["wrong.toml:15:17", "\"1 GiB\" is not a rate", "1 Gbit/s"]),
        ("300ms\"", "1s\"\non_deadline = \"stop\"", &["wrong.toml:15:15", "`cancel`, `switch-over`"]),
        (
            "300ms\"",
            "1s\"\nmax_downtime = \"300ms\"",
            &["wrong.toml:15:16", "above a max_downtime", "at least the downtime_limit"],
        ),
        (
            "300ms\"",
            "1s\"\n[convergence]\non_stall = [\"throtle\"]",
            &["wrong.toml:16:13", "unknown value `throtle`", "did you mean `throttle`?"],
        ),
        (
            "300ms\"",
            "1s\"\n[convergence]\nthrottle = { most = 100 }",
            &["wrong.toml:16:21", "write a number from 1 to 99"],
        ),
        (
            "300ms\"",
            "2s\"\n[convergence]\non_stall = [\"raise-downtime-limit\"]",
            &["a limit of 2s cannot be raised to 1s", "write more than downtime_limit"],
        ),
        ("[pipeline]", "[pipeline", &["wrong.toml:7:", "no TOML"]),
    ];
    for (right, wrong, words) in mistakes {
        assert!(RIGHT.contains(right), "{right}");
        scene.write("wrong.toml", RIGHT.replacen(right, wrong, 1));
        for command in ["run", "send", "check"] {
            scene.run(&[command, "wrong.toml"]).expect(2).says(words);
        }
    }
    scene.write("right.toml", RIGHT);
    scene.run(&["check", "right.toml"]).expect(0);
    let combined = ["transport.address=file:x", "migration.after=pause", "pipeline.connections=2"];
    let ended = scene.start_with(&["send", "right.toml"], &combined).end();
    ended.expect(2).says(&["--set", "pipeline.connections=2", "write connections = 1"]);
    scene.start_with(&["send", "right.toml"], &["pipeline"]).end().expect(2).says(&["--set pipeline.lanes=4"]);
}

#[test]
fn bad_usage_is_exit_code_2_and_changes_nothing() {
    let scene = Scene::new();
    scene.write("right.toml", RIGHT);
    let usages: [(&[&str], &[&str]); 9] = [
        (&[], &["Usage: memferry"]),
        (&["sned", "right.toml"], &["unrecognized subcommand", "send"]),
        (&["send"], &["<CONFIG>"]),
        (&["send", "right.toml", "--hostfor", "1s"], &["--host-for"]),
        (&["send", "right.toml", "--host-for", "soon"], &["write a length of time such as 10s"]),
        (&["send", "right.toml", "--log", "loud"], &["\"loud\" is not a level", "debug"]),
        (&["send", "nowhere.toml"], &["nowhere.toml", "No such file", "configs/quickstart.toml"]),
        (&["send", "right.toml", "--report", "no/report.json"], &["no/report.json", "there is no folder no"]),
        (&["send", "right.toml", "--report", "."], &["is a folder", "name a file"]),
    ];
    for (arguments, words) in usages {
        scene.run(arguments).expect(2).says(words);
    }
    assert_eq!(scene.names("."), ["right.toml"]);
}

#[test]
fn the_help_of_each_command_has_an_example() {
    let scene = Scene::new();
    for command in ["run", "send", "recv", "check", "record", "plan", "inspect", "probe"] {
        let example = format!("Examples:\n  memferry {command}");
        scene.run(&[command, "--help"]).expect(0).says(&[&example]);
    }
    scene.run(&["--help"]).expect(0).says(&["Examples:", "Exit codes:", "130  cancelled"]);
    scene.run(&["--version"]).expect(0).says(&["memferry "]);
    scene.run(&["probe"]).expect(0).says(&["PAGEMAP_SCAN"]);
}

/// An image to migrate, with both configurations written.
fn scene() -> Scene {
    let scene = Scene::new();
    scene.configure(&["ram"]);
    scene.write("from/ram", noise(300_000, 1));
    scene
}

fn send(scene: &Scene, sets: &[&str]) -> Ended {
    scene.start_with(&["send", "send.toml", "--report", "send.json"], sets).end()
}

#[test]
fn an_end_that_cannot_begin_says_why() {
    let scene = scene();
    let (_destination, address) = scene.listening(&[]);
    let taken = scene.start_with(&["recv", "recv.toml"], &[&address]).end().expect(1);
    taken.says(&["Address already in use", "end it or use another port"]);
    let _live = UnixListener::bind(scene.path("live")).unwrap();
    let live = scene.start_with(&["recv", "recv.toml"], &["transport.address=unix:live"]).end();
    live.expect(1).says(&["live", "already listening", "choose another path"]);
    let missing = scene.start_with(&["recv", "recv.toml"], &["transport.address=file:missing"]).end();
    missing.expect(1).says(&["cannot read file:missing", "No such file"]);
    scene.run(&["inspect", "missing"]).expect(1).says(&["missing cannot be read", "No such file"]);
    let images = "guest.file.images=[{ id = \"ram\", path = \"from/none\" }]";
    send(&scene, &[images]).expect(1).says(&["image ram", "from/none", "No such file"]);
    let report = Report::read(&scene.path("send.json"));
    assert!(report.text("error").contains("from/none"));
    let nobody = ["transport.address=tcp:127.0.0.1:1", "transport.connect_timeout=50ms"];
    send(&scene, &nobody).expect(1).says(&["cannot connect", "start the destination there", "connect_timeout"]);
    let nowhere = ["transport.address=file:no/stream", "migration.after=resume"];
    send(&scene, &nowhere).expect(1).says(&["no/stream", "No such file"]);
}

/// A source that is refused receives the reason; the destination continues to wait for one that it can accept.
#[test]
fn a_source_that_is_refused_is_sent_the_reason_and_the_wait_continues() {
    let scene = scene();
    let (destination, address) = scene.listening(&["migration.require_verify=true", "pipeline.max_lanes=2"]);
    let refused = send(&scene, &[&address, "migration.verify=false"]).expect(1);
    refused.says(&["the destination refused", "no digests", "require_verify"]);
    send(&scene, &[&address, "pipeline.lanes=4"]).expect(1).says(&["4 lanes", "at most 2"]);
    send(&scene, &[&address]).expect(0);
    destination.end().expect(0).says(&["turned away", "require_verify"]);
}

#[test]
fn images_that_do_not_fit_are_refused_at_both_ends() {
    let refuse = |sets: &[&str], words: &[&str]| {
        let scene = scene();
        scene.write("to/there", "mine");
        let (destination, address) = scene.listening(sets);
        send(&scene, &[&address]).expect(1).says(words);
        destination.end().expect(1).says(words);
        assert_eq!(scene.names("to"), ["there"]);
        assert_eq!(scene.read("to/there"), b"mine");
    };
    let other = "guest.file.images=[{ id = \"disk\", path = \"to/disk\" }]";
    refuse(&[other], &["[\"ram\"]", "[\"disk\"]", "each block needs its image"]);
    let there = "guest.file.images=[{ id = \"ram\", path = \"to/there\" }]";
    refuse(&[there], &["to/there exists", "overwrite = true"]);
    let nowhere = "guest.file.images=[{ id = \"ram\", path = \"no/ram\" }]";
    refuse(&[nowhere], &["no/ram", "No such file"]);
}

/// A destination that dies between Go and Running: it is unknown whether the guest started, and the source reports
/// that.
#[test]
fn a_handover_that_nobody_confirms_is_exit_code_3() {
    let scene = scene();
    let (destination, address) = scene.listening(&["guest.file.start=[\"sh\", \"-c\", \"kill -KILL $PPID\"]"]);
    let commands = ["guest.file.pause=[\"touch\", \"paused\"]", "guest.file.resume=[\"touch\", \"resumed\"]"];
    let source = send(&scene, &[&address, commands[0], commands[1]]).expect(3);
    source.says(&["unconfirmed after", "the guest stays paused here", "look at the destination"]);
    assert_eq!(destination.end().code, 128 + 9);
    assert!(scene.path("paused").exists() && !scene.path("resumed").exists(), "it may run at the destination");
    assert_eq!(Report::read(&scene.path("send.json")).text("status"), "unconfirmed");
}

/// A start that fails after Go: the destination reports it, and both operators learn of it.
#[test]
fn a_start_that_fails_is_reported_at_both_ends() {
    let scene = scene();
    let (destination, address) = scene.listening(&["guest.file.start=[\"sh\", \"-c\", \"echo no licence; exit 7\"]"]);
    let source = send(&scene, &[&address]);
    assert!([1, 3].contains(&source.code), "{source}");
    source.says(&["no licence"]);
    destination.end().expect(1).says(&["the images are complete and in place, but the start command", "no licence"]);
    assert!(scene.read("from/ram") == scene.read("to/ram"));
}

#[test]
fn a_source_that_cannot_resume_is_exit_code_4() {
    let scene = scene();
    let (destination, address) = scene.listening(&["guest.file.images=[{ id = \"ram\", path = \"to/ram\" }]"]);
    let commands = ["guest.file.pause=[\"false\"]", "guest.file.resume=[\"false\"]"];
    let source = send(&scene, &[&address, commands[0], commands[1]]).expect(4);
    source.says(&["the pause command [\"false\"]", "stays paused", "the resume command [\"false\"]"]);
    assert_eq!(Report::read(&scene.path("send.json")).text("status"), "failed");
    destination.end().expect(1).says(&["the source gave up", "the pause command"]);
    assert_eq!(scene.names("to"), [""; 0]);
}

/// A guest that lives in the program continues to be hosted after a failure, for the configured time.
#[test]
fn a_hosted_guest_outlives_a_failure() {
    let scene = Scene::new();
    scene.write("right.toml", RIGHT);
    let nobody = ["transport.address=tcp:127.0.0.1:1", "transport.connect_timeout=50ms"];
    let ended = scene.start_with(&["send", "right.toml", "--host-for", "100ms"], &nobody).end();
    ended.expect(1).says(&["cannot connect", "guest alive: ", " 0 stale pages"]);
    let source = scene.start_with(&["send", "right.toml"], &nobody);
    source.until_it_says("the guest is hosted here: Ctrl-C ends it");
    source.signal(rustix::process::Signal::INT);
    source.end().expect(1).says(&["ending", "guest alive: "]);
}
