//! A trace as a guest of the [simulation](crate::controller::simulation).
//!
//! It keeps the sets of pages that a migration keeps (dirty, sent in the last round, sent as a delta before) bit by bit, as unions
//! of the intervals of the trace, and takes from the samples only what a page of such a set comes to.
//!
//! - **Part of an interval.** Of n pages written in an interval, n · f^α are taken to be written in a share f of it: α is 1
//!   for a guest that writes ever other pages, and near 0 for one that writes the same ones all the time. It is read off the trace:
//!   two intervals together have 2^α times the pages of one. Which pages they are is drawn by hash, so that the parts of an
//!   interval add up to it.
//! - **Within a round.** Pages are sent in the order of their numbers. A page that was written before it was sent and not after
//!   is found by the sync all the same (unless the log re-arms late), but the destination has it already: with its copy in
//!   the cache it is unchanged.
//! - **The cache** has a copy of a page with a likelihood that follows from its size: pages that were written last are
//!   kept before others.
//! - **When the trace is over** it begins again.

use std::ops::Range;
use std::time::Duration;

use memferry_stages::codec::Codec;
use memferry_stages::tally::RoundTally;
use memferry_stages::wire::frame::HEAD_BYTES;
use memferry_stages::wire::pages::MIN_HEAD_BYTES;

use super::sampler::Random;
use super::trace::{Coded, DeltaSample, Deltas, Samples, Trace};
use crate::controller::simulation::{Encoded, Guest};
use crate::settings::{SourceSettings, XbzrleSettings};

/// Bytes of a page's descriptor in a frame.
const DESCRIPTOR_BYTES: f64 = 4.0;
/// Bytes that the cache keeps besides each page.
const SLOT_BYTES: u64 = 16;
/// The share of a cache that is filled before pages are turned away.
const FILLED: f64 = 0.97;
/// A round is looked at in so many parts, in each of which the same pages are sent already.
const PARTS: u32 = 8;
/// Sampled pages from which a figure counts.
const ENOUGH: u64 = 12;

/// See the [module](self).
#[derive(Debug)]
pub struct TracedGuest<'a> {
    trace: &'a Trace,
    settings: &'a SourceSettings,
    /// The end of each interval, from the begin of the first.
    ends: Vec<Duration>,
    /// How the pages of an interval grow with its length, once it was asked for.
    growth: Vec<Option<f64>>,
    /// The interval that was read last.
    at_hand: Option<(usize, Vec<Range<u64>>)>,
    round: u32,
    /// The pages of the round that is being sent: in the first round all, for which no bits are kept.
    sent: Vec<u64>,
    /// Those of them that were sent, up to each word; to find how far a round is.
    sent_before: Vec<u64>,
    /// What the sync after it found, and what of it the destination does not have.
    dirty: Vec<u64>,
    changed: Vec<u64>,
    /// Pages that were sent in a round of deltas.
    known: Vec<u64>,
    /// What was sent in the round before, if that had deltas.
    before: Vec<u64>,
    /// Guest's time of the last round.
    window: Duration,
    /// How far beyond its end the trace was asked for.
    reached: Duration,
}

impl<'a> TracedGuest<'a> {
    /// The guest of a trace, moved with these settings.
    #[must_use]
    pub fn new(trace: &'a Trace, settings: &'a SourceSettings) -> Self {
        let words = usize::try_from(trace.guest.words()).expect("a bitmap that fits into memory");
        let ends = trace.intervals.iter().scan(Duration::ZERO, |end, interval| {
            *end += interval.length;
            Some(*end)
        });
        Self {
            ends: ends.collect(),
            growth: vec![None; trace.intervals.len()],
            at_hand: None,
            round: 0,
            sent: Vec::new(),
            sent_before: Vec::new(),
            dirty: vec![0; words],
            changed: vec![0; words],
            known: vec![0; words],
            before: Vec::new(),
            window: Duration::ZERO,
            reached: Duration::ZERO,
            trace,
            settings,
        }
    }

