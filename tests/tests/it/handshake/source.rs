//! The source, against a destination played by hand.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use memferry::events::{Ended, Event, Outcome};
use memferry::guest::Guest;
use memferry::settings::{EncoderSettings, SourceSettings};
use memferry_stages::digest;
use memferry_stages::geometry::{PageAt, PageSize};
use memferry_stages::pool::BufferPool;
use memferry_stages::wire::messages::{Figure, Progress, RunState};
use memferry_stages::wire::{Kind, Message};
use memferry_tests::guest::{Fails, GuestCall};
use memferry_tests::{Hand, Recorder, TestGuest, run};
use memferry_transports::Transport;
use memferry_transports::memory::MemoryTransport;
use tokio_util::sync::CancellationToken;

use super::{LENGTH, block_on, says, settings};

/// The calls that a source guest receives if it continues after a pause.
pub(crate) const RESUMED: [GuestCall; 5] =
    [GuestCall::Pause, GuestCall::Save, GuestCall::Release, GuestCall::Reacquire, GuestCall::Resume];
/// The calls that a source guest receives if it is handed over.
const HANDED_OVER: [GuestCall; 4] = [GuestCall::Pause, GuestCall::Save, GuestCall::Release, GuestCall::Committed];

/// The outcome of a source.
pub(crate) struct Sent {
    ended: Ended,
    pub(crate) guest: Arc<TestGuest>,
    events: Vec<Event>,
}

/// Runs a source with a running guest against `play` and its connection, which is cut when `play` returns.
pub(crate) fn send_to(
    settings: SourceSettings,
    play: impl AsyncFnOnce(Hand, Arc<TestGuest>, CancellationToken),
) -> Sent {
    send_watched(settings, Arc::default(), play)
}

/// As [`send_to`], with the caller's recorder.
pub(crate) fn send_watched(
    settings: SourceSettings,
    recorder: Arc<Recorder>,
    play: impl AsyncFnOnce(Hand, Arc<TestGuest>, CancellationToken),
) -> Sent {
    send_guest_to(settings, recorder, Fails::default(), play)
}

/// The same, with a guest that fails a call.
fn send_guest_to(
    settings: SourceSettings,
    recorder: Arc<Recorder>,
    fails: Fails,
    play: impl AsyncFnOnce(Hand, Arc<TestGuest>, CancellationToken),
) -> Sent {
    let guest = TestGuest::source(PageSize::DEFAULT, &[LENGTH]).paced(Duration::from_micros(200)).failing(fails);
    let guest = guest.running(1);
    block_on(async {
        let (transport, cancel) = (Arc::new(MemoryTransport::new(64 << 10)), CancellationToken::new());
        let mut listener = transport.listen().await.unwrap();
        let peer = async {
            let hand = Hand::accept(&mut *listener).await;
            play(hand, guest.clone(), cancel.clone()).await;
            std::future::pending().await
        };
        let ended = tokio::select! {
            ended = run::source(guest.clone(), transport, settings, recorder.clone(), cancel.clone()) => ended,
            () = peer => unreachable!("it waits for ever"),
        };
        let events = recorder.events().into_iter().map(|(_, event)| event).collect();
        Sent { ended, guest: guest.clone(), events }
    })
}

impl Sent {
    /// The guest runs here and was never handed over; the error contains all of `words`.
    #[track_caller]
    pub(crate) fn stayed(&self, outcome: Outcome, words: &[&str]) {
        self.says(outcome, words);
        self.guest.wait_for_writes();
        assert!(!self.guest.was_called(GuestCall::Committed));
        let calls = self.guest.calls();
        assert!(calls.is_empty() || calls == RESUMED, "{calls:?}");
        assert_eq!(self.ended.downtime.is_some(), !calls.is_empty(), "it says how long the guest was paused");
        self.downtime_adds_up();
    }

