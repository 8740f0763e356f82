//! A migration in simulated time: the real [`Controller`] with a guest and a link that are models, or recordings of
//! real ones.
//!
//! The model covers what the controller sees: rounds that take time, syncs that find the pages written meanwhile, a
//! throttle that slows the guest's own time, and a switchover. Nothing is random, so a run is reproducible.

use std::num::NonZeroU32;
use std::time::Duration;

use memferry_stages::batch::RoundKind;
use memferry_stages::tally::{PageTally, RoundTally};
use memferry_stages::token_bucket::BURST;

use super::forecast::{FixedCost, Forecast, Standing, Work, seconds, whole};
use super::{Controller, Decided, Decision};
use crate::settings::{SourceSettings, SwitchoverBandwidth};

/// How often the controller looks at the deadline within a round.
const TICK: Duration = Duration::from_millis(100);
/// The least time of a round, however little there is to send.
const ROUND_LATENCY: Duration = Duration::from_millis(1);

/// A simulated guest: the pages it writes, and their size on the wire.
///
/// A simulation calls in this order: `send` for a round, `written` for the sync after it, then `send` for the next
/// round, whose pages are the ones that were found.
pub trait Guest {
    /// All its pages.
    fn pages(&self) -> u64;

    /// Bytes of a page in memory.
    fn page_bytes(&self) -> u64;

    /// A round begins, with the pages that the last sync found: their size on the wire. In the first round these are
    /// all pages.
    fn send(&mut self, sending: &Sending<'_>) -> Encoded;

    /// The size of the pages of such a round if it were sent: a sample is a share of that.
    fn look(&self, round: u32, pages: u64) -> Encoded;

    /// The pages that a sync finds, written from one moment of the guest's own time to another: from the sync before to
    /// this one, while a round was sent.
    fn written(&mut self, from: Duration, to: Duration) -> Found;
}

/// The number of distinct pages that a sync finds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// All of them.
    pub dirty: u64,
    /// The pages that can be sent as deltas.
    pub cached: u64,
}

/// A round that begins.
#[derive(Clone, Copy)]
pub struct Sending<'a> {
    /// Its number, from 1.
    pub round: u32,
    /// Its pages.
    pub pages: u64,
    /// The moment of the guest's own time; `None` if it is paused.
    pub from: Option<Duration>,
    /// The guest's own time that passes while pages of the given size on the wire are sent.
    pub takes: &'a dyn Fn(&Encoded) -> Duration,
}

impl std::fmt::Debug for Sending<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { round, pages, from, .. } = self;
        f.debug_struct("Sending")
            .field("round", round)
            .field("pages", pages)
            .field("from", from)
            .finish_non_exhaustive()
    }
}

/// The pages of a round after encoding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The counts, as the encoders would report them.
    pub tally: RoundTally,
    /// The least time that the stages need for them, whatever the link.
    pub stages: Duration,
}

impl Encoded {
    /// The same for the given number of its pages.
    fn sample(&self, pages: NonZeroU32) -> Self {
        let all = &self.tally.pages;
        let share = f64::from(pages.get()) / all.all.max(1) as f64;
        let of = |all: u64| whole((all as f64 * share).round());
        let [zero, raw, compressed, xbzrle, unchanged] =
            [all.zero, all.raw, all.compressed, all.xbzrle, all.unchanged].map(of);
        let tally = RoundTally {
            round: self.tally.round,
            kind: RoundKind::Live,
            batches: of(self.tally.batches),
            pages: PageTally {
                all: zero + raw + compressed + xbzrle + unchanged,
                zero,
                raw,
                compressed,
                xbzrle,
                unchanged,
                xbzrle_misses: of(all.xbzrle_misses),
                xbzrle_overflows: of(all.xbzrle_overflows),
                bytes_in: of(all.bytes_in),
                bytes_out: of(all.bytes_out),
            },
        };
        Self { tally, stages: self.stages.mul_f64(share) }
    }
}

