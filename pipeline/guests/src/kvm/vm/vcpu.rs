//! One vCPU: enters the guest, and returns with the reason of the exit.

use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::devices::{Ask, Devices};

/// How often in a row a full ring may turn out to be empty: another thread may have emptied it before.
const MOST_IN_VAIN: u32 = 100;

/// Why a vCPU left the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// A signal arrived, or a device was served: check the command.
    Kicked,
    /// A page is written.
    PageDone,
    /// Its dirty ring must be emptied before it can continue.
    RingFull,
}

/// A vCPU.
#[derive(Debug)]
pub(super) struct Vcpu {
    vcpu: VcpuFd,
    in_vain: u32,
}

impl Vcpu {
    pub(super) fn new(vcpu: VcpuFd) -> Self {
        Self { vcpu, in_vain: 0 }
    }

    pub(super) fn descriptor(&self) -> &VcpuFd {
        &self.vcpu
    }

    /// Enters the guest, and serves the devices when it leaves.
    ///
    /// # Errors
    /// The state of a vCPU that cannot continue.
    pub(super) fn run(&mut self, devices: &Devices) -> Result<Left, String> {
        let left = match self.vcpu.run() {
            Ok(VcpuExit::IoOut(port, bytes)) => match devices.write(port, bytes) {
                Ask::Pace => Left::PageDone,
                Ask::Continue => Left::Kicked,
            },
            Ok(VcpuExit::IoIn(port, bytes)) => {
                devices.read(port, bytes);
                Left::Kicked
            }
            Ok(VcpuExit::Intr) => Left::Kicked,
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => return Ok(Left::RingFull),
            Ok(exit) => return Err(format!("cannot continue: {exit:?}")),
            Err(error) if is_interruption(error) => Left::Kicked,
            Err(error) => return Err(format!("cannot continue: {error}")),
        };
        self.in_vain = 0;
        Ok(left)
    }

    /// Its ring was full: was anything removed from it?
    pub(super) fn ring_emptied(&mut self, made_room: bool) -> Result<(), String> {
        self.in_vain = if made_room { 0 } else { self.in_vain + 1 };
        if self.in_vain < MOST_IN_VAIN { Ok(()) } else { Err("has a full ring in which nothing is found".into()) }
    }

    /// Completes the guest's device access, without entering it.
    pub(super) fn complete_access(&mut self) -> Result<(), String> {
        self.vcpu.set_kvm_immediate_exit(1);
        let completed = match self.vcpu.run() {
            Err(error) if is_interruption(error) => Ok(()),
            Ok(VcpuExit::Intr) => Ok(()),
            Ok(exit) => Err(format!("cannot be stopped: {exit:?}")),
            Err(error) => Err(format!("cannot be stopped: {error}")),
        };
        self.vcpu.set_kvm_immediate_exit(0);
        completed
    }
}

fn is_interruption(error: kvm_ioctls::Error) -> bool {
    [libc::EINTR, libc::EAGAIN].contains(&error.errno())
}
