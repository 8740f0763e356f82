//! Memory mapped into this process: anonymous, a memfd, a file, or lent by a VMM.
//!
//! A [`MappedMemory`] owns its mapping and unmaps it when dropped; lent memory is kept alive instead. No method returns a
//! reference to it: pages are copied out and in through raw pointers, because others (vCPUs, writer threads,
//! another process) store into it at any time. That needs the `unsafe` in this module. Keep this value alive as long as a pointer
//! from [`MappedMemory::as_ptr`] is in use.

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use rustix::fs::MemfdFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::populate::{HUGE_BYTES, HugePages, populate};
use super::{Memory, copy, discard, holes, present, with_scratch};
use crate::geometry::{PageSize, bits};
use crate::pool::PooledBuffer;
use crate::xbzrle::Delta;

/// The kind of a mapping that a VMM lends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lent {
    /// A private anonymous mapping. Where a destination loads it densely, huge pages are requested.
    Anonymous,
    /// A shared mapping of a file or memfd.
    Shared,
}

/// Memory of one RAM block in this process's address space.
pub struct MappedMemory {
    start: NonNull<u8>,
    length: usize,
    backing: Backing,
    huge: HugePages,
}

enum Backing {
    Anonymous,
    Shared(File),
    Lent { kind: Lent, _keep_alive: Arc<dyn Any + Send + Sync> },
}

// SAFETY: the pointer is used only for volatile and bulk copies within the mapping, which lives as long as the value; the
// mapping is not tied to a thread.
unsafe impl Send for MappedMemory {}
// SAFETY: as for `Send`; concurrent copies of the same bytes may tear, which the contract of `Memory` allows for reads that
// race with the guest and excludes for writes.
unsafe impl Sync for MappedMemory {}

impl MappedMemory {
    /// Private memory of `length` bytes that reads as zeros and takes up no memory until it is written.
    ///
    /// # Errors
    /// If the length is 0 or the kernel has no room for it.
    pub fn anonymous(length: usize) -> io::Result<Self> {
        check_length(length)?;
        Ok(Self::over(map_anonymous(length)?, length, Backing::Anonymous))
    }

