//! The logs under the conformance kit, over a strict kernel and over kernels that are called wrongly.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::model::{LogModel, RingModel};
use super::*;
use crate::bitmap::DirtyBitmap;
use crate::dirty_log::conformance::{Breach, Case, Order, Subject, Writer, check, check_as};
use crate::dirty_log::{DirtyLog, SoftwareLog};
use crate::geometry::{BlockInfo, ExtentAt, PageAt, PageSize};
use crate::memory::{GuestMemory, MappedMemory, RamBlock};

/// Two blocks, one with a partial last page.
const LENGTHS: [u64; 2] = [96 * 4096, 70 * 4096 + 123];

fn slot(number: u32, block: u32, pages: std::ops::Range<u64>) -> Slot {
    let (offset, length) = (pages.start * 4096, (pages.end - pages.start) * 4096);
    Slot { number, block, offset, length, guest_address: u64::from(number) << 24 }
}

/// The slots of the blocks: one block is cut where pages of this size let it.
pub(super) fn slots(page_size: u64) -> Vec<Slot> {
    let second = slot(5, 1, 0..71);
    match page_size {
        4096 => vec![slot(7, 0, 0..64), slot(2, 0, 64..96), second],
        _ => vec![slot(7, 0, 0..96), second],
    }
}

pub(super) fn memory(page_size: u64) -> (Vec<Arc<MappedMemory>>, GuestMemory) {
    let mapped: Vec<_> = LENGTHS
        .iter()
        .map(|&length| Arc::new(MappedMemory::anonymous(usize::try_from(length).unwrap()).unwrap()))
        .collect();
    let block = |(index, memory): (usize, &Arc<MappedMemory>)| RamBlock {
        info: BlockInfo::new(format!("ram{index}"), LENGTHS[index]),
        memory: memory.clone(),
        fresh: true,
    };
    let blocks = mapped.iter().enumerate().map(block).collect();
    let guest = GuestMemory::new(PageSize::new(page_size).unwrap(), blocks).unwrap();
    (mapped, guest)
}

/// The slot of a byte of a block, and its page there.
fn find(slots: &[Slot], block: u32, offset: usize) -> (u32, u64) {
    let offset = offset as u64;
    let holds = |slot: &&Slot| slot.block == block && (slot.offset..slot.offset + slot.length).contains(&offset);
    let slot = slots.iter().find(holds).expect("every byte is in a slot");
    (slot.number, (offset - slot.offset) / 4096)
}

/// Writes pages one by one through `write`, which gets slot, page and how to store.
struct Guest<W> {
    blocks: Vec<Arc<MappedMemory>>,
    slots: Vec<Slot>,
    devices: Arc<dyn DirtyLog>,
    page_bytes: u64,
    write: W,
}

impl<W: Fn(u32, u64, &dyn Fn()) + Send + Sync> Writer for Guest<W> {
    fn store(&self, block: u32, offset: usize, bytes: &[u8]) {
        // A page of the layout may be several of KVM's: a store is cut at their borders.
        let (mut at, mut left) = (offset, bytes);
        while !left.is_empty() {
            let (now, rest) = left.split_at(left.len().min(4096 - at % 4096));
            let (slot, page) = find(&self.slots, block, at);
            (self.write)(slot, page, &|| self.blocks[block as usize].store(at, now));
            (at, left) = (at + now.len(), rest);
        }
    }

    fn store_unseen(&self, block: u32, offset: usize, bytes: &[u8]) -> bool {
        self.blocks[block as usize].store(offset, bytes);
        true
    }

    fn punch(&self, block: u32, pages: std::ops::Range<u64>) -> bool {
        let memory = &self.blocks[block as usize];
        let (start, end) = (pages.start * self.page_bytes, pages.end * self.page_bytes);
        let (start, length) = (usize::try_from(start).unwrap(), usize::try_from(end - start).unwrap());
        memory.give_back(start, length).unwrap();
        self.devices.mark(block, pages);
        true
    }
}

