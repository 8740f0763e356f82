//! Runs of the pair: without a fault, with one at every step of either end, and with several at random.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::time::Instant;

use fastrand::Rng;

use super::script::{Fault, Scene, Script, Side};
use super::{Ended, LIES, Ran, run};

/// Distinct runs, at least.
const RUNS: usize = 10_000;
/// Seeds the runs with several faults.
const SEED: u64 = 14;

const SCENES: [Scene; 9] = [
    Scene::PLAIN,
    Scene { verify: false, ..Scene::PLAIN },
    Scene { hints: true, ..Scene::PLAIN },
    Scene { was_running: false, ..Scene::PLAIN },
    Scene { lanes: 1, writes: 0, ..Scene::PLAIN },
    Scene { limit: 5, writes: 5000, throttles: true, ..Scene::PLAIN },
    Scene { limit: 5, writes: 5000, deadline: Some(400), ..Scene::PLAIN },
    Scene { limit: 5, writes: 5000, deadline: Some(60), ..Scene::PLAIN },
    Scene { limit: 5, writes: 5000, deadline: Some(400), switches_at_deadline: false, ..Scene::PLAIN },
];

/// Every fault that one end may have.
fn faults() -> Vec<Fault> {
    let mut faults = vec![
        Fault::Cut,
        Fault::Mute,
        Fault::Cancel,
        Fault::SwitchOver,
        Fault::Stop(1),
        Fault::Stop(25),
        Fault::Stop(60),
        Fault::CallFails,
        Fault::CallPanics,
        Fault::StageFails,
        Fault::Mistake,
        Fault::Stall(1),
        Fault::Stall(60),
    ];
    faults.extend((0..LIES).map(Fault::Lie));
    faults
}

/// Runs a script. One that violates a law ends the test with the script, to be replayed.
fn check(script: &Script) -> Ran {
    let ran = run(script);
    assert!(ran.violations.is_empty(), "{:#?}\n{ran:?}\nreplay it: run(&{})", ran.violations, rust(script));
    ran
}

/// The script as Rust.
fn rust(script: &Script) -> String {
    let Script { scene, faults } = script;
    let mut text = format!("Script {{ scene: {scene:?}, faults: vec![");
    for (side, step, fault) in faults {
        write!(text, "(Side::{side:?}, {step}, Fault::{fault:?}), ").unwrap();
    }
    text.push_str("] }");
    text
}

#[test]
fn without_a_fault_each_scene_ends_as_it_must() {
    let ended = |scene| check(&Script { scene, faults: Vec::new() });
    for scene in &SCENES[..8] {
        let ran = ended(*scene);
        assert_eq!((ran.source, ran.destination), (Ended::Completed, Ended::Completed), "{scene:?}");
    }
    assert_eq!(ended(SCENES[8]).source, Ended::Cancelled, "its deadline cancels it");
}

#[test]
fn the_same_script_runs_the_same_way() {
    let script = Script { scene: Scene::PLAIN, faults: vec![(Side::Destination, 9, Fault::Stop(1))] };
    assert_eq!(check(&script), check(&script));
}

#[test]
fn with_faults_at_every_step_the_laws_hold() {
    let begun = Instant::now();
    let mut seen = BTreeSet::new();
    let mut ends = BTreeSet::new();
    let mut run_new = |script: Script| {
        if !seen.contains(&script) {
            let ran = check(&script);
            ends.insert((ran.source, ran.destination));
            seen.insert(script);
        }
    };
    let mut lengths = Vec::new();
    for scene in SCENES {
        let ran = check(&Script { scene, faults: Vec::new() });
        // A scene of many rounds repeats itself: its beginning and its end are enough.
        for (side, steps) in [Side::Source, Side::Destination].into_iter().zip(ran.steps) {
            let in_full = (0..steps + 1).filter(|step| *step < 25 || *step + 30 > steps);
            for step in in_full {
                for fault in faults() {
                    run_new(Script { scene, faults: vec![(side, step, fault)] });
                }
            }
        }
        lengths.push(ran.steps);
    }
    let mut rng = Rng::with_seed(SEED);
    let faults = faults();
    for _ in 0..RUNS / 4 {
        let at = rng.usize(..SCENES.len());
        let several = (0..rng.usize(2..4)).map(|_| {
            let (side, steps) =
                if rng.bool() { (Side::Source, lengths[at][0]) } else { (Side::Destination, lengths[at][1]) };
            (side, rng.u32(..=steps), faults[rng.usize(..faults.len())])
        });
        let several = several.collect();
        run_new(Script { scene: SCENES[at], faults: several });
    }
    let runs = seen.len();
    println!("{runs} distinct runs, {} pairs of ends, in {:.1?}", ends.len(), begun.elapsed());
    assert!(runs >= RUNS, "{runs} runs");
    for source in [Ended::Completed, Ended::Failed, Ended::Cancelled, Ended::Unconfirmed, Ended::ResumeFailed] {
        assert!(ends.iter().any(|ends| ends.0 == source), "no run ended {source:?}: {ends:?}");
    }
}
