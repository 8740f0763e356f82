//! A peer that is silent while its connections stay open: stopped, hanging, or behind a network that delivers nothing
//! more.

use std::sync::Arc;
use std::time::Duration;

use memferry::events::Outcome;
use memferry::settings::{DestinationSettings, LEAST_PEER_TIMEOUT, SourceSettings};
use memferry_stages::geometry::PageSize;
use memferry_stages::wire::messages::RunState;
use memferry_stages::wire::{Kind, Message};
use memferry_tests::guest::GuestCall;
use memferry_tests::run::{self, destination_settings};
use memferry_tests::{Hand, TestGuest, Trouble};
use memferry_transports::Transport;
use memferry_transports::memory::{Direction, MemoryTransport};
use tokio::io::AsyncWriteExt;
use tokio_util::sync::CancellationToken;

use super::destination::{receive_from, send_all};
use super::source::send_to;
use super::{HANG, LENGTH, block_on, settings};

/// The words of the error about a silent peer.
const WORDS: [&str; 2] = ["was silent for 2s (peer_timeout)", "look whether its program runs"];

fn source_settings() -> SourceSettings {
    SourceSettings { peer_timeout: LEAST_PEER_TIMEOUT, ..settings() }
}

fn watchful() -> DestinationSettings {
    DestinationSettings { peer_timeout: LEAST_PEER_TIMEOUT, ..destination_settings() }
}

/// Sends heartbeats for longer than the timeout, and nothing else.
async fn live_on(hand: &mut Hand) {
    for _ in 0..10 {
        hand.send_message(Message::Heartbeat(Vec::new())).await;
        tokio::time::sleep(LEAST_PEER_TIMEOUT / 4).await;
    }
}

#[test]
fn before_go_the_source_guest_continues() {
    let sent = send_to(source_settings(), async |mut hand, _, _| {
        hand.hear_until(Kind::Hello).await;
        std::future::pending().await
    });
    sent.stayed(Outcome::Failed, &WORDS);
    let sent = send_to(source_settings(), async |mut hand, _, _| {
        hand.agree().await;
        std::future::pending().await
    });
    sent.stayed(Outcome::Failed, &WORDS);
    let sent = send_to(source_settings(), async |mut hand, _, _| {
        hand.take_all().await;
        assert!(matches!(hand.hear().await, Some(Message::Abort(why)) if why.contains(WORDS[0])));
        std::future::pending().await
    });
    sent.stayed(Outcome::Failed, &WORDS);
}

#[test]
fn after_go_the_source_guest_stays_paused() {
    let sent = send_to(source_settings(), async |mut hand, _, _| {
        hand.take_all().await;
        hand.send_message(Message::Loaded { verified: true }).await;
        hand.hear_until(Kind::Go).await;
        std::future::pending().await
    });
    sent.gave_away(Outcome::Unconfirmed, &[WORDS[0], "stays paused here", "look at the destination"]);
}

#[test]
fn a_destination_that_is_alive_is_waited_for() {
    let sent = send_to(source_settings(), async |mut hand, _, _| {
        hand.take_all().await;
        live_on(&mut hand).await;
        hand.send_message(Message::Refused("the disk is full".into())).await;
    });
    sent.stayed(Outcome::Failed, &["the disk is full"]);
}

#[test]
fn a_destination_starts_nothing_for_a_silent_source() {
    for until in [Kind::Blocks, Kind::End] {
        let received = receive_from(TestGuest::destination(), watchful(), async |mut hand, recording, _| {
            hand.send(&recording.frames[..recording.first(until)].concat()).await;
            assert!(matches!(hand.hear_until(Kind::Abort).await, Some(Message::Abort(why)) if why.contains(WORDS[0])));
            std::future::pending().await
        });
        received.stayed_off(Outcome::Failed, &WORDS);
    }
    let received = receive_from(TestGuest::destination(), watchful(), async |mut hand, recording, _| {
        send_all(&mut hand, &recording).await;
        std::future::pending().await
    });
    received.stayed_off(Outcome::Failed, &WORDS);
}

#[test]
fn a_source_that_is_alive_is_waited_for() {
    let received = receive_from(TestGuest::destination(), watchful(), async |mut hand, recording, _| {
        hand.send(&recording.frames[..recording.first(Kind::Blocks)].concat()).await;
        live_on(&mut hand).await;
        hand.send(&recording.frames[recording.first(Kind::Blocks)..].concat()).await;
        hand.hear_until(Kind::Loaded).await.expect("it loads everything");
        live_on(&mut hand).await;
        hand.send_message(Message::Go(RunState::Running)).await;
        assert_eq!(hand.hear().await, Some(Message::Running));
    });
    assert_eq!(received.ended.outcome, Outcome::Completed, "{:?}", received.ended.error);
}

