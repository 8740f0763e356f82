//! What the whole process has, for tests that see that nothing is left behind. Such a test is alone in its program.

use std::time::{Duration, Instant};

/// How long what has ended may take to be gone.
const PATIENCE: Duration = Duration::from_secs(60);

/// How many threads and descriptors the process has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Census {
    /// Threads.
    pub threads: usize,
    /// Open descriptors.
    pub descriptors: usize,
}

impl Census {
    /// As things are.
    #[must_use]
    pub fn take() -> Self {
        Self { threads: count("task"), descriptors: count("fd") }
    }

    /// Waits until there are no more of them than there were.
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

/// How many of the process's things are in a folder of `/proc/self`.
fn count(what: &str) -> usize {
    std::fs::read_dir(format!("/proc/self/{what}")).expect("a folder of /proc").count()
}
