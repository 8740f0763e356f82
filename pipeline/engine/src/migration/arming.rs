//! Arming the dirty logs before the first page is read, for a migration and for a program that only observes the guest.

use std::ops::Range;
use std::sync::Arc;

use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::dirty_log::{DirtyLog, LogCall};
use memferry_stages::exclusions::{ExclusionReason, Exclusions};
use memferry_stages::memory::GuestMemory;

use super::error::MigrationError;
use super::untouched_pages;

/// The armed logs.
#[derive(Debug)]
pub struct Armed {
    /// All bits are set but those of pages that never travel: the bitmap is the truth from here on (law 1).
    pub bitmap: Arc<DirtyBitmap>,
    /// Set if there can be pages that do not travel.
    pub exclusions: Option<Arc<Exclusions>>,
    /// The pages that were untouched when the logs had been armed.
    pub untouched: Arc<DirtyBitmap>,
}

/// Starts the logs, and only then asks which pages are untouched, so that a log sees every later write. May block.
///
/// # Errors
/// When a log cannot be started. Every log must then be stopped, as after every other end.
pub fn arm(
    memory: &GuestMemory,
    logs: &[Arc<dyn DirtyLog>],
    excluded: &[(ExclusionReason, u32, Range<u64>)],
    may_leave_out: bool,
) -> Result<Armed, MigrationError> {
    for log in logs {
        log.start().map_err(|error| MigrationError::Log { doing: LogCall::Start, error })?;
    }
    let bitmap = Arc::new(DirtyBitmap::filled(memory.layout()));
    let exclusions = may_leave_out.then(|| Arc::new(Exclusions::new(bitmap.clone(), excluded)));
    let untouched = untouched_pages(memory);
    if let Some(excluded) = exclusions.as_ref().and_then(|exclusions| exclusions.permanent()) {
        leave_out(logs, excluded, &untouched)?;
    }
    arm_untouched(logs, memory, &untouched)?;
    Ok(Armed { bitmap, exclusions, untouched: Arc::new(untouched) })
}

/// Pages that never travel do not concern the logs, and are not reported to them as untouched.
fn leave_out(
    logs: &[Arc<dyn DirtyLog>],
    excluded: &DirtyBitmap,
    untouched: &DirtyBitmap,
) -> Result<(), MigrationError> {
    for log in logs {
        log.leave_out(excluded).map_err(|error| MigrationError::Log { doing: LogCall::LeaveOut, error })?;
    }
    excluded.all_dirty_extents().for_each(|at| _ = untouched.take_mask(at, excluded.peek(at)));
    Ok(())
}

/// A log that re-arms late has not seen writes to untouched pages so far, and these pages will not be read. The log is
/// armed for them, and pages that were touched in the meantime are removed from the set.
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
