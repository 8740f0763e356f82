//! A migration in simulated time: the real [`Controller`] against a guest and a link that are models, or records of real ones.
//!
//! What is modelled is what the controller sees: rounds that take their time, syncs that find what was written meanwhile, a
//! throttle that slows the guest's own time, and a switchover. Nothing is random, so a run is its own proof.

use std::time::Duration;

use memferry_stages::tally::RoundTally;

use super::forecast::{FixedCost, Forecast, Standing, seconds, whole};
use super::{Controller, Decided, Decision};
use crate::settings::{SourceSettings, SwitchoverBandwidth};

/// How often the controller looks at the deadline within a round.
const TICK: Duration = Duration::from_millis(100);
/// The least that a round takes, however little there is to send.
const ROUND_LATENCY: Duration = Duration::from_millis(1);

/// A guest, as a simulation sees it.
pub trait Guest {
    /// All its pages.
    fn pages(&self) -> u64;

    /// How many different pages it writes from one moment of its own time to another.
    fn written(&mut self, from: Duration, to: Duration) -> u64;

    /// What its pages come to.
    fn costs(&self) -> Costs;
}

/// What pages of a guest come to on the wire.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    /// Bytes of a page in memory.
    pub page_bytes: u64,
    /// Share of the pages that are zero in the first round.
    pub zero: f64,
    /// Bytes on the wire of a page that is not, in the first round.
    pub first: f64,
    /// Bytes on the wire of a page that was written, in later rounds.
    pub later: f64,
}

/// What carries the pages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Bytes a second that it carries.
    pub bytes_per_second: f64,
    /// The least time that the stages take for a page.
    pub per_page: Duration,
    /// What a switchover costs beside the pages.
    pub fixed: FixedCost,
}

/// How a simulated migration went.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// [`Decision::SwitchOver`] or [`Decision::GiveUp`].
    pub end: Decision,
    /// Rounds before the last.
    pub rounds: u32,
    /// From the start to the end.
    pub total: Duration,
    /// How long the guest stood still; nothing if it was cancelled.
    pub downtime: Duration,
    /// The downtime limit when it switched over, as far as it was raised.
    pub limit: Duration,
    /// Bytes on the wire.
    pub bytes: f64,
    /// The most that the guest was throttled.
    pub throttle: u8,
    /// Everything that was decided, in order.
    pub decided: Vec<Decided>,
    /// Bytes that each round put on the wire.
    pub round_bytes: Vec<f64>,
}

impl Run {
    /// The forecast that the switchover rested on.
    #[must_use]
    pub fn forecast(&self) -> Option<Forecast> {
        self.decided.last()?.forecast
    }
}

/// Runs a migration with these settings. It ends, for rounds are bounded.
pub fn simulate(guest: &mut dyn Guest, link: &Link, settings: &SourceSettings) -> Run {
    Simulation::new(guest, link, settings).run()
}

struct Simulation<'a> {
    guest: &'a mut dyn Guest,
    costs: Costs,
    link: Link,
    settings: &'a SourceSettings,
    controller: Controller,
    now: Duration,
    /// The guest's own time, which a throttle slows.
    guest_now: Duration,
    guest_synced: Duration,
    paused: Option<Duration>,
    throttle: u8,
    round: u32,
    dirty: u64,
    run: Run,
}

impl<'a> Simulation<'a> {
    fn new(guest: &'a mut dyn Guest, link: &Link, settings: &'a SourceSettings) -> Self {
        let costs = guest.costs();
        let mut controller = Controller::new(settings, costs.page_bytes);
        *controller.fixed() = link.fixed;
        Self {
            costs,
            link: *link,
            settings,
            controller,
            now: Duration::ZERO,
            guest_now: Duration::ZERO,
            guest_synced: Duration::ZERO,
            paused: None,
            throttle: 0,
            round: 0,
            dirty: guest.pages(),
            guest,
            run: Run {
                end: Decision::AnotherRound,
                rounds: 0,
                total: Duration::ZERO,
                downtime: Duration::ZERO,
                limit: Duration::ZERO,
                bytes: 0.0,
                throttle: 0,
                decided: Vec::new(),
                round_bytes: Vec::new(),
            },
        }
    }

