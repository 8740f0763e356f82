//! What is encoded decodes to the same value.

use bytes::Bytes;
use futures::executor::block_on;
use proptest::collection::vec;
use proptest::prelude::*;

use super::samples;
use crate::batch::{PageEncoding, RoundKind, group_pages};
use crate::geometry::{BlockInfo, ExtentAt, Layout, MAX_LANES, PageAt, PageSize};
use crate::tally::{PageTally, RoundTally};
use crate::wire::messages::{
    BitmapPart, Figure, MAX_COUNT, Progress, Resume, Run, RunState, StateChunk, StatePhase, StretchDigest,
};
use crate::wire::{
    ConnectionRole, FrameHead, FrameReader, HEAD_BYTES, Hello, Incoming, Kind, Message, Nonce, PROTOCOL_VERSION,
    PagesHead, Proof, SessionId,
};

fn page_size() -> impl Strategy<Value = PageSize> {
    (12..=16u32).prop_map(|shift| PageSize::new(1 << shift).unwrap())
}

fn run_state() -> impl Strategy<Value = RunState> {
    prop_oneof![Just(RunState::Running), Just(RunState::Paused)]
}

fn hello() -> impl Strategy<Value = Message> {
    let counts = (1..=MAX_LANES)
        .prop_flat_map(|lanes| (Just(lanes), 1..=lanes, 0..=2u16))
        .prop_flat_map(|(lanes, bulk, others)| (Just(lanes), Just(bulk), Just(bulk + others), 0..bulk + others));
    let other = prop_oneof![Just(ConnectionRole::Urgent), Just(ConnectionRole::Control)];
    let features = proptest::collection::btree_set("[a-zé-]{1,30}", 0..=64);
    let ids = (any::<[u8; 16]>(), any::<u32>(), any::<[u8; 32]>());
    let fields = (ids, counts, other, page_size(), features);
    fields.prop_map(|((session, attempt, nonce), counts, other, page_size, features)| {
        let (lanes, bulk, connections, connection) = counts;
        let role = if connection < bulk { ConnectionRole::Bulk } else { other };
        let features = features.into_iter().map(Into::into).collect();
        Message::Hello(Hello {
            version: PROTOCOL_VERSION,
            session: SessionId(session),
            attempt,
            nonce: Nonce(nonce),
            connection,
            role,
            connections,
            bulk,
            lanes,
            page_size,
            features,
        })
    })
}

fn state() -> impl Strategy<Value = Message> {
    let phase = prop_oneof![Just(StatePhase::Setup), Just(StatePhase::Device)];
    (phase, "\\PC{1,60}", any::<u32>(), any::<bool>(), vec(any::<u8>(), 0..300)).prop_map(
        |(phase, name, version, end, bytes)| {
            Message::State(StateChunk { phase, name: name.into(), version, end, bytes: Bytes::from(bytes) })
        },
    )
}

fn block() -> impl Strategy<Value = BlockInfo> {
    ("\\PC{1,60}", any::<u64>(), any::<u64>(), any::<u64>(), any::<bool>()).prop_map(
        |(id, length, guest_address, backing_page_size, ignored)| BlockInfo {
            id: id.into(),
            length,
            guest_address,
            backing_page_size,
            ignored,
        },
    )
}

fn tally() -> impl Strategy<Value = Message> {
    let kind = prop_oneof![Just(RoundKind::Live), Just(RoundKind::Paused), Just(RoundKind::Final)];
    (1..=u32::MAX, kind, proptest::array::uniform11(0..=MAX_COUNT)).prop_map(|(round, kind, counts)| {
        let [batches, pages, zero, raw, compressed, xbzrle, unchanged, misses, overflows, bytes_in, bytes_out] = counts;
        Message::RoundComplete(RoundTally {
            round,
            kind,
            batches,
            pages: PageTally {
                all: pages,
                zero,
                raw,
                compressed,
                xbzrle,
                unchanged,
                xbzrle_misses: misses,
                xbzrle_overflows: overflows,
                bytes_in,
                bytes_out,
            },
        })
    })
}

