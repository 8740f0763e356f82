//! The delta's reference: the content of a page at the destination, as far as it is cached (ARCHITECTURE.md, law 6: the delta's
//! reference is what the destination holds).
//!
//! However a page is sent, the destination holds that page afterwards. So when a method returns, the page's entry equals the page
//! or is gone. In a final round entries are dropped instead of updated.

use crate::batch::Batch;
use crate::geometry::{PageAt, PageSize};
use crate::xbzrle::{self, Delta, Encoded, XbzrleCache};

/// A delta of at most this part of its page is applied to the page's entry. That leaves most of its cache lines unmodified, and
/// they need not be written back to memory. For larger deltas a copy of the page costs less than a walk over their runs.
const SPARSE: usize = 16;

/// The cache of one lane, and the rule by which it is updated.
#[derive(Debug)]
pub(super) struct Reference {
    cache: XbzrleCache,
    zero_page: Box<[u8]>,
}

/// The result of a comparison of a page with its reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compared {
    /// The destination holds it already.
    Equal,
    /// A delta of this many bytes, fewer than the page has, was written.
    Delta(usize),
    /// There is no reference.
    Miss,
    /// The delta would be no smaller than the page.
    Overflow,
}

impl Reference {
    /// A reference that takes at most `bytes`, bookkeeping included.
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

    /// Limits it to `bytes`, bookkeeping included. Pages that are dropped have no reference.
    pub(super) fn resize(&mut self, bytes: u64) {
        self.cache.resize(bytes);
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
        match compared {
            _ if batch.kind.is_final() => self.cache.remove(at),
            Compared::Delta(bytes) if bytes <= page.len() / SPARSE => {
                Delta::parse(&out[..bytes], page.len()).expect("our own delta").apply(held);
            }
            _ => held.copy_from_slice(page),
        }
        compared
    }

    /// Handles a page that is sent whole.
    pub(super) fn will_hold(&mut self, at: PageAt, page: &[u8], batch: &Batch) {
        self.keep(at, page, batch, batch.round);
    }

    /// Handles a page that is sent whole for the first time. It is not known to be written to, so it may be replaced one round
    /// sooner, by the pages that are dirty in the next round already. Otherwise a full cache would take none of them before the
    /// round after.
    pub(super) fn will_hold_first(&mut self, at: PageAt, page: &[u8], batch: &Batch) {
        self.keep(at, page, batch, batch.round.saturating_sub(1));
    }

    fn keep(&mut self, at: PageAt, page: &[u8], batch: &Batch, used: u32) {
        if batch.kind.is_final() {
            self.cache.remove(at);
        } else {
            self.cache.insert(at, page, used);
        }
    }

    /// Handles a page that is sent as zero. `keep` says whether it gets an entry if it has none.
    pub(super) fn will_be_zero(&mut self, at: PageAt, batch: &Batch) {
        if batch.kind.is_final() {
            self.cache.remove(at);
        } else {
            self.cache.insert(at, &self.zero_page, batch.round);
        }
    }

    /// Removes the page's entry.
    pub(super) fn forget(&mut self, at: PageAt) {
        self.cache.remove(at);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::batch::RoundKind;
    use crate::stage::testing::{batch, page_size};

    /// A page's next content: mostly a small change, so that deltas fit.
    fn changed(page: &[u8], seed: u8) -> Vec<u8> {
        let mut page = page.to_vec();
        match seed {
            0..16 => page.iter_mut().for_each(|byte| *byte = byte.wrapping_add(seed)),
            16..32 => page.fill(0),
            _ => page[usize::from(seed) * 16] ^= seed,
        }
        page
    }

    #[test]
    fn a_page_that_is_dirty_again_takes_the_place_of_one_that_only_came_in_the_first_round() {
        let (mut reference, mut out) = (Reference::new(page_size(4), 4200), vec![0; 4096]);
        let [idle, hot, also_hot] = [0, 1, 2].map(|page| PageAt { block: 0, page });
        let [first, second, third] = [1, 2, 3].map(|round| batch(0, 1, round));
        reference.will_hold_first(idle, &[1; 4096], &first);
        reference.will_hold_first(hot, &[1; 4096], &first);
        assert_eq!(reference.compare(hot, &[2; 4096], &second, &mut out), Compared::Miss);
        assert_eq!(reference.compare(also_hot, &[2; 4096], &second, &mut out), Compared::Miss);
        assert_eq!(reference.compare(hot, &[2; 4096], &third, &mut out), Compared::Equal);
        assert_eq!(reference.compare(idle, &[1; 4096], &third, &mut out), Compared::Miss);
    }

    proptest! {
        /// Law 6 (the delta's reference is what the destination holds) in a model: pages are sent in any way, and their entries
        /// equal what
    /// the destination holds.
        #[test]
        fn an_entry_is_what_the_destination_holds_or_gone(
            cache_pages in 0..20u64,
            passes in prop::collection::vec((0..24u64, any::<u8>(), 0..5u8, prop::bool::weighted(0.1)), 0..150),
        ) {
            let mut reference = Reference::new(page_size(4), cache_pages * 4200);
            let mut destination = HashMap::<PageAt, Vec<u8>>::new();
            let mut out = vec![0; 4096];
            for (step, (page, seed, way, last)) in (0..).zip(passes) {
                let at = PageAt { block: 0, page };
                let kind = if last { RoundKind::Final } else { RoundKind::Live };
                let batch = Batch { kind, ..batch(0, 1, 1 + step / 20) };
                let held = destination.entry(at).or_insert_with(|| vec![0; 4096]);
                let next = changed(held, seed);
                // Whether the destination holds it already, or nothing is sent.
                let mut equal = false;
                match way {
                    0 => {
                        reference.will_be_zero(at, &batch);
                        held.fill(0);
                    }
                    1 => reference.forget(at),
                    4 => {
                        reference.resize(u64::from(seed % 32) * 4200);
                        equal = true;
                    }
                    2 => {
                        reference.will_hold(at, &next, &batch);
                        *held = next;
                    }
                    _ => {
                        equal = reference.compare(at, &next, &batch, &mut out) == Compared::Equal;
                        prop_assert!(!equal || *held == next);
                        *held = next;
                    }
                }
                let kept = reference.cache.get(at, batch.round).map(|kept| kept.to_vec());
                prop_assert!(kept.is_none_or(|kept| &kept == held && (!last || equal)));
            }
            for (at, held) in destination {
                prop_assert!(reference.cache.get(at, u32::MAX).is_none_or(|kept| kept[..] == held[..]));
            }
        }
    }
}
