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
//! with a u16 length in front (0 = this piece is equal). A piece that overflows, alone among pieces that do not, is
//! written as one run of all its bytes; only if the pieces do not fit into a page together does the page overflow.
//!
//! A delta from a peer is a [`Delta`] only once it was checked completely. [`XbzrleCache`] stores the pages to encode against.

pub mod cache;
mod delta;
mod differences;
mod encode;
pub mod naive;

#[cfg(test)]
mod tests;

/// One version of [`encode_page`], for one set of instructions.
#[cfg(test)]
type Version = Box<dyn Fn(&[u8], &[u8], &mut [u8]) -> Encoded>;

pub use cache::XbzrleCache;
pub use delta::{Delta, DeltaError};

/// The longest run that can be written.
pub const MAX_RUN: usize = 0x3fff;
/// Pages longer than [`MAX_RUN`] are coded in pieces of this many bytes.
pub const PIECE_BYTES: usize = 4096;

/// The result of encoding a page against its old copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoded {
    /// The pages are equal: nothing to send.
    Equal,
    /// A delta of this many bytes was written.
    Delta(usize),
    /// It did not fit: the page is better sent whole.
    Overflow,
}

/// Encodes `new` against `old`, a page of any size, into `out`; a delta never takes more than a page. The content of
/// `out` beyond the delta is unspecified.
///
/// # Panics
/// If the three do not have the same length, or it is no multiple of 8, or of [`PIECE_BYTES`] if it is coded in pieces.
pub fn encode_page(old: &[u8], new: &[u8], out: &mut [u8]) -> Encoded {
    assert_sizes(old, new, out);
    encode::encode_page(old, new, out)
}

fn assert_sizes(old: &[u8], new: &[u8], out: &[u8]) {
    let lengths = (old.len(), new.len(), out.len());
    assert!(lengths.0 == lengths.1 && lengths.1 == lengths.2, "old, new and out of different lengths: {lengths:?}");
    let unit = if new.len() <= MAX_RUN { 8 } else { PIECE_BYTES };
    assert!(new.len().is_multiple_of(unit), "a page of {} bytes is no multiple of {unit}", new.len());
}
