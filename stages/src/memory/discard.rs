//! Dropping many ranges of pages, by the cheapest way for the memory.
//!
//! Scattered pages of private memory are dropped by `process_madvise`, up to 1024 ranges a call: a third of what a call for each range
//! costs. Kernels before 6.13 refuse that, and get a call for each range.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::mm::Advice;
use rustix::process::PidfdFlags;

/// The most ranges of one call (UIO_MAXIOV).
const RANGES: usize = 1024;

/// Makes holes of ranges of bytes of a file.
pub(super) fn punch(file: &File, ranges: impl Iterator<Item = Range<usize>>) -> io::Result<()> {
    for range in ranges {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(file, flags, range.start as u64, range.len() as u64)?;
    }
    Ok(())
}

/// Gives this advice for ranges of a mapping that starts at `start`.
///
/// # Safety
/// The ranges are whole pages of the host in a mapping to which no reference exists.
pub(super) unsafe fn advise(
    start: NonNull<u8>,
    advice: Advice,
    ranges: impl Iterator<Item = Range<usize>>,
) -> io::Result<()> {
    for range in ranges {
        // SAFETY: the caller's promise.
        unsafe { rustix::mm::madvise(start.as_ptr().add(range.start).cast(), range.len(), advice) }?;
    }
    Ok(())
}

/// Drops ranges of a private mapping that starts at `start`.
///
/// # Safety
/// As [`advise`].
pub(super) unsafe fn drop_private(start: NonNull<u8>, ranges: impl Iterator<Item = Range<usize>>) -> io::Result<()> {
    let mut ranges = ranges.peekable();
    let mut this_process = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).ok();
    while ranges.peek().is_some() {
        let mut some: Vec<_> = ranges.by_ref().take(RANGES).collect();
        if let Some(process) = this_process.take_if(|_| some.len() > 1) {
            // SAFETY: the caller's promise.
            this_process = unsafe { drop_batch(&process, start, &mut some) }?.then_some(process);
        }
        // SAFETY: the caller's promise.
        unsafe { advise(start, Advice::LinuxDontNeed, some.into_iter()) }?;
    }
    Ok(())
}

/// Drops ranges in as few calls as possible, and removes them from the list. False if the kernel cannot.
unsafe fn drop_batch(process: &OwnedFd, start: NonNull<u8>, ranges: &mut Vec<Range<usize>>) -> io::Result<bool> {
    while !ranges.is_empty() {
        let vector = |range: &Range<usize>| libc::iovec {
            iov_base: start.as_ptr().wrapping_add(range.start).cast(),
            iov_len: range.len(),
        };
        let vectors: Vec<_> = ranges.iter().map(vector).collect();
        // SAFETY: process_madvise takes a descriptor of this process, its vectors and their number, and changes no other memory;
        // the caller promises that it may be dropped.
        let done = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                process.as_raw_fd(),
                vectors.as_ptr(),
                vectors.len(),
                libc::MADV_DONTNEED,
                0,
            )
        };
        match usize::try_from(done) {
            Ok(bytes) if bytes > 0 => remove_front(ranges, bytes),
            Ok(_) => return Ok(false),
            Err(_) => {
                let error = io::Error::last_os_error();
                match Errno::from_io_error(&error) {
                    Some(Errno::INTR | Errno::AGAIN) => {}
                    Some(Errno::NOSYS | Errno::INVAL | Errno::PERM) => return Ok(false),
                    _ => return Err(error),
                }
            }
        }
    }
    Ok(true)
}

/// Removes the first `bytes` of the ranges: the kernel bounds how much one call does.
fn remove_front(ranges: &mut Vec<Range<usize>>, mut bytes: usize) {
    let whole = ranges.iter().take_while(|range| match bytes.checked_sub(range.len()) {
        Some(left) => {
            bytes = left;
            true
        }
        None => false,
    });
    let whole = whole.count();
    ranges.drain(..whole);
    if let Some(first) = ranges.first_mut() {
        first.start += bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_call_left_is_left() {
        let after = |bytes| {
            let mut ranges = vec![0..10, 20..25, 30..40];
            remove_front(&mut ranges, bytes);
            let ends = ranges.iter().map(|range| (range.start, range.end));
            ends.collect::<Vec<_>>()
        };
        assert_eq!(after(4), [(4, 10), (20, 25), (30, 40)]);
        assert_eq!(after(10), [(20, 25), (30, 40)]);
        assert_eq!(after(17), [(32, 40)]);
        assert_eq!(after(25), []);
    }
}
