//! A trace as a guest of the [simulation](memferry::controller::simulation).
//!
//! The model has the same sets of pages as a migration (dirty, sent in the last round, sent as a delta before), bit
//! by bit, as unions of the intervals of the trace. From the samples it takes only the average cost of a page of such
//! a set.
//!
//! - **Within a round.** Pages are sent in the order of their numbers. A page that was written before it was sent and
//!   not after is still found by the sync (unless the log re-arms late), but the destination already has its content:
//!   if its copy is in the cache, the page is unchanged.
//! - **Zeros** need no cache: the first write to a page that was sent as zero is a delta.
//! - **The cache** holds a copy of a page with a probability that follows from the cache's size: pages that were
//!   written last are retained first.

use std::time::Duration;

use memferry_stages::batch::RoundKind;
use memferry_stages::codec::Codec;
use memferry_stages::encoder::misses;
use memferry_stages::tally::{PageTally, RoundTally};
use memferry_stages::wire::frame::HEAD_BYTES;
use memferry_stages::wire::pages::MIN_HEAD_BYTES;

use super::bandwidth::Bandwidth;
use super::index;
use super::mix::{Mix, least_equal};
use super::trace::{Coded, DeltaSample, Deltas, Samples, Trace};
use super::written::Written;
use memferry::controller::forecast::whole;
use memferry::model::guest::{Encoded, Found, Guest, Sending};
use memferry::settings::{OnMiss, SourceSettings, XbzrleSettings};

/// Bytes of a page's descriptor in a frame.
const DESCRIPTOR_BYTES: f64 = 4.0;
/// Bytes that the cache stores in addition to each page.
pub(super) const SLOT_BYTES: u64 = 16;
/// The share of a cache that is filled before pages are rejected.
const FILLED: f64 = 0.97;
/// The number of parts into which a round is divided; the set of pages that are already sent is constant within each.
const PARTS: u32 = 8;
/// The least number of sampled pages for a figure to count.
const ENOUGH: u64 = 12;

/// See the [module](self).
#[derive(Debug)]
pub struct TracedGuest<'a> {
    written: &'a Written<'a>,
    trace: &'a Trace,
    settings: &'a SourceSettings,
    /// Of the link.
    bandwidth: Bandwidth,
    round: u32,
    /// The pages of the round that is being sent. Empty in the first round, which sends all.
    sent: Vec<u64>,
    /// The number of those pages up to each word, to find how far a round has come.
    sent_before: Vec<u64>,
    /// The pages that the next sync finds, and those among them whose content the destination does not have.
    dirty: Vec<u64>,
    changed: Vec<u64>,
    /// Pages that were sent in a round of deltas.
    known: Vec<u64>,
    /// Pages that are written about as often as a round is sent: those written in the time that follows the first
    /// round.
    regular: Vec<u64>,
    /// The pages of the previous round, if it used deltas.
    before: Vec<u64>,
    /// The guest's time in the last round.
    window: Duration,
    /// The latest moment of the trace that was asked for, repetitions included.
    reached: Duration,
}

impl<'a> TracedGuest<'a> {
    /// The guest of a trace, moved with these settings over a link of this bandwidth.
    #[must_use]
    pub fn new(written: &'a Written<'a>, settings: &'a SourceSettings, bandwidth: Bandwidth) -> Self {
        let trace = written.trace();
        let words = written.words();
        Self {
            written,
            round: 0,
            sent: Vec::new(),
            sent_before: Vec::new(),
            dirty: vec![0; words],
            changed: vec![0; words],
            known: vec![0; words],
            regular: vec![0; words],
            before: Vec::new(),
            window: Duration::ZERO,
            reached: Duration::ZERO,
            trace,
            settings,
            bandwidth,
        }
    }

    /// The guest time that was asked for. More than the trace's length means that the trace was repeated.
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

    /// A round of dirty pages.
    fn later_round(&self, round: u32, pages: u64) -> Encoded {
        let extents = self.dirty.iter().filter(|&&word| word != 0).count() as u64;
        let sum = match &self.settings.encoder.xbzrle {
            None => self.without_deltas(pages as f64),
            Some(xbzrle) => self.with_deltas(xbzrle),
        };
        self.encoded(round, pages, extents, &sum)
    }

