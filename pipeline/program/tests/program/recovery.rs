//! Two programs whose connection is lost, by the aid for trials.

use rustix::process::Signal;

use crate::harness::{Running, Scene, noise};
use crate::reports::Report;

/// Slow enough that pages are sent when a connection is cut.
const SLOWLY: &str = "migration.max_bandwidth=8 MiB/s";
/// A lost connection is made again.
const RECOVERS: &str = "migration.recovery.attempts=10";
/// After 1 MiB, and never again: the connection cannot be made again.
const FOR_GOOD: [&str; 2] = ["transport.faults.cut_after=[\"1 MiB\"]", "transport.faults.refuse_for=1h"];

/// Two programs that move 4 MiB of noise, with settings of the source.
fn moving(scene: &Scene, sets: &[&str]) -> (Running, Running) {
    scene.configure(&["ram"]);
    scene.write("from/ram", noise(4 << 20, 7));
    let (destination, address) = scene.listening(&["transport.address=tcp:127.0.0.1:0", RECOVERS]);
    let sets = [&[address.as_str(), SLOWLY, RECOVERS, "migration.recovery.backoff=20ms"], sets].concat();
    (scene.start_with(&["send", "send.toml", "--report", "send.json"], &sets), destination)
}

#[test]
fn a_connection_that_is_cut_twice_loses_nothing() {
    let scene = Scene::new();
    let cuts = ["transport.faults.cut_after=[\"1 MiB\", \"3 MiB\"]", "transport.faults.refuse_for=100ms"];
    let (source, destination) = moving(&scene, &cuts);
    source.end().expect(0).says(&[
        "disconnected: ",
        "connected again after ",
        "(attempt 3)",
        "lost        connection 1 ",
    ]);
    destination.end().expect(0).says(&["waiting for the source to return", "(attempt 3)"]);
    assert!(scene.read("from/ram") == scene.read("to/ram"));
    for report in ["send.json", "recv.json"] {
        let report = Report::read(&scene.path(report));
        assert_eq!((report.at("/outages/lost"), report.verified()), (&2.into(), Some(true)));
    }
}

#[test]
fn a_source_that_reaches_nobody_gives_up_and_so_does_its_destination() {
    let scene = Scene::new();
    let (source, destination) = moving(&scene, &[&FOR_GOOD[..], &["migration.recovery.give_up=1s"]].concat());
    source.end().expect(1).says(&["the destination was not reached again in ", "(recovery.give_up)"]);
    // Of two ends that differ the shorter time counts.
    destination.end().expect(1).says(&["the source did not return within 1.00 s (recovery.give_up)"]);
}

#[test]
fn a_cancel_takes_effect_at_once_while_there_is_no_connection() {
    let scene = Scene::new();
    let (source, _destination) = moving(&scene, &FOR_GOOD);
    source.until_it_says("trying again in ");
    source.signal(Signal::INT);
    source.end().expect(130).says(&["cancelled after"]);
}
