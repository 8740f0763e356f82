//! The forecast of the downtime: the remaining bytes after encoding, at the rate measured lately, plus the fixed cost
//! of a switchover.
//!
//! The bytes of a page on the wire depend on whether it can be sent as a delta. The number of dirty pages that can is
//! known: the encoders record which pages entered their cache and which were sent as zero. The size of a delta is taken
//! from the latest round of deltas, and so is the number of pages that the cache has lost again. Deltas get smaller from
//! round to round if a page is written so often that a shorter round leaves fewer changes in it: the dirty rate rises by
//! the same factor then, since a page counts once however often it is written. Before any round of deltas is measured, a
//! sample of the dirty pages is sent and shows their size; until then every page counts as sent without a delta. Zero
//! pages of the first round count as nothing: a written page is seldom zero.
//!
//! The duration is that of the wire, or of the busiest stage if that is longer. The stages' own figures show which of
//! the two limited a round. The rate of the wire is taken from the time in which the senders had anything to send: a
//! round that the stages before them limited shows the same rate.
//!
//! Of several measurements a decision takes neither the latest nor the mean, but a high quantile ([`QUANTILE`]): a
//! limit that one lucky measurement meets is not met. What it leads to is the same by the median of them
//! ([`Forecaster::likely`]), which the report compares with what is measured.

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::time::Duration;

use memferry_stages::tally::RoundTally;

use crate::downtime::DowntimeParts;
use crate::settings::{OnMiss, SourceSettings, SwitchoverBandwidth};

/// If a round took longer than its busiest stage worked by this factor, the wire was the limit.
const WIRE_HOLDS_UP: f64 = 1.25;
/// How much measured time a figure is averaged over: long enough to be smooth, short enough to follow the guest and the
/// link.
const WINDOW: Duration = Duration::from_millis(200);
/// How many bytes of pages a figure is averaged over: a round of a few pages measures the latency of a round, not a
/// rate.
const WINDOW_BYTES: u64 = 8 << 20;
/// Page bytes of a round from which its duration is used to compute the time of a page.
const TELLING_BYTES: u64 = 2 << 20;
/// A delta is assumed to take at least this share of the bytes that deltas took in the round before.
const LEAST_OF_A_DELTA: f64 = 0.25;
/// A sample of pages that can be sent as deltas is worth a round trip from this number of them on.
const WORTH_A_SAMPLE: u64 = 64;
/// The approximate number of pages of a sample: enough for an estimate.
const SAMPLE_PAGES: u64 = 512;
/// A sample is at most one in this number of dirty pages: a small part of what remains.
const SAMPLE_SHARE: u64 = 4;
/// How many of those rounds show the time that the stages need for a page.
const REPRESENTATIVE_ROUNDS: usize = 4;
/// The quantile of the measurements that the forecast counts on: this share of them was no worse.
pub const QUANTILE: f64 = 0.9;
/// The quantile of what is as likely to be more as less.
const MEDIAN: f64 = 0.5;
/// How many measurements of a part are stored, and how many windows show the rate of the wire.
const MEASUREMENTS: usize = 10;
/// Rounds that are stored: a window never needs more.
const MOST_ROUNDS: usize = 64;
/// From this share of `max_bandwidth` on, the cap limits the rounds, and not the link or the host.
const AT_CAP: f64 = 0.9;
/// The share of the downtime limit that the backlog may still need when the guest is paused.
const BACKLOG_SHARE: f64 = 0.05;

/// The cost of a switchover that does not depend on the remaining pages: the parts of the downtime besides the
/// transfer. [`DowntimeParts`] says what each is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FixedCost {
    /// Pausing the guest.
    pub pause: Duration,
    /// Device state.
    pub state: Duration,
    /// One more bitmap sync.
    pub sync: Duration,
    /// From the last byte sent until everything is loaded.
    pub load: Duration,
    /// Verification.
    pub verify: Duration,
    /// Writing to disk.
    pub durable: Duration,
    /// Preparing the guest.
    pub prepare: Duration,
    /// Starting the guest.
    pub start: Duration,
    /// The last handshake.
    pub handover: Duration,
}

impl FixedCost {
    /// The sum.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.with_transfer(Duration::ZERO).total()
    }

    /// As the parts of a downtime with this transfer.
    fn with_transfer(&self, transfer: Duration) -> DowntimeParts {
        let Self { pause, state, sync, load, verify, durable, prepare, start, handover } = *self;
        DowntimeParts {
            pause,
            state,
            final_sync: sync,
            final_transfer: transfer,
            load,
            verify,
            durable,
            prepare,
            start,
            handover,
            resume: Duration::ZERO,
        }
    }
}

/// A part of the fixed cost that is measured while the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measured {
    /// A bitmap sync.
    Sync,
    /// An estimate of what verification takes.
    Verify,
    /// The time from the last byte of a round sent until the destination acknowledged all of it.
    Load,
}

/// The latest measurements of a part, the latest in front.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recent(VecDeque<Duration>);

impl Recent {
    /// Adds a measurement. Returns the high quantile of the latest ones.
    pub(crate) fn with(&mut self, time: Duration) -> Duration {
        self.0.push_front(time);
        self.0.truncate(MEASUREMENTS);
        self.quantile(QUANTILE).unwrap_or(time)
    }

    /// A quantile of the latest measurements, if there are any.
    fn quantile(&self, quantile: f64) -> Option<Duration> {
        let mut sorted: Vec<_> = self.0.iter().copied().collect();
        sorted.sort_unstable();
        sorted.get(rank(sorted.len(), quantile)).copied()
    }
}

/// The index of a quantile in a number of sorted values: the least index such that the share of values up to it reaches
/// the quantile.
fn rank(values: usize, quantile: f64) -> usize {
    let last = values.saturating_sub(1);
    let below = whole((values as f64 * quantile).ceil()).saturating_sub(1);
    usize::try_from(below).map_or(last, |below| below.min(last))
}

/// How long the destination needs to make its memory durable: it does so while pages are loaded, and once more when
/// everything is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteBack {
    /// For what is loaded and not durable yet.
    pub backlog: Duration,
    /// For a call, however little there is to write.
    pub call: Duration,
    /// For each MiB of pages.
    pub per_mib: Duration,
}

