use futures::join;
use proptest::prelude::*;
use tokio::task::yield_now;

use super::*;
use crate::batch::{Mark, PageEncoding, RoundKind};
use crate::codec::Codec;
use crate::geometry::{BlockInfo, BulkMap, ExtentAt, LaneMap, Layout, PageSize};
use crate::loader::recorder::Recorder;
use crate::loader::{Direct, LaneProgress, Loaded, Loader};
use crate::queue::{Inlet, bounded};
use crate::tally::RoundTally;
use crate::wire::frames::{Frame, PAGE};
use crate::wire::messages::{BitmapPart, Progress, Resume, Run, RunState, StateChunk, StatePhase};
use crate::wire::{Features, FrameReader, Kind, Message, Nonce, Proof, ReadError, WireDeframer, WireError};

/// Extents of one stretch of 4 KiB pages: extent 8 is the second stretch.
const STRETCH: u32 = 8;

fn layout() -> Layout {
    let block = BlockInfo::new("ram", (64 << 20) - 1);
    Layout::new(PageSize::DEFAULT, vec![block]).unwrap()
}

/// What came out of a receiver.
struct Outcome {
    result: Result<(), StageError>,
    lanes: Vec<Vec<Item<Arrived>>>,
    control: Vec<Message>,
}

/// Hands a stream to the receiver of connection `connection` of 2, in a migration of 3 lanes.
async fn receive(connection: u16, stream: &[u8]) -> Outcome {
    receive_agreed(connection, stream, Features::default()).await
}

async fn receive_agreed(connection: u16, stream: &[u8], agreed: Features) -> Outcome {
    let reader = FrameReader::new(stream, format!("connection {connection}"), PageSize::DEFAULT);
    let lane_map = LaneMap::new(3, PageSize::DEFAULT);
    let meter = Meter::start(StageId::receiver(connection));
    let pool = BufferPool::new(64, PageSize::DEFAULT.extent_bytes());
    let deframer = WireDeframer::new(connection, BulkMap::new(3, 2), reader, layout(), lane_map, agreed);
    let receiver = Receiver::new(connection, deframer, pool, meter);
    let mut inlets = Vec::new();
    let outlet = |lane: u16| {
        (lane % 2 == connection).then(|| {
            let (outlet, inlet) = bounded(64);
            inlets.push(inlet);
            outlet
        })
    };
    let outlets = (0..3).map(outlet).collect();
    let (control, messages) = bounded(64);
    let result = receiver.run(outlets, control).await;
    let lanes = inlets.iter().map(|inlet| std::iter::from_fn(|| inlet.try_next()).collect()).collect();
    Outcome { result, lanes, control: std::iter::from_fn(|| messages.try_next()).collect() }
}

/// The error of a stream's second frame, which must be refused.
async fn refuses(connection: u16, first: &[u8], second: &[u8]) -> WireError {
    let error = receive(connection, &[first, second].concat()).await.result.unwrap_err();
    match error.cause {
        Cause::Read(ReadError::Frame(error)) => {
            assert_eq!((error.offset, error.stream), (first.len() as u64, format!("connection {connection}")));
            error.error
        }
        other => panic!("{other}"),
    }
}

fn round_complete(lane: u16, round: u32) -> Vec<u8> {
    Message::RoundComplete(RoundTally::new(round, RoundKind::Live)).encode(lane).to_vec()
}

fn lane_ends(lane: u16) -> Vec<u8> {
    Message::LaneEnds.encode(lane).to_vec()
}

fn state(bytes: &'static [u8]) -> Message {
    let (phase, name) = (StatePhase::Device, "device".into());
    Message::State(StateChunk { phase, name, version: 1, end: true, bytes: bytes.into() })
}

/// A page of a pattern of its own.
fn text(number: u8) -> Vec<u8> {
    (0..PAGE).map(|at| b"memory that moves "[at % 18] ^ number).collect()
}

/// What an item is, in short.
fn brief(item: &Item<Arrived>) -> String {
    match item {
        Item::Batch(arrived) => format!("extent {} at {}", arrived.at.extent, arrived.offset),
        Item::Mark(Mark::RoundComplete(tally)) => format!("round {}", tally.round),
        Item::Mark(mark) => format!("{mark:?}"),
    }
}

