//! Verification: this end's digests are compared with the source's.

use std::sync::Arc;

use futures::future::BoxFuture;
use memferry_stages::memory::GuestMemory;
use memferry_stages::page_hashes::PageHashes;
use memferry_stages::wire::Message;
use memferry_stages::wire::hello::Features;

use crate::migration::blocking;
use crate::migration::checker::Checker;
use crate::migration::digests::{self, Digests, LeftOut, Pending, StretchAt};
use crate::migration::error::MigrationError;
use crate::settings::Verify;

/// How memories are compared, as the stream has it, and what this end keeps for it.
pub(super) enum Verification {
    Off,
    Full,
    /// The hashes of the pages as they are loaded, and the check of memory against them.
    Pages(Arc<PageHashes>, Option<Checker>),
}

impl Verification {
    /// As the stream's features have it. Memory is checked from here on.
    ///
    /// # Errors
    /// When the check cannot start.
    pub(super) fn start(memory: &GuestMemory, features: Features) -> Result<Self, MigrationError> {
        if !features.verify {
            return Ok(Self::Off);
        }
        if !features.page_hashes {
            return Ok(Self::Full);
        }
        let page_hashes = Arc::new(PageHashes::new(memory.layout()));
        let checker = Checker::start(memory.clone(), page_hashes.clone()).map_err(MigrationError::Check)?;
        Ok(Self::Pages(page_hashes, Some(checker)))
    }

    /// After a lost connection memory is checked again.
    ///
    /// # Errors
    /// When the check cannot start.
    pub(super) fn go_on(&mut self, memory: &GuestMemory) -> Result<(), MigrationError> {
        if let Self::Pages(page_hashes, checker) = self {
            *checker = Some(Checker::start(memory.clone(), page_hashes.clone()).map_err(MigrationError::Check)?);
        }
        Ok(())
    }

    /// Memory is not checked from here on. Dropping what is returned waits until it is not read any more.
    pub(super) fn rest(&mut self) -> Option<Checker> {
        match self {
            Self::Pages(_, checker) => checker.take(),
            Self::Off | Self::Full => None,
        }
    }

    pub(super) fn kind(&self) -> Verify {
        match self {
            Self::Off => Verify::Off,
            Self::Full => Verify::Full,
            Self::Pages(..) => Verify::Pages,
        }
    }

    pub(super) fn page_hashes(&self) -> Option<&Arc<PageHashes>> {
        match self {
            Self::Pages(page_hashes, _) => Some(page_hashes),
            Self::Off | Self::Full => None,
        }
    }

    /// Everything is loaded: begins this end's digests. `excluded` are pages that never travel.
    pub(super) fn finish(&self, memory: &GuestMemory, excluded: LeftOut) -> Ours {
        match self {
            Self::Pages(page_hashes, checker) => {
                checker.iter().for_each(Checker::stop);
                Ours::Pages(page_hashes.clone(), excluded)
            }
            Self::Off | Self::Full => Ours::Memory(digests::start(memory, excluded)),
        }
    }
}

/// This end's digests, and their comparison.
pub(super) enum Comparison {
    None,
    /// This end's digests are begun, while the source makes its own.
    Started(Ours),
    /// They are compared.
    Running(BoxFuture<'static, Result<Option<(StretchAt, LeftOut)>, MigrationError>>),
    /// This stretch differs. The digests leave out these pages.
    Differs(StretchAt, LeftOut),
}

/// What this end's digests are made of.
pub(super) enum Ours {
    /// The memory, hashed as a whole.
    Memory(Pending),
    /// The hashes of the pages as they were loaded, and the pages that never travel.
    Pages(Arc<PageHashes>, LeftOut),
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
        let Some((stretch, left_out)) = differs? else { return Ok(true) };
        *self = Self::Differs(stretch, left_out);
        Ok(false)
    }
}

/// The first stretch that differs, and the pages that the digests leave out.
async fn compared(
    memory: GuestMemory,
    ours: Ours,
    theirs: Digests,
) -> Result<Option<(StretchAt, LeftOut)>, MigrationError> {
    let left_out = theirs.left_out().clone();
    let ours = match ours {
        Ours::Memory(pending) => {
            let ours = pending.finish().await.map_err(MigrationError::Digest)?;
            check_left_out(&ours, &left_out)?;
            ours.leaving_out(&memory, left_out.clone()).await.map_err(MigrationError::Digest)?
        }
        Ours::Pages(page_hashes, excluded) => {
            let (memory, left_out) = (memory.clone(), left_out.clone());
            blocking(move || sums(&memory, &page_hashes, excluded, left_out)).await?
        }
    };
    Ok(theirs.first_difference(memory.layout(), &ours).map(|stretch| (stretch, left_out)))
}

/// The sums of page hashes without `left_out`, unless a page was changed here after it was loaded. May block.
fn sums(
    memory: &GuestMemory,
    page_hashes: &PageHashes,
    excluded: LeftOut,
    left_out: LeftOut,
) -> Result<Digests, MigrationError> {
    let layout = memory.layout();
    let changed = digests::first_unrecorded_change(memory, page_hashes, &left_out).map_err(MigrationError::Digest)?;
    if let Some(at) = changed {
        let what = format!("{} was changed here after it was loaded", digests::describe(layout, at));
        return Err(MigrationError::Differs(what));
    }
    check_left_out(&Digests::of_pages(layout, page_hashes, excluded), &left_out)?;
    Ok(Digests::of_pages(layout, page_hashes, left_out))
}

/// Pages that never come here are left out at the source too.
fn check_left_out(ours: &Digests, theirs: &LeftOut) -> Result<(), MigrationError> {
    match ours.first_left_out_beside(theirs) {
        None => Ok(()),
        Some(page) => {
            let what = format!("{page} is unplugged or ignored here, and not at the source");
            Err(MigrationError::Differs(what))
        }
    }
}

/// The page hashes of a stretch, so that the source can name the page that differs.
pub(super) async fn page_hashes(
    memory: &GuestMemory,
    recorded: Option<&Arc<PageHashes>>,
    left_out: &LeftOut,
    stretch: StretchAt,
) -> Result<Message, MigrationError> {
    if let Some(recorded) = recorded {
        return Ok(digests::recorded_hashes(memory.layout(), recorded, left_out, stretch));
    }
    let (memory, left_out) = (memory.clone(), left_out.clone());
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
