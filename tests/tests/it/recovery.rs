//! Lost connections in the middle of whole migrations, through a proxy that cuts, stalls, half-closes and refuses them:
//! nothing is lost, little is sent again, the guest runs meanwhile, and never do two run.
//!
//! A sample of random faults, which counts what the process holds as well, is the binary `recovery` beside this folder.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use memferry::events::{Event, Outages, Outcome, Phase, Role};
use memferry::settings::{EncoderSettings, LEAST_PEER_TIMEOUT, RecoverySettings};
use memferry_stages::geometry::PageSize;
use memferry_stages::tally::RoundTally;
use memferry_stages::wire::reader::{FrameReader, Incoming};
use memferry_stages::wire::{Hello, Kind, Message, Nonce, Proof, SessionId};
use memferry_tests::crossing::{Crossed, Crossing, RECOVERY, Underway, Way};
use memferry_tests::guest::GuestCall;
use memferry_tests::proxy::{Door, Fault, HELD, Plan, Step, When};
use memferry_tests::{Hand, TestGuest, sample};
use memferry_transports::memory::Direction;

/// No test here takes this long unless something hangs.
const HANG: Duration = Duration::from_secs(120);
/// Longer than any test.
const FOREVER: Duration = Duration::from_secs(3600);
/// Two blocks whose lengths are not multiples of a page, with work for four lanes.
const LENGTHS: [u64; 2] = [(9 << 20) + 100, 4097];
/// Bytes after which the first round is on its way, and far from its end.
const EARLY: u64 = 500_000;
/// The kinds of connections, and the number of lanes, each with a connection of its own.
const WAYS: [(Way, u16); 4] = [(Way::Tcp, 1), (Way::Tcp, 4), (Way::Unix, 1), (Way::Unix, 4)];
/// Recovery that soon gives up.
const SHORT: RecoverySettings = RecoverySettings { give_up: Duration::from_secs(1), ..RECOVERY };
/// The setting that an error names when an end gave up.
const GIVE_UP: &str = "recovery.give_up";

fn block_on<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async { tokio::time::timeout(HANG, test).await.expect("it hangs") })
}

/// A source with writers that never rest, and a destination.
fn guests() -> (Arc<TestGuest>, Arc<TestGuest>) {
    guests_of(&LENGTHS)
}

fn guests_of(lengths: &[u64]) -> (Arc<TestGuest>, Arc<TestGuest>) {
    let source = TestGuest::source(PageSize::DEFAULT, lengths).paced(Duration::from_micros(500)).running(2);
    (source, Arc::new(TestGuest::destination()))
}

/// A migration whose faults come after the first page.
async fn crossing(way: Way, lanes: u16, steps: &[Step]) -> Crossing {
    let plan = [&[Plan::FIRST_PAGE], steps].concat();
    let mut crossing = Crossing::new(way, lanes, Plan(plan)).await;
    crossing.source.max_rounds = 2;
    crossing
}

fn early(fault: Fault) -> Step {
    Step::new(When::Bytes(Direction::ToDestination, EARLY), fault)
}

/// The place of the first event of the source that a function accepts.
#[track_caller]
fn place(crossed: &Crossed, is_it: impl Fn(&Event) -> bool) -> usize {
    let found = crossed.events.iter().position(|(role, event)| *role == Role::Source && is_it(event));
    found.unwrap_or_else(|| panic!("no such event in {crossed:?}"))
}

#[track_caller]
fn says(error: Option<&String>, words: &str) {
    assert!(error.is_some_and(|error| error.contains(words)), "{words:?} is not in {error:?}");
}

// ---- the guest runs at the source ----

#[test]
fn undisturbed_nothing_is_lost() {
    for (way, lanes) in WAYS {
        let (source, destination) = guests();
        let crossed =
            block_on(async { crossing(way, lanes, &[]).await.run(source.clone(), destination.clone()).await });
        crossed.check_completed(&source, &destination);
        assert_eq!(crossed.source.outages, Outages::default());
        let there = crossed.destination.as_ref().expect("it does not wait for a source that has settled");
        assert_eq!(there.outages, Outages::default());
    }
}

