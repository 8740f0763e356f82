//! The delta's reference: the content of a page at the destination, as far as it is cached (ARCHITECTURE.md, law 6: the delta's
//! reference is what the destination holds).
//!
//! However a page is sent, the destination holds that page afterwards. So when a method returns, the page's entry equals the page
//! or is gone. In a final round entries are dropped instead of updated. A page that is sent as zero has no entry: its bit in
//! [`KnownZero`] makes the zero page its reference.

use std::sync::Arc;

use super::known_zero::KnownZero;
use crate::batch::Batch;
use crate::geometry::{ExtentAt, PageAt, PageSize, bits};
use crate::xbzrle::{self, Delta, Encoded, XbzrleCache};

/// A delta of at most this part of its page is applied to the page's entry. That leaves most of its cache lines unmodified, and
/// they need not be written back to memory. For larger deltas a copy of the page costs less than a walk over their runs.
const SPARSE: usize = 16;

/// The cache of one lane, the pages known to be zero, and the rule by which both are updated.
#[derive(Debug)]
pub(super) struct Reference {
    cache: XbzrleCache,
    /// Without it, a page that was sent as zero has no reference.
    known_zero: Option<Arc<KnownZero>>,
    zero_page: Box<[u8]>,
}

/// The result of a comparison of a page with its reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compared {
    /// The destination holds it already.
    Equal,
    /// A delta of this many bytes, fewer than the page has, was written.
    Delta(usize),
    /// The same, against a page of zeros.
    DeltaOfZeros(usize),
    /// There is no reference.
    Miss,
    /// The delta would be no smaller than the page.
    Overflow,
}

impl Compared {
    fn of(encoded: Encoded, page: &[u8]) -> Self {
        match encoded {
            Encoded::Equal => Self::Equal,
            Encoded::Delta(bytes) if bytes < page.len() => Self::Delta(bytes),
            Encoded::Delta(_) | Encoded::Overflow => Self::Overflow,
        }
    }
}

impl Reference {
    /// A reference that takes at most `bytes`, bookkeeping included. No page is known to be zero.
    pub(super) fn new(page_size: PageSize, bytes: u64) -> Self {
        let zero_page = vec![0; page_size.bytes()].into();
        Self { cache: XbzrleCache::new(page_size, bytes), known_zero: None, zero_page }
    }

    /// Sets the pages that are known to be zero. They are shared with the other lanes, and do not count as its bytes.
    pub(super) fn set_known_zero(&mut self, known_zero: Arc<KnownZero>) {
        self.known_zero = Some(known_zero);
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
        if self.known_zero.as_ref().is_some_and(|known_zero| known_zero.contains(at)) {
            return self.compare_with_zeros(at, page, batch, out);
        }
        let Some(held) = self.cache.get(at, batch.round) else {
            self.will_hold(at, page, batch);
            return Compared::Miss;
        };
        let compared = Compared::of(xbzrle::encode_page(held, page, out), page);
        match compared {
            Compared::Equal => {}
            _ if batch.kind.is_final() => self.cache.remove(at),
            Compared::Delta(bytes) if bytes <= page.len() / SPARSE => {
                Delta::parse(&out[..bytes], page.len()).expect("our own delta").apply(held);
            }
            _ => held.copy_from_slice(page),
        }
        compared
    }

    fn compare_with_zeros(&mut self, at: PageAt, page: &[u8], batch: &Batch, out: &mut [u8]) -> Compared {
        let compared = match Compared::of(xbzrle::encode_page(&self.zero_page, page, out), page) {
            Compared::Equal => return Compared::Equal,
            Compared::Delta(bytes) => Compared::DeltaOfZeros(bytes),
            other => other,
        };
        self.will_hold(at, page, batch);
        compared
    }

    /// Writes the delta of a page against zeros into `out` again.
    pub(super) fn write_delta_of_zeros(&self, page: &[u8], out: &mut [u8]) {
        xbzrle::encode_page(&self.zero_page, page, out);
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
        if let Some(known_zero) = &self.known_zero {
            known_zero.remove_page(at);
        }
        if batch.kind.is_final() {
            self.cache.remove(at);
        } else {
            self.cache.insert(at, page, used);
        }
    }

    /// Drops the entries of pages whose content at the destination is not known. The pages known to be zero are left to
    /// [`KnownZero::forget`].
    pub(super) fn forget(&mut self, at: ExtentAt, pages: u64) {
        bits(pages).for_each(|bit| self.cache.remove(at.page(bit)));
    }

    /// Handles pages that are sent as zero. Their entries make room for other pages.
    pub(super) fn will_be_zero(&mut self, at: ExtentAt, zero: u64) {
        bits(zero).for_each(|bit| self.cache.remove(at.page(bit)));
        if let Some(known_zero) = &self.known_zero {
            known_zero.insert(at, zero);
        }
    }

