//! Debian's memcached, with its memory in a mapped file, moved while a client writes continuously: with
//! `configs/memcached.toml` as it is, except for the ports. Skipped without memcached.

use std::collections::HashMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::thread::{self, JoinHandle};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::harness::{Running, Scene, free_port, noise, until};
use crate::reports::Report;
use crate::skip::skipped;

const KEYS: u64 = 20_000;
/// Bytes of a value, after its version.
const FILLER: usize = 500;
const CONFIG: &str = "configs/memcached.toml";

/// The last version of each key that was acknowledged as stored.
type Acknowledged = HashMap<u64, u64>;

/// A connection that speaks the text protocol.
struct Client {
    stream: BufReader<TcpStream>,
    request: Vec<u8>,
    filler: Vec<u8>,
}

impl Client {
    fn connect(port: u16) -> io::Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::new(stream), request: Vec::new(), filler: noise(FILLER, 9) })
    }

    /// Returns when the store is acknowledged.
    fn set(&mut self, key: u64, version: u64) -> io::Result<()> {
        self.request.clear();
        write!(self.request, "set key:{key} 0 0 {}\r\n", 8 + FILLER)?;
        self.request.extend_from_slice(&version.to_le_bytes());
        self.request.extend_from_slice(&self.filler);
        self.request.extend_from_slice(b"\r\n");
        self.stream.get_mut().write_all(&self.request)?;
        match self.line()?.as_str() {
            "STORED" => Ok(()),
            "" => Err(io::ErrorKind::UnexpectedEof.into()),
            other => panic!("memcached says {other:?}"),
        }
    }

    /// The version of a key, if the key exists.
    fn get(&mut self, key: u64) -> io::Result<Option<u64>> {
        write!(self.stream.get_mut(), "get key:{key}\r\n")?;
        if self.line()? == "END" {
            return Ok(None);
        }
        let mut value = vec![0; 8 + FILLER + 2];
        self.stream.read_exact(&mut value)?;
        assert_eq!(self.line()?, "END");
        let (version, filler) = value.split_at(8);
        assert!(filler[..FILLER] == self.filler, "the value of key {key} is another");
        Ok(Some(u64::from_le_bytes(version.try_into().unwrap())))
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }
}

/// A client that stores key after key until its connection is cut. It returns the acknowledged keys, and the one that
/// was not acknowledged.
fn hammer(port: u16, mut acknowledged: Acknowledged) -> JoinHandle<(Acknowledged, u64)> {
    let mut client = Client::connect(port).unwrap();
    thread::spawn(move || {
        let newest = acknowledged.values().copied().max().unwrap_or(0);
        for step in 1_u64.. {
            let (key, version) = (step.wrapping_mul(7919) % KEYS, newest + step);
            if client.set(key, version).is_err() {
                return (acknowledged, key);
            }
            acknowledged.insert(key, version);
        }
        unreachable!("it is cut off long before")
    })
}

/// Every acknowledged key has its version; the one that was not acknowledged may have been stored all the same.
#[track_caller]
fn has_every_key(port: u16, acknowledged: &Acknowledged, unanswered: u64) {
    let mut client = Client::connect(port).unwrap();
    assert_eq!(acknowledged.len() as u64, KEYS);
    for (&key, &version) in acknowledged {
        let found = client.get(key).unwrap();
        assert!(
            found == Some(version) || (key == unanswered && found > Some(version)),
            "key {key}: version {version} was acknowledged, {found:?} is there"
        );
    }
}

/// A folder that looks like the project's after a build, with a memcached whose memory is on a tmpfs.
struct Cache {
    scene: Scene,
    memory: TempDir,
    /// At the source and at the destination.
    ports: [u16; 2],
}

