//! An event of a migration as JSON, one line each: what `--events FILE` writes and the control API streams.
//!
//! Takes events as they happen and gives [`EventLine`], which becomes a line of JSON and is read back from one. The types
//! are of this format, where the engine's have other units or more in them; what is alike is the engine's own. The names here stay.
//! What may come are kinds and fields that a reader does not know, to be passed over.
//!
//! Every line is one object with `ms`, the milliseconds since whoever writes began to watch, `role`, the end that it is of
//! ("source" or "destination"), and `event`, its kind. Names are in snake_case, times in milliseconds (`…_ms`), sizes in
//! bytes (`…_bytes`), rates in bytes a second (`…_bytes_per_s`), parts in percent (`…_percent`). What cannot be told is null.
//!
//! | event | when | fields |
//! |---|---|---|
//! | `started` | first in a file of events; has no role | `schema`: 1; `unix_ms`: the time of day at `ms` 0 |
//! | `phase` | the phase changed | `phase`: "setup", "active", "switchover", "completed", "failed", "cancelled", "unconfirmed" |
//! | `connected` | the peer is there and agreed | `peer`: who, or which file |
//! | `guest` | the guest's memory is known | `bytes`, `pages`, `blocks` (`id`, `bytes`, `page_size`), `memory_bound_bytes`: what the engine may take for itself |
//! | `round_scanned` | the scanner reached the bitmap's end | `round`: from 1 |
//! | `round_sent` | a round is sent; at the destination: loaded | `round`, `last`, `duration_ms`, `pages` (= `zero` + `raw` + `compressed` + `xbzrle` + `unchanged`), `xbzrle_misses`, `xbzrle_overflows`, `bytes_in` of the pages, `bytes_out` of the frames |
//! | `synced` | a bitmap sync is done | `after_round`, `dirty_pages`, `duration_ms` |
//! | `spared` | pages need not travel | so far: `hinted`, `hints_dropped`, `unplugged`, `ignored` |
//! | `decided` | the controller decided | `round`, `decision`: "another-round", "sample" (a part of what is dirty is sent, to see what deltas come to), "drain" (what is on its way shall arrive first), "throttle", "raise-downtime-limit", "switch-over", "give-up"; `expected_ms`, `why`: in words; `reason`: "already-paused", "deltas-unknown", "within-limit", "nothing-dirty", "backlog", "above-limit", "stall", "limit-raised", "stall-minimum", "budget-used-up", "operator"; `throttle_percent` or `downtime_limit_ms` where that is decided; `forecast`: as in the report |
//! | `changed` | a setting was changed while it ran | `round`, `key`, `from` and `to`: as the configuration writes them; `memory_bound_bytes`: from here on |
//! | `progress` | ten times a second | `round`, `remaining_bytes`, `total_bytes`, `wire_bytes`, `wire_bytes_per_s`, `page_bytes_per_s`, `dirty_bytes_per_s`, `expected_downtime_ms`, `downtime_limit_ms` (null at the destination, as `remaining_bytes` and `done_percent` are there after the first round), `throttle_percent`, `done_percent` of the guest's memory, `time_left_ms` (null if nothing is measured, or it does not converge), `bottleneck_percent` (over the latest seconds: `processor`, `limit`, `destination`, `wire`, `guest`, `source`; null where this end cannot know), `cpu_ms` of the process since the first page, `stages` (`name`, `lane`, `busy_ms`, `input_wait_ms`, `output_wait_ms`, `limit_wait_ms`, `batches`, `pages`: from its start on). The last one, before the end, has rates of 0, and 0 remaining after completion |
//! | `turned_away` | strangers or broken peers of a kind were refused: the first at once, then counts | `kind`, `peer`, `why`, `count` |
//! | `warning` | the operator should know, and it goes on | `what` |
//! | `paused` | the guest stands still at the source | |
//! | `handed_over` | a cancel is too late: the destination may run the guest | |
//! | `resumed` | the guest goes on at the source | |
//! | `ended` | the last of its end | `phase`, `error`, `verified`, `total_ms`, `setup_ms`, `downtime_ms`, `downtime` (its parts), `forecast`, `wire_bytes`, `spared`, `memory_peak_bytes`, `bottleneck_percent`, `cpu_ms`, `stages`: as in the report; `resume_failed`: the source guest stands still and nobody runs it |
//! | `lost` | the reader was too slow; has no role | `events`: how many are missing before this line |

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use memferry_stages::clears::Spared;
use memferry_stages::tally::RoundTally;
use memferry_stages::untrusted::{Untrusted, shown_json};
use serde::{Deserialize, Serialize};

