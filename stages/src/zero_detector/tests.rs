use std::io;
use std::ops::Range;
use std::sync::Mutex;
use std::time::Duration;

use futures::FutureExt;
use proptest::prelude::*;

use super::*;
use crate::batch::RoundKind;
use crate::bitmap::DirtyBitmap;
use crate::geometry::{PageSize, bits};
use crate::memory::{MappedMemory, Memory};
use crate::pool::PooledBuffer;
use crate::queue::bounded;
use crate::stage::testing::{batch, batches, block_on, drain, guest, mapped, meter, page_size};
use crate::tally::{PageTally, RoundTally};
use crate::xbzrle::Delta;

/// The calls to memory and log, in order.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Read(u64),
    Copied(u64),
}

/// Memory that remembers which of its pages were read, or cannot be.
#[derive(Debug)]
struct Watched {
    memory: Arc<MappedMemory>,
    asked: Arc<Mutex<Vec<Asked>>>,
    broken: bool,
}

impl Memory for Watched {
    fn length(&self) -> u64 {
        self.memory.length()
    }
    fn read_extent(&self, page_size: PageSize, first: u64, mask: u64, into: &mut PooledBuffer) -> io::Result<u64> {
        if self.broken {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.asked.lock().unwrap().push(Asked::Read(mask));
        self.memory.read_extent(page_size, first, mask, into)
    }
    fn read_page(&self, _page_size: PageSize, page: u64, _into: &mut [u8]) -> io::Result<()> {
        panic!("page {page} is read a second time")
    }
    fn write_pages(&self, _page_size: PageSize, _first: u64, _bytes: &[u8]) -> io::Result<()> {
        panic!("the source's memory is written")
    }
    fn write_zeros(&self, _page_size: PageSize, _pages: Range<u64>) -> io::Result<()> {
        panic!("the source's memory is written")
    }
    fn patch(&self, _page_size: PageSize, _page: u64, _delta: &Delta<'_>) -> io::Result<()> {
        panic!("the source's memory is written")
    }
}

/// A log that records the copies it gets.
#[derive(Debug)]
struct Shown {
    asked: Arc<Mutex<Vec<Asked>>>,
    bytes: Mutex<Vec<Vec<u8>>>,
}

impl DirtyLog for Shown {
    fn start(&self) -> io::Result<()> {
        Ok(())
    }
    fn sync(&self, _block: u32, _extents: Range<u32>, _into: &DirtyBitmap) -> io::Result<()> {
        Ok(())
    }
    fn copied(&self, copy: &CopiedBatch) {
        self.asked.lock().unwrap().push(Asked::Copied(copy.batch.mask));
        self.bytes.lock().unwrap().push(copy.pages.as_ref().map_or(Vec::new(), |pages| pages.to_vec()));
    }
    fn mark(&self, _block: u32, _pages: Range<u64>) {}
    fn stop(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A detector with its surroundings, over one block.
struct Bench {
    page_size: PageSize,
    memory: Arc<MappedMemory>,
    asked: Arc<Mutex<Vec<Asked>>>,
    log: Arc<Shown>,
    pool: BufferPool,
    meter: Arc<Meter>,
    broken: bool,
}

impl Bench {
    fn new(page_kib: u64, extents: u64, buffers: usize) -> Self {
        let page_size = page_size(page_kib);
        let asked = Arc::default();
        Self {
            page_size,
            memory: mapped(extents * page_size.extent_bytes() as u64),
            log: Arc::new(Shown { asked: Arc::clone(&asked), bytes: Mutex::default() }),
            asked,
            pool: BufferPool::new(buffers, page_size.extent_bytes()),
            meter: meter(),
            broken: false,
        }
    }

    fn detector(&self) -> ZeroDetector {
        let watched = Watched { memory: self.memory.clone(), asked: self.asked.clone(), broken: self.broken };
        let memory = guest(self.page_size, vec![Arc::new(watched)]);
        ZeroDetector::new(2, memory, self.pool.clone(), vec![self.log.clone()], self.meter.clone())
    }

    fn store(&self, page: u64, at: usize, byte: u8) {
        self.memory.store(usize::try_from(page).unwrap() * self.page_size.bytes() + at, &[byte]);
    }

    fn page(&self, page: u64) -> Vec<u8> {
        let mut bytes = vec![0; self.page_size.bytes()];
        self.memory.load(usize::try_from(page).unwrap() * self.page_size.bytes(), &mut bytes);
        bytes
    }

    /// What comes of these items; there must be buffers for all of them.
    fn detect(&self, items: Vec<Item<Batch>>) -> Result<Vec<Item<CopiedBatch>>, StageError> {
        block_on(async {
            let ((put, input), (output, got)) = (bounded(100), bounded(100));
            for item in items {
                put.put(item).await.unwrap();
            }
            drop(put);
            self.detector().run(input, output).await?;
            Ok(drain(&got))
        })
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn copies_are_what_a_naive_reader_finds_and_each_page_is_read_once(
        kib in 2..=6u32,
        nonzero in prop::collection::vec((0..128u64, 0..4096usize, 1..=255u8), 0..60),
        masks in prop::collection::vec((0..2u32, 1..=u64::MAX), 1..6),
        untouched: u64,
    ) {
        let bench = Bench::new(1 << kib, 2, 6);
        nonzero.iter().for_each(|&(page, at, byte)| bench.store(page, at, byte));
        let naive_zero = |extent: u32, bit: u32| bench.page(u64::from(extent) * 64 + u64::from(bit)).iter().all(|&b| b == 0);
        let given: Vec<_> = masks.iter().map(|&(extent, mask)| {
            let zero: u64 = bits(mask & untouched).filter(|&bit| naive_zero(extent, bit)).map(|bit| 1 << bit).sum();
            Batch { untouched: zero, ..batch(extent, mask, 1) }
        }).collect();
        let copies = batches(bench.detect(given.iter().copied().map(Item::Batch).collect()).unwrap());
        prop_assert_eq!(copies.len(), given.len());
        for (copy, given) in copies.iter().zip(&given) {
            prop_assert_eq!(&copy.batch, given);
            let zero: u64 = bits(given.mask).filter(|&bit| naive_zero(given.at.extent, bit)).map(|bit| 1 << bit).sum();
            prop_assert_eq!(copy.zero, zero);
            let whole: Vec<u8> = bits(given.mask & !zero).flat_map(|bit| bench.page(given.at.page(bit).page)).collect();
            prop_assert_eq!(copy.pages.as_ref().map_or(&[][..], |pages| &pages[..]), &whole[..]);
            prop_assert_eq!(copy.pages.is_none(), whole.is_empty());
        }
        let reads = |batch: &Batch| (batch.mask != batch.untouched).then_some(Asked::Read(batch.mask & !batch.untouched));
        let wanted: Vec<_> = given.iter().flat_map(|batch| reads(batch).into_iter().chain([Asked::Copied(batch.mask)])).collect();
        prop_assert_eq!(&*bench.asked.lock().unwrap(), &wanted, "one read for each batch, and then the logs");
        let shown = bench.log.bytes.lock().unwrap();
        prop_assert!(shown.iter().zip(&copies).all(|(shown, copy)| shown[..] == copy.pages.as_deref().unwrap_or(&[])[..]));
    }
}

#[test]
fn zero_pages_are_counted_round_by_round() {
    let bench = Bench::new(4, 1, 4);
    bench.store(3, 4095, 1);
    let complete = |round| {
        Item::Mark(Mark::RoundComplete(RoundTally {
            pages: PageTally { all: 9, ..PageTally::default() },
            ..RoundTally::new(round, RoundKind::Live)
        }))
    };
    let one = Batch { untouched: 0b1, ..batch(0, 0b1111, 1) };
    let items = vec![Item::Batch(one), Item::Batch(one), complete(1), Item::Batch(one), complete(2), complete(3)];
    let tallies = bench.detect(items).unwrap().into_iter().filter_map(|item| match item {
        Item::Mark(Mark::RoundComplete(tally)) => Some((tally.round, tally.pages.all, tally.pages.zero)),
        _ => None,
    });
    assert_eq!(tallies.collect::<Vec<_>>(), [(1, 9, 6), (2, 9, 3), (3, 9, 0)]);
    let reading = bench.meter.read();
    assert_eq!((reading.batches, reading.pages, reading.bytes), (3, 12, 12 * 4096));
}

#[test]
fn what_needs_no_reading_needs_no_buffer_and_zero_pages_keep_none() {
    let bench = Bench::new(4, 1, 1);
    let held = bench.pool.try_take().unwrap();
    let untouched = Batch { untouched: 0b11, ..batch(0, 0b11, 1) };
    assert_eq!(bench.detect(vec![Item::Batch(untouched)]).unwrap().len(), 1);
    drop(held);
    let zeros = vec![Item::Batch(batch(0, u64::MAX, 1)), Item::Batch(batch(0, 1, 1))];
    assert_eq!(batches(bench.detect(zeros).unwrap()).iter().filter(|copy| copy.pages.is_none()).count(), 2);
}

#[test]
fn a_tight_pool_bounds_what_is_copied_and_the_wait_for_it_is_for_output() {
    const BUFFERS: usize = 3;
    let bench = Bench::new(4, 16, BUFFERS);
    (0..16).for_each(|extent| bench.store(extent * 64, 0, 1));
    let ((put, input), (output, got)) = (bounded(100), bounded(100));
    for extent in 0..16 {
        assert_eq!(put.put(Item::Batch(batch(extent, 1, 1))).now_or_never(), Some(Ok(())));
    }
    let mut run = Box::pin(bench.detector().run(input, output));
    let mut until_it_waits = || (0..100).for_each(|_| assert!(run.as_mut().now_or_never().is_none(), "it waits"));
    until_it_waits();
    std::thread::sleep(Duration::from_millis(20));
    let copies = drain(&got);
    assert_eq!(copies.len(), BUFFERS);
    drop(copies);
    until_it_waits();
    assert_eq!(drain(&got).len(), BUFFERS);
    assert!(bench.meter.read().output_wait >= Duration::from_millis(20));
    assert_eq!(bench.pool.peak_bytes(), bench.pool.bound_bytes());
}

#[test]
fn memory_that_cannot_be_read_ends_the_stage_with_the_page_named() {
    let bench = Bench { broken: true, ..Bench::new(4, 2, 1) };
    let error = bench.detect(vec![Item::Batch(batch(1, 0b1000, 1))]).unwrap_err().to_string();
    assert!(error.starts_with("zero detector of lane 2: cannot read the extent from page 67 of block 0: "), "{error}");
}

#[test]
fn it_ends_with_the_switchover() {
    let bench = Bench::new(4, 1, 1);
    let items = bench.detect(vec![Item::Mark(Mark::LaneEnds), Item::Batch(batch(0, 1, 1))]).unwrap();
    assert!(matches!(items[..], [Item::Mark(Mark::LaneEnds)]));
}
