//! An observer that may block.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{Event, Observer, Role};
use crate::outlet::{Outlet, Sink};

/// Events that may be queued for an observer that blocks.
const EVENTS: usize = 1024;

/// An observer that may block (it writes to a terminal, a pipe, a disk), behind a bounded queue and a thread of its
/// own, so that the migration does not wait for it. Events that find the queue full are dropped, and counted.
#[derive(Debug)]
pub struct Queued {
    events: Outlet<(Role, Event)>,
    dropped: Arc<AtomicU64>,
}

impl Queued {
    /// Starts the thread that passes the events to `observer`.
    ///
    /// # Errors
    /// When the system cannot start a thread.
    pub fn new(observer: impl Observer + 'static) -> io::Result<Self> {
        let dropped = Arc::<AtomicU64>::default();
        let observing = Observing { observer, dropped: dropped.clone() };
        Ok(Self { events: Outlet::begin("memferry-observer", EVENTS, observing)?, dropped })
    }

    /// Waits until the observer has received every event so far: false if it has not after `limit`.
    pub fn flush(&self, limit: Duration) -> bool {
        self.events.flush(limit)
    }

    /// How many events were dropped because the observer was too slow, as far as it has come.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl Observer for Queued {
    fn event(&self, role: Role, event: &Event) {
        self.events.put((role, event.clone()));
    }
}

struct Observing<O> {
    observer: O,
    dropped: Arc<AtomicU64>,
}

impl<O: Observer + 'static> Sink<(Role, Event)> for Observing<O> {
    fn take(&mut self, (role, event): (Role, Event)) {
        self.observer.event(role, &event);
    }

    fn dropped(&mut self, count: u64) {
        self.dropped.fetch_add(count, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn an_observer_that_blocks_is_given_what_has_room_and_counts_the_rest() {
        let (leave, given) = channel::<()>();
        let (given, seen) = (Mutex::new(given), Arc::<AtomicU64>::default());
        let counts = seen.clone();
        let queued = Queued::new(move |_: Role, _: &Event| {
            given.lock().unwrap().recv().ok();
            counts.fetch_add(1, Ordering::Relaxed);
        });
        let queued = queued.unwrap();
        let sent = EVENTS as u64 + 100;
        (0..sent).for_each(|_| queued.event(Role::Source, &Event::Paused));
        assert!(!queued.flush(Duration::from_millis(1)));
        drop(leave);
        // It was blocked until the thread made progress.
        while !queued.flush(LONG) {
            thread::yield_now();
        }
        // The thread may have held one when the queue was full.
        assert!((99..=100).contains(&queued.dropped()), "{}", queued.dropped());
        assert_eq!(seen.load(Ordering::Relaxed) + queued.dropped(), sent);
    }
}