    /// Shared memory of `length` bytes in a memfd of this name, which other mappings may share.
    ///
    /// # Errors
    /// If the length is 0, or the kernel has no room for it.
    pub fn memfd(name: &str, length: usize) -> io::Result<Self> {
        check_length(length)?;
        let file = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?);
        file.set_len(length as u64)?;
        Self::file(file)
    }

    /// As [`MappedMemory::memfd`], of huge pages of 2 MiB that the operator has reserved (hugetlbfs).
    ///
    /// # Errors
    /// If the length is 0 or no multiple of 2 MiB, or the host has too few free huge pages: the message explains how to
    /// reserve them.
    pub fn hugetlb(name: &str, length: usize) -> io::Result<Self> {
        check_length(length)?;
        let invalid = || io::Error::new(io::ErrorKind::InvalidInput, format!("{length} bytes are no whole huge pages"));
        let pages = length.is_multiple_of(HUGE_BYTES).then_some(length / HUGE_BYTES).ok_or_else(invalid)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let mapped = rustix::fs::memfd_create(name, flags).map_err(io::Error::from).and_then(|file| {
            let file = File::from(file);
            file.set_len(length as u64)?;
            Self::file(file)
        });
        mapped.map_err(|error| {
            let ask = "set them aside with: sysctl vm.nr_hugepages=NUMBER";
            io::Error::new(error.kind(), format!("{pages} huge pages of 2 MiB: {error}; {ask}"))
        })
    }

    /// The whole of a file, shared: writes go to the file. The file must not shrink while it is mapped
    /// (SIGBUS would kill the process): use [`super::FileMemory`] for files of other programs.
    ///
    /// # Errors
    /// If the file is empty or cannot be mapped for reading and writing.
    pub fn file(file: File) -> io::Result<Self> {
        let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        check_length(length)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address that the kernel chooses touches no other memory.
        let start = unsafe { rustix::mm::mmap(null_mut(), length, access, MapFlags::SHARED, &file, 0) }?;
        Ok(Self::over(start.cast(), length, Backing::Shared(file)))
    }

    /// Memory that a VMM has mapped: `length` bytes at `start`, which live as long as `keep_alive`.
    ///
    /// # Safety
    /// As long as `keep_alive` lives, the bytes stay mapped for reading and writing. No Rust reference to them exists
    /// while this value is used. `kind` is the kind of their mapping.
    ///
    /// # Panics
    /// If `start` is not aligned to 4 KiB, or the length is 0.
    #[must_use]
    pub unsafe fn from_raw(
        start: NonNull<u8>,
        length: usize,
        kind: Lent,
        keep_alive: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        assert!(start.addr().get().is_multiple_of(4096), "memory at {start:p} does not start on a page");
        assert!(length > 0, "a block has at least one byte");
        let backing = Backing::Lent { kind, _keep_alive: keep_alive };
        Self { start, length, backing, huge: HugePages::default() }
    }

    fn over(start: *mut u8, length: usize, backing: Backing) -> Self {
        let start = NonNull::new(start).expect("the kernel maps nothing at 0");
        Self { start, length, backing, huge: HugePages::default() }
    }

    /// The first byte. Valid as long as this value lives.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Length in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether other mappings can write the same memory.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        matches!(self.backing, Backing::Shared(_) | Backing::Lent { kind: Lent::Shared, .. })
    }

    /// Stores bytes as a guest does: others may read them at the same time. Each aligned word of 8 bytes is stored in one
    /// access.
    ///
    /// # Panics
    /// If they reach beyond the end.
    pub fn store(&self, offset: usize, bytes: &[u8]) {
        let to = self.at(offset, bytes.len());
        // SAFETY: `at` has checked the range; no reference to the memory exists.
        unsafe { copy::store(to, bytes) }
    }

    /// Loads bytes that others may store at the same time, each aligned word of 8 bytes in one access.
    ///
    /// # Panics
    /// If they reach beyond the end.
    pub fn load(&self, offset: usize, into: &mut [u8]) {
        let from = self.at(offset, into.len());
        // SAFETY: `at` has checked the range; no reference to the memory exists.
        unsafe { copy::load(from, into) }
    }

    /// Asks the kernel to back the memory by huge pages, which makes first touch much cheaper. Advice only.
    ///
    /// # Errors
    /// If the kernel has no huge pages.
    pub fn advise_huge(&self) -> io::Result<()> {
        self.advise_huge_up_to(self.length)
    }

    /// [`MappedMemory::advise_huge`] for the first `length` bytes: no huge page reaches beyond them.
    ///
    /// # Errors
    /// If the kernel has no huge pages.
    pub fn advise_huge_up_to(&self, length: usize) -> io::Result<()> {
        let length = length.min(self.length).next_multiple_of(rustix::param::page_size());
        // SAFETY: the range is this mapping; the advice changes no content.
        unsafe { rustix::mm::madvise(self.as_ptr().cast(), length, rustix::mm::Advice::LinuxHugepage) }?;
        Ok(())
    }

    /// Leaves the memory out of core dumps.
    ///
    /// # Errors
    /// If the kernel cannot.
    pub(crate) fn leave_out_of_dumps(&self) -> io::Result<()> {
        let length = self.length.next_multiple_of(rustix::param::page_size());
        // SAFETY: the range is this mapping; the advice changes no content.
        unsafe { rustix::mm::madvise(self.as_ptr().cast(), length, Advice::LinuxDontDump) }?;
        Ok(())
    }

    /// Returns private memory to the host: it reads as zeros afterwards. A dirty log may not see this, so mark the pages.
    /// On shared memory it changes only this mapping's tables; punch a hole into the file instead.
    ///
    /// # Errors
    /// If `offset` is not on a page of the host, or the memory is locked.
    ///
    /// # Panics
    /// If the range, but for the rest of the last page, reaches beyond the end.
    pub fn give_back(&self, offset: usize, length: usize) -> io::Result<()> {
        let start = self.at(offset, length.min(self.length.saturating_sub(offset)));
        let end = (offset + length).min(self.length.next_multiple_of(rustix::param::page_size()));
        // SAFETY: the range is in this mapping, to which no reference exists; its content becomes zero or stays.
        unsafe { rustix::mm::madvise(start.cast(), end - offset, rustix::mm::Advice::LinuxDontNeed) }?;
        Ok(())
    }

    /// Drops ranges of pages: they read as zeros afterwards, and are touched for the first time again. Those of shared memory are
    /// dropped for every mapping of it, those of a file become holes. A dirty log may not see this.
    ///
    /// Huge pages are no longer requested for this memory, because a huge page could fill what was dropped.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if the host's pages are larger; when the kernel refuses, as for locked memory. Some of the pages
    /// may be dropped then.
    ///
    /// # Panics
    /// If a page is not of this memory.
    pub fn discard(&self, page_size: PageSize, pages: impl IntoIterator<Item = Range<u64>>) -> io::Result<()> {
        let host = rustix::param::page_size();
        if !page_size.bytes().is_multiple_of(host) {
            let why = format!("pages of {page_size:?} on a host with pages of {host} B");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        self.advise_no_huge();
        let bytes = |pages: Range<u64>| {
            let bytes = self.bytes_of(page_size, pages);
            bytes.start..bytes.end.next_multiple_of(host)
        };
        let ranges = pages.into_iter().map(bytes).filter(|range| !range.is_empty());
        match &self.backing {
            Backing::Shared(file) => discard::punch(file, ranges),
            Backing::Lent { kind: Lent::Shared, .. } => {
                // SAFETY: the ranges are of this mapping, to which no reference exists, and end with a page of the host.
                unsafe { discard::advise(self.start, Advice::LinuxRemove, ranges) }
            }
            Backing::Anonymous | Backing::Lent { kind: Lent::Anonymous, .. } => {
                // SAFETY: as above.
                unsafe { discard::drop_private(self.start, ranges) }
            }
        }
    }

    /// Asks the kernel for no huge pages here. Areas of huge pages become one mapping again, as userfaultfd needs it.
    pub(crate) fn advise_no_huge(&self) {
        let length = self.length.next_multiple_of(rustix::param::page_size());
        // SAFETY: the range is this mapping; the advice changes no content. A kernel without huge pages refuses it, and needs none.
        let _advice = unsafe { rustix::mm::madvise(self.as_ptr().cast(), length, Advice::LinuxNoHugepage) };
    }

    /// The address of `length` bytes at `offset`.
    fn at(&self, offset: usize, length: usize) -> *mut u8 {
        let fits = offset.checked_add(length).is_some_and(|end| end <= self.length);
        assert!(fits, "{length} bytes at {offset} in memory of {} bytes", self.length);
        // SAFETY: within the mapping.
        unsafe { self.as_ptr().add(offset) }
    }

    /// Where a page starts, and how many of its bytes are in the block.
    fn page(&self, page_size: PageSize, page: u64) -> (*mut u8, usize) {
        let start = usize::try_from(page).ok().and_then(|page| page.checked_mul(page_size.bytes()));
        let start = start.filter(|&start| start < self.length);
        let start = start.unwrap_or_else(|| panic!("page {page} in memory of {} bytes", self.length));
        let bytes = page_size.bytes().min(self.length - start);
        (self.at(start, bytes), bytes)
    }

    /// The bytes of some pages of this memory, as offsets, the rest of a partial last page left out.
    ///
    /// # Panics
    /// If not all of the pages are of this memory.
    fn bytes_of(&self, page_size: PageSize, pages: Range<u64>) -> Range<usize> {
        if pages.is_empty() {
            return 0..0;
        }
        let start = self.page(page_size, pages.start).0;
        let (last, bytes) = self.page(page_size, pages.end - 1);
        let offset = |at: *mut u8| at.addr() - self.start.addr().get();
        offset(start)..offset(last) + bytes
    }

    /// Copies a page out unless it is zero.
    fn copy_page(&self, page_size: PageSize, page: u64, into: &mut [u8]) -> bool {
        let (from, bytes) = self.page(page_size, page);
        if bytes == into.len() {
            // SAFETY: `page` has checked the range; no reference to the memory exists.
            return unsafe { copy::copy_unless_zero(from, into) };
        }
        let (inside, beyond) = into.split_at_mut(bytes);
        // SAFETY: as above.
        unsafe { copy::load(from, inside) };
        beyond.fill(0);
        inside.iter().all(|&byte| byte == 0)
    }
}

