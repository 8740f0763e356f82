//! stamp
/// Bytes of a stamp, at the start of a page.
pub(super) const STAMP_BYTES: usize = 16;
