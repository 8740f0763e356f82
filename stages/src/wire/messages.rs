//! Every frame but Pages, as a typed value: the control messages of both directions.
//!
//! The fields of each body, in order and with their bytes; their xxh3-64 follows them (see [`super`]).
//!
//! ```text
//! ┌───────────────┬──────────────────────────────────────────────────────────────────────────────────────┐
//! │ Hello         │ see hello                                                                            │
//! │ State         │ phase 1 · end 1 · version 4 · section: name · length 4 · bytes                       │
//! │ Blocks        │ list of (id: name · length 8 · guest address 8 · backing page size 8); where any is  │
//! │               │ ignored, behind it: list of (index of an ignored block 2), ascending                 │
//! │ RoundComplete │ round 4 · kind 1 · counts 8 each: batches · pages · zero · raw · compressed ·        │
//! │               │ xbzrle · unchanged · misses · overflows · bytes in · bytes out                       │
//! │ LaneEnds      │                                                                                      │
//! │ Digests       │ block 4 · first stretch 8 · list of (xxh3-128 16 · masks n 1 · n masks 8 each);      │
//! │               │ the masks of left out pages end with the last that is not 0                          │
//! │ Go            │ run state 1                                                                          │
//! │ Abort         │ reason                                                                               │
//! │ End           │ run state 1 · Pages frames of all lanes 8                                            │
//! │ Checkpoint    │ number 8                                                                             │
//! │ DirectEnds    │                                                                                      │
//! │ Secret        │ secret 32 · milliseconds that the source tries to return 8                           │
//! │ Proof         │ proof 32                                                                             │
//! │ Settled       │                                                                                      │
//! │ Missing       │ block 4 · first extent 4 · list of (extents 4 · mask of each 8)                      │
//! │ Discard       │                                                                                      │
//! │ Accept        │ milliseconds that it waits for a source to return 8                                  │
//! │ Ready         │                                                                                      │
//! │ Progress      │ bytes 8 · list of (frames of a lane 8)                                               │
//! │ PageHashes    │ block 4 · first page 8 · list of (xxh3-64 8)                                         │
//! │ Loaded        │ verified 1                                                                           │
//! │ Running       │                                                                                      │
//! │ Refused       │ reason                                                                               │
//! │ StartFailed   │ reason                                                                               │
//! │ Challenge     │ nonce 32 · proof 32                                                                  │
//! │ Resume        │ started 1 · list of (frames of a lane 8)                                             │
//! │ Received      │ block 4 · first extent 4 · list of (extents 4 · mask of each 8)                      │
//! │ Discarded     │                                                                                      │
//! │ PageRequest   │ block 4 · page 8                                                                     │
//! │ Complete      │                                                                                      │
//! │ Heartbeat     │ list of (figure: name · value 8)                                                     │
//! └───────────────┴──────────────────────────────────────────────────────────────────────────────────────┘
//!
//! name:   length 1 (never 0) · UTF-8           list: count 2 · items
//! reason: length 2 · UTF-8                     phase, run state, end, verified, started: 0 or 1
//! kind of a round: 0 live, 1 paused, 2 final
//! ```
//!
//! A value has only one form: bytes that decode are the bytes that the value encodes to.

use bytes::Bytes;

use super::hello::Hello;
use super::identity::Nonce;
use super::kind::Kind;
use super::proof::{Proof, Secret};
use crate::batch::Mark;
use crate::geometry::{BlockInfo, PageAt};
use crate::tally::RoundTally;
use crate::untrusted::Untrusted;

/// The longest reason that Abort, Refused and StartFailed carry, in bytes of UTF-8; longer ones are cut by the sender.
pub const MAX_REASON: usize = 4096;
/// The longest chunk of state in one frame.
pub const MAX_STATE_CHUNK: usize = 1 << 20;
/// The most stretches whose digests are in one frame.
pub const MAX_DIGESTS: usize = 4096;

/// The most figures that one Heartbeat carries.
pub const MAX_FIGURES: usize = 256;
/// The longest name of a figure, in bytes of UTF-8.
pub const MAX_FIGURE_NAME: usize = 64;

/// The most runs of extents in one part of a bitmap.
pub const MAX_RUNS: usize = 4096;

/// The longest name of a section of state, in bytes of UTF-8.
pub const MAX_SECTION_NAME: usize = 255;
/// The most extents of a stretch, and so the masks that one digest may leave out.
pub const MAX_STRETCH_EXTENTS: usize = 8;
/// The most pages of a stretch, and so the hashes in one PageHashes.
pub const MAX_STRETCH_PAGES: usize = MAX_STRETCH_EXTENTS * u64::BITS as usize;
/// The most that a count of a tally may be: far above any guest, and any number of lanes adds up without overflow.
pub const MAX_COUNT: u64 = 1 << 56;

