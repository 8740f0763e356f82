//! Access to guest memory: how pages leave and enter the memory of one RAM block.
//!
//! Whole extents are read and runs of pages are written through one trait, [`Memory`]. Its memory may be mapped into this process
//! ([`mapped`]) or a file that is read and written by position ([`mod@file`]). A running guest changes memory while it is read,
//! so nothing here returns a reference to guest memory: bytes are copied out once, and copied in (ARCHITECTURE.md, law 3: what is
//! compared, hashed or encoded is one copy).

mod copy;
mod discard;
pub mod file;
mod holes;
pub mod mapped;
mod populate;
mod present;
pub(crate) mod undumped;

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::geometry::{BlockInfo, Layout, LayoutError, PageSize};
use crate::pool::PooledBuffer;
use crate::xbzrle::Delta;

pub use file::FileMemory;
pub use mapped::{Lent, MappedMemory};

/// Memory of one RAM block, in pages.
///
/// Implementations are called from many threads at once, for different pages (law 4: a page keeps its lane). Reads
/// may race with the guest's writes; writes happen at a destination whose guest does not run yet. A partial last page
/// (of a block whose length is not a multiple of the page size) reads as zeros beyond the block's end, and writes there
/// are dropped.
pub trait Memory: Send + Sync + fmt::Debug {
    /// True length in bytes.
    fn length(&self) -> u64;

    /// The mapping that it is, where the whole of it is mapped into this process.
    fn into_mapping(self: Arc<Self>) -> Option<Arc<MappedMemory>> {
        None
    }

    /// Reads the pages of `mask` of an extent (bit 0 is page `first_page`), each byte once, in one pass with the zero
    /// test: pages that are not zero are put whole one after another into `into` from its start (its filled length is set
    /// to their sum), zero pages are left out. Returns the mask of the zero pages.
    ///
    /// # Errors
    /// When the memory cannot be read: a file that shrank is [`io::ErrorKind::UnexpectedEof`].
    fn read_extent(&self, page_size: PageSize, first_page: u64, mask: u64, into: &mut PooledBuffer) -> io::Result<u64>;

    /// Copies one page out, whole, zero or not. For digests, page hashes and deltas on memory without mapping.
    ///
    /// # Errors
    /// As [`Memory::read_extent`].
    fn read_page(&self, page_size: PageSize, page: u64, into: &mut [u8]) -> io::Result<()>;

    /// Writes whole pages that lie one after another, from page `first_page` on.
    ///
    /// # Errors
    /// When they cannot be written, as on a full disk.
    fn write_pages(&self, page_size: PageSize, first_page: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes pages zero that may hold other content. Where the memory can release them (as a hole), it does.
    ///
    /// # Errors
    /// As [`Memory::write_pages`].
    fn write_zeros(&self, page_size: PageSize, pages: Range<u64>) -> io::Result<()>;

    /// Populates pages that are about to be written for the first time, without changing them: one call is cheaper than faults as
    /// they are written. Does nothing unless the memory has a cheaper way.
    ///
    /// # Errors
    /// When it cannot: the pages may still be written, and no further call is needed.
    fn populate(&self, page_size: PageSize, pages: Range<u64>) -> io::Result<()> {
        let _ = (page_size, pages);
        Ok(())
    }

    /// As [`Memory::populate`], by huge pages: cheaper still, but all of `pages`, a stretch, then take up memory, whether they
    /// are written or not. False, with nothing done, if there are no huge pages for this range.
    ///
    /// # Errors
    /// As [`Memory::populate`].
    fn populate_huge(&self, page_size: PageSize, pages: Range<u64>) -> io::Result<bool> {
        let _ = (page_size, pages);
        Ok(false)
    }

    /// Applies a delta to a page in place. The delta was checked completely before, so it cannot fail in the middle.
    ///
    /// # Errors
    /// When the page cannot be read or written.
    fn patch(&self, page_size: PageSize, page: u64, delta: &Delta<'_>) -> io::Result<()>;

    /// The ranges of untouched pages, ascending: they are zero, and need not be read. Called after the dirty log was started, so
    /// that a later write to one is found. Empty unless the memory knows.
    ///
    /// # Errors
    /// When the kernel refuses the query; the caller continues without the answer.
    fn untouched(&self, page_size: PageSize) -> io::Result<Vec<Range<u64>>> {
        self.untouched_in(page_size, 0..self.length().div_ceil(page_size.bytes() as u64))
    }

    /// The part of [`Memory::untouched`] in `pages`, a range of pages of this memory. Implementations provide this method.
    ///
    /// # Errors
    /// As [`Memory::untouched`].
    fn untouched_in(&self, page_size: PageSize, pages: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let _ = (page_size, pages);
        Ok(Vec::new())
    }
}

/// A RAM block: its description and its memory. Cheap to clone.
#[derive(Clone, Debug)]
pub struct RamBlock {
    /// Id, length, addresses.
    pub info: BlockInfo,
    /// Its memory, `info.length` bytes.
    pub memory: Arc<dyn Memory>,
    /// Whether the block reads as zeros wherever nothing was loaded. A destination then need not touch zero pages.
    pub fresh: bool,
}

/// All RAM blocks of a guest with their layout, for the stages. Clones share it.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    shared: Arc<(Layout, Vec<RamBlock>)>,
}

impl GuestMemory {
    /// Checks the blocks and lays them out.
    ///
    /// # Errors
    /// A [`LayoutError`] if the blocks are invalid.
    ///
    /// # Panics
    /// If a block's memory does not have the block's length: that is the guest's mistake.
    pub fn new(page_size: PageSize, blocks: Vec<RamBlock>) -> Result<Self, LayoutError> {
        let layout = Layout::new(page_size, blocks.iter().map(|block| block.info.clone()).collect())?;
        for block in &blocks {
            assert_eq!(block.memory.length(), block.info.length, "length of RAM block {:?}", block.info.id);
        }
        Ok(Self { shared: Arc::new((layout, blocks)) })
    }

