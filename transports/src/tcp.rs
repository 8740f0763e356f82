//! TCP: several connections, each with its return path.
//!
//! Takes a host and a port, gives [`Connection`]s. Owns only its sockets.
//!
//! - Small frames leave at once (`TCP_NODELAY`).
//! - A peer that vanishes silently is noticed within one and a half peer timeouts: by keepalive where nothing waits to be sent, by
//!   `TCP_USER_TIMEOUT` where something does.
//! - Buffers are left to the kernel's autotuning, which knows the path better. The exception is a path that does not leave the
//!   host: it has no delay that a large buffer could hide, and bytes that wait in a large buffer leave the processor's cache
//!   before they are read.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, select_all};
use rustix::io::Errno;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream, lookup_host};
use tokio::time::{Instant, timeout, timeout_at};

use crate::retry::{Failure, after_failed_accept, connect_within, in_context};
use crate::{Address, Arrival, Capabilities, Connection, Listener, Transport};

/// How long a peer may acknowledge nothing, unless [`TcpTransport::with_peer_timeout`] sets it.
const PEER_TIMEOUT: Duration = Duration::from_secs(30);
/// The range of keepalive times that the kernel accepts, which counts them in whole seconds.
const KEEPALIVE: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(32_767);
/// The longest `TCP_USER_TIMEOUT` that the kernel accepts, which counts it in milliseconds.
const LONGEST_USER_TIMEOUT: Duration = Duration::from_millis(i32::MAX as u64);
/// The send buffer on a path that does not leave the host. The kernel doubles it, for its own bookkeeping.
const LOCAL_SEND_BUFFER: usize = 256 << 10;
/// The least time that one try has, however short the connect timeout is.
const LEAST_TRY: Duration = Duration::from_millis(200);

/// Connections over TCP.
#[derive(Clone, Debug)]
pub struct TcpTransport {
    host: String,
    port: u16,
    connect_timeout: Duration,
    peer_timeout: Duration,
}

impl TcpTransport {
    /// A transport to or from `host`: a name, an IPv4 address, or an IPv6 address without brackets.
    ///
    /// For port 0 the system chooses a listener's port, and [`Listener::local_address`] returns it. Where a name has several
    /// addresses, a listener uses all that belong to this host, and a connection the first that answers.
    /// `connect_timeout` is how long a source keeps trying.
    #[must_use]
    pub fn new(host: impl Into<String>, port: u16, connect_timeout: Duration) -> Self {
        Self { host: host.into(), port, connect_timeout, peer_timeout: PEER_TIMEOUT }
    }

    /// The same transport, whose connections end when the peer acknowledges neither data nor a probe for one and a half times
    /// `peer_timeout`.
    #[must_use]
    pub fn with_peer_timeout(self, peer_timeout: Duration) -> Self {
        Self { peer_timeout, ..self }
    }

