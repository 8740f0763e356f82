//! How a migration is to run: plain values, wherever they come from (a TOML file, a VMM's own code).
//!
//! They are the one definition of each setting: the configuration file takes its defaults, and whole tables where they are alike,
//! from here. The rules are here too: [`SourceSettings::check`] and [`DestinationSettings::check`] refuse what cannot be, and a
//! migration asks them before it begins anything.
//!
//! ```
//! use std::time::Duration;
//! use memferry::settings::SourceSettings;
//!
//! let settings = SourceSettings { downtime_limit: Duration::from_millis(50), ..SourceSettings::default() };
//! assert!(settings.verify);
//! ```

use std::time::Duration;

use memferry_stages::codec::Codec;
use memferry_stages::geometry::{MAX_LANES, PageSize};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::values::{Bandwidth, time};

pub use rules::{Rule, Setting, SettingsError};

mod rules;

/// What guest state may take where nothing else is set: virtual devices take kilobytes to a few megabytes.
pub const MAX_STATE_BYTES: u64 = 16 << 20;

/// How pages are encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncoderSettings {
    /// Compressor, in the first round; in every round where `xbzrle` is `None`.
    pub compress: Option<Codec>,
    /// Deltas from the first RoundComplete on.
    pub xbzrle: Option<XbzrleSettings>,
}

/// How deltas are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XbzrleSettings {
    /// Bytes of the cache, all lanes together. A source takes no more than its guest has memory: a larger cache holds nothing more.
    pub cache_bytes: u64,
    /// How pages travel that miss the cache, or whose delta is not smaller.
    pub on_miss: OnMiss,
    /// Do pages enter the cache in the first round already?
    pub cache_first_round: bool,
}

/// How a page travels that no delta helps: with the compressor of the first round, or as it is. Where that round has none, it
/// travels as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnMiss {
    /// Compressed where the wire is slower than the compressor, as it is elsewhere. Each lane decides for each batch, by what its
    /// sender waits.
    #[default]
    Auto,
    /// As it is.
    Raw,
    /// Compressed: the first round has a compressor then.
    Compress,
}

impl OnMiss {
    /// As the configuration writes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Raw => "raw",
            Self::Compress => "compress",
        }
    }
}

/// What happens when the deadline passes or the rounds are used up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnDeadline {
    /// The migration is cancelled; the guest goes on at the source.
    #[default]
    Cancel,
    /// The guest is paused and moved, however long that takes.
    SwitchOver,
}

/// How fast the rest may go while the guest is paused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SwitchoverBandwidth {
    /// As fast as the rounds: `max_bandwidth`.
    #[default]
    AsRounds,
    /// As fast as it goes. The forecast counts on no more than the rounds have shown.
    Unlimited,
    /// So many bytes a second. Where `max_bandwidth` held the rounds back, the forecast takes this for what the link carries.
    AtMost(u64),
}

impl SwitchoverBandwidth {
    /// Is it that of the rounds, which the configuration writes by leaving it out?
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

/// What can be done about a migration that does not come nearer to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum StallStep {
    /// The guest is held back, more each time.
    Throttle,
    /// The downtime limit is raised, more each time.
    RaiseDowntimeLimit,
    /// It switches over as soon as less remains than a round before.
    SwitchOver,
    /// It is cancelled.
    Cancel,
}

/// What is done about a migration that does not come nearer to its end by itself.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConvergenceSettings {
    /// The steps, in the order in which they are tried. None: rounds go on until they or the time are used up.
    pub on_stall: Vec<StallStep>,
    /// So many rounds without a new least of what remains are a stall.
    pub stall_rounds: u32,
    /// Rounds that a step is given to show what it does, before the next one.
    pub cool_down_rounds: u32,
    /// How the guest is held back.
    pub throttle: ThrottleSettings,
    /// How the downtime limit is raised.
    pub raise: RaiseSettings,
}

/// How a guest is held back, in percent of its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ThrottleSettings {
    /// The first step.
    pub start: u8,
    /// What each further step adds; the last may be smaller where the figures say that it suffices.
    pub step: u8,
    /// The most, at most 99.
    pub most: u8,
}

