//! A folder for each test, and the program run in it: every wait is bounded, every process is ended by its own pid.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// The time limit for anything on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until a condition holds.
#[track_caller]
pub(crate) fn until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// A port of this host on which nothing listens.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A folder in which the program runs. Relative paths in its configurations start here.
pub(crate) struct Scene {
    folder: TempDir,
    /// Bytes of private memory that a program started here may have.
    limit: Option<u64>,
}

impl Scene {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), limit: None }
    }

    /// The same scene, in which programs started from here on may have this many bytes of private memory (heap,
    /// stacks, and all other private mappings).
    pub(crate) fn limited(self, bytes: u64) -> Self {
        Self { limit: Some(bytes), ..self }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// The names of a folder's entries; none if the folder does not exist.
    pub(crate) fn names(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(folder)).into_iter().flatten();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Writes `send.toml` for images in the folder `from`, and `recv.toml` that writes them to the folder `to`.
    pub(crate) fn configure(&self, images: &[&str]) {
        for (config, folder) in [("send.toml", "from"), ("recv.toml", "to")] {
            let image = |name: &&str| format!("    {{ id = \"{name}\", path = \"{folder}/{name}\" }},\n");
            let images: String = images.iter().map(image).collect();
            // A test that loses a connection on purpose sees it lost.
            let transport = "[transport]\naddress = \"tcp:127.0.0.1:0\"\nconnect_timeout = \"1m\"\n\n[migration.recovery]\nattempts = 0\n";
            self.write(config, format!("[guest.file]\nimages = [\n{images}]\n\n{transport}"));
            fs::create_dir_all(self.path(folder)).unwrap();
        }
    }

    /// Starts the program.
    pub(crate) fn start(&self, arguments: &[&str]) -> Running {
        Running::start(self.folder.path(), self.limit, arguments)
    }

    /// Starts the program with these as its standard output and standard error. Pipes are read.
    pub(crate) fn start_into(&self, arguments: &[&str], stdout: Stdio, stderr: Stdio) -> Running {
        self.start_on(arguments, Stdio::null(), stdout, stderr)
    }

    /// The same, and with this as its standard input.
    pub(crate) fn start_on(&self, arguments: &[&str], stdin: Stdio, stdout: Stdio, stderr: Stdio) -> Running {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memferry"));
        command.args(arguments).current_dir(self.folder.path()).stdin(stdin).stdout(stdout).stderr(stderr);
        Running::spawn(command, arguments.join(" "))
    }

    /// Starts the program through a shell script, in which `$0` is the program and `$@` its arguments.
    pub(crate) fn start_by(&self, script: &str, arguments: &[&str]) -> Running {
        let mut command = Command::new("sh");
        command.args(["-c", script, env!("CARGO_BIN_EXE_memferry")]).args(arguments).current_dir(self.folder.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Running::spawn(command, arguments.join(" "))
    }

    /// Starts the program with the settings given, each as `--set`.
    pub(crate) fn start_with(&self, arguments: &[&str], sets: &[&str]) -> Running {
        let sets = sets.iter().flat_map(|set| ["--set", *set]);
        self.start(&arguments.iter().copied().chain(sets).collect::<Vec<_>>())
    }

    /// Runs the program to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Ended {
        self.start(arguments).end()
    }

    /// Starts a destination, and returns it with its address as a setting.
    pub(crate) fn listening(&self, sets: &[&str]) -> (Running, String) {
        let destination = self.start_with(&["recv", "recv.toml", "--report", "recv.json"], sets);
        let line = destination.until_it_says("waiting at ");
        let address = line.split("waiting at ").nth(1).unwrap();
        (destination, format!("transport.address={address}"))
    }
}

/// The program while it runs. Dropped, it is killed.
pub(crate) struct Running {
    child: Child,
    stdout: Text,
    stderr: Text,
    what: String,
}

/// The outcome of the program, and its output.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Its exit code; if a signal ended it, 128 and the signal's number, as in a shell.
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self}");
        self
    }

    /// Asserts that the output contains each of the words.
    #[track_caller]
    pub(crate) fn says(self, words: &[&str]) -> Self {
        for word in words {
            assert!(self.stdout.contains(word) || self.stderr.contains(word), "{word:?} is missing:\n{self}");
        }
        self
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "code {}\n{}{}", self.code, self.stdout, self.stderr)
    }
}

