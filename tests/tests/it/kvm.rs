//! A virtual machine moves while it runs, with each dirty log, and survives failures: its own program checks every
//! page. Skipped without KVM.

use std::sync::Arc;
use std::time::{Duration, Instant};

use memferry::events::{Event, Outcome, Role};
use memferry::guest::{Guest, SourceGuest};
use memferry::settings::{Mode, PostcopyAfter, RecoverySettings, SourceSettings};
use memferry_guests::kvm::{KvmGuest, KvmLogChoice, KvmSettings, KvmStatus, SharedSettings};
use memferry_stages::missing;
use memferry_stages::tally::RoundTally;
use memferry_tests::run::{AnyBuilder, keeping};
use memferry_tests::{Ends, Recorder, migrate_watched, skipped, source_settings};
use memferry_transports::memory::MemoryTransport;
use tokio_util::sync::CancellationToken;

/// No migration here takes this long unless it hangs. Where guest instructions are emulated and the host is busy, one of a machine of
/// 4.5 GiB takes more than a minute.
const HANG: Duration = Duration::from_secs(300);
const LOGS: [KvmLogChoice; 4] =
    [KvmLogChoice::DirtyLog, KvmLogChoice::DirtyRing, KvmLogChoice::Userfault, KvmLogChoice::Hash];

/// A machine whose two vCPUs write as fast as they can; `None`, with a message, without KVM.
fn machine(dirty_log: KvmLogChoice) -> Option<Arc<KvmGuest>> {
    machine_with(dirty_log, KvmSettings::default())
}

/// As [`machine`], with the additional settings of `more`.
fn machine_with(dirty_log: KvmLogChoice, more: KvmSettings) -> Option<Arc<KvmGuest>> {
    let settings = KvmSettings { memory: 16 << 20, vcpus: 2, region: 4 << 20, ..more };
    made(KvmSettings { pages_per_second: 0.0, bytes: 32, dirty_log, ..settings })
}

fn made(settings: KvmSettings) -> Option<Arc<KvmGuest>> {
    if let Err(why) = memferry_stages::host::kvm() {
        skipped(why);
        return None;
    }
    match KvmGuest::source(settings) {
        Ok(guest) => Some(guest),
        Err(error) => {
            skipped(error);
            None
        }
    }
}

/// Compression in the first round, then deltas, over a wire that is too slow for the guest until rounds are few.
fn settings() -> SourceSettings {
    let downtime_limit = Duration::from_millis(10);
    SourceSettings { max_bandwidth: Some(2 << 20), downtime_limit, max_rounds: 4, ..source_settings(2, 2) }
}

