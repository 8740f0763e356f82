//! What the tests of the stages share: guests to work on, and queues whose other end is the test.

use std::sync::Arc;

use crate::batch::{Batch, Item, RoundKind};
use crate::bitmap::DirtyBitmap;
use crate::geometry::{BlockInfo, ExtentAt, Layout, PageSize};
use crate::memory::{GuestMemory, MappedMemory, Memory, RamBlock};
use crate::meter::Meter;
use crate::queue::Inlet;
use crate::stage_id::StageId;

/// A page size in KiB.
pub(crate) fn page_size(kib: u64) -> PageSize {
    PageSize::new(kib << 10).expect("4 to 64")
}

/// The description of a block of a number of bytes.
pub(crate) fn block(index: usize, length: u64) -> BlockInfo {
    BlockInfo::new(format!("ram{index}"), length)
}

/// Blocks of these lengths.
pub(crate) fn layout(page_size: PageSize, lengths: &[u64]) -> Layout {
    let blocks = lengths.iter().enumerate().map(|(index, &length)| block(index, length));
    Layout::new(page_size, blocks.collect()).expect("a few blocks")
}

/// A guest over these memories.
pub(crate) fn guest(page_size: PageSize, memories: Vec<Arc<dyn Memory>>) -> GuestMemory {
    let ram = |(index, memory): (usize, Arc<dyn Memory>)| RamBlock {
        info: block(index, memory.length()),
        memory,
        fresh: true,
    };
    GuestMemory::new(page_size, memories.into_iter().enumerate().map(ram).collect()).expect("a few blocks")
}

/// Memory of this process.
pub(crate) fn mapped(length: u64) -> Arc<MappedMemory> {
    Arc::new(MappedMemory::anonymous(usize::try_from(length).expect("a few MiB")).expect("memory"))
}

/// Memory in which every page of 4 KiB holds its own number, from 1.
pub(crate) fn numbered(bytes: u64) -> Arc<MappedMemory> {
    let memory = mapped(bytes);
    let at = |page: u64| usize::try_from(page * 4096).expect("a few MiB");
    (0..bytes / 4096).for_each(|page| memory.store(at(page), &(page + 1).to_le_bytes()));
    memory
}

/// A meter without a reader.
pub(crate) fn meter() -> Arc<Meter> {
    Meter::start(StageId::SCANNER)
}

/// A batch of the first block.
pub(crate) fn batch(extent: u32, mask: u64, round: u32) -> Batch {
    Batch { at: ExtentAt { block: 0, extent }, mask, untouched: 0, round, kind: RoundKind::Live }
}

/// Everything in a queue by now.
pub(crate) fn drain<T>(inlet: &Inlet<T>) -> Vec<T> {
    std::iter::from_fn(|| inlet.try_next()).collect()
}

/// The batches among items.
pub(crate) fn batches<B>(items: Vec<Item<B>>) -> Vec<B> {
    let batch = |item| match item {
        Item::Batch(batch) => Some(batch),
        _ => None,
    };
    items.into_iter().filter_map(batch).collect()
}

/// The words of a bitmap.
pub(crate) fn words(bitmap: &DirtyBitmap) -> Vec<u64> {
    bitmap.extents().map(|at| bitmap.peek(at)).collect()
}

/// Runs a test's future on this thread, with a thread beside it where blocking is allowed.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(future)
}
