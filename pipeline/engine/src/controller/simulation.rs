//! A migration in simulated time: the real [`Controller`] with a [guest](Guest) and a [link](Link) that are models, or
//! recordings of real ones.
//!
//! The model covers what the controller sees: rounds that take time, syncs that find the pages written meanwhile, a
//! throttle that slows the guest's own time, and a switchover. Nothing is random, so a run is reproducible.

use std::num::NonZeroU32;
use std::time::Duration;

use memferry_stages::tally::RoundTally;

use super::forecast::{FixedCost, Forecast, Standing, Work, whole};
use super::{Controller, Decided, Decision};
use crate::model::guest::{Encoded, Found, Guest, Sending, own_time};
use crate::model::link::{Link, Wire};
use crate::settings::{Mode, SourceSettings, SwitchoverBandwidth};

/// How often the controller looks at the deadline within a round.
const TICK: Duration = Duration::from_millis(100);

/// The link, and the fixed costs of a migration on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Conditions {
    /// The link. All connections together are one of it.
    pub link: Link,
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
    /// [`Decision::SwitchOver`], [`Decision::Postcopy`] or [`Decision::GiveUp`].
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
    /// The size and duration of each round, in order; the last one is that of the switchover, or what follows in postcopy.
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
pub fn simulate(guest: &mut dyn Guest, conditions: &Conditions, settings: &SourceSettings) -> Run {
    Simulation::new(guest, conditions, settings).run()
}

struct Simulation<'a> {
    guest: &'a mut dyn Guest,
    conditions: Conditions,
    wire: Wire,
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
    /// Pages of a round that was cut short, which were not sent, and the share of the round that was.
    unsent: u64,
    sent_share: f64,
    cached: u64,
    run: Run,
}

