//! Memory that shall be durable is written to disk while pages are still loaded, so that the paused guest waits only for
//! what the last round changed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use crate::controller::forecast::{Recent, WriteBack};
use crate::guest::{DestinationGuest, GuestError};
use crate::migration::blocking;
use crate::migration::error::MigrationError;

/// From this number of bytes on a call shows how long a byte takes; below it, how long a call takes.
const TELLING_BYTES: u64 = 8 << 20;

/// The calls of [`DestinationGuest::make_durable`] beside the loading, one at a time, and how long they took.
#[derive(Default)]
pub(super) struct Writer {
    running: Option<Running>,
    /// Bytes that were loaded when the latest complete call began.
    durable_bytes: u64,
    small_calls: Recent,
    call: Duration,
    large_calls: Recent,
    per_mib: Duration,
}

/// A call in progress.
struct Running {
    /// Its time on the thread that makes it.
    call: JoinHandle<Result<Duration, GuestError>>,
    /// Bytes that were loaded when it began.
    loaded_bytes: u64,
}

impl Writer {
    /// Begins a call if pages were loaded since the latest one and none is in progress.
    pub(super) fn begin(&mut self, guest: &Arc<dyn DestinationGuest>, loaded_bytes: u64) {
        if self.running.is_some() || loaded_bytes == self.durable_bytes {
            return;
        }
        let guest = guest.clone();
        let call = tokio::task::spawn_blocking(move || {
            let began = Instant::now();
            guest.make_durable().map(|()| began.elapsed())
        });
        self.running = Some(Running { call, loaded_bytes });
    }

    /// Waits for the end of the call in progress; never returns if there is none. Safe to race in a `select!`.
    pub(super) async fn next(&mut self) -> Result<(), MigrationError> {
        let Some(running) = &mut self.running else { return std::future::pending().await };
        let result = (&mut running.call).await;
        let loaded_bytes = running.loaded_bytes;
        self.running = None;
        let time = result.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        self.took(time, loaded_bytes - self.durable_bytes);
        self.durable_bytes = loaded_bytes;
        Ok(())
    }

    /// Everything is loaded: returns when it is durable.
    pub(super) async fn finish(&mut self, guest: Arc<dyn DestinationGuest>) -> Result<(), MigrationError> {
        if self.running.is_some() {
            self.next().await?;
        }
        Ok(blocking(move || guest.make_durable()).await?)
    }

    /// Waits until no call is in progress.
    pub(super) async fn end(&mut self) {
        if let Some(running) = self.running.take() {
            // Whatever the result is, the migration has its own.
            drop(running.call.await);
        }
    }

    fn took(&mut self, time: Duration, bytes: u64) {
        if bytes < TELLING_BYTES {
            self.call = self.small_calls.with(time);
        } else {
            self.per_mib = self.large_calls.with(time.mul_f64(MIB / bytes as f64));
        }
    }

    /// How long it takes to make durable what is loaded, and what is to come.
    pub(super) fn times(&self, loaded_bytes: u64) -> WriteBack {
        let backlog = self.per_mib.mul_f64((loaded_bytes - self.durable_bytes) as f64 / MIB);
        WriteBack { backlog, call: self.call, per_mib: self.per_mib }
    }
}

const MIB: f64 = 1024.0 * 1024.0;

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn small_calls_show_the_time_of_a_call_and_large_ones_that_of_a_byte() {
        let mut writer = Writer::default();
        writer.took(100 * MS, 100 << 20);
        writer.took(3 * MS, 4096);
        writer.took(2 * MS, 4096);
        writer.durable_bytes = 100 << 20;
        let times = writer.times(150 << 20);
        assert_eq!(times, WriteBack { backlog: 50 * MS, call: 3 * MS, per_mib: MS });
    }
}
