//! The results of a migration, by any contestant.

use std::time::Duration;

use crate::process::Usage;

/// One migration.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moved {
    /// Did it complete? If not, it was cancelled when its time was up.
    pub(crate) completed: bool,
    /// From its start to its end, as the source reports it.
    pub(crate) total: Duration,
    /// The same, measured by this program, until both ends report completion.
    pub(crate) clock: Duration,
    /// Bytes through the sockets.
    pub(crate) wire_bytes: u64,
    /// The number of syncs of dirty pages.
    pub(crate) rounds: u64,
    /// How long no guest ran.
    pub(crate) downtime: Duration,
    /// Pages that a running guest wrote during the migration.
    pub(crate) written: u64,
    /// The resources that the source used.
    pub(crate) source: Spent,
    /// The resources that the destination used.
    pub(crate) destination: Spent,
    /// Resident memory that the guest takes at the destination.
    pub(crate) arrived: u64,
}

/// The resources that one end used for a migration.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Spent {
    /// Processor time.
    pub(crate) cpu: Duration,
    /// The peak of resident memory, shared memory included.
    pub(crate) peak: u64,
    /// Private memory that was allocated during the migration and is still in use.
    pub(crate) grown: u64,
}

impl Spent {
    /// The resources used between two readings.
    pub(crate) fn between(before: Usage, after: Usage) -> Self {
        Self {
            cpu: after.cpu.saturating_sub(before.cpu),
            peak: after.peak,
            grown: after.private.saturating_sub(before.private),
        }
    }
}