use super::{
    ChangeReport, DecisionReport, ForecastReport, GuestReport, PagesReport, StageReport, change, decision,
    forecast_report, guest, ms, percent, stage,
};
use memferry::bottleneck::Bottleneck;
use memferry::controller::forecast::whole;
use memferry::controller::{Decided, Decision};
use memferry::events::{DowntimeParts, Ended, Event, Phase, Progress, Role, TimeLeft};

/// The version of the names in a line.
pub const SCHEMA: u32 = 1;

/// One line. See the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EventLine {
    /// Milliseconds since whoever writes began to watch.
    pub ms: f64,
    /// Which end it is of; none for what the writer says of itself.
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
        /// To this.
        phase: Phase,
    },
    /// The peer is there and agreed.
    Connected {
        /// Who, or which file.
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
        /// The round before it.
        after_round: u32,
        /// Pages that are dirty.
        dirty_pages: u64,
        /// How long it took.
        duration_ms: f64,
    },
    /// Pages need not travel: so many so far.
    Spared(Spared),
    /// The controller decided.
    Decided(DecidedJson),
    /// A setting was changed while it ran.
    Changed(ChangedJson),
    /// Figures on the way.
    Progress(ProgressJson),
    /// Strangers or broken peers of a kind were turned away.
    TurnedAway {
        /// What kind of reason there was.
        kind: String,
        /// Who; of several the last.
        peer: Untrusted,
        /// Why; of several the last.
        why: Untrusted,
        /// How many, since the event before this one of the kind.
        count: u64,
    },
    /// Something the operator should know.
    Warning {
        /// What.
        what: Untrusted,
    },
    /// The guest stands still at the source.
    Paused,
    /// A cancel is too late.
    HandedOver,
    /// The guest goes on at the source.
    Resumed,
    /// It ended.
    Ended(EndedJson),
    /// The reader was too slow for the events before this line.
    Lost {
        /// How many are missing.
        events: u64,
    },
}

/// The guest's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestJson {
    /// Its bytes, pages and blocks.
    #[serde(flatten)]
    pub guest: GuestReport,
    /// What the engine may take for itself.
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
    /// What became of its pages.
    #[serde(flatten)]
    pub pages: PagesReport,
}

/// A decision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecidedJson {
    /// Which, when and why.
    #[serde(flatten)]
    pub decision: DecisionReport,
    /// Percent of its time that the guest is to be held back, where that is decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttle_percent: Option<u8>,
    /// The limit that is raised, where that is decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_limit_ms: Option<f64>,
    /// The forecast that it rests on; null if none could be made.
    pub forecast: Option<ForecastReport>,
}

/// A setting that was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangedJson {
    /// Which, when, and to what.
    #[serde(flatten)]
    pub change: ChangeReport,
    /// What the engine may take for itself from here on.
    pub memory_bound_bytes: u64,
}

