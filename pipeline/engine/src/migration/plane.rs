//! The data plane: the runtime that the stages run on.
//!
//! Timers, signals, control and progress run on the caller's runtime, so that no computation delays a cancel.

use std::future::Future;
use std::io;
use std::sync::OnceLock;

use memferry_stages::host::cores;
use tokio::runtime::{Handle, Runtime};
use tokio_util::task::AbortOnDropHandle;

use crate::threads;

/// Threads for blocking calls: a bitmap sync, a flush to the disk, a name lookup.
const BLOCKING_THREADS: usize = 3;

/// A separate runtime for the data plane, with a worker for each core. One serves any number of migrations.
#[derive(Debug)]
pub struct DataPlane {
    runtime: Option<Runtime>,
    /// One thread for pages that a guest waits for: no computation of the data plane delays them. Started when it is needed.
    urgent: OnceLock<Runtime>,
}

impl DataPlane {
    /// Starts the workers.
    ///
    /// # Errors
    /// When the system cannot start the threads, with the limit to raise.
    pub fn new() -> io::Result<Self> {
        let runtime = threads::runtime("memferry-data", cores(), BLOCKING_THREADS)?;
        Ok(Self { runtime: Some(runtime), urgent: OnceLock::new() })
    }

    /// The runtime of one thread for pages that a guest waits for.
    ///
    /// # Errors
    /// When the system cannot start the thread, with the limit to raise.
    pub(super) fn urgent(&self) -> io::Result<&Handle> {
        if self.urgent.get().is_none() {
            // One that is started at the same time is of no use, and ends.
            let started = threads::runtime("memferry-urgent", 1, 0)?;
            if let Err(second) = self.urgent.set(started) {
                second.shutdown_background();
            }
        }
        Ok(self.urgent.get().expect("it is started").handle())
    }

    pub(super) fn handle(&self) -> &Handle {
        self.runtime.as_ref().expect("there until dropped").handle()
    }

    /// Runs a future on the data plane, so that the sockets it opens belong to that runtime. Dropping the call ends it.
    pub(super) async fn run<T: Send + 'static>(&self, future: impl Future<Output = T> + Send + 'static) -> T {
        let task = AbortOnDropHandle::new(self.handle().spawn(future));
        match task.await {
            Ok(value) => value,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

impl Drop for DataPlane {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        if let Some(urgent) = self.urgent.take() {
            urgent.shutdown_background();
        }
    }
}
