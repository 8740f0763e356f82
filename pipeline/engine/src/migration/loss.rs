//! How a connection was lost.

use std::fmt;
use std::time::Duration;

use memferry_stages::untrusted::Untrusted;

use crate::events::Role;
use crate::values::Time;

/// How a connection was lost.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Loss {
    /// The peer closed it.
    #[error("the {0} closed it")]
    Closed(Role),
    /// The peer was silent for too long.
    #[error("{0}")]
    Silent(Silence),
    /// The destination took no pages for this long (`handover_timeout`).
    #[error("the destination has taken nothing for {} (handover_timeout)", Time(*.0))]
    NothingTaken(Duration),
    /// It could not be read, with the error's text.
    #[error("{0}")]
    Unreadable(String),
    /// The peer sent pages on the return path.
    #[error("pages came on the return path")]
    PagesReturned,
    /// The task that reads the return path ended.
    #[error("its reader ended")]
    ReaderEnded,
    /// The return path is closed.
    #[error("the return path is closed")]
    ReturnPathClosed,
    /// The stream ended before its end mark.
    #[error("the stream ends before its end mark, so it is not complete")]
    Incomplete,
    /// A sender ended before its stream did.
    #[error("a sender ended before its stream did")]
    SenderEnded,
    /// A stage ended and its failure is not known.
    #[error("a stage ended without saying why")]
    StageEnded,
    /// It was lost before the stages ran.
    #[error("while the migration was being agreed: {0}")]
    NotAgreed(#[source] Box<Self>),
}

/// A peer that sent nothing for the longest time allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Silence {
    /// Which end the peer is.
    pub(super) role: Role,
    /// Its name.
    pub(super) peer: Untrusted,
    /// The limit: how long it was silent.
    pub(super) limit: Duration,
}

impl fmt::Display for Silence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { role, peer, limit } = self;
        let limit = Time(*limit);
        write!(
            f,
            "the {role} ({peer}) was silent for {limit} (peer_timeout): look whether its program runs and is not stopped, and whether \
             the network between the hosts carries anything"
        )
    }
}
