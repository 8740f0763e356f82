//! Retries: connecting until somebody listens, and accepting again after a transient failure.

use std::future::Future;
use std::io;
use std::time::Duration;

use rustix::io::Errno;
use tokio::time::{Instant, sleep, sleep_until};

/// The first wait between two tries; each is twice the one before.
const FIRST_WAIT: Duration = Duration::from_millis(20);
/// The longest wait between two tries.
const LONGEST_WAIT: Duration = Duration::from_millis(500);

/// Why a try failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Transient: a later try may succeed.
    Retry(io::Error),
    /// Permanent: no later try can succeed.
    Final(io::Error),
}

/// Tries to connect until it succeeds, fails permanently, or `timeout` has passed. One try is always made.
///
/// `attempt` gets the time at which the last try should end.
pub(crate) async fn connect_within<T, F, A>(address: &str, timeout: Duration, mut attempt: F) -> io::Result<T>
where
    F: FnMut(Instant) -> A,
    A: Future<Output = Result<T, Failure>>,
{
    let begun = Instant::now();
    let deadline = begun + timeout;
    let mut wait = FIRST_WAIT;
    loop {
        let cause = match attempt(deadline).await {
            Ok(connected) => return Ok(connected),
            Err(Failure::Final(error)) => return Err(in_context(&error, &format!("cannot connect to {address}"))),
            Err(Failure::Retry(error)) => error,
        };
        if Instant::now() >= deadline {
            return Err(gave_up(address, begun.elapsed(), &cause));
        }
        sleep_until(deadline.min(Instant::now() + wait)).await;
        wait = LONGEST_WAIT.min(wait * 2);
    }
}

fn gave_up(address: &str, tried: Duration, cause: &io::Error) -> io::Error {
    let message = format!(
        "cannot connect to {address}: tried for {:.1} s, at last: {cause}; start the destination there, or allow more time (connect_timeout)",
        tried.as_secs_f64()
    );
    io::Error::new(cause.kind(), message)
}

/// The same error, with the place where it happened in front.
pub(crate) fn in_context(error: &io::Error, place: &str) -> io::Error {
    io::Error::new(error.kind(), format!("{place}: {error}"))
}

/// Errors for a shortage of what a connection takes: descriptors, memory.
const SHORTAGES: [Errno; 4] = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];

/// Whether this error of a listener is a shortage of descriptors or memory, which may be transient.
#[must_use]
pub fn is_shortage(error: &io::Error) -> bool {
    Errno::from_io_error(error).is_some_and(|errno| SHORTAGES.contains(&errno))
}

/// Handles an accept that failed. Returns the error if the listener is unusable, or, after a short wait, if it is a shortage
/// ([`is_shortage`]).
///
/// An error of a connection that broke off before it was accepted is ignored.
pub(crate) async fn after_failed_accept(address: &str, error: &io::Error) -> io::Result<()> {
    let broken = [Errno::BADF, Errno::INVAL, Errno::NOTSOCK, Errno::OPNOTSUPP];
    match Errno::from_io_error(error) {
        Some(errno) if SHORTAGES.contains(&errno) => {
            sleep(FIRST_WAIT * 5).await;
            Err(errno.into())
        }
        Some(errno) if !broken.contains(&errno) => {
            tracing::debug!(address, %error, "a connection could not be accepted");
            Ok(())
        }
        _ => Err(in_context(error, &format!("cannot accept connections on {address}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    fn refused() -> Failure {
        Failure::Retry(io::ErrorKind::ConnectionRefused.into())
    }

    #[tokio::test(start_paused = true)]
    async fn tries_end_in_time_and_say_why() {
        let (begun, tries) = (Instant::now(), Cell::new(0));
        let attempt = |_| {
            tries.set(tries.get() + 1);
            async { Err::<(), _>(refused()) }
        };
        let error = connect_within("tcp:a:1", Duration::from_secs(3), attempt).await.expect_err("nobody listens");
        assert_eq!(begun.elapsed().as_millis(), 3000);
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert!(error.to_string().contains("tcp:a:1: tried for 3.0 s, at last: connection refused"), "{error}");
        // 20, 40, … 320 ms, then 500 ms each: 5 + 1 + 5 waits and the try before them.
        assert_eq!(tries.get(), 11);
    }

    #[tokio::test(start_paused = true)]
    async fn one_try_is_always_made_and_success_ends_them() {
        let connected = connect_within("a", Duration::ZERO, |_| async { Ok(5) }).await;
        assert_eq!(connected.expect("connected"), 5);
        let tries = Cell::new(0);
        let attempt = |_| {
            tries.set(tries.get() + 1);
            let enough = tries.get() == 4;
            async move { if enough { Ok(()) } else { Err(refused()) } }
        };
        connect_within("a", Duration::from_secs(60), attempt).await.expect("at the fourth try");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_final_is_not_tried_again() {
        let begun = Instant::now();
        let denied = || async { Err::<(), _>(Failure::Final(io::ErrorKind::PermissionDenied.into())) };
        let error = connect_within("unix:/a", Duration::from_secs(60), |_| denied()).await.expect_err("denied");
        assert_eq!((error.kind(), begun.elapsed()), (io::ErrorKind::PermissionDenied, Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn a_broken_connection_passes_and_a_shortage_is_distinguished_from_an_unusable_listener() {
        for shortage in SHORTAGES {
            let error = after_failed_accept("tcp:a:1", &shortage.into()).await.expect_err("short");
            assert!(is_shortage(&error), "{error}");
        }
        for passing in [Errno::CONNABORTED, Errno::PROTO] {
            after_failed_accept("tcp:a:1", &passing.into()).await.expect("passing");
        }
        let error = after_failed_accept("tcp:a:1", &Errno::INVAL.into()).await.expect_err("not listening");
        assert!(error.to_string().contains("tcp:a:1") && !is_shortage(&error), "{error}");
    }
}