#[test]
fn a_cut_in_the_first_round_is_survived() {
    for (way, lanes) in WAYS {
        let (source, destination) = guests();
        let crossed = block_on(async {
            crossing(way, lanes, &[early(Fault::Cut)]).await.run(source.clone(), destination.clone()).await
        });
        crossed.check_completed(&source, &destination);
        assert_eq!((crossed.source.outages.lost, crossed.proxy.breaks()), (1, 1), "{crossed:?}");
        // The cut is within a frame of pages, which is not loaded.
        assert!(crossed.source.outages.put_back_bytes > 0, "{crossed:?}");
        assert_eq!(crossed.source.outages.paused, Duration::ZERO);
        assert!(place(&crossed, |event| matches!(event, Event::Reconnected { attempt: 2, .. })) > 0);
    }
}

#[test]
fn three_cuts_in_a_row_are_survived() {
    for (way, lanes) in WAYS {
        let (source, destination) = guests();
        let cuts = [
            early(Fault::Cut).refusing(Door::Absent, Duration::from_millis(50)),
            // In the middle of the recovery itself, or right behind it.
            Step::new(When::Bytes(Direction::ToSource, 10), Fault::Cut),
            Step::new(When::Bytes(Direction::ToDestination, 1000), Fault::Cut)
                .refusing(Door::Closes, Duration::from_millis(50)),
        ];
        let crossed =
            block_on(async { crossing(way, lanes, &cuts).await.run(source.clone(), destination.clone()).await });
        crossed.check_completed(&source, &destination);
        assert_eq!(crossed.proxy.breaks(), 3, "{crossed:?}");
    }
}

/// An attempt ends whole, whichever of its connections is lost, and however.
#[test]
fn connections_that_die_at_different_times_end_one_attempt() {
    for fault in [Fault::CutOne, Fault::HalfClose] {
        let (source, destination) = guests();
        let crossed = block_on(async {
            crossing(Way::Tcp, 4, &[early(fault)]).await.run(source.clone(), destination.clone()).await
        });
        crossed.check_completed(&source, &destination);
        assert_eq!(crossed.source.outages.lost, 1, "{fault:?}: {crossed:?}");
    }
    let again = Step::new(When::Bytes(Direction::ToDestination, 0), Fault::CutOne);
    let (source, destination) = guests();
    let crossed = block_on(async {
        crossing(Way::Tcp, 4, &[early(Fault::CutOne), again, again])
            .await
            .run(source.clone(), destination.clone())
            .await
    });
    crossed.check_completed(&source, &destination);
    assert!(crossed.source.outages.lost >= 1, "{crossed:?}");
}

#[test]
fn the_return_path_alone_is_cut() {
    for fault in [Fault::Cut, Fault::HalfClose] {
        let (source, destination) = guests();
        let step = Step::new(When::Bytes(Direction::ToSource, 30), fault);
        let crossed = block_on(async {
            let crossing = crossing(Way::Unix, 1, &[early(Fault::Mark), step]).await;
            crossing.run(source.clone(), destination.clone()).await
        });
        crossed.check_completed(&source, &destination);
        assert_eq!(crossed.source.outages.lost, 1, "{fault:?}: {crossed:?}");
    }
}

/// A connection that delivers nothing more counts as lost after `peer_timeout`, and the guest is not lost with it.
#[test]
fn silence_ends_the_attempt_and_not_the_transfer() {
    for lanes in [1, 4] {
        let (source, destination) = guests();
        let crossed = block_on(async {
            let mut crossing = crossing(Way::Tcp, lanes, &[early(Fault::Stall(FOREVER))]).await;
            crossing.source.peer_timeout = LEAST_PEER_TIMEOUT;
            crossing.destination.peer_timeout = LEAST_PEER_TIMEOUT;
            let underway = crossing.begin(source.clone(), destination.clone());
            underway.until_disconnected().await;
            underway.proxy.release();
            underway.end().await
        });
        crossed.check_arrived(&source, &destination);
        assert!(crossed.source.outages.lost >= 1, "{crossed:?}");
    }
}

/// Bytes of one send buffer of a Unix socket, which counts everything that its reader has not read.
fn unix_buffer() -> u64 {
    let text = fs::read_to_string("/proc/sys/net/core/wmem_default").unwrap();
    text.trim().parse().unwrap()
}

