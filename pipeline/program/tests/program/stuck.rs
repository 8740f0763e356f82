//! Outlets that block: a pipe without a reader, a terminal on hold. A migration runs as if they were not there.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::process::Stdio;
use std::thread;

use memferry::transports::Address;
use memferry_cli::api::client;
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::harness::{Scene, noise, until};
use crate::signals::ENDLESS;

/// A pipe without room, which stays full as long as its reader lives.
pub(crate) fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    while writer.write(&[b'x'; 4096]).is_ok() {}
    while writer.write(b"x").is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).unwrap();
    (reader, writer)
}

/// A terminal: the user's side, and the program's.
pub(crate) fn terminal() -> (File, File) {
    let person = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&person).unwrap();
    unlockpt(&person).unwrap();
    let name = ptsname(&person, Vec::new()).unwrap();
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let program = rustix::fs::open(&name, flags, rustix::fs::Mode::empty()).unwrap();
    (person.into(), program.into())
}

/// A guest of one image: `send.toml`, `recv.toml`, and `file.toml` which sends it to a file.
pub(crate) fn image_scene() -> Scene {
    let scene = Scene::new();
    scene.configure(&["ram"]);
    scene.write("from/ram", noise(4 << 20, 7));
    let to_file = scene.read("send.toml");
    let to_file = String::from_utf8(to_file).unwrap().replace("tcp:127.0.0.1:0", "file:stream");
    scene.write("file.toml", to_file + "\n[migration]\nafter = \"resume\"\n");
    scene
}

/// A command of the guest: it creates a file of the command's name.
pub(crate) fn notes(command: &str) -> String {
    format!("guest.file.{command}=[\"touch\", \"{command}d\"]")
}

#[test]
fn a_standard_error_that_takes_nothing_holds_up_neither_end() {
    let scene = image_scene();
    let address = format!("transport.address=unix:{}", scene.path("socket").display());
    let (pipe, stuck) = full_pipe();
    let quiet = |writer: &PipeWriter| Stdio::from(writer.try_clone().unwrap());
    let receives = ["recv", "recv.toml", "--log", "debug", "--set", &address];
    let destination = scene.start_into(&receives, Stdio::piped(), quiet(&stuck));
    until("it listens", || scene.path("socket").exists());
    let (pause, resume) = (notes("pause"), notes("resume"));
    let sends = ["send", "send.toml", "--log", "debug", "--set", &address, "--set", &pause, "--set", &resume];
    let source = scene.start_into(&sends, Stdio::piped(), quiet(&stuck));
    source.end().expect(0).says(&["completed after"]);
    destination.end().expect(0).says(&["completed after"]);
    assert!(scene.path("paused").exists() && !scene.path("resumed").exists());
    assert_eq!(scene.read("from/ram"), scene.read("to/ram"));
    drop(pipe);
}

#[test]
fn a_standard_output_that_takes_nothing_costs_neither_the_verdict_nor_its_code() {
    let scene = image_scene();
    let (pipe, stuck) = full_pipe();
    let send = |stdout: PipeWriter| scene.start_into(&["send", "file.toml"], stdout.into(), Stdio::piped()).end();
    send(stuck).expect(0).says(&["completed after"]);
    // Neither does a pipe whose reader is gone.
    let (reader, closed) = io::pipe().unwrap();
    drop(reader);
    send(closed).expect(0);
    drop(pipe);
}

/// With Ctrl-S before the start, the terminal accepts no output from the first line on.
#[test]
fn a_terminal_on_hold_does_not_hold_up_the_migration() {
    let scene = image_scene();
    let (mut person, program) = terminal();
    person.write_all(b"\x13").unwrap();
    let held = || Stdio::from(program.try_clone().unwrap());
    let running = scene.start_into(&["send", "file.toml", "--log", "info"], held(), held());
    running.end().expect(0);
    assert!(scene.path("stream").exists());
    // Confirms that the terminal was on hold: the output arrives only when it is released.
    person.write_all(b"\x11").unwrap();
    drop(program);
}

#[test]
fn events_wait_for_the_reader_of_a_pipe_and_the_migration_does_not() {
    let scene = image_scene();
    rustix::fs::mknodat(rustix::fs::CWD, scene.path("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let arguments = ["send", "file.toml", "--events", "pipe"];
    scene.run(&arguments).expect(0).says(&["LOST: the events in pipe: nobody reads this pipe", "completed after"]);
    let reader = thread::spawn({
        let pipe = scene.path("pipe");
        move || {
            let mut text = String::new();
            File::open(pipe).unwrap().read_to_string(&mut text).map(|_| text)
        }
    });
    scene.run(&arguments).expect(0);
    let text = reader.join().unwrap().unwrap();
    assert!(text.lines().last().unwrap().contains(r#""event":"ended""#), "{text}");
}

/// Far more lines than can be queued: each change of a setting is one.
#[test]
fn what_was_dropped_is_said_once_there_is_room() {
    let scene = Scene::new();
    scene.write("run.toml", ENDLESS);
    let (pipe, stuck) = full_pipe();
    let arguments = ["run", "run.toml", "--control", "control", "--host-for", "0s"];
    let running = scene.start_into(&arguments, Stdio::piped(), stuck.into());
    let address = Address::Unix(scene.path("control"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let set = |ms: u32| {
        let change = serde_json::json!({ "downtime_limit": format!("{ms}ms") });
        runtime.block_on(client::set(&address, change.as_object().unwrap())).is_ok()
    };
    until("it can be asked", || set(1));
    assert!((0..1000).all(|count| set(1 + count % 2)));
    let reader = thread::spawn(move || {
        let mut text = Vec::new();
        { pipe }.read_to_end(&mut text).map(|_| String::from_utf8_lossy(&text).into_owned())
    });
    running.signal(Signal::TERM);
    running.end().expect(130);
    let text = reader.join().unwrap().unwrap();
    assert!(text.contains("lines were dropped: standard error takes them too slowly"), "{text}");
}