fn digests() -> impl Strategy<Value = Message> {
    let mask = prop_oneof![3 => Just(0), 1 => any::<u64>()];
    let digest = (any::<u128>(), proptest::array::uniform8(mask));
    let digest = digest.prop_map(|(hash, left_out)| StretchDigest { hash, left_out });
    (0..1024u32, 0..1u64 << 31, vec(digest, 1..40)).prop_map(|(block, first, stretches)| Message::Digests {
        block,
        first,
        stretches,
    })
}

fn bitmap_part() -> impl Strategy<Value = BitmapPart> {
    let runs = vec((1..1_000_u32, any::<u64>()), 1..40);
    (0..1024u32, 0..1u32 << 31, runs).prop_map(|(block, first, runs)| {
        let runs = runs.into_iter().map(|(extents, mask)| Run { extents, mask }).collect();
        BitmapPart { block, first, runs }
    })
}

fn message() -> impl Strategy<Value = Message> {
    let first = (0..1024u32, 0..1u64 << 37).prop_map(|(block, page)| PageAt { block, page });
    prop_oneof![
        hello(),
        state(),
        vec(block(), 1..20).prop_map(Message::Blocks),
        tally(),
        any::<u64>().prop_map(Message::Checkpoint),
        Just(Message::DirectEnds),
        Just(Message::LaneEnds),
        digests(),
        run_state().prop_map(Message::Go),
        "\\PC{0,200}".prop_map(|why| Message::Abort(why.into())),
        (run_state(), any::<u64>()).prop_map(|(run_state, frames)| Message::End { run_state, frames }),
        (any::<[u8; 32]>(), any::<u64>())
            .prop_map(|(secret, waits_ms)| Message::Secret { secret: secret.into(), waits_ms }),
        any::<[u8; 32]>().prop_map(|proof| Message::Proof(Proof(proof))),
        Just(Message::Settled),
        any::<u64>().prop_map(|waits_ms| Message::Accept { waits_ms }),
        (any::<[u8; 32]>(), any::<[u8; 32]>())
            .prop_map(|(nonce, proof)| Message::Challenge { nonce: Nonce(nonce), proof: Proof(proof) }),
        (any::<bool>(), vec(any::<u64>(), 0..=64))
            .prop_map(|(started, frames)| Message::Resume(Resume { started, frames })),
        bitmap_part().prop_map(Message::Received),
        bitmap_part().prop_map(Message::Missing),
        Just(Message::Discard),
        Just(Message::Discarded),
        first.clone().prop_map(Message::PageRequest),
        Just(Message::Complete),
        Just(Message::Ready),
        (any::<u64>(), vec(any::<u64>(), 0..=64))
            .prop_map(|(bytes, frames)| Message::Progress(Progress { bytes, frames })),
        (first, vec(any::<u64>(), 1..=512)).prop_map(|(first, hashes)| Message::PageHashes { first, hashes }),
        any::<bool>().prop_map(|verified| Message::Loaded { verified }),
        Just(Message::Running),
        "\\PC{0,200}".prop_map(|why| Message::Refused(why.into())),
        "\\PC{0,200}".prop_map(|why| Message::StartFailed(why.into())),
        vec(("\\PC{1,20}", any::<u64>()), 0..=64).prop_map(|figures| {
            Message::Heartbeat(figures.into_iter().map(|(name, value)| Figure { name: name.into(), value }).collect())
        }),
    ]
}

/// Puts the pages of the mask into the group of a compressed page before them, as far as one may grow.
fn group(pages: &mut [(PageEncoding, u32)], page_size: PageSize, mask: u64) {
    let mut room = 0;
    for (index, page) in pages.iter_mut().enumerate() {
        if mask >> index & 1 == 1 && room > 0 {
            *page = (PageEncoding::Grouped, 0);
            room -= 1;
        } else if page.0.is_codec() {
            room = group_pages(page_size) - 1;
        }
    }
}

