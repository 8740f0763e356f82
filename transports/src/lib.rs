//! How the bytes of a migration travel. Knows nothing of pages, frames or guests.
//!
//! A [`Transport`] makes [`Connection`]s at the source and a [`Listener`] at the destination. Each connection is a
//! reliable ordered byte stream. Most transports also have a return path.
//!
//! | address | transport | return path | connections |
//! |---|---|---|---|
//! | `tcp:host:port`, `tcp:[::1]:port` | [`tcp`] | yes | several |
//! | `unix:/path` | [`unix`] | yes | several |
//! | `tls:host:port`, `tls+unix:/path` | TCP or a Unix socket beneath the crate memferry-transports-tls | yes | several |
//! | `file:/path` | [`mod@file`] | no | one |
//! | (in the process) | [`memory`] | yes | several |
//!
//! [`faults`] cuts the connections of any of them, for trials.
//!
//! # What flush and shutdown mean
//! The engine writes to a connection through [`AsyncWrite`]. `flush` returns when the bytes written so far are as durable
//! as the transport makes them (a file: on disk). `shutdown` completes the stream (a file: flushed and renamed into
//! place; a socket: end of stream). A writer that is dropped without `shutdown` leaves nothing that looks complete.

#![forbid(unsafe_code)]

pub mod address;
mod arrival;
pub mod faults;
pub mod file;
mod identity;
pub mod memory;
pub mod regular;
mod retry;
pub mod tcp;
pub mod temporary;
pub mod unix;
mod unregistered;
pub mod whole_file;

use std::fmt;
use std::io;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};

pub use address::{Address, AddressError};
pub use arrival::Arrival;
pub use identity::Identity;
pub use retry::is_shortage;

/// One reliable ordered byte stream, seen from one end.
pub struct Connection {
    /// The other end, for messages: "127.0.0.1:41234", a file's name.
    pub peer: String,
    /// Who the peer is; `None` where the transport does not authenticate it.
    pub identity: Option<Identity>,
    /// Bytes to the other end; `None` where this end only reads (a file's destination).
    pub writer: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    /// Bytes from the other end; `None` where this end only writes (a file's source).
    pub reader: Option<Box<dyn AsyncRead + Send + Unpin>>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("peer", &self.peer).finish_non_exhaustive()
    }
}

/// What a transport can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Whether the destination can answer.
    pub return_path: bool,
    /// The most connections of one migration.
    pub max_connections: u16,
    /// Whether the stream is stored, to be read later and more than once.
    pub stored: bool,
    /// Whether bytes that were changed or added on their way are refused, as TLS does: then no checksum of the stream's own is
    /// needed to trust what arrived.
    pub authenticated: bool,
}

/// How bytes travel from a source to a destination.
///
/// # Example
/// ```
/// use memferry_transports::{memory::MemoryTransport, Transport};
/// use tokio::io::{AsyncReadExt, AsyncWriteExt};
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let transport = MemoryTransport::new(64 * 1024);
/// let mut listener = transport.listen().await?;
/// let mut source = transport.connect().await?;
/// let mut destination = listener.accept_ready().await?;
/// source.writer.as_mut().unwrap().write_all(b"page").await?;
/// let mut bytes = [0; 4];
/// destination.reader.as_mut().unwrap().read_exact(&mut bytes).await?;
/// assert_eq!(&bytes, b"page");
/// # std::io::Result::Ok(()) }).unwrap();
/// ```
pub trait Transport: Send + Sync + fmt::Debug {
    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// Its address, as an operator writes it.
    fn address(&self) -> String;

    /// The source's side: one more connection. Where nobody listens yet, it tries again until the connect timeout of the
    /// transport.
    fn connect(&self) -> BoxFuture<'_, io::Result<Connection>>;

    /// The destination's side: the listener accepts connections once this call returns.
    fn listen(&self) -> BoxFuture<'_, io::Result<Box<dyn Listener>>>;
}

/// Waits for connections. Dropping it stops listening and removes what it created.
pub trait Listener: Send + fmt::Debug {
    /// The next connection, before its handshake. Errors of single connection attempts are ignored.
    ///
    /// A returned error is the listener's own. It is final unless [`is_shortage`] recognizes it: then the caller frees resources
    /// and calls again. A listener waits a moment before it returns a shortage.
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Arrival>>;

    /// The next connection, after its handshake. A silent peer holds it up, and the error may be that of one peer: for programs whose
    /// peers are known.
    fn accept_ready(&mut self) -> BoxFuture<'_, io::Result<Connection>> {
        async move { self.accept().await?.complete().await }.boxed()
    }

    /// The address that it listens on, with the port that the system chose for port 0.
    fn local_address(&self) -> String;
}

/// The transport of an address.
///
/// `connect_timeout` is how long a source keeps trying while nobody listens. The transport of a TLS address is in a crate of its own,
/// which puts it over one of these ([`Address::beneath`]); the one returned here for such an address refuses, and says so.
#[must_use]
pub fn open(address: &Address, connect_timeout: Duration) -> Box<dyn Transport> {
    match address {
        Address::Tcp { host, port } => Box::new(tcp::TcpTransport::new(host, *port, connect_timeout)),
        Address::Unix(path) => Box::new(unix::UnixTransport::new(path, connect_timeout)),
        Address::File(path) => Box::new(file::FileTransport::new(path)),
        Address::TlsTcp { .. } | Address::TlsUnix(_) => Box::new(unregistered::Unregistered::new(address)),
    }
}