/// How long the stages worked on a round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// The busiest stage.
    pub busiest: Duration,
    /// The time in which the busiest sender had anything to send: it wrote, or waited for the transport or the bandwidth
    /// limit. If it is unknown, the duration of the round counts.
    pub sending: Option<Duration>,
}

/// The state of the migration at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Time since the migration began.
    pub elapsed: Duration,
    /// Pages that are known to be dirty and that the scanner has not taken.
    pub dirty_pages: u64,
    /// The part of them that can be sent as deltas: set only after a sync.
    pub cached_pages: u64,
    /// Pages that the scanner took and the destination has not acknowledged.
    pub in_flight_pages: u64,
    /// Page bytes a second that are read lately, as the status shows them: 0 until it is measured.
    pub page_rate: u64,
}

/// The cost of a switchover, and its parts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Forecast {
    /// Bytes after encoding that the paused guest would wait for.
    pub remaining_bytes: f64,
    /// The time to send them.
    pub transfer: Duration,
    /// The time for everything else.
    pub fixed: FixedCost,
}

impl Forecast {
    /// The expected downtime.
    #[must_use]
    pub fn expected(&self) -> Duration {
        self.parts().total()
    }

    /// The expected parts of the downtime.
    #[must_use]
    pub fn parts(&self) -> DowntimeParts {
        self.fixed.with_transfer(self.transfer)
    }
}

/// The measurements of one round.
#[derive(Clone, Copy, Debug, Default)]
struct Achieved {
    /// Pages, without the zero pages of the first round.
    pages: u64,
    page_bytes: u64,
    wire_bytes: u64,
    time: Duration,
    /// How long the busiest stage worked.
    work: Duration,
    /// How long the busiest sender had anything to send.
    sending: Duration,
    /// Pages that were sent whole, and how many of them were compressed.
    whole: u64,
    compressed: u64,
    /// Pages that were to be sent as deltas, and missed the cache.
    misses: u64,
    /// Pages that could have been sent as deltas, as known before the round.
    cached: f64,
    /// Pages a second that the guest dirtied before it.
    dirty_rate: Option<f64>,
}

impl Achieved {
    fn rate(&self) -> f64 {
        self.wire_bytes as f64 / self.sending.as_secs_f64()
    }

    fn is_held_up_by_the_wire(&self) -> bool {
        self.time >= self.work.mul_f64(WIRE_HOLDS_UP)
    }

    /// Adds another round, as far as rates are computed of sums.
    fn add(&mut self, round: &Self) {
        self.pages += round.pages;
        self.page_bytes += round.page_bytes;
        self.wire_bytes += round.wire_bytes;
        self.sending += round.sending;
    }

    fn hits(&self) -> f64 {
        self.pages.saturating_sub(self.misses) as f64
    }

    fn is_enough(&self) -> bool {
        self.sending >= WINDOW && self.page_bytes >= WINDOW_BYTES
    }
}

/// Makes forecasts from the measurements of the rounds.
#[derive(Clone, Debug)]
pub struct Forecaster {
    /// The fixed cost of a switchover, as far as it is known.
    pub fixed: FixedCost,
    recent: RecentCosts,
    way: Way,
    rounds: Rounds,
    dirtied: Dirtied,
}

/// Parts of the cost of a switchover that vary.
#[derive(Clone, Debug, Default)]
struct RecentCosts {
    syncs: Recent,
    verifications: Recent,
    loads: Recent,
    /// How long the destination needs to make its memory durable, by its own forecast.
    write_back: WriteBack,
    /// Was the backlog of the latest round waited for?
    is_drained: bool,
}

/// How pages travel.
#[derive(Clone, Debug)]
struct Way {
    page_bytes: u64,
    /// Are deltas enabled from the second round on?
    deltas: bool,
    /// How pages travel that a delta does not help.
    on_miss: OnMiss,
    max_bandwidth: Option<u64>,
    switchover_bandwidth: SwitchoverBandwidth,
}

/// The rounds so far.
#[derive(Clone, Debug, Default)]
struct Rounds {
    first: Option<Achieved>,
    /// The rounds after the first, the latest in front.
    later: VecDeque<Achieved>,
    /// The measurements of a sample, if one was sent.
    sample: Option<Achieved>,
    /// If not all pages were sent that the last sync had found: how many pages were.
    sent_of_it: Option<u64>,
    /// The time of a page in the latest round, zero pages included: the pages in flight are of that round.
    latest_seconds_per_page: f64,
}

/// What the guest dirties.
#[derive(Clone, Debug, Default)]
struct Dirtied {
    /// Pages a second, if two syncs have measured it.
    rate: Option<f64>,
    /// Dirty pages that the last sync found, and how many of them can be sent as deltas.
    found: (u64, u64),
    last_sync: Duration,
    /// The sync from which the rate was measured.
    measured_from: Duration,
}

impl Forecaster {
    /// For a guest with pages of the given size. Nothing is measured yet.
    #[must_use]
    pub fn new(settings: &SourceSettings, page_bytes: u64) -> Self {
        let xbzrle = settings.encoder.xbzrle.as_ref();
        let way = Way {
            page_bytes,
            deltas: xbzrle.is_some(),
            on_miss: xbzrle.map_or(OnMiss::Raw, |xbzrle| xbzrle.on_miss),
            max_bandwidth: settings.max_bandwidth,
            switchover_bandwidth: settings.switchover_bandwidth,
        };
        Self {
            fixed: FixedCost::default(),
            recent: RecentCosts::default(),
            way,
            rounds: Rounds::default(),
            dirtied: Dirtied::default(),
        }
    }

    /// Other bandwidths apply from here on. Earlier measurements count as far as the new limits allow.
    pub fn set_bandwidth(&mut self, rounds: Option<u64>, switchover: SwitchoverBandwidth) {
        (self.way.max_bandwidth, self.way.switchover_bandwidth) = (rounds, switchover);
    }

