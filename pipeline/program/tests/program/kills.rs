//! Programs that are killed, interrupted, or run out of disk space: the source is as it was, and nothing incomplete
//! looks complete.
//!
//! Random moments come from the seed of `sample`, which sets the number of kills as well.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use memferry_stages::wire::Kind;
use rustix::process::Signal;

use crate::between::{Pass, between};
use crate::harness::{Ended, Running, Scene, noise, random, until};
use crate::reports::Report;
use crate::sample;
use crate::skip::skipped;
use crate::writer::{COMMANDS, Writer};

/// How often each end is killed, in the sample.
const KILLS: u64 = 8;
/// After the first round the writer is paused, and all that it wrote is sent uncompressed.
const TWICE: [&str; 4] =
    ["migration.max_rounds=1", "migration.on_deadline=switch-over", "encoder.compress=none", "encoder.delta=none"];
/// Frames of pages in one pass over the image: a random moment is at one of these frames, of either pass.
const FRAMES: u64 = IMAGE / (64 << 12);
const IMAGE: u64 = 6 << 20;
/// 6 MiB at this rate: about a second of rounds.
const SLOWLY: &str = "migration.max_bandwidth=6 MiB/s";

/// A moment of a migration: a frame of pages is in flight, of the first round or of the last, in which the guest is
/// paused.
///
/// While a frame of the first round is delayed, the rest of the round may fit in the sockets' buffers, and the source
/// may pause the guest. So a moment of the last round implies that the guest is paused, and one of the first round
/// implies nothing.
#[derive(Clone, Copy, Debug)]
struct Moment {
    paused: bool,
    frame: u64,
}

impl Moment {
    /// A random moment. The first round has all frames; the last one has as many as the writer's speed allows.
    fn drawn(seed: u64, step: u64) -> Self {
        let moment = Self { paused: step % 2 == 1, frame: 1 + random(seed, step) % FRAMES };
        eprintln!("step {step}: {moment:?}");
        moment
    }
}

/// An image with a writer, being moved between two programs.
struct Crossing {
    scene: Scene,
    writer: Writer,
    source: Running,
    destination: Running,
    reached: Receiver<()>,
    proceed: Sender<()>,
}

impl Crossing {
    /// Begins a migration that is delayed at the moment until it is released.
    fn begin(moment: Option<Moment>) -> Self {
        let scene = Scene::new();
        scene.configure(&["ram"]);
        scene.write("from/ram", noise(usize::try_from(IMAGE).unwrap(), 1));
        let writer = Writer::begin(&scene, "from/ram", Duration::ZERO);
        let start = "guest.file.start=[\"touch\", \"started\"]";
        let (destination, address) = scene.listening(&[start]);
        let ((reach, reached), (proceed, proceeded)) = (channel(), channel());
        let (mut paused, mut frames, mut moment) = (false, 0, moment);
        let address = between(&address, move |kind| {
            frames += u64::from(kind == Kind::Pages);
            let is_now = |at: Moment| paused == at.paused && (frames == at.frame || kind == Kind::End);
            if moment.take_if(|at| is_now(*at)).is_some() {
                reach.send(()).unwrap();
                // A test that has failed releases it as well.
                proceeded.recv().unwrap_or_default();
            }
            if kind == Kind::RoundComplete {
                (paused, frames) = (true, 0);
            }
            Pass::On
        });
        let sets: Vec<_> = [&[address.as_str(), "pipeline.lanes=1"], &COMMANDS[..], &TWICE].concat();
        let source = scene.start_with(&["send", "send.toml", "--report", "send.json"], &sets);
        Self { scene, writer, source, destination, reached, proceed }
    }

    /// Waits for the moment.
    #[track_caller]
    fn until_the_moment(&self) {
        self.reached.recv_timeout(Duration::from_secs(60)).expect("the moment comes");
    }

    /// Releases the frame.
    fn let_go(&self) {
        self.proceed.send(()).unwrap();
    }

