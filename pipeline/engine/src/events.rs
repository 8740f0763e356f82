//! What happens in a migration, as typed values: the log, the progress display, the metrics and the report all come from
//! these and from nothing else.

mod queued;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use memferry_stages::clears::Spared;
use memferry_stages::meter::Reading;
use memferry_stages::tally::RoundTally;
use memferry_stages::untrusted::Untrusted;
use serde::{Deserialize, Serialize};

use crate::bottleneck::Bottleneck;
use crate::change::Changed;
use crate::controller::Decided;
use crate::controller::forecast::Forecast;
use crate::human;
use crate::values::millis;

pub use queued::Queued;

/// Which end of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Sends.
    Source,
    /// Receives.
    Destination,
}

impl Role {
    /// Its name: in messages, in JSON and as a label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where a migration stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Connecting, agreeing, arming logs.
    #[default]
    Setup,
    /// Rounds, while the guest runs.
    Active,
    /// The guest is paused at the source.
    Switchover,
    /// The guest runs at the destination (or the file is complete).
    Completed,
    /// It failed; the source is as it was.
    Failed,
    /// It was cancelled; the source is as it was.
    Cancelled,
    /// Go was sent and nothing came back.
    Unconfirmed,
}

impl Phase {
    /// Every phase.
    pub const ALL: [Self; 7] = [
        Self::Setup,
        Self::Active,
        Self::Switchover,
        Self::Completed,
        Self::Failed,
        Self::Cancelled,
        Self::Unconfirmed,
    ];

    /// Its name, as JSON has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Active => "active",
            Self::Switchover => "switchover",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Unconfirmed => "unconfirmed",
        }
    }
}

/// A RAM block, for reports.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct BlockFacts {
    /// Its id.
    pub id: Untrusted,
    /// Its length.
    pub bytes: u64,
    /// Its page size.
    pub page_size: u64,
}

/// Figures taken once in a while during a migration, for whoever watches.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// The current round, from 1.
    pub round: u32,
    /// Page bytes that are dirty or taken and not acknowledged. A destination does not know what is dirty: there, page bytes that were
    /// not loaded once.
    pub remaining_bytes: u64,
    /// Bytes of the guest.
    pub total_bytes: u64,
    /// Bytes handed to the transport so far.
    pub wire_bytes: u64,
    /// Bytes to the wire a second, lately.
    pub wire_rate: f64,
    /// Page bytes a second that are read, or loaded, lately.
    pub page_rate: f64,
    /// Page bytes a second that the guest dirtied between the last syncs, if there were two; 0 once it is paused.
    pub dirty_rate: Option<f64>,
    /// What a switchover now would cost, if it can be told.
    pub expected_downtime: Option<Duration>,
    /// The downtime limit as far as it is raised; nothing at the destination, which has none.
    pub downtime_limit: Duration,
    /// Percent of its time that the guest is throttled.
    pub throttle: u8,
    /// What holds it up, over the latest seconds; once it has ended, from its start.
    pub bottleneck: Bottleneck,
    /// Processor time of the process since the first page.
    pub cpu: Duration,
    /// How every stage has spent its time so far.
    pub stages: Vec<Reading>,
}

impl Progress {
    /// The share of the guest's memory that does not remain, 0 to 1.
    #[must_use]
    pub fn done(&self) -> f64 {
        if self.total_bytes == 0 {
            return 0.0;
        }
        #[expect(clippy::cast_precision_loss, reason = "a share")]
        let left = self.remaining_bytes as f64 / self.total_bytes as f64;
        (1.0 - left).clamp(0.0, 1.0)
    }

    /// How long it takes until nothing remains.
    #[must_use]
    pub fn time_left(&self) -> TimeLeft {
        TimeLeft::at_rates(self.remaining_bytes, self.page_rate, self.dirty_rate)
    }
}

/// A time left above this says nothing: the rates of the moment do not last so long.
const LONGEST_SECONDS: f64 = 24.0 * 3600.0;

/// How long it takes until nothing remains, at the rates of the moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TimeLeft {
    /// Nothing is measured yet, or it would take more than a day.
    Unknown,
    /// About this.
    About(Duration),
    /// The guest dirties pages at least as fast as they are sent.
    DoesNotConverge,
}

impl TimeLeft {
    /// What remains shrinks by what is sent and grows by what is dirtied.
    #[must_use]
    pub fn at_rates(remaining_bytes: u64, page_rate: f64, dirty_rate: Option<f64>) -> Self {
        if remaining_bytes == 0 {
            return Self::About(Duration::ZERO);
        }
        if page_rate < 1.0 {
            return Self::Unknown;
        }
        let shrinks = page_rate - dirty_rate.unwrap_or(0.0);
        if shrinks.is_nan() || shrinks <= 0.0 {
            return Self::DoesNotConverge;
        }
        #[expect(clippy::cast_precision_loss, reason = "a time for the eye")]
        let seconds = remaining_bytes as f64 / shrinks;
        if seconds > LONGEST_SECONDS { Self::Unknown } else { Self::About(Duration::from_secs_f64(seconds)) }
    }
}