    /// A part of the fixed cost was measured.
    pub fn measured(&mut self, part: Measured, time: Duration) {
        match part {
            Measured::Sync => self.fixed.sync = self.recent.syncs.with(time),
            Measured::Verify => self.fixed.verify = self.recent.verifications.with(time),
            // What waits at the end of the first round is drained before the pause. A round trip is left, and the
            // handshake is one.
            Measured::Load if self.rounds.later.is_empty() => self.fixed.load = time.min(self.fixed.handover),
            Measured::Load => self.fixed.load = self.recent.loads.with(time),
        }
    }

    /// The destination's forecast of what it writes to disk.
    pub fn write_back(&mut self, times: WriteBack) {
        self.recent.write_back = times;
    }

    /// A round was sent, from its first batch to its last byte, in `time`.
    pub fn round(&mut self, tally: &RoundTally, time: Duration, work: Work) {
        let round = self.achieved(tally, time, work);
        self.recent.is_drained = false;
        self.rounds.latest_seconds_per_page = round.time.as_secs_f64() / tally.pages.all.max(1) as f64;
        if self.rounds.first.is_none() {
            self.rounds.first = Some(Achieved { pages: tally.pages.all - tally.pages.zero, ..round });
            return;
        }
        self.rounds.later.push_front(round);
        self.rounds.later.truncate(MOST_ROUNDS);
    }

    /// The same for a sample of the pages that the last sync found.
    pub fn sample(&mut self, tally: &RoundTally, time: Duration, work: Work) {
        self.rounds.sample = Some(self.achieved(tally, time, work));
        self.rounds.sent_of_it = Some(tally.pages.all);
    }

    /// Time has passed in which none of the pages that the last sync found was sent. What is not written to disk by then
    /// is not waited for any longer.
    pub fn drained(&mut self) {
        self.rounds.sent_of_it.get_or_insert(0);
        self.recent.is_drained = true;
    }

    fn achieved(&self, tally: &RoundTally, time: Duration, work: Work) -> Achieved {
        let (found, cached) = self.dirtied.found;
        let least = Duration::from_nanos(1);
        Achieved {
            pages: tally.pages.all,
            page_bytes: tally.pages.bytes_in,
            wire_bytes: tally.pages.bytes_out,
            time: time.max(least),
            work: work.busiest,
            sending: work.sending.unwrap_or(time).clamp(least, time.max(least)),
            whole: tally.pages.raw + tally.pages.compressed,
            compressed: tally.pages.compressed,
            misses: tally.pages.xbzrle_misses,
            cached: cached as f64 * tally.pages.all as f64 / found.max(1) as f64,
            dirty_rate: self.dirtied.rate,
        }
    }

    /// The logs are armed, at a time since the migration began: writes are logged from here on.
    pub fn armed(&mut self, elapsed: Duration) {
        self.dirtied.last_sync = elapsed;
    }

    /// A sync found the dirty pages.
    pub fn synced(&mut self, now: &Standing) {
        // Pages that were left then are found again: both syncs count as one.
        let sent = self.rounds.sent_of_it.take();
        if sent.is_none() {
            self.dirtied.measured_from = self.dirtied.last_sync;
        }
        let dirty = now.dirty_pages + sent.unwrap_or(0);
        let since = now.elapsed.saturating_sub(self.dirtied.measured_from).as_secs_f64();
        if since > 0.0 {
            self.dirtied.rate = Some(dirty as f64 / since);
        }
        self.dirtied.found = (now.dirty_pages, now.cached_pages);
        self.dirtied.last_sync = now.elapsed;
    }

    /// Bytes of the given number of pages.
    #[must_use]
    pub fn page_bytes(&self, pages: u64) -> u64 {
        self.way.page_bytes * pages
    }

    /// Bytes of pages a second that the guest dirtied before the last sync, if there was one.
    #[must_use]
    pub fn dirty_bytes_per_second(&self) -> Option<f64> {
        Some(self.dirtied.rate? * self.way.page_bytes as f64)
    }

    /// Bytes of pages a second that rounds have sent lately.
    #[must_use]
    pub fn page_bytes_per_second(&self) -> Option<f64> {
        self.round_seconds_per_page(QUANTILE).map(|seconds| self.way.page_bytes as f64 / seconds)
    }

    /// The cost of a switchover at this moment, with a backlog that is drained as far as `limit` requires. `None` while
    /// nothing is measured and something remains.
    #[must_use]
    pub fn forecast(&self, now: &Standing, limit: Duration) -> Option<Forecast> {
        self.forecast_by(QUANTILE, self.fixed, now, limit)
    }

    /// The same by the median of what was measured: the real cost is as likely to be more as less.
    #[must_use]
    pub fn likely(&self, now: &Standing, limit: Duration) -> Option<Forecast> {
        let median = |recent: &Recent, otherwise| recent.quantile(MEDIAN).unwrap_or(otherwise);
        let fixed = FixedCost {
            sync: median(&self.recent.syncs, self.fixed.sync),
            verify: median(&self.recent.verifications, self.fixed.verify),
            load: median(&self.recent.loads, self.fixed.load),
            ..self.fixed
        };
        self.forecast_by(MEDIAN, fixed, now, limit)
    }

    fn forecast_by(&self, quantile: f64, mut fixed: FixedCost, now: &Standing, limit: Duration) -> Option<Forecast> {
        if !fixed.load.is_zero() {
            // Neither took less than a round trip.
            fixed.handover = fixed.handover.min(fixed.load);
        }
        // The guest continues to run while the rest of either backlog is drained.
        let most = if self.recent.is_drained { Duration::MAX } else { limit.mul_f64(BACKLOG_SHARE) };
        let unwritten = self.recent.write_back.backlog.min(most);
        let writing = (self.recent.write_back.backlog - unwritten).as_secs_f64();
        fixed.durable = fixed.durable.saturating_add(self.recent.write_back.call).saturating_add(unwritten);
        if now.dirty_pages + now.in_flight_pages == 0 && writing == 0.0 {
            return Some(Forecast { remaining_bytes: 0.0, transfer: Duration::ZERO, fixed });
        }
        let backlog = now.in_flight_pages.min(self.backlog_pages(limit)?);
        let draining = (now.in_flight_pages - backlog) as f64 * self.rounds.latest_seconds_per_page;
        let pages = now.dirty_pages as f64 + self.dirtied.rate.unwrap_or(0.0) * draining.max(writing) + backlog as f64;
        let mib = pages * self.way.page_bytes as f64 / f64::from(1 << 20);
        fixed.durable = fixed.durable.saturating_add(seconds(mib * self.recent.write_back.per_mib.as_secs_f64()));
        let transfer = seconds(pages * self.switchover_seconds_per_page(quantile)?);
        // The source computes its digests while the rest is sent: that half adds no time.
        fixed.verify -= transfer.min(fixed.verify / 2);
        Some(Forecast { remaining_bytes: pages * self.wire_bytes_per_page()?, transfer, fixed })
    }

