//! Invalid fields under valid checksums, as from a hostile peer. Accepted messages are within their bounds
//! and have the only form that memferry writes; nothing panics, hangs or grows.

use futures::executor::block_on;
use proptest::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

use super::samples;
use crate::geometry::{MAX_LANES, PageSize};
use crate::wire::frame::seal;
use crate::wire::{FrameHead, FrameReader, HEAD_BYTES, Incoming, Kind, Message, PagesHead};

/// Bytes that are likely to hurt.
fn byte() -> impl Strategy<Value = u8> {
    prop_oneof![Just(0), Just(1), Just(0x10), Just(0x40), Just(0x7f), Just(0x80), Just(0xff), any::<u8>()]
}

/// Up to eight bytes to overwrite, and how many to cut from the end or to put behind it.
fn harm() -> impl Strategy<Value = (Vec<(prop::sample::Index, u8)>, i8)> {
    let length = prop_oneof![4 => Just(0), 1 => any::<i8>()];
    (prop::collection::vec((any::<prop::sample::Index>(), byte()), 0..8), length)
}

/// Harms the fields of a body and puts the right checksum behind them.
fn harmed(body: &[u8], (bytes, length): (Vec<(prop::sample::Index, u8)>, i8)) -> Vec<u8> {
    let mut fields = body[..body.len() - 8].to_vec();
    fields.resize(fields.len().saturating_add_signed(length.into()), 0x20);
    if !fields.is_empty() {
        bytes.into_iter().for_each(|(index, byte)| *index.get_mut(&mut fields) = byte);
    }
    sealed(fields)
}

fn sealed(mut fields: Vec<u8>) -> Vec<u8> {
    let checksum = xxh3_64(&fields);
    fields.extend(checksum.to_le_bytes());
    fields
}

/// Bytes that a message keeps on the heap, its own allocations only.
fn heap_bytes(message: &Message) -> usize {
    match message {
        Message::Hello(hello) => hello.features.iter().map(|name| size_of_val(name) + name.len()).sum(),
        Message::State(chunk) => chunk.name.len() + chunk.bytes.len(),
        Message::Blocks(blocks) => blocks.iter().map(|block| size_of_val(block) + block.id.len()).sum(),
        Message::Digests { stretches, .. } => size_of_val(&stretches[..]),
        Message::Progress(progress) => size_of_val(&progress.frames[..]),
        Message::PageHashes { hashes, .. } => size_of_val(&hashes[..]),
        Message::Heartbeat(figures) => figures.iter().map(|figure| size_of_val(figure) + figure.name.len()).sum(),
        Message::Abort(reason) | Message::Refused(reason) | Message::StartFailed(reason) => reason.len(),
        _ => 0,
    }
}

fn kind() -> impl Strategy<Value = Kind> {
    let messages = Kind::ALL.into_iter().filter(|&kind| kind != Kind::Pages);
    prop::sample::select(messages.collect::<Vec<_>>())
}

/// What is accepted is what we would write, and holds no more than a small multiple of its bytes: 12 at most, a feature of
/// three bytes being one of 32 and its name.
fn check_accepted(message: &Message, body: &[u8]) -> Result<(), TestCaseError> {
    prop_assert_eq!(&message.encode(0)[HEAD_BYTES..], body);
    prop_assert!(heap_bytes(message) <= 12 * body.len(), "{} bytes of {}", heap_bytes(message), body.len());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    #[test]
    fn hostile_heads(fields: [u8; 8], kind in prop_oneof![1..45u8, any::<u8>()], flags in prop_oneof![0..2u8, any::<u8>()],
                     short: bool, tail in prop::collection::vec(any::<u8>(), 0..80)) {
        let [_, _, lane0, lane1, l0, l1, l2, l3] = fields;
        let fields = if short { [kind, flags, 0, 0, l0, 0, 0, 0] } else { [kind, flags, lane0, lane1, l0, l1, l2, l3] };
        let bytes = seal(fields);
        if let Ok(head) = FrameHead::parse(&bytes, PageSize::DEFAULT) {
            prop_assert_eq!(head.to_bytes(), bytes);
            match Kind::from_u8(head.kind) {
                Some(kind) => prop_assert!(head.length <= kind.max_bytes(PageSize::DEFAULT) && head.lane < MAX_LANES),
                None => prop_assert!(head.length <= 1 << 20 && !head.must_understand),
            }
        }
        let stream = [&bytes[..], &tail].concat();
        let mut reader = FrameReader::new(&stream[..], "hostile".into(), PageSize::DEFAULT);
        // No body of a known kind has the right checksum by chance; an unknown one may be skipped.
        while let Ok(Some(incoming)) = block_on(reader.next()) {
            let Incoming::Pages(frame) = incoming else { panic!("{incoming:?} was accepted") };
            prop_assert!(samples::parse(&frame).is_err());
            if block_on(reader.skip_payload()).is_err() { break }
        }
        prop_assert!(reader.bytes_read() <= stream.len() as u64);
        prop_assert!(reader.held_bytes() <= (1 << 20) + 512);
    }

    #[test]
    fn hostile_fields(which in any::<prop::sample::Index>(), harm in harm()) {
        let message = which.get(&samples::messages()).clone();
        let body = harmed(&message.encode(0)[HEAD_BYTES..], harm);
        if let Ok(accepted) = Message::decode(message.kind(), &body) {
            check_accepted(&accepted, &body)?;
        }
    }

    #[test]
    fn hostile_noise(kind in kind(), fields in prop::collection::vec(byte(), 0..200)) {
        let body = sealed(fields);
        if let Ok(accepted) = Message::decode(kind, &body) {
            check_accepted(&accepted, &body)?;
        }
    }

    #[test]
    fn hostile_pages(harm in harm(), zero: bool, length_off in prop_oneof![3 => Just(0), 1 => -300..300i32]) {
        let (head, payload) = if zero { (samples::zero_pages(), vec![]) } else { samples::pages() };
        let body = harmed(&head.to_bytes(2)[HEAD_BYTES..], harm);
        let length = u32::try_from(body.len() + payload.len()).unwrap().saturating_add_signed(length_off);
        let layout = samples::layout();
        if let Ok(accepted) = PagesHead::parse(&body, length, &layout) {
            prop_assert_eq!(&accepted.to_bytes(2)[HEAD_BYTES..], &body[..]);
            prop_assert_eq!(length as usize, body.len() + accepted.payload_bytes());
            prop_assert_eq!(accepted.mask & !layout.valid_mask(accepted.at), 0);
        }
    }
}
