//! Two kernel interfaces that track the writes to memory of this process: userfaultfd in asynchronous write-protect
//! mode, and the PAGEMAP_SCAN ioctl. Used by the userfault log and by mapped memory. Missing faults are in [`missing`].
//!
//! A scan walks a range of page tables and returns ranges of pages with the same categories. It can write-protect what it reports
//! in the same step, so that no write falls between. In asynchronous mode the kernel itself lets a write to a protected page
//! through, and records it: no thread has to handle faults.
//!
//! `unsafe` is needed because the kernel is given addresses; the structs are those of linux/fs.h and linux/userfaultfd.h.

pub(crate) mod missing;

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, opcode};
use rustix::mm::UserfaultfdFlags;

/// An ioctl that takes a struct by pointer, may write to it, and returns a count.
pub(crate) struct Call<'a, const OPCODE: Opcode, T>(pub(crate) &'a mut T);

// SAFETY: the pointer is to a `T` that is exclusively borrowed for the call; the code that makes a `Call` ensures that the
// opcode takes a `T`.
unsafe impl<const OPCODE: Opcode, T> Ioctl for Call<'_, OPCODE, T> {
    type Output = usize;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        OPCODE
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<usize> {
        Ok(usize::try_from(output).expect("a count"))
    }
}

// ---- PAGEMAP_SCAN ----

/// The page was written since it was last write-protected.
pub(crate) const WRITTEN: u64 = 1 << 1;
/// The page is in memory.
pub(crate) const PRESENT: u64 = 1 << 3;
/// The page is in swap, or its table entry holds a mark.
pub(crate) const SWAPPED: u64 = 1 << 4;

/// The most ranges that one call returns; a scan repeats the call.
const REGIONS: usize = 512;
const PAGEMAP_SCAN: Opcode = opcode::read_write::<ScanArg>(b'f', 16);
const WP_MATCHING: u64 = 1;
const CHECK_WPASYNC: u64 = 2;

#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    region_count: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// The pages that a scan reports: those of all categories in `all_of`, and of at least one in `any_of` if there are any.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scan {
    /// All of these categories must apply.
    pub(crate) all_of: u64,
    /// At least one of these must apply, unless the set is empty.
    pub(crate) any_of: u64,
    /// Whether to write-protect them in the same step. The range must then be registered with a [`Userfaultfd`].
    pub(crate) protect: bool,
}

/// The pagemap of this process.
#[derive(Debug)]
pub(crate) struct Pagemap(File);

impl Pagemap {
    /// Opens it.
    ///
    /// # Errors
    /// If /proc is not mounted.
    pub(crate) fn open() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Self)
    }

    /// Calls `found` with each range of addresses whose pages match, ascending. `range` starts and ends on a page.
    ///
    /// # Errors
    /// ENOTTY from a kernel before 6.7, which has no such ioctl; EPERM if the range to protect is not registered.
    pub(crate) fn scan(&self, scan: Scan, range: Range<usize>, mut found: impl FnMut(Range<usize>)) -> io::Result<()> {
        let mut regions = [Region::default(); REGIONS];
        let mut at = range.start as u64;
        while at < range.end as u64 {
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                flags: if scan.protect { WP_MATCHING | CHECK_WPASYNC } else { 0 },
                start: at,
                end: range.end as u64,
                regions: regions.as_mut_ptr().expose_provenance() as u64,
                region_count: REGIONS as u64,
                category_mask: scan.all_of,
                category_anyof_mask: scan.any_of,
                return_mask: scan.all_of | scan.any_of,
                ..ScanArg::default()
            };
            // SAFETY: PAGEMAP_SCAN takes a ScanArg; it fills at most REGIONS regions, which outlive the call.
            let result = unsafe { rustix::ioctl::ioctl(&self.0, Call::<PAGEMAP_SCAN, _>(&mut arg)) };
            for region in &regions[..again_if_interrupted(result)?.unwrap_or(0)] {
                found(address(region.start)..address(region.end));
            }
            at = arg.walk_end.max(at);
        }
        Ok(())
    }
}

// ---- userfaultfd ----

/// The kernel records writes to protected pages, and reports no fault.
pub(crate) const WP_ASYNC: u64 = 1 << 15;
/// Absent pages can be write-protected too.
pub(crate) const WP_UNPOPULATED: u64 = 1 << 13;
/// Shared memory can be write-protected.
pub(crate) const WP_SHARED: u64 = 1 << 12;

const API_VERSION: u64 = 0xaa;
const API: Opcode = opcode::read_write::<ApiArg>(0xaa, 0x3f);
const REGISTER: Opcode = opcode::read_write::<RegisterArg>(0xaa, 0);
const UNREGISTER: Opcode = opcode::read::<RangeArg>(0xaa, 1);
const WRITE_PROTECT: Opcode = opcode::read_write::<WriteProtectArg>(0xaa, 6);
const REGISTER_MODE_WP: u64 = 2;
const WRITE_PROTECT_MODE_WP: u64 = 1;
const USER_MODE_ONLY: u32 = 1;

