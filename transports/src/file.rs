//! A stream in a file: complete or absent.
//!
//! Takes a path; gives the source one writer and the destination one reader. Owns the temporary file while it is written.
//! Promises: the path holds a whole stream, flushed to disk, or what it held before.
//!
//! ```text
//! connect   PATH.memferry-0123456789abcdef.partial   created for the owner only, and locked
//! write     into the page cache
//! flush     fdatasync
//! shutdown  fsync, rename to PATH, fsync of the directory
//! drop      without a finished shutdown: the temporary file is removed
//! ```
//!
//! A program that is killed leaves its `.partial` file, which nothing takes for a stream; the next one that writes to PATH removes
//! it ([`temporary`](crate::temporary)).
//!
//! Writes and reads run on the caller's thread, since the page cache takes them at the speed of memory; on a runtime
//! of several threads the other tasks continue meanwhile. Flushes run where blocking is allowed. Not for a tokio `LocalSet`.

use std::fs::File;
use std::future::Future;
use std::io::{self, ErrorKind, IoSlice, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures::FutureExt;
use futures::future::BoxFuture;
use rustix::fs::Advice;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::coop::poll_proceed;
use tokio::task::{JoinHandle, block_in_place, spawn_blocking};

use crate::regular;
use crate::retry::in_context;
use crate::temporary::{Temporary, target_of};
use crate::{Arrival, Capabilities, Connection, Listener, Transport};

/// A stream in a file.
#[derive(Clone, Debug)]
pub struct FileTransport {
    path: PathBuf,
}

impl FileTransport {
    /// A transport to or from the file at `path`. A symbolic link is followed.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Checks whether a stream can be written here, as far as that is known before it starts.
    ///
    /// # Errors
    /// As [`Transport::connect`].
    pub fn check_writable(&self) -> io::Result<()> {
        target_of(&self.path).map(drop).map_err(|error| self.cannot("write", &error))
    }

    /// Checks whether a stream can be read from here.
    ///
    /// # Errors
    /// As [`Listener::accept`].
    pub fn check_readable(&self) -> io::Result<()> {
        FileReader::open(&self.path).map(drop).map_err(|error| self.cannot("read", &error))
    }

    fn cannot(&self, what: &str, error: &io::Error) -> io::Error {
        in_context(error, &format!("cannot {what} {}", self.address()))
    }
}

impl Transport for FileTransport {
    fn capabilities(&self) -> Capabilities {
        Capabilities { return_path: false, max_connections: 1, stored: true, authenticated: false }
    }

    fn address(&self) -> String {
        format!("file:{}", self.path.display())
    }

    fn connect(&self) -> BoxFuture<'_, io::Result<Connection>> {
        async move {
            let writer = FileWriter::create(&self.path).map_err(|error| self.cannot("write", &error))?;
            Ok(Connection {
                peer: self.path.display().to_string(),
                identity: None,
                writer: Some(Box::new(writer)),
                reader: None,
            })
        }
        .boxed()
    }

    fn listen(&self) -> BoxFuture<'_, io::Result<Box<dyn Listener>>> {
        let listening = Listening { transport: self.clone(), given: false };
        async move { Ok(Box::new(listening) as Box<dyn Listener>) }.boxed()
    }
}

#[derive(Debug)]
struct Listening {
    transport: FileTransport,
    given: bool,
}

impl Listener for Listening {
    /// The file, once; a missing file is an error at once. After the file no connection ever comes.
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Arrival>> {
        async move {
            if self.given {
                return std::future::pending().await;
            }
            let path = &self.transport.path;
            let reader = FileReader::open(path).map_err(|error| self.transport.cannot("read", &error))?;
            self.given = true;
            let peer = path.display().to_string();
            Ok(Connection { peer, identity: None, writer: None, reader: Some(Box::new(reader)) }.into())
        }
        .boxed()
    }

    fn local_address(&self) -> String {
        self.transport.address()
    }
}

/// Reads a whole stream from its beginning.
#[derive(Debug)]
struct FileReader {
    file: File,
    position: u64,
    name: String,
}

impl FileReader {
    fn open(path: &Path) -> io::Result<Self> {
        let file = regular::open(path)?;
        if let Err(error) = rustix::fs::fadvise(&file, 0, None, Advice::Sequential) {
            tracing::debug!(%error, "no read-ahead could be asked for");
        }
        Ok(Self { file, position: 0, name: path.display().to_string() })
    }
}

impl AsyncRead for FileReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let budget = ready!(poll_proceed(context));
        budget.made_progress();
        let unfilled = buffer.initialize_unfilled();
        let position = self.position;
        let read = in_place(|| retry_interrupted(|| self.file.read_at(unfilled, position)));
        let read =
            read.map_err(|error| in_context(&error, &format!("cannot read {} at byte {position}", self.name)))?;
        buffer.advance(read);
        self.position += read as u64;
        Poll::Ready(Ok(()))
    }
}

/// Writes a stream beside its place and moves it there when it is complete.
#[derive(Debug)]
struct FileWriter {
    file: Arc<File>,
    temporary: Arc<Temporary>,
    /// Whether bytes were written since the last flush began.
    unsynced: bool,
    work: Option<Work>,
    /// The first error. It stays: after a flush that failed, a later one may succeed without the bytes on disk.
    failed: Option<(ErrorKind, String)>,
    complete: bool,
}

