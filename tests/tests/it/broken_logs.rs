//! A dirty log over the strict model of a hypervisor, with a mistake in it, loses a write: each way of comparing the memories finds it.
//!
//! A page is written before the first sync, which finds it. The second round sends it, and a write after that is lost.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use memferry::events::Outcome;
use memferry::guest::Guest;
use memferry::settings::{SourceSettings, Verify};
use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::dirty_log::DirtyLog;
use memferry_stages::dirty_log::model::{Hypervisor, ModelLog};
use memferry_stages::geometry::{EXTENT_PAGES, ExtentAt, PageAt, PageSize};
use memferry_tests::{Ends, TestGuest, migrate, source_settings};
use memferry_transports::memory::MemoryTransport;
use tokio_util::sync::CancellationToken;

/// The page that is written before the first sync, and its neighbour in the same extent. Neither is zero.
const PAGE: PageAt = PageAt { block: 0, page: 589 };
const NEIGHBOUR: PageAt = PageAt { block: 0, page: 590 };
const EXTENT: ExtentAt = ExtentAt { block: 0, extent: 9 };
const BIT: u64 = 1 << (PAGE.page % EXTENT_PAGES);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mistake {
    None,
    /// A page that was fetched is not protected again.
    ForgetsToRearm,
    /// A page that was not fetched is protected again with its neighbour.
    RearmsTooMuch,
    /// What the second sync fetches is not reported.
    ForgetsBits,
}

/// The log, which writes to the guest at the moments that matter.
#[derive(Debug)]
struct Broken {
    guest: Weak<TestGuest>,
    hypervisor: Arc<Hypervisor>,
    right: ModelLog,
    mistake: Mistake,
    verify: Verify,
    syncs: AtomicU32,
    /// The page whose last write is lost.
    lost: Mutex<Option<PageAt>>,
}

impl Broken {
    fn new(guest: &Arc<TestGuest>, mistake: Mistake, verify: Verify) -> Self {
        let memory = guest.memory();
        let guest = Arc::downgrade(guest);
        let hypervisor = Hypervisor::new(memory.layout());
        let right = ModelLog::new(hypervisor.clone(), memory.layout());
        Self { guest, hypervisor, right, mistake, verify, syncs: AtomicU32::new(0), lost: Mutex::default() }
    }

    /// The guest under that hypervisor, whose own writes are in another log.
    fn guest(&self) -> Arc<TestGuest> {
        self.guest.upgrade().expect("the guest is there")
    }

    fn write(&self, at: PageAt) {
        let offset = usize::try_from(at.page * 4096 + 17).unwrap();
        self.hypervisor.write(at, || self.guest().corrupt(0, offset));
    }

    /// The second round has sent the page.
    fn second_sync(&self) {
        if self.mistake != Mistake::RearmsTooMuch {
            self.write(PAGE);
            *self.lost.lock().unwrap() = Some(PAGE).filter(|_| self.mistake != Mistake::None);
        }
        let lost = *self.lost.lock().unwrap();
        if let (Some(lost), Verify::Pages) = (lost, self.verify) {
            // The background check has read it after the write: the second read begins behind the end of the first.
            self.guest().until_read(lost.page, 3);
        }
    }
}

impl DirtyLog for Broken {
    fn start(&self) -> io::Result<()> {
        self.right.start()
    }

    fn sync(&self, block: u32, extents: Range<u32>, into: &DirtyBitmap) -> io::Result<()> {
        if !extents.contains(&EXTENT.extent) {
            return self.right.sync(block, extents, into);
        }
        let number = self.syncs.fetch_add(1, Ordering::SeqCst) + 1;
        match number {
            1 => self.write(PAGE),
            2 => self.second_sync(),
            _ => {}
        }
        let forgets = number == 2 && self.mistake == Mistake::ForgetsBits;
        let none = DirtyBitmap::empty(into.layout());
        self.right.sync(block, extents, if forgets { &none } else { into })
    }

    fn rearm(&self, at: ExtentAt, mask: u64) -> io::Result<()> {
        let is_second = self.syncs.load(Ordering::SeqCst) == 1 && at == EXTENT && mask & BIT != 0;
        match self.mistake {
            Mistake::ForgetsToRearm if is_second => return Ok(()),
            Mistake::RearmsTooMuch if is_second => {
                self.write(NEIGHBOUR);
                self.hypervisor.rearm(at, u64::MAX);
                *self.lost.lock().unwrap() = Some(NEIGHBOUR);
            }
            _ => {}
        }
        self.right.rearm(at, mask)
    }

    fn rearms_late(&self) -> bool {
        self.right.rearms_late()
    }

    fn arm_unread(&self, pages: &DirtyBitmap) -> io::Result<bool> {
        self.right.arm_unread(pages)
    }

    fn mark(&self, block: u32, pages: Range<u64>) {
        self.right.mark(block, pages);
    }

    fn stop(&self) -> io::Result<()> {
        self.right.stop()
    }
}

fn moved(mistake: Mistake, verify: Verify) -> (Ends, Arc<Broken>, [Vec<Vec<u8>>; 2]) {
    let source = TestGuest::source(PageSize::DEFAULT, &[768 * 4096]).running(0);
    let destination = Arc::new(TestGuest::destination());
    let log = Arc::new(Broken::new(&source, mistake, verify));
    source.add_log(log.clone());
    // Nothing but a sync that finds nothing allows the switchover.
    let settings = SourceSettings { verify, downtime_limit: Duration::from_nanos(1), ..source_settings(2, 1) };
    let transport = Arc::new(MemoryTransport::new(64 << 10));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let moving = migrate(source.clone(), destination.clone(), transport, settings, CancellationToken::new());
    let ends = runtime.block_on(moving);
    let completed = ends.source.outcome == Outcome::Completed;
    assert_eq!((source.runs(), destination.runs()), (!completed, completed));
    (ends, log, [source.bytes(), destination.bytes()])
}

#[test]
fn a_strict_log_without_a_mistake_loses_nothing() {
    for verify in [Verify::Pages, Verify::Full] {
        let (ends, log, [source, destination]) = moved(Mistake::None, verify);
        assert_eq!((ends.source.outcome, ends.source.verified), (Outcome::Completed, Some(true)));
        assert!(source == destination && log.hypervisor.lost() == 0);
    }
}

#[test]
fn each_mistake_is_found_by_both() {
    for mistake in [Mistake::ForgetsToRearm, Mistake::RearmsTooMuch, Mistake::ForgetsBits] {
        for (verify, words) in [(Verify::Pages, "the dirty log lost a write"), (Verify::Full, "verification failed")] {
            let (ends, log, _) = moved(mistake, verify);
            let lost = log.lost.lock().unwrap().expect("a write was lost");
            let page = format!("page {} of block \"ram0\"", lost.page);
            let error = ends.source.error.as_deref().unwrap_or_default();
            assert_eq!(ends.source.outcome, Outcome::Failed, "{mistake:?}");
            assert!(error.contains(words) && error.contains(&page), "{mistake:?}, {verify:?}: {error}");
        }
    }
}

#[test]
fn without_a_comparison_the_memories_differ() {
    let (ends, _, [source, destination]) = moved(Mistake::ForgetsToRearm, Verify::Off);
    assert_eq!(ends.source.outcome, Outcome::Completed);
    assert!(source != destination, "the write is lost");
}
