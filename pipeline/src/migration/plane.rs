//! The data plane: the runtime that the stages run on.
//!
//! Timers, signals, control and progress run on the caller's runtime, so that nothing that computes delays a cancel.

use std::future::Future;
use std::io;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio_util::task::AbortOnDropHandle;

/// A runtime of the data's own, with a worker for each core. One serves any number of migrations.
#[derive(Debug)]
pub struct DataPlane {
    runtime: Option<Runtime>,
}

impl DataPlane {
    /// Starts the workers.
    ///
    /// # Errors
    /// When the system gives no threads.
    pub fn new() -> io::Result<Self> {
        let runtime = Builder::new_multi_thread().thread_name("memferry-data").enable_all().build()?;
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
