//! The two directions of a connection that has done its handshake.
//!
//! ```text
//!  lane's task ── poll_write ──▶ encrypt ──▶ records ──▶ connection beneath
//!                                               ▲
//!  flusher's task ── writes what is left ───────┘
//! ```
//!
//! A write encrypts in the task that writes, so lanes encrypt in parallel. It takes as many bytes as there is room for, and may leave
//! records that the connection beneath did not take at once. The engine does not flush after each write, so a small task, the
//! *flusher*, writes what is left as soon as there is room. Both wait with the same waker, which wakes both: whichever comes first
//! continues.
//!
//! The end of the connection without TLS's `close_notify` is an error, never an end: somebody between the two ends can cut a
//! connection, but not sign the notice. A writer that is dropped ends its direction without the notice.

use std::fmt;
use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::task::{Context, Poll, Wake, Waker, ready};

use futures::task::AtomicWaker;
use memferry_transports::Connection;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio_rustls::TlsStream;

use crate::words::Words;

/// How much is read from the connection beneath in one system call: several records of 16 KiB. TLS itself asks for 4 KiB at a time.
pub(crate) const READ_AHEAD: usize = 128 << 10;

type Writer = Box<dyn AsyncWrite + Send + Unpin>;
type Reader = Box<dyn AsyncRead + Send + Unpin>;

/// Both directions of the connection beneath, as TLS wants them.
pub(crate) struct Joined {
    reader: BufReader<Reader>,
    /// `None` once this end's writer was dropped.
    writer: Option<Writer>,
}

impl Joined {
    pub(crate) fn new(reader: Reader, writer: Writer) -> Self {
        Self { reader: BufReader::with_capacity(READ_AHEAD, reader), writer: Some(writer) }
    }

    /// Waits for the peer's first bytes, which are left to be read. Empty if the peer ends the connection instead.
    pub(crate) async fn first_bytes(&mut self) -> io::Result<&[u8]> {
        self.reader.fill_buf().await
    }

    fn poll_writer<R>(&mut self, poll: impl FnOnce(Pin<&mut Writer>) -> Poll<io::Result<R>>) -> Poll<io::Result<R>> {
        match &mut self.writer {
            Some(writer) => poll(Pin::new(writer)),
            None => Poll::Ready(Err(ErrorKind::BrokenPipe.into())),
        }
    }
}

impl fmt::Debug for Joined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Joined").finish_non_exhaustive()
    }
}

impl AsyncRead for Joined {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.reader).poll_read(context, buffer)
    }
}

impl AsyncWrite for Joined {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_writer(|writer| writer.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_writer(|writer| writer.poll_write_vectored(context, slices))
    }

    fn is_write_vectored(&self) -> bool {
        self.writer.as_ref().is_some_and(|writer| writer.is_write_vectored())
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_writer(|writer| writer.poll_flush(context))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_writer(|writer| writer.poll_shutdown(context))
    }
}

/// A connection's TLS, with who waits to write.
struct Shared {
    tls: Mutex<TlsStream<Joined>>,
    wakers: Arc<Wakers>,
    words: Words,
}

/// Who waits for the connection beneath.
#[derive(Default)]
struct Wakers {
    reader: AtomicWaker,
    writer: AtomicWaker,
    flusher: AtomicWaker,
    /// The flusher has found the TLS in use, and waits for whoever uses it.
    flusher_missed: AtomicBool,
}

impl Wake for Wakers {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.writer.wake();
        self.flusher.wake();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, TlsStream<Joined>> {
        self.tls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Polls a write in the writer's task, and has the flusher write what is left.
    fn poll_write<R>(
        &self,
        context: &Context<'_>,
        poll: impl FnOnce(Pin<&mut TlsStream<Joined>>, &mut Context<'_>) -> Poll<io::Result<R>>,
    ) -> Poll<io::Result<R>> {
        self.wakers.writer.register(context.waker());
        let waker = Waker::from(self.wakers.clone());
        let mut tls = self.lock();
        match poll(Pin::new(&mut tls), &mut Context::from_waker(&waker)) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(self.explain(&mut tls, error))),
            polled => polled,
        }
    }