    /// How much of its own time the guest was asked for: more than the trace has means that it was repeated.
    #[must_use]
    pub fn reached(&self) -> Duration {
        self.reached
    }

    fn samples(&self) -> &'a Samples {
        &self.trace.samples
    }

    /// Pages of the first round that are not zero.
    fn filled(&self) -> f64 {
        let touched = self.trace.guest.pages() - self.trace.guest.untouched;
        touched as f64 * (1.0 - self.samples().touched.share())
    }

    fn first_round(&self, pages: u64) -> Encoded {
        let filled = self.filled();
        let whole = self.settings.encoder.compress.map(|codec| self.coded(codec, &self.samples().whole));
        let whole = whole.unwrap_or_else(|| self.raw());
        let mut sum = Sum { filled, ..Sum::default() };
        sum.compressed = filled * whole.compressed;
        sum.bytes = filled * whole.bytes;
        sum.zero = pages as f64 - filled;
        let touched = (self.trace.guest.pages() - self.trace.guest.untouched) as f64;
        sum.encode_nanos = filled * (whole.nanos + self.checksum());
        sum.read_nanos = touched * self.samples().read.per_page();
        self.encoded(1, pages, self.trace.guest.words(), &sum)
    }

    /// A round of what was written.
    fn later_round(&self, round: u32, pages: u64) -> Encoded {
        let extents = self.dirty.iter().filter(|&&word| word != 0).count() as u64;
        let sum = match &self.settings.encoder.xbzrle {
            None => self.without_deltas(pages as f64),
            Some(xbzrle) => self.with_deltas(xbzrle),
        };
        self.encoded(round, pages, extents, &sum)
    }

    fn without_deltas(&self, pages: f64) -> Sum {
        let to_zero = self.all_deltas().share(|sample| sample.to_zero);
        let filled = pages * (1.0 - to_zero);
        let coded = self.settings.encoder.compress.map(|codec| self.coded(codec, &self.samples().written));
        let coded = coded.unwrap_or_else(|| self.raw());
        Sum {
            filled,
            zero: pages - filled,
            compressed: filled * coded.compressed,
            bytes: filled * coded.bytes,
            encode_nanos: filled * (coded.nanos + self.checksum()),
            read_nanos: pages * self.samples().read.per_page(),
            ..Sum::default()
        }
    }

    fn with_deltas(&self, xbzrle: &XbzrleSettings) -> Sum {
        let kinds = self.kinds();
        let cached = self.cached(xbzrle, &kinds);
        let alone = self.settings.encoder.compress.filter(|_| xbzrle.compress_on_miss);
        let whole = alone.map_or_else(|| self.raw(), |codec| self.coded(codec, &self.samples().alone));
        let mut sum = Sum::default();
        for (kind, hit) in kinds.iter().zip(cached) {
            let sample = self.deltas_over(self.window, kind.again);
            let was_zero = if kind.first { sample.share(|sample| sample.from_zero) } else { 0.0 };
            let written = kind.changed + kind.unchanged;
            sum.zero += written * sample.share_of_compared(|sample| sample.to_zero);
            let filled = written * (1.0 - sample.share_of_compared(|sample| sample.to_zero));
            let hits = filled * hit * (1.0 - was_zero);
            let misses = filled - hits;
            // A page without a copy that was not written since it was sent is sent again all the same.
            let compared = if written > 0.0 { hits * kind.changed / written } else { 0.0 };
            let deltas = compared * sample.share_of_changes(|sample| sample.deltas);
            let overflows = compared * sample.share_of_changes(|sample| sample.overflows);
            sum.unchanged += hits - deltas - overflows;
            sum.deltas += deltas;
            sum.misses += misses;
            sum.overflows += overflows;
            sum.bytes += deltas * sample.delta_bytes() + (misses + overflows) * whole.bytes;
            sum.compressed += (misses + overflows) * whole.compressed;
            sum.filled += deltas + overflows + misses;
            sum.encode_nanos += hits * self.samples().delta.per_page();
            sum.encode_nanos += (misses + overflows) * (whole.nanos + self.checksum());
            sum.read_nanos += written * self.samples().read.per_page();
        }
        sum
    }

    /// The pages of the round by what the cache may have of them.
    fn kinds(&self) -> [PagesOfKind; 3] {
        let mut kinds = [
            PagesOfKind { again: true, ..PagesOfKind::default() },
            PagesOfKind::default(),
            PagesOfKind { first: true, ..PagesOfKind::default() },
        ];
        for (at, &dirty) in self.dirty.iter().enumerate().filter(|&(_, &dirty)| dirty != 0) {
            let (known, before) = (self.known[at], self.before.get(at).copied().unwrap_or(0));
            let masks = [dirty & before, dirty & known & !before, dirty & !known & !before];
            for (kind, mask) in kinds.iter_mut().zip(masks) {
                kind.changed += f64::from((mask & self.changed[at]).count_ones());
                kind.unchanged += f64::from((mask & !self.changed[at]).count_ones());
            }
        }
        kinds
    }

    /// For each kind: how likely is it that the cache has a page of it?
    fn cached(&self, xbzrle: &XbzrleSettings, kinds: &[PagesOfKind; 3]) -> [f64; 3] {
        let lanes = u64::from(self.settings.lanes);
        let slots = xbzrle.cache_bytes / lanes / (self.trace.guest.page_size.bytes() as u64 + SLOT_BYTES) * lanes;
        let slots = slots as f64 * FILLED;
        let count = |words: &[u64]| words.iter().map(|word| f64::from(word.count_ones())).sum::<f64>();
        let (known, before) = (count(&self.known), count(&self.before));
        let share = |of: f64, room: f64| if of > 0.0 { (room / of).clamp(0.0, 1.0) } else { 1.0 };
        let first_left = (self.filled() - known).max(kinds[2].changed + kinds[2].unchanged);
        let first = if xbzrle.cache_first_round { share(first_left, slots - known) } else { 0.0 };
        [share(before, slots), share(known - before, slots - before), first]
    }

    /// What a page comes to with this codec. Where nothing was sampled, as a whole page.
    fn coded(&self, codec: Codec, of: &[Coded; 3]) -> PageCost {
        let samples = [of, &self.samples().whole].map(|of| of[Samples::index(codec)]);
        let Some(found) = samples.into_iter().find(|coded| coded.pages >= ENOUGH) else { return self.raw() };
        let per_page = |amount: u64| amount as f64 / found.pages as f64;
        PageCost { bytes: per_page(found.bytes), compressed: per_page(found.compressed), nanos: per_page(found.nanos) }
    }

    fn raw(&self) -> PageCost {
        PageCost { bytes: self.trace.guest.page_size.bytes() as f64, compressed: 0.0, nanos: 0.0 }
    }

    fn checksum(&self) -> f64 {
        if self.settings.checksum { self.samples().checksum.per_page() } else { 0.0 }
    }

    fn all_deltas(&self) -> Mix {
        let mut all = DeltaSample::default();
        for Deltas { again, rested, .. } in &self.samples().deltas {
            all += *again;
            all += *rested;
        }
        Mix::of(all)
    }

    /// Deltas of copies that are so old, by the spans that were sampled next to that.
    fn deltas_over(&self, age: Duration, again: bool) -> Mix {
        let of_kind = |deltas: &Deltas, again: bool| if again { deltas.again } else { deltas.rested };
        for again in [again, !again] {
            let spans = self.samples().deltas.iter().map(|deltas| (deltas.span, of_kind(deltas, again)));
            let spans: Vec<_> = spans.filter(|(_, sample)| sample.pages >= ENOUGH).collect();
            let Some(&(_, first)) = spans.first() else { continue };
            let longer = spans.iter().position(|&(span, _)| span > age);
            return match longer {
                Some(0) => Mix::of(first),
                None => Mix::of(spans[spans.len() - 1].1),
                Some(next) => {
                    let ((short, one), (long, other)) = (spans[next - 1], spans[next]);
                    let log = |time: Duration| time.as_secs_f64().ln();
                    let share = (log(age) - log(short)) / (log(long) - log(short));
                    Mix::of(one).and(Mix::of(other), share)
                }
            };
        }
        // Nothing was seen to be written: whole pages.
        Mix { overflows: 1.0, ..Mix::default() }
    }

    fn encoded(&self, round: u32, pages: u64, extents: u64, sum: &Sum) -> Encoded {
        let whole = |amount: f64| whole(amount.round());
        let zero = whole(sum.zero).min(pages);
        let unchanged = whole(sum.unchanged).min(pages - zero);
        let xbzrle = whole(sum.deltas).min(pages - zero - unchanged);
        let compressed = whole(sum.compressed).min(pages - zero - unchanged - xbzrle);
        let heads = extents as f64 * (HEAD_BYTES + MIN_HEAD_BYTES) as f64 + sum.filled * DESCRIPTOR_BYTES;
        let tally = RoundTally {
            round,
            last: false,
            batches: extents,
            pages,
            zero,
            raw: pages - zero - unchanged - xbzrle - compressed,
            compressed,
            xbzrle,
            unchanged,
            xbzrle_misses: whole(sum.misses),
            xbzrle_overflows: whole(sum.overflows),
            bytes_in: pages * self.trace.guest.page_size.bytes() as u64,
            bytes_out: whole(sum.bytes + heads),
        };
        // Every core is used by all lanes together; a lane is no faster than its slowest stage.
        let lanes = f64::from(self.settings.lanes);
        let by_cores = (sum.read_nanos + sum.encode_nanos) / f64::from(self.trace.guest.cores);
        let nanos = by_cores.max(sum.read_nanos.max(sum.encode_nanos) / lanes);
        Encoded { tally, stages: Duration::from_nanos(whole(nanos)) }
    }
}

