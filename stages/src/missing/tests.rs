use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicU8;

use fastrand::Rng;
use rustix::fs::MemfdFlags;
use rustix::io::Errno;

use super::*;
use crate::stage::testing::{layout, page_size};

const HOST: usize = 4096;

/// Whether the test can run here.
pub(crate) fn can_run() -> bool {
    let host = rustix::param::page_size();
    let why = supported().err().map(|why| why.to_string());
    let why = why.or_else(|| (host != HOST).then(|| format!("pages of {host} bytes")));
    if let Some(why) = &why {
        println!("skipped: {why}");
    }
    why.is_none()
}

/// A guest of one block, of which pages are missing, and what they hold where they come from.
struct Scene {
    size: PageSize,
    memory: Arc<MappedMemory>,
    missing: Arc<MissingMemory>,
    expected: DirtyBitmap,
    length: usize,
}

/// The byte that fills a page.
fn fill(page: u64) -> u8 {
    u8::try_from(page % 255 + 1).unwrap()
}

impl Scene {
    fn new(memory: MappedMemory, size: PageSize, is_expected: impl Fn(u64) -> bool) -> Self {
        let memory = Arc::new(memory);
        let layout = layout(size, &[memory.len() as u64]);
        let expected = DirtyBitmap::empty(&layout);
        let pages = (0..layout.block_pages(0)).filter(|page| is_expected(*page));
        pages.for_each(|page| _ = expected.set(PageAt { block: 0, page }));
        let blocks = vec![(0, memory.clone())];
        let missing = MissingMemory::register(&layout, blocks, expected.copied(), Discards::Followed).unwrap();
        Self { size, length: memory.len(), memory, missing, expected }
    }

    fn pages(&self) -> u64 {
        self.expected.layout().block_pages(0)
    }

    fn offset(&self, page: u64) -> usize {
        usize::try_from(page).unwrap() * self.size.bytes()
    }

    /// The first byte of a page of the host, in a load that may wait.
    fn load(&self, host_page: usize) -> u8 {
        let mut byte = [0];
        self.memory.load((host_page * HOST).min(self.length - 1), &mut byte);
        byte[0]
    }

    /// Places the pages of a mask as they should be. Some are zero.
    fn place(&self, at: ExtentAt, mask: u64) -> u64 {
        let zero = bits(mask).filter(|bit| is_zero(at.page(*bit).page)).fold(0, |all, bit| all | 1 << bit);
        let others = mask & !zero;
        let bytes: Vec<_> = bits(others).flat_map(|bit| vec![fill(at.page(bit).page); self.size.bytes()]).collect();
        let zero = if zero == 0 { 0 } else { self.missing.place_zero(at, zero).unwrap() };
        zero | if others == 0 { 0 } else { self.missing.place(at, others, &bytes).unwrap() }
    }

    fn place_page(&self, page: PageAt) -> u64 {
        let (at, mask) = locate(page);
        self.place(at, mask)
    }

    /// Places each page that is asked for, until all are there or it is stopped.
    fn serve(&self, faults: &mut Faults) -> Next {
        loop {
            match faults.next().unwrap() {
                Next::Page(page) => _ = self.place_page(page),
                next => return next,
            }
        }
    }

    fn place_rest(&self) {
        self.missing.missing().all_dirty_extents().for_each(|at| _ = self.place(at, self.missing.missing().peek(at)));
    }

    /// What a page should hold if it was never discarded.
    fn content(&self, page: u64) -> u8 {
        if self.expected.is_set(PageAt { block: 0, page }) && !is_zero(page) { fill(page) } else { 0 }
    }

    fn assert_page(&self, page: u64, content: u8) {
        let mut bytes = vec![0; self.size.bytes().min(self.length - self.offset(page))];
        self.memory.load(self.offset(page), &mut bytes);
        assert!(bytes.iter().all(|byte| *byte == content), "page {page} is not full of {content}");
    }
}