/// Two ends over memory.
async fn both_ends(
    source: Arc<TestGuest>,
    settings: SourceSettings,
    destination: DestinationSettings,
    stall: bool,
) -> [(Outcome, String); 2] {
    let (transport, cancel) = (MemoryTransport::new(64 << 10), CancellationToken::new());
    let faults = transport.faults();
    let listener = transport.listen().await.unwrap();
    let receiving =
        run::destination(Arc::new(TestGuest::destination()), listener, destination, Arc::default(), cancel.clone());
    let sending = run::source(source, Arc::new(transport), settings, Arc::default(), cancel);
    let stalling = async {
        while stall && faults.delivered(Direction::ToDestination) < 100_000 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if stall {
            faults.stall(Direction::ToDestination);
            faults.stall(Direction::ToSource);
        }
    };
    let (sent, received, ()) = tokio::join!(sending, receiving, stalling);
    [sent, received].map(|ended| (ended.outcome, ended.error.unwrap_or_default()))
}

/// Acts as a network that delivers nothing more, and closes nothing. Each end is tried with a patient peer, for what the
/// other finds depends on which of them is the first to end.
#[test]
fn both_ends_notice_a_way_that_carries_nothing_more() {
    let source = TestGuest::source(PageSize::DEFAULT, &[LENGTH]).running(1);
    let slow = SourceSettings { max_bandwidth: Some(256 << 10), ..source_settings() };
    let patient = SourceSettings { peer_timeout: HANG, ..slow.clone() };
    let patient_destination = DestinationSettings { peer_timeout: HANG, ..watchful() };
    let [noticed, _] = block_on(both_ends(source.clone(), slow, patient_destination, true));
    let [_, noticed_too] = block_on(both_ends(source.clone(), patient, watchful(), true));
    for (outcome, error) in [noticed, noticed_too] {
        assert!(outcome == Outcome::Failed && WORDS.iter().all(|word| error.contains(word)), "{outcome:?}: {error}");
    }
    source.wait_for_writes();
    assert!(!source.was_called(GuestCall::Committed));
}

/// A log that takes longer to start than the peer's timeout, as that of a huge guest does.
#[test]
fn an_end_that_blocks_is_not_silent() {
    let slow = TestGuest::source(PageSize::DEFAULT, &[LENGTH]).troubled(Trouble::LogStartTakes(LEAST_PEER_TIMEOUT * 2));
    for (outcome, error) in block_on(both_ends(Arc::new(slow), source_settings(), watchful(), false)) {
        assert_eq!(outcome, Outcome::Completed, "{error}");
    }
}

/// A peer that reads one connection and sends heartbeats, but does not read the other.
#[test]
fn a_destination_that_takes_no_pages_is_not_waited_for_though_it_is_alive() {
    let guest = TestGuest::source(PageSize::DEFAULT, &[2 * LENGTH]).running(1);
    let settings =
        SourceSettings { lanes: 2, connections: 2, handover_timeout: LEAST_PEER_TIMEOUT, ..source_settings() };
    let ended = block_on(async {
        let transport = MemoryTransport::new(64 << 10);
        let mut listener = transport.listen().await.unwrap();
        let alive = async {
            let first = listener.accept_ready().await.unwrap();
            let _second = listener.accept_ready().await.unwrap();
            let (mut writer, mut reader) = (first.writer.unwrap(), first.reader.unwrap());
            tokio::spawn(async move { tokio::io::copy(&mut reader, &mut tokio::io::sink()).await });
            for message in [Message::Accept { waits_ms: 0 }, Message::Ready] {
                writer.write_all(&message.encode(0)).await.unwrap();
            }
            loop {
                drop(writer.write_all(&Message::Heartbeat(Vec::new()).encode(0)).await);
                tokio::time::sleep(LEAST_PEER_TIMEOUT / 4).await;
            }
        };
        let sending =
            run::source(guest.clone(), Arc::new(transport), settings, Arc::default(), CancellationToken::new());
        tokio::select! {
            ended = sending => ended,
            () = alive => unreachable!("it lives for ever"),
        }
    });
    let error = ended.error.unwrap_or_default();
    assert!(
        ended.outcome == Outcome::Failed && error.contains("has taken nothing for"),
        "{:?}: {error}",
        ended.outcome
    );
    guest.wait_for_writes();
}
