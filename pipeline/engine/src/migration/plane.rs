//! The data plane: the runtime that the stages run on.
//!
//! Timers, signals, control and progress run on the caller's runtime, so that nothing that computes delays a cancel.

use std::future::Future;
use std::io;

use memferry_stages::host::cores;
use tokio::runtime::{Handle, Runtime};
use tokio_util::task::AbortOnDropHandle;

use crate::threads;

/// Threads for what blocks: a bitmap sync, a flush to the disk, a name to be resolved.
const BLOCKING_THREADS: usize = 3;

/// A runtime of the data's own, with a worker for each core. One serves any number of migrations.
#[derive(Debug)]
pub struct DataPlane {
    runtime: Option<Runtime>,
}

impl DataPlane {
    /// Starts the workers.
    ///
    /// # Errors
    /// When the system gives no threads, with the limit to raise.
    pub fn new() -> io::Result<Self> {
        let runtime = threads::runtime("memferry-data", cores(), BLOCKING_THREADS)?;
        Ok(Self { runtime: Some(runtime) })
    }

    pub(super) fn handle(&self) -> &Handle {
        self.runtime.as_ref().expect("there until dropped").handle()
    }

    /// Runs a future on the data plane, so that the sockets it opens belong there. Dropping the call ends it.
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
    }
}
