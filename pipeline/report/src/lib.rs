//! The report of a migration: one JSON object for programs, a table and a page for people, all derived from its
//! events.

pub mod account;
pub mod event_json;
mod file;
pub mod html;
pub mod postcopy;
pub mod series;
pub mod status_json;
pub mod table;
pub mod todo;

use std::fmt;
use std::io;
use std::path::Path;
use std::time::Duration;

use memferry_stages::exclusions::ExcludedPages;
use memferry_stages::meter::Reading;
use memferry_stages::page_hashes::Coverage;
use memferry_stages::tally::PageTally;
use memferry_stages::untrusted::Untrusted;
use serde::{Deserialize, Serialize};

use account::{Account, Lost, Round};
pub use file::write;
use memferry::bottleneck::Bottleneck;
use memferry::control::Changed;
use memferry::controller::forecast::{Forecast, whole};
use memferry::controller::{Decided, Decision};
use memferry::events::{BlockFacts, DowntimeParts, Ended, Outages, Outcome};
use memferry::values::ms;
use postcopy::PostcopyReport;

/// The version of the report's field names.
pub const SCHEMA: u32 = 1;

/// The report, as `--report FILE` writes it. Times are in milliseconds, sizes in bytes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The ends that it is about.
    pub role: Ends,
    /// How it ended: completed, failed, cancelled, unconfirmed or lost.
    pub status: Outcome,
    /// Its figures. With both ends, those of the source, supplemented by its destination's.
    #[serde(flatten)]
    pub end: EndReport,
    /// The guest that was moved.
    pub guest: GuestReport,
    /// The controller's decisions, in order.
    pub decisions: Vec<DecisionReport>,
    /// Settings that were changed during the migration, in order.
    pub changes: Vec<ChangeReport>,
    /// The lost connections, in order.
    pub lost_connections: Vec<LostConnectionReport>,
    /// Bytes on the wire for each second after the setup, without the time in which there was no connection.
    pub throughput_bytes_per_s: f64,
    /// The bound of the engine's memory, known before the migration starts.
    pub memory_bound_bytes: u64,
    /// The bottleneck, in words.
    pub bottleneck: String,
    /// Round by round.
    pub rounds: Vec<RoundReport>,
}

/// How one end of a migration ended, in figures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EndReport {
    /// Why it did not complete.
    pub error: Option<Untrusted>,
    /// Whether the digests of both ends are equal; null if they were not compared.
    pub verified: Option<bool>,
    /// How many pages were read again, of how many, and equalled what this end had sent or loaded; null without page hashes.
    #[serde(default)]
    pub checked: Option<Coverage>,
    /// From start to verdict.
    pub total_ms: f64,
    /// From start to the first page.
    pub setup_ms: f64,
    /// How long the guest was paused: until its start at the destination, or until it was resumed at the source. Null
    /// if it was not paused, or still is.
    pub downtime_ms: Option<f64>,
    /// The parts of the downtime, which add up to it at the source.
    pub downtime: DowntimeParts,
    /// The controller's forecast when it decided to switch over; null if it did not decide so, had no forecast, or the guest was handed
    /// over before its pages were sent.
    pub forecast: Option<ForecastReport>,
    /// Bytes written to the transport, or read from it.
    pub wire_bytes: u64,
    /// Pages that were not sent because of page hints, unplugged memory or ignored blocks, as the source counts them.
    pub excluded: ExcludedPages,
    /// The peak of the engine's memory.
    pub memory_peak_bytes: u64,
    /// The bottleneck.
    #[serde(default)]
    pub bottleneck_percent: Bottleneck,
    /// Processor time of the process from the first page to the verdict.
    #[serde(default)]
    pub cpu_ms: f64,
    /// How each stage spent its time.
    pub stages: Vec<StageReport>,
    /// What lost connections have cost.
    #[serde(default)]
    pub outages: Outages,
    /// What happened in postcopy; null if it did not come to that.
    #[serde(default)]
    pub postcopy: Option<PostcopyReport>,
}

