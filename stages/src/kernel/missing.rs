//! A userfaultfd for missing faults: a thread that touches a page that is not there waits until it is placed.
//!
//! It sees the faults of the kernel too (a `read` into guest memory, a vCPU), which needs a privilege. A descriptor for faults of
//! user mode alone would let such calls fail, so it is not used.
//!
//! The descriptor may come from another process. Then addresses are those of its owner, and only the bytes to place lie here.

use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::without_provenance_mut;

use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, opcode};
use rustix::mm::UserfaultfdFlags;

use super::{Call, REGISTER, RangeArg, RegisterArg, USER_MODE_ONLY, Userfaultfd, address};

const EVENT_REMOVE: u64 = 1 << 3;
const MISSING_SHARED: u64 = 1 << 5;

const REGISTER_MODE_MISSING: u64 = 1;
/// The operations that a registered range must offer, as a mask of their numbers. Memory in reserved huge pages has no ZEROPAGE.
const NEEDED: u64 = 1 << 2 | 1 << 3 | 1 << 4;
const WAKE: Opcode = opcode::read::<RangeArg>(0xaa, 2);
const COPY: Opcode = opcode::read_write::<CopyArg>(0xaa, 3);
const ZERO_PAGE: Opcode = opcode::read_write::<RangeOfMode>(0xaa, 4);
const POISON: Opcode = opcode::read_write::<RangeOfMode>(0xaa, 8);
const NEW: Opcode = opcode::none(0xaa, 0);

const PAGE_FAULT: u8 = 0x12;
const REMOVE: u8 = 0x15;
/// Bytes of one event.
const EVENT_BYTES: usize = 32;
/// The most events that one call reads.
const EVENTS: usize = 16;

#[repr(C)]
struct CopyArg {
    to: u64,
    from: u64,
    length: u64,
    mode: u64,
    copied: i64,
}

/// The argument of ZEROPAGE and POISON.
#[repr(C)]
struct RangeOfMode {
    range: RangeArg,
    mode: u64,
    done: i64,
}

/// Why this process gets no userfaultfd that sees the faults of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NoMissingFaults {
    /// The kernel has no userfaultfd.
    NotBuilt,
    /// There is one for faults of user mode alone: a system call that touches a missing page would fail.
    UserModeOnly,
    /// The system call and the device are both forbidden.
    Forbidden,
    /// The kernel lacks missing faults of shared memory, or the events of discards (Linux 4.11).
    TooOld,
    /// Another error of the kernel, as its number.
    Failed(i32),
}

impl fmt::Display for NoMissingFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotBuilt => f.write_str("the kernel was built without userfaultfd"),
            Self::UserModeOnly => f.write_str(
                "only faults of user mode are reported to this user: run as root, grant CAP_SYS_PTRACE, allow /dev/userfaultfd, \
                 or set vm.unprivileged_userfaultfd to 1",
            ),
            Self::Forbidden => f.write_str("userfaultfd is forbidden here: allow the system call in the sandbox"),
            Self::TooOld => f.write_str("Linux 4.11 or later has them"),
            Self::Failed(error) => write!(f, "userfaultfd does not open: {}", io::Error::from_raw_os_error(*error)),
        }
    }
}

impl std::error::Error for NoMissingFaults {}

/// What a userfaultfd reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A thread waits for the page of this address. The kernel does not say whether it is in user mode.
    Fault(usize),
    /// The owner of the memory discards a range. It waits until this event is read, and discards after that.
    Remove(Range<usize>),
}

/// The result of placing a range of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// All pages are there, and the threads that waited continue.
    Done,
    /// Only that many bytes are there: what stopped the rest, a further call says. 0 while a discard is under way.
    Again(usize),
    /// The first page is there already.
    Present,
    /// The range is not registered, or crosses from one mapping to another.
    NotRegistered,
    /// The process that owns the memory is gone.
    OwnerGone,
    /// Another error.
    Failed(Errno),
}

/// A userfaultfd for missing faults. Closing the last copy lets the threads that wait read zeros.
#[derive(Debug)]
pub(crate) struct MissingFaults(Userfaultfd);

impl MissingFaults {
    /// Opens one for the memory of this process. With `removes`, discards of registered memory wait until their event is read.
    ///
    /// # Errors
    /// If there is none that sees the faults of the kernel.
    pub(crate) fn open(removes: bool) -> Result<Self, NoMissingFaults> {
        let this = Self(Userfaultfd(open()?));
        let features = MISSING_SHARED | if removes { EVENT_REMOVE } else { 0 };
        match this.0.agree(features).map_err(|error| Errno::from_io_error(&error)) {
            Ok(_) => Ok(this),
            Err(Some(Errno::INVAL)) => Err(NoMissingFaults::TooOld),
            Err(error) => Err(NoMissingFaults::Failed(error.map_or(0, Errno::raw_os_error))),
        }
    }

