//! The kernels that see every byte of a page, each beside its controls: XBZRLE and its cache, and the page compressors.
//!
//! `cargo bench -p memferry-stages --bench kernels [FILTER]`; how to read it stands in [`common`]. The controls:
//! - *memcpy*: the pages into a warm buffer; *memcpy to its place*: onto cold pages, where a delta is applied;
//! - *oracle*: XBZRLE done byte by byte;
//! - *library*: the codec called bare.
//!
//! Each answer is checked once before it is measured.

mod common;

use std::hint::black_box;
use std::io::Write as _;

use common::inputs::{self, CHANGES, CONTENTS};
use common::{PAGE, PLACES, Suite, TURN, Walk, memcpy, memcpy_in_place, or_of, timed};
use memferry_stages::codec::{Codec, Compressor, Decompressor};
use memferry_stages::geometry::{PageAt, PageSize};
use memferry_stages::memory::{MappedMemory, Memory};
use memferry_stages::xbzrle::{Delta, Encoded, XbzrleCache, encode_page, naive};

fn main() {
    inputs::process(PAGE);
    let mut suite = Suite::new();
    for (place, bytes) in PLACES {
        let (old, mut new) = (inputs::random(bytes), inputs::random(bytes));
        encode(&mut suite, place, &old, &mut new);
        decode(&mut suite, place, &old, &mut new);
        cache(&mut suite, place, &old);
        for (kind, content) in CONTENTS.into_iter().skip(1) {
            codecs(&mut suite, &format!("codecs on {kind}, {place}"), &content(bytes));
        }
    }
    suite.finish();
}

fn encode(suite: &mut Suite, place: &str, old: &[u8], new: &mut [u8]) {
    let group = &format!("xbzrle encode, {place}");
    memcpy(suite, group, old);
    memcpy_in_place(suite, group, old, new);
    for (name, change) in CHANGES {
        inputs::change(old, new, change);
        check_encode(old, new);
        let oracle = format!("{name}, oracle");
        let controls = [("memcpy", "memcpy"), ("memcpy to its place", "memcpy to its place"), ("oracle", &oracle)];
        for (name, encode, controls) in [
            (&oracle[..], naive::encode_page as fn(&[u8], &[u8], &mut [u8]) -> Encoded, &[][..]),
            (name, encode_page, &controls),
        ] {
            let (mut out, mut walk) = (vec![0; PAGE], Walk::over(old.len()));
            let mut page = |at| {
                black_box(encode(&old[at..at + PAGE], &new[at..at + PAGE], &mut out));
            };
            suite.measure(group, name, TURN, controls, || timed(|| walk.turn().for_each(&mut page)));
        }
    }
}

fn check_encode(old: &[u8], new: &[u8]) {
    let mut outs = [[0; PAGE]; 2];
    for (old, new) in old.chunks_exact(PAGE).zip(new.chunks_exact(PAGE)).take(1000) {
        let [fast, slow] = &mut outs;
        let result = encode_page(old, new, fast);
        assert_eq!(result, naive::encode_page(old, new, slow));
        if let Encoded::Delta(bytes) = result {
            assert_eq!(fast[..bytes], slow[..bytes]);
        }
    }
}

/// What a loader does with a delta: check it, and patch the page where it stands.
fn decode(suite: &mut Suite, place: &str, old: &[u8], new: &mut [u8]) {
    let group = &format!("xbzrle decode, {place}");
    memcpy_in_place(suite, group, old, new);
    let memory = inputs::mapped(old);
    let mut naive_pages = old.to_vec();
    for (name, change) in CHANGES {
        inputs::change(old, new, change);
        let encode = |at: usize, new: &[u8], out: &mut [u8]| match encode_page(&old[at..at + PAGE], new, out) {
            Encoded::Delta(bytes) => Some(bytes),
            Encoded::Equal | Encoded::Overflow => None,
        };
        let Some(deltas) = Packed::of(new, encode) else { continue };
        let oracle = format!("{name}, oracle");
        let mut walk = Walk::over(old.len());
        suite.measure(group, &oracle, TURN, &[], || {
            out_of_cache(&walk, new);
            timed(|| walk.turn().for_each(|at| assert!(naive::apply(deltas.page(at), &mut naive_pages[at..at + PAGE]))))
        });
        memory.store(0, old);
        let patch = |at: usize| {
            let delta = Delta::parse(deltas.page(at), PAGE).expect("our own delta");
            memory.patch(PageSize::DEFAULT, (at / PAGE) as u64, &delta).expect("it is mapped");
        };
        let mut walk = Walk::over(old.len());
        suite.measure(
            group,
            name,
            TURN,
            &[("memcpy to its place", "memcpy to its place"), ("oracle", &oracle)],
            || {
                out_of_cache(&walk, new);
                timed(|| walk.turn().for_each(patch))
            },
        );
        (0..old.len()).step_by(PAGE).for_each(patch);
        assert_holds(&memory, new);
        naive_pages.copy_from_slice(old);
    }
}

/// The lines that sparse deltas touch are few: without a sweep of others in between they would stay in cache.
fn out_of_cache(walk: &Walk, others: &[u8]) {
    if others.len() > TURN && walk.at_start() {
        black_box(or_of(others));
    }
}

fn assert_holds(memory: &MappedMemory, expected: &[u8]) {
    let mut page = [0; PAGE];
    for (index, expected) in expected.chunks_exact(PAGE).enumerate() {
        memory.load(index * PAGE, &mut page);
        assert!(page == expected, "page {index}");
    }
}

