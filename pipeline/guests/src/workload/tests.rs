//! The workload as the engine uses it, through the guest traits alone, with pages copied by hand.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use memferry::guest::StateSection;
use memferry_stages::batch::{Batch, CopiedBatch, RoundKind};
use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::dirty_log::UserfaultLog;
use memferry_stages::geometry::bits;
use memferry_stages::pool::BufferPool;
use proptest::prelude::*;

use super::settings::STAMP_BYTES;
use super::*;

const PAGE: usize = 4096;

fn writer(pattern: Pattern, bytes: usize) -> WriterSettings {
    WriterSettings { pattern, pages_per_second: 0.0, bytes, region: Region::ALL }
}

/// 256 pages in two blocks, with two writers without a rate limit.
fn settings() -> WorkloadSettings {
    WorkloadSettings {
        memory: 256 * PAGE as u64,
        blocks: 2,
        dirty_log: LogChoice::Software,
        fill: Fill { zero: 0.25, text: 0.25, random: 0.25, process: 0.25 },
        writers: vec![writer(Pattern::Uniform, 40), writer(Pattern::Sequential, PAGE)],
        ..WorkloadSettings::default()
    }
}

/// As [`settings`], with one writer, which visits the pages in turn and changes each whole.
fn solo() -> WorkloadSettings {
    WorkloadSettings { writers: vec![writer(Pattern::Sequential, PAGE)], ..settings() }
}

fn wait_for(guest: &Workload, fine: impl Fn(&WorkloadStatus) -> bool) {
    let begun = Instant::now();
    while !fine(&guest.status()) {
        assert!(begun.elapsed() < Duration::from_secs(60), "waited in vain: {:?}", guest.status());
        thread::sleep(Duration::from_millis(1));
    }
}

fn run_for(guest: &Workload, writes: u64) {
    let from = guest.status().writes;
    wait_for(guest, |status| status.writes >= from + writes);
}

fn pages(guest: &Workload) -> Vec<Vec<u8>> {
    let memory = guest.memory();
    let read = |block: u32, page| {
        let mut bytes = vec![0; memory.page_size().bytes()];
        memory.block(block).memory.read_page(memory.page_size(), page, &mut bytes).unwrap();
        bytes
    };
    let of_block = |block| (0..memory.layout().block_pages(block)).map(move |page| (block, page));
    (0..memory.layout().block_count()).flat_map(of_block).map(|(block, page)| read(block, page)).collect()
}

/// A destination that was built and loaded with everything but the pages in `lost`, and not prepared.
fn moved(source: &Workload, lost: &[u32]) -> Arc<Workload> {
    let layout = source.memory().layout().clone();
    let setup = source.setup_state().unwrap();
    let destination = Workload::destination().build(layout.page_size(), layout.blocks(), &setup).unwrap();
    for (page, bytes) in (0..).zip(pages(source)).filter(|(page, _)| !lost.contains(page)) {
        destination.machine.store(page, 0, &bytes);
    }
    destination
}

#[test]
fn pausing_stops_every_write_and_resuming_continues() {
    let guest = Workload::source(settings()).unwrap();
    assert_eq!(guest.run_state(), RunState::Running);
    for _ in 0..20 {
        run_for(&guest, 300);
        guest.pause().unwrap();
        let (status, before) = (guest.status(), pages(&guest));
        thread::sleep(Duration::from_millis(3));
        assert!(pages(&guest) == before, "memory changed while the guest was paused");
        assert_eq!((guest.status(), guest.run_state()), (status, RunState::Paused));
        guest.resume().unwrap();
    }
    let status = guest.check_all();
    assert!(status.running && status.pages_checked > 0);
    assert_eq!((status.stale_pages, status.first_stale), (0, None));
}

