//! Law 10: nothing per page but the work. Migrations of a small and of a large guest are compared: what the additional
//! pages cost, at both ends together, is far below one allocation and one system call each.
//!
//! A binary of its own: its allocator counts the allocations of the whole process, and the kernel counts the process's
//! system calls that read or write (`/proc/self/io`).

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use memferry::events::{Event, Outcome, Role};
use memferry::settings::{After, EncoderSettings, OnMiss, SourceSettings, XbzrleSettings};
use memferry_stages::codec::Codec;
use memferry_stages::geometry::PageSize;
use memferry_tests::{Recorder, TestGuest, migrate_watched, skipped, source_settings};
use memferry_transports::Transport;
use memferry_transports::file::FileTransport;
use memferry_transports::memory::MemoryTransport;
use tokio_util::sync::CancellationToken;

const PAGE: u64 = 4096;
const SMALL: u64 = 16 << 20;
const LARGE: u64 = 128 << 20;
/// The most allocations, and the most system calls, for each page. A cost of each page is at least 1; one of each batch
/// of 64 pages is counted as little, and so is what depends on time, such as the figures of a running migration.
const MOST: f64 = 0.5;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// Does this thread act as the guest, whose allocations do not count?
    static IS_GUEST: Cell<bool> = const { Cell::new(false) };
}

struct Counting;

impl Counting {
    fn count() {
        if !IS_GUEST.get() {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
    }
}

// SAFETY: it is the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::count();
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::count();
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        Self::count();
        // SAFETY: as the caller promises.
        unsafe { System.realloc(memory, layout, bytes) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The system calls of this process that read or write, as the kernel counts them.
fn system_calls() -> Option<u64> {
    let io = std::fs::read_to_string("/proc/self/io").ok()?;
    let field = |name: &str| io.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
    Some(field("syscr:")? + field("syscw:")?)
}

/// How the pages of a migration are encoded.
#[derive(Clone, Copy, Debug)]
enum Encoding {
    Raw,
    Compressed,
    /// Each page travels twice: raw, and then as a delta.
    Deltas,
}

impl Encoding {
    fn settings(self) -> EncoderSettings {
        let xbzrle = XbzrleSettings { cache_bytes: 2 * LARGE, on_miss: OnMiss::Raw, cache_first_round: true };
        match self {
            Self::Raw => EncoderSettings { compress: None, xbzrle: None },
            Self::Compressed => EncoderSettings { compress: Some(Codec::Lz4), xbzrle: None },
            Self::Deltas => EncoderSettings { compress: None, xbzrle: Some(xbzrle) },
        }
    }

    fn guest(self, bytes: u64) -> TestGuest {
        match self {
            Self::Raw | Self::Deltas => TestGuest::incompressible(PageSize::DEFAULT, bytes),
            Self::Compressed => {
                let text = b"all work and no play makes a dull page; ".iter().copied().cycle();
                TestGuest::repeating(PageSize::DEFAULT, bytes, &text.take(4096 * 5).collect::<Vec<_>>())
            }
        }
    }
}

/// What a migration took, at both ends together.
#[derive(Debug)]
struct Cost {
    pages: u64,
    allocations: u64,
    system_calls: Option<u64>,
}

/// Migrates a guest of this size, over memory or through a file.
fn cost(encoding: Encoding, through_file: bool, bytes: u64) -> Cost {
    let folder = tempfile::tempdir().unwrap();
    let transport: Arc<dyn Transport> = if through_file {
        Arc::new(FileTransport::new(folder.path().join("stream")))
    } else {
        Arc::new(MemoryTransport::new(1 << 20))
    };
    let settings = SourceSettings {
        encoder: encoding.settings(),
        after: through_file.then_some(After::Pause),
        downtime_limit: Duration::from_secs(20),
        ..source_settings(2, 1)
    };
    let source = encoding.guest(bytes).running(0);
    let guest = source.clone();
    let recorder = Recorder::calling(move |role, event| {
        if role == Role::Source && matches!(event, Event::RoundSent { tally, .. } if tally.round == 1) {
            write_each_page(&guest, encoding, bytes);
        }
    });
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let destination = Arc::new(TestGuest::destination());
    let moving = migrate_watched(source, destination, transport, settings, CancellationToken::new(), recorder);
    let (allocations, calls) = (ALLOCATIONS.load(Ordering::Relaxed), system_calls());
    let ends = runtime.block_on(moving);
    let (allocations, calls) = (ALLOCATIONS.load(Ordering::Relaxed) - allocations, system_calls().zip(calls));
    assert_eq!(ends.destination.outcome, Outcome::Completed, "{:?}, {:?}", ends.source.error, ends.destination.error);
    let rounds = ends.events.iter().filter_map(|(role, event)| match event {
        Event::RoundSent { tally, .. } if *role == Role::Source => Some(tally.pages),
        _ => None,
    });
    let (mut pages, mut compressed, mut deltas) = (0, 0, 0);
    for round in rounds {
        (pages, compressed, deltas) = (pages + round.all, compressed + round.compressed, deltas + round.xbzrle);
    }
    match encoding {
        Encoding::Raw => assert_eq!((compressed, deltas), (0, 0)),
        Encoding::Compressed => assert!(compressed >= bytes / PAGE / 2, "{compressed} pages were compressed"),
        Encoding::Deltas => assert!(deltas >= bytes / PAGE / 2, "{deltas} pages travelled as deltas"),
    }
    Cost { pages, allocations, system_calls: calls.map(|(after, before)| after - before) }
}

/// Writes a little of each page, where deltas are to be sent.
fn write_each_page(guest: &TestGuest, encoding: Encoding, bytes: u64) {
    if matches!(encoding, Encoding::Deltas) {
        IS_GUEST.set(true);
        (0..bytes / PAGE).for_each(|page| guest.write(0, usize::try_from(page * PAGE).unwrap(), b"written!"));
        IS_GUEST.set(false);
    }
}

#[test]
fn a_page_costs_no_allocation_and_no_system_call() {
    for encoding in [Encoding::Raw, Encoding::Compressed, Encoding::Deltas] {
        for through_file in [false, true] {
            let (small, large) = (cost(encoding, through_file, SMALL), cost(encoding, through_file, LARGE));
            let pages = large.pages - small.pages;
            assert!(pages >= (LARGE - SMALL) / PAGE, "{pages} pages more");
            #[expect(clippy::cast_precision_loss, reason = "a ratio")]
            let each = |small: u64, large: u64| large.saturating_sub(small) as f64 / pages as f64;
            let allocations = each(small.allocations, large.allocations);
            let calls = small.system_calls.zip(large.system_calls).map(|(small, large)| each(small, large));
            println!("{encoding:?}, file {through_file}: {allocations:.4} allocations, {calls:.4?} calls a page");
            assert!(allocations < MOST, "{encoding:?}: {allocations} allocations a page: {small:?}, {large:?}");
            match calls {
                Some(calls) => assert!(calls < MOST, "{encoding:?}: {calls} calls a page: {small:?}, {large:?}"),
                None => skipped("system calls: this kernel does not count them in /proc/self/io"),
            }
        }
    }
}