/// The most page bytes that can be in flight: the extents in the queues of both ends, and what sockets and the proxy hold.
///
/// A lane holds at most, at the source: a batch at the scanner, 16 before the detector and one in it, 2 before the encoder and one
/// in it, 4 before the sender and one in it; at the destination: one in the receiver, 4 before the loader and one in it. That is 32.
/// Incompressible pages take as many bytes in a socket as in memory. A connection passes two sockets, the proxy and the reader's
/// buffer of 64 KiB, and a frame may lie partly in each of these.
fn in_flight_bound(lanes: u64) -> u64 {
    let extent = PageSize::DEFAULT.extent_bytes() as u64;
    lanes * ((32 + 4) * extent + 2 * unix_buffer() + HELD as u64 + (64 << 10))
}

/// The guest is at rest and its pages do not compress, so that each byte sent beyond its memory was sent before.
#[test]
fn what_was_in_flight_is_sent_again_and_no_more() {
    const LENGTH: u64 = 64 << 20;
    for lanes in [1, 2] {
        let source = Arc::new(TestGuest::incompressible(PageSize::DEFAULT, LENGTH));
        let destination = Arc::new(TestGuest::destination());
        let cuts =
            [30 << 20, 20 << 20].map(|bytes| Step::new(When::Bytes(Direction::ToDestination, bytes), Fault::Cut));
        let crossed = block_on(async {
            let mut crossing = crossing(Way::Unix, lanes, &cuts).await;
            crossing.source.encoder = EncoderSettings { compress: None, xbzrle: None };
            crossing.run(source.clone(), destination.clone()).await
        });
        let outages = crossed.source.outages;
        assert_eq!((crossed.source.outcome, crossed.source.verified), (Outcome::Completed, Some(true)), "{crossed:?}");
        assert!(source.bytes() == destination.bytes(), "the two memories differ");
        crossed.check_outages();
        assert_eq!(outages.lost, 2, "{crossed:?}");
        assert!(outages.put_back_bytes >= 2 * 4096, "{outages:?}");
        assert!(outages.put_back_bytes <= 2 * in_flight_bound(lanes.into()), "{outages:?}");
        // Heads of frames take less than a hundredth; state, digests and heartbeats less than a MiB.
        let most = (LENGTH + outages.put_back_bytes) / 100 * 101 + (1 << 20);
        let forwarded = crossed.proxy.forwarded(Direction::ToDestination);
        assert!(forwarded <= most, "{forwarded} bytes arrived, {most} were to be expected");
        assert!(crossed.source.wire_bytes <= most, "{} bytes were sent: {outages:?}", crossed.source.wire_bytes);
        // The guest's own save writes one page again.
        let pages = crossed.of_source(|event| match event {
            Event::RoundSent { tally, .. } => Some(tally.pages.all),
            _ => None,
        });
        let pages: u64 = pages.iter().sum();
        assert!(pages <= (LENGTH + outages.put_back_bytes) / 4096 + 1, "{pages} pages: {outages:?}");
    }
}

/// What was loaded before a cut stays a reference of deltas.
#[test]
fn the_first_round_after_a_cut_still_sends_deltas() {
    const LENGTH: u64 = 64 << 20;
    const PAGES: u64 = LENGTH / 4096;

    let source = TestGuest::source(PageSize::DEFAULT, &[LENGTH]).running(0);
    let destination = Arc::new(TestGuest::destination());
    let cut = [
        Step::new(When::After(Kind::RoundComplete), Fault::Mark),
        // The second round sends 16 MB, which is far more than the sockets hold.
        Step::new(When::Bytes(Direction::ToDestination, 1 << 20), Fault::Cut),
    ];
    let writer = source.clone();
    let crossed = block_on(async {
        let mut crossing = crossing(Way::Unix, 1, &cut).await;
        crossing.source.downtime_limit = Duration::from_micros(1);
        crossing.source.max_rounds = 4;
        if let Some(xbzrle) = &mut crossing.source.encoder.xbzrle {
            xbzrle.cache_bytes = LENGTH;
        }
        let crossing = crossing.calling(move |role, event| {
            if let (Role::Source, Event::RoundSent { tally: RoundTally { round: 1, .. }, .. }) = (role, event) {
                let mut noise = fastrand::Rng::with_seed(5);
                for page in 0..usize::try_from(PAGES).unwrap() {
                    let bytes: [u8; 1000] = std::array::from_fn(|_| noise.u8(..));
                    writer.write(0, page * 4096 + 100, &bytes);
                }
            }
        });
        crossing.run(source.clone(), destination.clone()).await
    });
    crossed.check_completed(&source, &destination);
    assert_eq!(crossed.source.outages.lost, 1, "{crossed:?}");
    let again = place(&crossed, |event| matches!(event, Event::Reconnected { .. }));
    let tally = crossed.events[again..].iter().find_map(|(role, event)| match event {
        Event::RoundSent { tally, .. } if *role == Role::Source => Some(tally.pages),
        _ => None,
    });
    let tally = tally.expect("a round follows");
    let put_back = crossed.source.outages.put_back_bytes / 4096;
    assert!(tally.xbzrle > PAGES / 4, "{tally:?}, {put_back} pages were put back");
    assert!(tally.raw + tally.compressed <= put_back + PAGES / 16, "{tally:?}, {put_back} pages were put back");
    assert!(tally.raw + tally.compressed < PAGES / 2, "{tally:?}, {put_back} pages were put back");
}

