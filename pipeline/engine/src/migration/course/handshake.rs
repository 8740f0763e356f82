//! The last handshake: *Loaded*, *Go*, *Running*. Pure state machines, so that law 7 can be read and tested in one place:
//! the source guest survives everything, and never two run.
//!
//! ```text
//!  source                                destination
//!    │ ── last pages, state, digests ──────▶ │ load, verify, prepare     may fail: Refused, the source resumes
//!    │ ◀───────────────────────── Loaded ─── │ from here it waits for Go or the end
//!    │ committed: nothing here resumes it    │                           may fail: Abort, the source resumes
//!    │ ── Go ──────────────────────────────▶ │ start                     cannot be taken back
//!    │ ◀──────────────────────── Running ─── │
//! ```
//!
//! Before Go is handed to the transport, the source survives every failure: it resumes. Once Go may have left, only the
//! destination's answer decides: Running (it is over), Refused or Abort (it had not begun its start and never will: the
//! source resumes). Anything else, silence included, leaves the source paused, because it cannot know.

use memferry_stages::untrusted::Untrusted;
use memferry_stages::wire::messages::RunState;
use memferry_stages::wire::{Kind, Message};

use crate::migration::loss::Loss;

/// The result at the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::migration) enum Verdict {
    /// The guest runs at the destination.
    Completed,
    /// It does not run there and never will: the source guest may resume.
    Failed(HandoverError),
    /// The operator cancelled in time: the source guest may resume.
    Cancelled,
    /// This end cannot know: the source guest stays paused.
    Unconfirmed(HandoverError),
}

/// Why the last handshake failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HandoverError {
    /// The destination loaded everything but compared no digests.
    #[error("the destination did not compare digests, though asked to")]
    NotVerified,
    /// It refused, with its reason.
    #[error("the destination refused: {0}")]
    Refused(Untrusted),
    /// It gave up before Go, with its reason.
    #[error("the destination gave up: {0}")]
    GivenUp(Untrusted),
    /// It gave up after Go and before it began to start the guest, with its reason.
    #[error("the destination gave up before it began to start the guest: {0}")]
    NotStarted(Untrusted),
    /// It began to start the guest and failed, with its reason.
    #[error("the destination began to start the guest and failed: {0}")]
    StartFailed(Untrusted),
    /// It reports that it started the guest before Go.
    #[error("the destination started the guest before Go")]
    StartedBeforeGo,
    /// It sent this message, which is unexpected here.
    #[error("the destination sent an unexpected message: {0}")]
    UnexpectedMessage(Kind),
    /// It sent this message where only Running, or a reason, can follow.
    #[error("the destination sent {0} instead of Running")]
    NotRunning(Kind),
    /// The connection was lost before Go.
    #[error("the connection was lost before the handover: {0}")]
    LostBeforeGo(#[source] Loss),
    /// The connection was lost after Go.
    #[error("the connection was lost after Go: {0}")]
    LostAfterGo(#[source] Loss),
    /// The destination did not load in time.
    #[error("the destination did not report that everything is loaded in time")]
    NotLoadedInTime,
    /// The destination did not answer Go in time.
    #[error("the destination did not confirm that the guest runs in time")]
    NotConfirmedInTime,
    /// A part of this end failed.
    #[error("{0}")]
    Broke(String),
}

/// An event at one end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::migration) enum Happening {
    /// The peer sent a message.
    Received(Message),
    /// The connection is lost.
    Lost(Loss),
    /// The operator cancelled.
    Cancel,
    /// The time limit of this handshake has passed.
    TimedOut,
    /// A part of this end failed.
    Broke(String),
}

/// The source's reaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::migration) enum SourceStep {
    /// Continue to wait.
    Wait,
    /// The destination sent the hashes of a stretch that differs: find the page and report it. Its Refused follows.
    NamePage(Message),
    /// This end may not resume the guest any more: commit, then hand Go to the transport.
    HandOver,
    /// A cancel came after Go: notify the operator that it is too late, and continue to wait.
    TooLate,
    /// The handshake is over.
    End(Verdict),
}

/// The source's side, from the moment its last frame is queued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::migration) enum SourceHandshake {
    /// The destination loads; the source may still resume.
    AwaitingLoaded {
        /// Must the destination have compared digests?
        verify: bool,
    },
    /// Go may have left.
    AwaitingRunning,
}

