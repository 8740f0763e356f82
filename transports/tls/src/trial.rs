//! Certificates for a trial: a small authority, and a certificate for each end.
//!
//! The authority's key is forgotten, so that nobody can make more. For anything but a trial, have certificates made by the authority
//! that the hosts already have.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use time::{Duration, OffsetDateTime};

/// How long the certificates hold.
const HOLDS: Duration = Duration::days(90);
/// How far a host's clock may be behind.
const SLACK: Duration = Duration::days(1);
/// Names that every certificate has besides: trials within a host.
const LOCAL: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// Writes `ca-cert.pem` and the certificate and key of each end into a directory, which is made if it is not there. The certificates
/// hold for 90 days, are valid for each of the hosts, and for connections within a host.
///
/// # Errors
/// When a name cannot stand in a certificate, or a file cannot be written. Nothing that is there is replaced.
pub fn write(directory: &Path, hosts: &[String]) -> io::Result<()> {
    let made = make(hosts).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error.to_string()))?;
    match DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(at(directory, &error)),
        _ => {}
    }
    if let Some(taken) = made.iter().map(|file| directory.join(file.name)).find(|file| file.exists()) {
        let what = format!("{} is there already, and stays: name an empty directory", taken.display());
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, what));
    }
    for Made { name, mode, pem } in made {
        let path = directory.join(name);
        let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&path);
        file.and_then(|mut file| file.write_all(pem.as_bytes())).map_err(|error| at(&path, &error))?;
    }
    Ok(())
}

fn at(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// A file to be written.
struct Made {
    name: &'static str,
    mode: u32,
    pem: String,
}

fn make(hosts: &[String]) -> Result<Vec<Made>, rcgen::Error> {
    let mut authority = params(&[], "memferry trial authority")?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
    let mut made = vec![Made { name: "ca-cert.pem", mode: 0o644, pem: authority.pem() }];
    let ends = [
        ("server-cert.pem", "server-key.pem", "memferry destination", ExtendedKeyUsagePurpose::ServerAuth),
        ("client-cert.pem", "client-key.pem", "memferry source", ExtendedKeyUsagePurpose::ClientAuth),
    ];
    for (certificate_file, key_file, subject, purpose) in ends {
        let mut end = params(hosts, subject)?;
        end.extended_key_usages = vec![purpose];
        end.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        end.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let certificate = end.signed_by(&key, &authority)?;
        made.push(Made { name: certificate_file, mode: 0o644, pem: certificate.pem() });
        made.push(Made { name: key_file, mode: 0o600, pem: key.serialize_pem() });
    }
    Ok(made)
}

fn params(hosts: &[String], subject: &str) -> Result<CertificateParams, rcgen::Error> {
    let local = LOCAL.iter().map(ToString::to_string).filter(|local| !hosts.contains(local));
    let names: Vec<String> = hosts.iter().cloned().chain(local).collect();
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name.remove(DnType::CommonName);
    params.distinguished_name.push(DnType::CommonName, subject);
    let now = OffsetDateTime::now_utc();
    params.not_before = now - SLACK;
    params.not_after = now + HOLDS;
    Ok(params)
}
