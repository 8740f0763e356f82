//! Dirty logs: where dirty bits come from.
//!
//! A guest has one log or several; a bitmap sync ORs them all into the dirty bitmap. Whatever a log is made of, it
//! keeps one promise, which [`conformance`] holds every log to: **a store that is complete before a sync begins, and was
//! not in a copy taken since it became visible, is found by that sync or a later one.** Nothing written is ever missed; a
//! page reported once too often costs only its transfer.
//!
//! ```text
//!  start ─▶ ( sync ─▶ for each extent taken: rearm ─▶ read ─▶ copied )* ─▶ stop
//! ```
//!
//! | log | sees | re-arms |
//! |---|---|---|
//! | [`software`] | what its writers mark | in sync |
//! | [`userfault`] | stores through one registered mapping of this process | in sync |
//! | [`hash`] | any change of any memory that can be read | by the copy that was sent |
//! | [`kvm`], dirty log | what vCPUs write | in rearm, only what was fetched |
//! | [`kvm`], dirty ring | what vCPUs write | in sync |
//! | [`model`] | what its writers mark, as strictly as a hypervisor may | in rearm, only what was fetched |

pub mod conformance;
pub mod hash;
pub mod kvm;
pub mod model;
pub mod software;
pub mod userfault;

use std::fmt;
use std::io;
use std::ops::Range;

use crate::batch::CopiedBatch;
use crate::bitmap::DirtyBitmap;
use crate::geometry::ExtentAt;

pub use hash::HashLog;
pub use kvm::{KvmLog, KvmRingLog};
pub use software::SoftwareLog;
pub use userfault::UserfaultLog;

/// Tells which pages were written. Called by the pipeline from threads that may block.
///
/// # Example
/// ```
/// use std::{io, ops::Range};
/// use memferry_stages::{bitmap::DirtyBitmap, dirty_log::DirtyLog};
///
/// /// A guest that never runs.
/// #[derive(Debug)]
/// struct NothingWrites;
///
/// impl DirtyLog for NothingWrites {
///     fn start(&self) -> io::Result<()> {
///         Ok(())
///     }
///     fn sync(&self, _block: u32, _extents: Range<u32>, _into: &DirtyBitmap) -> io::Result<()> {
///         Ok(())
///     }
///     fn mark(&self, _block: u32, _pages: Range<u64>) {}
///     fn stop(&self) -> io::Result<()> {
///         Ok(())
///     }
/// }
/// ```
pub trait DirtyLog: Send + Sync + fmt::Debug {
    /// Arms the log: every store from the return of this call on is found, or is in what is read later. Called once before
    /// anything is read.
    ///
    /// # Errors
    /// When the kernel refuses; the migration then does not begin.
    fn start(&self) -> io::Result<()>;

    /// ORs the pages of these extents of a block that were written since the last sync of them into the bitmap. The
    /// pipeline calls it range by range, a cancel can come between. Syncs never overlap each other.
    ///
    /// # Errors
    /// When the log can no longer be read; the migration then fails.
    fn sync(&self, block: u32, extents: Range<u32>, into: &DirtyBitmap) -> io::Result<()>;

    /// The scanner took these pages from the bitmap and they will be read after this call: a log that re-arms late does
    /// so for those that its last sync fetched, and for no others. Nothing by default, for a log that re-arms in sync.
    ///
    /// # Errors
    /// When the kernel refuses; the migration then fails.
    fn rearm(&self, at: ExtentAt, mask: u64) -> io::Result<()> {
        let _ = (at, mask);
        Ok(())
    }

    /// These pages leave the bitmap without being read, or count as zero without it (untouched, unplugged, hinted free): a
    /// log that re-arms late does so now, for those that it has fetched. True if there were any: a store to them before
    /// this call left no trace, every later one is found. Nothing by default, for a log that re-arms in sync.
    ///
    /// # Errors
    /// When the kernel refuses; the migration then fails.
    fn arm_unread(&self, pages: &DirtyBitmap) -> io::Result<bool> {
        let _ = pages;
        Ok(false)
    }

    /// These are the copies that will be sent. Nothing by default; the hash log compares with them from here on.
    fn copied(&self, copy: &CopiedBatch) {
        let _ = copy;
    }

    /// A writer whose stores the log cannot see has written these pages: it stores first, then marks.
    fn mark(&self, block: u32, pages: Range<u64>);

    /// Bytes that the log keeps in memory, for the bound that is told before the first round.
    fn memory_bytes(&self) -> u64 {
        0
    }

    /// Disarms the log and gives back what it held. Called on every end of a migration.
    ///
    /// # Errors
    /// When the kernel refuses; reported, the migration's end stays what it was.
    fn stop(&self) -> io::Result<()>;
}
