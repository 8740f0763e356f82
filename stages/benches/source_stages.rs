//! The source's stages, each alone between two queues, on cold memory, beside memcpy of the same memory in the same run.
//!
//! `cargo bench -p memferry-stages --bench source_stages`. Throughput is page bytes. Each bench checks its answer.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime};
use memferry_stages::batch::{Batch, CopiedBatch, Item};
use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::codec::Codec;
use memferry_stages::encoder::{DeltaPlan, Encoder, EncoderPlan};
use memferry_stages::geometry::{BlockInfo, ExtentAt, LaneMap, PageSize};
use memferry_stages::in_flight::InFlight;
use memferry_stages::memory::{GuestMemory, MappedMemory, RamBlock};
use memferry_stages::meter::Meter;
use memferry_stages::pool::{BufferPool, PooledBuffer};
use memferry_stages::queue::{Inlet, bounded};
use memferry_stages::scanner::{ScanOrder, Scanner};
use memferry_stages::tally::RoundTally;
use memferry_stages::zero_detector::ZeroDetector;

/// Several times what any cache holds.
const BYTES: usize = EXTENTS as usize * EXTENT;
const EXTENT: usize = 256 << 10;
const EXTENTS: u32 = 512;
const PAGES: u64 = (BYTES / 4096) as u64;

fn guest(content: impl Fn(usize) -> [u8; 4096]) -> GuestMemory {
    let memory = Arc::new(MappedMemory::anonymous(BYTES).expect("memory"));
    (0..BYTES / 4096).for_each(|page| memory.store(page * 4096, black_box(&content(page))));
    let info = BlockInfo { id: "ram".into(), length: BYTES as u64, guest_address: 0, backing_page_size: 4096 };
    GuestMemory::new(PageSize::DEFAULT, vec![RamBlock { info, memory, fresh: true }]).expect("one block")
}

/// Bytes without a pattern, different in each page.
fn random_page(page: usize) -> [u8; 4096] {
    let mut state = page as u64 * 0x9e37_79b9_7f4a_7c15 + 1;
    std::array::from_fn(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    })
}

/// Words in a row, chosen by chance.
fn text_page(page: usize) -> [u8; 4096] {
    let words =
        [b"memory  ", b"guest   ", b"pages,  ", b"dirty.  ", b"written ", b"held    ", b"lanes.  ", b"rounds, "];
    let chance = random_page(page);
    std::array::from_fn(|at| words[usize::from(chance[at / 8]) % 8][at % 8])
}

fn batch(extent: u32, round: u32) -> Batch {
    Batch { at: ExtentAt { block: 0, extent }, mask: u64::MAX, untouched: 0, round, last: false }
}

/// Runs a stage on this thread while what it gives is counted and dropped at once, and says how long it took.
fn timed<T>(stage: impl Future<Output = Result<(), impl std::fmt::Debug>>, output: &Inlet<T>) -> (Duration, usize) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let consumer = async {
        let mut items = 0;
        while output.next().await.is_some() {
            items += 1;
        }
        items
    };
    let since = Instant::now();
    let (ended, items) = runtime.block_on(async { tokio::join!(stage, consumer) });
    ended.expect("the stage ends well");
    (since.elapsed(), items)
}

/// A queue that holds all of these items, and no more come.
fn queue_of<T>(items: impl IntoIterator<Item = T>) -> Inlet<T> {
    let (put, inlet) = bounded(EXTENTS as usize + 2);
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        for item in items {
            put.put(item).await.expect("the queue is open");
        }
    });
    inlet
}

/// Measures what `once` says its work took.
fn bench(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, mut once: impl FnMut() -> Duration) {
    group.bench_function(name, |bencher| bencher.iter_custom(|times| (0..times).map(|_| once()).sum()));
}

fn memcpy(group: &mut BenchmarkGroup<'_, WallTime>) {
    let source: Vec<u8> = (0..BYTES / 4096).flat_map(random_page).collect();
    let mut buffer = vec![0; EXTENT];
    bench(group, "memcpy", || {
        let since = Instant::now();
        for extent in black_box(&source).chunks_exact(EXTENT) {
            black_box(&mut buffer).copy_from_slice(extent);
        }
        since.elapsed()
    });
}

fn scanner(group: &mut BenchmarkGroup<'_, WallTime>) {
    let layout = guest(|_| [0; 4096]).layout().clone();
    let mut scan = |name, dirty_pages: u64| {
        bench(group, name, || {
            let bitmap = Arc::new(DirtyBitmap::empty(&layout));
            (0..EXTENTS)
                .for_each(|extent| bitmap.set_range(0, u64::from(extent) * 64..u64::from(extent) * 64 + dirty_pages));
            let lanes = LaneMap::new(1, PageSize::DEFAULT);
            let meter = Meter::start("scanner", None);
            let in_flight = Arc::new(InFlight::new(bitmap.layout(), lanes));
            let scanner = Scanner::new(bitmap, None, Vec::new(), lanes, in_flight, meter);
            let ((lane, batches), (answer, _answers)) = (bounded(4), bounded(1));
            let orders = queue_of([ScanOrder { round: 1, last: true }]);
            let (took, items) = timed(scanner.run(orders, vec![lane], answer), &batches);
            assert_eq!(items, if dirty_pages == 0 { 2 } else { EXTENTS as usize + 2 });
            took
        });
    };
    scan("scanner/all dirty", 64);
    scan("scanner/one page of each extent", 1);
    scan("scanner/clean", 0);
}

