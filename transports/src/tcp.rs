//! TCP: several connections, each with its return path.
//!
//! Takes a host and a port, gives [`Connection`]s. Owns nothing but its sockets. Promises: small frames leave at once
//! (`TCP_NODELAY`), a peer that vanished without a word is noticed within about a minute and a half of silence
//! (keepalive), and buffers are left to the kernel's autotuning, which knows the path better. Only on a path that does not leave the
//! host there is nothing to tune for: no delay to fill, and what waits in a large buffer has left the processor's cache when it is read.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream, lookup_host};
use tokio::time::{Instant, timeout, timeout_at};

use crate::retry::{Failure, after_failed_accept, connect_within, in_context};
use crate::{Address, Capabilities, Connection, Listener, Transport};

/// Silence before the first keepalive probe.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(30);
/// Time between probes.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(5);
/// What waits to be read on a path that does not leave the host; the kernel takes twice as much, for what it keeps itself.
const LOCAL_SEND_BUFFER: usize = 256 << 10;
/// The least time that one try has, however short the connect timeout is.
const LEAST_TRY: Duration = Duration::from_millis(200);

/// Connections over TCP.
#[derive(Clone, Debug)]
pub struct TcpTransport {
    host: String,
    port: u16,
    connect_timeout: Duration,
}

impl TcpTransport {
    /// A transport to or from `host`: a name, an IPv4 address, or an IPv6 address without brackets.
    ///
    /// A listener may be given port 0: the system chooses one, and [`Listener::local_address`] says which. A name that has
    /// several addresses is listened to on the first that can be, and connected to on the first that answers.
    /// `connect_timeout` is how long a source keeps trying.
    #[must_use]
    pub fn new(host: impl Into<String>, port: u16, connect_timeout: Duration) -> Self {
        Self { host: host.into(), port, connect_timeout }
    }

    async fn connect_now(&self, deadline: Instant) -> Result<Connection, Failure> {
        let addresses = self.resolve(deadline).await.map_err(Failure::Retry)?;
        let mut causes = Causes::default();
        for (tried, address) in addresses.iter().enumerate() {
            let left = u32::try_from(addresses.len() - tried).unwrap_or(u32::MAX);
            let share = deadline.saturating_duration_since(Instant::now()) / left;
            match timeout(share.max(LEAST_TRY), connect_to(*address)).await {
                Ok(Ok(stream)) => return connection(stream, *address).map_err(Failure::Final),
                Ok(Err(error)) => causes.add(*address, &error),
                Err(_) => causes.add(*address, &ErrorKind::TimedOut.into()),
            }
        }
        Err(causes.failure())
    }

    async fn resolve(&self, deadline: Instant) -> io::Result<Vec<SocketAddr>> {
        let latest = deadline.max(Instant::now() + LEAST_TRY);
        let unresolved = |why: &dyn std::fmt::Display| format!("the name {:?} does not resolve ({why})", self.host);
        match timeout_at(latest, lookup_host((self.host.as_str(), self.port))).await {
            Ok(Ok(addresses)) => {
                let addresses: Vec<_> = addresses.collect();
                let none = || io::Error::new(ErrorKind::NotFound, unresolved(&"it has no address"));
                if addresses.is_empty() { Err(none()) } else { Ok(addresses) }
            }
            Ok(Err(error)) => Err(io::Error::new(error.kind(), unresolved(&error))),
            Err(_) => Err(io::Error::new(ErrorKind::TimedOut, unresolved(&"no answer in time"))),
        }
    }

    fn listen_error(&self, error: &io::Error) -> io::Error {
        let advice = match error.kind() {
            ErrorKind::AddrInUse => {
                "; another program listens there (ss -ltnp shows which): end it or use another port"
            }
            ErrorKind::AddrNotAvailable => "; this host has no such address: use one of its own, or 0.0.0.0 for all",
            ErrorKind::PermissionDenied => "; ports below 1024 need privileges: use a higher one",
            _ => "",
        };
        io::Error::new(error.kind(), format!("cannot listen on {}: {error}{advice}", self.address()))
    }
}

impl Transport for TcpTransport {
    fn capabilities(&self) -> Capabilities {
        Capabilities { return_path: true, max_connections: u16::MAX, stored: false }
    }

    fn address(&self) -> String {
        Address::Tcp { host: self.host.clone(), port: self.port }.to_string()
    }

    fn connect(&self) -> BoxFuture<'_, io::Result<Connection>> {
        async move {
            let address = self.address();
            if self.port == 0 {
                let message =
                    format!("cannot connect to {address}: port 0 is for listeners; write the destination's port");
                return Err(io::Error::new(ErrorKind::InvalidInput, message));
            }
            connect_within(&address, self.connect_timeout, |deadline| self.connect_now(deadline)).await
        }
        .boxed()
    }

    fn listen(&self) -> BoxFuture<'_, io::Result<Box<dyn Listener>>> {
        async move {
            let addresses = self.resolve(Instant::now() + self.connect_timeout).await;
            let addresses = addresses.map_err(|error| self.listen_error(&error))?;
            // Binds with SO_REUSEADDR: a port whose last connections linger can be listened to again at once.
            let bound = TcpListener::bind(&addresses[..]).await.map_err(|error| self.listen_error(&error))?;
            let address = bound.local_addr()?;
            let address = Address::Tcp { host: address.ip().to_string(), port: address.port() }.to_string();
            Ok(Box::new(Listening { socket: bound, address }) as Box<dyn Listener>)
        }
        .boxed()
    }
}