impl Guest for TracedGuest<'_> {
    fn pages(&self) -> u64 {
        self.trace.guest.pages()
    }

    fn page_bytes(&self) -> u64 {
        self.trace.guest.page_size.bytes() as u64
    }

    fn send(&mut self, round: u32, pages: u64, _last: bool) -> Encoded {
        let encoded = if round == 1 { self.first_round(pages) } else { self.later_round(round, pages) };
        if round > 1 {
            self.known.iter_mut().zip(&self.dirty).for_each(|(known, dirty)| *known |= dirty);
            self.before.clone_from(&self.dirty);
            self.sent.clone_from(&self.dirty);
            self.sent_before.clear();
            let mut sum = 0;
            self.sent_before.extend(self.sent.iter().map(|word| {
                sum += u64::from(word.count_ones());
                sum
            }));
        }
        self.round = round;
        encoded
    }

    fn written(&mut self, from: Duration, to: Duration) -> u64 {
        self.dirty.fill(0);
        self.changed.fill(0);
        self.window = to - from;
        self.reached = self.reached.max(to);
        for part in 0..PARTS {
            let at = |part: u32| from + self.window * part / PARTS;
            let how_far = (f64::from(part) + 0.5) / f64::from(PARTS);
            let (start, end) = (at(part), at(part + 1));
            let sent = self.words_sent(how_far);
            self.add(start, end, sent);
        }
        self.dirty.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

impl TracedGuest<'_> {
    /// The words whose pages are sent when so much of the round is over.
    fn words_sent(&self, how_far: f64) -> usize {
        match self.sent_before.last() {
            None => index(self.dirty.len() as f64 * how_far),
            Some(&all) => self.sent_before.partition_point(|&before| (before as f64) < all as f64 * how_far),
        }
    }

    /// Adds what is written from one moment to another, while the pages of the words below `sent` are sent already.
    fn add(&mut self, from: Duration, to: Duration, sent: usize) {
        let whole = *self.ends.last().expect("a trace has intervals");
        let mut from = from;
        while from < to {
            let turn = whole.as_nanos() * (from.as_nanos() / whole.as_nanos());
            let turn = Duration::from_nanos(u64::try_from(turn).unwrap_or(u64::MAX));
            let interval = self.ends.partition_point(|&end| turn + end <= from);
            let length = self.trace.intervals[interval].length;
            let (begin, end) = (turn + self.ends[interval] - length, turn + self.ends[interval]);
            let until = end.min(to);
            let share = |time: Duration| (time - begin).as_secs_f64() / length.as_secs_f64();
            self.add_part(interval, share(from)..share(until), sent);
            from = until;
        }
    }

    fn add_part(&mut self, interval: usize, part: Range<f64>, sent: usize) {
        let growth = self.growth_of(interval);
        self.read(interval);
        let Some((_, runs)) = self.at_hand.take() else { return };
        let length = part.end - part.start;
        let drawn = length.powf(growth);
        let start = if length < 1.0 { part.start * (1.0 - drawn) / (1.0 - length) } else { 0.0 };
        let hit = Draw { salt: interval as u64, all: length >= 1.0 - 1e-9, range: start..start + drawn };
        for run in &runs {
            for (word, mask) in words(run) {
                self.add_word(word, hit.of(word, mask), sent);
            }
        }
        self.at_hand = Some((interval, runs));
    }

    fn add_word(&mut self, word: usize, mask: u64, sent: usize) {
        let to_be_sent = if word < sent {
            0
        } else {
            self.sent.get(word).copied().unwrap_or(if self.round <= 1 { u64::MAX } else { 0 })
        };
        // What is written before it is sent is no news to the destination, and to some logs neither.
        self.changed[word] |= mask & !to_be_sent;
        self.dirty[word] |= if self.trace.guest.rearms_late { mask & !to_be_sent } else { mask };
    }

    fn read(&mut self, interval: usize) {
        if self.at_hand.as_ref().is_none_or(|&(read, _)| read != interval) {
            self.at_hand = Some((interval, self.trace.intervals[interval].written.runs()));
        }
    }

    /// α of the interval: what it and one next to it have together.
    fn growth_of(&mut self, interval: usize) -> f64 {
        if let Some(growth) = self.growth[interval] {
            return growth;
        }
        let next = if interval + 1 < self.ends.len() { interval + 1 } else { interval.saturating_sub(1) };
        let intervals = &self.trace.intervals;
        let growth = growth(
            (intervals[interval].written.runs(), intervals[interval].length),
            (intervals[next].written.runs(), intervals[next].length),
        );
        self.growth[interval] = Some(growth);
        growth
    }
}

