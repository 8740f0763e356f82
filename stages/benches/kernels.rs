//! The kernels that see every byte of a page: XBZRLE and the page compressors, beside memcpy of the same pages.
//!
//! All pages lie out of cache: two sets of 128 MiB are walked, old and new, each written before. A figure is page bytes a
//! second, whatever comes out. Each kernel's answer is checked once before it is measured.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};
use memferry_stages::codec::{Codec, Compressor, Decompressor};
use memferry_stages::geometry::{PageAt, PageSize};
use memferry_stages::xbzrle::{Delta, Encoded, XbzrleCache, encode_page, naive};

const PAGE: usize = 4096;
const SET_BYTES: usize = 128 << 20;
/// Pages of one iteration.
const TURN_PAGES: usize = 256;
const TURN_BYTES: usize = TURN_PAGES * PAGE;

type Change = fn(&mut [u8], &mut Random);
type Encode = fn(&[u8], &[u8], &mut [u8]) -> Encoded;

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(300))
        .nresamples(1000)
        .configure_from_args();
    let mut sets = Sets::new();
    encode(&mut criterion, &mut sets);
    decode(&mut criterion, &mut sets);
    cache(&mut criterion, &mut sets);
    for (kind, bytes) in contents() {
        codecs(&mut criterion, &mut sets, kind, &bytes);
    }
    criterion.final_summary();
}

/// Pages as they were and as they are, walked in turns, so that each turn finds its pages out of cache.
struct Sets {
    old: Vec<u8>,
    new: Vec<u8>,
}

impl Sets {
    fn new() -> Self {
        let mut random = Random(1);
        let old: Vec<u8> = (0..SET_BYTES / 8).flat_map(|_| random.next().to_le_bytes()).collect();
        Self { new: black_box(old.clone()), old: black_box(old) }
    }

    /// Makes the new pages of the old ones.
    fn change(&mut self, change: Change) {
        let mut random = Random(2);
        self.new.copy_from_slice(&self.old);
        self.new.chunks_exact_mut(PAGE).for_each(|page| change(page, &mut random));
        black_box(&mut self.new);
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).expect("below a usize")
    }
}

fn flip(bytes: &mut [u8]) {
    bytes.iter_mut().for_each(|byte| *byte ^= 0x5a);
}

/// What changes in every page.
const CHANGES: [(&str, Change); 8] = [
    ("equal", |_, _| {}),
    ("1 byte", |page, random| flip(&mut page[random.below(PAGE)..][..1])),
    ("1 word", |page, random| flip(&mut page[random.below(PAGE / 8) * 8..][..8])),
    ("8 words", |page, random| (0..8).for_each(|_| flip(&mut page[random.below(PAGE / 8) * 8..][..8]))),
    ("every 8th byte", |page, _| page.iter_mut().step_by(8).for_each(|byte| *byte ^= 1)),
    ("every 2nd byte", |page, _| page.iter_mut().step_by(2).for_each(|byte| *byte ^= 1)),
    ("half", |page, _| flip(&mut page[PAGE / 2..])),
    ("everything", |page, _| flip(page)),
];

/// A group whose figures are page bytes a second.
fn group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Bytes(TURN_BYTES as u64)).sampling_mode(criterion::SamplingMode::Flat);
    group
}

/// Gives the offset of one turn of pages after the other, round and round.
fn turns() -> impl FnMut() -> usize {
    let mut at = 0;
    move || {
        at = (at + TURN_BYTES) % SET_BYTES;
        at
    }
}

/// What the others of the group are measured against.
fn memcpy(group: &mut BenchmarkGroup<'_, WallTime>, from: &[u8], to: &mut [u8]) {
    let mut next = turns();
    group.bench_function("memcpy", |bencher| {
        bencher.iter(|| {
            let at = next();
            let from = from[at..at + TURN_BYTES].chunks_exact(PAGE);
            to[at..at + TURN_BYTES].chunks_exact_mut(PAGE).zip(from).for_each(|(to, from)| to.copy_from_slice(from));
        });
    });
}