// ---- the switchover ----

/// The places of a cut at which the guest is paused at the source, and Go has not left.
const IN_THE_PAUSE: [When; 5] = [
    When::Before(Kind::State),
    When::Before(Kind::Digests),
    When::Before(Kind::End),
    When::After(Kind::End),
    When::Before(Kind::Loaded),
];

#[test]
fn a_cut_before_go_resumes_the_guest_at_once() {
    for when in IN_THE_PAUSE {
        let cut = Step::new(when, Fault::Cut).refusing(Door::Closes, FOREVER);
        is_resumed_and_moves_later(crossing_in_the_pause(&[cut]), &format!("{when:?}"));
    }
}

#[test]
fn a_cut_right_after_the_pause_resumes_the_guest_at_once() {
    let crossing = async {
        let crossing = crossing(Way::Tcp, 2, &[]).await;
        let (proxy, is_first) = (crossing.proxy.clone(), AtomicBool::new(true));
        crossing.calling(move |role, event| {
            if (role, event) == (Role::Source, &Event::Paused) && is_first.swap(false, Ordering::SeqCst) {
                proxy.set_door(Door::Absent);
                proxy.cut();
            }
        })
    };
    is_resumed_and_moves_later(crossing, "at the pause");
}

async fn crossing_in_the_pause(cut: &[Step]) -> Crossing {
    crossing(Way::Tcp, 1, cut).await
}

/// A migration whose connection is cut while the guest is paused. The guest runs here before the connection is made again.
fn is_resumed_and_moves_later(crossing: impl Future<Output = Crossing>, what: &str) {
    let (source, destination) = guests();
    let crossed = block_on(async {
        let underway = crossing.await.begin(source.clone(), destination.clone());
        underway.until_disconnected().await;
        underway.until("the guest is resumed", Role::Source, |event| *event == Event::Resumed).await;
        let runs = source.clone();
        tokio::task::spawn_blocking(move || runs.wait_for_writes()).await.expect(what);
        assert!(!source.was_called(GuestCall::Committed) && !destination.was_called(GuestCall::Start), "{what}");
        underway.proxy.set_door(Door::Open);
        underway.end().await
    });
    crossed.check_completed(&source, &destination);
    assert_eq!(crossed.source.outages.lost, 1, "{what}: {crossed:?}");
    assert!(crossed.source.outages.paused > Duration::ZERO, "{what}: {crossed:?}");
    let [paused, lost, resumed, again] = [
        place(&crossed, |event| *event == Event::Paused),
        place(&crossed, |event| matches!(event, Event::Disconnected { .. })),
        place(&crossed, |event| *event == Event::Resumed),
        place(&crossed, |event| matches!(event, Event::Reconnected { .. })),
    ];
    assert!(paused < lost && paused < resumed && lost < again && resumed < again, "{what}: {crossed:?}");
    let pauses = source.calls().iter().filter(|&&call| call == GuestCall::Pause).count();
    assert_eq!(pauses, 2, "{what}: {:?}", source.calls());
    // The downtime is that of the switchover that completed.
    assert_eq!(crossed.source.downtime, Some(crossed.source.parts.total()), "{what}");
}

