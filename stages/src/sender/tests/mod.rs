mod wire;

use std::time::Duration;

use proptest::prelude::*;
use tokio::task::{JoinHandle, yield_now};

use super::backlog::GATHER_FRAMES;
use super::*;
use crate::batch::{PageEncoding, RoundKind};
use crate::geometry::{BlockInfo, ExtentAt, Layout, PageSize};
use crate::pool::BufferPool;
use crate::queue::bounded;
use crate::tally::RoundTally;
use crate::wire::PagesHead;
use crate::wire::messages::{Message, StateChunk, StatePhase};
use crate::wire::reader::{FrameReader, Incoming};
use wire::Wire;

/// A sender that runs, with the other ends of its queues.
struct Running {
    control: Outlet<Control>,
    bulk: Outlet<Outgoing>,
    sent: Inlet<Sent>,
    task: JoinHandle<Result<(), StageError>>,
    meter: Arc<Meter>,
}

/// Starts a sender whose bulk queue holds `bulk` at its start and has room for `capacity`.
async fn start(wire: &Wire, capacity: usize, bulk: Vec<Outgoing>) -> Running {
    start_with(wire, capacity, bulk, None, None).await
}

async fn start_with(
    wire: &Wire,
    capacity: usize,
    frames: Vec<Outgoing>,
    bucket: Option<Arc<TokenBucket>>,
    durable_lanes: Option<usize>,
) -> Running {
    let meter = Meter::start(StageId::sender(0));
    let bucket = bucket.map(|bucket| (bucket, Share::ALL));
    let sender =
        Sender::new(0, wire.clone(), bucket, durable_lanes.is_some(), durable_lanes.unwrap_or(1), meter.clone());
    let ((control, control_in), (bulk, bulk_in), (sent_out, sent)) = (bounded(64), bounded(capacity), bounded(64));
    for frame in frames {
        bulk.put(frame).await.unwrap();
    }
    let task = tokio::spawn(sender.run(control_in, bulk_in, sent_out));
    Running { control, bulk, sent, task, meter }
}

impl Running {
    async fn finish(self) -> Result<(), StageError> {
        self.control.put(Control::Finish).await.unwrap();
        self.task.await.unwrap()
    }
}

/// Lets every task run until none can continue.
async fn run_all() {
    for _ in 0..200 {
        yield_now().await;
    }
}

/// A frame of `bytes` bytes, all of them `fill`.
fn frame(fill: u8, bytes: usize) -> Outgoing {
    Outgoing { lane: 0, head: vec![fill; bytes].into(), payload: None, mark: None }
}

/// A frame with a head of 16 bytes and a payload of `bytes`.
fn large_frame(fill: u8, bytes: usize) -> Outgoing {
    let mut payload = BufferPool::new(1, bytes).try_take().unwrap();
    payload.space().fill(fill);
    payload.set_filled(bytes);
    Outgoing { payload: Some(payload), ..frame(fill, 16) }
}

fn round_complete(lane: u16, round: u32, bytes: usize) -> Outgoing {
    Outgoing { lane, mark: Some(Mark::RoundComplete(RoundTally::new(round, RoundKind::Live))), ..frame(b'R', bytes) }
}

fn switchover(lane: u16) -> Outgoing {
    Outgoing { lane, mark: Some(Mark::LaneEnds), ..frame(b'S', 1) }
}

fn completed(lane: u16, round: u32) -> Option<Sent> {
    Some(Sent { lane, mark: Mark::RoundComplete(RoundTally::new(round, RoundKind::Live)) })
}

/// The runs of equal bytes that were written.
fn written(wire: &Wire) -> Vec<(u8, usize)> {
    wire.look().bytes.chunk_by(|a, b| a == b).map(|run| (run[0], run.len())).collect()
}

#[tokio::test]
async fn what_waits_goes_out_in_one_vectored_write() {
    let wire = Wire::open();
    let small: Vec<_> = (0..100).map(|_| frame(b'a', 64)).chain([switchover(0)]).collect();
    let running = start(&wire, 101, small).await;
    assert_eq!(running.sent.next().await, Some(Sent { lane: 0, mark: Mark::LaneEnds }));
    assert_eq!(wire.look().slices, [GATHER_FRAMES, GATHER_FRAMES, GATHER_FRAMES, 5]);
    assert_eq!(running.meter.read().bytes, 6401);
    running.finish().await.unwrap();
}

#[tokio::test]
async fn large_frames_are_gathered_up_to_a_mebibyte_and_never_copied_together() {
    let wire = Wire::open();
    let large = (0..6).map(|fill| large_frame(fill, 256 << 10)).chain([switchover(0)]).collect();
    let running = start(&wire, 7, large).await;
    assert_eq!(running.sent.next().await, Some(Sent { lane: 0, mark: Mark::LaneEnds }));
    assert_eq!(wire.look().slices, [8, 5]);
    running.finish().await.unwrap();
}

