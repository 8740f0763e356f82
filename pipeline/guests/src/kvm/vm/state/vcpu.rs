//! The state of one vCPU.

use kvm_bindings::{
    KVM_MAX_MSR_ENTRIES, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Error, Kvm, VcpuFd};

use super::super::descriptor::set_xsave;
use super::super::machine::refused;
use super::bytes::{Input, Output};
use memferry::guest::GuestError;

/// Saves it. The vCPU is paused, and none of its device accesses is incomplete.
pub(super) fn save(vcpu: &VcpuFd, kvm: &Kvm, output: &mut Output) -> Result<(), Error> {
    // This comes first: it lets KVM complete pending work of the local interrupt controller.
    let mp_state = vcpu.get_mp_state()?;
    output.put(&vcpu.get_regs()?);
    output.put(&vcpu.get_sregs()?);
    output.put(&vcpu.get_xsave()?);
    output.put(&vcpu.get_xcrs()?);
    output.put(&vcpu.get_debug_regs()?);
    output.put(&vcpu.get_lapic()?);
    output.put(&vcpu.get_vcpu_events()?);
    output.put(&mp_state);
    // 0: this host cannot report it, and its machines' clocks run at one rate.
    output.u32(vcpu.get_tsc_khz().unwrap_or(0));
    output.list(&read_msrs(vcpu, kvm)?);
    Ok(())
}

/// Sets it to a saved state, in the order that the kernel requires.
pub(super) fn load(vcpu: &VcpuFd, input: &mut Input<'_>) -> Result<(), GuestError> {
    let regs: kvm_regs = input.take()?;
    let sregs: kvm_sregs = input.take()?;
    let xsave: kvm_xsave = input.take()?;
    let xcrs: kvm_xcrs = input.take()?;
    let debug: kvm_debugregs = input.take()?;
    let lapic: kvm_lapic_state = input.take()?;
    let events: kvm_vcpu_events = input.take()?;
    let mp_state: kvm_mp_state = input.take()?;
    let khz = input.u32()?;
    let msrs: Vec<kvm_msr_entry> = input.list("MSRs", KVM_MAX_MSR_ENTRIES)?;
    let set = |what: &'static str, set: Result<(), Error>| set.map_err(|error| refused(what, error));
    if khz != 0 && vcpu.get_tsc_khz().is_ok_and(|own| own != khz) {
        set("the vCPU's clock rate", vcpu.set_tsc_khz(khz))?;
    }
    set("the vCPU's run state", vcpu.set_mp_state(mp_state))?;
    set("the vCPU's registers", vcpu.set_regs(&regs))?;
    set("the vCPU's special registers", vcpu.set_sregs(&sregs))?;
    set("the vCPU's extended control registers", vcpu.set_xcrs(&xcrs))?;
    set("the vCPU's FPU and vector state", set_xsave(vcpu, &xsave))?;
    set("the vCPU's debug registers", vcpu.set_debug_regs(&debug))?;
    set("the vCPU's interrupt controller", vcpu.set_lapic(&lapic))?;
    write_msrs(vcpu, &msrs)?;
    set("the vCPU's pending events", vcpu.set_vcpu_events(&events))
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
