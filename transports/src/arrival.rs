//! A connection that arrived at a listener, before its handshake.

use std::fmt;
use std::future::ready;
use std::io;
use std::net::IpAddr;

use futures::FutureExt;
use futures::future::BoxFuture;

use crate::Connection;

/// A connection that arrived, whose transport may still have a handshake to do.
///
/// A peer decides how long its handshake takes, so a listener never waits for one: whoever accepts awaits
/// [`complete`](Self::complete) in a task of its own, within a time limit. Until then nothing is known of the peer but where it
/// connects from.
pub struct Arrival {
    peer: String,
    host: Option<IpAddr>,
    connection: BoxFuture<'static, io::Result<Connection>>,
}

impl Arrival {
    /// A connection that has no handshake. `host` is where it comes from, if the transport knows.
    #[must_use]
    pub fn new(connection: Connection, host: Option<IpAddr>) -> Self {
        Self { peer: connection.peer.clone(), host, connection: ready(Ok(connection)).boxed() }
    }

    /// The same arrival with a further handshake, over the connection that is there after the ones before it.
    #[must_use]
    pub fn then<F>(self, handshake: impl FnOnce(Connection) -> F + Send + 'static) -> Self
    where
        F: Future<Output = io::Result<Connection>> + Send + 'static,
    {
        let Self { peer, host, connection } = self;
        Self { peer, host, connection: async move { handshake(connection.await?).await }.boxed() }
    }

    /// The other end, for messages.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The host that it comes from: connections of one host compete with each other for a place first.
    #[must_use]
    pub fn host(&self) -> Option<IpAddr> {
        self.host
    }

    /// The connection, after its handshake.
    ///
    /// # Errors
    /// Why the handshake failed, on which side, in words for an operator.
    pub async fn complete(self) -> io::Result<Connection> {
        self.connection.await
    }
}

impl fmt::Debug for Arrival {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arrival").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl From<Connection> for Arrival {
    fn from(connection: Connection) -> Self {
        Self::new(connection, None)
    }
}
