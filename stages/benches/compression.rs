//! Pages through a whole encoder, beside the bare codec: ratio, time and what was tried, on several kinds of memory.
//!
//! `alone` is the codec on each page, `groups` the codec on each 64 KiB, both with nothing else. `encoder` is what a lane
//! does: glance, sampler, groups, frames with checksums. Everything of one line is measured in the same turn, and the best of
//! some turns counts.
//!
//! ```text
//! cargo bench -p memferry-stages --bench compression
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use memferry_stages::batch::{Batch, CopiedBatch, Item};
use memferry_stages::batch::{Mark, RoundKind};
use memferry_stages::codec::{Codec, Compressor};
use memferry_stages::encoder::{Encoder, EncoderPlan};
use memferry_stages::geometry::{ExtentAt, PageSize};
use memferry_stages::meter::Meter;
use memferry_stages::pool::BufferPool;
use memferry_stages::queue::bounded;
use memferry_stages::stage_id::StageId;
use memferry_stages::wire::WireFramer;

const PAGE: usize = 4096;
const EXTENT: usize = 64 * PAGE;
const GROUP: usize = 64 << 10;

fn main() {
    // `cargo test --benches` runs this too: once over little, to see that it works.
    let (extents, turns) = if std::env::args().any(|argument| argument == "--bench") { (32, 5) } else { (2, 1) };
    println!("{} MiB of each kind, best of {turns} turns; ratio, and ns for a page of 4 KiB", (extents * EXTENT) >> 20);
    println!("{:<34}{:>16}{:>16}{:>16}{:>10}{:>9}", "", "alone", "groups", "encoder", "of alone", "of raw");
    for (kind, memory) in contents(extents * EXTENT) {
        for codec in [Codec::Snap, Codec::Lz4, Codec::Zstd { level: -1 }, Codec::Zstd { level: 1 }] {
            let [mut alone, mut groups, mut lane, mut raw] = [Figure::default(); 4];
            for _ in 0..turns {
                alone.better(bare(codec, &memory, PAGE));
                groups.better(bare(codec, &memory, GROUP));
                lane.better(encoder(Some(codec), &memory));
                raw.better(encoder(None, &memory));
            }
            let shown = |figure: Figure| format!("{:>7.3}{:>9.0}", figure.ratio, figure.page_ns);
            println!(
                "{:<34}{}{}{}{:>10.2}{:>9.1}",
                format!("{kind}, {codec}"),
                shown(alone),
                shown(groups),
                shown(lane),
                lane.ratio / alone.ratio,
                lane.page_ns / raw.page_ns
            );
        }
    }
}

/// The result for some memory.
#[derive(Clone, Copy, Debug)]
struct Figure {
    ratio: f64,
    page_ns: f64,
}

impl Default for Figure {
    fn default() -> Self {
        Self { ratio: 0.0, page_ns: f64::INFINITY }
    }
}

impl Figure {
    fn new(memory: &[u8], bytes: usize, time: Duration) -> Self {
        let pages = memory.len() / PAGE;
        Self { ratio: memory.len() as f64 / bytes as f64, page_ns: time.as_nanos() as f64 / pages as f64 }
    }

    fn better(&mut self, other: Self) {
        if other.page_ns < self.page_ns {
            *self = other;
        }
    }
}

/// The codec alone on pieces of this size; those that do not shrink count as they are.
fn bare(codec: Codec, memory: &[u8], piece: usize) -> Figure {
    let (mut compressor, mut out) = (Compressor::new(codec), vec![0; piece - 1]);
    let began = Instant::now();
    let bytes =
        memory.chunks_exact(piece).map(|piece| compressor.compress(piece, &mut out).unwrap_or(piece.len())).sum();
    Figure::new(memory, bytes, began.elapsed())
}

