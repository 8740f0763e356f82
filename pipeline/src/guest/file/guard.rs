//! The guard: a small process that runs `resume` should memferry be killed after `pause` and before Go.
//!
//! ```text
//!  memferry                                   guard (its own session, deaf to Ctrl-C, hang-up and terminate)
//!     │  starts  `… guard -- TIMEOUT_MS RESUME…` ──▶ │
//!     │ ◀────────────────────────────── 'r': I watch │
//!     │  runs pause                                  │
//!     │  … last round, handshake …                   │
//!     │ 'd': Go is about to leave, or you resumed ─▶ │ ends without a word
//!     │ ◀───────────────────────── end of its life ─ │
//!     ╳  killed before that: the line closes ──────▶ │ runs resume, ends
//! ```
//!
//! The line is a pair of connected sockets, of which the guard has one as its standard input: the kernel closes ours
//! however this process dies. What kills the guard as well (the end of a container or of a service's control group)
//! nothing here can help.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};

use super::commands;
use crate::guest::GuestError;
use crate::threads::explained;

const READY: u8 = b'r';
const DISMISSED: u8 = b'd';
/// How long a guard may take to say that it watches, and to go when it is dismissed.
const PATIENCE: Duration = Duration::from_secs(10);

/// A guard on its post. Dropped without [`Guard::dismiss`], it runs resume.
#[derive(Debug)]
pub(super) struct Guard {
    process: Child,
    line: UnixStream,
}

impl Guard {
    /// Starts a guard, and returns when it watches.
    pub(super) fn post(program: &Path, resume: &[String], timeout: Duration) -> Result<Self, GuestError> {
        let failed = |error: io::Error| {
            GuestError::caused(format_args!("the guard {} cannot be started", program.display()), error)
        };
        let (line, theirs) = UnixStream::pair().map_err(failed)?;
        let process = Command::new(program)
            .args(["guard", "--"])
            .arg(timeout.as_millis().to_string())
            .args(resume)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| failed(explained(error)))?;
        let mut guard = Self { process, line };
        match guard.is_watching() {
            Ok(()) => Ok(guard),
            Err(error) => {
                guard.kill();
                Err(failed(error))
            }
        }
    }

    fn is_watching(&mut self) -> io::Result<()> {
        let mut said = [0];
        self.line.set_read_timeout(Some(PATIENCE))?;
        self.line.read_exact(&mut said)?;
        if said == [READY] { Ok(()) } else { Err(io::Error::other("it is no guard")) }
    }

    /// Ends the guard: when this returns it is gone, and has run nothing.
    pub(super) fn dismiss(mut self) {
        // If it is gone already, so much the better.
        drop(self.line.write_all(&[DISMISSED]));
        if !matches!(commands::wait(&mut self.process, PATIENCE), Ok(Some(_))) {
            self.kill();
        }
    }

    fn kill(&mut self) {
        // Both fail only if it has ended on its own.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

/// What `memferry guard -- …` does: watches over the process at the other end of its standard input. Takes what stands
/// behind `guard`. To be called before any runtime or thread is made.
#[must_use]
pub fn main(argv: &[String]) -> ExitCode {
    match watch(argv) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

fn watch(argv: &[String]) -> Result<(), GuestError> {
    let failed = |error: io::Error| GuestError::caused("it cannot watch", error);
    let (timeout, resume) = arguments(argv)?;
    // It fails where the guard was started by hand and leads a group already; then it is in nobody's way.
    rustix::process::setsid().ok();
    let _deaf = ignore_signals().map_err(failed)?;
    let mut line = UnixStream::from(io::stdin().as_fd().try_clone_to_owned().map_err(failed)?);
    line.write_all(&[READY]).map_err(failed)?;
    if is_dismissed(&mut line) {
        return Ok(());
    }
    say(&format!("memferry ended while the guest was paused, and had not handed it over: running {resume:?}"));
    commands::run("resume", resume, timeout)?;
    say("the guest was resumed");
    Ok(())
}

fn arguments(argv: &[String]) -> Result<(Duration, &[String]), GuestError> {
    let argv = argv.strip_prefix(&["--".to_owned()]).unwrap_or(argv);
    let [timeout, resume @ ..] = argv else {
        return Err(GuestError("this is memferry's own, not for use by hand".into()));
    };
    match timeout.parse() {
        Ok(millis) if !resume.is_empty() => Ok((Duration::from_millis(millis), resume)),
        _ => Err(GuestError("usage: guard -- TIMEOUT_MS RESUME…".into())),
    }
}

/// True if it said so; false if it ended.
fn is_dismissed(line: &mut UnixStream) -> bool {
    let mut said = [0];
    loop {
        match line.read(&mut said) {
            Ok(0) => return false,
            Ok(_) if said == [DISMISSED] => return true,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
}

/// Takes the signals that end a program, and does nothing on them, as long as what is returned lives. What this process
/// starts has them as usual.
fn ignore_signals() -> io::Result<Runtime> {
    let runtime = Builder::new_current_thread().enable_io().build()?;
    let context = runtime.enter();
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup(), SignalKind::quit()] {
        drop(signal(kind)?);
    }
    drop(context);
    Ok(runtime)
}

/// To standard error, whoever still reads it: memferry may have been its only reader, and resume comes first.
fn say(words: &str) {
    drop(writeln!(io::stderr(), "memferry guard: {words}"));
}

#[cfg(test)]
mod tests;
