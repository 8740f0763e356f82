//! What a deframer takes and refuses: lanes, order and encodings, and valid frames with seeded mutations.

use bytes::Bytes;
use fastrand::Rng;
use futures::executor::block_on;
use xxhash_rust::xxh3::xxh3_64;

use crate::batch::{Mark, PageEncoding, RoundKind};
use crate::dialect::{Deframed, Deframer};
use crate::geometry::{BlockInfo, BulkMap, LaneMap, Layout, PageAt, PageSize, bits};
use crate::tally::RoundTally;
use crate::wire::encoding::is_agreed;
use crate::wire::frames::{Frame, PAGE};
use crate::wire::messages::{BitmapPart, Run, RunState, StateChunk, StatePhase, StretchDigest};
use crate::wire::pages::{FIXED_BYTES, head_bytes};
use crate::wire::{
    Features, FrameError, FrameHead, FrameReader, HEAD_BYTES, Kind, Message, ReadError, WireDeframer, WireError,
};

/// Mutated streams of the bounded run.
const MUTATIONS: usize = 20_000;
/// Pages of the guest: two stretches, and so two lanes.
const PAGES: u64 = 512 + 70;

fn layout() -> Layout {
    Layout::new(PageSize::DEFAULT, vec![BlockInfo::new("ram", PAGES * PAGE as u64)]).unwrap()
}

/// Everything of a stream of two lanes on one connection, and why it ended. Payloads are read and not looked at.
fn read(stream: &[u8], features: Features) -> (Vec<Deframed<Message>>, Result<(), ReadError>) {
    let reader = FrameReader::new(stream, "sample".into(), PageSize::DEFAULT);
    let lanes = LaneMap::new(2, PageSize::DEFAULT);
    let mut deframer = WireDeframer::new(0, BulkMap::new(2, 1), reader, layout(), lanes, features);
    let (mut frames, mut payload) = (vec![], vec![]);
    let ended = block_on(async {
        while let Some(deframed) = deframer.next().await? {
            if let Deframed::Batch { arrived, .. } = &deframed {
                payload.resize(arrived.payload_bytes(), 0);
                deframer.payload(&mut payload).await?;
            }
            frames.push(deframed);
        }
        Ok(())
    });
    assert!(deframer.reader().bytes_read() <= stream.len() as u64);
    (frames, ended)
}

/// Why the last of these frames is refused. The others are taken.
fn refusal(frames: &[Bytes], features: Features) -> WireError {
    let (taken, ended) = read(&frames.concat(), features);
    let last = frames.len() - 1;
    let Err(ReadError::Frame(FrameError { offset, error, .. })) = ended else { panic!("{ended:?}") };
    assert_eq!((taken.len(), offset), (last, frames[..last].concat().len() as u64), "{error}");
    error
}

fn round_complete(lane: u16, round: u32) -> Bytes {
    Message::RoundComplete(RoundTally::new(round, RoundKind::Live)).encode(lane)
}

fn state(name: &str, end: bool) -> Bytes {
    let (phase, bytes) = (StatePhase::Device, Bytes::from_static(b"state"));
    Message::State(StateChunk { phase, name: name.into(), version: 1, end, bytes }).encode(0)
}

fn digests(first: u64, left_out: [u64; 8]) -> Bytes {
    Message::Digests { block: 0, first, stretches: vec![StretchDigest { hash: 1, left_out }] }.encode(0)
}

fn end() -> Bytes {
    Message::End { run_state: RunState::Running, frames: 3 }.encode(0)
}

/// A stream with every kind of frame behind its blocks.
fn sample() -> Vec<Bytes> {
    let first = Frame::new(0, 1).zero(0).raw(1, &[1; PAGE]).coded(2, PageEncoding::Lz4, &[2; 90]);
    let first = first.coded(5, PageEncoding::Grouped, &[]).coded(9, PageEncoding::Zstd, &[3; 70]);
    let second = Frame::new(0, 2).coded(1, PageEncoding::Xbzrle, &[4; 30]).coded(3, PageEncoding::Snap, &[5; 50]);
    vec![
        first.bytes(0).into(),
        Frame::new(8, 1).zero(3).bytes(1).into(),
        Message::Heartbeat(vec![]).encode(0),
        round_complete(0, 1),
        round_complete(1, 1),
        state("cpu", false),
        state("cpu", true),
        second.bytes(0).into(),
        round_complete(0, 2),
        Message::LaneEnds.encode(0),
        Message::LaneEnds.encode(1),
        digests(0, [1, 0, 0, 0, 0, 0, 0, 0]),
        digests(1, [0; 8]),
        end(),
        Message::Go(RunState::Running).encode(0),
    ]
}