/// A lane's encoder on batches that are copied already.
fn encoder(compress: Option<Codec>, memory: &[u8]) -> Figure {
    let plan = EncoderPlan { compress, delta: None };
    let extents = memory.len() / EXTENT;
    let (copies, own) = (BufferPool::new(extents, EXTENT), BufferPool::new(extents + 1, EXTENT));
    // Buffers are made beforehand, as they are in a run that has gone on for a while.
    let made: Vec<_> = (0..=extents).map(|_| own.try_take().expect("as many as that")).collect();
    made.into_iter().for_each(|mut buffer| buffer.space().fill(1));
    let encoder =
        Encoder::new(0, PageSize::DEFAULT, plan, WireFramer::new(true), own, Meter::start(StageId::encoder(0)));
    let ((put, input), (output, got)) = (bounded(extents + 2), bounded(extents + 2));
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("no threads");
    runtime.block_on(async {
        for (extent, bytes) in (0..).zip(memory.chunks_exact(EXTENT)) {
            let mut pages = copies.take().await;
            pages.extend(bytes);
            let at = ExtentAt { block: 0, extent };
            let batch = Batch { at, mask: u64::MAX, untouched: 0, round: 1, kind: RoundKind::Live };
            put.put(Item::Batch(CopiedBatch { batch, zero: 0, pages: Some(pages) })).await.expect("room");
        }
        put.put(Item::<CopiedBatch>::Mark(Mark::LaneEnds)).await.expect("room");
        let began = Instant::now();
        encoder.run(input, output).await.expect("nothing fails");
        let time = began.elapsed();
        let mut bytes = 0;
        while let Some(frame) = got.next().await {
            bytes += frame.head.len() + frame.payload.map_or(0, |payload| payload.len());
        }
        Figure::new(memory, bytes, time)
    })
}

/// Kinds of memory, as much of each.
fn contents(bytes: usize) -> Vec<(&'static str, Vec<u8>)> {
    let mut state = 1_u64;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.rotate_left(23)
    };
    let words = ["memory ", "page ", "of ", "the ", "guest ", "dirty ", "round ", "lane ", "\n"];
    let mut text = Vec::with_capacity(bytes + 8);
    while text.len() < bytes {
        text.extend(words[usize::try_from(next() % 9).expect("a few")].bytes());
    }
    text.truncate(bytes);
    let random: Vec<u8> = (0..bytes / 8).flat_map(|_| next().to_le_bytes()).collect();
    let floats: Vec<u8> = (0..bytes / 4).flat_map(|_| (next() as f32 / u64::MAX as f32).to_le_bytes()).collect();
    let turns = |piece: usize| {
        let pieces = random.chunks(piece).zip(text.chunks(piece)).enumerate();
        pieces.flat_map(|(turn, (random, text))| if turn % 2 == 0 { text } else { random }.iter().copied()).collect()
    };
    let (pages, extents): (Vec<u8>, Vec<u8>) = (turns(PAGE), turns(EXTENT));
    let mut process = process(bytes, &mut next);
    process.resize(process.len() / EXTENT * EXTENT, 0);
    vec![
        ("text", text),
        ("process", process),
        ("random", random),
        ("random floats", floats),
        ("pages in turns", pages),
        ("extents in turns", extents),
    ]
}

/// A process's memory: maps, lists and strings on the heap of this one, page by page, without its zero pages.
fn process(bytes: usize, next: &mut impl FnMut() -> u64) -> Vec<u8> {
    use std::collections::BTreeMap;
    use std::os::unix::fs::FileExt;
    let mut records: BTreeMap<u64, (Arc<str>, Vec<u32>, String)> = BTreeMap::new();
    while records.len() < bytes / 200 {
        let number = next();
        let tags = (0..number % 8).map(|tag| u32::try_from(tag * 17).expect("small")).collect();
        records.insert(number % 1_000_003, (format!("user{number}").into(), tags, format!("/home/{}", number % 999)));
    }
    let maps = std::fs::read_to_string("/proc/self/maps").expect("a process can read its own");
    let memory = std::fs::File::open("/proc/self/mem").expect("a process can read its own");
    let mut pages = Vec::with_capacity(bytes);
    for line in maps.lines().filter(|line| line.ends_with("[heap]")) {
        let (start, end) = line.split(' ').next().and_then(|range| range.split_once('-')).expect("a range");
        let number = |text| u64::from_str_radix(text, 16).expect("a number");
        for at in (number(start)..number(end)).step_by(PAGE) {
            let mut page = [0; PAGE];
            if memory.read_exact_at(&mut page, at).is_ok() && page.iter().any(|&byte| byte != 0) && pages.len() < bytes
            {
                pages.extend_from_slice(&page);
            }
        }
    }
    std::hint::black_box(&records);
    pages
}
