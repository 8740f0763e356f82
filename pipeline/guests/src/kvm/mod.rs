//! The KVM guest: a small, complete virtual machine whose program proves its memory.
//!
//! Its vCPUs step through a region of memory without an end, check in every page what the pass before left there, and say
//! over a serial port how far they are or which page was wrong. So a page that went stale on the way, a register or a timer
//! that was not restored, is found by the guest itself, on a processor that KVM runs.
//!
//! ```text
//! settings ─▶ machine ── KVM ──▶ vCPUs (threads: crew) ── ports ──▶ devices: serial port, pace
//!                │                     │                              │
//!                └─ ram ◀── stores ────┘◀── answers, marked ──────────┘
//! ```
//!
//! It owns its machine and threads; dropping it ends them. Built with the feature `kvm`, on x86-64 Linux.

pub mod settings;

#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
mod vm;

pub use super::shared::SharedSettings;
pub use settings::{KvmLogChoice, KvmSettings};
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
pub use vm::{KvmBuilder, KvmGuest, KvmStatus};

/// Can this program run KVM guests, if its host can?
pub const IS_BUILT_IN: bool = cfg!(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"));
