//! The kernel's interface to a KVM machine's memory: its slots, their dirty log, and its vCPUs' dirty rings.
//!
//! A VMM makes the machine and its vCPUs with whatever crate it likes and hands the machine's descriptor over; from then
//! on the slots are set here, so that logging can be switched on and off for them. The logs over this are in
//! [`dirty_log::kvm`](crate::dirty_log::kvm), which knows no ioctl.
//!
//! `unsafe` is needed because the kernel is given addresses and shares the rings; the structs are those of linux/kvm.h.

mod calls;
mod ring;
mod rings;

use std::ffi::c_void;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, opcode};

use self::ring::Entry;
use crate::kernel::Call;
use crate::memory::MappedMemory;

pub use self::calls::{LogCalls, RingCalls};
pub use self::rings::VmRings;

/// Bytes of a page as KVM's logs count them.
pub const KVM_PAGE_BYTES: u64 = 4096;

const KVM: u8 = 0xae;
const CREATE_VM: Opcode = opcode::none(KVM, 0x01);
const CHECK_EXTENSION: Opcode = opcode::none(KVM, 0x03);
const GET_DIRTY_LOG: Opcode = opcode::write::<DirtyLogArg>(KVM, 0x42);
const SET_USER_MEMORY_REGION: Opcode = opcode::write::<RegionArg>(KVM, 0x46);
const ENABLE_CAP: Opcode = opcode::write::<CapArg>(KVM, 0xa3);
const CLEAR_DIRTY_LOG: Opcode = opcode::read_write::<ClearArg>(KVM, 0xc0);
const RESET_DIRTY_RINGS: Opcode = opcode::none(KVM, 0xc7);

const CAP_USER_MEMORY: usize = 3;
const CAP_MANUAL_DIRTY_LOG_PROTECT2: usize = 168;
const CAP_DIRTY_LOG_RING_ACQ_REL: usize = 223;
const MANUAL_PROTECT: u64 = 1;
const INITIALLY_SET: u64 = 2;
const LOG_DIRTY_PAGES: u32 = 1;

#[repr(C)]
struct RegionArg {
    slot: u32,
    flags: u32,
    guest_address: u64,
    length: u64,
    address: u64,
}

#[repr(C)]
struct DirtyLogArg {
    slot: u32,
    padding: u32,
    bitmap: u64,
}

#[repr(C)]
struct ClearArg {
    slot: u32,
    pages: u32,
    first_page: u64,
    bitmap: u64,
}

#[repr(C)]
struct CapArg {
    cap: u32,
    flags: u32,
    args: [u64; 4],
    padding: [u8; 64],
}

/// An ioctl that takes a number, or nothing, and returns a number.
struct Plain<const OPCODE: Opcode>(usize);

// SAFETY: no pointer is passed; whoever makes a `Plain` sees to it that the opcode takes a number.
unsafe impl<const OPCODE: Opcode> Ioctl for Plain<OPCODE> {
    type Output = i32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        OPCODE
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.0)
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<i32> {
        Ok(output)
    }
}

/// A machine's memory slot: which part of a RAM block stands where in its physical memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Its number, unique in the machine; below 2^16.
    pub number: u32,
    /// Index of the RAM block.
    pub block: u32,
    /// Where in the block it begins, in bytes: on an extent.
    pub offset: u64,
    /// Its bytes: whole pages of 4 KiB, the last of which the block may fill in part.
    pub length: u64,
    /// Where the guest sees it.
    pub guest_address: u64,
}

impl Slot {
    /// How many pages of 4 KiB it has.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.length / KVM_PAGE_BYTES
    }
}

/// A KVM machine, seen from its memory. Dropping it takes the slots out of the machine: whatever of it still lives then
/// has no memory.
#[derive(Debug)]
pub struct VmMemory {
    descriptor: OwnedFd,
    slots: Vec<(Slot, Arc<MappedMemory>)>,
}

impl VmMemory {
    /// Sets the slots, each over its part of a block's memory.
    ///
    /// # Errors
    /// When the descriptor is no machine's, or the kernel refuses a slot.
    ///
    /// # Panics
    /// If a slot reaches beyond its memory.
    pub fn new(descriptor: OwnedFd, slots: Vec<(Slot, Arc<MappedMemory>)>) -> io::Result<Arc<Self>> {
        if extension(descriptor.as_fd(), CAP_USER_MEMORY)? <= 0 {
            return Err(io::Error::other("the descriptor is no KVM machine's"));
        }
        let mut this = Self { descriptor, slots: Vec::new() };
        for (slot, memory) in slots {
            let room = (memory.len() as u64).next_multiple_of(rustix::param::page_size() as u64);
            let end = slot.offset.checked_add(slot.length);
            assert!(end.is_some_and(|end| end <= room), "{slot:?} in memory of {} bytes", memory.len());
            this.set(&slot, &memory, 0, slot.length)?;
            this.slots.push((slot, memory));
        }
        Ok(Arc::new(this))
    }

