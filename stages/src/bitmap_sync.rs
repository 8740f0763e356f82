//! Stage: bitmap sync. Moves what the dirty logs found into the dirty bitmap, once for each order.
//!
//! - **Takes** a [`SyncOrder`] from the controller.
//! - **Gives** a [`Synced`]: how many pages are dirty, and how long the sync took.
//! - **Owns** nothing: logs and bitmaps are shared.
//! - **Promises** that every log is queried for every extent, that no [excluded](Exclusions) page has its bit set
//!   afterwards, that syncs never overlap, and that the sync of a dropped task ends at the next range of [`RANGE_BYTES`].
//!
//! The logs are queried on a thread where blocking is allowed.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::bitmap::DirtyBitmap;
use crate::dirty_log::{DirtyLog, LogCall};
use crate::error::{Cause, StageError};
use crate::exclusions::Exclusions;
use crate::geometry::Layout;
use crate::meter::Meter;
use crate::queue::{Closed, Inlet, Outlet};
use crate::stage::Stage;
use crate::stage_id::StageId;

/// The most guest memory that a log is queried for in one call, in bytes: a cancel takes effect between two.
pub const RANGE_BYTES: usize = 64 << 20;

/// An order to move what the logs have found so far into the bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyncOrder {
    /// The round that was scanned before; 0 before the first.
    pub after_round: u32,
}

/// A sync is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Synced {
    /// As in the order.
    pub after_round: u32,
    /// Pages whose bit is set.
    pub dirty_pages: u64,
    /// How long it took.
    pub duration: Duration,
}

/// The stage: see the module.
#[derive(Debug)]
pub struct BitmapSync {
    work: Work,
    stage: Stage,
}

impl BitmapSync {
    /// A sync of all `logs` into `bitmap`. The meter counts a sync as a batch, and the pages that are dirty after it.
    #[must_use]
    pub fn new(logs: Vec<Arc<dyn DirtyLog>>, bitmap: Arc<DirtyBitmap>, meter: Arc<Meter>) -> Self {
        let work = Work { logs, bitmap, exclusions: None, untouched: Mutex::default(), at_work: Arc::default() };
        Self { work, stage: Stage::new(StageId::BITMAP_SYNC, meter) }
    }

    /// Pages that a sync finds written are taken out of `untouched`.
    ///
    /// Needed where the scanner is given untouched pages and a sync may precede its first scan: the log reports a
    /// write once, the bit in the bitmap is set already, and without this the page would travel as a zero page.
    #[must_use]
    pub fn with_untouched(mut self, untouched: Arc<DirtyBitmap>) -> Self {
        self.work.untouched = Mutex::new(Some(untouched));
        self
    }

    /// After the logs were queried for a range, `exclusions` removes excluded pages from it, and notes which pages are sent again.
    #[must_use]
    pub fn with_exclusions(mut self, exclusions: Arc<Exclusions>) -> Self {
        self.work.exclusions = Some(exclusions);
        self
    }

    /// Locked while the logs are queried, which may last for one range after the task was dropped. Code that stops the logs waits
    /// for it first.
    #[must_use]
    pub fn at_work(&self) -> Arc<Mutex<()>> {
        self.work.at_work.clone()
    }

    /// Runs until there are no more orders.
    ///
    /// # Errors
    /// When a log cannot be synced, or the answers' receiver was dropped.
    pub async fn run(self, input: Inlet<SyncOrder>, output: Outlet<Synced>) -> Result<(), StageError> {
        let Self { work, stage } = self;
        let (input, output) = (input.metered(&stage.meter), output.metered(&stage.meter));
        let work = Arc::new(work);
        while let Some(SyncOrder { after_round }) = input.next().await {
            let since = Instant::now();
            let dirty_pages =
                work.clone().sync_where_blocking_is_allowed().await.map_err(|cause| stage.fails(cause))?;
            let page_bytes = work.bitmap.layout().page_size().bytes() as u64;
            stage.meter.count(dirty_pages, dirty_pages * page_bytes);
            let synced = Synced { after_round, dirty_pages, duration: since.elapsed() };
            output.put(synced).await.map_err(|closed| stage.fails(closed))?;
        }
        Ok(())
    }
}

