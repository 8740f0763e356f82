//! An event of a migration as JSON, one line each: what `--events FILE` writes and the control API streams.
//!
//! Events become [`EventLine`]s, and a line can be read back into one. The types here belong to the format and are
//! separate from the engine's where units or contents differ; otherwise the engine's types are used. The names in
//! this format are stable. New kinds and fields may be added: a reader must ignore those it does not know.
//!
//! Every line is one object with `ms`, the milliseconds since the writer began to watch, `role`, the end that it
//! belongs to ("source" or "destination"), and `event`, its kind. Names are in snake_case, times in milliseconds (`…_ms`), sizes in
//! bytes (`…_bytes`), rates in bytes a second (`…_bytes_per_s`), parts in percent (`…_percent`). An unknown value is null.
//!
//! | event | when | fields |
//! |---|---|---|
//! | `started` | first in a file of events; has no role | `schema`: 1; `unix_ms`: the time of day at `ms` 0 |
//! | `phase` | the phase changed | `phase`: "setup", "active", "switchover", "postcopy", "disconnected", "completed", "failed", "cancelled", "unconfirmed", "lost" |
//! | `connected` | the peer is connected and the handshake succeeded | `peer`: its address or file |
//! | `guest` | the guest's memory is known | `bytes`, `pages`, `blocks` (`id`, `bytes`, `page_size`), `memory_bound_bytes`: the bound of the engine's memory |
//! | `round_scanned` | the scanner reached the bitmap's end | `round`: from 1 |
//! | `round_sent` | a round is sent; at the destination: loaded | `round`, `last`, `duration_ms`, `pages` (= `zero` + `raw` + `compressed` + `xbzrle` + `unchanged`), `xbzrle_misses`, `xbzrle_overflows`, `bytes_in` of the pages, `bytes_out` of the frames |
//! | `synced` | a bitmap sync is done | `after_round`, `dirty_pages`, `duration_ms` |
//! | `excluded` | pages need not travel | so far: `hinted`, `hints_dropped`, `unplugged`, `ignored` |
//! | `decided` | the controller decided | `round`, `decision`: "another-round", "sample" (a part of the dirty pages is sent, to measure their deltas), "drain" (pages in flight are to arrive first), "throttle", "raise-downtime-limit", "switch-over", "postcopy" (the guest is started at the destination, and the rest follows), "give-up"; `expected_ms`, `why`: in words; `reason`: "already-paused", "deltas-unknown", "within-limit", "nothing-dirty", "backlog", "above-limit", "stall", "limit-raised", "stall-minimum", "budget-used-up", "postcopy-due", "operator"; `throttle_percent` or `downtime_limit_ms` where that is decided; `forecast`: as in the report |
//! | `changed` | a setting was changed during the migration | `round`, `key`, `from` and `to`: as the configuration writes them; `memory_bound_bytes`: from here on |
//! | `progress` | ten times a second | `round`, `remaining_bytes`, `total_bytes`, `wire_bytes`, `wire_bytes_per_s`, `page_bytes_per_s`, `dirty_bytes_per_s`, `expected_downtime_ms`, `downtime_limit_ms` (null at the destination, as `remaining_bytes` and `done_percent` are there after the first round), `throttle_percent`, `done_percent` of the guest's memory, `time_left_ms` (null if nothing is measured, or it does not converge), `bottleneck_percent` (over the latest seconds: `processor`, `limit`, `destination`, `wire`, `guest`, `source`; null where this end cannot know), `cpu_ms` of the process since the first page, `stages` (`name`, `lane`, `busy_ms`, `input_wait_ms`, `output_wait_ms`, `limit_wait_ms`, `batches`, `pages`: from its start on). The last one, before the end, has rates of 0, and 0 remaining after completion |
//! | `turned_away` | peers were refused for a reason of this kind: the first is reported at once, later ones are counted | `kind`, `peer`, `why`, `count` |
//! | `warning` | a problem that does not end the migration | `what` |
//! | `paused` | the guest is paused at the source | |
//! | `handed_over` | a cancel is too late: the destination may run the guest | |
//! | `resumed` | the guest is resumed at the source | |
//! | `disconnected` | the connection is lost, and is to be made again | `attempt`: the one that ended, from 1; `why` |
//! | `not_reached` | the source could not make the connection again yet | `tries` since it was lost; `why` the latest failed; `again_in_ms` |
//! | `reconnected` | the connection is made again, and the migration continues | `attempt`: the one that begins, from 2; `outage_ms`: how long there was none; `put_back_bytes` of pages that were in flight and are sent again, 0 at the destination |
//! | `ended` | the last event of its end | `phase`, `error`, `verified`, `checked`, `total_ms`, `setup_ms`, `downtime_ms`, `downtime` (its parts), `forecast`, `wire_bytes`, `excluded`, `memory_peak_bytes`, `bottleneck_percent`, `cpu_ms`, `stages`, `outages`, `postcopy`: as in the report; `resume_failed`: the source guest is still paused and runs nowhere |
//! | `lost` | the reader was too slow; has no role | `events`: how many are missing before this line |

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use memferry_stages::exclusions::ExcludedPages;
use memferry_stages::tally::{PageTally, RoundTally};
use memferry_stages::untrusted::{Untrusted, shown_json};
use serde::{Deserialize, Serialize};

