//! The interface between a loader and where its pages go.

use std::io;

use crate::batch::Mark;
use crate::geometry::{ExtentAt, PageAt, PageSize};
use crate::missing::PlaceError;
use crate::xbzrle::Delta;

/// Takes the pages of one lane from its loader, decoded and checked.
///
/// A batch is one [`begin`](Self::begin), and then a call for each run of adjacent pages or delta. A sink may be moved between
/// threads, and is called by one at a time. It decides what a page may replace: [`Direct`](super::Direct) writes into the memory of a
/// guest that does not run, and [`Place`](super::Place) fills what is missing in one that does.
///
/// # Example
/// ```
/// use memferry_stages::batch::Mark;
/// use memferry_stages::geometry::{ExtentAt, PageAt, PageSize};
/// use memferry_stages::loader::{PageSink, SinkError};
/// use memferry_stages::xbzrle::Delta;
///
/// /// Counts pages, and keeps none.
/// #[derive(Default)]
/// struct Count {
///     pages: u32,
///     epochs: u64,
/// }
///
/// impl PageSink for Count {
///     fn page_size(&self) -> PageSize {
///         PageSize::DEFAULT
///     }
///     fn begin(&mut self, _at: ExtentAt, zero: u64, _others: u64) -> Result<(), SinkError> {
///         self.pages += zero.count_ones();
///         Ok(())
///     }
///     fn write(&mut self, _at: ExtentAt, pages: u64, _bytes: &[u8], _hashes: &[u64]) -> Result<(), SinkError> {
///         self.pages += pages.count_ones();
///         Ok(())
///     }
///     fn patch(&mut self, page: PageAt, _delta: &Delta<'_>) -> Result<(), SinkError> {
///         Err(SinkError::NotReceived(page))
///     }
///     fn mark(&mut self, mark: Mark) -> Result<(), SinkError> {
///         self.epochs += u64::from(matches!(mark, Mark::Checkpoint(_)));
///         Ok(())
///     }
/// }
///
/// let mut sink = Count::default();
/// sink.begin(ExtentAt { block: 0, extent: 0 }, 0b1, 0b110)?;
/// sink.write(ExtentAt { block: 0, extent: 0 }, 0b110, &[7; 2 * 4096], &[])?;
/// sink.mark(Mark::Checkpoint(1))?;
/// assert_eq!((sink.pages, sink.epochs), (3, 1));
/// # Ok::<(), SinkError>(())
/// ```
pub trait PageSink: Send {
    /// The size of its pages.
    fn page_size(&self) -> PageSize;

    /// Whether it needs the hash of each page. Raw pages are hashed for it then even in a stream without hashes.
    fn wants_hashes(&self) -> bool {
        false
    }

    /// Begins a batch: makes the pages `zero` of the extent zero, and prepares for `others`, which follow.
    ///
    /// # Errors
    /// When the sink takes no pages any more, or its memory fails.
    fn begin(&mut self, at: ExtentAt, zero: u64, others: u64) -> Result<(), SinkError>;

    /// Takes adjacent whole pages of the extent; `bytes` is their content. `hashes` are their [`page_hash`](crate::batch::page_hash)es
    /// if they are known, and empty if not.
    ///
    /// # Errors
    /// When its memory fails.
    fn write(&mut self, at: ExtentAt, pages: u64, bytes: &[u8], hashes: &[u64]) -> Result<(), SinkError>;

    /// Applies a delta to a page that it has taken before.
    ///
    /// # Errors
    /// When it has no such page, or its memory fails.
    fn patch(&mut self, page: PageAt, delta: &Delta<'_>) -> Result<(), SinkError>;

    /// A mark of the lane: every batch before it was taken.
    ///
    /// # Errors
    /// When the sink cannot do what the mark requires.
    fn mark(&mut self, mark: Mark) -> Result<(), SinkError>;
}

/// Why a sink does not take a page.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SinkError {
    /// A delta for a page that was not received.
    #[error("a delta for {0}, which was not received before")]
    NotReceived(PageAt),
    /// Pages for [`Direct`](super::Direct) after DirectEnds.
    #[error("pages follow the lane's DirectEnds")]
    DirectEnded,
    /// A delta for [`Place`](super::Place), whose pages have no earlier version.
    #[error("a delta for {0}, which is placed whole")]
    Delta(PageAt),
    /// A page cannot be placed.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The memory failed.
    #[error("cannot write {0}: {1}")]
    Memory(PageAt, #[source] io::Error),
}
