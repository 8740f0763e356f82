//! Parts of a guest that know which pages need not be sent: a balloon that hints free pages, a device that unplugs
//! memory.
//!
//! A [`PageHinter`] is notified of five points of a migration at its source, and of nothing else:
//!
//! ```text
//!  Setup ─▶ BeforeSync ─ sync ─ AfterSync ─▶ ( scan ─▶ BeforeSync ─ sync ─ AfterSync )* ─▶ Complete ─▶ BeforeSync ─ sync ─ AfterSync
//!    │                          hints: Some │ the window is open  │ closed     Some │   the guest is paused            hints: None
//!    └─▶ … whatever happens, from any of these on ─▶ Cleanup, once
//! ```
//!
//! - The scanner swaps words of the bitmap between an `AfterSync` and the next `BeforeSync` or `Complete`, and at no
//!   other time: it is at rest during a notification. The last round is scanned after the last `AfterSync`.
//! - A point is notified when the notification before it has returned: to all page hinters of the guest, one after another,
//!   in the order in which the guest listed them.
//! - `Cleanup` is notified on every end (success, failure and cancel), once, to each page hinter that was notified of
//!   `Setup`, also if that failed. The guest may run again by then, or run at the destination.
//!
//! Hints that arrive outside the window that they were given for are dropped by [`Hints`] itself, so a late page hinter or
//! guest does no harm. The page hinter is responsible for the contract of [`Hints::free`]: pages stay free until the hint
//! for them has returned.

use std::fmt;
use std::ops::Range;

pub use memferry_stages::exclusions::{ExcludedPages, Hints};

use super::GuestError;

/// A point of a migration at its source. The [module](self) gives the order.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Point {
    /// The migration begins; no page was read. From here until [`Point::Cleanup`] unplugged memory stays unplugged:
    /// plugging is refused.
    Setup,
    /// A sync comes next. When this returns no hint should be in progress; one that is will be dropped.
    BeforeSync,
    /// The sync is complete, and a round is scanned next.
    AfterSync {
        /// While the guest runs: a window is open, and free pages may be hinted through this until the next
        /// [`Point::BeforeSync`]. `None` once it is paused, or if a dirty log of the guest does not [see
        /// stores](memferry_stages::dirty_log::DirtyLog::sees_stores).
        hints: Option<Hints>,
    },
    /// The guest was paused for the switchover, if it ran; its device state is not saved yet. The last sync follows.
    Complete,
    /// The migration has ended, with any result. Nothing is cleared any more; pages reserved for hints can be used
    /// again.
    Cleanup,
}

/// Pages of a RAM block, by its index.
pub type BlockPages = (u32, Range<u64>);

/// Clears bits of the dirty bitmap at defined points: see the [module](self).
///
/// # Example
/// ```
/// use std::sync::Mutex;
/// use memferry::guest::GuestError;
/// use memferry::guest::hints::{BlockPages, PageHinter, Hints, Point};
///
/// /// A balloon whose guest reports free pages through `report`, from a thread of the VMM's.
/// #[derive(Debug, Default)]
/// struct Balloon {
///     hints: Mutex<Option<Hints>>,
/// }
///
/// impl Balloon {
///     fn report(&self, (block, pages): BlockPages) {
///         // The guest holds the pages back until this report is answered.
///         if let Some(hints) = &*self.hints.lock().unwrap() {
///             hints.free(block, pages);
///         }
///     }
/// }
///
/// impl PageHinter for Balloon {
///     fn reached(&self, point: &Point) -> Result<(), GuestError> {
///         match point {
///             Point::AfterSync { hints } => *self.hints.lock().unwrap() = hints.clone(),
///             Point::BeforeSync | Point::Cleanup => *self.hints.lock().unwrap() = None,
///             _ => {}
///         }
///         Ok(())
///     }
/// }
/// ```
pub trait PageHinter: Send + Sync + fmt::Debug {
    /// The migration has reached this point. Called where blocking is allowed; the migration waits until it returns,
    /// and near its end that is downtime.
    ///
    /// # Errors
    /// When it cannot do its part. At [`Point::Setup`] the migration then does not begin. At any other point the
    /// operator is warned and the migration continues, because nothing depends on a hint.
    fn reached(&self, point: &Point) -> Result<(), GuestError>;

    /// Can it give hints? If no page hinter of the guest can, no window is opened: a window requires that the whole log is
    /// armed.
    fn gives_hints(&self) -> bool {
        true
    }

    /// Ranges without memory behind them: never read at the source, never written or read at the destination, and the
    /// same at both ends. At the source this is called once, after [`Point::Setup`] has returned. At a destination it
    /// is called once the guest is built, and nothing else is called there. None by default.
    fn unplugged(&self) -> Vec<BlockPages> {
        Vec::new()
    }
}
