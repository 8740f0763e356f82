//! The settings of a migration: plain values, from any source (a TOML file, a VMM's own code).
//!
//! This is the only definition of each setting: the configuration file takes its defaults from here, and whole tables
//! where they are the same. The rules are here too: [`SourceSettings::check`] and [`DestinationSettings::check`] refuse
//! invalid settings, and a migration calls them before it begins.
//!
//! ```
//! use std::time::Duration;
//! use memferry::settings::SourceSettings;
//!
//! let settings = SourceSettings { downtime_limit: Duration::from_millis(50), ..SourceSettings::default() };
//! assert!(settings.verify.is_on());
//! ```

use std::time::Duration;

use memferry_stages::codec::Codec;
use memferry_stages::geometry::{MAX_LANES, PageSize};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::values::{Bandwidth, time};

pub use postcopy::{Mode, PostcopyAfter, PostcopySettings};
pub use rules::{Rule, Setting, SettingsError};
pub use verify::Verify;

mod postcopy;
mod rules;
mod verify;

/// The default limit for guest state: virtual devices take kilobytes to a few megabytes.
pub const MAX_STATE_BYTES: u64 = 16 << 20;

/// How long a call into the guest is expected to take by default.
const EXPECTED_CALL: Duration = Duration::from_micros(250);

/// How pages are encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncoderSettings {
    /// The compressor of the first round, and of every round if `xbzrle` is `None`.
    pub compress: Option<Codec>,
    /// Deltas after the first RoundComplete.
    pub xbzrle: Option<XbzrleSettings>,
}

/// The settings for deltas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XbzrleSettings {
    /// Bytes of the cache, all lanes together. A source takes no more than its guest's memory: a larger cache holds no
    /// more pages.
    pub cache_bytes: u64,
    /// How pages travel that miss the cache, or whose delta is not smaller than the page.
    pub on_miss: OnMiss,
    /// Do pages enter the cache in the first round already?
    pub cache_first_round: bool,
}

/// How a page travels that a delta does not help: with the compressor of the first round, or raw. If the first round
/// has no compressor, it travels raw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnMiss {
    /// Compressed if the wire is slower than the compressor, else raw. Each lane decides for each batch, by the time
    /// that its sender waits.
    #[default]
    Auto,
    /// Raw.
    Raw,
    /// Compressed: requires a compressor for the first round.
    Compress,
}

impl OnMiss {
    /// The value in the syntax of the configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Raw => "raw",
            Self::Compress => "compress",
        }
    }
}

/// The action when the deadline passes or the rounds are used up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnDeadline {
    /// The migration is cancelled; the guest continues at the source.
    #[default]
    Cancel,
    /// The guest is paused and moved, however long that takes.
    SwitchOver,
}

/// The bandwidth limit for the rest while the guest is paused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SwitchoverBandwidth {
    /// The same limit as in the rounds: `max_bandwidth`.
    #[default]
    AsRounds,
    /// No limit. The forecast assumes no more than the rounds have shown.
    Unlimited,
    /// A limit in bytes a second. If `max_bandwidth` limited the rounds, the forecast assumes that the link carries
    /// this much.
    AtMost(u64),
}

impl SwitchoverBandwidth {
    /// Is it the limit of the rounds, which the configuration expresses by omission?
    #[must_use]
    pub fn is_as_rounds(&self) -> bool {
        *self == Self::AsRounds
    }
}

impl<'de> Deserialize<'de> for SwitchoverBandwidth {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Bandwidth(most) = Bandwidth::deserialize(deserializer)?;
        Ok(most.map_or(Self::Unlimited, Self::AtMost))
    }
}

impl Serialize for SwitchoverBandwidth {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Self::AsRounds => serializer.serialize_none(),
            Self::Unlimited => Bandwidth(None).serialize(serializer),
            Self::AtMost(most) => Bandwidth(Some(most)).serialize(serializer),
        }
    }
}

/// A step for a migration that does not converge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum StallStep {
    /// The guest is throttled, more each time.
    Throttle,
    /// The downtime limit is raised, more each time.
    RaiseDowntimeLimit,
    /// The guest is switched over as soon as less remains than a round before.
    SwitchOver,
    /// The guest is started at the destination before all of its pages are there: needs [`Mode::Hybrid`].
    Postcopy,
    /// The migration is cancelled.
    Cancel,
}

