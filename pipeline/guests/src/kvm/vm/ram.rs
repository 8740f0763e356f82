//! The machine's memory: its RAM blocks, the hole below 4 GiB, and its initial content.
//!
//! ```text
//! offset    0x1000  0x2000  0x4000   0x6000         0x8000    0x20000                  2 MiB
//!           GDT     IDT     program  shared words   stacks    page tables              the region, and the rest
//! ```
//!
//! An address of the program is an offset in RAM: the page tables leave the hole out, so that a region may span it.

use std::ops::Range;
use std::sync::Arc;

use fastrand::Rng;
use memferry_stages::dirty_log::{DirtyLog, SoftwareLog};
use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::kvm::Slot;
use memferry_stages::memory::{GuestMemory, MappedMemory, RamBlock};

use super::program::{self, TICK_VECTOR};
use crate::balloon::Ballooned;
use crate::free::FreeRanges;
use crate::kvm::settings::{KvmSettings, MEMORY_UNIT, PAGE_BYTES};
use memferry::guest::GuestError;
use memferry::guest::hints::BlockPages;

/// Where the hole begins and ends, in the guest's physical memory.
const HOLE: Range<u64> = 3 << 30..4 << 30;

pub(super) const GDT: u64 = 0x1000;
pub(super) const IDT: u64 = 0x2000;
pub(super) const PROGRAM: u64 = 0x4000;
const STACKS: u64 = 0x8000;
const STACK_BYTES: u64 = 0x1000;
pub(super) const TABLES: u64 = 0x2_0000;

/// Selectors of the descriptors in the GDT.
pub(super) const CODE_SELECTOR: u16 = 8;
pub(super) const DATA_SELECTOR: u16 = 16;
/// Bytes of the GDT: null, code, data.
pub(super) const GDT_BYTES: u16 = 24;
/// Bytes of the IDT, of 16 bytes for each vector up to the timer's.
pub(super) const IDT_BYTES: u16 = (TICK_VECTOR as u16 + 1) * 16;

/// The memory of a machine, and the log of its devices' writes.
#[derive(Debug)]
pub(super) struct Ram {
    pub(super) memory: GuestMemory,
    pub(super) blocks: Vec<Arc<MappedMemory>>,
    /// The host's writes are marked here: no other log sees them.
    pub(super) host_writes: Arc<SoftwareLog>,
    /// Free memory, page by page.
    free: Option<FreeRanges>,
    free_pages: Range<u32>,
    unplugged: Range<u32>,
}

impl Ram {
    /// Memory that reads as zeros.
    pub(super) fn new(settings: &KvmSettings, is_destination: bool) -> Result<Self, GuestError> {
        let infos = block_infos(settings);
        let map = |info: &BlockInfo| match &settings.shared {
            Some(shared) if info.ignored => shared.map(is_destination),
            _ => map(info),
        };
        let blocks = infos.iter().map(map).collect::<Result<Vec<_>, _>>()?;
        let block = |(info, memory): (BlockInfo, &Arc<MappedMemory>)| RamBlock {
            fresh: !info.ignored,
            info,
            memory: memory.clone(),
        };
        let rams = infos.into_iter().zip(&blocks).map(block).collect();
        let memory = GuestMemory::new(PageSize::DEFAULT, rams).map_err(|error| GuestError(error.to_string()))?;
        let host_writes = Arc::new(SoftwareLog::new(memory.layout()));
        let page = |bytes: u64| u32::try_from(bytes / PAGE_BYTES).expect("at most 64 GiB");
        let free_at = settings.free_at();
        let free_pages = page(free_at)..page(free_at + settings.free);
        let unplugged = page(settings.memory - settings.unplugged)..page(settings.memory);
        let free = (settings.free > 0).then(|| FreeRanges::new(free_pages.clone(), 1));
        Ok(Self { memory, blocks, host_writes, free, free_pages, unplugged })
    }

    /// The mappings of the machine's own blocks, by their index, without the shared one.
    pub(super) fn own_blocks(&self) -> Vec<(u32, Arc<MappedMemory>)> {
        let infos = self.memory.layout().blocks().iter();
        let own = (0..).zip(infos.zip(&self.blocks)).filter(|(_, (info, _))| !info.ignored);
        own.map(|(index, (_, memory))| (index, memory.clone())).collect()
    }

    /// The program takes a page of its free memory, or gives it back. Other pages are ignored: the program may send any
    /// number.
    pub(super) fn turn_page(&self, page: u32, is_taken: bool) {
        let Some(free) = self.free.as_ref().filter(|_| self.free_pages.contains(&page)) else { return };
        let range = page - self.free_pages.start;
        if is_taken {
            free.take_when_let_go(range)
        } else if free.is_taken(range) {
            free.give_back(range)
        }
    }

    /// The pages of free memory that are in use: a bit for each, in words.
    pub(super) fn pages_in_use(&self) -> Vec<u64> {
        let mut words = vec![0; self.free_pages.len().div_ceil(64)];
        if let Some(free) = &self.free {
            let taken = (0..free.count()).filter(|&range| free.is_taken(range));
            taken.for_each(|range| words[range as usize / 64] |= 1 << (range % 64));
        }
        words
    }