    /// Begins a crossing, and waits until it is held at a moment that is drawn.
    #[track_caller]
    fn held_at_random(seed: u64, step: u64) -> (Moment, Self) {
        let moment = Moment::drawn(seed, step);
        let crossing = Self::begin(Some(moment));
        crossing.until_the_moment();
        assert!(crossing.writer.is_stopped() || !moment.paused);
        (moment, crossing)
    }

    /// Waits for the end of both programs.
    fn end(self) -> (Scene, Writer, Ended, Ended) {
        (self.scene, self.writer, self.source.end(), self.destination.end())
    }
}

#[track_caller]
fn nothing_complete(scene: &Scene, folder: &str) {
    let names = scene.names(folder);
    assert!(names.iter().all(|name| name.contains("partial")), "{names:?}");
}

#[test]
fn a_source_survives_its_destination() {
    let seed = sample::seed();
    for step in 0..sample::count(KILLS) {
        let (moment, crossing) = Crossing::held_at_random(seed, step);
        crossing.destination.signal(Signal::KILL);
        crossing.destination.until_it_is_dead();
        crossing.let_go();
        let (scene, writer, source, destination) = crossing.end();
        assert_eq!(destination.code, 128 + 9);
        let source = source.expect(1).says(&["failed after", "connection"]);
        let report = Report::read(&scene.path("send.json"));
        assert_eq!(report.text("status"), "failed");
        let was_paused = source.stdout.contains("the guest was paused for ");
        assert!(was_paused || !moment.paused, "{source}");
        assert_eq!(report.at("/downtime_ms").is_null(), !was_paused);
        writer.continues(&scene.path("from/ram"));
        assert_eq!(fs::metadata(scene.path("from/ram")).unwrap().len(), IMAGE);
        nothing_complete(&scene, "to");
        assert!(!scene.path("started").exists());
        the_next_one_removes(&scene, "to", &["recv", "recv.toml"]);
    }
}

/// Files that a killed program left in a folder are removed, and reported, by the next one that writes to the same
/// place.
#[track_caller]
fn the_next_one_removes(scene: &Scene, folder: &str, command: &[&str]) {
    let left = scene.names(folder);
    let next = scene.start(command);
    for name in left {
        let line = next.until_it_says(&name);
        assert!(line.contains("removed") && line.contains("left unfinished"), "{line}");
        assert!(!scene.path(&format!("{folder}/{name}")).exists());
    }
}

#[test]
fn a_destination_starts_nothing_when_its_source_is_killed() {
    let seed = sample::seed();
    for step in 0..sample::count(KILLS) {
        let (moment, crossing) = Crossing::held_at_random(seed, step);
        crossing.source.signal(Signal::KILL);
        crossing.writer.continues(&crossing.scene.path("from/ram"));
        crossing.let_go();
        let (scene, writer, source, destination) = crossing.end();
        assert_eq!(source.code, 128 + 9);
        assert!(source.stderr.contains("memferry guard: ") || !moment.paused, "{source}");
        destination.expect(1).says(&["failed after"]);
        assert_eq!(Report::read(&scene.path("recv.json")).text("status"), "failed");
        assert_eq!(scene.names("to"), [""; 0]);
        assert!(!scene.path("started").exists());
        writer.continues(&scene.path("from/ram"));
    }
}

#[test]
fn interrupted_either_end_leaves_the_source_as_it_was() {
    for at_source in [true, false] {
        for paused in [true, false] {
            let crossing = Crossing::begin(Some(Moment { paused, frame: 1 }));
            crossing.until_the_moment();
            let end = if at_source { &crossing.source } else { &crossing.destination };
            end.signal(Signal::INT);
            end.until_it_says("cancelling; once more to end at once");
            crossing.let_go();
            let (scene, writer, source, destination) = crossing.end();
            let was_paused = !Report::read(&scene.path("send.json")).at("/downtime_ms").is_null();
            assert!(was_paused || !paused, "{source}\n{destination}");
            let (cancelled, notified) = if at_source { (source, destination) } else { (destination, source) };
            cancelled.expect(130).says(&["cancelled after"]);
            notified.expect(1).says(&["failed after", "cancelled at the"]);
            writer.continues(&scene.path("from/ram"));
            assert_eq!(scene.names("to"), [""; 0]);
            assert!(!scene.path("started").exists());
        }
    }
}

