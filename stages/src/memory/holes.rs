//! Where a file has holes, in whole pages.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::geometry::PageSize;

/// The pages of `pages` that lie wholly in holes of a file of `length` bytes. Moves the file's cursor. A file system
/// without holes says that everything is data.
pub(super) fn untouched(
    file: &File,
    length: u64,
    page_size: PageSize,
    pages: Range<u64>,
) -> io::Result<Vec<Range<u64>>> {
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

/// Where the next data is from `at` on: `None` if there is none.
fn data_from(file: &File, at: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) => Ok(Some(data)),
        Err(Errno::NXIO) => Ok(None),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(at)),
        Err(error) => Err(error.into()),
    }
}
