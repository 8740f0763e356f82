//! The head of every frame, and the checks that come before anything else is used. Its box is in [`super`];
//! the seed of its checksum is the bytes `mferry-1` as a little-endian number.
//!
//! The head, the checksum behind a body's fields and the first ten bytes of a Hello are the same in every version of the
//! protocol, so that a reader can name the version of a peer that it does not understand.

use std::fmt;

use xxhash_rust::xxh3::xxh3_64_with_seed;

pub use super::error::{FrameError, WireError};
use super::{messages, pages};
use crate::geometry::{MAX_LANES, PageSize};

/// Bytes of a frame's head.
pub const HEAD_BYTES: usize = 16;
/// The most bytes that follow the head of a frame whose kind is unknown.
pub const MAX_UNKNOWN_BYTES: u32 = 1 << 20;

/// Seed of the head's checksum: a run of zeros, or of anything else, is no head.
const HEAD_SEED: u64 = u64::from_le_bytes(*b"mferry-1");
/// The only flag.
const MUST_UNDERSTAND: u8 = 1;

/// The kind of a frame. The number is its byte on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// First frame of every connection.
    Hello = 1,
    /// A chunk of a named section of guest state (setup part or device part).
    State = 2,
    /// The RAM blocks.
    Blocks = 3,
    /// The dirty pages of one extent.
    Pages = 4,
    /// The end of a round in a lane.
    RoundComplete = 5,
    /// The last frame of a lane.
    Switchover = 6,
    /// Hashes of stretches.
    Digests = 7,
    /// The destination may start the guest.
    Go = 8,
    /// The sender aborts, with the reason. Both directions.
    Abort = 9,
    /// The end mark of a stream without a return path.
    End = 10,
    /// Return path: the answer to Hello.
    Accept = 32,
    /// Return path: the machine is built for the blocks.
    Ready = 33,
    /// Return path: the pages loaded so far.
    Progress = 34,
    /// Return path: hashes of the pages of a stretch that differs.
    PageHashes = 35,
    /// Return path: everything is loaded, verified and prepared.
    Loaded = 36,
    /// Return path: the guest runs here.
    Running = 37,
    /// Return path: the destination refuses, and has started nothing.
    Refused = 38,
    /// Return path: the start began and failed.
    StartFailed = 39,
    /// The sender is alive. Both directions.
    Heartbeat = 64,
}

impl Kind {
    /// Every kind, in the order of their numbers.
    pub const ALL: [Self; 19] = [
        Self::Hello,
        Self::State,
        Self::Blocks,
        Self::Pages,
        Self::RoundComplete,
        Self::Switchover,
        Self::Digests,
        Self::Go,
        Self::Abort,
        Self::End,
        Self::Accept,
        Self::Ready,
        Self::Progress,
        Self::PageHashes,
        Self::Loaded,
        Self::Running,
        Self::Refused,
        Self::StartFailed,
        Self::Heartbeat,
    ];

    /// The kind of a byte, if this version knows it.
    #[must_use]
    pub fn from_u8(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|&kind| kind as u8 == byte)
    }

    /// Its name, for messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hello => "Hello",
            Self::State => "State",
            Self::Blocks => "Blocks",
            Self::Pages => "Pages",
            Self::RoundComplete => "RoundComplete",
            Self::Switchover => "Switchover",
            Self::Digests => "Digests",
            Self::Go => "Go",
            Self::Abort => "Abort",
            Self::End => "End",
            Self::Accept => "Accept",
            Self::Ready => "Ready",
            Self::Progress => "Progress",
            Self::PageHashes => "PageHashes",
            Self::Loaded => "Loaded",
            Self::Running => "Running",
            Self::Refused => "Refused",
            Self::StartFailed => "StartFailed",
            Self::Heartbeat => "Heartbeat",
        }
    }

    /// Whether a frame of this kind belongs to a lane. All others are control frames.
    #[must_use]
    pub fn is_of_lane(self) -> bool {
        matches!(self, Self::Pages | Self::RoundComplete | Self::Switchover)
    }

    /// Whether a reader that does not know this kind must fail.
    #[must_use]
    pub fn must_understand(self) -> bool {
        self != Self::Heartbeat
    }

    /// The most bytes that follow the head of a frame of this kind.
    #[must_use]
    pub fn max_bytes(self, page_size: PageSize) -> u32 {
        let bytes = match self {
            Self::Pages => pages::MAX_HEAD_BYTES + page_size.extent_bytes(),
            message => messages::max_body_bytes(message),
        };
        u32::try_from(bytes).expect("every bound is a few MiB")
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

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
