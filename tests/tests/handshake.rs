//! The last handshake against a peer played by hand: whatever it says or leaves out, the source guest survives, never two
//! run, and when none runs somebody says so (law 7).

use std::sync::Arc;
use std::time::{Duration, Instant};

use memferry::events::{Ended, Event, Phase, Role};
use memferry::settings::{DestinationSettings, SourceSettings};
use memferry_stages::digest;
use memferry_stages::geometry::{PageAt, PageSize};
use memferry_stages::pool::BufferPool;
use memferry_stages::wire::messages::RunState;
use memferry_stages::wire::{Kind, Message};
use memferry_tests::guest::{Fails, Told};
use memferry_tests::run::{self, destination_settings};
use memferry_tests::{Hand, Recorder, Recording, TestGuest, source_settings};
use memferry_transports::Transport;
use memferry_transports::memory::MemoryTransport;
use tokio_util::sync::CancellationToken;

/// No test here takes this long unless something hangs.
const HANG: Duration = Duration::from_secs(20);
const LENGTH: u64 = (3 << 20) + 5;
/// What a source is told whose guest goes on after a pause.
const WENT_ON: [Told; 5] = [Told::Pause, Told::Save, Told::Release, Told::Reacquire, Told::Resume];
/// What a source is told that has handed its guest over.
const HANDED_OVER: [Told; 4] = [Told::Pause, Told::Save, Told::Release, Told::Committed];

fn settings() -> SourceSettings {
    SourceSettings { max_rounds: 1, ..source_settings(1, 1) }
}

fn impatient() -> SourceSettings {
    SourceSettings { handover_timeout: Duration::from_millis(400), ..settings() }
}

fn block_on<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async { tokio::time::timeout(HANG, test).await.expect("it hangs") })
}

// ---- the source, against a destination played by hand ----

/// How a source ended.
struct Sent {
    ended: Ended,
    guest: Arc<TestGuest>,
    events: Vec<Event>,
}

