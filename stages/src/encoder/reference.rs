//! The delta's reference: what the destination holds of a page, as far as it is cached (law 6).
//!
//! Whatever becomes of a page that passes here, the destination holds that page afterwards; so when a method returns, the
//! page's entry equals the page or is gone. In the last round entries are dropped instead of updated.

use crate::batch::Batch;
use crate::geometry::{PageAt, PageSize};
use crate::xbzrle::{self, Encoded, XbzrleCache};

/// The cache of one lane, and the rule by which it is kept.
#[derive(Debug)]
pub(super) struct Reference {
    cache: XbzrleCache,
    zero_page: Box<[u8]>,
}

/// What a page came to, compared with its reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compared {
    /// The destination holds it already.
    Equal,
    /// A delta of so many bytes, fewer than the page has, was written.
    Delta(usize),
    /// There is no reference.
    Miss,
    /// The delta would be no smaller than the page.
    Overflow,
}

impl Reference {
    /// At most `bytes` of pages and their places.
    pub(super) fn new(page_size: PageSize, bytes: u64) -> Self {
        Self { cache: XbzrleCache::new(page_size, bytes), zero_page: vec![0; page_size.bytes()].into() }
    }

    /// The most bytes it takes.
    pub(super) fn bound_bytes(&self) -> u64 {
        self.cache.bound_bytes() + self.zero_page.len() as u64
    }

    /// Bytes that the cache takes now.
    pub(super) fn memory_bytes(&self) -> u64 {
        self.cache.memory_bytes()
    }

    /// Compares a page that is about to be sent, and writes its delta into `out` (as long as a page).
    pub(super) fn compare(&mut self, at: PageAt, page: &[u8], batch: &Batch, out: &mut [u8]) -> Compared {
        let Some(held) = self.cache.get(at, batch.round) else {
            self.will_hold(at, page, batch);
            return Compared::Miss;
        };
        let compared = match xbzrle::encode_page(held, page, out) {
            Encoded::Equal => return Compared::Equal,
            Encoded::Delta(bytes) if bytes < page.len() => Compared::Delta(bytes),
            Encoded::Delta(_) | Encoded::Overflow => Compared::Overflow,
        };
        if batch.last {
            self.cache.remove(at);
        } else {
            held.copy_from_slice(page);
        }
        compared
    }

    /// A page is sent whole.
    pub(super) fn will_hold(&mut self, at: PageAt, page: &[u8], batch: &Batch) {
        if batch.last {
            self.cache.remove(at);
        } else {
            self.cache.insert(at, page, batch.round);
        }
    }

    /// A page is sent as zero. `keep`: worth an entry if it has none?
    pub(super) fn will_be_zero(&mut self, at: PageAt, batch: &Batch) {
        if batch.last {
            self.cache.remove(at);
        } else {
            self.cache.insert(at, &self.zero_page, batch.round);
        }
    }

    /// The page's entry is gone.
    pub(super) fn forget(&mut self, at: PageAt) {
        self.cache.remove(at);
    }
}
