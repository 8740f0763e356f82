//! How long frames may be: checked before anything is allocated for one.

use super::hello::MAX_FIELDS;
use super::kind::Kind;
use super::messages::{
    MAX_DIGESTS, MAX_FIGURE_NAME, MAX_FIGURES, MAX_REASON, MAX_RUNS, MAX_SECTION_NAME, MAX_STATE_CHUNK,
    MAX_STRETCH_EXTENTS, MAX_STRETCH_PAGES,
};
use crate::geometry::{MAX_BLOCK_ID, MAX_BLOCKS, MAX_LANES, PageSize};

/// Bytes of the checksum behind the fields of a message, and of the one before the payload of Pages.
pub(super) const CHECKSUM_BYTES: usize = 8;
/// Bytes of the fixed part of a Pages body.
pub const FIXED_BYTES: usize = 40;
/// Bytes of one page's descriptor.
pub(super) const DESCRIPTOR_BYTES: usize = 4;
/// The most bytes before the payload: fixed part, 64 descriptors, checksum.
pub const MAX_HEAD_BYTES: usize = FIXED_BYTES + 64 * DESCRIPTOR_BYTES + CHECKSUM_BYTES;
/// The fewest: of a frame that brings only zero pages, or none.
pub const MIN_HEAD_BYTES: usize = FIXED_BYTES + CHECKSUM_BYTES;

impl Kind {
    /// The most bytes that follow the head of a frame of this kind.
    #[must_use]
    pub fn max_bytes(self, page_size: PageSize) -> u32 {
        let bytes = match self {
            Self::Pages => MAX_HEAD_BYTES + page_size.extent_bytes(),
            message => max_body_bytes(message),
        };
        u32::try_from(bytes).expect("every bound is a few MiB")
    }
}

/// The most bytes that the body of a message of this kind may have.
///
/// # Panics
/// For Pages, which is no message.
fn max_body_bytes(kind: Kind) -> usize {
    let fields = match kind {
        Kind::Hello => MAX_FIELDS,
        Kind::State => 1 + 1 + 4 + (1 + MAX_SECTION_NAME) + (4 + MAX_STATE_CHUNK),
        Kind::Blocks => 2 + MAX_BLOCKS * (1 + MAX_BLOCK_ID + 3 * 8) + 2 + MAX_BLOCKS * 2,
        Kind::Pages => unreachable!("Pages is no message"),
        Kind::RoundComplete => 4 + 1 + 11 * 8,
        Kind::Digests => 4 + 8 + 2 + MAX_DIGESTS * (16 + 1 + MAX_STRETCH_EXTENTS * 8),
        Kind::Go | Kind::Loaded => 1,
        Kind::Secret => 40,
        Kind::Proof => 32,
        Kind::Challenge => 64,
        Kind::Resume => 1 + 2 + MAX_LANES as usize * 8,
        Kind::Missing | Kind::Received => 4 + 4 + 2 + MAX_RUNS * (4 + 8),
        Kind::End => 1 + 8,
        Kind::PageRequest => 4 + 8,
        Kind::Checkpoint | Kind::Accept => 8,
        Kind::Progress => 8 + 2 + MAX_LANES as usize * 8,
        Kind::PageHashes => 4 + 8 + 2 + MAX_STRETCH_PAGES * 8,
        Kind::Heartbeat => 2 + MAX_FIGURES * (1 + MAX_FIGURE_NAME + 8),
        Kind::Abort | Kind::Refused | Kind::StartFailed => 2 + MAX_REASON,
        Kind::DirectEnds
        | Kind::LaneEnds
        | Kind::Settled
        | Kind::Discard
        | Kind::Ready
        | Kind::Running
        | Kind::Discarded
        | Kind::Complete => 0,
    };
    fields + CHECKSUM_BYTES
}