/// Runs a source whose guest runs against whatever `play` does with the connection; it is cut when `play` returns.
fn send_to(settings: SourceSettings, play: impl AsyncFnOnce(Hand, Arc<TestGuest>, CancellationToken)) -> Sent {
    let guest = TestGuest::source(PageSize::DEFAULT, &[LENGTH]).paced(Duration::from_micros(200)).running(1);
    block_on(async {
        let (transport, cancel) = (Arc::new(MemoryTransport::new(64 << 10)), CancellationToken::new());
        let mut listener = transport.listen().await.unwrap();
        let recorder = Arc::new(Recorder::default());
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
    /// The guest runs here and was never given away; the error says all of `words`.
    #[track_caller]
    fn stayed(&self, phase: Phase, words: &[&str]) {
        self.says(phase, words);
        self.guest.wait_for_writes();
        assert!(!self.guest.was_told(Told::Committed));
        let told = self.guest.told();
        assert!(told.is_empty() || told == WENT_ON, "{told:?}");
    }

    /// The guest was handed over and stands still here.
    #[track_caller]
    fn gave_away(&self, phase: Phase, words: &[&str]) {
        self.says(phase, words);
        assert!(!self.guest.runs());
        assert_eq!(self.guest.told(), HANDED_OVER);
    }

    /// The guest was handed over and came back.
    #[track_caller]
    fn came_back(&self, words: &[&str]) {
        self.says(Phase::Failed, words);
        self.guest.wait_for_writes();
        let told = [Told::Pause, Told::Save, Told::Release, Told::Committed, Told::Reacquire, Told::Resume];
        assert_eq!(self.guest.told(), told);
    }

    #[track_caller]
    fn says(&self, phase: Phase, words: &[&str]) {
        let error = self.ended.error.clone().unwrap_or_default();
        assert_eq!(self.ended.phase, phase, "{error}");
        for word in words {
            assert!(error.contains(word), "{word:?} is not in {error:?}");
        }
        assert!(!self.guest.log().is_armed(), "the log was not stopped");
        assert_eq!(self.guest.log().misused(), None);
        assert!(!self.ended.resume_failed);
        assert_eq!(self.events.last(), Some(&Event::Ended(self.ended.clone())));
    }

    fn warned(&self, word: &str) -> bool {
        self.events.iter().any(|event| matches!(event, Event::Warning(what) if what.contains(word)))
    }
}

#[test]
fn cut_before_loaded() {
    let sent = send_to(settings(), async |mut hand, _, _| hand.take_all().await);
    sent.stayed(Phase::Failed, &["lost before the hand-over"]);
}

#[test]
fn refused_after_everything_was_sent() {
    let sent = send_to(settings(), async |mut hand, _, _| {
        hand.take_all().await;
        hand.say(Message::Refused("the disk is full".into())).await;
    });
    sent.stayed(Phase::Failed, &["the destination refused: the disk is full"]);
}

#[test]
fn loaded_and_cut_before_go_is_read() {
    let sent = send_to(settings(), async |mut hand, _, _| {
        hand.take_all().await;
        hand.say(Message::Loaded { verified: true }).await;
    });
    // Go may have left, or not: only before it was committed may the guest go on.
    match sent.ended.phase {
        Phase::Unconfirmed => sent.gave_away(Phase::Unconfirmed, &["look at the destination"]),
        _ => sent.stayed(Phase::Failed, &["lost"]),
    }
}

#[test]
fn cut_after_go() {
    let sent = send_to(settings(), async |mut hand, _, _| {
        hand.take_all().await;
        hand.say(Message::Loaded { verified: true }).await;
        assert_eq!(hand.hear().await, Some(Message::Go(RunState::Running)));
    });
    let words = ["lost after Go", "stays paused here", "look at the destination", "only if it does not run there"];
    sent.gave_away(Phase::Unconfirmed, &words);
    assert_eq!(sent.ended.verified, Some(true));
}

#[test]
fn running_completes_it() {
    let sent = send_to(settings(), async |mut hand, guest, _| {
        hand.take_all().await;
        assert!(!guest.runs() && !guest.was_told(Told::Committed));
        hand.say(Message::Loaded { verified: true }).await;
        assert_eq!(hand.hear().await, Some(Message::Go(RunState::Running)));
        assert!(guest.was_told(Told::Committed));
        hand.say(Message::Running).await;
        assert_eq!(hand.hear().await, None, "nothing follows Go");
    });
    sent.gave_away(Phase::Completed, &[]);
    assert_eq!(sent.ended.error, None);
}

#[test]
fn an_abort_that_crosses_go_brings_the_guest_back() {
    let sent = send_to(settings(), async |mut hand, _, _| {
        hand.take_all().await;
        hand.say(Message::Loaded { verified: true }).await;
        hand.say(Message::Abort("its operator cancelled".into())).await;
        hand.hear_until(Kind::Abort).await;
    });
    sent.came_back(&["before it began to start the guest", "its operator cancelled"]);
}

#[test]
fn a_start_that_fails_leaves_the_guest_paused() {
    let sent = send_to(settings(), async |mut hand, _, _| {
        hand.take_all().await;
        hand.say(Message::Loaded { verified: true }).await;
        hand.hear_until(Kind::Go).await;
        hand.say(Message::StartFailed("no such device".into())).await;
        hand.hear().await;
    });
    sent.gave_away(
        Phase::Unconfirmed,
        &["began to start the guest and failed: no such device", "look at the destination"],
    );
}

#[test]
fn running_before_go_leaves_the_guest_paused() {
    for early in [Message::Running, Message::StartFailed("oh".into())] {
        let sent = send_to(settings(), async |mut hand, _, _| {
            hand.take_all().await;
            hand.say(early).await;
            assert_eq!(hand.hear_until(Kind::Go).await, None, "it is not told to run");
        });
        sent.says(Phase::Unconfirmed, &["before it was told to", "look at the destination"]);
        assert!(!sent.guest.runs() && !sent.guest.was_told(Told::Resume));
    }
}

/// Its word counts even if its connection breaks in the same moment, and the sender notices that first.
#[test]
fn running_said_in_the_pause_is_heard_though_the_connection_breaks() {
    let sent = send_to(settings(), async |mut hand, _, _| {
        hand.agree().await;
        hand.hear_until(Kind::End).await;
        hand.say(Message::Loaded { verified: true }).await;
        hand.say(Message::Running).await;
    });
    // Running after Loaded answers a Go that may be on its way.
    sent.gave_away(Phase::Completed, &[]);
}

#[test]
fn silence_before_loaded_and_after_go() {
    let sent = send_to(impatient(), async |mut hand, _, _| {
        hand.take_all().await;
        assert!(matches!(hand.hear().await, Some(Message::Abort(why)) if why.contains("in time")));
        std::future::pending().await
    });
    sent.stayed(Phase::Failed, &["did not report that everything is loaded in time"]);
    let sent = send_to(impatient(), async |mut hand, _, _| {
        hand.take_all().await;
        hand.say(Message::Loaded { verified: true }).await;
        hand.hear_until(Kind::Go).await;
        std::future::pending().await
    });
    sent.gave_away(Phase::Unconfirmed, &["did not confirm that the guest runs in time", "look at the destination"]);
}

#[test]
fn loaded_without_the_comparison_that_was_asked_for() {
    let sent = send_to(settings(), async |mut hand, _, _| {
        hand.take_all().await;
        hand.say(Message::Loaded { verified: false }).await;
        assert!(matches!(hand.hear().await, Some(Message::Abort(_))), "no Go");
    });
    sent.stayed(Phase::Failed, &["did not compare digests"]);
    assert_ne!(sent.ended.verified, Some(true));
}

#[test]
fn page_hashes_make_the_source_name_the_page() {
    let sent = send_to(settings(), async |mut hand, guest, _| {
        hand.take_all().await;
        let memory = memferry::guest::Guest::memory(&*guest);
        let mut scratch = BufferPool::new(1, PageSize::DEFAULT.extent_bytes()).try_take().unwrap();
        let mut hashes = digest::page_hashes(&memory, 0, 1, &mut scratch).unwrap();
        hashes[77] ^= 1;
        hashes[78] ^= 1;
        hand.say(Message::PageHashes { first: PageAt { block: 0, page: 512 }, hashes }).await;
        hand.say(Message::Refused("block \"ram0\" differs".into())).await;
        hand.hear_until(Kind::Abort).await;
    });
    sent.stayed(Phase::Failed, &["block \"ram0\" differs", "page 589 of block \"ram0\"", "0x24d000"]);
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
            hand.say(Message::PageHashes { first, hashes: vec![1; 512] }).await;
            hand.say(Message::Refused("it differs".into())).await;
            hand.hear_until(Kind::Abort).await;
        });
        sent.stayed(Phase::Failed, &[word]);
    }
}

