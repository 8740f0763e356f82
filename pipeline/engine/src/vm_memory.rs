//! The adapter for VMMs that use the `vm-memory` crate, version 0.18: guest memory and a dirty log from its types.
//!
//! [`guest_memory`] makes a RAM block of each region, and keeps the mappings alive. [`build`] maps the memory of a
//! guest that arrives, and checks it against the received blocks. [`BitmapLog`] is the dirty log of the writes that go
//! through vm-memory's own API (devices, a boot loader): they mark vm-memory's bitmap. KVM logs the stores of vCPUs: a
//! guest returns both logs, and a sync ORs them.
//!
//! | writer | log that finds the write |
//! |---|---|
//! | the VMM, through `GuestMemory`, `Bytes`, `VolatileSlice` | [`BitmapLog`] |
//! | a vCPU | a KVM log over the same regions |
//! | other writers (vhost, io_uring into raw pointers) | none: they must mark the page in the [`BitmapLog`] |
//!
//! # Example
//! ```
//! use std::sync::Arc;
//! use memferry::dirty_log::DirtyLog;
//! use memferry::geometry::PageSize;
//! use memferry::guest::GuestError;
//! use memferry::vm_memory::{BitmapLog, build, guest_memory};
//! use vm_memory::bitmap::AtomicBitmap;
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
//! # use vm_memory::GuestMemoryBackend;
//!
//! // At the source, for `Guest::memory` and `SourceGuest::dirty_logs`:
//! let ram: GuestMemoryMmap<AtomicBitmap> = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
//! let memory = guest_memory(&ram, PageSize::DEFAULT)?;
//! let logs: Vec<Arc<dyn DirtyLog>> = vec![Arc::new(BitmapLog::new(&ram, memory.layout())?)];
//! ram.write_obj(7u32, GuestAddress(0x1000)).unwrap();
//!
//! // At the destination, in `GuestBuilder::build`, for the page size and the blocks that come. `memory` is what `Guest::memory` returns.
//! # let (page_size, blocks) = (PageSize::DEFAULT, memory.layout().blocks());
//! let (ram, memory) = build::<AtomicBitmap>(page_size, blocks)?;
//! # assert_eq!((ram.num_regions(), memory.layout().blocks()), (1, blocks));
//! # Ok::<(), GuestError>(())
//! ```

use std::any::Any;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::dirty_log::DirtyLog;
use memferry_stages::geometry::{self, BlockInfo, ExtentAt, Layout, PageAt, PageSize};
use memferry_stages::memory::{GuestMemory, Lent, MappedMemory, RamBlock};
use rustix::mm::MapFlags;
use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap};
use vm_memory::mmap::{GuestRegionMmap, MmapRegion};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::guest::GuestError;
use crate::host;
use crate::migration::built_otherwise;

/// The RAM blocks of this memory, one for each region, in the order of their addresses. A block is named after its guest
/// address, so that the same machine elsewhere has the same names.
///
/// Nothing is copied. The regions' mappings live as long as the returned value. Blocks count as fresh: at a destination
/// the memory must not have been written before.
///
/// # Errors
/// When a region is not mapped for reading and writing, or does not start on a page, or there are no regions.
pub fn guest_memory<B>(ram: &GuestMemoryMmap<B>, page_size: PageSize) -> Result<GuestMemory, GuestError>
where
    B: Bitmap + Send + Sync + 'static,
{
    let blocks = ram.iter().map(ram_block).collect::<Result<_, _>>()?;
    Ok(GuestMemory::new(page_size, blocks)?)
}

/// Maps the memory of a guest that arrives, for use in [`GuestBuilder::build`](crate::guest::GuestBuilder::build), from
/// the received page size and blocks. Returns vm-memory's regions, and the same memory as RAM blocks.
///
/// The peer is not trusted, so the result is checked: it has exactly these blocks, named as [`guest_memory`] names
/// them, none of them shared, and together no larger than this host's memory. A VMM that knows the size of its machine
/// checks that too.
///
/// # Errors
/// When these blocks cannot be built, with the first one that cannot.
pub fn build<B>(page_size: PageSize, blocks: &[BlockInfo]) -> Result<(GuestMemoryMmap<B>, GuestMemory), GuestError>
where
    B: NewBitmap + Send + Sync + 'static,
{
    if let Some(block) = blocks.iter().find(|block| block.ignored) {
        return Err(GuestError(format!(
            "block {:?} is ignored at the source, and not shared with this host",
            block.id
        )));
    }
    let bytes = blocks.iter().fold(0, |sum: u64, block| sum.saturating_add(block.length));
    if let Some(host) = host::beyond_memory(bytes) {
        return Err(GuestError(format!("the guest has {bytes} bytes of memory, more than {host}")));
    }
    let ram = GuestMemoryMmap::from_ranges(&ranges(blocks)?)
        .map_err(|error| GuestError::caused("the guest's RAM cannot be mapped", error))?;
    let memory = guest_memory(&ram, page_size)?;
    match built_otherwise(&memory, page_size, blocks) {
        None => Ok((ram, memory)),
        Some(what) => Err(GuestError(format!("the blocks do not fit: {what}"))),
    }
}

