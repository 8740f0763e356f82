//! Decides which pages are worth a try at compression: sample, skip, sample again.
//!
//! Memory that does not shrink must not cost the time of compression, and which memory that is changes from page to page. So
//! a quick test, [`looks_like_noise`], sorts pages into two classes. For each class, the outcome of the last tries decides
//! whether the next page is tried:
//!
//! ```text
//!              ┌── shrank ──────────────────────────────────────────────┐
//!              ▼                                                        │
//!  in trust: groups are tried ── [`PATIENCE`] tries in a row ──▶ in doubt: some pages are skipped, then one is tried;
//!                                failed                          after each failure twice as many are skipped, up to
//!                                                                [`LONGEST`]
//! ```
//!
//! Pages that look like noise begin in doubt, all others in trust. The test may be wrong either way (noise that repeats, text
//! in base 64). Its cost is then bounded:
//! - *Time*: of pages that never shrink, [`PATIENCE`] groups are tried, then one page in [`LONGEST`], after the doubling.
//! - *Ratio*: where memory changes to pages that shrink, at most [`LONGEST`] of them are skipped, and (except for [`PATIENCE`]) at
//!   most as many as pages of that class came since the last that shrank. Where they come often enough to keep the trust, none is.
//!
//! It uses no clock and no random numbers: the same pages and outcomes give the same choices.

/// Failed tries in a row before pages are skipped.
const PATIENCE: u32 = 4;
/// The most pages that are skipped between two tries.
const LONGEST: u32 = 256;

/// The policy of one lane.
#[derive(Debug)]
pub(super) struct Sampler {
    plain: Trust,
    noise: Trust,
}

/// The next pages, up to where the next group begins: those of `tried` are compressed together, the others are raw. The first
/// page is one of `tried`, if any is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// How many pages.
    pub(super) pages: u32,
    /// Which of them are tried, the first as bit 0. They look alike.
    pub(super) tried: u64,
}

impl Span {
    /// A span of pages of which none is tried.
    pub(super) fn raw(pages: usize) -> Self {
        Self { pages: u32::try_from(pages).expect("at most 64"), tried: 0 }
    }
}

/// The state of one class of pages.
#[derive(Debug)]
struct Trust {
    /// Failed tries in a row, up to [`PATIENCE`].
    failures: u32,
    /// Pages that were skipped before the last try.
    passed: u32,
    /// Pages that are still to be skipped.
    pass: u32,
}

impl Sampler {
    pub(super) fn new() -> Self {
        let trust = |failures| Trust { failures, passed: 0, pass: 0 };
        Self { plain: trust(0), noise: trust(PATIENCE) }
    }

    /// Decides on the next of `pages` pages, of which those in the mask `noise` look like noise. A group has at most
    /// `group` pages. If anything is tried in the span, its outcome must be reported before the next call.
    pub(super) fn span(&mut self, pages: u32, noise: u64, group: u32) -> Span {
        let (mut tried, mut room, mut look) = (0_u64, group, false);
        for page in 0..pages {
            let noisy = noise >> page & 1 == 1;
            let trust = self.trust(noisy);
            if trust.pass > 0 {
                trust.pass -= 1;
                continue;
            }
            if tried == 0 && page > 0 {
                return Span { pages: page, tried };
            }
            if tried == 0 {
                (look, room) = (noisy, trust.most(group));
            } else if look != noisy || room == 0 {
                return Span { pages: page, tried };
            }
            tried |= 1 << page;
            room -= 1;
        }
        Span { pages, tried }
    }

    /// Reports the outcome of a span's tried pages: whether they shrank enough to be worth it.
    pub(super) fn outcome(&mut self, span: Span, noise: u64, shrank: bool) {
        let noisy = noise & span.tried != 0;
        self.trust(noisy).outcome(shrank);
    }

    fn trust(&mut self, noisy: bool) -> &mut Trust {
        if noisy { &mut self.noise } else { &mut self.plain }
    }
}

impl Trust {
    /// How many pages may be tried together.
    fn most(&self, group: u32) -> u32 {
        if self.failures < PATIENCE { group } else { 1 }
    }

