//! XBZRLE: a page as the runs of bytes in which it differs from the copy that the destination holds.
//!
//! ```text
//! page  = (zrun nzrun)+          a trailing zrun is not emitted
//! zrun  = uleb                   count of bytes equal to the old page
//! nzrun = uleb, n new bytes      the new bytes as they are
//! uleb  = 1 byte below 0x80, else (n & 0x7f) | 0x80, n >> 7; at most 0x3fff
//! ```
//!
//! The encoding is QEMU's, bit for bit (migration/xbzrle.c, version 10.2): runs are maximal, and a page overflows by
//! exactly QEMU's tests. A run length ends at 0x3fff, so pages larger than 8 KiB are coded as [`PIECE_BYTES`] pieces, each
//! with a u16 length in front (0 = this piece is equal).

pub mod cache;
pub mod naive;

pub use cache::XbzrleCache;

/// The longest run that can be written.
pub const MAX_RUN: usize = 0x3fff;
/// Pages longer than [`MAX_RUN`] are coded in pieces of this many bytes.
pub const PIECE_BYTES: usize = 4096;

/// What came of encoding a page against its old copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoded {
    /// The pages are equal: nothing to send.
    Equal,
    /// A delta of so many bytes was written.
    Delta(usize),
    /// It did not fit: the page is better sent whole.
    Overflow,
}

/// Encodes `new` against `old`, a page of any size, into `out`; a delta never takes more than a page.
///
/// # Panics
/// If the three do not have the same length, or it is no multiple of 8.
pub fn encode_page(old: &[u8], new: &[u8], out: &mut [u8]) -> Encoded {
    todo!()
}

/// Why bytes are no delta of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// Ends in the middle.
    #[error("it ends in the middle of a run at byte {at}")]
    Truncated {
        /// Offset in the delta.
        at: usize,
    },
}

/// A delta that was checked from its first byte to its last: applying it cannot fail.
#[derive(Clone, Copy, Debug)]
pub struct Delta<'a> {
    bytes: &'a [u8],
    page_bytes: usize,
}

impl<'a> Delta<'a> {
    /// Checks a whole delta of a page of `page_bytes`.
    ///
    /// # Errors
    /// A [`DeltaError`] with the offset of the first byte that cannot be.
    pub fn parse(bytes: &'a [u8], page_bytes: usize) -> Result<Self, DeltaError> {
        todo!()
    }

    /// The runs of new bytes as (offset in the page, bytes), in order.
    pub fn runs(&self) -> impl Iterator<Item = (usize, &'a [u8])> {
        std::iter::empty()
    }

    /// Patches the old copy of the page.
    ///
    /// # Panics
    /// If `page` is not of the size the delta was checked for.
    pub fn apply(&self, page: &mut [u8]) {
        todo!()
    }
}