#[test]
fn messages_that_make_no_sense_leave_the_guest_here() {
    let strange: [fn() -> Message; 4] = [
        || Message::Ready,
        || Message::Accept(vec![]),
        || Message::Go(RunState::Running),
        || Message::End { run_state: RunState::Running, frames: 0 },
    ];
    for strange in strange {
        let sent = send_to(settings(), async |mut hand, _, _| {
            hand.take_all().await;
            hand.say(strange()).await;
            hand.hear_until(Kind::Abort).await;
        });
        sent.stayed(Phase::Failed, &[strange().kind().name(), "out of turn"]);
    }
}

#[test]
fn garbage_on_the_return_path_leaves_the_guest_here_before_go_and_paused_after_it() {
    let sent = send_to(settings(), async |mut hand, _, _| {
        hand.take_all().await;
        hand.send(&[0x5a; 64]).await;
        hand.hear_until(Kind::Abort).await;
    });
    sent.stayed(Phase::Failed, &["frame at byte", "damaged"]);
    let sent = send_to(settings(), async |mut hand, _, _| {
        hand.take_all().await;
        hand.say(Message::Loaded { verified: true }).await;
        hand.hear_until(Kind::Go).await;
        hand.send(&[0x5a; 64]).await;
        hand.hear().await;
    });
    sent.gave_away(Phase::Unconfirmed, &["frame at byte", "look at the destination"]);
}

