//! The bounded queues that join the stages.
//!
//! An [`async_channel`] whose ends measure their waits into the meter of the stage that holds them, and which takes
//! part in tokio's cooperative budget: a long backlog does not starve a timer. A queue is bounded by count. Since an
//! item holds at most one pooled buffer, the pools bound it in bytes (ARCHITECTURE.md, law 9: memory is bounded).

use std::sync::Arc;

use crate::meter::{Meter, Wait};

/// The other end of the queue was dropped: the neighbour has ended, and so should this stage.
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
    /// Must not be raced in a `select!`: a dropped send drops its item.
    ///
    /// # Errors
    /// [`Closed`] if the other end was dropped.
    pub async fn put(&self, item: T) -> Result<(), Closed> {
        let item = match self.sender.try_send(item) {
            Ok(()) => return Ok(()),
            Err(async_channel::TrySendError::Closed(_)) => return Err(Closed),
            Err(async_channel::TrySendError::Full(item)) => item,
        };
        let _waiting = self.meter.as_ref().map(|meter| meter.waiting(Wait::Output));
        self.sender.send(item).await.map_err(|_| Closed)
    }

    /// Puts an item into the queue if there is room, and drops it if there is none.
    ///
    /// # Errors
    /// [`Closed`] if the other end was dropped.
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

    /// The next item, or `None` when the queue is empty and its other end was dropped. Safe to race in a `select!`.
    pub async fn next(&self) -> Option<T> {
        tokio::task::coop::consume_budget().await;
        if let Some(item) = self.try_next() {
            return Some(item);
        }
        let _waiting = self.meter.as_ref().map(|meter| meter.waiting(Wait::Input));
        self.receiver.recv().await.ok()
    }

    /// An item, if one is waiting.
    #[must_use]
    pub fn try_next(&self) -> Option<T> {
        self.receiver.try_recv().ok()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::FutureExt;

    use super::*;
    use crate::stage::testing::{block_on, drain, meter};

    const WAIT: Duration = Duration::from_millis(20);

    #[test]
    fn a_queue_holds_its_capacity_and_not_one_more() {
        let (outlet, inlet) = bounded(3);
        let mut puts: Vec<_> = (0..5).map(|item| Box::pin(outlet.put(item))).collect();
        let done: Vec<_> = puts.iter_mut().map(|put| put.as_mut().now_or_never() == Some(Ok(()))).collect();
        assert_eq!(done, [true, true, true, false, false]);
        assert_eq!(drain(&inlet), [0, 1, 2]);
    }

    #[test]
    fn what_was_put_is_taken_before_the_end_is_seen() {
        block_on(async {
            let (outlet, inlet) = bounded(2);
            outlet.put(7).await.unwrap();
            drop(outlet);
            assert_eq!((inlet.next().await, inlet.next().await), (Some(7), None));
        });
    }

    #[test]
    fn putting_fails_when_nobody_will_take_it_also_while_it_waits() {
        block_on(async {
            let (outlet, inlet) = bounded(1);
            outlet.put(1).await.unwrap();
            let leave = async { drop(inlet) };
            assert_eq!(tokio::join!(outlet.put(2), leave).0, Err(Closed));
            assert_eq!(outlet.put(3).await, Err(Closed));
        });
    }

    #[test]
    fn a_take_that_is_given_up_takes_nothing() {
        block_on(async {
            let (outlet, inlet) = bounded(1);
            for item in 0..10 {
                assert_eq!(inlet.next().now_or_never(), None);
                outlet.put(item).await.unwrap();
                assert_eq!(inlet.next().await, Some(item));
            }
        });
    }

    #[test]
    fn each_end_counts_its_own_waits_and_nothing_else() {
        let (putter, taker) = (meter(), meter());
        let (outlet, inlet) = bounded(1);
        let (outlet, inlet) = (outlet.metered(&putter), inlet.metered(&taker));
        block_on(async {
            outlet.put(0).await.unwrap();
            inlet.next().await.unwrap();
            assert_eq!((putter.read().output_wait, taker.read().input_wait), (Duration::ZERO, Duration::ZERO));
            let late = async {
                tokio::time::sleep(WAIT).await;
                outlet.put(1).await.unwrap();
            };
            tokio::join!(inlet.next(), late);
            assert_eq!(putter.read().output_wait, Duration::ZERO);
            outlet.put(2).await.unwrap();
            let late = async {
                tokio::time::sleep(WAIT).await;
                inlet.next().await
            };
            tokio::join!(outlet.put(3), late).0.unwrap();
        });
        assert!(taker.read().input_wait >= WAIT && putter.read().output_wait >= WAIT);
        assert_eq!((putter.read().input_wait, taker.read().output_wait), (Duration::ZERO, Duration::ZERO));
    }

    #[test]
    fn a_long_backlog_lets_others_have_their_turn() {
        const ITEMS: usize = 10_000;
        let turns = block_on(async {
            let (outlet, inlet) = bounded(ITEMS);
            for item in 0..ITEMS {
                outlet.put(item).await.unwrap();
            }
            drop(outlet);
            let consumer = tokio::spawn(async move { while inlet.next().await.is_some() {} });
            let mut turns = 0;
            while !consumer.is_finished() {
                turns += 1;
                tokio::task::yield_now().await;
            }
            turns
        });
        assert!(turns >= ITEMS / 256, "{turns} turns beside {ITEMS} items");
    }
}
