//! The destination, against a source played by hand from a recorded stream.

use std::sync::Arc;
use std::time::Duration;

use memferry::events::{Ended, Event, Outcome, Role};
use memferry::settings::DestinationSettings;
use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::wire::messages::RunState;
use memferry_stages::wire::{Kind, Message};
use memferry_tests::guest::{Fails, GuestCall};
use memferry_tests::run::{self, destination_settings};
use memferry_tests::{Hand, Recorder, Recording, TestGuest};
use memferry_transports::Transport;
use memferry_transports::memory::MemoryTransport;
use tokio_util::sync::CancellationToken;

use super::{LENGTH, block_on, says};

/// The outcome of a destination.
pub(crate) struct Received {
    pub(crate) ended: Ended,
    guest: Arc<TestGuest>,
    events: Vec<(Role, Event)>,
}

/// Runs a destination against `play`, with a recorded stream and a connection, which is cut when `play` returns.
pub(crate) fn receive_from(
    guest: TestGuest,
    settings: DestinationSettings,
    play: impl AsyncFnOnce(Hand, Recording, CancellationToken),
) -> Received {
    let guest = Arc::new(guest);
    block_on(async {
        let recording =
            Recording::of(TestGuest::source(PageSize::DEFAULT, &[LENGTH]).running(0), super::settings()).await;
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
    /// Nothing was started; the error contains all of `words`.
    #[track_caller]
    pub(crate) fn stayed_off(&self, outcome: Outcome, words: &[&str]) {
        self.says(outcome, words);
        assert!(!self.guest.was_called(GuestCall::Start) && !self.guest.runs());
    }

    #[track_caller]
    fn says(&self, outcome: Outcome, words: &[&str]) {
        let last = self.events.last().filter(|(role, _)| *role == Role::Destination);
        says(&self.ended, last.map(|(_, event)| event), outcome, words);
    }

    fn starts(&self) -> usize {
        self.guest.calls().iter().filter(|&&call| call == GuestCall::Start).count()
    }
}

const LOADED: Option<Message> = Some(Message::Loaded { verified: true });

pub(crate) async fn send_all(hand: &mut Hand, recording: &Recording) {
    hand.send(&recording.bytes()).await;
    assert_eq!(hand.hear().await, Some(Message::Accept { waits_ms: 0 }));
    assert_eq!(hand.hear().await, Some(Message::Ready));
}

#[test]
fn go_starts_the_guest_once_and_running_follows() {
    let received = receive_from(TestGuest::destination(), destination_settings(), async |mut hand, recording, _| {
        send_all(&mut hand, &recording).await;
        assert_eq!(hand.hear().await, LOADED);
        hand.send_message(Message::Go(RunState::Running)).await;
        hand.send_message(Message::Go(RunState::Running)).await;
        assert_eq!(hand.hear().await, Some(Message::Running));
        assert_eq!(hand.hear().await, None);
    });
    received.says(Outcome::Completed, &[]);
    assert_eq!(received.guest.calls(), [GuestCall::Build, GuestCall::Prepare, GuestCall::Start]);
}

#[test]
fn go_may_say_that_the_guest_stays_paused() {
    let received = receive_from(TestGuest::destination(), destination_settings(), async |mut hand, recording, _| {
        send_all(&mut hand, &recording).await;
        hand.hear().await;
        hand.send_message(Message::Go(RunState::Paused)).await;
        hand.hear().await;
    });
    received.says(Outcome::Completed, &[]);
    assert!(received.starts() == 1 && !received.guest.runs());
}

#[test]
fn the_source_cut_before_go() {
    let received = receive_from(TestGuest::destination(), destination_settings(), async |mut hand, recording, _| {
        send_all(&mut hand, &recording).await;
        assert_eq!(hand.hear().await, LOADED);
    });
    received.stayed_off(Outcome::Failed, &["before Go", "not started here"]);
}

#[test]
fn the_source_gone_right_after_go_is_sent_nothing_and_the_guest_runs() {
    let received = receive_from(TestGuest::destination(), destination_settings(), async |mut hand, recording, _| {
        send_all(&mut hand, &recording).await;
        assert_eq!(hand.hear().await, LOADED);
        hand.send_message(Message::Go(RunState::Running)).await;
    });
    received.says(Outcome::Completed, &[]);
    assert!(received.starts() == 1 && received.guest.runs());
}

#[test]
fn abort_instead_of_go() {
    let received = receive_from(TestGuest::destination(), destination_settings(), async |mut hand, recording, _| {
        send_all(&mut hand, &recording).await;
        hand.hear().await;
        hand.send_message(Message::Abort("second thoughts".into())).await;
        hand.send_message(Message::Go(RunState::Running)).await;
        assert!(matches!(hand.hear().await, Some(Message::Abort(_))));
    });
    received.stayed_off(Outcome::Failed, &["the source gave up: second thoughts"]);
}

#[test]
fn go_before_the_end() {
    for before in [Kind::Pages, Kind::LaneEnds, Kind::End] {
        let received =
            receive_from(TestGuest::destination(), destination_settings(), async |mut hand, recording, _| {
                hand.send(&recording.frames[..recording.first(before)].concat()).await;
                hand.send_message(Message::Go(RunState::Running)).await;
                assert!(matches!(hand.hear_until(Kind::Abort).await, Some(Message::Abort(why)) if why.contains("Go")));
            });
        received.stayed_off(Outcome::Failed, &["unexpected message: Go"]);
    }
}

#[test]
fn no_go_in_time() {
    let settings = DestinationSettings { handover_timeout: Duration::from_millis(400), ..destination_settings() };
    let received = receive_from(TestGuest::destination(), settings, async |mut hand, recording, _| {
        send_all(&mut hand, &recording).await;
        assert_eq!(hand.hear().await, LOADED);
        assert!(matches!(hand.hear().await, Some(Message::Abort(why)) if why.contains("in time")));
        hand.send_message(Message::Go(RunState::Running)).await;
    });
    received.stayed_off(Outcome::Failed, &["Go did not come in time"]);
}

#[test]
fn something_else_instead_of_go() {
    let received = receive_from(TestGuest::destination(), destination_settings(), async |mut hand, recording, _| {
        send_all(&mut hand, &recording).await;
        hand.hear().await;
        hand.send(&[0xa5; 40]).await;
        hand.send_message(Message::Go(RunState::Running)).await;
        hand.hear_until(Kind::Abort).await;
    });
    received.stayed_off(Outcome::Failed, &["frame at byte"]);
}

#[test]
fn a_destination_that_fails_to_prepare_or_to_start() {
    let failing = |fails| TestGuest::destination().failing(fails);
    let guest = failing(Fails { prepare: true, ..Fails::default() });
    let received = receive_from(guest, destination_settings(), async |mut hand, recording, _| {
        send_all(&mut hand, &recording).await;
        assert!(matches!(hand.hear().await, Some(Message::Refused(why)) if why.contains("at prepare")));
        hand.send_message(Message::Go(RunState::Running)).await;
    });
    received.stayed_off(Outcome::Failed, &["at prepare"]);

    let guest = failing(Fails { start: true, ..Fails::default() });
    let received = receive_from(guest, destination_settings(), async |mut hand, recording, _| {
        send_all(&mut hand, &recording).await;
        hand.hear().await;
        hand.send_message(Message::Go(RunState::Running)).await;
        assert!(matches!(hand.hear().await, Some(Message::StartFailed(why)) if why.contains("at start")));
        assert_eq!(hand.hear().await, None, "a destination that began its start takes nothing back");
    });
    received.says(Outcome::Failed, &["at start"]);
    assert_eq!(received.starts(), 1);
}

#[test]
fn a_source_that_does_not_say_what_it_sent() {
    let received = receive_from(TestGuest::destination(), destination_settings(), async |mut hand, recording, _| {
        let end = recording.first(Kind::End);
        hand.send(&recording.frames[..end].concat()).await;
        hand.send_message(Message::End { run_state: RunState::Running, frames: 3 }).await;
        hand.hear_until(Kind::Abort).await;
    });
    received.stayed_off(Outcome::Failed, &["the end mark has 3"]);
}

#[test]
fn digests_left_out_or_wrong() {
    let received = receive_from(TestGuest::destination(), destination_settings(), async |mut hand, recording, _| {
        let frames = recording.frames.iter().filter(|frame| frame[0] != Kind::Digests as u8).cloned();
        hand.send(&frames.collect::<Vec<_>>().concat()).await;
        assert!(matches!(hand.hear_until(Kind::Refused).await, Some(Message::Refused(_))));
    });
    received.stayed_off(Outcome::Failed, &["verification failed", "\"ram0\""]);
    assert_eq!(received.ended.verified, Some(false));
}

#[test]
fn a_guest_that_is_built_otherwise_than_it_came_is_refused_before_any_page() {
    type Alters = fn(&mut Vec<BlockInfo>);
    let otherwise: [(Alters, &str); 5] = [
        (|blocks| blocks[0].length += 4096, "bytes at 0x0 was built"),
        (|blocks| blocks[0].length -= 1, "bytes at 0x0 was built"),
        (|blocks| blocks[0].id = "ram00".into(), "and \"ram00\" of "),
        (|blocks| blocks[0].guest_address = 4 << 30, "bytes at 0x100000000 was built"),
        (
            |blocks| blocks.push(BlockInfo { id: "more".into(), ..blocks[0].clone() }),
            "1 RAM blocks came and 2 were built",
        ),
    ];
    for (alters, words) in otherwise {
        let guest = TestGuest::destination().building(alters);
        let received = receive_from(guest, destination_settings(), async |mut hand, recording, _| {
            hand.send(&recording.bytes()).await;
            let said = hand.hear_until(Kind::Refused).await;
            assert!(matches!(&said, Some(Message::Refused(why)) if why.contains(words)), "{words:?}: {said:?}");
        });
        received.stayed_off(Outcome::Failed, &["the guest was built otherwise than it came", words]);
        assert_eq!(received.guest.calls(), [GuestCall::Build]);
    }
    // The kind of memory at the destination is the host's choice.
    let guest = TestGuest::destination().building(|blocks| blocks[0].backing_page_size = 2 << 20);
    let received = receive_from(guest, destination_settings(), async |mut hand, recording, _| {
        send_all(&mut hand, &recording).await;
        assert_eq!(hand.hear().await, LOADED);
    });
    received.stayed_off(Outcome::Failed, &[]);
}

#[test]
fn cancel_at_the_destination_at_each_point() {
    let never = TestGuest::destination;
    let received = receive_from(never(), destination_settings(), async |_hand, _, cancel| {
        cancel.cancel();
        std::future::pending().await
    });
    received.stayed_off(Outcome::Cancelled, &["cancelled"]);
    for before in [Kind::State, Kind::Pages, Kind::End] {
        let received = receive_from(never(), destination_settings(), async |mut hand, recording, cancel| {
            hand.send(&recording.frames[..recording.first(before)].concat()).await;
            hand.hear_until(if before == Kind::State { Kind::Accept } else { Kind::Ready }).await;
            cancel.cancel();
            assert_eq!(hand.hear().await, Some(Message::Abort("cancelled at the destination".into())));
        });
        received.stayed_off(Outcome::Cancelled, &["cancelled"]);
    }
    let received = receive_from(never(), destination_settings(), async |mut hand, recording, cancel| {
        send_all(&mut hand, &recording).await;
        assert_eq!(hand.hear().await, LOADED);
        cancel.cancel();
        assert_eq!(hand.hear().await, Some(Message::Abort("cancelled at the destination".into())));
        hand.send_message(Message::Go(RunState::Running)).await;
        std::future::pending().await
    });
    received.stayed_off(Outcome::Cancelled, &["cancelled"]);
}

/// With a slow prepare the source may wait, cancel, or time out: the destination runs no guest.
#[test]
fn a_source_that_loses_patience_with_a_slow_destination() {
    let guest = TestGuest::destination().preparing_for(Duration::from_millis(600));
    let received = receive_from(guest, destination_settings(), async |mut hand, recording, _| {
        send_all(&mut hand, &recording).await;
        hand.send_message(Message::Abort("too slow".into())).await;
        hand.hear_until(Kind::Abort).await;
    });
    received.stayed_off(Outcome::Failed, &["the source gave up: too slow"]);
}
