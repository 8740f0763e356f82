//! Proofs: how the two ends of a migration know each other again after a lost connection.
//!
//! ```text
//!  source                                                   destination
//!    │ ── Secret ─────────────────────────────────────────────▶ │   in the first attempt, behind Accept
//!    ┆                    the connection is lost                ┆
//!    │ ── Hello: session, attempt, connection, nonce ─────────▶ │
//!    │ ◀── Challenge: nonce, proof of the destination ───────── │
//!    │ ── Proof: proof of the source ─────────────────────────▶ │   each connection proves itself
//! ```
//!
//! A proof is the BLAKE3 hash, keyed with the secret, of which end proves itself, the session, the attempt, the connection and both
//! nonces. So a proof that was seen once is of no use on another connection, in another attempt, or in the other direction. The
//! secret itself travels once. Who can read that connection can return in the source's place: where that matters, the connection
//! must be encrypted.

use std::fmt;
use std::io;

use super::hello::Hello;
use super::identity::{Nonce, SessionId, random};

/// What the ends of one migration know each other by: 32 bytes from the operating system.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; 32]);

/// Shows that one end has the secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Proof(pub [u8; 32]);

/// What both ends prove that they know, of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meeting {
    /// The migration.
    pub session: SessionId,
    /// The attempt.
    pub attempt: u32,
    /// The connection.
    pub connection: u16,
    /// The source's nonce, of its Hello.
    pub source: Nonce,
    /// The destination's nonce, of its Challenge.
    pub destination: Nonce,
}

impl Meeting {
    /// That of the connection of this Hello, with the nonce of the destination's Challenge.
    #[must_use]
    pub fn of(hello: &Hello, destination: Nonce) -> Self {
        let Hello { session, attempt, connection, nonce: source, .. } = *hello;
        Self { session, attempt, connection, source, destination }
    }
}

/// The end that proves itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Prover {
    /// The source.
    Source = 0,
    /// The destination.
    Destination = 1,
}

impl Secret {
    /// A secret from the system's generator.
    ///
    /// # Errors
    /// When `/dev/urandom` cannot be read.
    pub fn random() -> io::Result<Self> {
        random().map(Self)
    }

    /// The proof of one end.
    #[must_use]
    pub fn prove(&self, prover: Prover, meeting: &Meeting) -> Proof {
        Proof(self.hash(prover, meeting).into())
    }

    /// Whether this is the proof of that end. The time that it takes does not depend on the proof.
    #[must_use]
    pub fn is_proven(&self, prover: Prover, meeting: &Meeting, proof: &Proof) -> bool {
        // The comparison of two hashes takes constant time.
        self.hash(prover, meeting) == blake3::Hash::from_bytes(proof.0)
    }

    fn hash(&self, prover: Prover, meeting: &Meeting) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(b"memferry recovery").update(&[prover as u8]);
        hasher
            .update(&meeting.session.0)
            .update(&meeting.attempt.to_le_bytes())
            .update(&meeting.connection.to_le_bytes());
        hasher.update(&meeting.source.0).update(&meeting.destination.0);
        hasher.finalize()
    }

    pub(super) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<[u8; 32]> for Secret {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for Secret {
    /// Logs do not hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meeting() -> Meeting {
        Meeting {
            session: SessionId([1; 16]),
            attempt: 2,
            connection: 3,
            source: Nonce([4; 32]),
            destination: Nonce([5; 32]),
        }
    }

    #[test]
    fn a_proof_is_good_for_its_end_its_connection_and_its_attempt_alone() {
        let secret = Secret([7; 32]);
        let proof = secret.prove(Prover::Source, &meeting());
        assert!(secret.is_proven(Prover::Source, &meeting(), &proof));
        assert!(!secret.is_proven(Prover::Destination, &meeting(), &proof));
        assert!(!Secret([8; 32]).is_proven(Prover::Source, &meeting(), &proof));
        let others = [
            Meeting { session: SessionId([2; 16]), ..meeting() },
            Meeting { attempt: 3, ..meeting() },
            Meeting { connection: 2, ..meeting() },
            Meeting { source: Nonce([5; 32]), ..meeting() },
            Meeting { destination: Nonce([4; 32]), ..meeting() },
            Meeting { source: Nonce([5; 32]), destination: Nonce([4; 32]), ..meeting() },
        ];
        for other in others {
            assert!(!secret.is_proven(Prover::Source, &other, &proof), "{other:?}");
        }
        for byte in 0..32 {
            let mut changed = proof;
            changed.0[byte] ^= 1;
            assert!(!secret.is_proven(Prover::Source, &meeting(), &changed), "byte {byte}");
        }
    }

    #[test]
    fn a_secret_is_not_shown() {
        assert_eq!(format!("{:?}", Secret([7; 32])), "Secret");
        assert_ne!(Secret::random().unwrap(), Secret::random().unwrap());
    }
}
