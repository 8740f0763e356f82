//! The switch to postcopy at the destination: pages are discarded, and are missing from then on.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::geometry::Layout;
use memferry_stages::memory::{GuestMemory, MappedMemory};
use memferry_stages::missing::{self, Discards, MissingMemory};
use memferry_stages::wire::BitmapParts;
use memferry_stages::wire::messages::BitmapPart;

use super::{Attempt, Destination};
use crate::events::Postcopy;
use crate::guest::{DestinationGuest, GuestError};
use crate::migration::digests::LeftOut;
use crate::migration::error::MigrationError;
use crate::migration::{blocking, unparked};

/// What is known of a switch.
pub(super) struct Switch {
    layout: Layout,
    /// The bitmap that arrives: what is to be discarded, and after that what the last sync has found besides.
    parts: BitmapParts,
    /// The pages that were discarded while the guest ran at its source.
    named: Option<DirtyBitmap>,
    /// The same memory as `missing`, for the lanes' sinks.
    pub(super) switched: Arc<OnceLock<Arc<MissingMemory>>>,
    /// Set from the registration on.
    pub(super) missing: Option<Arc<MissingMemory>>,
    figures: Postcopy,
    /// When the guest was started.
    started: Option<Instant>,
}

impl Switch {
    pub(super) fn new(layout: &Layout) -> Self {
        Self {
            layout: layout.clone(),
            parts: BitmapParts::new(layout),
            named: None,
            switched: Arc::default(),
            missing: None,
            figures: Postcopy::default(),
            started: None,
        }
    }

    /// Adds a part of the bitmap that arrives.
    ///
    /// # Errors
    /// When it is not the next one, or names pages that never travel.
    pub(super) fn add(&mut self, part: &BitmapPart) -> Result<(), MigrationError> {
        self.parts.add(part)?;
        let is_ignored = self.layout.blocks()[part.block as usize].ignored;
        if is_ignored && part.runs.iter().any(|run| run.mask != 0) {
            let what = format!("pages of block {} are missing, which both ends share", part.block);
            return Err(MigrationError::Protocol(what));
        }
        Ok(())
    }

    /// The bitmap that has arrived.
    fn take(&mut self) -> Result<DirtyBitmap, MigrationError> {
        Ok(std::mem::replace(&mut self.parts, BitmapParts::new(&self.layout)).finish()?)
    }

    /// The guest runs from here on.
    pub(super) fn starts(&mut self) {
        if self.missing.is_some() {
            self.started = Some(Instant::now());
        }
    }

    /// Pages that are missing, once they are registered.
    pub(super) fn left(&self) -> Option<u64> {
        self.missing.as_ref().map(|missing| missing.left())
    }

    /// The figures, once the guest was started.
    pub(super) fn figures(&self) -> Option<Postcopy> {
        let (missing, started) = (self.missing.as_ref()?, self.started?);
        let counts = missing.counts();
        Some(Postcopy {
            time: started.elapsed(),
            urgent_pages: counts.requests,
            faults: Some(counts),
            ..self.figures.clone()
        })
    }

    /// The pages that the source need not send: all but those that are missing.
    pub(super) fn here(&self) -> Option<Arc<DirtyBitmap>> {
        let missing = self.missing.as_ref()?.missing();
        let here = DirtyBitmap::empty(&self.layout);
        for at in here.extents() {
            here.set_mask(at, self.layout.valid_mask(at) & !missing.peek(at));
        }
        Some(Arc::new(here))
    }
}

/// Can the guest be started before all of its memory is here?
///
/// # Errors
/// Why not, for its operator.
pub(super) fn check(guest: &dyn DestinationGuest, memory: &GuestMemory) -> Result<(), GuestError> {
    missing::supported().map_err(|why| GuestError(format!("postcopy is not possible on this host: {why}")))?;
    let caused = |error| GuestError::caused("postcopy is not possible with this guest", error);
    guest.can_be_userfaulted().map_err(caused)?;
    guest.mapping_is_exclusive().map_err(caused)?;
    let not_mapped =
        memory.blocks().iter().find(|block| !block.info.ignored && block.memory.clone().into_mapping().is_none());
    match not_mapped {
        Some(block) => Err(GuestError(format!("postcopy is not possible: block {:?} is not mapped", block.info.id))),
        None => Ok(()),
    }
}

/// The memory of each block that travels.
fn mapped(memory: &GuestMemory) -> Vec<(u32, Arc<MappedMemory>)> {
    let blocks = (0..).zip(memory.blocks()).filter(|(_, block)| !block.info.ignored);
    blocks.filter_map(|(index, block)| Some((index, block.memory.clone().into_mapping()?))).collect()
}