// ---- Go in flight ----

/// Watches two guests, and remembers whether both have run at once.
struct Both {
    is_over: Arc<AtomicBool>,
    watching: JoinHandle<bool>,
}

impl Both {
    fn watch(source: &Arc<TestGuest>, destination: &Arc<TestGuest>) -> Self {
        let (source, destination) = (source.clone(), destination.clone());
        let is_over = Arc::new(AtomicBool::new(false));
        let ends = is_over.clone();
        let watching = std::thread::spawn(move || {
            let mut both = false;
            while !ends.load(Ordering::SeqCst) {
                both |= destination.runs() && source.runs();
                std::thread::sleep(Duration::from_micros(50));
            }
            both
        });
        Self { is_over, watching }
    }

    fn have_run(self) -> bool {
        self.is_over.store(true, Ordering::SeqCst);
        self.watching.join().unwrap()
    }
}

/// The places of a fault around Go: the frames of the last handshake, lost or delivered, and up to a millisecond after them.
fn around_go(number: u64, draw: &mut fastrand::Rng) -> Step {
    let soon = Duration::from_micros(draw.u64(..1000));
    let step = match number % 10 {
        0 => Step::new(When::Before(Kind::Go), Fault::Cut),
        1 => Step::new(When::After(Kind::Go), Fault::Cut),
        2 | 3 => Step::new(When::After(Kind::Go), Fault::CutAfter(soon)),
        4 => Step::new(When::Before(Kind::Running), Fault::Cut),
        5 => Step::new(When::After(Kind::Loaded), Fault::CutAfter(soon)),
        6 => Step::new(When::After(Kind::Go), Fault::StallAndCut(soon)),
        7 => Step::new(When::Before(Kind::Running), Fault::HalfClose),
        8 => Step::new(When::After(Kind::Running), Fault::CutAfter(soon)),
        _ => Step::new(When::After(Kind::Go), Fault::HalfClose),
    };
    let time = Duration::from_millis(draw.u64(..100));
    match draw.u8(..4) {
        0 => step.refusing(Door::Closes, time),
        1 => step.refusing(Door::Absent, time),
        _ => step,
    }
}

#[test]
fn cuts_around_go_leave_one_guest() {
    let seed = sample::seed();
    for number in 0..sample::count(20) {
        let step = around_go(number, &mut fastrand::Rng::with_seed(seed.wrapping_add(number)));
        let way = if number % 20 < 10 { Way::Tcp } else { Way::Unix };
        println!("cut {number}: {way:?}, {step:?}");
        let (source, destination) = guests_of(&[300_000]);
        let both = Both::watch(&source, &destination);
        let crossed =
            block_on(async { crossing(way, 1, &[step]).await.run(source.clone(), destination.clone()).await });
        assert!(!both.have_run(), "two ran: {crossed:?}");
        crossed.check_completed(&source, &destination);
        // A Go that was lost is one that the destination never acts on: the guest has run here again.
        let go_is_lost = step.when == When::Before(Kind::Go);
        assert!(!go_is_lost || source.was_called(GuestCall::Resume), "{crossed:?}");
        assert!(step.when != When::Before(Kind::Running) || !source.was_called(GuestCall::Resume), "{crossed:?}");
        assert!(crossed.source.outages.lost == 1 || !matches!(step.when, When::Before(_)), "{crossed:?}");
    }
}

/// A refusal of one attempt is no word about the guest: the source returns again, and does not resume the guest while it may run.
#[test]
fn an_attempt_that_is_refused_is_made_again() {
    let refused = Step::new(When::Before(Kind::Proof), Fault::HalfClose);
    for first in [early(Fault::Cut), Step::new(When::Before(Kind::Running), Fault::Cut)] {
        for (way, lanes) in WAYS {
            let (source, destination) = guests();
            let both = Both::watch(&source, &destination);
            let crossed = block_on(async {
                let mut crossing = crossing(way, lanes, &[first, refused]).await;
                crossing.destination.hello_timeout = Duration::from_millis(300);
                crossing.run(source.clone(), destination.clone()).await
            });
            assert!(!both.have_run(), "two ran: {crossed:?}");
            crossed.check_completed(&source, &destination);
            assert_eq!(crossed.proxy.breaks(), 2, "{crossed:?}");
            assert!(!source.was_called(GuestCall::Resume), "{crossed:?}");
        }
    }
}

