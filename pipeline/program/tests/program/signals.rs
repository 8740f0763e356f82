//! Signals: they end the program even if something else hangs, and leave no guest paused.

use std::fs;
use std::io::{Read, Write};
use std::process::Stdio;

use rustix::process::Signal;

use crate::harness::{Running, Scene, until};
use crate::stuck::{full_pipe, image_scene, notes, terminal};

/// A guest that is written faster than it is sent: its migration ends on request only.
pub(crate) const ENDLESS: &str = r#"
[guest.workload]
memory = "8 MiB"
fill = { random = 1.0 }

[[guest.workload.writers]]
pattern = "uniform"
pages_per_second = 20_000
bytes = 4000

[transport]
address = "tcp:127.0.0.1:0"

[migration]
max_bandwidth = "1 MiB/s"
downtime_limit = "1ms"
max_rounds = 1_000_000
verify = false
"#;

fn endless() -> Scene {
    let scene = Scene::new();
    scene.write("run.toml", ENDLESS);
    scene
}

const RUN: [&str; 5] = ["run", "run.toml", "--host-for", "0s", "--events=events.jsonl"];

fn begun(scene: &Scene) {
    until("a round runs", || scene.path("events.jsonl").exists() && scene.read("events.jsonl").len() > 1000);
}

/// The state letter of a process.
fn state(running: &Running) -> char {
    let stat = fs::read_to_string(format!("/proc/{}/stat", running.id())).unwrap();
    stat.rsplit(") ").next().unwrap().chars().next().unwrap()
}

/// A pause command that does not end before the file `go` exists. It ends with its folder, too.
const HELD_PAUSE: &str = r#"guest.file.pause=["sh", "-c", "touch pausing; until test -e go || ! test -e pausing; do sleep 0.01; done; touch paused"]"#;

/// A send to a file, with a pause command that does not end before the file `go` exists.
fn held_at_its_pause(scene: &Scene, stdout: Stdio, stderr: Stdio) -> Running {
    let resume = notes("resume");
    let arguments = ["send", "file.toml", "--set", HELD_PAUSE, "--set", &resume];
    let running = scene.start_into(&arguments, stdout, stderr);
    until("the guest is being paused", || scene.path("pausing").exists());
    running
}

#[test]
fn the_second_signal_ends_the_program_though_nothing_takes_what_it_says() {
    let scene = image_scene();
    let (pipe, stuck) = full_pipe();
    let held = || Stdio::from(stuck.try_clone().unwrap());
    let running = held_at_its_pause(&scene, held(), held());
    // The first signal waits for the pause command, which does not end.
    running.signal(Signal::TERM);
    running.signal(Signal::INT);
    running.end().expect(130);
    scene.write("go", "");
    drop(pipe);
}

#[test]
fn a_hang_up_cancels_unless_it_was_ignored_at_the_start() {
    let scene = endless();
    let running = scene.start(&RUN);
    begun(&scene);
    running.signal(Signal::HUP);
    running.end().expect(130).says(&["cancelling"]);
    let scene = endless();
    let running = scene.start_by("trap '' HUP; exec \"$0\" \"$@\"", &RUN);
    begun(&scene);
    running.signal(Signal::HUP);
    let so_far = scene.read("events.jsonl").len();
    until("it continues", || scene.read("events.jsonl").len() > so_far + 1000);
    running.signal(Signal::TERM);
    running.end().expect(130);
}

#[test]
fn a_file_that_may_not_grow_costs_the_file() {
    let scene = endless();
    // One block: less than the events of one second.
    let limited = "ulimit -f 1; exec \"$0\" \"$@\"";
    let running = scene.start_by(limited, &[&RUN[..], &["--report", "run.json"]].concat());
    running.until_it_says("events cannot be written to events.jsonl: File too large");
    running.signal(Signal::TERM);
    running
        .end()
        .expect(130)
        .says(&["LOST: the report run.json: File too large", "the events in events.jsonl, of which"]);
}