/// Drops pages. May block.
fn discard(memory: &GuestMemory, pages: &DirtyBitmap) -> Result<(), MigrationError> {
    for (block, mapped) in mapped(memory) {
        let mut runs = pages.page_runs(block).peekable();
        if runs.peek().is_some() {
            mapped.discard(memory.page_size(), runs)?;
        }
    }
    Ok(())
}

impl Destination<'_> {
    /// Discards what the source has named, while the guest runs there.
    pub(super) async fn discard_ahead(&mut self) -> Result<(), MigrationError> {
        let began = Instant::now();
        let named = self.switch()?.take()?;
        let named = self.drop_pages(named).await?;
        let switch = self.switch()?;
        switch.named = Some(named);
        switch.figures.discarded_ahead = began.elapsed();
        Ok(())
    }

    /// Discards what the last sync has found besides. All pages that were discarded are missing from here on.
    pub(super) async fn register(&mut self) -> Result<(), MigrationError> {
        let began = Instant::now();
        let more = self.switch()?.take()?;
        let more = self.drop_pages(more).await?;
        let switch = self.switch()?;
        let all =
            switch.named.take().ok_or_else(|| MigrationError::Protocol("nothing was named to be discarded".into()))?;
        more.all_dirty_extents().for_each(|at| _ = all.set_mask(at, more.peek(at)));
        switch.figures.missing_pages = all.count();
        let memory = self.memory()?;
        let registered = blocking(move || {
            let layout = memory.layout().clone();
            MissingMemory::register(&layout, mapped(&memory), all, Discards::Followed)
                .map_err(|why| MigrationError::Guest(GuestError(why.to_string())))
        });
        let missing = registered.await?;
        let switch = self.switch()?;
        switch.missing = Some(missing.clone());
        // The lanes place what comes from here on.
        _ = switch.switched.set(missing);
        switch.figures.discarded_paused = began.elapsed();
        self.start_urgent()
    }

    /// Pages that were loaded are dropped, with what is known of them. Nothing reads memory meanwhile: a page that is read is there.
    async fn drop_pages(&mut self, pages: DirtyBitmap) -> Result<DirtyBitmap, MigrationError> {
        let built = self.built.as_mut().ok_or_else(not_built)?;
        let checker = built.verification.rest();
        let (memory, received) = (built.memory().clone(), built.place.received.clone());
        let page_hashes = built.place.page_hashes.clone();
        blocking(move || {
            drop(checker);
            pages.all_dirty_extents().for_each(|at| _ = received.take_mask(at, pages.peek(at)));
            page_hashes.iter().for_each(|page_hashes| page_hashes.forget(&pages));
            discard(&memory, &pages)?;
            Ok(pages)
        })
        .await
    }

    /// Pages that threads wait for are asked for from here on.
    pub(super) fn start_urgent(&mut self) -> Result<(), MigrationError> {
        let runtime = self.plane.urgent()?;
        let (Some(built), Some(switch)) = (&self.built, &self.switch) else { return Err(not_built()) };
        let (Attempt::Running(flow), Some(missing)) = (&mut self.attempt, &switch.missing) else {
            return Err(not_built());
        };
        let urgent = unparked(&mut flow.urgent).ok_or_else(not_built)?;
        flow.stages_left += flow.graph.start_urgent(urgent, &flow.stream, &built.place, missing, runtime);
        Ok(())
    }

    /// Digests leave out pages that are missing, besides those that never travel.
    pub(super) fn left_out(&self) -> LeftOut {
        let excluded = self.built.as_ref().and_then(|built| built.excluded.clone());
        let Some(missing) = self.switch.as_ref().and_then(|switch| switch.missing.as_ref()) else { return excluded };
        let out = excluded.map_or_else(|| DirtyBitmap::empty(missing.missing().layout()), |excluded| excluded.copied());
        missing.missing().all_dirty_extents().for_each(|at| _ = out.set_mask(at, missing.missing().peek(at)));
        Some(Arc::new(out))
    }

    /// The connection is lost before the guest was started: its memory is written directly again.
    pub(super) fn abandon_missing(&mut self) {
        if let Some(missing) = self.switch.take().and_then(|switch| switch.missing) {
            missing.abandon();
        }
    }

    /// How long the guest has run here without all of its pages is known until the end.
    pub(super) fn postcopy(&self) -> Option<Postcopy> {
        self.switch.as_ref().and_then(Switch::figures)
    }

    pub(super) fn switch(&mut self) -> Result<&mut Switch, MigrationError> {
        self.switch.as_mut().ok_or_else(|| MigrationError::Protocol("postcopy was not agreed on".into()))
    }

    fn memory(&self) -> Result<GuestMemory, MigrationError> {
        self.built.as_ref().map(|built| built.memory().clone()).ok_or_else(not_built)
    }
}

fn not_built() -> MigrationError {
    MigrationError::Mistake("a switch without a guest or its connection".into())
}