/// A guest under the dirty log; `calls` may stand between log and kernel.
fn logged(page_size: u64, initially_set: bool, calls: &dyn Fn(Arc<LogModel>) -> Arc<dyn LogCalls>) -> Subject {
    let (slots, (blocks, memory)) = (slots(page_size), memory(page_size));
    let model = LogModel::new(&slots, initially_set);
    let log = Arc::new(KvmLog::new(calls(model.clone()), slots.clone(), memory.layout()));
    let devices: Arc<dyn DirtyLog> = Arc::new(SoftwareLog::new(memory.layout()));
    let write = move |slot, page, store: &dyn Fn()| model.write(slot, page, store);
    let logs: Vec<Arc<dyn DirtyLog>> = vec![log, devices.clone()];
    Subject { memory, logs, writer: Arc::new(Guest { blocks, slots, devices, page_bytes: page_size, write }) }
}

/// How a vCPU stores something to a page of a slot.
type Store = fn(&RingModel, &KvmRingLog, vcpu: usize, (u32, u64), &dyn Fn());

/// A guest under rings of 8 entries; `calls` may stand between log and kernel.
fn ringed(page_size: u64, calls: &dyn Fn(Arc<RingModel>) -> Arc<dyn RingCalls>, store: Store) -> Subject {
    let (slots, (blocks, memory)) = (slots(page_size), memory(page_size));
    let model = RingModel::new(&slots, 8);
    let log = Arc::new(KvmRingLog::new(calls(model.clone()), slots.clone(), memory.layout()));
    let devices: Arc<dyn DirtyLog> = Arc::new(SoftwareLog::new(memory.layout()));
    let (ring_log, turn) = (log.clone(), AtomicUsize::default());
    let write = move |slot, page, stored: &dyn Fn()| {
        let vcpu = turn.fetch_add(1, Ordering::Relaxed) % 2;
        store(&model, &ring_log, vcpu, (slot, page), stored);
    };
    let logs: Vec<Arc<dyn DirtyLog>> = vec![log, devices.clone()];
    Subject { memory, logs, writer: Arc::new(Guest { blocks, slots, devices, page_bytes: page_size, write }) }
}

/// A vCPU that makes room when its ring is full.
fn trapped(model: &RingModel, log: &KvmRingLog, vcpu: usize, (slot, page): (u32, u64), stored: &dyn Fn()) {
    while !model.write(vcpu, slot, page, stored) {
        log.make_room(vcpu).unwrap();
    }
}

/// A vCPU that makes room only after the store, as where KVM emulates it.
fn emulated(model: &RingModel, log: &KvmRingLog, vcpu: usize, (slot, page): (u32, u64), stored: &dyn Fn()) {
    if model.write_emulated(vcpu, slot, page, stored) {
        log.make_room(vcpu).unwrap();
    }
}

#[test]
fn the_dirty_log_misses_nothing() {
    for (page_size, initially_set) in [(4096, true), (4096, false), (16384, true)] {
        check(&|| logged(page_size, initially_set, &|model| model)).unwrap();
    }
}

#[test]
fn the_dirty_rings_miss_nothing() {
    for page_size in [4096, 16384] {
        check(&|| ringed(page_size, &|model| model, trapped)).unwrap();
    }
}

#[test]
fn rings_that_the_kernel_runs_over_miss_nothing() {
    for page_size in [4096, 16384] {
        check(&|| ringed(page_size, &|model| model, emulated)).unwrap();
    }
}

// ---- and these mistakes are found ----

/// The breach that the kit must find within a few attempts: a race need not be lost at the first.
fn must_breach(make: &dyn Fn() -> Subject, order: Order) -> Breach {
    let found = (0..20).find_map(|_| check_as(make, order).err());
    let breach = found.expect("the kit finds the mistake");
    println!("found: {breach}");
    breach
}

