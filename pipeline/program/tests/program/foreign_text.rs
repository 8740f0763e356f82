//! Text from a peer or a file on a terminal: it cannot move the cursor, ring the bell, begin a line or change its
//! direction.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::untrusted::{Untrusted, is_unsafe};
use memferry_stages::wire::messages::{RunState, StateChunk, StatePhase};
use memferry_stages::wire::{Hello, Message, SessionId};

use crate::harness::{Scene, noise};

const EVIL: &str = "evil\n\u{1b}[2K\u{7}\u{9b}31m\u{202e}\r\nmemferry: completed, verified";
/// The same text as it is shown.
const SHOWN: &str = r"evil\n\u{1b}[2K\u{7}\u{9b}31m\u{202e}\r\nmemferry: completed, verified";

#[track_caller]
fn is_harmless(what: &str, text: &str) {
    let bad = text.chars().find(|&character| is_unsafe(character) && character != '\n');
    assert_eq!(bad, None, "{what}: {text:?}");
    assert!(!text.lines().any(|line| line.starts_with("memferry: completed")), "{what}: {text}");
}

fn hello(features: Vec<Untrusted>) -> Message {
    Message::Hello(Hello::bulk(SessionId([7; 16]), 0, 1, 1, PageSize::DEFAULT, features))
}

/// A destination that answers a source's Hello with these bytes and then waits for its end. Returns the setting for
/// the source to connect to it.
fn destination_that_says(answer: Message) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let (mut source, _) = listener.accept().unwrap();
        source.write_all(&answer.encode(0)).unwrap();
        source.read_to_end(&mut Vec::new()).unwrap_or_default();
    });
    format!("transport.address=tcp:{address}")
}

#[test]
fn the_reason_of_a_destination_shows_nothing_but_text_at_the_source() {
    for answer in [Message::Abort(EVIL.into()), Message::Refused(EVIL.into())] {
        let scene = Scene::new();
        scene.configure(&["ram"]);
        scene.write("from/ram", noise(4096, 1));
        let address = destination_that_says(answer);
        let arguments =
            ["send", "send.toml", "--log", "debug", "--events", "events", "--report", "r.json", "--report", "r.html"];
        let ended = scene.start_with(&arguments, &[&address]).end().expect(1).says(&[SHOWN]);
        is_harmless("stdout", &ended.stdout);
        is_harmless("stderr", &ended.stderr);
        for file in ["events", "r.json", "r.html"] {
            is_harmless(file, &String::from_utf8(scene.read(file)).unwrap());
        }
        let watched = scene.run(&["watch", "events"]).expect(0).says(&[SHOWN]);
        is_harmless("watch", &watched.stdout);
    }
}

#[test]
fn the_names_and_the_reason_of_a_source_show_nothing_but_text_at_the_destination() {
    let scene = Scene::new();
    scene.configure(&["ram"]);
    let (destination, address) = scene.listening(&[]);
    let address = address.strip_prefix("transport.address=tcp:").unwrap();
    let say = |messages: &[Message]| {
        let mut peer = TcpStream::connect(address).unwrap();
        messages.iter().for_each(|message| peer.write_all(&message.encode(0)).unwrap());
        peer.read_to_end(&mut Vec::new()).unwrap_or_default();
    };
    say(&[hello(vec![EVIL.into()])]);
    destination.until_it_says("turned away");
    say(&[hello(Vec::new()), Message::Blocks(vec![BlockInfo::new(EVIL, 4096)])]);
    let ended = destination.end().expect(1).says(&["requires features", "blocks [\"evil\\n"]);
    is_harmless("stdout", &ended.stdout);
    is_harmless("stderr", &ended.stderr);

    let (destination, address) = scene.listening(&[]);
    let mut peer = TcpStream::connect(address.strip_prefix("transport.address=tcp:").unwrap()).unwrap();
    for message in [hello(Vec::new()), Message::Abort(EVIL.into())] {
        peer.write_all(&message.encode(0)).unwrap();
    }
    let ended = destination.end().expect(1).says(&[SHOWN]);
    is_harmless("stdout", &ended.stdout);
    is_harmless("stderr", &ended.stderr);
}

#[test]
fn the_names_in_a_stored_stream_show_nothing_but_text() {
    let scene = Scene::new();
    let state =
        StateChunk { phase: StatePhase::Device, name: EVIL.into(), version: 1, end: true, bytes: vec![1].into() };
    let stream = |features| {
        let messages = [
            hello(features),
            Message::Blocks(vec![BlockInfo::new(EVIL, 4096)]),
            Message::State(state.clone()),
            Message::LaneEnds,
            Message::End { run_state: RunState::Running, frames: 0 },
        ];
        messages.iter().flat_map(|message| message.encode(0)).collect::<Vec<u8>>()
    };
    scene.write("stream", stream(Vec::new()));
    let inspected = scene.run(&["inspect", "stream"]).expect(0);
    is_harmless("inspect", &inspected.stdout);
    assert_eq!(inspected.stdout.matches(SHOWN).count(), 2, "block, section: {inspected}");
    // A feature that nobody knows is refused, as a destination refuses it.
    scene.write("stream", stream(vec![EVIL.into()]));
    let refused = scene.run(&["inspect", "stream"]).expect(1).says(&[SHOWN]);
    is_harmless("inspect", &refused.stdout);
    is_harmless("inspect", &refused.stderr);
}

/// A command's output is text from outside, too.
#[test]
fn the_output_of_a_command_shows_nothing_but_text() {
    let scene = Scene::new();
    scene.configure(&["ram"]);
    scene.write("from/ram", noise(4096, 1));
    scene.write("pause", "printf 'evil\\n\\033[2K\\007memferry: completed' >&2; exit 1");
    let (destination, address) = scene.listening(&[]);
    let sets = [&address, "guest.file.pause=[\"sh\", \"pause\"]", "guest.file.resume=[\"true\"]"];
    let ended = scene.start_with(&["send", "send.toml"], &sets).end().expect(1);
    let shown = r"output: evil | \u{1b}[2K\u{7}memferry: completed";
    for ended in [ended, destination.end()] {
        is_harmless("stdout", &ended.stdout);
        is_harmless("stderr", &ended.stderr);
        ended.says(&[shown]);
    }
}

/// So is the name of a file that somebody else made.
#[test]
fn the_name_of_a_file_shows_nothing_but_text() {
    const NAME: &str = "evil\n\u{1b}[2K\u{7}memferry: completed";
    let scene = Scene::new();
    scene.configure(&["ram"]);
    scene.write(NAME, "[guest.file]\nimages = []\n");
    let missing = r#"guest.file.images=[{ id = "ram", path = "missing\nmemferry: completed\u001b" }]"#;
    let into_itself = format!("{NAME}/events");
    let named: [&[&str]; 9] = [
        &["check", NAME],
        &["inspect", NAME],
        &["watch", NAME],
        &["plan", NAME],
        &["recv", "no\n such\u{1b}"],
        &["send", "send.toml", "--set", missing],
        &["send", "send.toml", "--events", NAME, "--report", NAME],
        &["send", "send.toml", "--report", &into_itself],
        &["check", "send.toml", "--set", missing],
    ];
    for arguments in named {
        let ended = scene.run(arguments);
        assert_ne!(ended.code, 0, "{ended}");
        is_harmless("stdout", &ended.stdout);
        is_harmless("stderr", &ended.stderr);
        assert!(ended.stderr.contains("\\n") || ended.stdout.contains("\\n"), "the name is shown: {ended}");
    }
}
