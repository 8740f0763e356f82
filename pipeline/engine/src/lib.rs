//! memferry moves the memory of a running guest to another process, host or file while the guest keeps writing to it.
//!
//! # For a VMM that embeds it
//! This crate is the only dependency that a VMM needs: it re-exports the types that its traits and settings use.
//!
//! | to do | here |
//! |---|---|
//! | make a VM movable | implement [`SourceGuest`](guest::SourceGuest) and [`DestinationGuest`](guest::DestinationGuest): [`guest`] |
//! | describe its RAM | [`memory`], [`geometry`] |
//! | report which pages were written | a [`DirtyLog`](dirty_log::DirtyLog) of those in [`dirty_log`], or one of your own |
//! | move it | [`migration::send`] and [`migration::receive`], with [`settings`], over one of the [`transports`] |
//! | move it from a VMM that uses threads, without an async runtime | [`blocking`] |
//! | observe it | [`events`] |
//! | change or cancel it while it runs | [`control`] |
//! | take RAM and dirty log from `vm-memory` | `vm_memory`, with the feature `vm-memory` |
//! | test the implementation | [`guest::conformance`], [`dirty_log::conformance`] |
//!
//! `examples/embed.rs` is all of that in one program. The guests that memferry ships are in the crate `memferry-guests`.

pub mod blocking;
mod change;
pub mod control;
pub mod controller;
mod downtime;
pub mod events;
pub mod guest;
pub mod migration;
pub mod settings;
#[cfg(feature = "vm-memory")]
pub mod vm_memory;

// Shared with the other crates of this workspace. Not part of the public interface; changes without notice.
#[doc(hidden)]
pub mod bottleneck;
#[doc(hidden)]
pub mod host;
#[doc(hidden)]
pub mod human;
#[doc(hidden)]
pub mod model;
#[doc(hidden)]
pub mod outlet;
#[cfg(any(test, feature = "samples"))]
#[doc(hidden)]
pub mod samples;
#[doc(hidden)]
pub mod threads;
#[doc(hidden)]
pub mod units;
#[doc(hidden)]
pub mod values;

pub use memferry_stages::{
    batch, bitmap, codec, dirty_log, geometry, kvm, memory, meter, pool, stage_id, tally, xbzrle,
};
pub use memferry_transports as transports;