/// Calls the dirty log's kernel the wrong way.
#[derive(Debug)]
struct Careless(Arc<LogModel>, Mistake);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mistake {
    /// Clears every bit around what it clears, fetched or not.
    ClearsAllOnes,
    /// Clears what it is about to fetch.
    ClearsBeforeFetch,
    NeverClears,
}

impl Careless {
    fn clear_all(&self, slot: u32) -> io::Result<()> {
        let pages = self.0.pages(slot);
        self.0.clear(slot, 0, pages, &vec![u64::MAX; pages.div_ceil(64) as usize])
    }
}

impl LogCalls for Careless {
    fn manual_protect(&self) -> io::Result<bool> {
        self.0.manual_protect()
    }

    fn set_logging(&self, slot: u32, on: bool) -> io::Result<()> {
        self.0.set_logging(slot, on)
    }

    fn fetch(&self, slot: u32, into: &mut [u64]) -> io::Result<()> {
        if self.1 == Mistake::ClearsBeforeFetch {
            self.clear_all(slot)?;
        }
        self.0.fetch(slot, into)
    }

    fn clear(&self, slot: u32, first_page: u64, pages: u32, bits: &[u64]) -> io::Result<()> {
        match self.1 {
            Mistake::ClearsAllOnes => self.clear_all(slot),
            Mistake::NeverClears => Ok(()),
            Mistake::ClearsBeforeFetch => self.0.clear(slot, first_page, pages, bits),
        }
    }
}

#[test]
fn a_dirty_log_that_clears_what_it_did_not_fetch_is_found() {
    for mistake in [Mistake::ClearsAllOnes, Mistake::ClearsBeforeFetch] {
        must_breach(&|| logged(4096, false, &|model| Arc::new(Careless(model, mistake))), Order::Right);
    }
}

#[test]
fn a_dirty_log_that_never_clears_is_found() {
    let never = || logged(4096, true, &|model| Arc::new(Careless(model, Mistake::NeverClears)));
    assert_eq!(must_breach(&never, Order::Right).case, Case::Quiet);
}

#[test]
fn a_scanner_that_reads_before_it_rearms_the_dirty_log_is_found() {
    must_breach(&|| logged(4096, false, &|model| model), Order::ReadBeforeRearm);
}

/// Resets some harvests later: what was harvested is in the bitmap while its pages are unprotected.
#[derive(Debug)]
struct ResetsLate(Arc<RingModel>, Mutex<u32>);

impl RingCalls for ResetsLate {
    fn set_logging(&self, slot: u32, on: bool) -> io::Result<()> {
        self.0.set_logging(slot, on)
    }

    fn count(&self) -> usize {
        self.0.count()
    }

    fn harvest(&self, ring: usize, is_full: bool, found: &mut dyn FnMut(u32, u64)) -> usize {
        let mut harvests = self.1.lock().unwrap();
        *harvests += 1;
        if harvests.is_multiple_of(5) {
            (0..self.count()).for_each(|ring| _ = self.0.reset(ring).unwrap());
        }
        self.0.harvest(ring, is_full, found)
    }

    fn reset(&self, _ring: usize) -> io::Result<bool> {
        Ok(false)
    }
}

#[test]
fn a_ring_whose_entries_reach_the_bitmap_before_the_reset_is_found() {
    must_breach(&|| ringed(4096, &|model| Arc::new(ResetsLate(model, Mutex::default())), trapped), Order::Right);
}

/// Ignores that a ring was overrun.
#[derive(Debug)]
struct Believes(Arc<RingModel>);

impl RingCalls for Believes {
    fn set_logging(&self, slot: u32, on: bool) -> io::Result<()> {
        self.0.set_logging(slot, on)
    }

    fn count(&self) -> usize {
        self.0.count()
    }

