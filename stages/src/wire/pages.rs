//! The Pages frame: the dirty pages of one extent.
//!
//! ```text
//! body
//! ┌─────────┬──────────┬─────────┬────────────────┬────────┬────────┬────────────────┐
//! │ block 4 │ extent 4 │ round 4 │ payload bytes 4│ mask 8 │ zero 8 │ payload xxh3 8 │
//! ├─────────┴──────────┴─────────┴────────────────┴────────┴────────┴────────────────┤
//! │ descriptors: 4 bytes for each bit of mask & !zero, lowest bit first              │
//! │              encoding (8 bits) | payload bytes of the page << 8 (24 bits)        │
//! ├───────────────────────────────────────────────────────────────────────────────────┤
//! │ xxh3-64 of all of the body before it   8                                          │
//! ├───────────────────────────────────────────────────────────────────────────────────┤
//! │ payload: the pages' bytes, in the order of the descriptors                        │
//! └───────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! `mask` holds the pages that the frame brings (an unchanged page is in neither mask), `zero` those of them that are
//! all zero. The payload's hash is 0 where the `payload-xxh3` feature is off. One frame is sent for each batch, even if
//! it brings no page: the count of frames in a lane is what Progress acknowledges.

use super::frame::WireError;
use crate::geometry::{ExtentAt, Layout};

/// How a page's bytes are coded. The number is on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PageEncoding {
    /// The page as it is.
    Raw = 1,
    /// Snappy, raw format.
    Snap = 2,
    /// LZ4 block.
    Lz4 = 3,
    /// A Zstandard frame.
    Zstd = 4,
    /// A delta against what the destination holds.
    Xbzrle = 5,
}

/// Bytes of the fixed part of a Pages body.
pub const FIXED_BYTES: usize = 40;
/// The most bytes that stand before the payload: fixed part, 64 descriptors, checksum.
pub const MAX_HEAD_BYTES: usize = FIXED_BYTES + 64 * 4 + 8;

/// What stands before the payload of a Pages frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagesHead {
    /// The extent.
    pub at: ExtentAt,
    /// The round, from 1.
    pub round: u32,
    /// Pages that the frame brings.
    pub mask: u64,
    /// Those of them that are all zero.
    pub zero: u64,
    /// xxh3-64 of the payload, or 0.
    pub payload_hash: u64,
    /// For each page of `mask & !zero`, lowest first: its encoding and the bytes it has in the payload.
    pub pages: Vec<(PageEncoding, u32)>,
}

impl PagesHead {
    /// Bytes of the payload: the sum of the pages'.
    #[must_use]
    pub fn payload_bytes(&self) -> usize {
        self.pages.iter().map(|&(_, bytes)| bytes as usize).sum()
    }

    /// The frame's head and the body up to the payload, as they go on the wire in front of it.
    #[must_use]
    pub fn to_bytes(&self, lane: u16) -> bytes::Bytes {
        todo!()
    }

    /// Reads a body up to its payload (`bytes` is that part and no more) and checks all of it against the layout: block,
    /// extent, masks within the block, descriptors that add up to the payload length, raw pages of exactly a page.
    ///
    /// # Errors
    /// [`WireError`] with what is wrong and both figures.
    pub fn parse(bytes: &[u8], frame_length: u32, layout: &Layout) -> Result<Self, WireError> {
        todo!()
    }
}