#[tokio::test]
async fn frames_are_dealt_to_their_lanes_in_order_and_messages_to_the_controller() {
    let frames = [
        Frame::new(0, 1).raw(1, &text(1)).zero(9).bytes(0),
        Frame::new(2 * STRETCH, 1).zero(3).bytes(2),
        state(b"one").encode(0).to_vec(),
        round_complete(0, 1),
        Frame::new(1, 2).bytes(0),
        round_complete(2, 1),
        lane_ends(2),
        state(b"two").encode(0).to_vec(),
        round_complete(0, 2),
        lane_ends(0),
        Message::Go(RunState::Running).encode(0).to_vec(),
    ];
    let offsets: Vec<_> =
        frames.iter().scan(0, |sum, frame| Some(std::mem::replace(sum, *sum + frame.len()))).collect();
    let outcome = receive(0, &frames.concat()).await;
    outcome.result.unwrap();
    let lane = |index: usize| outcome.lanes[index].iter().map(brief).collect::<Vec<_>>();
    let second = format!("extent 1 at {}", offsets[4]);
    assert_eq!(lane(0), ["extent 0 at 0", "round 1", &second, "round 2", "LaneEnds"]);
    assert_eq!(lane(1), [&format!("extent 16 at {}", offsets[1]), "round 1", "LaneEnds"]);
    assert_eq!(outcome.control, [state(b"one"), state(b"two"), Message::Go(RunState::Running)]);
    let Item::Batch(first) = &outcome.lanes[0][0] else { panic!() };
    assert_eq!(first.payload.as_deref(), Some(&text(1)[..]));
    let Item::Batch(zeros) = &outcome.lanes[1][0] else { panic!() };
    assert!(zeros.payload.is_none(), "no buffer where there is no payload");
}

#[tokio::test]
async fn a_frame_must_be_of_its_lane_and_the_lane_of_the_connection() {
    let first = Frame::new(0, 1).raw(1, &text(1)).bytes(0);
    let at = ExtentAt { block: 0, extent: STRETCH };
    assert_eq!(
        refuses(0, &first, &Frame::new(STRETCH, 1).zero(1).bytes(0)).await,
        WireError::WrongLane { at, lane: 0, right: 1 }
    );
    for frame in [Frame::new(STRETCH, 1).zero(1).bytes(1), round_complete(1, 1), lane_ends(1)] {
        assert_eq!(refuses(0, &first, &frame).await, WireError::WrongConnection { lane: 1, connection: 0, right: 1 });
    }
    for frame in [Frame::new(3 * STRETCH, 1).bytes(3), round_complete(3, 1), lane_ends(3)] {
        assert_eq!(refuses(1, &[], &frame).await, WireError::NoLane { lane: 3, lanes: 3 });
    }
}

#[tokio::test]
async fn rounds_never_go_down_in_a_lane() {
    let bytes = |round| Frame::new(0, round).zero(1).bytes(0);
    for (first, second) in [
        (bytes(3), bytes(2)),
        (round_complete(0, 2), bytes(2)),
        (round_complete(0, 2), round_complete(0, 2)),
        (bytes(3), round_complete(0, 2)),
    ] {
        let error = refuses(0, &first, &second).await;
        assert_eq!(error, WireError::WrongRound { lane: 0, round: 2, current: 3 });
    }
    let other_lane = [bytes(3), Frame::new(2 * STRETCH, 1).zero(1).bytes(2)].concat();
    receive(0, &other_lane).await.result.unwrap();
}

#[tokio::test]
async fn nothing_comes_in_a_lane_after_its_end() {
    for (frame, kind) in [
        (Frame::new(0, 9).zero(1).bytes(0), Kind::Pages),
        (round_complete(0, 9), Kind::RoundComplete),
        (lane_ends(0), Kind::LaneEnds),
    ] {
        let error = refuses(0, &lane_ends(0), &frame).await;
        assert!(matches!(error, WireError::OutOfPlace { kind: found, .. } if found == kind), "{error}");
    }
}

