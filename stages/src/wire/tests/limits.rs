//! The largest frame of each kind passes, and its bound is not a byte too wide.

use bytes::Bytes;

use crate::batch::PageEncoding;
use crate::geometry::{BlockInfo, ExtentAt, Layout, MAX_BLOCK_ID, MAX_BLOCKS, MAX_LANES, PageAt, PageSize};
use crate::untrusted::Untrusted;
use crate::wire::messages::{
    Figure, MAX_DIGESTS, MAX_FIGURE_NAME, MAX_FIGURES, MAX_REASON, MAX_RUNS, MAX_STATE_CHUNK, MAX_STRETCH_PAGES,
    Progress, Run, RunState, StateChunk, StatePhase, StretchDigest,
};
use crate::wire::{FrameHead, HEAD_BYTES, Kind, Message, PagesHead};

use super::samples;

fn name(index: usize, bytes: usize) -> Untrusted {
    format!("{index:0bytes$}").into()
}

fn largest() -> Vec<Message> {
    let bytes = Bytes::from(vec![1; MAX_STATE_CHUNK]);
    let chunk = StateChunk { phase: StatePhase::Setup, name: name(0, 255), version: 1, end: false, bytes };
    let block = |index| BlockInfo {
        id: name(index, MAX_BLOCK_ID),
        length: 1,
        guest_address: 2,
        backing_page_size: 3,
        ignored: true,
    };
    let digest = StretchDigest { hash: 1, left_out: [1; 8] };
    let figure = |index| Figure { name: name(index, MAX_FIGURE_NAME), value: 1 };
    let reason = "x".repeat(MAX_REASON);
    let mut messages = samples::messages();
    messages.retain(|message| !matches!(message.kind(), Kind::Hello));
    for message in &mut messages {
        match message {
            Message::State(state) => *state = chunk.clone(),
            Message::Blocks(blocks) => *blocks = (0..MAX_BLOCKS).map(block).collect(),
            Message::Digests { stretches, .. } => *stretches = vec![digest; MAX_DIGESTS],
            Message::Progress(progress) => *progress = Progress { bytes: 1, frames: vec![2; MAX_LANES.into()] },
            Message::Resume(resume) => resume.frames = vec![2; MAX_LANES.into()],
            Message::Missing(part) | Message::Received(part) => part.runs = vec![Run { extents: 3, mask: 1 }; MAX_RUNS],
            Message::PageHashes { hashes, .. } => *hashes = vec![1; MAX_STRETCH_PAGES],
            Message::Heartbeat(figures) => *figures = (0..MAX_FIGURES).map(figure).collect(),
            Message::Abort(text) | Message::Refused(text) | Message::StartFailed(text) => {
                *text = reason.as_str().into()
            }
            _ => {}
        }
    }
    messages
}

#[test]
fn the_largest_message_of_each_kind_fills_its_bound() {
    for message in largest() {
        let frame = message.encode(0);
        let (head, body) = frame.split_first_chunk::<HEAD_BYTES>().unwrap();
        let head = FrameHead::parse(head, PageSize::DEFAULT).unwrap();
        assert_eq!(head.length, message.kind().max_bytes(PageSize::DEFAULT), "{}", message.kind());
        assert_eq!(Message::decode(message.kind(), body).unwrap(), message);
    }
}

#[test]
fn the_largest_hello_fits() {
    let mut hello = samples::hello();
    hello.features = (0..64).map(|index| name(index, 64)).collect();
    let frame = Message::Hello(hello.clone()).encode(0);
    assert!(frame.len() <= HEAD_BYTES + Kind::Hello.max_bytes(PageSize::DEFAULT) as usize);
    assert_eq!(Message::decode(Kind::Hello, &frame[HEAD_BYTES..]).unwrap(), Message::Hello(hello));
}

#[test]
fn an_extent_of_raw_pages_fills_the_bound_of_pages() {
    for page_size in [4096, 65536].map(|bytes| PageSize::new(bytes).unwrap()) {
        let length = page_size.extent_bytes() as u64;
        let block = BlockInfo::new("ram", length);
        let layout = Layout::new(page_size, vec![block]).unwrap();
        let pages = vec![(PageEncoding::Raw, u32::try_from(page_size.bytes()).unwrap()); 64];
        let at = ExtentAt { block: 0, extent: 0 };
        let head = PagesHead { at, round: 1, mask: u64::MAX, zero: 0, payload_hash: 1, pages };
        let bytes = head.to_bytes(MAX_LANES - 1);
        let frame = FrameHead::parse(bytes.first_chunk().unwrap(), page_size).unwrap();
        assert_eq!(frame.length, Kind::Pages.max_bytes(page_size));
        assert_eq!(PagesHead::parse(&bytes[HEAD_BYTES..], frame.length, &layout).unwrap(), head);
    }
}

#[test]
fn a_long_reason_is_cut_at_the_end_of_a_character() {
    let reason = format!("x{}", "é".repeat(MAX_REASON));
    let frame = Message::Abort(reason.as_str().into()).encode(0);
    let Ok(Message::Abort(cut)) = Message::decode(Kind::Abort, &frame[HEAD_BYTES..]) else { panic!("no Abort") };
    assert_eq!(cut.raw(), &reason[..MAX_REASON - 1]);
}

#[test]
#[should_panic(expected = "a list of 513 items")]
fn a_list_of_ours_that_is_too_long_is_an_assertion() {
    drop(Message::PageHashes { first: PageAt { block: 0, page: 0 }, hashes: vec![0; 513] }.encode(0));
}

#[test]
#[should_panic(expected = "the Go frame is on lane 1, control frames are on lane 0")]
fn a_control_frame_of_ours_on_a_lane_is_an_assertion() {
    drop(Message::Go(RunState::Running).encode(1));
}