/// The size of pages on the wire, for a guest of which only the mean size of a page is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    /// Bytes of a page in memory.
    pub page_bytes: u64,
    /// Share of the pages that are zero in the first round.
    pub zero: f64,
    /// Bytes on the wire of a nonzero page, in the first round.
    pub first: f64,
    /// Bytes on the wire of a written page, in later rounds.
    pub later: f64,
    /// The least time that the stages need for a page.
    pub per_page: Duration,
}

impl Costs {
    /// The given number of pages of a round.
    #[must_use]
    pub fn encode(&self, round: u32, pages: u64) -> Encoded {
        let (zero, each) = if round == 1 { (self.zero, self.first) } else { (0.0, self.later) };
        let zero = whole((pages as f64 * zero).round());
        let tally = RoundTally {
            round,
            pages: PageTally {
                all: pages,
                zero,
                raw: pages - zero,
                bytes_in: pages * self.page_bytes,
                bytes_out: whole(((pages - zero) as f64 * each).round()),
                ..PageTally::default()
            },
            ..RoundTally::default()
        };
        Encoded { tally, stages: seconds(pages as f64 * self.per_page.as_secs_f64()) }
    }
}

/// The link, and the fixed costs of a migration on it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Link {
    /// Its bandwidth, in bytes a second.
    pub bytes_per_second: f64,
    /// The fixed cost of a switchover.
    pub fixed: FixedCost,
    /// The time before the first round.
    pub setup: Duration,
    /// The time of a decision besides its sync: an estimate of the cost of digests.
    pub decision: Duration,
    /// The time from the decision to switch over until the pages in flight have arrived and the guest is paused.
    pub drain: Duration,
}

/// The result of a simulated migration.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// [`Decision::SwitchOver`] or [`Decision::GiveUp`].
    pub end: Decision,
    /// Rounds before the last.
    pub rounds: u32,
    /// From the start to the end.
    pub total: Duration,
    /// How long the guest was paused; zero if the migration was cancelled.
    pub downtime: Duration,
    /// The downtime limit at the switchover, with any raise.
    pub limit: Duration,
    /// Bytes of the rounds on the wire.
    pub bytes: u64,
    /// The highest throttle.
    pub throttle: u8,
    /// All decisions, in order.
    pub decided: Vec<Decided>,
    /// The size and duration of each round, in order; the last one is that of the switchover.
    pub sent: Vec<Round>,
}

impl Run {
    /// The forecast that the switchover rested on.
    #[must_use]
    pub fn forecast(&self) -> Option<Forecast> {
        self.decided.last()?.forecast
    }
}

/// A round that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Its pages after encoding.
    pub tally: RoundTally,
    /// From its first page to its last.
    pub time: Duration,
}

/// Runs a migration with these settings. It always ends, because rounds are bounded.
pub fn simulate(guest: &mut dyn Guest, link: &Link, settings: &SourceSettings) -> Run {
    Simulation::new(guest, link, settings).run()
}

struct Simulation<'a> {
    guest: &'a mut dyn Guest,
    link: Link,
    settings: &'a SourceSettings,
    controller: Controller,
    now: Duration,
    /// The guest's own time, which a throttle slows.
    guest_now: Duration,
    guest_synced: Duration,
    guest_synced_before: Duration,
    paused: Option<Duration>,
    throttle: u8,
    round: u32,
    dirty: u64,
    cached: u64,
    /// The time since which nothing is sent.
    idle: Duration,
    run: Run,
}

