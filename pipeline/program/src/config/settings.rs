//! From a checked configuration to the plain values that migrations and guests take.
//!
//! Every function here takes a [`Config`] that [`super::load`] gave: what the rules have refused cannot occur.

use std::path::PathBuf;

use memferry_stages::codec::Codec;
use memferry_stages::geometry::PageSize;
use memferry_transports::tcp::TcpTransport;
use memferry_transports::{Address, Transport};

use super::tables::{
    self, Compress, Config, ConvergenceTable, DeltaChoice, EncoderTable, FileTable, KvmTable, WorkloadTable,
    WriterTable,
};
use memferry::settings::{
    After, ConvergenceSettings, DestinationSettings, EncoderSettings, OnDeadline, OnMiss, RaiseSettings,
    SourceSettings, StallStep, SwitchoverBandwidth, ThrottleSettings, XbzrleSettings,
};
use memferry::values::{Bandwidth, Size};
use memferry_guests::file::{FileGuestSettings, Image};
use memferry_guests::kvm::{KvmLogChoice, KvmSettings};
use memferry_guests::workload::{
    Backing, Fill, FreeSettings, LogChoice, Pattern, Region, SharedSettings, WorkloadSettings, WriterSettings,
};

/// The level of zstd where none is given: as fast as lz4's neighbours, denser than them.
const ZSTD_LEVEL: i32 = 1;

impl Config {
    /// Settings of the source.
    #[must_use]
    pub fn source(&self) -> SourceSettings {
        let (pipeline, migration) = (&self.pipeline, &self.migration);
        SourceSettings {
            lanes: pipeline.lanes,
            connections: pipeline.connections,
            encoder: encoder(&self.encoder),
            checksum: pipeline.checksum,
            max_bandwidth: migration.max_bandwidth.0,
            switchover_bandwidth: match migration.switchover_bandwidth {
                None => SwitchoverBandwidth::AsRounds,
                Some(Bandwidth(None)) => SwitchoverBandwidth::Unlimited,
                Some(Bandwidth(Some(rate))) => SwitchoverBandwidth::AtMost(rate),
            },
            downtime_limit: migration.downtime_limit.0,
            max_downtime: migration.max_downtime.0,
            max_rounds: migration.max_rounds,
            deadline: migration.deadline.0,
            on_deadline: match migration.on_deadline {
                tables::OnDeadline::Cancel => OnDeadline::Cancel,
                tables::OnDeadline::SwitchOver => OnDeadline::SwitchOver,
            },
            convergence: convergence(&self.convergence),
            verify: migration.verify,
            after: migration.after.map(|after| match after {
                tables::After::Resume => After::Resume,
                tables::After::Pause => After::Pause,
            }),
            max_state_bytes: migration.max_state.0,
            handover_timeout: migration.handover_timeout.0,
            peer_timeout: migration.peer_timeout.0,
        }
    }

    /// Settings of the destination. It takes the page size that comes.
    #[must_use]
    pub fn destination(&self) -> DestinationSettings {
        DestinationSettings {
            page_size: None,
            max_lanes: self.pipeline.max_lanes,
            require_verify: self.migration.require_verify,
            hello_timeout: self.migration.hello_timeout.0,
            max_state_bytes: self.migration.max_state.0,
            handover_timeout: self.migration.handover_timeout.0,
            peer_timeout: self.migration.peer_timeout.0,
        }
    }

    /// The address.
    ///
    /// # Panics
    /// If the configuration was not checked.
    #[must_use]
    pub fn address(&self) -> Address {
        self.transport.address.parse().expect("the rules have checked it")
    }

    /// The transport to this address: the configuration's own, or the one that a listener got.
    #[must_use]
    pub fn transport_to(&self, address: &Address) -> Box<dyn Transport> {
        let [connect, peer] = [self.transport.connect_timeout, self.migration.peer_timeout].map(|timeout| timeout.0);
        match address {
            Address::Tcp { host, port } => Box::new(TcpTransport::new(host, *port, connect).with_peer_timeout(peer)),
            other => memferry_transports::open(other, connect),
        }
    }
}

fn convergence(table: &ConvergenceTable) -> ConvergenceSettings {
    let ConvergenceTable { on_stall, stall_rounds, cool_down_rounds, throttle, raise } = table;
    let step = |step: &tables::StallStep| match step {
        tables::StallStep::Throttle => StallStep::Throttle,
        tables::StallStep::RaiseDowntimeLimit => StallStep::RaiseDowntimeLimit,
        tables::StallStep::SwitchOver => StallStep::SwitchOver,
        tables::StallStep::Cancel => StallStep::Cancel,
    };
    ConvergenceSettings {
        on_stall: on_stall.iter().map(step).collect(),
        stall_rounds: *stall_rounds,
        cool_down_rounds: *cool_down_rounds,
        throttle: ThrottleSettings { start: throttle.start, step: throttle.step, most: throttle.most },
        raise: RaiseSettings { step: raise.step.0, most: raise.most.0 },
    }
}

