use std::collections::{BTreeMap, VecDeque};

use fastrand::Rng;
use futures::FutureExt;
use proptest::prelude::*;

use super::*;
use crate::batch::RoundKind;
use crate::codec::{Compressor, Decompressor};
use crate::geometry::Layout;
use crate::queue::bounded;
use crate::stage::testing::{batch, block_on, drain, layout, meter, page_size};
use crate::token_bucket::TokenBucket;
use crate::wire::{FrameHead, HEAD_BYTES, Message, PagesHead, WireFramer};
use crate::xbzrle::Delta;

const EXTENTS: usize = 2;
const PAGES: usize = EXTENTS * 64;
const LANE: u16 = 1;

/// A simple destination: it applies frames to its memory.
struct Destination {
    layout: Layout,
    memory: Vec<u8>,
    decompressor: Decompressor,
}

impl Destination {
    fn new(layout: Layout) -> Self {
        let memory = vec![0; usize::try_from(layout.bytes()).unwrap()];
        Self { layout, memory, decompressor: Decompressor::default() }
    }

    /// Loads one frame, and returns its head.
    fn load(&mut self, outgoing: &Outgoing, checksum: bool) -> PagesHead {
        let (head, body) = outgoing.head.split_first_chunk::<HEAD_BYTES>().unwrap();
        let frame = FrameHead::parse(head, self.layout.page_size()).unwrap();
        let head = PagesHead::parse(body, frame.length, &self.layout).unwrap();
        let mut payload = outgoing.payload.as_deref().unwrap_or(&[]);
        assert_eq!((frame.lane, frame.length as usize), (LANE, body.len() + payload.len()));
        assert_eq!(
            head.payload_hash,
            if checksum && !payload.is_empty() { head.clone().with_hash_of(payload).payload_hash } else { 0 }
        );
        let page_bytes = self.layout.page_size().bytes();
        let mut pages = head.pages.iter();
        let mut group = VecDeque::<Vec<u8>>::new();
        for bit in bits(head.mask) {
            let start = usize::try_from(head.at.page(bit).page).unwrap() * page_bytes;
            let page = &mut self.memory[start..start + page_bytes];
            if head.zero & (1 << bit) != 0 {
                page.fill(0);
                continue;
            }
            let &(encoding, bytes) = pages.next().unwrap();
            let coded = payload.split_off(..bytes as usize).unwrap();
            match encoding {
                PageEncoding::Raw => page.copy_from_slice(coded),
                PageEncoding::Xbzrle => Delta::parse(coded, page_bytes).unwrap().apply(page),
                PageEncoding::Grouped => page.copy_from_slice(&group.pop_front().unwrap()),
                codec => {
                    assert!(group.is_empty(), "a group ends before the next begins");
                    let others = pages.clone().take_while(|(encoding, _)| !encoding.is_codec());
                    let others = others.filter(|(encoding, _)| *encoding == PageEncoding::Grouped).count();
                    let mut whole = vec![0; (1 + others) * page_bytes];
                    self.decompressor.decompress(codec, coded, &mut whole).unwrap();
                    group = whole.chunks_exact(page_bytes).map(<[u8]>::to_vec).collect();
                    page.copy_from_slice(&group.pop_front().unwrap());
                }
            }
        }
        assert!(payload.is_empty() && pages.next().is_none());
        head
    }
}

/// What a guest does to one of its pages.
#[derive(Clone, Copy, Debug)]
enum Write {
    Zeros,
    /// A few bytes.
    Sparse,
    /// Every other byte: no delta fits.
    Dense,
    Random,
    Text,
    /// What it holds already.
    Same,
}

/// A source: guest memory, and the encoder's input made of it.
struct Source {
    page_size: PageSize,
    memory: Vec<u8>,
    pool: BufferPool,
}

impl Source {
    fn new(page_size: PageSize) -> Self {
        let pool = BufferPool::new(64, page_size.extent_bytes());
        Self { page_size, memory: vec![0; PAGES * page_size.bytes()], pool }
    }

    fn layout(&self) -> Layout {
        layout(self.page_size, &[self.memory.len() as u64])
    }

    fn page(&mut self, page: usize) -> &mut [u8] {
        let bytes = self.page_size.bytes();
        &mut self.memory[page * bytes..(page + 1) * bytes]
    }

    fn write(&mut self, page: usize, write: Write, seed: u64) {
        let mut random = Rng::with_seed(seed);
        let page = self.page(page);
        match write {
            Write::Zeros => page.fill(0),
            Write::Sparse => {
                for _ in 0..5 {
                    let at = random.usize(..page.len());
                    page[at] = page[at].wrapping_add(1);
                }
            }
            Write::Dense => page.iter_mut().step_by(2).for_each(|byte| *byte = byte.wrapping_add(1)),
            Write::Random => random.fill(page),
            Write::Text => {
                let words = [b"memory ", b"guests ", b"pages, ", b"dirty. "];
                page.chunks_mut(7).for_each(|word| word.copy_from_slice(&words[random.usize(..4)][..word.len()]));
            }
            Write::Same => {}
        }
    }