    /// The pages that may still be in flight when the guest is paused: the worth of a small share of the downtime
    /// limit.
    #[must_use]
    pub fn backlog_pages(&self, limit: Duration) -> Option<u64> {
        let pages = limit.as_secs_f64() * BACKLOG_SHARE / self.switchover_seconds_per_page(QUANTILE)?;
        Some(whole(pages))
    }

    /// Has the destination more to write to disk than may be left when the guest is paused? How long that takes.
    #[must_use]
    pub fn write_backlog(&self, limit: Duration) -> Option<Duration> {
        let backlog = self.recent.write_back.backlog;
        (backlog > limit.mul_f64(BACKLOG_SHARE)).then_some(backlog)
    }

    /// How many of the dirty pages are to be sent as a sample: only if the size of deltas is unknown, and enough pages
    /// remain for it to matter.
    #[must_use]
    pub fn sample_wanted(&self, now: &Standing) -> Option<NonZeroU32> {
        let is_shown = self.rounds.sample.is_some() || self.rounds.later.iter().any(|round| round.hits() > 0.0);
        if !self.way.deltas || self.rounds.first.is_none() || is_shown || now.cached_pages < WORTH_A_SAMPLE {
            return None;
        }
        u32::try_from((now.dirty_pages / SAMPLE_SHARE).min(SAMPLE_PAGES)).ok().and_then(NonZeroU32::new)
    }

    /// The duration of another round.
    #[must_use]
    pub fn round_time(&self, now: &Standing) -> Option<Duration> {
        Some(seconds(now.dirty_pages as f64 * self.round_seconds_per_page(QUANTILE)?))
    }

    /// Pages that the guest dirties in the time in which a round sends one: at 1 or above, rounds do not get smaller.
    #[must_use]
    pub fn dirty_ratio(&self) -> Option<f64> {
        Some(self.dirtied.rate? * self.round_seconds_per_page(QUANTILE)?)
    }

    /// Pages that were written since the last sync and not found yet, by the rate before it; `None` before the first.
    #[must_use]
    pub fn unseen_pages(&self, elapsed: Duration) -> Option<f64> {
        Some(self.dirtied.rate? * elapsed.saturating_sub(self.dirtied.last_sync).as_secs_f64())
    }

    /// The bytes of a dirty page on the wire, by recent rounds.
    fn wire_bytes_per_page(&self) -> Option<f64> {
        self.rounds.first?;
        let whole = self.wire_bytes_of_a_whole_page();
        if !self.way.deltas {
            return Some(whole);
        }
        let shown = self.representative().next().or(self.rounds.later.iter().find(|round| round.pages > 0));
        let Some(round) = shown.or(self.rounds.sample.as_ref()) else { return Some(whole) };
        let (dirty, cached) = (self.dirtied.found.0.max(1) as f64, self.dirtied.found.1 as f64);
        let still_cached = if round.cached == 0.0 { 1.0 } else { (round.hits() / round.cached).min(1.0) };
        let hits = (cached / dirty * still_cached).min(1.0);
        // Without a hit the size of a delta is unknown.
        let hit = if round.hits() == 0.0 {
            whole
        } else {
            let bytes = (round.wire_bytes as f64 - round.misses as f64 * whole).max(0.0);
            bytes / round.hits() * self.writes_since(round)
        };
        Some(hits * hit + (1.0 - hits) * whole)
    }

    /// How often a dirty page was written lately, as a share of how often the pages of a round were.
    fn writes_since(&self, round: &Achieved) -> f64 {
        let (Some(before), Some(lately)) = (round.dirty_rate, self.dirtied.rate) else { return 1.0 };
        (before / lately.max(f64::MIN_POSITIVE)).clamp(LEAST_OF_A_DELTA, 1.0)
    }

    /// The same for a page that is sent without a delta.
    fn wire_bytes_of_a_whole_page(&self) -> f64 {
        let of = |achieved: Achieved| achieved.wire_bytes as f64 / achieved.pages as f64;
        if !self.way.deltas {
            let later = self.representative().next().copied().unwrap_or_else(|| lately(self.rounds.later.iter()));
            if later.pages > 0 {
                return of(later);
            }
        }
        let raw = self.way.page_bytes as f64;
        let first = self.rounds.first.filter(|first| first.pages > 0).map_or(raw, of);
        if self.way.deltas { raw + (first - raw) * self.misses_compressed() } else { first }
    }

    /// The share of the pages not helped by a delta that is encoded as in the first round.
    fn misses_compressed(&self) -> f64 {
        match self.way.on_miss {
            OnMiss::Raw => 0.0,
            OnMiss::Compress => 1.0,
            OnMiss::Auto => self.misses_were_compressed().unwrap_or_else(|| {
                // The encoders know the limit beforehand; without one they discover what the first round has shown.
                let wire_holds =
                    self.way.max_bandwidth.is_some() || self.rounds.first.is_some_and(|it| it.is_held_up_by_the_wire());
                f64::from(u8::from(wire_holds))
            }),
        }
    }

    /// The same by the latest round or sample that sent any. A page that does not shrink in the first round does not
    /// later.
    fn misses_were_compressed(&self) -> Option<f64> {
        let share = |round: &Achieved| round.compressed as f64 / round.whole as f64;
        let latest = self.rounds.later.iter().chain(&self.rounds.sample).find(|round| round.whole > 0)?;
        let shrink = self.rounds.first.as_ref().filter(|first| first.compressed > 0).map_or(1.0, share);
        Some((share(latest) / shrink).min(1.0))
    }

