//! The files of an end: where they are, and what is in them.
//!
//! QEMU (`tls-creds-x509,dir=`) and Cloud Hypervisor (`tls_dir=`) use the same names in a directory: `ca-cert.pem`, `server-cert.pem`,
//! `server-key.pem`, `client-cert.pem`, `client-key.pem`; QEMU has `ca-crl.pem` besides. Its `dh-params.pem` is for older versions of
//! TLS and not read.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use memferry_transports::{regular, whole_file};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};

use crate::settings::{ClientCertificates, End, TlsSettings};

/// The longest file that is read. A list of revoked certificates may be long.
const MOST_BYTES: u64 = 16 << 20;
/// Access of anybody but the owner.
const OTHERS: u32 = 0o077;

/// A key of `[transport.tls]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the settings have them")]
pub enum TlsKey {
    Directory,
    Ca,
    Certificate,
    Key,
    Crl,
    PeerName,
    Allow,
}

impl TlsKey {
    /// Its name in the table.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Directory => "directory",
            Self::Ca => "ca",
            Self::Certificate => "certificate",
            Self::Key => "key",
            Self::Crl => "crl",
            Self::PeerName => "peer_name",
            Self::Allow => "allow",
        }
    }
}

/// Why settings cannot be used. Its text never holds what is in a file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {what}; {help}", .key.name())]
pub struct TlsError {
    /// The setting with the fault.
    pub key: TlsKey,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub help: String,
}

impl TlsError {
    pub(crate) fn new(key: TlsKey, what: impl Into<String>, help: impl Into<String>) -> Self {
        Self { key, what: what.into(), help: help.into() }
    }
}

/// A file, and the setting that names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) key: TlsKey,
    pub(crate) path: PathBuf,
}

impl Named {
    pub(crate) fn shown(&self) -> String {
        self.path.display().to_string()
    }

    fn cannot(&self, error: &std::io::Error) -> TlsError {
        let help = match error.kind() {
            std::io::ErrorKind::NotFound => {
                "make it, or name another; `memferry certs DIR --host NAME` makes some for a trial"
            }
            _ => "name a file that can be read",
        };
        TlsError::new(self.key, format!("{} cannot be read: {error}", self.shown()), help)
    }

    fn no_pem(&self, what: &str) -> TlsError {
        TlsError::new(self.key, format!("{} holds no {what}", self.shown()), "name a PEM file that does")
    }

    /// The certificates in the file, at least one.
    pub(crate) fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let bytes = whole_file::read(&self.path, MOST_BYTES).map_err(|error| self.cannot(&error))?;
        let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
        found.ok().filter(|found| !found.is_empty()).ok_or_else(|| self.no_pem("certificate"))
    }

    /// The lists of revoked certificates in the file, at least one.
    pub(crate) fn revocations(&self) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
        let bytes = whole_file::read(&self.path, MOST_BYTES).map_err(|error| self.cannot(&error))?;
        let found: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(&bytes).collect();
        found.ok().filter(|found| !found.is_empty()).ok_or_else(|| self.no_pem("list of revoked certificates"))
    }

    /// The private key in the file, which nobody else may read.
    pub(crate) fn key(&self) -> Result<PrivateKeyDer<'static>, TlsError> {
        let file = regular::open(&self.path).map_err(|error| self.cannot(&error))?;
        let mode = file.metadata().map_err(|error| self.cannot(&error))?.mode();
        if mode & OTHERS != 0 {
            let what =
                format!("{} holds a private key, and others may access it (mode {:03o})", self.shown(), mode & 0o777);
            return Err(TlsError::new(self.key, what, format!("chmod 600 {}", self.shown())));
        }
        let mut bytes = Vec::new();
        file.take(MOST_BYTES).read_to_end(&mut bytes).map_err(|error| self.cannot(&error))?;
        let key = PrivateKeyDer::from_pem_slice(&bytes).map_err(|_| self.no_pem("private key that is not encrypted"));
        bytes.fill(0);
        key
    }
}

/// The files of one end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Files {
    pub(crate) ca: Named,
    /// This end's certificate and its key.
    pub(crate) own: Option<(Named, Named)>,
    pub(crate) crl: Option<Named>,
}

impl Files {
    /// The files that the settings name for this end.
    pub(crate) fn of(settings: &TlsSettings, end: End) -> Result<Self, TlsError> {
        let shows_one = end == End::Destination || settings.client_certificates == ClientCertificates::Required;
        match &settings.directory {
            Some(directory) => Self::in_directory(settings, directory, end, shows_one),
            None => Self::named(settings, end, shows_one),
        }
    }

    fn in_directory(settings: &TlsSettings, directory: &Path, end: End, shows_one: bool) -> Result<Self, TlsError> {
        let beside = [
            (TlsKey::Ca, &settings.ca),
            (TlsKey::Certificate, &settings.certificate),
            (TlsKey::Key, &settings.key),
            (TlsKey::Crl, &settings.crl),
        ];
        if let Some((key, _)) = beside.into_iter().find(|(_, path)| path.is_some()) {
            let what = format!("`directory` has all files, and `{}` names another", key.name());
            return Err(TlsError::new(key, what, "delete one of them"));
        }
        let named = |name: &str| Named { key: TlsKey::Directory, path: directory.join(name) };
        let own = match end {
            End::Destination => (named("server-cert.pem"), named("server-key.pem")),
            End::Source => (named("client-cert.pem"), named("client-key.pem")),
        };
        let crl = named("ca-crl.pem");
        Ok(Self {
            ca: named("ca-cert.pem"),
            own: shows_one.then_some(own),
            // Whatever is there is read, and an error is reported: a list that cannot be read is never ignored.
            crl: std::fs::symlink_metadata(&crl.path).is_ok().then_some(crl),
        })
    }

    fn named(settings: &TlsSettings, end: End, shows_one: bool) -> Result<Self, TlsError> {
        let named = |key, path: &Option<PathBuf>| path.clone().map(|path| Named { key, path });
        let missing = |key: TlsKey| {
            let what = format!("TLS needs `{}`, and nothing names it", key.name());
            TlsError::new(
                key,
                what,
                "write directory = \"DIR\", or ca, certificate and key; `memferry certs DIR --host NAME` makes some for a trial",
            )
        };
        let ca = named(TlsKey::Ca, &settings.ca).ok_or_else(|| missing(TlsKey::Ca))?;
        let certificate = named(TlsKey::Certificate, &settings.certificate);
        let key = named(TlsKey::Key, &settings.key);
        let own = match (certificate, key) {
            (Some(certificate), Some(key)) => shows_one.then_some((certificate, key)),
            (Some(_), None) => return Err(missing(TlsKey::Key)),
            (None, Some(_)) => return Err(missing(TlsKey::Certificate)),
            (None, None) if !shows_one => None,
            (None, None) => {
                let mut error = missing(TlsKey::Certificate);
                if end == End::Source {
                    error.help.push_str("; client_certificates = \"none\" if the destination requires none");
                }
                return Err(error);
            }
        };
        Ok(Self { ca, own, crl: named(TlsKey::Crl, &settings.crl) })
    }
}
