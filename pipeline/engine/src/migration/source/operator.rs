//! What the operator sends to a source: cancel, and requests.

use tokio_util::sync::CancellationToken;

use crate::control::{Request, Requests};
use crate::migration::cancel::Cancel;

/// The operator's side of a source.
pub(super) struct Operator {
    pub(super) cancel: Cancel,
    pub(super) requests: Open,
}

impl Operator {
    pub(super) fn new(token: CancellationToken, requests: Requests) -> Self {
        Self { cancel: Cancel::new(token), requests: Open(Some(requests)) }
    }
}

/// The request queue, while requests are accepted.
pub(super) struct Open(Option<Requests>);

impl Open {
    /// The next request. Safe to race in a `select!`.
    pub(super) async fn next(&mut self) -> Request {
        match &mut self.0 {
            Some(requests) => requests.next().await,
            None => std::future::pending().await,
        }
    }

    /// From here on, requests are answered with an error: the migration is over.
    pub(super) fn close(&mut self) {
        self.0 = None;
    }
}