    /// The parts of the downtime add up to it, and the parts within the pause are present.
    #[track_caller]
    fn downtime_adds_up(&self) {
        let Some(downtime) = self.ended.downtime else { return };
        let parts = &self.ended.parts;
        assert_eq!(parts.total(), downtime, "{parts:?}");
        let is_resumed = self.guest.was_called(GuestCall::Resume);
        assert_eq!(!parts.resume.is_zero(), is_resumed, "{parts:?}");
        assert!(!parts.final_sync.is_zero() || !parts.final_transfer.is_zero(), "{parts:?}");
    }

    /// The guest was handed over and is paused here.
    #[track_caller]
    pub(crate) fn gave_away(&self, outcome: Outcome, words: &[&str]) {
        self.says(outcome, words);
        assert!(!self.guest.runs());
        let calls = self.guest.calls();
        assert_eq!(calls[..HANDED_OVER.len()], HANDED_OVER);
        // Only the destination's answer releases the guard of the guest.
        let moved: &[GuestCall] = if outcome == Outcome::Completed { &[GuestCall::Moved] } else { &[] };
        assert_eq!(&calls[HANDED_OVER.len()..], moved);
        self.downtime_adds_up();
    }

    /// The guest was handed over and taken back.
    #[track_caller]
    fn came_back(&self, words: &[&str]) {
        self.says(Outcome::Failed, words);
        self.guest.wait_for_writes();
        let calls = [
            GuestCall::Pause,
            GuestCall::Save,
            GuestCall::Release,
            GuestCall::Committed,
            GuestCall::Reacquire,
            GuestCall::Resume,
        ];
        assert_eq!(self.guest.calls(), calls);
        assert!(self.ended.downtime.is_some(), "it says how long the guest was paused");
        self.downtime_adds_up();
    }

    #[track_caller]
    fn says(&self, outcome: Outcome, words: &[&str]) {
        says(&self.ended, self.events.last(), outcome, words);
        assert!(!self.guest.log().is_armed(), "the log was not stopped");
        assert_eq!(self.guest.log().misused(), None);
        assert!(!self.ended.resume_failed);
    }
}

#[test]
fn cut_before_loaded() {
    let sent = send_to(settings(), async |mut hand, _, _| hand.take_all().await);
    sent.stayed(Outcome::Failed, &["lost before the handover"]);
}

#[test]
fn refused_after_everything_was_sent() {
    let sent = send_to(settings(), async |mut hand, _, _| {
        hand.take_all().await;
        hand.send_message(Message::Refused("the disk is full".into())).await;
    });
    sent.stayed(Outcome::Failed, &["the destination refused: the disk is full"]);
}

#[test]
fn loaded_and_cut_before_go_is_read() {
    let sent = send_to(settings(), async |mut hand, _, _| {
        hand.take_all().await;
        hand.send_message(Message::Loaded { verified: true }).await;
    });
    // Go may have left, or not: the guest may continue only if Go was not yet committed.
    match sent.ended.outcome {
        Outcome::Unconfirmed => sent.gave_away(Outcome::Unconfirmed, &["look at the destination"]),
        _ => sent.stayed(Outcome::Failed, &["lost"]),
    }
}

#[test]
fn cut_after_go() {
    let sent = send_to(settings(), async |mut hand, _, _| {
        hand.take_all().await;
        hand.send_message(Message::Loaded { verified: true }).await;
        assert_eq!(hand.hear().await, Some(Message::Go(RunState::Running)));
    });
    let words = ["lost after Go", "stays paused here", "look at the destination", "only if it does not run there"];
    sent.gave_away(Outcome::Unconfirmed, &words);
    assert_eq!(sent.ended.verified, Some(true));
}

/// The backlog is waited for before the guest is paused, and no longer than it lasts.
#[test]
fn the_guest_is_paused_as_soon_as_the_backlog_is_acknowledged() {
    // How long the source waits for a destination that acknowledges nothing.
    const PATIENCE: Duration = Duration::from_millis(500);
    assert!(decided_before_the_pause(false) >= PATIENCE, "nothing was acknowledged");
    // On a busy machine it may take as long for other reasons, though not every time.
    let is_short = |_| {
        let time = decided_before_the_pause(true);
        println!("paused after {time:?}");
        time < PATIENCE
    };
    assert!((0..50).any(is_short), "it waits for what has arrived");
}

