//! Programs that are killed while their connection is lost: the other end waits for as long as it is set to, says what it
//! knows, and the guest is where it was, or paused where nobody may resume it.

use std::time::Duration;

use memferry_stages::wire::Kind;
use rustix::process::Signal;
use serde_json::Value;

use crate::between::{Pass, between};
use crate::harness::{Ended, Running, Scene, noise, until};
use crate::reports::Report;
use crate::writer::{COMMANDS, Writer};

const IMAGE: usize = 6 << 20;
/// The frame of pages at which the connection is lost: in the first round.
const FRAME: u64 = 5;
/// An end that is left alone soon gives up.
const GIVE_UP: &str = "migration.recovery.give_up=2s";
const RECOVERS: &str = "migration.recovery.attempts=10";

/// Two programs whose connection is lost, and cannot be made again.
struct Apart {
    scene: Scene,
    writer: Writer,
    source: Running,
    destination: Running,
}

impl Apart {
    /// Begins a migration, cuts it in place of a frame, and waits until both ends are disconnected.
    fn at(lost: Kind) -> Self {
        let scene = Scene::new();
        scene.configure(&["ram"]);
        scene.write("from/ram", noise(IMAGE, 1));
        let writer = Writer::begin(&scene, "from/ram", Duration::from_micros(100));
        let start = "guest.file.start=[\"touch\", \"started\"]";
        let receive = ["recv", "recv.toml", "--report", "recv.json", "--control", "recv.sock"];
        let destination = scene.start_with(&receive, &[start, RECOVERS, GIVE_UP]);
        let line = destination.until_it_says("waiting at ");
        let address = format!("transport.address={}", line.split("waiting at ").nth(1).unwrap());
        let mut frames = 0;
        let address = between(&address, move |kind| {
            frames += u64::from(kind == lost);
            let is_now = kind == lost && (lost != Kind::Pages || frames == FRAME);
            if is_now { Pass::Cut } else { Pass::On }
        });
        let send = ["send", "send.toml", "--report", "send.json", "--control", "send.sock"];
        let sets = [
            &[address.as_str(), RECOVERS, GIVE_UP, "pipeline.lanes=1", "transport.connect_timeout=100ms"][..],
            &["migration.max_rounds=1", "migration.on_deadline=switch-over"],
            &COMMANDS,
        ];
        let source = scene.start_with(&send, &sets.concat());
        let apart = Self { scene, writer, source, destination };
        apart.until_disconnected("send.sock");
        // A destination that has started its guest needs no source.
        if lost != Kind::Running {
            apart.until_disconnected("recv.sock");
        }
        apart
    }

    #[track_caller]
    fn until_disconnected(&self, socket: &str) {
        until("it is disconnected", || {
            let status = self.scene.run(&["status", socket, "--json"]);
            let status = serde_json::from_str::<Value>(&status.stdout).unwrap_or_default();
            status["phase"] == "disconnected"
        });
    }

    fn kill_source(self) -> Left {
        self.source.signal(Signal::KILL);
        self.source.until_it_is_dead();
        self.end()
    }

    fn kill_destination(self) -> Left {
        self.destination.signal(Signal::KILL);
        self.destination.until_it_is_dead();
        self.end()
    }

    fn end(self) -> Left {
        let (source, destination) = (self.source.end(), self.destination.end());
        Left { scene: self.scene, writer: self.writer, source, destination }
    }
}

/// What is left when both programs have ended.
struct Left {
    scene: Scene,
    writer: Writer,
    source: Ended,
    destination: Ended,
}

impl Left {
    #[track_caller]
    fn is_started(&self, is_started: bool) {
        assert_eq!(self.scene.path("started").exists(), is_started, "{}\n{}", self.source, self.destination);
    }
}

#[test]
fn a_destination_gives_up_a_source_that_was_killed() {
    let left = Apart::at(Kind::Pages).kill_source();
    left.is_started(false);
    assert_eq!(left.source.code, 128 + 9);
    left.writer.continues(&left.scene.path("from/ram"));
    left.destination.expect(1).says(&["failed after", "recovery.give_up"]);
    assert_eq!(Report::read(&left.scene.path("recv.json")).text("status"), "failed");
    assert_eq!(left.scene.names("to"), [""; 0]);
}

#[test]
fn a_source_gives_up_a_destination_that_was_killed() {
    let left = Apart::at(Kind::Pages).kill_destination();
    left.is_started(false);
    assert_eq!(left.destination.code, 128 + 9);
    left.writer.continues(&left.scene.path("from/ram"));
    let source = left.source.expect(1).says(&["failed after", "recovery.give_up"]);
    assert!(!source.stdout.contains("the guest was paused for "), "{source}");
    assert_eq!(Report::read(&left.scene.path("send.json")).text("status"), "failed");
}

/// Go is lost, and only the destination could say so: the guard resumes nothing, and says where to look.
#[test]
fn a_source_that_is_killed_with_go_in_flight_leaves_the_guest_paused() {
    let left = Apart::at(Kind::Go).kill_source();
    left.is_started(false);
    assert_eq!(left.source.code, 128 + 9);
    assert!(left.writer.is_stopped(), "{}", left.source);
    left.source.says(&["memferry guard: ", "Look whether it runs at tcp:127.0.0.1:"]);
    left.destination.expect(1).says(&["failed after", "recovery.give_up"]);
    assert_eq!(left.scene.names("to"), [""; 0]);
}

/// The guest started at the destination, and the source was not told.
#[test]
fn a_source_whose_destination_is_killed_with_go_in_flight_stays_paused() {
    let left = Apart::at(Kind::Running).kill_destination();
    left.is_started(true);
    assert!(left.writer.is_stopped(), "{}", left.source);
    left.source.expect(3);
    assert_eq!(Report::read(&left.scene.path("send.json")).text("status"), "unconfirmed");
}
