//! Machines that run, stop, are throttled, and move by their state alone. Skipped on a host without KVM.

use std::time::{Duration, Instant};

use super::*;
use memferry::guest::StateSection;

/// How long anything may take on a machine that is busy with other work.
const PATIENCE: Duration = Duration::from_secs(60);

/// Settings of a small machine; `None` on a host without KVM, with a message.
fn small() -> Option<KvmSettings> {
    if let Err(why) = memferry_stages::host::kvm() {
        println!("skipped: {why}");
        return None;
    }
    Some(KvmSettings { memory: 4 << 20, region: 64 << 10, ..KvmSettings::default() })
}

#[track_caller]
fn until(guest: &KvmGuest, holds: impl Fn(&KvmStatus) -> bool) -> KvmStatus {
    let begun = Instant::now();
    loop {
        let status = guest.status();
        if holds(&status) {
            return status;
        }
        assert!(begun.elapsed() < PATIENCE, "waited in vain: {status:?}");
        assert_eq!((status.failed.as_ref(), status.troubles), (None, 0), "{status:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Moves a paused machine into another: memory, then state, as a migration does.
fn moved(from: &KvmGuest, dirty_log: KvmLogChoice) -> Arc<KvmGuest> {
    let (memory, setup) = (from.memory(), from.setup_state().unwrap());
    let builder = KvmGuest::destination(dirty_log);
    let to = builder.build(memory.page_size(), memory.layout().blocks(), &setup).unwrap();
    let state = from.save().unwrap();
    let (source, copy) = (memory, to.memory());
    let mut page = vec![0; 4096];
    for block in 0..source.layout().block_count() {
        for at in 0..source.layout().block_pages(block) {
            source.block(block).memory.read_page(PageSize::DEFAULT, at, &mut page).unwrap();
            copy.block(block).memory.write_pages(PageSize::DEFAULT, at, &page).unwrap();
        }
    }
    to.prepare(&state).unwrap();
    to
}

#[test]
fn a_machine_runs_and_its_timer_ticks() {
    let Some(settings) = small() else { return };
    for vcpus in [1, 3] {
        let guest = KvmGuest::source(KvmSettings { vcpus, ..settings.clone() }).unwrap();
        let status = until(&guest, |status| status.pass >= 5 && status.ticks >= 3);
        assert!(status.running && status.heartbeats >= 5 * u64::from(vcpus), "{status:?}");
    }
}

#[test]
fn a_paused_machine_writes_nothing_and_continues_where_it_was() {
    let Some(settings) = small() else { return };
    let guest = KvmGuest::source(KvmSettings { vcpus: 2, pages_per_second: 0.0, ..settings }).unwrap();
    let logs = guest.dirty_logs().unwrap();
    for _ in 0..5 {
        let before = until(&guest, |status| status.pass >= 2).pass;
        logs.iter().for_each(|log| log.start().unwrap());
        guest.pause().unwrap();
        let dirty = memferry_stages::bitmap::DirtyBitmap::empty(guest.memory().layout());
        let sync = || {
            logs.iter().for_each(|log| log.sync(0, 0..16, &dirty).unwrap());
            dirty.extents().for_each(|at| {
                let mask = dirty.take(at);
                logs.iter().for_each(|log| log.rearm(at, mask).unwrap());
            });
        };
        sync();
        let paused = guest.status();
        std::thread::sleep(Duration::from_millis(20));
        logs.iter().for_each(|log| log.sync(0, 0..16, &dirty).unwrap());
        assert_eq!((dirty.count(), guest.status()), (0, paused));
        logs.iter().for_each(|log| log.stop().unwrap());
        guest.resume().unwrap();
        until(&guest, |status| status.pass > before);
    }
}

#[test]
fn a_machine_moves_with_its_state_and_finds_no_fault() {
    let Some(settings) = small() else { return };
    for vcpus in [1, 2] {
        let mut guest = KvmGuest::source(KvmSettings { vcpus, pages_per_second: 0.0, ..settings.clone() }).unwrap();
        for dirty_log in [KvmLogChoice::DirtyRing, KvmLogChoice::Hash, KvmLogChoice::DirtyLog] {
            until(&guest, |status| status.heartbeats >= 3);
            guest.pause().unwrap();
            let before = guest.status();
            let next = moved(&guest, dirty_log);
            assert_eq!(next.run_state(), RunState::Paused);
            next.start(RunState::Running).unwrap();
            let after = until(&next, |status| status.pass >= before.pass + 3 && status.ticks > before.ticks + 2);
            assert!(after.pages > 0 && after.heartbeats >= 3, "{after:?}");
            guest = next;
        }
    }
}

#[test]
fn a_stale_page_is_found_by_the_guest() {
    let Some(settings) = small() else { return };
    let guest = KvmGuest::source(settings).unwrap();
    until(&guest, |status| status.pass >= 2);
    guest.pause().unwrap();
    let next = moved(&guest, KvmLogChoice::DirtyLog);
    // Page 5 of the region as it was a pass ago.
    let (memory, page) = (next.memory(), (2 << 20) / 4096 + 5);
    let mut content = vec![0; 4096];
    memory.block(0).memory.read_page(PageSize::DEFAULT, page, &mut content).unwrap();
    content[8] ^= 1;
    memory.block(0).memory.write_pages(PageSize::DEFAULT, page, &content).unwrap();
    next.start(RunState::Running).unwrap();
    let begun = Instant::now();
    while next.status().troubles == 0 {
        assert!(begun.elapsed() < PATIENCE, "{:?}", next.status());
        std::thread::sleep(Duration::from_millis(2));
    }
    let status = next.status();
    assert!(status.first_trouble.as_ref().unwrap().contains("wrong page 00000005"), "{status:?}");
}

#[test]
fn a_held_machine_writes_less() {
    // In each slice of 10 ms it runs for a hundredth: no vCPU writes a page in less than half a microsecond. On a busy
    // machine the throttle's thread may be late, though not every time.
    const MOST_IN_A_SLICE: u128 = 200;
    let Some(settings) = small() else { return };
    let guest = KvmGuest::source(KvmSettings { vcpus: 1, pages_per_second: 0.0, ..settings }).unwrap();
    until(&guest, |status| status.pass >= 2);
    guest.throttle(99).unwrap();
    let is_held = |_| {
        let (before, begun) = (guest.status().pages, Instant::now());
        let status = until(&guest, |status| status.pages > before && begun.elapsed() > Duration::from_millis(100));
        let (pages, slices) = (u128::from(status.pages - before), begun.elapsed().as_micros() / 9_900 + 2);
        println!("{pages} pages in {slices} slices");
        pages <= slices * MOST_IN_A_SLICE
    };
    assert!((0..100).any(is_held));
    guest.throttle(0).unwrap();
    let before = guest.status().pass;
    until(&guest, |status| status.pass > before + 2);
}

#[test]
fn state_that_does_not_fit_is_refused() {
    let Some(settings) = small() else { return };
    let guest = KvmGuest::source(settings).unwrap();
    until(&guest, |status| status.pass >= 1);
    guest.pause().unwrap();
    let (setup, state) = (guest.setup_state().unwrap(), guest.save().unwrap());
    let memory = guest.memory();
    let build = |setup: &GuestState| {
        KvmGuest::destination(KvmLogChoice::DirtyLog).build(PageSize::DEFAULT, memory.layout().blocks(), setup)
    };
    // Cut anywhere, or with trailing bytes.
    let cut = |whole: &GuestState, section: usize, length: usize| {
        let mut cut = whole.clone();
        cut.sections[section].bytes.resize(length, 0xff);
        cut
    };
    let length = setup.sections[0].bytes.len();
    for to in [0, 7, 8, 30, length - 1, length + 1] {
        build(&cut(&setup, 0, to)).unwrap_err();
    }
    let to = build(&setup).unwrap();
    for (section, whole) in state.sections.iter().enumerate() {
        let length = whole.bytes.len();
        for to_length in (0..length).step_by(length / 40 + 1).chain([length - 1, length + 1]) {
            to.prepare(&cut(&state, section, to_length)).unwrap_err();
        }
    }
    let renamed = StateSection { name: "vcpu 1".into(), ..state.sections[0].clone() };
    to.prepare(&GuestState { sections: vec![renamed, state.sections[1].clone()] }).unwrap_err();
    to.prepare(&GuestState { sections: vec![state.sections[1].clone()] }).unwrap_err();
    to.prepare(&GuestState::default()).unwrap_err();
    to.prepare(&state).unwrap();
    to.prepare(&state).unwrap_err();
}
