//! TLS over the connections of another transport: `tls:host:port` over TCP, `tls+unix:/path` over a Unix socket.
//!
//! Takes a [`Transport`] and [`TlsSettings`], gives a transport whose connections are encrypted and whose peers are authenticated.
//! Owns no socket. Promises:
//!
//! - TLS 1.3 and nothing older. The key exchange is X25519 with ML-KEM-768 where the peer has it, as every memferry has: a stream that is
//!   recorded today is not read by a quantum computer later. Each connection is authenticated in full, none is resumed.
//! - Both ends have certificates, unless [`ClientCertificates::None`] asks for server-only authentication by name.
//! - A listener never waits for a handshake ([`Arrival`]), and a client that sends nothing costs no TLS state.
//! - The digest of the peer's certificate is the connection's [`Identity`](memferry_transports::Identity). The engine requires the
//!   same one of all connections of a migration, those that are made again included.
//! - A connection that ends without TLS's notice of its end is an error, wherever it ends.
//!
//! The cryptography is aws-lc-rs, which builds with a C compiler alone on Linux (no cmake, no nasm).
//!
//! # Example
//! ```
//! use std::time::Duration;
//!
//! use memferry_transports_tls::{TlsSettings, TlsTransport, trial};
//! use memferry_transports::{Transport, memory::MemoryTransport};
//! use tokio::io::{AsyncReadExt, AsyncWriteExt};
//!
//! # let directory = tempfile::tempdir()?;
//! # let directory = directory.path().join("pki");
//! trial::write(&directory, &["localhost".into()])?;
//! let settings = TlsSettings { directory: Some(directory), peer_name: Some("localhost".into()), ..TlsSettings::default() };
//! # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
//! let transport = TlsTransport::new(Box::new(MemoryTransport::new(64 * 1024)), settings, Duration::from_secs(5));
//! let mut listener = transport.listen().await?;
//! let (source, destination) = tokio::join!(transport.connect(), listener.accept_ready());
//! let (mut source, mut destination) = (source?, destination?);
//! source.writer.as_mut().unwrap().write_all(b"page").await?;
//! let mut bytes = [0; 4];
//! destination.reader.as_mut().unwrap().read_exact(&mut bytes).await?;
//! assert_eq!(&bytes, b"page");
//! # std::io::Result::Ok(()) })?;
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod certificate;
mod credentials;
mod files;
mod settings;
mod stream;
pub mod trial;
mod verify;
mod words;

use std::io::{self, ErrorKind};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use memferry_transports::{Address, Arrival, Capabilities, Connection, Listener, Transport};
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

pub use certificate::{Facts, SOON, Validity};
pub use credentials::{Credentials, OwnCertificate};
pub use files::{TlsError, TlsKey};
pub use settings::{ClientCertificates, End, TlsSettings, matches};
use stream::Joined;
use words::{Words, not_tls};

/// The first byte of TLS's first record.
const HANDSHAKE: u8 = 0x16;
/// How long a handshake has at a source, at least.
const LEAST_PATIENCE: Duration = Duration::from_secs(5);
/// The wait before a source tries again, after a destination ended the connection in the handshake.
const WAIT: Duration = Duration::from_millis(100);
/// The most plaintext that waits to be written, encrypted.
const MOST_BUFFERED: usize = 256 << 10;
/// The most bytes that a connection takes in this process, besides those of the connection beneath: what is read ahead, what waits
/// to be written, and records at work.
pub const CONNECTION_BYTES: u64 = (stream::READ_AHEAD + MOST_BUFFERED + (128 << 10)) as u64;

/// TLS over another transport.
#[derive(Debug)]
pub struct TlsTransport {
    beneath: Box<dyn Transport>,
    settings: TlsSettings,
    connect_timeout: Duration,
    source: OnceLock<Result<Arc<Credentials>, TlsError>>,
    destination: OnceLock<Result<Arc<Credentials>, TlsError>>,
}

impl TlsTransport {
    /// TLS over this transport. Files are read when the first connection is made, or a listener starts, and not again: a connection that
    /// is lost and made again shows the same certificate. `connect_timeout` is how long a source keeps trying the handshake.
    #[must_use]
    pub fn new(beneath: Box<dyn Transport>, settings: TlsSettings, connect_timeout: Duration) -> Self {
        Self { beneath, settings, connect_timeout, source: OnceLock::new(), destination: OnceLock::new() }
    }

    fn credentials(&self, end: End) -> io::Result<Arc<Credentials>> {
        let loaded = match end {
            End::Source => &self.source,
            End::Destination => &self.destination,
        };
        let load = || Credentials::load(&self.settings, end).map(Arc::new);
        loaded.get_or_init(load).clone().map_err(|error| {
            io::Error::new(ErrorKind::InvalidInput, format!("{}: [transport.tls] {error}", self.address()))
        })
    }