impl Memory for MappedMemory {
    fn length(&self) -> u64 {
        self.length as u64
    }

    fn into_mapping(self: Arc<Self>) -> Option<Arc<MappedMemory>> {
        Some(self)
    }

    fn read_extent(&self, page_size: PageSize, first_page: u64, mask: u64, into: &mut PooledBuffer) -> io::Result<u64> {
        let (mut zero, mut filled) = (0, 0);
        let mut bits = bits(mask).peekable();
        while let Some(bit) = bits.next() {
            if let Some(next) = bits.peek() {
                copy::expect(self.page(page_size, first_page + u64::from(*next)).0);
            }
            let space = &mut into.space()[filled..filled + page_size.bytes()];
            if self.copy_page(page_size, first_page + u64::from(bit), space) {
                zero |= 1 << bit;
            } else {
                filled += page_size.bytes();
            }
        }
        into.set_filled(filled);
        Ok(zero)
    }

    fn read_page(&self, page_size: PageSize, page: u64, into: &mut [u8]) -> io::Result<()> {
        assert_eq!(into.len(), page_size.bytes(), "room for one page");
        if self.copy_page(page_size, page, into) {
            into.fill(0);
        }
        Ok(())
    }

    fn write_pages(&self, page_size: PageSize, first_page: u64, bytes: &[u8]) -> io::Result<()> {
        assert!(bytes.len().is_multiple_of(page_size.bytes()), "{} bytes are no whole pages", bytes.len());
        let pages = first_page..first_page + (bytes.len() / page_size.bytes()) as u64;
        let inside = self.bytes_of(page_size, pages);
        let to = self.at(inside.start, inside.len());
        // SAFETY: `at` has checked the range, and what lies beyond the memory's end is left out. The guest does not run,
        // `bytes` is not this memory since no reference to it exists.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), inside.len()) };
        Ok(())
    }