#[test]
fn a_page_that_is_rolled_back_is_found_by_the_sweep_and_by_its_writer() {
    let guest = Workload::source(solo()).unwrap();
    run_for(&guest, 2_000);
    guest.pause().unwrap();
    let old = pages(&guest);
    guest.resume().unwrap();
    run_for(&guest, 2_000);
    guest.pause().unwrap();
    assert_eq!(guest.check_all().stale_pages, 0);
    guest.machine.store(130, 0, &old[130]);
    let status = guest.check_all();
    assert_eq!(status.stale_pages, 1);
    let words = status.first_stale.unwrap();
    assert!(
        words.starts_with("page 2 of block ram1: holds sequence ")
            && words.contains(" of page 130, expected sequence "),
        "{words}"
    );
    guest.resume().unwrap();
    wait_for(&guest, |status| status.stale_pages == 2);
}

#[test]
fn bytes_that_are_not_those_of_the_stamp_and_stamps_that_are_none_are_found() {
    let guest = Workload::source(solo()).unwrap();
    run_for(&guest, 3_000);
    guest.pause().unwrap();
    let machine = &guest.machine;
    let mut sound = [0; PAGE];
    machine.load(1, 0, &mut sound);
    for (at, words) in [
        (0, "holds no stamp"),
        (STAMP_BYTES - 1, "holds no stamp"),
        (STAMP_BYTES, "the bytes are not"),
        (PAGE - 1, "the bytes are not"),
    ] {
        let before = guest.status();
        machine.store(1, at, &[sound[at] ^ 1]);
        let status = guest.check_all();
        assert_eq!(status.stale_pages, before.stale_pages + 1, "byte {at}");
        if at == 0 {
            assert!(status.first_stale.unwrap().contains(words));
        }
        machine.store(1, 0, &sound);
    }
}

#[test]
fn what_was_saved_continues_at_the_destination() {
    let source = Workload::source(settings()).unwrap();
    run_for(&source, 5_000);
    source.pause().unwrap();
    let (state, writes) = (source.save().unwrap(), source.status().writes);
    let destination = moved(&source, &[]);
    assert!(destination.memory().blocks().iter().all(|block| block.fresh));
    destination.prepare(&state).unwrap();
    assert!(destination.pause().is_err(), "it has not started");
    destination.start(RunState::Paused).unwrap();
    assert_eq!(destination.run_state(), RunState::Paused);
    assert!(destination.save().unwrap() == state, "the state came through changed");
    let status = destination.check_all();
    assert_eq!((status.writes, status.writes_since_start_here, status.stale_pages), (writes, 0, 0));
    destination.resume().unwrap();
    run_for(&destination, 2_000);
    let status = destination.check_all();
    assert!(status.running && status.writes_since_start_here >= 2_000);
    assert_eq!(status.stale_pages, 0);
    assert!(destination.start(RunState::Running).is_err(), "it has started already");
}

#[test]
fn a_page_lost_on_the_way_is_found_by_the_writers_that_continue() {
    let source = Workload::source(solo()).unwrap();
    run_for(&source, 5_000);
    source.pause().unwrap();
    let destination = moved(&source, &[31]);
    destination.prepare(&source.save().unwrap()).unwrap();
    destination.start(RunState::Running).unwrap();
    wait_for(&destination, |status| status.stale_pages == 1);
    let words = destination.status().first_stale.unwrap();
    assert!(words.starts_with("page 31 of block ram0: holds no stamp, expected sequence "), "{words}");
}

/// One pass over all extents: sync, then copy the dirty pages in the order that the laws require.
fn round(source: &Workload, logs: &[Arc<dyn DirtyLog>], bitmap: &DirtyBitmap, to: &GuestMemory, buffers: &BufferPool) {
    let (memory, layout) = (source.memory(), bitmap.layout());
    for block in 0..layout.block_count() {
        logs.iter().for_each(|log| log.sync(block, 0..layout.block_extents(block), bitmap).unwrap());
    }
    for at in bitmap.extents() {
        let mask = bitmap.take(at);
        if mask == 0 {
            continue;
        }
        logs.iter().for_each(|log| log.rearm(at, mask).unwrap());
        let mut pages = buffers.try_take().unwrap();
        let (from, size) = (&memory.block(at.block).memory, layout.page_size());
        let zero = from.read_extent(size, at.first_page(), mask, &mut pages).unwrap();
        for (bit, page) in bits(mask & !zero).zip(pages.chunks(size.bytes())) {
            to.block(at.block).memory.write_pages(size, at.page(bit).page, page).unwrap();
        }
        let batch = Batch { at, mask, untouched: 0, round: 1, kind: RoundKind::Live };
        let copy = CopiedBatch { batch, zero, pages: (mask != zero).then_some(pages) };
        logs.iter().for_each(|log| log.copied(&copy));
    }
}

