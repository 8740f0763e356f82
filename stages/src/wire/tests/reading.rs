//! The reader's place in the stream, whatever the pieces that the bytes come in.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::executor::block_on;
use tokio::io::{AsyncRead, ReadBuf};

use super::samples;
use crate::geometry::PageSize;
use crate::wire::frame::MAX_UNKNOWN_BYTES;
use crate::wire::{FrameHead, FrameReader, Incoming, Message, ReadError, WireError};

/// Gives at most `piece` bytes at a time, is not ready every other time, and ends with `error` if there is one.
struct Trickle<'a> {
    left: &'a [u8],
    piece: usize,
    ready: bool,
    error: Option<io::ErrorKind>,
}

impl AsyncRead for Trickle<'_> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.ready = !self.ready;
        if !self.ready {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if let (true, Some(kind)) = (self.left.is_empty(), self.error) {
            return Poll::Ready(Err(kind.into()));
        }
        let (piece, left) = self.left.split_at(self.piece.min(self.left.len()).min(buffer.remaining()));
        buffer.put_slice(piece);
        self.left = left;
        Poll::Ready(Ok(()))
    }
}

fn skippable(length: u32) -> Vec<u8> {
    let head = FrameHead { kind: 200, must_understand: false, lane: 9, length };
    [&head.to_bytes()[..], &vec![7; length as usize]].concat()
}

#[test]
fn frames_come_out_the_same_in_pieces_of_any_size() {
    let (stream, starts) = samples::stream();
    for piece in (1..40).chain([4095, 4096, 100_000]) {
        let trickle = Trickle { left: &stream, piece, ready: false, error: None };
        let mut reader = FrameReader::new(trickle, "sample".into(), PageSize::DEFAULT);
        let mut offsets = vec![];
        while let Some(incoming) = block_on(reader.next()).unwrap() {
            offsets.push(usize::try_from(reader.offset()).unwrap());
            if let Incoming::Pages(frame) = incoming {
                let mut payload = vec![0; frame.payload_bytes()];
                let (first, rest) = payload.split_at_mut(frame.payload_bytes() / 3);
                block_on(reader.read_payload(first)).unwrap();
                block_on(reader.read_payload(rest)).unwrap();
                let head = samples::parse(&frame).unwrap();
                samples::check_payload(&head, &payload).unwrap();
            }
        }
        assert_eq!(offsets, starts, "pieces of {piece}");
    }
}

#[test]
fn unknown_frames_that_need_not_be_understood_are_passed_over() {
    let ready = Message::Ready.encode(0);
    let stream = [&skippable(0), &skippable(100_000), &ready[..], &skippable(MAX_UNKNOWN_BYTES)].concat();
    let mut reader = FrameReader::new(&stream[..], "sample".into(), PageSize::DEFAULT);
    let message = Message::Ready;
    assert_eq!(block_on(reader.next()).unwrap(), Some(Incoming::Message { lane: 0, message }));
    assert_eq!((reader.offset(), reader.frames()), (100_032, 3));
    assert_eq!(block_on(reader.next()).unwrap(), None);
    assert_eq!((reader.bytes_read(), reader.frames()), (stream.len() as u64, 4));
    assert_eq!(reader.held_bytes(), 8, "what is passed over is not kept");
}

#[test]
fn an_unknown_frame_that_is_cut_short_is_truncated() {
    let stream = &skippable(100)[..50];
    let mut reader = FrameReader::new(stream, "sample".into(), PageSize::DEFAULT);
    let error = block_on(reader.next()).unwrap_err();
    assert_eq!(error.to_string(), "sample ends at byte 50, inside the frame that begins at byte 0");
}

#[test]
fn a_payload_can_be_skipped() {
    let (head, payload) = samples::pages();
    let stream = [&head.to_bytes(2)[..], &payload, &Message::Ready.encode(0)].concat();
    let mut reader = FrameReader::new(&stream[..], "sample".into(), PageSize::DEFAULT);
    let Some(Incoming::Pages(frame)) = block_on(reader.next()).unwrap() else { panic!("no Pages") };
    assert_eq!(frame.payload_bytes(), payload.len());
    block_on(reader.read_payload(&mut [0; 10])).unwrap();
    block_on(reader.skip_payload()).unwrap();
    assert!(matches!(block_on(reader.next()).unwrap(), Some(Incoming::Message { message: Message::Ready, .. })));
}

#[test]
#[should_panic(expected = "a payload was neither read nor skipped")]
fn a_payload_that_is_forgotten_is_an_assertion() {
    let (head, payload) = samples::pages();
    let stream = [&head.to_bytes(2)[..], &payload].concat();
    let mut reader = FrameReader::new(&stream[..], "sample".into(), PageSize::DEFAULT);
    block_on(reader.next()).unwrap();
    drop(block_on(reader.next()));
}

#[test]
fn an_error_of_the_transport_says_where() {
    let frame = Message::Abort("no".into()).encode(0);
    let left = &frame[..20];
    let error = Some(io::ErrorKind::ConnectionReset);
    let trickle = Trickle { left, piece: 7, ready: false, error };
    let mut reader = FrameReader::new(trickle, "connection 3".into(), PageSize::DEFAULT);
    let error = block_on(reader.next()).unwrap_err();
    assert!(matches!(error, ReadError::Io { offset: 20, .. }), "{error}");
    assert_eq!(error.to_string(), "cannot read connection 3 at byte 20: connection reset");
}

#[test]
fn the_page_size_of_hello_bounds_what_follows() {
    let big = PageSize::new(65536).unwrap();
    let head = FrameHead { kind: 4, must_understand: true, lane: 0, length: 1 << 20 }.to_bytes();
    let read = |page_size| {
        let mut reader = FrameReader::new(&head[..], "sample".into(), PageSize::DEFAULT);
        reader.set_page_size(page_size);
        block_on(reader.next()).unwrap_err()
    };
    assert!(matches!(read(PageSize::DEFAULT), ReadError::Frame(error)
        if error.error == WireError::TooLong { kind: 4, length: 1 << 20, most: 304 + (64 << 12) }));
    assert!(matches!(read(big), ReadError::Truncated { offset: 0, end: 16, .. }));
}

#[test]
fn a_fault_found_later_names_the_frame() {
    let stream = [Message::Ready.encode(0), Message::Running.encode(0)].concat();
    let mut reader = FrameReader::new(&stream[..], "connection 0".into(), PageSize::DEFAULT);
    block_on(reader.next()).unwrap();
    block_on(reader.next()).unwrap();
    let error = reader.fail(WireError::NoLane { lane: 7, lanes: 2 });
    assert_eq!(error.to_string(), "frame at byte 24 of connection 0: a frame of lane 7, there are 2 lanes");
}