fn encoder(table: &EncoderTable) -> EncoderSettings {
    let xbzrle = XbzrleSettings {
        cache_bytes: table.xbzrle_cache.map_or(XbzrleSettings::default().cache_bytes, |size| size.0),
        on_miss: match table.on_miss {
            tables::OnMiss::Auto => OnMiss::Auto,
            tables::OnMiss::Raw => OnMiss::Raw,
            tables::OnMiss::Compress => OnMiss::Compress,
        },
        cache_first_round: table.cache_first_round,
    };
    EncoderSettings {
        compress: match table.compress {
            Compress::None => None,
            Compress::Snap => Some(Codec::Snap),
            Compress::Lz4 => Some(Codec::Lz4),
            Compress::Zstd => Some(Codec::Zstd { level: table.compress_level.unwrap_or(ZSTD_LEVEL) }),
        },
        xbzrle: (table.delta == DeltaChoice::Xbzrle).then_some(xbzrle),
    }
}

/// What a workload is.
///
/// # Panics
/// If the table was not checked.
#[must_use]
pub fn workload(table: &WorkloadTable) -> WorkloadSettings {
    let fill = &table.fill;
    WorkloadSettings {
        memory: table.memory.0,
        blocks: table.blocks,
        page_size: page_size(table.page_size),
        backing: match table.backing {
            tables::Backing::Anonymous => Backing::Anonymous,
            tables::Backing::Memfd => Backing::Memfd,
            tables::Backing::Hugetlb => Backing::Hugetlb,
        },
        dirty_log: match table.dirty_log {
            tables::LogChoice::Auto => LogChoice::Auto,
            tables::LogChoice::Software => LogChoice::Software,
            tables::LogChoice::Userfault => LogChoice::Userfault,
            tables::LogChoice::Hash => LogChoice::Hash,
        },
        fill: Fill { zero: fill.zero, text: fill.text, random: fill.random, process: fill.process },
        writers: table.writers.iter().map(writer).collect(),
        free: table.free.as_ref().map(|free| FreeSettings {
            share: free.share,
            turns_per_second: free.turns_per_second,
            // What does not fit is more than the most, and refused as that.
            range_pages: u32::try_from(free.range.0 / table.page_size.0).unwrap_or(u32::MAX),
        }),
        unplugged: table.unplugged,
        shared: table.shared.as_ref().map(shared),
        seed: table.seed,
    }
}

fn writer(table: &WriterTable) -> WriterSettings {
    let [from, to] = table.region;
    WriterSettings {
        pattern: match table.pattern {
            tables::Pattern::Sequential => Pattern::Sequential,
            tables::Pattern::Uniform => Pattern::Uniform,
            tables::Pattern::Zipf { exponent } => Pattern::Zipf { exponent },
            tables::Pattern::HotSpot { pages, writes } => Pattern::HotSpot { pages, writes },
        },
        pages_per_second: table.pages_per_second,
        bytes: usize::try_from(table.bytes.0).expect("at most a page"),
        region: Region { from, to },
    }
}

/// What a file guest is at the source.
///
/// # Panics
/// If the table was not checked.
#[must_use]
pub fn source_files(table: &FileTable) -> FileGuestSettings {
    files(table, |image| image.path.clone())
}

/// What a file guest is at the destination: with `run` it makes the copies, else the images themselves.
///
/// # Panics
/// If the table was not checked.
#[must_use]
pub fn destination_files(table: &FileTable, run: bool) -> FileGuestSettings {
    let copy = |image: &tables::ImageTable| image.copy.clone().expect("the rules ask for it");
    files(table, |image| if run { copy(image) } else { image.path.clone() })
}

fn files(table: &FileTable, path: impl Fn(&tables::ImageTable) -> PathBuf) -> FileGuestSettings {
    let image = |image: &tables::ImageTable| Image { id: image.id.clone(), path: path(image) };
    FileGuestSettings {
        images: table.images.iter().map(image).collect(),
        state_files: table.state_files.iter().map(image).collect(),
        page_size: page_size(table.page_size),
        pause: table.pause.clone(),
        resume: table.resume.clone(),
        command_timeout: table.command_timeout.0,
        start: table.start.clone(),
        overwrite: table.overwrite,
    }
}

/// What a virtual machine is.
#[must_use]
pub fn kvm(table: &KvmTable) -> KvmSettings {
    KvmSettings {
        memory: table.memory.0,
        vcpus: table.vcpus,
        region: table.region.0,
        pages_per_second: table.pages_per_second,
        // What does not fit is more than a page, and refused as that.
        bytes: u32::try_from(table.bytes.0).unwrap_or(u32::MAX),
        region_at: KvmSettings::default().region_at,
        free: table.free.0,
        unplugged: table.unplugged.0,
        shared: table.shared.as_ref().map(shared),
        dirty_log: match table.dirty_log {
            tables::KvmLogChoice::DirtyLog => KvmLogChoice::DirtyLog,
            tables::KvmLogChoice::DirtyRing => KvmLogChoice::DirtyRing,
            tables::KvmLogChoice::Userfault => KvmLogChoice::Userfault,
            tables::KvmLogChoice::Hash => KvmLogChoice::Hash,
        },
    }
}

fn shared(table: &tables::SharedTable) -> SharedSettings {
    SharedSettings { path: table.path.clone(), bytes: table.size.0 }
}

fn page_size(size: Size) -> PageSize {
    PageSize::new(size.0).expect("the rules have checked it")
}
