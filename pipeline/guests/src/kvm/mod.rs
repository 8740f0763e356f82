//! The KVM guest: a small, complete virtual machine whose program checks its own memory.
//!
//! Its vCPUs step through a region of memory forever, check in every page the words that the previous pass left there,
//! and report over a serial port how far they are or which page was wrong. So the guest itself detects a page that
//! became stale during a migration, or a register or timer that was not restored, on a processor that KVM runs.
//!
//! ```text
//! settings ─▶ machine ── KVM ──▶ vCPUs (threads: crew) ── ports ──▶ devices: serial port, pace
//!                │                     │                              │
//!                └─ ram ◀── stores ────┘◀── answers, marked ──────────┘
//! ```
//!
//! The guest owns its machine and threads; dropping it ends them. Built with the feature `kvm`, on x86-64 Linux.

pub mod settings;

#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
mod vm;

pub use super::shared::SharedSettings;
pub use settings::{KvmLogChoice, KvmSettings};
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
pub use vm::{KvmBuilder, KvmGuest, KvmStatus};

/// Was this program built to run KVM guests, if its host supports them?
pub const IS_BUILT_IN: bool = cfg!(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"));