    /// Bytes a second on the wire: this share of the latest windows was no slower. No more than the cap allows.
    fn wire_rate(&self, quantile: f64) -> Option<f64> {
        let mut slowest_last = self.windows();
        slowest_last.sort_by(|a, b| b.total_cmp(a));
        let rate = *slowest_last.get(rank(slowest_last.len(), quantile))?;
        let rate = self.way.max_bandwidth.map_or(rate, |cap| rate.min(cap as f64));
        (rate > 0.0).then_some(rate)
    }

    /// The rate of each of the latest windows. Where the rounds after the first do not fill one, the first is added to
    /// it.
    fn windows(&self) -> Vec<f64> {
        let mut rates = Vec::new();
        let mut window = Achieved::default();
        for round in &self.rounds.later {
            window.add(round);
            if window.is_enough() {
                rates.push(std::mem::take(&mut window).rate());
            }
            if rates.len() == MEASUREMENTS {
                return rates;
            }
        }
        if rates.is_empty()
            && let Some(first) = &self.rounds.first
        {
            window.add(first);
            rates.push(window.rate());
        }
        rates
    }

    /// The rounds after the first that were large enough for an estimate, the latest in front.
    fn representative(&self) -> impl Iterator<Item = &Achieved> {
        self.rounds.later.iter().filter(|round| round.page_bytes >= TELLING_BYTES)
    }

    /// Time that the busiest stage needs for a page: the quantile of the latest rounds that were large enough for an
    /// estimate; else by the sample, or by the first round.
    fn stage_seconds_per_page(&self, quantile: f64) -> f64 {
        let of = |round: &Achieved| round.work.as_secs_f64() / round.pages as f64;
        let mut slowest_last: Vec<_> = self.representative().take(REPRESENTATIVE_ROUNDS).map(of).collect();
        if slowest_last.is_empty() {
            slowest_last
                .extend(self.rounds.sample.iter().chain(&self.rounds.first).find(|round| round.pages > 0).map(of));
        }
        slowest_last.sort_by(f64::total_cmp);
        if slowest_last.is_empty() { 0.0 } else { slowest_last[rank(slowest_last.len(), quantile)] }
    }

    /// In a round: the time of the wire, or of the stages if that is longer.
    fn round_seconds_per_page(&self, quantile: f64) -> Option<f64> {
        let wire = self.wire_bytes_per_page()? / self.wire_rate(quantile)?;
        Some(wire.max(self.stage_seconds_per_page(quantile)))
    }

    /// In the switchover, which may have a bandwidth limit of its own.
    fn switchover_seconds_per_page(&self, quantile: f64) -> Option<f64> {
        let rate = self.wire_rate(quantile)?;
        let at_cap = self.way.max_bandwidth.is_some_and(|cap| rate >= AT_CAP * cap as f64);
        match self.way.switchover_bandwidth {
            // The rounds waited for their cap: their duration does not measure the stages.
            SwitchoverBandwidth::AtMost(most) if at_cap => Some(self.wire_bytes_per_page()? / most as f64),
            SwitchoverBandwidth::AtMost(most) => {
                let wire = self.wire_bytes_per_page()? / rate.min(most as f64);
                Some(wire.max(self.stage_seconds_per_page(quantile)))
            }
            SwitchoverBandwidth::AsRounds | SwitchoverBandwidth::Unlimited => self.round_seconds_per_page(quantile),
        }
    }
}

/// The sum of the latest rounds that together are enough; of all rounds, if they are not.
fn lately<'a>(rounds: impl Iterator<Item = &'a Achieved>) -> Achieved {
    let mut sum = Achieved::default();
    for round in rounds {
        if sum.is_enough() {
            break;
        }
        sum.add(round);
    }
    sum
}

/// A duration of this many seconds; the longest duration if it is more.
pub fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

/// The integer part of a figure that is not negative; the largest integer if it is more.
pub fn whole(figure: f64) -> u64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it saturates, and is not negative")]
    let whole = figure as u64;
    whole
}

#[cfg(test)]
mod tests {
    use memferry_stages::tally::PageTally;

    use super::*;
    use crate::settings::{EncoderSettings, XbzrleSettings};

    const MS: Duration = Duration::from_millis(1);
    const LIMIT: Duration = Duration::from_millis(100);
    /// The stages took negligible time.
    const NONE: Work = Work { busiest: Duration::ZERO, sending: None };

    /// The busiest stage worked for this long.
    fn worked(busiest: Duration) -> Work {
        Work { busiest, sending: None }
    }

    fn forecaster(xbzrle: Option<XbzrleSettings>) -> Forecaster {
        let encoder = EncoderSettings { xbzrle, ..EncoderSettings::default() };
        Forecaster::new(&SourceSettings { encoder, ..SourceSettings::default() }, 4096)
    }

    fn pages(all: u64, zero: u64, bytes_out: u64) -> PageTally {
        PageTally { all, zero, bytes_in: all * 4096, bytes_out, ..PageTally::default() }
    }

    fn of(pages: PageTally) -> RoundTally {
        RoundTally { pages, ..RoundTally::default() }
    }

    fn round(all: u64, zero: u64, bytes_out: u64) -> RoundTally {
        of(pages(all, zero, bytes_out))
    }

    fn dirty(dirty_pages: u64) -> Standing {
        Standing { dirty_pages, ..Standing::default() }
    }

    /// With the given number of pages that can be sent as deltas.
    fn transfer(forecaster: &Forecaster, pages: u64) -> f64 {
        transfer_of(forecaster, pages, pages)
    }

    fn transfer_of(forecaster: &Forecaster, dirty_pages: u64, cached_pages: u64) -> f64 {
        let now = Standing { dirty_pages, cached_pages, ..Standing::default() };
        let mut forecaster = forecaster.clone();
        forecaster.synced(&now);
        forecaster.forecast(&now, LIMIT).unwrap().transfer.as_secs_f64()
    }

    #[test]
    fn nothing_is_known_before_a_round_but_what_nothing_costs() {
        let mut forecaster = forecaster(None);
        assert_eq!(forecaster.forecast(&dirty(1), LIMIT), None);
        forecaster.fixed.sync = 3 * MS;
        assert_eq!(forecaster.forecast(&dirty(0), LIMIT).unwrap().expected(), 3 * MS);
    }