/// How the pages that are written grow with the time, as a power of it, by two intervals that lie side by side.
fn growth((one, length): (Vec<Range<u64>>, Duration), (other, more): (Vec<Range<u64>>, Duration)) -> f64 {
    let count = |runs: &[Range<u64>]| runs.iter().map(|run| run.end - run.start).sum::<u64>() as f64;
    let (first, second) = (count(&one), count(&other));
    let both = first + second - overlap(&one, &other);
    let ratio = (length + more).as_secs_f64() / length.as_secs_f64();
    if first == 0.0 || second == 0.0 {
        return 1.0;
    }
    ((both / first).ln() / ratio.ln()).clamp(0.02, 1.0)
}

/// Pages that both have.
fn overlap(one: &[Range<u64>], other: &[Range<u64>]) -> f64 {
    let (mut a, mut b, mut both) = (0, 0, 0);
    while let (Some(left), Some(right)) = (one.get(a), other.get(b)) {
        both += left.end.min(right.end).saturating_sub(left.start.max(right.start));
        if left.end <= right.end { a += 1 } else { b += 1 }
    }
    both as f64
}

/// Which pages of an interval are written in a part of it.
struct Draw {
    salt: u64,
    all: bool,
    range: Range<f64>,
}

impl Draw {
    fn of(&self, word: usize, mask: u64) -> u64 {
        if self.all {
            return mask;
        }
        memferry_stages::geometry::bits(mask)
            .filter(|&bit| self.range.contains(&self.place(word, bit)))
            .fold(0, |drawn, bit| drawn | 1 << bit)
    }

