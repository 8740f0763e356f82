//! Finds the untouched pages of private anonymous memory.

use std::io;
use std::ops::Range;

use crate::geometry::PageSize;
use crate::kernel::{PRESENT, Pagemap, SWAPPED, Scan};

/// The pages of `pages` of which no byte is in memory or in swap. `start` is where the private anonymous mapping of
/// `length` bytes begins. Empty where the kernel does not report them.
pub(super) fn untouched(start: usize, length: usize, size: PageSize, pages: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let Ok(pagemap) = Pagemap::open() else { return Ok(Vec::new()) };
    let host = rustix::param::page_size();
    let offset = |page: u64| usize::try_from(page).map_or(length, |page| page.saturating_mul(size.bytes())).min(length);
    // A host page larger than ours is checked as a whole.
    let first = start + offset(pages.start) / host * host;
    let end = start + offset(pages.end).next_multiple_of(host);
    let mut found = Vec::new();
    let mut next = pages.start;
    let here = |touched: Range<usize>| {
        let first = ((touched.start - start) / size.bytes()) as u64;
        let end = (touched.end - start).div_ceil(size.bytes()) as u64;
        if first > next {
            found.push(next..first.min(pages.end));
        }
        next = next.max(end);
    };
    match pagemap.scan(Scan { all_of: 0, any_of: PRESENT | SWAPPED, protect: false }, first..end, here) {
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NOTTY.raw_os_error()) => return Ok(Vec::new()),
        other => other?,
    }
    if next < pages.end {
        found.push(next..pages.end);
    }
    Ok(found)
}
