//! The state of a machine that travels besides its memory, as sections of guest state: "machine" in setup, and "vcpu 0",
//! "vcpu 1", … and "board" of the devices, all of one version. The kernel's structs in them (linux/kvm.h, x86-64) travel
//! as their bytes, which kvm-bindings makes of them: their layout never changes.
//!
//! A peer may have made these bytes up: lengths are checked before anything is built from them, values are checked by
//! the kernel when they are set, and invalid bytes are an error. They can put a vCPU into any state, in which it
//! reaches nothing but its own machine.

mod vcpu;

use std::path::Path;

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, kvm_clock_data,
    kvm_cpuid_entry2, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use self::vcpu::VcpuState;
use super::console::{Console, MOST_LINE};
use super::devices::Log;
use super::machine::{Machine, refused};
use crate::kvm::settings::{KvmLogChoice, KvmSettings};
use crate::shared::SharedSettings;
use crate::state::{encoded, only_section, section, value_of};
use memferry::guest::{GuestError, GuestState, StateSection};

const VERSION: u32 = 3;
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
/// The most bytes of a section, without the pages of free memory in use.
const MOST_BYTES: usize = 32 << 10;

/// The settings of a machine, and its processors: what a destination needs to build it.
#[derive(Deserialize, Serialize)]
struct Setup {
    memory: u64,
    vcpus: u32,
    region: u64,
    region_at: u64,
    bytes: u64,
    pages_per_second: f64,
    free: u64,
    unplugged: u64,
    /// 0 if there is no shared block.
    shared_bytes: u64,
    cpuid: Vec<kvm_cpuid_entry2>,
}

/// The devices outside the vCPUs, and what the guest has reported.
#[derive(Deserialize, Serialize)]
struct Board {
    /// Those of [`CHIPS`].
    chips: [kvm_irqchip; 3],
    timer: kvm_pit_state2,
    /// In ns. The flags of the clock are those of measurements against the host's, which mean nothing on another host.
    clock: u64,
    registers: [u8; 8],
    line: Vec<u8>,
    heartbeats: u64,
    troubles: u64,
    ticks: u32,
    /// One for each vCPU.
    passes: Vec<u32>,
    /// The pages of free memory in use, as words of a bitmap.
    in_use: Vec<u64>,
}

/// The state that a destination needs to build the machine.
pub(super) fn save_setup(machine: &Machine) -> GuestState {
    let KvmSettings { memory, vcpus, region, region_at, pages_per_second, bytes, free, unplugged, .. } =
        machine.settings;
    let shared_bytes = SharedSettings::bytes_of(machine.settings.shared.as_ref());
    let cpuid = machine.cpuid.as_slice().to_vec();
    let setup =
        Setup { memory, vcpus, region, region_at, bytes, pages_per_second, free, unplugged, shared_bytes, cpuid };
    GuestState { sections: vec![section("machine", VERSION, encoded(&setup))] }
}

/// The settings of the machine that arrives, checked. The destination chooses how its writes are found at this end, and
/// the file of its shared block.
pub(super) fn load_setup(
    state: &GuestState,
    dirty_log: KvmLogChoice,
    shared: Option<&Path>,
) -> Result<(KvmSettings, CpuId), GuestError> {
    let Setup { memory, vcpus, region, region_at, bytes, pages_per_second, free, unplugged, shared_bytes, cpuid } =
        value_of(only_section(state, "a KVM machine")?, "machine", VERSION, MOST_BYTES)?;
    let shared = SharedSettings::that_came(shared_bytes, shared).map_err(GuestError)?;
    let settings =
        KvmSettings { memory, vcpus, region, region_at, pages_per_second, bytes, free, unplugged, shared, dirty_log };
    settings.validate().map_err(|error| GuestError::caused("the machine that came cannot be", error))?;
    let cpuid = CpuId::from_entries(&cpuid).map_err(|_| GuestError("too many entries of its processors".into()))?;
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
        let state =
            VcpuState::of(vcpu, &machine.kvm).map_err(|error| refused(&format!("the state of vCPU {index}"), error))?;
        Ok(section(&vcpu_name(index), VERSION, encoded(&state)))
    })?;
    sections.push(section("board", VERSION, encoded(&Board::of(machine)?)));
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
    Board::came(board, machine)?.set(machine)?;
    machine.crew.visit(|index, vcpu| {
        let state: VcpuState = value_of(&vcpus[index as usize], &vcpu_name(index), VERSION, MOST_BYTES)?;
        state.set(vcpu)
    })?;
    Ok(())
}

fn vcpu_name(index: u32) -> String {
    format!("vcpu {index}")
}

impl Board {
    fn of(machine: &Machine) -> Result<Self, GuestError> {
        let mut chips = CHIPS.map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
        for chip in &mut chips {
            machine.vm.get_irqchip(chip).map_err(|error| refused("the interrupt controller's state", error))?;
        }
        let timer = machine.vm.get_pit2().map_err(|error| refused("the timer's state", error))?;
        let clock = machine.vm.get_clock().map_err(|error| refused("the clock's state", error))?.clock;
        let Console { registers, line } = machine.devices.console().clone();
        let Log { heartbeats, troubles, ticks, passes, .. } = machine.devices.log().clone();
        let in_use = machine.ram.pages_in_use();
        Ok(Self { chips, timer, clock, registers, line, heartbeats, troubles, ticks, passes, in_use })
    }

    /// Decodes it from a section, for this machine.
    fn came(section: &StateSection, machine: &Machine) -> Result<Self, GuestError> {
        /// The most bytes of a word.
        const WORD_BYTES: usize = 10;
        let (vcpus, words) = (machine.settings.vcpus as usize, machine.ram.pages_in_use().len());
        let board: Self = value_of(section, "board", VERSION, MOST_BYTES + words * WORD_BYTES)?;
        let refuse = |why: String| Err(GuestError(format!("the state \"board\" does not fit: {why}")));
        let chips = board.chips.each_ref().map(|chip| chip.chip_id);
        if chips != CHIPS {
            return refuse(format!("the interrupt controllers {chips:?} came, {CHIPS:?} belong here"));
        }
        for (what, came, here) in [("passes", board.passes.len(), vcpus), ("words", board.in_use.len(), words)] {
            if came != here {
                return refuse(format!("{came} {what} came, {here} belong here"));
            }
        }
        if board.line.len() > MOST_LINE {
            return refuse(format!("a line of {} bytes came, at most {MOST_LINE} can be", board.line.len()));
        }
        Ok(board)
    }

    fn set(self, machine: &Machine) -> Result<(), GuestError> {
        for chip in &self.chips {
            machine.vm.set_irqchip(chip).map_err(|error| refused("the interrupt controller's state", error))?;
        }
        machine.vm.set_pit2(&self.timer).map_err(|error| refused("the timer's state", error))?;
        let clock = kvm_clock_data { clock: self.clock, ..Default::default() };
        machine.vm.set_clock(&clock).map_err(|error| refused("the clock's state", error))?;
        machine.ram.set_pages_in_use(&self.in_use);
        let Self { registers, line, heartbeats, troubles, ticks, passes, .. } = self;
        *machine.devices.console() = Console { registers, line };
        let first_trouble = (troubles > 0).then(|| "before it came here".into());
        *machine.devices.log() = Log { heartbeats, passes, ticks, troubles, first_trouble };
        Ok(())
    }
}

#[cfg(test)]
mod tests;
