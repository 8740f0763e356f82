//! The kinds of frames.

use std::fmt;

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
    LaneEnds = 6,
    /// Hashes of stretches.
    Digests = 7,
    /// The destination may start the guest.
    Go = 8,
    /// The sender aborts, with the reason. Both directions.
    Abort = 9,
    /// The end mark of a stream without a return path.
    End = 10,
    /// The end of an epoch in a lane.
    Checkpoint = 11,
    /// The switch to postcopy in a lane.
    DirectEnds = 12,
    /// What a source that returns proves itself by.
    Secret = 13,
    /// The source proves that it is the one that has the secret.
    Proof = 14,
    /// The source knows that the guest runs at the destination.
    Settled = 15,
    /// Pages that the destination does not hold at the switch to postcopy.
    Missing = 16,
    /// The destination is to discard the pages that were named.
    Discard = 17,
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
    /// Return path: the answer to the Hello of a source that returns.
    Challenge = 40,
    /// Return path: what the destination has loaded, and whether it runs the guest.
    Resume = 41,
    /// Return path: a part of the received bitmap.
    Received = 42,
    /// Return path: the pages are discarded.
    Discarded = 43,
    /// Return path of the urgent connection: the guest waits for this page.
    PageRequest = 44,
    /// Return path: every page is placed.
    Complete = 45,
    /// The sender is alive. Both directions.
    Heartbeat = 64,
}

impl Kind {
    /// Every kind, in the order of their numbers.
    pub const ALL: [Self; 32] = [
        Self::Hello,
        Self::State,
        Self::Blocks,
        Self::Pages,
        Self::RoundComplete,
        Self::LaneEnds,
        Self::Digests,
        Self::Go,
        Self::Abort,
        Self::End,
        Self::Checkpoint,
        Self::DirectEnds,
        Self::Secret,
        Self::Proof,
        Self::Settled,
        Self::Missing,
        Self::Discard,
        Self::Accept,
        Self::Ready,
        Self::Progress,
        Self::PageHashes,
        Self::Loaded,
        Self::Running,
        Self::Refused,
        Self::StartFailed,
        Self::Challenge,
        Self::Resume,
        Self::Received,
        Self::Discarded,
        Self::PageRequest,
        Self::Complete,
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
            Self::LaneEnds => "LaneEnds",
            Self::Digests => "Digests",
            Self::Go => "Go",
            Self::Abort => "Abort",
            Self::End => "End",
            Self::Checkpoint => "Checkpoint",
            Self::DirectEnds => "DirectEnds",
            Self::Secret => "Secret",
            Self::Proof => "Proof",
            Self::Settled => "Settled",
            Self::Missing => "Missing",
            Self::Discard => "Discard",
            Self::Accept => "Accept",
            Self::Ready => "Ready",
            Self::Progress => "Progress",
            Self::PageHashes => "PageHashes",
            Self::Loaded => "Loaded",
            Self::Running => "Running",
            Self::Refused => "Refused",
            Self::StartFailed => "StartFailed",
            Self::Challenge => "Challenge",
            Self::Resume => "Resume",
            Self::Received => "Received",
            Self::Discarded => "Discarded",
            Self::PageRequest => "PageRequest",
            Self::Complete => "Complete",
            Self::Heartbeat => "Heartbeat",
        }
    }

    /// Whether a frame of this kind belongs to a lane. All others are control frames.
    #[must_use]
    pub fn is_of_lane(self) -> bool {
        matches!(self, Self::Pages | Self::RoundComplete | Self::Checkpoint | Self::DirectEnds | Self::LaneEnds)
    }

    /// Whether a reader that does not know this kind must fail.
    #[must_use]
    pub fn must_understand(self) -> bool {
        self != Self::Heartbeat
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
