//! The dirty rings of a machine's vCPUs, mapped from their descriptors.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use super::ring::{Entry, Reading};
use super::{
    CAP_DIRTY_LOG_RING_ACQ_REL, KVM_PAGE_BYTES, LogCalls, Plain, RESET_DIRTY_RINGS, RingCalls, VmMemory, extension,
};

/// The offset of a vCPU's ring in its descriptor.
const RING_OFFSET: u64 = 64 * KVM_PAGE_BYTES;

/// Dirty rings of a machine: what its vCPUs write, in the order in which they do.
#[derive(Debug)]
pub struct VmRings {
    memory: Arc<VmMemory>,
    entries: u32,
    rings: Mutex<Vec<Ring>>,
}

/// The ring of a vCPU.
#[derive(Debug)]
struct Ring {
    start: NonNull<Entry>,
    entries: usize,
    reading: Reading,
    /// Its mapping is the vCPU's.
    _vcpu: OwnedFd,
}

// SAFETY: the mapping is not tied to a thread, and lives as long as the value.
unsafe impl Send for Ring {}

impl VmRings {
    /// Gives every vCPU of a machine a ring of at most `entries` entries, a power of two; before there are any vCPUs.
    ///
    /// # Errors
    /// When KVM has no rings (Linux 5.18 or later has them), or there are vCPUs already.
    ///
    /// # Panics
    /// If `entries` is no power of two.
    pub fn new(memory: Arc<VmMemory>, entries: u32) -> io::Result<Arc<Self>> {
        assert!(entries.is_power_of_two(), "{entries} entries");
        let most = extension(memory.descriptor.as_fd(), CAP_DIRTY_LOG_RING_ACQ_REL)?;
        let most = u32::try_from(most).unwrap_or(0) / u32::try_from(size_of::<Entry>()).expect("small");
        if most == 0 {
            return Err(io::Error::other("KVM has no dirty rings: Linux 5.18 or later has them"));
        }
        let entries = entries.min(most);
        memory.enable(CAP_DIRTY_LOG_RING_ACQ_REL, u64::from(entries) * size_of::<Entry>() as u64)?;
        Ok(Arc::new(Self { memory, entries, rings: Mutex::default() }))
    }

    /// Maps the ring of a vCPU of this machine.
    ///
    /// # Errors
    /// When the descriptor has no ring.
    pub fn add(&self, vcpu: OwnedFd) -> io::Result<()> {
        let length = self.entries as usize * size_of::<Entry>();
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address that the kernel chooses touches no other memory.
        let start = unsafe { rustix::mm::mmap(null_mut(), length, access, MapFlags::SHARED, &vcpu, RING_OFFSET) }?;
        let start = NonNull::new(start.cast()).expect("the kernel maps nothing at 0");
        let entries = self.entries as usize;
        self.rings().push(Ring { start, entries, reading: Reading::default(), _vcpu: vcpu });
        Ok(())
    }

    fn rings(&self) -> MutexGuard<'_, Vec<Ring>> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RingCalls for VmRings {
    fn set_logging(&self, slot: u32, on: bool) -> io::Result<()> {
        self.memory.set_logging(slot, on)
    }

    fn count(&self) -> usize {
        self.rings().len()
    }

    fn harvest(&self, ring: usize, is_full: bool, found: &mut dyn FnMut(u32, u64)) -> usize {
        let mut rings = self.rings();
        let (mapped, reading) = rings[ring].parts();
        reading.harvest(mapped, is_full, found)
    }

    fn reset(&self, ring: usize) -> io::Result<bool> {
        let mut rings = self.rings();
        let (mapped, reading) = rings[ring].parts();
        reading.reset(mapped, || {
            // SAFETY: KVM_RESET_DIRTY_RINGS takes nothing.
            match unsafe { rustix::ioctl::ioctl(&self.memory.descriptor, Plain::<RESET_DIRTY_RINGS>(0)) } {
                Ok(count) => Ok(usize::try_from(count).unwrap_or(0)),
                Err(Errno::INTR) => Ok(0),
                Err(error) => Err(error.into()),
            }
        })
    }
}

impl Ring {
    /// Its entries, and the position at which they are read.
    fn parts(&mut self) -> (&[Entry], &mut Reading) {
        // SAFETY: the ring was mapped for this many entries; the kernel shares them by atomic accesses.
        let mapped = unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.entries) };
        (mapped, &mut self.reading)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let length = self.entries * size_of::<Entry>();
        // SAFETY: the mapping was made for this length, and nothing can use it afterwards.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), length) };
        debug_assert!(unmapped.is_ok(), "a mapping of ours is unmapped");
    }
}
