//! Verification: this end's digests are compared with the source's.

use futures::future::BoxFuture;
use memferry_stages::memory::GuestMemory;
use memferry_stages::wire::Message;

use crate::migration::blocking;
use crate::migration::digests::{self, Digests, LeftOut, Pending, StretchAt};
use crate::migration::error::MigrationError;

/// This end's digests, and their comparison.
pub(super) enum Comparison {
    None,
    /// They are computed, while the source computes its own.
    Started(Pending),
    /// They are compared.
    Running(BoxFuture<'static, Result<Option<StretchAt>, MigrationError>>),
    /// This stretch differs. The digests leave out these pages.
    Differs(StretchAt),
}

impl Comparison {
    /// Begins to compare with the source's digests, if this end's are begun.
    pub(super) fn compare(&mut self, memory: &GuestMemory, theirs: Digests) {
        *self = match std::mem::replace(self, Self::None) {
            Self::Started(ours) => Self::Running(Box::pin(compared(memory.clone(), ours, theirs))),
            other => other,
        };
    }

    /// Waits until they are compared. Are they equal? Safe to race in a `select!`.
    pub(super) async fn next(&mut self) -> Result<bool, MigrationError> {
        let Self::Running(comparing) = self else { return std::future::pending().await };
        let differs = comparing.await;
        *self = Self::None;
        let differs = differs?;
        if let Some(stretch) = differs {
            *self = Self::Differs(stretch);
        }
        Ok(differs.is_none())
    }
}

/// The first stretch that differs.
async fn compared(memory: GuestMemory, ours: Pending, theirs: Digests) -> Result<Option<StretchAt>, MigrationError> {
    let left_out = theirs.left_out().clone();
    let ours = ours.finish().await.map_err(MigrationError::Digest)?;
    if let Some(page) = ours.first_left_out_beside(&left_out) {
        let what = format!("{page} is unplugged or ignored here, and not at the source");
        return Err(MigrationError::Differs(what));
    }
    let ours = ours.leaving_out(&memory, left_out).await.map_err(MigrationError::Digest)?;
    Ok(theirs.first_difference(memory.layout(), &ours))
}

/// The page hashes of a stretch, so that the source can name the page that differs.
pub(super) async fn page_hashes(
    memory: &GuestMemory,
    left_out: LeftOut,
    stretch: StretchAt,
) -> Result<Message, MigrationError> {
    let memory = memory.clone();
    let hashes = blocking(move || digests::page_hashes(&memory, &left_out, stretch)).await;
    hashes.map_err(MigrationError::Digest)
}

/// Where the memories differ, as text.
pub(super) fn describe(memory: &GuestMemory, stretch: StretchAt) -> MigrationError {
    let layout = memory.layout();
    let (block, first) = (&layout.blocks()[stretch.block as usize], digests::first_page(layout, stretch));
    let start = first.page * layout.page_size().bytes() as u64;
    let end = block.length.min(start + layout.page_size().stretch_bytes());
    MigrationError::Differs(format!(
        "block {:?} differs from the source's between bytes {start:#x} and {end:#x}",
        block.id
    ))
}
