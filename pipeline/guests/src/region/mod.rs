//! Memory that a program allocates for its own state, and can send to a peer while the program runs, without a VM.
//!
//! A [`Region`] is bytes at offsets. To read or write, a thread takes an [`Access`], one at a time. Several reads and
//! writes under one access are moved together or not at all. While a region is sent, accesses continue; they wait only
//! at the switchover. Then the region is at the peer, and an access here returns [`Gone`]; or the send failed or was
//! cancelled, and accesses continue here unchanged. A few named pieces of state travel with it.
//!
//! ```text
//!  access ─▶ read, write, state ─▶ drop        access: waits ──┬─ failed ──▶ continues
//!      … while rounds of pages are sent …      (switchover)    └─ moved ───▶ Err(Gone::Moved)
//! ```
//!
//! While nothing is sent, a write costs only the copy. While a region is sent the kernel finds the writes, through the
//! userfault log. [`Region::tracking`] says so, or why the hash log is used instead.
//!
//! # Example
//! ```
//! use std::sync::Arc;
//! use memferry::events::{Observers, Role};
//! use memferry::migration::CancellationToken;
//! use memferry_guests::region::{Gone, Region};
//! use memferry::settings::{DestinationSettings, SourceSettings};
//! use memferry::transports::{Transport, memory::MemoryTransport};
//!
//! # tokio::runtime::Runtime::new()?.block_on(async {
//! let region = Region::new(1 << 20)?;
//! {
//!     let mut access = region.access()?;
//!     access.write(4000, b"a value across two pages: 4000 is near the end of one, and this is longer than what is left");
//!     access.set_state("values", vec![1]);
//! }
//! // Here both ends are in one process; over a socket or TCP each has its own.
//! let transport = Arc::new(MemoryTransport::new(1 << 16));
//! let listener = transport.listen().await?;
//! let (never, unwatched) = (CancellationToken::new(), Observers::none);
//! let sending = region.send(transport, SourceSettings::default(), unwatched(Role::Source), never.clone());
//! let settings = DestinationSettings::default();
//! let receiving = Region::receive(listener, 1 << 30, settings, unwatched(Role::Destination), never);
//! let (sent, received) = tokio::join!(sending, receiving);
//!
//! println!("paused for {:?}", sent?.ended.downtime);
//! assert_eq!(region.access().err(), Some(Gone::Moved));
//! let there = received?;
//! let access = there.access()?;
//! assert_eq!((access.load::<7>(4000), access.state("values")), (*b"a value", Some(&[1][..])));
//! # Ok::<(), Box<dyn std::error::Error>>(()) })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod guest;
mod store;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use memferry_stages::geometry::PageSize;
use memferry_transports::{Listener, Transport};

use self::guest::RegionGuest;
use self::store::Store;
use memferry::control::Control;
use memferry::events::Observers;
use memferry::guest::RunState;
use memferry::migration::{self, DataPlane, ReceiveError, Sent};
use memferry::settings::{DestinationSettings, SourceSettings};

pub use store::Access;

/// Memory that can be sent while it is used. See the [module](self). Clones share the same memory.
#[derive(Clone, Debug)]
pub struct Region {
    store: Arc<Store>,
}

/// The region is not here any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Gone {
    /// It is at the peer.
    #[error("the region has moved to the peer")]
    Moved,
    /// It was handed over without a confirmation: it may be at the peer. See [`Region::reopen`].
    #[error("the region was handed over to a peer that did not confirm it")]
    Unconfirmed,
}

/// Why a region was not sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The region is not here.
    #[error(transparent)]
    Gone(#[from] Gone),
    /// The system cannot start a thread.
    #[error("no threads to send with")]
    Threads(#[source] io::Error),
    /// The migration did not succeed. Accesses continue here, unless the error is
    /// [`Unconfirmed`](migration::SendError::Unconfirmed).
    #[error(transparent)]
    Migration(#[from] migration::SendError),
}

/// How writes are found while a region is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// The kernel records them; the cost of a round depends on what was written.
    Userfault,
    /// The whole region is hashed in every round, because the kernel cannot record writes, for this reason.
    Hash(String),
}

impl Region {
    /// Allocates `bytes` bytes that read as zeros and take no memory until they are written.
    ///
    /// # Errors
    /// If `bytes` is 0 or more than the host can map.
    pub fn new(bytes: usize) -> io::Result<Self> {
        Ok(Self { store: Arc::new(Store::new(bytes, PageSize::DEFAULT, RunState::Running)?) })
    }

    /// Its length in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> usize {
        self.store.len()
    }

    /// How writes are found while it is sent.
    #[must_use]
    pub fn tracking(&self) -> Tracking {
        guest::tracking()
    }

    /// Waits for any other access to end, and while the region is being handed over. Reads and writes under one access
    /// are moved together. Hold it for a short time only: the switchover waits for it too. Blocks its thread, and must
    /// not be called while the same thread holds an access.
    ///
    /// # Errors
    /// When the region is at the peer.
    pub fn access(&self) -> Result<Access<'_>, Gone> {
        self.store.access()
    }

    /// Sends the region over `transport`. Accesses continue meanwhile. Only one send runs at a time; another one waits.
    /// It returns when it is decided where the region is. `control` is a [`Control`], or the token that cancels it;
    /// dropping the call does not end the send.
    ///
    /// # Errors
    /// When the region is at the peer already, the host cannot start threads, or the migration did not succeed: see
    /// [`SendError`].
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub async fn send(
        &self,
        transport: Arc<dyn Transport>,
        settings: SourceSettings,
        observers: Observers,
        control: impl Into<Control>,
    ) -> Result<Sent, SendError> {
        let control = control.into();
        let store = self.store.clone();
        // A separate task, so that a dropped call does not leave a region that is never opened.
        let sending = tokio::spawn(async move {
            let _one_at_a_time = store.sending.lock().await;
            store.is_here()?;
            let plane = DataPlane::new().map_err(SendError::Threads)?;
            let guest = Arc::new(RegionGuest { store: store.clone() });
            let sent = migration::send(guest, transport, settings, &plane, observers, control).await;
            let is_unknown = matches!(sent, Err(migration::SendError::Unconfirmed { .. }));
            store.conclude(if is_unknown { Gone::Unconfirmed } else { Gone::Moved });
            Ok(sent?)
        });
        sending.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
    }

    /// Receives a region of at most `at_most` bytes from the first valid source that connects to `listener`.
    ///
    /// # Errors
    /// Why no region was received.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub async fn receive(
        listener: Box<dyn Listener>,
        at_most: usize,
        settings: DestinationSettings,
        observers: Observers,
        control: impl Into<Control>,
    ) -> Result<Self, ReceiveError> {
        let control = control.into();
        let plane = DataPlane::new().expect("the runtime has threads, so the host gives them");
        let builder = RegionGuest::expecting(at_most);
        let received = migration::receive(builder, listener, settings, &plane, observers, control).await?;
        let store = received.guest.store.clone();
        store.resume();
        Ok(Self { store })
    }

    /// Reopens the region here after an unconfirmed handover. Call it only after a check that the region is not open at
    /// the peer. Has no effect on a region that is open here, or that has moved.
    pub fn reopen(&self) {
        self.store.reopen();
    }
}
