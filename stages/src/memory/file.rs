//! Memory in a file, read and written by position.
//!
//! The file is never mapped: if it is truncated, the result is an error that names it, not a SIGBUS, and a hole that is
//! read stays a hole. A query for holes, which each sync of the hash log makes, also fails if the file grew or was
//! removed: it is then no longer the memory of its writer. The file's true length is preserved, whatever the page size;
//! pages of zeros become holes where the file system has them.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::{Memory, ZEROS, holes, is_zero, with_scratch};
use crate::geometry::{PageSize, runs};
use crate::pool::PooledBuffer;
use crate::xbzrle::Delta;

/// A file as the memory of one RAM block.
#[derive(Debug)]
pub struct FileMemory {
    file: File,
    path: PathBuf,
    length: u64,
    /// Whether it had a name when it was opened. A memfd never has.
    had_name: bool,
    /// Whether it was written since [`FileMemory::sync`] was last called.
    written: AtomicBool,
}

impl FileMemory {
    /// Memory that is only read, of a regular file that is open for reading. Its length now is the block's length. `path` is its
    /// name in messages.
    ///
    /// # Errors
    /// If it is empty, or its length cannot be read.
    pub fn of_source(file: File, path: &Path) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let length = metadata.len();
        if length == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is empty, memory has at least one byte"));
        }
        Ok(Self { file, path: path.into(), length, had_name: metadata.nlink() > 0, written: AtomicBool::new(false) })
    }

    /// Creates a file of `length` bytes, all of it a hole, that only its owner may read and write.
    ///
    /// # Errors
    /// If the name exists already or the file cannot be made; the message names it, and nothing is left
    /// behind.
    pub fn create(path: &Path, length: u64) -> io::Result<Self> {
        let named = |error| about(path, "cannot be created", error);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path).map_err(named)?;
        // The error that matters is the first one.
        Self::over(file, path, length).inspect_err(|_| drop(std::fs::remove_file(path)))
    }

    /// Makes memory of `length` bytes, all of it a hole, of an empty file that is open for reading and writing. `path` is its name
    /// in messages.
    ///
    /// # Errors
    /// If the file cannot have that length; the message names it.
    pub fn over(file: File, path: &Path, length: u64) -> io::Result<Self> {
        file.set_len(length).map_err(|error| about(path, "cannot be created", error))?;
        Ok(Self { file, path: path.into(), length, had_name: true, written: AtomicBool::new(true) })
    }

    /// The path it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Has something been written that [`FileMemory::sync`] has not made durable?
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.written.load(Ordering::Acquire)
    }

    /// Returns when everything written before the call is on the disk.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn sync(&self) -> io::Result<()> {
        // What is written meanwhile is left for the next call.
        self.written.store(false, Ordering::SeqCst);
        self.file.sync_data().map_err(|error| {
            self.written.store(true, Ordering::SeqCst);
            about(&self.path, "cannot be made durable", error)
        })
    }

    /// The bytes of some pages that are in the block.
    ///
    /// # Panics
    /// If not even the first byte of the last page is.
    fn bytes_of(&self, page_size: PageSize, pages: Range<u64>) -> Range<u64> {
        let size = page_size.bytes() as u64;
        let inside = pages.is_empty() || pages.end <= self.length.div_ceil(size);
        assert!(inside, "pages {pages:?} of {size} bytes in a file of {} bytes", self.length);
        pages.start * size..(pages.end * size).min(self.length)
    }

    /// Reads whole pages from `first_page` on; bytes beyond the block's end are zeros.
    fn read_pages(&self, page_size: PageSize, first_page: u64, into: &mut [u8]) -> io::Result<()> {
        let count = (into.len() / page_size.bytes()) as u64;
        let bytes = self.bytes_of(page_size, first_page..first_page + count);
        let (inside, beyond) = into.split_at_mut(length_of(&bytes));
        beyond.fill(0);
        self.file.read_exact_at(inside, bytes.start).map_err(|error| self.read_failed(&bytes, error))
    }

    fn read_failed(&self, bytes: &Range<u64>, error: io::Error) -> io::Error {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            return self.cut_short(self.file.metadata().map_or("fewer".into(), |metadata| metadata.len().to_string()));
        }
        about(&self.path, format_args!("cannot be read at bytes {} to {}", bytes.start, bytes.end), error)
    }

    fn cut_short(&self, now: impl std::fmt::Display) -> io::Error {
        let what = format!("{}: it was cut short, from {} bytes to {now}", self.path.display(), self.length);
        io::Error::new(io::ErrorKind::UnexpectedEof, what)
    }

    /// Checks that it still has the block's length, and a name.
    fn check(&self) -> io::Result<()> {
        let now = self.file.metadata().map_err(|error| about(&self.path, "cannot be looked at", error))?;
        if now.len() < self.length {
            return Err(self.cut_short(now.len()));
        }
        let changed = |what: String| Err(io::Error::other(format!("{}: {what}", self.path.display())));
        if now.len() > self.length {
            return changed(format!("it grew, from {} bytes to {}", self.length, now.len()));
        }
        if self.had_name && now.nlink() == 0 {
            return changed("it was removed or replaced".into());
        }
        Ok(())
    }

    fn write_failed(&self, at: u64, error: io::Error) -> io::Error {
        about(&self.path, format_args!("cannot be written at byte {at}"), error)
    }

    /// Writes zeros over a range of a file system that has no holes.
    fn overwrite(&self, bytes: Range<u64>) -> io::Result<()> {
        let mut at = bytes.start;
        while at < bytes.end {
            let part = &ZEROS[..length_of(&(at..bytes.end)).min(ZEROS.len())];
            let written = self.file.write_all_at(part, at);
            self.written.store(true, Ordering::SeqCst);
            written.map_err(|error| self.write_failed(at, error))?;
            at += part.len() as u64;
        }
        Ok(())
    }
}

