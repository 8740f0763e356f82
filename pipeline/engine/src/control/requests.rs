//! Requests to a running source, in its queue.

use std::sync::Arc;

use memferry_transports::Transport;
use tokio::sync::{mpsc, oneshot};

use super::{Change, ControlError};

/// A request.
#[derive(Clone, Debug)]
pub(crate) enum Ask {
    /// Change settings.
    Set(Vec<Change>),
    /// Switch over at once.
    SwitchOver,
    /// Start the guest at the destination before its pages are all there.
    Postcopy,
    /// Look for the destination over this transport.
    SetAddress(Arc<dyn Transport>),
}

/// A request, and the channel for its answer.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) ask: Ask,
    pub(crate) answer: oneshot::Sender<Result<(), ControlError>>,
}

/// The requests that reach one source.
#[derive(Debug)]
pub(crate) struct Requests(mpsc::Receiver<Request>);

impl Requests {
    pub(super) fn new(requests: mpsc::Receiver<Request>) -> Self {
        Self(requests)
    }

    /// The next request whose sender still waits. Never returns once no handle is left. Safe to race in a `select!`.
    pub(crate) async fn next(&mut self) -> Request {
        loop {
            match self.0.recv().await {
                Some(request) if request.answer.is_closed() => {}
                Some(request) => return request,
                None => std::future::pending().await,
            }
        }
    }
}