impl Cache {
    /// `None`, with a message, without memcached or a tmpfs.
    fn begin() -> Option<Self> {
        let found = Command::new("memcached").arg("-V").output();
        if let Err(error) = found {
            skipped(format_args!("memcached cannot be run ({error}): install Debian's package memcached"));
            return None;
        }
        let memory = match TempDir::new_in("/dev/shm") {
            Ok(memory) => memory,
            Err(error) => {
                skipped(format_args!("no folder in shared memory, {error}"));
                return None;
            }
        };
        ["from", "to"].iter().for_each(|end| fs::create_dir(memory.path().join(end)).unwrap());
        let scene = Scene::new();
        fs::create_dir(scene.path("target")).unwrap();
        symlink(memory.path(), scene.path("target/memcached")).unwrap();
        symlink(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs"), scene.path("configs")).unwrap();
        let cache = Self { scene, memory, ports: [free_port(), free_port()] };
        let port = cache.ports[0].to_string();
        let begun = Command::new("sh")
            .args(["configs/memcached.sh", "begin", "target/memcached/from", &port])
            .current_dir(cache.scene.path(""))
            .output()
            .unwrap();
        assert!(begun.status.success(), "{}", String::from_utf8_lossy(&begun.stderr));
        Some(cache)
    }

    fn fill(&self) -> Acknowledged {
        let mut client = Client::connect(self.ports[0]).unwrap();
        (0..KEYS).for_each(|key| client.set(key, 0).unwrap());
        (0..KEYS).map(|key| (key, 0)).collect()
    }

    /// Begins to move it, slowly enough that the rounds and the switchover take some time each.
    fn moving(&self, rounds: u32) -> Running {
        let [from, to] = self.ports;
        let begin = |command: &str, end: &str, port: u16| {
            let script = "\"sh\", \"configs/memcached.sh\", \"begin\"";
            format!("guest.file.{command}=[{script}, \"target/memcached/{end}\", \"{port}\"]")
        };
        let sets = [
            begin("resume", "from", from),
            begin("start", "to", to),
            format!("migration.max_rounds={rounds}"),
            "migration.max_bandwidth=10 MiB/s".into(),
            "encoder.compress=none".into(),
            "encoder.delta=none".into(),
        ];
        let sets: Vec<_> = sets.iter().map(String::as_str).collect();
        self.scene.start_with(&["run", CONFIG, "--report", "report.json"], &sets)
    }

    fn pid(&self, end: &str) -> Option<i32> {
        let text = fs::read_to_string(self.memory.path().join(end).join("pid")).ok()?;
        text.trim().parse().ok()
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        for pid in ["from", "to"].iter().filter_map(|end| self.pid(end)) {
            // The one that runs belongs to this test; the other's file is gone with it.
            kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap_or_default();
        }
    }
}

#[test]
fn a_memcached_is_moved_with_every_key_that_it_acknowledged_and_survives_what_ends_the_move() {
    let Some(cache) = Cache::begin() else { return };
    let [from, to] = cache.ports;
    let mut acknowledged = cache.fill();

    // Cancelled, then killed, while memcached is stopped: memcached restarts at the source.
    for (signal, code) in [(Signal::INT, 130), (Signal::KILL, 128 + 9)] {
        let writer = hammer(from, acknowledged);
        let moving = cache.moving(1);
        moving.until_it_says("the guest is paused");
        assert_eq!(cache.pid("from"), None, "it has ended");
        moving.signal(signal);
        moving.end().expect(code);
        let unanswered;
        (acknowledged, unanswered) = writer.join().unwrap();
        until("memcached begins again", || Client::connect(from).is_ok());
        has_every_key(from, &acknowledged, unanswered);
        assert_eq!(cache.pid("to"), None);
        assert!(!cache.memory.path().join("to/ram").exists() && !cache.memory.path().join("to/ram.meta").exists());
        // The name of a file that a killed memferry could not remove shows that it is partial.
        for name in cache.scene.names("target/memcached/to") {
            assert!(name.ends_with(".partial"), "{name}");
            fs::remove_file(cache.memory.path().join("to").join(name)).unwrap();
        }
        // The guard of a killed memferry ends after the resume command, which waits until the pid is written.
        until("memcached reports its number", || cache.pid("from").is_some());
    }

    let writer = hammer(from, acknowledged);
    cache.moving(3).end().expect(0).says(&["completed after", ", verified"]);
    let (acknowledged, unanswered) = writer.join().unwrap();
    has_every_key(to, &acknowledged, unanswered);
    assert!(cache.pid("from").is_none() && Client::connect(from).is_err(), "two run");
    let report = Report::read(&cache.scene.path("report.json"));
    report.is_of_a_whole_migration();
    assert!(report.at("/rounds/0/dirty_after").as_u64().unwrap() > 100, "it was written to meanwhile");
}

#[test]
fn a_memcached_whose_memory_does_not_come_whole_says_so_and_begins_again_at_the_source() {
    let Some(cache) = Cache::begin() else { return };
    let acknowledged = cache.fill();
    let writer = hammer(cache.ports[0], acknowledged);
    let absent = "guest.file.state_files=[{ id = \"meta\", path = \"target/memcached/absent\", copy = \"copy\" }]";
    let resume = format!(
        "guest.file.resume=[\"sh\", \"configs/memcached.sh\", \"begin\", \"target/memcached/from\", \"{}\"]",
        cache.ports[0]
    );
    let ended = cache.scene.start_with(&["run", CONFIG], &[absent, &resume]).end();
    ended.expect(1).says(&["state file meta: target/memcached/absent: No such file"]);
    let (acknowledged, unanswered) = writer.join().unwrap();
    has_every_key(cache.ports[0], &acknowledged, unanswered);
    assert_eq!(cache.scene.names("target/memcached/to"), [""; 0]);
}