/// The time from the first decision to the pause of a guest whose backlog is acknowledged at once, or never.
fn decided_before_the_pause(acknowledged: bool) -> Duration {
    let plain = EncoderSettings { compress: None, ..settings().encoder };
    // So slow that the first round does not fit in a tenth of the limit.
    let limit = Duration::from_secs(6);
    let slow = SourceSettings { downtime_limit: limit, max_bandwidth: Some(2 << 20), encoder: plain, ..settings() };
    let (decided, paused) = (Arc::new(OnceLock::new()), Arc::new(OnceLock::new()));
    let (decides, pauses) = (decided.clone(), paused.clone());
    let recorder = Recorder::calling(move |_, event| match event {
        Event::Decided(_) => _ = decides.set(Instant::now()),
        Event::Paused => _ = pauses.set(Instant::now()),
        _ => {}
    });
    let sent = send_watched(slow, Arc::new(recorder), async |mut hand, _, _| {
        hand.agree().await;
        let Some(Message::RoundComplete(tally)) = hand.hear_until(Kind::RoundComplete).await else { panic!("a round") };
        if acknowledged {
            hand.send_message(Message::Progress(Progress { bytes: LENGTH, frames: vec![tally.batches] })).await;
        }
        hand.hear_until(Kind::End).await.expect("the rest follows");
    });
    sent.stayed(Outcome::Failed, &["lost before the handover"]);
    paused.get().unwrap().duration_since(*decided.get().unwrap())
}

#[test]
fn running_completes_it() {
    let sent = send_to(settings(), async |mut hand, guest, _| {
        hand.take_all().await;
        assert!(!guest.runs() && !guest.was_called(GuestCall::Committed));
        hand.send_message(Message::Loaded { verified: true }).await;
        assert_eq!(hand.hear().await, Some(Message::Go(RunState::Running)));
        assert!(guest.was_called(GuestCall::Committed));
        hand.send_message(Message::Running).await;
        assert_eq!(hand.hear().await, None, "nothing follows Go");
    });
    sent.gave_away(Outcome::Completed, &[]);
    assert_eq!(sent.ended.error, None);
}

/// What the destination reports of its own work counts only as far as the source waited for it.
#[test]
fn what_the_destination_claims_about_its_work_does_not_lengthen_the_downtime() {
    let claims =
        ["verify_ns", "durable_ns", "prepare_ns", "start_ns", "write_backlog_ns", "write_call_ns", "write_mib_ns"];
    let claims = claims.map(|name| Figure { name: name.into(), value: u64::MAX });
    let sent = send_to(settings(), async |mut hand, _, _| {
        hand.agree().await;
        hand.send_message(Message::Heartbeat(claims.into())).await;
        hand.hear_until(Kind::End).await.expect("a source ends its stream");
        hand.send_message(Message::Loaded { verified: true }).await;
        assert_eq!(hand.hear().await, Some(Message::Go(RunState::Running)));
        hand.send_message(Message::Running).await;
        hand.hear().await;
    });
    sent.gave_away(Outcome::Completed, &[]);
    let parts = sent.ended.parts;
    assert_eq!(Some(parts.total()), sent.ended.downtime, "{parts:?}");
    assert_eq!((parts.load, parts.handover), (Duration::ZERO, Duration::ZERO), "all of it is claimed: {parts:?}");
}

/// Law 7: if it is not certain that nothing else resumes the guest, Go does not leave.
#[test]
fn a_guest_that_cannot_be_committed_stays_and_nothing_is_started() {
    let fails = Fails { commit: true, ..Fails::default() };
    let sent = send_guest_to(settings(), Arc::default(), fails, async |mut hand, _, _| {
        hand.take_all().await;
        hand.send_message(Message::Loaded { verified: true }).await;
        assert!(matches!(hand.hear().await, Some(Message::Abort(why)) if why.contains("at commit")), "no Go");
    });
    sent.came_back(&["made to fail at commit"]);
}