/// What is done about a migration that does not converge by itself.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConvergenceSettings {
    /// The steps, in the order in which they are tried. If empty, rounds continue until they or the time are used up.
    pub on_stall: Vec<StallStep>,
    /// A stall is this number of rounds without a new minimum of what remains.
    pub stall_rounds: u32,
    /// Rounds that a step has to show its effect, before the next one.
    pub cool_down_rounds: u32,
    /// How the guest is throttled.
    pub throttle: ThrottleSettings,
    /// How the downtime limit is raised.
    pub raise: RaiseSettings,
}

/// The throttle, in percent of the guest's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ThrottleSettings {
    /// The first level.
    pub start: u8,
    /// The increase of each further step; the last may be smaller if the figures show that it suffices.
    pub step: u8,
    /// The ceiling, at most 99.
    pub most: u8,
}

/// How the downtime limit is raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RaiseSettings {
    /// The increase of each step.
    #[serde(with = "time")]
    pub step: Duration,
    /// The highest limit.
    #[serde(with = "time")]
    pub most: Duration,
}

/// The state of the source guest when a stream without a return path is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum After {
    /// It is resumed: a snapshot.
    Resume,
    /// It stays paused: a move.
    Pause,
}

/// The least `peer_timeout`: each end sends something every half second while it is alive.
pub const LEAST_PEER_TIMEOUT: Duration = Duration::from_secs(2);

/// What is done about a lost connection. The transport needs a return path, and payloads a checksum or a transport that
/// authenticates them; without either, a lost connection ends the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RecoverySettings {
    /// How many lost connections a migration survives. With 0 the first one ends it.
    pub attempts: u32,
    /// The wait before the source tries again to reach the destination. It doubles with each try, up to ten seconds.
    #[serde(with = "time")]
    pub backoff: Duration,
    /// How long an end waits for the other one. Of two ends that differ the shorter time counts.
    #[serde(with = "time")]
    pub give_up: Duration,
}

impl Default for RecoverySettings {
    /// Suits a switch that is down for two minutes.
    fn default() -> Self {
        Self { attempts: 10, ..Self::OFF }
    }
}

impl RecoverySettings {
    /// A lost connection ends the migration.
    pub const OFF: Self = Self { attempts: 0, backoff: Duration::from_millis(500), give_up: Duration::from_secs(300) };
}

/// Settings of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceSettings {
    /// Lanes: parallel chains of stages.
    pub lanes: u16,
    /// Connections, 1 to `lanes`.
    pub connections: u16,
    /// Encodings.
    pub encoder: EncoderSettings,
    /// Do payloads carry a checksum?
    pub checksum: bool,
    /// Bytes a second that are written, all connections together, without network headers; `None` is unlimited. The
    /// configuration and the [control](crate::control) of a running migration accept no less than [64
    /// KiB/s](crate::values::Bandwidth::LEAST).
    pub max_bandwidth: Option<u64>,
    /// The same limit while the guest is paused.
    pub switchover_bandwidth: SwitchoverBandwidth,
    /// How long the guest may be paused, by the forecast.
    pub downtime_limit: Duration,
    /// The downtime that no switchover may exceed by the forecast, whatever causes it: a raised limit, a stall, the
    /// deadline.
    pub max_downtime: Option<Duration>,
    /// How long pausing the guest takes. It is not known before it is done, so the forecast counts this: for a guest that
    /// commands pause, set it to what they take, as the report of an earlier migration shows it.
    pub expected_pause: Duration,
    /// The same for preparing the guest at the destination.
    pub expected_prepare: Duration,
    /// The same for starting the guest at the destination.
    pub expected_start: Duration,
    /// The most rounds before the last one.
    pub max_rounds: u32,
    /// The longest the migration may take, from the start.
    pub deadline: Option<Duration>,
    /// The action after `max_rounds`, or when there is no other way to meet the `deadline`.
    pub on_deadline: OnDeadline,
    /// The steps before that for a migration that does not converge.
    pub convergence: ConvergenceSettings,
    /// How the destination's memory is compared with the source's before the guest may run there.
    pub verify: Verify,
    /// The state of the guest at the end, for a transport without a return path.
    pub after: Option<After>,
    /// The most bytes that guest state may take, both of its parts together. It is part of the memory bound.
    pub max_state_bytes: u64,
    /// How long the last handshake may take before Go and after it, and how long the destination may accept no data or
    /// leave a request unanswered before that.
    pub handover_timeout: Duration,
    /// How long the destination may be silent before the connection counts as lost, if the transport has a return path. At least
    /// [`LEAST_PEER_TIMEOUT`].
    pub peer_timeout: Duration,
    /// What is done about a lost connection.
    pub recovery: RecoverySettings,
    /// When the guest is started at the destination.
    pub mode: Mode,
    /// When [`Mode::Hybrid`] switches to postcopy; `None`: when the operator asks for it, or as a step of `convergence`.
    pub postcopy_after: Option<PostcopyAfter>,
    /// What follows a switch to postcopy.
    pub postcopy: PostcopySettings,
}