/// When a section of state is given to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum StatePhase {
    /// Before the blocks: what the destination needs to build its machine.
    Setup = 0,
    /// After the pause: the devices.
    Device = 1,
}

/// A chunk of a named, versioned section of state. Chunks of a section follow each other directly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateChunk {
    /// Which part it belongs to.
    pub phase: StatePhase,
    /// Name of the section, 1 to 255 bytes.
    pub name: Untrusted,
    /// Version of the section's format, as the guest defines it.
    pub version: u32,
    /// Whether it is the section's last chunk.
    pub end: bool,
    /// The bytes.
    pub bytes: Bytes,
}

/// The run state of the guest at the source when the migration began, which it gets at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RunState {
    /// It ran.
    Running = 0,
    /// Its operator had paused it: memferry does not start it.
    Paused = 1,
}

/// The hash of one stretch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StretchDigest {
    /// xxh3-128 over the stretch's pages, holes as zeros, a partial last page padded with zeros.
    pub hash: u128,
    /// Pages left out (hinted free, unplugged), as masks of the stretch's extents: empty if none is.
    pub left_out: [u64; 8],
}

/// An acknowledgement: everything that was loaded on the destination since its start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Page bytes loaded, all lanes.
    pub bytes: u64,
    /// Pages frames loaded, by lane, in the order they were sent.
    pub frames: Vec<u64>,
}

/// What a destination says to a source that returns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resume {
    /// Whether the start of the guest was begun. Where it was not, no Go of an earlier attempt starts it any more.
    pub started: bool,
    /// Pages frames of the latest attempt that were loaded, by lane.
    pub frames: Vec<u64>,
}

/// A part of a bitmap: consecutive extents of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapPart {
    /// Index of the block.
    pub block: u32,
    /// The first extent.
    pub first: u32,
    /// The extents.
    pub runs: Vec<Run>,
}

/// Extents that follow each other, with the same pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// How many extents: 1 or more.
    pub extents: u32,
    /// The pages of each.
    pub mask: u64,
}

/// One figure of a [`Message::Heartbeat`], by name.
///
/// A reader ignores figures whose names it does not know, and requires none: names can be added without another version of the
/// protocol. The names come from a peer, so they must be escaped before they are shown. A destination reports
/// `receivers_worked_ns`: the nanoseconds since its start in which its receivers did not wait for bytes, the mean over connections.
/// Before Ready it reports how long it took to build the guest: `build_ns`. Before Loaded and before Running it reports what its parts of the downtime took: `verify_ns`, `durable_ns`, `prepare_ns`,
/// `start_ns`. With each round that is loaded, and each time that memory is on disk, it reports how long it needs to write to disk:
/// `write_backlog_ns` for what is loaded, `write_call_ns` for any call, `write_mib_ns` for each MiB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Figure {
    /// Its name, 1 to [`MAX_FIGURE_NAME`] bytes; the unit is part of it.
    pub name: Untrusted,
    /// Its value.
    pub value: u64,
}

