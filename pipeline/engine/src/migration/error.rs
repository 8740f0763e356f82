//! The errors that end a migration.

use std::any::Any;
use std::fmt;
use std::io;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures::FutureExt;
use memferry_stages::dirty_log::LogCall;
use memferry_stages::error::StageError;
use memferry_stages::geometry::LayoutError;
use memferry_stages::stage_id::StageId;
use memferry_stages::untrusted::Untrusted;
use memferry_stages::wire::WireError;
use memferry_stages::wire::reader::ReadError;

use super::course::handshake::{HandoverError, Happening, NotStarted};
use crate::controller::Decided;
use crate::events::Role;
use crate::guest::GuestError;
use crate::human;
use crate::settings::Mode;

pub(super) use super::loss::{Loss, Silence};

/// The error that ended a migration. Its text is for the operator: what failed and where.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MigrationError {
    /// The operator cancelled it.
    #[error("cancelled")]
    Cancelled,
    /// The limits of the settings cannot be met, and the settings cancel the migration in this case.
    #[error("{0}")]
    GaveUp(Box<Decided>),
    /// The peer could not be reached or heard.
    #[error("{0}")]
    Transport(#[from] io::Error),
    /// The guest returned an error.
    #[error("the guest failed: {0}")]
    Guest(#[from] GuestError),
    /// The guest was built for blocks other than those received.
    #[error("the guest was built otherwise than it came: {0}")]
    BuiltOtherwise(String),
    /// The guest's blocks are not a valid layout.
    #[error("the RAM blocks do not fit: {0}")]
    Layout(#[from] LayoutError),
    /// The guest is too large for the memory of this host.
    #[error("the guest is too large: {0}")]
    TooLarge(String),
    /// The XBZRLE cache is too large for the memory of this host.
    #[error("xbzrle_cache: {0}")]
    CacheTooLarge(String),
    /// A dirty log failed.
    #[error("the dirty log cannot {doing}: {error}")]
    Log {
        /// The operation that failed.
        doing: LogCall,
        /// The kernel's error.
        #[source]
        error: io::Error,
    },
    /// Guest memory could not be read for a digest.
    #[error("guest memory cannot be read for its digest: {0}")]
    Digest(#[source] io::Error),
    /// The background check of memory against page hashes cannot start.
    #[error("memory cannot be checked in the background: {0}")]
    Check(#[source] io::Error),
    /// A stage failed.
    #[error("{0}")]
    Stage(#[from] Failure),
    /// The stream could not be read, or is not valid.
    #[error("{0}")]
    Read(#[from] ReadError),
    /// A message that cannot be acted on in this state.
    #[error("{0}")]
    Wire(#[from] WireError),
    /// The peer refused, with its reason.
    #[error("the {peer} refused: {why}")]
    Refused {
        /// Which end the peer is.
        peer: Role,
        /// The peer's reason.
        why: Untrusted,
    },
    /// The peer gave up, with its reason.
    #[error("the {peer} gave up: {why}")]
    GivenUp {
        /// Which end the peer is.
        peer: Role,
        /// The peer's reason.
        why: Untrusted,
    },
    /// The peer violated the protocol.
    #[error("the peer does not keep to the protocol: {0}")]
    Protocol(String),
    /// The connection ended.
    #[error("the connection was lost: {0}")]
    Lost(#[source] Loss),
    /// The destination does not start the guest.
    #[error("{0}")]
    NotStarted(#[from] NotStarted),
    /// The peer was silent for too long.
    #[error("{0}")]
    Silent(Silence),
    /// The connection was lost, and was not made again in time.
    #[error("{cause}; {not_recovered}")]
    NotRecovered {
        /// How it was lost.
        #[source]
        cause: Box<Self>,
        /// What was tried.
        not_recovered: NotRecovered,
    },
    /// After a lost connection, the peer does not prove that it is the one that was lost.
    #[error("the {0} did not prove that it is the one whose connection was lost")]
    NotProven(Role),
    /// A connection leads to another peer than the first one of the migration did.
    #[error(
        "{name} has another certificate than the {peer} that the migration began with: every connection must lead to the same \
         {peer}"
    )]
    OtherPeer {
        /// Which end the peer is.
        peer: Role,
        /// Its name.
        name: Untrusted,
    },
    /// The last handshake failed.
    #[error("{0}")]
    Handover(#[from] HandoverError),
    /// The last handshake failed because a page differs between the two ends.
    #[error("{source}: {page}")]
    PageDiffers {
        /// The destination's message.
        source: HandoverError,
        /// The page.
        page: String,
    },
    /// A time limit was exceeded.
    #[error("{0}")]
    TimedOut(String),
    /// A panic was caught, so that it does not end the guest's process.
    #[error("memferry or the guest's own code made a mistake: {0}")]
    Mistake(String),
    /// Postcopy over a transport without answers, such as a file.
    #[error("mode {:?} needs a destination that answers: write mode = \"precopy\", or choose another transport", .0.name())]
    NoReturnPath(Mode),
    /// The guest runs without pages that are still at the other end, and does not get them.
    #[error("the guest was started before all of its memory was there, and the rest is lost: {0}")]
    PagesLost(#[source] Box<Self>),
    /// A page of the paused source differs from what was last sent, and its bit is clear.
    #[error("the dirty log lost a write: {0} differs from what was sent, and no log reported it")]
    LostWrite(String),
    /// The digests of the two memories differ.
    #[error("verification failed: {0}")]
    Differs(String),
}

/// What was tried to make a lost connection again.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NotRecovered {
    /// It was lost once more than the settings allow.
    LostTooOften {
        /// How many lost connections the settings allow.
        attempts: u32,
    },
    /// The source has not reached the destination.
    NotReached {
        /// How often it has tried.
        tries: u32,
        /// For how long.
        waited: Duration,
        /// Why the latest try failed.
        last: String,
    },
    /// The source has not come back to the destination.
    NotReturned {
        /// How long it was waited for.
        waited: Duration,
    },
}

impl fmt::Display for NotRecovered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LostTooOften { attempts } => {
                write!(f, "it is not made again, for it was so {attempts} times already (recovery.attempts)")
            }
            Self::NotReached { tries, waited, last } => {
                let waited = human::time(*waited);
                let tries = if *tries == 1 { "1 try".into() } else { format!("{tries} tries") };
                write!(f, "the destination was not reached again in {waited} (recovery.give_up) and {tries}: {last}")
            }
            Self::NotReturned { waited } => {
                write!(f, "the source did not return within {} (recovery.give_up)", human::time(*waited))
            }
        }
    }
}

impl MigrationError {
    /// Whether the connection was lost. Another one may do better; where an end made a mistake or gave up, none does.
    pub(super) fn is_lost_connection(&self) -> bool {
        match self {
            Self::Lost(loss) => !matches!(loss, Loss::PagesReturned | Loss::SenderEnded | Loss::StageEnded),
            Self::Silent(_) => true,
            Self::Stage(failure) => failure.is_lost_connection(),
            Self::Read(error) => error.is_lost_connection(),
            _ => false,
        }
    }

    /// Whether this process made a mistake, an observer or the guest's code included.
    pub(super) fn is_mistake(&self) -> bool {
        matches!(self, Self::Mistake(_))
    }
}

impl From<MigrationError> for Happening {
    fn from(error: MigrationError) -> Self {
        match error {
            MigrationError::Lost(loss) => Self::Lost(loss),
            MigrationError::Silent(silence) => Self::Lost(Loss::Silent(silence)),
            other => Self::Broke(other.to_string()),
        }
    }
}

/// The error that ended a stage.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// It returned an error.
    #[error("{0}")]
    Stage(#[from] StageError),
    /// It panicked: a bug, caught so that it does not end the guest's process.
    #[error("the {stage} stopped at a mistake in memferry: {panic}")]
    Panicked {
        /// Which stage.
        stage: StageId,
        /// The panic message.
        panic: String,
    },
    /// Its connection ended at a frame boundary, but not at the end of the stream.
    #[error("{0}: the connection ended before its stream did")]
    Ended(StageId),
}

impl Failure {
    /// Whether the connection was lost. Another one may do better.
    pub(super) fn is_lost_connection(&self) -> bool {
        match self {
            Self::Stage(error) => error.is_lost_connection(),
            Self::Ended(_) => true,
            Self::Panicked { .. } => false,
        }
    }

    /// May it be the consequence of another failure, which is about to be reported?
    pub(super) fn is_echo(&self) -> bool {
        match self {
            Self::Stage(error) => error.is_closed(),
            Self::Ended(_) => true,
            Self::Panicked { .. } => false,
        }
    }
}

/// Runs a future to its end. A panic in it becomes an error: a bug in the engine or in the guest's code must not leave
/// a paused guest that nothing resumes.
pub(super) async fn guarded<T>(future: impl Future<Output = Result<T, MigrationError>>) -> Result<T, MigrationError> {
    let ended = AssertUnwindSafe(future).catch_unwind().await;
    ended.unwrap_or_else(|panic| Err(MigrationError::Mistake(panic_words(&*panic))))
}

/// The message of a panic.
pub(super) fn panic_words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "a panic without a message".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_becomes_an_error_that_says_what_it_said() {
        let at_once = guarded(async { if true { panic!("page {} is gone", 7) } else { Ok(()) } }).await;
        assert!(at_once.unwrap_err().to_string().ends_with("mistake: page 7 is gone"));
        let after_a_wait = guarded::<()>(async {
            tokio::task::yield_now().await;
            panic!("plain")
        });
        assert!(after_a_wait.await.unwrap_err().to_string().ends_with("mistake: plain"));
        assert_eq!(guarded(async { Ok(3) }).await.unwrap(), 3);
    }
}
