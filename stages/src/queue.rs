//! The bounded queues that join the stages.
//!
//! An [`async_channel`] whose ends measure their waits into the meter of the stage that holds them, and which takes
//! part in tokio's cooperative budget: a long backlog does not starve a timer. A queue is bounded by count; since what
//! it carries holds at most one pooled buffer, the pools bound it in bytes (law 9).

use std::sync::Arc;
use std::time::Instant;

use crate::meter::Meter;

/// The other end of the queue is gone: the neighbour has ended, and so should this stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the next stage has ended")]
pub struct Closed;

/// A queue of at most `capacity` items.
#[must_use]
pub fn bounded<T>(capacity: usize) -> (Outlet<T>, Inlet<T>) {
    let (sender, receiver) = async_channel::bounded(capacity);
    (Outlet { sender, meter: None }, Inlet { receiver, meter: None })
}

/// The end that a stage puts into.
#[derive(Debug)]
pub struct Outlet<T> {
    sender: async_channel::Sender<T>,
    meter: Option<Arc<Meter>>,
}

impl<T> Clone for Outlet<T> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), meter: self.meter.clone() }
    }
}

impl<T> Outlet<T> {
    /// Measures waits into `meter`.
    #[must_use]
    pub fn metered(mut self, meter: &Arc<Meter>) -> Self {
        self.meter = Some(meter.clone());
        self
    }

    /// Puts an item into the queue, waiting for room.
    ///
    /// Not to be raced in a `select!`: a send that is dropped drops its item.
    ///
    /// # Errors
    /// [`Closed`] if nobody will take it.
    pub async fn put(&self, item: T) -> Result<(), Closed> {
        let item = match self.sender.try_send(item) {
            Ok(()) => return Ok(()),
            Err(async_channel::TrySendError::Closed(_)) => return Err(Closed),
            Err(async_channel::TrySendError::Full(item)) => item,
        };
        let since = Instant::now();
        let sent = self.sender.send(item).await;
        if let Some(meter) = &self.meter {
            meter.waited_for_output(since);
        }
        sent.map_err(|_| Closed)
    }

    /// Puts an item into the queue if there is room, and drops it if there is none.
    ///
    /// # Errors
    /// [`Closed`] if nobody will take it.
    pub fn offer(&self, item: T) -> Result<(), Closed> {
        match self.sender.try_send(item) {
            Ok(()) | Err(async_channel::TrySendError::Full(_)) => Ok(()),
            Err(async_channel::TrySendError::Closed(_)) => Err(Closed),
        }
    }
}

/// The end that a stage takes from.
#[derive(Debug)]
pub struct Inlet<T> {
    receiver: async_channel::Receiver<T>,
    meter: Option<Arc<Meter>>,
}

impl<T> Inlet<T> {
    /// Measures waits into `meter`.
    #[must_use]
    pub fn metered(mut self, meter: &Arc<Meter>) -> Self {
        self.meter = Some(meter.clone());
        self
    }

    /// The next item, or `None` when the queue is empty and its other end is gone. Safe to race in a `select!`.
    pub async fn next(&self) -> Option<T> {
        tokio::task::coop::consume_budget().await;
        if let Some(item) = self.try_next() {
            return Some(item);
        }
        let since = Instant::now();
        let item = self.receiver.recv().await.ok();
        if let Some(meter) = &self.meter {
            meter.waited_for_input(since);
        }
        item
    }

    /// An item that waits already.
    #[must_use]
    pub fn try_next(&self) -> Option<T> {
        self.receiver.try_recv().ok()
    }
}
