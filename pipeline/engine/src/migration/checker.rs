//! The check of memory against page hashes, in the background.
//!
//! One thread at each end reads the guest's memory again, in a circle, and notes what differs from what was sent or loaded (see
//! [`PageHashes`]). It has the lowest priority and works at most a twentieth of the time, so a migration hardly notices it.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use memferry_stages::memory::GuestMemory;
use memferry_stages::page_hashes::PageHashes;
use rustix::process::setpriority_process;
use rustix::time::{ClockId, clock_gettime};

use super::digests::scratch;
use crate::threads::explained;

/// It rests this many times as long as it has worked.
const RESTS: u32 = 19;
/// The shortest rest: work of this order is done at once.
const LEAST_REST: Duration = Duration::from_millis(2);
/// How long it waits when there was nothing to check.
const IDLE: Duration = Duration::from_millis(20);
/// The lowest priority that a thread may have (`nice`).
const LOWEST_PRIORITY: i32 = 19;

/// The running check. Dropping it ends and joins the thread.
#[derive(Debug)]
pub(super) struct Checker {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

/// A request to stop, which ends a rest at once.
#[derive(Debug, Default)]
struct Stop {
    requested: Mutex<bool>,
    changed: Condvar,
}

impl Checker {
    /// Starts to check.
    ///
    /// # Errors
    /// When the system gives this user no more threads.
    pub(super) fn start(memory: GuestMemory, page_hashes: Arc<PageHashes>) -> io::Result<Self> {
        let stop = Arc::new(Stop::default());
        let requested = stop.clone();
        let thread = Builder::new().name("check".into()).spawn(move || run(&memory, &page_hashes, &requested));
        Ok(Self { stop, thread: Some(thread.map_err(explained)?) })
    }

    /// Requests that it ends, and does not wait for that: a paused guest may be waiting. Notes that come later are of no use and no harm.
    pub(super) fn stop(&self) {
        *self.stop.requested.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.stop.changed.notify_all();
    }
}

impl Drop for Checker {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            // A panic of the check is no failure of the migration.
            drop(thread.join());
        }
    }
}

impl Stop {
    /// Rests for this time. Returns `true` if a stop is requested.
    fn rest(&self, time: Duration) -> bool {
        let requested = self.requested.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(requested, time, |requested| !*requested);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// The processor time of this thread: while others have the processor, the check neither works nor needs to rest.
fn processor_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

/// Checks until a stop is requested. Memory that cannot be read ends the check: the stage that needs it reports the error.
fn run(memory: &GuestMemory, page_hashes: &PageHashes, stop: &Stop) {
    // Without it the check competes with the guest for a twentieth of a core, and no more.
    let _lowered = setpriority_process(None, LOWEST_PRIORITY);
    let mut scratch = scratch(memory);
    let mut worked = Duration::ZERO;
    loop {
        let mut found = false;
        for at in page_hashes.all_extents().filter(|&at| page_hashes.readable(at) != 0) {
            let began = processor_time();
            if page_hashes.check(memory, at, u64::MAX, &mut scratch).is_err() {
                return;
            }
            found = true;
            worked += processor_time().saturating_sub(began);
            if worked * RESTS >= LEAST_REST && stop.rest(std::mem::take(&mut worked) * RESTS) {
                return;
            }
        }
        if !found && stop.rest(IDLE) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use memferry_stages::batch::page_hash;
    use memferry_stages::geometry::{BlockInfo, ExtentAt, PageSize};
    use memferry_stages::memory::{MappedMemory, RamBlock};

    use super::*;

    #[test]
    fn it_reaches_every_page_and_ends_when_it_is_dropped() {
        let length = 3 << 20;
        let memory = Arc::new(MappedMemory::anonymous(length).unwrap());
        let block = RamBlock { info: BlockInfo::new("ram", length as u64), memory: memory.clone(), fresh: true };
        let guest = GuestMemory::new(PageSize::DEFAULT, vec![block]).unwrap();
        let page_hashes = Arc::new(PageHashes::new(guest.layout()));
        let checker = Checker::start(guest, page_hashes.clone()).unwrap();
        memory.store(0, &vec![7; length]);
        for extent in 0..12 {
            let hashes = vec![page_hash(&[7; 4096]); 64];
            page_hashes.record(ExtentAt { block: 0, extent }, u64::MAX, 0, u64::MAX, hashes);
        }
        while page_hashes.coverage().checked < 768 {
            std::thread::yield_now();
        }
        drop(checker);
        assert_eq!(Arc::strong_count(&page_hashes), 1, "the thread has ended");
    }
}
