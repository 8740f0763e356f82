//! Where a file has holes, in whole pages.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::geometry::PageSize;

/// The type that `fstatfs` returns for tmpfs, and so for memfds (`TMPFS_MAGIC`).
const TMPFS: rustix::fs::FsWord = 0x0102_1994;
/// The unit of `st_blocks`.
const BLOCK_BYTES: u64 = 512;

/// The pages of `pages` that lie wholly in holes of a file of `length` bytes. Moves the file's cursor. A file system
/// without holes reports everything as data.
pub(super) fn untouched(
    file: &File,
    length: u64,
    page_size: PageSize,
    pages: Range<u64>,
) -> io::Result<Vec<Range<u64>>> {
    if is_whole_in_memory(file, length)? {
        return Ok(Vec::new());
    }
    let size = page_size.bytes() as u64;
    let end = (pages.end * size).min(length);
    let mut at = pages.start * size;
    let mut found = Vec::new();
    while at < end {
        let data = data_from(file, at)?.unwrap_or(end).min(end);
        // The last page may be partial: a hole up to the block's end covers it.
        let hole = at.div_ceil(size)..if data == length { length.div_ceil(size) } else { data / size };
        if !hole.is_empty() {
            found.push(hole);
        }
        if data == end {
            break;
        }
        at = rustix::fs::seek(file, SeekFrom::Hole(data))?;
    }
    Ok(found)
}

/// Whether it is a file in memory that takes up as much as its length. Then it has no holes, and the kernel need not check each of
/// its pages to find the end of the data. (On a disk, allocated blocks that were never written take up room as well.)
fn is_whole_in_memory(file: &File, length: u64) -> io::Result<bool> {
    let allocated = || file.metadata().map(|metadata| metadata.blocks() * BLOCK_BYTES);
    Ok(rustix::fs::fstatfs(file)?.f_type == TMPFS && allocated()? >= length)
}

/// The offset of the next data from `at` on; `None` if there is none.
fn data_from(file: &File, at: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) => Ok(Some(data)),
        Err(Errno::NXIO) => Ok(None),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(at)),
        Err(error) => Err(error.into()),
    }
}