#[repr(C)]
struct ApiArg {
    version: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RangeArg {
    start: u64,
    length: u64,
}

impl From<Range<usize>> for RangeArg {
    fn from(range: Range<usize>) -> Self {
        Self { start: range.start as u64, length: range.len() as u64 }
    }
}

#[repr(C)]
struct RegisterArg {
    range: RangeArg,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct WriteProtectArg {
    range: RangeArg,
    mode: u64,
}

/// A userfaultfd. Closing it unregisters every range.
#[derive(Debug)]
pub(crate) struct Userfaultfd(OwnedFd);

impl Userfaultfd {
    /// A userfaultfd for faults of this process's own stores, with these features agreed on.
    ///
    /// # Errors
    /// ENOSYS or EPERM when the kernel has none or forbids it, EINVAL when it lacks a feature.
    pub(crate) fn open(features: u64) -> io::Result<Self> {
        let this = Self(descriptor()?);
        this.agree(features)?;
        Ok(this)
    }

    fn agree(&self, features: u64) -> io::Result<u64> {
        let mut arg = ApiArg { version: API_VERSION, features, ioctls: 0 };
        // SAFETY: UFFDIO_API takes an ApiArg.
        unsafe { rustix::ioctl::ioctl(&self.0, Call::<API, _>(&mut arg)) }?;
        Ok(arg.features)
    }

    /// Registers whole pages of this process for write protection.
    ///
    /// # Safety
    /// The range is a mapping of the caller's and stays one until it is unregistered or this value is dropped.
    ///
    /// # Errors
    /// EINVAL or EBUSY for memory that cannot be registered, or is already.
    pub(crate) unsafe fn register(&self, range: Range<usize>) -> io::Result<()> {
        let mut arg = RegisterArg { range: range.into(), mode: REGISTER_MODE_WP, ioctls: 0 };
        // SAFETY: UFFDIO_REGISTER takes a RegisterArg. In asynchronous mode it changes no content and blocks no store.
        unsafe { rustix::ioctl::ioctl(&self.0, Call::<REGISTER, _>(&mut arg)) }?;
        Ok(())
    }

    /// Unregisters a range, which lifts its protection.
    ///
    /// # Errors
    /// EINVAL for a range that is no mapping.
    pub(crate) fn unregister(&self, range: Range<usize>) -> io::Result<()> {
        let mut arg = RangeArg::from(range);
        // SAFETY: UFFDIO_UNREGISTER takes a RangeArg; it changes no content.
        unsafe { rustix::ioctl::ioctl(&self.0, Call::<UNREGISTER, _>(&mut arg)) }?;
        Ok(())
    }

    /// Write-protects a registered range, absent pages included.
    ///
    /// # Errors
    /// ENOENT for a range that is not registered.
    pub(crate) fn write_protect(&self, range: Range<usize>) -> io::Result<()> {
        loop {
            let mut arg = WriteProtectArg { range: range.clone().into(), mode: WRITE_PROTECT_MODE_WP };
            // SAFETY: UFFDIO_WRITEPROTECT takes a WriteProtectArg; it changes no content, and stores continue in
            // asynchronous mode.
            let result = unsafe { rustix::ioctl::ioctl(&self.0, Call::<WRITE_PROTECT, _>(&mut arg)) };
            if again_if_interrupted(result)?.is_some() {
                return Ok(());
            }
        }
    }
}

fn descriptor() -> io::Result<OwnedFd> {
    // The user-mode-only flag needs no privilege. In asynchronous mode it excludes nothing: the kernel's own stores (a read into
    // guest memory) are recorded like all others, since no fault waits for an answer.
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
    // SAFETY: the descriptor does nothing until a range is registered with it.
    Ok(unsafe { rustix::mm::userfaultfd(flags) }?)
}

// ---- probes ----

/// The features that this kernel's userfaultfd has.
///
/// # Errors
/// The reason if it does not open, and the remedy.
pub(crate) fn userfault_features() -> Result<u64, String> {
    let features = descriptor().and_then(|descriptor| Userfaultfd(descriptor).agree(0));
    features.map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::NOSYS) => "the kernel was built without userfaultfd".into(),
        Some(Errno::PERM) => "userfaultfd is forbidden here: allow the system call in the sandbox".into(),
        _ => format!("userfaultfd does not open: {error}"),
    })
}

/// Checks whether there is a PAGEMAP_SCAN.
///
/// # Errors
/// The reason if there is not, and the remedy.
pub(crate) fn pagemap_scan() -> Result<(), String> {
    let pagemap = Pagemap::open().map_err(|error| format!("/proc/self/pagemap does not open: {error}"))?;
    let page = rustix::param::page_size();
    let anywhere = pagemap.scan(Scan { all_of: PRESENT, any_of: 0, protect: false }, page..2 * page, |_| ());
    anywhere.map_err(|error| format!("the kernel refuses PAGEMAP_SCAN ({error}): Linux 6.7 or later has it"))
}

// ---- shared by both ----

/// `None` when a signal interrupted the call, which must be repeated.
fn again_if_interrupted(result: rustix::io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(count) => Ok(Some(count)),
        Err(Errno::INTR | Errno::AGAIN) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn address(value: u64) -> usize {
    usize::try_from(value).expect("an address of this process")
}
