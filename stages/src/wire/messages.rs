//! Every frame but Pages, as a typed value: the control messages of both directions.

use bytes::Bytes;

use super::hello::Hello;
use crate::geometry::{BlockInfo, PageAt};
use crate::tally::RoundTally;

/// The longest reason that Abort, Refused and StartFailed carry, in bytes of UTF-8; longer ones are cut by the sender.
pub const MAX_REASON: usize = 4096;
/// The longest chunk of state in one frame.
pub const MAX_STATE_CHUNK: usize = 1 << 20;
/// The most state a migration may have, all sections of both parts together: a peer cannot make us hold more.
pub const MAX_STATE_BYTES: u64 = 256 << 20;
/// The most stretches whose digests stand in one frame.
pub const MAX_DIGESTS: usize = 4096;

/// When a section of state is given to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum StatePhase {
    /// Before the blocks: what the destination needs to build its machine.
    Setup = 0,
    /// After the pause: the devices.
    Device = 1,
}

/// A chunk of a named, versioned section of state. Chunks of a section follow one another without a gap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateChunk {
    /// Which part it belongs to.
    pub phase: StatePhase,
    /// Name of the section, 1 to 255 bytes.
    pub name: String,
    /// Version of the section's format; the guest's business.
    pub version: u32,
    /// Is it the section's last chunk?
    pub end: bool,
    /// The bytes.
    pub bytes: Bytes,
}

/// What the guest was doing at the source when the migration began, and should do at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RunState {
    /// It ran.
    Running = 0,
    /// Its operator had paused it: it is not started by us.
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

/// What is acknowledged: everything that was loaded on the destination since its start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Page bytes loaded, all lanes.
    pub bytes: u64,
    /// Pages frames loaded, by lane, in the order they were sent.
    pub frames: Vec<u64>,
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
    /// End of a round in the frame's lane, with what it came to.
    RoundComplete(RoundTally),
    /// Last frame of the lane.
    Switchover,
    /// Digests of consecutive stretches of a block, from `first` on.
    Digests {
        /// Index of the block.
        block: u32,
        /// Number of the first stretch.
        first: u64,
        /// One for each stretch.
        stretches: Vec<StretchDigest>,
    },
    /// Run it. Carries the run state to give it.
    Go(RunState),
    /// The sender gives up; why.
    Abort(String),
    /// The end mark: all state, digests and pages have been sent. In a file it is the last frame.
    End {
        /// What the guest was doing.
        run_state: RunState,
        /// Pages frames of all lanes.
        frames: u64,
    },
    /// The destination takes part; the optional features it accepts.
    Accept(Vec<String>),
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
    /// Loaded, verified and prepared; `verified` says whether digests were compared.
    Loaded {
        /// Were digests compared (and found equal)?
        verified: bool,
    },
    /// The guest runs at the destination.
    Running,
    /// The destination will not, and has started nothing.
    Refused(String),
    /// The destination began to start the guest and failed.
    StartFailed(String),
}