/// An operation that runs where blocking is allowed.
#[derive(Debug)]
enum Work {
    Flush(JoinHandle<io::Result<()>>),
    Completion(JoinHandle<io::Result<()>>),
}

impl FileWriter {
    fn create(path: &Path) -> io::Result<Self> {
        let (file, temporary) = Temporary::create(path)?;
        Ok(Self::over(file, temporary))
    }

    fn over(file: File, temporary: Temporary) -> Self {
        let (file, temporary) = (Arc::new(file), Arc::new(temporary));
        Self { file, temporary, unsynced: false, work: None, failed: None, complete: false }
    }

    /// Fails if anything failed before.
    fn check(&self) -> io::Result<()> {
        match &self.failed {
            Some((kind, message)) => Err(io::Error::new(*kind, message.clone())),
            None => Ok(()),
        }
    }

    /// Stores an error, with the place in front of it.
    fn fail(&mut self, error: &io::Error) -> io::Error {
        let error = in_context(error, &format!("cannot write {}", self.temporary.path().display()));
        self.failed = Some((error.kind(), error.to_string()));
        error
    }

    fn write(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.check()?;
        if self.complete || matches!(self.work, Some(Work::Completion(_))) {
            return Err(io::Error::new(ErrorKind::BrokenPipe, "the stream was shut down"));
        }
        self.unsynced = true;
        let mut file = &*self.file;
        in_place(|| retry_interrupted(|| file.write_vectored(slices))).map_err(|error| self.fail(&error))
    }

    /// Waits for the operation in progress.
    fn poll_work(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (handle, completes) = match &mut self.work {
            None => return Poll::Ready(self.check()),
            Some(Work::Flush(handle)) => (handle, false),
            Some(Work::Completion(handle)) => (handle, true),
        };
        let outcome = ready!(Pin::new(handle).poll(context)).unwrap_or_else(|stopped| Err(io::Error::other(stopped)));
        self.work = None;
        match outcome {
            Ok(()) => self.complete = completes,
            Err(error) => return Poll::Ready(Err(self.fail(&error))),
        }
        Poll::Ready(Ok(()))
    }

    fn start_flush(&mut self) {
        self.unsynced = false;
        let file = self.file.clone();
        self.work = Some(Work::Flush(spawn_blocking(move || file.sync_data())));
    }

    fn start_completion(&mut self) {
        let (file, temporary) = (self.file.clone(), self.temporary.clone());
        self.work = Some(Work::Completion(spawn_blocking(move || temporary.complete(&file))));
    }
}

impl AsyncWrite for FileWriter {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let budget = ready!(poll_proceed(context));
        budget.made_progress();
        Poll::Ready(self.write(slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.poll_work(context))?;
            if self.complete || !self.unsynced {
                return Poll::Ready(Ok(()));
            }
            self.start_flush();
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.poll_work(context))?;
            if self.complete {
                return Poll::Ready(Ok(()));
            }
            self.start_completion();
        }
    }
}

impl Drop for FileWriter {
    fn drop(&mut self) {
        self.temporary.give_up();
    }
}

/// Runs a call that may block for a moment. On a runtime of several threads, the other tasks of this thread move to others.
fn in_place<R>(call: impl FnOnce() -> R) -> R {
    match Handle::try_current() {
        Ok(runtime) if runtime.runtime_flavor() == RuntimeFlavor::MultiThread => block_in_place(call),
        _ => call(),
    }
}

fn retry_interrupted(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, OpenOptions};
    use tokio::io::AsyncWriteExt;

    /// A writer over a device that is always full; what is beside the path is a plain file.
    fn on_a_full_device(path: &Path) -> FileWriter {
        let (_, temporary) = Temporary::create(path).expect("created");
        FileWriter::over(OpenOptions::new().write(true).open("/dev/full").expect("opened"), temporary)
    }

    #[tokio::test]
    async fn an_error_stays_and_names_the_file() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("stream");
        let mut writer = on_a_full_device(&path);
        let error = writer.write_all(b"page").await.expect_err("full");
        assert_eq!(error.kind(), ErrorKind::StorageFull);
        assert!(error.to_string().contains("stream.memferry-"), "{error}");
        for again in [writer.write_all(b"x").await.err(), writer.flush().await.err(), writer.shutdown().await.err()] {
            assert_eq!(again.expect("it failed").to_string(), error.to_string());
        }
        drop(writer);
        assert_eq!(fs::read_dir(directory.path()).expect("a directory").count(), 0);
    }

    #[tokio::test]
    async fn a_flush_that_fails_is_not_forgotten() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("stream");
        // A device cannot be flushed, so the bytes are not on disk, whatever a later call says.
        let (_, temporary) = Temporary::create(&path).expect("created");
        let null = OpenOptions::new().write(true).open("/dev/null").expect("opened");
        let mut writer = FileWriter::over(null, temporary);
        writer.write_all(b"page").await.expect("written");
        let error = writer.flush().await.expect_err("no flush").to_string();
        assert_eq!(writer.shutdown().await.expect_err("no flush").to_string(), error);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_rename_that_fails_leaves_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("stream");
        let mut writer = FileWriter::create(&path).expect("created");
        writer.write_all(b"page").await.expect("written");
        fs::create_dir(&path).expect("something in the way");
        writer.shutdown().await.expect_err("a directory");
        drop(writer);
        assert_eq!(fs::read_dir(directory.path()).expect("a directory").count(), 1);
    }
}
