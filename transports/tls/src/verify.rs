//! Which certificates of peers are accepted: those that an authority vouches for, under the right name, not revoked, and allowed.
//!
//! The checks of a chain are those of rustls (webpki). This adds `allow`, and words: rustls's errors do not hold what an operator needs
//! to find the certificate.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

use crate::certificate::{Facts, Validity, date, shown};
use crate::settings::{End, matches};
use crate::words::Refused;

/// What a check of a peer needs besides the chain.
#[derive(Debug)]
pub(crate) struct Policy {
    /// Which end the peer is.
    pub(crate) peer: End,
    pub(crate) allow: Vec<String>,
    /// The file of the authorities, for messages.
    pub(crate) ca: String,
    /// The file of revoked certificates, for messages.
    pub(crate) crl: String,
}

/// A verifier of one connection, which notes why it refuses.
#[derive(Debug)]
pub(crate) struct Checked<V: ?Sized> {
    pub(crate) policy: Arc<Policy>,
    pub(crate) refused: Refused,
    pub(crate) verifier: Arc<V>,
}

impl<V: ?Sized> Checked<V> {
    fn check<T>(
        &self,
        verified: Result<T, Error>,
        certificate: &CertificateDer<'_>,
        now: UnixTime,
    ) -> Result<T, Error> {
        let facts = Facts::of(certificate);
        match verified {
            Ok(verified) => self.check_allowed(facts.as_ref()).map(|()| verified),
            Err(error) => {
                self.refused.note(self.policy.refusal(facts.as_ref(), &error, now));
                Err(error)
            }
        }
    }

    fn check_allowed(&self, facts: Option<&Facts>) -> Result<(), Error> {
        let Policy { peer, allow, .. } = &*self.policy;
        let names = facts.map_or(&[][..], Facts::names);
        let is_allowed = |name: &String| allow.iter().any(|pattern| matches(pattern, name));
        if allow.is_empty() || names.iter().any(is_allowed) {
            return Ok(());
        }
        let whose = self.policy.whose(facts);
        let allowed = allow.join(", ");
        self.refused.note(match facts {
            Some(facts) if !facts.names().is_empty() => {
                format!("{whose} is refused here: its names are {}, and `allow` here has {allowed}", facts.names_shown())
            }
            _ => format!(
                "{whose} is refused here: it has no subject alternative name, and `allow` here has {allowed}: make one for the {} \
                 with a name (memferry certs DIR --host NAME; certtool: dns_name = \"NAME\"; openssl: subjectAltName = DNS:NAME)",
                peer.name()
            ),
        });
        Err(CertificateError::ApplicationVerificationFailure.into())
    }
}

impl Policy {
    /// `the certificate of "CN=dest" (dest.example), which the destination shows,`
    fn whose(&self, facts: Option<&Facts>) -> String {
        let peer = self.peer.name();
        facts.map_or_else(
            || format!("the certificate that the {peer} shows"),
            |facts| format!("{facts}, which the {peer} shows,"),
        )
    }

    fn refusal(&self, facts: Option<&Facts>, error: &Error, now: UnixTime) -> String {
        let whose = self.whose(facts);
        let Error::InvalidCertificate(error) = error else { return format!("{whose} is refused here: {error}") };
        format!("{whose} is refused here: {}", self.why(facts, error, now))
    }

    fn why(&self, facts: Option<&Facts>, error: &CertificateError, now: UnixTime) -> String {
        let validity = facts.map(|facts| facts.validity(SystemTime::UNIX_EPOCH + Duration::from_secs(now.as_secs())));
        let issuer = facts.map_or_else(String::new, Facts::issuer);
        let today = seconds(now);
        match error {
            CertificateError::ExpiredContext { not_after, .. } => {
                let which = if validity == Some(Validity::Expired) { "it" } else { "one of its authorities" };
                let (ended, today) = (date(seconds(*not_after)), date(today));
                format!("{which} expired on {ended}, and here it is {today}: renew it, or set the clock")
            }
            CertificateError::NotValidYetContext { not_before, .. } => {
                let (begins, today) = (date(seconds(*not_before)), date(today));
                format!("it is valid from {begins}, and here it is {today}: set the clock")
            }
            CertificateError::UnknownIssuer | CertificateError::Other(_) if facts.is_some_and(Facts::is_own_issuer) => {
                format!("it is signed by itself, not by an authority in {}", self.ca)
            }
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                format!("no authority in {} issued it; its issuer is \"{issuer}\"", self.ca)
            }
            CertificateError::NotValidForNameContext { expected, .. } => wrong_name(facts, &expected.to_str()),
            CertificateError::Revoked => format!("it is revoked, by {}", self.crl),
            CertificateError::UnknownRevocationStatus => format!(
                "{} has no list of its issuer \"{issuer}\", so it is not known whether it is revoked: add that list, or remove the file",
                self.crl
            ),
            CertificateError::ExpiredRevocationListContext { next_update, .. } => {
                format!("{} should have been renewed by {}: renew it", self.crl, date(seconds(*next_update)))
            }
            CertificateError::InvalidPurposeContext { .. } | CertificateError::InvalidPurpose => {
                let purpose = match self.peer {
                    End::Source => "TLS clients (certtool: tls_www_client)",
                    End::Destination => "TLS servers (certtool: tls_www_server)",
                };
                format!("its extended key usage is not that of {purpose}")
            }
            other => other.to_string(),
        }
    }
}

fn wrong_name(facts: Option<&Facts>, expected: &str) -> String {
    let expected = shown(expected);
    match facts {
        Some(facts) if !facts.names().is_empty() => format!(
            "its names are {}, and the one that is wanted is {expected}: if it is the right destination, set peer_name to one of them \
             in [transport.tls]",
            facts.names_shown()
        ),
        _ => format!(
            "it has no subject alternative name, and the one that is wanted is {expected} (the common name does not count): make one \
             with that name (memferry certs DIR --host {expected}; certtool: dns_name = \"{expected}\")"
        ),
    }
}

fn seconds(time: UnixTime) -> i64 {
    i64::try_from(time.as_secs()).unwrap_or(i64::MAX)
}

impl ServerCertVerifier for Checked<WebPkiServerVerifier> {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self.verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        self.check(verified, end_entity, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

impl ClientCertVerifier for Checked<dyn ClientCertVerifier> {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.verifier.root_hint_subjects()
    }

    fn offer_client_auth(&self) -> bool {
        self.verifier.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.verifier.client_auth_mandatory()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.verifier.verify_client_cert(end_entity, intermediates, now);
        self.check(verified, end_entity, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}