impl<'a> Simulation<'a> {
    fn new(guest: &'a mut dyn Guest, link: &Link, settings: &'a SourceSettings) -> Self {
        let mut controller = Controller::new(settings, guest.page_bytes());
        *controller.fixed() = link.fixed;
        controller.armed(link.setup);
        Self {
            link: *link,
            settings,
            controller,
            now: link.setup,
            guest_now: Duration::ZERO,
            guest_synced: Duration::ZERO,
            guest_synced_before: Duration::ZERO,
            paused: None,
            throttle: 0,
            round: 0,
            dirty: guest.pages(),
            cached: 0,
            idle: link.setup,
            guest,
            run: Run {
                end: Decision::AnotherRound,
                rounds: 0,
                total: Duration::ZERO,
                downtime: Duration::ZERO,
                limit: Duration::ZERO,
                bytes: 0,
                throttle: 0,
                decided: Vec::new(),
                sent: Vec::new(),
            },
        }
    }

    fn run(mut self) -> Run {
        let mut decision = Decision::AnotherRound;
        loop {
            decision = match decision {
                Decision::AnotherRound | Decision::RaiseLimit(_) => self.live_round(),
                Decision::Sample(pages) => self.sample(pages),
                // In the model nothing is in flight when a round has ended.
                Decision::Drain => self.sync(self.guest_synced_before),
                Decision::Throttle(percent) => {
                    self.throttle = percent;
                    self.run.throttle = self.run.throttle.max(percent);
                    self.live_round()
                }
                Decision::SwitchOver => return self.switch_over(),
                Decision::GiveUp => return self.end(decision),
            }
        }
    }

    /// A sample of the dirty pages, while the guest runs. The sync after it finds the pages that were left out as well.
    fn sample(&mut self, pages: NonZeroU32) -> Decision {
        self.round += 1;
        let encoded = self.guest.look(self.round, self.dirty).sample(pages);
        let (rate, saved) = (self.rate(), self.saved());
        let time = round_time(&encoded, rate, saved);
        self.advance(time);
        self.count(&encoded, time);
        self.controller.round(&encoded.tally, time, work(&encoded, rate, saved));
        self.sync(self.guest_synced_before)
    }

    /// One round while the guest runs, unless the deadline pauses the guest during it or ends the migration, and the
    /// decision after it.
    fn live_round(&mut self) -> Decision {
        self.round += 1;
        let pages = self.dirty;
        let (rate, saved) = (self.rate(), self.saved());
        let (encoded, time) = self.send(rate);
        let began = self.now;
        while self.now - began < time {
            self.advance(TICK.min(time - (self.now - began)));
            let share_left = 1.0 - (self.now - began).as_secs_f64() / time.as_secs_f64();
            let now = Standing {
                elapsed: self.now,
                dirty_pages: whole((pages as f64 * share_left).round()),
                ..Standing::default()
            };
            let Some(decided) = self.controller.tick(&now) else { continue };
            let decision = decided.decision;
            self.run.decided.push(decided);
            match decision {
                Decision::GiveUp => {
                    self.run.bytes += whole(encoded.tally.pages.bytes_out as f64 * (1.0 - share_left));
                    return decision;
                }
                _ => self.paused = Some(self.now),
            }
        }
        self.count(&encoded, time);
        self.controller.round(&encoded.tally, time, work(&encoded, rate, saved));
        self.guest_synced_before = self.guest_synced;
        self.sync(self.guest_synced)
    }

    /// Sends the dirty pages at the given number of bytes a second. Returns their size on the wire, and the duration.
    fn send(&mut self, rate: f64) -> (Encoded, Duration) {
        let (runs, saved) = (1.0 - f64::from(self.throttle) / 100.0, self.saved());
        let time = |encoded: &Encoded| round_time(encoded, rate, saved);
        let sending = Sending {
            round: self.round,
            pages: self.dirty,
            from: self.paused.is_none().then_some(self.guest_now),
            takes: &|encoded| time(encoded).mul_f64(runs),
        };
        let encoded = self.guest.send(&sending);
        (encoded, time(&encoded))
    }

    /// The credit that a bandwidth cap has saved while nothing was sent, as time.
    fn saved(&self) -> Duration {
        if self.settings.max_bandwidth.is_some() { (self.now - self.idle).min(BURST) } else { Duration::ZERO }
    }

