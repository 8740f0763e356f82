//! The events of a migration, as typed values. They are the only source of the log, the progress display, the metrics
//! and the report.

mod queued;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use memferry_stages::meter::Reading;
use memferry_stages::missing::MissingCounts;
use memferry_stages::tally::RoundTally;
use serde::{Deserialize, Serialize};

use crate::bottleneck::Bottleneck;
use crate::change::Changed;
use crate::controller::Decided;
use crate::controller::forecast::Forecast;
use crate::human;
use crate::values::millis;

pub use crate::downtime::DowntimeParts;
pub use memferry_stages::exclusions::ExcludedPages;
pub use memferry_stages::page_hashes::Coverage;
pub use memferry_stages::untrusted::Untrusted;
pub use queued::Queued;

/// Which end of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The source.
    Source,
    /// The destination.
    Destination,
}

impl Role {
    /// Its name in messages, in JSON and as a label.
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

/// The phase of a migration.
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
    /// The guest runs at the destination, and pages of it are still at the source.
    Postcopy,
    /// The connection is lost, and is to be made again. The guest runs at the source, or is paused if Go may have left.
    Disconnected,
    /// The guest runs at the destination (or the file is complete).
    Completed,
    /// It failed; the source is as it was.
    Failed,
    /// It was cancelled; the source is as it was.
    Cancelled,
    /// Go was sent and no answer arrived.
    Unconfirmed,
    /// The guest ran at the destination, and lost pages that were still at the source.
    Lost,
}

impl Phase {
    /// Every phase.
    pub const ALL: [Self; 10] = [
        Self::Setup,
        Self::Active,
        Self::Switchover,
        Self::Postcopy,
        Self::Disconnected,
        Self::Completed,
        Self::Failed,
        Self::Cancelled,
        Self::Unconfirmed,
        Self::Lost,
    ];

    /// Its name in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Active => "active",
            Self::Switchover => "switchover",
            Self::Postcopy => "postcopy",
            Self::Disconnected => "disconnected",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Unconfirmed => "unconfirmed",
            Self::Lost => "lost",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The guest runs at the destination (or the file is complete).
    Completed,
    /// It failed; the source is as it was.
    Failed,
    /// It was cancelled; the source is as it was.
    Cancelled,
    /// Go was sent and no answer arrived.
    Unconfirmed,
    /// The guest was lost in postcopy: it ran at the destination, and pages that were still at the source did not reach it.
    Lost,
}

impl Outcome {
    /// Its name in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        Phase::from(self).name()
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl From<Outcome> for Phase {
    /// The last phase.
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Completed => Self::Completed,
            Outcome::Failed => Self::Failed,
            Outcome::Cancelled => Self::Cancelled,
            Outcome::Unconfirmed => Self::Unconfirmed,
            Outcome::Lost => Self::Lost,
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

/// Progress figures, taken at intervals during a migration, for observers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// The current round, from 1.
    pub round: u32,
    /// Page bytes that are dirty or were taken and not acknowledged. A destination does not know the dirty pages:
    /// there, page bytes of the first round that are not loaded, and `None` after it.
    pub remaining_bytes: Option<u64>,
    /// Bytes of the guest.
    pub total_bytes: u64,
    /// Bytes handed to the transport so far.
    pub wire_bytes: u64,
    /// Recent rate on the wire, in bytes a second.
    pub wire_rate: f64,
    /// Recent rate of page bytes read, or loaded, in bytes a second.
    pub page_rate: f64,
    /// Page bytes a second that the guest dirtied between the last syncs, if there were two; 0 once it is paused.
    pub dirty_rate: Option<f64>,
    /// The cost of a switchover at this moment, if there is a forecast.
    pub expected_downtime: Option<Duration>,
    /// The downtime limit, with any raise; `None` at the destination, which has none.
    pub downtime_limit: Duration,
    /// Percent of its time that the guest is throttled.
    pub throttle: u8,
    /// What limits the speed, over the last few seconds; once the migration has ended, from its start.
    pub bottleneck: Bottleneck,
    /// Processor time of the process since the first page.
    pub cpu: Duration,
    /// How every stage has spent its time so far.
    pub stages: Vec<Reading>,
}

impl Progress {
    /// The share of the guest's memory that does not remain, 0 to 1; `None` while the remaining bytes are unknown.
    #[must_use]
    pub fn done(&self) -> Option<f64> {
        let remaining = self.remaining_bytes?;
        if self.total_bytes == 0 {
            return Some(0.0);
        }
        #[expect(clippy::cast_precision_loss, reason = "a share")]
        let left = remaining as f64 / self.total_bytes as f64;
        Some((1.0 - left).clamp(0.0, 1.0))
    }

