//! memferry moves the memory of a running guest to another process, host or file while the guest keeps writing to it.
//!
//! # For whoever embeds it
//! This crate is the only dependency that a VMM needs: what its traits and settings name is re-exported here.
//!
//! | to do | here |
//! |---|---|
//! | make a VM one that can be moved | implement [`Guest`](guest::Guest): [`guest`] |
//! | describe its RAM | [`memory`], [`geometry`] |
//! | tell which pages were written | a [`DirtyLog`](dirty_log::DirtyLog) of those in [`dirty_log`], or one of your own |
//! | move it | [`migration::send`] and [`migration::receive`], with [`settings`], over one of the [`transports`] |
//! | watch it | [`events`] |
//! | change or end it while it runs | [`control`]; over a Unix socket [`api`] |
//! | take RAM and log from `vm-memory` | `vm_memory`, with the feature `vm-memory` |
//! | know that the implementation is right | [`guest::conformance`], [`dirty_log::conformance`] |
//!
//! `examples/embed.rs` is all of that in one short program. Who has no VM, only state of their own to move, takes a
//! [`Region`]; `examples/kv.rs` is a key-value store that moves to another process under load.

pub mod api;
pub mod bottleneck;
pub mod cli;
pub mod config;
pub mod control;
pub mod controller;
mod event_file;
pub mod events;
pub mod guest;
mod host;
mod http;
pub mod log;
pub mod metrics;
pub mod migration;
mod outlet;
mod partial;
pub mod plan;
pub mod progress;
pub mod region;
pub mod report;
pub mod settings;
mod threads;
#[cfg(feature = "vm-memory")]
pub mod vm_memory;
mod whole_file;

pub use memferry_stages::{batch, bitmap, codec, dirty_log, geometry, kvm, memory, meter, pool, tally, xbzrle};
pub use memferry_transports as transports;
pub use region::Region;