#[test]
fn only_a_peer_that_never_comes_back_is_unconfirmed() {
    for (kind, starts, there) in [(Kind::Go, 0, Outcome::Failed), (Kind::Running, 1, Outcome::Completed)] {
        for door in [Door::Closes, Door::Absent] {
            let (source, destination) = guests();
            let both = Both::watch(&source, &destination);
            let cut = Step::new(When::Before(kind), Fault::Cut).refusing(door, FOREVER);
            let crossed = block_on(async {
                let crossing = crossing(Way::Tcp, 1, &[cut]).await.recovering(SHORT);
                crossing.run(source.clone(), destination.clone()).await
            });
            assert!(!both.have_run(), "two ran: {crossed:?}");
            crossed.check_law_seven(&source, &destination);
            assert_eq!(crossed.source.outcome, Outcome::Unconfirmed, "{kind}: {crossed:?}");
            says(crossed.source.error.as_ref(), "look at the destination");
            assert!(!source.was_called(GuestCall::Resume) && !source.runs(), "{kind}: {crossed:?}");
            let calls = destination.calls();
            assert_eq!(calls.iter().filter(|&&call| call == GuestCall::Start).count(), starts, "{kind}: {crossed:?}");
            assert_eq!(crossed.destination.as_ref().map(|ended| ended.outcome), Some(there), "{kind}: {crossed:?}");
        }
    }
}

// ---- the end that never comes back ----

#[test]
fn a_destination_that_never_comes_back_leaves_the_guest_here() {
    for door in [Door::Closes, Door::Absent] {
        let (source, destination) = guests();
        let crossed = block_on(async {
            let cut = early(Fault::Cut).refusing(door, FOREVER);
            let crossing = crossing(Way::Tcp, 2, &[cut]).await.recovering(SHORT);
            crossing.begin(source.clone(), destination.clone()).end_by_themselves().await
        });
        crossed.check_law_seven(&source, &destination);
        crossed.check_outages();
        assert_eq!((crossed.source.outcome, crossed.source.outages.lost), (Outcome::Failed, 1), "{crossed:?}");
        assert!(crossed.source.outages.time >= SHORT.give_up, "{crossed:?}");
        says(crossed.source.error.as_ref(), GIVE_UP);
        assert!(source.runs() && !source.was_called(GuestCall::Pause));
        let tries = crossed.of_source(|event| match event {
            Event::NotReached { tries, .. } => Some(*tries),
            _ => None,
        });
        assert!(tries.is_sorted(), "{crossed:?}");
        // It has waited as long for a source that it could not reach.
        let there = crossed.destination.as_ref().expect("it has ended");
        assert_eq!(there.outcome, Outcome::Failed, "{crossed:?}");
        says(there.error.as_ref(), GIVE_UP);
    }
}

#[test]
fn a_source_that_never_comes_back_is_given_up() {
    let (source, destination) = guests();
    block_on(async {
        let cut = early(Fault::Cut).refusing(Door::Absent, FOREVER);
        let underway =
            crossing(Way::Unix, 1, &[cut]).await.recovering(SHORT).begin(source.clone(), destination.clone());
        underway.until_disconnected().await;
        underway.source.abort();
        let ended = underway.destination.await.unwrap();
        assert_eq!(ended.outcome, Outcome::Failed, "{ended:?}");
        says(ended.error.as_ref(), GIVE_UP);
        assert_eq!(ended.outages.put_back_bytes, 0);
        assert!(ended.outages.lost == 1 && ended.outages.time >= SHORT.give_up, "{ended:?}");
        assert!(!destination.was_called(GuestCall::Prepare) && !destination.was_called(GuestCall::Start));
    });
}

