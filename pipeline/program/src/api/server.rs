//! The control API at its socket.

use std::io;
use std::time::Duration;

use memferry_transports::{Address, open};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::routes::Routes;
use crate::http;
use memferry::control::Control;

/// A server of the control API. Dropped, it ends at once; the socket goes with it.
#[derive(Debug)]
pub struct Server {
    closing: CancellationToken,
    serving: AbortOnDropHandle<()>,
}

impl Server {
    /// Listens at a Unix socket, made for its owner only, and serves what is asked of `control`. A socket that a dead
    /// program left is replaced.
    ///
    /// # Errors
    /// When the address is no Unix socket's, somebody listens there, or the system refuses.
    pub async fn listen(address: &Address, control: Control) -> io::Result<Self> {
        if !matches!(address, Address::Unix(_)) {
            let what = format!("{address} is no Unix socket, which the control API needs; write unix:/PATH");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let listener = open(address, Duration::ZERO).listen().await?;
        let closing = CancellationToken::new();
        let routes = Routes::new(control, closing.clone());
        let serving = tokio::spawn(http::serve(listener, routes, closing.clone()));
        Ok(Self { closing, serving: AbortOnDropHandle::new(serving) })
    }

    /// Takes no more requests, and gives the answers that are on their way a moment: streams of events that have come to
    /// their end are read to it.
    pub async fn close(self) {
        self.closing.cancel();
        drop(self.serving.await);
    }
}