    /// Registers whole pages of this process for missing faults. False, with nothing registered, if their kind of memory lacks an
    /// operation that placing needs.
    ///
    /// # Safety
    /// The range is a mapping of the caller's, and stays one until it is unregistered or this value is dropped. No reference to it
    /// exists, and its missing pages may take any content.
    ///
    /// # Errors
    /// EINVAL or EBUSY for memory that cannot be registered, or is already.
    pub(crate) unsafe fn register(&self, range: Range<usize>) -> io::Result<bool> {
        let mut arg = RegisterArg { range: range.clone().into(), mode: REGISTER_MODE_MISSING, ioctls: 0 };
        // SAFETY: UFFDIO_REGISTER takes a RegisterArg; it changes no content.
        unsafe { rustix::ioctl::ioctl(&self.0.0, Call::<REGISTER, _>(&mut arg)) }?;
        if arg.ioctls & NEEDED == NEEDED {
            return Ok(true);
        }
        self.unregister(range)?;
        Ok(false)
    }

    /// Unregisters a range: threads that wait in it continue, and pages that are not there read as zeros.
    ///
    /// # Errors
    /// EINVAL for a range that is no mapping.
    pub(crate) fn unregister(&self, range: Range<usize>) -> io::Result<()> {
        self.0.unregister(range)
    }

    /// Places whole pages that are missing from `to` on, and wakes the threads that wait for them. A page that is there is never changed.
    pub(crate) fn copy(&self, to: usize, from: &[u8]) -> Step {
        let (length, from) = (from.len() as u64, from.as_ptr().expose_provenance() as u64);
        let mut arg = CopyArg { to: to as u64, from, length, mode: 0, copied: 0 };
        // SAFETY: UFFDIO_COPY takes a CopyArg. It reads `from`, and fills pages of registered ranges alone, as the caller of
        // `register` permits.
        let result = unsafe { rustix::ioctl::ioctl(&self.0.0, Call::<COPY, _>(&mut arg)) };
        step(result, arg.copied)
    }

    /// As [`copy`](Self::copy), with zeros.
    pub(crate) fn zero(&self, range: Range<usize>) -> Step {
        let mut arg = RangeOfMode { range: range.into(), mode: 0, done: 0 };
        // SAFETY: UFFDIO_ZEROPAGE takes a RangeOfMode, and fills pages of registered ranges alone.
        let result = unsafe { rustix::ioctl::ioctl(&self.0.0, Call::<ZERO_PAGE, _>(&mut arg)) };
        step(result, arg.done)
    }

    /// Makes missing pages unusable: a thread that touches one, or waits for it, gets SIGBUS, or EFAULT in a system call. They stay so
    /// when this descriptor is closed. Needs Linux 6.6.
    pub(crate) fn poison(&self, range: Range<usize>) -> Step {
        let mut arg = RangeOfMode { range: range.into(), mode: 0, done: 0 };
        // SAFETY: UFFDIO_POISON takes a RangeOfMode, and marks missing pages of registered ranges alone.
        let result = unsafe { rustix::ioctl::ioctl(&self.0.0, Call::<POISON, _>(&mut arg)) };
        step(result, arg.done)
    }

    /// Wakes the threads that wait in a range: they touch it again.
    ///
    /// # Errors
    /// EINVAL for a range that is no whole pages.
    pub(crate) fn wake(&self, range: Range<usize>) -> io::Result<()> {
        let mut arg = RangeArg::from(range);
        // SAFETY: UFFDIO_WAKE takes a RangeArg; it changes no content.
        unsafe { rustix::ioctl::ioctl(&self.0.0, Call::<WAKE, _>(&mut arg)) }?;
        Ok(())
    }

    /// Gives each event that waits to be read, without waiting for one.
    ///
    /// # Errors
    /// When the kernel refuses to report.
    pub(crate) fn read(&self, mut event: impl FnMut(Event)) -> io::Result<()> {
        let mut bytes = [0; EVENT_BYTES * EVENTS];
        let length = match rustix::io::read(&self.0.0, &mut bytes) {
            Ok(length) => length,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        bytes[..length].as_chunks().0.iter().filter_map(parse).for_each(&mut event);
        Ok(())
    }
}

impl AsFd for MissingFaults {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.0.as_fd()
    }
}