    /// The copies of these pages as the detector would hand them on, a batch for each extent.
    fn copies(&self, dirty: impl IntoIterator<Item = usize>, round: u32, kind: RoundKind) -> Vec<CopiedBatch> {
        let mut masks = BTreeMap::new();
        for page in dirty {
            *masks.entry(u32::try_from(page / 64).unwrap()).or_insert(0) |= 1u64 << (page % 64);
        }
        masks.into_iter().map(|(extent, mask)| self.copy(Batch { kind, ..batch(extent, mask, round) })).collect()
    }

    fn copy(&self, batch: Batch) -> CopiedBatch {
        let page_bytes = self.page_size.bytes();
        let extent = &self.memory[batch.at.extent as usize * self.page_size.extent_bytes()..];
        let (mut zero, mut buffer) = (0, self.pool.try_take().unwrap());
        for bit in bits(batch.mask) {
            let page = &extent[bit as usize * page_bytes..][..page_bytes];
            if page.iter().all(|&byte| byte == 0) { zero |= 1 << bit } else { buffer.extend(page) }
        }
        CopiedBatch { batch, zero, pages: (zero != batch.mask).then_some(buffer) }
    }
}

/// What the scanner and the detector say of these copies.
fn tally(copies: &[CopiedBatch], page_size: PageSize, round: u32, kind: RoundKind) -> RoundTally {
    let mut tally = RoundTally { batches: copies.len() as u64, ..RoundTally::new(round, kind) };
    for copied in copies {
        tally.pages.all += u64::from(copied.batch.mask.count_ones());
        tally.pages.zero += u64::from(copied.zero.count_ones());
    }
    tally.pages.bytes_in = tally.pages.all * page_size.bytes() as u64;
    tally
}

/// An encoder to be fed round by round.
struct Bench {
    source: Source,
    known_zero: Arc<KnownZero>,
    encoder: Encoder<WireFramer>,
}

impl Bench {
    fn new(page_size: PageSize, plan: EncoderPlan) -> Self {
        Self::with_checksums(page_size, plan, false)
    }

    fn with_checksums(page_size: PageSize, plan: EncoderPlan, checksum: bool) -> Self {
        let (source, pool) = (Source::new(page_size), BufferPool::new(64, page_size.extent_bytes()));
        let known_zero = Arc::new(KnownZero::new(&source.layout()));
        let encoder = Encoder::new(LANE, page_size, plan, WireFramer::new(checksum), pool, meter())
            .with_known_zero(known_zero.clone())
            .with_wire(wire(Some(64 << 10)));
        Self { source, known_zero, encoder }
    }

    /// Writes these pages and encodes them as a round: its frames, and its figures.
    fn round(&mut self, round: u32, kind: RoundKind, writes: &[(usize, Write, u64)]) -> (Vec<Outgoing>, RoundTally) {
        writes.iter().for_each(|&(page, write, seed)| self.source.write(page, write, seed));
        let copies = self.source.copies(writes.iter().map(|&(page, ..)| page), round, kind);
        let tally = tally(&copies, self.source.page_size, round, kind);
        let frames = copies.into_iter().map(|copied| self.encoder.batch(copied).now_or_never().unwrap()).collect();
        let complete = self.encoder.mark(Mark::RoundComplete(tally));
        let Some(Mark::RoundComplete(figures)) = complete.mark else { panic!("{complete:?}") };
        (frames, figures)
    }

    /// The same for `write` into all of `pages`: just the figures.
    fn figures(&mut self, round: u32, pages: std::ops::Range<usize>, write: Write) -> RoundTally {
        let writes: Vec<_> = pages.map(|page| (page, write, 77 + page as u64 + (u64::from(round) << 20))).collect();
        self.round(round, RoundKind::Live, &writes).1
    }
}

fn deltas(cache_pages: u64, on_miss: OnMiss, cache_first_round: bool) -> Option<DeltaPlan> {
    Some(DeltaPlan { cache_bytes: cache_pages * 5000, on_miss, cache_first_round })
}

/// zero, raw, compressed, xbzrle, unchanged
fn encodings(tally: &RoundTally) -> [u64; 5] {
    [tally.pages.zero, tally.pages.raw, tally.pages.compressed, tally.pages.xbzrle, tally.pages.unchanged]
}

/// How many pages came in an encoding, in these frames.
fn count(heads: &[PagesHead], which: impl Fn(PageEncoding) -> bool) -> u64 {
    heads.iter().flat_map(|head| &head.pages).filter(|(encoding, _)| which(*encoding)).count() as u64
}

