//! What a migration came to, whoever made it.

use std::time::Duration;

use crate::process::Usage;

/// One migration.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moved {
    /// Did it complete? Else it was cancelled when its time was up.
    pub(crate) completed: bool,
    /// From its start to its end as the source itself tells it.
    pub(crate) total: Duration,
    /// The same by this program's clock, until both ends say that it is complete.
    pub(crate) clock: Duration,
    /// Bytes through the sockets.
    pub(crate) wire_bytes: u64,
    /// How often the dirty pages were looked for and sent.
    pub(crate) rounds: u64,
    /// How long no guest ran.
    pub(crate) downtime: Duration,
    /// Pages that a running guest wrote meanwhile.
    pub(crate) written: u64,
    /// What the source used.
    pub(crate) source: Spent,
    /// What the destination used.
    pub(crate) destination: Spent,
    /// Resident memory that the guest takes at the destination.
    pub(crate) arrived: u64,
}

/// What one end used for a migration.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Spent {
    /// Processor time.
    pub(crate) cpu: Duration,
    /// The most resident memory, with what is shared.
    pub(crate) peak: u64,
    /// Private memory that came up meanwhile and is still there.
    pub(crate) grown: u64,
}

impl Spent {
    /// What was used between two looks.
    pub(crate) fn between(before: Usage, after: Usage) -> Self {
        Self {
            cpu: after.cpu.saturating_sub(before.cpu),
            peak: after.peak,
            grown: after.private.saturating_sub(before.private),
        }
    }
}