    /// Finds the pages written since a moment of the guest's time, and the controller decides.
    fn sync(&mut self, from: Duration) -> Decision {
        self.advance(self.link.fixed.sync);
        self.find(from);
        self.guest_synced = self.guest_now;
        self.advance(self.link.decision);
        let now =
            Standing { elapsed: self.now, dirty_pages: self.dirty, cached_pages: self.cached, ..Standing::default() };
        let decided = self.controller.synced(&now);
        let decision = decided.decision;
        if self.paused.is_none() || decision != Decision::SwitchOver {
            self.run.decided.push(decided);
        }
        decision
    }

    /// Adds the pages written from a moment of the guest's time to this one to the dirty pages.
    fn find(&mut self, from: Duration) {
        let Found { dirty, cached } = self.guest.written(from, self.guest_now);
        (self.dirty, self.cached) = (dirty, cached);
    }

    /// Pauses the guest, syncs once more, and sends the rest.
    fn switch_over(mut self) -> Run {
        self.advance(self.link.drain);
        if self.paused.is_none() && self.guest_now > self.guest_synced {
            // The last sync finds the pages written since the one before as well.
            self.find(self.guest_synced_before);
        }
        let paused = *self.paused.get_or_insert(self.now);
        self.run.limit = self.controller.downtime_limit();
        let rate = match self.settings.switchover_bandwidth {
            SwitchoverBandwidth::AsRounds => self.rate(),
            SwitchoverBandwidth::Unlimited => self.link.bytes_per_second,
            SwitchoverBandwidth::AtMost(most) => self.link.bytes_per_second.min(most as f64),
        };
        let FixedCost { sync, verify, .. } = self.link.fixed;
        let others = self.link.fixed.total() - sync - verify;
        self.round += 1;
        self.now += sync;
        let (encoded, transfer) = if self.dirty == 0 { Default::default() } else { self.send(rate) };
        // The source computes its digests while the rest is sent: that half adds no time.
        self.now += transfer + (verify - transfer.min(verify / 2)) + others;
        self.count(&encoded, transfer);
        self.round -= 1;
        self.run.downtime = self.now - paused;
        self.end(Decision::SwitchOver)
    }

    fn end(mut self, end: Decision) -> Run {
        self.run.end = end;
        self.run.total = self.now;
        self.run.rounds = self.round;
        self.run
    }

    /// Advances the time. The guest's own time runs slower if it is throttled, and does not advance while it is paused.
    fn advance(&mut self, time: Duration) {
        self.now += time;
        if self.paused.is_none() {
            self.guest_now += time.mul_f64(1.0 - f64::from(self.throttle) / 100.0);
        }
    }

    /// Bytes a second of a round.
    fn rate(&self) -> f64 {
        self.settings.max_bandwidth.map_or(self.link.bytes_per_second, |cap| self.link.bytes_per_second.min(cap as f64))
    }

    fn count(&mut self, encoded: &Encoded, time: Duration) {
        self.run.bytes += encoded.tally.pages.bytes_out;
        self.run.sent.push(Round { tally: encoded.tally, time });
        self.idle = self.now;
    }
}

/// The time of the wire after a pause that saved this credit, or of the stages if that is longer.
fn round_time(encoded: &Encoded, rate: f64, saved: Duration) -> Duration {
    wire_time(encoded, rate, saved).max(encoded.stages).max(ROUND_LATENCY)
}

fn wire_time(encoded: &Encoded, rate: f64, saved: Duration) -> Duration {
    seconds(encoded.tally.pages.bytes_out as f64 / rate).saturating_sub(saved)
}

/// How long the stages work on a round. A round that is over within the saved credit shows no rate.
fn work(encoded: &Encoded, rate: f64, saved: Duration) -> Work {
    let sending = wire_time(encoded, rate, saved);
    Work { busiest: encoded.stages, sending: Some(sending).filter(|sending| !sending.is_zero()) }
}
