//! The stages after the encoder, each alone between two queues, beside memcpy of the same bytes from and to the same
//! kind of place.
//!
//! `cargo bench -p memferry-stages --bench sink_stages [FILTER]`; how to read it stands in [`common`]. A turn is 128 MiB of a
//! guest that was all written before: the cost of first touch is the host's.
//!
//! - sender: cold payloads into a sink that copies them into one warm buffer, as a socket would.
//! - receiver: a cold stream in memory into warm pooled buffers.
//! - loader: warm payloads into cold guest memory, by encoding, with checksum. Its *memcpy* does the same.

mod common;

use std::future::Future;
use std::hint::black_box;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use common::inputs::{self, CHANGES};
use common::{EXTENT, PAGE, Suite, or_of, timed};
use fastrand::Rng;
use futures::join;
use memferry_stages::batch::{Arrived, Item, Mark, PageEncoding};
use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::codec::{Codec, Compressor};
use memferry_stages::encoder::Outgoing;
use memferry_stages::geometry::BulkMap;
use memferry_stages::geometry::{BlockInfo, ExtentAt, LaneMap, Layout, PageSize};
use memferry_stages::loader::Direct;
use memferry_stages::loader::{LaneProgress, Loader};
use memferry_stages::memory::{GuestMemory, MappedMemory};
use memferry_stages::meter::Meter;
use memferry_stages::pool::{BufferPool, PooledBuffer};
use memferry_stages::queue::bounded;
use memferry_stages::receiver::Receiver;
use memferry_stages::sender::{Control, Sender};
use memferry_stages::stage_id::StageId;
use memferry_stages::wire::{Features, FrameReader, PagesHead, WireDeframer};
use memferry_stages::xbzrle::{Encoded, encode_page};
use tokio::io::AsyncWrite;

const EXTENTS: u32 = 512;
const TURN: usize = EXTENTS as usize * EXTENT;
/// Buffers of the stages that reuse them.
const WARM: usize = 4;

const MEMCPY: [(&str, &str); 1] = [("memcpy", "memcpy")];

fn main() {
    inputs::process(PAGE);
    let mut suite = Suite::new();
    sender(&mut suite);
    receiver(&mut suite);
    loader(&mut suite);
    suite.finish();
}

/// Measures turns of async work, whose preparation is not counted.
fn turns<P, F: Future>(
    suite: &mut Suite,
    group: &str,
    name: &str,
    mut prepare: impl FnMut() -> P,
    work: impl Fn(P) -> F,
) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    suite.measure(group, name, TURN, &MEMCPY, || {
        let prepared = prepare();
        timed(|| {
            runtime.block_on(work(prepared));
        })
    });
}

fn sender(suite: &mut Suite) {
    let pool = BufferPool::new(EXTENTS as usize, EXTENT);
    let mut buffers: Vec<PooledBuffer> = (0..EXTENTS).map(|_| filled(&pool, &inputs::random(EXTENT))).collect();
    let mut sink = Sink(vec![1; EXTENT]);
    suite.measure("sender", "memcpy", TURN, &[], || {
        timed(|| buffers.iter().for_each(|buffer| black_box(&mut sink.0).copy_from_slice(buffer)))
    });
    buffers.clear();
    turns(suite, "sender", "into a sink", || (outgoing(&pool), sink.clone()), |(frames, sink)| send(frames, sink));
}

/// Raw frames of a whole turn, their payloads in the buffers of the pool, which keep what was put there.
fn outgoing(pool: &BufferPool) -> Vec<Outgoing> {
    let mut buffers: Vec<_> = std::iter::from_fn(|| pool.try_take()).collect();
    buffers.iter_mut().for_each(|buffer| buffer.set_filled(EXTENT));
    let frame = |(extent, payload)| {
        let mark = (extent == EXTENTS - 1).then_some(Mark::LaneEnds);
        Outgoing { lane: 0, head: raw_head(extent).to_bytes(0), payload: Some(payload), mark }
    };
    (0..).zip(buffers).map(frame).collect()
}

async fn send(frames: Vec<Outgoing>, sink: Sink) {
    let meter = Meter::start(StageId::sender(0));
    let ((control, control_in), (bulk, bulk_in), (sent, reports)) = (bounded(1), bounded(16), bounded(4));
    let feed = async {
        for frame in frames {
            bulk.put(frame).await.expect("the sender runs");
        }
        reports.next().await.expect("the last frame is reported");
        control.put(Control::Finish).await.expect("the sender runs");
    };
    let (ran, ()) = join!(Sender::new(0, sink, None, false, 1, meter).run(control_in, bulk_in, sent), feed);
    ran.expect("a sink does not fail");
}

