//! A source that is killed around Go. Never do two guests run, and if none may run, a program reports that.
//!
//! The moments are frames on the wire. All random choices come from the seed of `sample`, which sets the number of kills
//! as well.

use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use memferry_stages::wire::Kind;
use rustix::process::Signal;

use crate::between::{Pass, between};
use crate::harness::{Ended, Running, Scene, noise, random};
use crate::sample;
use crate::writer::{COMMANDS, Writer};

/// The moment at which a source is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// The destination has sent Loaded, and the source has not received it.
    BeforeLoaded,
    /// The source receives Loaded: the guard is about to be notified, or has been, or Go leaves.
    AtLoaded,
    /// Go has left the source and is lost.
    GoLost,
    /// Go has left the source and arrives.
    GoArrives,
    /// The destination has sent Running, and the source has not received it.
    BeforeRunning,
}

const MOMENTS: [Moment; 5] =
    [Moment::BeforeLoaded, Moment::AtLoaded, Moment::GoLost, Moment::GoArrives, Moment::BeforeRunning];

impl Moment {
    fn frame(self) -> Kind {
        match self {
            Self::BeforeLoaded | Self::AtLoaded => Kind::Loaded,
            Self::GoLost | Self::GoArrives => Kind::Go,
            Self::BeforeRunning => Kind::Running,
        }
    }
}

/// The observed state of a guest whose source was killed.
struct Seen {
    source: Ended,
    destination: Ended,
    runs_here: bool,
    started_there: bool,
}

/// Kills a source at a moment. `spins` delays the kill where it races with the source.
fn killed(moment: Moment, spins: u64) -> Seen {
    let scene = Scene::new();
    scene.configure(&["ram"]);
    scene.write("from/ram", noise(64 << 10, 1));
    let writer = Writer::begin(&scene, "from/ram", Duration::from_micros(100));
    let (destination, address) = scene.listening(&["guest.file.start=[\"touch\", \"started\"]"]);
    let (give, running) = channel::<Running>();
    let (sender, source) = channel();
    let mut running = Some(running);
    let address = between(&address, move |kind| {
        if kind != moment.frame() {
            return Pass::On;
        }
        let Some(running) = running.take().map(|running| running.recv().unwrap()) else { return Pass::On };
        kill(moment, spins, running, &sender)
    });
    let sets = [&[address.as_str(), "migration.max_rounds=1", "migration.on_deadline=switch-over"], &COMMANDS[..]];
    give.send(scene.start_with(&["send", "send.toml"], &sets.concat())).unwrap();
    // Its standard error is closed when its guard has ended, too.
    let source = source.recv_timeout(Duration::from_secs(60)).expect("the moment comes").end();
    let destination = destination.end();
    let started_there = scene.path("started").exists();
    let runs_here = !writer.is_stopped();
    if runs_here {
        writer.continues(&scene.path("from/ram"));
    }
    Seen { source, destination, runs_here, started_there }
}

/// The frame of the moment has arrived, and the source runs.
fn kill(moment: Moment, spins: u64, running: Running, sender: &Sender<Running>) -> Pass {
    if moment == Moment::AtLoaded {
        // The frame is forwarded when this returns, so the kill comes from a separate thread.
        let sender = sender.clone();
        std::thread::spawn(move || {
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_micros(spins) {
                std::hint::spin_loop();
            }
            running.signal(Signal::KILL);
            sender.send(running).unwrap();
        });
        return Pass::On;
    }
    running.signal(Signal::KILL);
    // The source is dead before the frame is forwarded.
    running.until_it_is_dead();
    sender.send(running).unwrap();
    if moment == Moment::GoArrives || moment == Moment::BeforeRunning { Pass::On } else { Pass::Cut }
}

#[test]
fn a_source_killed_around_go_leaves_one_guest_or_words_that_say_where_to_look() {
    let seed = sample::seed();
    for kill in 0..sample::count(10) {
        let moment = MOMENTS[usize::try_from(kill).unwrap() % MOMENTS.len()];
        let spins = random(seed, kill) % 4000;
        let seen = killed(moment, spins);
        let Seen { source, destination, runs_here, started_there } = &seen;
        let what = format!(
            "kill {kill}, {moment:?}, {spins} µs: runs here {runs_here}, started there {started_there}\n{source}\n{destination}"
        );
        eprintln!("kill {kill}, {moment:?}, {spins} µs: runs here {runs_here}, started there {started_there}");
        // A source that is killed late enough has already ended.
        assert!(source.code == 128 + 9 || moment == Moment::AtLoaded && source.code == 0, "{what}");
        let says = |words: &str| source.stderr.contains("memferry guard: ") && source.stderr.contains(words);
        assert!(!(*runs_here && *started_there), "two run: {what}");
        if *runs_here {
            assert!(says("the guest was resumed"), "{what}");
        } else if moment != Moment::AtLoaded || !*started_there {
            assert!(says("Look whether it runs at tcp:127.0.0.1:") && says("resume it here: [\"sh\", "), "{what}");
        }
        match moment {
            Moment::BeforeLoaded => assert!(*runs_here, "{what}"),
            Moment::AtLoaded => {}
            Moment::GoLost => assert!(!*runs_here && !*started_there, "{what}"),
            Moment::GoArrives | Moment::BeforeRunning => assert!(!*runs_here && *started_there, "{what}"),
        }
    }
}