impl<'a> Simulation<'a> {
    fn new(guest: &'a mut dyn Guest, conditions: &Conditions, settings: &'a SourceSettings) -> Self {
        let &Conditions { link, fixed, setup, .. } = conditions;
        let mut controller = Controller::new(settings, guest.page_bytes());
        *controller.fixed() = fixed;
        controller.armed(setup);
        let mut wire = Wire::new(link, 1);
        wire.set_cap(setup, settings.max_bandwidth);
        Self {
            conditions: *conditions,
            wire,
            settings,
            controller,
            now: setup,
            guest_now: Duration::ZERO,
            guest_synced: Duration::ZERO,
            guest_synced_before: Duration::ZERO,
            paused: None,
            throttle: 0,
            round: 0,
            dirty: guest.pages(),
            unsent: 0,
            sent_share: 1.0,
            cached: 0,
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
        let mut decision = self.first();
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
                Decision::Postcopy => return self.postcopy(),
                Decision::GiveUp => return self.end(decision),
            }
        }
    }

    /// The first decision.
    fn first(&mut self) -> Decision {
        if self.settings.mode != Mode::Postcopy {
            return Decision::AnotherRound;
        }
        (self.unsent, self.sent_share) = (self.dirty, 0.0);
        let decided = self.controller.postcopy_at_once();
        self.run.decided.push(decided);
        Decision::Postcopy
    }

    /// A sample of the dirty pages, while the guest runs. The sync after it finds the pages that were left out as well.
    fn sample(&mut self, pages: NonZeroU32) -> Decision {
        self.round += 1;
        let encoded = self.guest.look(self.round, self.dirty).sample(pages);
        let (time, work) = (self.round_time(&encoded), self.work(&encoded));
        self.advance(time);
        self.count(&encoded, time);
        self.controller.round(&encoded.tally, time, work);
        self.sync(self.guest_synced_before)
    }

    /// One round while the guest runs, unless the deadline pauses the guest during it or ends the migration, and the
    /// decision after it.
    fn live_round(&mut self) -> Decision {
        self.round += 1;
        let pages = self.dirty;
        let (encoded, time) = self.send();
        let work = self.work(&encoded);
        let began = self.now;
        while self.now - began < time {
            self.advance(TICK.min(time - (self.now - began)));
            let share_left = 1.0 - (self.now - began).as_secs_f64() / time.as_secs_f64();
            if share_left > 0.0 && self.controller.is_postcopy_due(self.now) {
                return self.cut(&encoded, pages, share_left);
            }
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
        self.controller.round(&encoded.tally, time, work);
        self.guest_synced_before = self.guest_synced;
        self.sync(self.guest_synced)
    }

    /// The round ends before this share of it is sent: it is time for postcopy.
    fn cut(&mut self, encoded: &Encoded, pages: u64, share_left: f64) -> Decision {
        self.unsent = whole((pages as f64 * share_left).round());
        self.sent_share = 1.0 - share_left;
        self.run.bytes += whole(encoded.tally.pages.bytes_out as f64 * (1.0 - share_left));
        self.guest_synced_before = self.guest_synced;
        self.sync(self.guest_synced)
    }

    /// Sends the dirty pages. Returns their size on the wire, and the duration.
    fn send(&mut self) -> (Encoded, Duration) {
        self.send_by(|guest, sending| guest.send(sending))
    }

    fn send_by(&mut self, send: impl FnOnce(&mut dyn Guest, &Sending<'_>) -> Encoded) -> (Encoded, Duration) {
        let (wire, now, throttle) = (&self.wire, self.now, self.throttle);
        let sending = Sending {
            round: self.round,
            pages: self.dirty,
            from: self.paused.is_none().then_some(self.guest_now),
            takes: &|encoded| own_time(round_time(wire, now, encoded), throttle),
        };
        let encoded = send(self.guest, &sending);
        let time = self.round_time(&encoded);
        (encoded, time)
    }

    /// Finds the pages written since a moment of the guest's time, and the controller decides.
    fn sync(&mut self, from: Duration) -> Decision {
        self.advance(self.conditions.fixed.sync);
        self.find(from);
        self.guest_synced = self.guest_now;
        self.advance(self.conditions.decision);
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
        // Those that were not sent are dirty, written or not: the others are taken to be spread evenly.
        let others = whole((dirty as f64 * self.sent_share).round());
        (self.dirty, self.cached) = ((self.unsent + others).min(self.guest.pages()), cached);
    }

    /// Pauses the guest, syncs once more, and sends the rest.
    fn switch_over(mut self) -> Run {
        self.advance(self.conditions.drain);
        if self.paused.is_none() && self.guest_now > self.guest_synced {
            // The last sync finds the pages written since the one before as well.
            self.find(self.guest_synced_before);
        }
        let paused = *self.paused.get_or_insert(self.now);
        self.run.limit = self.controller.downtime_limit();
        match self.settings.switchover_bandwidth {
            SwitchoverBandwidth::AsRounds => {}
            SwitchoverBandwidth::Unlimited => self.wire.set_cap(self.now, None),
            SwitchoverBandwidth::AtMost(most) => self.wire.set_cap(self.now, Some(most)),
        }
        let FixedCost { sync, verify, .. } = self.conditions.fixed;
        let others = self.conditions.fixed.total() - sync - verify;
        self.round += 1;
        self.now += sync;
        let (encoded, transfer) = if self.dirty == 0 { Default::default() } else { self.send() };
        // The source computes its digests while the rest is sent: that half adds no time.
        self.now += transfer + (verify - transfer.min(verify / 2)) + others;
        self.count(&encoded, transfer);
        self.round -= 1;
        self.run.downtime = self.now - paused;
        self.end(Decision::SwitchOver)
    }

    /// Pauses the guest for what a switchover costs without a page, and sends the rest while it runs at the destination.
    fn postcopy(mut self) -> Run {
        if self.round > 0 {
            self.advance(self.conditions.drain);
        }
        self.find(self.guest_synced_before);
        let paused = *self.paused.get_or_insert(self.now);
        self.run.limit = self.controller.downtime_limit();
        self.now += self.conditions.fixed.total();
        self.run.downtime = self.now - paused;
        self.round += 1;
        let (encoded, transfer) =
            if self.dirty == 0 { Default::default() } else { self.send_by(|guest, sending| guest.send_whole(sending)) };
        self.now += transfer;
        self.count(&encoded, transfer);
        self.round -= 1;
        self.end(Decision::Postcopy)
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
            self.guest_now += own_time(time, self.throttle);
        }
    }

    /// The time that a round of this size takes if it begins at this moment.
    fn round_time(&self, encoded: &Encoded) -> Duration {
        round_time(&self.wire, self.now, encoded)
    }

    /// How long the stages work on such a round.
    fn work(&self, encoded: &Encoded) -> Work {
        let sending = wire_time(&self.wire, self.now, encoded);
        Work { busiest: encoded.stages, sending: Some(sending).filter(|sending| !sending.is_zero()) }
    }

    fn count(&mut self, encoded: &Encoded, time: Duration) {
        self.run.bytes += encoded.tally.pages.bytes_out;
        self.run.sent.push(Round { tally: encoded.tally, time });
        self.wire.idle_from(self.now);
    }
}

/// The time of the wire, or of the stages if that is longer; no round is shorter than the link's latency.
fn round_time(wire: &Wire, now: Duration, encoded: &Encoded) -> Duration {
    wire_time(wire, now, encoded).max(encoded.stages).max(wire.link().latency)
}

fn wire_time(wire: &Wire, now: Duration, encoded: &Encoded) -> Duration {
    wire.leaves(0, now, encoded.tally.pages.bytes_out) - now
}