impl fmt::Display for TimeLeft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("time left not known"),
            Self::About(time) => write!(f, "{} to go", human::time(*time)),
            Self::DoesNotConverge => f.write_str("does not converge"),
        }
    }
}

/// The parts of the downtime.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct DowntimeParts {
    /// Pause to pages known: device state aside.
    #[serde(rename = "final_sync_ms", with = "millis")]
    pub final_sync: Duration,
    /// The last round, until its last byte is loaded.
    #[serde(rename = "final_transfer_ms", with = "millis")]
    pub final_transfer: Duration,
    /// Saving and sending device state.
    #[serde(rename = "state_ms", with = "millis")]
    pub state: Duration,
    /// Digests.
    #[serde(rename = "verify_ms", with = "millis")]
    pub verify: Duration,
    /// Go to Running.
    #[serde(rename = "handover_ms", with = "millis")]
    pub handover: Duration,
}

/// Why a connection is turned away, as far as it matters to whoever watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TurnedAwayKind {
    /// It said nothing in time, or ended without a word.
    Silent,
    /// It does not speak memferry's protocol, or wrongly.
    Stranger,
    /// It speaks another version of the protocol.
    Version,
    /// Its stream is one that this destination cannot or may not take.
    Unfit,
    /// It contradicts another connection of its migration.
    Contradicts,
    /// Not all connections of its migration came in time.
    Incomplete,
    /// This end is short of descriptors or memory.
    Shortage,
}

impl TurnedAwayKind {
    /// Every kind.
    pub const ALL: [Self; 7] =
        [Self::Silent, Self::Stranger, Self::Version, Self::Unfit, Self::Contradicts, Self::Incomplete, Self::Shortage];

    /// Its name, as JSON has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Silent => "silent",
            Self::Stranger => "stranger",
            Self::Version => "version",
            Self::Unfit => "unfit",
            Self::Contradicts => "contradicts",
            Self::Incomplete => "incomplete",
            Self::Shortage => "shortage",
        }
    }
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The phase changed.
    Phase(Phase),
    /// The peer is there and agreed.
    Connected {
        /// Who, or which file.
        peer: Untrusted,
    },
    /// The guest's blocks are known; with the bound of the memory the engine takes for itself.
    Guest {
        /// Its blocks.
        blocks: Vec<BlockFacts>,
        /// Its pages.
        pages: u64,
        /// Bound of queues, pools, caches and bitmaps in bytes.
        memory_bound: u64,
    },
    /// The scanner reached the end of the bitmap; its batches are on their way.
    RoundScanned {
        /// The round.
        round: u32,
    },
    /// All batches of a round are sent; at the destination: loaded.
    RoundSent {
        /// Its figures, all lanes together.
        tally: RoundTally,
        /// From its first batch to its last byte sent, or loaded.
        duration: Duration,
    },
    /// A sync between rounds found this many dirty pages.
    Synced {
        /// The round before it.
        after_round: u32,
        /// Pages that are dirty.
        dirty_pages: u64,
        /// How long the sync took.
        duration: Duration,
    },
    /// How many pages were spared so far, and why: told where the window for hints was closed, and where pages are out for good.
    Spared(Spared),
    /// What the controller decided after a sync or within a round, and why, in words and figures.
    Decided(Decided),
    /// A setting of the source was changed while it ran.
    Changed(Changed),
    /// Figures on the way.
    Progress(Progress),
    /// Strangers or broken peers of a kind were turned away, and waiting continues: the first of the kind at once, then a count at a
    /// growing interval, and a last one at the end.
    TurnedAway {
        /// What kind of reason there was.
        kind: TurnedAwayKind,
        /// Who; of several the last.
        peer: Untrusted,
        /// Why; of several the last.
        why: String,
        /// How many, since the event before this one of the kind.
        count: u64,
    },
    /// Something the operator should know, and the migration goes on.
    Warning(String),
    /// The guest was paused at the source.
    Paused,
    /// A cancel is too late from here on: the source tells the destination to run the guest; the destination begins to start it.
    HandedOver,
    /// The guest goes on at the source.
    Resumed,
    /// It ended.
    Ended(Ended),
}

