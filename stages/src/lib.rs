//! The stages of a memory migration, and what they work on.
//!
//! ```text
//!  dirty logs ──▶ bitmap_sync ──▶ bitmap ──▶ scanner ─▶ zero_detector ─▶ encoder ─▶ sender ═══▶ receiver ─▶ loader
//! ```
//!
//! Each stage is one module: a value with an `async fn run(self, …queues)` that owns its state, takes items from one
//! bounded queue and puts them into the next ([`queue`]). No stage knows its neighbours; the pipeline joins them, and a
//! test or a bench can run one alone.
//!
//! Comments name the laws of the design by number, as ARCHITECTURE.md lists them.

pub mod batch;
pub mod bitmap;
pub mod bitmap_sync;
pub mod codec;
pub mod decoder;
pub mod dialect;
pub mod digest;
pub mod dirty_log;
pub mod encoder;
pub mod error;
pub mod exclusions;
pub mod geometry;
mod hash;
pub mod heartbeat;
pub mod host;
pub mod in_flight;
mod kernel;
pub mod kvm;
pub mod loader;
pub mod memory;
pub mod meter;
pub mod missing;
pub mod page_hashes;
pub mod page_requester;
pub mod page_server;
mod pending;
pub mod pool;
pub mod queue;
pub mod receiver;
pub mod scanner;
pub mod sender;
pub mod silence;
mod stage;
pub mod stage_id;
pub mod take;
pub mod tally;
pub mod token_bucket;
pub mod untrusted;
pub mod wire;
pub mod xbzrle;
pub mod zero_detector;
