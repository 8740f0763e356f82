//! The faults of missing memory, for one thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use super::{MissingMemory, PlaceError};

use crate::geometry::PageAt;

/// What follows for the thread that takes faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// A thread waits for this page, which must be asked for.
    Page(PageAt),
    /// All pages are there: no faults follow. Dropping the memory closes the descriptor.
    Complete,
    /// It was stopped.
    Stopped,
}

/// Takes the faults of a [`MissingMemory`], on a thread that may block. There is one at a time.
#[derive(Debug)]
pub struct Faults {
    memory: Arc<MissingMemory>,
    stopped: Arc<AtomicBool>,
}

/// Ends [`Faults`] from another thread.
#[derive(Clone, Debug)]
pub struct Stop {
    memory: Arc<MissingMemory>,
    stopped: Arc<AtomicBool>,
}

impl Stop {
    /// Lets [`Faults::next`] return [`Next::Stopped`] from now on. Threads that wait for pages continue to wait.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.memory.kick();
    }
}

impl MissingMemory {
    /// The faults. What one [`Faults`] has not handled, the next one does.
    ///
    /// # Panics
    /// If there is one.
    #[must_use]
    pub fn faults(self: &Arc<Self>) -> Faults {
        let followed = self.followed.swap(true, Ordering::AcqRel);
        assert!(!followed, "one thread takes the faults");
        Faults { memory: self.clone(), stopped: Arc::default() }
    }
}

impl Faults {
    /// What ends this one.
    #[must_use]
    pub fn stopper(&self) -> Stop {
        Stop { memory: self.memory.clone(), stopped: self.stopped.clone() }
    }

    /// Waits for a page that a thread waits for, and that was not given before unless [`MissingMemory::ask_again`] was called. Touches
    /// of pages that are not expected, or were discarded, are resolved meanwhile.
    ///
    /// # Errors
    /// When the kernel does not report faults, or a page cannot be made zero.
    #[expect(clippy::should_implement_trait, reason = "it never ends by itself, and may fail")]
    pub fn next(&mut self) -> Result<Next, PlaceError> {
        loop {
            if self.stopped.load(Ordering::Acquire) {
                return Ok(Next::Stopped);
            }
            if self.memory.is_complete() {
                return Ok(Next::Complete);
            }
            if let Some(page) = self.again() {
                return Ok(Next::Page(page));
            }
            let fault = self.memory.queue().faults.pop_front();
            if let Some(address) = fault {
                if let Some(page) = self.memory.fault(address)? {
                    return Ok(Next::Page(page));
                }
                continue;
            }
            self.wait().map_err(|error| PlaceError::Faults(error.into()))?;
            self.memory.read_events()?;
        }
    }

    /// A page to ask for again.
    fn again(&self) -> Option<PageAt> {
        let mut queue = self.memory.queue();
        std::iter::from_fn(|| queue.again.pop_front()).find(|page| self.memory.missing.is_set(*page))
    }

    /// Waits for an event or a kick.
    fn wait(&self) -> rustix::io::Result<()> {
        let (faults, kick) = (&*self.memory.target.faults, &self.memory.kick);
        let mut ready = [PollFd::new(faults, PollFlags::IN), PollFd::new(kick, PollFlags::IN)];
        match rustix::event::poll(&mut ready, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        if ready[0].revents().intersects(PollFlags::ERR | PollFlags::NVAL) {
            return Err(Errno::BADF);
        }
        if !ready[1].revents().is_empty() {
            let _kicks = rustix::io::read(kick, &mut [0_u8; 8]);
        }
        Ok(())
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        self.memory.followed.store(false, Ordering::Release);
    }
}
