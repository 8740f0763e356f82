//! Pages that are asked for, taken on a blocking thread beside a full pipeline: scanner, zero detectors, encoders and senders.

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Poll};
use std::thread;

use futures::FutureExt;
use futures::future::try_join_all;
use tokio::io::AsyncWrite;

use super::testing::{block_on, guest, meter, numbered};
use crate::batch::{Mark, PageEncoding, RoundKind};
use crate::bitmap::DirtyBitmap;
use crate::dirty_log::DirtyLog;
use crate::encoder::{Encoder, EncoderPlan};
use crate::error::StageError;
use crate::geometry::{BulkMap, ExtentAt, LaneMap, Layout, PageAt, PageSize, bits};
use crate::in_flight::InFlight;
use crate::memory::GuestMemory;
use crate::pool::BufferPool;
use crate::queue::{Inlet, Outlet, bounded};
use crate::scanner::{RoundScanned, ScanOrder, Scanner, ScannerOrder};
use crate::sender::{Control, Sender, Sent};
use crate::take::{PageTaker, UrgentPage, UrgentTaker};
use crate::wire::{FrameReader, Incoming, PagesHead, WireFramer};
use crate::zero_detector::ZeroDetector;

const PAGE: usize = 4096;
const PAGES: u64 = 16_384;
const REQUESTS: usize = 10_000;
const LANES: u16 = 2;
/// The urgent connection: it follows the bulk connections.
const URGENT: usize = LANES as usize;

/// What is written on all connections, in order. One clock orders it with the takes and the requests.
#[derive(Debug, Default)]
struct Wire {
    clock: AtomicU64,
    /// Bytes that the bulk connections may write before they block.
    credit: AtomicUsize,
    written: Mutex<Vec<Written>>,
}

#[derive(Debug)]
struct Written {
    time: u64,
    connection: usize,
    bytes: Vec<u8>,
}

impl Wire {
    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn write(&self, connection: usize, bytes: Vec<u8>) -> u64 {
        let mut written = self.written.lock().unwrap();
        let time = self.tick();
        written.push(Written { time, connection, bytes });
        time
    }

    /// When each page was complete on the wire. Each has left exactly once, with its content.
    fn left(&self, layout: &Layout) -> Vec<u64> {
        let written = self.written.lock().unwrap();
        let mut left = vec![None; usize::try_from(PAGES).unwrap()];
        for connection in 0..=URGENT {
            let of_connection = || written.iter().filter(|written| written.connection == connection);
            let stream: Vec<u8> = of_connection().flat_map(|written| &written.bytes).copied().collect();
            let ends: Vec<(usize, u64)> = of_connection()
                .scan(0, |end, written| {
                    *end += written.bytes.len();
                    Some((*end, written.time))
                })
                .collect();
            for (end, page, content) in pages_of(&stream, layout) {
                let time = ends[ends.partition_point(|&(written, _)| written < end)].1;
                assert_eq!(left[usize::try_from(page).unwrap()].replace(time), None, "page {page} has left twice");
                assert_eq!(content[..8], (page + 1).to_le_bytes(), "page {page}");
            }
        }
        left.into_iter().map(|time| time.expect("every page leaves")).collect()
    }
}

/// The raw pages of a stream, each with the end of its frame.
fn pages_of(stream: &[u8], layout: &Layout) -> Vec<(usize, u64, Vec<u8>)> {
    let mut reader = FrameReader::new(stream, "the stream".into(), PageSize::DEFAULT);
    let mut pages = Vec::new();
    block_on(async {
        while let Some(incoming) = reader.next().await.unwrap() {
            let Incoming::Pages(frame) = incoming else { continue };
            let head = PagesHead::parse(&frame.body, frame.frame_length, layout).unwrap();
            let mut payload = vec![0; head.payload_bytes()];
            reader.read_payload(&mut payload).await.unwrap();
            let end = usize::try_from(reader.bytes_read()).unwrap();
            let numbers = bits(head.mask).map(|bit| head.at.page(bit).page);
            pages.extend(numbers.zip(payload.chunks_exact(PAGE)).map(|(page, content)| (end, page, content.to_vec())));
        }
    });
    pages
}

/// A bulk connection.
struct Bulk {
    connection: usize,
    wire: Arc<Wire>,
}

