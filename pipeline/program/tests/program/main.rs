//! The program, run as operators run it: its ends as processes, on real files, killed, out of disk space,
//! misconfigured.

mod between;
mod changing;
mod checks;
mod configs;
mod control;
mod exposition;
mod foreign_text;
mod handover_kills;
mod harness;
mod images;
mod kills;
mod limits;
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
mod machines;
mod memcached;
mod memory;
mod messages;
mod openapi;
mod outlets;
mod pages;
mod plans;
mod postcopy;
mod recovery;
mod recovery_kills;
mod reports;
#[path = "../../../../tests/src/sample.rs"]
pub mod sample;
mod security;
mod signals;
#[path = "../../../../tests/src/skip.rs"]
pub mod skip;
mod stuck;
mod writer;
