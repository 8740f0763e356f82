//! The logs over KVM itself: a machine whose one vCPU stores on command. Skipped where there is no KVM.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, kvm_regs};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use super::tests::{memory, slots};
use super::*;
use crate::dirty_log::conformance::{Subject, Writer, check};
use crate::dirty_log::{DirtyLog, SoftwareLog};
use crate::kvm::{VmMemory, VmRings};
use crate::memory::MappedMemory;

/// `rep movsb` with 32-bit addresses, `out 0x10, al`, and back to the start.
const PROGRAM: [u8; 7] = [0x67, 0xf3, 0xa4, 0xe6, 0x10, 0xeb, 0xf9];
/// Where the bytes to be stored lie, in the page of the program.
const COMMAND: usize = 0x800;
/// No RAM block: the program's own page, in a slot that no log follows.
const OWN: u32 = 100;

/// A machine that stores on command. The fields are dropped in this order.
struct Machine {
    vcpu: Mutex<VcpuFd>,
    _vm: VmFd,
    own: Arc<MappedMemory>,
    slots: Vec<Slot>,
    blocks: Vec<Arc<MappedMemory>>,
    rings: Option<Arc<KvmRingLog>>,
    devices: Arc<SoftwareLog>,
}

fn duplicate(descriptor: &impl AsRawFd) -> OwnedFd {
    // SAFETY: the descriptor is open while its owner is borrowed.
    unsafe { BorrowedFd::borrow_raw(descriptor.as_raw_fd()) }.try_clone_to_owned().unwrap()
}

/// A machine under the dirty log or, with `rings`, the dirty ring.
fn machine(kvm: &Kvm, rings: bool) -> Subject {
    let vm = kvm.create_vm().unwrap();
    let (slots, (blocks, memory)) = (slots(4096), memory(4096));
    let own = Arc::new(MappedMemory::anonymous(8192).unwrap());
    own.store(0, &PROGRAM);
    let own_slot = Slot { number: OWN, block: 0, offset: 0, length: 8192, guest_address: 0 };
    let followed = slots.iter().map(|slot| (slot.clone(), blocks[slot.block as usize].clone()));
    let all = followed.chain([(own_slot, own.clone())]).collect();
    let vm_memory = VmMemory::new(duplicate(&vm), all).unwrap();
    let vm_rings = rings.then(|| VmRings::new(vm_memory.clone(), 1024).unwrap());
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    for segment in [&mut sregs.ds, &mut sregs.es] {
        segment.limit = u32::MAX;
        segment.g = 1;
    }
    vcpu.set_sregs(&sregs).unwrap();
    let devices = Arc::new(SoftwareLog::new(memory.layout()));
    let ring_log = vm_rings.as_ref().map(|rings| {
        rings.add(duplicate(&vcpu)).unwrap();
        Arc::new(KvmRingLog::new(rings.clone(), slots.clone(), memory.layout()))
    });
    let log: Arc<dyn DirtyLog> = match &ring_log {
        Some(log) => log.clone(),
        None => Arc::new(KvmLog::new(vm_memory, slots.clone(), memory.layout())),
    };
    let logs = vec![log, devices.clone()];
    let writer = Machine { vcpu: Mutex::new(vcpu), _vm: vm, own, slots, blocks, rings: ring_log, devices };
    Subject { memory, logs, writer: Arc::new(writer) }
}

impl Writer for Machine {
    fn store(&self, block: u32, offset: usize, bytes: &[u8]) {
        let at = offset as u64;
        let holds = |slot: &&Slot| slot.block == block && (slot.offset..slot.offset + slot.length).contains(&at);
        let slot = self.slots.iter().find(holds).unwrap();
        let mut vcpu = self.vcpu.lock().unwrap();
        self.own.store(COMMAND, bytes);
        let rdi = slot.guest_address + at - slot.offset;
        let regs = kvm_regs { rsi: COMMAND as u64, rdi, rcx: bytes.len() as u64, rflags: 2, ..Default::default() };
        vcpu.set_regs(&regs).unwrap();
        let mut in_vain = 0;
        loop {
            match vcpu.run().unwrap() {
                VcpuExit::IoOut(0x10, _) => break,
                VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => {
                    let made_room = self.rings.as_ref().unwrap().make_room(0).unwrap();
                    // A sync may just have emptied it.
                    in_vain = if made_room { 0 } else { in_vain + 1 };
                    assert!(in_vain < 100, "a full ring has entries");
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn store_unseen(&self, block: u32, offset: usize, bytes: &[u8]) -> bool {
        self.blocks[block as usize].store(offset, bytes);
        true
    }

    fn punch(&self, block: u32, pages: std::ops::Range<u64>) -> bool {
        let bytes = |pages: u64| usize::try_from(pages * 4096).unwrap();
        self.blocks[block as usize].give_back(bytes(pages.start), bytes(pages.end - pages.start)).unwrap();
        self.devices.mark(block, pages);
        true
    }
}

/// KVM, if it is present and supports what a test needs.
fn kvm(needs: fn(crate::kvm::Offers) -> bool) -> Option<Kvm> {
    let offers = crate::kvm::offers();
    match offers {
        Ok(offers) if needs(offers) => Some(Kvm::new().unwrap()),
        Ok(offers) => {
            println!("skipped: KVM offers {offers:?}");
            None
        }
        Err(error) => {
            println!("skipped: /dev/kvm: {error}");
            None
        }
    }
}

#[test]
fn the_dirty_log_misses_nothing_of_a_machine() {
    let Some(kvm) = kvm(|offers| offers.manual_protect.is_some()) else { return };
    check(&|| machine(&kvm, false)).unwrap();
}

#[test]
fn the_dirty_ring_misses_nothing_of_a_machine() {
    let Some(kvm) = kvm(|offers| offers.ring_entries > 0) else { return };
    check(&|| machine(&kvm, true)).unwrap();
}

#[test]
fn what_is_no_machine_is_refused() {
    let file = File::open("/dev/null").unwrap();
    assert!(VmMemory::new(file.as_fd().try_clone_to_owned().unwrap(), Vec::new()).is_err());
}