fn is_compressed(encoding: PageEncoding) -> bool {
    encoding.is_codec() || encoding == PageEncoding::Grouped
}

fn codecs() -> impl Strategy<Value = Option<Codec>> {
    prop::option::of(prop_oneof![Just(Codec::Snap), Just(Codec::Lz4), Just(Codec::Zstd { level: -1 })])
}

/// A connection of one lane whose sender never waits for its transport.
fn wire(limit: Option<u64>) -> Wire {
    let sender = meter();
    sender.count(0, 1 << 30);
    Wire::new(sender, Arc::new(limit.map_or_else(TokenBucket::unlimited, TokenBucket::new)), 1, 1)
}

fn on_miss() -> impl Strategy<Value = OnMiss> {
    let auto = codecs().prop_map(|codec| codec.map_or(OnMiss::Raw, OnMiss::Auto));
    prop_oneof![codecs().prop_map(|codec| codec.map_or(OnMiss::Raw, OnMiss::Compress)), auto]
}

fn plans() -> impl Strategy<Value = EncoderPlan> {
    let delta = (prop_oneof![Just(0u64), Just(6), Just(1000)], on_miss(), any::<bool>())
        .prop_map(|(pages, on_miss, first)| deltas(pages, on_miss, first).unwrap());
    (codecs(), prop::option::of(delta)).prop_map(|(compress, delta)| EncoderPlan { compress, delta })
}