use super::{
    ChangeReport, DecisionReport, EndReport, ForecastReport, GuestReport, StageReport, change, decision,
    forecast_report, guest, ms, percent, stage,
};
use memferry::bottleneck::Bottleneck;
use memferry::controller::forecast::whole;
use memferry::controller::{Decided, Decision};
use memferry::events::{Ended, Event, Outcome, Phase, Progress, Role, TimeLeft};

/// The version of the names in a line.
pub const SCHEMA: u32 = 1;

/// One line. See the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EventLine {
    /// Milliseconds since the writer began to watch.
    pub ms: f64,
    /// The end that it belongs to; none for lines about the writer itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
    /// What happened.
    #[serde(flatten)]
    pub event: EventJson,
}

/// What happened; the tag `event` names the kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum EventJson {
    /// A file of events begins.
    Started {
        /// [`SCHEMA`].
        schema: u32,
        /// The time of day, in milliseconds since 1970.
        unix_ms: u64,
    },
    /// The phase changed.
    Phase {
        /// The new phase.
        phase: Phase,
    },
    /// The peer is connected and the handshake succeeded.
    Connected {
        /// Its address or file.
        peer: Untrusted,
    },
    /// The guest's memory is known.
    Guest(GuestJson),
    /// The scanner reached the end of the bitmap.
    RoundScanned {
        /// The round.
        round: u32,
    },
    /// A round is sent, or loaded.
    RoundSent(RoundJson),
    /// A bitmap sync is done.
    Synced {
        /// The round before the sync.
        after_round: u32,
        /// Dirty pages.
        dirty_pages: u64,
        /// How long it took.
        duration_ms: f64,
    },
    /// Pages are skipped; the figures are totals so far.
    Excluded(ExcludedPages),
    /// The controller decided.
    Decided(DecidedJson),
    /// A setting was changed during the migration.
    Changed(ChangedJson),
    /// Progress figures.
    Progress(ProgressJson),
    /// Peers were refused for a reason of this kind.
    TurnedAway {
        /// The kind of reason.
        kind: String,
        /// The peer; of several, the last one.
        peer: Untrusted,
        /// The reason; of several, the last one.
        why: Untrusted,
        /// How many were refused since the previous event of this kind.
        count: u64,
    },
    /// A problem that the operator should know of.
    Warning {
        /// The message.
        what: Untrusted,
    },
    /// The guest is paused at the source.
    Paused,
    /// The handover has begun: a cancel is too late.
    HandedOver,
    /// The guest is resumed at the source.
    Resumed,
    /// The connection is lost, and is to be made again.
    Disconnected {
        /// The attempt that ended, from 1.
        attempt: u32,
        /// Why.
        why: Untrusted,
    },
    /// The source could not make the connection again yet.
    NotReached {
        /// How often it has tried since the connection was lost.
        tries: u32,
        /// Why the latest try failed.
        why: Untrusted,
        /// When it tries again.
        again_in_ms: f64,
    },
    /// The connection is made again, and the migration continues.
    Reconnected {
        /// The attempt that begins, from 2.
        attempt: u32,
        /// How long there was no connection.
        outage_ms: f64,
        /// Page bytes that were in flight, and are sent again; 0 at the destination.
        put_back_bytes: u64,
    },
    /// The migration ended.
    Ended(Box<EndedJson>),
    /// The reader was too slow for the events before this line.
    Lost {
        /// The number of missing events.
        events: u64,
    },
}