#[test]
fn an_abort_that_crosses_go_brings_the_guest_back() {
    let sent = send_to(settings(), async |mut hand, _, _| {
        hand.take_all().await;
        hand.send_message(Message::Loaded { verified: true }).await;
        hand.send_message(Message::Abort("its operator cancelled".into())).await;
        hand.hear_until(Kind::Abort).await;
    });
    sent.came_back(&["before it began to start the guest", "its operator cancelled"]);
}

#[test]
fn a_start_that_fails_leaves_the_guest_paused() {
    let sent = send_to(settings(), async |mut hand, _, _| {
        hand.take_all().await;
        hand.send_message(Message::Loaded { verified: true }).await;
        hand.hear_until(Kind::Go).await;
        hand.send_message(Message::StartFailed("no such device".into())).await;
        hand.hear().await;
    });
    sent.gave_away(
        Outcome::Unconfirmed,
        &["began to start the guest and failed: no such device", "look at the destination"],
    );
}

#[test]
fn running_before_go_leaves_the_guest_paused() {
    for early in [Message::Running, Message::StartFailed("oh".into())] {
        let sent = send_to(settings(), async |mut hand, _, _| {
            hand.take_all().await;
            hand.send_message(early).await;
            assert_eq!(hand.hear_until(Kind::Go).await, None, "no Go is sent");
        });
        sent.says(Outcome::Unconfirmed, &["before Go", "look at the destination"]);
        assert!(!sent.guest.runs() && !sent.guest.was_called(GuestCall::Resume));
    }
}

/// Its answer counts even if its connection breaks at the same moment and the sender notices that first.
#[test]
fn running_said_in_the_pause_is_heard_though_the_connection_breaks() {
    let sent = send_to(settings(), async |mut hand, _, _| {
        hand.agree().await;
        hand.hear_until(Kind::End).await;
        hand.send_message(Message::Loaded { verified: true }).await;
        hand.send_message(Message::Running).await;
    });
    // Running after Loaded answers a Go that may be in flight.
    sent.gave_away(Outcome::Completed, &[]);
}

#[test]
fn silence_before_loaded_and_after_go() {
    // A machine that is too busy to send Loaded in time gets more time.
    let mut timeout = Duration::from_millis(400);
    while !is_silent(timeout) {
        timeout *= 2;
    }
}

/// Leaves one source without Loaded, and another without Running, until its handover times out; false if the timeout
/// was too short for the steps before.
fn is_silent(handover_timeout: Duration) -> bool {
    let impatient = SourceSettings { handover_timeout, ..settings() };
    let mut heard = None;
    let sent = send_to(impatient.clone(), async |mut hand, _, _| {
        hand.agree().await;
        heard = hand.hear_until(Kind::Abort).await;
        std::future::pending().await
    });
    if sent.ended.error.as_ref().is_some_and(|error| error.contains("does not read what it is sent")) {
        return false;
    }
    assert!(matches!(&heard, Some(Message::Abort(why)) if why.contains("in time")), "{heard:?}");
    sent.stayed(Outcome::Failed, &["did not report that everything is loaded in time"]);
    let mut went = false;
    let sent = send_to(impatient, async |mut hand, _, _| {
        hand.agree().await;
        hand.hear_until(Kind::End).await;
        hand.send_message(Message::Loaded { verified: true }).await;
        went = hand.hear_until(Kind::Go).await.is_some();
        std::future::pending().await
    });
    if went {
        let words = ["did not confirm that the guest runs in time", "look at the destination"];
        sent.gave_away(Outcome::Unconfirmed, &words);
    }
    went
}