impl From<&Ended> for EndReport {
    fn from(ended: &Ended) -> Self {
        Self {
            error: ended.error.as_deref().map(Untrusted::from),
            verified: ended.verified,
            checked: ended.checked,
            total_ms: ms(ended.total),
            setup_ms: ms(ended.setup),
            downtime_ms: ended.downtime.map(ms),
            downtime: ended.parts,
            forecast: ended
                .forecast
                .filter(|_| ended.postcopy.is_none())
                .map(|forecast| forecast_report(&forecast, ended.switchover())),
            wire_bytes: ended.wire_bytes,
            excluded: ended.excluded,
            memory_peak_bytes: ended.memory_peak,
            bottleneck_percent: ended.bottleneck,
            cpu_ms: ms(ended.cpu),
            stages: ended.stages.iter().map(stage).collect(),
            outages: ended.outages,
            postcopy: ended.postcopy.as_ref().map(PostcopyReport::from),
        }
    }
}

/// The ends of a migration that a report is about, named after the command that hosts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Ends {
    /// Both, in one process.
    #[serde(rename = "run")]
    Both,
    /// The source.
    #[serde(rename = "send")]
    Source,
    /// The destination.
    #[serde(rename = "recv")]
    Destination,
}

impl Ends {
    /// The name in JSON, which is that of the command.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Both => "run",
            Self::Source => "send",
            Self::Destination => "recv",
        }
    }
}

impl fmt::Display for Ends {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestReport {
    /// Bytes of all blocks.
    pub bytes: u64,
    /// Pages of all blocks.
    pub pages: u64,
    /// Each block.
    pub blocks: Vec<BlockFacts>,
}

/// A forecast, and beside the actual result the likely one: see [`Ended::forecast`](memferry::events::Ended::forecast).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ForecastReport {
    /// The expected downtime.
    pub expected_ms: f64,
    /// How far the forecast was above (or, negative, below) the downtime, as a share of the downtime; null if there
    /// was no downtime.
    pub error_percent: Option<f64>,
    /// Bytes that were expected to remain, after encoding.
    pub remaining_bytes: u64,
    /// The expected parts of the downtime: see [`DowntimeParts`].
    #[serde(default)]
    pub pause_ms: f64,
    /// Device state.
    #[serde(default)]
    pub state_ms: f64,
    /// The last sync.
    pub sync_ms: f64,
    /// The last round.
    pub transfer_ms: f64,
    /// What the destination still has to load.
    #[serde(default)]
    pub load_ms: f64,
    /// Verification.
    pub verify_ms: f64,
    /// Writing to disk.
    #[serde(default)]
    pub durable_ms: f64,
    /// Preparing the guest.
    #[serde(default)]
    pub prepare_ms: f64,
    /// Starting it.
    #[serde(default)]
    pub start_ms: f64,
    /// The last handshake.
    pub handover_ms: f64,
}

/// One decision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecisionReport {
    /// The round after which, or in which, it was made.
    pub round: u32,
    /// "another-round", "sample", "drain", "throttle", "raise-downtime-limit", "switch-over", "postcopy" or "give-up".
    pub decision: Untrusted,
    /// The expected downtime; null if it is unknown.
    pub expected_ms: Option<f64>,
    /// The reason, in words and figures.
    pub why: Untrusted,
    /// The name of the reason, as [`Reason::name`](memferry::controller::reason::Reason::name) returns it; empty if
    /// the writer knows none.
    #[serde(default)]
    pub reason: Untrusted,
}

/// A setting that was changed during the migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeReport {
    /// The round in which it was changed.
    pub round: u32,
    /// The name of the setting.
    pub key: Untrusted,
    /// Its value before, as the configuration writes it.
    pub from: Untrusted,
    /// Its new value.
    pub to: Untrusted,
}

/// A connection that was lost.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LostConnectionReport {
    /// The attempt that ended, from 1.
    pub attempt: u32,
    /// When, from this end's first event.
    pub at_ms: f64,
    /// Why.
    pub why: Untrusted,
    /// How long there was no connection; null if it was not made again.
    pub outage_ms: Option<f64>,
    /// How often the source tried to make it again and failed.
    pub failed_tries: u32,
    /// Page bytes that were in flight, and were sent again; 0 at the destination.
    pub put_back_bytes: u64,
    /// How long the guest was paused in the switchover that it interrupted; null if there was none.
    pub paused_ms: Option<f64>,
}

