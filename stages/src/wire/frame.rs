//! The head of every frame, and the checks that come before anything else is used. Its box is in [`super`];
//! the seed of its checksum is the bytes `mferry-1` as a little-endian number.
//!
//! The head, the checksum behind a body's fields and the first ten bytes of a Hello are the same in every version of the
//! protocol, so that a reader can name the version of a peer that it does not understand.

use xxhash_rust::xxh3::xxh3_64_with_seed;

pub use super::error::{FrameError, WireError};
pub use super::kind::Kind;
use crate::geometry::{MAX_LANES, PageSize};

/// Bytes of a frame's head.
pub const HEAD_BYTES: usize = 16;
/// The most bytes that follow the head of a frame whose kind is unknown.
pub const MAX_UNKNOWN_BYTES: u32 = 1 << 20;

/// Seed of the head's checksum: a run of zeros, or of anything else, is no head.
const HEAD_SEED: u64 = u64::from_le_bytes(*b"mferry-1");
/// The only flag.
const MUST_UNDERSTAND: u8 = 1;

/// The head of a frame, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHead {
    /// The kind's byte: not every byte is a [`Kind`].
    pub kind: u8,
    /// Whether a reader that does not know the kind must fail.
    pub must_understand: bool,
    /// The lane; 0 for control frames.
    pub lane: u16,
    /// Bytes that follow the head.
    pub length: u32,
}

impl FrameHead {
    /// The head of a frame of this version.
    ///
    /// # Panics
    /// If a control frame is given a lane other than 0, or `lane` is not below [`MAX_LANES`].
    #[must_use]
    pub fn new(kind: Kind, lane: u16, length: u32) -> Self {
        check_lane(kind, lane).unwrap_or_else(|error| panic!("{error}"));
        Self { kind: kind as u8, must_understand: kind.must_understand(), lane, length }
    }

    /// Reads a head: checksum first, then the fields (unknown flags are refused), then the length against what the kind
    /// may have at most, and the lane. A head that is returned is of a known kind, or of one that can be skipped.
    ///
    /// # Errors
    /// [`WireError`] for damage, a kind that must be understood and is not known, a length or a lane out of bounds.
    pub fn parse(bytes: &[u8; HEAD_BYTES], page_size: PageSize) -> Result<Self, WireError> {
        let [kind, flags, lane0, lane1, l0, l1, l2, l3, ..] = *bytes;
        if *bytes != seal([kind, flags, lane0, lane1, l0, l1, l2, l3]) {
            return Err(WireError::HeadChecksum);
        }
        if flags & !MUST_UNDERSTAND != 0 {
            return Err(WireError::UnknownFlags { flags: flags & !MUST_UNDERSTAND });
        }
        let (lane, length) = (u16::from_le_bytes([lane0, lane1]), u32::from_le_bytes([l0, l1, l2, l3]));
        let head = Self { kind, must_understand: flags & MUST_UNDERSTAND != 0, lane, length };
        head.check(page_size)?;
        Ok(head)
    }

    /// Are these the first bytes of a TLS handshake or alert? Their second byte is no flag of a head.
    #[must_use]
    pub fn is_tls(bytes: &[u8; HEAD_BYTES]) -> bool {
        matches!(bytes, [0x15 | 0x16, 3, 0..=4, ..])
    }

    /// The head's bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEAD_BYTES] {
        let [lane0, lane1] = self.lane.to_le_bytes();
        let [l0, l1, l2, l3] = self.length.to_le_bytes();
        seal([self.kind, u8::from(self.must_understand), lane0, lane1, l0, l1, l2, l3])
    }

    fn check(self, page_size: PageSize) -> Result<(), WireError> {
        let known = Kind::from_u8(self.kind);
        if known.is_none() && self.must_understand {
            return Err(WireError::UnknownKind { kind: self.kind });
        }
        let most = known.map_or(MAX_UNKNOWN_BYTES, |kind| kind.max_bytes(page_size));
        if self.length > most {
            return Err(WireError::TooLong { kind: self.kind, length: self.length, most });
        }
        known.map_or(Ok(()), |kind| check_lane(kind, self.lane))
    }
}

fn check_lane(kind: Kind, lane: u16) -> Result<(), WireError> {
    match (kind.is_of_lane(), lane) {
        (true, MAX_LANES..) => Err(WireError::Lane { kind, lane }),
        (false, 1..) => Err(WireError::ControlLane { kind, lane }),
        _ => Ok(()),
    }
}

/// Puts the checksum behind a head's fields.
pub(super) fn seal(fields: [u8; 8]) -> [u8; HEAD_BYTES] {
    let checksum = xxh3_64_with_seed(&fields, HEAD_SEED);
    let mut bytes = [0; HEAD_BYTES];
    bytes[..8].copy_from_slice(&fields);
    bytes[8..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}
