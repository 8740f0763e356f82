//! The tables of a configuration file, as they are written. What they mean together is checked in `rules`.

mod guest;

use std::time::Duration;

use memferry_stages::geometry::MAX_LANES;
use serde::{Deserialize, Serialize};

pub use guest::{
    Backing, FileTable, FillTable, FreeTable, ImageTable, KvmLogChoice, KvmTable, LogChoice, Pattern, SharedTable,
    WorkloadTable, WriterTable,
};
use memferry::settings::MAX_STATE_BYTES;
use memferry::values::{Bandwidth, Deadline, Size, Time};

/// A whole file.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What is moved.
    pub guest: GuestTable,
    /// How pages are encoded.
    #[serde(default)]
    pub encoder: EncoderTable,
    /// How many stages work side by side.
    #[serde(default)]
    pub pipeline: PipelineTable,
    /// How the bytes travel.
    pub transport: TransportTable,
    /// When to switch over, and what to do if that moment does not come.
    #[serde(default)]
    pub migration: MigrationTable,
    /// What to do about a guest that outruns the wire.
    #[serde(default)]
    pub convergence: ConvergenceTable,
}

/// `[guest.workload]`, `[guest.file]` or `[guest.kvm]`.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestTable {
    /// Memory of this process, written by threads of this process.
    Workload(WorkloadTable),
    /// Memory images in files.
    File(FileTable),
    /// A virtual machine of this process.
    Kvm(KvmTable),
}

/// `[encoder]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct EncoderTable {
    /// Compressor of the first round; of every round where `delta` is none.
    pub compress: Compress,
    /// Level of zstd, -7 (fast) to 19 (dense).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compress_level: Option<i32>,
    /// What follows the first round.
    pub delta: DeltaChoice,
    /// What becomes of a page that the cache does not hold or whose delta is not smaller: by default it is compressed where the wire is
    /// slower than the compressor. Where `compress` is none it always goes as it is.
    pub on_miss: OnMiss,
    /// Bytes of the XBZRLE cache, all lanes together, at most the guest's memory. By default 256 MiB, or all of the guest's memory if
    /// that is less.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub xbzrle_cache: Option<Size>,
    /// Do pages enter the cache in the first round already? By default they do: the second round then sends deltas where it
    /// would only miss. On 512 MiB with 8-byte writes all over, in lz4, that was 40 % fewer bytes and 20 % less time than
    /// without; on the quickstart, whose cache holds a quarter of the guest, 6 % and 12 %.
    pub cache_first_round: bool,
}

/// A compressor, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compress {
    /// Pages go as they are.
    None,
    /// Snappy.
    Snap,
    /// LZ4.
    Lz4,
    /// Zstandard.
    Zstd,
}

/// Deltas, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DeltaChoice {
    /// Whole pages only.
    None,
    /// XBZRLE from the first RoundComplete on.
    Xbzrle,
}

/// How a page travels that no delta helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnMiss {
    /// Compressed where the wire is what holds the lane up.
    Auto,
    /// As it is.
    Raw,
    /// Compressed.
    Compress,
}

/// `[pipeline]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct PipelineTable {
    /// Chains of stages side by side.
    pub lanes: u16,
    /// Connections that carry them, 1 to `lanes`; a file has one.
    pub connections: u16,
    /// Do payloads carry a checksum?
    pub checksum: bool,
    /// The most lanes that a destination accepts.
    pub max_lanes: u16,
}

/// `[transport]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TransportTable {
    /// `tcp:host:port`, `unix:/path` or `file:/path`.
    pub address: String,
    /// How long a source keeps trying while nobody listens.
    #[serde(default = "TransportTable::default_connect_timeout")]
    pub connect_timeout: Time,
}

impl TransportTable {
    fn default_connect_timeout() -> Time {
        seconds(30)
    }
}