#[test]
fn more_acknowledged_than_was_sent() {
    let sent = send_to(settings(), async |mut hand, _, _| {
        hand.agree().await;
        let frames = vec![1 << 40];
        hand.say(Message::Progress(memferry_stages::wire::messages::Progress { bytes: 1, frames })).await;
        hand.hear_until(Kind::Abort).await;
    });
    sent.stayed(Phase::Failed, &["lane 0", "acknowledged"]);
}

// ---- cancel at the source, at each point ----

#[test]
fn cancel_before_anyone_listens() {
    let guest = TestGuest::source(PageSize::DEFAULT, &[LENGTH]).running(1);
    let ended = block_on(async {
        let cancel = CancellationToken::new();
        let transport = Arc::new(MemoryTransport::new(64 << 10));
        let sending = run::source(guest.clone(), transport, settings(), Arc::default(), cancel.clone());
        let cancelling = async {
            tokio::time::sleep(Duration::from_millis(30)).await;
            cancel.cancel();
        };
        tokio::join!(sending, cancelling).0
    });
    assert_eq!(ended.phase, Phase::Cancelled);
    guest.wait_for_writes();
    assert_eq!(guest.told(), []);
}

#[test]
fn cancel_while_it_is_agreed() {
    for point in [Kind::Hello, Kind::Blocks] {
        let sent = send_to(settings(), async |mut hand, _, cancel| {
            hand.hear_until(Kind::Hello).await;
            if point == Kind::Blocks {
                hand.say(Message::Accept(vec![])).await;
                hand.hear_until(Kind::Blocks).await;
            }
            cancel.cancel();
            assert_eq!(hand.hear_until(Kind::End).await, None);
        });
        sent.stayed(Phase::Cancelled, &["cancelled"]);
    }
}

#[test]
fn cancel_in_the_first_round() {
    let sent = send_to(settings(), async |mut hand, guest, cancel| {
        hand.agree().await;
        cancel.cancel();
        assert_eq!(hand.hear_until(Kind::Abort).await, Some(Message::Abort("cancelled at the source".into())));
        assert!(guest.runs(), "the guest goes on before anything else");
    });
    sent.stayed(Phase::Cancelled, &["cancelled"]);
    assert_eq!(sent.guest.told(), [], "it was never paused");
}

#[test]
fn cancel_while_the_guest_is_paused_and_nobody_reads() {
    let sent = send_to(settings(), async |mut hand, guest, cancel| {
        hand.agree().await;
        hand.hear_until(Kind::RoundComplete).await;
        // Nothing is read on: the rest waits in the transport, and the source for room.
        while !guest.was_told(Told::Release) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        cancel.cancel();
        tokio::time::sleep(HANG).await;
    });
    sent.stayed(Phase::Cancelled, &["cancelled"]);
    assert_eq!(sent.guest.told(), WENT_ON);
}

#[test]
fn cancel_while_loaded_is_awaited() {
    let sent = send_to(settings(), async |mut hand, _, cancel| {
        hand.take_all().await;
        cancel.cancel();
        assert!(matches!(hand.hear().await, Some(Message::Abort(_))), "no Go");
    });
    sent.stayed(Phase::Cancelled, &["cancelled"]);
}

