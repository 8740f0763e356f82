//! The source's stages, each alone between two queues, beside what memory and the codecs' libraries can do.
//!
//! `cargo bench -p memferry-stages --bench source_stages [FILTER]`; how to read it stands in [`common`]. Where a set is one of
//! copies it lies in buffers of its own: *out of cache* there are 128 MiB of them, *in cache* two extents. The controls:
//! - *memcpy*: the same pages into a warm buffer; *sweep*: reading them and no more;
//! - *library*: the codec called bare.
//!
//! Each answer is checked by its count of frames, and by the round's figures.

mod common;

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::inputs::{self, CHANGES, CONTENTS};
use common::{EXTENT, PAGE, Suite, memcpy, sweep, timed};
use fastrand::Rng;
use memferry_stages::batch::{Batch, CopiedBatch, Item, Mark, RoundKind};
use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::codec::Codec;
use memferry_stages::encoder::misses::OnMiss;
use memferry_stages::encoder::{DeltaPlan, Encoder, EncoderPlan};
use memferry_stages::geometry::{ExtentAt, LaneMap, PageSize};
use memferry_stages::in_flight::InFlight;
use memferry_stages::memory::MappedMemory;
use memferry_stages::meter::Meter;
use memferry_stages::pool::{BufferPool, PooledBuffer};
use memferry_stages::queue::{Inlet, bounded};
use memferry_stages::scanner::{ScanOrder, Scanner, ScannerOrder};
use memferry_stages::stage_id::StageId;
use memferry_stages::take::PageTaker;
use memferry_stages::tally::{PageTally, RoundTally};
use memferry_stages::wire::WireFramer;
use memferry_stages::zero_detector::ZeroDetector;

/// Where the pages of a round lie, and how many extents it has.
const PLACES: [(&str, u32); 2] = [("out of cache", 512), ("in cache", 2)];
const MEMCPY: [(&str, &str); 1] = [("memcpy", "memcpy")];

fn main() {
    inputs::process(PAGE);
    let mut suite = Suite::new();
    scanner(&mut suite);
    for (place, extents) in PLACES {
        zero_detector(&mut suite, place, extents);
        first_round(&mut suite, place, extents);
        deltas(&mut suite, place, extents);
    }
    suite.finish();
}

fn bytes_of(extents: u32) -> usize {
    extents as usize * EXTENT
}

fn batch(extent: u32, round: u32) -> Batch {
    Batch { at: ExtentAt { block: 0, extent }, mask: u64::MAX, untouched: 0, round, kind: RoundKind::Live }
}

/// Runs a stage on this thread while what it gives is counted and dropped at once, and says how long it took.
fn run<T>(stage: impl Future<Output = Result<(), impl std::fmt::Debug>>, output: &Inlet<T>) -> (Duration, usize) {
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
    let (put, inlet) = bounded(PLACES[0].1 as usize + 2);
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        for item in items {
            put.put(item).await.expect("the queue is open");
        }
    });
    inlet
}

/// No page is read here: the figure is the bytes of the pages that are found.
fn scanner(suite: &mut Suite) {
    let extents = PLACES[0].1;
    let layout = inputs::guest(inputs::untouched(bytes_of(extents))).layout().clone();
    for (name, dirty_pages) in [("all dirty", 64), ("one page of each extent", 1), ("clean", 0)] {
        suite.measure("scanner", name, bytes_of(extents), &[], || {
            let bitmap = Arc::new(DirtyBitmap::empty(&layout));
            for first in (0..u64::from(extents)).map(|extent| extent * 64) {
                bitmap.set_range(0, first..first + dirty_pages);
            }
            let lanes = LaneMap::new(1, PageSize::DEFAULT);
            let meter = Meter::start(StageId::SCANNER);
            let in_flight = Arc::new(InFlight::new(bitmap.layout(), lanes));
            let scanner = Scanner::new(PageTaker::new(bitmap, None, Vec::new(), in_flight), lanes, meter);
            let ((lane, batches), (answer, _answers)) = (bounded(4), bounded(1));
            let orders = queue_of([ScanOrder::all(1, RoundKind::Final).into(), ScannerOrder::EndLanes]);
            let (took, items) = run(scanner.run(orders, vec![lane], answer), &batches);
            assert_eq!(items, if dirty_pages == 0 { 2 } else { extents as usize + 2 });
            took
        });
    }
}