#[tokio::test]
async fn marks_pass_in_order_where_they_were_agreed_on_and_are_refused_elsewhere() {
    let marks = [Mark::Checkpoint(u64::MAX), Mark::DirectEnds];
    let first = Frame::new(0, 1).zero(1).bytes(0);
    for (mark, kind) in marks.into_iter().zip([Kind::Checkpoint, Kind::DirectEnds]) {
        let refused = refuses(0, &first, &Message::from(mark).encode(0)).await;
        assert_eq!(refused, WireError::MarkNotAgreed { kind, lane: 0 });
        let wrong = refuses(0, &first, &Message::from(mark).encode(1)).await;
        assert_eq!(wrong, WireError::WrongConnection { lane: 1, connection: 0, right: 1 });
    }
    let agreed = Features { checkpoints: true, postcopy: true, ..Features::default() };
    let frames = [round_complete(0, 1), Message::from(marks[0]).encode(0).to_vec(), first.clone()];
    let behind = Frame::new(0, 2).zero(1).bytes(0);
    let frames = [&frames[0], &frames[1], &behind, &Message::from(marks[1]).encode(0)[..], &lane_ends(0)].concat();
    let outcome = receive_agreed(0, &frames, agreed).await;
    outcome.result.unwrap();
    let brief: Vec<_> = outcome.lanes[0].iter().map(brief).collect();
    let extent = format!("extent 0 at {}", frames.len() - behind.len() - 2 * lane_ends(0).len());
    assert_eq!(brief, ["round 1", "Checkpoint(18446744073709551615)", &extent, "DirectEnds", "LaneEnds"]);
}

#[tokio::test]
async fn the_return_paths_messages_are_refused() {
    let messages = [
        Message::Accept { waits_ms: 0 },
        Message::Challenge { nonce: Nonce::default(), proof: Proof([0; 32]) },
        Message::Resume(Resume::default()),
        Message::Received(BitmapPart { block: 0, first: 0, runs: vec![Run { extents: 1, mask: 1 }] }),
        Message::Discarded,
        Message::PageRequest(ExtentAt { block: 0, extent: 0 }.page(0)),
        Message::Complete,
        Message::Ready,
        Message::Progress(Progress { bytes: 1, frames: vec![1] }),
        Message::PageHashes { first: ExtentAt { block: 0, extent: 0 }.page(0), hashes: vec![1] },
        Message::Loaded { verified: true },
        Message::Running,
        Message::Refused("no".into()),
        Message::StartFailed("no".into()),
    ];
    for message in messages {
        let error = refuses(0, &lane_ends(0), &message.encode(0)).await;
        assert!(matches!(error, WireError::OutOfPlace { kind, .. } if kind == message.kind()), "{error}");
    }
    let both_ways = Message::Abort("cancelled".into());
    let stream = [Message::Heartbeat(Vec::new()).encode(0), both_ways.encode(0)].concat();
    assert_eq!(receive(0, &stream).await.control, [both_ways]);
}

#[tokio::test]
async fn pages_must_lie_in_the_layout() {
    let mut frame = Frame::new(0, 1).zero(1);
    frame.head.at.block = 7;
    assert_eq!(refuses(0, &lane_ends(2), &frame.bytes(0)).await, WireError::NoBlock { block: 7, blocks: 1 });
    let frame = Frame::new(300, 1).zero(1);
    assert!(matches!(refuses(0, &lane_ends(2), &frame.bytes(0)).await, WireError::NoExtent { extents: 256, .. }));
}

#[tokio::test]
async fn what_is_read_ahead_is_what_the_pool_holds() {
    let stream: Vec<u8> = (0..5).flat_map(|bit| Frame::new(0, 1).raw(bit, &text(1)).bytes(0)).collect();
    let reader = FrameReader::new(std::io::Cursor::new(stream), "connection 0".into(), PageSize::DEFAULT);
    let pool = BufferPool::new(2, PageSize::DEFAULT.extent_bytes());
    let lane_map = LaneMap::new(1, PageSize::DEFAULT);
    let meter = Meter::start(StageId::receiver(0));
    let deframer = WireDeframer::new(0, BulkMap::new(1, 1), reader, layout(), lane_map, Features::ALL);
    let receiver = Receiver::new(0, deframer, pool, meter);
    let ((outlet, lane), (control, _messages)) = (bounded(8), bounded(8));
    let task = tokio::spawn(receiver.run(vec![Some(outlet)], control));
    let mut held = Vec::new();
    for expected in [2, 1, 1, 1, 0] {
        for _ in 0..100 {
            yield_now().await;
        }
        let came: Vec<_> = std::iter::from_fn(|| lane.try_next()).collect();
        assert_eq!(came.len(), expected);
        held.extend(came);
        held.remove(0);
    }
    task.await.unwrap().unwrap();
}