/// Some pages are zero where they come from.
fn is_zero(page: u64) -> bool {
    page % 11 == 3
}

fn both_kinds(length: usize) -> [MappedMemory; 2] {
    [MappedMemory::anonymous(length).unwrap(), MappedMemory::memfd("missing", length).unwrap()]
}

/// Whether another userfaultfd can register the memory: then this one does not hold it any more.
fn is_free(memory: &MappedMemory) -> bool {
    let other = MissingFaults::open(false).unwrap();
    let start = memory.as_ptr().addr();
    // SAFETY: the memory outlives `other`, and nobody else uses it.
    match unsafe { other.register(start..start + memory.len().next_multiple_of(HOST)) } {
        Ok(registered) => registered,
        Err(error) => {
            assert_eq!(Errno::from_io_error(&error), Some(Errno::BUSY));
            false
        }
    }
}

#[test]
fn threads_that_touch_missing_pages_get_what_is_placed() {
    if !can_run() {
        return;
    }
    for kib in [4, 16] {
        let size = page_size(kib);
        for memory in both_kinds(300 * size.bytes() - 5000) {
            let scene = Scene::new(memory, size, |page| page % 3 != 0);
            thread::scope(|scope| {
                scope.spawn(|| assert_eq!(scene.serve(&mut scene.missing.faults()), Next::Complete));
                let touchers: Vec<_> = (0..4)
                    .map(|seed| {
                        let scene = &scene;
                        scope.spawn(move || {
                            let mut random = Rng::with_seed(seed);
                            for _ in 0..100 {
                                let page = random.u64(..scene.pages());
                                scene.assert_page(page, scene.content(page));
                            }
                        })
                    })
                    .collect();
                touchers.into_iter().for_each(|toucher| toucher.join().unwrap());
                scene.place_rest();
            });
            (0..scene.pages()).for_each(|page| scene.assert_page(page, scene.content(page)));
            let counts = scene.missing.counts();
            // A page whose thread is awake may be placed once more before it counts as placed.
            assert!(counts.duplicates <= counts.requests, "{counts:?}");
            assert_eq!((counts.placed, counts.discarded), (scene.expected.count(), 0));
            assert!(counts.requests > 0 && counts.zeros > 0 && counts.faults >= counts.requests, "{counts:?}");
            assert_eq!(counts.waits.count(), counts.requests);
            assert!(scene.missing.outstanding().is_empty() && scene.missing.is_complete());
            assert!(is_free(&scene.memory));
        }
    }
}

#[test]
fn a_system_call_into_a_missing_page_waits_for_it() {
    if !can_run() {
        return;
    }
    for memory in both_kinds(4 * HOST) {
        let scene = Scene::new(memory, PageSize::DEFAULT, |page| page != 2);
        let (from, to) = rustix::pipe::pipe().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| assert_eq!(scene.serve(&mut scene.missing.faults()), Next::Complete));
            File::from(to).write_all(&[99; 2 * HOST]).unwrap();
            // SAFETY: the bytes are of the memory, from the second page to the middle of the last.
            let read = unsafe { libc::read(from.as_raw_fd(), scene.memory.as_ptr().add(HOST + 8).cast(), 2 * HOST) };
            assert_eq!(read, 2 * HOST as isize);
            scene.place_rest();
        });
        let mut bytes = vec![0; 4 * HOST];
        scene.memory.load(0, &mut bytes);
        let parts =
            [(0..HOST, fill(0)), (HOST..HOST + 8, fill(1)), (HOST + 8..3 * HOST + 8, 99), (3 * HOST + 8..4 * HOST, 0)];
        for (part, byte) in parts {
            assert!(bytes[part.clone()].iter().all(|found| *found == byte), "{part:?}");
        }
    }
}

/// What a page of the host may hold, by how far its discard is.
struct Model {
    discards: Vec<AtomicU8>,
}

const DISCARDING: u8 = 1;
const DISCARDED: u8 = 2;

