//! What is encoded decodes to the same value.

use futures::executor::block_on;

use super::samples;
use crate::geometry::PageSize;
use crate::wire::{FrameReader, Incoming};

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
                let head = reader.parse_pages(&frame, &samples::layout()).unwrap();
                let mut payload = vec![0; frame.payload_bytes()];
                block_on(reader.read_payload(&mut payload)).unwrap();
                head.check_payload(&payload).unwrap();
                let expected = if frame.lane == 2 { samples::pages() } else { (samples::zero_pages(), vec![]) };
                assert_eq!((head, payload), expected);
            }
        }
    }
    assert_eq!((messages, offsets), (samples::messages(), starts.clone()));
    assert_eq!((reader.bytes_read(), reader.frames()), (stream.len() as u64, starts.len() as u64));
}