    #[test]
    fn zero_pages_of_the_first_round_make_what_is_written_no_cheaper() {
        let mut forecaster = forecaster(None);
        // A second for 10,000 pages, of which 9,000 were zero: the others took 2,000 bytes each.
        forecaster.round(&round(10_000, 9_000, 2_000_000), 1000 * MS, NONE);
        assert!((transfer(&forecaster, 1000) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn what_is_in_flight_of_the_first_round_is_mostly_zero_pages_where_the_round_was() {
        let mut forecaster = forecaster(None);
        forecaster.armed(Duration::ZERO);
        forecaster.round(&round(10_000, 9_900, 200_000), 1000 * MS, NONE);
        forecaster.synced(&Standing { elapsed: 1000 * MS, ..dirty(100) });
        // 5,000 of them take half a second, in which 50 pages are dirtied; a page takes 10 ms.
        let now = Standing { dirty_pages: 100, in_flight_pages: 5_000, ..Standing::default() };
        let transfer = forecaster.forecast(&now, LIMIT).unwrap().transfer.as_secs_f64();
        assert!((transfer - 1.5).abs() < 0.1, "{transfer}");
    }

    #[test]
    fn until_deltas_are_measured_pages_count_as_they_are() {
        let mut forecaster = forecaster(Some(XbzrleSettings { on_miss: OnMiss::Raw, ..XbzrleSettings::default() }));
        forecaster.round(&round(10_000, 0, 10_000_000), 1000 * MS, NONE);
        assert!((transfer(&forecaster, 10_000) - 4.096).abs() < 1e-9);
        // 100 bytes a page, at the same rate.
        forecaster.round(&round(10_000, 0, 1_000_000), 100 * MS, NONE);
        assert!((transfer(&forecaster, 10_000) - 0.1).abs() < 0.001);
    }

    #[test]
    fn a_sample_shows_what_deltas_come_to_and_what_they_take_but_not_the_wire() {
        let mut forecaster = forecaster(Some(XbzrleSettings::default()));
        let found = |dirty_pages, ms| Standing {
            elapsed: ms * MS,
            dirty_pages,
            cached_pages: dirty_pages,
            ..Standing::default()
        };
        assert_eq!(forecaster.sample_wanted(&found(10_000, 1000)), None, "nothing was sent yet");
        forecaster.round(&round(100_000, 0, 409_600_000), 1000 * MS, NONE);
        forecaster.synced(&found(10_000, 1000));
        assert_eq!(forecaster.sample_wanted(&found(10_000, 1000)).map(NonZeroU32::get), Some(512));
        assert_eq!(forecaster.sample_wanted(&found(100, 1000)).map(NonZeroU32::get), Some(25));
        assert_eq!(forecaster.sample_wanted(&found(63, 1000)), None, "what so few pages come to is no matter");

        // Of 500 pages 100 bytes each, which took the stages a microsecond and the trip to the other end 5 ms.
        forecaster.sample(&round(500, 0, 50_000), 5 * MS, worked(MS / 2));
        forecaster.synced(&found(9_500, 1010));
        assert_eq!(forecaster.sample_wanted(&found(9_500, 1010)), None, "once");
        let forecast = forecaster.forecast(&found(9_500, 1010), LIMIT).unwrap();
        assert!((forecast.remaining_bytes - 950_000.0).abs() < 1.0, "{forecast:?}");
        assert!((forecast.transfer.as_secs_f64() - 0.0095).abs() < 1e-6, "{forecast:?}");
        let rate = forecaster.dirty_bytes_per_second().unwrap() / 4096.0;
        assert!((rate - 10_000.0 / 1.01).abs() < 1.0, "{rate}: both syncs as one");
    }

    #[test]
    fn where_misses_are_compressed_pages_count_as_the_first_round_compressed_them() {
        let mut forecaster =
            forecaster(Some(XbzrleSettings { on_miss: OnMiss::Compress, ..XbzrleSettings::default() }));
        forecaster.round(&round(10_000, 5_000, 5_000_000), 1000 * MS, NONE);
        assert!((transfer(&forecaster, 1000) - 0.2).abs() < 1e-9);
    }

    #[test]
    fn where_that_is_left_open_pages_count_as_the_latest_round_encoded_them() {
        let settings = |max_bandwidth| SourceSettings { max_bandwidth, ..SourceSettings::default() };
        let remaining = |forecaster: &Forecaster| {
            let mut forecaster = forecaster.clone();
            forecaster.synced(&Standing { elapsed: 1000 * MS, ..dirty(1000) });
            forecaster.forecast(&dirty(1000), LIMIT).unwrap().remaining_bytes
        };
        // Half of the pages shrink in the first round, to a quarter; so a page takes 2,560 bytes.
        let first = of(PageTally { raw: 5000, compressed: 5000, ..pages(10_000, 0, 25_600_000) });
        for (limit, work, bytes) in
            [(None, 1000, 4_096_000.0), (None, 100, 2_560_000.0), (Some(50 << 20), 1000, 2_560_000.0)]
        {
            let mut forecaster = Forecaster::new(&settings(limit), 4096);
            forecaster.round(&first, 1000 * MS, worked(work * MS));
            assert!((remaining(&forecaster) - bytes).abs() < 1.0, "{limit:?}, {work} ms");
            // A quarter of the misses was compressed: half of those that shrink.
            let missed = of(PageTally { raw: 750, compressed: 250, xbzrle_misses: 1000, ..pages(1000, 0, 3_328_000) });
            forecaster.round(&missed, 100 * MS, worked(50 * MS));
            assert!((remaining(&forecaster) - 3_328_000.0).abs() < 1.0, "{limit:?}, {work} ms");
        }
    }

    #[test]
    fn stages_that_are_slower_than_the_wire_count_in_full() {
        let mut forecaster = forecaster(Some(XbzrleSettings::default()));
        forecaster.round(&round(100_000, 0, 400_000_000), 1000 * MS, NONE);
        // A tenth of a second for 10,000 deltas of 10 bytes: the wire would have taken a quarter of a millisecond.
        forecaster.round(&round(10_000, 0, 100_000), 100 * MS, worked(100 * MS));
        assert!((transfer(&forecaster, 10_000) - 0.1).abs() < 1e-9);
    }

    #[test]
    fn rounds_of_a_few_pages_do_not_pass_their_latency_off_as_a_rate() {
        let mut forecaster = forecaster(None);
        forecaster.round(&round(100_000, 0, 400_000_000), 1000 * MS, NONE);
        (0..30).for_each(|_| forecaster.round(&round(1, 0, 4_000), 10 * MS, NONE));
        assert!(transfer(&forecaster, 100_000) < 1.5);
    }

    #[test]
    fn the_latest_rounds_count_where_they_are_long_and_large_enough() {
        let mut forecaster = forecaster(None);
        forecaster.round(&round(100_000, 0, 400_000_000), 1000 * MS, NONE);
        forecaster.round(&round(100_000, 0, 400_000_000), 4000 * MS, NONE);
        assert!((transfer(&forecaster, 100_000) - 4.0).abs() < 1e-9);
    }

    #[test]
    fn a_backlog_is_run_down_to_its_share_while_the_guest_writes_on() {
        let mut forecaster = forecaster(None);
        forecaster.round(&round(100_000, 0, 400_000_000), 1000 * MS, NONE);
        forecaster.synced(&Standing { elapsed: 1000 * MS, ..dirty(10_000) });
        assert_eq!(forecaster.backlog_pages(LIMIT), Some(500));
        let now = Standing { dirty_pages: 10_000, in_flight_pages: 10_500, ..Standing::default() };
        // 10,000 pages are drained in 0.1 s, in which 1,000 pages are written.
        let forecast = forecaster.forecast(&now, LIMIT).unwrap();
        assert!((forecast.transfer.as_secs_f64() - 0.115).abs() < 1e-9, "{forecast:?}");
        assert!((forecast.remaining_bytes - 11_500.0 * 4000.0).abs() < 1.0, "{forecast:?}");
    }

    #[test]
    fn digests_of_the_source_are_made_while_the_rest_is_sent() {
        let mut forecaster = forecaster(None);
        forecaster.fixed.verify = 40 * MS;
        forecaster.round(&round(100_000, 0, 400_000_000), 1000 * MS, NONE);
        let expected = |pages| forecaster.forecast(&dirty(pages), LIMIT).unwrap().expected();
        assert_eq!([expected(0), expected(1000), expected(10_000)], [40 * MS, 40 * MS, 120 * MS]);
    }

    #[test]
    fn a_part_counts_by_a_high_quantile_of_its_measurements_and_not_by_the_latest() {
        let mut forecaster = forecaster(None);
        let sync = |forecaster: &mut Forecaster, ms: u32| {
            forecaster.measured(Measured::Sync, ms * MS);
            forecaster.fixed.sync
        };
        assert_eq!([5, 9, 1, 2].map(|ms| sync(&mut forecaster, ms)), [5, 9, 9, 9].map(|ms: u32| ms * MS));
        // Of ten, nine are no worse than 5 ms.
        let later = [1; 7].map(|ms| sync(&mut forecaster, ms));
        assert_eq!((later[5], later[6]), (5 * MS, 2 * MS), "{later:?}");
    }

    #[test]
    fn what_is_likely_goes_by_the_median_of_what_the_decision_takes_the_high_quantile_of() {
        let mut forecaster = forecaster(None);
        for ms in [1, 2, 9] {
            forecaster.measured(Measured::Sync, ms * MS);
        }
        // 100 MB a round, at 1000, 400 and 500 MB a second.
        for ms in [250, 100, 250, 200] {
            forecaster.round(&round(25_000, 0, 100_000_000), ms * MS, NONE);
        }
        forecaster.synced(&dirty(1000));
        let [decided, likely] = [Forecaster::forecast, Forecaster::likely];
        let of = |forecast: fn(&Forecaster, &Standing, Duration) -> Option<Forecast>| {
            let forecast = forecast(&forecaster, &dirty(1000), LIMIT).unwrap();
            (forecast.fixed.sync, forecast.transfer)
        };
        assert_eq!(of(decided).0, 9 * MS);
        assert_eq!(of(likely).0, 2 * MS);
        assert!(of(likely).1 < of(decided).1, "{:?} {:?}", of(likely), of(decided));
    }

    #[test]
    fn senders_that_wait_for_pages_show_what_the_wire_carries_while_they_send() {
        let mut forecaster = forecaster(None);
        // 400 MB in a second, of which the senders had something to send for a quarter.
        let work = Work { busiest: 200 * MS, sending: Some(250 * MS) };
        forecaster.round(&round(100_000, 0, 400_000_000), 1000 * MS, work);
        assert!((transfer(&forecaster, 100_000) - 0.25).abs() < 1e-9);
        // Two windows later, the slower one counts.
        forecaster.round(
            &round(100_000, 0, 400_000_000),
            1000 * MS,
            Work { sending: Some(400 * MS), ..Work::default() },
        );
        forecaster.round(
            &round(100_000, 0, 400_000_000),
            1000 * MS,
            Work { sending: Some(200 * MS), ..Work::default() },
        );
        assert!((transfer(&forecaster, 100_000) - 0.4).abs() < 1e-9);
    }

    #[test]
    fn what_the_destination_has_not_written_is_waited_for_once_and_then_counts() {
        let mut forecaster = forecaster(None);
        forecaster.round(&round(100_000, 0, 409_600_000), 1000 * MS, NONE);
        forecaster.write_back(WriteBack { backlog: 500 * MS, call: 2 * MS, per_mib: MS });
        assert_eq!(forecaster.write_backlog(LIMIT), Some(500 * MS));
        // A call, a MiB, and what may be left of the backlog.
        let durable = |forecaster: &Forecaster| forecaster.forecast(&dirty(256), LIMIT).unwrap().fixed.durable;
        assert_eq!(durable(&forecaster), 8 * MS);
        forecaster.drained();
        assert_eq!(durable(&forecaster), 503 * MS);
        forecaster.round(&round(256, 0, 1 << 20), 3 * MS, NONE);
        assert_eq!(durable(&forecaster), 8 * MS);
        forecaster.write_back(WriteBack { backlog: 5 * MS, call: 2 * MS, per_mib: MS });
        assert_eq!((forecaster.write_backlog(LIMIT), durable(&forecaster)), (None, 8 * MS));
    }

    #[test]
    fn the_handshake_takes_no_longer_than_a_round_took_to_be_acknowledged() {
        let mut forecaster = forecaster(None);
        forecaster.fixed.handover = 40 * MS;
        assert_eq!(forecaster.forecast(&dirty(0), LIMIT).unwrap().fixed.handover, 40 * MS);
        forecaster.measured(Measured::Load, 3 * MS);
        let fixed = forecaster.forecast(&dirty(0), LIMIT).unwrap().fixed;
        assert_eq!((fixed.load, fixed.handover), (3 * MS, 3 * MS));
    }

    #[test]
    fn deltas_that_get_better_count_as_the_latest_round_had_them() {
        let mut forecaster = forecaster(Some(XbzrleSettings::default()));
        forecaster.round(&round(10_000, 0, 10_000_000), 1000 * MS, NONE);
        forecaster.round(&round(10_000, 0, 4_000_000), 400 * MS, NONE);
        forecaster.round(&round(5_000, 0, 500_000), 50 * MS, NONE);
        assert!((transfer(&forecaster, 10_000) - 0.1).abs() < 1e-9);
    }

    #[test]
    fn pages_that_were_never_sent_count_in_full_beside_deltas() {
        let mut forecaster = forecaster(Some(XbzrleSettings::default()));
        forecaster.round(&round(100_000, 90_000, 40_960_000), 1000 * MS, NONE);
        forecaster.synced(&Standing { cached_pages: 100, ..dirty(1000) });
        // 900 misses of a page each, and 100 deltas of 40 bytes.
        let mixed = of(PageTally { xbzrle_misses: 900, ..pages(1000, 0, 900 * 4096 + 100 * 40) });
        forecaster.round(&mixed, 90 * MS, NONE);
        let whole = 4096.0 / 40_960_000.0;
        let delta = whole * 40.0 / 4096.0;
        assert!((transfer_of(&forecaster, 1000, 1000) - 1000.0 * delta).abs() < 1e-4);
        assert!((transfer_of(&forecaster, 1000, 800) - 200.0 * whole - 800.0 * delta).abs() < 1e-4);
    }

    #[test]
    fn deltas_of_pages_that_had_less_time_to_be_written_come_to_less() {
        let mut forecaster = forecaster(Some(XbzrleSettings::default()));
        forecaster.round(&round(100_000, 0, 409_600_000), 1000 * MS, NONE);
        let found = |dirty_pages, ms| Standing {
            elapsed: ms * MS,
            dirty_pages,
            cached_pages: dirty_pages,
            ..Standing::default()
        };
        // The same 1,000 pages in a second, and in half a second.
        forecaster.synced(&found(1000, 1000));
        forecaster.round(&round(1000, 0, 400_000), 500 * MS, NONE);
        let remaining = |forecaster: &Forecaster, now| forecaster.forecast(&now, LIMIT).unwrap().remaining_bytes;
        forecaster.synced(&found(1000, 1500));
        assert!((remaining(&forecaster, found(1000, 1500)) - 200_000.0).abs() < 1.0);
        // Half of them in a quarter of a second: none was written oftener than before.
        forecaster.round(&round(1000, 0, 200_000), 250 * MS, NONE);
        forecaster.synced(&found(500, 1750));
        assert!((remaining(&forecaster, found(500, 1750)) - 100_000.0).abs() < 1.0);
    }

    #[test]
    fn a_cache_that_has_lost_half_of_what_it_was_given_is_taken_to_lose_as_much_again() {
        let mut forecaster = forecaster(Some(XbzrleSettings::default()));
        forecaster.round(&round(100_000, 0, 409_600_000), 1000 * MS, NONE);
        forecaster.synced(&Standing { cached_pages: 1000, ..dirty(1000) });
        let half = of(PageTally { xbzrle_misses: 500, ..pages(1000, 0, 500 * 4096) });
        forecaster.round(&half, 5 * MS, NONE);
        assert!((transfer(&forecaster, 1000) - 0.005).abs() < 1e-4);
    }

    #[test]
    fn rounds_that_the_stages_held_up_say_what_the_wire_carries_at_least() {
        let mut forecaster = forecaster(Some(XbzrleSettings::default()));
        forecaster.round(&round(100_000, 0, 409_600_000), 1000 * MS, worked(500 * MS));
        forecaster.synced(&Standing { cached_pages: 0, ..dirty(10_000) });
        let deltas = of(PageTally { xbzrle_misses: 0, ..pages(10_000, 0, 100_000) });
        forecaster.round(&deltas, 20 * MS, Work { busiest: 20 * MS, sending: Some(MS / 4) });
        // A page that is sent whole takes 10 µs on the wire of the first round, not the 10 bytes in 2 µs of a delta.
        assert!((transfer_of(&forecaster, 1000, 0) - 0.01).abs() < 1e-4);
    }

    #[test]
    fn a_bandwidth_of_the_switchover_counts_where_the_cap_held_the_rounds_back() {
        let settings = |cap, switchover_bandwidth| SourceSettings {
            max_bandwidth: Some(cap),
            switchover_bandwidth,
            encoder: EncoderSettings { compress: None, xbzrle: None },
            ..SourceSettings::default()
        };
        let transfer = |cap, switchover_bandwidth| {
            let mut forecaster = Forecaster::new(&settings(cap, switchover_bandwidth), 4096);
            forecaster.round(&round(100_000, 0, 400_000_000), 4000 * MS, NONE);
            transfer(&forecaster, 100_000)
        };
        let ten_times = SwitchoverBandwidth::AtMost(1_000_000_000);
        assert!((transfer(100_000_000, ten_times) - 0.4).abs() < 1e-9);
        assert!((transfer(200_000_000, ten_times) - 4.0).abs() < 1e-9, "the link did not even carry the cap");
        assert!((transfer(200_000_000, SwitchoverBandwidth::AtMost(50_000_000)) - 8.0).abs() < 1e-9);
        assert!((transfer(100_000_000, SwitchoverBandwidth::Unlimited) - 4.0).abs() < 1e-9, "nothing is promised");
    }
}