/// One round.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RoundReport {
    /// Its number, from 1.
    pub round: u32,
    /// How long it took.
    pub ms: f64,
    /// Was it a sample round, which sends a part of the dirty pages to measure their deltas?
    pub sample: bool,
    /// Its pages by encoding.
    #[serde(flatten)]
    pub pages: PageTally,
    /// Dirty pages that the next sync found; null if there was none.
    pub dirty_after: Option<u64>,
}

/// One stage in one lane.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageReport {
    /// Its name.
    pub name: Untrusted,
    /// Its lane, or the number of its connection; null if there is only one.
    pub lane: Option<u16>,
    /// Time spent working.
    pub busy_ms: f64,
    /// Time spent waiting for input.
    pub input_wait_ms: f64,
    /// Time spent waiting for room in the output channel.
    pub output_wait_ms: f64,
    /// Time spent waiting for `max_bandwidth`.
    #[serde(default)]
    pub limit_wait_ms: f64,
    /// Batches that passed.
    pub batches: u64,
    /// Pages that passed.
    pub pages: u64,
}

impl Report {
    /// The report of a migration from one end. With `other`, the report of the source supplemented by its
    /// destination: the stages are those of both ends, and the destination determines whether the memory was
    /// verified.
    ///
    /// # Panics
    /// If `account` has not ended.
    #[must_use]
    pub fn new(role: Ends, verdict: &Ended, account: &Account, other: Option<&Account>) -> Self {
        let ended = account.status.ended.as_ref().expect("an account that ended");
        let far = other.and_then(|account| account.status.ended.as_ref());
        let stages = readings(account, other);
        let held_up = held_up(ended, far);
        let end = EndReport {
            error: verdict.error.as_deref().map(Untrusted::from),
            verified: far.map_or(ended.verified, |far| far.verified),
            memory_peak_bytes: ended.memory_peak + far.map_or(0, |far| far.memory_peak),
            bottleneck_percent: held_up,
            stages: stages.iter().map(stage).collect(),
            postcopy: PostcopyReport::joined(ended.postcopy.as_ref(), far.and_then(|far| far.postcopy.as_ref())),
            ..ended.into()
        };
        Self {
            schema: SCHEMA,
            role,
            status: verdict.outcome,
            end,
            guest: guest(&account.status.blocks, account.status.pages),
            decisions: account.decided.iter().map(decision).collect(),
            changes: account.changed.iter().map(change).collect(),
            lost_connections: account.lost.iter().map(lost_connection).collect(),
            throughput_bytes_per_s: throughput(ended).round(),
            memory_bound_bytes: account.memory_bound + other.map_or(0, |other| other.memory_bound),
            bottleneck: held_up.to_string(),
            rounds: account.rounds.iter().map(round).collect(),
        }
    }

    /// Writes the report as JSON, completely or not at all. A target that is not a regular file (`/dev/stdout`, a
    /// pipe, a link) is written to directly, never replaced.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, file: &Path) -> io::Result<()> {
        write(file, &self.to_json())
    }

    /// The JSON that [`write`](Self::write) writes.
    pub fn to_json(&self) -> Vec<u8> {
        let mut json = serde_json::to_vec_pretty(self).expect("plain values become JSON");
        json.push(b'\n');
        json
    }
}

/// How the stages of both ends spent their time, for each end that has ended.
#[must_use]
pub fn readings(account: &Account, other: Option<&Account>) -> Vec<Reading> {
    let ends = [Some(account), other].into_iter().flatten().filter_map(|account| account.status.ended.as_ref());
    ends.flat_map(|ended| ended.stages.iter().cloned()).collect()
}

/// The bottleneck. If both ends are in this process, the figures of both are used.
#[must_use]
pub fn held_up(ended: &Ended, far: Option<&Ended>) -> Bottleneck {
    far.map_or(ended.bottleneck, |far| ended.bottleneck.beside(&far.bottleneck))
}

/// The stage with the greatest share of working time, and that share; `None` if no stage has run.
#[must_use]
pub fn busiest(stages: &[Reading]) -> Option<(&Reading, f64)> {
    let share = |stage: &Reading| stage.busy.as_secs_f64() / stage.life().as_secs_f64().max(f64::MIN_POSITIVE);
    let shares = stages.iter().map(|stage| (stage, share(stage)));
    shares.max_by(|a, b| a.1.total_cmp(&b.1))
}