    /// The slots, as they were given.
    pub fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter().map(|(slot, _)| slot)
    }

    fn set(&self, slot: &Slot, memory: &MappedMemory, flags: u32, length: u64) -> io::Result<()> {
        let offset = usize::try_from(slot.offset).expect("checked against the memory");
        let address = memory.as_ptr().wrapping_add(offset).expose_provenance() as u64;
        let mut arg = RegionArg { slot: slot.number, flags, guest_address: slot.guest_address, length, address };
        // SAFETY: KVM_SET_USER_MEMORY_REGION takes a RegionArg. The guest gets at memory that is kept alive until the slot
        // is taken out, and to which no Rust reference exists.
        unsafe { rustix::ioctl::ioctl(&self.descriptor, Call::<SET_USER_MEMORY_REGION, _>(&mut arg)) }?;
        Ok(())
    }

    fn enable(&self, cap: usize, argument: u64) -> io::Result<()> {
        let cap = u32::try_from(cap).expect("a small number");
        let mut arg = CapArg { cap, flags: 0, args: [argument, 0, 0, 0], padding: [0; 64] };
        // SAFETY: KVM_ENABLE_CAP takes a CapArg.
        unsafe { rustix::ioctl::ioctl(&self.descriptor, Call::<ENABLE_CAP, _>(&mut arg)) }?;
        Ok(())
    }
}

impl Drop for VmMemory {
    fn drop(&mut self) {
        for (slot, memory) in std::mem::take(&mut self.slots) {
            if self.set(&slot, &memory, 0, 0).is_err() {
                // The guest may still get at it.
                std::mem::forget(memory);
            }
        }
    }
}

impl LogCalls for VmMemory {
    fn manual_protect(&self) -> io::Result<bool> {
        let modes = u64::try_from(extension(self.descriptor.as_fd(), CAP_MANUAL_DIRTY_LOG_PROTECT2)?).unwrap_or(0);
        if modes & MANUAL_PROTECT == 0 {
            return Err(io::Error::other("KVM has no manual dirty log protection: Linux 5.2 or later has it"));
        }
        self.enable(CAP_MANUAL_DIRTY_LOG_PROTECT2, modes & (MANUAL_PROTECT | INITIALLY_SET))?;
        Ok(modes & INITIALLY_SET != 0)
    }

    fn set_logging(&self, slot: u32, on: bool) -> io::Result<()> {
        let found = self.slots.iter().find(|(own, _)| own.number == slot);
        let (slot, memory) = found.unwrap_or_else(|| panic!("there is no slot {slot}"));
        self.set(slot, memory, if on { LOG_DIRTY_PAGES } else { 0 }, slot.length)
    }

    fn fetch(&self, slot: u32, into: &mut [u64]) -> io::Result<()> {
        self.check_bits(slot, into.len());
        let mut arg = DirtyLogArg { slot, padding: 0, bitmap: into.as_mut_ptr().expose_provenance() as u64 };
        // SAFETY: KVM_GET_DIRTY_LOG takes a DirtyLogArg; it fills a word for each 64 pages of the slot, as many as there are.
        unsafe { rustix::ioctl::ioctl(&self.descriptor, Call::<GET_DIRTY_LOG, _>(&mut arg)) }?;
        Ok(())
    }

    fn clear(&self, slot: u32, first_page: u64, pages: u32, bits: &[u64]) -> io::Result<()> {
        assert!(bits.len() as u64 * 64 >= u64::from(pages), "a bit for each of {pages} pages");
        let mut arg = ClearArg { slot, pages, first_page, bitmap: bits.as_ptr().expose_provenance() as u64 };
        // SAFETY: KVM_CLEAR_DIRTY_LOG takes a ClearArg; it reads a bit for each of the pages.
        unsafe { rustix::ioctl::ioctl(&self.descriptor, Call::<CLEAR_DIRTY_LOG, _>(&mut arg)) }?;
        Ok(())
    }
}

impl VmMemory {
    /// The kernel fills a whole slot's bits: are there so many words?
    fn check_bits(&self, slot: u32, words: usize) {
        let pages = self.slots().find(|own| own.number == slot).map_or(0, Slot::pages);
        let needed = pages.div_ceil(64);
        assert!(needed > 0 && words as u64 >= needed, "{words} words for the {pages} pages of slot {slot}");
    }
}

/// Asks a machine, or KVM itself, for a capability: 0 is no.
fn extension(descriptor: BorrowedFd<'_>, capability: usize) -> io::Result<i32> {
    // SAFETY: KVM_CHECK_EXTENSION takes a number.
    Ok(unsafe { rustix::ioctl::ioctl(descriptor, Plain::<CHECK_EXTENSION>(capability)) }?)
}

// ---- what there is ----

/// What KVM offers a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Offers {
    /// Manual protection of the dirty log; is everything set at the start?
    pub(crate) manual_protect: Option<bool>,
    /// The most entries of a dirty ring; 0 is no ring.
    pub(crate) ring_entries: u32,
}

/// Opens KVM, makes a machine and asks what it can do.
pub(crate) fn offers() -> io::Result<Offers> {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
    // SAFETY: KVM_CREATE_VM takes a number; it returns a fresh descriptor, which is nobody else's.
    let machine = unsafe {
        let number = rustix::ioctl::ioctl(&kvm, Plain::<CREATE_VM>(0))?;
        OwnedFd::from_raw_fd(number)
    };
    let modes = u64::try_from(extension(machine.as_fd(), CAP_MANUAL_DIRTY_LOG_PROTECT2)?).unwrap_or(0);
    let ring_bytes = u32::try_from(extension(machine.as_fd(), CAP_DIRTY_LOG_RING_ACQ_REL)?).unwrap_or(0);
    Ok(Offers {
        manual_protect: (modes & MANUAL_PROTECT != 0).then_some(modes & INITIALLY_SET != 0),
        ring_entries: ring_bytes / u32::try_from(size_of::<Entry>()).expect("small"),
    })
}