/// Pages of the small guest that streams are loaded into.
const PAGES: usize = 9;

/// A stream that uses every encoding, with the places where its frames end.
fn sample() -> (Vec<u8>, Vec<usize>) {
    let new = |page: u8| {
        let mut bytes = text(page);
        bytes[77] ^= 0x80;
        bytes
    };
    let zstd = Codec::Zstd { level: 1 };
    let first = Frame::new(0, 1).zero(0).compressed(1, Codec::Snap, &text(1)).compressed(2, Codec::Lz4, &text(2));
    let frames = [
        first.compressed(3, zstd, &text(3)).raw(4, &text(4)).zero(5).group(zstd, &[6, 7, 8].map(group_page)).bytes(0),
        round_complete(0, 1),
        state(b"a device").encode(0).to_vec(),
        Frame::new(0, 2).delta(1, &text(1), &new(1)).zero(2).delta(4, &text(4), &new(4)).bytes(0),
        Frame::new(0, 2).bytes(0),
        round_complete(0, 2),
        lane_ends(0),
    ];
    let ends = frames.iter().scan(0, |sum, frame| {
        *sum += frame.len();
        Some(*sum)
    });
    (frames.concat(), std::iter::once(0).chain(ends).collect())
}

/// A page of the group in the sample.
fn group_page(bit: u32) -> (u32, Vec<u8>) {
    (bit, text(bit.to_le_bytes()[0]))
}

/// What a stream made of a guest whose pages all held 0xee.
struct Landed {
    receiver: Result<(), StageError>,
    loader: Result<(), StageError>,
    reports: Inlet<Loaded>,
    memory: Vec<u8>,
}

/// Runs a stream through receiver and loader.
async fn land(stream: &[u8], checksum: bool) -> Landed {
    let (guest, memory, received) = Recorder::guest(vec![0xee; PAGES * PAGE], false);
    let lane_map = LaneMap::new(1, PageSize::DEFAULT);
    let reader = FrameReader::new(stream, "connection 0".into(), PageSize::DEFAULT);
    let pool = BufferPool::new(2, PageSize::DEFAULT.extent_bytes());
    let layout = guest.layout().clone();
    let features = Features { checksum, ..Features::ALL };
    let deframer = WireDeframer::new(0, BulkMap::new(1, 1), reader, layout, lane_map, features);
    let receiver = Receiver::new(0, deframer, pool, Meter::start(StageId::receiver(0)));
    let progress = Arc::new(LaneProgress::default());
    let loader = Loader::new(0, Direct::new(guest, received), progress, Meter::start(StageId::loader(0)));
    let ((outlet, inlet), (control, _messages), (loaded, reports)) = (bounded(4), bounded(8), bounded(8));
    let (receiver, loader) = join!(receiver.run(vec![Some(outlet)], control), loader.run(inlet, loaded));
    Landed { receiver, loader, reports, memory: memory.bytes() }
}

/// Everything that each page may be while the sample is loaded.
fn versions() -> Vec<Vec<Vec<u8>>> {
    let patched = |page| {
        let mut bytes: Vec<u8> = text(page);
        bytes[77] ^= 0x80;
        bytes
    };
    let zero = || vec![0; PAGE];
    vec![
        vec![zero()],
        vec![text(1), patched(1)],
        vec![text(2), zero()],
        vec![text(3)],
        vec![text(4), patched(4)],
        vec![zero()],
        vec![text(6)],
        vec![text(7)],
        vec![text(8)],
    ]
}

fn assert_no_wrong_page(memory: &[u8], versions: &[Vec<Vec<u8>>], what: &str) {
    for (number, (page, versions)) in memory.chunks_exact(PAGE).zip(versions).enumerate() {
        let right = page.iter().all(|&byte| byte == 0xee) || versions.iter().any(|version| version == page);
        assert!(right, "{what}: page {number} is wrong");
    }
}

#[tokio::test]
async fn a_whole_stream_is_loaded() {
    let Landed { receiver, loader, reports, memory } = land(&sample().0, true).await;
    receiver.unwrap();
    loader.unwrap();
    let last: Vec<u8> = versions().iter().flat_map(|page| page.last().unwrap().clone()).collect();
    assert!(memory == last);
    let tally = |round| RoundTally::new(round, RoundKind::Live);
    assert_eq!(reports.next().await, Some(Loaded { lane: 0, mark: Mark::RoundComplete(tally(1)) }));
    assert_eq!(reports.next().await, Some(Loaded { lane: 0, mark: Mark::RoundComplete(tally(2)) }));
    assert_eq!(reports.next().await, Some(Loaded { lane: 0, mark: Mark::LaneEnds }));
}