/// A pause command that hangs cannot be cancelled cleanly. The second signal does not wait for it, and the guard
/// resumes the writer when the pause has ended, and not before.
#[test]
fn a_second_interrupt_ends_at_once() {
    let scene = Scene::new();
    scene.configure(&["ram"]);
    scene.write("from/ram", noise(1 << 20, 2));
    let writer = Writer::begin(&scene, "from/ram", Duration::from_micros(100));
    let pause = String::from_utf8(scene.read("pause")).unwrap();
    scene.write("pause", format!("echo begins >> log; until [ -e let-go ]; do sleep 0.01; done; {pause}"));
    let (destination, address) = scene.listening(&[]);
    let sets = [address.as_str(), COMMANDS[0], COMMANDS[1], "guest.file.command_timeout=50s"];
    let source = scene.start_with(&["send", "send.toml"], &sets);
    until("the pause command has begun", || scene.path("log").exists() && scene.read("log") == b"begins\n");
    source.signal(Signal::INT);
    source.until_it_says("cancelling; once more to end at once");
    source.signal(Signal::INT);
    source.until_it_is_dead();
    assert_eq!(scene.read("log"), b"begins\n");
    scene.write("let-go", "");
    source.end().expect(130).says(&["second signal, ending at once", "memferry guard: "]);
    assert_eq!(scene.read("log"), b"begins\npause\nresume\n");
    writer.continues(&scene.path("from/ram"));
    destination.end().expect(1);
    assert_eq!(scene.names("to"), [""; 0]);
}

#[test]
fn waiting_for_the_other_end_can_be_interrupted() {
    let scene = Scene::new();
    scene.configure(&["ram"]);
    scene.write("from/ram", [1]);
    let (destination, address) = scene.listening(&[]);
    destination.signal(Signal::INT);
    destination.end().expect(130);
    let source = scene.start_with(&["send", "send.toml", "--report", "send.json"], &[&address]);
    until("it takes signals", || source.takes(Signal::TERM));
    source.signal(Signal::TERM);
    source.end().expect(130);
    assert_eq!(Report::read(&scene.path("send.json")).text("status"), "cancelled");
}

/// A small file system. Dropped, it is unmounted.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None`, with a message, if this process may not mount.
    fn mount(at: &Path) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"]).arg(at).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(at.into())),
            Ok(output) => {
                skipped(format_args!("no file system to fill, {}", String::from_utf8_lossy(&output.stderr).trim()));
                None
            }
            Err(error) => {
                skipped(format_args!("no file system to fill, mount cannot be run: {error}"));
                None
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(&self.0).status();
        assert!(unmounted.is_ok_and(|status| status.success()) || thread::panicking(), "the small disk stays mounted");
    }
}

#[test]
fn a_full_disk_at_the_destination_is_named_at_both_ends() {
    let scene = Scene::new();
    scene.configure(&["ram"]);
    scene.write("from/ram", noise(6 << 20, 3));
    let Some(disk) = SmallDisk::mount(&scene.path("to")) else { return };
    let writer = Writer::begin(&scene, "from/ram", Duration::from_micros(100));
    let (destination, address) = scene.listening(&["guest.file.start=[\"touch\", \"started\"]"]);
    let source = scene.start_with(&["send", "send.toml"], &[&address, COMMANDS[0], COMMANDS[1]]).end();
    for end in [source, destination.end()] {
        end.expect(1).says(&["to/ram", "No space left"]);
    }
    writer.continues(&scene.path("from/ram"));
    assert_eq!(scene.names("to"), [""; 0]);
    assert!(!scene.path("started").exists());
    drop(disk);
}

