//! Authorities and certificates of tests, and two ends with them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use memferry_transports::memory::MemoryTransport;
use memferry_transports::{Connection, Listener, Transport};
use memferry_transports_tls::{TlsSettings, TlsTransport};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
};
use time::OffsetDateTime;

/// No test here takes this long unless it hangs.
pub(crate) const HANG: Duration = Duration::from_secs(60);
/// The name of the destination.
pub(crate) const DESTINATION: &str = "dest-1.example";
/// The name of the source.
pub(crate) const SOURCE: &str = "src-1.example";

/// An authority that makes certificates in a directory of its own.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: tempfile::TempDir,
}

/// A certificate to be made.
#[derive(Clone)]
pub(crate) struct Made {
    pub(crate) name: Option<&'static str>,
    pub(crate) purpose: ExtendedKeyUsagePurpose,
    pub(crate) from: i64,
    pub(crate) days: i64,
    pub(crate) serial: u64,
}

impl Made {
    pub(crate) fn of_destination() -> Self {
        let purpose = ExtendedKeyUsagePurpose::ServerAuth;
        Self { name: Some(DESTINATION), purpose, from: -2, days: 100, serial: 7 }
    }

    pub(crate) fn of_source() -> Self {
        Self { name: Some(SOURCE), purpose: ExtendedKeyUsagePurpose::ClientAuth, serial: 8, ..Self::of_destination() }
    }

    fn params(&self) -> CertificateParams {
        let names: Vec<_> = self.name.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.remove(DnType::CommonName);
        params.distinguished_name.push(DnType::CommonName, self.name.unwrap_or("nameless"));
        params.extended_key_usages = vec![self.purpose.clone()];
        params.not_before = OffsetDateTime::now_utc() + time::Duration::days(self.from);
        params.not_after = params.not_before + time::Duration::days(self.days);
        params.serial_number = Some(SerialNumber::from(self.serial));
        params.use_authority_key_identifier_extension = true;
        params
    }
}

/// Writes a file that only its owner can read.
pub(crate) fn write(path: &Path, text: &str) -> PathBuf {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    path.to_owned()
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        Self { issuer, directory: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }

    /// The settings of an end with such a certificate.
    pub(crate) fn settings(&self, made: &Made) -> TlsSettings {
        let key = KeyPair::generate().unwrap();
        let certificate = made.params().signed_by(&key, &self.issuer).unwrap();
        self.settings_with(&certificate.pem(), &key)
    }

    /// The settings of an end whose certificate is signed by itself.
    pub(crate) fn self_signed(&self, made: &Made) -> TlsSettings {
        let key = KeyPair::generate().unwrap();
        let certificate = made.params().self_signed(&key).unwrap();
        self.settings_with(&certificate.pem(), &key)
    }

    fn settings_with(&self, certificate: &str, key: &KeyPair) -> TlsSettings {
        let number = fs::read_dir(self.directory.path()).unwrap().count();
        let file = |kind: &str, text: &str| Some(write(&self.path(&format!("{number}-{kind}.pem")), text));
        TlsSettings {
            ca: file("ca", &self.issuer.pem()),
            certificate: file("cert", certificate),
            key: file("key", &key.serialize_pem()),
            peer_name: Some(DESTINATION.into()),
            ..TlsSettings::default()
        }
    }

    /// A list that revokes these serial numbers, and should be renewed in so many days.
    pub(crate) fn revokes(&self, serials: &[u64], days: i64) -> PathBuf {
        let now = OffsetDateTime::now_utc();
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: now - time::Duration::days(9),
            next_update: now + time::Duration::days(days),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let number = fs::read_dir(self.directory.path()).unwrap().count();
        write(&self.path(&format!("{number}-crl.pem")), &params.signed_by(&self.issuer).unwrap().pem().unwrap())
    }
}

/// A transport of each end over the same memory.
pub(crate) struct Ends {
    pub(crate) memory: MemoryTransport,
    pub(crate) source: TlsTransport,
    pub(crate) destination: TlsTransport,
}

impl Ends {
    pub(crate) fn new(source: TlsSettings, destination: TlsSettings) -> Self {
        let memory = MemoryTransport::new(64 << 10);
        let over = |settings| TlsTransport::new(Box::new(memory.clone()), settings, Duration::ZERO);
        Self { source: over(source), destination: over(destination), memory }
    }

    /// Both ends of a connection, or the error of each.
    pub(crate) async fn meet(&self) -> (Result<Connection, String>, Result<Connection, String>) {
        let mut listener = self.destination.listen().await.unwrap();
        self.meet_at(&mut *listener).await
    }

    pub(crate) async fn meet_at(
        &self,
        listener: &mut dyn Listener,
    ) -> (Result<Connection, String>, Result<Connection, String>) {
        let meeting = async { tokio::join!(self.source.connect(), listener.accept_ready()) };
        let (source, destination) = tokio::time::timeout(HANG, meeting).await.expect("it hangs");
        (source.map_err(|error| error.to_string()), destination.map_err(|error| error.to_string()))
    }

    /// Both ends of a connection.
    pub(crate) async fn connected(&self) -> (Connection, Connection) {
        let (source, destination) = self.meet().await;
        (source.unwrap(), destination.unwrap())
    }
}
