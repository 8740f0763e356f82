//! A writer that takes as many bytes as a test sets, and records them.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use tokio::io::AsyncWrite;

/// Clones share the wire: one is written to, the other is inspected.
#[derive(Clone, Debug)]
pub(super) struct Wire(Arc<Mutex<State>>);

#[derive(Debug)]
pub(super) struct State {
    /// All that was written.
    pub(super) bytes: Vec<u8>,
    /// Slices given to each write that took something.
    pub(super) slices: Vec<usize>,
    /// How many bytes had come at each flush.
    pub(super) flushes: Vec<usize>,
    pub(super) shut_down: bool,
    /// Fails from the next write on.
    pub(super) broken: bool,
    /// The most that each write takes, repeated in turn; 0 is a short pause.
    steps: Vec<usize>,
    step: usize,
    /// Bytes it takes before it stalls.
    room: usize,
    waker: Option<Waker>,
}

impl Wire {
    /// A wire that takes everything at once.
    pub(super) fn open() -> Self {
        Self::stepping(vec![usize::MAX])
    }

    /// A wire whose writes take at most these many bytes, in turn.
    pub(super) fn stepping(steps: Vec<usize>) -> Self {
        Self(Arc::new(Mutex::new(State {
            bytes: Vec::new(),
            slices: Vec::new(),
            flushes: Vec::new(),
            shut_down: false,
            broken: false,
            steps,
            step: 0,
            room: usize::MAX,
            waker: None,
        })))
    }

    /// A wire that stalls after `room` bytes.
    pub(super) fn stalling(room: usize) -> Self {
        let wire = Self::open();
        wire.set_room(room);
        wire
    }

    /// It takes `room` bytes more, then it stalls.
    pub(super) fn set_room(&self, room: usize) {
        let mut state = self.look();
        state.room = room;
        state.waker.take().into_iter().for_each(Waker::wake);
    }

    pub(super) fn look(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

impl State {
    /// What of `total` bytes is taken now; `None` is nothing yet.
    fn take(&mut self, total: usize, waker: &Waker) -> Option<usize> {
        let step = self.steps[self.step % self.steps.len()];
        self.step += 1;
        if step == 0 {
            waker.wake_by_ref();
            return None;
        }
        let taken = total.min(step).min(self.room);
        if taken == 0 {
            self.waker = Some(waker.clone());
            return None;
        }
        self.room -= taken;
        Some(taken)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.look();
        if state.broken {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let Some(taken) = state.take(slices.iter().map(|slice| slice.len()).sum(), context.waker()) else {
            return Poll::Pending;
        };
        let mut left = taken;
        for slice in slices {
            let part = &slice[..slice.len().min(left)];
            state.bytes.extend(part);
            left -= part.len();
        }
        state.slices.push(slices.len());
        Poll::Ready(Ok(taken))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.look();
        let bytes = state.bytes.len();
        state.flushes.push(bytes);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.look().shut_down = true;
        Poll::Ready(Ok(()))
    }
}