#[track_caller]
fn until(guest: &KvmGuest, holds: impl Fn(&KvmStatus) -> bool) -> KvmStatus {
    let begun = Instant::now();
    loop {
        let status = guest.status();
        assert_eq!((status.failed.as_ref(), status.troubles), (None, 0), "{status:?}");
        if holds(&status) {
            return status;
        }
        assert!(begun.elapsed() < HANG, "waited in vain: {status:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The machine continues from where it was, and its check finds no fault.
#[track_caller]
fn continues(guest: &KvmGuest, from: &KvmStatus) -> KvmStatus {
    until(guest, |status| status.running && status.pass >= from.pass + 3 && status.ticks > from.ticks)
}

fn moved(
    source: &Arc<KvmGuest>,
    destination: AnyBuilder,
    transport: MemoryTransport,
    settings: SourceSettings,
    recorder: Recorder,
) -> Ends {
    let moving =
        migrate_watched(source.clone(), destination, Arc::new(transport), settings, CancellationToken::new(), recorder);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async { tokio::time::timeout(HANG, moving).await.expect("it hangs") })
}

fn rounds(ends: &Ends) -> Vec<RoundTally> {
    let sent = |(role, event): &(Role, Event)| match event {
        Event::RoundSent { tally, .. } if *role == Role::Source => Some(*tally),
        _ => None,
    };
    ends.events.iter().filter_map(sent).collect()
}

/// A recorder that delays the source after the first round, until the machine has written all of its region once
/// more.
fn delays_the_second_round(source: &Arc<KvmGuest>) -> Recorder {
    let source = source.clone();
    Recorder::calling(move |role, event| {
        if role == Role::Source && matches!(event, Event::RoundSent { tally, .. } if tally.round == 1) {
            let pass = source.status().pass;
            until(&source, |status| status.pass >= pass + 2);
        }
    })
}

#[track_caller]
fn moves_whole(source: &Arc<KvmGuest>, dirty_log: KvmLogChoice, settings: SourceSettings) -> (Arc<KvmGuest>, Ends) {
    moves_whole_watched(source, dirty_log, settings, Recorder::default())
}

#[track_caller]
fn moves_whole_watched(
    source: &Arc<KvmGuest>,
    dirty_log: KvmLogChoice,
    settings: SourceSettings,
    recorder: Recorder,
) -> (Arc<KvmGuest>, Ends) {
    let (builder, built) = keeping(KvmGuest::destination(dirty_log));
    let ends = moved(source, builder, MemoryTransport::new(64 << 10), settings, recorder);
    assert_eq!(ends.source.outcome, Outcome::Completed, "{:?}, {:?}", ends.source.error, ends.destination.error);
    assert_eq!(ends.destination.verified, Some(true));
    let left = source.status();
    assert!(!left.running, "two run: {left:?}");
    let destination = built.get().expect("it has arrived").clone();
    continues(&destination, &left);
    assert_eq!(source.status(), left, "it was left paused");
    (destination, ends)
}

/// Its vCPUs touch pages that are still at the source: the kernel's faults wait for them.
#[test]
fn a_machine_is_started_before_its_memory_is_there() {
    if let Err(why) = missing::supported() {
        return skipped(why);
    }
    for (dirty_log, mode) in [(KvmLogChoice::DirtyLog, Mode::Hybrid), (KvmLogChoice::Userfault, Mode::Postcopy)] {
        let Some(source) = machine(dirty_log) else { return };
        until(&source, |status| status.pass >= 2);
        let settings = SourceSettings {
            mode,
            postcopy_after: (mode == Mode::Hybrid).then_some(PostcopyAfter::Rounds(1)),
            downtime_limit: Duration::from_nanos(1),
            recovery: RecoverySettings::default(),
            ..settings()
        };
        let (_, ends) = moves_whole(&source, dirty_log, settings);
        let there = ends.destination.postcopy.expect("postcopy");
        let counts = there.faults.as_ref().expect("the destination counts");
        println!("{mode:?}: downtime {:?}, {there:?}", ends.source.downtime);
        assert!(counts.requests > 0, "its vCPUs waited for no page: {counts:?}");
        assert_eq!(counts.placed + counts.discarded, there.missing_pages, "{counts:?}");
    }
}

#[test]
fn a_machine_moves_with_each_dirty_log_while_it_rewrites_all_of_its_memory() {
    for dirty_log in LOGS {
        let Some(source) = machine(dirty_log) else { return };
        until(&source, |status| status.pass >= 2);
        let (destination, ends) = moves_whole_watched(&source, dirty_log, settings(), delays_the_second_round(&source));
        let (rounds, status) = (rounds(&ends), destination.status());
        let (pages, downtime) = (rounds.iter().map(|round| round.pages.all).collect::<Vec<_>>(), ends.source.downtime);
        println!("{dirty_log:?}: rounds of {pages:?} pages, downtime {downtime:?}, then {status:?}");
        assert!(rounds.len() >= 3 && rounds[0].pages.compressed > 500 && rounds[0].pages.xbzrle == 0, "{rounds:#?}");
        assert!(rounds[1..].iter().map(|round| round.pages.xbzrle).sum::<u64>() > 500, "{rounds:#?}");
        let sampled_and_rest = rounds[1].pages.all + rounds[2].pages.all;
        assert!(sampled_and_rest > 900, "the guest wrote nearly all of its region meanwhile: {rounds:#?}");
    }
}

/// A machine of 4.5 GiB that touches 3 MiB: its region ends half a mebibyte after the hole in physical memory below 4
/// GiB, and the second of three vCPUs crosses the hole.
#[test]
fn a_region_that_reaches_over_the_hole_below_4_gib_moves_with_each_dirty_log() {
    const PAGES: u64 = 128;
    for dirty_log in LOGS {
        let region = 2 * PAGES * 4096;
        let settings = KvmSettings {
            memory: 9 << 29,
            vcpus: 3,
            region,
            region_at: (3 << 30) - region / 2,
            dirty_log,
            ..KvmSettings::default()
        };
        let Some(source) = made(settings) else { return };
        let layout = source.memory().layout().clone();
        let places = layout.blocks().iter().map(|block| (block.id.raw(), block.guest_address, block.length));
        assert!(places.eq([("ram-low", 0, 3 << 30), ("ram-high", 4 << 30, 3 << 29)]));
        until(&source, |status| status.pass >= 2);
        let (destination, ends) = moves_whole(&source, dirty_log, settings_without_cap());
        let sent: u64 =
            rounds(&ends).iter().map(|round| round.pages.raw + round.pages.compressed + round.pages.xbzrle).sum();
        assert!((2 * PAGES..20 * PAGES).contains(&sent), "{dirty_log:?}: {sent} pages that are not zero");
        // The last page of the region and the first after the hole contain the number of a pass.
        for page in [0, PAGES - 1] {
            let mut content = [0; 4096];
            destination.memory().block(1).memory.read_page(layout.page_size(), page, &mut content).unwrap();
            assert!(content[8..16] != [0; 8], "{dirty_log:?}: page {page} behind the hole was never written");
        }
    }
}

fn settings_without_cap() -> SourceSettings {
    SourceSettings { max_bandwidth: None, ..settings() }
}

#[test]
fn a_machine_moves_on_and_on() {
    let Some(mut guest) = machine(KvmLogChoice::DirtyLog) else { return };
    let mut first = until(&guest, |status| status.pass >= 2);
    let quick = SourceSettings { max_bandwidth: None, max_rounds: 3, ..settings() };
    for dirty_log in LOGS {
        let (next, _) = moves_whole(&guest, dirty_log, quick.clone());
        let status = next.status();
        assert!(status.pass > first.pass && status.ticks > first.ticks, "{status:?} after {first:?}");
        (guest, first) = (next, status);
    }
}

#[test]
fn a_machine_continues_at_its_source_when_the_connection_breaks() {
    for dirty_log in LOGS {
        let Some(source) = machine(dirty_log) else { return };
        until(&source, |status| status.pass >= 1);
        let transport = MemoryTransport::new(64 << 10);
        let faults = transport.faults();
        // In the last round: the guest is paused, its state is in flight.
        let recorder = Recorder::calling(move |role, event| {
            if (role, event) == (Role::Source, &Event::Paused) {
                faults.cut();
            }
        });
        let quick = SourceSettings { max_bandwidth: None, max_rounds: 2, ..settings() };
        let (builder, built) = keeping(KvmGuest::destination(dirty_log));
        let ends = moved(&source, builder, transport, quick.clone(), recorder);
        assert_eq!(ends.source.outcome, Outcome::Failed, "{:?}", ends.source.error);
        assert!(built.get().is_none_or(|destination| !destination.status().running));
        continues(&source, &source.status());
        moves_whole(&source, dirty_log, quick);
    }
}

#[test]
fn a_machine_that_was_paused_by_its_operator_arrives_paused() {
    let Some(source) = machine(KvmLogChoice::DirtyLog) else { return };
    until(&source, |status| status.pass >= 1);
    source.pause().unwrap();
    let paused = source.status();
    let (builder, built) = keeping(KvmGuest::destination(KvmLogChoice::DirtyLog));
    let quick = SourceSettings { max_bandwidth: None, ..settings() };
    let ends = moved(&source, builder, MemoryTransport::new(64 << 10), quick, Recorder::default());
    assert_eq!(ends.source.outcome, Outcome::Completed, "{:?}", ends.source.error);
    let destination = built.get().unwrap();
    let arrived = destination.status();
    assert_eq!((arrived.running, arrived.pass, arrived.heartbeats), (false, paused.pass, 0));
    destination.resume().unwrap();
    continues(destination, &paused);
}

/// Its program continuously allocates, checks and frees pages of its free memory; free pages are hinted.
#[test]
fn free_unplugged_and_shared_memory_of_a_machine_does_not_travel_and_what_it_uses_does() {
    let all = [KvmLogChoice::DirtyLog, KvmLogChoice::DirtyRing, KvmLogChoice::Userfault, KvmLogChoice::Hash];
    for dirty_log in all {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shared");
        let more = KvmSettings {
            free: 8 << 20,
            unplugged: 1 << 20,
            shared: Some(SharedSettings { path: path.clone(), bytes: 1 << 20 }),
            ..KvmSettings::default()
        };
        let Some(mut source) = machine_with(dirty_log, more) else { return };
        until(&source, |status| status.pass >= 3);
        // Two runs, because the destination must know which pages are in use as well as the source does. On a busy
        // host the scanner may complete before the balloon's first report, though not every time.
        let (mut moves, mut hinted) = (0, 0);
        while moves < 2 || (dirty_log != KvmLogChoice::Hash && hinted == 0 && moves < 20) {
            moves += 1;
            let (builder, built) = keeping(KvmGuest::destination_sharing(dirty_log, path.clone()));
            let transport = MemoryTransport::new(64 << 10);
            let faster = SourceSettings { max_bandwidth: Some(8 << 20), ..settings() };
            let ends = moved(&source, builder, transport, faster, Recorder::default());
            assert_eq!(
                ends.source.outcome,
                Outcome::Completed,
                "{:?}, {:?}",
                ends.source.error,
                ends.destination.error
            );
            assert_eq!(ends.destination.verified, Some(true));
            let excluded = ends.source.excluded;
            println!("{dirty_log:?}: {excluded:?}");
            assert_eq!((excluded.unplugged, excluded.ignored), (256, 256), "{dirty_log:?}");
            hinted += excluded.hinted;
            let destination = built.get().expect("it has arrived").clone();
            continues(&destination, &source.status());
            source = destination;
        }
        assert_eq!(hinted > 0, dirty_log != KvmLogChoice::Hash, "{dirty_log:?}");
    }
}
