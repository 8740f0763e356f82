//! The machine: created with KVM from its settings, and set to the start of its program or to a saved state.

use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, KVM_PIT_SPEAKER_DUMMY, kvm_mp_state, kvm_pit_config, kvm_regs,
    kvm_segment, kvm_sregs,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use memferry_stages::dirty_log::{DirtyLog, HashLog, KvmLog, KvmRingLog, UserfaultLog};
use memferry_stages::kvm::{Slot, VmMemory, VmRings};

use super::crew::Crew;
use super::descriptor::duplicate;
use super::devices::Devices;
use super::ram::{self, Ram};
use crate::kvm::settings::{KvmLogChoice, KvmSettings, PAGE_BYTES};
use memferry::guest::GuestError;

/// Entries of each vCPU's dirty ring, of 16 bytes. If KVM emulates many stores in a row, a small ring would often
/// overflow.
const RING_ENTRIES: u32 = 16384;
/// Where KVM on Intel processors may place three pages of its own: in the hole.
const KVM_OWN_PAGES: usize = 0xfffb_d000;

/// A machine. Its vCPUs are paused until the crew is started and resumed. The fields are dropped in this order.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) crew: Crew,
    pub(super) vm: VmFd,
    pub(super) kvm: Kvm,
    vm_memory: Arc<VmMemory>,
    rings: Option<Arc<KvmRingLog>>,
    pub(super) devices: Arc<Devices>,
    pub(super) ram: Arc<Ram>,
    pub(super) settings: KvmSettings,
    /// The CPUID of the guest, without the numbers of its processors.
    pub(super) cpuid: CpuId,
}

impl Machine {
    /// Creates a machine whose memory reads as zeros. Its processors have the CPUID `cpuid`, or all that this host
    /// supports if it is not given.
    pub(super) fn new(settings: KvmSettings, cpuid: Option<CpuId>) -> Result<Self, GuestError> {
        settings.validate()?;
        // A machine with a given CPUID receives its memory too.
        let is_destination = cpuid.is_some();
        let kvm = Kvm::new().map_err(|_| no_kvm())?;
        let cpuid = match cpuid {
            Some(cpuid) => cpuid,
            None => kvm
                .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
                .map_err(|error| refused("what processors it has", error))?,
        };
        let ram = Arc::new(Ram::new(&settings, is_destination)?);
        let vm = make_vm(&kvm)?;
        let failed = |what: &'static str| move |error: std::io::Error| GuestError::caused(what, error);
        let descriptor = duplicate(&vm).map_err(failed("the machine's descriptor"))?;
        let vm_memory = VmMemory::new(descriptor, ram.slots()).map_err(failed("the machine's memory"))?;
        let rings = (settings.dirty_log == KvmLogChoice::DirtyRing)
            .then(|| VmRings::new(vm_memory.clone(), RING_ENTRIES))
            .transpose()
            .map_err(|error| GuestError(format!("{error}; or take dirty_log = \"dirty-log\"")))?;
        let mut vcpus = Vec::new();
        for index in 0..settings.vcpus {
            let vcpu = vm.create_vcpu(index.into()).map_err(|error| refused(&format!("vCPU {index}"), error))?;
            vcpu.set_cpuid2(&numbered(&cpuid, index)).map_err(|error| refused("these processors", error))?;
            if let Some(rings) = &rings {
                duplicate(&vcpu).and_then(|vcpu| rings.add(vcpu)).map_err(failed("a vCPU's dirty ring"))?;
            }
            vcpus.push(vcpu);
        }
        let devices = Arc::new(Devices::new(ram.clone(), settings.vcpus));
        let rings = rings.map(|rings| Arc::new(KvmRingLog::new(rings, slots(&ram), ram.memory.layout())));
        let crew = Crew::new(vcpus, devices.clone(), rings.clone(), settings.pages_per_second);
        Ok(Self { crew, vm, kvm, vm_memory, rings, devices, ram, settings, cpuid })
    }

    /// Loads the program, and sets every vCPU to its first instruction.
    pub(super) fn begin(&self) -> Result<(), GuestError> {
        self.ram.fill(&self.settings);
        self.crew.visit(|index, vcpu| {
            let begun = begin(vcpu, &self.settings, index);
            begun.map_err(|error| refused(&format!("the registers of vCPU {index}"), error))
        })?;
        Ok(())
    }