/// The slots of a machine whose KVM memory slots are the regions of this memory, numbered from 0 in the order of the
/// blocks. Pass them to [`KvmLog`](crate::dirty_log::kvm::KvmLog) with the VM's descriptor.
#[must_use]
pub fn slots(layout: &Layout) -> Vec<memferry_stages::kvm::Slot> {
    let slot = |(number, block): (u32, &BlockInfo)| memferry_stages::kvm::Slot {
        number,
        block: number,
        offset: 0,
        length: block.length.next_multiple_of(4096),
        guest_address: block.guest_address,
    };
    (0..).zip(layout.blocks()).map(slot).collect()
}

/// The address and length of each block, as `GuestMemoryMmap::from_ranges` takes them, for a VMM that does not map its
/// memory with [`build`]. Such a VMM checks the received blocks itself.
///
/// # Errors
/// When a block is longer than the address space.
pub fn ranges(blocks: &[BlockInfo]) -> Result<Vec<(GuestAddress, usize)>, GuestError> {
    let range = |block: &BlockInfo| {
        let length = usize::try_from(block.length);
        let length = length.map_err(|_| GuestError(format!("block {:?} has {} bytes", block.id, block.length)))?;
        Ok((GuestAddress(block.guest_address), length))
    };
    blocks.iter().map(range).collect()
}

fn ram_block<B>(region: &GuestRegionMmap<B>) -> Result<RamBlock, GuestError>
where
    B: Bitmap + Send + Sync + 'static,
{
    let (mapping, address): (Arc<MmapRegion<B>>, _) = (region.get_mmap(), region.start_addr().0);
    let refuse = |why: &str| GuestError(format!("the region at {address:#x} {why}"));
    let length = mapping.size();
    let info = BlockInfo {
        guest_address: address,
        backing_page_size: rustix::param::page_size() as u64,
        ..BlockInfo::new(format!("ram@{address:#x}"), length as u64)
    };
    let access = i32::try_from(rustix::mm::ProtFlags::READ.union(rustix::mm::ProtFlags::WRITE).bits()).expect("3");
    if mapping.prot() & access != access {
        return Err(refuse("is not mapped for reading and writing"));
    }
    let start = NonNull::new(mapping.as_ptr()).filter(|start| start.addr().get().is_multiple_of(4096));
    let start = start.filter(|_| length > 0).ok_or_else(|| refuse("does not start on a page, or is empty"))?;
    let kind = kind(&mapping);
    // SAFETY: the mapping is readable and writable and lives as long as its Arc, which is stored; vm-memory hands out
    // pointers and volatile slices, and a caller that makes references of them does so at its own risk; `kind` errs on
    // the side of shared.
    let memory = unsafe { MappedMemory::from_raw(start, length, kind, mapping as Arc<dyn Any + Send + Sync>) };
    Ok(RamBlock { info, memory: Arc::new(memory), fresh: true })
}

/// Only memory known to be private and anonymous reads as zero while it is untouched.
fn kind<B: Bitmap>(mapping: &MmapRegion<B>) -> Lent {
    let shared = i32::try_from(MapFlags::SHARED.bits()).expect("1");
    let anonymous = mapping.owned() && mapping.file_offset().is_none() && mapping.flags() & shared == 0;
    if anonymous { Lent::Anonymous } else { Lent::Shared }
}

/// The dirty log of writes through vm-memory. Nothing else may reset its bitmaps while a migration runs.
///
/// vm-memory returns all of a region's bitmap at once, with an atomic operation for each of its words, or bit by bit,
/// which costs thirty times as much. So a sync takes all of it with the first range that is requested, and answers the
/// following ranges from that copy. A write that comes in between is found by the next sync.
#[derive(Debug)]
pub struct BitmapLog {
    regions: Vec<Followed>,
    /// Bits that were taken from the bitmaps and not requested yet.
    taken: DirtyBitmap,
}