impl AsyncWrite for Bulk {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        // The test polls again when it has given credit.
        let count = bytes.len().min(self.wire.credit.load(Ordering::Relaxed));
        if count == 0 {
            return Poll::Pending;
        }
        self.wire.credit.fetch_sub(count, Ordering::Relaxed);
        self.wire.write(self.connection, bytes[..count].to_vec());
        Poll::Ready(Ok(count))
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Notes when each page is taken: the take re-arms the log.
#[derive(Debug)]
struct Takes {
    wire: Arc<Wire>,
    at: Mutex<Vec<(u64, u64)>>,
}

impl DirtyLog for Takes {
    fn start(&self) -> io::Result<()> {
        Ok(())
    }
    fn sync(&self, _block: u32, _extents: Range<u32>, _into: &DirtyBitmap) -> io::Result<()> {
        Ok(())
    }
    fn rearm(&self, at: ExtentAt, mask: u64) -> io::Result<()> {
        let mut taken = self.at.lock().unwrap();
        let time = self.wire.tick();
        taken.extend(bits(mask).map(|bit| (time, at.page(bit).page)));
        Ok(())
    }
    fn mark(&self, _block: u32, _pages: Range<u64>) {}
    fn stop(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Serves requests on a thread of its own: takes, reads, and writes to the urgent connection.
struct Requester {
    urgent: Arc<UrgentTaker>,
    memory: GuestMemory,
    wire: Arc<Wire>,
}

/// A page that was sent urgently.
#[derive(Clone, Copy)]
struct Served {
    page: u64,
    asked: u64,
    left: u64,
}

impl Requester {
    /// `None` if somebody else has taken the page.
    fn serve(&self, page: u64) -> Option<Served> {
        let asked = self.wire.tick();
        let UrgentPage::Taken(batch) = self.urgent.take(PageAt { block: 0, page }).unwrap() else { return None };
        let mut content = vec![0; PAGE];
        self.memory.block(0).memory.read_page(PageSize::DEFAULT, page, &mut content).unwrap();
        let pages = vec![(PageEncoding::Raw, 4096)];
        let (round, mask) = (batch.round, batch.mask);
        let head = PagesHead { at: batch.at, round, mask, zero: 0, payload_hash: 0, pages };
        let left = self.wire.write(URGENT, [&head.to_bytes(0)[..], &content].concat());
        Some(Served { page, asked, left })
    }
}

/// A source whose pages are all dirty, with one bulk connection for each lane.
struct Source {
    run: Pin<Box<dyn Future<Output = Result<Vec<()>, StageError>>>>,
    orders: Outlet<ScannerOrder>,
    _scanned: Inlet<RoundScanned>,
    control: Vec<Outlet<Control>>,
    sent: Inlet<Sent>,
    memory: GuestMemory,
    bitmap: Arc<DirtyBitmap>,
    in_flight: Arc<InFlight>,
    wire: Arc<Wire>,
    takes: Arc<Takes>,
    urgent: Arc<UrgentTaker>,
}

type Running = Pin<Box<dyn Future<Output = Result<(), StageError>>>>;

impl Source {
    fn new() -> Self {
        let memory = guest(PageSize::DEFAULT, vec![numbered(PAGES * PAGE as u64)]);
        let (wire, lane_map) = (Arc::new(Wire::default()), LaneMap::new(LANES, PageSize::DEFAULT));
        let takes = Arc::new(Takes { wire: wire.clone(), at: Mutex::default() });
        let bitmap = Arc::new(DirtyBitmap::filled(memory.layout()));
        let in_flight = Arc::new(InFlight::new(memory.layout(), lane_map));
        let logs: Vec<Arc<dyn DirtyLog>> = vec![takes.clone()];
        let taker = PageTaker::new(bitmap.clone(), None, logs.clone(), in_flight.clone());
        let urgent = Arc::new(taker.open_urgent(1).unwrap());
        let ((orders, ordered), (answer, _scanned)) = (bounded(2), bounded(1));
        let (sent_out, sent) = bounded(usize::from(LANES) * 2);
        let (mut lanes, mut control, mut stages) = (Vec::new(), Vec::new(), Vec::<Running>::new());
        for lane in 0..LANES {
            let connection = BulkMap::new(LANES, LANES).connection(lane);
            let pool = || BufferPool::new(4, PageSize::DEFAULT.extent_bytes());
            let ((batch, batches), (copy, copies)) = (bounded(2), bounded(2));
            let ((frame, frames), (order, orders)) = (bounded(2), bounded(1));
            let detector = ZeroDetector::new(lane, memory.clone(), pool(), logs.clone(), meter());
            let encoder =
                Encoder::new(lane, PageSize::DEFAULT, EncoderPlan::default(), WireFramer::new(false), pool(), meter());
            let writer = Bulk { connection: connection.into(), wire: wire.clone() };
            let sender = Sender::new(connection, writer, None, false, 1, meter());
            stages.push(Box::pin(detector.run(batches, copy)));
            stages.push(Box::pin(encoder.run(copies, frame)));
            stages.push(Box::pin(sender.run(orders, frames, sent_out.clone())));
            lanes.push(batch);
            control.push(order);
        }
        stages.push(Box::pin(Scanner::new(taker, lane_map, meter()).run(ordered, lanes, answer)));
        for order in [ScanOrder::all(1, RoundKind::Final).into(), ScannerOrder::EndLanes] {
            assert_eq!(orders.put(order).now_or_never(), Some(Ok(())));
        }
        let run = Box::pin(try_join_all(stages));
        Self { run, orders, _scanned, control, sent, memory, bitmap, in_flight, wire, takes, urgent }
    }

    fn requester(&self) -> Requester {
        Requester { urgent: self.urgent.clone(), memory: self.memory.clone(), wire: self.wire.clone() }
    }

    /// Lets the stages write this much, and run until all of them wait.
    fn step(&mut self, credit: usize) {
        self.wire.credit.store(credit, Ordering::Relaxed);
        (0..100).for_each(|_| assert!(self.run.as_mut().now_or_never().is_none(), "it waits"));
    }

    /// Lets the stages run to their end, and checks what has left. Returns when each page was complete on the wire.
    fn finish(mut self, served: &[Served]) -> Vec<u64> {
        self.wire.credit.store(usize::MAX / 2, Ordering::Relaxed);
        let over = async {
            let mut lanes = LANES;
            while lanes > 0 {
                lanes -= u16::from(self.sent.next().await.unwrap().mark == Mark::LaneEnds);
            }
            for control in &self.control {
                control.put(Control::Finish).await.unwrap();
            }
        };
        let (ended, ()) = block_on(async { tokio::join!(&mut self.run, over) });
        ended.unwrap();
        drop(self.orders);
        assert_eq!((self.bitmap.count(), self.in_flight.pages()), (0, PAGES));
        let place = |page| PageAt { block: 0, page };
        for served in served {
            assert!(self.in_flight.acknowledge_urgent(place(served.page)), "page {}", served.page);
        }
        assert_eq!(self.in_flight.pages(), PAGES - served.len() as u64);
        self.wire.left(self.memory.layout())
    }
}

/// Distinct pages in a random order that is always the same.
fn requests() -> Vec<u64> {
    let mut pages: Vec<u64> = (0..PAGES).collect();
    fastrand::Rng::with_seed(14).shuffle(&mut pages);
    pages.truncate(REQUESTS);
    pages
}

/// The pipeline is stopped, as full as it gets, while a request is served: so the order of events depends on no clock.
#[test]
fn ten_thousand_requested_pages_leave_once_and_before_all_that_is_taken_after_the_request() {
    let mut source = Source::new();
    let mut served = Vec::new();
    thread::scope(|scope| {
        let ((ask, asked), (answer, answers)) = (mpsc::channel(), mpsc::channel());
        let requester = source.requester();
        scope.spawn(move || asked.into_iter().for_each(|page| answer.send(requester.serve(page)).unwrap()));
        for (number, page) in requests().into_iter().enumerate() {
            if number % 100 == 0 {
                source.step(64 * PAGE);
            }
            ask.send(page).unwrap();
            served.extend(answers.recv().unwrap());
        }
    });
    let takes = source.takes.clone();
    let left = source.finish(&served);
    assert!((4000..REQUESTS).contains(&served.len()), "{} of {REQUESTS}: others had left", served.len());

    let mut urgent = vec![false; left.len()];
    served.iter().for_each(|served| urgent[usize::try_from(served.page).unwrap()] = true);
    let takes = takes.at.lock().unwrap();
    let scanned: Vec<_> = takes.iter().filter(|(_, page)| !urgent[usize::try_from(*page).unwrap()]).collect();
    assert!(scanned.is_sorted_by_key(|(time, _)| time));
    // The earliest that any of the pages from each take on has left.
    let mut earliest = vec![u64::MAX; scanned.len() + 1];
    for (index, (_, page)) in scanned.iter().enumerate().rev() {
        earliest[index] = earliest[index + 1].min(left[usize::try_from(*page).unwrap()]);
    }
    for Served { page, asked, left } in served {
        let later = scanned.partition_point(|(time, _)| *time < asked);
        assert!(left < earliest[later], "page {page} was asked for at {asked} and left at {left}");
    }
}

#[test]
fn requests_of_many_threads_beside_a_running_pipeline_send_each_page_once() {
    let source = Source::new();
    let all = requests();
    let (finished, served) = thread::scope(|scope| {
        let requester = |pages: &[u64]| {
            let (requester, pages) = (source.requester(), pages.to_vec());
            scope.spawn(move || pages.into_iter().filter_map(|page| requester.serve(page)).collect::<Vec<_>>())
        };
        let threads: Vec<_> = all.chunks(REQUESTS / 4).map(requester).collect();
        let mut source = source;
        source.wire.credit.store(usize::MAX / 2, Ordering::Relaxed);
        (0..2000).for_each(|_| assert!(source.run.as_mut().now_or_never().is_none(), "it waits"));
        let served = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect::<Vec<_>>();
        (source, served)
    });
    let left = finished.finish(&served);
    assert_eq!(left.len() as u64, PAGES);
}