#[test]
fn every_log_on_every_memory_lets_a_running_workload_arrive_whole() {
    for (dirty_log, backing) in [LogChoice::Auto, LogChoice::Software, LogChoice::Userfault, LogChoice::Hash]
        .into_iter()
        .flat_map(|log| [Backing::Anonymous, Backing::Memfd, Backing::Hugetlb].map(|backing| (log, backing)))
    {
        let memory = if backing == Backing::Hugetlb { 4 << 20 } else { settings().memory };
        let source = match Workload::source(WorkloadSettings { memory, dirty_log, backing, ..settings() }) {
            Err(error) if backing == Backing::Hugetlb => {
                println!("skipped: {error}");
                continue;
            }
            source => source.unwrap(),
        };
        let logs = match source.dirty_logs() {
            Err(error) if UserfaultLog::supported().is_err() => {
                println!("skipped: {error}");
                continue;
            }
            logs => logs.unwrap(),
        };
        let layout = source.memory().layout().clone();
        let setup = source.setup_state().unwrap();
        let destination = Workload::destination().build(layout.page_size(), layout.blocks(), &setup).unwrap();
        logs.iter().for_each(|log| log.start().unwrap());
        let (bitmap, buffers) = (DirtyBitmap::filled(&layout), BufferPool::new(1, layout.page_size().extent_bytes()));
        for _ in 0..5 {
            round(&source, &logs, &bitmap, &destination.memory(), &buffers);
            run_for(&source, 200);
        }
        source.pause().unwrap();
        let state = source.save().unwrap();
        round(&source, &logs, &bitmap, &destination.memory(), &buffers);
        logs.iter().for_each(|log| log.stop().unwrap());
        assert!(pages(&source) == pages(&destination), "{dirty_log:?} on {backing:?}: memory differs");
        destination.prepare(&state).unwrap();
        destination.start(RunState::Running).unwrap();
        run_for(&destination, 500);
        assert_eq!(destination.check_all().first_stale, None, "{dirty_log:?} on {backing:?}");
    }
}

#[test]
fn a_log_that_is_not_notified_shows() {
    // The rounds above find a missed page: with a log that misses writes, memory differs.
    let source = Workload::source(settings()).unwrap();
    let layout = source.memory().layout().clone();
    let destination = moved(&source, &[]);
    run_for(&source, 1_000);
    source.pause().unwrap();
    let nothing = DirtyBitmap::empty(&layout);
    round(&source, &[], &nothing, &destination.memory(), &BufferPool::new(1, layout.page_size().extent_bytes()));
    destination.prepare(&source.save().unwrap()).unwrap();
    destination.start(RunState::Paused).unwrap();
    assert!(destination.check_all().stale_pages > 0);
}

#[test]
fn the_fill_has_the_shares_that_were_asked_for_and_never_touches_zero_pages() {
    // The remaining quarter is zero pages too.
    let fill = Fill { zero: 0.25, text: 0.25, random: 0.25, process: 0.0 };
    let guest = Workload::source(WorkloadSettings {
        memory: 64 << 20,
        blocks: 1,
        backing: Backing::Memfd,
        fill,
        writers: vec![],
        ..settings()
    })
    .unwrap();
    // Called first: reading a hole of shared memory through its mapping fills it.
    let memory = guest.memory();
    let untouched: u64 =
        memory.block(0).memory.untouched(memory.page_size()).unwrap().iter().map(|range| range.end - range.start).sum();
    let pages = pages(&guest);
    let share = |is: fn(&[u8]) -> bool| pages.iter().filter(|page| is(page)).count() as f64 / pages.len() as f64;
    let zero = share(|page| page.iter().all(|&byte| byte == 0));
    let text = share(|page| page.iter().all(|&byte| byte.is_ascii_graphic() || b" \n".contains(&byte)));
    assert!((0.4..0.6).contains(&zero) && (0.17..0.33).contains(&text), "zero {zero}, text {text}");
    assert_eq!(untouched as f64 / pages.len() as f64, zero);
    assert_eq!(guest.check_all(), WorkloadStatus { running: true, ..WorkloadStatus::default() });
}