impl Default for SourceSettings {
    fn default() -> Self {
        Self {
            lanes: 2,
            connections: 1,
            encoder: EncoderSettings::default(),
            checksum: true,
            max_bandwidth: None,
            switchover_bandwidth: SwitchoverBandwidth::AsRounds,
            downtime_limit: Duration::from_millis(300),
            max_downtime: None,
            expected_pause: EXPECTED_CALL,
            expected_prepare: EXPECTED_CALL,
            expected_start: EXPECTED_CALL,
            max_rounds: 100,
            deadline: None,
            on_deadline: OnDeadline::Cancel,
            convergence: ConvergenceSettings::default(),
            verify: Verify::default(),
            after: None,
            max_state_bytes: MAX_STATE_BYTES,
            handover_timeout: Duration::from_secs(30),
            peer_timeout: Duration::from_secs(30),
            recovery: RecoverySettings::default(),
            mode: Mode::default(),
            postcopy_after: None,
            postcopy: PostcopySettings::default(),
        }
    }
}

impl Default for ConvergenceSettings {
    /// No steps: throttling a guest or pausing it for longer requires the operator's decision.
    fn default() -> Self {
        Self {
            on_stall: Vec::new(),
            stall_rounds: 4,
            cool_down_rounds: 2,
            throttle: ThrottleSettings::default(),
            raise: RaiseSettings::default(),
        }
    }
}

impl Default for ThrottleSettings {
    fn default() -> Self {
        Self { start: 20, step: 10, most: 90 }
    }
}

impl Default for RaiseSettings {
    fn default() -> Self {
        Self { step: Duration::from_millis(100), most: Duration::from_secs(1) }
    }
}

impl Default for EncoderSettings {
    /// lz4 in the first round, deltas after it.
    fn default() -> Self {
        Self { compress: Some(Codec::Lz4), xbzrle: Some(XbzrleSettings::default()) }
    }
}

impl Default for XbzrleSettings {
    fn default() -> Self {
        Self { cache_bytes: 256 << 20, on_miss: OnMiss::Auto, cache_first_round: true }
    }
}

/// Settings of a destination. The source determines the properties of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DestinationSettings {
    /// The page size its guest is built for; another one is refused. `None` accepts any.
    pub page_size: Option<PageSize>,
    /// The most lanes it accepts.
    pub max_lanes: u16,
    /// Is a stream without digests refused?
    pub require_verify: bool,
    /// The most bytes that guest state may take, both of its parts together. It is part of the memory bound.
    pub max_state_bytes: u64,
    /// How long a connection may take to send Hello, and all of them to arrive.
    pub hello_timeout: Duration,
    /// How long to wait for Go.
    pub handover_timeout: Duration,
    /// How long the source may be silent before the connection counts as lost, if there is a return path. At least
    /// [`LEAST_PEER_TIMEOUT`].
    pub peer_timeout: Duration,
    /// What is done about a lost connection: of it, `attempts` and `give_up`.
    pub recovery: RecoverySettings,
}

impl Default for DestinationSettings {
    /// Accepts any page size.
    fn default() -> Self {
        Self {
            page_size: None,
            max_lanes: MAX_LANES,
            require_verify: false,
            max_state_bytes: MAX_STATE_BYTES,
            hello_timeout: Duration::from_secs(10),
            handover_timeout: Duration::from_secs(30),
            peer_timeout: Duration::from_secs(30),
            recovery: RecoverySettings::default(),
        }
    }
}