/// What the pages of a set were encoded to, one after another.
struct Packed {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Packed {
    /// `encode` is given a page's offset, the page and room, and returns the bytes written. `None` if it cannot be done.
    fn of(set: &[u8], mut encode: impl FnMut(usize, &[u8], &mut [u8]) -> Option<usize>) -> Option<Self> {
        let mut packed = Self { bytes: Vec::new(), ends: vec![0] };
        let mut out = vec![0; PAGE];
        for (index, page) in set.chunks_exact(PAGE).enumerate() {
            let bytes = encode(index * PAGE, page, &mut out)?;
            packed.bytes.extend_from_slice(&out[..bytes]);
            packed.ends.push(packed.bytes.len());
        }
        Some(packed)
    }

    /// The code of the page at an offset of the set.
    fn page(&self, at: usize) -> &[u8] {
        let index = at / PAGE;
        &self.bytes[self.ends[index]..self.ends[index + 1]]
    }
}

/// What the encoder does in the first round, and with a page that overflows: keep what was sent.
fn cache(suite: &mut Suite, place: &str, set: &[u8]) {
    let group = &format!("xbzrle cache, {place}");
    let page_at = |offset: usize| PageAt { block: 0, page: (offset / PAGE) as u64 };
    let empty = || XbzrleCache::new(PageSize::DEFAULT, 2 * set.len() as u64 + (1 << 20));
    let mut copy = vec![1; set.len()];
    memcpy_in_place(suite, group, set, &mut copy);
    let control = [("memcpy to its place", "memcpy to its place")];
    let (mut cache, mut walk) = (empty(), Walk::over(set.len()));
    let mut insert = |at: usize| assert!(cache.insert(page_at(at), &set[at..at + PAGE], 1), "there is room for all");
    (0..set.len()).step_by(PAGE).for_each(&mut insert);
    suite.measure(group, "insert, cached before", TURN, &control, || timed(|| walk.turn().for_each(&mut insert)));
    assert_eq!(*cache.get(page_at(5 * PAGE), 2).expect("cached"), set[5 * PAGE..6 * PAGE]);
    if set.len() > TURN {
        let (mut cache, mut walk) = (empty(), Walk::over(set.len()));
        suite.measure(group, "insert, the first time", TURN, &control, || {
            if walk.at_start() {
                cache = empty();
            }
            timed(|| walk.turn().for_each(|at| assert!(cache.insert(page_at(at), &set[at..at + PAGE], 1))))
        });
    }
}

fn codecs(suite: &mut Suite, group: &str, set: &[u8]) {
    memcpy(suite, group, set);
    for codec in [Codec::Snap, Codec::Lz4, Codec::Zstd { level: -1 }, Codec::Zstd { level: 1 }] {
        let (mut bare, mut compressor) = (bare(codec), Compressor::new(codec));
        let (library, mut out) = (format!("{codec} compress, library"), vec![0; 2 * PAGE]);
        let mut walk = Walk::over(set.len());
        suite.measure(group, &library, TURN, &[], || {
            timed(|| {
                walk.turn().for_each(|at| {
                    black_box(bare(&set[at..at + PAGE], &mut out));
                });
            })
        });
        let mut walk = Walk::over(set.len());
        let controls = [("memcpy", "memcpy"), ("library", &library)];
        suite.measure(group, &format!("{codec} compress"), TURN, &controls, || {
            timed(|| {
                walk.turn().for_each(|at| {
                    black_box(compressor.compress(&set[at..at + PAGE], &mut out[..PAGE - 1]));
                });
            })
        });
        decompress(suite, group, codec, set);
    }
}

/// Compresses a page into enough room, and returns the bytes.
type Bare = Box<dyn FnMut(&[u8], &mut [u8]) -> usize>;

/// The codec's library, called as its documentation says.
fn bare(codec: Codec) -> Bare {
    match codec {
        Codec::Snap => {
            let mut encoder = snap::raw::Encoder::new();
            Box::new(move |page, out| encoder.compress(page, out).expect("room"))
        }
        Codec::Lz4 => Box::new(|page, out| lz4_flex::block::compress_into(page, out).expect("room")),
        Codec::Zstd { level } => {
            let mut compressor = zstd::bulk::Compressor::new(level).expect("a level");
            Box::new(move |page, out| compressor.compress_to_buffer(page, out).expect("room"))
        }
    }
}

/// Measures only pages that shrank; others would have been sent raw.
fn decompress(suite: &mut Suite, group: &str, codec: Codec, set: &[u8]) {
    let (mut compressor, mut decompressor) = (Compressor::new(codec), Decompressor::default());
    let turn = &set[..TURN.min(set.len())];
    let packed = Packed::of(turn, |_, page, out| Some(compressor.compress(page, &mut out[..PAGE - 1]).unwrap_or(0)));
    let packed = packed.expect("a page that does not shrink has no bytes");
    let shrunk: Vec<usize> = (0..turn.len()).step_by(PAGE).filter(|&at| !packed.page(at).is_empty()).collect();
    if shrunk.is_empty() {
        writeln!(std::io::stderr(), "skipped: {codec} decompress, no page shrinks").expect("stderr is open");
        return;
    }
    let mut page = vec![0; PAGE];
    let mut unpack = |at: usize, page: &mut [u8]| {
        decompressor.decompress(codec.encoding(), packed.page(at), page).expect("our own bytes");
    };
    for &at in &shrunk {
        unpack(at, &mut page);
        assert!(page == turn[at..at + PAGE]);
    }
    suite.measure(group, &format!("{codec} decompress"), TURN, &[("memcpy", "memcpy")], || {
        timed(|| shrunk.iter().cycle().take(TURN / PAGE).for_each(|&at| unpack(at, &mut page)))
    });
}
