//! Measures how long a future keeps its caller waiting.

use std::future::poll_fn;
use std::pin::pin;
use std::time::Instant;

/// Awaits `future` and tells `waited` when each stretch began in which it was pending, as the stretch ends. A future that
/// is ready at once costs no look at the clock.
pub(crate) async fn pending<F: Future>(future: F, waited: impl Fn(Instant)) -> F::Output {
    let mut future = pin!(future);
    let mut since = None;
    poll_fn(|context| {
        since.take().into_iter().for_each(&waited);
        let poll = future.as_mut().poll(context);
        since = poll.is_pending().then(Instant::now);
        poll
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test]
    async fn only_a_pending_future_is_measured() {
        let waits = Cell::new(0);
        let count = |since: Instant| {
            assert!(since.elapsed().as_nanos() > 0);
            waits.set(waits.get() + 1);
        };
        assert_eq!(pending(async { 7 }, count).await, 7);
        assert_eq!(waits.get(), 0);
        pending(tokio::task::yield_now(), count).await;
        assert_eq!(waits.get(), 1);
    }
}