impl Event {
    /// What the operator should know of it though the migration goes on, in words.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        match self {
            Self::Warning(what) => Some(what.clone()),
            Self::TurnedAway { peer, why, count: 1, .. } => Some(format!("{peer} was turned away: {why}")),
            Self::TurnedAway { peer, why, count, .. } => {
                Some(format!("{count} more were turned away, the last of them {peer}: {why}"))
            }
            _ => None,
        }
    }
}

/// How it ended, with everything the report needs that no event before it said.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// [`Phase::Completed`], [`Phase::Failed`], [`Phase::Cancelled`] or [`Phase::Unconfirmed`].
    pub phase: Phase,
    /// Why not completed.
    pub error: Option<String>,
    /// Were digests compared: `None` if they never were.
    pub verified: Option<bool>,
    /// From start to verdict.
    pub total: Duration,
    /// From start to the first page.
    pub setup: Duration,
    /// How long the guest was paused: until it ran at the destination, or until it was resumed here, whatever the end. `None` if it
    /// was not paused, or still is.
    pub downtime: Option<Duration>,
    /// Its parts, as far as it came.
    pub parts: DowntimeParts,
    /// What the controller expected of it when it decided to switch over, if it did and could tell.
    pub forecast: Option<Forecast>,
    /// Bytes handed to the transport (source) or taken from it (destination).
    pub wire_bytes: u64,
    /// Pages that were not sent for what the guest said of them (source).
    pub spared: Spared,
    /// Most memory the engine held.
    pub memory_peak: u64,
    /// How every stage spent its time.
    pub stages: Vec<Reading>,
    /// What held it up.
    pub bottleneck: Bottleneck,
    /// Processor time of the process from the first page to the verdict.
    pub cpu: Duration,
    /// Did the source guest fail to go on after it was paused? It stands still, and nobody else runs it.
    pub resume_failed: bool,
}

impl Ended {
    /// How long the switchover took, pause to Running, if it came to its end: what a forecast is measured by.
    #[must_use]
    pub fn switchover(&self) -> Option<Duration> {
        self.downtime.filter(|_| self.phase == Phase::Completed)
    }
}

/// Takes events as they happen. Called from the control plane: return soon, never block. One that may block, be it only because it
/// prints, goes behind [`Queued`]. A closure is one.
pub trait Observer: Send + Sync {
    /// One event of one end.
    fn event(&self, role: Role, event: &Event);
}

impl<F: Fn(Role, &Event) + Send + Sync> Observer for F {
    fn event(&self, role: Role, event: &Event) {
        self(role, event);
    }
}

/// A list of observers, cheap to clone, tied to one end of a migration.
#[derive(Clone)]
pub struct Observers {
    role: Role,
    list: Arc<[Arc<dyn Observer>]>,
}

impl fmt::Debug for Observers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} observers of the {:?}", self.list.len(), self.role)
    }
}

impl Observers {
    /// Observers of one end.
    #[must_use]
    pub fn new(role: Role, list: Vec<Arc<dyn Observer>>) -> Self {
        Self { role, list: list.into() }
    }

    /// These and one more, which is told first.
    #[must_use]
    pub fn and(&self, another: Arc<dyn Observer>) -> Self {
        Self { role: self.role, list: std::iter::once(another).chain(self.list.iter().cloned()).collect() }
    }

    /// Nobody watches this end.
    #[must_use]
    pub fn none(role: Role) -> Self {
        Self::new(role, Vec::new())
    }

    /// Which end.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// Tells every observer.
    pub fn tell(&self, event: &Event) {
        for observer in self.list.iter() {
            observer.event(self.role, event);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_remains_shrinks_by_what_is_sent_less_what_is_dirtied() {
        let about = |seconds| TimeLeft::About(Duration::from_secs(seconds));
        assert_eq!(TimeLeft::at_rates(300, 30.0, None), about(10));
        assert_eq!(TimeLeft::at_rates(300, 30.0, Some(20.0)), about(30));
        assert_eq!(TimeLeft::at_rates(0, 0.0, Some(20.0)), about(0));
        assert_eq!(TimeLeft::at_rates(300, 0.0, None), TimeLeft::Unknown);
        assert_eq!(TimeLeft::at_rates(u64::MAX, 1.0, None), TimeLeft::Unknown);
        assert_eq!(TimeLeft::at_rates(300, 30.0, Some(30.0)), TimeLeft::DoesNotConverge);
        assert_eq!(TimeLeft::at_rates(300, f64::NAN, Some(f64::INFINITY)), TimeLeft::DoesNotConverge);
    }

    #[test]
    fn done_is_what_does_not_remain() {
        let done =
            |remaining_bytes, total_bytes| Progress { remaining_bytes, total_bytes, ..Progress::default() }.done();
        assert_eq!([done(0, 0), done(1, 4), done(9, 4), done(0, 4)], [0.0, 0.75, 0.0, 1.0]);
    }
}