/// A frame's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// See [`Hello`].
    Hello(Hello),
    /// See [`StateChunk`].
    State(StateChunk),
    /// The RAM blocks, in order; their page size is in Hello.
    Blocks(Vec<BlockInfo>),
    /// End of a round in the frame's lane, with its figures.
    RoundComplete(RoundTally),
    /// Last frame of the lane.
    LaneEnds,
    /// Digests of consecutive stretches of a block, from `first` on.
    Digests {
        /// Index of the block.
        block: u32,
        /// Number of the first stretch.
        first: u64,
        /// One for each stretch.
        stretches: Vec<StretchDigest>,
    },
    /// The destination may start the guest. Carries its run state.
    Go(RunState),
    /// The sender aborts, with the reason.
    Abort(Untrusted),
    /// The end mark: all state, digests and pages have been sent. In a file it is the last frame.
    End {
        /// The run state of the guest.
        run_state: RunState,
        /// Pages frames of all lanes.
        frames: u64,
    },
    /// End of an epoch in the frame's lane, with the number of its checkpoint.
    Checkpoint(u64),
    /// The switch to postcopy in the frame's lane.
    DirectEnds,
    /// See [`Secret`].
    Secret {
        /// What both ends prove that they know.
        secret: Secret,
        /// How long the source tries to return after a lost connection, in milliseconds.
        waits_ms: u64,
    },
    /// The source returns, and proves that it has the secret.
    Proof(Proof),
    /// The source knows that the guest runs at the destination, and asks no more.
    Settled,
    /// A part of the bitmap of pages that the destination does not hold at the switch to postcopy. The bitmap comes twice: behind
    /// DirectEnds, and with the device state, when it has what the last sync found besides.
    Missing(BitmapPart),
    /// The pages named so far are to be discarded, while the guest still runs at the source.
    Discard,
    /// The destination accepts the stream as its Hello describes it.
    Accept {
        /// How long it waits for a source whose connection is lost, in milliseconds; 0 if it does not.
        waits_ms: u64,
    },
    /// The machine is built; pages may come.
    Ready,
    /// See [`Progress`].
    Progress(Progress),
    /// xxh3-64 of each page of a stretch that differs at the destination.
    PageHashes {
        /// The stretch's first page.
        first: PageAt,
        /// One for each page.
        hashes: Vec<u64>,
    },
    /// Loaded, verified and prepared; `verified`: whether digests were compared.
    Loaded {
        /// Whether digests were compared, and were equal.
        verified: bool,
    },
    /// The guest runs at the destination.
    Running,
    /// The destination refuses this connection, this attempt or this guest. It has started nothing, unless the source returns.
    Refused(Untrusted),
    /// The destination began to start the guest and failed.
    StartFailed(Untrusted),
    /// The destination proves that it has the secret, and asks for the source's proof.
    Challenge {
        /// Its part of what both ends prove.
        nonce: Nonce,
        /// Its proof.
        proof: Proof,
    },
    /// See [`Resume`].
    Resume(Resume),
    /// A part of the received bitmap.
    Received(BitmapPart),
    /// The pages that the source has named are discarded.
    Discarded,
    /// The guest waits for this page.
    PageRequest(PageAt),
    /// Every page is placed: the source is not needed any more.
    Complete,
    /// The sender is alive, with figures that it reports. Both directions, at any time from Hello or Accept on; a reader
    /// that does not know it may skip it.
    Heartbeat(Vec<Figure>),
}

impl From<Mark> for Message {
    fn from(mark: Mark) -> Self {
        match mark {
            Mark::RoundComplete(tally) => Self::RoundComplete(tally),
            Mark::Checkpoint(number) => Self::Checkpoint(number),
            Mark::DirectEnds => Self::DirectEnds,
            Mark::LaneEnds => Self::LaneEnds,
        }
    }
}

impl Message {
    /// The mark of a lane that it is, or the message itself.
    pub(crate) fn into_mark(self) -> Result<Mark, Self> {
        match self {
            Self::RoundComplete(tally) => Ok(Mark::RoundComplete(tally)),
            Self::Checkpoint(number) => Ok(Mark::Checkpoint(number)),
            Self::DirectEnds => Ok(Mark::DirectEnds),
            Self::LaneEnds => Ok(Mark::LaneEnds),
            other => Err(other),
        }
    }

    /// The kind of frame it travels in.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Hello(_) => Kind::Hello,
            Self::State(_) => Kind::State,
            Self::Blocks(_) => Kind::Blocks,
            Self::RoundComplete(_) => Kind::RoundComplete,
            Self::LaneEnds => Kind::LaneEnds,
            Self::Digests { .. } => Kind::Digests,
            Self::Go(_) => Kind::Go,
            Self::Abort(_) => Kind::Abort,
            Self::End { .. } => Kind::End,
            Self::Checkpoint(_) => Kind::Checkpoint,
            Self::DirectEnds => Kind::DirectEnds,
            Self::Secret { .. } => Kind::Secret,
            Self::Proof(_) => Kind::Proof,
            Self::Settled => Kind::Settled,
            Self::Missing(_) => Kind::Missing,
            Self::Discard => Kind::Discard,
            Self::Accept { .. } => Kind::Accept,
            Self::Ready => Kind::Ready,
            Self::Progress(_) => Kind::Progress,
            Self::PageHashes { .. } => Kind::PageHashes,
            Self::Loaded { .. } => Kind::Loaded,
            Self::Running => Kind::Running,
            Self::Refused(_) => Kind::Refused,
            Self::StartFailed(_) => Kind::StartFailed,
            Self::Challenge { .. } => Kind::Challenge,
            Self::Resume(_) => Kind::Resume,
            Self::Received(_) => Kind::Received,
            Self::Discarded => Kind::Discarded,
            Self::PageRequest(_) => Kind::PageRequest,
            Self::Complete => Kind::Complete,
            Self::Heartbeat(_) => Kind::Heartbeat,
        }
    }
}