    fn without_deltas(&self, pages: f64) -> Sum {
        let to_zero = self.all_deltas().to_zero;
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
        let whole = self.missed(xbzrle.on_miss);
        let mut sum = Sum::default();
        for (kind, hit) in kinds.iter().zip(cached) {
            let sample = self.deltas_over(self.window, kind.again);
            let to_zero = sample.share_of_compared(|sample| sample.to_zero);
            let [changed, unchanged] = [kind.changed, kind.unchanged].map(|pages| pages * (1.0 - to_zero));
            sum.zero += (kind.changed + kind.unchanged) * to_zero;
            sum.read_nanos += (kind.changed + kind.unchanged) * self.samples().read.per_page();
            // What the first round sent as zero needs no copy in the cache.
            let was_zero = if kind.first { self.samples().first_written.share() } else { 0.0 };
            let from_zero = changed * was_zero;
            self.add_compared(&mut sum, from_zero, &self.first_writes_over(self.window, &whole), &whole);
            self.add_compared(&mut sum, (changed - from_zero) * hit, &sample, &whole);
            sum.unchanged += unchanged * hit;
            sum.encode_nanos += unchanged * hit * self.samples().delta.per_page();
            // A page without a copy in the cache is sent again even if it was not written since it was sent.
            let misses = (changed - from_zero + unchanged) * (1.0 - hit);
            sum.misses += misses;
            self.add_whole(&mut sum, misses, &whole);
        }
        sum
    }

    /// Changed pages that are compared with what the destination holds.
    fn add_compared(&self, sum: &mut Sum, pages: f64, sample: &Mix, whole: &PageCost) {
        let deltas = pages * sample.share_of_changes(|sample| sample.deltas);
        let overflows = pages * sample.share_of_changes(|sample| sample.overflows);
        sum.unchanged += pages - deltas - overflows;
        sum.deltas += deltas;
        sum.overflows += overflows;
        sum.filled += deltas;
        sum.bytes += deltas * sample.delta_bytes;
        sum.encode_nanos += pages * self.samples().delta.per_page();
        self.add_whole(sum, overflows, whole);
    }

    /// Pages that no delta helps.
    fn add_whole(&self, sum: &mut Sum, pages: f64, whole: &PageCost) {
        sum.filled += pages;
        sum.bytes += pages * whole.bytes;
        sum.compressed += pages * whole.compressed;
        sum.encode_nanos += pages * (whole.nanos + self.checksum());
    }

    /// The cost of a page for which a delta is not possible, as the encoders decide.
    fn missed(&self, on_miss: OnMiss) -> PageCost {
        let Some(codec) = self.settings.encoder.compress.filter(|_| on_miss != OnMiss::Raw) else { return self.raw() };
        let alone = self.coded(codec, &self.samples().alone);
        if on_miss == OnMiss::Auto {
            let saved = self.raw().bytes - alone.bytes;
            let limit = self.settings.max_bandwidth.map_or(f64::INFINITY, |limit| limit as f64);
            let rate = self.bandwidth.bytes_per_second.min(limit) / f64::from(self.settings.lanes);
            if !misses::pays(saved, alone.nanos, 1e9 / rate) {
                return self.raw();
            }
        }
        alone
    }

    /// The pages of the round, by whether the cache can have a copy and how old the copy is.
    fn kinds(&self) -> [PagesOfKind; 4] {
        let first = PagesOfKind { first: true, ..PagesOfKind::default() };
        let again = PagesOfKind { again: true, ..PagesOfKind::default() };
        let mut kinds = [again, PagesOfKind::default(), PagesOfKind { again: true, ..first }, first];
        // All pages were sent in the first round: those that are written often are recognized by the writes that
        // follow.
        let is_second = self.round == 1;
        for (at, &dirty) in self.dirty.iter().enumerate().filter(|&(_, &dirty)| dirty != 0) {
            let (known, before) = (self.known[at], self.before.get(at).copied().unwrap_or(0));
            let regular = if is_second { self.regular[at] } else { 0 };
            let first = dirty & !known & !before;
            let masks = [dirty & before, dirty & known & !before, first & regular, first & !regular];
            for (kind, mask) in kinds.iter_mut().zip(masks) {
                kind.changed += f64::from((mask & self.changed[at]).count_ones());
                kind.unchanged += f64::from((mask & !self.changed[at]).count_ones());
            }
        }
        kinds
    }