    fn write_zeros(&self, page_size: PageSize, pages: Range<u64>) -> io::Result<()> {
        with_scratch(page_size.bytes(), |scratch| {
            for page in pages {
                if !self.copy_page(page_size, page, scratch) {
                    let (to, bytes) = self.page(page_size, page);
                    // SAFETY: `page` has checked the range; the guest does not run.
                    unsafe { to.write_bytes(0, bytes) };
                }
            }
        });
        Ok(())
    }

    fn populate(&self, page_size: PageSize, pages: Range<u64>) -> io::Result<()> {
        let host = rustix::param::page_size();
        let bytes = self.bytes_of(page_size, pages);
        let (start, end) = (bytes.start / host * host, bytes.end.next_multiple_of(host));
        // SAFETY: the pages are of this mapping, which ends with a page of the host.
        unsafe { populate(self.start.add(start), end - start) }
    }

    fn populate_huge(&self, page_size: PageSize, pages: Range<u64>) -> io::Result<bool> {
        let bytes = self.bytes_of(page_size, pages);
        let is_huge = |address: usize| address.is_multiple_of(HUGE_BYTES);
        if self.is_shared() || !is_huge(self.start.addr().get() + bytes.start) || !is_huge(bytes.len()) {
            return Ok(false);
        }
        for start in bytes.step_by(HUGE_BYTES) {
            // SAFETY: it is of this private mapping, and aligned as was just found.
            if !unsafe { self.huge.populate(start / HUGE_BYTES, self.start.add(start)) }? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn patch(&self, page_size: PageSize, page: u64, delta: &Delta<'_>) -> io::Result<()> {
        let (to, bytes) = self.page(page_size, page);
        assert_eq!(delta.page_bytes(), page_size.bytes(), "a delta of another page size");
        delta.each_run(|offset, run| {
            let start = offset.min(bytes);
            let inside = run.len().min(bytes - start);
            // SAFETY: start + inside is at most the page's bytes in the block; the guest does not run, and no reference
            // to its memory exists.
            unsafe { copy::put(to.add(start), &run[..inside]) };
        });
        Ok(())
    }

    fn untouched_in(&self, page_size: PageSize, pages: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        match &self.backing {
            Backing::Shared(file) => holes::untouched(file, self.length(), page_size, pages),
            Backing::Anonymous | Backing::Lent { kind: Lent::Anonymous, .. } => {
                present::untouched(self.start.addr().get(), self.length, page_size, pages)
            }
            Backing::Lent { kind: Lent::Shared, .. } => Ok(Vec::new()),
        }
    }
}

impl fmt::Debug for MappedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.backing {
            Backing::Anonymous => "anonymous",
            Backing::Shared(_) => "shared",
            Backing::Lent { .. } => "lent",
        };
        write!(f, "MappedMemory({kind}, {} bytes at {:p})", self.length, self.start)
    }
}

