//! A stream that is cut short or has one bit wrong is an error at the frame that it happened in, and never another value.

use futures::executor::block_on;

use super::samples;
use crate::geometry::PageSize;
use crate::wire::{FrameError, FrameReader, Incoming, ReadError};

/// Why a frame is not taken.
#[derive(Debug)]
enum Refusal {
    Read(ReadError),
    /// The payload of the frame that began here is damaged.
    Payload(u64),
}

impl From<ReadError> for Refusal {
    fn from(error: ReadError) -> Self {
        Self::Read(error)
    }
}

/// What a destination would take from a stream: every frame with its payload, and why it stopped.
fn read_all(stream: &[u8]) -> (Vec<(Incoming, Vec<u8>)>, Option<Refusal>) {
    let mut reader = FrameReader::new(stream, "sample".into(), PageSize::DEFAULT);
    let mut frames = vec![];
    loop {
        match block_on(read_one(&mut reader)) {
            Ok(Some(frame)) => frames.push(frame),
            Ok(None) => return (frames, None),
            Err(error) => return (frames, Some(error)),
        }
    }
}

async fn read_one(reader: &mut FrameReader<&[u8]>) -> Result<Option<(Incoming, Vec<u8>)>, Refusal> {
    let Some(incoming) = reader.next().await? else { return Ok(None) };
    let mut payload = vec![];
    if let Incoming::Pages(frame) = &incoming {
        let head = samples::parse(frame).map_err(|error| ReadError::from(reader.fail(error)))?;
        payload.resize(frame.payload_bytes(), 0);
        reader.read_payload(&mut payload).await?;
        samples::check_payload(&head, &payload).map_err(|_| Refusal::Payload(frame.offset))?;
    }
    Ok(Some((incoming, payload)))
}

/// The number of the frame that a byte of the stream is in, and where it begins.
fn frame_of(byte: usize, starts: &[usize]) -> (usize, u64) {
    let index = starts.partition_point(|&start| start <= byte) - 1;
    (index, starts[index] as u64)
}

#[test]
fn a_stream_cut_anywhere_ends_between_frames_or_is_truncated() {
    let (stream, starts) = samples::stream();
    let (whole, _) = read_all(&stream);
    for length in 0..=stream.len() {
        let (frames, error) = read_all(&stream[..length]);
        assert_eq!(frames, whole[..frames.len()], "cut at {length}");
        if length == stream.len() || starts.contains(&length) {
            assert!(error.is_none(), "cut at {length}, between frames: {error:?}");
            continue;
        }
        let (index, begin) = frame_of(length, &starts);
        assert_eq!(frames.len(), index, "cut at {length}");
        match error {
            Some(Refusal::Read(ReadError::Truncated { offset, end, .. })) => {
                assert_eq!((offset, end), (begin, length as u64))
            }
            other => panic!("cut at {length}: {other:?}"),
        }
    }
}

#[test]
fn every_flipped_bit_is_an_error_of_its_frame() {
    let (mut stream, starts) = samples::stream();
    let (whole, _) = read_all(&stream);
    for bit in 0..stream.len() * 8 {
        stream[bit / 8] ^= 1 << (bit % 8);
        let (frames, error) = read_all(&stream);
        let (index, begin) = frame_of(bit / 8, &starts);
        assert_eq!(frames, whole[..index], "bit {bit}");
        match error {
            Some(Refusal::Read(ReadError::Frame(FrameError { offset, .. })) | Refusal::Payload(offset)) => {
                assert_eq!(offset, begin, "bit {bit}");
            }
            other => panic!("bit {bit}: {other:?}"),
        }
        stream[bit / 8] ^= 1 << (bit % 8);
    }
}