    fn run(mut self) -> Run {
        loop {
            let decision = match self.live_round() {
                Some(given_up) => given_up,
                None => self.sync(),
            };
            match decision {
                Decision::AnotherRound | Decision::RaiseLimit(_) => {}
                Decision::Throttle(percent) => {
                    self.throttle = percent;
                    self.run.throttle = self.run.throttle.max(percent);
                }
                Decision::SwitchOver => return self.switch_over(),
                Decision::GiveUp => return self.end(decision),
            }
        }
    }

    /// One round while the guest runs, unless the deadline pauses it on the way; what ends the migration in it.
    fn live_round(&mut self) -> Option<Decision> {
        self.round += 1;
        let (tally, time) = (self.tally(self.dirty), self.round_time(self.dirty, self.rate()));
        let (began, pages) = (self.now, self.dirty);
        while self.now - began < time {
            self.advance(TICK.min(time - (self.now - began)));
            let share_left = 1.0 - (self.now - began).as_secs_f64() / time.as_secs_f64();
            let now = Standing {
                elapsed: self.now,
                dirty_pages: whole((pages as f64 * share_left).round()),
                kept_pages: 0,
                in_flight_pages: 0,
            };
            let Some(decided) = self.controller.tick(&now) else { continue };
            let decision = decided.decision;
            self.run.decided.push(decided);
            match decision {
                Decision::GiveUp => return Some(decision),
                _ => self.paused = Some(self.now),
            }
        }
        self.count(&tally);
        self.controller.round(&tally, time, self.link.per_page.mul_f64(pages as f64));
        None
    }

    fn sync(&mut self) -> Decision {
        self.advance(self.link.fixed.sync);
        self.dirty = self.guest.written(self.guest_synced, self.guest_now);
        self.guest_synced = self.guest_now;
        let now = Standing { elapsed: self.now, dirty_pages: self.dirty, kept_pages: self.dirty, in_flight_pages: 0 };
        let decided = self.controller.synced(&now);
        let decision = decided.decision;
        if self.paused.is_none() || decision != Decision::SwitchOver {
            self.run.decided.push(decided);
        }
        decision
    }

    fn switch_over(mut self) -> Run {
        let paused = *self.paused.get_or_insert(self.now);
        self.run.limit = self.controller.downtime_limit();
        let rate = match self.settings.switchover_bandwidth {
            SwitchoverBandwidth::AsRounds => self.rate(),
            SwitchoverBandwidth::Unlimited => self.link.bytes_per_second,
            SwitchoverBandwidth::AtMost(most) => self.link.bytes_per_second.min(most as f64),
        };
        let tally = self.tally(self.dirty);
        self.now += if self.dirty == 0 { Duration::ZERO } else { self.round_time(self.dirty, rate) };
        self.now += self.link.fixed.total();
        self.count(&tally);
        self.run.downtime = self.now - paused;
        self.end(Decision::SwitchOver)
    }

    fn end(mut self, end: Decision) -> Run {
        self.run.end = end;
        self.run.total = self.now;
        self.run.rounds = self.round;
        self.run
    }

    /// Time passes; the guest's own runs slower if it is throttled, and stands still while it is paused.
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

    fn round_time(&self, pages: u64, rate: f64) -> Duration {
        let wire = self.wire_bytes(pages) / rate;
        seconds(wire.max(pages as f64 * self.link.per_page.as_secs_f64())).max(ROUND_LATENCY)
    }

    fn wire_bytes(&self, pages: u64) -> f64 {
        let pages = pages as f64;
        if self.run.round_bytes.is_empty() {
            pages * (1.0 - self.costs.zero) * self.costs.first
        } else {
            pages * self.costs.later
        }
    }

    fn tally(&self, pages: u64) -> RoundTally {
        let first = self.run.round_bytes.is_empty();
        RoundTally {
            round: self.round,
            pages,
            zero: if first { whole((pages as f64 * self.costs.zero).round()) } else { 0 },
            bytes_in: pages * self.costs.page_bytes,
            bytes_out: whole(self.wire_bytes(pages).round()),
            ..RoundTally::default()
        }
    }

    fn count(&mut self, tally: &RoundTally) {
        self.run.bytes += tally.bytes_out as f64;
        self.run.round_bytes.push(tally.bytes_out as f64);
    }
}