    /// The name that the destination's certificate must have.
    fn name(&self) -> io::Result<ServerName<'static>> {
        let name = self.settings.peer_name.clone().unwrap_or_else(|| host_of(&self.beneath.address()));
        ServerName::try_from(name.clone()).map_err(|_| {
            let what = format!("{}: {name:?} cannot be the name in a certificate; set peer_name", self.address());
            io::Error::new(ErrorKind::InvalidInput, what)
        })
    }

    async fn connect_now(&self) -> io::Result<Connection> {
        let (credentials, name) = (self.credentials(End::Source)?, self.name()?);
        let deadline = Instant::now() + self.connect_timeout;
        loop {
            let connection = self.beneath.connect().await?;
            let patience = deadline.saturating_duration_since(Instant::now()).max(LEAST_PATIENCE);
            let done = timeout(patience, handshake_of_source(connection, &credentials, name.clone())).await;
            let late = || io::Error::new(ErrorKind::TimedOut, "the destination does not answer TLS's handshake");
            match done.unwrap_or_else(|_| Err(late())) {
                Ok(connection) => return Ok(connection),
                // A destination with many clients drops some of them.
                Err(error) if is_dropped(&error) && Instant::now() < deadline => sleep(WAIT).await,
                Err(error) => {
                    let what = format!("cannot connect to {}: {error}", self.address());
                    return Err(io::Error::new(error.kind(), what));
                }
            }
        }
    }
}

/// The host of an address, as a certificate names it.
fn host_of(beneath: &str) -> String {
    match beneath.parse() {
        Ok(Address::Tcp { host, .. }) => host.split('%').next().unwrap_or_default().to_owned(),
        _ => "localhost".to_owned(),
    }
}

fn is_dropped(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted
    )
}

impl Transport for TlsTransport {
    fn capabilities(&self) -> Capabilities {
        Capabilities { authenticated: true, ..self.beneath.capabilities() }
    }

    fn address(&self) -> String {
        over_tls(&self.beneath.address())
    }

    fn connect(&self) -> BoxFuture<'_, io::Result<Connection>> {
        self.connect_now().boxed()
    }

    fn listen(&self) -> BoxFuture<'_, io::Result<Box<dyn Listener>>> {
        async move {
            let credentials = self.credentials(End::Destination)?;
            let beneath = self.beneath.listen().await?;
            Ok(Box::new(Listening { beneath, credentials }) as Box<dyn Listener>)
        }
        .boxed()
    }
}

/// The address of TLS over an address.
fn over_tls(beneath: &str) -> String {
    let address = beneath.parse().ok().and_then(|address: Address| address.over_tls());
    address.map_or_else(|| format!("tls over {beneath}"), |address| address.to_string())
}

#[derive(Debug)]
struct Listening {
    beneath: Box<dyn Listener>,
    credentials: Arc<Credentials>,
}

impl Listener for Listening {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Arrival>> {
        async move {
            let arrival = self.beneath.accept().await?;
            let credentials = self.credentials.clone();
            Ok(arrival.then(|connection| async move { handshake_of_destination(connection, &credentials).await }))
        }
        .boxed()
    }

    fn local_address(&self) -> String {
        over_tls(&self.beneath.local_address())
    }
}

fn joined(connection: Connection) -> io::Result<(String, Joined)> {
    let Connection { peer, reader, writer, .. } = connection;
    match (reader, writer) {
        (Some(reader), Some(writer)) => Ok((peer, Joined::new(reader, writer))),
        _ => Err(io::Error::new(ErrorKind::Unsupported, "TLS needs a connection with both directions")),
    }
}

async fn handshake_of_source(
    connection: Connection,
    credentials: &Credentials,
    name: ServerName<'static>,
) -> io::Result<Connection> {
    let (peer, joined) = joined(connection)?;
    let (words, config) = credentials.client();
    match TlsConnector::from(Arc::new(config)).connect(name, joined).await {
        Ok(tls) => Ok(secured(tls.into(), &peer, words)),
        Err(error) => Err(words.of(error)),
    }
}

async fn handshake_of_destination(connection: Connection, credentials: &Credentials) -> io::Result<Connection> {
    let (peer, mut joined) = joined(connection)?;
    // A client that sends nothing costs no more than its socket.
    match joined.first_bytes().await? {
        [HANDSHAKE, ..] => {}
        [] => return Err(io::Error::new(ErrorKind::UnexpectedEof, "it ended at byte 0, without a word")),
        _ => {
            refuse_plaintext(&mut joined).await;
            return Err(io::Error::new(ErrorKind::InvalidData, not_tls(End::Source)));
        }
    }
    let (words, config) = credentials.server();
    match TlsAcceptor::from(Arc::new(config)).accept(joined).await {
        Ok(tls) => Ok(secured(tls.into(), &peer, words)),
        Err(error) => Err(words.of(error)),
    }
}

/// Answers a client that does not speak TLS with TLS's alert `unexpected_message`, by which a source knows what it has reached.
async fn refuse_plaintext(joined: &mut Joined) {
    use tokio::io::AsyncWriteExt;
    let alert = [0x15, 3, 3, 0, 2, 2, 10];
    let refusal = async {
        joined.write_all(&alert).await?;
        joined.shutdown().await
    };
    drop(timeout(WAIT, refusal).await);
}

/// The connection after its handshake.
fn secured(mut tls: TlsStream<Joined>, peer: &str, words: Words) -> Connection {
    let (_, session) = match &mut tls {
        TlsStream::Client(stream) => {
            let (_, session) = stream.get_mut();
            session.set_buffer_limit(Some(MOST_BUFFERED));
            tls.get_ref()
        }
        TlsStream::Server(stream) => {
            let (_, session) = stream.get_mut();
            session.set_buffer_limit(Some(MOST_BUFFERED));
            tls.get_ref()
        }
    };
    let shown: Option<&CertificateDer<'_>> = session.peer_certificates().and_then(|chain| chain.first());
    let identity = shown.map(certificate::identity);
    let peer = match shown.and_then(Facts::of) {
        Some(facts) => format!("{peer} ({})", facts.holder()),
        None => peer.to_owned(),
    };
    stream::connection(tls, peer, identity, words)
}
