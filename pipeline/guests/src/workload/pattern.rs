//! Which page a writer writes next.
//!
//! A [`Plan`] is computed from the settings at each end; the [`Cursor`] is the state that changes, and travels.

use fastrand::Rng;

use super::settings::Pattern;

/// The position of a writer in its pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cursor {
    /// Its generator.
    pub(super) random: Rng,
    /// The index that a sequential writer writes next.
    pub(super) next: u32,
}

/// A pattern over a known number of pages.
#[derive(Debug)]
pub(super) struct Plan {
    pages: u32,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Sequential,
    Uniform,
    Zipf(Zipf),
    HotSpot { hot: u32, writes: f64 },
}

impl Plan {
    /// The plan of a writer that has `pages` pages, at least one.
    pub(super) fn new(pattern: Pattern, pages: u32) -> Self {
        assert!(pages > 0, "a pattern over no pages");
        let kind = match pattern {
            Pattern::Sequential => Kind::Sequential,
            Pattern::Uniform => Kind::Uniform,
            Pattern::Zipf { exponent } => Kind::Zipf(Zipf::new(exponent, pages)),
            Pattern::HotSpot { pages: share, writes } => Kind::HotSpot { hot: share_of(share, pages), writes },
        };
        Self { pages, kind }
    }

    /// The index, below the number of pages, of the page to write.
    pub(super) fn choose(&self, cursor: &mut Cursor) -> u32 {
        match &self.kind {
            Kind::Sequential => {
                let chosen = cursor.next;
                cursor.next = (chosen + 1) % self.pages;
                chosen
            }
            Kind::Uniform => cursor.random.u32(..self.pages),
            Kind::Zipf(zipf) => zipf.choose(&mut cursor.random),
            Kind::HotSpot { hot, writes } => {
                let cold = self.pages - hot;
                let is_hot = cold == 0 || cursor.random.f64() < *writes;
                if is_hot { cursor.random.u32(..*hot) } else { hot + cursor.random.u32(..cold) }
            }
        }
    }
}

/// A share of the pages, at least one page.
fn share_of(share: f64, pages: u32) -> u32 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of 0 to 1 of a u32")]
    let hot = (share * f64::from(pages)).round() as u32;
    hot.clamp(1, pages)
}

/// Draws ranks 1 to n in proportion to 1 / rank^exponent in constant time and without tables, by rejection and
/// inversion of the integral of that function (Hörmann and Derflinger, 1996), and scatters them over the pages.
#[derive(Debug)]
struct Zipf {
    exponent: f64,
    pages: u32,
    from: f64,
    to: f64,
    sure: f64,
    stride: u64,
}

impl Zipf {
    fn new(exponent: f64, pages: u32) -> Self {
        let mut zipf = Self { exponent, pages, from: 0.0, to: 0.0, sure: 0.0, stride: stride(pages) };
        zipf.from = zipf.integral(1.5) - 1.0;
        zipf.to = zipf.integral(f64::from(pages) + 0.5);
        zipf.sure = 2.0 - zipf.inverse(zipf.integral(2.5) - zipf.weight(2.0));
        zipf
    }

    fn choose(&self, random: &mut Rng) -> u32 {
        scattered(self.rank(random) - 1, self.stride, self.pages)
    }

    fn rank(&self, random: &mut Rng) -> u32 {
        loop {
            let height = self.to + random.f64() * (self.from - self.to);
            let exact = self.inverse(height);
            let nearest = exact.round().clamp(1.0, f64::from(self.pages));
            if nearest - exact <= self.sure || height >= self.integral(nearest + 0.5) - self.weight(nearest) {
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 1 to pages")]
                return nearest as u32;
            }
        }
    }

    fn weight(&self, x: f64) -> f64 {
        x.powf(-self.exponent)
    }

    /// The integral of the weight from 1 to x; the logarithm where the exponent is (nearly) 1.
    fn integral(&self, x: f64) -> f64 {
        let (log, power) = (x.ln(), 1.0 - self.exponent);
        if (power * log).abs() < 1e-8 { log } else { (power * log).exp_m1() / power }
    }

    fn inverse(&self, area: f64) -> f64 {
        let power = 1.0 - self.exponent;
        // Rounding can bring the argument to -1 or just below where the integral converges.
        let grown = (area * power).max(-1.0);
        if grown.abs() < 1e-8 { area.exp() } else { (grown.ln_1p() / power).exp() }
    }
}