/// What a sync works on.
#[derive(Debug)]
struct Work {
    logs: Vec<Arc<dyn DirtyLog>>,
    bitmap: Arc<DirtyBitmap>,
    exclusions: Option<Arc<Exclusions>>,
    /// The untouched pages, while there are any.
    untouched: Mutex<Option<Arc<DirtyBitmap>>>,
    at_work: Arc<Mutex<()>>,
}

impl Work {
    /// Syncs, and counts the pages that are dirty then. When this future is dropped, the sync ends at the next range.
    async fn sync_where_blocking_is_allowed(self: Arc<Self>) -> Result<u64, Cause> {
        let wanted = Arc::new(());
        let still_wanted = Arc::downgrade(&wanted);
        let counted = tokio::task::spawn_blocking(move || self.sync(&still_wanted)).await;
        drop(wanted);
        match counted {
            Ok(counted) => counted.map_err(|error| Cause::Log { doing: LogCall::Sync, error }),
            Err(ended) => match ended.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_runtime_ended) => Err(Closed.into()),
            },
        }
    }

    fn sync(&self, wanted: &Weak<()>) -> io::Result<u64> {
        // An earlier sync that panicked does not affect this one.
        let _at_work = self.at_work.lock().unwrap_or_else(PoisonError::into_inner);
        let untouched = self.untouched();
        // Holds what was found before it moves into the bitmap.
        let found = untouched.as_ref().map(|_| DirtyBitmap::empty(self.bitmap.layout()));
        let mut dirty_pages = 0;
        for (block, extents) in ranges(self.bitmap.layout()) {
            if wanted.strong_count() == 0 {
                break;
            }
            match untouched.as_deref().zip(found.as_ref()) {
                None => self.ask_logs(block, extents.clone(), &self.bitmap)?,
                Some((untouched, found)) => {
                    self.ask_logs(block, extents.clone(), found)?;
                    self.bring_in(block, extents.clone(), found, untouched);
                }
            }
            if let Some(exclusions) = &self.exclusions {
                exclusions.synced(block, extents.clone());
            }
            // While its words are still in the cache.
            dirty_pages += self.bitmap.count_in(block, extents);
        }
        Ok(dirty_pages)
    }

    /// The untouched pages, if any of them have not been scanned yet. No bit is ever added to them.
    fn untouched(&self) -> Option<Arc<DirtyBitmap>> {
        let mut untouched = self.untouched.lock().unwrap_or_else(PoisonError::into_inner);
        drop(untouched.take_if(|pages| pages.is_empty()));
        untouched.clone()
    }

    fn ask_logs(&self, block: u32, extents: Range<u32>, into: &DirtyBitmap) -> io::Result<()> {
        self.logs.iter().try_for_each(|log| log.sync(block, extents.clone(), into))
    }

    /// Moves what was found into the bitmap. The bits leave `untouched` first, so that the scanner that takes a bit finds the page
    /// touched.
    fn bring_in(&self, block: u32, extents: Range<u32>, found: &DirtyBitmap, untouched: &DirtyBitmap) {
        for at in found.dirty_extents(block, extents) {
            let written = found.take(at);
            let _touched = untouched.take_mask(at, written);
            self.bitmap.set_mask(at, written);
        }
    }
}