impl Model {
    fn touch(&self, scene: &Scene, host_page: usize) {
        let page = (host_page * HOST / scene.size.bytes()) as u64;
        let before = self.discards[host_page].load(Ordering::SeqCst);
        let found = scene.load(host_page);
        let after = self.discards[host_page].load(Ordering::SeqCst);
        let placed = scene.content(page);
        let may_be = match (before, after) {
            (DISCARDED, _) => found == 0,
            (_, 0) => found == placed,
            _ => found == 0 || found == placed,
        };
        assert!(may_be, "page {host_page} of the host holds {found}: discarded {before} before, {after} after");
    }

    fn discard(&self, scene: &Scene, host_pages: Range<usize>) {
        let note =
            |note| self.discards[host_pages.clone()].iter().for_each(|page| _ = page.fetch_max(note, Ordering::SeqCst));
        note(DISCARDING);
        let bytes = host_pages.start * HOST..(host_pages.end * HOST).min(scene.length);
        if scene.memory.is_shared() {
            let advice = rustix::mm::Advice::LinuxRemove;
            let start = scene.memory.as_ptr().wrapping_add(bytes.start).cast();
            // SAFETY: the pages are of this mapping, to which no reference exists.
            unsafe { rustix::mm::madvise(start, bytes.len().next_multiple_of(HOST), advice) }.unwrap();
        } else {
            scene.memory.give_back(bytes.start, bytes.len()).unwrap();
        }
        note(DISCARDED);
    }
}

/// Random touches, placements, duplicates and discards by several threads at once. A page that was discarded before a touch began is
/// zero, one that is not discarded when it ends is as placed.
#[test]
fn touches_placements_and_discards_in_any_order_agree_with_a_model() {
    if !can_run() {
        return;
    }
    for (seed, kib) in [(1, 4), (2, 4), (3, 16)] {
        let size = page_size(kib);
        for memory in both_kinds(200 * size.bytes() - 5000) {
            let scene = Scene::new(memory, size, |page| page % 4 != 0);
            let host_pages = scene.length.div_ceil(HOST);
            let model = Model { discards: (0..host_pages).map(|_| AtomicU8::new(0)).collect() };
            let mut faults = scene.missing.faults();
            let stop = faults.stopper();
            thread::scope(|scope| {
                let (scene, model) = (&scene, &model);
                // Completion ends the reports: a page stays missing until the discards are done.
                let last = scene.pages() - 1;
                scope.spawn(move || {
                    let end = scene.serve(&mut faults);
                    assert_eq!(end, Next::Stopped);
                });
                // However the threads are scheduled, one page is asked for and one is discarded before it arrives.
                let each = size.bytes() / HOST;
                model.touch(scene, each);
                model.discard(scene, 2 * each..3 * each);
                let toucher = |seed| {
                    move || {
                        let mut random = Rng::with_seed(seed);
                        (0..150).for_each(|_| model.touch(scene, random.usize(..host_pages - each)));
                    }
                };
                let mut threads: Vec<_> = (0..2).map(|thread| scope.spawn(toucher(seed * 10 + thread))).collect();
                threads.push(scope.spawn(move || {
                    let mut random = Rng::with_seed(seed * 10 + 5);
                    for _ in 0..60 {
                        let start = random.usize(..host_pages - 40);
                        model.discard(scene, start..start + random.usize(1..8));
                        thread::yield_now();
                    }
                }));
                threads.push(scope.spawn(move || {
                    let mut random = Rng::with_seed(seed * 10 + 6);
                    for _ in 0..100 {
                        let at = ExtentAt { block: 0, extent: random.u32(..scene.expected.layout().block_extents(0)) };
                        let (last_at, last_mask) = locate(PageAt { block: 0, page: last });
                        let keep = if at == last_at { !last_mask } else { u64::MAX };
                        scene.place(at, scene.expected.peek(at) & random.u64(..) & random.u64(..) & keep);
                        thread::yield_now();
                    }
                }));
                let ended: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
                stop.stop();
                assert!(ended.iter().all(Result::is_ok));
            });
            scene.place_rest();
            for host_page in 0..host_pages {
                model.touch(&scene, host_page);
            }
            let counts = scene.missing.counts();
            assert_eq!(counts.placed + counts.discarded, scene.expected.count(), "{counts:?}");
            assert!(counts.duplicates > 0 && counts.discarded > 0 && counts.requests > 0, "{counts:?}");
            assert!(scene.missing.is_complete() && is_free(&scene.memory));
        }
    }
}