fn zero_detector(suite: &mut Suite, place: &str, extents: u32) {
    let bytes = bytes_of(extents);
    detect(suite, &format!("zero detector on untouched, {place}"), &inputs::untouched(bytes), 64);
    for (kind, content) in CONTENTS {
        let zero = if kind == "zero" { 64 } else { 0 };
        detect(suite, &format!("zero detector on {kind}, {place}"), &inputs::mapped(&content(bytes)), zero);
    }
}

/// `zero` pages of each extent are to be found.
fn detect(suite: &mut Suite, group: &str, memory: &Arc<MappedMemory>, zero: u32) {
    memcpy(suite, group, inputs::pages(memory));
    sweep(suite, group, inputs::pages(memory));
    let (guest, pool) = (inputs::guest(memory.clone()), BufferPool::new(4, EXTENT));
    let extents = u32::try_from(memory.len() / EXTENT).expect("few");
    suite.measure(group, "stage", memory.len(), &[("memcpy", "memcpy"), ("sweep", "sweep")], || {
        let meter = Meter::start(StageId::zero_detector(0));
        let detector = ZeroDetector::new(0, guest.clone(), pool.clone(), Vec::new(), meter);
        let tally = RoundTally::new(1, RoundKind::Live);
        let batches = (0..extents).map(|extent| Item::Batch(batch(extent, 1)));
        let batches = queue_of(batches.chain([Item::Mark(Mark::RoundComplete(tally))]));
        let ((output, copies), found) = (bounded(2), std::cell::Cell::new(0));
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let consumer = async {
            while let Some(item) = copies.next().await {
                if let Item::Mark(Mark::RoundComplete(tally)) = item {
                    found.set(tally.pages.zero);
                }
            }
        };
        let took = timed(|| {
            runtime.block_on(async { tokio::join!(detector.run(batches, output), consumer).0 }).expect("it ends well");
        });
        assert_eq!(found.get(), u64::from(extents * zero));
        took
    });
}

/// Copies of all extents, in buffers that keep their bytes from one use to the next.
struct Copies {
    buffers: Vec<PooledBuffer>,
    pool: BufferPool,
}

impl Copies {
    fn of(content: &[u8]) -> Self {
        let extents = content.len() / EXTENT;
        let pool = BufferPool::new(extents, EXTENT);
        let mut buffers: Vec<_> = (0..extents).map(|_| pool.try_take().expect("one for each")).collect();
        buffers.iter_mut().zip(content.chunks_exact(EXTENT)).for_each(|(buffer, extent)| buffer.extend(extent));
        Self { buffers, pool }
    }

    fn bytes(&self) -> usize {
        self.buffers.len() * EXTENT
    }

    /// The round's items. The buffers come back as they are dropped, in the same order.
    fn round(&mut self, round: u32) -> Vec<Item<CopiedBatch>> {
        let pages = (self.bytes() / PAGE) as u64;
        let copied =
            |(extent, pages)| Item::Batch(CopiedBatch { batch: batch(extent, round), zero: 0, pages: Some(pages) });
        let tally = RoundTally {
            pages: PageTally { all: pages, ..PageTally::default() },
            ..RoundTally::new(round, RoundKind::Live)
        };
        (0..).zip(self.buffers.drain(..)).map(copied).chain([Item::Mark(Mark::RoundComplete(tally))]).collect()
    }

    fn take_back(&mut self) {
        self.buffers.extend(std::iter::from_fn(|| self.pool.try_take()));
        self.buffers.iter_mut().for_each(|buffer| buffer.set_filled(EXTENT));
    }

    /// Changes each page.
    fn change(&mut self, change: fn(&mut [u8], &mut Rng), random: &mut Rng) {
        let pages = self.buffers.iter_mut().flat_map(|buffer| buffer.chunks_exact_mut(PAGE));
        pages.for_each(|page| change(page, random));
    }
}