    /// As received with a machine's state. Bits after the last page are ignored.
    pub(super) fn set_pages_in_use(&self, words: &[u64]) {
        for (range, page) in self.free_pages.clone().enumerate() {
            self.turn_page(page, words[range / 64] & 1 << (range % 64) != 0);
        }
    }

    /// A slot for each block.
    pub(super) fn slots(&self) -> Vec<(Slot, Arc<MappedMemory>)> {
        let slot = |(number, (info, memory)): (u32, (&BlockInfo, &Arc<MappedMemory>))| {
            let slot =
                Slot { number, block: number, offset: 0, length: info.length, guest_address: info.guest_address };
            (slot, memory.clone())
        };
        (0..).zip(self.memory.layout().blocks().iter().zip(&self.blocks)).map(slot).collect()
    }

    /// A device's write: stored, then marked. It must not cross the end of a block.
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) {
        let (block, at) = self.store(offset, bytes);
        let last = at + bytes.len() as u64 - 1;
        self.host_writes.mark(block, at / PAGE_BYTES..last / PAGE_BYTES + 1);
    }

    fn store(&self, offset: u64, bytes: &[u8]) -> (u32, u64) {
        let (block, at) = if offset < HOLE.start { (0, offset) } else { (1, offset - HOLE.start) };
        self.blocks[block as usize].store(usize::try_from(at).expect("in a mapping"), bytes);
        (block, at)
    }

    /// Writes tables, program and region, in their state before the first pass.
    pub(super) fn fill(&self, settings: &KvmSettings) {
        self.store(PROGRAM, program::code());
        self.words(GDT, [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]);
        self.words(IDT + u64::from(TICK_VECTOR) * 16, gate(PROGRAM + program::on_tick()));
        self.map_all(settings.memory);
        let mut noise = Rng::with_seed(1);
        let mut content = [0; 4096];
        let half = content.len() / 2;
        let changed = usize::try_from(settings.bytes).expect("at most a page");
        for page in 0..settings.region_pages() + settings.free / PAGE_BYTES {
            // Half a page of random bytes: the page compresses to about half.
            noise.fill(&mut content[..half]);
            content[..changed].fill(0);
            content[..8].copy_from_slice(&page.to_le_bytes());
            self.store(settings.region_at + page * PAGE_BYTES, &content);
        }
    }

    /// Page tables in which an address is an offset.
    fn map_all(&self, memory: u64) {
        const PRESENT_WRITABLE: u64 = 0b11;
        const LARGE: u64 = 1 << 7;
        let pages = memory / MEMORY_UNIT;
        let (pointers, directories) = (TABLES + 0x1000, TABLES + 0x2000);
        self.words(TABLES, [pointers | PRESENT_WRITABLE]);
        self.words(pointers, (0..pages.div_ceil(512)).map(|table| (directories + table * 4096) | PRESENT_WRITABLE));
        self.words(directories, (0..pages).map(|page| physical(page * MEMORY_UNIT) | LARGE | PRESENT_WRITABLE));
    }

    fn words(&self, offset: u64, words: impl IntoIterator<Item = u64>) {
        let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        self.store(offset, &bytes);
    }
}

/// The physical address of an offset in RAM.
fn physical(offset: u64) -> u64 {
    if offset < HOLE.start { offset } else { offset - HOLE.start + HOLE.end }
}

/// The top of a vCPU's stack.
pub(super) fn stack(vcpu: u32) -> u64 {
    STACKS + u64::from(vcpu + 1) * STACK_BYTES
}

/// The pages of the region that belong to a vCPU.
pub(super) fn part(settings: &KvmSettings, vcpu: u32) -> Range<u64> {
    let border = |vcpu: u32| settings.region_pages() * u64::from(vcpu) / u64::from(settings.vcpus);
    border(vcpu)..border(vcpu + 1)
}

impl Ballooned for Ram {
    fn free(&self) -> Option<&FreeRanges> {
        self.free.as_ref()
    }

    fn unplugged(&self) -> Range<u32> {
        self.unplugged.clone()
    }

    fn by_block(&self, pages: Range<u32>) -> Vec<BlockPages> {
        let hole = HOLE.start / PAGE_BYTES;
        let (start, end) = (u64::from(pages.start), u64::from(pages.end));
        let low = (0, start..end.min(hole));
        let high = (1, start.max(hole) - hole..end.max(hole) - hole);
        [low, high].into_iter().filter(|(_, pages)| !pages.is_empty()).collect()
    }
}

/// The free memory that belongs to a vCPU, as addresses of the program.
pub(super) fn free_part(settings: &KvmSettings, vcpu: u32) -> Range<u64> {
    let pages = settings.free / PAGE_BYTES;
    let border = |vcpu: u32| settings.free_at() + pages * u64::from(vcpu) / u64::from(settings.vcpus) * PAGE_BYTES;
    border(vcpu)..border(vcpu + 1)
}

