//! Who the peer of a connection is, where its transport proves it.

use std::fmt;

/// The identity of an authenticated peer: the SHA-256 digest of its certificate.
///
/// Two connections with the same identity lead to the holder of the same private key.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity([u8; 32]);

impl Identity {
    /// The peer whose certificate has this digest.
    #[must_use]
    pub fn of_digest(digest: [u8; 32]) -> Self {
        Self(digest)
    }
}

/// The fingerprint, as `openssl x509 -fingerprint -sha256` and `certtool --fingerprint` write its digits.
impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({self})")
    }
}
