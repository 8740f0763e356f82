//! The state of a machine that travels besides its memory, as sections of guest state, little-endian. The structs are
//! the kernel's own (linux/kvm.h, x86-64), whose layout never changes.
//!
//! ```text
//! "machine" in setup, version 2
//! ┌────────┬───────┬────────┬───────────┬───────┬────────────────┬──────┬───────────┬────────┬─────────┬──────────────────┐
//! │ memory │ vCPUs │ region │ region at │ bytes │ pages a second │ free │ unplugged │ shared │ entries │ kvm_cpuid_entry2 │
//! │ u64    │ u32   │ u64    │ u64       │ u32   │ f64            │ u64  │ u64       │ u64    │ u32     │ of each          │
//! └────────┴───────┴────────┴───────────┴───────┴────────────────┴──────┴───────────┴────────┴─────────┴──────────────────┘
//!   shared: bytes of the shared block, 0 if there is none
//! "vcpu 0", "vcpu 1", … of the devices, version 2
//! ┌──────┬───────┬───────┬──────┬───────────┬───────┬────────┬──────────┬─────────┬──────┬───────────────┐
//! │ regs │ sregs │ xsave │ xcrs │ debugregs │ lapic │ events │ mp_state │ TSC kHz │ MSRs │ kvm_msr_entry │
//! │      │       │       │      │           │       │        │          │ u32     │ u32  │ of each       │
//! └──────┴───────┴───────┴──────┴───────────┴───────┴────────┴──────────┴─────────┴──────┴───────────────┘
//! "board" of the devices, version 2; after the fields in the drawing: words u32, the pages of free memory in use, u64
//! each
//! ┌──────────────┬────────────┬───────┬──────────────────┬──────────┬────────────┬──────────┬────────┬───────┬──────┐
//! │ irqchip      │ pit_state2 │ clock │ serial registers │ line     │ heartbeats │ troubles │ ticks  │ vCPUs │ pass │
//! │ PIC, PIC, IO │            │       │ 8 bytes          │ u32, it  │ u64        │ u64      │ u32    │ u32   │ u32  │
//! └──────────────┴────────────┴───────┴──────────────────┴──────────┴────────────┴──────────┴────────┴───────┴──────┘
//! ```
//!
//! A peer may have made these bytes up: lengths are checked before anything is built from them, values are checked by
//! the kernel when they are set, and invalid bytes are an error. They can put a vCPU into any state, in which it
//! reaches nothing but its own machine.

mod bytes;
mod vcpu;

use std::path::Path;

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, kvm_clock_data,
    kvm_cpuid_entry2, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::Kvm;

use self::bytes::{Input, Output};
use super::console::{Console, MOST_LINE};
use super::devices::Log;
use super::machine::{Machine, refused};
use crate::kvm::settings::{KvmLogChoice, KvmSettings};
use crate::shared::SharedSettings;
use memferry::guest::{GuestError, GuestState, StateSection};

const VERSION: u32 = 2;
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
/// The flags of a restored clock. Flags of measurements against the host's clock are meaningless on another host.
const CLOCK_FLAGS: u32 = 0;

/// The state that a destination needs to build the machine.
pub(super) fn save_setup(machine: &Machine) -> GuestState {
    let KvmSettings { memory, vcpus, region, region_at, pages_per_second, bytes, free, unplugged, .. } =
        machine.settings;
    let mut output = Output::default();
    output.u64(memory);
    output.u32(vcpus);
    output.u64(region);
    output.u64(region_at);
    output.u32(u32::try_from(bytes).expect("at most a page"));
    output.u64(pages_per_second.to_bits());
    output.u64(free);
    output.u64(unplugged);
    output.u64(SharedSettings::bytes_of(machine.settings.shared.as_ref()));
    output.list(machine.cpuid.as_slice());
    GuestState { sections: vec![output.section("machine", VERSION)] }
}

/// The settings of the machine that arrives, checked. The destination chooses how its writes are found at this end, and
/// the file of its shared block.
pub(super) fn load_setup(
    state: &GuestState,
    dirty_log: KvmLogChoice,
    shared: Option<&Path>,
) -> Result<(KvmSettings, CpuId), GuestError> {
    let [section] = &state.sections[..] else {
        return Err(GuestError(format!("{} sections of setup came, a KVM machine has one", state.sections.len())));
    };
    let mut input = Input::of(section, "machine", VERSION)?;
    let (memory, vcpus, region, region_at) = (input.u64()?, input.u32()?, input.u64()?, input.u64()?);
    let bytes = input.u32()?.into();
    let pages_per_second = f64::from_bits(input.u64()?);
    let (free, unplugged, shared_bytes) = (input.u64()?, input.u64()?, input.u64()?);
    let shared = SharedSettings::that_came(shared_bytes, shared).map_err(|why| input.refuse(why))?;
    let entries = input.list::<kvm_cpuid_entry2>("entries of its processors", KVM_MAX_CPUID_ENTRIES)?;
    input.end()?;
    let settings =
        KvmSettings { memory, vcpus, region, region_at, pages_per_second, bytes, free, unplugged, shared, dirty_log };
    settings.validate().map_err(|error| GuestError::caused("the machine that came cannot be", error))?;
    let cpuid = CpuId::from_entries(&entries).map_err(|_| GuestError("too many entries of its processors".into()))?;
    Ok((settings, cpuid))
}