#[test]
fn cancel_after_go_is_too_late() {
    let sent = send_to(settings(), async |mut hand, _, cancel| {
        hand.take_all().await;
        hand.say(Message::Loaded { verified: true }).await;
        hand.hear_until(Kind::Go).await;
        cancel.cancel();
        tokio::time::sleep(Duration::from_millis(50)).await;
        hand.say(Message::Running).await;
        hand.hear().await;
    });
    sent.gave_away(Phase::Completed, &[]);
    assert!(sent.warned("too late"));
    let sent = send_to(settings(), async |mut hand, _, cancel| {
        hand.take_all().await;
        hand.say(Message::Loaded { verified: true }).await;
        hand.hear_until(Kind::Go).await;
        cancel.cancel();
        tokio::time::sleep(Duration::from_millis(50)).await;
    });
    sent.gave_away(Phase::Unconfirmed, &["lost after Go"]);
}

// ---- the destination, against a source played by hand ----

/// How a destination ended.
struct Received {
    ended: Ended,
    guest: Arc<TestGuest>,
    events: Vec<(Role, Event)>,
}

/// Runs a destination against whatever `play` does with a recorded stream and a connection; it is cut when `play` returns.
fn receive_from(
    guest: TestGuest,
    settings: DestinationSettings,
    play: impl AsyncFnOnce(Hand, Recording, CancellationToken),
) -> Received {
    let guest = Arc::new(guest);
    block_on(async {
        let recording =
            Recording::of(TestGuest::source(PageSize::DEFAULT, &[LENGTH]).running(0), self::settings()).await;
        let (transport, cancel) = (MemoryTransport::new(64 << 10), CancellationToken::new());
        let listener = transport.listen().await.unwrap();
        let recorder = Arc::new(Recorder::default());
        let peer = async {
            let hand = Hand::connect(&transport).await;
            play(hand, recording, cancel.clone()).await;
            std::future::pending().await
        };
        let ended = tokio::select! {
            ended = run::destination(guest.clone(), listener, settings, recorder.clone(), cancel.clone()) => ended,
            () = peer => unreachable!("it waits for ever"),
        };
        Received { ended, guest: guest.clone(), events: recorder.events() }
    })
}

impl Received {
    /// Nothing was started; the error says all of `words`.
    #[track_caller]
    fn stayed_off(&self, phase: Phase, words: &[&str]) {
        self.says(phase, words);
        assert!(!self.guest.was_told(Told::Start) && !self.guest.runs());
    }

    #[track_caller]
    fn says(&self, phase: Phase, words: &[&str]) {
        let error = self.ended.error.clone().unwrap_or_default();
        assert_eq!(self.ended.phase, phase, "{error}");
        for word in words {
            assert!(error.contains(word), "{word:?} is not in {error:?}");
        }
        assert_eq!(self.events.last(), Some(&(Role::Destination, Event::Ended(self.ended.clone()))));
    }

    fn starts(&self) -> usize {
        self.guest.told().iter().filter(|&&told| told == Told::Start).count()
    }
}

const LOADED: Option<Message> = Some(Message::Loaded { verified: true });

async fn send_all(hand: &mut Hand, recording: &Recording) {
    hand.send(&recording.bytes()).await;
    assert_eq!(hand.hear().await, Some(Message::Accept(vec![])));
    assert_eq!(hand.hear().await, Some(Message::Ready));
}

#[test]
fn go_starts_the_guest_once_and_running_follows() {
    let received = receive_from(TestGuest::destination(), destination_settings(), async |mut hand, recording, _| {
        send_all(&mut hand, &recording).await;
        assert_eq!(hand.hear().await, LOADED);
        hand.say(Message::Go(RunState::Running)).await;
        hand.say(Message::Go(RunState::Running)).await;
        assert_eq!(hand.hear().await, Some(Message::Running));
        assert_eq!(hand.hear().await, None);
    });
    received.says(Phase::Completed, &[]);
    assert_eq!(received.guest.told(), [Told::Build, Told::Prepare, Told::Start]);
}

