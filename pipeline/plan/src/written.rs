//! The pages that a guest wrote between any two moments of its trace.
//!
//! - **Part of an interval.** Of n pages written in an interval, n · f^α are assumed to be written in a share f of
//!   it. α is 1 for a guest that always writes different pages, and near 0 for one that writes the same pages all the
//!   time. It is estimated from the trace: two intervals together have 2^α times the pages of one. The pages are
//!   chosen by hash, so that the parts of an interval add up to it.
//! - **At the end of the trace** the trace is repeated.

use std::borrow::Cow;
use std::ops::Range;
use std::time::Duration;

use fastrand::Rng;
use memferry_stages::geometry::bits;

use super::trace::{Interval, Trace};

/// The memory that decompressed intervals may take; a larger trace is decompressed at each access.
const AT_HAND_BYTES: u64 = 1 << 30;
/// The least α: a guest that writes the same pages all the time.
const LEAST_GROWTH: f64 = 0.02;

/// A word of the bitmap: its number and the bits of its pages.
type Word = (u32, u64);

/// See the [module](self).
#[derive(Debug)]
pub struct Written<'a> {
    trace: &'a Trace,
    /// The end of each interval, from the start of the first.
    ends: Vec<Duration>,
    /// The α of each interval.
    growth: Vec<f64>,
    /// The words of each interval, if they are in memory.
    stored: Vec<Box<[Word]>>,
    /// The union of all intervals' words.
    all: Box<[Word]>,
}

impl<'a> Written<'a> {
    /// Prepares a trace.
    ///
    /// # Panics
    /// If the trace has no interval.
    #[must_use]
    pub fn of(trace: &'a Trace) -> Self {
        let ends = trace.intervals.iter().scan(Duration::ZERO, |end, interval| {
            *end += interval.length;
            Some(*end)
        });
        let ends: Vec<_> = ends.collect();
        assert!(!ends.is_empty(), "a trace has intervals");
        let words = trace.guest.words();
        let bytes = |interval: &Interval| interval.written.pages().min(words) * size_of::<Word>() as u64;
        let keeps = trace.intervals.iter().map(bytes).sum::<u64>() <= AT_HAND_BYTES;
        let mut all = vec![0; usize::try_from(words).expect("a bitmap that fits into memory")];
        let (mut stored, mut growth) = (Vec::new(), Vec::new());
        let mut before: Option<(&Interval, Box<[Word]>)> = None;
        for interval in &trace.intervals {
            let here = read(interval);
            here.iter().for_each(|&(word, mask)| all[word as usize] |= mask);
            if let Some((interval_before, before)) = before.take() {
                growth.push(grows((interval_before, &before), (interval, &here)));
                stored.extend(keeps.then_some(before));
            }
            before = Some((interval, here));
        }
        growth.push(growth.last().copied().unwrap_or(1.0));
        stored.extend(before.map(|(_, last)| last).filter(|_| keeps));
        let all = (0..).zip(all).filter(|&(_, mask)| mask != 0).collect();
        Self { trace, ends, growth, stored, all }
    }

    /// The trace.
    #[must_use]
    pub fn trace(&self) -> &'a Trace {
        self.trace
    }

    /// The number of words of a bitmap of the guest.
    #[must_use]
    pub fn words(&self) -> usize {
        usize::try_from(self.trace.guest.words()).expect("a bitmap that fits into memory")
    }

    /// Reports the pages that are written from one moment of the guest's time to another, word by word; some more
    /// than once.
    pub fn between(&self, from: Duration, to: Duration, mut report: impl FnMut(usize, u64)) {
        let whole = *self.ends.last().expect("a trace has intervals");
        if to.saturating_sub(from) >= whole {
            return self.all.iter().for_each(|&(word, mask)| report(word as usize, mask));
        }
        let mut from = from;
        while from < to {
            let turns = from.as_nanos() / whole.as_nanos() * whole.as_nanos();
            let turn = Duration::from_nanos(u64::try_from(turns).unwrap_or(u64::MAX));
            let interval = self.ends.partition_point(|&end| turn + end <= from);
            let length = self.trace.intervals[interval].length;
            let end = turn + self.ends[interval];
            let share = |time: Duration| 1.0 - (end.saturating_sub(time)).as_secs_f64() / length.as_secs_f64();
            let until = end.min(to);
            self.part(interval, share(from)..share(until), &mut report);
            from = until;
        }
    }

    fn part(&self, interval: usize, part: Range<f64>, report: &mut impl FnMut(usize, u64)) {
        let length = part.end - part.start;
        let is_all = length >= 1.0 - 1e-9;
        let drawn = length.powf(self.growth[interval]);
        let start = if is_all { 0.0 } else { part.start * (1.0 - drawn) / (1.0 - length) };
        let range = start..start + drawn;
        for &(word, mask) in &*self.interval(interval) {
            let is_drawn = |&bit: &u32| range.contains(&place(interval, word, bit));
            let mask = if is_all { mask } else { bits(mask).filter(is_drawn).fold(0, |drawn, bit| drawn | 1 << bit) };
            if mask != 0 {
                report(word as usize, mask);
            }
        }
    }

    fn interval(&self, interval: usize) -> Cow<'_, [Word]> {
        match self.stored.get(interval) {
            Some(stored) => Cow::Borrowed(stored),
            None => Cow::Owned(read(&self.trace.intervals[interval]).into()),
        }
    }
}