    fn outcome(&mut self, shrank: bool) {
        if shrank {
            *self = Self { failures: 0, passed: 0, pass: 0 };
            return;
        }
        self.failures = (self.failures + 1).min(PATIENCE);
        if self.failures == PATIENCE {
            self.passed = (self.passed * 2).clamp(PATIENCE, LONGEST);
            self.pass = self.passed;
        }
    }
}

/// Words of a page that the quick test reads.
const GLANCE_WORDS: usize = 16;
/// The number of pairs of equal bytes in the quick test from which a page does not look like noise. The 128 bytes of the test form
/// 128 × 127 / 2 = 8,128 pairs; in noise each is equal with probability 1/256, so 32 are expected, with a standard deviation of
/// 6. Text and records have hundreds.
const PAIRS: u32 = 64;

/// Whether a page's bytes look evenly distributed: tests 128 bytes from all over it.
pub(super) fn looks_like_noise(page: &[u8]) -> bool {
    // One word more than an even step, which might hit the same field of each record.
    let step = page.len() / GLANCE_WORDS / 8 * 8 + 8;
    let (mut seen, mut pairs) = ([0_u8; 256], 0);
    for word in page.chunks(step.min(page.len())).filter_map(|chunk| chunk.first_chunk::<8>()) {
        for &byte in word {
            let before = &mut seen[usize::from(byte)];
            pairs += u32::from(*before);
            *before += 1;
        }
    }
    pairs < PAIRS
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GROUP: u32 = 16;

    /// A page: whether it looks like noise, and whether it shrinks.
    #[derive(Clone, Copy, Debug)]
    struct Page {
        noisy: bool,
        shrinks: bool,
    }

    /// The outcome of each page: whether it was tried, and with how many others.
    fn run(pages: &[Page], batch: usize) -> Vec<u32> {
        let mut sampler = Sampler::new();
        let mut fates = Vec::new();
        for batch in pages.chunks(batch) {
            let mut rest = batch;
            while !rest.is_empty() {
                let noise = (0..).zip(rest).fold(0, |mask, (bit, page)| mask | u64::from(page.noisy) << bit);
                let span = sampler.span(u32::try_from(rest.len()).unwrap(), noise, GROUP);
                let (these, behind) = rest.split_at(span.pages as usize);
                let tried = |index: usize| span.tried >> index & 1 == 1;
                let group: Vec<_> = (0..these.len()).filter(|&index| tried(index)).map(|index| these[index]).collect();
                assert!(span.tried == 0 || tried(0), "a group stands at the beginning of its span");
                assert!(group.len() <= GROUP as usize && span.pages > 0 && span.tried >> (span.pages - 1) <= 1);
                assert!(
                    group.windows(2).all(|pair| pair[0].noisy == pair[1].noisy),
                    "a group of pages that look alike"
                );
                if !group.is_empty() {
                    sampler.outcome(span, noise, group.iter().any(|page| page.shrinks));
                }
                let members = u32::try_from(group.len()).unwrap();
                fates.extend((0..these.len()).map(|index| if tried(index) { members } else { 0 }));
                rest = behind;
            }
        }
        fates
    }

    fn tried(fates: &[u32]) -> usize {
        fates.iter().filter(|&&group| group > 0).count()
    }

    fn stretches() -> impl Strategy<Value = Vec<(bool, usize)>> {
        prop::collection::vec((any::<bool>(), 1..1000_usize), 1..12)
    }

    proptest! {
        /// The promise of time.
        #[test]
        fn pages_that_never_shrink_are_hardly_tried(looks in prop::collection::vec(any::<bool>(), 1..4000), batch in 1..=64_usize) {
            let pages: Vec<_> = looks.iter().map(|&noisy| Page { noisy, shrinks: false }).collect();
            let groups = (PATIENCE * GROUP) as usize;
            // 4, 8 … 128 pages are passed over before the rhythm of the longest is reached.
            let doubling = 2 * (LONGEST / PATIENCE).ilog2() as usize;
            let rhythm = pages.len() / (LONGEST as usize + 1) + 4;
            prop_assert!(tried(&run(&pages, batch)) <= groups + doubling + rhythm);
        }

        /// The promise of ratio, for pages that look alike: of each stretch that shrinks, no more is passed over than the
        /// longest pass, nor than pages came before it since the last that shrank and was tried.
        #[test]
        fn a_change_to_pages_that_shrink_is_seen_in_time(stretches in stretches(), noisy: bool, batch in 1..=64_usize) {
            let pages: Vec<_> = stretches
                .iter()
                .flat_map(|&(shrinks, length)| std::iter::repeat_n(Page { noisy, shrinks }, length))
                .collect();
            let fates = run(&pages, batch);
            let (mut since, mut lost) = (0, 0);
            for (page, &group) in pages.iter().zip(&fates) {
                match (page.shrinks, group > 0) {
                    (true, true) => (since, lost) = (0, 0),
                    (true, false) => lost += 1,
                    (false, _) => (since, lost) = (since + lost + 1, 0),
                }
                prop_assert!(lost <= LONGEST, "{lost} pages in a row");
                prop_assert!(lost <= since + PATIENCE, "{lost} pages after {since}");
            }
        }

        /// Where pages shrink as they look, all that shrink are tried, but for nothing; others hardly are.
        #[test]
        fn what_looks_as_it_is_goes_as_it_should(looks in prop::collection::vec(any::<bool>(), 1..2000), batch in 1..=64_usize) {
            let pages: Vec<_> = looks.iter().map(|&noisy| Page { noisy, shrinks: !noisy }).collect();
            let fates = run(&pages, batch);
            prop_assert!(pages.iter().zip(&fates).all(|(page, &group)| page.noisy || group > 0));
            let noise: Vec<_> = pages.iter().zip(&fates).filter(|(page, _)| page.noisy).map(|(_, &group)| group).collect();
            prop_assert!(tried(&noise) <= 8 + noise.len() / LONGEST as usize);
        }
    }

    #[test]
    fn pages_in_turns_are_grouped_across_each_other() {
        let pages: Vec<_> = (0..64).map(|page| Page { noisy: page % 2 == 1, shrinks: page % 2 == 0 }).collect();
        let fates = run(&[&pages[..], &pages, &pages, &pages].concat(), 64);
        // Noise is tried now and then, and ends the group that is open.
        let whole = fates[128..].iter().filter(|&&group| group == GROUP).count();
        assert!(whole >= 48, "{fates:?}");
    }

    #[test]
    fn noise_that_shrinks_all_the_same_is_found_at_once() {
        let fates = run(&[Page { noisy: true, shrinks: true }; 65], 64);
        assert_eq!((fates[0], &fates[1..17]), (1, &[16; 16][..]));
        assert_eq!(tried(&fates), 65);
    }

    #[test]
    fn a_few_pages_that_do_not_shrink_do_not_end_the_trust() {
        let pages: Vec<_> = (0..1000).map(|page| Page { noisy: false, shrinks: page % 64 < 16 }).collect();
        assert_eq!(tried(&run(&pages, 64)), 1000);
    }

    #[test]
    fn glances() {
        let mut state = 1_u64;
        let mut noise = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state.rotate_left(29).to_le_bytes()[0]
        };
        for size in [4096, 8192, 65536] {
            for _ in 0..2000 {
                let page: Vec<u8> = (0..size).map(|_| noise()).collect();
                assert!(looks_like_noise(&page));
            }
            let text: Vec<u8> = (0..size).map(|at| b"all work and no play makes a dull page; "[at % 40]).collect();
            assert!(!looks_like_noise(&text) && !looks_like_noise(&vec![7; size]));
            let base64: Vec<u8> = (0..size).map(|_| b'0' + noise() % 64).collect();
            assert!(!looks_like_noise(&base64), "6 bits of 8 are worth a try");
            // Numbers whose high bytes are 0, pointers into one heap, floats.
            for fixed in [6, 4, 2] {
                let records: Vec<u8> = (0..size).map(|at| if at % 8 < fixed { 0x55 } else { noise() }).collect();
                assert!(!looks_like_noise(&records), "{fixed} of 8 bytes");
            }
        }
    }
}