/// Copies what it is given into one buffer.
#[derive(Clone)]
struct Sink(Vec<u8>);

impl AsyncWrite for Sink {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        for slice in slices {
            black_box(&mut self.0[..slice.len()]).copy_from_slice(slice);
        }
        Poll::Ready(Ok(slices.iter().map(|slice| slice.len()).sum()))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

fn receiver(suite: &mut Suite) {
    let payload = inputs::random(EXTENT);
    let stream: Vec<u8> =
        (0..EXTENTS).flat_map(|extent| [&raw_head(extent).to_bytes(0)[..], &payload].concat()).collect();
    let pool = BufferPool::new(WARM, EXTENT);
    let mut warm = vec![1; EXTENT];
    suite.measure("receiver", "memcpy", TURN, &[], || {
        timed(|| stream.chunks_exact(EXTENT).for_each(|part| black_box(&mut warm).copy_from_slice(part)))
    });
    turns(suite, "receiver", "from memory", || (), |()| receive(&stream, pool.clone()));
}

async fn receive(stream: &[u8], pool: BufferPool) {
    let meter = Meter::start(StageId::receiver(0));
    let reader = FrameReader::new(stream, "memory".into(), PageSize::DEFAULT);
    let lanes = LaneMap::new(1, PageSize::DEFAULT);
    let deframer = WireDeframer::new(0, BulkMap::new(1, 1), reader, layout(), lanes, Features::default());
    let receiver = Receiver::new(0, deframer, pool, meter);
    let ((outlet, arrived), (control, _messages)) = (bounded(WARM), bounded(1));
    let count = async {
        let mut frames = 0;
        while arrived.next().await.is_some() {
            frames += 1;
        }
        assert_eq!(frames, EXTENTS);
    };
    let (ran, ()) = join!(receiver.run(vec![Some(outlet)], control), count);
    ran.expect("the stream is whole");
}

fn loader(suite: &mut Suite) {
    let memory = Arc::new(MappedMemory::anonymous(TURN).expect("memory"));
    let (random, text, process) = (inputs::random(EXTENT), inputs::text(EXTENT), inputs::process(EXTENT));
    let guest = inputs::guest(memory.clone());
    let mut cold = inputs::random(TURN);
    suite.measure("loader", "memcpy", TURN, &[], || {
        timed(|| cold.chunks_exact_mut(EXTENT).for_each(|extent| black_box(extent).copy_from_slice(&random)))
    });

    let raw = Coded { pages: vec![(PageEncoding::Raw, 4096); 64], payload: random.clone() };
    fill(&memory, &text);
    loads(suite, "raw", &memory, &guest, &raw, &random);
    loads(suite, "zero, loaded before", &memory, &guest, &Coded { pages: vec![], payload: vec![] }, &[0; EXTENT]);
    for (kind, extent) in [("text", &text), ("process", &process)] {
        for codec in [Codec::Snap, Codec::Lz4, Codec::Zstd { level: 1 }] {
            let mut compressor = Compressor::new(codec);
            let compress = |_, page: &[u8], out: &mut [u8]| compressor.compress(page, &mut out[..PAGE - 1]);
            let Some(coded) = Coded::new(codec.encoding(), extent, compress) else { continue };
            loads(suite, &format!("{codec}, {kind}"), &memory, &guest, &coded, extent);
        }
    }
    for (name, change) in CHANGES {
        let (mut changed, mut numbers) = (random.clone(), Rng::with_seed(2));
        changed.chunks_exact_mut(PAGE).for_each(|page| change(page, &mut numbers));
        let encode = |at: usize, page: &[u8], out: &mut [u8]| match encode_page(&random[at..at + PAGE], page, out) {
            Encoded::Delta(bytes) => Some(bytes),
            Encoded::Equal | Encoded::Overflow => None,
        };
        let Some(coded) = Coded::new(PageEncoding::Xbzrle, &changed, encode) else { continue };
        fill(&memory, &random);
        loads(suite, &format!("delta, {name}"), &memory, &guest, &coded, &changed);
    }
}

fn fill(memory: &MappedMemory, extent: &[u8]) {
    (0..EXTENTS as usize).for_each(|number| memory.store(number * EXTENT, extent));
}

/// Pages of an extent as they are on the wire: all of them zero if there are none.
struct Coded {
    pages: Vec<(PageEncoding, u32)>,
    payload: Vec<u8>,
}

impl Coded {
    /// `encode` is given a page's offset, the page and room, and returns the bytes written. `None` if a page cannot be coded.
    fn new(
        encoding: PageEncoding,
        extent: &[u8],
        mut encode: impl FnMut(usize, &[u8], &mut [u8]) -> Option<usize>,
    ) -> Option<Self> {
        let mut coded = Self { pages: vec![], payload: vec![] };
        let mut out = vec![0; PAGE];
        for (index, page) in extent.chunks_exact(PAGE).enumerate() {
            let bytes = encode(index * PAGE, page, &mut out)?;
            coded.pages.push((encoding, u32::try_from(bytes).expect("less than a page")));
            coded.payload.extend(&out[..bytes]);
        }
        Some(coded)
    }

