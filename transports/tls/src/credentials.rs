//! What an end shows, and what it accepts, loaded from its files and checked.

use std::sync::Arc;

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::ServerName;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::certificate::Facts;
use crate::files::{Files, Named, TlsError, TlsKey};
use crate::settings::{ClientCertificates, End, TlsSettings};
use crate::verify::{Checked, Policy};
use crate::words::{Refused, Words};

/// What one end shows, and what it accepts.
#[derive(Debug)]
pub struct Credentials {
    end: End,
    own: Option<Arc<CertifiedKey>>,
    facts: Option<Arc<Facts>>,
    /// The certificate's file and that of the authorities, for messages.
    files: Files,
    authorities: Vec<Facts>,
    policy: Arc<Policy>,
    verifier: Verifier,
    provider: Arc<CryptoProvider>,
}

#[derive(Debug)]
enum Verifier {
    OfServers(Arc<WebPkiServerVerifier>),
    OfClients(Arc<dyn ClientCertVerifier>),
}

/// A certificate of this end's files, for warnings.
#[derive(Debug)]
pub struct OwnCertificate<'a> {
    /// The setting that names its file.
    pub key: TlsKey,
    /// Its file.
    pub file: String,
    /// What it says.
    pub facts: &'a Facts,
}

impl Credentials {
    /// Loads the files of the settings for this end. Blocks for as long as reading them takes.
    ///
    /// # Errors
    /// When a setting or a file cannot be used: a file that is missing, a key that others can read or that is another certificate's.
    pub fn load(settings: &TlsSettings, end: End) -> Result<Self, TlsError> {
        check(settings)?;
        let files = Files::of(settings, end)?;
        let provider = Arc::new(aws_lc_rs::default_provider());
        let own = files.own.as_ref().map(|(certificate, key)| certified(certificate, key, &provider)).transpose()?;
        let facts = match (&own, &files.own) {
            (Some(own), Some((certificate, _))) => Some(Arc::new(facts_of(&own.cert[0], certificate)?)),
            _ => None,
        };
        let policy = Arc::new(Policy {
            peer: end.peer(),
            allow: settings.allow.clone(),
            ca: files.ca.shown(),
            crl: files.crl.as_ref().map_or_else(String::new, Named::shown),
        });
        let authorities = files.ca.certificates()?;
        let verifier = Verifier::load(settings, end, &files, &authorities, &provider)?;
        let authorities = authorities.iter().filter_map(Facts::of).collect();
        Ok(Self { end, own, facts, files, authorities, policy, verifier, provider })
    }

    /// The certificates in this end's files whose end matters: its own, and those of the authorities.
    pub fn certificates(&self) -> impl Iterator<Item = OwnCertificate<'_>> {
        let own = self.files.own.iter().zip(&self.facts);
        let own = own.map(|((named, _), facts)| OwnCertificate { key: named.key, file: named.shown(), facts });
        let ca = &self.files.ca;
        let of_authority = |facts| OwnCertificate { key: ca.key, file: ca.shown(), facts };
        own.chain(self.authorities.iter().map(of_authority))
    }

    /// The words and the configuration of one connection to a destination. Nothing is resumed: each connection is authenticated anew.
    pub(crate) fn client(&self) -> (Words, ClientConfig) {
        let (refused, words) = self.words();
        let Verifier::OfServers(verifier) = &self.verifier else { unreachable!("a source verifies destinations") };
        let checked = Checked { policy: self.policy.clone(), refused, verifier: verifier.clone() };
        let builder = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])
            .expect("the provider has TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(checked));
        let mut config = match &self.own {
            Some(own) => builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(own.clone()))),
            None => builder.with_no_client_auth(),
        };
        config.resumption = Resumption::disabled();
        (words, config)
    }

    /// The words and the configuration of one connection from a source.
    pub(crate) fn server(&self) -> (Words, ServerConfig) {
        let (refused, words) = self.words();
        let Verifier::OfClients(verifier) = &self.verifier else { unreachable!("a destination verifies sources") };
        let checked = Checked { policy: self.policy.clone(), refused, verifier: verifier.clone() };
        let own = self.own.clone().expect("a destination has a certificate");
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])
            .expect("the provider has TLS 1.3")
            .with_client_cert_verifier(Arc::new(checked))
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(own)));
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        (words, config)
    }

    fn words(&self) -> (Refused, Words) {
        let refused = Refused::default();
        (refused.clone(), Words::new(self.end, self.facts.clone(), refused))
    }
}