impl Drop for MappedMemory {
    fn drop(&mut self) {
        if !matches!(self.backing, Backing::Lent { .. }) {
            // SAFETY: the mapping was made by this value for this length, and nothing can use it afterwards.
            let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.length) };
            debug_assert!(unmapped.is_ok(), "a mapping of ours is unmapped");
        }
    }
}

/// Maps private memory, at an address where huge pages fit if it is as large as one.
fn map_anonymous(length: usize) -> io::Result<*mut u8> {
    let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
    let length = length.next_multiple_of(rustix::param::page_size());
    let (align, spare) = if length < HUGE_BYTES { (1, 0) } else { (HUGE_BYTES, HUGE_BYTES) };
    // SAFETY: a fresh mapping at an address that the kernel chooses touches no other memory.
    let mapped = unsafe { rustix::mm::mmap_anonymous(null_mut(), length + spare, access, flags) }?.cast::<u8>();
    let before = mapped.addr().next_multiple_of(align) - mapped.addr();
    let start = mapped.wrapping_add(before);
    for (unused, bytes) in [(mapped, before), (start.wrapping_add(length), spare - before)] {
        if bytes > 0 {
            // SAFETY: it is an unused part of the fresh mapping; both ends lie on pages of the host.
            unsafe { rustix::mm::munmap(unused.cast(), bytes) }?;
        }
    }
    Ok(start)
}

