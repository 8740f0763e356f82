//! Arming the dirty logs: what comes before the first page is read, for a migration and for whoever only watches.

use std::ops::Range;
use std::sync::Arc;

use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::clears::{Clears, OutForGood};
use memferry_stages::dirty_log::{DirtyLog, LogCall};
use memferry_stages::memory::GuestMemory;

use super::error::MigrationError;
use super::untouched_pages;

/// Logs that are armed.
#[derive(Debug)]
pub struct Armed {
    /// All bits are set but those of pages that never travel: the bitmap is the truth from here on (law 1).
    pub bitmap: Arc<DirtyBitmap>,
    /// If there may be pages that do not travel.
    pub clears: Option<Arc<Clears>>,
    /// The pages that were never touched when the logs were armed already.
    pub untouched: Arc<DirtyBitmap>,
}

/// Starts the logs, and only then asks which pages were never touched: a write that comes later is in a log. May block.
///
/// # Errors
/// When a log refuses. Each of them is to be stopped then, as after every other end.
pub fn arm(
    memory: &GuestMemory,
    logs: &[Arc<dyn DirtyLog>],
    out: &[(OutForGood, u32, Range<u64>)],
    may_leave_out: bool,
) -> Result<Armed, MigrationError> {
    for log in logs {
        log.start().map_err(|error| MigrationError::Log { doing: LogCall::Start, error })?;
    }
    let bitmap = Arc::new(DirtyBitmap::filled(memory.layout()));
    let clears = may_leave_out.then(|| Arc::new(Clears::new(bitmap.clone(), out)));
    let untouched = untouched_pages(memory);
    if let Some(out) = clears.as_ref().and_then(|clears| clears.out_for_good()) {
        leave_out(logs, out, &untouched)?;
    }
    arm_untouched(logs, memory, &untouched)?;
    Ok(Armed { bitmap, clears, untouched: Arc::new(untouched) })
}

/// What never travels is nothing to the logs, and is not told of as untouched.
fn leave_out(logs: &[Arc<dyn DirtyLog>], out: &DirtyBitmap, untouched: &DirtyBitmap) -> Result<(), MigrationError> {
    for log in logs {
        log.leave_out(out).map_err(|error| MigrationError::Log { doing: LogCall::LeaveOut, error })?;
    }
    out.all_dirty_extents().for_each(|at| _ = untouched.take_mask(at, out.peek(at)));
    Ok(())
}

/// A log that re-arms late has not seen what was written to untouched pages until here, and they will not be read: it is
/// armed for them, and those that were touched meanwhile are taken out.
fn arm_untouched(
    logs: &[Arc<dyn DirtyLog>],
    memory: &GuestMemory,
    untouched: &DirtyBitmap,
) -> Result<(), MigrationError> {
    let mut were_late = false;
    for log in logs {
        were_late |= log.arm_unread(untouched).map_err(|error| MigrationError::Log { doing: LogCall::Arm, error })?;
    }
    if were_late {
        let still = untouched_pages(memory);
        for at in untouched.extents() {
            let _touched = untouched.take_mask(at, !still.peek(at));
        }
    }
    Ok(())
}