#[test]
fn a_fill_that_is_cancelled_ends_before_its_first_run() {
    let cancel = CancellationToken::new();
    cancel.cancel();
    let error = Workload::source_unless(settings(), &cancel).unwrap_err().to_string();
    assert!(error.starts_with("cancelled while the workload's memory was filled"), "{error}");
}

#[test]
fn what_can_be_made_is_reported_without_making_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("shared");
    let shared = |path: PathBuf, bytes| WorkloadSettings { shared: Some(SharedSettings { path, bytes }), ..settings() };
    Workload::check(shared(path.clone(), PAGE as u64)).unwrap();
    assert!(!path.exists());
    let nowhere = Workload::check(shared(folder.path().join("no/shared"), PAGE as u64)).unwrap_err().to_string();
    assert!(nowhere.contains("no/shared: No such file"), "{nowhere}");
    std::fs::write(&path, [7; PAGE]).unwrap();
    Workload::check(shared(path.clone(), PAGE as u64)).unwrap();
    let other = Workload::check(shared(path.clone(), 2 * PAGE as u64)).unwrap_err().to_string();
    assert!(other.starts_with("the shared block has 8192 bytes"), "{other}");
    let pipe = folder.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let piped = Workload::check(shared(pipe, PAGE as u64)).unwrap_err().to_string();
    assert!(piped.ends_with("pipe: it is no regular file"), "{piped}");
    assert_eq!(std::fs::read(&path).unwrap(), [7; PAGE]);
    assert!(Workload::check(WorkloadSettings { memory: 5000, ..settings() }).is_err());
}

#[test]
fn a_writer_with_no_page_to_write_is_idle_and_one_page_serves_one_writer() {
    let region = Region { from: 0.0, to: 0.001 };
    let nothing = WriterSettings { region, ..writer(Pattern::Zipf { exponent: 1.0 }, 8) };
    let guest =
        Workload::source(WorkloadSettings { writers: vec![nothing, writer(Pattern::Uniform, 0)], ..settings() })
            .unwrap();
    run_for(&guest, 1_000);
    guest.pause().unwrap();
    let destination = moved(&guest, &[]);
    destination.prepare(&guest.save().unwrap()).unwrap();
    destination.start(RunState::Running).unwrap();
    run_for(&destination, 1_000);
    assert_eq!(destination.check_all().stale_pages, 0);
}

#[test]
fn settings_out_of_their_limits_are_named() {
    let refuse = |change: fn(&mut WorkloadSettings)| {
        let mut settings = settings();
        change(&mut settings);
        Workload::source(settings).unwrap_err().to_string()
    };
    assert_eq!(
        refuse(|s| s.memory = 5000),
        "memory is 5000 bytes: it must be a multiple of blocks × page size, 8192 bytes"
    );
    assert_eq!(refuse(|s| s.blocks = 0), "blocks is 0: it may be 1 to 1024");
    assert_eq!(
        refuse(|s| s.writers[1].bytes = 4097),
        "writer 1: bytes is 4097: a write changes at most a page, 4096 bytes"
    );
    assert_eq!(
        refuse(|s| s.writers[0].region.to = f64::NAN),
        "writer 0: region is 0 to NaN: it must be 0 ≤ from < to ≤ 1"
    );
    assert!(refuse(|s| s.fill.text = -0.1).ends_with("none may be below 0"));
    assert!(refuse(|s| s.fill.text = f64::NAN).ends_with("none may be below 0"));
    assert_eq!(refuse(|s| s.fill.text = 0.5), "fill has shares that add up to 1.25: at most 1 is possible");
    assert!(refuse(|s| s.writers[0].pattern = Pattern::Zipf { exponent: 0.0 }).contains("exponent of zipf"));
    assert!(refuse(|s| s.memory = 1 << 50).contains("take larger pages"));
}