    /// The page's place among those of the interval, from 0 to 1.
    fn place(&self, word: usize, bit: u32) -> f64 {
        let hash = Random((word as u64 * 64 + u64::from(bit)) ^ self.salt << 40).next();
        (hash >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// The words of a run, with the bits of its pages.
fn words(run: &Range<u64>) -> impl Iterator<Item = (usize, u64)> + use<> {
    let Range { start, end } = run.clone();
    (start / 64..end.div_ceil(64)).map(move |word| {
        let (first, last) = (start.max(word * 64) - word * 64, end.min(word * 64 + 64) - word * 64);
        let below = |bit: u64| if bit == 64 { u64::MAX } else { (1 << bit) - 1 };
        (index(word as f64), below(last) & !below(first))
    })
}

fn index(number: f64) -> usize {
    usize::try_from(whole(number)).unwrap_or(usize::MAX)
}

fn whole(number: f64) -> u64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it saturates, and is not negative")]
    let whole = number as u64;
    whole
}

/// Pages of which the cache may have a copy for the same reason.
#[derive(Clone, Copy, Debug, Default)]
struct PagesOfKind {
    /// Were they sent in the round before, after the first?
    again: bool,
    /// Were they sent in the first round only?
    first: bool,
    changed: f64,
    unchanged: f64,
}

/// What a page comes to if it is sent whole.
#[derive(Clone, Copy, Debug)]
struct PageCost {
    bytes: f64,
    compressed: f64,
    nanos: f64,
}

/// What a round comes to.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    /// Pages with bytes in their frames.
    filled: f64,
    zero: f64,
    compressed: f64,
    deltas: f64,
    unchanged: f64,
    misses: f64,
    overflows: f64,
    bytes: f64,
    read_nanos: f64,
    encode_nanos: f64,
}

/// Shares of the pages of a sample.
#[derive(Clone, Copy, Debug, Default)]
struct Mix {
    from_zero: f64,
    to_zero: f64,
    equal: f64,
    overflows: f64,
    deltas: f64,
    delta_bytes: f64,
}

impl Mix {
    fn of(sample: DeltaSample) -> Self {
        let share = |part: u64| if sample.pages == 0 { 0.0 } else { part as f64 / sample.pages as f64 };
        Self {
            from_zero: share(sample.from_zero),
            to_zero: share(sample.to_zero),
            equal: share(sample.equal),
            overflows: share(sample.overflows),
            deltas: share(sample.deltas),
            delta_bytes: if sample.deltas == 0 { 0.0 } else { sample.delta_bytes as f64 / sample.deltas as f64 },
        }
    }