impl Running {
    fn start(folder: &Path, limit: Option<u64>, arguments: &[&str]) -> Self {
        let program = env!("CARGO_BIN_EXE_memferry");
        let mut command = Command::new(if limit.is_some() { "sh" } else { program });
        if let Some(bytes) = limit {
            command.args(["-c", "ulimit -d $0 && exec \"$@\"", &(bytes >> 10).to_string(), program]);
        }
        command.args(arguments).current_dir(folder);
        Self::of(command, arguments.join(" "))
    }

    /// Starts the program, or a command that becomes it by `exec`.
    pub(crate) fn of(mut command: Command, what: String) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self::spawn(command, what)
    }

    fn spawn(mut command: Command, what: String) -> Self {
        let mut child = command.spawn().unwrap();
        let (stdout, stderr) = (Text::of(child.stdout.take()), Text::of(child.stderr.take()));
        Self { child, stdout, stderr, what }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Does the process handle the signal itself?
    pub(crate) fn takes(&self, signal: Signal) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
        u64::from_str_radix(mask.trim(), 16).unwrap() & 1 << (signal.as_raw() - 1) != 0
    }

    /// Waits until the output contains the words, and returns that line.
    #[track_caller]
    pub(crate) fn until_it_says(&self, words: &str) -> String {
        let begun = Instant::now();
        loop {
            let said = self.stderr.so_far();
            // Only a complete line counts.
            let whole = said.rfind('\n').map_or("", |end| &said[..end]);
            if let Some(line) = whole.lines().find(|line| line.contains(words)) {
                return line.to_owned();
            }
            assert!(begun.elapsed() < PATIENCE && !self.stderr.is_over(), "{}: no {words:?} in\n{said}", self.what);
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// The peak of its resident memory, in bytes, as the kernel reports it.
    #[track_caller]
    pub(crate) fn peak_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        peak.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
    }

    /// Resets [`Running::peak_memory`], so that earlier memory does not count.
    #[track_caller]
    pub(crate) fn forget_peak_memory(&self) {
        fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5").unwrap();
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits until it no longer runs, whichever process reaps it.
    #[track_caller]
    pub(crate) fn until_it_is_dead(&self) {
        let stat = format!("/proc/{}/stat", self.child.id());
        until("it is dead", || fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") Z ")));
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn end(mut self) -> Ended {
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            let said = self.stderr.so_far();
            assert!(begun.elapsed() < PATIENCE, "{} does not end; it said:\n{said}", self.what);
            thread::sleep(Duration::from_millis(2));
        };
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap());
        Ended { code, stdout: self.stdout.whole(), stderr: self.stderr.whole() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The output of a process, read by a thread.
struct Text {
    said: Arc<Mutex<String>>,
    reader: JoinHandle<()>,
}

impl Text {
    /// Without a pipe there is no output.
    fn of(pipe: Option<impl Read + Send + 'static>) -> Self {
        let said = Arc::new(Mutex::new(String::new()));
        let shared = said.clone();
        let reader = thread::spawn(move || {
            let Some(mut pipe) = pipe else { return };
            let mut piece = [0; 4096];
            while let Ok(bytes @ 1..) = pipe.read(&mut piece) {
                shared.lock().unwrap().push_str(&String::from_utf8_lossy(&piece[..bytes]));
            }
        });
        Self { said, reader }
    }

    fn so_far(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    fn is_over(&self) -> bool {
        self.reader.is_finished()
    }

    /// All output: the last process that can write to it has ended.
    #[track_caller]
    fn whole(&self) -> String {
        until("the output ends", || self.is_over());
        self.so_far()
    }
}

/// A number derived from a seed, different for each `draw`.
pub(crate) fn random(seed: u64, draw: u64) -> u64 {
    fastrand::Rng::with_seed(seed.wrapping_add(draw)).u64(..)
}

/// Bytes without a pattern, the same for the same seed.
pub(crate) fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut noise = vec![0; bytes.next_multiple_of(8)];
    for word in noise.chunks_exact_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        word.copy_from_slice(&(state ^ (state >> 29)).to_le_bytes());
    }
    noise.truncate(bytes);
    noise
}

/// Writes a sparse file: `length` bytes with `piece` at each of the offsets.
pub(crate) fn sparse(path: &Path, length: u64, piece: &[u8], offsets: &[u64]) {
    use std::io::{Seek, SeekFrom};
    let mut file = fs::File::create(path).unwrap();
    file.set_len(length).unwrap();
    for offset in offsets {
        file.seek(SeekFrom::Start(*offset)).unwrap();
        file.write_all(piece).unwrap();
    }
}