#[test]
fn a_destination_refuses_what_is_not_its_own() {
    let source = Workload::source(settings()).unwrap();
    source.pause().unwrap();
    let (setup, layout) = (source.setup_state().unwrap(), source.memory().layout().clone());
    let build = |page_size, blocks: &[BlockInfo], setup: &GuestState| {
        Workload::destination().build(page_size, blocks, setup).unwrap_err().to_string()
    };
    let mut blocks = layout.blocks().to_vec();
    blocks[1].length += 1;
    let words = build(PageSize::DEFAULT, &blocks, &setup);
    assert!(words.contains("ram1") && words.contains("524289") && words.contains("524288"), "{words}");
    assert!(build(PageSize::new(8192).unwrap(), layout.blocks(), &setup).contains("8192 B"));
    assert!(build(PageSize::DEFAULT, layout.blocks(), &GuestState::default()).contains("a workload has one"));
    let mut newer = setup.clone();
    newer.sections[0].version = 9;
    assert!(build(PageSize::DEFAULT, layout.blocks(), &newer).contains("version 9"));
    assert!(moved(&source, &[]).start(RunState::Running).is_err(), "it is not prepared");
}

/// The bytes of both sections. If they change, the format has another version.
#[test]
fn the_format_is_that_of_its_versions() {
    let mut all = settings();
    all.writers.push(writer(Pattern::HotSpot { pages: 0.5, writes: 0.25 }, 9));
    all.free = Some(FreeSettings { share: 0.5, turns_per_second: 2.0, range_pages: 9 });
    all.shared = Some(SharedSettings { path: "/there".into(), bytes: 8192 });
    let [setup] = &state::save_settings(&all, true).sections[..] else { panic!("one section") };
    let cursors = vec![pattern::Cursor { random: Rng::with_seed(300), next: 2 }];
    let device = DeviceState { written: 40, cursors, sequences: vec![0, 0, 0, 7, 200, 0, 1, 0] };
    let [device] = &device.save().sections[..] else { panic!("one section") };
    assert_eq!((setup.name.raw(), setup.version, device.name.raw(), device.version), ("workload", 3, "workload", 3));
    let share = |share: f64| share.to_le_bytes().to_vec();
    let expected = [
        // Memory, blocks, page size, backing, log, fill.
        &[vec![0x80, 0x80, 0x40, 2, 0x80, 0x20, 0, 1], share(0.25).repeat(4)].concat()[..],
        // Writers: pattern, pages a second, bytes, region.
        &[vec![3, 1], share(0.0), vec![40], share(0.0), share(1.0)].concat(),
        &[vec![0], share(0.0), vec![0x80, 0x20], share(0.0), share(1.0)].concat(),
        &[vec![3], share(0.5), share(0.25), share(0.0), vec![9], share(0.0), share(1.0)].concat(),
        // Free, unplugged, seed; plugged, shared block.
        &[vec![1], share(0.5), share(2.0), vec![9], share(0.0), vec![1], vec![1, 0x80, 0x40]].concat(),
    ];
    assert_eq!(setup.bytes, expected.concat());
    // Written, writers, pages, written pages, and these.
    assert_eq!(device.bytes, [40, 1, 0xac, 2, 2, 8, 3, 3, 7, 0, 0xc8, 1, 1, 1]);
}

