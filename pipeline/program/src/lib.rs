//! The `memferry` program: its command line, configuration, control API, log, progress and metrics.

pub mod api;
pub mod cli;
pub mod config;
mod event_file;
mod http;
pub mod log;
pub mod metrics;
pub mod progress;
