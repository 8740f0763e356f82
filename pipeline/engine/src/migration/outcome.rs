//! The results of [`send`](super::send) and [`receive`](super::receive), which state where the guest is.

use std::sync::Arc;

use super::error::MigrationError;
use crate::events::Ended;
use crate::settings::SettingsError;

/// What an operator does about an unconfirmed handover.
pub(super) const LOOK: &str =
    "the guest stays paused here: look at the destination; resume it here only if it does not run there";

/// What an operator does about a guest that was lost in postcopy.
pub(super) const LOST_HERE: &str = "the guest was started at the destination without all of its memory, and the rest stays here: end what is \
                                    left of it there; what is paused here is the guest as it was at the switchover, which may be resumed \
                                    only if nothing that it did since matters";

/// The guest runs at the destination, or the stream in a file is complete.
#[must_use]
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Sent {
    /// The figures of the migration.
    pub ended: Ended,
    /// Does the guest run here? It does after a snapshot, unless the settings keep it paused.
    pub(super) resumed: bool,
}

impl Sent {
    /// Where the guest is: [`RunsHere::AsBefore`] after a snapshot, else [`RunsHere::Elsewhere`].
    pub fn guest_runs_here(&self) -> RunsHere {
        if self.resumed { RunsHere::AsBefore } else { RunsHere::Elsewhere }
    }
}

/// Where a guest is after a send.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunsHere {
    /// As before the migration: it runs here if it did, and is paused here if its operator had paused it.
    AsBefore,
    /// Not here any more: it is at the destination, or in the stream of a file. It stays paused here.
    Elsewhere,
    /// It is paused here and runs nowhere: the migration paused it, and [`SourceGuest::resume`] or
    /// [`SourceGuest::reacquire`] failed.
    ///
    /// [`SourceGuest::resume`]: crate::guest::SourceGuest::resume
    /// [`SourceGuest::reacquire`]: crate::guest::SourceGuest::reacquire
    ResumeFailed,
    /// It is paused here, and may run at the destination.
    Unknown,
    /// It was started at the destination and does not get all of its memory. Here it is paused as it was at the switchover.
    Lost,
}

/// Why a guest was not sent, and where it is.
///
/// This enum is exhaustive on purpose: each variant requires a different action of the caller. A new variant would be a
/// breaking change, so that every caller has to handle it. Fields may be added.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The settings are invalid. Nothing was begun, and no observer was notified.
    #[error("{source}")]
    #[non_exhaustive]
    Settings {
        /// The rule that they violate.
        #[from]
        source: SettingsError,
    },
    /// The migration failed; the guest is here, as before.
    #[error("the migration failed, the guest is here as before: {source}")]
    #[non_exhaustive]
    Failed {
        /// What failed.
        source: MigrationError,
        /// The figures up to then.
        ended: Box<Ended>,
    },
    /// It was cancelled, or its limits could not be met and the settings cancel it then; the guest is here, as before.
    #[error("the migration was cancelled, the guest is here as before: {source}")]
    #[non_exhaustive]
    Cancelled {
        /// [`MigrationError::Cancelled`] or [`MigrationError::GaveUp`].
        source: MigrationError,
        /// The figures up to then.
        ended: Box<Ended>,
    },
    /// The guest could not be resumed here: it is paused, and runs nowhere.
    #[error("the guest could not be resumed here and stays paused: {source}")]
    #[non_exhaustive]
    ResumeFailed {
        /// Why it could not be resumed.
        source: Box<MigrationError>,
        /// Why the migration ended; `None` if the stream in a file is complete.
        cause: Option<Box<MigrationError>>,
        /// The figures up to then.
        ended: Box<Ended>,
    },
    /// The guest was handed over and the destination did not confirm it: the guest is paused here, and may run at the
    /// destination. An operator must check the destination and decide.
    #[error("the handover was not confirmed: {source}; {LOOK}")]
    #[non_exhaustive]
    Unconfirmed {
        /// Why no confirmation arrived.
        source: MigrationError,
        /// The figures up to then.
        ended: Box<Ended>,
    },
    /// The guest was started at the destination before all of its memory was there, and the rest does not reach it any more: the guest is
    /// lost. Here it is paused as it was at the switchover.
    #[error("the guest was lost in postcopy: {source}; {LOST_HERE}")]
    #[non_exhaustive]
    Lost {
        /// Why the rest does not reach it.
        source: MigrationError,
        /// The figures up to then.
        ended: Box<Ended>,
    },
}

impl SendError {
    /// The figures of the migration; `None` if it was not begun.
    #[must_use]
    pub fn ended(&self) -> Option<&Ended> {
        match self {
            Self::Settings { .. } => None,
            Self::Failed { ended, .. }
            | Self::Cancelled { ended, .. }
            | Self::ResumeFailed { ended, .. }
            | Self::Unconfirmed { ended, .. }
            | Self::Lost { ended, .. } => Some(ended),
        }
    }

    /// Where the guest is.
    pub fn guest_runs_here(&self) -> RunsHere {
        match self {
            Self::Settings { .. } | Self::Failed { .. } | Self::Cancelled { .. } => RunsHere::AsBefore,
            Self::ResumeFailed { .. } => RunsHere::ResumeFailed,
            Self::Unconfirmed { .. } => RunsHere::Unknown,
            Self::Lost { .. } => RunsHere::Lost,
        }
    }
}

/// A guest that has arrived: it was started, or is paused as it was at its source.
#[must_use]
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Received<G> {
    /// The guest, as the builder built it.
    pub guest: Arc<G>,
    /// The figures of the migration.
    pub ended: Ended,
}

/// Why no guest was received. A guest that was built is dropped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReceiveError {
    /// The settings are invalid. Nothing was begun, and no observer was notified.
    #[error("{source}")]
    #[non_exhaustive]
    Settings {
        /// The rule that they violate.
        #[from]
        source: SettingsError,
    },
    /// The migration failed before the guest was started: it does not run here.
    #[error("the migration failed, the guest does not run here: {source}")]
    #[non_exhaustive]
    Failed {
        /// What failed.
        source: MigrationError,
        /// The figures up to then.
        ended: Box<Ended>,
    },
    /// It was cancelled before the guest was started: it does not run here.
    #[error("the migration was cancelled, the guest does not run here: {source}")]
    #[non_exhaustive]
    Cancelled {
        /// [`MigrationError::Cancelled`].
        source: MigrationError,
        /// The figures up to then.
        ended: Box<Ended>,
    },
    /// The guest was handed over, and [`DestinationGuest::start`](crate::guest::DestinationGuest::start) failed. The
    /// source keeps its guest paused, and does not know the outcome.
    #[error("the guest was handed over and did not start here: {source}")]
    #[non_exhaustive]
    StartFailed {
        /// Why the start failed.
        source: MigrationError,
        /// The figures up to then.
        ended: Box<Ended>,
    },
    /// The guest was started here before all of its memory was here, and the rest does not come any more: it is lost. Threads that
    /// touched a page that is missing wait until this process ends.
    #[error("the guest was lost in postcopy: {source}")]
    #[non_exhaustive]
    Lost {
        /// Why the rest does not come.
        source: MigrationError,
        /// The figures up to then.
        ended: Box<Ended>,
    },
}

impl ReceiveError {
    /// The figures of the migration; `None` if it was not begun.
    #[must_use]
    pub fn ended(&self) -> Option<&Ended> {
        match self {
            Self::Settings { .. } => None,
            Self::Failed { ended, .. }
            | Self::Cancelled { ended, .. }
            | Self::StartFailed { ended, .. }
            | Self::Lost { ended, .. } => Some(ended),
        }
    }
}