#[test]
fn a_full_disk_under_a_stream_leaves_no_file() {
    let scene = Scene::new();
    scene.configure(&["ram"]);
    scene.write("from/ram", noise(6 << 20, 4));
    let Some(disk) = SmallDisk::mount(&scene.path("disk")) else { return };
    let writer = Writer::begin(&scene, "from/ram", Duration::from_micros(100));
    let sets = ["transport.address=file:disk/stream", "migration.after=pause", COMMANDS[0], COMMANDS[1]];
    scene.start_with(&["send", "send.toml"], &sets).end().expect(1).says(&["disk/stream", "No space left"]);
    writer.continues(&scene.path("from/ram"));
    assert_eq!(scene.names("disk"), [""; 0]);
    drop(disk);
}

/// A stored stream of a small image.
fn stored() -> Scene {
    let scene = Scene::new();
    scene.configure(&["ram"]);
    let mut image = noise(200_000, 5);
    image.extend_from_slice(include_bytes!("../../../../Cargo.lock"));
    scene.write("from/ram", image);
    let sets = ["transport.address=file:whole", "migration.after=resume"];
    scene.start_with(&["send", "send.toml"], &sets).end().expect(0);
    scene
}

/// Neither `recv` nor `inspect` accepts the stream, and both report the offset.
#[track_caller]
fn is_refused(scene: &Scene, what: &str) {
    let received = scene.start_with(&["recv", "recv.toml"], &["transport.address=file:damaged"]).end();
    let inspected = scene.run(&["inspect", "damaged"]);
    for end in [received, inspected] {
        let names_a_byte = |text: &str| text.contains("byte ") || text.contains("ends before its end mark");
        assert!(end.code == 1 && names_a_byte(&end.stdout), "{what}: {end}");
    }
    assert_eq!(scene.names("to"), [""; 0], "{what}");
}

#[test]
fn a_stored_stream_that_is_cut_short_is_refused() {
    let scene = stored();
    let whole = scene.read("whole");
    for length in (0..12).map(|cut| whole.len() * cut / 12).chain([1, 47, whole.len() - 1]) {
        scene.write("damaged", &whole[..length]);
        is_refused(&scene, &format!("{length} bytes of {}", whole.len()));
    }
}

#[test]
fn a_stored_stream_with_one_bit_flipped_is_refused() {
    let scene = stored();
    let mut bytes = scene.read("whole");
    let length = bytes.len();
    for place in (0..16).map(|flip| length * flip / 16 + flip * 7).chain([length - 1]) {
        bytes[place] ^= 1 << (place % 8);
        scene.write("damaged", &bytes);
        is_refused(&scene, &format!("bit {} of byte {place} of {length}", place % 8));
        bytes[place] ^= 1 << (place % 8);
    }
}

/// A source that is interrupted leaves no partial stream behind, and one that is killed leaves none that is taken for
/// complete.
#[test]
fn a_stream_that_was_not_completed_is_absent() {
    for signal in [Signal::INT, Signal::KILL] {
        let scene = Scene::new();
        scene.configure(&["ram"]);
        scene.write("from/ram", noise(6 << 20, 6));
        let sets = ["transport.address=file:out/stream", "migration.after=resume", SLOWLY];
        fs::create_dir(scene.path("out")).unwrap();
        let source = scene.start_with(&["send", "send.toml"], &sets);
        source.until_it_says("RAM block");
        until("the stream grows", || scene.names("out").iter().any(|name| grown(&scene.path("out").join(name))));
        source.signal(signal);
        source.end().expect(if signal == Signal::INT { 130 } else { 137 });
        assert!(!scene.path("out/stream").exists());
        if signal == Signal::INT {
            assert_eq!(scene.names("out"), [""; 0]);
        } else {
            assert_eq!(scene.names("out").len(), 1);
            let sets: Vec<_> = sets.iter().flat_map(|set| ["--set", *set]).collect();
            the_next_one_removes(&scene, "out", &[&["send", "send.toml"], &sets[..]].concat());
        }
    }
}

fn grown(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|file| file.size() > 100_000)
}

/// The migration that all the kills above interrupt completes when it is not interrupted.
#[test]
fn uninterrupted_the_same_crossing_completes() {
    let (scene, writer, source, destination) = Crossing::begin(None).end();
    source.expect(0);
    destination.expect(0);
    assert!(writer.is_stopped() && scene.path("started").exists());
    assert!(scene.read("from/ram") == scene.read("to/ram"));
}
