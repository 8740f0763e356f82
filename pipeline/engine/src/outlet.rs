//! An outlet: writes the output of an observer, however slowly its reader takes it.
//!
//! A bounded queue and a thread. The caller never waits: an item that finds the queue full is dropped and counted, and
//! the count is stored at its place in the queue, so that the reader learns what is missing and where. Only the thread
//! waits for a descriptor. The end waits for a limited time, and then abandons the thread, which ends with the program.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::threads::explained;

/// The work of an outlet's thread. Each call may block.
pub trait Sink<T>: Send + 'static {
    /// Writes the next item.
    fn take(&mut self, item: T);

    /// Items were dropped at this place, because those before them were written too slowly.
    fn dropped(&mut self, count: u64);

    /// There are no more items.
    fn end(&mut self) {}
}

/// A bounded queue with a thread that empties it: see the [module](self). Once dropped, it accepts no more items.
pub struct Outlet<T> {
    shared: Arc<Shared<T>>,
    /// Entries that may be queued.
    room: usize,
}

impl<T> fmt::Debug for Outlet<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.shared.state();
        write!(f, "an outlet with {} of {} entries, {:?}", state.entries.len(), self.room, state.thread)
    }
}

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    entries: VecDeque<Entry<T>>,
    thread: Thread,
    is_closed: bool,
    /// Has a wait timed out since the thread last made progress?
    is_stuck: bool,
}

enum Entry<T> {
    Item(T),
    Dropped(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thread {
    Waits,
    Writes,
    Ended,
}

impl<T: Send + 'static> Outlet<T> {
    /// Starts the thread. Up to `room` entries may be queued for it.
    ///
    /// # Errors
    /// When the system cannot start a thread.
    pub fn begin(name: &str, room: usize, sink: impl Sink<T>) -> io::Result<Self> {
        let state = State { entries: VecDeque::new(), thread: Thread::Waits, is_closed: false, is_stuck: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let theirs = shared.clone();
        thread::Builder::new().name(name.into()).spawn(move || theirs.run(sink)).map_err(explained)?;
        Ok(Self { shared, room })
    }

    /// Queues an item, or counts it as dropped.
    pub fn put(&self, item: T) {
        let mut state = self.shared.state();
        if state.is_closed {
            return;
        }
        if state.entries.len() < self.room {
            state.entries.push_back(Entry::Item(item));
        } else if let Some(Entry::Dropped(count)) = state.entries.back_mut() {
            *count += 1;
        } else {
            state.entries.push_back(Entry::Dropped(1));
        }
        self.shared.changed.notify_all();
    }

    /// Queues an item that a later one replaces: if there is no room, it is dropped without being counted.
    pub fn offer(&self, item: T) {
        let mut state = self.shared.state();
        if !state.is_closed && state.entries.len() < self.room {
            state.entries.push_back(Entry::Item(item));
            self.shared.changed.notify_all();
        }
    }

    /// Waits until everything queued so far is written: false if it is not after `limit`. After one timeout, later
    /// calls return at once until the thread makes progress.
    pub fn flush(&self, limit: Duration) -> bool {
        let state = self.shared.state();
        let waits = |state: &State<T>| state.thread == Thread::Writes || !state.entries.is_empty();
        self.wait(state, limit, |state| state.thread != Thread::Ended && waits(state))
    }

    /// Closes the queue, and waits until all is written and the sink has ended: false if it has not after `limit`.
    pub fn close(&self, limit: Duration) -> bool {
        let mut state = self.shared.state();
        state.is_closed = true;
        self.shared.changed.notify_all();
        self.wait(state, limit, |state| state.thread != Thread::Ended)
    }

    fn wait(&self, state: MutexGuard<'_, State<T>>, limit: Duration, unfinished: impl Fn(&State<T>) -> bool) -> bool {
        let limit = if state.is_stuck { Duration::ZERO } else { limit };
        let waited = self.shared.changed.wait_timeout_while(state, limit, |state| unfinished(state));
        let (mut state, time) = waited.unwrap_or_else(PoisonError::into_inner);
        state.is_stuck |= time.timed_out();
        !time.timed_out()
    }
}

impl<T> Drop for Outlet<T> {
    fn drop(&mut self) {
        self.shared.state().is_closed = true;
        self.shared.changed.notify_all();
    }
}

impl<T> Shared<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, mut sink: impl Sink<T>) {
        // A terminal may stop a background process that writes to it (`stty tostop`), unless the writing thread blocks
        // this signal.
        let mut background = SigSet::empty();
        background.add(Signal::SIGTTOU);
        background.thread_block().ok();
        let _ended = Ends(self);
        while let Some(entry) = self.next() {
            match entry {
                Entry::Item(item) => sink.take(item),
                Entry::Dropped(count) => sink.dropped(count),
            }
            let mut state = self.state();
            (state.thread, state.is_stuck) = (Thread::Waits, false);
            self.changed.notify_all();
        }
        sink.end();
    }