/// Figures on the way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProgressJson {
    /// The current round, from 1.
    pub round: u32,
    /// Page bytes that are dirty or taken and not acknowledged; at the destination those of the first round that are not loaded, null
    /// after it.
    pub remaining_bytes: Option<u64>,
    /// Bytes of the guest.
    pub total_bytes: u64,
    /// Bytes handed to the transport so far, or taken from it.
    pub wire_bytes: u64,
    /// Bytes to the wire, or from it, a second, lately.
    pub wire_bytes_per_s: u64,
    /// Page bytes that get done a second, lately.
    pub page_bytes_per_s: u64,
    /// Page bytes that the guest dirtied a second between the last syncs; null if there were not two.
    pub dirty_bytes_per_s: Option<u64>,
    /// What a switchover at this moment would cost; null if it cannot be told.
    pub expected_downtime_ms: Option<f64>,
    /// The downtime limit as far as it is raised; null at the destination.
    pub downtime_limit_ms: Option<f64>,
    /// Percent of its time that the guest is throttled.
    pub throttle_percent: u8,
    /// The part of the guest's memory that does not remain; null where it is not known what does.
    #[serde(default)]
    pub done_percent: Option<f64>,
    /// How long it takes until nothing remains, at the rates of the moment; null if nothing is measured, or it does not converge.
    #[serde(default)]
    pub time_left_ms: Option<f64>,
    /// What holds it up, over the latest seconds; once it has ended, from its start.
    #[serde(default)]
    pub bottleneck_percent: Bottleneck,
    /// Processor time of the process since the first page.
    #[serde(default)]
    pub cpu_ms: f64,
    /// How every stage has spent its time so far.
    pub stages: Vec<StageReport>,
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EndedJson {
    /// Completed, failed, cancelled or unconfirmed.
    pub phase: Phase,
    /// Why it is not completed.
    pub error: Option<Untrusted>,
    /// Were digests compared and equal; null if they were not compared.
    pub verified: Option<bool>,
    /// From start to verdict.
    pub total_ms: f64,
    /// From start to the first page.
    pub setup_ms: f64,
    /// How long the guest was paused: until its start, or until it was resumed at the source; null if it was not paused, or still is.
    pub downtime_ms: Option<f64>,
    /// Its parts.
    pub downtime: DowntimeParts,
    /// What was expected of the downtime; null if the controller did not decide to switch over, or could not tell.
    pub forecast: Option<ForecastReport>,
    /// Bytes handed to the transport, or taken from it.
    pub wire_bytes: u64,
    /// Pages that were not sent for what the guest said of them.
    pub spared: Spared,
    /// The most memory that the engine took.
    pub memory_peak_bytes: u64,
    /// What held it up.
    #[serde(default)]
    pub bottleneck_percent: Bottleneck,
    /// Processor time of the process from the first page to the verdict.
    #[serde(default)]
    pub cpu_ms: f64,
    /// How each stage spent its time.
    pub stages: Vec<StageReport>,
    /// The source guest was paused and could not be resumed.
    pub resume_failed: bool,
}

impl EventLine {
    /// What happened at one end, so long after the watch began.
    #[must_use]
    pub fn new(since: Duration, role: Role, event: &Event) -> Self {
        Self { ms: ms(since), role: Some(role), event: event.into() }
    }

    /// The first line of a file, at a time of day.
    #[must_use]
    pub fn started(now: SystemTime) -> Self {
        let unix = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let unix_ms = u64::try_from(unix.as_millis()).unwrap_or(u64::MAX);
        Self { ms: 0.0, role: None, event: EventJson::Started { schema: SCHEMA, unix_ms } }
    }

    /// So many events are missing before this line.
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
    /// When it is no JSON, or of a kind that is not known here, which a reader should pass over.
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
            Event::Spared(so_far) => Self::Spared(*so_far),
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
            Event::Ended(ended) => Self::Ended(ended.into()),
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
        Self {
            phase: ended.phase,
            error: ended.error.as_deref().map(Untrusted::from),
            verified: ended.verified,
            total_ms: ms(ended.total),
            setup_ms: ms(ended.setup),
            downtime_ms: ended.downtime.map(ms),
            downtime: ended.parts,
            forecast: ended.forecast.map(|forecast| forecast_report(&forecast, ended.switchover())),
            wire_bytes: ended.wire_bytes,
            spared: ended.spared,
            memory_peak_bytes: ended.memory_peak,
            bottleneck_percent: ended.bottleneck,
            cpu_ms: ms(ended.cpu),
            stages: ended.stages.iter().map(stage).collect(),
            resume_failed: ended.resume_failed,
        }
    }
}

/// Whole bytes a second; no rate that is none.
fn rate(rate: f64) -> u64 {
    whole(rate.round())
}

fn round(tally: &RoundTally, duration: Duration) -> RoundJson {
    RoundJson { round: tally.round, last: tally.last, duration_ms: ms(duration), pages: tally.into() }
}

#[cfg(test)]
mod tests;