#[test]
fn ctrl_z_stops_a_program_that_holds_no_guest() {
    let scene = endless();
    let running = scene.start(&RUN);
    begun(&scene);
    running.signal(Signal::TSTP);
    until("it is stopped", || state(&running) == 'T');
    running.signal(Signal::CONT);
    until("it runs again", || state(&running) != 'T');
    running.signal(Signal::TERM);
    running.end().expect(130);
}

#[test]
fn ctrl_z_waits_while_the_guest_is_paused() {
    let scene = image_scene();
    let running = held_at_its_pause(&scene, Stdio::piped(), Stdio::piped());
    running.signal(Signal::TSTP);
    running.until_it_says("the program stops when the migration has ended");
    assert_ne!(state(&running), 'T');
    scene.write("go", "");
    until("it stops", || state(&running) == 'T');
    assert!(scene.path("stream").exists(), "the migration has ended");
    running.signal(Signal::CONT);
    running.end().expect(0).says(&["completed after"]);
}

/// A program that this program starts inherits no signal dispositions from it.
#[test]
fn commands_of_an_operator_have_default_dispositions() {
    let scene = image_scene();
    let pause = r#"guest.file.pause=["sh", "-c", "grep Sig /proc/self/status > dispositions"]"#;
    scene.run(&["send", "file.toml", "--set", pause, "--set", &notes("resume")]).expect(0);
    let text = String::from_utf8(scene.read("dispositions")).unwrap();
    // The C library reserves signals from 32 on for itself.
    let mask = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        u64::from_str_radix(line.rsplit('\t').next().unwrap(), 16).unwrap() & 0x7fff_ffff
    };
    let ours = fs::read_to_string("/proc/self/status").unwrap();
    // This test, a Rust program, ignores SIGPIPE; its children do not. What a shell ignores in the background is inherited, unless
    // the program handles it.
    let inherited = mask(&ours, "SigIgn:") & !(1 << (Signal::PIPE.as_raw() - 1));
    assert_eq!((mask(&text, "SigIgn:") & !inherited, mask(&text, "SigBlk:")), (0, 0), "{text}");
}

/// Lines of a migration of one minute, without the last line.
fn recorded(scene: &Scene) {
    let progress =
        (0..600).map(|tenth| format!("{{\"ms\":{}.0,\"role\":\"source\",\"event\":\"paused\"}}\n", tenth * 100));
    scene.write("events.jsonl", progress.collect::<String>());
}

#[test]
fn watch_ends_when_its_terminal_does() {
    let scene = Scene::new();
    recorded(&scene);
    let (mut person, program) = terminal();
    let own = || Stdio::from(program.try_clone().unwrap());
    let running = scene.start_on(&["watch", "events.jsonl", "--speed", "1"], own(), own(), own());
    assert!(person.read(&mut [0; 4096]).unwrap() > 0);
    drop((program, person));
    running.end();
}

#[test]
fn watch_ends_by_a_signal_and_leaves_the_terminal_as_it_was() {
    for signal in [Signal::TERM, Signal::HUP, Signal::INT] {
        let scene = Scene::new();
        recorded(&scene);
        let (mut person, program) = terminal();
        let before = rustix::termios::tcgetattr(&program).unwrap();
        let own = || Stdio::from(program.try_clone().unwrap());
        let running = scene.start_on(&["watch", "events.jsonl", "--speed", "1"], own(), own(), own());
        assert!(person.read(&mut [0; 4096]).unwrap() > 0);
        until("the terminal is raw", || {
            rustix::termios::tcgetattr(&program).unwrap().local_modes != before.local_modes
        });
        running.signal(signal);
        // Nothing reads its drawing: writes may block.
        running.end().expect(0);
        assert_eq!(rustix::termios::tcgetattr(&program).unwrap().local_modes, before.local_modes);
    }
}

#[test]
fn watch_ends_when_its_reader_goes_and_by_a_signal_when_that_takes_nothing() {
    let scene = Scene::new();
    recorded(&scene);
    let (pipe, stuck) = full_pipe();
    let running = scene.start_into(&["watch", "events.jsonl", "--speed", "0"], stuck.into(), Stdio::piped());
    until("it takes signals", || running.takes(Signal::TERM));
    running.signal(Signal::TERM);
    running.end().expect(0);
    drop(pipe);
    // A program with no output notices it too.
    let (reader, writer) = std::io::pipe().unwrap();
    let (_silent, lines) = std::io::pipe().map(|(reader, writer)| (writer, reader)).unwrap();
    let running = scene.start_on(&["watch", "-"], lines.into(), writer.into(), Stdio::piped());
    drop(reader);
    running.end().expect(0);
}