    /// The time until nothing remains.
    #[must_use]
    pub fn time_left(&self) -> TimeLeft {
        let at_rates = |remaining| TimeLeft::at_rates(remaining, self.page_rate, self.dirty_rate);
        self.remaining_bytes.map_or(TimeLeft::Unknown, at_rates)
    }
}

/// A time left above this is not reported: the current rates do not last that long.
const LONGEST_SECONDS: f64 = 24.0 * 3600.0;

/// The time until nothing remains, at the current rates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TimeLeft {
    /// Nothing is measured yet, or it would take more than a day.
    Unknown,
    /// The estimate.
    About(Duration),
    /// The guest dirties pages at least as fast as they are sent.
    DoesNotConverge,
}

impl TimeLeft {
    /// The remaining bytes shrink by the sending rate and grow by the dirty rate.
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

/// Why a connection is refused, in the categories that matter to an observer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TurnedAwayKind {
    /// It sent nothing in time, or ended without a message.
    Silent,
    /// It does not speak memferry's protocol, or violates it.
    Protocol,
    /// It speaks another version of the protocol.
    Version,
    /// Its stream is one that this destination cannot or may not accept.
    Unfit,
    /// It contradicts another connection of its migration.
    Contradicts,
    /// Not all connections of its migration arrived in time.
    Incomplete,
    /// This end is short of descriptors or memory.
    Shortage,
    /// A guest is being received from another source.
    Busy,
    /// It returns after a lost connection, and is not the source that was lost; or one of its connections has another certificate
    /// than the others.
    NotProven,
    /// The handshake of its transport failed: its certificate is refused, or it does not speak TLS.
    Handshake,
}

impl TurnedAwayKind {
    /// Every kind.
    pub const ALL: [Self; 10] = [
        Self::Silent,
        Self::Protocol,
        Self::Version,
        Self::Unfit,
        Self::Contradicts,
        Self::Incomplete,
        Self::Shortage,
        Self::Busy,
        Self::NotProven,
        Self::Handshake,
    ];

    /// Its name in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Silent => "silent",
            Self::Protocol => "protocol",
            Self::Version => "version",
            Self::Unfit => "unfit",
            Self::Contradicts => "contradicts",
            Self::Incomplete => "incomplete",
            Self::Shortage => "shortage",
            Self::Busy => "busy",
            Self::NotProven => "not_proven",
            Self::Handshake => "handshake",
        }
    }
}

/// An event.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The phase changed.
    Phase(Phase),
    /// The peer was reached and accepted.
    Connected {
        /// The peer's name, or the file.
        peer: Untrusted,
    },
    /// The guest's blocks are known, and the bound of the memory that the engine takes for itself.
    Guest {
        /// Its blocks.
        blocks: Vec<BlockFacts>,
        /// Its pages.
        pages: u64,
        /// Bound of queues, pools, caches and bitmaps in bytes.
        memory_bound: u64,
    },
    /// The scanner reached the end of the bitmap; its batches are in flight.
    RoundScanned {
        /// The round.
        round: u32,
    },
    /// All batches of a round are sent or, at the destination, loaded.
    RoundSent {
        /// Its figures, all lanes together.
        tally: RoundTally,
        /// From its first batch to its last byte, sent or loaded.
        duration: Duration,
    },
    /// A sync between rounds found this number of dirty pages.
    Synced {
        /// The round before it.
        after_round: u32,
        /// Pages that are dirty.
        dirty_pages: u64,
        /// How long the sync took.
        duration: Duration,
    },
    /// The number of pages skipped so far, by reason. Sent when the window for hints is closed, and where pages are
    /// excluded.
    Excluded(ExcludedPages),
    /// The controller's decision after a sync or within a round, with its reason and figures.
    Decided(Decided),
    /// A setting of the source was changed while it ran.
    Changed(Changed),
    /// Progress figures.
    Progress(Progress),
    /// Clients or broken peers were refused for one kind of reason, and the wait continues. The first of a kind is
    /// reported at once, then a count at a growing interval, and a last count at the end.
    TurnedAway {
        /// The kind of reason.
        kind: TurnedAwayKind,
        /// The client's name; of several, the latest.
        peer: Untrusted,
        /// The reason; of several, the latest.
        why: String,
        /// The number since the previous event of this kind.
        count: u64,
    },
    /// A warning for the operator; the migration continues.
    Warning(String),
    /// The connection is lost, and is to be made again.
    Disconnected {
        /// The number of the attempt that ended, from 1.
        attempt: u32,
        /// Why.
        why: String,
    },
    /// The source could not make the connection again yet.
    NotReached {
        /// How often it has tried since the connection was lost.
        tries: u32,
        /// Why the latest try failed.
        why: String,
        /// When it tries again.
        again_in: Duration,
    },
    /// The connection is made again, and the migration continues.
    Reconnected {
        /// The number of the attempt that begins. It rises with each try to reach the destination.
        attempt: u32,
        /// How long there was no connection.
        outage: Duration,
        /// Page bytes that were in flight when the connection was lost, and are sent again; 0 at the destination.
        put_back_bytes: u64,
    },
    /// The guest was paused at the source.
    Paused,
    /// A cancel is too late from here on: the source sends Go; the destination begins to start the guest.
    HandedOver,
    /// The guest continues at the source.
    Resumed,
    /// The migration ended.
    Ended(Box<Ended>),
}