#[test]
fn go_may_say_that_the_guest_stays_paused() {
    let received = receive_from(TestGuest::destination(), destination_settings(), async |mut hand, recording, _| {
        send_all(&mut hand, &recording).await;
        hand.hear().await;
        hand.say(Message::Go(RunState::Paused)).await;
        hand.hear().await;
    });
    received.says(Phase::Completed, &[]);
    assert!(received.starts() == 1 && !received.guest.runs());
}

#[test]
fn the_source_cut_before_go() {
    let received = receive_from(TestGuest::destination(), destination_settings(), async |mut hand, recording, _| {
        send_all(&mut hand, &recording).await;
        assert_eq!(hand.hear().await, LOADED);
    });
    received.stayed_off(Phase::Failed, &["before Go", "not started here"]);
}

#[test]
fn the_source_gone_right_after_go_is_told_nothing_and_the_guest_runs() {
    let received = receive_from(TestGuest::destination(), destination_settings(), async |mut hand, recording, _| {
        send_all(&mut hand, &recording).await;
        assert_eq!(hand.hear().await, LOADED);
        hand.say(Message::Go(RunState::Running)).await;
    });
    received.says(Phase::Completed, &[]);
    assert!(received.starts() == 1 && received.guest.runs());
}

#[test]
fn abort_instead_of_go() {
    let received = receive_from(TestGuest::destination(), destination_settings(), async |mut hand, recording, _| {
        send_all(&mut hand, &recording).await;
        hand.hear().await;
        hand.say(Message::Abort("second thoughts".into())).await;
        hand.say(Message::Go(RunState::Running)).await;
        assert!(matches!(hand.hear().await, Some(Message::Abort(_))));
    });
    received.stayed_off(Phase::Failed, &["the source gave up: second thoughts"]);
}

#[test]
fn go_before_the_end() {
    for before in [Kind::Pages, Kind::Switchover, Kind::End] {
        let received =
            receive_from(TestGuest::destination(), destination_settings(), async |mut hand, recording, _| {
                hand.send(&recording.frames[..recording.first(before)].concat()).await;
                hand.say(Message::Go(RunState::Running)).await;
                assert!(matches!(hand.hear_until(Kind::Abort).await, Some(Message::Abort(why)) if why.contains("Go")));
            });
        received.stayed_off(Phase::Failed, &["Go came out of turn"]);
    }
}

#[test]
fn no_go_in_time() {
    let settings = DestinationSettings { handover_timeout: Duration::from_millis(400), ..destination_settings() };
    let received = receive_from(TestGuest::destination(), settings, async |mut hand, recording, _| {
        send_all(&mut hand, &recording).await;
        assert_eq!(hand.hear().await, LOADED);
        assert!(matches!(hand.hear().await, Some(Message::Abort(why)) if why.contains("in time")));
        hand.say(Message::Go(RunState::Running)).await;
    });
    received.stayed_off(Phase::Failed, &["Go did not come in time"]);
}

#[test]
fn something_else_instead_of_go() {
    let received = receive_from(TestGuest::destination(), destination_settings(), async |mut hand, recording, _| {
        send_all(&mut hand, &recording).await;
        hand.hear().await;
        hand.send(&[0xa5; 40]).await;
        hand.say(Message::Go(RunState::Running)).await;
        hand.hear_until(Kind::Abort).await;
    });
    received.stayed_off(Phase::Failed, &["frame at byte"]);
}