#[test]
fn loaded_without_the_comparison_that_was_asked_for() {
    let sent = send_to(settings(), async |mut hand, _, _| {
        hand.take_all().await;
        hand.send_message(Message::Loaded { verified: false }).await;
        assert!(matches!(hand.hear().await, Some(Message::Abort(_))), "no Go");
    });
    sent.stayed(Outcome::Failed, &["did not compare digests"]);
    assert_ne!(sent.ended.verified, Some(true));
}

#[test]
fn page_hashes_make_the_source_name_the_page() {
    let sent = send_to(settings(), async |mut hand, guest, _| {
        hand.take_all().await;
        let memory = guest.memory();
        let mut scratch = BufferPool::new(1, PageSize::DEFAULT.extent_bytes()).try_take().unwrap();
        let mut hashes = digest::page_hashes(&memory, 0, 1, &digest::Known::default(), &mut scratch).unwrap();
        hashes[77] ^= 1;
        hashes[78] ^= 1;
        hand.send_message(Message::PageHashes { first: PageAt { block: 0, page: 512 }, hashes }).await;
        hand.send_message(Message::Refused("block \"ram0\" differs".into())).await;
        hand.hear_until(Kind::Abort).await;
    });
    sent.stayed(Outcome::Failed, &["block \"ram0\" differs", "page 589 of block \"ram0\"", "0x24d000"]);
    assert_eq!(sent.ended.verified, Some(false));
}

#[test]
fn page_hashes_of_pages_that_are_not_there_are_survived() {
    let cases = [
        (PageAt { block: 9, page: 0 }, "it differs"),
        (PageAt { block: 0, page: 769 }, "it differs"),
        (PageAt { block: 0, page: 511 }, "it differs"),
        (PageAt { block: 0, page: u64::MAX }, "first page is"),
    ];
    for (first, word) in cases {
        let sent = send_to(settings(), async |mut hand, _, _| {
            hand.take_all().await;
            hand.send_message(Message::PageHashes { first, hashes: vec![1; 512] }).await;
            hand.send_message(Message::Refused("it differs".into())).await;
            hand.hear_until(Kind::Abort).await;
        });
        sent.stayed(Outcome::Failed, &[word]);
    }
}

#[test]
fn messages_that_make_no_sense_leave_the_guest_here() {
    let strange: [fn() -> Message; 4] = [
        || Message::Ready,
        || Message::Accept { waits_ms: 0 },
        || Message::Go(RunState::Running),
        || Message::End { run_state: RunState::Running, frames: 0 },
    ];
    for strange in strange {
        let sent = send_to(settings(), async |mut hand, _, _| {
            hand.take_all().await;
            hand.send_message(strange()).await;
            hand.hear_until(Kind::Abort).await;
        });
        sent.stayed(Outcome::Failed, &[strange().kind().name(), "unexpected message"]);
    }
}

#[test]
fn garbage_on_the_return_path_leaves_the_guest_here_before_go_and_paused_after_it() {
    let sent = send_to(settings(), async |mut hand, _, _| {
        hand.take_all().await;
        hand.send(&[0x5a; 64]).await;
        hand.hear_until(Kind::Abort).await;
    });
    sent.stayed(Outcome::Failed, &["frame at byte", "damaged"]);
    let sent = send_to(settings(), async |mut hand, _, _| {
        hand.take_all().await;
        hand.send_message(Message::Loaded { verified: true }).await;
        hand.hear_until(Kind::Go).await;
        hand.send(&[0x5a; 64]).await;
        hand.hear().await;
    });
    sent.gave_away(Outcome::Unconfirmed, &["frame at byte", "look at the destination"]);
}

#[test]
fn more_acknowledged_than_was_sent() {
    let sent = send_to(settings(), async |mut hand, _, _| {
        hand.agree().await;
        let frames = vec![1 << 40];
        hand.send_message(Message::Progress(Progress { bytes: 1, frames })).await;
        hand.hear_until(Kind::Abort).await;
    });
    sent.stayed(Outcome::Failed, &["lane 0", "acknowledged"]);
}