#[test]
fn counts_and_places_beyond_those_here_are_refused() {
    let device = |bytes: &[u8]| {
        let section = StateSection { name: "workload".into(), version: 3, bytes: bytes.to_vec() };
        DeviceState::load(&GuestState { sections: vec![section] }, 1, 8).map_err(|error| error.to_string())
    };
    let fine = device(&[40, 1, 9, 2, 8, 2, 3, 7, 3, 1]).unwrap();
    assert_eq!((fine.written, fine.sequences), (40, vec![0, 0, 0, 7, 0, 0, 0, 1]));
    for (bytes, why) in [
        (&[40, 0xff, 0xff, 0xff, 0xff, 0xf][..], "at byte 6: 4294967295 writers came, 1 belong here"),
        (&[40, 1, 9, 2, 9], "at byte 5: 9 pages came, 8 belong here"),
        (&[40, 1, 9, 2, 8, 2, 3, 7, 4, 1], "at byte 10: a page behind the last one"),
        (&[40, 1, 9, 2, 8, 0xff, 0xff, 0xff, 0xff, 0xf], "at byte 10: it ends within a value"),
        (&[40, 1, 9, 2, 8, 0xff, 0xff, 0xff, 0xff, 0x1f], "at byte 10: a value cannot be decoded"),
        (&[40, 1, 9, 2, 8, 0, 0], "at byte 6: 1 bytes are left"),
    ] {
        assert_eq!(device(bytes).unwrap_err(), format!("the state \"workload\" does not fit, {why}"));
    }
    let setup = |bytes| {
        let section = StateSection { name: "workload".into(), version: 3, bytes };
        state::load_settings(&GuestState { sections: vec![section] }, None).unwrap_err().to_string()
    };
    assert!(setup(vec![1; (16 << 10) + 1]).ends_with("16385 bytes came, at most 16384 can be"));
}

/// A state with one error: cut to a length, or longer, or one bit flipped.
fn damaged(mut state: GuestState, cut: prop::sample::Index, bit: Option<u8>) -> GuestState {
    let bytes = &mut state.sections[0].bytes;
    let at = cut.index(bytes.len());
    match bit {
        Some(bit) => bytes[at] ^= 1 << (bit % 8),
        None if at == 0 => bytes.push(0),
        None => bytes.truncate(at),
    }
    state
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_damaged_state_is_refused_or_harmless(cut: prop::sample::Index, bit: Option<u8>) {
        let quiet = WorkloadSettings { memory: 16 * PAGE as u64, ..settings() };
        let settings_state = state::save_settings(&quiet, false);
        let setup = state::load_settings(&damaged(settings_state, cut, bit), None);
        prop_assert!(bit.is_some() || setup.is_err());

        let cursors = vec![pattern::Cursor { random: Rng::with_seed(3), next: 2 }; 2];
        let device = DeviceState { written: 40, cursors, sequences: (0..16).collect() };
        let machine = Machine::new(quiet.clone(), true, false).unwrap();
        let came = DeviceState::load(&damaged(device.save(), cut, bit), 2, 16);
        prop_assert!(bit.is_some() || came.is_err());
        if let Ok(came) = came {
            let restored = restore(&machine, &mut writer::writers(&quiet), came.clone());
            prop_assert_eq!(restored.is_err(), came.cursors.iter().any(|cursor| cursor.next >= 8));
        }
    }
}

#[test]
fn settings_come_through_whole() {
    let zipf = WriterSettings {
        pattern: Pattern::Zipf { exponent: 1.1 },
        pages_per_second: 0.1,
        bytes: 7,
        region: Region { from: 0.1, to: 0.3 },
    };
    let hot = writer(Pattern::HotSpot { pages: 0.1, writes: 0.9 }, 9);
    let mut all = settings();
    all.writers.extend([zipf, hot]);
    all.backing = Backing::Memfd;
    all.dirty_log = LogChoice::Hash;
    all.free = Some(FreeSettings { share: 0.5, turns_per_second: 7.5, range_pages: 9 });
    all.unplugged = 0.25;
    let saved = state::save_settings(&all, true);
    assert_eq!(state::load_settings(&saved, Some(Path::new("/here"))).unwrap(), (all.clone(), true));

    let shared = |path: &str| Some(SharedSettings { path: path.into(), bytes: 8192 });
    all.shared = shared("/there");
    let saved = state::save_settings(&all, false);
    let refusal = state::load_settings(&saved, None).unwrap_err().to_string();
    assert!(refusal.contains("a shared block of 8192 bytes came, and no file for it is named here"), "{refusal}");
    all.shared = shared("/here");
    assert_eq!(state::load_settings(&saved, Some(Path::new("/here"))).unwrap(), (all, false));
}