fn encode(criterion: &mut Criterion, sets: &mut Sets) {
    let mut group = group(criterion, "xbzrle encode");
    memcpy(&mut group, &sets.old, &mut sets.new);
    for (name, change) in CHANGES {
        sets.change(change);
        check_encode(sets);
        for (which, encode) in [("", encode_page as Encode), (", oracle", naive::encode_page)] {
            let mut next = turns();
            let mut out = vec![0; PAGE];
            group.bench_function(format!("{name}{which}"), |bencher| {
                bencher.iter(|| {
                    let at = next();
                    let [old, new] = [&sets.old, &sets.new].map(|set| set[at..at + TURN_BYTES].chunks_exact(PAGE));
                    old.zip(new).for_each(|(old, new)| {
                        black_box(encode(old, new, &mut out));
                    });
                });
            });
        }
    }
}

fn check_encode(sets: &Sets) {
    let mut outs = [[0; PAGE]; 2];
    for (old, new) in sets.old.chunks_exact(PAGE).zip(sets.new.chunks_exact(PAGE)).take(1000) {
        let [fast, slow] = &mut outs;
        let result = encode_page(old, new, fast);
        assert_eq!(result, naive::encode_page(old, new, slow));
        if let Encoded::Delta(bytes) = result {
            assert_eq!(fast[..bytes], slow[..bytes]);
        }
    }
}

fn decode(criterion: &mut Criterion, sets: &mut Sets) {
    let mut group = group(criterion, "xbzrle decode in place");
    memcpy(&mut group, &sets.old, &mut sets.new);
    for (name, change) in
        CHANGES.into_iter().filter(|(name, _)| !["equal", "every 2nd byte", "everything"].contains(name))
    {
        sets.change(change);
        let deltas = Packed::of(&sets.new, |at, new, out| match encode_page(&sets.old[at..at + PAGE], new, out) {
            Encoded::Delta(bytes) => bytes,
            other => panic!("{other:?}"),
        });
        let mut pages = sets.old.clone();
        let patch = |at: usize, pages: &mut [u8]| {
            for (page, delta) in pages.chunks_exact_mut(PAGE).zip(deltas.turn(at)) {
                Delta::parse(delta, PAGE).expect("our own delta").apply(page);
            }
        };
        group.throughput(Throughput::Bytes(SET_BYTES as u64));
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|iterations| {
                let timed = |_| {
                    // The lines that a sparse delta touches are few: without a sweep between they would stay in cache.
                    pages.copy_from_slice(&sets.old);
                    sweep(&sets.new);
                    let start = Instant::now();
                    let turns = pages.chunks_exact_mut(TURN_BYTES).enumerate();
                    turns.for_each(|(turn, pages)| patch(turn * TURN_BYTES, pages));
                    start.elapsed()
                };
                (0..iterations).map(timed).sum()
            });
        });
        assert!(pages == sets.new);
    }
}

/// Reads a set, so that nothing else stays in cache.
fn sweep(set: &[u8]) {
    let words = set.as_chunks().0.iter().copied().map(u64::from_le_bytes);
    black_box(words.fold(0, u64::wrapping_add));
}

/// What pages were encoded to, one after another.
struct Packed {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Packed {
    /// Encodes every page of a set: `encode` is given its offset, the page and room, and tells the bytes written.
    fn of(set: &[u8], mut encode: impl FnMut(usize, &[u8], &mut [u8]) -> usize) -> Self {
        let mut packed = Self { bytes: Vec::new(), ends: vec![0] };
        let mut out = vec![0; PAGE];
        for (index, page) in set.chunks_exact(PAGE).enumerate() {
            let bytes = encode(index * PAGE, page, &mut out);
            packed.bytes.extend_from_slice(&out[..bytes]);
            packed.ends.push(packed.bytes.len());
        }
        packed
    }

