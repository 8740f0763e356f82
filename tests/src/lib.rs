//! What the whole-migration tests share: a guest made for them, a way to run both ends, and figures for what is compared.
//!
//! The guest keeps nothing secret: its memory is mapped here, its writers are threads that never rest, and it records what it was
//! told, so that a test can ask afterwards who ran, and when.

pub mod bare;
pub mod busy;
pub mod foreseen;
pub mod guest;
pub mod host;
pub mod hot;
pub mod leftovers;
pub mod peer;
pub mod run;
pub mod sparse;
pub mod trouble;

pub use guest::TestGuest;
pub use host::warm_memory;
pub use peer::{Hand, Recording};
pub use run::{Ends, Recorder, migrate, migrate_watched, source_settings};
pub use trouble::Trouble;
