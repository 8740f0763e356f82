//! Memory that a program allocates for its own state, and can send to a peer while the program runs: for those who have no VM.
//!
//! A [`Region`] is bytes at offsets. Whoever reads or writes takes an [`Access`], one at a time, and may do several reads
//! and writes under it: they are moved together or not at all. While a region is sent, accesses go on; only at the
//! switchover they wait. Then the region lives at the peer, and an access here says so ([`Gone`]); or the send failed or
//! was cancelled, and they go on here as if nothing had been. A few named pieces of state travel with it.
//!
//! ```text
//!  access ─▶ read, write, state ─▶ drop        access: waits ──┬─ failed ──▶ goes on
//!      … while rounds of pages are sent …      (switchover)    └─ moved ───▶ Err(Gone::Moved)
//! ```
//!
//! Writes cost nothing but the copy while nothing is sent: the kernel finds them, by the userfault log
//! ([`Region::tracking`] says so, or why it is the hash log instead).
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

/// Memory that can be sent while it is used. See the [module](self). Clones are the same memory.
#[derive(Clone, Debug)]
pub struct Region {
    store: Arc<Store>,
}

/// The region is not here any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Gone {
    /// It lives at the peer.
    #[error("the region has moved to the peer")]
    Moved,
    /// It was handed over and nobody confirmed it: it may live at the peer. See [`Region::reopen`].
    #[error("the region was handed over to a peer that did not confirm it")]
    Unconfirmed,
}

/// Why a region was not sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// There is nothing here to send.
    #[error(transparent)]
    Gone(#[from] Gone),
    /// The system gives no threads.
    #[error("no threads to send with")]
    Threads(#[source] io::Error),
    /// The migration did not succeed. Accesses go on here, unless it is
    /// [`Unconfirmed`](migration::SendError::Unconfirmed).
    #[error(transparent)]
    Migration(#[from] migration::SendError),
}

/// How writes are found while a region is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// The kernel notes them; a round costs what was written.
    Userfault,
    /// All of the region is hashed in every round, for the kernel cannot: this is why.
    Hash(String),
}

impl Region {
    /// `bytes` bytes that read as zeros and take up nothing until they are written.
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

    /// Waits for whoever has access, and while the region is being handed over. What is read and written under one access
    /// is moved together. Hold it shortly: the switchover waits for it too. Blocks its thread, and must not be asked for
    /// while the same thread has one.
    ///
    /// # Errors
    /// When the region lives elsewhere.
    pub fn access(&self) -> Result<Access<'_>, Gone> {
        self.store.access()
    }

    /// Sends the region to whatever `transport` leads to. Accesses go on meanwhile; one send at a time, another one waits.
    /// It returns when it is decided where the region lives. `control` is a [`Control`], or the token that cancels it; dropping
    /// the call does not end it.
    ///
    /// # Errors
    /// When the region lives elsewhere already, the host has no threads, or the migration did not succeed: see [`SendError`].
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
        // A task of its own, so that a call that is dropped leaves no region behind that nobody opens.
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

    /// Receives a region of at most `at_most` bytes from whoever connects to `listener`.
    ///
    /// # Errors
    /// Why nothing has arrived.
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

    /// Goes on here after a hand-over that nobody confirmed. Only for who has looked and knows that the region does not live
    /// at the peer. Nothing happens to a region that is here, or that has moved.
    pub fn reopen(&self) {
        self.store.reopen();
    }
}