fn check_length(length: usize) -> io::Result<()> {
    let empty = || io::Error::new(io::ErrorKind::InvalidInput, "memory of 0 bytes cannot be mapped");
    if length == 0 { Err(empty()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bitmap::DirtyBitmap;
    use crate::geometry::PageAt;
    use crate::pool::BufferPool;

    const PAGE: PageSize = PageSize::DEFAULT;

    fn all_kinds(length: usize) -> Vec<MappedMemory> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(length as u64).unwrap();
        vec![
            MappedMemory::anonymous(length).unwrap(),
            MappedMemory::memfd("test", length).unwrap(),
            MappedMemory::file(file).unwrap(),
            lend(MappedMemory::anonymous(length).unwrap(), Lent::Anonymous),
            lend(MappedMemory::memfd("lent", length).unwrap(), Lent::Shared),
        ]
    }

    fn lend(owner: MappedMemory, kind: Lent) -> MappedMemory {
        let (start, length) = (owner.start, owner.length);
        // SAFETY: the owner is kept alive by the value.
        unsafe { MappedMemory::from_raw(start, length, kind, Arc::new(owner)) }
    }

    /// Whether this kernel has huge pages.
    fn knows_huge_pages() -> bool {
        let knows = std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists();
        if !knows {
            println!("skipped: this kernel has no transparent huge pages");
        }
        knows
    }

    /// Two stretches, and a partial page behind them.
    const LENGTH: usize = (4 << 20) + 100;

    #[test]
    fn memory_made_ready_holds_what_it_held() {
        for memory in all_kinds(LENGTH) {
            memory.store(4096, &[7; 10]);
            memory.store(LENGTH - 1, &[8]);
            memory.populate(PAGE, 0..1025).unwrap();
            if memory.is_shared() || knows_huge_pages() {
                assert_eq!(memory.populate_huge(PAGE, 0..512).unwrap(), !memory.is_shared(), "{memory:?}");
            }
            assert!(!memory.populate_huge(PAGE, 512..600).unwrap(), "it is no whole huge page");
            let mut page = [1; 4096];
            memory.read_page(PAGE, 1, &mut page).unwrap();
            assert!(page[..10] == [7; 10] && page[10..] == [0; 4086]);
            memory.read_page(PAGE, 1024, &mut page).unwrap();
            assert_eq!((page[98], page[99], page[100]), (0, 8, 0));
        }
    }

    #[test]
    fn memory_made_ready_is_there_and_no_other() {
        let memory = MappedMemory::anonymous(16 << 20).unwrap();
        if memory.untouched(PAGE).unwrap().is_empty() {
            println!("skipped: this kernel does not report untouched pages");
            return;
        }
        memory.populate(PAGE, 3..5).unwrap();
        assert_eq!(memory.untouched(PAGE).unwrap(), [0..3, 5..4096]);
        if knows_huge_pages() {
            assert!(memory.populate_huge(PAGE, 512..1024).unwrap());
            assert_eq!(memory.untouched(PAGE).unwrap(), [0..3, 5..512, 1024..4096]);
        }
    }

    #[test]
    fn an_extent_is_read_without_its_zero_pages() {
        for memory in all_kinds(70 * 4096 + 100) {
            memory.store(3 * 4096 + 4095, &[7]);
            memory.store(64 * 4096, &[8; 4096]);
            memory.store(70 * 4096 + 99, &[9]);
            let mut buffer = BufferPool::new(1, PAGE.extent_bytes()).try_take().unwrap();
            assert_eq!(memory.read_extent(PAGE, 0, 0b1010, &mut buffer).unwrap(), 0b10);
            assert_eq!((buffer.len(), buffer[4094], buffer[4095]), (4096, 0, 7));
            assert_eq!(memory.read_extent(PAGE, 64, 0x7f, &mut buffer).unwrap(), 0x3e);
            assert!(buffer[..4096] == [8; 4096]);
            assert_eq!((buffer.len(), buffer[4096 + 98], buffer[4096 + 99], buffer[4096 + 100]), (8192, 0, 9, 0));
            assert_eq!(memory.read_extent(PAGE, 0, 0, &mut buffer).unwrap(), 0);
            assert!(buffer.is_empty());
        }
    }

    #[test]
    fn what_lies_beyond_a_partial_last_page_reads_as_zeros_and_is_dropped() {
        for memory in all_kinds(4096 + 10) {
            memory.write_pages(PAGE, 0, &[5; 8192]).unwrap();
            let mut page = [1; 4096];
            memory.read_page(PAGE, 1, &mut page).unwrap();
            assert!(page[..10] == [5; 10] && page[10..] == [0; 4086]);
            memory.write_zeros(PAGE, 0..2).unwrap();
            memory.read_page(PAGE, 1, &mut page).unwrap();
            assert!(page == [0; 4096]);
        }
    }

    #[test]
    #[should_panic(expected = "page 2 in memory of 4106 bytes")]
    fn a_page_beyond_the_end_is_our_own_mistake() {
        let memory = MappedMemory::anonymous(4106).unwrap();
        memory.write_pages(PAGE, 1, &[5; 8192]).unwrap();
    }

    #[test]
    fn untouched_pages_are_those_that_nothing_was_written_to() {
        for memory in all_kinds(100 * 4096 + 1) {
            let whole = memory.untouched(PAGE).unwrap();
            if whole.is_empty() {
                println!("skipped: {memory:?} does not know what was touched");
                continue;
            }
            assert_eq!(whole, vec![0..101], "{memory:?}");
            memory.store(10 * 4096 - 1, &[1, 1]);
            assert_eq!(memory.untouched(PAGE).unwrap(), [0..9, 11..101], "{memory:?}");
            assert_eq!(memory.untouched_in(PAGE, 5..10).unwrap(), vec![5..9], "{memory:?}");
            assert_eq!(memory.untouched_in(PAGE, 9..11).unwrap(), [], "{memory:?}");
            let larger = PageSize::new(16384).unwrap();
            assert_eq!(memory.untouched(larger).unwrap(), [0..2, 3..26], "{memory:?}");
            memory.store(100 * 4096, &[1]);
            assert_eq!(memory.untouched(PAGE).unwrap(), [0..9, 11..100], "{memory:?}");
            memory.store(0, &[1; 100 * 4096 + 1]);
            assert_eq!(memory.untouched(PAGE).unwrap(), [], "{memory:?}");
        }
    }

    #[test]
    fn a_delta_patches_the_page_in_place() {
        for memory in all_kinds(2 * 4096 - 10) {
            memory.write_pages(PAGE, 0, &[1; 8192]).unwrap();
            crate::memory::tests::patch_both_pages(&memory);
        }
    }

    #[test]
    fn what_is_given_back_reads_as_zeros() {
        let memory = MappedMemory::anonymous(3 * 4096 - 10).unwrap();
        memory.write_pages(PAGE, 0, &[1; 3 * 4096]).unwrap();
        memory.give_back(4096, 2 * 4096).unwrap();
        let mut bytes = [0; 3 * 4096 - 10];
        memory.load(0, &mut bytes);
        assert!(bytes[..4096] == [1; 4096] && bytes[4096..] == [0; 8182]);
    }

    /// Every page holds its own number, from 1.
    fn number_pages(memory: &MappedMemory, size: PageSize) {
        for (page, offset) in (0..memory.len()).step_by(size.bytes()).enumerate() {
            memory.store(offset, &[u8::try_from(page % 255 + 1).unwrap()]);
        }
    }

    #[test]
    fn exactly_the_pages_that_are_discarded_read_as_zeros() {
        let mut random = fastrand::Rng::with_seed(7);
        for kib in [4, 16] {
            let size = PageSize::new(kib << 10).unwrap();
            // More ranges than one call takes, and a partial last page.
            let length = 6000 * size.bytes() - 3000;
            let layout = crate::stage::testing::layout(size, &[length as u64]);
            for memory in all_kinds(length) {
                _ = memory.advise_huge();
                number_pages(&memory, size);
                let bits = DirtyBitmap::empty(&layout);
                (0..6000).filter(|_| random.u8(..3) > 0).for_each(|page| _ = bits.set(PageAt { block: 0, page }));
                bits.set(PageAt { block: 0, page: 5999 });
                memory.discard(size, bits.page_runs(0)).unwrap();
                for page in 0..6000 {
                    let mut first = [9];
                    memory.load(usize::try_from(page).unwrap() * size.bytes(), &mut first);
                    let kept = u8::try_from(page % 255 + 1).unwrap();
                    let expected = if bits.is_set(PageAt { block: 0, page }) { 0 } else { kept };
                    assert_eq!(first, [expected], "page {page} of {memory:?}");
                }
            }
        }
    }

    #[test]
    fn memory_of_no_bytes_is_refused() {
        assert!(MappedMemory::anonymous(0).is_err());
        assert!(MappedMemory::file(tempfile::tempfile().unwrap()).is_err());
    }
}
