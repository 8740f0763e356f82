//! `--no-core`: this program writes no core dump.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Switches core dumps off, for this process and those that it starts.
///
/// The kernel refuses to dump to a file that is limited to one byte, and gives up on a pipe (`/proc/sys/kernel/core_pattern`) at exactly
/// that limit. Where a lower limit forbids this one, a dump to a pipe would be written in spite of it: so dumps are left without memory
/// as well.
///
/// # Errors
/// When the system refuses.
pub(super) fn none() -> io::Result<()> {
    let most = getrlimit(Resource::Core).maximum.map_or(1, |maximum| maximum.min(1));
    setrlimit(Resource::Core, Rlimit { current: Some(most), maximum: Some(most) })?;
    std::fs::write("/proc/self/coredump_filter", "0")
}