#[derive(Debug)]
struct Listening {
    socket: TcpListener,
    address: String,
}

impl Listener for Listening {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Connection>> {
        async move {
            loop {
                let accepted = self.socket.accept().await;
                match accepted.and_then(|(stream, peer)| connection(stream, peer)) {
                    Ok(connection) => return Ok(connection),
                    Err(error) => after_failed_accept(&self.address, &error).await?,
                }
            }
        }
        .boxed()
    }

    fn local_address(&self) -> String {
        self.address.clone()
    }
}

async fn connect_to(address: SocketAddr) -> io::Result<TcpStream> {
    refuse_itself(TcpStream::connect(address).await?)
}

/// Where nobody listens, a port of the ephemeral range on this host can come to be connected to itself.
fn refuse_itself(stream: TcpStream) -> io::Result<TcpStream> {
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(ErrorKind::ConnectionRefused.into());
    }
    Ok(stream)
}

fn connection(stream: TcpStream, peer: SocketAddr) -> io::Result<Connection> {
    prepare(&stream)?;
    let (reader, writer) = stream.into_split();
    Ok(Connection { peer: peer.to_string(), writer: Some(Box::new(writer)), reader: Some(Box::new(reader)) })
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    if stream.local_addr()?.ip() == stream.peer_addr()?.ip() {
        socket.set_send_buffer_size(LOCAL_SEND_BUFFER)?;
    }
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE_AFTER).with_interval(KEEPALIVE_EVERY))
}

/// Why each address of a host could not be reached.
#[derive(Default)]
struct Causes {
    words: Vec<String>,
    kind: Option<ErrorKind>,
    retry: bool,
}

impl Causes {
    fn add(&mut self, address: SocketAddr, error: &io::Error) {
        self.words.push(in_context(error, &address.to_string()).to_string());
        let retry = may_listen_later(error.kind());
        // The most hopeful address tells the kind: an IPv6 address that this host cannot reach says little.
        if self.kind.is_none() || (retry && !self.retry) {
            self.kind = Some(error.kind());
        }
        self.retry |= retry;
    }

    fn failure(self) -> Failure {
        let error = io::Error::new(self.kind.unwrap_or(ErrorKind::NotFound), self.words.join(", "));
        if self.retry { Failure::Retry(error) } else { Failure::Final(error) }
    }
}

fn may_listen_later(kind: ErrorKind) -> bool {
    use ErrorKind::{
        AddrNotAvailable, ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable, Interrupted,
        NetworkDown, NetworkUnreachable, TimedOut,
    };
    matches!(
        kind,
        ConnectionRefused
            | ConnectionReset
            | ConnectionAborted
            | HostUnreachable
            | NetworkUnreachable
            | NetworkDown
            | AddrNotAvailable
            | TimedOut
            | Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpSocket;

    #[tokio::test]
    async fn a_socket_that_is_connected_to_itself_is_refused() {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind("127.0.0.1:0".parse().expect("an address")).expect("bound");
        let own = socket.local_addr().expect("its address");
        let stream = socket.connect(own).await.expect("to itself");
        assert_eq!(refuse_itself(stream).expect_err("itself").kind(), ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn frames_leave_at_once_a_vanished_peer_is_noticed_and_little_waits_within_a_host() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listening");
        let stream = connect_to(listener.local_addr().expect("an address")).await.expect("connected");
        prepare(&stream).expect("prepared");
        let socket = SockRef::from(&stream);
        assert!(stream.nodelay().expect("asked") && socket.keepalive().expect("asked"));
        // The kernel takes twice of it, or of the most that the host allows.
        let buffer = socket.send_buffer_size().expect("asked");
        assert!((LOCAL_SEND_BUFFER..=2 * LOCAL_SEND_BUFFER).contains(&buffer), "{buffer} bytes");
    }

    #[test]
    fn the_most_hopeful_address_tells_the_kind() {
        let (six, four) = ("[::1]:7".parse().expect("an address"), "127.0.0.1:7".parse().expect("an address"));
        let mut causes = Causes::default();
        causes.add(six, &ErrorKind::PermissionDenied.into());
        causes.add(four, &ErrorKind::ConnectionRefused.into());
        let Failure::Retry(error) = causes.failure() else { panic!("one of them may listen later") };
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        assert_eq!(error.to_string(), "[::1]:7: permission denied, 127.0.0.1:7: connection refused");

        let mut causes = Causes::default();
        causes.add(six, &ErrorKind::PermissionDenied.into());
        assert!(matches!(causes.failure(), Failure::Final(_)));
    }
}