#[test]
fn a_connection_that_is_lost_too_often_is_given_up() {
    for (attempts, words) in [(0, "connection"), (1, "recovery.attempts")] {
        let (source, destination) = guests();
        let crossed = block_on(async {
            let again = Step::new(When::Bytes(Direction::ToDestination, 200_000), Fault::Cut);
            let recovery = RecoverySettings { attempts, ..RECOVERY };
            let crossing = crossing(Way::Tcp, 1, &[early(Fault::Cut), again]).await.recovering(recovery);
            crossing.run(source.clone(), destination.clone()).await
        });
        crossed.check_law_seven(&source, &destination);
        assert_eq!(crossed.source.outcome, Outcome::Failed, "{crossed:?}");
        says(crossed.source.error.as_ref(), words);
        let regained = crossed.of_source(|event| matches!(event, Event::Reconnected { .. }).then_some(()));
        assert_eq!((regained.len(), crossed.proxy.breaks()), (attempts as usize, attempts as usize + 1), "{crossed:?}");
    }
}

// ---- cancel ----

/// The next try is an hour away, or in progress with a peer that does not answer.
#[test]
fn a_cancel_while_disconnected_works_at_once() {
    let patient = RecoverySettings { attempts: 20, backoff: FOREVER, give_up: FOREVER };
    for is_in_a_try in [false, true] {
        let (source, destination) = guests();
        let crossed = block_on(async {
            let cut = early(Fault::Cut);
            let cut = if is_in_a_try { cut } else { cut.refusing(Door::Closes, FOREVER) };
            let recovery = if is_in_a_try { RECOVERY } else { patient };
            let crossing = crossing(Way::Tcp, 2, &[cut]).await.recovering(recovery);
            let proxy = crossing.proxy.clone();
            let crossing = crossing.calling(move |role, event| {
                if is_in_a_try && role == Role::Source && matches!(event, Event::Disconnected { .. }) {
                    proxy.stall();
                }
            });
            let underway = crossing.begin(source.clone(), destination.clone());
            underway.until_disconnected().await;
            tokio::time::sleep(Duration::from_millis(200)).await;
            let runs = source.clone();
            tokio::task::spawn_blocking(move || runs.wait_for_writes()).await.expect("the guest runs meanwhile");
            underway.cancel_source.cancel();
            underway.end().await
        });
        crossed.check_law_seven(&source, &destination);
        crossed.check_outages();
        assert_eq!((crossed.source.outcome, crossed.source.outages.lost), (Outcome::Cancelled, 1), "{crossed:?}");
        assert!(source.runs() && !source.was_called(GuestCall::Pause));
    }
}

#[test]
fn a_destination_is_cancelled_while_disconnected() {
    let (source, destination) = guests();
    block_on(async {
        let cut = early(Fault::Cut).refusing(Door::Closes, FOREVER);
        let recovery = RecoverySettings { give_up: FOREVER, ..RECOVERY };
        let crossing = crossing(Way::Tcp, 1, &[cut]).await.recovering(recovery);
        let underway = crossing.begin(source.clone(), destination.clone());
        underway.until("the loss", Role::Destination, |event| matches!(event, Event::Disconnected { .. })).await;
        underway.cancel_destination.cancel();
        let ended = underway.destination.await.unwrap();
        assert_eq!(ended.outcome, Outcome::Cancelled, "{ended:?}");
        assert!(!destination.was_called(GuestCall::Start));
        underway.cancel_source.cancel();
        assert_eq!(underway.source.await.unwrap().outcome, Outcome::Cancelled);
        source.wait_for_writes();
    });
}

// ---- other peers ----

/// The Hello of the source.
async fn hello_of(underway: &Underway) -> Hello {
    let greeting = underway.proxy.greeting();
    let mut reader = FrameReader::new(greeting.as_slice(), "the greeting".into(), PageSize::DEFAULT);
    match reader.next().await {
        Ok(Some(Incoming::Message { message: Message::Hello(hello), .. })) => hello,
        other => panic!("{other:?}"),
    }
}

/// Greets the destination, with a wrong proof where one is asked for, and returns what it answered before it closed the
/// connection.
async fn greeted(underway: &Underway, hello: Hello) -> Vec<Message> {
    let mut hand = Hand::connect(&*underway.past_the_proxy()).await;
    hand.send_message(Message::Hello(hello)).await;
    let mut answers = Vec::new();
    while let Some(answer) = hand.hear().await {
        if matches!(answer, Message::Challenge { .. }) {
            hand.send_message(Message::Proof(Proof([7; 32]))).await;
        }
        answers.push(answer);
    }
    answers
}

