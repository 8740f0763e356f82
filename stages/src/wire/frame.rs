//! The head that every frame has, and the checks that come before anything else is believed.

use crate::geometry::PageSize;

/// Bytes of a frame's head.
pub const HEAD_BYTES: usize = 16;

/// What a frame is. The number is its byte on the wire.
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
    /// The sender gives up, with the reason. Both directions.
    Abort = 9,
    /// The end mark of a stream without a return path.
    End = 10,
    /// Return path: the answer to Hello.
    Accept = 32,
    /// Return path: the machine is built for the blocks.
    Ready = 33,
    /// Return path: what is loaded so far.
    Progress = 34,
    /// Return path: hashes of the pages of a stretch that differs.
    PageHashes = 35,
    /// Return path: everything is loaded, verified and prepared.
    Loaded = 36,
    /// Return path: the guest runs here.
    Running = 37,
    /// Return path: no, and nothing was started.
    Refused = 38,
    /// Return path: the start was begun and failed.
    StartFailed = 39,
}

/// The head of a frame, believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHead {
    /// The kind's byte: not every byte is a [`Kind`].
    pub kind: u8,
    /// Must a reader that does not know the kind give up?
    pub must_understand: bool,
    /// The lane; 0 for control frames.
    pub lane: u16,
    /// Bytes that follow the head.
    pub length: u32,
}

/// Why a frame is refused. The offset of the frame in its stream is added by whoever reads ([`FrameError`]).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The head's checksum does not match: damage, or no memferry stream at all.
    #[error("the frame head is damaged (checksum mismatch), or this is not a memferry stream")]
    HeadChecksum,
    // … the implementer completes this list: one variant for each thing that a peer can get wrong, with the figures.
    /// What a field holds cannot be.
    #[error("{0}")]
    Field(String),
}

/// What was wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("frame at byte {offset} of {stream}: {error}")]
pub struct FrameError {
    /// Where the frame began, in bytes from the stream's start.
    pub offset: u64,
    /// Which stream: "connection 0", a file's name.
    pub stream: String,
    /// What is wrong.
    pub error: WireError,
}

impl FrameHead {
    /// Reads a head: checksum first, then the fields (unknown flags are refused), then the length against what the kind
    /// may have at most.
    ///
    /// # Errors
    /// [`WireError`] for damage or a length out of bounds.
    pub fn parse(bytes: &[u8; HEAD_BYTES], page_size: PageSize) -> Result<Self, WireError> {
        todo!()
    }

    /// The head's bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEAD_BYTES] {
        todo!()
    }
}