    /// The logs that together see every write to the memory.
    pub(super) fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError> {
        let layout = self.ram.memory.layout();
        let log: Arc<dyn DirtyLog> = match (self.settings.dirty_log, &self.rings) {
            (KvmLogChoice::DirtyRing, Some(rings)) => rings.clone(),
            (KvmLogChoice::DirtyRing | KvmLogChoice::DirtyLog, _) => {
                Arc::new(KvmLog::new(self.vm_memory.clone(), slots(&self.ram), layout))
            }
            (KvmLogChoice::Userfault, _) => {
                UserfaultLog::supported().map_err(|why| {
                    GuestError(format!("the userfault log cannot be used: {why}; or take dirty_log = \"dirty-log\""))
                })?;
                Arc::new(UserfaultLog::new(layout, self.ram.own_blocks()))
            }
            (KvmLogChoice::Hash, _) => Arc::new(HashLog::new(self.ram.memory.clone())),
        };
        Ok(vec![log, self.ram.host_writes.clone()])
    }
}

fn slots(ram: &Ram) -> Vec<Slot> {
    ram.slots().into_iter().map(|(slot, _)| slot).collect()
}

/// A machine with interrupt controllers and timer.
fn make_vm(kvm: &Kvm) -> Result<VmFd, GuestError> {
    let vm = kvm.create_vm().map_err(|error| refused("a machine", error))?;
    vm.set_tss_address(KVM_OWN_PAGES).map_err(|error| refused("room for its own pages", error))?;
    vm.create_irq_chip().map_err(|error| refused("an interrupt controller", error))?;
    let timer = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(timer).map_err(|error| refused("a timer", error))?;
    Ok(vm)
}

/// The CPUID for one of the processors: it contains the processor's number.
fn numbered(cpuid: &CpuId, index: u32) -> CpuId {
    let mut cpuid = cpuid.clone();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => entry.ebx = entry.ebx & 0x00ff_ffff | index << 24,
            0xb | 0x1f => entry.edx = index,
            _ => {}
        }
    }
    cpuid
}

/// 64-bit mode at the program's first instruction.
fn begin(vcpu: &VcpuFd, settings: &KvmSettings, index: u32) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    long_mode(&mut sregs);
    vcpu.set_sregs(&sregs)?;
    let (part, free) = (ram::part(settings, index), ram::free_part(settings, index));
    vcpu.set_regs(&kvm_regs {
        rip: ram::PROGRAM,
        rsp: ram::stack(index),
        rflags: 2,
        r12: settings.region_at + part.start * PAGE_BYTES,
        rsi: settings.region_at + part.end * PAGE_BYTES,
        r13: part.start,
        r14: free.start,
        r15: free.end,
        r9: settings.bytes,
        r10: index.into(),
        ..Default::default()
    })?;
    // Without this, all but the first would wait for the first to start them.
    vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })
}

fn long_mode(sregs: &mut kvm_sregs) {
    const CR0_PROTECTED_PAGED: u64 = 1 << 31 | 1 << 16 | 1 << 5 | 1 << 4 | 1 << 1 | 1;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LONG_MODE: u64 = 1 << 10 | 1 << 8;
    let segment = |selector, kind, long: bool| kvm_segment {
        selector,
        type_: kind,
        limit: u32::MAX,
        present: 1,
        s: 1,
        g: 1,
        l: u8::from(long),
        db: u8::from(!long),
        ..Default::default()
    };
    sregs.cs = segment(ram::CODE_SELECTOR, 0xb, true);
    let data = segment(ram::DATA_SELECTOR, 3, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.gdt.base, sregs.gdt.limit) = (ram::GDT, ram::GDT_BYTES - 1);
    (sregs.idt.base, sregs.idt.limit) = (ram::IDT, ram::IDT_BYTES - 1);
    (sregs.cr0, sregs.cr3, sregs.cr4) = (CR0_PROTECTED_PAGED, ram::TABLES, CR4_PAE);
    sregs.efer = EFER_LONG_MODE;
}

fn no_kvm() -> GuestError {
    let why = memferry_stages::host::kvm().err().unwrap_or_else(|| "it opens, and does not answer".into());
    GuestError(format!("a KVM guest needs /dev/kvm: {why}"))
}

pub(super) fn refused(what: &str, error: kvm_ioctls::Error) -> GuestError {
    GuestError::caused(format_args!("KVM refuses {what}"), error)
}