#[test]
fn a_part_of_a_missing_page_may_be_discarded() {
    if !can_run() {
        return;
    }
    let scene = Scene::new(MappedMemory::anonymous(2 * 16384).unwrap(), page_size(16), |page| page == 1);
    let mut faults = scene.missing.faults();
    let stop = faults.stopper();
    thread::scope(|scope| {
        scope.spawn(|| assert_eq!(scene.serve(&mut faults), Next::Stopped));
        scene.memory.give_back(5 * HOST, HOST).unwrap();
        assert_eq!(scene.load(5), 0, "it is discarded, and touched without a request");
        assert_eq!(scene.missing.counts().requests, 0);
        stop.stop();
    });
    assert_eq!(scene.place_page(PageAt { block: 0, page: 1 }), 0, "it does not hold what was placed");
    assert_eq!([4, 5, 6, 7].map(|page| scene.load(page)), [fill(1), 0, fill(1), fill(1)]);
    let counts = scene.missing.counts();
    assert_eq!((counts.placed, counts.discarded, counts.duplicates), (0, 1, 0));
}

#[test]
fn pages_that_are_dropped_before_the_guest_runs_are_asked_for() {
    if !can_run() {
        return;
    }
    for memory in both_kinds(100 * HOST) {
        memory.store(0, &vec![200; 100 * HOST]);
        let scene = Scene::new(memory, PageSize::DEFAULT, |page| page >= 50);
        thread::scope(|scope| {
            scope.spawn(|| assert_eq!(scene.serve(&mut scene.missing.faults()), Next::Complete));
            scene.missing.discard(&scene.expected).unwrap();
            (0..50).for_each(|page| scene.assert_page(page, 200));
            (50..100).for_each(|page| scene.assert_page(page, scene.content(page)));
        });
        let counts = scene.missing.counts();
        assert_eq!((counts.requests, counts.discarded), (50, 0));
    }
}

#[test]
fn faults_are_stopped_while_threads_wait_and_asked_for_again() {
    if !can_run() {
        return;
    }
    let scene = Scene::new(MappedMemory::anonymous(8 * HOST).unwrap(), PageSize::DEFAULT, |_| true);
    let page = |page| PageAt { block: 0, page };
    let mut faults = scene.missing.faults();
    let stop = faults.stopper();
    thread::scope(|scope| {
        let one = scope.spawn(|| scene.load(5));
        assert_eq!(faults.next().unwrap(), Next::Page(page(5)));
        let other = scope.spawn(|| scene.load(1));
        assert_eq!(faults.next().unwrap(), Next::Page(page(1)));
        stop.stop();
        assert_eq!(faults.next().unwrap(), Next::Stopped);
        drop(faults);
        assert_eq!(scene.missing.outstanding(), [page(5), page(1)], "the oldest first");
        scene.missing.ask_again();
        let mut faults = scene.missing.faults();
        assert_eq!(faults.next().unwrap(), Next::Page(page(5)));
        assert_eq!(scene.place_page(page(1)), 1 << 1);
        assert_eq!(other.join().unwrap(), fill(1));
        assert!(!one.is_finished());
        scene.place_page(page(5));
        assert_eq!(one.join().unwrap(), fill(5));
        assert!(scene.missing.outstanding().is_empty());
        scene.place_rest();
        assert_eq!(faults.next().unwrap(), Next::Complete);
    });
    assert_eq!(scene.missing.counts().requests, 2);
}

