//! The outcome of a migration as an exit code.

use memferry::events::{Ended, Outcome};

pub(super) const DONE: u8 = 0;
pub(super) const FAILED: u8 = 1;
pub(super) const BAD_USAGE: u8 = 2;
pub(super) const UNCONFIRMED: u8 = 3;
pub(super) const NOT_RESUMED: u8 = 4;
pub(super) const LOST: u8 = 5;
pub(super) const CANCELLED: u8 = 130;

/// The exit code for an end.
pub(super) fn exit_code(ended: &Ended) -> u8 {
    match ended.outcome {
        _ if ended.resume_failed => NOT_RESUMED,
        Outcome::Completed => DONE,
        Outcome::Unconfirmed => UNCONFIRMED,
        Outcome::Lost => LOST,
        Outcome::Cancelled => CANCELLED,
        Outcome::Failed => FAILED,
    }
}

/// The outcome of a migration with both ends in this process: the worse of the two, with the source's figures.
///
/// A cancel by the operator explains a failure at the other end; a cancel without a request is a consequence of that
/// failure.
pub(super) fn joint(source: &Ended, destination: &Ended, asked_to_cancel: bool) -> Ended {
    let rank = |ended: &Ended| match exit_code(ended) {
        DONE => 0,
        CANCELLED if !asked_to_cancel => 1,
        FAILED => 2,
        CANCELLED => 3,
        UNCONFIRMED => 4,
        _ => 5,
    };
    let worse = if rank(destination) > rank(source) { destination } else { source };
    Ended { outcome: worse.outcome, error: worse.error.clone(), verified: destination.verified, ..source.clone() }
}

/// The end of a migration that could not begin.
pub(super) fn never_begun(error: String) -> Ended {
    Ended {
        outcome: Outcome::Failed,
        error: Some(error),
        verified: None,
        checked: None,
        total: std::time::Duration::ZERO,
        setup: std::time::Duration::ZERO,
        downtime: None,
        forecast: None,
        parts: memferry::events::DowntimeParts::default(),
        wire_bytes: 0,
        excluded: memferry_stages::exclusions::ExcludedPages::default(),
        memory_peak: 0,
        stages: Vec::new(),
        bottleneck: memferry::bottleneck::Bottleneck::default(),
        cpu: std::time::Duration::ZERO,
        resume_failed: false,
        outages: memferry::events::Outages::default(),
        postcopy: None,
    }
}

/// The end of a migration that was cancelled while its guest was created.
pub(super) fn cancelled_before_it_began() -> Ended {
    Ended { outcome: Outcome::Cancelled, ..never_begun("before the guest was ready".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(outcome: Outcome, error: &str) -> Ended {
        Ended { outcome, error: (!error.is_empty()).then(|| error.to_owned()), ..never_begun(String::new()) }
    }

    #[test]
    fn exit_codes_are_those_that_were_promised() {
        let codes = [Outcome::Completed, Outcome::Failed, Outcome::Unconfirmed, Outcome::Lost, Outcome::Cancelled];
        assert_eq!(codes.map(|phase| exit_code(&ended(phase, ""))), [0, 1, 3, 5, 130]);
        let stuck = Ended { resume_failed: true, ..ended(Outcome::Cancelled, "") };
        assert_eq!(exit_code(&stuck), 4);
    }

    #[test]
    fn the_worse_end_decides() {
        let done = ended(Outcome::Completed, "");
        let full = ended(Outcome::Failed, "disk full");
        assert_eq!(joint(&done, &full, false).error.as_deref(), Some("disk full"));
        assert_eq!(joint(&full, &done, false).outcome, Outcome::Failed);
        assert_eq!(joint(&done, &done, false).outcome, Outcome::Completed);
        assert_eq!(joint(&ended(Outcome::Unconfirmed, "?"), &full, false).outcome, Outcome::Unconfirmed);
    }

    #[test]
    fn a_cancel_explains_a_failure_only_if_it_was_asked_for() {
        let cancelled = ended(Outcome::Cancelled, "by the operator");
        let failed = ended(Outcome::Failed, "the peer gave up");
        assert_eq!(joint(&cancelled, &failed, true).outcome, Outcome::Cancelled);
        assert_eq!(joint(&failed, &cancelled, true).outcome, Outcome::Cancelled);
        assert_eq!(joint(&failed, &cancelled, false).outcome, Outcome::Failed);
    }
}
