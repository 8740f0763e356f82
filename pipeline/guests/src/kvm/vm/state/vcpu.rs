//! The state of one vCPU.

use kvm_bindings::{
    KVM_MAX_MSR_ENTRIES, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Error, Kvm, VcpuFd};

use serde::{Deserialize, Serialize};

use super::super::descriptor::set_xsave;
use super::super::machine::refused;
use memferry::guest::GuestError;

/// The kernel's structs of a vCPU.
#[derive(Default, Deserialize, Serialize)]
pub(super) struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    /// The rate of the TSC. 0: the source's host cannot report it, and its machines' clocks run at one rate.
    khz: u32,
    msrs: Vec<kvm_msr_entry>,
}

impl VcpuState {
    /// The state of a vCPU that is paused, and none of whose device accesses is incomplete.
    pub(super) fn of(vcpu: &VcpuFd, kvm: &Kvm) -> Result<Self, Error> {
        // This comes first: it lets KVM complete pending work of the local interrupt controller.
        let mp_state = vcpu.get_mp_state()?;
        Ok(Self {
            regs: vcpu.get_regs()?,
            sregs: vcpu.get_sregs()?,
            xsave: vcpu.get_xsave()?,
            xcrs: vcpu.get_xcrs()?,
            debug: vcpu.get_debug_regs()?,
            lapic: vcpu.get_lapic()?,
            events: vcpu.get_vcpu_events()?,
            mp_state,
            khz: vcpu.get_tsc_khz().unwrap_or(0),
            msrs: read_msrs(vcpu, kvm)?,
        })
    }

    /// Sets a vCPU to it, in the order that the kernel requires.
    pub(super) fn set(&self, vcpu: &VcpuFd) -> Result<(), GuestError> {
        if self.msrs.len() > KVM_MAX_MSR_ENTRIES {
            return Err(GuestError(format!("{} MSRs came, at most {KVM_MAX_MSR_ENTRIES} can be", self.msrs.len())));
        }
        let set = |what: &'static str, set: Result<(), Error>| set.map_err(|error| refused(what, error));
        if self.khz != 0 && vcpu.get_tsc_khz().is_ok_and(|own| own != self.khz) {
            set("the vCPU's clock rate", vcpu.set_tsc_khz(self.khz))?;
        }
        set("the vCPU's run state", vcpu.set_mp_state(self.mp_state))?;
        set("the vCPU's registers", vcpu.set_regs(&self.regs))?;
        set("the vCPU's special registers", vcpu.set_sregs(&self.sregs))?;
        set("the vCPU's extended control registers", vcpu.set_xcrs(&self.xcrs))?;
        set("the vCPU's FPU and vector state", set_xsave(vcpu, &self.xsave))?;
        set("the vCPU's debug registers", vcpu.set_debug_regs(&self.debug))?;
        set("the vCPU's interrupt controller", vcpu.set_lapic(&self.lapic))?;
        write_msrs(vcpu, &self.msrs)?;
        set("the vCPU's pending events", vcpu.set_vcpu_events(&self.events))
    }
}

/// The MSRs that the kernel lists, except those that cannot be read.
fn read_msrs(vcpu: &VcpuFd, kvm: &Kvm) -> Result<Vec<kvm_msr_entry>, Error> {
    let indices = kvm.get_msr_index_list()?;
    let mut wanted: Vec<_> =
        indices.as_slice().iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut read = Vec::with_capacity(wanted.len());
    while !wanted.is_empty() {
        let mut msrs = Msrs::from_entries(&wanted).expect("no more than the kernel has");
        // The call stops at the first MSR that it cannot read: that one is left out.
        let count = vcpu.get_msrs(&mut msrs)?;
        read.extend_from_slice(&msrs.as_slice()[..count]);
        wanted.drain(..(count + 1).min(wanted.len()));
    }
    Ok(read)
}

/// Writes MSRs. One that cannot be written is accepted if it already has the required value.
fn write_msrs(vcpu: &VcpuFd, mut wanted: &[kvm_msr_entry]) -> Result<(), GuestError> {
    let failed = |error| refused("the vCPU's MSRs", error);
    while !wanted.is_empty() {
        let msrs = Msrs::from_entries(wanted).expect("no more than the kernel has");
        let count = vcpu.set_msrs(&msrs).map_err(failed)?;
        let Some(stopped) = wanted.get(count) else { return Ok(()) };
        let mut own = Msrs::from_entries(&[kvm_msr_entry { data: 0, ..*stopped }]).expect("one");
        let has = vcpu.get_msrs(&mut own).map_err(failed)?;
        if has != 1 || own.as_slice()[0].data != stopped.data {
            let (index, data) = (stopped.index, stopped.data);
            return Err(GuestError(format!("KVM cannot set MSR {index:#x} to {data:#x} here")));
        }
        wanted = &wanted[count + 1..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fields with their lengths. If they change, the format has another version.
    #[test]
    fn the_format_is_that_of_its_version() {
        let msrs = vec![kvm_msr_entry { index: 0x10, data: 300, ..Default::default() }];
        let state = VcpuState { regs: kvm_regs { rax: 1, ..Default::default() }, khz: 300, msrs, ..Default::default() };
        let structs: [(&[u8], usize); 8] = [
            (&[0x90, 1], 144),
            (&[0xb8, 2], 312),
            (&[0x80, 0x20], 4096),
            (&[0x88, 3], 392),
            (&[0x80, 1], 128),
            (&[0x80, 8], 1024),
            (&[64], 64),
            (&[4], 4),
        ];
        let mut expected = structs.map(|(length, bytes)| [length, &vec![0; bytes]].concat()).concat();
        expected[2] = 1;
        expected.extend([0xac, 2, 1, 16, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x2c, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(crate::state::encoded(&state), expected);
    }
}
