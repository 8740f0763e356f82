//! memferry moves the memory of a running guest to another process, host or file while the guest keeps writing to it.

pub mod cli;
pub mod config;
pub mod events;
pub mod guest;
mod host;
pub mod log;
pub mod metrics;
pub mod migration;
pub mod progress;
pub mod report;
pub mod settings;