/// Refuses a CPUID with features that this host's processors lack.
pub(super) fn compare_processors(came: &CpuId) -> Result<(), GuestError> {
    /// The locations of feature bits: function, index, and which registers (eax, ebx, ecx, edx).
    const FEATURES: [(u32, u32, [bool; 4]); 4] = [
        (1, 0, [false, false, true, true]),
        (7, 0, [false, true, true, true]),
        (7, 1, [true, false, false, true]),
        (0x8000_0001, 0, [false, false, true, true]),
    ];
    let Ok(kvm) = Kvm::new() else { return Ok(()) };
    let here =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(|error| refused("what processors it has", error))?;
    let find = |cpuid: &CpuId, function, index| {
        let entry = cpuid.as_slice().iter().find(|entry| entry.function == function && entry.index == index);
        entry.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
    };
    for (function, index, registers) in FEATURES {
        let (came, here) = (find(came, function, index), find(&here, function, index));
        for register in (0..4).filter(|&register| registers[register]) {
            let missing = came[register] & !here[register];
            if missing != 0 {
                let name = ["eax", "ebx", "ecx", "edx"][register];
                return Err(GuestError(format!(
                    "the guest's processors have features that this host's lack: {missing:#010x} of {name} in CPUID \
                     {function:#x}.{index}"
                )));
            }
        }
    }
    Ok(())
}

/// The device state of a paused machine.
pub(super) fn save(machine: &Machine) -> Result<GuestState, GuestError> {
    let mut sections = machine.crew.visit(|index, vcpu| {
        let mut output = Output::default();
        vcpu::save(vcpu, &machine.kvm, &mut output)
            .map_err(|error| refused(&format!("the state of vCPU {index}"), error))?;
        Ok(output.section(&format!("vcpu {index}"), VERSION))
    })?;
    sections.push(save_board(machine)?);
    Ok(GuestState { sections })
}

/// Sets a paused machine to a saved state.
pub(super) fn load(machine: &Machine, state: &GuestState) -> Result<(), GuestError> {
    let [vcpus @ .., board] = &state.sections[..] else {
        return Err(GuestError("no sections of device state came".into()));
    };
    if vcpus.len() != machine.settings.vcpus as usize {
        let (came, here) = (vcpus.len(), machine.settings.vcpus);
        return Err(GuestError(format!("the state of {came} vCPUs came, the machine has {here}")));
    }
    // The controllers come first: a vCPU's local controller finds the ones it is connected to.
    load_board(machine, board)?;
    machine.crew.visit(|index, vcpu| {
        let mut input = Input::of(&vcpus[index as usize], &format!("vcpu {index}"), VERSION)?;
        vcpu::load(vcpu, &mut input).and_then(|()| input.end())
    })?;
    Ok(())
}

fn save_board(machine: &Machine) -> Result<StateSection, GuestError> {
    let mut output = Output::default();
    for chip_id in CHIPS {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        machine.vm.get_irqchip(&mut chip).map_err(|error| refused("the interrupt controller's state", error))?;
        output.put(&chip);
    }
    output.put(&machine.vm.get_pit2().map_err(|error| refused("the timer's state", error))?);
    let clock = machine.vm.get_clock().map_err(|error| refused("the clock's state", error))?;
    output.put(&kvm_clock_data { clock: clock.clock, flags: CLOCK_FLAGS, ..Default::default() });
    let (console, log) = (machine.devices.console().clone(), machine.devices.log().clone());
    output.bytes(&console.registers);
    output.list(&console.line);
    output.u64(log.heartbeats);
    output.u64(log.troubles);
    output.u32(log.ticks);
    output.list(&log.passes);
    output.list(&machine.ram.pages_in_use());
    Ok(output.section("board", VERSION))
}

fn load_board(machine: &Machine, section: &StateSection) -> Result<(), GuestError> {
    let mut input = Input::of(section, "board", VERSION)?;
    for chip_id in CHIPS {
        let chip: kvm_irqchip = input.take()?;
        if chip.chip_id != chip_id {
            return Err(input.refuse(format_args!("interrupt controller {} in the place of {chip_id}", chip.chip_id)));
        }
        machine.vm.set_irqchip(&chip).map_err(|error| refused("the interrupt controller's state", error))?;
    }
    let timer: kvm_pit_state2 = input.take()?;
    machine.vm.set_pit2(&timer).map_err(|error| refused("the timer's state", error))?;
    let clock: kvm_clock_data = input.take()?;
    let clock = kvm_clock_data { clock: clock.clock, flags: CLOCK_FLAGS, ..Default::default() };
    machine.vm.set_clock(&clock).map_err(|error| refused("the clock's state", error))?;
    let registers = input.take()?;
    let line = input.list("bytes of a line", MOST_LINE)?;
    let (heartbeats, troubles, ticks) = (input.u64()?, input.u64()?, input.u32()?);
    let vcpus = machine.settings.vcpus as usize;
    let passes = input.list("passes", vcpus)?;
    if passes.len() != vcpus {
        return Err(input.refuse(format_args!("{} passes of {vcpus} vCPUs", passes.len())));
    }
    let words = machine.ram.pages_in_use().len();
    let in_use = input.list::<u64>("words of pages in use", words)?;
    if in_use.len() != words {
        return Err(input.refuse(format_args!("{} words of pages in use, {words} belong here", in_use.len())));
    }
    input.end()?;
    machine.ram.set_pages_in_use(&in_use);
    *machine.devices.console() = Console { registers, line };
    let first_trouble = (troubles > 0).then(|| "before it came here".into());
    *machine.devices.log() = Log { heartbeats, passes, ticks, troubles, first_trouble };
    Ok(())
}