impl SourceHandshake {
    /// Handles one event.
    pub(in crate::migration) fn step(&mut self, happening: Happening) -> SourceStep {
        match self {
            Self::AwaitingLoaded { verify } => {
                let step = before_go(*verify, happening);
                if step == SourceStep::HandOver {
                    *self = Self::AwaitingRunning;
                }
                step
            }
            Self::AwaitingRunning => after_go(happening),
        }
    }
}

fn before_go(verify: bool, happening: Happening) -> SourceStep {
    let failed = |why| SourceStep::End(Verdict::Failed(why));
    match happening {
        Happening::Received(Message::Loaded { verified }) if verified || !verify => SourceStep::HandOver,
        Happening::Received(Message::Loaded { .. }) => failed(HandoverError::NotVerified),
        Happening::Received(Message::Progress(_) | Message::Heartbeat(_)) => SourceStep::Wait,
        Happening::Received(hashes @ Message::PageHashes { .. }) => SourceStep::NamePage(hashes),
        Happening::Received(Message::Refused(why)) => failed(HandoverError::Refused(why)),
        Happening::Received(Message::Abort(why)) => failed(HandoverError::GivenUp(why)),
        // It runs without Go: resuming here could make two guests run.
        Happening::Received(Message::Running | Message::StartFailed(_)) => {
            SourceStep::End(Verdict::Unconfirmed(HandoverError::StartedBeforeGo))
        }
        Happening::Received(other) => failed(HandoverError::UnexpectedMessage(other.kind())),
        Happening::Lost(loss) => failed(HandoverError::LostBeforeGo(loss)),
        Happening::TimedOut => failed(HandoverError::NotLoadedInTime),
        Happening::Broke(why) => failed(HandoverError::Broke(why)),
        Happening::Cancel => SourceStep::End(Verdict::Cancelled),
    }
}

fn after_go(happening: Happening) -> SourceStep {
    let unknown = |why| SourceStep::End(Verdict::Unconfirmed(why));
    match happening {
        Happening::Received(Message::Running) => SourceStep::End(Verdict::Completed),
        Happening::Received(Message::Refused(why) | Message::Abort(why)) => {
            SourceStep::End(Verdict::Failed(HandoverError::NotStarted(why)))
        }
        Happening::Received(Message::StartFailed(why)) => unknown(HandoverError::StartFailed(why)),
        Happening::Received(Message::Progress(_) | Message::Heartbeat(_)) => SourceStep::Wait,
        Happening::Received(other) => unknown(HandoverError::NotRunning(other.kind())),
        Happening::Lost(loss) => unknown(HandoverError::LostAfterGo(loss)),
        Happening::TimedOut => unknown(HandoverError::NotConfirmedInTime),
        Happening::Broke(why) => unknown(HandoverError::Broke(why)),
        Happening::Cancel => SourceStep::TooLate,
    }
}

/// The destination's reaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::migration) enum DestinationStep {
    /// Continue to wait.
    Wait,
    /// Start the guest, and answer Running or StartFailed.
    Start(RunState),
    /// The handshake is over, nothing was started and nothing will be: report it to the source.
    End(NotStarted),
}

/// Why the destination does not start the guest, after it has sent Loaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotStarted {
    /// The operator of this end cancelled.
    #[error("cancelled at the destination")]
    Cancelled,
    /// The source gave up, with its reason.
    #[error("the source gave up: {0}")]
    GivenUp(Untrusted),
    /// The source sent this message where only Go can follow.
    #[error("the source sent {0} instead of Go")]
    NotGo(Kind),
    /// The connection was lost before Go.
    #[error("the connection was lost before Go, so the guest is not started here: {0}")]
    LostBeforeGo(#[source] Loss),
    /// Go did not come in time.
    #[error("Go did not come in time, so the guest is not started here")]
    TimedOut,
    /// A part of this end failed.
    #[error("{0}")]
    Broke(String),
}