/// Peers that are not the source. None is let in. Returns a connection that was asked for its proof and stays silent.
async fn others_are_turned_away(underway: &Underway, attempt: u32) -> Hand {
    let way = underway.past_the_proxy();
    let mut garbage = Hand::connect(&*way).await;
    garbage.send(&[0xa5; 100]).await;
    assert_eq!(garbage.hear_until(Kind::Accept).await, None);

    let hello = hello_of(underway).await;
    let returning = Hello { attempt: attempt + 7, nonce: Nonce([3; 32]), ..hello.clone() };
    let others = [
        returning.clone(),
        // The session's own first number, and that of the latest attempt.
        Hello { attempt: 1, ..hello.clone() },
        Hello { attempt, ..returning.clone() },
        // A second source, which is new or returns.
        Hello { session: SessionId([9; 16]), attempt: 1, ..hello.clone() },
        Hello { session: SessionId([9; 16]), ..returning.clone() },
    ];
    for other in others {
        let answers = greeted(underway, other.clone()).await;
        let is_let_in =
            |answer: &Message| !matches!(answer, Message::Challenge { .. } | Message::Refused(_) | Message::Abort(_));
        assert!(!answers.iter().any(is_let_in), "{other:?}: {answers:?}");
        let is_of_another = other.session != hello.session;
        assert!(!is_of_another || !answers.iter().any(|answer| answer.kind() == Kind::Challenge), "{answers:?}");
    }
    let mut silent = Hand::connect(&*way).await;
    silent.send_message(Message::Hello(returning)).await;
    let asked = silent.hear().await;
    assert!(matches!(asked, Some(Message::Challenge { .. })), "{asked:?}");
    silent
}

#[track_caller]
fn were_noticed(crossed: &Crossed) {
    let turned_away = crossed
        .events
        .iter()
        .filter(|(role, event)| *role == Role::Destination && matches!(event, Event::TurnedAway { .. }));
    assert!(turned_away.count() >= 1, "{crossed:?}");
}

/// Waits until the proxy has injected so many faults.
async fn until_faults(underway: &Underway, count: usize) {
    while underway.proxy.faults().len() < count {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[test]
fn while_connected_other_peers_are_turned_away() {
    // In the first attempt, and in the second.
    let stall = Step::new(When::Bytes(Direction::ToDestination, 200_000), Fault::Stall(FOREVER));
    for (steps, lost) in [(vec![stall], 0), (vec![early(Fault::Cut), stall], 1)] {
        let (source, destination) = guests();
        let crossed = block_on(async {
            let underway = crossing(Way::Tcp, 1, &steps).await.begin(source.clone(), destination.clone());
            until_faults(&underway, 1 + steps.len()).await;
            let silent = others_are_turned_away(&underway, 1 + lost).await;
            underway.proxy.release();
            let crossed = underway.end().await;
            drop(silent);
            crossed
        });
        crossed.check_completed(&source, &destination);
        assert_eq!(crossed.source.outages.lost, lost, "{crossed:?}");
        were_noticed(&crossed);
    }
}

#[test]
fn while_disconnected_other_peers_are_turned_away() {
    let (source, destination) = guests();
    let crossed = block_on(async {
        let cut = early(Fault::Cut).refusing(Door::Closes, FOREVER);
        let underway = crossing(Way::Tcp, 1, &[cut]).await.begin(source.clone(), destination.clone());
        underway.until_disconnected().await;
        underway.until("the loss", Role::Destination, |event| matches!(event, Event::Disconnected { .. })).await;
        let silent = others_are_turned_away(&underway, 1).await;
        underway.proxy.set_door(Door::Open);
        let crossed = underway.end().await;
        drop(silent);
        crossed
    });
    crossed.check_completed(&source, &destination);
    assert_eq!(crossed.source.outages.lost, 1, "{crossed:?}");
    were_noticed(&crossed);
    let phases = crossed.of_source(|event| match event {
        Event::Phase(phase) => Some(*phase),
        _ => None,
    });
    assert!(phases.windows(2).any(|two| two == [Phase::Active, Phase::Disconnected]), "{phases:?}");
}