/// An interrupt gate to a handler.
fn gate(handler: u64) -> [u64; 2] {
    const PRESENT_GATE: u64 = 0x8e00;
    let low = handler & 0xffff | u64::from(CODE_SELECTOR) << 16 | PRESENT_GATE << 32 | (handler >> 16 & 0xffff) << 48;
    [low, handler >> 32]
}

/// The blocks of a machine with these settings: one, or one on each side of the hole.
pub(super) fn block_infos(settings: &KvmSettings) -> Vec<BlockInfo> {
    let info = |id: &str, length, guest_address| BlockInfo {
        guest_address,
        backing_page_size: rustix::param::page_size() as u64,
        ..BlockInfo::new(id, length)
    };
    let mut blocks = match settings.memory.checked_sub(HOLE.start) {
        None | Some(0) => vec![info("ram", settings.memory, 0)],
        Some(above) => vec![info("ram-low", HOLE.start, 0), info("ram-high", above, HOLE.end)],
    };
    let behind = physical(settings.memory).max(HOLE.end);
    blocks.extend(settings.shared.as_ref().map(|shared| shared.block_info(behind)));
    blocks
}

fn map(info: &BlockInfo) -> Result<Arc<MappedMemory>, GuestError> {
    let length = usize::try_from(info.length).expect("at most 64 GiB");
    let mapped = MappedMemory::anonymous(length);
    let what = || format!("{length} bytes of memory for block {}", info.id);
    mapped.map(Arc::new).map_err(|error| GuestError::caused(what(), error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::settings::OWN_BYTES;

    #[test]
    fn blocks_stand_on_both_sides_of_the_hole() {
        let blocks = |memory| {
            let infos = block_infos(&KvmSettings { memory, ..KvmSettings::default() });
            infos.into_iter().map(|info| (info.length, info.guest_address)).collect::<Vec<_>>()
        };
        assert_eq!(blocks(3 << 30), [(3 << 30, 0)]);
        assert_eq!(blocks((3 << 30) + MEMORY_UNIT), [(3 << 30, 0), (MEMORY_UNIT, 4 << 30)]);
        assert_eq!((physical((3 << 30) - 1), physical(3 << 30)), ((3 << 30) - 1, 4 << 30));
    }

    #[test]
    fn free_memory_is_the_vcpus_and_may_reach_over_the_hole() {
        let settings = KvmSettings { vcpus: 2, free: 5 * 4096, ..KvmSettings::default() };
        let start = settings.free_at();
        assert_eq!(free_part(&settings, 0), start..start + 2 * 4096);
        assert_eq!(free_part(&settings, 1), start + 2 * 4096..start + 5 * 4096);
        let ram = Ram::new(&settings, false).unwrap();
        let first = u32::try_from(start / 4096).unwrap();
        ram.turn_page(first + 1, true);
        for none in [first - 1, first + 5, u32::MAX] {
            ram.turn_page(none, true);
        }
        assert_eq!(ram.pages_in_use(), [0b10]);
        ram.set_pages_in_use(&[u64::MAX - 1]);
        assert_eq!(ram.pages_in_use(), [0b11110]);
        ram.turn_page(first + 1, false);
        assert_eq!(ram.pages_in_use(), [0b11100]);
        let hole = u32::try_from(HOLE.start / 4096).unwrap();
        assert_eq!(ram.by_block(hole - 2..hole + 3), [(0, u64::from(hole) - 2..hole.into()), (1, 0..3)]);
        assert_eq!(ram.by_block(hole..hole + 1), [(1, 0..1)]);
    }

    #[test]
    fn every_page_of_the_region_is_one_vcpus() {
        let settings = KvmSettings { vcpus: 3, region: 10 * 4096, ..KvmSettings::default() };
        assert_eq!([0, 1, 2].map(|vcpu| part(&settings, vcpu)), [0..3, 3..6, 6..10]);
    }

    #[test]
    fn what_stands_in_the_own_part_does_not_overlap() {
        assert!(PROGRAM + program::code().len() as u64 <= program::LOCK);
        assert!(stack(crate::kvm::settings::MOST_VCPUS - 1) <= TABLES);
        let tables = 2 + crate::kvm::settings::MOST_MEMORY / MEMORY_UNIT / 512;
        assert!(TABLES + tables * 4096 <= OWN_BYTES);
        assert!(IDT + u64::from(IDT_BYTES) <= PROGRAM && GDT + u64::from(GDT_BYTES) <= IDT);
    }

    #[test]
    fn host_writes_are_marked() {
        let ram = Ram::new(&KvmSettings::default(), false).unwrap();
        ram.host_writes.start().unwrap();
        ram.write(4090, &[1; 8]);
        let dirty = memferry_stages::bitmap::DirtyBitmap::empty(ram.memory.layout());
        ram.host_writes.sync(0, 0..1, &dirty).unwrap();
        assert_eq!(dirty.peek(memferry_stages::geometry::ExtentAt { block: 0, extent: 0 }), 0b11);
    }
}