#[test]
fn a_stream_is_its_batches_marks_and_messages() {
    let frames = sample();
    let (taken, ended) = read(&frames.concat(), Features::ALL);
    ended.unwrap();
    // All but the Heartbeat.
    assert_eq!(taken.len(), frames.len() - 1);
    let Deframed::Batch { lane: 0, arrived, bytes } = &taken[0] else { panic!("{:?}", taken[0]) };
    use PageEncoding::{Grouped, Lz4, Raw, Zstd};
    assert_eq!(arrived.pages, [(Raw, 0..4096), (Lz4, 4096..4186), (Grouped, 4186..4186), (Zstd, 4186..4256)]);
    assert_eq!((arrived.mask, arrived.zero, arrived.payload_bytes()), (0b10_0010_0111, 1, 4256));
    assert_eq!((*bytes, arrived.offset), (frames[0].len() as u64, 0));
    assert!(matches!(taken[2], Deframed::Mark { lane: 0, mark: Mark::RoundComplete(tally) } if tally.round == 1));
    assert!(matches!(taken[9], Deframed::Mark { lane: 1, mark: Mark::LaneEnds }));
    assert!(matches!(taken[12], Deframed::Message(Message::End { .. })));
}

fn missing() -> Bytes {
    Message::Missing(BitmapPart { block: 0, first: 0, runs: vec![Run { extents: 10, mask: 1 }] }).encode(0)
}

/// A stream that switches to postcopy behind round 1.
fn switch() -> Vec<Bytes> {
    vec![
        Frame::new(0, 1).zero(0).bytes(0).into(),
        round_complete(0, 1),
        round_complete(1, 1),
        Message::DirectEnds.encode(0),
        Message::DirectEnds.encode(1),
        missing(),
        Message::Discard.encode(0),
        state("cpu", true),
        missing(),
        end(),
        Message::Go(RunState::Running).encode(0),
        Frame::new(0, 2).zero(0).bytes(0).into(),
        round_complete(1, 2),
        Message::LaneEnds.encode(1),
        Message::LaneEnds.encode(0),
    ]
}

#[test]
fn in_a_switch_to_postcopy_pages_follow_go() {
    let frames = switch();
    let (taken, ended) = read(&frames.concat(), Features::ALL);
    ended.unwrap();
    assert_eq!(taken.len(), frames.len());
    let refused = |frames: &[Bytes]| refusal(frames, Features::ALL);
    let out_of_place = |frames: &[Bytes], kind: Kind| {
        let error = refused(frames);
        assert!(matches!(error, WireError::OutOfPlace { kind: found, .. } if found == kind), "{error}");
    };
    out_of_place(&[Message::DirectEnds.encode(0), end()], Kind::End);
    out_of_place(&[Message::DirectEnds.encode(0), Message::DirectEnds.encode(0)], Kind::DirectEnds);
    out_of_place(&[Message::Discard.encode(0), Message::Discard.encode(0)], Kind::Discard);
    let ended = &frames[3..10];
    out_of_place(&[ended, &[missing()]].concat(), Kind::Missing);
    out_of_place(&[ended, &[Message::DirectEnds.encode(0)]].concat(), Kind::DirectEnds);
    out_of_place(&[&frames[..], &[Frame::new(0, 2).zero(0).bytes(0).into()]].concat(), Kind::Pages);
}

#[test]
fn postcopy_is_refused_unless_it_was_agreed_on() {
    let without = Features { postcopy: false, ..Features::ALL };
    assert_eq!(
        refusal(&[Message::DirectEnds.encode(0)], without),
        WireError::MarkNotAgreed { kind: Kind::DirectEnds, lane: 0 }
    );
    for message in [missing(), Message::Discard.encode(0)] {
        assert!(matches!(refusal(&[message], without), WireError::OutOfPlace { .. }));
    }
}

#[test]
fn an_urgent_connection_carries_pages_of_all_lanes_and_nothing_else() {
    let read = |stream: &[u8]| {
        let reader = FrameReader::new(stream, "sample".into(), PageSize::DEFAULT);
        let lanes = LaneMap::new(2, PageSize::DEFAULT);
        let mut deframer = WireDeframer::urgent(reader, layout(), lanes, Features::ALL);
        block_on(async {
            let mut lanes = vec![];
            while let Some(Deframed::Batch { lane, .. }) = deframer.next().await? {
                lanes.push(lane);
            }
            Ok::<_, ReadError>(lanes)
        })
    };
    let pages = [Frame::new(8, 2).zero(3).bytes(1), Frame::new(0, 2).zero(0).bytes(0)].concat();
    assert_eq!(read(&pages).unwrap(), [1, 0]);
    let wrong = [Frame::new(8, 2).zero(3).bytes(0), round_complete(0, 1).into(), end().into(), missing().into()];
    for frame in wrong {
        assert!(matches!(read(&frame), Err(ReadError::Frame(_))));
    }
}