/// The page of a rank, both counted from 0.
fn scattered(rank: u32, stride: u64, pages: u32) -> u32 {
    u32::try_from(u64::from(rank) * stride % u64::from(pages)).expect("below the number of pages")
}

/// A step near the golden section of `pages` that shares no divisor with it: its multiples visit every page once.
fn stride(pages: u32) -> u64 {
    let pages = u64::from(pages);
    let start = (pages * 618 / 1000).max(1);
    (start..).find(|&step| divisor(step, pages) == 1).expect("a prime is not far")
}

fn divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use fastrand::Rng;
    use proptest::prelude::*;

    use super::*;

    fn draw(pattern: Pattern, pages: u32, draws: u32, seed: u64) -> Vec<u32> {
        let plan = Plan::new(pattern, pages);
        let mut cursor = Cursor { random: Rng::with_seed(seed), next: 0 };
        let mut counts = vec![0; pages as usize];
        (0..draws).for_each(|_| counts[plan.choose(&mut cursor) as usize] += 1);
        counts
    }

    /// Is a count of successes within six standard deviations of the expected one, with a small allowance for rare
    /// ones?
    fn is_likely(count: u32, draws: u32, probability: f64) -> bool {
        let (count, draws) = (f64::from(count), f64::from(draws));
        let deviation = (draws * probability * (1.0 - probability)).sqrt();
        (count - draws * probability).abs() <= 6.0 * deviation + 8.0
    }

    proptest! {
        #[test]
        fn sequential_visits_each_page_in_turn(pages in 1_u32..500, rounds in 1_u32..4) {
            prop_assert!(draw(Pattern::Sequential, pages, pages * rounds, 1).iter().all(|&count| count == rounds));
        }

        #[test]
        fn uniform_gives_every_page_its_share(pages in 1_u32..200, seed: u64) {
            let counts = draw(Pattern::Uniform, pages, 20_000, seed);
            prop_assert!(counts.iter().all(|&count| is_likely(count, 20_000, 1.0 / f64::from(pages))));
        }

        #[test]
        fn zipf_gives_every_rank_its_share(pages in 1_u32..200, exponent in 0.05_f64..4.0, seed: u64) {
            let drawn = draw(Pattern::Zipf { exponent }, pages, 20_000, seed);
            let counts: Vec<u32> =
                (0..pages).map(|rank| drawn[scattered(rank, stride(pages), pages) as usize]).collect();
            let weight = |rank: usize| ((rank + 1) as f64).powf(-exponent);
            let sum: f64 = (0..counts.len()).map(weight).sum();
            for (rank, &count) in counts.iter().enumerate() {
                prop_assert!(is_likely(count, 20_000, weight(rank) / sum), "rank {rank}: {count}");
            }
        }

        #[test]
        fn a_hot_spot_gets_its_share(pages in 2_u32..500, share in 0.01_f64..1.0, writes in 0.0_f64..=1.0, seed: u64) {
            let hot = share_of(share, pages);
            let counts = draw(Pattern::HotSpot { pages: share, writes }, pages, 20_000, seed);
            let hits = counts[..hot as usize].iter().sum();
            let expected = if hot == pages { 1.0 } else { writes };
            prop_assert!(is_likely(hits, 20_000, expected));
        }

        #[test]
        fn ranks_are_scattered_over_all_pages(pages in 1_u32..5000) {
            let mut seen = vec![false; pages as usize];
            for rank in 0..pages {
                seen[scattered(rank, stride(pages), pages) as usize] = true;
            }
            prop_assert!(seen.iter().all(|&seen| seen));
        }
    }

    #[test]
    fn extreme_exponents_stay_in_bounds() {
        for (exponent, pages) in [(16.0, u32::MAX), (1e-9, u32::MAX), (1.0, u32::MAX), (1.0 + 1e-12, 3), (16.0, 1)] {
            let plan = Plan::new(Pattern::Zipf { exponent }, pages);
            let mut cursor = Cursor { random: Rng::with_seed(7), next: 0 };
            assert!((0..10_000).all(|_| plan.choose(&mut cursor) < pages), "{exponent} over {pages}");
        }
    }
}