#[tokio::test]
async fn a_stalled_writer_holds_exactly_a_gathering_and_a_full_queue() {
    let wire = Wire::stalling(0);
    let running = start(&wire, 8, (0..8).map(|fill| large_frame(fill, 256 << 10)).collect()).await;
    let producer = tokio::spawn({
        let bulk = running.bulk.clone();
        async move {
            for fill in 8.. {
                bulk.put(large_frame(fill, 256 << 10)).await.unwrap();
            }
        }
    });
    run_all().await;
    producer.abort();
    assert!(producer.await.unwrap_err().is_cancelled());
    wire.set_room(usize::MAX);
    running.bulk.put(switchover(0)).await.unwrap();
    assert_eq!(running.sent.next().await, Some(Sent { lane: 0, mark: Mark::LaneEnds }));
    // Four of 256 KiB were gathered, eight waited in the queue, and the producer waited with the next.
    assert_eq!(written(&wire).len(), 4 + 8 + 1);
    running.finish().await.unwrap();
}

#[tokio::test]
async fn control_comes_behind_the_frame_that_was_begun_and_before_all_others() {
    let wire = Wire::stalling(10);
    let running = start(&wire, 4, vec![frame(b'a', 64), frame(b'b', 64), frame(b'c', 64), switchover(0)]).await;
    run_all().await;
    running.control.put(Control::Frame(Bytes::from_static(&[b'!'; 16]))).await.unwrap();
    running.control.put(Control::Frame(Bytes::from_static(&[b'?'; 16]))).await.unwrap();
    run_all().await;
    assert_eq!(written(&wire), [(b'a', 10)]);
    wire.set_room(usize::MAX);
    assert_eq!(running.sent.next().await, Some(Sent { lane: 0, mark: Mark::LaneEnds }));
    assert_eq!(written(&wire), [(b'a', 64), (b'!', 16), (b'?', 16), (b'b', 64), (b'c', 64), (b'S', 1)]);
    running.finish().await.unwrap();
}

#[tokio::test]
async fn control_needs_no_bulk_and_outlives_it() {
    let wire = Wire::open();
    let Running { control, bulk, sent: _sent, task, .. } = start(&wire, 4, vec![frame(b'a', 8)]).await;
    drop(bulk);
    run_all().await;
    control.put(Control::Frame(Bytes::from_static(b"!!"))).await.unwrap();
    run_all().await;
    assert_eq!(written(&wire), [(b'a', 8), (b'!', 2)]);
    assert!(!wire.look().shut_down);
    control.put(Control::Finish).await.unwrap();
    task.await.unwrap().unwrap();
    assert!(wire.look().shut_down);
}

#[tokio::test]
async fn finish_ends_the_frame_that_was_begun_and_drops_what_is_queued() {
    let wire = Wire::stalling(10);
    let running = start(&wire, 4, vec![frame(b'a', 64), frame(b'b', 64), switchover(0)]).await;
    run_all().await;
    running.control.put(Control::Frame(Bytes::from_static(b"!"))).await.unwrap();
    wire.set_room(usize::MAX);
    running.finish().await.unwrap();
    assert_eq!(written(&wire), [(b'a', 64), (b'!', 1)]);
    assert!(wire.look().shut_down);
}

#[tokio::test]
async fn a_sender_without_a_controller_or_a_writer_completes_nothing() {
    let wire = Wire::open();
    let Running { control, bulk: _bulk, task, .. } = start(&wire, 4, vec![]).await;
    drop(control);
    assert!(task.await.unwrap().unwrap_err().is_closed());
    assert!(!wire.look().shut_down);

    let wire = Wire::open();
    wire.look().broken = true;
    let running = start(&wire, 4, vec![frame(b'a', 64)]).await;
    let error = running.task.await.unwrap().unwrap_err();
    assert!(matches!(error.cause, Cause::Transport(_)), "{error}");
    assert!(!wire.look().shut_down);
}

#[tokio::test]
async fn a_sender_that_nobody_listens_to_still_says_its_last_word() {
    let wire = Wire::open();
    let Running { control, bulk: _bulk, sent, task, .. } = start(&wire, 4, vec![]).await;
    drop(sent);
    control.put(Control::Frame(Bytes::from_static(b"abort"))).await.unwrap();
    control.put(Control::Finish).await.unwrap();
    task.await.unwrap().unwrap();
    assert_eq!(wire.look().bytes, b"abort");
}

