//! The `unsafe` of this guest, and all of it: what the crates for KVM leave to their users.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use kvm_bindings::kvm_xsave;
use kvm_ioctls::VcpuFd;

/// A descriptor of our own for what a machine or a vCPU has open. Their types lend no descriptor in a safe way.
pub(super) fn duplicate(owner: &impl AsRawFd) -> io::Result<OwnedFd> {
    // SAFETY: the owner is borrowed, and keeps its descriptor open meanwhile.
    unsafe { BorrowedFd::borrow_raw(owner.as_raw_fd()) }.try_clone_to_owned()
}

/// Sets the FPU and vector state of a vCPU.
pub(super) fn set_xsave(vcpu: &VcpuFd, state: &kvm_xsave) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: the kernel reads more than these 4 KiB only if this process was granted state that is enabled on demand (AMX),
    // for which it never asks.
    unsafe { vcpu.set_xsave(state) }
}