    /// The reason of a failed write. The peer may have sent it before it closed the connection, which is what failed the write.
    fn explain(&self, tls: &mut TlsStream<Joined>, error: io::Error) -> io::Error {
        if !matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) {
            return self.words.of(error);
        }
        // What the peer has sent besides is left for the reader, which waits again.
        let filled = Pin::new(tls).poll_fill_buf(&mut Context::from_waker(Waker::noop())).map_ok(|_| ());
        self.wakers.reader.wake();
        match filled {
            Poll::Ready(Err(reason)) if reason.kind() == ErrorKind::InvalidData => self.words.of(reason),
            _ => self.words.of(error),
        }
    }
}

impl Drop for Shared {
    /// The flusher ends.
    fn drop(&mut self) {
        self.wakers.flusher.wake();
    }
}

/// The connection over this TLS.
pub(crate) fn connection(
    tls: TlsStream<Joined>,
    peer: String,
    identity: Option<memferry_transports::Identity>,
    words: Words,
) -> Connection {
    let wakers = Arc::<Wakers>::default();
    let shared = Arc::new(Shared { tls: Mutex::new(tls), wakers: wakers.clone(), words });
    drop(tokio::spawn(flush(Arc::downgrade(&shared), wakers)));
    Connection {
        peer,
        identity,
        writer: Some(Box::new(WriteHalf(shared.clone()))),
        reader: Some(Box::new(ReadHalf(shared))),
    }
}

/// Writes what writes have left, until both halves of the connection are dropped.
async fn flush(shared: Weak<Shared>, wakers: Arc<Wakers>) {
    std::future::poll_fn(|context| {
        wakers.flusher.register(context.waker());
        let Some(shared) = shared.upgrade() else { return Poll::Ready(()) };
        wakers.flusher_missed.store(true, Ordering::SeqCst);
        let mut tls = match shared.tls.try_lock() {
            Ok(tls) => tls,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // A writer writes what is left itself, or waits for room and is woken with this task; a reader wakes it.
            Err(TryLockError::WouldBlock) => return Poll::Pending,
        };
        wakers.flusher_missed.store(false, Ordering::SeqCst);
        let is_left = tls.get_ref().1.wants_write() && tls.get_ref().0.writer.is_some();
        let waker = Waker::from(wakers.clone());
        if is_left && let Poll::Ready(Err(_)) = Pin::new(&mut *tls).poll_flush(&mut Context::from_waker(&waker)) {
            // The writer finds the same error.
            return Poll::Ready(());
        }
        Poll::Pending
    })
    .await;
}

struct WriteHalf(Arc<Shared>);

impl AsyncWrite for WriteHalf {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if slices.iter().all(|slice| slice.is_empty()) {
            return Poll::Ready(Ok(0));
        }
        self.0.poll_write(context, |tls, context| tls.poll_write_vectored(context, slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll_write(context, TlsStream::poll_flush)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll_write(context, TlsStream::poll_shutdown)
    }
}

impl Drop for WriteHalf {
    /// The peer reads the end of the connection beneath: without the notice, unless this half was shut down.
    fn drop(&mut self) {
        self.0.lock().get_mut().0.writer = None;
    }
}

struct ReadHalf(Arc<Shared>);

impl AsyncRead for ReadHalf {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.0.wakers.reader.register(context.waker());
        let read = Pin::new(&mut *self.0.lock()).poll_read(context, buffer);
        if self.0.wakers.flusher_missed.swap(false, Ordering::SeqCst) {
            self.0.wakers.flusher.wake();
        }
        Poll::Ready(ready!(read).map_err(|error| self.0.words.of(error)))
    }
}
