//! Errors of TLS in words for an operator: which check failed, on which side, with names and dates. Never key material.

use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::{AlertDescription, Error};

use crate::certificate::Facts;
use crate::settings::End;

/// What the errors of one connection are described with.
#[derive(Clone, Debug)]
pub(crate) struct Words {
    end: End,
    own: Option<Arc<Facts>>,
    refused: Refused,
}

/// Why this end refuses the certificate of its peer, once it does.
#[derive(Clone, Debug, Default)]
pub(crate) struct Refused(Arc<Mutex<Option<String>>>);

impl Refused {
    pub(crate) fn note(&self, why: String) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
    }

    fn noted(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Words {
    /// The words of a connection of this end, which shows this certificate.
    pub(crate) fn new(end: End, own: Option<Arc<Facts>>, refused: Refused) -> Self {
        Self { end, own, refused }
    }

    /// The error, in words.
    pub(crate) fn of(&self, error: io::Error) -> io::Error {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
            Some(tls) => io::Error::new(self.kind(tls), self.of_tls(tls)),
            None if error.kind() == ErrorKind::UnexpectedEof => io::Error::new(
                ErrorKind::UnexpectedEof,
                "it ended without TLS's notice of its end (close_notify): it was lost, or cut on its way",
            ),
            None => error,
        }
    }

    /// Refused on either side, or not TLS.
    fn kind(&self, error: &Error) -> ErrorKind {
        match error {
            Error::InvalidCertificate(_) | Error::AlertReceived(_) | Error::NoCertificatesPresented => {
                ErrorKind::PermissionDenied
            }
            _ => ErrorKind::InvalidData,
        }
    }

    fn of_tls(&self, error: &Error) -> String {
        let peer = self.end.peer().name();
        match error {
            Error::InvalidCertificate(other) => {
                self.refused.noted().unwrap_or_else(|| format!("the {peer}'s certificate is refused here: {other}"))
            }
            Error::AlertReceived(alert) => self.of_alert(*alert),
            Error::NoCertificatesPresented => format!(
                "the {peer} shows no certificate, and this destination requires one: set `certificate` and `key`, or \
                 `directory`, in its [transport.tls]; or client_certificates = \"none\" at both ends, and anybody who reaches \
                 this address may send it a guest"
            ),
            Error::InvalidMessage(_) => not_tls(self.end.peer()),
            Error::PeerIncompatible(why) => {
                format!(
                    "the {peer} and this end have no TLS in common ({why:?}): memferry speaks TLS 1.3 and no older version"
                )
            }
            Error::DecryptError => {
                format!("a TLS record from the {peer} is not authentic: it was changed on its way, or damaged")
            }
            other => format!("TLS with the {peer} failed: {other}"),
        }
    }

    fn of_alert(&self, alert: AlertDescription) -> String {
        let peer = self.end.peer().name();
        let own = match &self.own {
            Some(own) => format!("{own}, valid from {} to {}", own.begins(), own.ends()),
            None => "this end, which shows no certificate".into(),
        };
        let issuer = self.own.as_ref().map_or_else(String::new, |own| own.issuer());
        let why = match alert {
            AlertDescription::CertificateRequired => {
                return format!(
                    "the {peer} requires a certificate, and this end shows none: set `certificate` and `key`, or `directory`, \
                     in [transport.tls] here, and client_certificates = \"required\""
                );
            }
            AlertDescription::ProtocolVersion => {
                return format!("the {peer} speaks no TLS 1.3: memferry speaks no older version");
            }
            AlertDescription::CertificateExpired => "it has expired, by the clock there, or is not valid yet".into(),
            AlertDescription::CertificateRevoked => "it is revoked there".into(),
            AlertDescription::UnknownCA => format!("no authority there issued it; its issuer is \"{issuer}\""),
            AlertDescription::BadCertificate => "the name or the signature in it is not what is required there".into(),
            AlertDescription::AccessDenied => "its name is not in `allow` there".into(),
            AlertDescription::CertificateUnknown | AlertDescription::UnsupportedCertificate => {
                "it is of a kind that is not accepted there".into()
            }
            other => return format!("the {peer} ended TLS with the alert {other:?}: its own messages say why"),
        };
        format!("the {peer} refuses {own}: {why} (the messages of the {peer} say more)")
    }
}

/// The words for a peer that does not speak TLS.
pub(crate) fn not_tls(peer: End) -> String {
    let write = match peer {
        End::Source => "write tls: in its address, or tcp: in that of this destination",
        End::Destination => "write tls: in its address, or tcp: here",
    };
    format!("the {} does not speak TLS: if it is memferry, {write}", peer.name())
}
