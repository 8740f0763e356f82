//! The line between memferry and its guard: requests one way, answers the other way, each one line of JSON.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The longest message. The operating system accepts no longer command either.
const MAX_MESSAGE: u64 = 4 << 20;

/// The requests of memferry to its guard.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Request {
    /// The first request: the configuration of the guard.
    Watch(Orders),
    /// Run the pause command. From here on the guest may be paused.
    Pause,
    /// Run the resume command. If it succeeds, the guest runs.
    Resume,
    /// From here on, never resume the guest unless it is requested: Go is about to leave.
    Commit {
        /// The destination of the guest.
        destination: String,
    },
    /// End. The state of the guest is known and reported.
    Dismiss,
}

/// The configuration of a guard.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Orders {
    pub(super) pause: Vec<String>,
    pub(super) resume: Vec<String>,
    /// How long each command may take.
    pub(super) timeout: Duration,
}

/// The answers of a guard. Each request but Dismiss has exactly one answer that is not Started.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Answer {
    /// The request is done.
    Done,
    /// A command runs as this process. The result follows.
    Started(i32),
    /// A command failed; the text is for the operator.
    Failed(String),
}

/// One end of the line.
#[derive(Debug)]
pub(super) struct Line(BufReader<UnixStream>);

impl Line {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self(BufReader::new(stream))
    }

    /// How long the other end may be silent while its message is awaited, and may leave a sent message unread.
    pub(super) fn set_patience(&self, patience: Duration) -> io::Result<()> {
        self.0.get_ref().set_read_timeout(Some(patience))?;
        self.0.get_ref().set_write_timeout(Some(patience))
    }

    #[cfg(test)]
    pub(super) fn socket(&self) -> &UnixStream {
        self.0.get_ref()
    }

    pub(super) fn send(&mut self, message: &impl Serialize) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(message)?;
        bytes.push(b'\n');
        self.0.get_mut().write_all(&bytes)
    }

    /// The next message; `None` if the other end has closed the line, even in the middle of a message.
    ///
    /// # Errors
    /// [`io::ErrorKind::ConnectionReset`] if the other end closed it and had not read all that was sent to it.
    pub(super) fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        let mut bytes = Vec::new();
        (&mut self.0).take(MAX_MESSAGE).read_until(b'\n', &mut bytes)?;
        match bytes.pop() {
            Some(b'\n') => Ok(serde_json::from_slice(&bytes)?),
            _ => Ok(None),
        }
    }
}
