//! What a certificate says, for checks and for messages.

use std::fmt;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest::{SHA256, digest};
use memferry_transports::Identity;
use rustls::pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// How long before its end a certificate is warned of.
pub const SOON: Duration = Duration::from_secs(30 * 24 * 3600);
/// The longest text of a certificate that is shown, in characters.
const LONGEST: usize = 200;
/// The most names of a certificate that are shown.
const MOST_NAMES: usize = 8;

/// What a certificate says of itself. Texts of a peer's certificate are escaped and bounded where they are shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    subject: String,
    issuer: String,
    names: Vec<String>,
    not_before: i64,
    not_after: i64,
    is_own_issuer: bool,
}

/// How long a certificate still holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validity {
    /// It holds for longer than [`SOON`].
    Holds,
    /// It is not valid yet.
    NotYet,
    /// It ends within [`SOON`].
    EndsIn {
        /// Whole days.
        days: u64,
    },
    /// It has ended.
    Expired,
}

/// The identity of the holder of a certificate.
pub(crate) fn identity(certificate: &CertificateDer<'_>) -> Identity {
    let digest = digest(&SHA256, certificate);
    Identity::of_digest(digest.as_ref().try_into().expect("SHA-256 has 32 bytes"))
}

impl Facts {
    /// `None` if it is no certificate.
    #[must_use]
    pub fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let names = match parsed.subject_alternative_name() {
            Ok(Some(extension)) => extension.value.general_names.iter().filter_map(name_of).collect(),
            Ok(None) => Vec::new(),
            Err(_) => return None,
        };
        let validity = parsed.validity();
        Some(Self {
            subject: parsed.subject().to_string(),
            issuer: parsed.issuer().to_string(),
            names,
            not_before: validity.not_before.timestamp(),
            not_after: validity.not_after.timestamp(),
            is_own_issuer: parsed.subject().as_raw() == parsed.issuer().as_raw(),
        })
    }

    /// Its subject alternative names: host names, IP addresses and URIs.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Who issued it, for messages.
    #[must_use]
    pub fn issuer(&self) -> String {
        shown(&self.issuer)
    }

    /// Is its issuer itself?
    #[must_use]
    pub fn is_own_issuer(&self) -> bool {
        self.is_own_issuer
    }

    /// When it ends, for messages.
    #[must_use]
    pub fn ends(&self) -> String {
        date(self.not_after)
    }

    /// When it begins, for messages.
    #[must_use]
    pub fn begins(&self) -> String {
        date(self.not_before)
    }

    /// How long it still holds at a time.
    #[must_use]
    pub fn validity(&self, now: SystemTime) -> Validity {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let now = i64::try_from(now).unwrap_or(i64::MAX);
        if now < self.not_before {
            return Validity::NotYet;
        }
        match u64::try_from(self.not_after - now) {
            Err(_) => Validity::Expired,
            Ok(left) if left > SOON.as_secs() => Validity::Holds,
            Ok(left) => Validity::EndsIn { days: left / (24 * 3600) },
        }
    }

    /// The shortest name by which an operator knows the holder.
    pub(crate) fn holder(&self) -> String {
        shown(self.names.first().unwrap_or(&self.subject))
    }

    /// The names, for messages.
    pub(crate) fn names_shown(&self) -> String {
        let names = self.names.iter().take(MOST_NAMES).map(|name| shown(name)).collect::<Vec<_>>().join(", ");
        match self.names.len() {
            0 => "no name at all".into(),
            more if more > MOST_NAMES => format!("{names} and {} more", more - MOST_NAMES),
            _ => names,
        }
    }
}

/// `the certificate of "CN=dest" (dest.example)`
impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the certificate of \"{}\"", shown(&self.subject))?;
        if self.names.is_empty() { Ok(()) } else { write!(f, " ({})", self.names_shown()) }
    }
}

fn name_of(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) | GeneralName::URI(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match *bytes {
            bytes if bytes.len() == 4 => Some(IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?).to_string()),
            bytes => Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?).to_string()),
        },
        _ => None,
    }
}

/// A text of a peer, escaped and bounded.
pub(crate) fn shown(text: &str) -> String {
    let mut shown: String = text.chars().take(LONGEST).flat_map(char::escape_default).collect();
    if text.chars().nth(LONGEST).is_some() {
        shown.push('…');
    }
    shown
}

/// A time of a certificate: `2026-11-30 18:40 UTC`.
pub(crate) fn date(seconds: i64) -> String {
    match time::OffsetDateTime::from_unix_timestamp(seconds) {
        Ok(at) => {
            format!("{}-{:02}-{:02} {:02}:{:02} UTC", at.year(), u8::from(at.month()), at.day(), at.hour(), at.minute())
        }
        Err(_) => format!("second {seconds}"),
    }
}