    /// For each kind: the probability that the cache holds a page of it.
    fn cached(&self, xbzrle: &XbzrleSettings, kinds: &[PagesOfKind; 4]) -> [f64; 4] {
        let lanes = u64::from(self.settings.lanes);
        let slots = xbzrle.cache_bytes / lanes / (self.trace.guest.page_size.bytes() as u64 + SLOT_BYTES) * lanes;
        let slots = slots as f64 * FILLED;
        let count = |words: &[u64]| words.iter().map(|word| f64::from(word.count_ones())).sum::<f64>();
        let (known, before) = (count(&self.known), count(&self.before));
        let share = |of: f64, room: f64| if of > 0.0 { (room / of).clamp(0.0, 1.0) } else { 1.0 };
        let of_first: f64 = kinds[2..].iter().map(|kind| kind.changed + kind.unchanged).sum();
        let first_left = (self.filled() - known).max(of_first);
        let first = if xbzrle.cache_first_round { share(first_left, slots - known) } else { 0.0 };
        [share(before, slots), share(known - before, slots - before), first, first]
    }

    /// The cost of a page with this codec. Without samples, that of an uncompressed page.
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
        for Deltas { again, rested, from_zero, .. } in &self.samples().deltas {
            [again, rested, from_zero].into_iter().for_each(|sample| all += *sample);
        }
        Mix::of(all)
    }

    /// Deltas against copies of this age.
    fn deltas_over(&self, age: Duration, again: bool) -> Mix {
        let of_kind = |again| self.interpolated(age, |deltas| if again { deltas.again } else { deltas.rested });
        of_kind(again).or_else(|| of_kind(!again)).unwrap_or(Mix::WHOLE)
    }

    /// Deltas against zeros of pages that were written in this time, or the whole page where that is smaller.
    fn first_writes_over(&self, time: Duration, whole: &PageCost) -> Mix {
        let mix = self.interpolated(time, |deltas| deltas.from_zero).unwrap_or(Mix::WHOLE);
        Mix { delta_bytes: mix.delta_bytes.min(whole.bytes), ..mix }
    }

    /// Samples over this time, interpolated from the sampled spans nearest to it. `None` if no writes were sampled.
    fn interpolated(&self, time: Duration, of_kind: impl Fn(&Deltas) -> DeltaSample) -> Option<Mix> {
        let spans = self.samples().deltas.iter().map(|deltas| (deltas.span, of_kind(deltas)));
        let spans: Vec<_> = spans.filter(|(_, sample)| sample.pages >= ENOUGH).collect();
        let &(_, first) = spans.first()?;
        let mix = match spans.iter().position(|&(span, _)| span > time) {
            Some(0) => Mix::of(first),
            None => Mix::of(spans[spans.len() - 1].1),
            Some(next) => {
                let ((short, one), (long, other)) = (spans[next - 1], spans[next]);
                let log = |time: Duration| time.as_secs_f64().ln();
                let share = (log(time) - log(short)) / (log(long) - log(short));
                Mix::of(one).and(Mix::of(other), share)
            }
        };
        Some(mix.with_equal_at_most(least_equal(&spans)))
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
            kind: RoundKind::Live,
            batches: extents,
            pages: PageTally {
                all: pages,
                zero,
                raw: pages - zero - unchanged - xbzrle - compressed,
                compressed,
                xbzrle,
                unchanged,
                xbzrle_misses: whole(sum.misses),
                xbzrle_overflows: whole(sum.overflows),
                bytes_in: pages * self.trace.guest.page_size.bytes() as u64,
                bytes_out: whole(sum.bytes + heads),
            },
        };
        // All lanes together use every core; a lane is no faster than its slowest stage.
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

    fn send(&mut self, sending: &Sending<'_>) -> Encoded {
        let &Sending { round, pages, from, takes } = sending;
        let mut encoded = if round == 1 { self.first_round(pages) } else { self.later_round(round, pages) };
        if let (2.., Some(from)) = (round, from) {
            // Some pages that the destination already has are written again before their turn.
            self.write_before_sent(from, takes(&encoded));
            encoded = self.later_round(round, pages);
        }
        if round > 1 {
            self.known.iter_mut().zip(&self.dirty).for_each(|(known, dirty)| *known |= dirty);
            self.before.clone_from(&self.dirty);
            self.sent.clone_from(&self.dirty);
            self.sent_before = counts(&self.dirty);
        }
        self.round = round;
        encoded
    }

    fn send_whole(&mut self, sending: &Sending<'_>) -> Encoded {
        let &Sending { round, pages, .. } = sending;
        if round == 1 {
            return self.first_round(pages);
        }
        let extents = self.dirty.iter().filter(|&&word| word != 0).count() as u64;
        self.encoded(round, pages, extents, &self.without_deltas(pages as f64))
    }

    fn look(&self, round: u32, pages: u64) -> Encoded {
        self.later_round(round, pages)
    }

    fn written(&mut self, from: Duration, to: Duration) -> Found {
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
        if self.round == 1 {
            self.regular.fill(0);
            let (written, regular) = (self.written, &mut self.regular);
            written.between(to, to + self.window, |word, mask| regular[word] |= mask);
        }
        self.found()
    }
}

