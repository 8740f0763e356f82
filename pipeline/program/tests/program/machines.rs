//! A virtual machine moved between two programs. Skipped without KVM.

use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use crate::harness::{Ended, PATIENCE, Running, Scene};
use crate::skip::skipped;

const CONFIG: &str = "\
[guest.kvm]
memory = \"16 MiB\"
vcpus = 2
region = \"2 MiB\"
pages_per_second = 0
dirty_log = \"dirty-log\"

[transport]
address = \"tcp:127.0.0.1:0\"
connect_timeout = \"1m\"

[migration.recovery]
attempts = 0
";
/// Two rounds; the second is the last, and takes long enough to be observed.
const TWICE: [&str; 4] =
    ["migration.max_rounds=1", "migration.on_deadline=switch-over", "encoder.compress=none", "encoder.delta=none"];

/// A destination that waits, and its address as a setting; `None`, with a message, without KVM.
fn scene() -> Option<Scene> {
    if let Err(why) = memferry_stages::host::kvm() {
        skipped(why);
        return None;
    }
    let scene = Scene::new();
    scene.write("send.toml", CONFIG);
    scene.write("recv.toml", CONFIG);
    Some(scene)
}

fn send(scene: &Scene, sets: &[&str]) -> Running {
    scene.start_with(&["send", "send.toml"], sets)
}

/// The number before a word in the line about the guest.
#[track_caller]
fn figure(text: &str, before: &str, behind: &str) -> u64 {
    let (_, rest) = text.split_once(before).unwrap_or_else(|| panic!("no {before:?} in {text}"));
    let (number, _) = rest.split_once(behind).unwrap_or_else(|| panic!("no {behind:?} in {rest}"));
    number.replace(',', "").parse().unwrap_or_else(|_| panic!("{number:?} in {text}"))
}

/// Hosts a guest for a while, or longer if the host is too busy for the guest to make progress: the guest continues
/// to run.
#[track_caller]
fn lives_on(code: i32, hosts: impl Fn() -> Running) -> Ended {
    let mut time = Duration::from_millis(200);
    loop {
        let program = hosts();
        program.until_it_says("hosted here");
        thread::sleep(time);
        program.signal(Signal::INT);
        let ended = program.end().expect(code).says(&["guest alive: ", " 0 wrong pages"]);
        let is_alive = figure(&ended.stdout, "guest alive: ", " heartbeats here") > 0;
        if is_alive && figure(&ended.stdout, ", pass ", ",") > 1 {
            return ended;
        }
        assert!(time < PATIENCE, "{ended}");
        time *= 2;
    }
}

#[test]
fn a_machine_lives_on_in_the_program_that_received_it() {
    let Some(scene) = scene() else { return };
    for log in ["dirty-log", "dirty-ring", "userfault", "hash"] {
        let log = format!("guest.kvm.dirty_log={log}");
        lives_on(0, || {
            let (destination, address) = scene.listening(&[&log]);
            let source =
                send(&scene, &[&address, &log, "migration.max_bandwidth=4 MiB/s", TWICE[1], "migration.max_rounds=4"]);
            source.end().expect(0).says(&["completed after", ", verified"]);
            destination
        });
    }
}

#[test]
fn a_machine_survives_its_destination_in_the_last_round_and_can_be_sent_again() {
    let Some(scene) = scene() else { return };
    let ended = lives_on(1, || {
        let (destination, address) = scene.listening(&[]);
        let slowly = [&[address.as_str(), "migration.max_bandwidth=1 MiB/s"], &TWICE[..]].concat();
        let source = send(&scene, &slowly);
        source.until_it_says("the guest is paused");
        destination.signal(Signal::KILL);
        assert_eq!(destination.end().code, 128 + 9);
        source
    });
    ended.says(&["failed after"]);
}

#[test]
fn a_machine_that_cannot_be_is_refused_with_what_would_be_right() {
    let scene = Scene::new();
    scene.write("wrong.toml", CONFIG.replace("vcpus = 2", "vcpus = 99").replace("2 MiB", "64 MiB"));
    let words = ["99 vCPUs", "write a number from 1 to 16", "a region of 64 MiB", "wrong.toml:3"];
    scene.run(&["check", "wrong.toml"]).expect(2).says(&words);
}
