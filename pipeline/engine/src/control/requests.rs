//! What is asked of a running source, on its way there.

use tokio::sync::{mpsc, oneshot};

use super::{Change, ControlError};

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// Other settings.
    Set(Vec<Change>),
    /// Switch over at once.
    SwitchOver,
}

/// A question, and where its answer goes.
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

    /// The next one that somebody still waits for; for ever none once nobody can ask. Safe to race in a `select!`.
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