/// The guest's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestJson {
    /// Its bytes, pages and blocks.
    #[serde(flatten)]
    pub guest: GuestReport,
    /// The bound of the engine's memory.
    pub memory_bound_bytes: u64,
}

/// A round that is sent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoundJson {
    /// Its number, from 1.
    pub round: u32,
    /// Is it the last?
    pub last: bool,
    /// From its first batch to its last byte sent, or loaded.
    pub duration_ms: f64,
    /// Its pages by encoding.
    #[serde(flatten)]
    pub pages: PageTally,
}

/// A decision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecidedJson {
    /// Which decision, when and why.
    #[serde(flatten)]
    pub decision: DecisionReport,
    /// Percent of its time that the guest is to be throttled, for a decision to throttle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttle_percent: Option<u8>,
    /// The new downtime limit, for a decision to raise it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_limit_ms: Option<f64>,
    /// The forecast that the decision rests on; null if none could be made.
    pub forecast: Option<ForecastReport>,
}

/// A setting that was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangedJson {
    /// Which setting, when, and its new value.
    #[serde(flatten)]
    pub change: ChangeReport,
    /// The bound of the engine's memory from here on.
    pub memory_bound_bytes: u64,
}

/// Progress figures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProgressJson {
    /// The current round, from 1.
    pub round: u32,
    /// Bytes of pages that are dirty, or taken and not yet acknowledged. At the destination: bytes of the first
    /// round's pages that are not loaded, null after that round.
    pub remaining_bytes: Option<u64>,
    /// Bytes of the guest.
    pub total_bytes: u64,
    /// Bytes written to the transport so far, or read from it.
    pub wire_bytes: u64,
    /// Recent rate of bytes written to the wire, or read from it, per second.
    pub wire_bytes_per_s: u64,
    /// Recent rate of completed page bytes, per second.
    pub page_bytes_per_s: u64,
    /// Rate at which the guest dirtied page bytes between the last two syncs, per second; null before the second
    /// sync.
    pub dirty_bytes_per_s: Option<u64>,
    /// The expected cost of a switchover at this moment; null if it is unknown.
    pub expected_downtime_ms: Option<f64>,
    /// The downtime limit, including raises; null at the destination.
    pub downtime_limit_ms: Option<f64>,
    /// Percent of its time that the guest is throttled.
    pub throttle_percent: u8,
    /// The part of the guest's memory that does not remain to be sent; null if the remainder is unknown.
    #[serde(default)]
    pub done_percent: Option<f64>,
    /// Time until nothing remains, at the current rates; null if nothing is measured or the migration does not
    /// converge.
    #[serde(default)]
    pub time_left_ms: Option<f64>,
    /// The bottleneck over the latest seconds; after the end, over the whole migration.
    #[serde(default)]
    pub bottleneck_percent: Bottleneck,
    /// Processor time of the process since the first page.
    #[serde(default)]
    pub cpu_ms: f64,
    /// How every stage has spent its time so far.
    pub stages: Vec<StageReport>,
}

/// How the migration ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EndedJson {
    /// Completed, failed, cancelled, unconfirmed or lost.
    #[serde(rename = "phase")]
    pub outcome: Outcome,
    /// Its figures.
    #[serde(flatten)]
    pub end: EndReport,
    /// The source guest was paused and could not be resumed.
    pub resume_failed: bool,
}

impl EventLine {
    /// An event at one end, at this time since the watch began.
    #[must_use]
    pub fn new(since: Duration, role: Role, event: &Event) -> Self {
        Self { ms: ms(since), role: Some(role), event: event.into() }
    }

    /// The first line of a file, with the time of day at which it begins.
    #[must_use]
    pub fn started(now: SystemTime) -> Self {
        let unix = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let unix_ms = u64::try_from(unix.as_millis()).unwrap_or(u64::MAX);
        Self { ms: 0.0, role: None, event: EventJson::Started { schema: SCHEMA, unix_ms } }
    }

    /// This number of events is missing before this line.
    #[must_use]
    pub fn lost(since: Duration, events: u64) -> Self {
        Self { ms: ms(since), role: None, event: EventJson::Lost { events } }
    }

    /// The line, with its newline.
    ///
    /// # Panics
    /// Never: plain values become JSON.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut line = shown_json(serde_json::to_string(self).expect("plain values become JSON"));
        line.push('\n');
        line
    }

    /// Reads a line.
    ///
    /// # Errors
    /// If it is not JSON, or its kind is unknown here. A reader should ignore an unknown kind.
    pub fn from_json(line: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(line)
    }
}