#[test]
fn an_encoding_is_refused_unless_it_was_agreed_on() {
    let none = Features { checksum: true, ..Features::default() };
    for (encoding, agreed) in [
        (PageEncoding::Snap, Features { snap: true, ..none }),
        (PageEncoding::Lz4, Features { lz4: true, ..none }),
        (PageEncoding::Zstd, Features { zstd: true, ..none }),
        (PageEncoding::Xbzrle, Features { xbzrle: true, ..none }),
    ] {
        let before = Frame::new(0, 1).raw(1, &[1; PAGE]).bytes(0).into();
        let frames = [before, Frame::new(0, 1).zero(0).coded(2, encoding, &[0xff; 7]).bytes(0).into()];
        let page = PageAt { block: 0, page: 2 };
        assert_eq!(refusal(&frames, none), WireError::NotAgreed { page, encoding });
        read(&frames.concat(), agreed).1.unwrap();
    }
    let group = Frame::new(0, 1).coded(1, PageEncoding::Lz4, &[1; 7]).coded(2, PageEncoding::Grouped, &[]);
    let page = PageAt { block: 0, page: 2 };
    assert_eq!(
        refusal(&[group.bytes(0).into()], Features { lz4: true, ..none }),
        WireError::NotAgreed { page, encoding: PageEncoding::Grouped }
    );
    read(&group.bytes(0), Features { lz4: true, groups: true, ..none }).1.unwrap();
}

#[test]
fn without_hashes_no_payload_has_one() {
    let frame = Frame::new(0, 1).raw(1, &[1; PAGE]).bytes(0);
    for checksum in [false, true] {
        let (taken, _) = read(&frame, Features { checksum, ..Features::ALL });
        let Deframed::Batch { arrived, .. } = &taken[0] else { panic!("{taken:?}") };
        assert_eq!(arrived.payload_hash.is_some(), checksum);
    }
}

#[test]
fn messages_come_in_order() {
    let out_of_place = |frames: &[Bytes], kind: Kind| {
        let error = refusal(frames, Features::ALL);
        assert!(matches!(error, WireError::OutOfPlace { kind: found, .. } if found == kind), "{error}");
    };
    let over = [Message::LaneEnds.encode(0), Message::LaneEnds.encode(1)];
    let ended = [over.concat().into(), end()];
    let after_end = |frame: Bytes, kind| {
        let stream = [&over[..], &[end(), frame]].concat();
        out_of_place(&stream, kind);
    };
    read(&ended.concat(), Features::ALL).1.unwrap();
    out_of_place(&[over[0].clone(), end()], Kind::End);
    after_end(end(), Kind::End);
    after_end(state("cpu", true), Kind::State);
    after_end(digests(0, [0; 8]), Kind::Digests);
    after_end(Frame::new(0, 1).bytes(0).into(), Kind::Pages);
    after_end(Message::LaneEnds.encode(1), Kind::LaneEnds);
    out_of_place(&[state("cpu", false), state("net", false)], Kind::State);
    out_of_place(&[over[0].clone(), over[1].clone(), state("cpu", false), end()], Kind::End);
    out_of_place(&[digests(1, [0; 8])], Kind::Digests);
    out_of_place(&[digests(0, [0; 8]), digests(0, [0; 8])], Kind::Digests);
    out_of_place(&[digests(0, [0; 8]), digests(1, [0; 8]), digests(2, [0; 8])], Kind::Digests);
    // The second stretch has two extents, the second of them six pages.
    read(&[digests(0, [u64::MAX; 8]), digests(1, [1, 1, 0, 0, 0, 0, 0, 0])].concat(), Features::ALL).1.unwrap();
    out_of_place(&[digests(0, [0; 8]), digests(1, [0, 1 << 6, 0, 0, 0, 0, 0, 0])], Kind::Digests);
    out_of_place(&[digests(0, [0; 8]), digests(1, [0, 0, 1, 0, 0, 0, 0, 0])], Kind::Digests);
    let blocks = Message::Blocks(vec![BlockInfo::new("ram", 1)]).encode(0);
    out_of_place(&[blocks], Kind::Blocks);
    let none = Features { left_out: false, ..Features::ALL };
    assert!(matches!(refusal(&[digests(0, [1; 8])], none), WireError::OutOfPlace { kind: Kind::Digests, .. }));
}

