//! Dirty logs: where dirty bits come from.
//!
//! A guest has one log or several; a bitmap sync ORs them all into the dirty bitmap. Whatever a log is made of, it
//! keeps one promise, which [`conformance`] holds every log to: **a store that is complete before a sync begins, and was
//! not in a copy taken since it became visible, is found by that sync or a later one.** Nothing written is ever missed; a
//! page reported once too often costs only its transfer.
//!
//! ```text
//!  start ─▶ for each extent: rearm ─▶ read ─▶ copied ─▶ ( sync ─▶ for each extent found: rearm ─▶ read ─▶ copied )* ─▶ stop
//! ```
//!
//! Every page is taken once before the first sync, for the bitmap starts with all bits set. The last sync comes when the
//! guest is paused and its device state is saved.
//!
//! | call | from | beside it |
//! |---|---|---|
//! | `start`, `stop` | a thread that may block | no other call but `mark` |
//! | `arm_unread`, `leave_out` | a thread that may block, behind `start` or a `sync` and before any `rearm` that follows it | `mark` |
//! | `sync` | a thread that may block | `copied`, `mark`; never another `sync`, never `rearm` |
//! | `rearm` | the scanner, a task: a short system call is right, waiting is not | `copied`, `mark` |
//! | `copied` | one task for each lane: arithmetic, no waiting | everything but `start` and `stop`, itself included |
//! | `mark` | the guest's own threads | everything, before `start` and after `stop` too |
//! | `memory_bytes`, `sees_stores`, `rearms_late` | the control plane: no waiting | everything |
//!
//! A log is started for one migration at a time, and may be started again for the next.
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

/// What a dirty log is asked for: one of its trait's calls, for errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LogCall {
    /// [`DirtyLog::start`]
    Start,
    /// [`DirtyLog::sync`]
    Sync,
    /// [`DirtyLog::rearm`]
    Rearm,
    /// [`DirtyLog::arm_unread`]
    Arm,
    /// [`DirtyLog::leave_out`]
    LeaveOut,
    /// [`DirtyLog::stop`]
    Stop,
}

impl fmt::Display for LogCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Start => "start",
            Self::Sync => "sync",
            Self::Rearm => "re-arm",
            Self::Arm => "arm",
            Self::LeaveOut => "leave pages out",
            Self::Stop => "stop",
        })
    }
}

/// Tells which pages were written. The [module](self) says who calls what, and from where.
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
    /// Arms the log: every store from the return of this call on is found, or is in what is read later. Called before
    /// anything is read. What was written before need not be reported.
    ///
    /// # Errors
    /// When the kernel refuses; the migration then does not begin, and the log is stopped.
    fn start(&self) -> io::Result<()>;

    /// ORs the pages of these extents of a block that were written since the last sync of them into the bitmap, and
    /// clears no bit there. The whole guest is asked for range by range, at most 64 MiB of one block in a call, in order; a
    /// cancel comes between two, and then the rest is not asked for. A log that re-arms in sync does it before it reports:
    /// a store that comes in between is found by this sync or the next.
    ///
    /// # Errors
    /// When the log can no longer be read; the migration then fails.
    fn sync(&self, block: u32, extents: Range<u32>, into: &DirtyBitmap) -> io::Result<()>;

    /// The scanner took these pages from the bitmap and they will be read after this call: a log that re-arms late does
    /// so for those that its last sync fetched, and for no others. A page may be taken that no sync of this log reported: in
    /// the first round, or because another log did. Nothing by default, for a log that re-arms in sync.
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

    /// These pages are out until the log is stopped: nobody writes them, and the log neither reads nor reports them. Called once
    /// at most, behind `start`. Armed as pages that are not read by default, which is enough for a log that never reads and
    /// reports only what was written.
    ///
    /// # Errors
    /// When the kernel refuses; the migration then does not begin.
    fn leave_out(&self, pages: &DirtyBitmap) -> io::Result<()> {
        self.arm_unread(pages).map(drop)
    }

    /// Is a store found whatever it stores, also into a page that was never read? Free-page hints are taken only where every log
    /// says so: the destination may hold anything in place of a page that was hinted, and a store that leaves the page as it
    /// was at the source must be sent too.
    fn sees_stores(&self) -> bool {
        true
    }

    /// Does it re-arm late, so that a page which waits to be sent is found again only for what is written after it was taken? Else it
    /// is found again for every store since the last sync. For forecasts: nothing that is sent depends on it.
    fn rearms_late(&self) -> bool {
        false
    }

    /// These are the copies that will be sent: for each page the order of these calls is the order in which they were
    /// taken and will be loaded. What was taken may never be copied, if the migration ends. Nothing by default; the hash
    /// log compares with them from here on.
    fn copied(&self, copy: &CopiedBatch) {
        let _ = copy;
    }

    /// A writer whose stores the log cannot see has written these pages: it stores first, then marks. Must not block: a
    /// guest's thread calls it for each write.
    fn mark(&self, block: u32, pages: Range<u64>);

    /// Bytes that the log keeps in memory, for the bound that is told before the first round.
    fn memory_bytes(&self) -> u64 {
        0
    }

    /// Disarms the log and gives back what it held. The last call on every end of a migration that got as far as asking
    /// for the logs; then also for a log that was never started, or whose start failed. The guest may run by then.
    ///
    /// # Errors
    /// When the kernel refuses; reported, the migration's end stays what it was.
    fn stop(&self) -> io::Result<()>;
}