impl Memory for FileMemory {
    fn length(&self) -> u64 {
        self.length
    }

    /// One read for each run of the mask; then the other pages move together over the zero pages.
    fn read_extent(&self, page_size: PageSize, first_page: u64, mask: u64, into: &mut PooledBuffer) -> io::Result<u64> {
        let size = page_size.bytes();
        let (mut zero, mut filled) = (0, 0);
        for (first, count) in runs(mask) {
            let space = &mut into.space()[filled..];
            self.read_pages(page_size, first_page + u64::from(first), &mut space[..count as usize * size])?;
            let mut kept = 0;
            for page in 0..count as usize {
                let at = page * size;
                if is_zero(&space[at..at + size]) {
                    zero |= 1 << (first as usize + page);
                    continue;
                }
                if kept != at {
                    space.copy_within(at..at + size, kept);
                }
                kept += size;
            }
            filled += kept;
        }
        into.set_filled(filled);
        Ok(zero)
    }

    fn read_page(&self, page_size: PageSize, page: u64, into: &mut [u8]) -> io::Result<()> {
        assert_eq!(into.len(), page_size.bytes(), "room for one page");
        self.read_pages(page_size, page, into)
    }

    fn write_pages(&self, page_size: PageSize, first_page: u64, bytes: &[u8]) -> io::Result<()> {
        assert!(bytes.len().is_multiple_of(page_size.bytes()), "{} bytes are no whole pages", bytes.len());
        let count = (bytes.len() / page_size.bytes()) as u64;
        let range = self.bytes_of(page_size, first_page..first_page + count);
        let inside = &bytes[..length_of(&range)];
        let written = self.file.write_all_at(inside, range.start);
        self.written.store(true, Ordering::SeqCst);
        written.map_err(|error| self.write_failed(range.start, error))
    }

