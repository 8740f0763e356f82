//! Unix sockets: several connections inside one host, each with its return path, for the owner only.
//!
//! Takes a path, gives [`Connection`]s. Owns the socket file while it listens, and removes it if it is still its own.
//! Promises: no other user can connect at any moment; a socket that a dead program left is replaced; a live socket, and
//! anything that is not a socket, stays.
//!
//! # How the socket is created
//! The mode is set on the socket *before* it is bound: Linux gives the file the socket's own mode, less the umask. So the
//! file is `0600` from its first moment. The process umask is not changed under other threads, and there is no second name.
//!
//! Detecting a stale socket, removing it and listening again are three steps. A lock (`flock`) on the directory serializes two
//! programs that do so at once, and leaves nothing behind.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use rustix::fs::Mode;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{Instant, sleep};

use crate::retry::{Failure, after_failed_accept, connect_within, in_context};
use crate::{Arrival, Capabilities, Connection, Listener, Transport};

/// The longest path of a socket, in bytes: the kernel's limit.
const MAX_PATH: usize = 107;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// How long to wait for another program's lock on the directory.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

/// Checks that the path is short enough for a socket. The error says why it is not.
pub(crate) fn check_path_length(path: &Path) -> Result<(), String> {
    let bytes = path.as_os_str().len();
    if bytes <= MAX_PATH {
        return Ok(());
    }
    Err(format!("the path has {bytes} bytes, a socket's has at most {MAX_PATH}"))
}

/// Connections over a Unix socket.
#[derive(Clone, Debug)]
pub struct UnixTransport {
    path: PathBuf,
    connect_timeout: Duration,
}

impl UnixTransport {
    /// A transport over the socket at `path`. `connect_timeout` is how long a source keeps trying.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>, connect_timeout: Duration) -> Self {
        Self { path: path.into(), connect_timeout }
    }

    fn check_path(&self) -> io::Result<()> {
        let refuse =
            |why| io::Error::new(ErrorKind::InvalidInput, format!("{}: {why}; use a shorter one", self.address()));
        check_path_length(&self.path).map_err(refuse)
    }

    async fn connect_now(&self) -> Result<Connection, Failure> {
        match UnixStream::connect(&self.path).await {
            Ok(stream) => Ok(connection(stream, self.path.display().to_string())),
            // Absent so far, left by a dead program, or its backlog is full.
            Err(error) if is_passing(error.kind()) => Err(Failure::Retry(error)),
            Err(error) => Err(Failure::Final(error)),
        }
    }

    async fn listen_now(&self) -> io::Result<Listening> {
        let _lock = lock_directory(&self.path).await;
        let socket = match bind(&self.path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                remove_stale(&self.path)?;
                bind(&self.path)?
            }
            bound => bound?,
        };
        let created = Created::at(&self.path)?;
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        let socket = UnixListener::from_std(socket.into())?;
        Ok(Listening { created, socket, address: self.address() })
    }
}

fn is_passing(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

impl Transport for UnixTransport {
    fn capabilities(&self) -> Capabilities {
        Capabilities { return_path: true, max_connections: u16::MAX, stored: false, authenticated: false }
    }

    fn address(&self) -> String {
        format!("unix:{}", self.path.display())
    }

    fn connect(&self) -> BoxFuture<'_, io::Result<Connection>> {
        async move {
            self.check_path()?;
            connect_within(&self.address(), self.connect_timeout, |_| self.connect_now()).await
        }
        .boxed()
    }

    fn listen(&self) -> BoxFuture<'_, io::Result<Box<dyn Listener>>> {
        async move {
            self.check_path()?;
            match self.listen_now().await {
                Ok(listening) => Ok(Box::new(listening) as Box<dyn Listener>),
                Err(error) => Err(in_context(&error, &format!("cannot listen on {}", self.address()))),
            }
        }
        .boxed()
    }
}

#[derive(Debug)]
struct Listening {
    /// Dropped before the socket: while the socket is open, no other file has its inode, and no program takes it for a stale one.
    created: Created,
    socket: UnixListener,
    address: String,
}

impl Listener for Listening {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Arrival>> {
        async move {
            loop {
                match self.socket.accept().await {
                    Ok((stream, _)) => {
                        let peer = name_of_peer(&stream);
                        return Ok(connection(stream, peer).into());
                    }
                    Err(error) => after_failed_accept(&self.address, &error).await?,
                }
            }
        }
        .boxed()
    }

    fn local_address(&self) -> String {
        format!("unix:{}", self.created.path.display())
    }
}

fn connection(stream: UnixStream, peer: String) -> Connection {
    let (reader, writer) = stream.into_split();
    Connection { peer, identity: None, writer: Some(Box::new(writer)), reader: Some(Box::new(reader)) }
}

fn name_of_peer(stream: &UnixStream) -> String {
    match stream.peer_cred().ok().and_then(|cred| cred.pid()) {
        Some(pid) => format!("process {pid}"),
        None => "a process of this host".to_owned(),
    }
}

/// The socket file. Dropping this removes the file, if it is still the one that was created.
#[derive(Debug)]
struct Created {
    path: PathBuf,
    identity: (u64, u64),
}

impl Created {
    fn at(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)? })
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|found| found == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "the socket could not be removed");
        }
    }
}

/// Device and inode of the file at a path.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

/// A socket file for the owner only. No connection is possible before `listen`.
fn bind(path: &Path) -> io::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    socket.bind(&SockAddr::unix(path)?)?;
    Ok(socket)
}

/// Removes a socket that nobody listens on.
fn remove_stale(path: &Path) -> io::Result<()> {
    let before = fs::symlink_metadata(path)?;
    if !before.file_type().is_socket() {
        let message = "what stands there is no socket, and stays; choose another path";
        return Err(io::Error::new(ErrorKind::AlreadyExists, message));
    }
    match probe(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
        Err(error) if error.kind() != ErrorKind::WouldBlock => {
            return Err(in_context(&error, "a socket is there, and it is not known whether it is in use"));
        }
        Ok(()) | Err(_) => {
            let message = "a program is already listening there; end it or choose another path";
            return Err(io::Error::new(ErrorKind::AddrInUse, message));
        }
    }
    if identity(path)? == (before.dev(), before.ino()) { fs::remove_file(path) } else { Ok(()) }
}

/// Whether somebody listens. `WouldBlock` means yes, with a full backlog.
fn probe(path: &Path) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&SockAddr::unix(path)?)
}

/// Keeps other memferry programs from replacing a socket of the same directory meanwhile. Where the directory cannot be locked,
/// the caller continues without: only the protection against two that start in the same instant is lost.
async fn lock_directory(path: &Path) -> Option<File> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().as_bytes().is_empty());
    let directory = File::open(parent.unwrap_or(Path::new("."))).ok()?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match directory.try_lock() {
            Ok(()) => return Some(directory),
            Err(fs::TryLockError::WouldBlock) if Instant::now() < deadline => sleep(Duration::from_millis(5)).await,
            Err(_) => return None,
        }
    }
}
