//! Runs of the pair: without a fault, with one at every step of either end, and with several at random.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::time::{Duration, Instant};

use fastrand::Rng;

use super::requests::SETS;
use super::script::{Fault, Postcopy, Scene, Script, Side};
use super::{Ended, LIES, LINK, Ran, guest, run, settings};
use crate::controller::Decision;
use crate::controller::simulation::{Conditions, simulate};
use crate::events::DowntimeParts;

/// Distinct runs, at least.
const RUNS: usize = 10_000;
/// Seeds the runs with several faults.
const SEED: u64 = 14;

const SCENES: [Scene; 22] = [
    Scene::PLAIN,
    Scene { verify: false, ..Scene::PLAIN },
    Scene { hints: true, ..Scene::PLAIN },
    Scene { was_running: false, ..Scene::PLAIN },
    Scene { lanes: 1, writes: 0, ..Scene::PLAIN },
    Scene { limit: 5, writes: 5000, throttles: true, ..Scene::PLAIN },
    Scene { limit: 5, writes: 5000, deadline: Some(400), ..Scene::PLAIN },
    Scene { limit: 5, writes: 5000, deadline: Some(60), ..Scene::PLAIN },
    Scene::STORED,
    Scene { resumes: true, hints: true, ..Scene::STORED },
    Scene { verify: false, was_running: false, lanes: 1, ..Scene::STORED },
    Scene::RECOVERS,
    Scene { verify: false, lanes: 1, ..Scene::RECOVERS },
    Scene { hints: true, ..Scene::RECOVERS },
    Scene { was_running: false, ..Scene::RECOVERS },
    Scene { limit: 5, writes: 5000, throttles: true, ..Scene::RECOVERS },
    Scene::HYBRID,
    Scene { verify: false, lanes: 1, postcopy: Postcopy::After(20), ..Scene::HYBRID },
    Scene { hints: true, writes: 200, ..Scene::HYBRID },
    Scene { postcopy: Postcopy::AtOnce, ..Scene::HYBRID },
    Scene { postcopy: Postcopy::AtOnce, was_running: false, hints: true, ..Scene::HYBRID },
    // The last: its deadline cancels it.
    Scene { limit: 5, writes: 5000, throttles: true, deadline: Some(400), switches_at_deadline: false, ..Scene::PLAIN },
];

/// Every fault that an end may have at a step. Of the requests for settings, which only a source has, each step has two.
fn faults(side: Side, step: u32) -> Vec<Fault> {
    let mut faults = vec![
        Fault::Cut,
        Fault::Outage(1),
        Fault::Outage(400),
        Fault::Mute,
        Fault::Cancel,
        Fault::Stop(1),
        Fault::Stop(25),
        Fault::Stop(60),
        Fault::CallFails,
        Fault::CallPanics,
        Fault::StageFails,
        Fault::NotifyPanics,
        Fault::Mistake,
        Fault::Stall(1),
        Fault::Stall(60),
    ];
    faults.extend((0..LIES).map(Fault::Lie));
    if side == Side::Destination {
        faults.push(Fault::Corrupt);
    }
    if side == Side::Source {
        let number = u8::try_from(step % u32::from(SETS)).unwrap();
        faults.extend([Fault::SwitchOver, Fault::Set(number), Fault::Set((number + SETS / 2) % SETS)]);
    }
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
    let (cancelled, complete) = SCENES.split_last().unwrap();
    for scene in complete {
        let ran = ended(*scene);
        assert_eq!((ran.source, ran.destination), (Ended::Completed, Ended::Completed), "{scene:?}");
    }
    assert_eq!(ended(*cancelled).source, Ended::Cancelled);
}

#[test]
fn the_same_script_runs_the_same_way() {
    let script = Script { scene: Scene::PLAIN, faults: vec![(Side::Destination, 9, Fault::Stop(1))] };
    assert_eq!(check(&script), check(&script));
}

