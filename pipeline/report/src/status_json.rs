//! The status of a running migration as JSON: the answer to `GET /migration` of the control API.
//!
//! Names and units are those of [`event_json`](super::event_json), whose types it contains. An unknown value is null.

use memferry_stages::untrusted::Untrusted;
use serde::Serialize;
use serde_json::{Map, Value};

use super::event_json::{DecidedJson, EndedJson, ProgressJson};
use super::{ForecastReport, forecast_report, ms};
use memferry::control::{Change, Status};
use memferry::events::{Outages, Phase, Role};
use memferry::settings::{SourceSettings, SwitchoverBandwidth};

/// The version of the field names.
pub const SCHEMA: u32 = 1;

/// The status of one end of a migration.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StatusJson {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The end; null before it has begun.
    pub role: Option<Role>,
    /// The phase.
    pub phase: Phase,
    /// Time since the begin; after the end, the total duration.
    pub elapsed_ms: f64,
    /// The peer's address or file.
    pub peer: Option<Untrusted>,
    /// Bytes of the guest; 0 before they are known.
    pub total_bytes: u64,
    /// The bound of the engine's memory.
    pub memory_bound_bytes: u64,
    /// Rounds that are complete.
    pub rounds: u32,
    /// Has the handover begun, so that a cancel is too late?
    pub handed_over: bool,
    /// Does the guest run at the destination, with pages of it still at the source? It stays so while there is no connection.
    pub postcopy: bool,
    /// The attempt, from 1: one more for each connection that was lost and made again; 0 before the first.
    pub attempt: u32,
    /// Why there is no connection, while there is none: the reason of the loss, or of the latest try to make it again.
    pub disconnected: Option<Untrusted>,
    /// What lost connections have cost so far.
    pub outages: Outages,
    /// The settings that can be changed, in the form that a PATCH takes; null at the destination.
    pub settings: Option<Map<String, Value>>,
    /// The latest figures.
    pub progress: Option<ProgressJson>,
    /// The latest forecast that a decision rests on.
    pub forecast: Option<ForecastReport>,
    /// The latest decision.
    pub decision: Option<DecidedJson>,
    /// Warnings for the operator, the latest last.
    pub warnings: Vec<String>,
    /// How it ended; null while it runs.
    pub ended: Option<EndedJson>,
}

impl From<&Status> for StatusJson {
    fn from(status: &Status) -> Self {
        Self {
            schema: SCHEMA,
            role: status.role,
            phase: status.phase,
            elapsed_ms: ms(status.elapsed),
            peer: status.peer.clone(),
            total_bytes: status.total_bytes(),
            memory_bound_bytes: status.memory_bound,
            rounds: status.rounds,
            handed_over: status.is_handed_over,
            postcopy: status.is_postcopy,
            attempt: status.attempt,
            disconnected: status.disconnected.as_deref().map(Untrusted::from),
            outages: status.outages,
            settings: status.settings.as_ref().map(settings),
            progress: status.progress.as_ref().map(ProgressJson::from),
            forecast: status.forecast.map(|forecast| forecast_report(&forecast, None)),
            decision: status.decision.as_ref().map(DecidedJson::from),
            warnings: status.warnings.clone(),
            ended: status.ended.as_ref().map(EndedJson::from),
        }
    }
}

fn settings(settings: &SourceSettings) -> Map<String, Value> {
    Change::list(settings).iter().map(|setting| (setting.key().to_owned(), value(setting))).collect()
}

/// The value in the form that a PATCH takes.
fn value(setting: &Change) -> Value {
    match setting {
        Change::ThrottleMost(percent) => (*percent).into(),
        Change::SwitchoverBandwidth(SwitchoverBandwidth::AsRounds) => Value::Null,
        other => other.to_string().into(),
    }
}
