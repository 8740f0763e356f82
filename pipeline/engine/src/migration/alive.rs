//! Both ends show each other that they are alive, and the silence of one ends the migration at the other.
//!
//! Heartbeats and the watch are tasks on the caller's runtime: nothing that computes or blocks holds them up, no sync, no digest
//! and no call into the guest.

use std::sync::Arc;
use std::time::Duration;

use memferry_stages::heartbeat::{EVERY, send_heartbeats};
use memferry_stages::queue::Outlet;
use memferry_stages::sender::Control;
use memferry_stages::silence::{Ear, silence};
use memferry_stages::wire::messages::Figure;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::error::{MigrationError, Silence};
use crate::settings::LEAST_PEER_TIMEOUT;
use crate::values::Time;

const _: () = assert!(LEAST_PEER_TIMEOUT.as_millis() >= 3 * EVERY.as_millis(), "heartbeats come too rarely for it");

/// This end's heartbeats, and its watch over the peer. Dropping it ends both.
#[derive(Debug)]
pub(super) struct Alive {
    silence: Silence,
    silent: CancellationToken,
    heartbeats: AbortOnDropHandle<()>,
    _watch: AbortOnDropHandle<()>,
}

impl Alive {
    /// Sends heartbeats to `control`, and listens with `ears` for as long as `silence_of` says.
    pub(super) fn start(control: Outlet<Control>, ears: Vec<Arc<Ear>>, silence_of: Silence) -> Self {
        let silent = CancellationToken::new();
        let (token, limit) = (silent.clone(), silence_of.limit);
        let watch = async move {
            silence(ears, limit).await;
            token.cancel();
        };
        Self {
            silence: silence_of,
            silent,
            heartbeats: heartbeats(control, Vec::new),
            _watch: AbortOnDropHandle::new(tokio::spawn(watch)),
        }
    }

    /// From here on the heartbeats carry what `figures` returns.
    pub(super) fn report(
        &mut self,
        control: Outlet<Control>,
        figures: impl Fn() -> Vec<Figure> + Send + Sync + 'static,
    ) {
        std::mem::replace(&mut self.heartbeats, heartbeats(control, figures)).abort();
    }

    /// Waits until the peer was silent for too long.
    pub(super) async fn silenced(&self) -> Silence {
        self.silent.cancelled().await;
        self.silence.clone()
    }
}

fn heartbeats(
    control: Outlet<Control>,
    figures: impl Fn() -> Vec<Figure> + Send + Sync + 'static,
) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(send_heartbeats(control, figures)))
}

/// Waits until the peer was silent for too long; for ever where nobody answers, as with a file.
pub(super) async fn silenced(alive: Option<&Alive>) -> Silence {
    match alive {
        Some(alive) => alive.silenced().await,
        None => std::future::pending().await,
    }
}

/// Is the limit long enough for heartbeats to come within it?
pub(super) fn check_peer_timeout(limit: Duration) -> Result<(), MigrationError> {
    if limit >= LEAST_PEER_TIMEOUT {
        return Ok(());
    }
    let [limit, least] = [limit, LEAST_PEER_TIMEOUT].map(Time);
    Err(MigrationError::Setting(format!("a peer_timeout of {limit} is too short; set {least} or more")))
}
