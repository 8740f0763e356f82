//! A guest is recorded, and its migration planned.

use std::os::unix::fs::PermissionsExt;

use rustix::process::Signal;

use crate::harness::{Scene, noise, until};

const GUEST: &str = "\
[guest.workload]
memory = \"16 MiB\"
[[guest.workload.writers]]
pattern = \"uniform\"
pages_per_second = 2000
bytes = \"64 B\"
[transport]
address = \"tcp:10.1.2.3:4567\"
[migration]
downtime_limit = \"2s\"
verify = false
";

fn recorded() -> Scene {
    let scene = Scene::new();
    scene.write("guest.toml", GUEST);
    let recording = ["record", "guest.toml", "-o", "guest.trace", "--for", "500ms", "--host-for", "0s"];
    scene.run(&recording).expect(0).says(&["guest.trace recorded: ", "intervals", "0 stale pages"]);
    scene
}

#[test]
fn a_recording_is_whole_private_and_holds_no_address() {
    let scene = recorded();
    assert_eq!(std::fs::metadata(scene.path("guest.trace")).unwrap().permissions().mode() & 0o777, 0o600);
    let trace = scene.read("guest.trace");
    assert!(trace.windows(8).any(|bytes| bytes == b"\"xbzrle\""), "the settings");
    assert!(!trace.windows(6).any(|bytes| bytes == b"10.1.2"), "an address");
    let mut names = scene.names(".");
    names.sort();
    assert_eq!(names, ["guest.toml", "guest.trace"]);
}

#[test]
fn a_plan_answers_in_words_and_in_json_with_the_settings_of_the_recording_or_others() {
    let scene = recorded();
    let plan = scene.run(&["plan", "guest.trace", "--bandwidth", "1gbit/s,10 MB/s"]).expect(0);
    plan.says(&["downtime limit: 2.00 s", "1 Gbit/s ", "10 MB/s ", "converges", "The smallest bandwidth"]);
    let set = ["plan", "guest.trace", "--set", "migration.downtime_limit=70ms", "--json"];
    let json = scene.run(&set).expect(0).stdout;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["downtime_limit"], json["bandwidths"].as_array().unwrap().len()), (&0.07.into(), 3));
    let hybrid = ["--set", "migration.mode=hybrid", "--set", "migration.postcopy_after=1"];
    let slow = ["plan", "guest.trace", "--bandwidth", "1 Mbit/s", "--set", "migration.downtime_limit=1ms"];
    let postcopy = scene.run(&[&slow[..], &hybrid[..]].concat()).expect(0);
    postcopy.says(&["Postcopy: the guest runs at its destination before all of its pages are there"]);
    scene.write("other.toml", GUEST.replace("2s", "90ms"));
    scene.run(&["plan", "guest.trace", "other.toml"]).expect(0).says(&["downtime limit: 90.0 ms"]);
}

#[test]
fn what_cannot_be_planned_is_refused_with_what_to_write() {
    let scene = recorded();
    scene.run(&["plan", "guest.trace", "--bandwidth", "fast"]).expect(2).says(&["no bandwidth", "10Gbit/s"]);
    let typo = scene.run(&["plan", "guest.trace", "--set", "encoder.compres=none"]).expect(2);
    typo.says(&["--set", "did you mean `compress`?"]);
    scene.run(&["plan", "guest.toml"]).expect(1).says(&["guest.toml: byte 0: this is no trace of memferry record"]);
    scene.run(&["plan", "none.trace"]).expect(1).says(&["none.trace", "No such file"]);
    let trace = scene.read("guest.trace");
    scene.write("half.trace", &trace[..trace.len() / 2]);
    scene.run(&["plan", "half.trace"]).expect(1).says(&["the trace ends too early"]);
    scene.run(&["record", "guest.toml", "-o", "no/trace"]).expect(2).says(&["there is no folder no"]);
    let hasty = ["record", "guest.toml", "-o", "trace", "--interval", "1ms"];
    scene.run(&hasty).expect(2).says(&["write 10ms or more"]);
}

#[test]
fn a_signal_ends_a_recording_that_is_kept_and_the_next_one_the_guest() {
    let scene = Scene::new();
    scene.write("guest.toml", GUEST);
    let recording = scene.start(&["record", "guest.toml", "-o", "guest.trace"]);
    recording.until_it_says("recording; Ctrl-C ends it");
    recording.signal(Signal::INT);
    recording.until_it_says("the guest is hosted here");
    until("the trace is there", || scene.path("guest.trace").exists());
    recording.signal(Signal::INT);
    recording.end().expect(0).says(&["recorded: ", "guest alive", "0 stale pages"]);
    scene.run(&["plan", "guest.trace"]).expect(0);
}

/// By hashes: a log that compares with copies. Nothing writes to this guest.
#[test]
fn a_file_is_followed_and_left_alone() {
    let scene = Scene::new();
    scene.configure(&["ram"]);
    scene.write("from/ram", noise(300_000, 1));
    scene
        .run(&["record", "send.toml", "-o", "file.trace", "--for", "300ms"])
        .expect(0)
        .says(&["0 pages/s found dirty"]);
    assert_eq!(scene.read("from/ram"), noise(300_000, 1));
    scene.run(&["plan", "file.trace"]).expect(0).says(&["converges"]);
}
