//! Whole migrations over every transport, with writers that never rest: the memory arrives unchanged, to the last
//! byte.

use std::sync::Arc;
use std::time::Duration;

use memferry::blocking::Runtime;
use memferry::events::{Event, Observers, Outcome, Role};
use memferry::migration::{RunsHere, SendError};
use memferry::settings::{After, EncoderSettings, OnMiss, Rule, Setting, SourceSettings, Verify, XbzrleSettings};
use memferry_guests::workload::{Pattern, Region, Workload, WorkloadSettings, WriterSettings};
use memferry_stages::codec::Codec;
use memferry_stages::geometry::PageSize;
use memferry_stages::tally::{PageTally, RoundTally};
use memferry_tests::guest::GuestCall;
use memferry_tests::run::destination_settings;
use memferry_tests::{Ends, Recorder, TestGuest, migrate, migrate_watched, source_settings};
use memferry_transports::memory::MemoryTransport;
use memferry_transports::{Address, Transport, open};
use tokio_util::sync::CancellationToken;

/// Two blocks whose lengths are not multiples of a page, with work for four lanes.
const LENGTHS: [u64; 2] = [(9 << 20) + 100, (3 << 20) + 4097];

struct Moved {
    ends: Ends,
    source: Arc<TestGuest>,
    destination: Arc<TestGuest>,
}

fn move_guest(transport: Arc<dyn Transport>, settings: SourceSettings, page_size: PageSize) -> Moved {
    let source = TestGuest::source(page_size, &LENGTHS).paced(Duration::from_micros(200)).running(2);
    let destination = Arc::new(TestGuest::destination());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let cancel = CancellationToken::new();
    let ends = runtime.block_on(migrate(source.clone(), destination.clone(), transport, settings, cancel));
    Moved { ends, source, destination }
}

fn transport(address: &str) -> Arc<dyn Transport> {
    open(&address.parse::<Address>().unwrap(), Duration::from_secs(10)).into()
}

impl Moved {
    fn rounds(&self) -> Vec<RoundTally> {
        let tally = |(role, event): &(Role, Event)| match event {
            Event::RoundSent { tally, .. } if *role == Role::Source => Some(*tally),
            _ => None,
        };
        self.ends.events.iter().filter_map(tally).collect()
    }

    /// The properties of every migration that completes.
    #[track_caller]
    fn check(&self) {
        let Moved { ends, source, destination } = self;
        assert_eq!(ends.source.outcome, Outcome::Completed, "source: {:?}", ends.source.error);
        assert_eq!(ends.destination.outcome, Outcome::Completed, "destination: {:?}", ends.destination.error);
        assert!(source.bytes() == destination.bytes(), "the two memories differ");
        assert!(source.writes() > 0, "the writers never wrote");
        assert!(!source.runs() && destination.runs(), "the guest runs at the destination and there only");
        assert!(destination.applied_state().sections[0].bytes.len() == 100_000);
        let rounds = self.rounds();
        assert!(rounds.len() >= 2, "{rounds:?}");
        for round in &rounds {
            let kinds = round.pages.zero
                + round.pages.raw
                + round.pages.compressed
                + round.pages.xbzrle
                + round.pages.unchanged;
            assert_eq!(kinds, round.pages.all, "{round:?}");
        }
        for end in [&ends.source, &ends.destination] {
            assert!(end.memory_peak <= self.bound(), "{} bytes held, bound {}", end.memory_peak, self.bound());
        }
    }

    fn bound(&self) -> u64 {
        let bounds = self.ends.events.iter().filter_map(|(_, event)| match event {
            Event::Guest { memory_bound, .. } => Some(*memory_bound),
            _ => None,
        });
        bounds.max().unwrap()
    }
}

#[test]
fn tcp_with_as_many_connections_as_lanes() {
    let moved = move_guest(transport("tcp:127.0.0.1:0"), source_settings(4, 4), PageSize::DEFAULT);
    moved.check();
    assert_eq!(moved.ends.source.verified, Some(true));
    assert_eq!(moved.ends.destination.verified, Some(true));
    let calls = moved.source.calls();
    assert_eq!(calls, [GuestCall::Pause, GuestCall::Save, GuestCall::Release, GuestCall::Committed, GuestCall::Moved]);
    assert_eq!(moved.destination.calls(), [GuestCall::Build, GuestCall::Prepare, GuestCall::Start]);
}

#[test]
fn tcp_with_four_lanes_on_one_connection() {
    move_guest(transport("tcp:127.0.0.1:0"), source_settings(4, 1), PageSize::DEFAULT).check();
}

#[test]
fn tcp_with_three_lanes_on_two_connections() {
    move_guest(transport("tcp:127.0.0.1:0"), source_settings(3, 2), PageSize::DEFAULT).check();
}

#[test]
fn unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    let address = format!("unix:{}", dir.path().join("socket").display());
    move_guest(transport(&address), source_settings(2, 2), PageSize::DEFAULT).check();
}