    /// Handles pages that are sent whole and have no entries.
    pub(super) fn will_not_be_zero(&mut self, at: ExtentAt, whole: u64) {
        if let Some(known_zero) = &self.known_zero {
            known_zero.remove(at, whole);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::batch::RoundKind;
    use crate::bitmap::{DirtyBitmap, locate};
    use crate::geometry::Layout;
    use crate::stage::testing::{batch, layout, page_size};

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

    /// What is done with one of two dozen pages.
    #[derive(Clone, Copy, Debug)]
    enum Pass {
        Zero,
        Whole(u8),
        Compare(u8),
        Resize(u8),
        /// The page is put back: whether the destination has it is not known.
        PutBack,
        /// The destination discards everything.
        DiscardAll,
    }

    fn passes() -> impl Strategy<Value = Vec<(u64, Pass, bool)>> {
        let pass = prop_oneof![
            4 => Just(Pass::Zero),
            4 => any::<u8>().prop_map(Pass::Whole),
            10 => any::<u8>().prop_map(Pass::Compare),
            2 => any::<u8>().prop_map(Pass::Resize),
            2 => Just(Pass::PutBack),
            1 => Just(Pass::DiscardAll),
        ];
        prop::collection::vec((0..24u64, pass, prop::bool::weighted(0.1)), 0..150)
    }

    /// A reference, and what the destination holds: `None` where that is not known.
    struct Model {
        reference: Reference,
        known_zero: Arc<KnownZero>,
        layout: Layout,
        destination: HashMap<PageAt, Option<Vec<u8>>>,
        out: Vec<u8>,
    }

    impl Model {
        fn new(cache_pages: u64) -> Self {
            let layout = layout(page_size(4), &[24 * 4096]);
            let known_zero = Arc::new(KnownZero::new(&layout));
            let mut reference = Reference::new(page_size(4), cache_pages * 4200);
            reference.set_known_zero(known_zero.clone());
            Self { reference, known_zero, layout, destination: HashMap::new(), out: vec![0; 4096] }
        }

        fn pass(&mut self, at: PageAt, pass: Pass, batch: &Batch) {
            let held = self.destination.get(&at).cloned().flatten();
            let next = |seed| changed(held.as_ref().unwrap_or(&vec![3; 4096]), seed);
            let held = match pass {
                Pass::Zero => {
                    let (extent, mask) = locate(at);
                    self.reference.will_be_zero(extent, mask);
                    Some(vec![0; 4096])
                }
                Pass::Whole(seed) => {
                    self.reference.will_hold(at, &next(seed), batch);
                    Some(next(seed))
                }
                Pass::Compare(seed) => Some(self.compare(at, held.as_ref(), next(seed), batch)),
                Pass::Resize(seed) => {
                    self.reference.resize(u64::from(seed % 32) * 4200);
                    held
                }
                Pass::PutBack => {
                    let lost = DirtyBitmap::empty(&self.layout);
                    lost.set(at);
                    self.known_zero.forget(&lost);
                    self.reference.cache.remove(at);
                    None
                }
                Pass::DiscardAll => {
                    self.known_zero.forget_all();
                    self.reference.resize(0);
                    self.destination.clear();
                    None
                }
            };
            self.destination.insert(at, held);
        }

        /// The page as the destination makes it of what it holds.
        fn compare(&mut self, at: PageAt, held: Option<&Vec<u8>>, next: Vec<u8>, batch: &Batch) -> Vec<u8> {
            match self.reference.compare(at, &next, batch, &mut self.out) {
                Compared::Equal => held.expect("it was sent").clone(),
                Compared::Delta(bytes) | Compared::DeltaOfZeros(bytes) => {
                    let mut page = held.expect("it was sent").clone();
                    Delta::parse(&self.out[..bytes], 4096).unwrap().apply(&mut page);
                    assert!(page == next);
                    page
                }
                Compared::Miss | Compared::Overflow => next,
            }
        }

        /// Whether each reference is what the destination holds.
        fn is_kept(&mut self) -> bool {
            let Self { reference, known_zero, destination, .. } = self;
            destination.iter().all(|(&at, held)| {
                let entry = reference.cache.get(at, 0).map(|entry| entry.to_vec());
                let zero = known_zero.contains(at).then(|| vec![0; 4096]);
                (entry.is_none() || zero.is_none())
                    && entry.or(zero).is_none_or(|reference| held.as_ref() == Some(&reference))
            })
        }
    }

    proptest! {
        /// Law 6 (the delta's reference is what the destination holds) in a model: pages are sent in any way, and what a delta may
        /// refer to equals what the destination holds.
        #[test]
        fn a_reference_is_what_the_destination_holds_or_gone(cache_pages in 0..20u64, passes in passes()) {
            let mut model = Model::new(cache_pages);
            for (step, (page, pass, last)) in (0..).zip(passes) {
                let at = PageAt { block: 0, page };
                let kind = if last { RoundKind::Final } else { RoundKind::Live };
                let before = model.reference.cache.get(at, 0).map(|entry| entry.to_vec());
                model.pass(at, pass, &Batch { kind, ..batch(0, 1, 1 + step / 20) });
                prop_assert!(model.is_kept(), "{pass:?} of page {page}");
                let after = model.reference.cache.get(at, 0).map(|entry| entry.to_vec());
                prop_assert!(!last || after.is_none() || after == before, "a final round makes no entries");
            }
        }
    }

    #[test]
    fn a_page_that_becomes_zero_leaves_its_place_to_another() {
        let mut model = Model::new(1);
        let (first, second) = (batch(0, 1, 1), batch(0, 1, 2));
        let [zero, other] = [0, 1].map(|page| PageAt { block: 0, page });
        model.reference.will_hold(zero, &[1; 4096], &first);
        model.reference.will_hold(other, &[1; 4096], &first);
        assert!(model.reference.cache.get(other, 1).is_none(), "there is room for one page");
        model.reference.will_be_zero(first.at, 1);
        assert_eq!(model.reference.compare(other, &[2; 4096], &second, &mut model.out), Compared::Miss);
        assert_eq!(model.reference.compare(other, &[2; 4096], &second, &mut model.out), Compared::Equal);
        assert_eq!(model.reference.compare(zero, &[0; 4096], &second, &mut model.out), Compared::Equal);
        assert_eq!(model.reference.compare(zero, &[1; 4096], &second, &mut model.out), Compared::Overflow);
        assert!(!model.known_zero.contains(zero));
    }
}
