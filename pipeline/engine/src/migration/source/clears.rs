//! The points at which bits are cleared: the order in which clearers are notified, and when their hints count.
//!
//! Only this module notifies [clearers](crate::guest::clearer), and opens and closes the window for hints. Pages that
//! are unplugged or ignored leave the bitmap where it is made, in `setup`.

use std::ops::Range;

use memferry_stages::clears::{OutForGood, Spared};
use memferry_stages::dirty_log::LogCall;

use super::Source;
use crate::events::Event;
use crate::guest::clearer::{Hints, Point};
use crate::guest::{GuestError, RunState};
use crate::migration::error::MigrationError;
use crate::migration::out_for_good::out_for_good;
use crate::migration::{asked, blocking};
use crate::settings::After;

impl Source {
    /// Can there be pages that do not travel?
    pub(super) fn may_leave_out(&self) -> bool {
        !self.clearers.is_empty() || self.layout().blocks().iter().any(|block| block.ignored)
    }

    /// Notified before the logs are armed: unplugged pages stay unplugged from here on. Returns the pages that never
    /// travel.
    pub(super) async fn reach_setup(&mut self) -> Result<Vec<(OutForGood, u32, Range<u64>)>, MigrationError> {
        self.refuse_torn_snapshot()?;
        let mut unplugged = Vec::new();
        for clearer in self.clearers.clone() {
            // A clearer that fails here is notified of the end too.
            self.set_up += 1;
            unplugged.extend(blocking(move || clearer.reached(&Point::Setup).map(|()| clearer.unplugged())).await?);
        }
        Ok(out_for_good(self.layout(), unplugged)?)
    }

    /// A stream in a file lacks the ignored blocks. A guest that continues to run would change them under the snapshot.
    fn refuse_torn_snapshot(&self) -> Result<(), MigrationError> {
        let ignored = self.layout().blocks().iter().find(|block| block.ignored);
        match ignored.filter(|_| self.settings.after == Some(After::Resume)) {
            None => Ok(()),
            Some(block) => Err(MigrationError::Guest(GuestError(format!(
                "block {:?} is ignored, so a snapshot does not hold it, and the guest goes on writing it; let it stay paused \
                 (after = \"pause\"), or do not ignore the block",
                block.id
            )))),
        }
    }

    /// No hint counts once this returns.
    pub(super) async fn reach_before_sync(&mut self) {
        if self.clearers.is_empty() {
            return;
        }
        self.tell_clearers(Point::BeforeSync).await;
        self.close_window().await;
        self.tell_spared();
    }

    /// A sync is complete. While the guest runs, hints count from here on.
    pub(super) async fn reach_after_sync(&mut self) -> Result<(), MigrationError> {
        if self.clearers.is_empty() {
            return Ok(());
        }
        let hints = self.open_window().await?;
        self.tell_clearers(Point::AfterSync { hints }).await;
        Ok(())
    }

    /// The guest is paused, and its state is not saved yet.
    pub(super) async fn reach_complete(&self) {
        self.tell_clearers(Point::Complete).await;
    }

    /// The migration is over, with any outcome.
    pub(super) async fn reach_cleanup(&self) {
        self.tell_clearers(Point::Cleanup).await;
    }

    /// Pages that were not sent, by reason.
    pub(super) fn spared(&self) -> Spared {
        self.clears.as_ref().map_or_else(Spared::default, |clears| clears.spared())
    }

    pub(super) fn tell_spared(&self) {
        let spared = self.spared();
        if spared != Spared::default() {
            self.observers.tell(&Event::Spared(spared));
        }
    }

    /// Closes the window, if there is one: waits for hints in progress.
    pub(super) async fn close_window(&self) {
        if let Some(clears) = self.clears.clone() {
            blocking(move || clears.close()).await;
        }
    }

    /// Opens a window for hints, if they can be valid. The whole log is armed first: a page that was fetched and waits
    /// to be re-armed could be hinted, taken and written without a trace. A page that waits has its bit in the bitmap.
    async fn open_window(&self) -> Result<Option<Hints>, MigrationError> {
        let runs = self.was == RunState::Running && self.paused.is_none();
        let (Some(clears), Some(bitmap)) = (&self.clears, &self.bitmap) else { return Ok(None) };
        if !runs || !self.wants_hints() || !self.logs.iter().all(|log| log.sees_stores()) {
            return Ok(None);
        }
        let (logs, bitmap) = (self.logs.clone(), bitmap.clone());
        let arm = move || logs.iter().try_for_each(|log| log.arm_unread(&bitmap).map(drop));
        blocking(arm).await.map_err(|error| MigrationError::Log { doing: LogCall::Arm, error })?;
        Ok(Some(clears.open()))
    }

    fn wants_hints(&self) -> bool {
        self.clearers.iter().any(|clearer| clearer.gives_hints())
    }

    /// Warns once if hints will not be accepted.
    pub(super) fn warn_of_lost_hints(&self) {
        if self.wants_hints() && !self.logs.iter().all(|log| log.sees_stores()) {
            let what = "free-page hints are not taken: the guest's dirty log compares pages, and cannot see a store that \
                        changes nothing";
            self.observers.tell(&Event::Warning(what.into()));
        }
    }

    /// Notifies every clearer that was notified of Setup. A failure is a warning: nothing depends on a hint.
    async fn tell_clearers(&self, point: Point) {
        for clearer in &self.clearers[..self.set_up] {
            let (clearer, point) = (clearer.clone(), point.clone());
            if let Err(error) = asked(move || clearer.reached(&point)).await {
                self.observers.tell(&Event::Warning(error.to_string()));
            }
        }
    }
}
