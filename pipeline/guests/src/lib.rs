//! The guests in this crate, each an implementation of [`memferry::guest::Guest`].
//!
//! | guest | what it is |
//! |---|---|
//! | [`workload`] | memory that threads never stop writing to, with stamps to check each page: for trials and tests |
//! | [`mod@file`] | files or shared memory that another program writes, with commands that pause and resume it |
//! | [`kvm`] | a small virtual machine under KVM whose own program stamps and checks its pages |
//! | [`region`] | memory of a program without a VM |

mod balloon;
pub mod file;
mod free;
pub mod kvm;
pub mod region;
mod shared;
mod state;
pub mod workload;

pub use region::Region;
pub use shared::SharedSettings;