    fn harvest(&self, ring: usize, is_full: bool, found: &mut dyn FnMut(u32, u64)) -> usize {
        self.0.harvest(ring, is_full, found)
    }

    fn reset(&self, ring: usize) -> io::Result<bool> {
        self.0.reset(ring).map(|_| false)
    }
}

#[test]
fn a_ring_that_is_believed_though_it_was_run_over_is_found() {
    must_breach(&|| ringed(4096, &|model| Arc::new(Believes(model)), emulated), Order::Right);
}

#[test]
fn a_vcpu_that_throws_a_full_ring_away_is_found() {
    let forget: Store = |model, _, vcpu, (slot, page), stored| {
        while !model.write(vcpu, slot, page, stored) {
            model.harvest(vcpu, true, &mut |_, _| ());
            model.reset(vcpu).unwrap();
        }
    };
    must_breach(&|| ringed(4096, &|model| model, forget), Order::Right);
}

// ---- chunks ----

/// A machine of one slot of 150 MiB: chunks of 64 MiB, the last of which ends within a word.
fn large(initially_set: bool) -> (Arc<LogModel>, KvmLog, DirtyBitmap) {
    let slots = [slot(0, 0, 0..38_401)];
    let info = BlockInfo::new("ram", 38_401 * 4096);
    let layout = Layout::new(PageSize::DEFAULT, vec![info]).unwrap();
    let model = LogModel::new(&slots, initially_set);
    let log = KvmLog::new(model.clone(), slots, &layout);
    log.start().unwrap();
    (model, log, DirtyBitmap::empty(&layout))
}

fn sync(log: &KvmLog, dirty: &DirtyBitmap) {
    // As the stage does: range by range.
    for start in (0..601).step_by(256) {
        log.sync(0, start..(start + 256).min(601), dirty).unwrap();
    }
}

fn take(log: &KvmLog, dirty: &DirtyBitmap) -> Vec<PageAt> {
    let take = |at: ExtentAt| {
        let mask = dirty.take(at);
        log.rearm(at, mask).unwrap();
        crate::geometry::bits(mask).map(move |bit| at.page(bit)).collect::<Vec<_>>()
    };
    dirty.extents().flat_map(take).collect()
}

#[test]
fn a_chunk_is_cleared_once_for_what_was_fetched_in_it() {
    let (model, log, dirty) = large(false);
    let pages = [0, 63, 64, 16_383, 16_384, 30_000, 38_400];
    pages.iter().for_each(|&page| model.write(0, page, || ()));
    sync(&log, &dirty);
    // Written after the fetch, in chunks that are about to be cleared.
    model.write(0, 5, || ());
    model.write(0, 38_399, || ());
    assert_eq!(take(&log, &dirty), pages.map(|page| PageAt { block: 0, page }));
    assert_eq!((model.clears(), model.lost()), (3, 0));
    sync(&log, &dirty);
    assert_eq!(take(&log, &dirty), [5, 38_399].map(|page| PageAt { block: 0, page }));
    sync(&log, &dirty);
    assert_eq!(dirty.count(), 0);
    log.stop().unwrap();
    assert!(log.sync(0, 0..1, &dirty).is_err(), "a log that was stopped cannot be read");
}

#[test]
fn pages_that_leave_the_bitmap_unread_do_not_come_back() {
    let (model, log, dirty) = large(true);
    let unread = DirtyBitmap::empty(dirty.layout());
    unread.set_range(0, 100..20_000);
    assert!(log.arm_unread(&unread).unwrap(), "nothing was protected before");
    assert!(!log.arm_unread(&unread).unwrap());
    model.write(0, 150, || ());
    sync(&log, &dirty);
    assert_eq!(dirty.count(), 38_401 - 19_900 + 1, "what was never cleared comes, and what was written");
    assert_eq!(take(&log, &dirty).len(), 18_502);
    sync(&log, &dirty);
    assert_eq!((dirty.count(), model.lost()), (0, 0));
}