#[test]
fn memory_stays_registered_while_pages_are_missing_even_when_it_unwinds() {
    if !can_run() {
        return;
    }
    let one = |_: u64| true;
    let scene = Scene::new(MappedMemory::anonymous(2 * HOST).unwrap(), PageSize::DEFAULT, one);
    scene.place_page(PageAt { block: 0, page: 0 });
    let memory = scene.memory.clone();
    drop(scene);
    assert!(!is_free(&memory));

    let scene = Scene::new(MappedMemory::anonymous(2 * HOST).unwrap(), PageSize::DEFAULT, one);
    let memory = scene.memory.clone();
    let unwound = catch_unwind(AssertUnwindSafe(move || {
        let _scene = scene;
        std::panic::resume_unwind(Box::new("the handler fails"));
    }));
    assert!(unwound.is_err() && !is_free(&memory));

    let scene = Scene::new(MappedMemory::anonymous(2 * HOST).unwrap(), PageSize::DEFAULT, one);
    scene.place_rest();
    let memory = scene.memory.clone();
    drop(scene);
    assert!(is_free(&memory));
}

#[test]
fn poisoned_pages_fail_and_never_read_as_zeros() {
    if !can_run() {
        return;
    }
    for memory in both_kinds(4 * HOST) {
        let scene = Scene::new(memory, PageSize::DEFAULT, |page| page < 2);
        scene.place_page(PageAt { block: 0, page: 0 });
        match scene.missing.poison() {
            Ok(poisoned) => assert_eq!(poisoned, 1),
            Err(PlaceError::Kernel(_, why)) if Errno::from_io_error(&why) == Some(Errno::INVAL) => {
                println!("skipped: this kernel cannot poison pages");
                return;
            }
            Err(error) => panic!("{error}"),
        }
        let memory = scene.memory.clone();
        drop(scene);
        assert!(is_free(&memory), "the descriptor is closed");
        let (_from, to) = rustix::pipe::pipe().unwrap();
        // SAFETY: the bytes are of the memory.
        let write = |page| unsafe { libc::write(to.as_raw_fd(), memory.as_ptr().add(page * HOST).cast(), 1) };
        assert_eq!(write(0), 1);
        assert_eq!(write(1), -1, "{memory:?}");
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EFAULT));
    }
}

#[test]
fn what_a_peer_may_send_is_refused_or_harmless() {
    if !can_run() {
        return;
    }
    let scene = Scene::new(MappedMemory::anonymous(70 * HOST).unwrap(), PageSize::DEFAULT, |page| page != 2);
    let at = |block, extent| ExtentAt { block, extent };
    let place = |at, pages: u64, bytes: usize| scene.missing.place(at, pages, &vec![7; bytes]);
    let page = |block, page| PageAt { block, page };
    for (extent, bit) in [(at(0, 1), 6), (at(0, u32::MAX), 0), (at(1, 0), 5)] {
        let error = place(extent, 1 << bit, HOST).unwrap_err();
        assert!(matches!(error, PlaceError::OutOfRange(page) if page == extent.page(bit)), "{error}");
    }
    assert!(matches!(place(at(0, 0), 0b111, 3 * HOST), Err(PlaceError::NotExpected(found)) if found == page(0, 2)));
    assert!(matches!(scene.missing.place_zero(at(0, 0), 0b100), Err(PlaceError::NotExpected(_))));
    for bytes in [0, HOST - 1, HOST + 1, 2 * HOST] {
        let error = place(at(0, 0), 1, bytes).unwrap_err();
        assert!(matches!(error, PlaceError::Length { pages: 1, bytes: found } if found == bytes), "{error}");
    }
    assert_eq!(scene.missing.left(), 69, "nothing was placed");
    assert_eq!(place(at(0, 0), 0b1011, 3 * HOST).unwrap(), 0b1011);
    assert_eq!(scene.missing.place(at(0, 0), 0b1, &[8; HOST]).unwrap(), 0, "the first that came stays");
    assert_eq!([0, 1, 3].map(|page| scene.load(page)), [7, 7, 7]);
    assert_eq!(place(at(0, 0), 0, 0).unwrap(), 0);
    let counts = scene.missing.counts();
    assert_eq!((counts.placed, counts.duplicates), (3, 1));
    scene.place_rest();
    assert_eq!(place(at(0, 1), 1, HOST).unwrap(), 0, "after the end too");
}