    fn write_zeros(&self, page_size: PageSize, pages: Range<u64>) -> io::Result<()> {
        let bytes = self.bytes_of(page_size, pages);
        if bytes.is_empty() {
            return Ok(());
        }
        // To the end of a partial last page, or its block of the file would stay allocated.
        let whole_pages = (bytes.end - bytes.start).next_multiple_of(page_size.bytes() as u64);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let punched = rustix::fs::fallocate(&self.file, flags, bytes.start, whole_pages);
        self.written.store(true, Ordering::SeqCst);
        match punched {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.overwrite(bytes),
            Err(error) => Err(self.write_failed(bytes.start, error.into())),
        }
    }

    fn patch(&self, page_size: PageSize, page: u64, delta: &Delta<'_>) -> io::Result<()> {
        with_scratch(page_size.bytes(), |scratch| {
            self.read_page(page_size, page, scratch)?;
            delta.apply(scratch);
            self.write_pages(page_size, page, scratch)
        })
    }

    fn untouched_in(&self, page_size: PageSize, pages: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let found = holes::untouched(&self.file, self.length, page_size, pages);
        // Checked afterwards: a truncated file looks like one with a hole at its end.
        self.check().and(found)
    }
}

fn length_of(bytes: &Range<u64>) -> usize {
    usize::try_from(bytes.end - bytes.start).expect("bytes that fit in memory")
}