/// The parts of the downtime are what the models take for each: a sync 1 ms, a pause 2 ms, and so on.
#[test]
fn without_a_fault_the_downtime_has_these_parts() {
    // In milliseconds: pause, state, sync, verify, durable, prepare, start, handover and resume at the source; verify, durable, prepare
    // and start at the destination.
    let parts = [
        (Scene::PLAIN, [2, 2, 1, 4, 1, 2, 1, 5, 0], [2, 1, 2, 1]),
        (Scene { verify: false, ..Scene::PLAIN }, [2, 2, 1, 0, 1, 2, 1, 5, 0], [0, 1, 2, 1]),
        (Scene { hints: true, ..Scene::PLAIN }, [2, 2, 2, 4, 1, 2, 1, 5, 0], [2, 1, 2, 1]),
        (Scene { was_running: false, ..Scene::PLAIN }, [0, 2, 1, 4, 1, 2, 1, 5, 0], [2, 1, 2, 1]),
        (Scene::STORED, [2, 2, 1, 2, 3, 0, 0, 0, 0], [2, 1, 2, 0]),
        (Scene { resumes: true, ..Scene::STORED }, [2, 2, 1, 2, 2, 0, 0, 0, 1], [2, 1, 2, 0]),
        (Scene { verify: false, was_running: false, ..Scene::STORED }, [0, 2, 1, 0, 3, 0, 0, 0, 0], [0, 1, 2, 0]),
    ];
    for (scene, here, there) in parts {
        let figures = check(&Script { scene, faults: Vec::new() }).figures;
        let [source, destination] = figures.parts;
        let ms = |part: Duration| part.as_millis();
        let DowntimeParts { pause, state, final_sync, verify, durable, prepare, start, handover, resume, .. } = source;
        let parts = [pause, state, final_sync, verify, durable, prepare, start, handover, resume].map(ms);
        let theirs = [destination.verify, destination.durable, destination.prepare, destination.start].map(ms);
        assert_eq!((parts, theirs), (here, there), "{scene:?}");
        assert!(!source.final_transfer.is_zero() && figures.downtime == Some(source.total()), "{scene:?}: {figures:?}");
        let compared = scene.verify.then_some(true);
        assert_eq!(figures.verified, [compared.filter(|_| scene.return_path), compared], "{scene:?}");
        assert!(figures.fixed.is_some() && figures.rounds <= 3, "{scene:?}: {figures:?}");
    }
}

#[test]
fn a_page_that_differs_ends_it_at_both_ends_and_is_named() {
    for scene in [Scene::PLAIN, Scene::STORED] {
        let ran = check(&Script { scene, faults: vec![(Side::Destination, 0, Fault::Corrupt)] });
        assert_eq!(ran.destination, Ended::Failed, "{scene:?}");
        assert_eq!(ran.source, if scene.return_path { Ended::Failed } else { Ended::Completed });
        assert_eq!(ran.figures.verified, [scene.return_path.then_some(false), Some(false)], "{scene:?}");
    }
}

#[test]
fn what_the_operator_sets_decides() {
    let scene = Scene { limit: 1, writes: 5000, switches_at_deadline: false, ..Scene::PLAIN };
    let set = |numbers: &[u8]| {
        let faults = numbers.iter().map(|&number| (Side::Source, 40, Fault::Set(number))).collect();
        let ran = check(&Script { scene, faults });
        (ran.source, ran.figures.rounds)
    };
    let (ended, rounds) = set(&[]);
    assert_eq!((ended, rounds), (Ended::Cancelled, 20), "the guest does not converge");
    assert_eq!(set(&[4]).0, Ended::Completed, "the downtime limit is high enough");
    assert_eq!(set(&[4, 5]).0, Ended::Cancelled, "the later request decides");
    let (ended, rounds) = set(&[7]);
    assert!(ended == Ended::Cancelled && rounds < 20, "the deadline ends it: {rounds} rounds");
}

