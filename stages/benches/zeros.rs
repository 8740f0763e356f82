//! First writes to a guest of zeros: the bytes of its second round, with the pages that are known to be zero and without.
//!
//! No time is measured: a run prints the same figures on every machine, bytes of a page on the wire. Where a page that was sent as
//! zero is no reference, its first write misses the cache and travels `raw`, or compressed with `lz4`. Behind each is the ratio of
//! the bytes with the reference, a miss being the same, to the bytes without; `delta` has the bytes behind the ratio to `raw`.
//!
//! ```text
//! cargo bench -p memferry-stages --bench zeros
//! ```

use std::sync::Arc;

use fastrand::Rng;
use memferry_stages::batch::{Batch, CopiedBatch, Item, Mark, RoundKind};
use memferry_stages::codec::Codec;
use memferry_stages::encoder::misses::OnMiss;
use memferry_stages::encoder::{DeltaPlan, Encoder, EncoderPlan, KnownZero};
use memferry_stages::geometry::{BlockInfo, ExtentAt, Layout, PageSize};
use memferry_stages::meter::Meter;
use memferry_stages::pool::BufferPool;
use memferry_stages::queue::bounded;
use memferry_stages::stage_id::StageId;
use memferry_stages::tally::{PageTally, RoundTally};
use memferry_stages::wire::WireFramer;

const PAGE: usize = 4096;
const PAGES_OF_EXTENT: usize = 64;
const EXTENTS: u32 = 64;
const PAGES: u64 = EXTENTS as u64 * PAGES_OF_EXTENT as u64;

type Write = fn(&mut [u8], &mut Rng);

/// What the guest writes to each page.
const WRITES: [(&str, Write); 7] = [
    ("a byte", |page, random| page[random.usize(..PAGE)] = 1),
    ("8 words", |page, random| {
        for _ in 0..8 {
            let at = random.usize(..PAGE / 8) * 8;
            page[at..at + 8].copy_from_slice(&random.u64(1..).to_le_bytes());
        }
    }),
    ("a line of text", |page, _| page[64..128].copy_from_slice(&b"of text ".repeat(8))),
    ("half a page of text", |page, random| {
        let words = ["memory ", "page ", "of ", "the ", "guest ", "dirty ", "round ", "lane ", "\n"];
        let text = std::iter::repeat_with(|| words[random.usize(..words.len())].bytes()).flatten();
        page[..PAGE / 2].iter_mut().zip(text).for_each(|(byte, letter)| *byte = letter);
    }),
    ("half a page of noise", |page, random| random.fill(&mut page[..PAGE / 2])),
    ("small numbers", |page, random| page.iter_mut().step_by(8).for_each(|byte| *byte = random.u8(1..))),
    ("pointers", |page, random| {
        for word in page.as_chunks_mut::<8>().0 {
            *word = (0x7f00_0000_0000_u64 + random.u64(..1 << 24) * 16).to_le_bytes();
        }
    }),
];

fn main() {
    println!("{:<22}{:>11}{:>11}{:>8}{:>11}{:>8}", "bytes a page", "delta", "raw", "ratio", "lz4", "ratio");
    for (name, write) in WRITES {
        let [raw, lz4] = [OnMiss::Raw, OnMiss::Compress(Codec::Lz4)];
        let [with, without] = [true, false].map(|known| second_round(raw, known, write));
        let compressed = [true, false].map(|known| second_round(lz4, known, write));
        let row = |bytes: u64| bytes as f64 / PAGES as f64;
        println!(
            "{name:<22}{:>11.1}{:>11.1}{:>8.3}{:>11.1}{:>8.3}",
            row(with),
            row(without),
            with as f64 / without as f64,
            row(compressed[1]),
            compressed[0] as f64 / compressed[1] as f64,
        );
        let is_sparse = ["a byte", "8 words", "a line of text"].contains(&name);
        assert!(!is_sparse || with * 10 <= without, "sparse writes take at most a tenth");
    }
}

/// The bytes of the round behind the first, in which every page of a guest of zeros was sent as zero.
fn second_round(on_miss: OnMiss, known: bool, write: Write) -> u64 {
    let layout = Layout::new(PageSize::DEFAULT, vec![BlockInfo::new("ram", PAGES * PAGE as u64)]).expect("one block");
    let delta = DeltaPlan { cache_bytes: PAGES * PAGE as u64, on_miss, cache_first_round: true };
    let plan = EncoderPlan { compress: Some(Codec::Lz4), delta: Some(delta) };
    let pool = |buffers| BufferPool::new(buffers, PAGES_OF_EXTENT * PAGE);
    let (copies, meter) = (pool(EXTENTS as usize), Meter::start(StageId::encoder(0)));
    let own = pool(EXTENTS as usize + 1);
    let mut encoder = Encoder::new(0, PageSize::DEFAULT, plan, WireFramer::new(true), own, meter);
    if known {
        encoder = encoder.with_known_zero(Arc::new(KnownZero::new(&layout)));
    }
    let ((put, input), (output, frames)) = (bounded(2 * EXTENTS as usize + 3), bounded(2 * EXTENTS as usize + 3));
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("no threads");
    runtime.block_on(async {
        let mut random = Rng::with_seed(1);
        for round in [1, 2] {
            for extent in 0..EXTENTS {
                let copied = if round == 1 { zeros(extent) } else { written(extent, &copies, write, &mut random) };
                put.put(Item::Batch(copied)).await.expect("room");
            }
            put.put(Item::Mark(Mark::RoundComplete(tally(round)))).await.expect("room");
        }
        put.put(Item::Mark(Mark::LaneEnds)).await.expect("room");
        encoder.run(input, output).await.expect("nothing fails");
        let mut bytes = 0;
        while let Some(frame) = frames.next().await {
            if let Some(Mark::RoundComplete(tally)) = frame.mark {
                bytes = tally.pages.bytes_out;
            }
        }
        bytes
    })
}

fn batch(extent: u32, round: u32) -> Batch {
    Batch { at: ExtentAt { block: 0, extent }, mask: u64::MAX, untouched: 0, round, kind: RoundKind::Live }
}

fn zeros(extent: u32) -> CopiedBatch {
    CopiedBatch { batch: batch(extent, 1), zero: u64::MAX, pages: None }
}

fn written(extent: u32, copies: &BufferPool, write: Write, random: &mut Rng) -> CopiedBatch {
    let mut pages = copies.try_take().expect("one for each");
    for _ in 0..PAGES_OF_EXTENT {
        let mut page = [0; PAGE];
        write(&mut page, random);
        pages.extend(&page);
    }
    CopiedBatch { batch: batch(extent, 2), zero: 0, pages: Some(pages) }
}

fn tally(round: u32) -> RoundTally {
    let zero = if round == 1 { PAGES } else { 0 };
    RoundTally {
        pages: PageTally { all: PAGES, zero, ..PageTally::default() },
        ..RoundTally::new(round, RoundKind::Live)
    }
}
