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
    use std::sync::Arc;
    use std::time::Duration;

    use futures::FutureExt;

    use super::*;
    use crate::meter::Reading;
    use crate::stage::testing::meter;
    use crate::token_bucket::{BURST, Share, TokenBucket};

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

    /// A meter whose stage is limited, and the time in which the bucket fills.
    fn limited() -> (Arc<Meter>, Arc<TokenBucket>, Duration) {
        let (meter, bucket) = (meter(), Arc::new(TokenBucket::new(1000)));
        bucket.charge(5);
        meter.limited_by(bucket.clone());
        (meter, bucket, Duration::from_millis(5) + BURST)
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_for_the_limit_is_no_wait_for_room() {
        let (meter, bucket, fills_in) = limited();
        let limited = async {
            pending(bucket.take(1, Share::ALL), &meter, Wait::Limit).await;
            futures::pending!();
        };
        let mut waits = Box::pin(pending(limited, &meter, Wait::Output));
        assert_eq!(waits.as_mut().now_or_never(), None);
        tokio::time::advance(fills_in).await;
        std::thread::sleep(WAIT);
        assert_eq!(waits.as_mut().now_or_never(), None);
        let limited = meter.read().limit_wait;
        std::thread::sleep(WAIT);
        assert_eq!(waits.as_mut().now_or_never(), Some(()));
        let reading = meter.read();
        assert!(limited >= WAIT && reading.limit_wait >= limited && reading.output_wait >= WAIT / 2, "{reading:?}");
        assert!(reading.life() >= 2 * WAIT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_for_the_limit_counts_until_the_bucket_is_full_and_is_work_from_then_on() {
        let (meter, bucket, fills_in) = limited();
        let limited = pending(bucket.take(1, Share::ALL), &meter, Wait::Limit);
        let mut waits = Box::pin(pending(limited, &meter, Wait::Output));
        assert_eq!(waits.as_mut().now_or_never(), None);
        tokio::time::advance(Duration::from_secs(1)).await;
        std::thread::sleep(2 * fills_in);
        let is_late = |reading: Reading| {
            assert_eq!((reading.limit_wait, reading.output_wait), (fills_in, Duration::ZERO), "{reading:?}");
            assert!(reading.busy >= fills_in, "{reading:?}");
        };
        is_late(meter.read());
        assert_eq!(waits.await, 1);
        is_late(meter.read());
    }

    #[test]
    fn a_wait_counts_while_it_continues_and_when_it_is_given_up() {
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
