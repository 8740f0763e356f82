//! Conversion of a checked configuration to the plain values that migrations and guests take.
//!
//! Every function here takes a [`Config`] that [`super::load`] returned: values that the rules refuse cannot occur.

use std::path::PathBuf;

use memferry_stages::codec::Codec;
use memferry_stages::geometry::PageSize;
use memferry_transports::faults::Cuts;
use memferry_transports::tcp::TcpTransport;
use memferry_transports::{Address, Transport};
use memferry_transports_tls::{ClientCertificates, TlsSettings, TlsTransport};

use super::tables::{
    self, ClientCertificatesChoice, Compress, Config, DeltaChoice, EncoderTable, Ends, FileTable, WorkloadTable,
    WriterTable,
};
use memferry::settings::{DestinationSettings, EncoderSettings, SourceSettings, XbzrleSettings};
use memferry::values::Size;
use memferry_guests::file::{FileGuestSettings, Image};
use memferry_guests::workload::{FreeSettings, Region, WorkloadSettings, WriterSettings};

/// The default level of zstd: about as fast as the codecs near lz4, with a better ratio.
const ZSTD_LEVEL: i32 = 1;

impl Config {
    /// Settings of the source.
    #[must_use]
    pub fn source(&self) -> SourceSettings {
        let (encoder, convergence) = (encoder(&self.encoder), self.convergence.clone());
        SourceSettings { encoder, convergence, ..self.ends().source }
    }

    /// Settings of the destination. It accepts any page size.
    #[must_use]
    pub fn destination(&self) -> DestinationSettings {
        self.ends().destination
    }

    fn ends(&self) -> Ends {
        let mut ends = Ends::default();
        self.pipeline.put_into(&mut ends);
        self.migration.put_into(&mut ends);
        ends
    }

    /// The address.
    ///
    /// # Panics
    /// If the configuration was not checked.
    #[must_use]
    pub fn address(&self) -> Address {
        self.transport.address.parse().expect("the rules have checked it")
    }

    /// The faults that the configuration asks for: one count for all transports of a source.
    #[must_use]
    pub fn cuts(&self) -> Option<Cuts> {
        let table = self.transport.faults.as_ref()?;
        Some(Cuts::new(table.cut_after.iter().map(|size| size.0), table.refuse_for.0))
    }

    /// The transport to this address: the configured one, or the one that a listener is bound to.
    #[must_use]
    pub fn transport_to(&self, address: &Address) -> Box<dyn Transport> {
        let [connect, peer] = [self.transport.connect_timeout, self.migration.peer_timeout].map(|timeout| timeout.0);
        // An address that a source is given during the migration may lack what TLS needs: then it refuses. One without TLS leads to a peer
        // without the certificate that the migration began with, which the engine refuses.
        if let (Some(beneath), Some(settings)) = (address.beneath(), self.tls()) {
            return Box::new(TlsTransport::new(self.transport_to(&beneath), settings, connect));
        }
        match address {
            Address::Tcp { host, port } => Box::new(TcpTransport::new(host, *port, connect).with_peer_timeout(peer)),
            other => memferry_transports::open(other, connect),
        }
    }

    /// The settings of TLS, if the address has it. The destination's name is that of the configured address: a listener is bound to an
    /// IP address, and a source that is given another address during the migration still reaches the same destination.
    #[must_use]
    pub fn tls(&self) -> Option<TlsSettings> {
        let address: Address = self.transport.address.parse().ok()?;
        let host = match address.beneath()? {
            Address::Tcp { host, .. } => Some(host.split('%').next().unwrap_or_default().to_owned()),
            _ => None,
        };
        let table = self.transport.tls.clone()?;
        Some(TlsSettings {
            directory: table.directory,
            ca: table.ca,
            certificate: table.certificate,
            key: table.key,
            crl: table.crl,
            peer_name: table.peer_name.or(host),
            allow: table.allow,
            client_certificates: match table.client_certificates {
                ClientCertificatesChoice::Required => ClientCertificates::Required,
                ClientCertificatesChoice::None => ClientCertificates::None,
            },
        })
    }
}

fn encoder(table: &EncoderTable) -> EncoderSettings {
    let xbzrle = XbzrleSettings {
        cache_bytes: table.xbzrle_cache.map_or(XbzrleSettings::default().cache_bytes, |size| size.0),
        on_miss: table.on_miss,
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

/// The settings of a workload.
///
/// # Panics
/// If the table was not checked.
#[must_use]
pub fn workload(table: &WorkloadTable) -> WorkloadSettings {
    WorkloadSettings {
        memory: table.memory.0,
        blocks: table.blocks,
        page_size: page_size(table.page_size),
        backing: table.backing,
        dirty_log: table.dirty_log,
        fill: table.fill,
        writers: table.writers.iter().map(writer).collect(),
        free: table.free.as_ref().map(|free| FreeSettings {
            share: free.share,
            turns_per_second: free.turns_per_second,
            // A value that does not fit is above the maximum, and is refused as such.
            range_pages: u32::try_from(free.range.0 / table.page_size.0).unwrap_or(u32::MAX),
        }),
        unplugged: table.unplugged,
        shared: table.shared.clone(),
        seed: table.seed,
    }
}

fn writer(table: &WriterTable) -> WriterSettings {
    let [from, to] = table.region;
    WriterSettings {
        pattern: table.pattern,
        pages_per_second: table.pages_per_second,
        bytes: usize::try_from(table.bytes.0).expect("at most a page"),
        region: Region { from, to },
    }
}

/// The settings of a file guest at the source.
///
/// # Panics
/// If the table was not checked.
#[must_use]
pub fn source_files(table: &FileTable) -> FileGuestSettings {
    files(table, |image| image.path.clone())
}

/// The settings of a file guest at the destination: with `run` the copies, else the images themselves.
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

fn page_size(size: Size) -> PageSize {
    PageSize::new(size.0).expect("the rules have checked it")
}
