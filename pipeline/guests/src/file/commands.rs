//! Runs an operator's command: an argument vector without a shell, with a time limit, storing the end of its output.

use std::collections::VecDeque;
use std::io::{self, PipeReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use memferry_stages::untrusted::{Untrusted, shown};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use memferry::guest::GuestError;
use memferry::threads::explained;

/// How much of a command's output is stored: its end.
const TAIL_BYTES: usize = 4096;
/// How many lines of it are shown.
const SHOWN_LINES: usize = 5;
/// How long to wait for the output of a failed command, in case a process that it left behind holds it open.
const OUTPUT_WAIT: Duration = Duration::from_millis(200);

/// Runs a command to its end. `name` is its name in the settings. After `timeout` it is killed, with its process group.
///
/// # Errors
/// When it cannot be run, does not succeed, or takes too long; with the last lines of its output.
pub(super) fn run(name: &'static str, argv: &[String], timeout: Duration) -> Result<(), GuestError> {
    Running::start(name, argv)?.finish(timeout)
}

/// A command that was started and whose end was not awaited.
#[derive(Debug)]
pub(super) struct Running {
    /// Its name in errors.
    what: String,
    child: Child,
    output: Output,
}

impl Running {
    /// Starts a command in a process group of its own.
    ///
    /// # Errors
    /// When it cannot be run.
    pub(super) fn start(name: &'static str, argv: &[String]) -> Result<Self, GuestError> {
        let what = format!("the {name} command {}", shown(&format!("{argv:?}")));
        match spawn(argv) {
            Ok((child, output)) => Ok(Self { what, child, output }),
            Err(error) => Err(GuestError::caused(what, format_args!("cannot be run: {}", explained(error)))),
        }
    }

    /// Its process, and the process group that it leads.
    pub(super) fn process(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Waits for its end. After `timeout` it is killed, with its process group.
    ///
    /// # Errors
    /// When it does not succeed, or takes too long; with the last lines of its output.
    pub(super) fn finish(mut self, timeout: Duration) -> Result<(), GuestError> {
        let why = match wait(&mut self.child, timeout) {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => format!("{status}{}", self.output.last_lines()),
            Ok(None) => {
                kill(&mut self.child);
                let lines = self.output.last_lines();
                format!("killed, for it took longer than {}{lines}", humantime::format_duration(timeout))
            }
            Err(error) => {
                kill(&mut self.child);
                format!("it cannot be waited for: {error}")
            }
        };
        Err(GuestError::caused(self.what, why))
    }
}

/// A command that another process started and may leave behind when it dies.
#[derive(Debug)]
pub(super) struct Orphan {
    process: Pid,
    handle: OwnedFd,
}

impl Orphan {
    /// The command that runs as this process; `None` if it has ended.
    pub(super) fn watch(process: i32) -> Option<Self> {
        let process = Pid::from_raw(process)?;
        Some(Self { process, handle: pidfd_open(process, PidfdFlags::empty()).ok()? })
    }

    /// Returns when the command has ended. After `timeout` it is killed, with its process group.
    pub(super) fn end(self, timeout: Duration) {
        if !matches!(has_ended(&self.handle, timeout), Ok(true)) {
            // The handle has not ended, so the process id is still that of this process.
            kill_process_group(self.process, Signal::KILL).unwrap_or_default();
            has_ended(&self.handle, timeout).unwrap_or_default();
        }
    }
}

/// Waits for a child's end, but no longer than `timeout`: `None` if it is still running.
pub(super) fn wait(child: &mut Child, timeout: Duration) -> io::Result<Option<ExitStatus>> {
    let handle = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    if has_ended(&handle, timeout)? { child.wait().map(Some) } else { Ok(None) }
}

/// Waits until a process has ended, but no longer than `timeout`.
fn has_ended(handle: &OwnedFd, timeout: Duration) -> io::Result<bool> {
    let deadline = Instant::now().checked_add(timeout);
    loop {
        // A limit that the clock cannot represent is no limit.
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut [PollFd::new(handle, PollFlags::IN)], left.as_ref()) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Kills a command and its process group. Its end was not awaited yet, so its process id is still its own.
fn kill(child: &mut Child) {
    // Both fail only if there is nothing left to kill.
    kill_process_group(Pid::from_child(child), Signal::KILL).unwrap_or_default();
    drop(child.wait());
}

fn spawn(argv: &[String]) -> io::Result<(Child, Output)> {
    let (output, input) = io::pipe()?;
    let output = Output::keep(output)?;
    let child = Command::new(&argv[0])
        .args(&argv[1..])
        .stdin(Stdio::null())
        .stdout(input.try_clone()?)
        .stderr(input)
        .process_group(0)
        .spawn()?;
    Ok((child, output))
}

/// The end of a command's output, read by a separate thread, so that a command never waits for its reader.
#[derive(Debug)]
struct Output {
    tail: Arc<Mutex<VecDeque<u8>>>,
    closed: Receiver<()>,
}

impl Output {
    fn keep(pipe: PipeReader) -> io::Result<Self> {
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let (open, closed) = sync_channel(0);
        let output = Self { tail: tail.clone(), closed };
        let read = move || {
            read_end(pipe, &tail);
            drop(open);
        };
        thread::Builder::new().name("command-output".into()).spawn(read)?;
        Ok(output)
    }

    /// `; output: …`, or nothing if there was no output.
    fn last_lines(self) -> String {
        // The channel carries no items: it closes with the output, or the wait times out.
        self.closed.recv_timeout(OUTPUT_WAIT).unwrap_or_default();
        let tail: Vec<u8> = locked(&self.tail).iter().copied().collect();
        let text = String::from_utf8_lossy(&tail);
        let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let last = Untrusted::from(lines[lines.len().saturating_sub(SHOWN_LINES)..].join(" | "));
        if last.is_empty() { String::new() } else { format!("; output: {last}") }
    }
}

/// Reads until the other end is closed, and stores the last bytes.
fn read_end(mut pipe: PipeReader, tail: &Mutex<VecDeque<u8>>) {
    let mut piece = [0; TAIL_BYTES];
    while let Ok(bytes @ 1..) = pipe.read(&mut piece) {
        let mut tail = locked(tail);
        tail.extend(&piece[..bytes]);
        let excess = tail.len().saturating_sub(TAIL_BYTES);
        tail.drain(..excess);
    }
}

fn locked(tail: &Mutex<VecDeque<u8>>) -> MutexGuard<'_, VecDeque<u8>> {
    tail.lock().expect("appending does not panic")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, timeout: Duration) -> Result<(), String> {
        run("pause", &["sh".into(), "-c".into(), script.into()], timeout).map_err(|error| error.to_string())
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_command_that_succeeds_is_silent_whatever_it_says() {
        sh("cat; echo much; yes | head -c 1000000; echo more >&2", LONG).unwrap();
    }

    #[test]
    fn a_failure_shows_the_command_the_status_and_the_last_lines() {
        let words =
            sh("for n in 1 2 3 4 5 6 7; do echo line $n; done; printf '\\033[1mbold' >&2; exit 3", LONG).unwrap_err();
        assert!(words.starts_with("the pause command [\"sh\", \"-c\", "), "{words}");
        assert!(
            words.ends_with("exit status: 3; output: line 4 | line 5 | line 6 | line 7 | \\u{1b}[1mbold"),
            "{words}"
        );
        assert!(sh("kill -9 $$", LONG).unwrap_err().ends_with("signal: 9 (SIGKILL)"));
        let missing = run("start", &["/no/such/program".into()], LONG).unwrap_err().to_string();
        assert!(missing.contains("the start command [\"/no/such/program\"]: cannot be run: No such file"), "{missing}");
    }

    #[test]
    fn a_command_that_hangs_is_killed_with_its_process_group() {
        let folder = tempfile::tempdir().unwrap();
        let pid = folder.path().join("pid");
        let script = format!("echo waiting; sleep 1000 & echo $! > '{}'; wait", pid.display());
        // The loop gives a slow machine time to reach the write of the process id.
        let mut limit = Duration::from_millis(100);
        let (words, sleeper) = loop {
            let words = sh(&script, limit).unwrap_err();
            match std::fs::read_to_string(&pid) {
                Ok(number) if number.ends_with('\n') => break (words, number),
                _ => limit *= 2,
            }
        };
        assert!(words.contains("killed, for it took longer than ") && words.ends_with("; output: waiting"), "{words}");
        // The sleeper is not a child of this process: it vanishes, or is a zombie.
        let is_dead = || match std::fs::read_to_string(format!("/proc/{}/stat", sleeper.trim())) {
            Ok(stat) => stat.contains(") Z ") || stat.contains(") X "),
            Err(_) => true,
        };
        let begin = Instant::now();
        while !is_dead() {
            assert!(begin.elapsed() < LONG, "the sleeper outlives its group");
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_process_left_behind_with_the_output_holds_nobody_up() {
        let folder = tempfile::tempdir().unwrap();
        let pid = folder.path().join("pid");
        let sleeper = format!("sleep 1000 & echo $! > '{}'", pid.display());
        // It still runs when the command ends, and is ended here.
        let ends = || {
            let pid = std::fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
            rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
        };
        sh(&format!("{sleeper}; exit 0"), LONG).unwrap();
        ends();
        let words = sh(&format!("{sleeper}; echo no; exit 1"), LONG).unwrap_err();
        ends();
        assert!(words.ends_with("; output: no"), "{words}");
    }
}
