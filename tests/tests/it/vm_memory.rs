//! The adapter for `vm-memory`: its log passes the conformance kit, and memory that is written through vm-memory's
//! API alone is migrated.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use memferry::bitmap::DirtyBitmap;
use memferry::dirty_log::conformance::{Subject, Writer, check};
use memferry::dirty_log::{DirtyLog, SoftwareLog};
use memferry::geometry::{BlockInfo, PageAt, PageSize};
use memferry::guest::conformance;
use memferry::guest::{DestinationGuest, Guest, GuestBuilder, GuestError, GuestState, RunState, SourceGuest};
use memferry::memory::GuestMemory;
use memferry::vm_memory::{BitmapLog, build, guest_memory};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::{GuestRegionMmap, MmapRegionBuilder};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

type Ram = GuestMemoryMmap<AtomicBitmap>;

/// Two regions with a hole between them; the second ends in the middle of a page.
const RANGES: [(GuestAddress, usize); 2] = [(GuestAddress(0), 96 * 4096), (GuestAddress(1 << 32), 70 * 4096 + 123)];

/// PROT_READ | PROT_WRITE, and MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, with Linux's values.
const PROTECTION: i32 = 0x3;
const FLAGS: i32 = 0x4022;

/// Memory whose bitmaps have pages of this size.
fn ram_with_pages_of(bytes: usize) -> Ram {
    let region = |(base, length): (GuestAddress, usize)| {
        let bitmap = AtomicBitmap::new(length, NonZeroUsize::new(bytes).unwrap());
        let mapping = MmapRegionBuilder::new_with_bitmap(length, bitmap)
            .with_mmap_prot(PROTECTION)
            .with_mmap_flags(FLAGS)
            .build()
            .unwrap();
        GuestRegionMmap::new(mapping, base).unwrap()
    };
    Ram::from_regions(RANGES.map(region).into()).unwrap()
}

/// Writes through vm-memory, and writes that bypass it.
struct Device {
    ram: Ram,
    raw: GuestMemory,
    /// A second log that sees some of the writes instead.
    other: Option<Arc<SoftwareLog>>,
    turn: AtomicU64,
}

impl Device {
    fn address(&self, block: u32, offset: usize) -> GuestAddress {
        GuestAddress(RANGES[block as usize].0.0 + offset as u64)
    }

    /// Stores through the raw pointer, which marks nothing, as a vCPU does.
    fn store_raw(&self, block: u32, offset: usize, bytes: &[u8]) {
        let region = self.ram.find_region(self.address(block, 0)).unwrap();
        let slice = region.get_slice(MemoryRegionAddress(offset as u64), bytes.len()).unwrap();
        let guard = slice.ptr_guard_mut();
        for (index, &byte) in bytes.iter().enumerate() {
            // SAFETY: the slice is of this length; volatile stores race with the log's readers as a guest's do.
            unsafe { guard.as_ptr().add(index).write_volatile(byte) };
        }
    }
}

impl Writer for Device {
    fn store(&self, block: u32, offset: usize, bytes: &[u8]) {
        if let Some(other) = self.other.as_ref().filter(|_| self.turn.fetch_add(1, Ordering::Relaxed).is_multiple_of(2))
        {
            self.store_raw(block, offset, bytes);
            let page = offset as u64 / self.raw.page_size().bytes() as u64;
            return other.mark(block, page..page + 1);
        }
        self.ram.write_slice(bytes, self.address(block, offset)).unwrap();
    }

    fn punch(&self, _: u32, _: Range<u64>) -> bool {
        false
    }

    fn store_unseen(&self, block: u32, offset: usize, bytes: &[u8]) -> bool {
        self.store_raw(block, offset, bytes);
        true
    }
}

fn subject(ram: Ram, page_size: u64, with_other: bool) -> Subject {
    let memory = guest_memory(&ram, PageSize::new(page_size).unwrap()).unwrap();
    let mut logs: Vec<Arc<dyn DirtyLog>> = vec![Arc::new(BitmapLog::new(&ram, memory.layout()).unwrap())];
    let other = with_other.then(|| Arc::new(SoftwareLog::new(memory.layout())));
    logs.extend(other.clone().map(|other| other as Arc<dyn DirtyLog>));
    let writer = Device { ram, raw: memory.clone(), other, turn: AtomicU64::new(0) };
    Subject { memory, logs, writer: Arc::new(writer) }
}

#[test]
fn the_log_misses_nothing() {
    check(&|| subject(Ram::from_ranges(&RANGES).unwrap(), 4096, false)).unwrap();
}

#[test]
fn the_log_misses_nothing_where_pages_are_larger_than_those_of_the_bitmap() {
    check(&|| subject(ram_with_pages_of(4096), 16384, false)).unwrap();
    check(&|| subject(ram_with_pages_of(512), 4096, false)).unwrap();
}

#[test]
fn the_log_misses_nothing_beside_one_that_sees_the_other_writes() {
    check(&|| subject(Ram::from_ranges(&RANGES).unwrap(), 4096, true)).unwrap();
}

#[test]
fn a_bitmap_of_larger_pages_than_the_layouts_is_refused() {
    let ram = ram_with_pages_of(65536);
    let memory = guest_memory(&ram, PageSize::DEFAULT).unwrap();
    let error = BitmapLog::new(&ram, memory.layout()).unwrap_err();
    assert!(error.to_string().contains("does not fit pages of 4096 B"), "{error}");
}

