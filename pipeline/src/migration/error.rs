//! Why a migration ended before its time.

use std::io;

use memferry_stages::geometry::LayoutError;
use memferry_stages::wire::WireError;
use memferry_stages::wire::reader::ReadError;

use super::stage_set::Failure;
use crate::guest::GuestError;

/// What ended a migration. Its text is the operator's: it says what failed and where.
#[derive(Debug, thiserror::Error)]
pub(super) enum MigrationError {
    /// The operator said so.
    #[error("cancelled")]
    Cancelled,
    /// The limits of the configuration cannot be met.
    #[error("{0}")]
    GaveUp(String),
    /// No way to the peer, or from it.
    #[error("{0}")]
    Transport(#[from] io::Error),
    /// The guest could not do its part.
    #[error("the guest failed: {0}")]
    Guest(#[from] GuestError),
    /// The guest's blocks cannot be.
    #[error("the RAM blocks do not fit: {0}")]
    Layout(#[from] LayoutError),
    /// A dirty log could not do its part.
    #[error("the dirty log cannot {doing}: {error}")]
    Log {
        /// What it should have done.
        doing: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
    /// Guest memory could not be read for a digest.
    #[error("guest memory cannot be read for its digest: {0}")]
    Digest(io::Error),
    /// A stage failed.
    #[error("{0}")]
    Stage(#[from] Failure),
    /// The stream could not be read, or holds what cannot be.
    #[error("{0}")]
    Read(#[from] ReadError),
    /// A message that cannot be acted on.
    #[error("{0}")]
    Wire(#[from] WireError),
    /// The peer refused, and said why.
    #[error("the {peer} refused: {why}")]
    Refused {
        /// "source" or "destination".
        peer: &'static str,
        /// In its words.
        why: String,
    },
    /// The peer gave up, and said why.
    #[error("the {peer} gave up: {why}")]
    GivenUp {
        /// "source" or "destination".
        peer: &'static str,
        /// In its words.
        why: String,
    },
    /// The peer did not keep to the protocol.
    #[error("the peer does not keep to the protocol: {0}")]
    Protocol(String),
    /// The connection ended.
    #[error("the connection was lost: {0}")]
    Lost(String),
    /// Something took too long.
    #[error("{0}")]
    TimedOut(String),
    /// The two memories are not the same.
    #[error("verification failed: {0}")]
    Differs(String),
}