/// The rules for settings that need no file.
fn check(settings: &TlsSettings) -> Result<(), TlsError> {
    if let Some(name) = &settings.peer_name
        && ServerName::try_from(name.as_str()).is_err()
    {
        let what = format!("{name:?} is no name of a host and no IP address");
        return Err(TlsError::new(TlsKey::PeerName, what, "write a name that stands in the destination's certificate"));
    }
    match settings.allow.iter().find(|pattern| pattern.is_empty()) {
        Some(_) => Err(TlsError::new(TlsKey::Allow, "a pattern is empty", "write names such as \"dest-*.example\"")),
        None => Ok(()),
    }
}

fn facts_of(certificate: &rustls::pki_types::CertificateDer<'_>, file: &Named) -> Result<Facts, TlsError> {
    Facts::of(certificate)
        .ok_or_else(|| TlsError::new(file.key, format!("{} holds no X.509 certificate", file.shown()), "make it anew"))
}

/// This end's certificate with its key, which belong together.
fn certified(certificate: &Named, key: &Named, provider: &CryptoProvider) -> Result<Arc<CertifiedKey>, TlsError> {
    let chain = certificate.certificates()?;
    match CertifiedKey::from_der(chain, key.key()?, provider) {
        Ok(certified) => Ok(Arc::new(certified)),
        Err(rustls::Error::InconsistentKeys(_)) => Err(TlsError::new(
            key.key,
            format!("{} is not the key of {}", key.shown(), certificate.shown()),
            "name the key that the certificate was made with",
        )),
        Err(error) => Err(TlsError::new(
            key.key,
            format!("{} cannot be used: {error}", key.shown()),
            "make a key of RSA with 2048 bits or more, ECDSA P-256, P-384, P-521 or Ed25519",
        )),
    }
}

impl Verifier {
    fn load(
        settings: &TlsSettings,
        end: End,
        files: &Files,
        authorities: &[rustls::pki_types::CertificateDer<'static>],
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in authorities {
            roots.add(certificate.clone()).map_err(|error| {
                let what = format!("{} holds a certificate that is no authority's: {error}", files.ca.shown());
                TlsError::new(files.ca.key, what, "name the certificates of authorities")
            })?;
        }
        let roots = Arc::new(roots);
        let crls = files.crl.as_ref().map(Named::revocations).transpose()?.unwrap_or_default();
        let unusable = |error: VerifierBuilderError| match (&error, &files.crl) {
            (VerifierBuilderError::InvalidCrl(why), Some(crl)) => {
                let what = format!("{} holds a list that cannot be honoured ({why:?})", crl.shown());
                TlsError::new(crl.key, what, "make it anew, as a version 2 list of the whole authority")
            }
            _ => TlsError::new(
                files.ca.key,
                format!("{}: {error}", files.ca.shown()),
                "name the certificates of authorities",
            ),
        };
        if end == End::Source {
            let builder = WebPkiServerVerifier::builder_with_provider(roots, provider.clone()).with_crls(crls);
            let verifier = builder.enforce_revocation_expiration().build().map_err(unusable)?;
            return Ok(Self::OfServers(verifier));
        }
        if settings.client_certificates == ClientCertificates::None {
            return Ok(Self::OfClients(WebPkiClientVerifier::no_client_auth()));
        }
        let builder = WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).with_crls(crls);
        Ok(Self::OfClients(builder.enforce_revocation_expiration().build().map_err(unusable)?))
    }
}