#[tokio::test]
async fn a_mark_is_reported_when_the_last_byte_of_its_frame_is_written() {
    let wire = Wire::stalling(8 + 15);
    let running = start(&wire, 4, vec![frame(b'a', 8), round_complete(0, 1, 16)]).await;
    run_all().await;
    assert_eq!(running.sent.try_next(), None);
    wire.set_room(1);
    run_all().await;
    assert_eq!(running.sent.try_next(), completed(0, 1));
    assert!(wire.look().flushes.is_empty(), "a socket needs no flush");
    running.finish().await.unwrap();
}

#[tokio::test]
async fn durable_rounds_are_flushed_once_and_reported_after_it() {
    let wire = Wire::open();
    let running = start_with(&wire, 8, vec![round_complete(0, 1, 4)], None, Some(2)).await;
    run_all().await;
    assert_eq!((running.sent.try_next(), wire.look().flushes.len()), (None, 0));
    // Lane 0 runs ahead by a round; lane 1 then ends the first.
    running.bulk.put(round_complete(0, 2, 4)).await.unwrap();
    running.bulk.put(switchover(0)).await.unwrap();
    running.bulk.put(round_complete(1, 1, 4)).await.unwrap();
    run_all().await;
    assert_eq!(wire.look().flushes, [13]);
    let reports = || running.sent.try_next();
    assert_eq!(
        [reports(), reports(), reports()],
        [completed(0, 1), completed(0, 2), Some(Sent { lane: 0, mark: Mark::LaneEnds })]
    );
    assert_eq!([reports(), reports()], [completed(1, 1), None]);
    running.bulk.put(round_complete(1, 2, 4)).await.unwrap();
    running.bulk.put(switchover(1)).await.unwrap();
    run_all().await;
    assert_eq!(wire.look().flushes, [13, 18]);
    assert_eq!([reports(), reports()], [completed(1, 2), Some(Sent { lane: 1, mark: Mark::LaneEnds })]);
    running.finish().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn bulk_is_held_to_the_cap_and_control_is_not() {
    let wire = Wire::open();
    let bucket = Arc::new(TokenBucket::new(4096));
    let running = start_with(&wire, 4, vec![large_frame(b'a', 256 << 10), frame(b'b', 9)], Some(bucket), None).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let bytes = wire.look().bytes.len();
    assert!(bytes.abs_diff(40960) <= 100, "{bytes} bytes in 10 s at 4096 B/s");

    // Control does not wait a minute for the rest of the frame: that goes at once, and what follows pays for it.
    let start = tokio::time::Instant::now();
    running.control.put(Control::Frame(Bytes::from_static(b"!"))).await.unwrap();
    run_all().await;
    assert!(start.elapsed().is_zero());
    assert_eq!(written(&wire), [(b'a', (256 << 10) + 16), (b'!', 1)]);
    let debt = Duration::from_secs((256 << 10) / 4096 - 10);
    tokio::time::sleep(debt - Duration::from_millis(500)).await;
    assert_eq!(written(&wire).len(), 2);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(written(&wire)[2], (b'b', 9));
    running.finish().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn control_is_charged_to_the_cap() {
    let wire = Wire::open();
    let running = start_with(&wire, 4, Vec::new(), Some(Arc::new(TokenBucket::new(4096))), None).await;
    running.control.put(Control::Frame(vec![b'!'; 8192].into())).await.unwrap();
    run_all().await;
    running.bulk.put(frame(b'a', 4096)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1900)).await;
    assert_eq!(written(&wire), [(b'!', 8192)]);
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(written(&wire), [(b'!', 8192), (b'a', 4096)]);
    assert_eq!((running.meter.bytes(), running.meter.bulk_bytes()), (12_288, 4096));
    running.finish().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_cap_that_is_set_in_the_middle_holds_from_the_next_write_on() {
    let bucket = Arc::new(TokenBucket::unlimited());
    let wire = Wire::stalling(1000);
    let frames = vec![large_frame(b'a', 256 << 10), large_frame(b'b', 256 << 10)];
    let _running = start_with(&wire, 4, frames, Some(bucket.clone()), None).await;
    run_all().await;
    assert_eq!(wire.look().bytes.len(), 1000);
    bucket.set_rate(Some(4096));
    // The write that was begun without a cap is of as much as the wire takes.
    wire.set_room(500);
    run_all().await;
    assert_eq!(wire.look().bytes.len(), 1500);
    wire.set_room(usize::MAX);
    tokio::time::sleep(Duration::from_secs(10)).await;
    let bytes = wire.look().bytes.len() - 1500;
    assert!(bytes.abs_diff(40960) <= 100, "{bytes} bytes in 10 s at 4096 B/s");
    bucket.set_rate(None);
    run_all().await;
    assert_eq!(wire.look().bytes.len(), 2 * ((256 << 10) + 16));
}

#[tokio::test(start_paused = true)]
async fn senders_that_share_a_bucket_share_its_rate() {
    let bucket = Arc::new(TokenBucket::new(1 << 20));
    let wires = [Wire::open(), Wire::open(), Wire::open()];
    let mut running = Vec::new();
    for wire in &wires {
        let frames = (0..64).map(|fill| large_frame(fill, 256 << 10)).collect();
        running.push(start_with(wire, 64, frames, Some(bucket.clone()), None).await);
    }
    tokio::time::sleep(Duration::from_secs(10)).await;
    let share = (10 << 20) / 3;
    for wire in &wires {
        let bytes = wire.look().bytes.len();
        assert!(bytes.abs_diff(share) * 50 <= share, "{bytes} of {share}");
    }
}

/// A frame as it may come: pages of one extent as Pages frame, or nothing but a head.
fn pages_frame(number: u32, payload_pages: u32, pool: &BufferPool) -> Outgoing {
    let bytes = payload_pages as usize * 4096;
    let mut payload = pool.try_take().unwrap();
    payload.space()[..bytes].fill(u8::try_from(number % 251).unwrap());
    payload.set_filled(bytes);
    let mask = (1 << payload_pages) - 1;
    let head = PagesHead {
        at: ExtentAt { block: 0, extent: number },
        round: 1,
        mask,
        zero: 0,
        payload_hash: 0,
        pages: vec![(PageEncoding::Raw, 4096); payload_pages as usize],
    };
    let head = head.with_hash_of(&payload);
    Outgoing { lane: 0, head: head.to_bytes(0), payload: (bytes > 0).then_some(payload), mark: None }
}

fn control_frame(number: u32) -> Bytes {
    let (phase, name) = (StatePhase::Device, "device".into());
    let bytes = vec![7; number as usize * 50].into();
    Message::State(StateChunk { phase, name, version: number, end: true, bytes }).encode(0)
}

/// What a reader at the other end makes of the bytes: extents of Pages frames, versions of state chunks.
async fn read_back(bytes: &[u8]) -> (Vec<u32>, Vec<u32>) {
    let block = BlockInfo::new("ram", 64 << 20);
    let layout = Layout::new(PageSize::DEFAULT, vec![block]).unwrap();
    let mut reader = FrameReader::new(bytes, "test".into(), PageSize::DEFAULT);
    let (mut extents, mut versions) = (Vec::new(), Vec::new());
    while let Some(incoming) = reader.next().await.unwrap() {
        match incoming {
            Incoming::Pages(frame) => {
                let head = PagesHead::parse(&frame.body, frame.frame_length, &layout).unwrap();
                let mut payload = vec![0; head.payload_bytes()];
                reader.read_payload(&mut payload).await.unwrap();
                head.clone().into_arrived(true, frame.offset).check_payload(&payload, &mut Vec::new()).unwrap();
                extents.push(head.at.extent);
            }
            Incoming::Message { message: Message::State(chunk), .. } => versions.push(chunk.version),
            Incoming::Message { message, .. } => panic!("{message:?}"),
        }
    }
    (extents, versions)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn every_frame_arrives_whole_whatever_the_writer_takes(
        payloads in prop::collection::vec(0_u32..4, 1..40),
        steps in prop::collection::vec(prop_oneof![Just(0_usize), 1_usize..40, 1_usize..70_000], 1..12)
            .prop_filter("a wire takes something", |steps| steps.iter().any(|&step| step > 0)),
        controls in 0_u32..8,
        rate in prop::option::of(1_000_000_u64..1_000_000_000),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let wire = Wire::stepping(steps);
        let pool = BufferPool::new(payloads.len(), 4 * 4096);
        let frames: Vec<_> = (0..).zip(&payloads).map(|(number, &pages)| pages_frame(number, pages, &pool)).collect();
        let count = u32::try_from(frames.len()).unwrap();
        runtime.block_on(async {
            let bucket = rate.map(|rate| Arc::new(TokenBucket::new(rate)));
            let running = start_with(&wire, 4, Vec::new(), bucket, None).await;
            let feed = async {
                for frame in frames {
                    running.bulk.put(frame).await.unwrap();
                }
                let last = Outgoing { mark: Some(Mark::LaneEnds), ..pages_frame(count, 0, &BufferPool::new(1, 1)) };
                running.bulk.put(last).await.unwrap();
            };
            let control = async {
                for number in 0..controls {
                    running.control.put(Control::Frame(control_frame(number))).await.unwrap();
                    for _ in 0..number * 3 {
                        yield_now().await;
                    }
                }
            };
            let report = async { running.sent.next().await.unwrap() };
            futures::join!(feed, control, report);
            running.finish().await.unwrap();
        });
        let (extents, versions) = runtime.block_on(read_back(&wire.look().bytes));
        prop_assert_eq!(extents, (0..=count).collect::<Vec<_>>());
        prop_assert_eq!(versions, (0..controls).collect::<Vec<_>>());
    }
}