    /// So much of the other, and the rest of this.
    fn and(self, other: Self, share: f64) -> Self {
        let mix = |one: f64, other: f64| one * (1.0 - share) + other * share;
        Self {
            from_zero: mix(self.from_zero, other.from_zero),
            to_zero: mix(self.to_zero, other.to_zero),
            equal: mix(self.equal, other.equal),
            overflows: mix(self.overflows, other.overflows),
            deltas: mix(self.deltas, other.deltas),
            delta_bytes: if self.deltas == 0.0 {
                other.delta_bytes
            } else if other.deltas == 0.0 {
                self.delta_bytes
            } else {
                mix(self.delta_bytes, other.delta_bytes)
            },
        }
    }

    fn share(&self, of: impl Fn(&Self) -> f64) -> f64 {
        of(self)
    }

    /// Of the pages whose copy was not zero.
    fn share_of_compared(&self, of: impl Fn(&Self) -> f64) -> f64 {
        let compared = self.to_zero + self.equal + self.overflows + self.deltas;
        if compared > 0.0 { of(self) / compared } else { 0.0 }
    }

    /// Of those that are not zero now either.
    fn share_of_changes(&self, of: impl Fn(&Self) -> f64) -> f64 {
        let changes = self.equal + self.overflows + self.deltas;
        if changes > 0.0 { of(self) / changes } else { 0.0 }
    }

    fn delta_bytes(&self) -> f64 {
        self.delta_bytes
    }
}