/// The result of an operation that stores how many bytes it has done, or the negative number of an error.
fn step(result: rustix::io::Result<usize>, done: i64) -> Step {
    match result {
        Ok(_) => Step::Done,
        Err(Errno::AGAIN | Errno::INTR) => Step::Again(usize::try_from(done).unwrap_or(0)),
        Err(Errno::EXIST) => Step::Present,
        Err(Errno::NOENT) => Step::NotRegistered,
        Err(Errno::SRCH) => Step::OwnerGone,
        Err(error) => Step::Failed(error),
    }
}

/// An event that is of interest. Others are not asked for.
fn parse(event: &[u8; EVENT_BYTES]) -> Option<Event> {
    let word = |at: usize| address(u64::from_ne_bytes(event[at..at + 8].try_into().expect("8 bytes")));
    match event[0] {
        PAGE_FAULT => Some(Event::Fault(word(16))),
        REMOVE => Some(Event::Remove(word(8)..word(16))),
        _ => None,
    }
}

/// A descriptor that sees the faults of the kernel: by the system call, or by the device where a sandbox forbids the call.
fn open() -> Result<OwnedFd, NoMissingFaults> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: the descriptor does nothing until a range is registered with it.
    let call = |flags| unsafe { rustix::mm::userfaultfd(flags) };
    if let Ok(descriptor) = call(flags).or_else(|_| device(flags)) {
        return Ok(descriptor);
    }
    match call(flags | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY)) {
        Ok(_) => Err(NoMissingFaults::UserModeOnly),
        Err(Errno::NOSYS) => Err(NoMissingFaults::NotBuilt),
        Err(Errno::PERM | Errno::ACCESS) => Err(NoMissingFaults::Forbidden),
        Err(error) => Err(NoMissingFaults::Failed(error.raw_os_error())),
    }
}

fn device(flags: UserfaultfdFlags) -> rustix::io::Result<OwnedFd> {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd");
    let device = opened.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    // SAFETY: USERFAULTFD_IOC_NEW takes flags and returns a descriptor.
    let descriptor = unsafe { rustix::ioctl::ioctl(&device, New(flags)) }?;
    // SAFETY: the kernel has just made the descriptor for this call.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// An ioctl that takes flags by value and returns a descriptor.
struct New(UserfaultfdFlags);

// SAFETY: the kernel takes the argument as a number, and dereferences nothing.
unsafe impl Ioctl for New {
    type Output = RawFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        NEW
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        without_provenance_mut(self.0.bits() as usize)
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut std::ffi::c_void) -> rustix::io::Result<RawFd> {
        Ok(output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_and_the_call_give_descriptors_that_agree() {
        if let Err(why) = MissingFaults::open(true) {
            println!("skipped: {why}");
            return;
        }
        match device(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) {
            Ok(descriptor) => assert_ne!(Userfaultfd(descriptor).agree(MISSING_SHARED | EVENT_REMOVE).unwrap(), 0),
            Err(why) => println!("skipped: /dev/userfaultfd: {why}"),
        }
    }

    #[test]
    fn results_of_the_kernel_are_steps() {
        assert_eq!(step(Ok(0), 4096), Step::Done);
        assert_eq!(step(Err(Errno::AGAIN), 12288), Step::Again(12288));
        assert_eq!(step(Err(Errno::AGAIN), -11), Step::Again(0));
        assert_eq!(step(Err(Errno::EXIST), -17), Step::Present);
        assert_eq!(step(Err(Errno::NOENT), 0), Step::NotRegistered);
        assert_eq!(step(Err(Errno::SRCH), 0), Step::OwnerGone);
        assert_eq!(step(Err(Errno::FAULT), 0), Step::Failed(Errno::FAULT));
    }

    #[test]
    fn events_are_read_as_the_kernel_lays_them_out() {
        let mut event = [0; EVENT_BYTES];
        event[8..16].copy_from_slice(&0x7000_u64.to_ne_bytes());
        event[16..24].copy_from_slice(&0x9000_u64.to_ne_bytes());
        event[0] = PAGE_FAULT;
        assert_eq!(parse(&event), Some(Event::Fault(0x9000)));
        event[0] = REMOVE;
        assert_eq!(parse(&event), Some(Event::Remove(0x7000..0x9000)));
        event[0] = 0x16;
        assert_eq!(parse(&event), None);
    }
}
