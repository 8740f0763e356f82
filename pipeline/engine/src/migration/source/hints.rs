//! Pages that do not travel: the order in which page hinters are notified, and when their hints count.
//!
//! Only this module notifies [page hinters](crate::guest::hints), and opens and closes the window for hints.

use std::ops::Range;
use std::sync::Arc;

use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::dirty_log::{DirtyLog, LogCall};
use memferry_stages::exclusions::{ExcludedPages, ExclusionReason, Exclusions};
use memferry_stages::geometry::Layout;
use memferry_stages::memory::GuestMemory;

use crate::events::{Event, Observers};
use crate::guest::GuestError;
use crate::guest::hints::{PageHinter, Point};
use crate::migration::error::MigrationError;
use crate::migration::excluded::excluded_ranges;
use crate::migration::{asked, blocking};
use crate::settings::After;

/// The page hinters of a guest, and what they have cleared.
pub(super) struct Hints {
    hinters: Vec<Arc<dyn PageHinter>>,
    /// How many of them were notified of Setup.
    set_up: usize,
    /// Are there blocks that are never sent?
    has_ignored: bool,
    /// Pages that never travel, once the page hinters have been asked.
    ranges: Vec<(ExclusionReason, u32, Range<u64>)>,
    /// Set once the logs are armed, if there can be pages that do not travel.
    exclusions: Option<Arc<Exclusions>>,
}

impl Hints {
    pub(super) fn new(hinters: Vec<Arc<dyn PageHinter>>, memory: &GuestMemory) -> Self {
        let has_ignored = memory.layout().blocks().iter().any(|block| block.ignored);
        Self { hinters, set_up: 0, has_ignored, ranges: Vec::new(), exclusions: None }
    }

    /// Is anybody to be notified?
    pub(super) fn may_come(&self) -> bool {
        !self.hinters.is_empty()
    }

    /// Can there be pages that do not travel?
    pub(super) fn may_leave_out(&self) -> bool {
        self.may_come() || self.has_ignored
    }

    /// Pages that never travel.
    pub(super) fn excluded_ranges(&self) -> Vec<(ExclusionReason, u32, Range<u64>)> {
        self.ranges.clone()
    }

    pub(super) fn exclusions(&self) -> Option<Arc<Exclusions>> {
        self.exclusions.clone()
    }

    /// Notified before the logs are armed: unplugged pages stay unplugged from here on.
    pub(super) async fn set_up(&mut self, layout: &Layout, after: Option<After>) -> Result<(), MigrationError> {
        refuse_torn_snapshot(layout, after)?;
        let mut unplugged = Vec::new();
        for hinter in self.hinters.clone() {
            // A page hinter that fails here is notified of the end too.
            self.set_up += 1;
            unplugged.extend(blocking(move || hinter.reached(&Point::Setup).map(|()| hinter.unplugged())).await?);
        }
        self.ranges = excluded_ranges(layout, unplugged)?;
        Ok(())
    }

    pub(super) fn armed(&mut self, exclusions: Option<Arc<Exclusions>>) {
        self.exclusions = exclusions;
    }

    /// Pages that were not sent, by reason.
    pub(super) fn excluded(&self) -> ExcludedPages {
        self.exclusions.as_ref().map_or_else(ExcludedPages::default, |exclusions| exclusions.excluded())
    }

    /// Reports the pages that were not sent, if there are any.
    pub(super) fn report(&self, observers: &Observers) {
        let excluded = self.excluded();
        if excluded != ExcludedPages::default() {
            observers.notify(&Event::Excluded(excluded));
        }
    }

    /// Notifies every page hinter that was notified of Setup. A failure is a warning: nothing depends on a hint.
    pub(super) async fn reach(&self, point: Point, observers: &Observers) {
        for hinter in &self.hinters[..self.set_up] {
            let (hinter, point) = (hinter.clone(), point.clone());
            if let Err(error) = asked(move || hinter.reached(&point)).await {
                observers.notify(&Event::Warning(error.to_string()));
            }
        }
    }

    /// A sync is next: no hint counts once this returns.
    pub(super) async fn before_sync(&self, observers: &Observers) {
        if self.may_come() {
            self.reach(Point::BeforeSync, observers).await;
            self.close().await;
            self.report(observers);
        }
    }

    /// Closes the window, if there is one: waits for hints in progress.
    pub(super) async fn close(&self) {
        if let Some(exclusions) = self.exclusions.clone() {
            blocking(move || exclusions.close()).await;
        }
    }

    /// A sync is complete: hints of a guest that `runs` count from here on, if they can be valid.
    pub(super) async fn open(
        &self,
        runs: bool,
        bitmap: &Arc<DirtyBitmap>,
        logs: &[Arc<dyn DirtyLog>],
        observers: &Observers,
    ) -> Result<(), MigrationError> {
        let hints = match &self.exclusions {
            Some(exclusions) if runs && self.are_given() && all_see_stores(logs) => {
                arm_unread(bitmap, logs).await?;
                Some(exclusions.open())
            }
            _ => None,
        };
        self.reach(Point::AfterSync { hints }, observers).await;
        Ok(())
    }

    fn are_given(&self) -> bool {
        self.hinters.iter().any(|hinter| hinter.gives_hints())
    }

    /// Warns if hints will not be accepted.
    pub(super) fn warn_if_lost(&self, logs: &[Arc<dyn DirtyLog>], observers: &Observers) {
        if self.are_given() && !all_see_stores(logs) {
            let what = "free-page hints are not taken: the guest's dirty log compares pages, and cannot see a store that \
                        changes nothing";
            observers.notify(&Event::Warning(what.into()));
        }
    }
}

fn all_see_stores(logs: &[Arc<dyn DirtyLog>]) -> bool {
    logs.iter().all(|log| log.sees_stores())
}

/// Arms the whole log before hints count: a page that was fetched and waits to be re-armed could be hinted, taken and
/// written without a trace. A page that waits has its bit in the bitmap.
async fn arm_unread(bitmap: &Arc<DirtyBitmap>, logs: &[Arc<dyn DirtyLog>]) -> Result<(), MigrationError> {
    let (logs, bitmap) = (logs.to_vec(), bitmap.clone());
    let arm = move || logs.iter().try_for_each(|log| log.arm_unread(&bitmap).map(drop));
    blocking(arm).await.map_err(|error| MigrationError::Log { doing: LogCall::Arm, error })
}

/// A stream in a file lacks the ignored blocks. A guest that continues to run would change them under the snapshot.
fn refuse_torn_snapshot(layout: &Layout, after: Option<After>) -> Result<(), MigrationError> {
    let ignored = layout.blocks().iter().find(|block| block.ignored);
    match ignored.filter(|_| after == Some(After::Resume)) {
        None => Ok(()),
        Some(block) => Err(MigrationError::Guest(GuestError(format!(
            "block {:?} is ignored, so a snapshot does not hold it, and the guest continues to write it; let it stay paused \
             (after = \"pause\"), or do not ignore the block",
            block.id
        )))),
    }
}
