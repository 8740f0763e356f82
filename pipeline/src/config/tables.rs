//! The tables of a configuration file, as they are written. What they mean together is checked in `rules`.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::values::{Bandwidth, Deadline, Size, Time};
use memferry_stages::geometry::MAX_LANES;

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

/// `[guest.workload]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkloadTable {
    /// Bytes of memory.
    pub memory: Size,
    /// RAM blocks it is cut into.
    pub blocks: u32,
    /// Unit of the dirty bitmap.
    pub page_size: Size,
    /// Where the memory comes from.
    pub backing: Backing,
    /// How writes are found.
    pub dirty_log: LogChoice,
    /// Start of every random sequence.
    pub seed: u64,
    /// What the memory holds at the start.
    pub fill: FillTable,
    /// The share of the memory that is unplugged: its end. It never travels.
    pub unplugged: f64,
    /// Memory that is free, and hinted so while it is migrated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free: Option<FreeTable>,
    /// A block more, in a file that both ends have. It never travels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shared: Option<SharedTable>,
    /// Who writes to it.
    pub writers: Vec<WriterTable>,
}

/// `[guest.workload.free]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FreeTable {
    /// The share of the memory that is free, behind what is in use and before what is unplugged.
    pub share: f64,
    /// How often a second a range of it is taken and written, or given back; 0 is never.
    #[serde(default)]
    pub turns_per_second: f64,
    /// What is taken at a time.
    #[serde(default = "FreeTable::default_range")]
    pub range: Size,
}

impl FreeTable {
    fn default_range() -> Size {
        Size(256 << 10)
    }
}

/// `[guest.workload.shared]`, `[guest.kvm.shared]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SharedTable {
    /// The file, the same at both ends. The source makes it if it is not there, and fills it.
    pub path: PathBuf,
    /// Its length.
    pub size: Size,
}

/// Where a workload's memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backing {
    /// Private memory.
    Anonymous,
    /// Shared memory.
    Memfd,
    /// Shared memory of huge pages that the operator has set aside (sysctl vm.nr_hugepages).
    Hugetlb,
}

/// How a workload's writes are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogChoice {
    /// Userfault where the host has it, else software.
    Auto,
    /// The writers mark what they write.
    Software,
    /// The kernel says which pages were written.
    Userfault,
    /// Every page is hashed and compared.
    Hash,
}

/// `fill`: shares of the memory; they need not add up to 1.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct FillTable {
    /// Pages of zeros.
    pub zero: f64,
    /// Pages of words.
    pub text: f64,
    /// Pages that do not compress.
    pub random: f64,
    /// Pages of this program's own binary.
    pub process: f64,
}

/// `[[guest.workload.writers]]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct WriterTable {
    /// Which pages come next.
    pub pattern: Pattern,
    /// How many a second; 0 is as many as it can.
    #[serde(default = "WriterTable::default_pages_per_second")]
    pub pages_per_second: f64,
    /// Bytes changed in a page by one write.
    #[serde(default = "WriterTable::default_bytes")]
    pub bytes: Size,
    /// The part of memory it writes to: from and to, as shares.
    #[serde(default = "WriterTable::default_region")]
    pub region: [f64; 2],
}

impl WriterTable {
    fn default_pages_per_second() -> f64 {
        10_000.0
    }

    fn default_bytes() -> Size {
        Size(64)
    }

    fn default_region() -> [f64; 2] {
        [0.0, 1.0]
    }
}

/// In which order a writer takes its pages.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Pattern {
    /// One after another, round and round.
    Sequential,
    /// Any page as likely as any other.
    Uniform,
    /// A few pages very often, most of them hardly ever.
    Zipf {
        /// How steep: 1 is the classic, more is steeper.
        exponent: f64,
    },
    /// A share of the writes goes to a share of the pages.
    HotSpot {
        /// Share of the pages that are hot.
        pages: f64,
        /// Share of the writes that go there.
        writes: f64,
    },
}

