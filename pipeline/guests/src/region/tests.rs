//! Regions that are written all the time, with sends that succeed and sends that fail.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use memferry_transports::memory::MemoryTransport;
use tokio_util::sync::CancellationToken;

use super::*;
use memferry::events::{Event, Observer, Phase, Role};
use memferry::guest::conformance::{Subject, check};
use memferry::guest::{GuestBuilder, GuestState};
use memferry::migration::RunsHere;
use memferry_stages::geometry::BlockInfo;

const BYTES: usize = (8 << 20) + 100;

/// Increments many counters under one access: the state, and 64 pages. Records the last acknowledged count.
fn count_in(region: Region, stop: Arc<AtomicBool>) -> JoinHandle<(u64, Option<Gone>)> {
    thread::spawn(move || {
        let mut acknowledged = 0;
        while !stop.load(Ordering::Relaxed) {
            let mut access = match region.access() {
                Ok(access) => access,
                Err(gone) => return (acknowledged, Some(gone)),
            };
            let next = counts(&access) + 1;
            for place in 0..64 {
                access.write(place * 131_001, &next.to_le_bytes());
            }
            access.set_state("count", next.to_le_bytes().to_vec());
            drop(access);
            acknowledged = next;
            thread::sleep(Duration::from_micros(50));
        }
        (acknowledged, None)
    })
}

/// The count, which is the same in every place.
fn counts(access: &Access<'_>) -> u64 {
    let state = access.state("count").map_or(0, |bytes| u64::from_le_bytes(bytes.try_into().unwrap()));
    for place in 0..64 {
        assert_eq!(u64::from_le_bytes(access.load(place * 131_001)), state, "place {place}");
    }
    state
}

/// Sends a region; `hook` sees the source's events.
fn send(
    region: &Region,
    hook: impl Fn(&Event) + Send + Sync + 'static,
    cancel: &CancellationToken,
) -> (Result<Sent, SendError>, Option<Region>) {
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let transport = Arc::new(MemoryTransport::new(1 << 16));
        let listener = transport.listen().await.unwrap();
        let watch = move |_: Role, event: &Event| hook(event);
        let watched = Observers::new(Role::Source, vec![Arc::new(watch) as Arc<dyn Observer>]);
        // A limit that a busy machine can meet.
        let settings = SourceSettings { downtime_limit: Duration::from_secs(20), ..SourceSettings::default() };
        let sending = region.send(transport, settings, watched, cancel.clone());
        let settings = DestinationSettings::default();
        let receiving = Region::receive(listener, BYTES, settings, Observers::none(Role::Destination), cancel.clone());
        let (sent, received) = tokio::join!(sending, receiving);
        (sent, received.ok())
    })
}

#[test]
fn every_acknowledged_write_is_there_after_a_move() {
    let (region, stop) = (Region::new(BYTES).unwrap(), Arc::new(AtomicBool::new(false)));
    println!("tracked by {:?}", region.tracking());
    let writers = [(); 3].map(|()| count_in(region.clone(), stop.clone()));
    while counts(&region.access().unwrap()) < 10 {
        thread::sleep(Duration::from_millis(1));
    }
    let (sent, received) = send(&region, |_| (), &CancellationToken::new());
    assert_eq!(sent.unwrap().guest_runs_here(), RunsHere::Elsewhere);
    let ends = writers.map(|writer| writer.join().unwrap());
    assert!(ends.iter().all(|end| end.1 == Some(Gone::Moved)), "{ends:?}");
    let there = received.unwrap();
    let last = ends.iter().map(|end| end.0).max().unwrap();
    assert_eq!(counts(&there.access().unwrap()), last);
    assert!(last >= 10, "{last}");
    // It runs there, and can be moved again.
    let writer = count_in(there.clone(), stop);
    let (sent, received) = send(&there, |_| (), &CancellationToken::new());
    assert_eq!(sent.unwrap().guest_runs_here(), RunsHere::Elsewhere);
    assert_eq!(counts(&received.unwrap().access().unwrap()), writer.join().unwrap().0);
}

#[test]
fn after_a_cancel_the_writers_continue() {
    let (region, stop) = (Region::new(BYTES).unwrap(), Arc::new(AtomicBool::new(false)));
    let writer = count_in(region.clone(), stop.clone());
    for at in [Event::Phase(Phase::Active), Event::Phase(Phase::Switchover), Event::Paused] {
        let cancel = CancellationToken::new();
        let token = cancel.clone();
        let (sent, received) = send(
            &region,
            move |event| {
                if *event == at {
                    token.cancel()
                }
            },
            &cancel,
        );
        assert!(matches!(sent, Err(SendError::Migration(migration::SendError::Cancelled { .. }))), "{sent:?}");
        assert!(received.is_none());
        let before = counts(&region.access().unwrap());
        while counts(&region.access().unwrap()) == before {
            thread::sleep(Duration::from_millis(1));
        }
    }
    stop.store(true, Ordering::Relaxed);
    assert_eq!(writer.join().unwrap().1, None);
    let (sent, received) = send(&region, |_| (), &CancellationToken::new());
    assert_eq!(sent.unwrap().guest_runs_here(), RunsHere::Elsewhere);
    counts(&received.unwrap().access().unwrap());
    let again = tokio::runtime::Runtime::new().unwrap().block_on(region.send(
        Arc::new(MemoryTransport::new(1)),
        SourceSettings::default(),
        Observers::none(Role::Source),
        CancellationToken::new(),
    ));
    assert!(matches!(again, Err(SendError::Gone(Gone::Moved))));
}

#[test]
fn a_handover_that_nobody_confirms_is_opened_by_hand_only() {
    let store = Store::new(4096, PageSize::DEFAULT, RunState::Running).unwrap();
    store.pause();
    store.conclude(Gone::Unconfirmed);
    let region = Region { store: Arc::new(store) };
    assert_eq!(region.access().err(), Some(Gone::Unconfirmed));
    region.reopen();
    assert!(region.access().is_ok());
}

#[test]
#[should_panic(expected = "8 bytes at 4089 in memory of 4096 bytes")]
fn a_write_beyond_the_end_is_refused() {
    Region::new(4096).unwrap().access().unwrap().write(4089, &[1; 8]);
}

struct Regions;

impl Subject for Regions {
    type Guest = RegionGuest;

    fn source(&self) -> Arc<RegionGuest> {
        let store = Store::new(BYTES, PageSize::DEFAULT, RunState::Running).unwrap();
        writing(RegionGuest { store: Arc::new(store) })
    }

    fn destination(&self) -> impl GuestBuilder<Built = RegionGuest> {
        |page_size: PageSize, blocks: &[BlockInfo], setup: &GuestState| {
            RegionGuest::build(BYTES, page_size, blocks, setup).map(writing)
        }
    }
}

/// A region with a program that writes it, wherever it is.
fn writing(guest: RegionGuest) -> Arc<RegionGuest> {
    let guest = Arc::new(guest);
    let program = Arc::downgrade(&guest);
    thread::spawn(move || {
        for count in 0_u64.. {
            let Some(store) = program.upgrade().map(|guest| guest.store.clone()) else { break };
            if store.run_state() == RunState::Running
                && let Ok(mut access) = store.access()
            {
                let page = usize::try_from(count * 7 % 2000).unwrap();
                access.write(page * 4096, &count.to_le_bytes());
                access.set_state("page", page.to_le_bytes().to_vec());
            }
            thread::sleep(Duration::from_micros(100));
        }
    });
    guest
}

#[test]
fn a_region_is_a_guest_as_it_should_be() {
    check(&Regions).unwrap();
}