/// A source with its guest paused, and a destination that is stopped until it is continued.
fn held_at_its_handover(scene: &Scene, resume: &str) -> (Running, Running) {
    let socket = format!("transport.address=unix:{}", scene.path("socket").display());
    let destination = scene.start(&["recv", "recv.toml", "--set", &socket]);
    destination.until_it_says("waiting at ");
    let sets = ["--set", &socket, "--set", HELD_PAUSE, "--set", resume];
    let source = scene.start(&[&["send", "send.toml", "--control", "control"], &sets[..]].concat());
    until("the guest is being paused", || scene.path("pausing").exists());
    destination.signal(Signal::STOP);
    until("the destination stops", || state(&destination) == 'T');
    scene.write("go", "");
    until("the guest is paused", || scene.path("paused").exists());
    assert!(!scene.path("resumed").exists());
    (source, destination)
}

/// Lets the destination detect the end.
fn let_go(destination: Running) {
    destination.signal(Signal::CONT);
    destination.end().expect(1);
}

#[test]
fn a_cancel_is_answered_when_the_guest_is_resumed() {
    let scene = image_scene();
    let (source, destination) = held_at_its_handover(&scene, &notes("resume"));
    scene.run(&["cancel", "control"]).expect(0).says(&["cancelled: the guest continues at the source"]);
    assert!(scene.path("resumed").exists());
    source.end().expect(130);
    let_go(destination);
}

#[test]
fn a_cancel_does_not_say_that_a_guest_continues_which_does_not() {
    let scene = image_scene();
    let (source, destination) = held_at_its_handover(&scene, r#"guest.file.resume=["false"]"#);
    let cancelled = scene.run(&["cancel", "control"]).expect(1);
    assert!(!cancelled.stdout.contains("continues"), "{cancelled}");
    cancelled.says(&["the guest is paused at the source", "the guest could not be resumed here"]);
    source.end().expect(4);
    let_go(destination);
}

/// Even if nothing reads its own messages.
#[test]
fn a_cancel_is_answered_by_a_program_that_nobody_hears() {
    let scene = endless();
    let (pipe, stuck) = full_pipe();
    let arguments = [&RUN[..], &["--log", "trace", "--control", "control"]].concat();
    let running = scene.start_into(&arguments, Stdio::null(), stuck.into());
    begun(&scene);
    scene.run(&["cancel", "control"]).expect(0).says(&["the guest continues at the source"]);
    running.end().expect(130);
    drop(pipe);
}

#[test]
fn no_command_minds_a_standard_output_that_is_closed() {
    let scene = image_scene();
    for arguments in
        [&["probe"][..], &["check", "send.toml"], &["--help"], &["inspect", "send.toml"], &["watch", "send.toml"]]
    {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let ended = scene.start_into(arguments, writer.into(), Stdio::piped()).end();
        assert!(ended.code <= 1 && !ended.stderr.contains("panicked"), "{arguments:?}: {ended}");
    }
}

#[test]
fn nothing_is_left_on_a_terminal_that_a_bar_was_on() {
    let scene = image_scene();
    let (mut person, program) = terminal();
    let own = || Stdio::from(program.try_clone().unwrap());
    let running = scene.start_on(&["send", "file.toml"], Stdio::null(), own(), own());
    drop(program);
    let mut text = Vec::new();
    // The end of a terminal is an error.
    let mut piece = [0; 4096];
    while let Ok(bytes @ 1..) = person.read(&mut piece) {
        text.extend_from_slice(&piece[..bytes]);
    }
    running.end().expect(0);
    let text = String::from_utf8_lossy(&text);
    let verdict = text.find("completed after").unwrap_or_else(|| panic!("{text:?}"));
    assert!(!text[verdict..].contains("\u{1b}["), "the bar is drawn over the verdict: {text:?}");
    person.flush().unwrap();
}