/// `[guest.file]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FileTable {
    /// The images: one RAM block each.
    pub images: Vec<ImageTable>,
    /// Small files that the source reads after `pause`, and that are in place at the destination before `start`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub state_files: Vec<ImageTable>,
    /// Unit of the dirty bitmap.
    #[serde(default = "default_page_size")]
    pub page_size: Size,
    /// Source: a command that pauses whoever writes the images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause: Option<Vec<String>>,
    /// Source: a command that lets it go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<Vec<String>>,
    /// Destination: a command that starts what lives on the images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<Vec<String>>,
    /// How long a command may take.
    #[serde(default = "FileTable::default_command_timeout")]
    pub command_timeout: Time,
    /// Destination: may images that exist be replaced?
    #[serde(default)]
    pub overwrite: bool,
}

impl FileTable {
    fn default_command_timeout() -> Time {
        seconds(10)
    }
}

/// One memory image, or one state file.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ImageTable {
    /// Name of its RAM block, or of its part of the state: the same at both ends.
    pub id: String,
    /// The file.
    pub path: PathBuf,
    /// With `run`: the file that the destination makes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<PathBuf>,
}

/// `[guest.kvm]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct KvmTable {
    /// Bytes of RAM.
    pub memory: Size,
    /// Virtual processors; each has its part of the region.
    pub vcpus: u32,
    /// Bytes that its program writes and checks, over and over.
    pub region: Size,
    /// Pages that each vCPU writes in a second; 0 is as many as it can.
    pub pages_per_second: f64,
    /// Bytes changed in each page.
    pub bytes: Size,
    /// Bytes behind the region that are free and hinted so: its program takes pages of them and gives them back.
    pub free: Size,
    /// Bytes at the end of the RAM that are unplugged: they never travel.
    pub unplugged: Size,
    /// A block more, in a file that both ends have. It never travels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shared: Option<SharedTable>,
    /// How writes are found.
    pub dirty_log: KvmLogChoice,
}

/// How the writes of a virtual machine are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum KvmLogChoice {
    /// KVM's dirty log, with manual protection.
    DirtyLog,
    /// KVM's dirty rings.
    DirtyRing,
    /// The kernel says which pages were written.
    Userfault,
    /// Every page is hashed and compared.
    Hash,
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
    /// What becomes of a page that the cache does not hold or whose delta is not smaller.
    pub on_miss: OnMiss,
    /// Bytes of the XBZRLE cache, all lanes together.
    pub xbzrle_cache: Size,
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
    /// Bytes a second on the wire, all connections together.
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
    /// How long the last handshake may take, and how long the peer may take nothing or leave a question unanswered.
    pub handover_timeout: Time,
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

impl Default for WorkloadTable {
    fn default() -> Self {
        Self {
            memory: Size(1 << 30),
            blocks: 1,
            page_size: default_page_size(),
            backing: Backing::Anonymous,
            dirty_log: LogChoice::Auto,
            seed: 1,
            fill: FillTable::default(),
            unplugged: 0.0,
            free: None,
            shared: None,
            writers: Vec::new(),
        }
    }
}

impl Default for KvmTable {
    fn default() -> Self {
        Self {
            memory: Size(64 << 20),
            vcpus: 1,
            region: Size(4 << 20),
            pages_per_second: 5_000.0,
            bytes: Size(64),
            free: Size(0),
            unplugged: Size(0),
            shared: None,
            dirty_log: KvmLogChoice::DirtyLog,
        }
    }
}

impl Default for FillTable {
    /// An ordinary guest: much of it never used, the rest mostly text and code.
    fn default() -> Self {
        Self { zero: 0.3, text: 0.3, random: 0.1, process: 0.3 }
    }
}

impl Default for EncoderTable {
    fn default() -> Self {
        Self {
            compress: Compress::Lz4,
            compress_level: None,
            delta: DeltaChoice::Xbzrle,
            on_miss: OnMiss::Raw,
            xbzrle_cache: Size(256 << 20),
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
            handover_timeout: seconds(30),
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

fn default_page_size() -> Size {
    Size(4096)
}

fn seconds(seconds: u64) -> Time {
    Time(Duration::from_secs(seconds))
}
