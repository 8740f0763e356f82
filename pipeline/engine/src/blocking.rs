//! Migrations for VMMs that use threads and have no async runtime.
//!
//! A [`Runtime`] owns the threads that a migration needs. Its calls are those of [`migration`], and
//! return when it is decided where the guest is. Each blocks the calling thread, so a VMM dedicates a thread to it. A
//! clone of the [`Control`] passed to a call controls it from any other thread.
//!
//! # Example
//! ```no_run
//! use std::sync::Arc;
//! use std::time::Duration;
//! use memferry::blocking::Runtime;
//! use memferry::events::{Observers, Role};
//! use memferry::guest::SourceGuest;
//! use memferry::migration::{CancellationToken, SendError};
//! use memferry::settings::SourceSettings;
//! use memferry::transports::open;
//!
//! fn migrate(guest: Arc<dyn SourceGuest>) -> Result<(), Box<dyn std::error::Error>> {
//!     let transport = open(&"tcp:there:7000".parse()?, Duration::from_secs(10));
//!     let (settings, unwatched) = (SourceSettings::default(), Observers::none(Role::Source));
//!     match Runtime::new()?.send(guest, transport.into(), settings, unwatched, CancellationToken::new()) {
//!         Ok(sent) => println!("moved, and paused for {:?}", sent.ended.downtime),
//!         Err(error @ SendError::Unconfirmed { .. }) => eprintln!("do not resume it before you have looked: {error}"),
//!         Err(error) => eprintln!("{error}"),
//!     }
//!     Ok(())
//! }
//! ```

use std::io;
use std::sync::Arc;

use memferry_transports::{Listener, Transport};
use tokio::runtime::Builder;

use crate::control::Control;
use crate::events::Observers;
use crate::guest::{GuestBuilder, SourceGuest};
use crate::migration::{self, DataPlane, ReceiveError, Received, SendError, Sent};
use crate::settings::{DestinationSettings, SourceSettings};

/// The threads that migrations need. Dropping it ends them.
#[derive(Debug)]
pub struct Runtime {
    control: tokio::runtime::Runtime,
    plane: DataPlane,
}

impl Runtime {
    /// Starts the threads: one for timers and control, and a worker for each core.
    ///
    /// # Errors
    /// If the host cannot start them.
    pub fn new() -> io::Result<Self> {
        let control = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        Ok(Self { control, plane: DataPlane::new()? })
    }

    /// Listens at the transport's address. Pass the listener to [`Runtime::receive`] of this runtime.
    ///
    /// # Errors
    /// If the address cannot be bound.
    ///
    /// # Panics
    /// If it is called from async code.
    pub fn listen(&self, transport: &dyn Transport) -> io::Result<Box<dyn Listener>> {
        self.control.block_on(transport.listen())
    }

    /// See [`migration::send`].
    ///
    /// # Errors
    /// See there.
    ///
    /// # Panics
    /// If it is called from async code.
    pub fn send(
        &self,
        guest: Arc<dyn SourceGuest>,
        transport: Arc<dyn Transport>,
        settings: SourceSettings,
        observers: Observers,
        control: impl Into<Control>,
    ) -> Result<Sent, SendError> {
        self.control.block_on(migration::send(guest, transport, settings, &self.plane, observers, control))
    }

    /// See [`migration::receive`].
    ///
    /// # Errors
    /// See there.
    ///
    /// # Panics
    /// If it is called from async code.
    pub fn receive<B: GuestBuilder>(
        &self,
        builder: B,
        listener: Box<dyn Listener>,
        settings: DestinationSettings,
        observers: Observers,
        control: impl Into<Control>,
    ) -> Result<Received<B::Built>, ReceiveError> {
        self.control.block_on(migration::receive(builder, listener, settings, &self.plane, observers, control))
    }
}
