//! The guard process: it runs the commands that memferry requests, and completes the remaining steps when memferry
//! dies.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::Duration;

use memferry_stages::untrusted::{Untrusted, shown};
use rustix::event::{PollFd, PollFlags, poll};
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};

use super::line::{Answer, Line, Orders, Request};
use crate::file::commands::{self, Running};
use memferry::guest::GuestError;

/// How long standard error may take to accept the guard's last message. Nothing waits for it.
const SPEAKING: Duration = Duration::from_secs(600);

/// The implementation of `memferry guard`: watches the process at the other end of its standard input. Call it before
/// any runtime or thread is created.
#[must_use]
pub fn main() -> ExitCode {
    match watch() {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(Left { words, succeeded })) => {
            speak(words);
            if succeeded { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            speak(error.to_string());
            ExitCode::FAILURE
        }
    }
}

/// Watches until the line ends. Returns what it did in memferry's place, if anything was needed.
fn watch() -> Result<Option<Left>, GuestError> {
    let failed = |error: io::Error| GuestError::caused("this is memferry's own, not for use by hand", error);
    // It fails if the guard was started by hand and leads a group already; then it is not needed.
    rustix::process::setsid().ok();
    let _deaf = ignore_signals().map_err(failed)?;
    let mut line = Line::new(UnixStream::from(io::stdin().as_fd().try_clone_to_owned().map_err(failed)?));
    match line.receive().map_err(failed)? {
        Some(Request::Watch(orders)) => {
            line.send(&Answer::Done).map_err(failed)?;
            Ok(Watch::new(orders).run_to_end(&mut line))
        }
        // Memferry died before it paused anything.
        None => Ok(None),
        Some(_) => Err(failed(io::Error::other("the message does not name what to watch over"))),
    }
}

/// A running guard.
#[derive(Debug)]
pub(super) struct Watch {
    orders: Orders,
    duty: Duty,
}

/// The action if memferry dies.
#[derive(Debug, PartialEq)]
enum Duty {
    /// Nothing: the guest runs.
    Nothing,
    /// Resume the guest: it may be paused.
    Resume,
    /// Print where the guest may be. Go may have left, so the guest must not be resumed.
    Report { destination: Untrusted },
}

/// How the line ended.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    /// The guard was dismissed.
    Dismissed,
    /// Memferry died.
    Closed,
    /// Memferry died before it read the last answer.
    Unread,
}

/// The action of a guard in memferry's place.
#[derive(Debug, PartialEq)]
pub(super) struct Left {
    /// A description for the operator.
    pub(super) words: String,
    /// Does the guest run, or was there nothing to do but to print?
    pub(super) succeeded: bool,
}

impl Watch {
    pub(super) fn new(orders: Orders) -> Self {
        Self { orders, duty: Duty::Nothing }
    }

    /// Serves memferry until it dismisses the guard or dies, and then acts in its place.
    pub(super) fn run_to_end(mut self, line: &mut Line) -> Option<Left> {
        let end = self.serve(line);
        match self.duty {
            _ if end == End::Dismissed => None,
            Duty::Nothing => None,
            Duty::Resume => Some(self.resume_alone()),
            // Go leaves only after memferry has read the answer that permits it. It was not read, so Go has not left.
            Duty::Report { .. } if end == End::Unread => Some(self.resume_alone()),
            Duty::Report { destination } => Some(report(&destination, &self.orders.resume)),
        }
    }

    fn serve(&mut self, line: &mut Line) -> End {
        loop {
            // A failure to send the answer shows in the next receive as well.
            match line.receive() {
                Ok(Some(Request::Pause)) => {
                    self.duty = Duty::Resume;
                    drop(self.run(line, "pause"));
                }
                Ok(Some(Request::Resume)) => {
                    self.duty = Duty::Resume;
                    if self.run(line, "resume") == Ok(()) {
                        self.duty = Duty::Nothing;
                    }
                }
                Ok(Some(Request::Commit { destination })) => {
                    self.duty = Duty::Report { destination: destination.into() };
                    if line.send(&Answer::Done).is_err() {
                        return End::Unread;
                    }
                }
                Ok(Some(Request::Dismiss)) => return End::Dismissed,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return End::Unread,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Some(Request::Watch(_)) | None) | Err(_) => return End::Closed,
            }
        }
    }

    /// Runs a command to its end, whether or not memferry lives, and sends the result.
    fn run(&self, line: &mut Line, name: &'static str) -> Result<(), String> {
        let argv = if name == "pause" { &self.orders.pause } else { &self.orders.resume };
        let ended = Running::start(name, argv).and_then(|running| {
            drop(line.send(&Answer::Started(running.process().as_raw_pid())));
            running.finish(self.orders.timeout)
        });
        let ended = ended.map_err(|error| error.to_string());
        drop(line.send(&ended.clone().map_or_else(Answer::Failed, |()| Answer::Done)));
        ended
    }

    fn resume_alone(&self) -> Left {
        let ended = "memferry ended while the guest was paused, and had not handed it over";
        match commands::run("resume", &self.orders.resume, self.orders.timeout) {
            Ok(()) => Left { words: format!("{ended}: the guest was resumed"), succeeded: true },
            Err(error) => Left { words: format!("{ended}: it stays paused, because {error}"), succeeded: false },
        }
    }
}

fn report(destination: &Untrusted, resume: &[String]) -> Left {
    let resume = format!("{resume:?}");
    let words = format!(
        "memferry ended after it sent Go to {destination}, or was about to. The guest is paused here. Look whether it runs at \
         {destination}. If it does not, and memferry has ended there, resume it here: {}",
        shown(&resume)
    );
    Left { words, succeeded: true }
}

/// Handles the signals that end a program by doing nothing, as long as the returned value lives. Processes that this
/// process starts have the default handlers.
fn ignore_signals() -> io::Result<Runtime> {
    let runtime = Builder::new_current_thread().enable_io().build()?;
    let context = runtime.enter();
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup(), SignalKind::quit()] {
        drop(signal(kind)?);
    }
    drop(context);
    Ok(runtime)
}

/// Prints the last message to standard error. All actions are done by then, so a reader that does not read delays
/// nothing; it is given [`SPEAKING`].
fn speak(words: String) {
    let (spoken, end) = sync_channel::<()>(0);
    let speaker = thread::Builder::new().name("last-words".into()).spawn(move || {
        // There is no one to report a failure to.
        drop(write_out(&format!("memferry guard: {words}\n")));
        drop(spoken);
    });
    if speaker.is_ok() {
        // No item is sent: it returns when the channel closes, or when the wait times out.
        end.recv_timeout(SPEAKING).unwrap_or_default();
    }
}

/// Writes all of it, even if another process that shares standard error has made it non-blocking.
fn write_out(words: &str) -> io::Result<()> {
    let mut left = words.as_bytes();
    while !left.is_empty() {
        let stderr = io::stderr();
        match (&stderr).write(left) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(bytes) => left = &left[bytes..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], None)?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