fn new_encoder(plan: EncoderPlan, checksum: bool) -> Encoder<WireFramer> {
    let (framer, pool) = (WireFramer::new(checksum), BufferPool::new(4, EXTENT));
    Encoder::new(0, PageSize::DEFAULT, plan, framer, pool, Meter::start(StageId::encoder(0)))
}

/// Rounds before any delta: a new encoder for each.
fn first_round(suite: &mut Suite, place: &str, extents: u32) {
    for (kind, content) in CONTENTS.into_iter().skip(1) {
        let (group, content) = (format!("encoder on {kind}, {place}"), content(bytes_of(extents)));
        memcpy(suite, &group, &content);
        let mut copies = Copies::of(&content);
        let mut measure = |suite: &mut Suite, name: &str, controls: &[(&str, &str)], plan, checksum| {
            suite.measure(&group, name, copies.bytes(), controls, || {
                let (output, frames) = bounded(2);
                let (took, items) = run(new_encoder(plan, checksum).run(queue_of(copies.round(1)), output), &frames);
                assert_eq!(items, extents as usize + 1);
                copies.take_back();
                took
            });
        };
        if kind == "random" {
            let delta =
                DeltaPlan { cache_bytes: 2 * content.len() as u64, on_miss: OnMiss::Raw, cache_first_round: true };
            measure(suite, "raw", &MEMCPY, EncoderPlan::default(), false);
            measure(suite, "raw with checksum", &MEMCPY, EncoderPlan::default(), true);
            measure(
                suite,
                "raw, cached in a new cache",
                &MEMCPY,
                EncoderPlan { delta: Some(delta), compress: None },
                true,
            );
        }
        let mut out = vec![0; 2 * PAGE];
        suite.measure(&group, "lz4, library", content.len(), &[], || {
            timed(|| {
                for page in content.chunks_exact(PAGE) {
                    black_box(lz4_flex::block::compress_into(page, &mut out).expect("room"));
                }
            })
        });
        let controls = [("memcpy", "memcpy"), ("library", "lz4, library")];
        measure(suite, "lz4 with checksum", &controls, EncoderPlan { compress: Some(Codec::Lz4), delta: None }, true);
    }
}

/// Deltas against a warm cache: one encoder sees a first round that fills it, and then round after round. With checksum.
fn deltas(suite: &mut Suite, place: &str, extents: u32) {
    let (group, content) = (format!("encoder of deltas, {place}"), inputs::random(bytes_of(extents)));
    memcpy(suite, &group, &content);
    for (name, change) in CHANGES {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let delta = DeltaPlan { cache_bytes: 2 * content.len() as u64, on_miss: OnMiss::Raw, cache_first_round: true };
        let ((put, input), (output, frames)) = (bounded(extents as usize + 1), bounded(2));
        let encoder = new_encoder(EncoderPlan { delta: Some(delta), compress: None }, true);
        let (mut stage, mut copies) = (Box::pin(encoder.run(input, output)), Copies::of(&content));
        let (mut round, mut random) = (0, Rng::with_seed(2));
        let mut once = || {
            round += 1;
            copies.change(change, &mut random);
            let items = copies.round(round);
            let (took, tally) = runtime.block_on(async {
                for item in items {
                    put.put(item).await.expect("the queue is open");
                }
                let since = Instant::now();
                let complete = async {
                    loop {
                        let frame = frames.next().await.expect("the encoder runs");
                        if let Some(Mark::RoundComplete(tally)) = frame.mark {
                            return tally;
                        }
                    }
                };
                tokio::select! {
                    tally = complete => (since.elapsed(), tally),
                    ended = &mut stage => panic!("it ended: {ended:?}"),
                }
            });
            let whole = if round == 1 { tally.pages.all } else { tally.pages.xbzrle_overflows };
            assert!(
                tally.pages.raw == whole && tally.pages.xbzrle_misses == 0 && tally.pages.all > 0,
                "{name}: {tally:?}"
            );
            copies.take_back();
            took
        };
        once();
        suite.measure(&group, name, bytes_of(extents), &MEMCPY, once);
    }
}