    /// The encoded pages of the turn at an offset of the set.
    fn turn(&self, at: usize) -> impl Iterator<Item = &[u8]> {
        let first = at / PAGE;
        self.ends[first..=first + TURN_PAGES].windows(2).map(|ends| &self.bytes[ends[0]..ends[1]])
    }
}

/// What the encoder does with a page that it knows: look it up, encode, keep what was sent.
fn cache(criterion: &mut Criterion, sets: &mut Sets) {
    let mut cache = XbzrleCache::new(PageSize::DEFAULT, 256 << 20);
    let page_at = |offset: usize| PageAt { block: 0, page: (offset / PAGE) as u64 };
    for (index, page) in sets.old.chunks_exact(PAGE).enumerate() {
        assert!(cache.insert(page_at(index * PAGE), page, 1), "there is room for all");
    }
    let mut group = group(criterion, "xbzrle cache");
    memcpy(&mut group, &sets.old, &mut sets.new);
    let mut next = turns();
    group.bench_function("find and update", |bencher| {
        bencher.iter(|| {
            let at = next();
            for offset in (at..at + TURN_BYTES).step_by(PAGE) {
                let copy = cache.get(page_at(offset), 2).expect("it was kept");
                copy.copy_from_slice(&sets.old[offset..offset + PAGE]);
            }
        });
    });
    assert_eq!(*cache.get(page_at(5 * PAGE), 2).expect("kept"), sets.old[5 * PAGE..6 * PAGE]);
}

/// Kinds of bytes to compress: what repeats in a page shrinks.
fn contents() -> [(&'static str, Vec<u8>); 3] {
    let mut random = Random(3);
    let words = ["memory ", "page ", "of ", "the ", "guest ", "dirty ", "round ", "lane ", "\n"];
    let text = (0..200_000).flat_map(|_| words[random.below(words.len())].bytes()).collect();
    let noise = (0..1 << 17).flat_map(|_| random.next().to_le_bytes()).collect();
    let program = std::env::current_exe().and_then(std::fs::read).expect("a program can read itself");
    [("text", text), ("random", noise), ("program", program)]
}

fn codecs(criterion: &mut Criterion, sets: &mut Sets, kind: &str, bytes: &[u8]) {
    let repeated = bytes.iter().copied().cycle();
    sets.new.iter_mut().zip(repeated).for_each(|(to, from)| *to = from);
    let mut group = group(criterion, kind);
    memcpy(&mut group, &sets.new, &mut sets.old);
    for codec in [Codec::Snap, Codec::Lz4, Codec::Zstd { level: -1 }, Codec::Zstd { level: 1 }] {
        let mut compressor = Compressor::new(codec);
        let mut out = vec![0; PAGE - 1];
        let mut next = turns();
        group.bench_function(format!("{codec} compress"), |bencher| {
            bencher.iter(|| {
                let at = next();
                for page in sets.new[at..at + TURN_BYTES].chunks_exact(PAGE) {
                    black_box(compressor.compress(page, &mut out));
                }
            });
        });
        decompress(&mut group, codec, sets);
    }
}

/// Measures only pages that shrank; others would have been sent raw.
fn decompress(group: &mut BenchmarkGroup<'_, WallTime>, codec: Codec, sets: &mut Sets) {
    let mut compressor = Compressor::new(codec);
    let packed = Packed::of(&sets.new[..TURN_BYTES], |_, page, out| compressor.compress(page, out).unwrap_or(0));
    let shrunk: Vec<&[u8]> = packed.turn(0).filter(|bytes| !bytes.is_empty()).collect();
    println!("{codec}: {} of {TURN_PAGES} pages shrink, all to {} bytes", shrunk.len(), packed.bytes.len());
    if shrunk.is_empty() {
        println!("skipped: {codec} decompress, no page shrinks");
        return;
    }
    let mut decompressor = Decompressor::default();
    let mut unpack = |bytes: &[u8], page: &mut [u8]| {
        decompressor.decompress(codec.encoding(), bytes, page).expect("our own bytes");
    };
    let mut page = vec![0; PAGE];
    for (original, bytes) in sets.new.chunks_exact(PAGE).zip(packed.turn(0)).filter(|(_, bytes)| !bytes.is_empty()) {
        unpack(bytes, &mut page);
        assert!(page == original);
    }
    let mut next = turns();
    group.bench_function(format!("{codec} decompress"), |bencher| {
        bencher.iter(|| {
            let at = next();
            let pages = sets.old[at..at + TURN_BYTES].chunks_exact_mut(PAGE);
            pages.zip(shrunk.iter().cycle()).for_each(|(page, bytes)| unpack(bytes, page));
        });
    });
}