#[test]
fn a_destination_that_fails_to_prepare_or_to_start() {
    let failing = |fails| TestGuest::destination().failing(fails);
    let guest = failing(Fails { prepare: true, ..Fails::default() });
    let received = receive_from(guest, destination_settings(), async |mut hand, recording, _| {
        send_all(&mut hand, &recording).await;
        assert!(matches!(hand.hear().await, Some(Message::Refused(why)) if why.contains("at prepare")));
        hand.say(Message::Go(RunState::Running)).await;
    });
    received.stayed_off(Phase::Failed, &["at prepare"]);

    let guest = failing(Fails { start: true, ..Fails::default() });
    let received = receive_from(guest, destination_settings(), async |mut hand, recording, _| {
        send_all(&mut hand, &recording).await;
        hand.hear().await;
        hand.say(Message::Go(RunState::Running)).await;
        assert!(matches!(hand.hear().await, Some(Message::StartFailed(why)) if why.contains("at start")));
        assert_eq!(hand.hear().await, None, "a destination that began its start takes nothing back");
    });
    received.says(Phase::Failed, &["at start"]);
    assert_eq!(received.starts(), 1);
}

#[test]
fn a_source_that_does_not_say_what_it_sent() {
    let received = receive_from(TestGuest::destination(), destination_settings(), async |mut hand, recording, _| {
        let end = recording.first(Kind::End);
        hand.send(&recording.frames[..end].concat()).await;
        hand.say(Message::End { run_state: RunState::Running, frames: 3 }).await;
        hand.hear_until(Kind::Abort).await;
    });
    received.stayed_off(Phase::Failed, &["the end mark says 3"]);
}

#[test]
fn digests_left_out_or_wrong() {
    let received = receive_from(TestGuest::destination(), destination_settings(), async |mut hand, recording, _| {
        let frames = recording.frames.iter().filter(|frame| frame[0] != Kind::Digests as u8).cloned();
        hand.send(&frames.collect::<Vec<_>>().concat()).await;
        assert!(matches!(hand.hear_until(Kind::Refused).await, Some(Message::Refused(_))));
    });
    received.stayed_off(Phase::Failed, &["verification failed", "\"ram0\""]);
    assert_eq!(received.ended.verified, Some(false));
}

#[test]
fn cancel_at_the_destination_at_each_point() {
    let never = TestGuest::destination;
    let received = receive_from(never(), destination_settings(), async |_hand, _, cancel| {
        cancel.cancel();
        std::future::pending().await
    });
    received.stayed_off(Phase::Cancelled, &["cancelled"]);
    for before in [Kind::State, Kind::Pages, Kind::End] {
        let received = receive_from(never(), destination_settings(), async |mut hand, recording, cancel| {
            hand.send(&recording.frames[..recording.first(before)].concat()).await;
            hand.hear_until(if before == Kind::State { Kind::Accept } else { Kind::Ready }).await;
            cancel.cancel();
            assert_eq!(hand.hear().await, Some(Message::Abort("cancelled at the destination".into())));
        });
        received.stayed_off(Phase::Cancelled, &["cancelled"]);
    }
    let received = receive_from(never(), destination_settings(), async |mut hand, recording, cancel| {
        send_all(&mut hand, &recording).await;
        assert_eq!(hand.hear().await, LOADED);
        cancel.cancel();
        assert_eq!(hand.hear().await, Some(Message::Abort("cancelled at the destination".into())));
        hand.say(Message::Go(RunState::Running)).await;
        std::future::pending().await
    });
    received.stayed_off(Phase::Cancelled, &["cancelled"]);
}

/// With a slow prepare the source may wait, cancel, or lose patience: the destination runs nothing.
#[test]
fn a_source_that_loses_patience_with_a_slow_destination() {
    let guest = TestGuest::destination().preparing_for(Duration::from_millis(600));
    let received = receive_from(guest, destination_settings(), async |mut hand, recording, _| {
        send_all(&mut hand, &recording).await;
        hand.say(Message::Abort("too slow".into())).await;
        let since = Instant::now();
        hand.hear_until(Kind::Abort).await;
        assert!(since.elapsed() < HANG);
    });
    received.stayed_off(Phase::Failed, &["the source gave up: too slow"]);
}
