//! One frame of each kind, and strategies for any of them.

use bytes::Bytes;

use crate::batch::{PageEncoding, PageFault, RoundKind};
use crate::geometry::{BlockInfo, ExtentAt, Layout, PageAt, PageSize};
use crate::tally::{PageTally, RoundTally};
use crate::wire::messages::{
    BitmapPart, Figure, Progress, Resume, Run, RunState, StateChunk, StatePhase, StretchDigest,
};
use crate::wire::{Features, Hello, Message, Nonce, PagesFrame, PagesHead, Proof, SessionId, WireError};

/// Two blocks: 2 extents and 1 page, and a few bytes.
pub(super) fn layout() -> Layout {
    Layout::new(PageSize::DEFAULT, vec![BlockInfo::new("ram", 129 * 4096), BlockInfo::new("rom", 700)]).unwrap()
}

/// The head of a frame of this layout.
pub(super) fn parse(frame: &PagesFrame) -> Result<PagesHead, WireError> {
    PagesHead::parse(&frame.body, frame.frame_length, &layout())
}

/// The verdict of a loader on the payload of a frame with hashes.
pub(super) fn check_payload(head: &PagesHead, payload: &[u8]) -> Result<(), PageFault> {
    head.clone().into_arrived(true, 0).check_payload(payload, &mut Vec::new())
}

pub(super) fn hello() -> Hello {
    let features = Features { checksum: true, lz4: true, xbzrle: true, ..Features::default() };
    let session = SessionId(*b"0123456789abcdef");
    Hello { connections: 3, ..Hello::bulk(session, 1, 2, 3, PageSize::DEFAULT, features.to_list()) }
}

pub(super) fn tally() -> RoundTally {
    RoundTally {
        round: 2,
        kind: RoundKind::Final,
        batches: 3,
        pages: PageTally {
            all: 15,
            zero: 1,
            raw: 2,
            compressed: 3,
            xbzrle: 4,
            unchanged: 5,
            xbzrle_misses: 6,
            xbzrle_overflows: 7,
            bytes_in: 61440,
            bytes_out: 9000,
        },
    }
}

/// A message of each kind, in the order of their numbers.
pub(super) fn messages() -> Vec<Message> {
    let chunk = StateChunk {
        phase: StatePhase::Device,
        name: "cpu".into(),
        version: 7,
        end: true,
        bytes: Bytes::from_static(b"state"),
    };
    let block = BlockInfo { guest_address: 1 << 32, backing_page_size: 2 << 20, ..BlockInfo::new("ram", 129 * 4096) };
    let all = StretchDigest { hash: 1 << 100 | 2, left_out: [0; 8] };
    let some = StretchDigest { hash: 3, left_out: [4, 0, 5, 0, 0, 0, 0, 0] };
    vec![
        Message::Hello(hello()),
        Message::State(chunk),
        Message::Blocks(vec![block]),
        Message::RoundComplete(tally()),
        Message::LaneEnds,
        Message::Digests { block: 1, first: 6, stretches: vec![all, some] },
        Message::Go(RunState::Paused),
        Message::Abort("disk full".into()),
        Message::End { run_state: RunState::Running, frames: 17 },
        Message::Checkpoint(9),
        Message::DirectEnds,
        Message::Secret { secret: [3; 32].into(), waits_ms: 60_000 },
        Message::Proof(Proof([4; 32])),
        Message::Settled,
        Message::Missing(BitmapPart { block: 1, first: 2, runs: vec![Run { extents: 3, mask: 5 }] }),
        Message::Discard,
        Message::Accept { waits_ms: 300_000 },
        Message::Ready,
        Message::Progress(Progress { bytes: 1 << 33, frames: vec![8, 9] }),
        Message::PageHashes { first: PageAt { block: 1, page: 512 }, hashes: vec![10, 11] },
        Message::Loaded { verified: true },
        Message::Running,
        Message::Refused("blocks differ".into()),
        Message::StartFailed("no /dev/kvm".into()),
        Message::Challenge { nonce: Nonce([5; 32]), proof: Proof([6; 32]) },
        Message::Resume(Resume { started: true, frames: vec![8, 9] }),
        Message::Received(BitmapPart { block: 1, first: 2, runs: vec![Run { extents: 3, mask: 5 }] }),
        Message::Discarded,
        Message::PageRequest(PageAt { block: 1, page: 513 }),
        Message::Complete,
        Message::Heartbeat(vec![Figure { name: "loader.busy".into(), value: 12 }]),
    ]
}

/// A Pages frame with two groups, the first of which continues after a raw page, and its payload.
pub(super) fn grouped_pages() -> (PagesHead, Vec<u8>) {
    use PageEncoding::{Grouped, Lz4, Raw, Zstd};
    let payload: Vec<u8> = (0..5000 + 4096 + 300).map(|i| (i * 11 % 241) as u8).collect();
    let head = PagesHead {
        at: ExtentAt { block: 0, extent: 0 },
        round: 1,
        mask: 0x6e,
        zero: 0,
        payload_hash: 0,
        pages: vec![(Lz4, 5000), (Raw, 4096), (Grouped, 0), (Zstd, 300), (Grouped, 0)],
    };
    (head.with_hash_of(&payload), payload)
}

/// A Pages frame with a zero page, a raw, a compressed and a delta, and its payload.
pub(super) fn pages() -> (PagesHead, Vec<u8>) {
    let payload: Vec<u8> = (0..4096 + 100 + 9).map(|i| (i * 7 % 251) as u8).collect();
    let head = PagesHead {
        at: ExtentAt { block: 0, extent: 1 },
        round: 2,
        mask: 0x8000_0000_0000_0017,
        zero: 0x12,
        payload_hash: 0,
        pages: vec![(PageEncoding::Raw, 4096), (PageEncoding::Lz4, 100), (PageEncoding::Xbzrle, 9)],
    };
    (head.with_hash_of(&payload), payload)
}

/// A frame that brings only zero pages.
pub(super) fn zero_pages() -> PagesHead {
    let at = ExtentAt { block: 1, extent: 0 };
    PagesHead { at, round: 1, mask: 1, zero: 1, payload_hash: 0, pages: vec![] }
}

/// Frames of all kinds one after another, and where each begins.
pub(super) fn stream() -> (Vec<u8>, Vec<usize>) {
    let [(head, payload), (grouped, group)] = [pages(), grouped_pages()];
    let mut frames: Vec<Vec<u8>> = messages().iter().map(|message| message.encode(0).to_vec()).collect();
    frames.insert(3, zero_pages().to_bytes(1).to_vec());
    frames.insert(3, [&head.to_bytes(2)[..], &payload].concat());
    frames.insert(3, [&grouped.to_bytes(0)[..], &group].concat());
    let starts = frames.iter().scan(0, |start, frame| Some(std::mem::replace(start, *start + frame.len()))).collect();
    (frames.concat(), starts)
}
