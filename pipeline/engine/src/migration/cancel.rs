//! The operator's cancel, as an end sees it.

use tokio_util::sync::CancellationToken;

/// A cancel that is reported once: a course may continue after one that came too late.
pub(super) struct Cancel {
    pub(super) token: CancellationToken,
    is_reported: bool,
}

impl Cancel {
    pub(super) fn new(token: CancellationToken) -> Self {
        Self { token, is_reported: false }
    }

    /// Waits for it. Safe to race in a `select!`.
    pub(super) async fn next(&mut self) {
        if self.is_reported {
            return std::future::pending().await;
        }
        self.token.cancelled().await;
        self.is_reported = true;
    }
}
