//! The tables of a configuration file, as they are written. Rules across tables are in `rules`.

mod guest;

use std::path::PathBuf;
use std::time::Duration;

use memferry_stages::codec::Codec;
use serde::{Deserialize, Serialize};

pub use guest::{FileTable, FreeTable, ImageTable, WorkloadTable, WriterTable};
use memferry::settings::{
    After, ConvergenceSettings, DestinationSettings, EncoderSettings, Mode, OnDeadline, OnMiss, PostcopyAfter,
    PostcopySettings, RecoverySettings, SourceSettings, SwitchoverBandwidth, Verify,
};
use memferry::values::{Bandwidth, Deadline, Size, Time};
use memferry_guests::kvm::KvmSettings;

/// A whole file.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The guest to move.
    pub guest: GuestTable,
    /// How pages are encoded.
    #[serde(default)]
    pub encoder: EncoderTable,
    /// How many stages work in parallel.
    #[serde(default)]
    pub pipeline: PipelineTable,
    /// How the bytes travel.
    pub transport: TransportTable,
    /// When to switch over, and what to do if the migration does not converge.
    #[serde(default)]
    pub migration: MigrationTable,
    /// How to throttle a guest whose dirty rate is above the bandwidth.
    #[serde(default)]
    pub convergence: ConvergenceSettings,
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
    Kvm(KvmSettings),
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
    /// The encoding after the first round.
    pub delta: DeltaChoice,
    /// The encoding of a page that the cache does not hold or whose delta is not smaller. By default it is compressed
    /// if the wire is slower than the compressor. If `compress` is none, it is always sent raw.
    pub on_miss: OnMiss,
    /// Bytes of the XBZRLE cache, all lanes together, at most the guest's memory. By default 256 MiB, or all of the
    /// guest's memory if that is less.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub xbzrle_cache: Option<Size>,
    /// Do pages enter the cache in the first round? By default they do: the second round then sends deltas where it
    /// would otherwise only miss. On 512 MiB with 8-byte writes all over, in lz4, that was 40 % fewer bytes and 20 %
    /// less time than without; on the quickstart, whose cache holds a quarter of the guest, 6 % and 12 %.
    pub cache_first_round: bool,
}

/// A compressor, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compress {
    /// Pages are sent raw.
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

/// `[transport]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TransportTable {
    /// `tls:host:port`, `tcp:host:port`, `tls+unix:/path`, `unix:/path` or `file:/path`.
    pub address: String,
    /// How long a source retries while nothing listens.
    #[serde(default = "TransportTable::default_connect_timeout")]
    pub connect_timeout: Time,
    /// The certificates of an address with TLS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsTable>,
    /// An aid for trials: connections that are lost on purpose.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub faults: Option<FaultsTable>,
}

/// `[transport.tls]`: who this end is, and whom it accepts. The same table serves both ends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlsTable {
    /// A directory with `ca-cert.pem`, `server-cert.pem` and `server-key.pem` (destination), `client-cert.pem` and `client-key.pem`
    /// (source), and `ca-crl.pem` if certificates are revoked: the names of QEMU and of Cloud Hypervisor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
    /// The certificates of the authorities whose word about the peer counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// This end's certificate, with intermediate ones behind it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<PathBuf>,
    /// Its private key, which only its owner may read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
    /// Revoked certificates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crl: Option<PathBuf>,
    /// The name that the destination's certificate must have, if it is not the host of the address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_name: Option<String>,
    /// The peers that are accepted, by a name of their certificate; `*` stands for any characters but `.` and `/`. By default whomever
    /// an authority vouches for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<String>,
    /// Must the source have a certificate?
    pub client_certificates: ClientCertificatesChoice,
}

/// Whether the source must prove who it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientCertificatesChoice {
    /// Both ends have certificates.
    #[default]
    Required,
    /// Only the destination has one: anybody who reaches it may send it a guest.
    None,
}

/// `[transport.faults]`: an aid for trials of recovery. The source's connections are cut.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FaultsTable {
    /// The bytes after which every connection is cut, counted from the beginning over all of them; one cut for each.
    pub cut_after: Vec<Size>,
    /// How long connections are refused after a cut.
    #[serde(default = "FaultsTable::default_refuse_for")]
    pub refuse_for: Time,
}

