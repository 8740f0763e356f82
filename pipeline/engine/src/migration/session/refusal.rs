//! Why a connection is refused.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use memferry_stages::untrusted::Untrusted;
use memferry_stages::wire::reader::ReadError;
use memferry_stages::wire::{ConnectionRole, FrameError, PROTOCOL_VERSION, WireError};

use crate::events::TurnedAwayKind;
use crate::values::Time;

/// The reason, for the client and for observers.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("it sent nothing for {0:.1?}")]
    Silent(Duration),
    #[error("it ended at byte 0, without a word")]
    Ended,
    #[error("its first frame is not Hello")]
    NoHello,
    #[error("{0}")]
    Unreadable(Arc<ReadError>),
    #[error("it speaks protocol version {0}, this is version {PROTOCOL_VERSION}")]
    Version(u16),
    #[error("{0}")]
    Features(WireError),
    #[error("it is the {0} connection of its migration, whose features have no use for one")]
    Role(ConnectionRole),
    #[error("{others} of its connections are not bulk: there is one more for postcopy, and none without it")]
    OtherConnections { others: u16 },
    #[error("its lanes carry marks of checkpoints, which this destination does not accept")]
    Marks,
    #[error(
        "its mode is postcopy without checksums or without recovery: a damaged page or a lost connection would lose the guest"
    )]
    UnsafePostcopy,
    #[error("its mode is postcopy, and this destination does not wait for a lost connection (recovery.attempts = 0)")]
    PostcopyWithoutRecovery,
    #[error("it has {lanes} lanes, at most {most} are accepted here")]
    Lanes { lanes: u16, most: u16 },
    #[error("its pages have {theirs} bytes, ours {ours}")]
    PageSize { theirs: usize, ours: usize },
    #[error("it sends no digests, and this destination requires them (require_verify)")]
    NoDigests,
    #[error("it contradicts another connection of the same migration")]
    Contradicts,
    #[error("its handshake failed: {0}")]
    Handshake(Arc<io::Error>),
    #[error("it has another certificate than {0} of its migration")]
    OtherPeer(Earlier),
    #[error("connection {0} of its migration is there already")]
    Occupied(usize),
    #[error("{came} of the {of} connections of its migration came, and {why}")]
    Incomplete { came: usize, of: usize, why: Incomplete },
    #[error("a guest is received from {0} here: try again when it has arrived, or another address")]
    Busy(Untrusted),
    #[error("it returns to a migration that is not received here")]
    NotLost,
    #[error("it is attempt {attempt} of its migration, and attempt {latest} has begun")]
    OldAttempt { attempt: u32, latest: u32 },
    #[error("it does not prove that it is the source whose connection was lost")]
    NotProven,
    #[error("{0}: raise its limit of open files (ulimit -n), or end what holds them")]
    Shortage(Shortage),
}

/// What a connection of the same migration had shown who its peer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Earlier {
    #[error("an earlier connection")]
    Connection,
    #[error("the source whose connection was lost")]
    LostSource,
}

/// Why no more connections of a migration are waited for.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum Incomplete {
    #[error("one of them has ended")]
    OneEnded,
    #[error("others came after it")]
    Overtaken,
    #[error("no more came in time (hello_timeout = {})", Time(*.0))]
    Late(Duration),
    #[error("{0}")]
    Shortage(Shortage),
}

/// No connection can be accepted.
#[derive(Clone, Debug, thiserror::Error)]
#[error("this destination cannot accept a connection ({0})")]
pub(super) struct Shortage(pub(super) Arc<io::Error>);

impl Refusal {
    /// The category that matters to an observer.
    pub(super) fn kind(&self) -> TurnedAwayKind {
        match self {
            Self::Silent(_) | Self::Ended => TurnedAwayKind::Silent,
            Self::Unreadable(error) if is_version(error) => TurnedAwayKind::Version,
            Self::NoHello | Self::Unreadable(_) => TurnedAwayKind::Protocol,
            Self::Version(_) => TurnedAwayKind::Version,
            Self::Features(_)
            | Self::Role(_)
            | Self::OtherConnections { .. }
            | Self::Marks
            | Self::UnsafePostcopy
            | Self::PostcopyWithoutRecovery
            | Self::Lanes { .. }
            | Self::PageSize { .. }
            | Self::NoDigests => TurnedAwayKind::Unfit,
            Self::Busy(_) => TurnedAwayKind::Busy,
            Self::Handshake(_) => TurnedAwayKind::Handshake,
            Self::NotLost | Self::OldAttempt { .. } | Self::NotProven => TurnedAwayKind::NotProven,
            Self::OtherPeer(_) => TurnedAwayKind::NotProven,
            Self::Contradicts | Self::Occupied(_) => TurnedAwayKind::Contradicts,
            Self::Incomplete { why: Incomplete::Shortage(_), .. } | Self::Shortage(_) => TurnedAwayKind::Shortage,
            Self::Incomplete { .. } => TurnedAwayKind::Incomplete,
        }
    }
}

fn is_version(error: &ReadError) -> bool {
    matches!(error, ReadError::Frame(FrameError { error: WireError::Version { .. }, .. }))
}