#[test]
fn memory_with_one_lane() {
    move_guest(Arc::new(MemoryTransport::new(64 << 10)), source_settings(1, 1), PageSize::DEFAULT).check();
}

#[test]
fn file_moves_the_guest_and_leaves_the_source_paused() {
    let dir = tempfile::tempdir().unwrap();
    let address = format!("file:{}", dir.path().join("guest.mf").display());
    let settings = SourceSettings { after: Some(After::Pause), ..source_settings(3, 1) };
    let moved = move_guest(transport(&address), settings, PageSize::DEFAULT);
    moved.check();
    assert!(moved.source.was_called(GuestCall::Committed) && moved.source.was_called(GuestCall::Moved));
    assert_eq!(moved.ends.destination.verified, Some(true));
}

#[test]
fn a_snapshot_to_a_file_lets_the_source_continue() {
    let dir = tempfile::tempdir().unwrap();
    let address = format!("file:{}", dir.path().join("guest.mf").display());
    let settings = SourceSettings { after: Some(After::Resume), ..source_settings(2, 1) };
    let moved = move_guest(transport(&address), settings, PageSize::DEFAULT);
    assert_eq!(moved.ends.source.outcome, Outcome::Completed, "{:?}", moved.ends.source.error);
    assert_eq!(moved.ends.destination.outcome, Outcome::Completed, "{:?}", moved.ends.destination.error);
    assert!(moved.source.was_called(GuestCall::Resume));
    moved.source.wait_for_writes();
    assert!(moved.source.resumed_with() == moved.destination.bytes());
    assert!(!moved.source.was_called(GuestCall::Committed) && !moved.source.was_called(GuestCall::Moved));
    assert!(moved.ends.source.downtime.is_some());
}

#[test]
fn every_page_size() {
    for bytes in [8192, 16384, 32768, 65536] {
        let page_size = PageSize::new(bytes).unwrap();
        move_guest(Arc::new(MemoryTransport::new(1 << 20)), source_settings(2, 2), page_size).check();
    }
}

/// All four combinations of compression and deltas, and the encodings that each may use in each round.
#[test]
fn compression_in_the_first_round_and_deltas_after_it() {
    let xbzrle = XbzrleSettings { cache_bytes: 64 << 20, on_miss: OnMiss::Raw, cache_first_round: true };
    for compress in [None, Some(Codec::Snap), Some(Codec::Lz4), Some(Codec::Zstd { level: 1 })] {
        for delta in [None, Some(xbzrle.clone())] {
            let encoder = EncoderSettings { compress, xbzrle: delta.clone() };
            let settings = SourceSettings { encoder, ..source_settings(2, 2) };
            let moved = move_guest(Arc::new(MemoryTransport::new(1 << 20)), settings, PageSize::DEFAULT);
            moved.check();
            for round in moved.rounds() {
                let what = format!("{compress:?}, {delta:?}: {round:?}");
                let may_compress = compress.is_some() && (round.round == 1 || delta.is_none());
                assert!(may_compress || round.pages.compressed == 0, "{what}");
                let may_delta = delta.is_some() && round.round > 1;
                assert!(may_delta || round.pages.xbzrle + round.pages.unchanged == 0, "{what}");
                assert!(round.round > 1 || round.pages.all >= (12 << 20) / 4096, "{what}");
                assert!(!may_delta || round.pages.xbzrle > 0 || round.pages.all < 64, "{what}");
            }
        }
    }
}

/// A page that the destination holds as zero is a delta's reference without an entry in the cache, which has room for few pages here.
#[test]
fn the_first_writes_to_a_guest_of_zeros_travel_as_deltas() {
    const LENGTH: u64 = 16 << 20;
    const WRITTEN: usize = 1000;
    for address in ["tcp:127.0.0.1:0", "memory"] {
        let source = Arc::new(TestGuest::repeating(PageSize::DEFAULT, LENGTH, &[0; 4096]));
        let destination = Arc::new(TestGuest::destination());
        let writer = source.clone();
        let recorder = Recorder::calling(move |role, event| {
            if let (Role::Source, Event::RoundSent { tally: RoundTally { round: 1, .. }, .. }) = (role, event) {
                (0..WRITTEN).for_each(|page| writer.write(0, page * 3 * 4096 + page, b"sparse"));
            }
        });
        let xbzrle = XbzrleSettings { cache_bytes: 4 * 4096, on_miss: OnMiss::Auto, cache_first_round: true };
        let encoder = EncoderSettings { compress: Some(Codec::Lz4), xbzrle: Some(xbzrle) };
        let settings = SourceSettings { encoder, ..source_settings(2, 2) };
        let way = match address {
            "memory" => Arc::new(MemoryTransport::new(1 << 20)) as Arc<dyn Transport>,
            address => transport(address),
        };
        let cancel = CancellationToken::new();
        let migration = migrate_watched(source.clone(), destination.clone(), way, settings, cancel, recorder);
        let ends = tokio::runtime::Runtime::new().unwrap().block_on(migration);
        let moved = Moved { ends, source, destination };
        let rounds = moved.rounds();
        let [first, later] = [true, false].map(|is_first| {
            rounds.iter().filter(|tally| (tally.round == 1) == is_first).fold(PageTally::default(), |mut sum, tally| {
                sum += tally.pages;
                sum
            })
        });
        assert_eq!((first.all, first.zero), (LENGTH / 4096, LENGTH / 4096));
        // The guest's own save writes to one of these pages again: then it is neither zero nor surely cached.
        let again = later.all - WRITTEN as u64;
        assert!(again <= 1 && later.xbzrle >= WRITTEN as u64, "{rounds:?}");
        assert!(later.xbzrle_misses <= again && later.xbzrle_overflows == 0, "{rounds:?}");
        assert!(moved.source.bytes() == moved.destination.bytes());
        assert_eq!((moved.ends.source.verified, moved.ends.destination.verified), (Some(true), Some(true)));
    }
}

