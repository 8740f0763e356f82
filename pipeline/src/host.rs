//! How much memory this host has: what is too large for it is refused before it is allocated.

/// The bytes of this host's memory, if `bytes` are more than half of them; `None` also if the kernel does not tell.
pub(crate) fn beyond_half_of_memory(bytes: u64) -> Option<u64> {
    memory().filter(|host| bytes > host / 2)
}

/// The bytes of this host's memory, if `bytes` are more than all of them; `None` also if the kernel does not tell.
#[cfg(feature = "vm-memory")]
pub(crate) fn beyond_memory(bytes: u64) -> Option<u64> {
    memory().filter(|host| bytes > *host)
}

fn memory() -> Option<u64> {
    let facts = std::fs::read_to_string("/proc/meminfo").ok()?;
    let total = facts.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    total.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_fits_and_everything_does_not() {
        assert_eq!(beyond_half_of_memory(4096), None);
        assert!(beyond_half_of_memory(u64::MAX).is_some());
    }
}