/// Bytes on the wire for each second after the setup, without the time in which there was no connection.
#[must_use]
pub fn throughput(ended: &Ended) -> f64 {
    let seconds = ended.total.saturating_sub(ended.setup).saturating_sub(ended.outages.time).as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let bytes = ended.wire_bytes as f64;
    if seconds > 0.0 { bytes / seconds } else { 0.0 }
}

fn guest(blocks: &[BlockFacts], pages: u64) -> GuestReport {
    let bytes = blocks.iter().map(|block| block.bytes).sum();
    GuestReport { bytes, pages, blocks: blocks.to_vec() }
}

fn forecast_report(forecast: &Forecast, downtime: Option<Duration>) -> ForecastReport {
    let fixed = forecast.fixed;
    ForecastReport {
        expected_ms: ms(forecast.expected()),
        error_percent: downtime.map(|downtime| (error_percent(forecast, downtime) * 10.0).round() / 10.0),
        remaining_bytes: whole(forecast.remaining_bytes),
        pause_ms: ms(fixed.pause),
        state_ms: ms(fixed.state),
        sync_ms: ms(fixed.sync),
        transfer_ms: ms(forecast.transfer),
        load_ms: ms(fixed.load),
        verify_ms: ms(fixed.verify),
        durable_ms: ms(fixed.durable),
        prepare_ms: ms(fixed.prepare),
        start_ms: ms(fixed.start),
        handover_ms: ms(fixed.handover),
    }
}

/// How far a forecast was above the actual downtime, in percent of the downtime.
#[must_use]
pub fn error_percent(forecast: &Forecast, downtime: Duration) -> f64 {
    let (expected, took) = (forecast.expected().as_secs_f64(), downtime.as_secs_f64());
    (expected / took - 1.0) * 100.0
}

fn decision(decided: &Decided) -> DecisionReport {
    DecisionReport {
        round: decided.round,
        decision: decision_name(decided.decision).into(),
        expected_ms: decided.forecast.map(|forecast| ms(forecast.expected())),
        why: decided.to_string().into(),
        reason: decided.reason.name().into(),
    }
}

/// The name of a decision.
#[must_use]
pub fn decision_name(decision: Decision) -> &'static str {
    match decision {
        Decision::AnotherRound => "another-round",
        Decision::Sample(_) => "sample",
        Decision::Drain => "drain",
        Decision::Throttle(_) => "throttle",
        Decision::RaiseLimit(_) => "raise-downtime-limit",
        Decision::SwitchOver => "switch-over",
        Decision::Postcopy => "postcopy",
        Decision::GiveUp => "give-up",
    }
}

fn change(changed: &Changed) -> ChangeReport {
    let Changed { round, from, to, .. } = changed;
    ChangeReport { round: *round, key: to.key().into(), from: from.to_string().into(), to: to.to_string().into() }
}

fn lost_connection(lost: &Lost) -> LostConnectionReport {
    LostConnectionReport {
        attempt: lost.attempt,
        at_ms: ms(lost.at),
        why: lost.why.as_str().into(),
        outage_ms: lost.outage.map(ms),
        failed_tries: lost.tries,
        put_back_bytes: lost.put_back_bytes,
        paused_ms: lost.paused.map(ms),
    }
}

fn round(round: &Round) -> RoundReport {
    let &Round { tally, duration, is_sample, dirty_after } = round;
    RoundReport { round: tally.round, ms: ms(duration), sample: is_sample, pages: tally.pages, dirty_after }
}

fn stage(reading: &Reading) -> StageReport {
    StageReport {
        name: reading.stage.kind.name().into(),
        lane: reading.stage.at.number(),
        busy_ms: ms(reading.busy),
        input_wait_ms: ms(reading.input_wait),
        output_wait_ms: ms(reading.output_wait),
        limit_wait_ms: ms(reading.limit_wait),
        batches: reading.batches,
        pages: reading.pages,
    }
}

/// A share in percent, to one decimal.
fn percent(share: f64) -> f64 {
    (share * 1e3).round() / 10.0
}

#[cfg(test)]
pub(crate) mod tests;