    fn head(&self, extent: u32) -> PagesHead {
        let (at, zero) = (ExtentAt { block: 0, extent }, if self.pages.is_empty() { u64::MAX } else { 0 });
        PagesHead { at, round: 1, mask: u64::MAX, zero, payload_hash: 0, pages: self.pages.clone() }
            .with_hash_of(&self.payload)
    }
}

/// Loads a turn of such extents over memory that is held, after which each extent is as expected.
fn loads(suite: &mut Suite, name: &str, memory: &MappedMemory, guest: &GuestMemory, coded: &Coded, expected: &[u8]) {
    let pool = BufferPool::new(WARM, EXTENT);
    let filled_buffers: Vec<_> = (0..WARM).map(|_| filled(&pool, &coded.payload)).collect();
    drop(filled_buffers);
    let others = inputs::random(TURN);
    let heads = || {
        // The lines that sparse deltas touch are few: without a sweep of others they would stay in cache.
        black_box(or_of(&others));
        (0..EXTENTS).map(|extent| coded.head(extent).into_arrived(true, 0)).collect()
    };
    let mut loaded = false;
    turns(
        suite,
        "loader",
        name,
        || (heads(), loaded = true).0,
        |heads| load(guest.clone(), heads, &coded.payload, pool.clone()),
    );
    let mut extent = vec![0; EXTENT];
    memory.load(TURN - EXTENT, &mut extent);
    assert!(!loaded || extent == expected, "{name}");
}

async fn load(guest: GuestMemory, heads: Vec<Arrived>, payload: &[u8], pool: BufferPool) {
    let received = Arc::new(DirtyBitmap::filled(guest.layout()));
    let (progress, meter) = (Arc::new(LaneProgress::default()), Meter::start(StageId::loader(0)));
    let loader = Loader::new(0, Direct::new(guest, received), progress.clone(), meter);
    let ((outlet, input), (output, _reports)) = (bounded(WARM), bounded(1));
    let feed = async {
        for head in heads {
            let buffer = if payload.is_empty() { None } else { Some(pool.take().await) };
            let payload = buffer.map(|mut buffer| {
                buffer.set_filled(payload.len());
                buffer
            });
            outlet.put(Item::Batch(Arrived { payload, ..head })).await.expect("the loader runs");
        }
        outlet.put(Item::Mark(Mark::LaneEnds)).await.expect("the loader runs");
    };
    let (ran, ()) = join!(loader.run(input, output), feed);
    ran.expect("the frames are whole");
    assert_eq!(progress.frames.load(std::sync::atomic::Ordering::Acquire), u64::from(EXTENTS));
}

fn layout() -> Layout {
    let info = BlockInfo::new("ram", TURN as u64);
    Layout::new(PageSize::DEFAULT, vec![info]).expect("a layout")
}

fn raw_head(extent: u32) -> PagesHead {
    let at = ExtentAt { block: 0, extent };
    PagesHead { at, round: 1, mask: u64::MAX, zero: 0, payload_hash: 0, pages: vec![(PageEncoding::Raw, 4096); 64] }
}

fn filled(pool: &BufferPool, bytes: &[u8]) -> PooledBuffer {
    let mut buffer = pool.try_take().expect("a free buffer");
    buffer.extend(bytes);
    buffer
}