#[test]
fn ranges_of_a_sync_are_of_one_moment_and_the_next_sync_begins_anew() {
    let ram = Ram::from_ranges(&[(GuestAddress(0), 256 * 4096)]).unwrap();
    let memory = guest_memory(&ram, PageSize::DEFAULT).unwrap();
    let (log, dirty) = (BitmapLog::new(&ram, memory.layout()).unwrap(), DirtyBitmap::empty(memory.layout()));
    let write = |page: u64| ram.write_obj(1u8, GuestAddress(page * 4096)).unwrap();
    let found = |extents: Range<u32>| {
        log.sync(0, extents, &dirty).unwrap();
        let pages: Vec<_> = (0..256).filter(|&page| dirty.is_set(PageAt { block: 0, page })).collect();
        dirty.clear_range(0, 0..256);
        pages
    };
    write(1);
    log.start().unwrap();
    [2, 70, 140, 201].into_iter().for_each(write);
    assert_eq!(found(0..1), [2]);
    [3, 71, 200].into_iter().for_each(write);
    assert_eq!(found(1..3), [70, 140]);
    // The sync is abandoned here: the next one finds later writes, and the writes to ranges that this one has not
    // requested.
    assert_eq!(found(0..4), [3, 71, 200, 201]);
    write(255);
    // A sync of one range alone finds that range's writes.
    assert_eq!(found(3..4), [255]);
    write(254);
    log.stop().unwrap();
    log.start().unwrap();
    assert_eq!(found(0..4), [0; 0]);
}

/// A guest of vm-memory's, written by one thread through its API alone.
#[derive(Debug)]
struct Vm {
    ram: Ram,
    memory: GuestMemory,
    running: Mutex<bool>,
}

impl Vm {
    fn new((ram, memory): (Ram, GuestMemory), runs: bool) -> Arc<Self> {
        let vm = Arc::new(Self { ram, memory, running: Mutex::new(runs) });
        let weak = Arc::downgrade(&vm);
        std::thread::spawn(move || {
            for step in 0_u64.. {
                let Some(vm) = weak.upgrade() else { break };
                vm.step(step);
                std::thread::sleep(Duration::from_micros(50));
            }
        });
        vm
    }

    fn step(&self, step: u64) {
        let running = self.running.lock().unwrap();
        if !*running {
            return;
        }
        let page = GuestAddress(step % 96 * 4096);
        self.ram.write_obj(step, page).unwrap();
        let high = GuestAddress((1 << 32) + step % 70 * 4096 + 100);
        self.ram.write_slice(&step.to_le_bytes(), high).unwrap();
    }
}

impl Guest for Vm {
    fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }

    fn can_be_userfaulted(&self) -> Result<(), GuestError> {
        Ok(())
    }

    /// Nothing else maps it, and no page is pinned.
    fn mapping_is_exclusive(&self) -> Result<(), GuestError> {
        Ok(())
    }
}

impl SourceGuest for Vm {
    fn run_state(&self) -> RunState {
        if *self.running.lock().unwrap() { RunState::Running } else { RunState::Paused }
    }

    fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError> {
        Ok(vec![Arc::new(BitmapLog::new(&self.ram, self.memory.layout())?)])
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.start(RunState::Paused)
    }

    fn resume(&self) -> Result<(), GuestError> {
        self.start(RunState::Running)
    }

    fn save(&self) -> Result<GuestState, GuestError> {
        Ok(GuestState::default())
    }
}

impl DestinationGuest for Vm {
    fn prepare(&self, _: &GuestState) -> Result<(), GuestError> {
        Ok(())
    }

    fn start(&self, run_state: RunState) -> Result<(), GuestError> {
        *self.running.lock().unwrap() = run_state == RunState::Running;
        Ok(())
    }
}

struct Vms;

impl conformance::Subject for Vms {
    type Guest = Vm;

    fn source(&self) -> Arc<Vm> {
        let ram = Ram::from_ranges(&RANGES).unwrap();
        let memory = guest_memory(&ram, PageSize::DEFAULT).unwrap();
        Vm::new((ram, memory), true)
    }

    fn destination(&self) -> impl GuestBuilder<Built = Vm> {
        |page_size: PageSize, blocks: &[BlockInfo], _: &GuestState| {
            Ok(Vm::new(build::<AtomicBitmap>(page_size, blocks)?, false))
        }
    }
}

/// Migrations that succeed, compared to the last byte, and migrations that fail. Its `build` is that of the module's
/// example.
#[test]
fn a_guest_of_vm_memorys_is_moved() {
    conformance::check(&Vms).unwrap();
}

#[test]
fn blocks_that_cannot_be_built_are_refused_with_the_reason() {
    let source = guest_memory(&Ram::from_ranges(&RANGES).unwrap(), PageSize::DEFAULT).unwrap();
    let right = source.layout().blocks();
    let refused = |change: &dyn Fn(&mut Vec<BlockInfo>)| {
        let mut blocks = right.to_vec();
        change(&mut blocks);
        build::<AtomicBitmap>(PageSize::DEFAULT, &blocks).unwrap_err().to_string()
    };
    build::<AtomicBitmap>(PageSize::DEFAULT, right).unwrap();
    let named = refused(&|blocks| blocks[1].id = "disk".into());
    assert!(named.contains("RAM block \"disk\" of 286843 bytes at 0x100000000 came"), "{named}");
    let ignored = refused(&|blocks| blocks[0].ignored = true);
    assert!(ignored.contains("\"ram@0x0\" is ignored at the source"), "{ignored}");
    let huge = refused(&|blocks| blocks[1].length = 1 << 60);
    assert!(huge.contains("more than the ") && huge.contains(" that this host has"), "{huge}");
    let overlapping = refused(&|blocks| blocks[1].guest_address = 4096);
    assert!(overlapping.contains("cannot be mapped"), "{overlapping}");
    assert!(refused(&|blocks| blocks.reverse()).contains("cannot be mapped"));
    assert!(refused(&Vec::clear).contains("cannot be mapped"));
}
