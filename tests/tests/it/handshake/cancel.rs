//! Cancels at the source at each point: its guest continues at once, until Go may have left.

use std::sync::Arc;
use std::time::Duration;

use memferry::events::{Event, Outcome, Role};
use memferry_stages::geometry::PageSize;
use memferry_stages::wire::{Kind, Message};
use memferry_tests::guest::GuestCall;
use memferry_tests::{Recorder, TestGuest, run};
use memferry_transports::memory::MemoryTransport;
use tokio_util::sync::CancellationToken;

use super::source::{RESUMED, send_to, send_watched};
use super::{HANG, LENGTH, block_on, settings};

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
    assert_eq!(ended.outcome, Outcome::Cancelled);
    guest.wait_for_writes();
    assert_eq!(guest.calls(), []);
}

#[test]
fn cancel_while_it_is_agreed() {
    for point in [Kind::Hello, Kind::Blocks] {
        let sent = send_to(settings(), async |mut hand, _, cancel| {
            hand.hear_until(Kind::Hello).await;
            if point == Kind::Blocks {
                hand.send_message(Message::Accept { waits_ms: 0 }).await;
                hand.hear_until(Kind::Blocks).await;
            }
            cancel.cancel();
            assert_eq!(hand.hear_until(Kind::End).await, None);
        });
        sent.stayed(Outcome::Cancelled, &["cancelled"]);
    }
}

#[test]
fn cancel_in_the_first_round() {
    let sent = send_to(settings(), async |mut hand, guest, cancel| {
        hand.agree().await;
        cancel.cancel();
        assert_eq!(hand.hear_until(Kind::Abort).await, Some(Message::Abort("cancelled at the source".into())));
        assert!(guest.runs(), "the guest continues before anything else");
    });
    sent.stayed(Outcome::Cancelled, &["cancelled"]);
    assert_eq!(sent.guest.calls(), [], "it was never paused");
}

#[test]
fn cancel_while_the_guest_is_paused_and_nobody_reads() {
    let sent = send_to(settings(), async |mut hand, guest, cancel| {
        hand.agree().await;
        hand.hear_until(Kind::RoundComplete).await;
        // Reading stops: the rest waits in the transport, and the source waits for room.
        while !guest.was_called(GuestCall::Release) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        cancel.cancel();
        tokio::time::sleep(HANG).await;
    });
    sent.stayed(Outcome::Cancelled, &["cancelled"]);
    assert_eq!(sent.guest.calls(), RESUMED);
}

#[test]
fn cancel_while_loaded_is_awaited() {
    let sent = send_to(settings(), async |mut hand, _, cancel| {
        hand.take_all().await;
        cancel.cancel();
        assert!(matches!(hand.hear().await, Some(Message::Abort(_))), "no Go");
    });
    sent.stayed(Outcome::Cancelled, &["cancelled"]);
}

#[test]
fn cancel_after_go_is_too_late() {
    for runs in [true, false] {
        let recorder = Arc::new(Recorder::default());
        let heard = recorder.clone();
        let sent = send_watched(settings(), recorder, async |mut hand, _, cancel| {
            hand.take_all().await;
            hand.send_message(Message::Loaded { verified: true }).await;
            hand.hear_until(Kind::Go).await;
            cancel.cancel();
            let too_late =
                |(_, event): (Role, Event)| matches!(event, Event::Warning(what) if what.contains("too late"));
            while !heard.events().into_iter().any(too_late) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            if runs {
                hand.send_message(Message::Running).await;
                hand.hear().await;
            }
        });
        if runs {
            sent.gave_away(Outcome::Completed, &[]);
        } else {
            sent.gave_away(Outcome::Unconfirmed, &["lost after Go"]);
        }
    }
}
