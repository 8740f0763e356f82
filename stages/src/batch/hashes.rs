//! Hashes of pages, and of the payloads that carry them.
//!
//! A payload's hash is made of the hashes of its parts, so that a raw page is hashed once: for its frame, and for the
//! [page hashes](crate::page_hashes) that verification compares.

use super::PageEncoding;
use crate::hash;

const HASH_BYTES: usize = size_of::<u64>();
/// The most parts of a payload: a page of an extent each.
const MOST_PARTS: usize = u64::BITS as usize;

/// The xxh3-64 of a page, or of the bytes that carry one or a group; never 0.
#[must_use]
pub fn page_hash(bytes: &[u8]) -> u64 {
    hash::xxh3_64(bytes).max(1)
}

/// The hash of a payload: the xxh3-64 of the [`page_hash`]es of its parts, little-endian, in their order. A part is the bytes of a raw
/// page, a delta or a group. Never 0.
///
/// # Panics
/// If there are more parts than an extent has pages.
pub fn payload_hash(parts: impl IntoIterator<Item = u64>) -> u64 {
    let mut bytes = [0; MOST_PARTS * HASH_BYTES];
    let mut filled = 0;
    for part in parts {
        bytes[filled..filled + HASH_BYTES].copy_from_slice(&part.to_le_bytes());
        filled += HASH_BYTES;
    }
    xxhash_rust::xxh3::xxh3_64(&bytes[..filled]).max(1)
}

/// The parts of a payload whose pages have these encodings and numbers of bytes, with their encodings.
///
/// # Panics
/// If the payload is shorter.
pub(crate) fn parts(
    pages: impl Iterator<Item = (PageEncoding, usize)>,
    mut payload: &[u8],
) -> impl Iterator<Item = (PageEncoding, &[u8])> {
    pages.filter(|(_, bytes)| *bytes > 0).map(move |(encoding, bytes)| {
        let (part, rest) = payload.split_at(bytes);
        payload = rest;
        (encoding, part)
    })
}
