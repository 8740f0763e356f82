//! What the tests of whole migrations share: a guest for tests, functions that run both ends, and figures for
//! comparisons.
//!
//! The guest is fully observable: its memory is mapped in this process, its writers are threads that never rest, and
//! it records the calls that it received, so that a test can check afterwards which guest ran, and when.

pub mod bare;
pub mod busy;
pub mod crossing;
pub mod foreseen;
pub mod guest;
pub mod host;
pub mod hot;
pub mod leftovers;
pub mod peer;
pub mod proxy;
pub mod run;
pub mod sample;
pub mod skip;
pub mod sparse;
pub mod trouble;

pub use guest::TestGuest;
pub use host::warm_memory;
pub use peer::{Hand, Recording};
pub use run::{Ends, Recorder, migrate, migrate_watched, source_settings};
pub use skip::skipped;
pub use trouble::Trouble;
