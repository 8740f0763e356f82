//! Page requester: asks for the pages that threads of the guest wait for.
//!
//! ```text
//!  userfaultfd ── faults ──▶ ┌────────────────┐
//!                            │ page requester │ ══ PageRequest ══▶
//!  missing memory ──────────▶└────────────────┘
//! ```
//!
//! One thread takes a fault from the kernel and writes the request itself: nothing else is waited for between the two. Each page is
//! asked for once; what is outstanding when the stage begins is asked for again, for the requests of a lost connection are lost.
//!
//! Its meter counts requests and their bytes.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};

use crate::error::{Cause, StageError};
use crate::loader::SinkError;
use crate::meter::{Meter, Wait};
use crate::missing::{Faults, MissingMemory, Next, PlaceError, Stop};
use crate::pending::pending;
use crate::stage::Stage;
use crate::stage_id::StageId;
use crate::wire::Message;

/// The stage: see the module.
#[derive(Debug)]
pub struct PageRequester {
    missing: Arc<MissingMemory>,
    stage: Stage,
}

impl PageRequester {
    /// The requester of this memory's missing pages.
    #[must_use]
    pub fn new(missing: Arc<MissingMemory>, meter: Arc<Meter>) -> Self {
        Self { missing, stage: Stage::new(StageId::PAGE_REQUESTER, meter) }
    }

    /// Runs until no page is missing. Called on a runtime, which the writer belongs to.
    ///
    /// # Errors
    /// When the transport fails, or the kernel reports no faults.
    ///
    /// # Panics
    /// If another one runs.
    pub async fn run(self, writer: impl AsyncWrite + Send + Unpin + 'static) -> Result<(), StageError> {
        self.work(writer).await.map_err(|cause| self.stage.fails(cause))
    }

    async fn work(&self, writer: impl AsyncWrite + Send + Unpin + 'static) -> Result<(), Cause> {
        let faults = self.missing.faults();
        self.missing.ask_again();
        let (ended, end) = oneshot::channel();
        let stopped = Arc::new(Notify::new());
        let stop = faults.stopper();
        let asking = Asking { faults, writer, meter: self.stage.meter.clone(), stopped: stopped.clone() };
        let runtime = Handle::current();
        let work = move || drop(ended.send(asking.run(&runtime)));
        let thread = thread::Builder::new().name("memferry-faults".into()).spawn(work).map_err(no_faults)?;
        let _running = Running { stop, stopped, thread: Some(thread) };
        // It works when a thread of the guest waits, which is measured as that thread's wait.
        let end = pending(end, &self.stage.meter, Wait::Input).await;
        end.unwrap_or_else(|_| Err(no_faults(io::ErrorKind::Other.into())))
    }
}

fn no_faults(error: io::Error) -> Cause {
    Cause::Sink(SinkError::Place(PlaceError::Faults(error)))
}

/// The thread's part.
struct Asking<W> {
    faults: Faults,
    writer: W,
    meter: Arc<Meter>,
    stopped: Arc<Notify>,
}

impl<W: AsyncWrite + Unpin> Asking<W> {
    fn run(mut self, runtime: &Handle) -> Result<(), Cause> {
        loop {
            match self.faults.next().map_err(|error| Cause::Sink(SinkError::Place(error)))? {
                Next::Page(page) => {
                    let frame = Message::PageRequest(page).encode(0);
                    let written = runtime.block_on(async {
                        tokio::select! {
                            biased;
                            written = self.writer.write_all(&frame) => written,
                            () = self.stopped.notified() => Ok(()),
                        }
                    });
                    written.map_err(Cause::Transport)?;
                    self.meter.count(1, frame.len() as u64);
                }
                Next::Complete => {
                    // The server ends. That it cannot be notified is its end too.
                    drop(runtime.block_on(self.writer.shutdown()));
                    return Ok(());
                }
                Next::Stopped => return Ok(()),
            }
        }
    }
}

/// Ends the thread when it is dropped, and joins it: the next requester takes the faults.
struct Running {
    stop: Stop,
    stopped: Arc<Notify>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.stop();
        self.stopped.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic there has ended the stage already.
            drop(thread.join());
        }
    }
}