#[derive(Debug)]
struct Followed {
    mapping: Arc<MmapRegion<AtomicBitmap>>,
    /// Bits of vm-memory's bitmap for each page.
    bits: u64,
    /// The extent that the current sync requests next; a range that begins elsewhere belongs to another sync.
    next: AtomicU32,
}

impl BitmapLog {
    /// A log for the regions of this memory, laid out by [`guest_memory`].
    ///
    /// # Errors
    /// When a region's bitmap has pages that do not divide those of the layout.
    ///
    /// # Panics
    /// If the layout is not the layout of this memory.
    pub fn new(ram: &GuestMemoryMmap<AtomicBitmap>, layout: &Layout) -> Result<Self, GuestError> {
        let follow = |region: &GuestRegionMmap<AtomicBitmap>| {
            let mapping = region.get_mmap();
            let bits = bits_of_a_page(mapping.bitmap(), layout.page_size())?;
            Ok(Followed { mapping, bits, next: AtomicU32::new(0) })
        };
        let regions = ram.iter().map(follow).collect::<Result<Vec<_>, GuestError>>()?;
        let lengths = regions.iter().map(|region| region.mapping.size() as u64);
        assert!(lengths.eq(layout.blocks().iter().map(|block| block.length)), "a block for each region");
        Ok(Self { regions, taken: DirtyBitmap::empty(layout) })
    }

    /// Takes the marked pages of a region. A bit is reset before its page is read, so a later write sets it again.
    fn take(&self, block: u32) {
        let Followed { mapping, bits, .. } = &self.regions[block as usize];
        for (index, word) in (0_u32..).zip(mapping.bitmap().get_and_reset()) {
            if *bits == 1 {
                self.taken.set_mask(ExtentAt { block, extent: index }, word);
                continue;
            }
            for bit in geometry::bits(word) {
                self.taken.set(PageAt { block, page: (u64::from(index) * 64 + u64::from(bit)) / bits });
            }
        }
    }

    fn forget(&self) {
        (0..).zip(&self.regions).for_each(|(block, _)| self.take(block));
        for at in self.taken.extents() {
            let _forgotten = self.taken.take(at);
        }
    }
}

impl DirtyLog for BitmapLog {
    /// Drops the marks: the writes are in memory, which is not read yet.
    fn start(&self) -> io::Result<()> {
        self.forget();
        Ok(())
    }

    fn sync(&self, block: u32, extents: Range<u32>, into: &DirtyBitmap) -> io::Result<()> {
        // The first extent begins a sync, wherever the previous one stopped. Syncs do not overlap.
        let next = self.regions[block as usize].next.swap(extents.end, Ordering::Relaxed);
        if extents.start == 0 || extents.start != next {
            self.take(block);
        }
        for extent in extents {
            let at = ExtentAt { block, extent };
            into.set_mask(at, self.taken.take(at));
        }
        Ok(())
    }

    fn mark(&self, block: u32, pages: Range<u64>) {
        let page = self.taken.layout().page_size().bytes();
        let (first, count) = (usize::try_from(pages.start), usize::try_from(pages.end - pages.start));
        let (first, count) = (first.expect("a page in memory"), count.expect("pages in memory"));
        self.regions[block as usize].mapping.bitmap().mark_dirty(first * page, count * page);
    }

    fn memory_bytes(&self) -> u64 {
        self.taken.memory_bytes()
    }

    /// Drops the marks. vm-memory owns its bitmaps, which continue to be marked.
    fn stop(&self) -> io::Result<()> {
        self.forget();
        Ok(())
    }
}

/// How many bits a page has. The size of a bitmap's page can only be inferred from the number of its bits. If several
/// sizes fit, the bitmap has one bit, which stands for the whole region.
fn bits_of_a_page(bitmap: &AtomicBitmap, page_size: PageSize) -> Result<u64, GuestError> {
    let (bits, bytes) = (bitmap.len(), bitmap.byte_size());
    let mut sizes = (0..=page_size.bytes().trailing_zeros()).map(|shift| 1_usize << shift);
    let size = sizes.find(|&size| bytes.div_ceil(size) == bits).map(|size| (page_size.bytes() / size) as u64);
    size.ok_or_else(|| {
        GuestError(format!("a bitmap of {bits} bits for {bytes} bytes does not fit pages of {page_size:?}"))
    })
}
