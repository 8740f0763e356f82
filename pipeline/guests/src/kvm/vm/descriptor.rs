//! All `unsafe` code of this guest: operations that the KVM crates leave to their users.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use kvm_bindings::kvm_xsave;
use kvm_ioctls::VcpuFd;

/// A duplicate of the descriptor of a machine or a vCPU. Their types provide no safe borrow of it.
pub(super) fn duplicate(owner: &impl AsRawFd) -> io::Result<OwnedFd> {
    // SAFETY: the owner is borrowed, and keeps its descriptor open meanwhile.
    unsafe { BorrowedFd::borrow_raw(owner.as_raw_fd()) }.try_clone_to_owned()
}

/// Sets the FPU and vector state of a vCPU.
pub(super) fn set_xsave(vcpu: &VcpuFd, state: &kvm_xsave) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: the kernel reads more than these 4 KiB only if this process was granted state that is enabled on demand
    // (AMX), which it never requests.
    unsafe { vcpu.set_xsave(state) }
}
