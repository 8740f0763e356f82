//! The source's stages together: scanner, zero detector and encoder of one lane, joined as the pipeline joins them.

use std::pin::Pin;
use std::sync::Arc;

use futures::FutureExt;

use super::testing::{block_on, drain, guest, layout, meter, numbered, page_size};
use crate::batch::{Mark, RoundKind};
use crate::bitmap::DirtyBitmap;
use crate::bitmap_sync::{BitmapSync, SyncOrder, Synced};
use crate::codec::Codec;
use crate::dirty_log::{DirtyLog, SoftwareLog};
use crate::encoder::{Encoder, EncoderPlan, Outgoing};
use crate::error::StageError;
use crate::geometry::{LaneMap, Layout, PageSize};
use crate::in_flight::InFlight;
use crate::memory::{MappedMemory, Memory};
use crate::pool::{BufferPool, PooledBuffer};
use crate::queue::{Inlet, Outlet, bounded};
use crate::scanner::{RoundScanned, ScanOrder, Scanner, ScannerOrder};
use crate::take::PageTaker;
use crate::wire::WireFramer;
use crate::xbzrle::Delta;
use crate::zero_detector::ZeroDetector;

const MIB: u64 = 1 << 20;

type Running = Pin<Box<dyn Future<Output = Result<(), StageError>>>>;

/// What a chain is made of: buffers of the detector and of the encoder, and the room of the queues between the stages.
#[derive(Clone, Copy)]
struct Bounds {
    copies: usize,
    frames: usize,
    to_detector: usize,
    to_encoder: usize,
    to_sender: usize,
}

/// A running source of one lane, with the ends that the controller and the sender hold.
struct Chain {
    run: Running,
    bitmap: Arc<DirtyBitmap>,
    in_flight: Arc<InFlight>,
    orders: Outlet<ScannerOrder>,
    scanned: Inlet<RoundScanned>,
    frames: Inlet<Outgoing>,
}

impl Chain {
    fn new(memory: Arc<dyn Memory>, logs: Vec<Arc<dyn DirtyLog>>, plan: EncoderPlan, bounds: Bounds) -> Self {
        let page_size = PageSize::DEFAULT;
        let memory = guest(page_size, vec![memory]);
        let pool = |buffers| BufferPool::new(buffers, page_size.extent_bytes());
        let lanes = LaneMap::new(1, page_size);
        let bitmap = Arc::new(DirtyBitmap::filled(memory.layout()));
        let in_flight = Arc::new(InFlight::new(memory.layout(), lanes));
        let ((orders, ordered), (answer, scanned)) = (bounded(2), bounded(1));
        let ((batch, batches), (copy, copies)) = (bounded(bounds.to_detector), bounded(bounds.to_encoder));
        let (frame, frames) = bounded(bounds.to_sender);
        let scanner =
            Scanner::new(PageTaker::new(bitmap.clone(), None, logs.clone(), in_flight.clone()), lanes, meter());
        let detector = ZeroDetector::new(0, memory, pool(bounds.copies), logs, meter());
        let encoder = Encoder::new(0, page_size, plan, WireFramer::new(false), pool(bounds.frames), meter());
        let run = async move {
            let scanner = scanner.run(ordered, vec![batch], answer);
            tokio::try_join!(scanner, detector.run(batches, copy), encoder.run(copies, frame)).map(|_| ())
        };
        Self { run: Box::pin(run), bitmap, in_flight, orders, scanned, frames }
    }

    /// Lets the stages run until all of them wait, while no frame is taken.
    fn until_it_waits(&mut self) {
        (0..1000).for_each(|_| assert!(self.run.as_mut().now_or_never().is_none(), "it waits"));
    }

    /// One round from its order to its end: the frames of its batches.
    async fn round(&mut self, round: u32) -> Vec<Outgoing> {
        self.orders.put(ScanOrder::all(round, RoundKind::Live).into()).await.unwrap();
        let mut frames = Vec::new();
        loop {
            let frame = tokio::select! {
                frame = self.frames.next() => frame.unwrap(),
                ended = &mut self.run => panic!("it ended: {ended:?}"),
            };
            match frame.mark {
                Some(Mark::RoundComplete(_)) => break,
                _ => frames.push(frame),
            }
        }
        tokio::select! {
            scanned = self.scanned.next() => assert_eq!(scanned.unwrap().round, round),
            ended = &mut self.run => panic!("it ended: {ended:?}"),
        }
        frames
    }
}

/// The most batches that are taken and not gone when the sender has taken `taken` frames and takes no more.
fn on_their_way(bounds: Bounds, plan: EncoderPlan, taken: usize) -> u64 {
    let mut chain = Chain::new(numbered(64 * MIB), Vec::new(), plan, bounds);
    assert_eq!(chain.orders.put(ScanOrder::all(1, RoundKind::Final).into()).now_or_never(), Some(Ok(())));
    for _ in 0..taken {
        chain.until_it_waits();
        assert!(chain.frames.try_next().is_some());
    }
    chain.until_it_waits();
    let left = chain.bitmap.count();
    assert_eq!(chain.in_flight.pages(), 64 * MIB / 4096 - left);

    // Everything that was taken and not acknowledged can be put back.
    chain.in_flight.acknowledge(0, taken as u64).unwrap();
    chain.in_flight.put_back(&chain.bitmap);
    assert_eq!(chain.bitmap.count(), 64 * MIB / 4096 - taken as u64 * 64);
    (64 * MIB / 4096 - left) / 64 - taken as u64
}