/// A layout of one block with a partial last extent, and any frame for it.
fn pages() -> impl Strategy<Value = (Layout, PagesHead)> {
    let block = |length| BlockInfo::new("ram", length);
    (page_size(), 1..300u64, any::<[u64; 3]>(), 1..=u32::MAX, vec((0..5u8, any::<u32>()), 64), any::<u64>()).prop_map(
        move |(page_size, pages, [extent, mask, zero], round, sizes, grouped)| {
            let bytes = u32::try_from(page_size.bytes()).unwrap();
            let layout = Layout::new(page_size, vec![block(pages * u64::from(bytes))]).unwrap();
            let at = ExtentAt { block: 0, extent: u32::try_from(extent % pages.div_ceil(64)).unwrap() };
            let mask = mask & layout.valid_mask(at);
            let size = |(encoding, size)| match encoding {
                0 => (PageEncoding::Raw, bytes),
                1 => (PageEncoding::Snap, size % (bytes - 1) + 1),
                2 => (PageEncoding::Lz4, size % (bytes - 1) + 1),
                3 => (PageEncoding::Zstd, size % (bytes - 1) + 1),
                _ => (PageEncoding::Xbzrle, size % bytes + 1),
            };
            let present = (mask & !zero).count_ones() as usize;
            let mut pages: Vec<_> = sizes.into_iter().map(size).take(present).collect();
            group(&mut pages, page_size, grouped);
            (layout, PagesHead { at, round, mask, zero: mask & zero, payload_hash: extent, pages })
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn every_message_decodes_to_itself(message in message()) {
        let frame = message.encode(0);
        let (head, body) = frame.split_first_chunk::<HEAD_BYTES>().unwrap();
        let head = FrameHead::parse(head, PageSize::DEFAULT).unwrap();
        prop_assert_eq!(head, FrameHead::new(message.kind(), 0, u32::try_from(body.len()).unwrap()));
        prop_assert_eq!(Message::decode(message.kind(), body).unwrap(), message);
    }

    #[test]
    fn every_pages_head_parses_to_itself((layout, head) in pages(), lane in 0..MAX_LANES) {
        let bytes = head.to_bytes(lane);
        let (frame, body) = bytes.split_first_chunk::<HEAD_BYTES>().unwrap();
        let frame = FrameHead::parse(frame, layout.page_size()).unwrap();
        prop_assert_eq!((frame.kind, frame.lane), (Kind::Pages as u8, lane));
        prop_assert_eq!(frame.length as usize, body.len() + head.payload_bytes());
        prop_assert_eq!(PagesHead::parse(body, frame.length, &layout).unwrap(), head);
    }
}

#[test]
fn a_stream_of_all_kinds_is_read_back() {
    let (stream, starts) = samples::stream();
    let mut reader = FrameReader::new(&stream[..], "sample".into(), PageSize::DEFAULT);
    let (mut messages, mut offsets) = (vec![], vec![]);
    while let Some(incoming) = block_on(reader.next()).unwrap() {
        offsets.push(usize::try_from(reader.offset()).unwrap());
        match incoming {
            Incoming::Message { lane, message } => {
                assert_eq!(lane, 0);
                messages.push(message);
            }
            Incoming::Pages(frame) => {
                let head = samples::parse(&frame).unwrap();
                let mut payload = vec![0; frame.payload_bytes()];
                block_on(reader.read_payload(&mut payload)).unwrap();
                samples::check_payload(&head, &payload).unwrap();
                let expected = match frame.lane {
                    0 => samples::grouped_pages(),
                    1 => (samples::zero_pages(), vec![]),
                    _ => samples::pages(),
                };
                assert_eq!((head, payload), expected);
            }
        }
    }
    assert_eq!((messages, offsets), (samples::messages(), starts.clone()));
    assert_eq!((reader.bytes_read(), reader.frames()), (stream.len() as u64, starts.len() as u64));
}