#[test]
fn a_page_that_somebody_else_populated_is_an_error() {
    if !can_run() {
        return;
    }
    let file = File::from(rustix::fs::memfd_create("missing", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(4 * HOST as u64).unwrap();
    let scene = Scene::new(MappedMemory::file(file.try_clone().unwrap()).unwrap(), PageSize::DEFAULT, |_| true);
    file.write_all_at(&[1], HOST as u64).unwrap();
    let at = ExtentAt { block: 0, extent: 0 };
    let error = scene.missing.place(at, 0b111, &[7; 3 * HOST]).unwrap_err();
    assert!(matches!(error, PlaceError::Populated(PageAt { block: 0, page: 1 })), "{error}");
    assert_eq!(scene.missing.left(), 4, "none of the run counts as placed");
}

#[test]
fn a_run_across_two_mappings_is_placed() {
    if !can_run() {
        return;
    }
    let scene = Scene::new(MappedMemory::anonymous(8 * HOST).unwrap(), PageSize::DEFAULT, |_| true);
    let start = scene.memory.as_ptr().wrapping_add(4 * HOST).cast();
    // SAFETY: the pages are of this mapping, and stay readable.
    unsafe { rustix::mm::mprotect(start, HOST, rustix::mm::MprotectFlags::READ) }.unwrap();
    scene.place_rest();
    (0..8).for_each(|page| scene.assert_page(page, scene.content(page)));
}

#[test]
fn memory_that_cannot_be_filled_is_refused() {
    if !can_run() {
        return;
    }
    let layout = layout(PageSize::DEFAULT, &[2 * HOST as u64, HOST as u64]);
    let memory = || Arc::new(MappedMemory::anonymous(2 * HOST).unwrap());
    let expected = DirtyBitmap::filled(&layout);
    let error = MissingMemory::register(&layout, vec![(0, memory())], expected, Discards::Excluded).unwrap_err();
    assert!(matches!(error, TargetError::NoMemory(PageAt { block: 1, page: 0 })), "{error}");
    let file = tempfile::tempfile_in("/var/tmp").unwrap();
    file.set_len(2 * HOST as u64).unwrap();
    let on_disk = Arc::new(MappedMemory::file(file).unwrap());
    let expected = DirtyBitmap::empty(&layout);
    expected.set(PageAt { block: 0, page: 0 });
    match MissingMemory::register(&layout, vec![(0, on_disk)], expected.copied(), Discards::Excluded) {
        Err(error) => assert!(matches!(error, TargetError::Register { block: 0, .. }), "{error}"),
        Ok(_) => println!("skipped: /var/tmp is in memory"),
    }
    if let Ok(huge) = MappedMemory::hugetlb("huge", 2 << 20) {
        let layout = crate::stage::testing::layout(PageSize::DEFAULT, &[2 << 20]);
        let expected = DirtyBitmap::filled(&layout);
        let error =
            MissingMemory::register(&layout, vec![(0, Arc::new(huge))], expected, Discards::Excluded).unwrap_err();
        assert!(matches!(error, TargetError::HugePages(0)), "{error}");
    } else {
        println!("skipped: no huge page can be reserved");
    }
}

#[test]
fn memory_of_which_nothing_is_missing_is_complete() {
    if !can_run() {
        return;
    }
    let scene = Scene::new(MappedMemory::anonymous(HOST).unwrap(), PageSize::DEFAULT, |_| false);
    assert!(scene.missing.is_complete() && is_free(&scene.memory));
    assert_eq!(scene.missing.faults().next().unwrap(), Next::Complete);
}