impl Event {
    /// The text of a warning, if the event is one: the migration continues.
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

/// The result, with everything for the report that no earlier event carries.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// How it ended.
    pub outcome: Outcome,
    /// Why it did not complete.
    pub error: Option<String>,
    /// The result of the comparison of digests; `None` if it did not take place.
    pub verified: Option<bool>,
    /// The pages that were read again, and equalled what this end had sent or loaded; `None` without page hashes.
    pub checked: Option<Coverage>,
    /// From start to verdict.
    pub total: Duration,
    /// From start to the first page.
    pub setup: Duration,
    /// How long the guest was paused: until it ran at the destination, or until it was resumed here, whatever the
    /// result. `None` if it was not paused, or still is.
    pub downtime: Option<Duration>,
    /// The parts of the downtime, as far as the migration came. At the source they add up to the downtime. A
    /// destination does not know the downtime, and reports the parts that it works on.
    pub parts: DowntimeParts,
    /// The likely cost when the controller decided to switch over, by the medians of what was measured, if it had a forecast.
    /// The forecast that the decision rests on, by high quantiles, is that of [`Event::Decided`].
    pub forecast: Option<Forecast>,
    /// Bytes handed to the transport (source) or taken from it (destination).
    pub wire_bytes: u64,
    /// Pages that were not sent because of the guest's information about them (source).
    pub excluded: ExcludedPages,
    /// The most memory that the engine used.
    pub memory_peak: u64,
    /// How every stage spent its time.
    pub stages: Vec<Reading>,
    /// What limited the speed.
    pub bottleneck: Bottleneck,
    /// Processor time of the process from the first page to the verdict.
    pub cpu: Duration,
    /// Did the source guest fail to resume after it was paused? It is paused, and runs nowhere else.
    pub resume_failed: bool,
    /// What lost connections have cost.
    pub outages: Outages,
    /// What happened in postcopy, if it came to that.
    pub postcopy: Option<Postcopy>,
}

/// A guest that was started at the destination before all of its pages were there.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Postcopy {
    /// Pages that were missing when the guest was handed over.
    pub missing_pages: u64,
    /// From the start of the guest until the last page was there, or was given up.
    pub time: Duration,
    /// Pages that were sent or placed for threads that waited.
    pub urgent_pages: u64,
    /// How long the destination discarded pages before the guest was paused (destination).
    pub discarded_ahead: Duration,
    /// The same while the guest was paused (destination).
    pub discarded_paused: Duration,
    /// What happened to missing pages, and how long threads waited for them (destination).
    pub faults: Option<MissingCounts>,
}

/// What lost connections have cost a migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub struct Outages {
    /// How many connections were lost.
    pub lost: u32,
    /// How long there was none, all together.
    #[serde(rename = "time_ms", with = "millis")]
    pub time: Duration,
    /// Page bytes that were in flight when a connection was lost, and were sent again; 0 at the destination.
    pub put_back_bytes: u64,
    /// How long the guest was paused in switchovers that a lost connection interrupted. It is no part of the downtime.
    #[serde(rename = "paused_ms", with = "millis")]
    pub paused: Duration,
}

impl Ended {
    /// How long the switchover took, from pause to Running, if it came to that: the value to compare a forecast with.
    #[must_use]
    pub fn switchover(&self) -> Option<Duration> {
        self.downtime.filter(|_| matches!(self.outcome, Outcome::Completed | Outcome::Lost))
    }
}

/// Receives events as they happen. Called from the control plane: return soon, never block. Wrap an observer that may
/// block, even if only by printing, in [`Queued`]. A closure is an observer.
pub trait Observer: Send + Sync {
    /// Receives one event of one end.
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

    /// This list with one more observer, which is notified first.
    #[must_use]
    pub fn and(&self, another: Arc<dyn Observer>) -> Self {
        Self { role: self.role, list: std::iter::once(another).chain(self.list.iter().cloned()).collect() }
    }

    /// No observers of this end.
    #[must_use]
    pub fn none(role: Role) -> Self {
        Self::new(role, Vec::new())
    }

    /// Which end.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// Notifies every observer.
    pub fn notify(&self, event: &Event) {
        for observer in self.list.iter() {
            observer.event(self.role, event);
        }
    }

    /// Notifies every observer of the end: its phase, and its figures.
    pub(crate) fn notify_end(&self, ended: &Ended) {
        self.notify(&Event::Phase(ended.outcome.into()));
        self.notify(&Event::Ended(Box::new(ended.clone())));
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
        let done = |remaining, total_bytes| {
            Progress { remaining_bytes: Some(remaining), total_bytes, ..Progress::default() }.done()
        };
        assert_eq!([done(0, 0), done(1, 4), done(9, 4), done(0, 4)], [0.0, 0.75, 0.0, 1.0].map(Some));
    }
}