#[test]
fn a_sender_that_waits_stops_everything_with_an_exact_count_on_its_way() {
    let queues = Bounds { copies: 100, frames: 100, to_detector: 3, to_encoder: 2, to_sender: 4 };
    let lz4 = EncoderPlan { compress: Some(Codec::Lz4), ..EncoderPlan::default() };
    for taken in [0, 1, 7] {
        // The content of the queues, and one batch in each stage.
        assert_eq!(on_their_way(queues, EncoderPlan::default(), taken), 3 + 2 + 4 + 3);
        assert_eq!(on_their_way(queues, lz4, taken), 3 + 2 + 4 + 3);
        // Two copies at most: then the detector and the queue to it are full.
        assert_eq!(on_their_way(Bounds { copies: 2, ..queues }, EncoderPlan::default(), taken), 2 + 1 + 3 + 1);
        // Compressed, a copy is gone once its frame is made: one frame and two copies.
        let tight = Bounds { copies: 2, frames: 1, ..queues };
        assert_eq!(on_their_way(tight, lz4, taken), 1 + 2 + 1 + 3 + 1);
    }
}

/// Memory whose guest writes a page at the moment it is read, once, and marks it.
#[derive(Debug)]
struct WritesWhenRead {
    memory: Arc<MappedMemory>,
    log: Arc<SoftwareLog>,
    page: u64,
    wrote: std::sync::atomic::AtomicBool,
}

impl Memory for WritesWhenRead {
    fn length(&self) -> u64 {
        self.memory.length()
    }
    fn read_extent(&self, size: PageSize, first: u64, mask: u64, into: &mut PooledBuffer) -> std::io::Result<u64> {
        let zero = self.memory.read_extent(size, first, mask, into)?;
        let here = (first..first + 64).contains(&self.page) && mask & (1 << (self.page - first)) != 0;
        if here && !self.wrote.swap(true, std::sync::atomic::Ordering::Relaxed) {
            self.memory.store(usize::try_from(self.page).unwrap() * 4096, b"later");
            self.log.mark(0, self.page..self.page + 1);
        }
        Ok(zero)
    }
    fn read_page(&self, size: PageSize, page: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.memory.read_page(size, page, into)
    }
    fn write_pages(&self, size: PageSize, first: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.memory.write_pages(size, first, bytes)
    }
    fn write_zeros(&self, size: PageSize, pages: std::ops::Range<u64>) -> std::io::Result<()> {
        self.memory.write_zeros(size, pages)
    }
    fn patch(&self, size: PageSize, page: u64, delta: &Delta<'_>) -> std::io::Result<()> {
        self.memory.patch(size, page, delta)
    }
}

/// One sync of a log into the bitmap.
async fn sync(log: Arc<SoftwareLog>, bitmap: Arc<DirtyBitmap>) -> Synced {
    let ((order, orders), (answer, answers)) = (bounded(1), bounded(1));
    order.put(SyncOrder { after_round: 1 }).await.unwrap();
    drop(order);
    BitmapSync::new(vec![log], bitmap, meter()).run(orders, answer).await.unwrap();
    drain(&answers)[0]
}

#[test]
fn a_page_written_while_it_is_read_comes_again_with_what_was_written() {
    const PAGE: u64 = 130;
    let layout: Layout = layout(page_size(4), &[MIB]);
    let log = Arc::new(SoftwareLog::new(&layout));
    let memory = WritesWhenRead { memory: numbered(MIB), log: log.clone(), page: PAGE, wrote: false.into() };
    let bounds = Bounds { copies: 4, frames: 4, to_detector: 4, to_encoder: 4, to_sender: 100 };
    let mut chain = Chain::new(Arc::new(memory), vec![log.clone()], EncoderPlan::default(), bounds);
    block_on(async {
        assert_eq!(chain.round(1).await.len(), 4);
        assert_eq!(sync(log.clone(), chain.bitmap.clone()).await.dirty_pages, 1);
        let again = chain.round(2).await;
        assert!(again.len() == 1 && again[0].payload.as_ref().unwrap().starts_with(b"later"));
        assert_eq!(sync(log, chain.bitmap.clone()).await.dirty_pages, 0);
        assert_eq!(chain.round(3).await.len(), 0);
    });
}

#[test]
fn the_stages_end_with_the_lanes() {
    let bounds = Bounds { copies: 4, frames: 1, to_detector: 2, to_encoder: 2, to_sender: 10 };
    let chain = Chain::new(numbered(MIB), Vec::new(), EncoderPlan::default(), bounds);
    assert_eq!(chain.orders.put(ScanOrder::all(1, RoundKind::Final).into()).now_or_never(), Some(Ok(())));
    assert_eq!(chain.orders.put(ScannerOrder::EndLanes).now_or_never(), Some(Ok(())));
    block_on(chain.run).unwrap();
    let marks: Vec<_> = drain(&chain.frames).into_iter().map(|frame| frame.mark).collect();
    assert!(matches!(marks[..], [None, None, None, None, Some(Mark::RoundComplete(_)), Some(Mark::LaneEnds)]));
}