    /// Waits for the next entry; `None` once the queue is closed and empty.
    fn next(&self) -> Option<Entry<T>> {
        let idle = |state: &mut State<T>| state.entries.is_empty() && !state.is_closed;
        let mut state = self.changed.wait_while(self.state(), idle).unwrap_or_else(PoisonError::into_inner);
        let entry = state.entries.pop_front()?;
        state.thread = Thread::Writes;
        Some(entry)
    }
}

/// However the thread ends, waits for it end too.
struct Ends<'a, T>(&'a Shared<T>);

impl<T> Drop for Ends<'_, T> {
    fn drop(&mut self) {
        self.0.state().thread = Thread::Ended;
        self.0.changed.notify_all();
    }
}

/// A descriptor as a writer. It avoids the buffer and the lock of the standard library's handles, which a thread that
/// waits for room would hold, and it handles a descriptor that another process has made non-blocking.
#[derive(Debug)]
pub struct Direct<F>(pub F);

impl<F: AsFd> Write for Direct<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match rustix::io::write(&self.0, bytes) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => drop(poll(&mut [PollFd::new(&self.0, PollFlags::OUT)], None)),
                written => return written.map_err(io::Error::from),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    /// Waits for permission before each entry, then records it.
    struct Slow {
        leave: Receiver<()>,
        notes: Sender<String>,
    }

    impl Slow {
        fn note(&self, what: String) {
            // Without a sender of permissions it does not wait.
            self.leave.recv().ok();
            self.notes.send(what).unwrap();
        }
    }

    impl Sink<u32> for Slow {
        fn take(&mut self, item: u32) {
            self.note(item.to_string());
        }

        fn dropped(&mut self, count: u64) {
            self.note(format!("-{count}"));
        }

        fn end(&mut self) {
            self.note("end".into());
        }
    }

    fn slow(room: usize) -> (Outlet<u32>, Sender<()>, Receiver<String>) {
        let ((leave, given), (notes, noted)) = (channel(), channel());
        (Outlet::begin("slow", room, Slow { leave: given, notes }).unwrap(), leave, noted)
    }

    const LONG: Duration = Duration::from_secs(60);

    /// Queues an item and waits until the thread has taken it; the thread then waits for permission.
    fn occupy(outlet: &Outlet<u32>) {
        outlet.put(0);
        while outlet.shared.state().thread != Thread::Writes {
            thread::yield_now();
        }
    }

    #[test]
    fn what_finds_no_room_is_counted_at_its_place() {
        let (outlet, leave, noted) = slow(2);
        occupy(&outlet);
        (1..=5).for_each(|item| outlet.put(item));
        // Two of them fit, three do not.
        (0..2).for_each(|_| leave.send(()).unwrap());
        assert_eq!(noted.iter().take(2).collect::<Vec<_>>(), ["0", "1"]);
        drop(leave);
        assert_eq!(noted.iter().take(2).collect::<Vec<_>>(), ["2", "-3"]);
        assert!(outlet.flush(LONG));
        outlet.put(6);
        assert!(outlet.close(LONG));
        outlet.put(7);
        assert_eq!(noted.iter().collect::<Vec<_>>(), ["6", "end"]);
    }

    #[test]
    fn what_a_later_one_replaces_is_not_counted() {
        let (outlet, leave, noted) = slow(1);
        occupy(&outlet);
        (1..=5).for_each(|item| outlet.offer(item));
        drop(leave);
        assert!(outlet.close(LONG));
        assert_eq!(noted.iter().collect::<Vec<_>>(), ["0", "1", "end"]);
    }

    #[test]
    fn nobody_waits_twice_for_one_that_is_stuck() {
        let (outlet, leave, noted) = slow(8);
        occupy(&outlet);
        assert!(!outlet.flush(Duration::from_millis(1)));
        let begun = std::time::Instant::now();
        assert!(!outlet.flush(LONG) && !outlet.close(LONG));
        assert!(begun.elapsed() < LONG);
        drop(leave);
        assert_eq!(noted.iter().collect::<Vec<_>>(), ["0", "end"]);
    }

    #[test]
    fn one_that_panics_holds_nobody_up() {
        struct Panics;
        impl Sink<()> for Panics {
            fn take(&mut self, (): ()) {
                // Suppresses the panic message.
                std::panic::resume_unwind(Box::new(()));
            }
            fn dropped(&mut self, _: u64) {}
        }
        let outlet = Outlet::begin("panics", 1, Panics).unwrap();
        (0..9).for_each(|_| outlet.put(()));
        assert!(outlet.flush(LONG) && outlet.close(LONG));
    }

    #[test]
    fn a_descriptor_that_does_not_block_is_waited_for() {
        let (reader, writer) = io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        let bytes = vec![7; 1 << 20];
        let read = thread::spawn(move || {
            let mut all = Vec::new();
            io::Read::read_to_end(&mut { reader }, &mut all).map(|_| all)
        });
        Direct(writer).write_all(&bytes).unwrap();
        assert_eq!(read.join().unwrap().unwrap(), bytes);
    }
}
