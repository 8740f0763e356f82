//! The XBZRLE cache of one lane: copies of pages as the destination holds them (law 6).

use crate::geometry::{PageAt, PageSize};

/// Copies of pages, bounded in bytes, replaced by age. Owned by one lane's encoder: no locks.
#[derive(Debug)]
pub struct XbzrleCache {}

impl XbzrleCache {
    /// A cache that keeps at most `bytes`, its own bookkeeping included. Memory is used as pages come in.
    #[must_use]
    pub fn new(page_size: PageSize, bytes: u64) -> Self {
        todo!()
    }

    /// The copy of a page, to encode against and to overwrite with what is sent; marks it as used in `round`.
    pub fn get(&mut self, at: PageAt, round: u32) -> Option<&mut [u8]> {
        todo!()
    }

    /// Keeps a copy of what was sent for a page, if its place is free or holds a page that was not used in `round` or the
    /// round before. Returns whether it is kept.
    pub fn insert(&mut self, at: PageAt, page: &[u8], round: u32) -> bool {
        todo!()
    }

    /// Forgets a page.
    pub fn remove(&mut self, at: PageAt) {
        todo!()
    }

    /// The most bytes it takes.
    #[must_use]
    pub fn bound_bytes(&self) -> u64 {
        todo!()
    }

    /// Bytes it takes now (it never shrinks before its end).
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        todo!()
    }
}
