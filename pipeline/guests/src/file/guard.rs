//! The guard: a small process that runs the commands `pause` and `resume` for memferry, and completes the remaining
//! steps if memferry is killed.
//!
//! ```text
//!  memferry                                   guard (its own session, deaf to Ctrl-C, hang-up and terminate)
//!     │  starts `… guard` ──────────────────────────▶ │
//!     │ Watch: the commands, their time limit ──────▶ │
//!     │ ◀─────────────────────────────────────── Done │ ┄┄ killed: nothing to do
//!     │ Pause ──────────────────────────────────────▶ │ runs pause, to its end
//!     │ ◀──────────────────── Started; Done or Failed │ ┄┄ killed from here on: awaits the end of pause, resumes
//!     │  … last round, handshake …                    │
//!     │ Commit: Go is about to leave ───────────────▶ │ resumes no more, unless it is asked to
//!     │ ◀─────────────────────────────────────── Done │ ┄┄ killed before this is read: resumes; Go has not left
//!     │ ══ Go ══▶ destination                         │ ┄┄ killed from here on: prints where to look
//!     │  … the verdict …                              │
//!     │ Resume, if the guest is to run here ────────▶ │ runs resume, to its end
//!     │ ◀──────────────────── Started; Done or Failed │
//!     │ Dismiss ────────────────────────────────────▶ │ ends silently
//! ```
//!
//! The line is a pair of connected sockets. The guard has one end as its standard input, and the kernel closes
//! memferry's end however memferry dies. The socket also shows the guard whether its last answer was read, so a guest
//! is resumed up to the moment at which memferry may send Go, and never after it.
//!
//! Between that moment and the arrival of Go at the destination, normally a fraction of a millisecond, memferry's death
//! leaves a guest that is paused here and does not run there. This side cannot know that, so the guard prints what to
//! check and how to resume the guest.
//!
//! The guard acts first and prints afterwards. If the guard itself is killed, memferry runs the commands. If both are
//! killed (at the end of a container or of a service's control group), nothing here can help.

mod line;
mod watch;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use self::line::{Answer, Line, Orders, Request};
use super::commands::{self, Orphan};
use memferry::guest::GuestError;
use memferry::threads::explained;

pub use watch::main;

/// How long a guard may take to answer, besides the time of a command. A busy host may take seconds to start a process.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running guard. If dropped without [`Guard::dismiss`], it resumes the guest or prints where it may be.
#[derive(Debug)]
pub(super) struct Guard {
    process: Child,
    line: Line,
    timeout: Duration,
    /// The command that it runs.
    running: Option<Orphan>,
}

/// The guard does not answer, or not validly: it was killed or stopped, or the program is not a guard.
pub(super) type Lost = io::Error;

impl Guard {
    /// Starts a guard, and returns when it watches.
    pub(super) fn post(
        program: &Path,
        pause: &[String],
        resume: &[String],
        timeout: Duration,
    ) -> Result<Self, GuestError> {
        let failed = |error: io::Error| {
            GuestError::caused(format_args!("the guard {} cannot be started", program.display()), error)
        };
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let process = Command::new(program)
            .arg("guard")
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| failed(explained(error)))?;
        let mut guard = Self { process, line: Line::new(ours), timeout, running: None };
        let orders = Orders { pause: pause.to_vec(), resume: resume.to_vec(), timeout };
        match guard.ask(&Request::Watch(orders), PATIENCE) {
            Ok(_) => Ok(guard),
            Err(error) => {
                guard.end();
                Err(failed(error))
            }
        }
    }

    /// Runs the pause command.
    pub(super) fn pause(&mut self) -> Result<Result<(), GuestError>, Lost> {
        self.ask(&Request::Pause, self.timeout.saturating_add(PATIENCE))
    }

    /// Runs the resume command.
    pub(super) fn resume(&mut self) -> Result<Result<(), GuestError>, Lost> {
        self.ask(&Request::Resume, self.timeout.saturating_add(PATIENCE))
    }

    /// Once this returns the guard does not resume the guest, unless it is asked to.
    pub(super) fn commit(&mut self, destination: &str) -> Result<(), Lost> {
        self.ask(&Request::Commit { destination: destination.into() }, PATIENCE).map(drop)
    }

    /// Ends the guard, which does nothing more.
    pub(super) fn dismiss(mut self) {
        // It may have ended already.
        drop(self.line.send(&Request::Dismiss));
        if !matches!(commands::wait(&mut self.process, PATIENCE), Ok(Some(_))) {
            self.end();
        }
    }

    /// Kills the guard, and returns when the guard and the command that it ran have ended.
    pub(super) fn end(mut self) {
        // Both fail only if it has ended on its own.
        drop(self.process.kill());
        drop(self.process.wait());
        if let Some(running) = self.running {
            running.end(self.timeout);
        }
    }

    /// Sends a request, and waits for the answer.
    fn ask(&mut self, request: &Request, patience: Duration) -> Result<Result<(), GuestError>, Lost> {
        self.line.set_patience(patience)?;
        self.line.send(request)?;
        loop {
            match self.line.receive()? {
                Some(Answer::Started(process)) => self.running = Orphan::watch(process),
                Some(Answer::Done) => {
                    self.running = None;
                    return Ok(Ok(()));
                }
                Some(Answer::Failed(why)) => {
                    self.running = None;
                    return Ok(Err(GuestError(why)));
                }
                None => return Err(io::Error::other("the guard has ended")),
            }
        }
    }
}

#[cfg(test)]
mod tests;