fn about(path: &Path, what: impl std::fmt::Display, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {what}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;
    use crate::geometry::bits;
    use crate::pool::BufferPool;

    const PAGE: PageSize = PageSize::DEFAULT;

    fn created(length: u64) -> (TempDir, FileMemory) {
        let folder = tempfile::tempdir().unwrap();
        let memory = FileMemory::create(&folder.path().join("image"), length).unwrap();
        (folder, memory)
    }

    #[test]
    fn a_created_file_is_its_owners_and_has_its_true_length() {
        use std::os::unix::fs::MetadataExt;
        let (_folder, memory) = created(3 * 4096 + 5);
        let metadata = std::fs::metadata(memory.path()).unwrap();
        assert_eq!((metadata.mode() & 0o777, metadata.len(), memory.length()), (0o600, 12293, 12293));
        memory.write_pages(PAGE, 2, &[6; 8192]).unwrap();
        assert_eq!(std::fs::metadata(memory.path()).unwrap().len(), 12293);
        let again = FileMemory::create(memory.path(), 1).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
        assert!(again.to_string().contains("image: cannot be created"), "{again}");
    }

    #[test]
    fn an_empty_file_is_no_memory() {
        let empty = FileMemory::of_source(tempfile::tempfile().unwrap(), Path::new("empty")).unwrap_err();
        assert_eq!(empty.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_file_cut_short_is_an_error_that_says_so() {
        let (_folder, memory) = created(64 * 4096);
        memory.file.set_len(4096).unwrap();
        let mut buffer = BufferPool::new(1, PAGE.extent_bytes()).try_take().unwrap();
        assert_eq!(memory.read_extent(PAGE, 0, 1, &mut buffer).unwrap(), 1);
        let errors = [memory.read_extent(PAGE, 0, 3, &mut buffer).unwrap_err(), memory.untouched(PAGE).unwrap_err()];
        for error in errors {
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
            assert!(error.to_string().ends_with("image: it was cut short, from 262144 bytes to 4096"), "{error}");
        }
    }

    #[test]
    fn a_file_that_grew_or_was_removed_is_an_error_that_says_so() {
        let (_folder, memory) = created(2 * 4096);
        memory.file.set_len(8193).unwrap();
        let words = memory.untouched(PAGE).unwrap_err().to_string();
        assert!(words.ends_with("image: it grew, from 8192 bytes to 8193"), "{words}");
        memory.file.set_len(8192).unwrap();
        memory.untouched(PAGE).unwrap();
        std::fs::remove_file(memory.path()).unwrap();
        let words = memory.untouched(PAGE).unwrap_err().to_string();
        assert!(words.ends_with("image: it was removed or replaced"), "{words}");
    }

    #[test]
    fn a_file_that_never_had_a_name_is_memory_like_any_other() {
        use std::os::fd::AsRawFd;
        let memfd = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        memfd.write_all_at(&[1; 3 * 4096], 0).unwrap();
        let path = format!("/proc/self/fd/{}", memfd.as_raw_fd());
        let memory = FileMemory::of_source(File::open(&path).unwrap(), Path::new(&path)).unwrap();
        assert_eq!(memory.untouched(PAGE).unwrap(), []);
        memfd.set_len(4096).unwrap();
        assert!(memory.untouched(PAGE).unwrap_err().to_string().contains("cut short, from 12288 bytes to 4096"));
    }

    #[test]
    fn zeros_become_holes_and_are_not_read() {
        let (_folder, memory) = created(128 * 4096 + 1);
        memory.write_pages(PAGE, 0, &vec![1; 129 * 4096]).unwrap();
        assert_eq!(memory.untouched(PAGE).unwrap(), []);
        memory.write_zeros(PAGE, 16..64).unwrap();
        memory.write_zeros(PAGE, 100..129).unwrap();
        let mut page = [1; 4096];
        memory.read_page(PAGE, 128, &mut page).unwrap();
        assert!(is_zero(&page));
        memory.read_page(PAGE, 15, &mut page).unwrap();
        assert!(page == [1; 4096]);
        let holes = memory.untouched(PAGE).unwrap();
        if holes.is_empty() {
            println!("skipped: the file system of {} has no holes", memory.path().display());
            return;
        }
        assert_eq!(holes, [16..64, 100..129]);
    }

    #[test]
    fn zeros_are_written_where_there_are_no_holes() {
        let (_folder, memory) = created(40 * 4096);
        memory.write_pages(PAGE, 0, &[3; 40 * 4096]).unwrap();
        memory.overwrite(4096..39 * 4096).unwrap();
        let mut buffer = BufferPool::new(1, PAGE.extent_bytes()).try_take().unwrap();
        let zero = memory.read_extent(PAGE, 0, (1 << 40) - 1, &mut buffer).unwrap();
        assert_eq!(zero, (1 << 39) - 2);
    }

    #[test]
    fn a_delta_patches_the_page_in_place() {
        let (_folder, memory) = created(2 * 4096 - 10);
        memory.write_pages(PAGE, 0, &[1; 8192]).unwrap();
        crate::memory::tests::patch_both_pages(&memory);
        assert_eq!(std::fs::metadata(memory.path()).unwrap().len(), 2 * 4096 - 10);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn an_extent_read_is_its_pages_read_one_by_one(mask: u64, zero: u64, shift in 12..=14u32, cut in 1..4096usize) {
            let size = PageSize::new(1 << shift).unwrap();
            let length = size.extent_bytes() - cut;
            let (_folder, memory) = created(length as u64);
            for bit in bits(!zero) {
                let page = vec![u8::try_from(bit).unwrap() + 1; size.bytes()];
                memory.write_pages(size, u64::from(bit), &page).unwrap();
            }
            let mut buffer = BufferPool::new(1, size.extent_bytes()).try_take().unwrap();
            prop_assert_eq!(memory.read_extent(size, 0, mask, &mut buffer).unwrap(), mask & zero);
            let mut expected = Vec::new();
            for bit in bits(mask & !zero) {
                let mut page = vec![0xee; size.bytes()];
                memory.read_page(size, u64::from(bit), &mut page).unwrap();
                if bit == 63 {
                    prop_assert!(is_zero(&page[size.bytes() - cut..]));
                }
                prop_assert!(page[0] == u8::try_from(bit).unwrap() + 1);
                expected.extend(page);
            }
            prop_assert!(buffer[..] == expected);
        }
    }
}