/// The layout in ranges of at most [`RANGE_BYTES`]: a block and some of its extents, in order. A log is queried for one range in
/// each call.
pub fn ranges(layout: &Layout) -> impl Iterator<Item = (u32, Range<u32>)> {
    let step = RANGE_BYTES / layout.page_size().extent_bytes();
    (0..layout.block_count()).flat_map(move |block| {
        let extents = layout.block_extents(block);
        let step_extents = u32::try_from(step).expect("at most 256");
        let range = move |start: u32| (block, start..start.saturating_add(step_extents).min(extents));
        (0..extents).step_by(step).map(range)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::dirty_log::SoftwareLog;
    use crate::queue::bounded;
    use crate::stage::testing::{block_on, layout, meter, page_size, words};

    /// A log whose syncs follow a script, and that records its queries.
    struct ScriptedLog<F> {
        asked: Mutex<Vec<(u32, Range<u32>)>>,
        does: F,
    }

    impl<F> ScriptedLog<F> {
        fn new(does: F) -> Arc<Self> {
            Arc::new(Self { asked: Mutex::default(), does })
        }
    }

    impl<F> std::fmt::Debug for ScriptedLog<F> {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "{:?}", self.asked)
        }
    }

    impl<F: Fn() -> io::Result<()> + Send + Sync> DirtyLog for ScriptedLog<F> {
        fn start(&self) -> io::Result<()> {
            Ok(())
        }
        fn sync(&self, block: u32, extents: Range<u32>, _into: &DirtyBitmap) -> io::Result<()> {
            self.asked.lock().unwrap().push((block, extents));
            (self.does)()
        }
        fn mark(&self, _block: u32, _pages: Range<u64>) {}
        fn stop(&self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Gives the orders, one after another, and returns the answers.
    fn orders(sync: BitmapSync, after_rounds: &[u32]) -> Result<Vec<Synced>, StageError> {
        block_on(async {
            let ((order, orders), (answer, answers)) = (bounded(16), bounded(16));
            for &after_round in after_rounds {
                order.put(SyncOrder { after_round }).await.unwrap();
            }
            drop(order);
            sync.run(orders, answer).await?;
            Ok(crate::stage::testing::drain(&answers))
        })
    }

    #[test]
    fn what_any_log_saw_is_in_the_bitmap() {
        let layout = layout(page_size(4), &[1 << 20, 1 << 20]);
        let [one, two] = [(); 2].map(|()| Arc::new(SoftwareLog::new(&layout)));
        let bitmap = Arc::new(DirtyBitmap::empty(&layout));
        bitmap.set_range(0, 0..1);
        one.mark(0, 0..3);
        two.mark(0, 2..5);
        two.mark(1, 255..256);
        let meter = meter();
        let sync = BitmapSync::new(vec![one.clone(), two], bitmap.clone(), meter.clone());
        let synced = orders(sync, &[3, 4]).unwrap();
        let figures: Vec<_> = synced.iter().map(|synced| (synced.after_round, synced.dirty_pages)).collect();
        assert_eq!(figures, [(3, 6), (4, 6)]);
        assert_eq!(words(&bitmap), [0b11111, 0, 0, 0, 0, 0, 0, 1 << 63]);
        assert_eq!((meter.read().batches, meter.read().pages), (2, 12));
    }

    #[test]
    fn every_log_is_asked_for_every_extent_in_ranges_of_64_mib() {
        let ask = |page_kib, lengths: &[u64]| {
            let logs = [(); 2].map(|()| ScriptedLog::new(|| Ok(())));
            let bitmap = Arc::new(DirtyBitmap::empty(&layout(page_size(page_kib), lengths)));
            orders(BitmapSync::new(vec![logs[0].clone(), logs[1].clone()], bitmap, meter()), &[0]).unwrap();
            let [one, two] = logs.map(|log| std::mem::take(&mut *log.asked.lock().unwrap()));
            assert_eq!(one, two);
            one
        };
        assert_eq!(ask(4, &[(128 << 20) + 1, 7]), [(0, 0..256), (0, 256..512), (0, 512..513), (1, 0..1)]);
        assert_eq!(ask(64, &[128 << 20]), [(0, 0..16), (0, 16..32)]);
    }

    #[test]
    fn the_time_the_logs_take_is_measured() {
        let pause = Duration::from_millis(15);
        let slow = ScriptedLog::new(move || {
            std::thread::sleep(pause);
            Ok(())
        });
        let bitmap = Arc::new(DirtyBitmap::empty(&layout(page_size(4), &[4096, 4096])));
        let synced = orders(BitmapSync::new(vec![slow], bitmap, meter()), &[0]).unwrap();
        assert!(synced[0].duration >= 2 * pause, "{synced:?}");
    }

    #[test]
    fn a_log_that_fails_ends_the_stage() {
        let broken = ScriptedLog::new(|| Err(io::Error::other("no more")));
        let bitmap = Arc::new(DirtyBitmap::empty(&layout(page_size(4), &[4096])));
        let error = orders(BitmapSync::new(vec![broken], bitmap, meter()), &[0]).unwrap_err();
        assert_eq!(error.to_string(), "bitmap sync: the dirty log cannot sync: no more");
    }

    #[test]
    fn the_sync_of_a_dropped_task_ends_at_the_next_range() {
        let (begun, has_begun) = mpsc::channel();
        let (proceed, may_proceed) = mpsc::channel::<()>();
        let may_proceed = Mutex::new(may_proceed);
        let log = ScriptedLog::new(move || {
            begun.send(()).unwrap();
            may_proceed.lock().unwrap().recv().map_err(|_| io::Error::other("asked again"))
        });
        let bitmap = Arc::new(DirtyBitmap::empty(&layout(page_size(4), &[64 << 20, 4096, 4096])));
        let sync = BitmapSync::new(vec![log.clone()], bitmap, meter());
        block_on(async {
            let ((order, orders), (answer, _answers)) = (bounded(1), bounded(1));
            order.put(SyncOrder { after_round: 1 }).await.unwrap();
            let at_work = sync.at_work();
            let task = tokio::spawn(sync.run(orders, answer));
            tokio::task::spawn_blocking(move || has_begun.recv().unwrap()).await.unwrap();
            task.abort();
            assert!(task.await.unwrap_err().is_cancelled());
            assert!(at_work.try_lock().is_err(), "the log is still asked");
            proceed.send(()).unwrap();
            tokio::task::spawn_blocking(move || drop(at_work.lock().unwrap())).await.unwrap();
        });
        // The runtime has ended, and with it the thread of the sync: no more queries follow.
        assert_eq!(*log.asked.lock().unwrap(), [(0, 0..256)]);
    }

    #[test]
    fn a_page_that_was_written_before_the_first_scan_is_no_more_untouched() {
        let layout = layout(page_size(4), &[1 << 20]);
        let log = Arc::new(SoftwareLog::new(&layout));
        let (bitmap, untouched) = (Arc::new(DirtyBitmap::filled(&layout)), Arc::new(DirtyBitmap::filled(&layout)));
        log.mark(0, 64..66);
        let sync = BitmapSync::new(vec![log], bitmap.clone(), meter()).with_untouched(untouched.clone());
        assert_eq!(orders(sync, &[0]).unwrap()[0].dirty_pages, 256);
        assert_eq!(words(&untouched), [u64::MAX, !0b11, u64::MAX, u64::MAX]);
        assert_eq!(words(&bitmap), [u64::MAX; 4]);
    }

    #[test]
    fn untouched_pages_are_kept_until_none_is_left() {
        let layout = layout(page_size(4), &[1 << 20]);
        let (log, bitmap) = (Arc::new(SoftwareLog::new(&layout)), Arc::new(DirtyBitmap::empty(&layout)));
        let untouched = Arc::new(DirtyBitmap::empty(&layout));
        untouched.set_range(0, 3..5);
        let sync = BitmapSync::new(vec![log.clone()], bitmap, meter()).with_untouched(untouched.clone());
        let wanted = Arc::new(());
        let sync_for = |page| {
            log.mark(0, page..page + 1);
            let dirty = sync.work.sync(&Arc::downgrade(&wanted)).unwrap();
            (dirty, untouched.count(), Arc::strong_count(&untouched))
        };
        assert_eq!(sync_for(3), (1, 1, 2));
        assert_eq!(sync_for(4), (2, 0, 2));
        assert_eq!(sync_for(5), (3, 0, 1), "none is left: it goes straight into the bitmap");
    }

    #[test]
    fn what_is_excluded_leaves_the_bitmap_again_before_it_is_counted() {
        let layout = layout(page_size(4), &[130 * 4096, 64 * 4096]);
        let log = Arc::new(SoftwareLog::new(&layout));
        let bitmap = Arc::new(DirtyBitmap::empty(&layout));
        let out = [
            (crate::exclusions::ExclusionReason::Unplugged, 0, 60..129),
            (crate::exclusions::ExclusionReason::Ignored, 1, 0..64),
        ];
        let exclusions = Arc::new(Exclusions::new(bitmap.clone(), &out));
        log.mark(0, 0..130);
        log.mark(1, 3..9);
        let sync = BitmapSync::new(vec![log], bitmap.clone(), meter()).with_exclusions(exclusions);
        let ((orders, input), (output, synced)) = (bounded(1), bounded(1));
        block_on(async {
            orders.put(SyncOrder { after_round: 1 }).await.unwrap();
            drop(orders);
            sync.run(input, output).await.unwrap();
            assert_eq!(synced.next().await.unwrap().dirty_pages, 61);
        });
        assert_eq!(words(&bitmap), [(1 << 60) - 1, 0, 0b10, 0]);
    }
}