/// `[migration]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct MigrationTable {
    /// How long the guest may stand still, by the forecast.
    pub downtime_limit: Time,
    /// What no switchover may take by the forecast, whatever asks for it.
    pub max_downtime: Deadline,
    /// Bytes a second that are written, all connections together, headers of the network not counted.
    pub max_bandwidth: Bandwidth,
    /// The same while the guest stands still; as `max_bandwidth` where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub switchover_bandwidth: Option<Bandwidth>,
    /// Compare digests before the destination may run?
    pub verify: bool,
    /// The most rounds before the last one.
    pub max_rounds: u32,
    /// The longest that the whole may take.
    pub deadline: Deadline,
    /// What happens after `max_rounds`, or when the deadline can be kept in no other way.
    pub on_deadline: OnDeadline,
    /// What becomes of the source guest when a file is complete.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<After>,
    /// Destination: is a stream without digests refused?
    pub require_verify: bool,
    /// Destination: how long a connection may take to say who it is.
    pub hello_timeout: Time,
    /// The most memory that the state of the guest's devices may take, all of it together, at either end.
    pub max_state: Size,
    /// How long the last handshake may take, and how long the peer may take nothing or leave a question unanswered.
    pub handover_timeout: Time,
    /// How long the peer may be silent, at both ends, where the destination answers.
    pub peer_timeout: Time,
}

/// What happens to a migration that does not converge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnDeadline {
    /// It is cancelled.
    Cancel,
    /// The guest stands still for as long as it takes.
    SwitchOver,
}

/// `[convergence]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConvergenceTable {
    /// What is tried, in this order, when rounds bring it no nearer to its end.
    pub on_stall: Vec<StallStep>,
    /// So many rounds without a new least of what remains are a stall.
    pub stall_rounds: u32,
    /// Rounds that a step is given before the next one.
    pub cool_down_rounds: u32,
    /// How the guest is held back.
    pub throttle: ThrottleTable,
    /// How the downtime limit is raised.
    pub raise: RaiseTable,
}

/// What can be done about a stall.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum StallStep {
    /// The guest is held back.
    Throttle,
    /// The downtime limit is raised.
    RaiseDowntimeLimit,
    /// It switches over as soon as less remains than a round before.
    SwitchOver,
    /// It is cancelled.
    Cancel,
}

/// `throttle`: percent of the guest's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ThrottleTable {
    /// The first step.
    pub start: u8,
    /// What each further step adds.
    pub step: u8,
    /// The most.
    pub most: u8,
}

/// `raise`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RaiseTable {
    /// What each step adds to the downtime limit.
    pub step: Time,
    /// The highest limit.
    pub most: Time,
}

/// What becomes of the source guest when a file is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum After {
    /// It goes on: a snapshot.
    Resume,
    /// It stays paused: a move.
    Pause,
}

impl Default for EncoderTable {
    fn default() -> Self {
        Self {
            compress: Compress::Lz4,
            compress_level: None,
            delta: DeltaChoice::Xbzrle,
            on_miss: OnMiss::Auto,
            xbzrle_cache: None,
            cache_first_round: true,
        }
    }
}

impl Default for PipelineTable {
    fn default() -> Self {
        Self { lanes: 2, connections: 1, checksum: true, max_lanes: MAX_LANES }
    }
}

impl Default for MigrationTable {
    fn default() -> Self {
        Self {
            downtime_limit: Time(Duration::from_millis(300)),
            max_downtime: Deadline(None),
            max_bandwidth: Bandwidth(None),
            switchover_bandwidth: None,
            verify: true,
            max_rounds: 100,
            deadline: Deadline(None),
            on_deadline: OnDeadline::Cancel,
            after: None,
            require_verify: false,
            hello_timeout: seconds(10),
            max_state: Size(MAX_STATE_BYTES),
            handover_timeout: seconds(30),
            peer_timeout: seconds(30),
        }
    }
}

impl Default for ConvergenceTable {
    fn default() -> Self {
        Self {
            on_stall: Vec::new(),
            stall_rounds: 4,
            cool_down_rounds: 2,
            throttle: ThrottleTable::default(),
            raise: RaiseTable::default(),
        }
    }
}

impl Default for ThrottleTable {
    fn default() -> Self {
        Self { start: 20, step: 10, most: 90 }
    }
}

impl Default for RaiseTable {
    fn default() -> Self {
        Self { step: Time(Duration::from_millis(100)), most: seconds(1) }
    }
}

fn seconds(seconds: u64) -> Time {
    Time(Duration::from_secs(seconds))
}
