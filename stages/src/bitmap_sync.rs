//! Stage: bitmap sync. Brings what the dirty logs saw into the dirty bitmap, once for each order.
//!
//! - **Takes** a [`SyncOrder`] from the controller.
//! - **Gives** a [`Synced`]: how many pages are dirty, and how long it took to find out.
//! - **Owns** nothing: logs and bitmaps are shared.
//! - **Promises** that every log is asked for every extent, that syncs never overlap, and that the sync of a task that is
//!   dropped ends at the next range of [`RANGE_BYTES`].
//!
//! The logs are asked on a thread where blocking is allowed.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crate::bitmap::DirtyBitmap;
use crate::dirty_log::DirtyLog;
use crate::error::{Cause, StageError};
use crate::geometry::{ExtentAt, Layout};
use crate::meter::Meter;
use crate::queue::{Closed, Inlet, Outlet};
use crate::stage::Stage;

/// The most guest memory that a log is asked for in one call, in bytes: a cancel comes between two.
pub const RANGE_BYTES: usize = 64 << 20;

/// Bring in what the logs saw up to here.
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
        Self { work: Work { logs, bitmap, untouched: None }, stage: Stage::new("bitmap sync", None, meter) }
    }

    /// Pages that a sync finds written are taken out of `untouched`.
    ///
    /// Needed where the scanner is given untouched pages and a sync may come before its first scan: the log tells of a
    /// write once, the bit in the bitmap is set already, and the page would travel as the zero page that it is no more.
    #[must_use]
    pub fn with_untouched(mut self, untouched: Arc<DirtyBitmap>) -> Self {
        let found = DirtyBitmap::empty(self.work.bitmap.layout());
        self.work.untouched = Some(Untouched { found, pages: untouched });
        self
    }

    /// Runs until there are no more orders.
    ///
    /// # Errors
    /// When a log cannot be synced, or nobody takes the answers.
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
    untouched: Option<Untouched>,
}

/// The pages never touched, and a place to see what a sync found before it is in the bitmap.
#[derive(Debug)]
struct Untouched {
    found: DirtyBitmap,
    pages: Arc<DirtyBitmap>,
}

impl Work {
    /// Syncs, and counts the pages that are dirty then. When this future is dropped, the sync ends at the next range.
    async fn sync_where_blocking_is_allowed(self: Arc<Self>) -> Result<u64, Cause> {
        let wanted = Arc::new(());
        let still_wanted = Arc::downgrade(&wanted);
        let counted = tokio::task::spawn_blocking(move || self.sync(&still_wanted)).await;
        drop(wanted);
        match counted {
            Ok(counted) => counted.map_err(|error| Cause::Log { doing: "synced", error }),
            Err(ended) => match ended.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_runtime_ended) => Err(Closed.into()),
            },
        }
    }

    fn sync(&self, wanted: &Weak<()>) -> io::Result<u64> {
        for (block, extents) in ranges(self.bitmap.layout()) {
            if wanted.strong_count() == 0 {
                break;
            }
            match &self.untouched {
                None => self.ask_logs(block, extents, &self.bitmap)?,
                Some(Untouched { found, pages }) => {
                    self.ask_logs(block, extents.clone(), found)?;
                    self.bring_in(block, extents, found, pages);
                }
            }
        }
        Ok(self.bitmap.count())
    }

    fn ask_logs(&self, block: u32, extents: Range<u32>, into: &DirtyBitmap) -> io::Result<()> {
        self.logs.iter().try_for_each(|log| log.sync(block, extents.clone(), into))
    }

    /// Moves what was found into the bitmap. It leaves `untouched` first: who takes the bit finds the page touched.
    fn bring_in(&self, block: u32, extents: Range<u32>, found: &DirtyBitmap, untouched: &DirtyBitmap) {
        for extent in extents {
            let at = ExtentAt { block, extent };
            let written = found.take(at);
            let _touched = untouched.take_mask(at, written);
            self.bitmap.set_mask(at, written);
        }
    }
}

/// The layout in ranges of at most [`RANGE_BYTES`]: a block and some of its extents, in order.
fn ranges(layout: &Layout) -> impl Iterator<Item = (u32, Range<u32>)> {
    let step = RANGE_BYTES / layout.page_size().extent_bytes();
    (0..layout.block_count()).flat_map(move |block| {
        let extents = layout.block_extents(block);
        let step_extents = u32::try_from(step).expect("at most 256");
        let range = move |start: u32| (block, start..start.saturating_add(step_extents).min(extents));
        (0..extents).step_by(step).map(range)
    })
}