/// The page's position among those of the interval, from 0 to 1.
fn place(interval: usize, word: u32, bit: u32) -> f64 {
    let hash = Rng::with_seed((u64::from(word) * 64 + u64::from(bit)) ^ ((interval as u64) << 40)).u64(..);
    (hash >> 11) as f64 / (1_u64 << 53) as f64
}

fn read(interval: &Interval) -> Box<[Word]> {
    let mut words: Vec<Word> = Vec::new();
    for Range { start, end } in interval.written.runs() {
        for number in start / 64..end.div_ceil(64) {
            let (first, last) = (start.max(number * 64) - number * 64, end.min(number * 64 + 64) - number * 64);
            let below = |bit: u64| if bit == 64 { u64::MAX } else { (1 << bit) - 1 };
            let (number, mask) = (u32::try_from(number).expect("at most 2^32 words"), below(last) & !below(first));
            match words.last_mut() {
                Some((last, bits)) if *last == number => *bits |= mask,
                _ => words.push((number, mask)),
            }
        }
    }
    words.into()
}

/// The exponent by which the number of written pages grows with time, from two adjacent intervals.
fn grows(one: (&Interval, &[Word]), other: (&Interval, &[Word])) -> f64 {
    let [first, second] = [one.0, other.0].map(|interval| interval.written.pages() as f64);
    if first == 0.0 || second == 0.0 {
        return 1.0;
    }
    // The pages that the second adds to the first, relative to its length.
    let lengths = (one.0.length + other.0.length).as_secs_f64() / one.0.length.as_secs_f64();
    let both = first + second - common(one.1, other.1) as f64;
    ((both / first).ln() / lengths.ln()).clamp(LEAST_GROWTH, 1.0)
}

/// The pages that both have.
fn common(one: &[Word], other: &[Word]) -> u64 {
    let (mut left, mut right, mut common) = (one.iter().peekable(), other.iter().peekable(), 0);
    while let (Some(&&(a, mask)), Some(&&(b, bits))) = (left.peek(), right.peek()) {
        if a == b {
            common += u64::from((mask & bits).count_ones());
        }
        if a <= b {
            left.next();
        }
        if b <= a {
            right.next();
        }
    }
    common
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::trace::{GuestFacts, Runs, Samples};

    const TENTH: Duration = Duration::from_millis(100);

    fn trace(intervals: &[BTreeSet<u64>]) -> Trace {
        let guest = GuestFacts::of_blocks(vec![("ram".into(), 1 << 16)]);
        let interval = |pages: &BTreeSet<u64>| {
            let mut runs: Vec<Range<u64>> = Vec::new();
            for &page in pages {
                match runs.last_mut() {
                    Some(last) if last.end == page => last.end += 1,
                    _ => runs.push(page..page + 1),
                }
            }
            Interval { length: TENTH, sync: Duration::ZERO, written: Runs::of(runs) }
        };
        Trace { guest, intervals: intervals.iter().map(interval).collect(), samples: Samples::default() }
    }

    fn between(written: &Written<'_>, from: Duration, to: Duration) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        written.between(from, to, |word, mask| pages.extend(bits(mask).map(|bit| word as u64 * 64 + u64::from(bit))));
        pages
    }

    proptest! {
        #[test]
        fn whole_intervals_are_their_union_and_begin_again_behind_the_last(
            sets in prop::collection::vec(prop::collection::btree_set(0_u64..2000, 0..80), 1..6),
            from in 0_u32..12, count in 0_u32..12,
        ) {
            let trace = trace(&sets);
            let written = Written::of(&trace);
            let wanted: BTreeSet<u64> = (from..from + count).flat_map(|at| &sets[at as usize % sets.len()]).copied().collect();
            prop_assert_eq!(between(&written, TENTH * from, TENTH * (from + count)), wanted);
        }

        #[test]
        fn parts_of_an_interval_have_its_pages_and_no_others(
            set in prop::collection::btree_set(0_u64..2000, 1..300), cut in 1_u32..99, salt in 0_u64..3,
        ) {
            let other: BTreeSet<u64> = set.iter().map(|page| page + salt * 1000).collect();
            let trace = trace(&[set.clone(), other]);
            let written = Written::of(&trace);
            let cut = TENTH * cut / 100;
            let (one, two) = (between(&written, Duration::ZERO, cut), between(&written, cut, TENTH));
            prop_assert!(one.is_subset(&set) && two.is_subset(&set));
            if salt > 0 && set.iter().all(|page| *page < salt * 1000) {
                // Always different pages: each in one of the parts.
                prop_assert_eq!(one.len() + two.len(), set.len());
                prop_assert!(one.union(&two).eq(&set));
            }
        }
    }

    #[test]
    fn a_short_part_has_few_of_ever_other_pages_and_all_of_ever_the_same() {
        let same: BTreeSet<u64> = (0..1000).collect();
        let others = |from: u64| (from..from + 1000).collect::<BTreeSet<u64>>();
        for (intervals, fewest, most) in
            [(vec![same.clone(), same], 900, 1000), (vec![others(0), others(5000)], 70, 130)]
        {
            let trace = trace(&intervals);
            let found = between(&Written::of(&trace), Duration::ZERO, TENTH / 10).len();
            assert!((fewest..=most).contains(&found), "{found}");
        }
    }
}
