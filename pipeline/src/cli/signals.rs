//! Ctrl-C and SIGTERM: the first ends what goes on in good order, the next one ends the program at once.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::verdict::CANCELLED;

/// Cancels whatever goes on when a signal comes. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Signals(Arc<Mutex<Armed>>);

#[derive(Debug)]
struct Armed {
    token: CancellationToken,
    /// What is said when the signal comes.
    notice: &'static str,
}

impl Signals {
    /// Starts to listen, on the runtime of the caller.
    ///
    /// # Errors
    /// When the system refuses.
    pub(super) fn listen() -> io::Result<Self> {
        let signals = Self(Arc::new(Mutex::new(Armed { token: CancellationToken::new(), notice: "" })));
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let shared = signals.clone();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                shared.came();
            }
        });
        Ok(signals)
    }

    /// What goes on from here on: a signal cancels the token that is returned, and says `notice`.
    pub(super) fn arm(&self, notice: &'static str) -> CancellationToken {
        let token = CancellationToken::new();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Armed { token: token.clone(), notice };
        token
    }

    fn came(&self) {
        let armed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if armed.token.is_cancelled() {
            tell!("memferry: second signal, ending at once");
            std::process::exit(i32::from(CANCELLED));
        }
        armed.token.cancel();
        if !armed.notice.is_empty() {
            tell!("memferry: {}", armed.notice);
        }
    }
}