#[tokio::test]
async fn a_stream_cut_at_any_byte_is_an_error_that_names_the_frame_and_loads_no_wrong_page() {
    let ((stream, ends), versions) = (sample(), versions());
    for cut in 0..stream.len() {
        let Landed { receiver, loader, memory, .. } = land(&stream[..cut], true).await;
        loader.unwrap();
        assert_no_wrong_page(&memory, &versions, &format!("cut at {cut}"));
        match receiver {
            Ok(()) => assert!(ends.contains(&cut), "cut at {cut}"),
            Err(StageError { cause: Cause::Read(ReadError::Truncated { offset, end, .. }), .. }) => {
                let frame = ends.iter().rev().find(|&&end| end <= cut).unwrap();
                assert_eq!((offset, end), (*frame as u64, cut as u64));
                assert!(!ends.contains(&cut), "cut at {cut}");
            }
            Err(error) => panic!("cut at {cut}: {error}"),
        }
    }
}

#[tokio::test]
async fn any_flipped_bit_is_an_error_and_loads_no_wrong_page() {
    let ((stream, ends), versions) = (sample(), versions());
    for bit in 0..stream.len() * 8 {
        let mut damaged = stream.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let Landed { receiver, loader, memory, .. } = land(&damaged, true).await;
        let errors: Vec<_> = [receiver.err(), loader.err()].into_iter().flatten().collect();
        let error = errors.iter().find(|error| !error.is_closed()).unwrap_or_else(|| panic!("bit {bit} is not missed"));
        let frame = ends.iter().rev().find(|&&end| end <= bit / 8).unwrap();
        assert!(error.to_string().contains(&format!("frame at byte {frame} of")), "bit {bit}: {error}");
        assert_no_wrong_page(&memory, &versions, &format!("bit {bit}"));
    }
}

/// A Pages frame with valid checksums and any fields.
fn hostile() -> impl Strategy<Value = (Frame, u16, bool)> {
    let word = || prop_oneof![Just(0_u64), Just(u64::MAX), 0_u64..64, any::<u64>()];
    let encodings = [
        PageEncoding::Raw,
        PageEncoding::Snap,
        PageEncoding::Lz4,
        PageEncoding::Zstd,
        PageEncoding::Xbzrle,
        PageEncoding::Grouped,
    ];
    let page = (prop::sample::select(encodings.to_vec()), prop_oneof![Just(4096_usize), 0_usize..200]);
    let pages = prop::collection::vec(page, 64);
    (0_u32..2, 0_u32..2, 0_u32..3, word(), word(), pages, any::<u64>(), 0_u16..2, any::<bool>()).prop_map(
        |(block, extent, round, mask, zero, pages, seed, lane, small)| {
            let mut frame = Frame::new(extent, round);
            frame.head.at.block = block;
            let mask = if small { mask & 0x3f } else { mask };
            for bit in crate::geometry::bits(mask) {
                let (encoding, length) = pages[bit as usize];
                let bytes: Vec<u8> = (0..length).map(|at| (seed >> (at % 57)).to_le_bytes()[0]).collect();
                let is_zero = zero >> bit & 1 == 1;
                frame = if is_zero { frame.zero(bit) } else { frame.coded(bit, encoding, &bytes) };
            }
            (frame, lane, seed % 3 == 0)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn hostile_fields_end_in_an_error_or_a_loaded_page_and_never_in_a_panic(frames in prop::collection::vec(hostile(), 1..5)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let checksum = frames[0].2;
        let stream: Vec<u8> = frames.iter().flat_map(|(frame, lane, _)| frame.bytes(*lane)).collect();
        let landed = runtime.block_on(land(&stream, checksum));
        prop_assert_eq!(landed.memory.len(), PAGES * PAGE);
        let in_layout = |frame: &Frame| frame.head.at == ExtentAt { block: 0, extent: 0 } && frame.head.mask >> PAGES == 0;
        if !frames.iter().all(|(frame, lane, _)| in_layout(frame) && *lane == 0) {
            prop_assert!(landed.receiver.is_err() || landed.loader.is_err());
        }
    }
}
