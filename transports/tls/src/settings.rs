//! Where the certificates of an end are, and which peers it accepts. Plain values.

use std::path::PathBuf;

/// The settings of TLS, the same at both ends. By default nothing is set, and nothing is accepted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsSettings {
    /// A directory with files of the usual names: `ca-cert.pem`, `server-cert.pem` and `server-key.pem` at the destination,
    /// `client-cert.pem` and `client-key.pem` at the source, and `ca-crl.pem` if certificates are revoked.
    pub directory: Option<PathBuf>,
    /// The certificates of the authorities whose word about the peer counts.
    pub ca: Option<PathBuf>,
    /// This end's certificate, with the intermediate ones behind it.
    pub certificate: Option<PathBuf>,
    /// Its private key.
    pub key: Option<PathBuf>,
    /// Revoked certificates.
    pub crl: Option<PathBuf>,
    /// The name that the destination's certificate must have, if it is not the host of the address.
    pub peer_name: Option<String>,
    /// The peers that are accepted, by a name of their certificate; `*` stands for any characters but `.` and `/`. Empty: whomever an
    /// authority vouches for.
    pub allow: Vec<String>,
    /// Must the source have a certificate?
    pub client_certificates: ClientCertificates,
}

/// Whether the source must prove who it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClientCertificates {
    /// It must: both ends authenticate each other.
    #[default]
    Required,
    /// Only the destination is authenticated. Anybody who reaches it may send it a guest.
    None,
}

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It connects: TLS's client.
    Source,
    /// It listens: TLS's server.
    Destination,
}

impl End {
    /// The other end.
    #[must_use]
    pub fn peer(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }

    /// Its name, for messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// Does a name match a pattern of `allow`? `*` stands for any characters but `.` and `/`, and letters match in either case.
#[must_use]
pub fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.to_ascii_lowercase(), name.to_ascii_lowercase());
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| name.strip_prefix(first)) else { return false };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        let within = rest.find(['.', '/']).unwrap_or(rest.len());
        // The last part must end the name; any other is taken where it first comes, which leaves the most for the rest.
        let at = if parts.peek().is_none() {
            rest.len().checked_sub(part.len()).filter(|_| rest.ends_with(part))
        } else {
            rest.find(part)
        };
        match at {
            Some(at) if at <= within => rest = &rest[at + part.len()..],
            _ => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stays_within_its_label() {
        for (pattern, name, matching) in [
            ("dest-*.example", "dest-7.example", true),
            ("dest-*.example", "DEST-7.Example", true),
            ("dest-*.example", "dest-.example", true),
            ("dest-*.example", "dest-7.evil.example", false),
            ("dest-*.example", "dest-7.example.evil", false),
            ("dest-*.example", "other.example", false),
            ("*", "dest", true),
            ("*", "dest.example", false),
            ("*.*", "dest.example", true),
            ("*-*.example", "a-b-c.example", true),
            ("*a*b", "xaab", true),
            ("*a*b", "xaac", false),
            ("10.0.0.*", "10.0.0.7", true),
            ("10.0.0.*", "10.0.0.7.8", false),
            ("dest.example", "dest.example", true),
            ("dest.example", "dest.example.org", false),
            ("", "dest", false),
            ("spiffe://host/*", "spiffe://host/a", true),
            ("spiffe://host/*", "spiffe://host/a/b", false),
        ] {
            assert_eq!(matches(pattern, name), matching, "{pattern} and {name}");
        }
    }
}