fn zero_detector(group: &mut BenchmarkGroup<'_, WallTime>) {
    let mut detect = |name, memory: GuestMemory| {
        let pool = BufferPool::new(4, EXTENT);
        bench(group, name, || {
            let meter = Meter::start("zero-page detector", Some(0));
            let detector = ZeroDetector::new(0, memory.clone(), pool.clone(), Vec::new(), meter);
            let batches = queue_of((0..EXTENTS).map(|extent| Item::Batch(batch(extent, 1))));
            let (output, copies) = bounded(2);
            let (took, items) = timed(detector.run(batches, output), &copies);
            assert_eq!(items, EXTENTS as usize);
            took
        });
    };
    detect("zero-page detector/no page zero", guest(random_page));
    detect("zero-page detector/every page zero", guest(|_| [0; 4096]));
    detect(
        "zero-page detector/every other page zero",
        guest(|page| if page % 2 == 0 { [0; 4096] } else { random_page(page) }),
    );
}

/// Copies of all extents, in buffers that keep their bytes from one use to the next.
struct Copies {
    buffers: Vec<PooledBuffer>,
    pool: BufferPool,
}

impl Copies {
    fn new(content: impl Fn(usize) -> [u8; 4096]) -> Self {
        let pool = BufferPool::new(EXTENTS as usize, EXTENT);
        let mut buffers: Vec<_> = (0..EXTENTS).map(|_| pool.try_take().expect("one for each")).collect();
        for (extent, buffer) in buffers.iter_mut().enumerate() {
            (0..64).for_each(|page| buffer.extend(black_box(&content(extent * 64 + page))));
        }
        Self { buffers, pool }
    }

    /// The round's items. The buffers come back as they are dropped, in the same order.
    fn round(&mut self, round: u32) -> Inlet<Item<CopiedBatch>> {
        let copied =
            |(extent, pages)| Item::Batch(CopiedBatch { batch: batch(extent, round), zero: 0, pages: Some(pages) });
        let tally = RoundTally { pages: PAGES, raw: PAGES, ..RoundTally::new(round, false) };
        let items = (0..).zip(self.buffers.drain(..)).map(copied).chain([Item::RoundComplete(tally)]);
        queue_of(items)
    }

    fn take_back(&mut self) {
        self.buffers.extend((0..EXTENTS).map(|_| self.pool.try_take().expect("all are back")));
        self.buffers.iter_mut().for_each(|buffer| buffer.set_filled(EXTENT));
    }

    /// Changes so many words of each page.
    fn write(&mut self, words: usize, by: u8) {
        for page in self.buffers.iter_mut().flat_map(|buffer| buffer.chunks_exact_mut(4096)) {
            (0..words).for_each(|word| page[word * (4096 / words) + 8] = by);
        }
    }
}

fn encoder(group: &mut BenchmarkGroup<'_, WallTime>) {
    let plan = EncoderPlan { checksum: true, ..EncoderPlan::default() };
    first_round(group, "encoder/raw", EncoderPlan::default(), random_page);
    first_round(group, "encoder/raw with checksum", plan, random_page);
    let lz4 = EncoderPlan { compress: Some(Codec::Lz4), ..plan };
    first_round(group, "encoder/lz4 of text with checksum", lz4, text_page);
    first_round(group, "encoder/lz4 of noise with checksum", lz4, random_page);
}

fn new_encoder(plan: EncoderPlan) -> Encoder {
    Encoder::new(0, PageSize::DEFAULT, plan, BufferPool::new(4, EXTENT), Meter::start("encoder", Some(0)))
}

fn first_round(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    plan: EncoderPlan,
    content: impl Fn(usize) -> [u8; 4096],
) {
    let mut copies = Copies::new(content);
    bench(group, name, || {
        let (output, frames) = bounded(2);
        let (took, items) = timed(new_encoder(plan).run(copies.round(1), output), &frames);
        assert_eq!(items, EXTENTS as usize + 1);
        copies.take_back();
        took
    });
}

/// Deltas against a warm cache: one encoder sees a first round that fills it, and then round after round.
fn xbzrle(group: &mut BenchmarkGroup<'_, WallTime>) {
    for (name, words) in [("encoder/xbzrle, 1 word", 1), ("encoder/xbzrle, 8 words", 8)] {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let delta = DeltaPlan { cache_bytes: 2 * BYTES as u64, on_miss: None, cache_first_round: true };
        let ((put, input), (output, frames)) = (bounded(EXTENTS as usize + 1), bounded(2));
        let encoder = new_encoder(EncoderPlan { delta: Some(delta), checksum: true, ..EncoderPlan::default() });
        let (mut stage, mut copies) = (Box::pin(encoder.run(input, output)), Copies::new(random_page));
        let mut round = 0;
        let mut once = || {
            round += 1;
            copies.write(words, u8::try_from(round % 251).expect("small"));
            let input = copies.round(round);
            let took = runtime.block_on(async {
                while let Some(item) = input.try_next() {
                    put.put(item).await.expect("the queue is open");
                }
                let since = Instant::now();
                let consumer = async { while frames.next().await.is_some_and(|frame| frame.mark.is_none()) {} };
                tokio::select! {
                    () = consumer => {}
                    ended = &mut stage => panic!("it ended: {ended:?}"),
                }
                since.elapsed()
            });
            copies.take_back();
            took
        };
        once();
        bench(group, name, once);
    }
}

fn all(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("source");
    group.throughput(Throughput::Bytes(BYTES as u64)).sample_size(10);
    group.warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
    memcpy(&mut group);
    scanner(&mut group);
    zero_detector(&mut group);
    encoder(&mut group);
    xbzrle(&mut group);
    group.finish();
}

criterion_group!(benches, all);
criterion_main!(benches);