/// How the downtime limit is raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RaiseSettings {
    /// What each step adds.
    #[serde(with = "time")]
    pub step: Duration,
    /// The highest limit.
    #[serde(with = "time")]
    pub most: Duration,
}

/// What becomes of the source guest when a stream without a return path is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum After {
    /// It goes on: a snapshot.
    Resume,
    /// It stays paused: a move.
    Pause,
}

/// The least `peer_timeout`: an end that is alive sends something each half second.
pub const LEAST_PEER_TIMEOUT: Duration = Duration::from_secs(2);

/// Settings of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceSettings {
    /// Lanes: chains of stages side by side.
    pub lanes: u16,
    /// Connections, 1 to `lanes`.
    pub connections: u16,
    /// Encodings.
    pub encoder: EncoderSettings,
    /// Do payloads carry a checksum?
    pub checksum: bool,
    /// Bytes a second that are written, all connections together, headers of the network not counted; `None` is as fast as it
    /// goes. The configuration and the
    /// [control](crate::control) of a running migration take no less than
    /// [64 KiB/s](crate::values::Bandwidth::LEAST).
    pub max_bandwidth: Option<u64>,
    /// The same while the guest is paused.
    pub switchover_bandwidth: SwitchoverBandwidth,
    /// How long the guest may be paused, by the forecast.
    pub downtime_limit: Duration,
    /// What no switchover may take by the forecast, whatever asks for it: a raised limit, a stall, the deadline.
    pub max_downtime: Option<Duration>,
    /// The most rounds before the last one.
    pub max_rounds: u32,
    /// The longest the whole may take, from the start.
    pub deadline: Option<Duration>,
    /// What happens after `max_rounds`, or when the `deadline` can be kept in no other way.
    pub on_deadline: OnDeadline,
    /// What is done before that about a migration that does not converge.
    pub convergence: ConvergenceSettings,
    /// Compare digests before the destination may run.
    pub verify: bool,
    /// For a transport without a return path.
    pub after: Option<After>,
    /// The most bytes that guest state may take, both of its parts together. It is part of the memory bound.
    pub max_state_bytes: u64,
    /// How long the last handshake may take on either side of Go, and how long the destination may take nothing or leave a
    /// question unanswered before that.
    pub handover_timeout: Duration,
    /// How long the destination may be silent before the migration ends, where it answers at all. At least
    /// [`LEAST_PEER_TIMEOUT`].
    pub peer_timeout: Duration,
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
            max_rounds: 100,
            deadline: None,
            on_deadline: OnDeadline::Cancel,
            convergence: ConvergenceSettings::default(),
            verify: true,
            after: None,
            max_state_bytes: MAX_STATE_BYTES,
            handover_timeout: Duration::from_secs(30),
            peer_timeout: Duration::from_secs(30),
        }
    }
}

impl Default for ConvergenceSettings {
    /// Nothing is done: holding a guest back or stopping it for longer takes its operator's word.
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

/// Settings of a destination. What the stream is like, the source says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DestinationSettings {
    /// The page size its guest is built for; another one is refused. `None` takes what comes.
    pub page_size: Option<PageSize>,
    /// The most lanes it accepts.
    pub max_lanes: u16,
    /// Is a stream without digests refused?
    pub require_verify: bool,
    /// The most bytes that guest state may take, both of its parts together. It is part of the memory bound.
    pub max_state_bytes: u64,
    /// How long a connection may take to say Hello, and all of them to arrive.
    pub hello_timeout: Duration,
    /// How long to wait for Go.
    pub handover_timeout: Duration,
    /// How long the source may be silent before the migration ends, where it is answered at all. At least
    /// [`LEAST_PEER_TIMEOUT`].
    pub peer_timeout: Duration,
}

impl Default for DestinationSettings {
    /// Takes any page size.
    fn default() -> Self {
        Self {
            page_size: None,
            max_lanes: MAX_LANES,
            require_verify: false,
            max_state_bytes: MAX_STATE_BYTES,
            hello_timeout: Duration::from_secs(10),
            handover_timeout: Duration::from_secs(30),
            peer_timeout: Duration::from_secs(30),
        }
    }
}
