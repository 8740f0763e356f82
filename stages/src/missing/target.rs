//! Where missing pages are placed: a userfaultfd, and where each block lies in the memory of its owner.

use std::io;
use std::mem;
use std::ops::Range;
use std::sync::Arc;

use super::{Discards, NoMissingFaults};
use crate::bitmap::DirtyBitmap;
use crate::geometry::{Layout, PageAt, PageSize};
use crate::kernel::missing::MissingFaults;
use crate::memory::MappedMemory;

/// Why memory cannot be registered for missing faults.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TargetError {
    /// There is no userfaultfd.
    #[error("no userfaultfd for missing faults: {0}")]
    Unavailable(#[from] NoMissingFaults),
    /// The host's pages are larger than the guest's: one would be placed in parts.
    #[error("pages of {guest} bytes cannot be placed on a host with pages of {host} bytes")]
    HostPages {
        /// Bytes of a page of the guest.
        guest: usize,
        /// Bytes of a page of the host.
        host: usize,
    },
    /// A page is expected in a block whose memory was not given.
    #[error("{0} is expected, but its block has no memory here")]
    NoMemory(PageAt),
    /// Memory in reserved huge pages, which takes no pages of the guest's size.
    #[error("block {0} is in reserved huge pages, which are not placed in parts")]
    HugePages(u32),
    /// The kernel does not register the memory.
    #[error("block {block} cannot be registered for missing faults: {error}")]
    Register {
        /// The block.
        block: u32,
        /// Why.
        error: io::Error,
    },
    /// The kernel gives no descriptor.
    #[error("no descriptor: {0}")]
    Kernel(#[source] io::Error),
}

/// A block in the address space of its owner, whole pages of the host.
#[derive(Clone, Copy, Debug)]
struct Region {
    start: usize,
    length: usize,
}

/// Does not access the memory: addresses may be another process's.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) faults: Arc<MissingFaults>,
    /// The layout of the blocks in pages of the host.
    pub(super) host_layout: Layout,
    /// By block.
    regions: Vec<Option<Region>>,
    /// By address: where blocks start, and which.
    by_address: Vec<(usize, u32)>,
    /// By block: memory of this process, which stays mapped as long as it is registered.
    memory: Vec<Option<Arc<MappedMemory>>>,
}

impl Target {
    /// Registers memory of this process.
    pub(super) fn own(
        layout: &Layout,
        blocks: Vec<(u32, Arc<MappedMemory>)>,
        expected: &DirtyBitmap,
        discards: Discards,
    ) -> Result<Self, TargetError> {
        let host_layout = host_layout(layout)?;
        let mut memory = vec![None; layout.blocks().len()];
        for (block, mapped) in blocks {
            assert_eq!(mapped.len() as u64, layout.blocks()[block as usize].length, "length of block {block}");
            memory[block as usize] = Some(mapped);
        }
        if let Some(at) = expected.all_dirty_extents().find(|at| memory[at.block as usize].is_none()) {
            return Err(TargetError::NoMemory(at.page(expected.peek(at).trailing_zeros())));
        }
        let faults = MissingFaults::open(discards == Discards::Followed)?;
        for (block, mapped) in (0..).zip(&memory).filter_map(|(block, mapped)| Some((block, mapped.as_ref()?))) {
            mapped.advise_no_huge();
            let region = region(mapped);
            // SAFETY: the memory is mapped as long as this value lives, which is no longer than the descriptor unless it is leaked:
            // nobody places pages then. `MappedMemory` has no references into it, and its missing pages are the caller's to fill.
            let registered = unsafe { faults.register(region.start..region.start + region.length) };
            if !registered.map_err(|error| TargetError::Register { block, error })? {
                return Err(TargetError::HugePages(block));
            }
        }
        let regions: Vec<_> = memory.iter().map(|mapped| mapped.as_deref().map(region)).collect();
        let starts = (0..).zip(&regions).filter_map(|(block, region)| Some((region.as_ref()?.start, block)));
        let mut by_address: Vec<_> = starts.collect();
        by_address.sort_unstable();
        Ok(Self { faults: Arc::new(faults), host_layout, regions, by_address, memory })
    }

    pub(super) fn host_bytes(&self) -> usize {
        self.host_layout.page_size().bytes()
    }

    pub(super) fn memory(&self, block: u32) -> Option<&Arc<MappedMemory>> {
        self.memory[block as usize].as_ref()
    }

    /// The address of a block.
    pub(super) fn start(&self, block: u32) -> usize {
        self.region(block).start
    }

    /// The bytes of a block, in whole pages of the host.
    pub(super) fn length(&self, block: u32) -> usize {
        self.region(block).length
    }

    /// The addresses of all blocks.
    pub(super) fn regions(&self) -> impl Iterator<Item = Range<usize>> {
        self.regions.iter().flatten().map(|region| region.start..region.start + region.length)
    }

    /// The block of an address, and the offset there.
    pub(super) fn find(&self, address: usize) -> Option<(u32, usize)> {
        let after = self.by_address.partition_point(|(start, _)| *start <= address);
        let (start, block) = self.by_address[after.checked_sub(1)?];
        let offset = address - start;
        (offset < self.length(block)).then_some((block, offset))
    }

    /// The parts of a range of addresses that lie in blocks, as offsets there.
    pub(super) fn parts(&self, range: &Range<usize>) -> impl Iterator<Item = (u32, Range<usize>)> {
        let part = move |&(start, block): &(usize, u32)| {
            let end = range.end.min(start + self.length(block));
            let first = range.start.max(start);
            (first < end).then(|| (block, first - start..end - start))
        };
        self.by_address.iter().filter_map(part)
    }

    /// Never closes the descriptor.
    pub(super) fn leak(&self) {
        mem::forget(self.faults.clone());
    }

    fn region(&self, block: u32) -> Region {
        self.regions[block as usize].expect("pages are expected only where there is memory")
    }
}

fn region(memory: &MappedMemory) -> Region {
    Region { start: memory.as_ptr().addr(), length: memory.len().next_multiple_of(rustix::param::page_size()) }
}

/// The blocks in pages of the host, where these are not larger than the guest's.
fn host_layout(layout: &Layout) -> Result<Layout, TargetError> {
    let (guest, host) = (layout.page_size().bytes(), rustix::param::page_size());
    let size = PageSize::new(host as u64).filter(|size| size.bytes() <= guest);
    let layout = size.and_then(|size| Layout::new(size, layout.blocks().to_vec()).ok());
    layout.ok_or(TargetError::HostPages { guest, host })
}