#[test]
fn without_checksums_and_verification() {
    let settings = SourceSettings { checksum: false, verify: Verify::Off, ..source_settings(2, 1) };
    let moved = move_guest(transport("tcp:127.0.0.1:0"), settings, PageSize::DEFAULT);
    moved.check();
    assert_eq!(moved.ends.source.verified, None);
}

#[test]
fn a_guest_that_was_paused_by_its_operator_is_not_started() {
    let source = Arc::new(TestGuest::source(PageSize::DEFAULT, &LENGTHS));
    let destination = Arc::new(TestGuest::destination());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let transport = Arc::new(MemoryTransport::new(1 << 20));
    let moving =
        migrate(source.clone(), destination.clone(), transport, source_settings(2, 1), CancellationToken::new());
    let ends = runtime.block_on(moving);
    assert_eq!(ends.destination.outcome, Outcome::Completed, "{:?}", ends.destination.error);
    assert!(!destination.runs() && !source.was_called(GuestCall::Pause));
    assert!(source.bytes() == destination.bytes());
}

#[test]
fn a_bandwidth_cap_bounds_what_goes_over_the_wire() {
    let settings = SourceSettings { max_bandwidth: Some(8 << 20), ..source_settings(2, 2) };
    let moved = move_guest(transport("tcp:127.0.0.1:0"), settings, PageSize::DEFAULT);
    moved.check();
    let ended = &moved.ends.source;
    let rate = ended.wire_bytes as f64 / ended.total.as_secs_f64();
    assert!(rate < 1.1 * f64::from(8 << 20), "{rate} bytes a second");
}

/// Two threads, and no async code in the caller.
#[test]
fn a_guest_is_moved_between_threads_without_a_runtime_of_the_callers() {
    let writer = WriterSettings { pattern: Pattern::Uniform, pages_per_second: 5e3, bytes: 64, region: Region::ALL };
    let settings = WorkloadSettings { memory: 4 << 20, writers: vec![writer], ..WorkloadSettings::default() };
    let source = Workload::source(settings).unwrap();
    let (here, there) = (Runtime::new().unwrap(), Runtime::new().unwrap());
    let transport = memferry_transports::open(&"tcp:127.0.0.1:0".parse().unwrap(), Duration::ZERO);
    let listener = there.listen(&*transport).unwrap();
    let way = memferry_transports::open(&listener.local_address().parse().unwrap(), Duration::from_secs(10));
    let receiving = std::thread::spawn(move || {
        let unwatched = Observers::none(Role::Destination);
        there.receive(Workload::destination(), listener, destination_settings(), unwatched, CancellationToken::new())
    });
    let unwatched = Observers::none(Role::Source);
    let sent = here.send(source.clone(), way.into(), source_settings(2, 1), unwatched, CancellationToken::new());
    assert_eq!(sent.unwrap().guest_runs_here(), RunsHere::Elsewhere);
    let arrived = receiving.join().unwrap().unwrap().guest;
    assert!(arrived.status().running && !source.status().running);
    assert_eq!(arrived.check_all().first_stale, None);
}

/// Invalid settings are an error before the migration begins, and the guest receives no call that would change it.
#[test]
fn settings_that_cannot_be_are_refused_before_anything_begins() {
    let source = TestGuest::source(PageSize::DEFAULT, &[1 << 20]).running(1);
    let refused = Runtime::new().unwrap().send(
        source.clone(),
        Arc::new(MemoryTransport::new(1)),
        SourceSettings { lanes: 0, ..source_settings(1, 1) },
        Observers::none(Role::Source),
        CancellationToken::new(),
    );
    let Err(SendError::Settings { source: why, .. }) = refused else { panic!("{refused:?}") };
    assert_eq!((why.setting, why.broken), (Setting::Lanes, Rule::Lanes(0)));
    assert!(source.calls().is_empty() && source.runs());
}