impl TracedGuest<'_> {
    fn found(&self) -> Found {
        let dirty = self.dirty.iter().map(|word| u64::from(word.count_ones())).sum();
        let Some(xbzrle) = &self.settings.encoder.xbzrle else { return Found { dirty, cached: 0 } };
        let known = self.dirty.iter().zip(&self.known).map(|(dirty, known)| u64::from((dirty & known).count_ones()));
        let known: u64 = known.sum();
        // The first round leaves the pages that are not zero in the cache, or none; zeros need no copy.
        let referred = if xbzrle.cache_first_round { 1.0 } else { self.samples().first_written.share() };
        Found { dirty, cached: known + whole((dirty - known) as f64 * referred) }
    }

    /// Marks which pages of a round that begins will be written before they are sent.
    fn write_before_sent(&mut self, from: Duration, time: Duration) {
        let (written, counts) = (self.written, counts(&self.dirty));
        let all = counts.last().copied().unwrap_or(0) as f64;
        for part in 0..PARTS {
            let how_far = (f64::from(part) + 0.5) / f64::from(PARTS);
            let sent = counts.partition_point(|&before| (before as f64) < all * how_far);
            let (dirty, changed) = (&self.dirty, &mut self.changed);
            let start = from + time * part / PARTS;
            written.between(start, from + time * (part + 1) / PARTS, |word, mask| {
                if word >= sent {
                    changed[word] |= mask & dirty[word];
                }
            });
        }
    }

    /// The number of words whose pages are sent at this fraction of the round.
    fn words_sent(&self, how_far: f64) -> usize {
        match self.sent_before.last() {
            None => index(self.dirty.len() as f64 * how_far),
            Some(&all) => self.sent_before.partition_point(|&before| (before as f64) < all as f64 * how_far),
        }
    }

    /// Adds the writes from one moment to another; the pages of the words below `sent` are already sent.
    fn add(&mut self, from: Duration, to: Duration, sent: usize) {
        let written = self.written;
        written.between(from, to, |word, mask| self.add_word(word, mask, sent));
    }

    fn add_word(&mut self, word: usize, mask: u64, sent: usize) {
        let to_be_sent = if word < sent {
            0
        } else {
            self.sent.get(word).copied().unwrap_or(if self.round <= 1 { u64::MAX } else { 0 })
        };
        // A write before the page is sent does not make the destination's copy stale, and some logs do not report it.
        self.changed[word] |= mask & !to_be_sent;
        self.dirty[word] |= if self.trace.guest.rearms_late { mask & !to_be_sent } else { mask };
    }
}

/// For each word, the number of pages up to its end.
fn counts(words: &[u64]) -> Vec<u64> {
    let sum = words.iter().scan(0, |sum, word| {
        *sum += u64::from(word.count_ones());
        Some(*sum)
    });
    sum.collect()
}

/// Pages whose copies may be in the cache for the same reason.
#[derive(Clone, Copy, Debug, Default)]
struct PagesOfKind {
    /// Were they written in the preceding round as well?
    again: bool,
    /// Were they sent in the first round only?
    first: bool,
    changed: f64,
    unchanged: f64,
}

/// The cost of a page that is sent whole.
#[derive(Clone, Copy, Debug)]
struct PageCost {
    bytes: f64,
    compressed: f64,
    nanos: f64,
}

/// The totals of a round.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    /// Pages with a payload in their frames.
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