/// A frame with some of its bytes changed, and the checksums that they have.
fn mutated(frame: &[u8], dice: &mut Rng) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let is_pages = frame[0] == Kind::Pages as u8;
    let fields = |frame: &[u8]| match frame.get(HEAD_BYTES..HEAD_BYTES + FIXED_BYTES) {
        Some(fixed) if is_pages => head_bytes(fixed.try_into().unwrap()) - 8,
        _ => frame.len() - HEAD_BYTES - 8,
    };
    let checked = fields(&frame);
    for _ in 0..dice.usize(1..4) {
        if checked > 0 {
            let byte = if dice.bool() { dice.u8(..) } else { *dice.choice(&[0, 1, 0x7f, 0x80, 0xff]).unwrap() };
            frame[HEAD_BYTES + dice.usize(..checked)] = byte;
        }
    }
    if dice.usize(..4) == 0 {
        let mut head = FrameHead::parse(frame.first_chunk().unwrap(), PageSize::DEFAULT).unwrap();
        head.lane = if dice.bool() { dice.u16(..4) } else { dice.u16(..) };
        frame[..HEAD_BYTES].copy_from_slice(&head.to_bytes());
    }
    let end = HEAD_BYTES + fields(&frame).min(frame.len() - HEAD_BYTES - 8);
    let checksum = xxh3_64(&frame[HEAD_BYTES..end]);
    frame[end..end + 8].copy_from_slice(&checksum.to_le_bytes());
    frame
}

/// Checks what a deframer promises of whatever it takes.
fn check_taken(taken: &Deframed<Message>, features: &Features, seed: u64) {
    let layout = layout();
    match taken {
        Deframed::Batch { lane, arrived, .. } => {
            assert_eq!(arrived.mask & !layout.valid_mask(arrived.at), 0, "seed {seed}: {arrived:?}");
            assert_eq!(arrived.zero & !arrived.mask, 0, "seed {seed}: {arrived:?}");
            assert_eq!(*lane, LaneMap::new(2, PageSize::DEFAULT).lane(arrived.at), "seed {seed}");
            assert_eq!(bits(arrived.mask & !arrived.zero).count(), arrived.pages.len(), "seed {seed}");
            let mut end = 0;
            for (encoding, range) in &arrived.pages {
                assert!(range.start == end && is_agreed(*encoding, features), "seed {seed}: {arrived:?}");
                end = range.end;
            }
            assert!(end as usize <= PageSize::DEFAULT.extent_bytes(), "seed {seed}: {arrived:?}");
            let covered = arrived.pieces(&vec![0; end as usize]).fold(0, |mask, piece| mask | piece.mask);
            assert_eq!(covered, arrived.mask & !arrived.zero, "seed {seed}: {arrived:?}");
        }
        Deframed::Mark { lane, .. } => assert!(*lane < 2, "seed {seed}"),
        Deframed::Message(message) => assert!(!message.kind().is_of_lane(), "seed {seed}"),
    }
}

#[test]
fn mutated_frames_are_refused_at_their_place_or_keep_every_promise() {
    let (frames, mut refused) = (sample(), 0);
    for seed in 0..MUTATIONS as u64 {
        let mut dice = Rng::with_seed(seed);
        let features =
            if dice.bool() { Features::ALL } else { Features { lz4: false, left_out: false, ..Features::ALL } };
        let place = dice.usize(..frames.len());
        let mut stream: Vec<Vec<u8>> = frames.iter().map(|frame| frame.to_vec()).collect();
        stream[place] = mutated(&frames[place], &mut dice);
        let starts: Vec<u64> =
            stream.iter().scan(0, |at, frame| Some(std::mem::replace(at, *at + frame.len() as u64))).collect();
        let (taken, ended) = read(&stream.concat(), features);
        taken.iter().for_each(|taken| check_taken(taken, &features, seed));
        match ended {
            Ok(()) => {}
            Err(ReadError::Frame(FrameError { offset, .. }) | ReadError::Truncated { offset, .. }) => {
                assert!(starts.contains(&offset), "seed {seed}: byte {offset} of {starts:?}");
                refused += 1;
            }
            Err(error) => panic!("seed {seed}: {error}"),
        }
    }
    assert!(refused > MUTATIONS / 2, "{refused} of {MUTATIONS} were refused");
}
