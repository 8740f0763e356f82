//! Liveness: each end sends heartbeats, and ends the migration if the peer is silent for too long.
//!
//! Heartbeats and the watch are tasks on the caller's runtime. No computation or blocking call delays them: no sync, no
//! digest and no call into the guest.

use std::sync::Arc;

use memferry_stages::heartbeat::{EVERY, send_heartbeats};
use memferry_stages::queue::Outlet;
use memferry_stages::sender::Control;
use memferry_stages::silence::{Ear, silence};
use memferry_stages::wire::messages::Figure;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::error::Silence;
use crate::settings::LEAST_PEER_TIMEOUT;

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
    /// Sends heartbeats to `control`, and watches the peer through `ears` for the limit in `silence_of`.
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

    /// From here on the heartbeats carry the figures that `figures` returns.
    pub(super) fn report(
        &mut self,
        control: Outlet<Control>,
        figures: impl Fn() -> Vec<Figure> + Send + Sync + 'static,
    ) {
        std::mem::replace(&mut self.heartbeats, heartbeats(control, figures)).abort();
    }

    /// Waits until the peer has been silent for too long.
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

/// Waits until the peer has been silent for too long. Never returns where the transport has no return path, as with a
/// file.
pub(super) async fn silenced(alive: Option<&Alive>) -> Silence {
    match alive {
        Some(alive) => alive.silenced().await,
        None => std::future::pending().await,
    }
}
