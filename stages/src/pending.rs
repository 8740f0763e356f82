//! Measures how long a future keeps its caller waiting.

use std::future::poll_fn;
use std::pin::pin;

use crate::meter::{Meter, Wait};

/// Awaits `future`; the stretches in which it is pending are waits of the stage. A future that is ready at once costs no
/// look at the clock.
pub(crate) async fn pending<F: Future>(future: F, meter: &Meter, wait: Wait) -> F::Output {
    let mut future = pin!(future);
    let mut waiting = None;
    poll_fn(|context| {
        waiting = None;
        let poll = future.as_mut().poll(context);
        waiting = poll.is_pending().then(|| meter.waiting(wait));
        poll
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::FutureExt;

    use super::*;
    use crate::stage::testing::meter;

    const WAIT: Duration = Duration::from_millis(5);

    #[tokio::test]
    async fn only_a_pending_future_is_measured() {
        let meter = meter();
        assert_eq!(pending(async { 7 }, &meter, Wait::Input).await, 7);
        assert_eq!(meter.read().input_wait, Duration::ZERO);
        pending(tokio::time::sleep(WAIT), &meter, Wait::Input).await;
        assert!(meter.read().input_wait >= WAIT);
        assert_eq!(meter.read().output_wait, Duration::ZERO);
    }

    #[tokio::test]
    async fn a_wait_for_the_limit_is_no_wait_for_room() {
        let meter = meter();
        let limited = async {
            pending(tokio::time::sleep(WAIT), &meter, Wait::Limit).await;
            tokio::time::sleep(WAIT).await;
        };
        pending(limited, &meter, Wait::Output).await;
        let reading = meter.read();
        assert!(reading.limit_wait >= WAIT && reading.output_wait >= WAIT, "{reading:?}");
        assert!(reading.life() >= 2 * WAIT);
    }

    #[test]
    fn a_wait_for_the_limit_counts_while_it_goes_on() {
        let meter = meter();
        let limited = pending(std::future::pending::<()>(), &meter, Wait::Limit);
        let mut waits = Box::pin(pending(limited, &meter, Wait::Output));
        assert_eq!(waits.as_mut().now_or_never(), None);
        std::thread::sleep(WAIT);
        let reading = meter.read();
        assert!(reading.limit_wait >= WAIT && reading.output_wait < WAIT, "{reading:?}");
    }

    #[test]
    fn a_wait_counts_while_it_goes_on_and_when_it_is_given_up() {
        let meter = meter();
        let mut waits = Box::pin(pending(std::future::pending::<()>(), &meter, Wait::Output));
        assert_eq!(waits.as_mut().now_or_never(), None);
        let when_it_began = meter.read();
        std::thread::sleep(WAIT);
        let while_it_waits = meter.read();
        assert!(while_it_waits.output_wait >= when_it_began.output_wait + WAIT);
        assert_eq!(while_it_waits.busy, when_it_began.busy, "a wait is no work");
        drop(waits);
        let waited = meter.read().output_wait;
        assert!(waited >= while_it_waits.output_wait);
        std::thread::sleep(WAIT);
        assert_eq!(meter.read().output_wait, waited);
    }
}
