//! The writing end of memferry's dialect, for one lane.

use std::ops::Range;

use bytes::Bytes;

use super::messages::Message;
use super::pages::PagesHead;
use crate::batch::{EncodedBatch, Mark, PageEncoding, page_hash, parts, payload_hash};
use crate::dialect::{Framed, Framer};
use crate::geometry::ExtentAt;

/// Makes Pages frames of batches, and a message of each mark. The payload is passed on as it is.
#[derive(Debug)]
pub struct WireFramer {
    /// Whether each payload carries its xxh3-64.
    checksum: bool,
    /// The head of the frame in progress; its list of pages is reused.
    head: PagesHead,
}

impl WireFramer {
    /// The framer of one lane. `checksum`: whether each payload carries its hash, as the `payload-xxh3` feature has it.
    #[must_use]
    pub fn new(checksum: bool) -> Self {
        let at = ExtentAt { block: 0, extent: 0 };
        let head = PagesHead { at, round: 0, mask: 0, zero: 0, payload_hash: 0, pages: Vec::with_capacity(64) };
        Self { checksum, head }
    }
}

/// The hash of a payload. Pages that are raw, and hashed already, are not read again.
fn hash_of(payload: &[u8], pages: &[(PageEncoding, Range<u32>)], hashes: &[u64]) -> u64 {
    let listed = pages.iter().map(|(encoding, range)| (*encoding, range.len()));
    let mut known = pages.iter().zip(hashes).filter(|((_, range), _)| !range.is_empty()).map(|(_, hash)| *hash);
    payload_hash(parts(listed, payload).map(|(encoding, bytes)| match (known.next(), encoding) {
        (Some(hash), PageEncoding::Raw) => hash,
        _ => page_hash(bytes),
    }))
}

impl Framer for WireFramer {
    fn batch(&mut self, lane: u16, encoded: EncodedBatch) -> Framed {
        let EncodedBatch { batch, zero, pages, payload, hashes } = encoded;
        self.head.at = batch.at;
        self.head.round = batch.round;
        self.head.mask = batch.mask;
        self.head.zero = zero;
        self.head.payload_hash = match &payload {
            Some(payload) if self.checksum => hash_of(payload, &pages, &hashes),
            _ => 0,
        };
        self.head.pages.clear();
        self.head.pages.extend(pages.into_iter().map(|(encoding, range)| (encoding, range.end - range.start)));
        Framed { head: self.head.to_bytes(lane), payload }
    }

    fn mark(&mut self, lane: u16, mark: &Mark) -> Bytes {
        Message::from(*mark).encode(lane)
    }
}