fn writes() -> impl Strategy<Value = Vec<(usize, Write, u64)>> {
    use Write::{Dense, Random, Same, Sparse, Text, Zeros};
    let write = prop_oneof![
        1 => Just(Zeros), 4 => Just(Sparse), 1 => Just(Dense), 1 => Just(Random), 1 => Just(Text), 1 => Just(Same)
    ];
    // Few of the pages, so that each is written again and again.
    let page = prop_oneof![0..12usize, 60..70usize];
    prop::collection::vec((page, write, any::<u64>()), 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Laws 5 (the round travels in band) and 6 (the delta's reference is what the destination holds): each delta is applied to
    /// what the destination holds. A last round may be followed by others, since a switchover may be called off. The cache may
    /// change its size before any of them.
    #[test]
    fn the_destination_holds_what_the_source_held_after_every_round(
        plan in plans(),
        checksum: bool,
        kib in prop_oneof![8 => Just(4u64), 1 => Just(16), 1 => Just(64)],
        rounds in prop::collection::vec(
            (writes(), prop::bool::weighted(0.2), prop::option::weighted(0.3, 0..200_000u64)),
            1..8,
        ),
    ) {
        let mut bench = Bench::with_checksums(page_size(kib), plan, checksum);
        let mut destination = Destination::new(bench.source.layout());
        for (round, (writes, last, cache)) in (1..).zip(&rounds) {
            cache.iter().for_each(|&bytes| bench.encoder.cache_share().set(bytes));
            let kind = if *last { RoundKind::Final } else { RoundKind::Live };
            let (frames, tally) = bench.round(round, kind, writes);
            let heads: Vec<_> = frames.iter().map(|frame| destination.load(frame, checksum)).collect();
            prop_assert!(destination.memory == bench.source.memory, "round {round}");

            let bytes = |frame: &Outgoing| frame.head.len() + frame.payload.as_ref().map_or(0, |payload| payload.len());
            prop_assert_eq!(tally.pages.bytes_out, frames.iter().map(bytes).sum::<usize>() as u64);
            prop_assert_eq!(tally.batches, frames.len() as u64, "a frame for each batch");
            prop_assert!(heads.iter().all(|head| head.round == round));
            let sent: u32 = heads.iter().map(|head| head.mask.count_ones()).sum();
            let zero: u32 = heads.iter().map(|head| head.zero.count_ones()).sum();
            let [raw, xbzrle] = [PageEncoding::Raw, PageEncoding::Xbzrle].map(|which| count(&heads, |it| it == which));
            let counted = [zero.into(), raw, count(&heads, is_compressed), xbzrle, tally.pages.all - u64::from(sent)];
            prop_assert_eq!(encodings(&tally), counted);
            prop_assert_eq!(counted.iter().sum::<u64>(), tally.pages.all, "the encodings add up");

            let compressor = match plan.delta {
                Some(delta) if round > 1 => {
                    prop_assert_eq!(raw + tally.pages.compressed, tally.pages.xbzrle_misses + tally.pages.xbzrle_overflows);
                    delta.on_miss.codec()
                }
                _ => {
                    prop_assert_eq!(xbzrle + tally.pages.unchanged + tally.pages.xbzrle_misses + tally.pages.xbzrle_overflows, 0);
                    plan.compress
                }
            };
            let allowed = compressor.map(Codec::encoding);
            prop_assert_eq!(count(&heads, |it| it.is_codec() && Some(it) != allowed), 0);
        }
    }
}

#[test]
fn misses_are_compressed_where_a_limit_holds_and_raw_where_nothing_does() {
    // A page takes a second at 4 KiB/s: no processor is slower.
    for (limit, compressed) in [(Some(4 << 10), 128), (None, 64)] {
        let auto = deltas(1000, OnMiss::Auto(Codec::Lz4), false);
        let mut bench = Bench::new(page_size(4), EncoderPlan { delta: auto, ..EncoderPlan::default() });
        bench.encoder = bench.encoder.with_wire(wire(limit));
        bench.round(1, RoundKind::Live, &[]);
        // Until the first try has shrunk a page there is nothing to decide by.
        assert_eq!(encodings(&bench.figures(2, 0..PAGES, Write::Text)), [0, 128 - compressed, compressed, 0, 0]);
    }
}

#[test]
fn a_delta_is_made_of_what_is_marked_as_cached_and_of_nothing_else() {
    for first_round in [false, true] {
        let plan = EncoderPlan { delta: deltas(1000, OnMiss::Raw, first_round), ..EncoderPlan::default() };
        let mut bench = Bench::new(page_size(4), plan);
        let cached = Arc::new(DirtyBitmap::empty(&bench.source.layout()));
        bench.encoder = bench.encoder.with_cached(cached.clone());
        bench.round(1, RoundKind::Live, &[(0, Write::Zeros, 1), (1, Write::Random, 1)]);
        let at = batch(0, 1, 1).at;
        assert_eq!((cached.peek(at), bench.known_zero.pages(at)), (u64::from(first_round) << 1, 1));
        let writes: Vec<_> = (0..4).map(|page| (page, Write::Sparse, 2)).collect();
        for round in [2, 3] {
            let (dirty, before) = (4, cached.peek(at) | bench.known_zero.pages(at));
            assert_eq!(
                bench.round(round, RoundKind::Live, &writes).1.pages.xbzrle_misses,
                dirty - u64::from(before.count_ones()),
                "round {round}"
            );
            assert_eq!((cached.peek(at), bench.known_zero.pages(at)), (0b1111, 0));
        }
    }
}

#[test]
fn compression_in_round_one_only_and_deltas_only_after_it() {
    let plan = EncoderPlan { compress: Some(Codec::Lz4), delta: deltas(1000, OnMiss::Raw, true) };
    let mut bench = Bench::new(page_size(4), plan);
    assert_eq!(encodings(&bench.figures(1, 0..100, Write::Text)), [0, 0, 100, 0, 0]);
    assert_eq!(encodings(&bench.figures(2, 0..100, Write::Sparse)), [0, 0, 0, 100, 0]);
    let third = bench.figures(3, 0..100, Write::Dense);
    assert_eq!((encodings(&third), third.pages.xbzrle_overflows), ([0, 100, 0, 0, 0], 100));
}

#[test]
fn pages_that_shrink_are_compressed_together_across_those_that_do_not() {
    let plan = EncoderPlan { compress: Some(Codec::Lz4), ..EncoderPlan::default() };
    let mut bench = Bench::new(page_size(4), plan);
    let mut destination = Destination::new(bench.source.layout());
    // Noise is tried again now and then, but not in the third round.
    for round in 1..=3 {
        let writes: Vec<_> = (0..48)
            .map(|page| (page, if page % 3 == 0 { Write::Random } else { Write::Text }, 5 + page as u64))
            .collect();
        let (frames, tally) = bench.round(round, RoundKind::Live, &writes);
        assert_eq!(encodings(&tally), [0, 16, 32, 0, 0]);
        let head = destination.load(&frames[0], false);
        assert!(destination.memory == bench.source.memory);
        let begun = count(std::slice::from_ref(&head), PageEncoding::is_codec);
        assert!(round < 3 || begun == 2, "two groups of 16: {:?}", head.pages);
    }
}

#[test]
fn together_they_are_fewer_bytes_than_alone() {
    for codec in [Codec::Snap, Codec::Lz4, Codec::Zstd { level: -1 }] {
        let mut bench = Bench::new(page_size(4), EncoderPlan { compress: Some(codec), ..EncoderPlan::default() });
        let together = bench.figures(1, 0..64, Write::Text);
        assert_eq!(encodings(&together), [0, 0, 64, 0, 0]);
        let (mut compressor, mut out) = (Compressor::new(codec), vec![0; 4095]);
        let alone: usize = (0..64).map(|page| compressor.compress(bench.source.page(page), &mut out).unwrap()).sum();
        assert!(together.pages.bytes_out < alone as u64, "{codec}: {} and {alone}", together.pages.bytes_out);
    }
}

#[test]
fn a_page_of_64_kib_is_a_group_of_its_own() {
    let mut bench = Bench::new(page_size(64), EncoderPlan { compress: Some(Codec::Lz4), ..EncoderPlan::default() });
    let writes: Vec<_> = (0..5).map(|page| (page, Write::Text, 1)).collect();
    let (frames, _) = bench.round(1, RoundKind::Live, &writes);
    let head = Destination::new(bench.source.layout()).load(&frames[0], false);
    assert!(head.pages.iter().all(|(encoding, _)| *encoding == PageEncoding::Lz4));
}

#[test]
fn its_working_memory_never_grows() {
    for codec in [Codec::Snap, Codec::Lz4, Codec::Zstd { level: -7 }, Codec::Zstd { level: 3 }] {
        for kib in [4, 16, 64] {
            let mut bench = Bench::new(page_size(kib), EncoderPlan { compress: Some(codec), ..EncoderPlan::default() });
            let before = bench.encoder.coder.memory_bytes();
            let mut pages = 1;
            for round in 1..=7 {
                bench.figures(round, 0..pages, Write::Text);
                pages *= 2;
            }
            assert_eq!(bench.encoder.coder.memory_bytes(), before, "{codec}, {kib} KiB");
        }
    }
}

#[test]
fn without_deltas_compression_continues_and_what_does_not_shrink_goes_raw() {
    let mut bench = Bench::new(page_size(4), EncoderPlan { compress: Some(Codec::Snap), ..EncoderPlan::default() });
    for round in 1..4 {
        assert_eq!(encodings(&bench.figures(round, 0..10, Write::Text)), [0, 0, 10, 0, 0]);
        assert_eq!(encodings(&bench.figures(round, 0..10, Write::Random)), [0, 10, 0, 0, 0]);
    }
}

#[test]
fn misses_and_overflows_are_compressed_where_that_is_planned() {
    let plan = EncoderPlan { delta: deltas(1000, OnMiss::Compress(Codec::Lz4), false), ..EncoderPlan::default() };
    let mut bench = Bench::new(page_size(4), plan);
    assert_eq!(encodings(&bench.figures(1, 0..10, Write::Text)), [0, 10, 0, 0, 0]);
    let misses = bench.figures(2, 0..10, Write::Sparse);
    assert_eq!((encodings(&misses), misses.pages.xbzrle_misses), ([0, 0, 10, 0, 0], 10));
    let overflows = bench.figures(3, 0..10, Write::Dense);
    assert_eq!((encodings(&overflows), overflows.pages.xbzrle_overflows), ([0, 0, 10, 0, 0], 10));
}

#[test]
fn pages_enter_the_cache_in_the_first_round_if_asked_for() {
    let second_round = |cache_first_round| {
        let plan = EncoderPlan { delta: deltas(1000, OnMiss::Raw, cache_first_round), ..EncoderPlan::default() };
        let mut bench = Bench::new(page_size(4), plan);
        bench.figures(1, 0..10, Write::Random);
        let second = bench.figures(2, 0..10, Write::Sparse);
        let third = bench.figures(3, 0..10, Write::Sparse);
        assert_eq!((third.pages.xbzrle, third.pages.xbzrle_misses), (10, 0));
        (second.pages.xbzrle, second.pages.xbzrle_misses)
    };
    assert_eq!((second_round(true), second_round(false)), ((10, 0), (0, 10)));
}

#[test]
fn a_zero_page_is_a_reference_and_an_equal_page_is_not_sent() {
    let plan = EncoderPlan { delta: deltas(1000, OnMiss::Raw, false), ..EncoderPlan::default() };
    let mut bench = Bench::new(page_size(4), plan);
    assert_eq!(encodings(&bench.figures(1, 0..3, Write::Random)), [0, 3, 0, 0, 0]);
    assert_eq!(encodings(&bench.figures(2, 0..3, Write::Zeros)), [3, 0, 0, 0, 0]);
    assert_eq!(encodings(&bench.figures(3, 0..3, Write::Sparse)), [0, 0, 0, 3, 0]);
    let same: Vec<_> = (0..3).map(|page| (page, Write::Same, 0)).collect();
    let (frames, tally) = bench.round(4, RoundKind::Live, &same);
    assert_eq!(encodings(&tally), [0, 0, 0, 0, 3]);
    assert!(frames.len() == 1 && frames[0].payload.is_none());
    let head = Destination::new(bench.source.layout()).load(&frames[0], false);
    assert_eq!((head.mask, head.zero), (0, 0));
}

#[test]
fn the_last_round_makes_deltas_and_drops_what_it_used() {
    let plan = EncoderPlan { delta: deltas(1000, OnMiss::Raw, true), ..EncoderPlan::default() };
    let mut bench = Bench::new(page_size(4), plan);
    bench.figures(1, 0..4, Write::Random);
    let (_, last) =
        bench.round(2, RoundKind::Final, &[(0, Write::Sparse, 1), (1, Write::Zeros, 2), (2, Write::Dense, 3)]);
    assert_eq!(encodings(&last), [1, 1, 0, 1, 0]);
    let after = bench.figures(3, 0..4, Write::Sparse);
    assert_eq!(
        (after.pages.xbzrle_misses, after.pages.xbzrle),
        (2, 2),
        "page 1 is known to be zero, and page 3 was not in the last round"
    );
}

/// What is known to be zero takes no memory, so the size of the cache does not matter.
#[test]
fn the_first_write_to_a_zero_page_is_a_delta_whatever_the_cache_holds() {
    for (cache_pages, cache_first_round) in [(0, true), (0, false), (1, true), (1000, false)] {
        for compress in [None, Some(Codec::Snap), Some(Codec::Lz4), Some(Codec::Zstd { level: -1 })] {
            let plan = EncoderPlan { compress, delta: deltas(cache_pages, OnMiss::Raw, cache_first_round) };
            let mut bench = Bench::new(page_size(4), plan);
            assert_eq!(encodings(&bench.figures(1, 0..PAGES, Write::Zeros)), [128, 0, 0, 0, 0]);
            let second = bench.figures(2, 0..PAGES, Write::Sparse);
            assert_eq!((encodings(&second), second.pages.xbzrle_misses), ([0, 0, 0, 128, 0], 0));
            assert!(second.pages.bytes_out < 128 * 64, "{} bytes", second.pages.bytes_out);
            let third = bench.figures(3, 0..PAGES, Write::Sparse);
            assert_eq!(third.pages.xbzrle_misses, 128_u64.saturating_sub(cache_pages), "other pages need the cache");
        }
    }
}

#[test]
fn a_zero_page_that_is_written_all_over_overflows_and_is_no_miss() {
    let plan = EncoderPlan { delta: deltas(1000, OnMiss::Raw, true), ..EncoderPlan::default() };
    let mut bench = Bench::new(page_size(4), plan);
    bench.figures(1, 0..3, Write::Zeros);
    let second = bench.figures(2, 0..3, Write::Random);
    assert_eq!(encodings(&second), [0, 3, 0, 0, 0]);
    assert_eq!((second.pages.xbzrle_misses, second.pages.xbzrle_overflows), (0, 3));
    assert_eq!(encodings(&bench.figures(3, 0..3, Write::Sparse)), [0, 0, 0, 3, 0]);
}

/// Zeros are all that a delta against zeros leaves out.
#[test]
fn a_page_against_zeros_travels_as_the_smaller_of_delta_and_compressed() {
    for (on_miss, text_is_compressed) in [(OnMiss::Raw, 0), (OnMiss::Compress(Codec::Lz4), 1)] {
        let mut bench =
            Bench::new(page_size(4), EncoderPlan { delta: deltas(0, on_miss, true), ..EncoderPlan::default() });
        let mut destination = Destination::new(bench.source.layout());
        let zeros: Vec<_> = (0..2).map(|page| (page, Write::Zeros, 0)).collect();
        let (frames, _) = bench.round(1, RoundKind::Live, &zeros);
        destination.load(&frames[0], false);
        for (page, write) in [(0, Write::Text), (1, Write::Random)] {
            bench.source.write(page, write, 9);
            bench.source.page(page)[2048..].fill(0);
        }
        let (frames, tally) = bench.round(2, RoundKind::Live, &[(0, Write::Same, 0), (1, Write::Same, 0)]);
        assert_eq!(encodings(&tally), [0, 0, text_is_compressed, 2 - text_is_compressed, 0]);
        assert_eq!((tally.pages.xbzrle_misses, tally.pages.xbzrle_overflows), (0, text_is_compressed));
        destination.load(&frames[0], false);
        assert!(destination.memory == bench.source.memory);
    }
}

#[test]
fn a_page_is_known_to_be_zero_until_it_is_sent_otherwise() {
    let plan = EncoderPlan { delta: deltas(0, OnMiss::Raw, true), ..EncoderPlan::default() };
    let mut bench = Bench::new(page_size(4), plan);
    bench.figures(1, 0..1, Write::Zeros);
    let kinds = [RoundKind::Live, RoundKind::Paused, RoundKind::Final];
    for (turn, kind) in (0u32..).zip(kinds) {
        let mut round = |step: u32, write| bench.round(2 + 4 * turn + step, kind, &[(0, write, 5)]).1.pages;
        assert_eq!(round(0, Write::Zeros).zero, 1, "a zero page is always sent as zero");
        assert_eq!(round(1, Write::Sparse).xbzrle, 1);
        assert_eq!(round(2, Write::Sparse).xbzrle_misses, 1, "it is neither zero nor cached");
        assert_eq!(round(3, Write::Zeros).zero, 1);
    }
    assert_eq!(bench.known_zero.pages(batch(0, 1, 1).at), 1);
}

/// Deltas begin behind the first RoundComplete, and a page that comes again before it is sent whole.
#[test]
fn a_page_that_comes_again_in_the_first_round_is_not_known_to_be_zero() {
    for cache_first_round in [true, false] {
        let plan = EncoderPlan { compress: Some(Codec::Lz4), delta: deltas(0, OnMiss::Raw, cache_first_round) };
        let mut bench = Bench::new(page_size(4), plan);
        let at = batch(0, 1, 1).at;
        for (write, known) in [(Write::Zeros, 1), (Write::Text, 0), (Write::Zeros, 1), (Write::Random, 0)] {
            bench.source.write(0, write, 3);
            let copied = bench.source.copies([0], 1, RoundKind::Live).remove(0);
            let frame = bench.encoder.batch(copied).now_or_never().unwrap();
            assert_eq!((frame.payload.is_none(), bench.known_zero.pages(at)), (known == 1, known), "{write:?}");
        }
        let pages = PageTally { all: 4, zero: 2, ..PageTally::default() };
        bench.encoder.mark(Mark::RoundComplete(RoundTally { pages, ..RoundTally::new(1, RoundKind::Live) }));
        assert_eq!(bench.figures(2, 0..1, Write::Sparse).pages.xbzrle_misses, 1);
    }
}

/// No frame was made for a page that was hinted as free, and what the destination holds there is unknown.
#[test]
fn a_page_that_never_travelled_is_not_known_to_be_zero() {
    let plan = EncoderPlan { delta: deltas(1000, OnMiss::Raw, true), ..EncoderPlan::default() };
    let mut bench = Bench::new(page_size(4), plan);
    bench.figures(1, 0..2, Write::Zeros);
    let second = bench.figures(2, 0..4, Write::Sparse);
    assert_eq!((second.pages.xbzrle, second.pages.xbzrle_misses), (2, 2));
}

#[test]
fn a_page_that_was_never_touched_is_known_to_be_zero_once_its_frame_is_made() {
    let plan = EncoderPlan { delta: deltas(1000, OnMiss::Raw, true), ..EncoderPlan::default() };
    let mut bench = Bench::new(page_size(4), plan);
    let untouched = Batch { untouched: 0b11, ..batch(0, 0b11, 1) };
    let copied = CopiedBatch { batch: untouched, zero: 0b11, pages: None };
    let head =
        Destination::new(bench.source.layout()).load(&bench.encoder.batch(copied).now_or_never().unwrap(), false);
    assert_eq!((head.zero, bench.known_zero.pages(untouched.at)), (0b11, 0b11));
    bench.round(1, RoundKind::Live, &[]);
    assert_eq!(encodings(&bench.figures(2, 0..2, Write::Sparse)), [0, 0, 0, 2, 0]);
}

#[test]
fn what_was_put_back_or_discarded_misses() {
    let plan = EncoderPlan { delta: deltas(1000, OnMiss::Raw, true), ..EncoderPlan::default() };
    let mut bench = Bench::new(page_size(4), plan);
    bench.figures(1, 0..8, Write::Zeros);
    let lost = DirtyBitmap::empty(&bench.source.layout());
    lost.set_range(0, 2..5);
    bench.known_zero.forget(&lost);
    let second = bench.figures(2, 0..6, Write::Sparse);
    assert_eq!((second.pages.xbzrle, second.pages.xbzrle_misses), (3, 3));
    bench.known_zero.forget_all();
    let third = bench.figures(3, 6..8, Write::Sparse);
    assert_eq!((third.pages.xbzrle, third.pages.xbzrle_misses), (0, 2));
}

#[test]
fn a_cache_that_shrinks_to_nothing_leaves_zero_pages_known() {
    let plan = EncoderPlan { delta: deltas(1000, OnMiss::Raw, true), ..EncoderPlan::default() };
    let mut bench = Bench::new(page_size(4), plan);
    bench.round(1, RoundKind::Live, &[(0, Write::Zeros, 1), (1, Write::Random, 1)]);
    bench.encoder.cache_share().set(0);
    let second = bench.figures(2, 0..2, Write::Sparse);
    assert_eq!((second.pages.xbzrle, second.pages.xbzrle_misses), (1, 1));
    bench.encoder.cache_share().set(1000 * 5000);
    assert_eq!(bench.figures(3, 0..2, Write::Sparse).pages.xbzrle_misses, 2);
    assert_eq!(bench.figures(4, 0..2, Write::Sparse).pages.xbzrle, 2);
}

#[test]
fn each_lane_makes_its_own_zero_pages_known() {
    let plan = EncoderPlan { delta: deltas(1000, OnMiss::Raw, true), ..EncoderPlan::default() };
    let mut lanes = [0, 1].map(|_| Bench::new(page_size(4), plan));
    let known_zero = lanes[0].known_zero.clone();
    lanes[1].encoder.coder.set_known_zero(known_zero.clone());
    // The first extent is of one lane, the second of the other.
    for (bench, pages) in lanes.iter_mut().zip([0..64, 64..128]) {
        assert_eq!(encodings(&bench.figures(1, pages.clone(), Write::Zeros)), [64, 0, 0, 0, 0]);
    }
    assert_eq!([0, 1].map(|extent| known_zero.pages(batch(extent, 1, 1).at)), [u64::MAX; 2]);
    for (bench, pages) in lanes.iter_mut().zip([0..64, 64..96]) {
        let count = pages.len() as u64;
        assert_eq!(encodings(&bench.figures(2, pages, Write::Sparse)), [0, 0, 0, count, 0]);
    }
    assert_eq!([0, 1].map(|extent| known_zero.pages(batch(extent, 1, 1).at)), [0, u64::MAX << 32]);
}

#[test]
fn without_the_set_of_zero_pages_they_are_no_reference() {
    let plan = EncoderPlan { delta: deltas(1000, OnMiss::Raw, true), ..EncoderPlan::default() };
    let mut bench = Bench::new(page_size(4), plan);
    let pool = BufferPool::new(64, page_size(4).extent_bytes());
    bench.encoder = Encoder::new(LANE, page_size(4), plan, WireFramer::new(false), pool, meter());
    bench.figures(1, 0..4, Write::Zeros);
    assert_eq!(bench.figures(2, 0..4, Write::Sparse).pages.xbzrle_misses, 4);
}

#[test]
fn where_all_pages_go_raw_the_detectors_buffer_is_the_payload() {
    for plan in [EncoderPlan::default(), EncoderPlan { compress: Some(Codec::Lz4), ..EncoderPlan::default() }] {
        let mut bench = Bench::new(page_size(4), plan);
        (3..20).for_each(|page| bench.source.write(page, Write::Random, page as u64));
        let copied = bench.source.copies(0..64, 1, RoundKind::Live).remove(0);
        let buffer = copied.pages.as_ref().unwrap().as_ptr();
        let frame = bench.encoder.batch(copied).now_or_never().unwrap();
        assert_eq!(frame.payload.unwrap().as_ptr(), buffer);
    }
}

#[test]
fn marks_travel_in_band_as_frames_and_it_ends_with_the_lane() {
    let Bench { source, encoder, .. } = Bench::new(page_size(4), EncoderPlan::default());
    let copies = source.copies([0, 64], 1, RoundKind::Final);
    let tally = tally(&copies, source.page_size, 1, RoundKind::Final);
    let ((put, input), (output, got)) = (bounded(10), bounded(10));
    let marks = [Mark::RoundComplete(tally), Mark::Checkpoint(7), Mark::DirectEnds, Mark::LaneEnds, Mark::LaneEnds];
    for item in copies.into_iter().map(Item::Batch).chain(marks.map(Item::Mark)) {
        assert_eq!(put.put(item).now_or_never(), Some(Ok(())));
    }
    let meter = encoder.stage.meter.clone();
    block_on(encoder.run(input, output)).unwrap();
    let frames = drain(&got);
    let marks: Vec<_> = frames.iter().map(|frame| frame.mark).collect();
    let bytes_out = (frames[0].head.len() + frames[1].head.len()) as u64;
    let complete = RoundTally { pages: PageTally { bytes_out, ..tally.pages }, ..tally };
    let wanted = [Mark::RoundComplete(complete), Mark::Checkpoint(7), Mark::DirectEnds, Mark::LaneEnds];
    assert_eq!((&marks[..2], &marks[2..]), (&[None, None][..], &wanted.map(Some)[..]));
    for (frame, mark) in frames[2..].iter().zip(wanted) {
        assert_eq!(frame.head, Message::from(mark).encode(LANE));
    }
    let reading = meter.read();
    assert_eq!((reading.batches, reading.pages, reading.bytes), (2, 2, bytes_out));
}

#[test]
fn a_tight_pool_makes_it_wait_until_a_frame_is_gone() {
    let page_size = page_size(4);
    let mut source = Source::new(page_size);
    (0..PAGES).for_each(|page| source.write(page, Write::Text, page as u64));
    let plan = EncoderPlan { compress: Some(Codec::Lz4), ..EncoderPlan::default() };
    let pool = BufferPool::new(1, page_size.extent_bytes());
    let encoder = Encoder::new(LANE, page_size, plan, WireFramer::new(false), pool, meter());
    let ((put, input), (output, got)) = (bounded(10), bounded(10));
    for copied in source.copies(0..PAGES, 1, RoundKind::Live) {
        assert!(put.put(Item::Batch(copied)).now_or_never().is_some());
    }
    let mut run = Box::pin(encoder.run(input, output));
    assert!(run.as_mut().now_or_never().is_none());
    assert_eq!(drain(&got).len(), 1);
    assert!(run.as_mut().now_or_never().is_none());
    assert_eq!(drain(&got).len(), 1);
}