/// The destination's side, after it has sent Loaded: handles one event.
#[must_use]
pub(in crate::migration) fn awaiting_go(happening: Happening) -> DestinationStep {
    let end = DestinationStep::End;
    match happening {
        Happening::Received(Message::Go(run_state)) => DestinationStep::Start(run_state),
        Happening::Received(Message::Heartbeat(_)) => DestinationStep::Wait,
        Happening::Received(Message::Abort(why)) => end(NotStarted::GivenUp(why)),
        Happening::Received(other) => end(NotStarted::NotGo(other.kind())),
        Happening::Lost(loss) => end(NotStarted::LostBeforeGo(loss)),
        Happening::TimedOut => end(NotStarted::TimedOut),
        Happening::Broke(why) => end(NotStarted::Broke(why)),
        Happening::Cancel => end(NotStarted::Cancelled),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::error::MigrationError;

    fn all_happenings() -> Vec<Happening> {
        let messages = [
            Message::Ready,
            Message::Loaded { verified: true },
            Message::Loaded { verified: false },
            Message::Running,
            Message::Refused("no".into()),
            Message::Abort("stop".into()),
            Message::StartFailed("broken".into()),
            Message::Go(RunState::Running),
        ];
        let mut all: Vec<_> = messages.into_iter().map(Happening::Received).collect();
        all.extend([
            Happening::Lost(Loss::ReaderEnded),
            Happening::Cancel,
            Happening::TimedOut,
            Happening::Broke("disk".into()),
        ]);
        all
    }

    /// Both ends, with messages that may be lost or cross, in every order of events. Two guests never run, and if none
    /// runs one end reports it.
    #[test]
    fn never_two_run_and_never_none_in_silence() {
        #[derive(Clone)]
        struct World {
            source: SourceHandshake,
            verdict: Option<Verdict>,
            destination_over: bool,
            destination_runs: bool,
            to_destination: Vec<Message>,
            to_source: Vec<Message>,
        }
        fn check(world: &World) {
            let source_runs = matches!(world.verdict, Some(Verdict::Failed(_) | Verdict::Cancelled));
            assert!(!(source_runs && world.destination_runs), "two run: {:?}", world.verdict);
            if world.verdict == Some(Verdict::Completed) {
                assert!(world.destination_runs, "none runs and neither end reports it");
            }
        }
        fn source_step(world: &mut World, happening: Happening) {
            if world.verdict.is_some() {
                return;
            }
            match world.source.step(happening) {
                SourceStep::HandOver => world.to_destination.push(Message::Go(RunState::Running)),
                SourceStep::End(verdict) => {
                    if !matches!(verdict, Verdict::Completed) {
                        world.to_destination.push(Message::Abort("over".into()));
                    }
                    world.verdict = Some(verdict);
                }
                SourceStep::Wait | SourceStep::TooLate | SourceStep::NamePage(_) => {}
            }
        }
        fn destination_step(world: &mut World, happening: Happening, start_fails: bool) {
            if world.destination_over {
                return;
            }
            match awaiting_go(happening) {
                DestinationStep::Wait => {}
                DestinationStep::Start(_) => {
                    world.destination_over = true;
                    // A start that fails may have run part of the guest: it counts as running.
                    world.destination_runs = true;
                    let answer = if start_fails { Message::StartFailed("x".into()) } else { Message::Running };
                    world.to_source.push(answer);
                }
                DestinationStep::End(why) => {
                    world.destination_over = true;
                    world.to_source.push(Message::Abort(why.to_string().into()));
                }
            }
        }
        // Every sequence of up to 6 moves out of: deliver or lose a message either way, cancel or time out either end, cut.
        fn explore(world: &World, depth: u32, seen: &mut u64) {
            check(world);
            *seen += 1;
            if depth == 0 {
                return;
            }
            for action in 0..10 {
                let mut next = world.clone();
                match action {
                    0 if !next.to_source.is_empty() => {
                        let message = next.to_source.remove(0);
                        source_step(&mut next, Happening::Received(message));
                    }
                    1 | 2 if !next.to_destination.is_empty() => {
                        let message = next.to_destination.remove(0);
                        destination_step(&mut next, Happening::Received(message), action == 2);
                    }
                    3 => source_step(&mut next, Happening::Cancel),
                    4 => source_step(&mut next, Happening::TimedOut),
                    5 => source_step(&mut next, Happening::Lost(Loss::ReaderEnded)),
                    6 => destination_step(&mut next, Happening::Cancel, false),
                    7 => destination_step(&mut next, Happening::TimedOut, false),
                    8 => {
                        next.to_source.clear();
                        next.to_destination.clear();
                        source_step(&mut next, Happening::Lost(Loss::ReaderEnded));
                    }
                    9 => destination_step(&mut next, Happening::Lost(Loss::ReaderEnded), false),
                    _ => continue,
                }
                explore(&next, depth - 1, seen);
            }
        }
        let world = World {
            source: SourceHandshake::AwaitingLoaded { verify: true },
            verdict: None,
            destination_over: false,
            destination_runs: false,
            to_destination: vec![],
            to_source: vec![Message::Loaded { verified: true }],
        };
        let mut seen = 0;
        explore(&world, 6, &mut seen);
        assert!(seen > 100_000, "{seen} states explored");
    }

    #[test]
    fn before_go_only_loaded_hands_over_and_everything_else_leaves_the_guest_here() {
        for happening in all_happenings() {
            let mut source = SourceHandshake::AwaitingLoaded { verify: true };
            let step = source.step(happening.clone());
            let expected = match happening {
                Happening::Received(Message::Loaded { verified: true }) => step == SourceStep::HandOver,
                Happening::Received(Message::Running | Message::StartFailed(_)) => {
                    matches!(step, SourceStep::End(Verdict::Unconfirmed(_)))
                }
                Happening::Cancel => step == SourceStep::End(Verdict::Cancelled),
                _ => matches!(step, SourceStep::End(Verdict::Failed(_))),
            };
            assert!(expected, "{happening:?} -> {step:?}");
        }
    }

    #[test]
    fn after_go_only_the_destinations_word_resumes_the_source() {
        for happening in all_happenings() {
            let step = SourceHandshake::AwaitingRunning.step(happening.clone());
            let expected = match happening {
                Happening::Received(Message::Running) => step == SourceStep::End(Verdict::Completed),
                Happening::Received(Message::Refused(_) | Message::Abort(_)) => {
                    matches!(step, SourceStep::End(Verdict::Failed(_)))
                }
                Happening::Cancel => step == SourceStep::TooLate,
                _ => matches!(step, SourceStep::End(Verdict::Unconfirmed(_))),
            };
            assert!(expected, "{happening:?} -> {step:?}");
        }
    }

    #[test]
    fn a_heartbeat_decides_nothing() {
        let heartbeat = || Happening::Received(Message::Heartbeat(Vec::new()));
        for state in [SourceHandshake::AwaitingLoaded { verify: true }, SourceHandshake::AwaitingRunning] {
            let mut source = state.clone();
            assert_eq!((source.step(heartbeat()), source), (SourceStep::Wait, state));
        }
        assert_eq!(awaiting_go(heartbeat()), DestinationStep::Wait);
    }

    #[test]
    fn a_lost_connection_is_no_broken_part_and_is_named_once() {
        let lost = || Happening::from(MigrationError::Lost(Loss::ReturnPathClosed));
        assert_eq!(lost(), Happening::Lost(Loss::ReturnPathClosed));
        let SourceStep::End(Verdict::Failed(before)) = SourceHandshake::AwaitingLoaded { verify: true }.step(lost())
        else {
            panic!("it survives");
        };
        let SourceStep::End(Verdict::Unconfirmed(after)) = SourceHandshake::AwaitingRunning.step(lost()) else {
            panic!("it cannot know");
        };
        let DestinationStep::End(not_started) = awaiting_go(lost()) else { panic!("it starts nothing") };
        for error in [before.into(), after.into(), MigrationError::from(not_started)] {
            assert_eq!(error.to_string().matches("the connection was lost").count(), 1, "{error}");
        }
    }

    #[test]
    fn without_verify_an_unverified_load_is_enough() {
        let mut source = SourceHandshake::AwaitingLoaded { verify: false };
        assert_eq!(source.step(Happening::Received(Message::Loaded { verified: false })), SourceStep::HandOver);
    }

    #[test]
    fn the_destination_starts_on_go_and_on_nothing_else() {
        for happening in all_happenings() {
            let starts = matches!(awaiting_go(happening.clone()), DestinationStep::Start(_));
            assert_eq!(starts, matches!(happening, Happening::Received(Message::Go(_))), "{happening:?}");
        }
    }
}
