//! The resources of the whole process, for tests that nothing is left behind. Such a test is alone in its binary.

use std::time::{Duration, Instant};

/// The time limit for resources to be released.
const PATIENCE: Duration = Duration::from_secs(60);

/// The number of threads and descriptors of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Census {
    /// Threads.
    pub threads: usize,
    /// Open descriptors.
    pub descriptors: usize,
}

impl Census {
    /// The current numbers.
    #[must_use]
    pub fn take() -> Self {
        Self { threads: count("task"), descriptors: count("fd") }
    }

    /// Waits until there are no more of them than before.
    ///
    /// # Panics
    /// If there still are after a minute.
    #[track_caller]
    pub fn wait_until_as_before(&self) {
        let since = Instant::now();
        loop {
            let now = Self::take();
            if now.threads <= self.threads && now.descriptors <= self.descriptors {
                return;
            }
            assert!(since.elapsed() < PATIENCE, "{now:?}, before {self:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The number of entries in a folder of `/proc/self`.
fn count(what: &str) -> usize {
    std::fs::read_dir(format!("/proc/self/{what}")).expect("a folder of /proc").count()
}