    async fn connect_now(&self, deadline: Instant) -> Result<Connection, Failure> {
        let addresses = self.resolve(deadline).await.map_err(Failure::Retry)?;
        let mut causes = Causes::default();
        for (tried, address) in addresses.iter().enumerate() {
            let left = u32::try_from(addresses.len() - tried).unwrap_or(u32::MAX);
            let share = deadline.saturating_duration_since(Instant::now()) / left;
            match timeout(share.max(LEAST_TRY), connect_to(*address)).await {
                Ok(Ok(stream)) => return connection(stream, *address, self.peer_timeout).map_err(Failure::Final),
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
        Capabilities { return_path: true, max_connections: u16::MAX, stored: false, authenticated: false }
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
            let sockets = bind_all(&addresses).await.map_err(|error| self.listen_error(&error))?;
            let address = sockets[0].local_addr()?;
            // A single address is shown as such, several by their common name.
            let host = if sockets.len() == 1 { address.ip().to_string() } else { self.host.clone() };
            let address = Address::Tcp { host, port: address.port() }.to_string();
            Ok(Box::new(Listening { sockets, address, peer_timeout: self.peer_timeout }) as Box<dyn Listener>)
        }
        .boxed()
    }
}

#[derive(Debug)]
struct Listening {
    /// One for each address, at least one.
    sockets: Vec<TcpListener>,
    address: String,
    peer_timeout: Duration,
}

impl Listener for Listening {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Arrival>> {
        async move {
            loop {
                let accepting = self.sockets.iter().map(|socket| socket.accept().boxed());
                let (accepted, ..) = select_all(accepting).await;
                let arrive = |(stream, peer): (TcpStream, SocketAddr)| {
                    Ok(Arrival::new(connection(stream, peer, self.peer_timeout)?, Some(peer.ip())))
                };
                match accepted.and_then(arrive) {
                    Ok(arrival) => return Ok(arrival),
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

/// Binds to every address that this host has.
async fn bind_all(addresses: &[SocketAddr]) -> io::Result<Vec<TcpListener>> {
    let (mut sockets, mut missing): (Vec<TcpListener>, Option<io::Error>) = (Vec::new(), None);
    for address in addresses {
        // The port that the system chose for the first address is used for all.
        let chosen = sockets.first().map(TcpListener::local_addr).transpose()?.map(|first| first.port());
        let mut address = *address;
        address.set_port(chosen.unwrap_or(address.port()));
        if sockets.iter().any(|socket| socket.local_addr().is_ok_and(|bound| bound == address)) {
            continue;
        }
        // Binds with SO_REUSEADDR: a port whose last connections are in TIME_WAIT can be listened to again at once.
        match TcpListener::bind(address).await {
            Ok(socket) => sockets.push(socket),
            Err(error) if is_of_another_host(&error) => missing = Some(error),
            Err(error) => return Err(in_context(&error, &address.to_string())),
        }
    }
    match missing {
        Some(error) if sockets.is_empty() => Err(error),
        _ => Ok(sockets),
    }
}

/// Whether the address belongs to another host, or to a protocol that this host does not support. A name may have such addresses.
fn is_of_another_host(error: &io::Error) -> bool {
    error.kind() == ErrorKind::AddrNotAvailable || Errno::from_io_error(error) == Some(Errno::AFNOSUPPORT)
}

async fn connect_to(address: SocketAddr) -> io::Result<TcpStream> {
    refuse_itself(TcpStream::connect(address).await?)
}

/// Refuses a connection to itself, which can arise where nobody listens on a port of this host's ephemeral range.
fn refuse_itself(stream: TcpStream) -> io::Result<TcpStream> {
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(ErrorKind::ConnectionRefused.into());
    }
    Ok(stream)
}

fn connection(stream: TcpStream, peer: SocketAddr, peer_timeout: Duration) -> io::Result<Connection> {
    prepare(&stream, peer_timeout)?;
    let (reader, writer) = stream.into_split();
    Ok(Connection {
        peer: peer.to_string(),
        identity: None,
        writer: Some(Box::new(writer)),
        reader: Some(Box::new(reader)),
    })
}

fn prepare(stream: &TcpStream, peer_timeout: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    if stream.local_addr()?.ip() == stream.peer_addr()?.ip() {
        socket.set_send_buffer_size(LOCAL_SEND_BUFFER)?;
    }
    // With a user timeout, an idle connection ends at the first probe after that time. Several probes are sent before it.
    let [idle, every] =
        [peer_timeout / 2, peer_timeout / 8].map(|time| time.clamp(*KEEPALIVE.start(), *KEEPALIVE.end()));
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(idle).with_interval(every))?;
    // The engine's own watch for silence comes first, and its error says more than "connection timed out".
    let user_timeout = peer_timeout.saturating_add(peer_timeout / 2).min(LONGEST_USER_TIMEOUT);
    socket.set_tcp_user_timeout(Some(user_timeout))
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
        // The kind is that of an address that may be reached later, if there is one: an unreachable IPv6 address says little.
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
        prepare(&stream, Duration::from_secs(7)).expect("prepared");
        let socket = SockRef::from(&stream);
        assert!(stream.nodelay().expect("asked") && socket.keepalive().expect("asked"));
        assert_eq!(socket.tcp_user_timeout().expect("asked"), Some(Duration::from_millis(10_500)));
        assert_eq!(socket.tcp_keepalive_time().expect("asked"), Duration::from_secs(3));
        assert_eq!(socket.tcp_keepalive_interval().expect("asked"), Duration::from_secs(1));
        // Whatever the timeout, the kernel takes it.
        for timeout in [Duration::from_millis(1), Duration::MAX] {
            prepare(&stream, timeout).expect("prepared");
        }
        // The kernel takes twice of it, or of the most that the host allows.
        let buffer = socket.send_buffer_size().expect("asked");
        assert!((LOCAL_SEND_BUFFER..=2 * LOCAL_SEND_BUFFER).contains(&buffer), "{buffer} bytes");
    }

    /// The third address belongs to no host (documentation, RFC 5737).
    #[tokio::test]
    async fn every_address_of_a_name_that_this_host_has_is_listened_to() {
        let addresses =
            ["127.0.0.1:0", "127.0.0.2:0", "192.0.2.1:0", "127.0.0.1:0"].map(|address| address.parse().unwrap());
        let sockets = bind_all(&addresses).await.expect("bound");
        let bound: Vec<_> = sockets.iter().map(|socket| socket.local_addr().expect("bound")).collect();
        let port = bound[0].port();
        assert_eq!(bound, ["127.0.0.1", "127.0.0.2"].map(|ip| SocketAddr::new(ip.parse().unwrap(), port)));
        let mut listener = Listening { sockets, address: "tcp:two".into(), peer_timeout: PEER_TIMEOUT };
        for address in [bound[1], bound[0], bound[1]] {
            let stream = connect_to(address).await.expect("connected");
            let accepted = listener.accept().await.expect("accepted");
            assert_eq!(accepted.peer(), stream.local_addr().expect("an address").to_string());
        }

        let error = bind_all(&addresses[2..3]).await.expect_err("of another host");
        assert_eq!(error.kind(), ErrorKind::AddrNotAvailable);
        // An address that is taken is an error, though another is free.
        let taken = [SocketAddr::new([127, 0, 0, 3].into(), port), bound[0]];
        assert_eq!(bind_all(&taken).await.expect_err("taken").kind(), ErrorKind::AddrInUse);
    }

    #[test]
    fn the_most_hopeful_address_decides_the_kind() {
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