impl TransportTable {
    fn default_connect_timeout() -> Time {
        seconds(30)
    }
}

impl FaultsTable {
    fn default_refuse_for() -> Time {
        seconds(0)
    }
}

/// The settings of both ends, which a table's keys refer to.
#[derive(Clone, Debug, Default)]
pub(super) struct Ends {
    pub(super) source: SourceSettings,
    pub(super) destination: DestinationSettings,
}

/// A table whose keys are settings: each with its type in the file, and the setting or settings that it stands for.
/// The meaning and default of a key are documented at its setting.
macro_rules! table {
    ($(#[$about:meta])* $table:ident {
        $($(#[$how:meta])* $key:ident: $written:ty = $end:ident.$setting:ident $(, $other:ident.$same:ident)*;)*
    }) => {
        $(#[$about])*
        #[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
        #[serde(default, deny_unknown_fields)]
        #[expect(missing_docs, reason = "the settings have them")]
        pub struct $table {
            $($(#[$how])* pub $key: $written,)*
        }

        impl $table {
            pub(super) fn put_into(&self, ends: &mut Ends) {
                $(
                    ends.$end.$setting = self.$key.into();
                    $(ends.$other.$same = self.$key.into();)*
                )*
            }
        }

        impl Default for $table {
            fn default() -> Self {
                let ends = Ends::default();
                Self { $($key: ends.$end.$setting.into(),)* }
            }
        }
    };
}

table! {
    /// `[pipeline]`
    PipelineTable {
        lanes: u16 = source.lanes;
        connections: u16 = source.connections;
        checksum: bool = source.checksum;
        max_lanes: u16 = destination.max_lanes;
    }
}

table! {
    /// `[migration]`
    MigrationTable {
        downtime_limit: Time = source.downtime_limit;
        max_downtime: Deadline = source.max_downtime;
        expected_pause: Time = source.expected_pause;
        expected_prepare: Time = source.expected_prepare;
        expected_start: Time = source.expected_start;
        max_bandwidth: Bandwidth = source.max_bandwidth;
        #[serde(skip_serializing_if = "SwitchoverBandwidth::is_as_rounds")]
        switchover_bandwidth: SwitchoverBandwidth = source.switchover_bandwidth;
        verify: Verify = source.verify;
        max_rounds: u32 = source.max_rounds;
        deadline: Deadline = source.deadline;
        on_deadline: OnDeadline = source.on_deadline;
        #[serde(skip_serializing_if = "Option::is_none")]
        after: Option<After> = source.after;
        require_verify: bool = destination.require_verify;
        hello_timeout: Time = destination.hello_timeout;
        max_state: Size = source.max_state_bytes, destination.max_state_bytes;
        handover_timeout: Time = source.handover_timeout, destination.handover_timeout;
        peer_timeout: Time = source.peer_timeout, destination.peer_timeout;
        recovery: RecoverySettings = source.recovery, destination.recovery;
        mode: Mode = source.mode;
        #[serde(skip_serializing_if = "Option::is_none")]
        postcopy_after: Option<PostcopyAfter> = source.postcopy_after;
        postcopy: PostcopySettings = source.postcopy;
    }
}

impl Default for EncoderTable {
    fn default() -> Self {
        let EncoderSettings { compress, xbzrle } = EncoderSettings::default();
        let deltas = xbzrle.unwrap_or_default();
        Self {
            compress: match compress {
                None => Compress::None,
                Some(Codec::Snap) => Compress::Snap,
                Some(Codec::Lz4) => Compress::Lz4,
                Some(Codec::Zstd { .. }) => Compress::Zstd,
            },
            compress_level: None,
            delta: DeltaChoice::Xbzrle,
            on_miss: deltas.on_miss,
            xbzrle_cache: None,
            cache_first_round: deltas.cache_first_round,
        }
    }
}

fn seconds(seconds: u64) -> Time {
    Time(Duration::from_secs(seconds))
}