impl From<&Event> for EventJson {
    fn from(event: &Event) -> Self {
        match event {
            Event::Phase(phase) => Self::Phase { phase: *phase },
            Event::Connected { peer } => Self::Connected { peer: peer.clone() },
            Event::Guest { blocks, pages, memory_bound } => {
                Self::Guest(GuestJson { guest: guest(blocks, *pages), memory_bound_bytes: *memory_bound })
            }
            Event::RoundScanned { round } => Self::RoundScanned { round: *round },
            Event::RoundSent { tally, duration } => Self::RoundSent(round(tally, *duration)),
            Event::Synced { after_round, dirty_pages, duration } => {
                Self::Synced { after_round: *after_round, dirty_pages: *dirty_pages, duration_ms: ms(*duration) }
            }
            Event::Excluded(so_far) => Self::Excluded(*so_far),
            Event::Decided(decided) => Self::Decided(decided.into()),
            Event::Progress(progress) => Self::Progress(progress.into()),
            Event::TurnedAway { kind, peer, why, count } => Self::TurnedAway {
                kind: kind.name().to_owned(),
                peer: peer.clone(),
                why: why.as_str().into(),
                count: *count,
            },
            Event::Warning(what) => Self::Warning { what: what.as_str().into() },
            Event::Changed(changed) => {
                Self::Changed(ChangedJson { change: change(changed), memory_bound_bytes: changed.memory_bound })
            }
            Event::Paused => Self::Paused,
            Event::HandedOver => Self::HandedOver,
            Event::Resumed => Self::Resumed,
            Event::Disconnected { attempt, why } => Self::Disconnected { attempt: *attempt, why: why.as_str().into() },
            Event::NotReached { tries, why, again_in } => {
                Self::NotReached { tries: *tries, why: why.as_str().into(), again_in_ms: ms(*again_in) }
            }
            Event::Reconnected { attempt, outage, put_back_bytes } => {
                Self::Reconnected { attempt: *attempt, outage_ms: ms(*outage), put_back_bytes: *put_back_bytes }
            }
            Event::Ended(ended) => Self::Ended(Box::new((&**ended).into())),
        }
    }
}

impl From<&Decided> for DecidedJson {
    fn from(decided: &Decided) -> Self {
        Self {
            decision: decision(decided),
            throttle_percent: match decided.decision {
                Decision::Throttle(percent) => Some(percent),
                _ => None,
            },
            downtime_limit_ms: match decided.decision {
                Decision::RaiseLimit(limit) => Some(ms(limit)),
                _ => None,
            },
            forecast: decided.forecast.map(|forecast| forecast_report(&forecast, None)),
        }
    }
}

impl From<&Progress> for ProgressJson {
    fn from(now: &Progress) -> Self {
        Self {
            round: now.round,
            remaining_bytes: now.remaining_bytes,
            total_bytes: now.total_bytes,
            wire_bytes: now.wire_bytes,
            wire_bytes_per_s: rate(now.wire_rate),
            page_bytes_per_s: rate(now.page_rate),
            dirty_bytes_per_s: now.dirty_rate.map(rate),
            expected_downtime_ms: now.expected_downtime.map(ms),
            downtime_limit_ms: (!now.downtime_limit.is_zero()).then(|| ms(now.downtime_limit)),
            throttle_percent: now.throttle,
            done_percent: now.done().map(percent),
            time_left_ms: match now.time_left() {
                TimeLeft::About(time) => Some(ms(time)),
                TimeLeft::Unknown | TimeLeft::DoesNotConverge => None,
            },
            bottleneck_percent: now.bottleneck,
            cpu_ms: ms(now.cpu),
            stages: now.stages.iter().map(stage).collect(),
        }
    }
}

impl From<&Ended> for EndedJson {
    fn from(ended: &Ended) -> Self {
        Self { outcome: ended.outcome, end: ended.into(), resume_failed: ended.resume_failed }
    }
}

/// Whole bytes per second; 0 for a value that is not a rate.
fn rate(rate: f64) -> u64 {
    whole(rate.round())
}

fn round(tally: &RoundTally, duration: Duration) -> RoundJson {
    RoundJson { round: tally.round, last: tally.kind.is_final(), duration_ms: ms(duration), pages: tally.pages }
}

#[cfg(test)]
mod tests;