    /// The layout of the blocks.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.shared.0
    }

    /// The size of every page.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.layout().page_size()
    }

    /// A block by its index.
    ///
    /// # Panics
    /// If there is no such block.
    #[must_use]
    pub fn block(&self, index: u32) -> &RamBlock {
        &self.shared.1[index as usize]
    }

    /// All blocks.
    #[must_use]
    pub fn blocks(&self) -> &[RamBlock] {
        &self.shared.1
    }
}

/// A page of zeros of any size.
pub(crate) static ZEROS: [u8; 65536] = [0; 65536];

/// Whether all bytes are zero. Runs at the speed of memory, up to the first that is not.
fn is_zero(bytes: &[u8]) -> bool {
    let or = |chunk: &[u8]| chunk.iter().fold(0, |all, byte| all | byte);
    let mut chunks = bytes.chunks_exact(256);
    chunks.all(|chunk| or(chunk) == 0) && or(chunks.remainder()) == 0
}

/// Room for one page in each thread, so that no page allocates. Its content is unspecified.
fn with_scratch<R>(bytes: usize, work: impl FnOnce(&mut [u8]) -> R) -> R {
    thread_local! {
        static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.resize(bytes.max(scratch.len()), 0);
        work(&mut scratch[..bytes])
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xbzrle::{Encoded, encode_page};

    /// Patches two pages of ones, the last of which lacks its last ten bytes: both halves and the very end change.
    pub(super) fn patch_both_pages(memory: &dyn Memory) {
        for page in 0..2 {
            let (old, mut new, mut out) = ([1; 4096], [1; 4096], [0; 4096]);
            new[5] = 7;
            new[2048..2148].fill(8);
            new[4080..].fill(9);
            let Encoded::Delta(length) = encode_page(&old, &new, &mut out) else { panic!("a small delta") };
            let delta = Delta::parse(&out[..length], 4096).unwrap();
            memory.patch(PageSize::DEFAULT, page, &delta).unwrap();
            let mut patched = [0; 4096];
            memory.read_page(PageSize::DEFAULT, page, &mut patched).unwrap();
            if page == 1 {
                new[4086..].fill(0);
            }
            assert!(patched == new, "page {page} of {memory:?}");
        }
    }

    #[test]
    fn zeros_are_distinguished_from_others_wherever_the_other_stands() {
        for length in [0, 1, 255, 256, 257, 1000] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for at in 0..length {
                bytes[at] = 1;
                assert!(!is_zero(&bytes));
                bytes[at] = 0;
            }
        }
    }
}
