//! The server of the control API on its socket.

use std::io;
use std::time::Duration;

use memferry_transports::{Address, open};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::Reach;
use super::routes::Routes;
use crate::http;
use memferry::control::Control;

/// A server of the control API. Dropped, it ends at once and removes the socket.
#[derive(Debug)]
pub struct Server {
    closing: CancellationToken,
    serving: AbortOnDropHandle<()>,
}

impl Server {
    /// Listens on a Unix socket that only its owner can open, and serves requests for `control`. `reach` makes the
    /// transport to another address of the destination. A socket that a dead
    /// program left behind is replaced.
    ///
    /// # Errors
    /// If the address is not a Unix socket, if another process listens there, or if the system refuses.
    pub async fn listen(address: &Address, control: Control, reach: Reach) -> io::Result<Self> {
        if !matches!(address, Address::Unix(_)) {
            let what = format!("{address} is no Unix socket, which the control API needs; write unix:/PATH");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let listener = open(address, Duration::ZERO).listen().await?;
        let closing = CancellationToken::new();
        let routes = Routes::new(control, reach, closing.clone());
        let serving = tokio::spawn(http::serve(listener, routes, closing.clone()));
        Ok(Self { closing, serving: AbortOnDropHandle::new(serving) })
    }

    /// Accepts no more requests, and gives answers in progress a moment to complete: streams of events that have
    /// ended are read to their end.
    pub async fn close(self) {
        self.closing.cancel();
        drop(self.serving.await);
    }
}
