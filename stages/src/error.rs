//! Why a stage ended early.

use std::io;

use crate::batch::PageFault;
use crate::dirty_log::LogCall;
use crate::geometry::PageAt;
use crate::loader::sink::SinkError;
use crate::queue::Closed;
use crate::stage_id::StageId;
use crate::wire::reader::ReadError;

/// The error of one stage: which one, and what happened. Its text holds the cause's.
#[derive(Debug, thiserror::Error)]
#[error("{stage}: {cause}")]
pub struct StageError {
    /// Which stage.
    pub stage: StageId,
    /// What happened.
    pub cause: Cause,
}

impl StageError {
    /// Whether it ended only because a neighbour had ended. Then another stage's error is the one to report.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        matches!(self.cause, Cause::Closed(_))
    }

    /// Whether the connection was lost. Another one may do better; where the peer sent what is invalid, none does.
    #[must_use]
    pub fn is_lost_connection(&self) -> bool {
        match &self.cause {
            Cause::Transport(_) => true,
            Cause::Read(error) => error.is_lost_connection(),
            _ => false,
        }
    }
}

/// The cause of a stage's end.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// A neighbour ended first.
    #[error(transparent)]
    Closed(#[from] Closed),
    /// Guest memory could not be read or written.
    #[error("{doing} {at}: {error}")]
    Memory {
        /// What was tried: "cannot read from", "cannot write".
        doing: &'static str,
        /// The page, or the first of several.
        at: PageAt,
        /// Why it failed.
        error: io::Error,
    },
    /// A dirty log failed.
    #[error("the dirty log cannot {doing}: {error}")]
    Log {
        /// What it should have done.
        doing: LogCall,
        /// Why it failed.
        error: io::Error,
    },
    /// The pages of a frame are damaged.
    #[error("frame at byte {offset} of its stream: {fault}")]
    Pages {
        /// Where the frame began, in bytes from the stream's start.
        offset: u64,
        /// What is wrong with them.
        fault: PageFault,
    },
    /// A stream could not be read: an invalid frame, damage, an early end, or an error of the transport.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The page sink cannot do what a mark requires, or cannot place a page.
    #[error(transparent)]
    Sink(SinkError),
    /// The transport failed.
    #[error("the transport failed: {0}")]
    Transport(#[source] io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_which_stage_of_which_lane() {
        let error = |stage, cause| StageError { stage, cause }.to_string();
        let at = PageAt { block: 1, page: 640 };
        let short = || io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends at byte 7");
        assert_eq!(
            error(StageId::zero_detector(2), Cause::Memory { doing: "cannot read from", at, error: short() }),
            "zero detector of lane 2: cannot read from page 640 of block 1: the file ends at byte 7"
        );
        assert_eq!(
            error(StageId::BITMAP_SYNC, Cause::Log { doing: LogCall::Sync, error: short() }),
            "bitmap sync: the dirty log cannot sync: the file ends at byte 7"
        );
        assert_eq!(
            error(StageId::sender(0), Cause::Transport(short())),
            "sender of connection 0: the transport failed: the file ends at byte 7"
        );
    }

    #[test]
    fn only_a_neighbours_end_is_closed() {
        let error = |cause| StageError { stage: StageId::encoder(0), cause };
        assert!(error(Closed.into()).is_closed());
        assert!(!error(Cause::Transport(io::ErrorKind::BrokenPipe.into())).is_closed());
    }
}