/// A simulation moves the pair's guest over the pair's link, with the fixed cost that the pair has measured.
#[test]
fn a_simulation_of_the_same_guest_and_link_has_the_same_rounds_and_decision() {
    let pair = |scene| check(&Script { scene, faults: Vec::new() });
    let plain = Scene { verify: false, lanes: 1, switches_at_deadline: false, ..Scene::PLAIN };
    let fixed = pair(Scene { limit: 10_000, ..plain }).figures.fixed.unwrap();
    let (setup, none) = (Duration::from_millis(10), Duration::ZERO);
    let conditions = Conditions { link: LINK, fixed, setup, decision: none, drain: none };
    for (writes, limit, ended, rounds) in [
        (0, 20, Ended::Completed, 2),
        (40, 17, Ended::Completed, 3),
        (40, 41, Ended::Completed, 2),
        (200, 17, Ended::Completed, 3),
        (1000, 17, Ended::Completed, 3),
        (5000, 21, Ended::Completed, 3),
        (5000, 1, Ended::Cancelled, 20),
    ] {
        let scene = Scene { writes, limit, ..plain };
        let ran = pair(scene);
        assert_eq!((ran.source, ran.figures.rounds), (ended, rounds), "{scene:?}");
        let run = simulate(&mut guest(&scene), &conditions, &settings(&scene));
        // The pair counts the round of the paused guest.
        let simulated = match run.end {
            Decision::SwitchOver => (Ended::Completed, run.rounds + 1),
            _ => (Ended::Cancelled, run.rounds),
        };
        assert_eq!(simulated, (ended, rounds), "{scene:?}: {run:#?}");
    }
}

/// It may be noticed before the silence of a peer is, and is no other loss than that.
#[test]
fn a_destination_that_takes_nothing_costs_the_connection_and_not_the_migration() {
    let stalled = |scene, step| check(&Script { scene, faults: vec![(Side::Source, step, Fault::Stall(60))] }).source;
    let steps = check(&Script { scene: Scene::RECOVERS, faults: Vec::new() }).steps[0];
    for step in 0..steps {
        assert_eq!(stalled(Scene::RECOVERS, step), Ended::Completed, "step {step}");
    }
    assert!((0..steps).any(|step| stalled(Scene::PLAIN, step) == Ended::Failed), "without recovery it fails");
}

/// Before Go the guest runs at its source meanwhile, and the switch is made again; after it the pages follow once the source is back.
#[test]
fn a_connection_that_is_cut_at_any_step_of_a_switch_to_postcopy_costs_nothing() {
    for postcopy in [Postcopy::AfterRound, Postcopy::AtOnce] {
        let scene = Scene { postcopy, ..Scene::HYBRID };
        let steps = check(&Script { scene, faults: Vec::new() }).steps;
        for (side, steps) in [Side::Source, Side::Destination].into_iter().zip(steps) {
            for script in (8..steps).map(|step| Script { scene, faults: vec![(side, step, Fault::Cut)] }) {
                let ran = check(&script);
                assert_eq!((ran.source, ran.destination), (Ended::Completed, Ended::Completed), "{}", rust(&script));
            }
        }
    }
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
                for fault in faults(side, step) {
                    run_new(Script { scene, faults: vec![(side, step, fault)] });
                }
                if scene.recovers {
                    let refused = (Side::Destination, 0, Fault::Refuse);
                    run_new(Script { scene, faults: vec![(side, step, Fault::Cut), refused] });
                }
            }
        }
        lengths.push(ran.steps);
    }
    let mut rng = Rng::with_seed(SEED);
    for _ in 0..RUNS / 4 {
        let at = rng.usize(..SCENES.len());
        let several = (0..rng.usize(2..4)).map(|_| {
            let (side, steps) =
                if rng.bool() { (Side::Source, lengths[at][0]) } else { (Side::Destination, lengths[at][1]) };
            let step = rng.u32(..=steps);
            let faults = faults(side, step);
            (side, step, faults[rng.usize(..faults.len())])
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
    assert!(ends.contains(&(Ended::Lost, Ended::Lost)), "no guest was lost: {ends:?}");
}
