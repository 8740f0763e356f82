//! Lost connections on request: an aid for trials of recovery, never for a migration that matters.
//!
//! Takes a transport, gives one whose source end loses all of its connections after a number of bytes. [`Cuts`] counts over
//! every transport that it is put on, so the count continues when a connection is made again, and at another address.
//!
//! A cut is exact to the byte: the write that reaches it succeeds, the connections are closed in both directions, and whatever
//! either end still expected of them fails.

use std::fmt;
use std::future::ready;
use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use crate::retry::in_context;
use crate::{Capabilities, Connection, Listener, Transport};

/// When connections are cut. Clones share the count.
#[derive(Clone, Debug)]
pub struct Cuts(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// The cuts to come, the next one last: each is a count of bytes from the beginning.
    cuts: Vec<u64>,
    refuse_for: Duration,
    refuses_until: Option<Instant>,
    /// Bytes written so far, all connections together.
    written: u64,
    open: Vec<Weak<dyn Cut + Send + Sync>>,
}

impl Cuts {
    /// Cuts every connection each time the bytes written from the beginning reach one of `cut_after`. For `refuse_for` after a
    /// cut no connection can be made.
    #[must_use]
    pub fn new(cut_after: impl IntoIterator<Item = u64>, refuse_for: Duration) -> Self {
        let mut cuts: Vec<_> = cut_after.into_iter().collect();
        cuts.sort_unstable_by(|a, b| b.cmp(a));
        let state = State { cuts, refuse_for, refuses_until: None, written: 0, open: Vec::new() };
        Self(Arc::new(Mutex::new(state)))
    }

    /// The transport, whose connections made by [`Transport::connect`] are counted and cut. Its listener is as it was.
    #[must_use]
    pub fn on(&self, transport: Arc<dyn Transport>) -> Arc<dyn Transport> {
        Arc::new(Faulty { transport, cuts: self.clone() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }

    /// The connection, counted and cut.
    fn watch(&self, connection: Connection) -> Connection {
        let Connection { peer, identity, writer, reader } = connection;
        let mut state = self.state();
        state.open.retain(|half| half.strong_count() > 0);
        let writer = writer.map(|writer| {
            let half = state.add(writer);
            Box::new(Writer { half, cuts: self.clone() }) as Box<dyn AsyncWrite + Send + Unpin>
        });
        let reader = reader.map(|reader| Box::new(Reader(state.add(reader))) as Box<dyn AsyncRead + Send + Unpin>);
        Connection { peer, identity, writer, reader }
    }
}

impl State {
    fn add<T: Send + 'static>(&mut self, half: T) -> Arc<Half<T>> {
        let half = Arc::new(Half(Mutex::new(HalfState { inner: Some(half), waker: None })));
        let weak: Weak<Half<T>> = Arc::downgrade(&half);
        self.open.push(weak);
        half
    }

    /// Bytes up to the next cut.
    fn left(&self) -> u64 {
        self.cuts.last().map_or(u64::MAX, |cut| cut.saturating_sub(self.written))
    }

    /// Counts bytes, and cuts where that is due.
    fn count(&mut self, bytes: usize) {
        self.written += bytes as u64;
        if self.left() > 0 {
            return;
        }
        self.cuts.pop();
        self.refuses_until = Some(Instant::now() + self.refuse_for);
        tracing::info!(written = self.written, "the connections are cut, as [transport.faults] asks");
        std::mem::take(&mut self.open).iter().filter_map(Weak::upgrade).for_each(|half| half.cut());
    }
}

/// A transport whose connections are cut.
#[derive(Debug)]
struct Faulty {
    transport: Arc<dyn Transport>,
    cuts: Cuts,
}

impl Transport for Faulty {
    fn capabilities(&self) -> Capabilities {
        self.transport.capabilities()
    }

    fn address(&self) -> String {
        self.transport.address()
    }

    /// As the transport, but refused at once while a cut lasts.
    fn connect(&self) -> BoxFuture<'_, io::Result<Connection>> {
        let refused = self.cuts.state().refuses_until.is_some_and(|until| Instant::now() < until);
        if refused {
            let place = format!("cannot connect to {}", self.address());
            return ready(Err(in_context(&ErrorKind::ConnectionRefused.into(), &place))).boxed();
        }
        async move { Ok(self.cuts.watch(self.transport.connect().await?)) }.boxed()
    }

    fn listen(&self) -> BoxFuture<'_, io::Result<Box<dyn Listener>>> {
        self.transport.listen()
    }
}

/// One direction of a connection, which another task can close.
struct Half<T>(Mutex<HalfState<T>>);

struct HalfState<T> {
    /// `None` once it is cut.
    inner: Option<T>,
    /// Who waits for it.
    waker: Option<Waker>,
}

impl<T> fmt::Debug for Half<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Half").finish_non_exhaustive()
    }
}

/// A direction that can be cut, whichever it is.
trait Cut: fmt::Debug {
    fn cut(&self);
}

impl<T: Send> Cut for Half<T> {
    fn cut(&self) {
        let mut half = lock(&self.0);
        half.inner = None;
        half.waker.take().into_iter().for_each(Waker::wake);
    }
}

impl<T> Half<T> {
    fn poll<R>(
        &self,
        context: &mut Context<'_>,
        poll: impl FnOnce(&mut T, &mut Context<'_>) -> Poll<io::Result<R>>,
    ) -> Poll<io::Result<R>> {
        let mut half = lock(&self.0);
        let Some(inner) = &mut half.inner else { return Poll::Ready(Err(ErrorKind::ConnectionReset.into())) };
        let polled = poll(inner, context);
        half.waker = polled.is_pending().then(|| context.waker().clone());
        polled
    }
}

struct Reader(Arc<Half<Box<dyn AsyncRead + Send + Unpin>>>);

impl AsyncRead for Reader {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.0.poll(context, |reader, context| Pin::new(reader).poll_read(context, buffer))
    }
}

struct Writer {
    half: Arc<Half<Box<dyn AsyncWrite + Send + Unpin>>>,
    cuts: Cuts,
}

impl AsyncWrite for Writer {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    /// Writers take turns, so that no byte is written between the one that a cut is due after and the cut.
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.cuts.state();
        let slices = first_bytes(slices, state.left());
        let written = self.half.poll(context, |writer, context| Pin::new(writer).poll_write_vectored(context, &slices));
        if let Poll::Ready(Ok(bytes)) = written {
            state.count(bytes);
        }
        written
    }

    fn is_write_vectored(&self) -> bool {
        lock(&self.half.0).inner.as_ref().is_some_and(|writer| writer.is_write_vectored())
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.half.poll(context, |writer, context| Pin::new(writer).poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.half.poll(context, |writer, context| Pin::new(writer).poll_shutdown(context))
    }
}

/// The slices up to this many bytes.
fn first_bytes<'a>(slices: &'a [IoSlice<'_>], most: u64) -> Vec<IoSlice<'a>> {
    let mut left = usize::try_from(most).unwrap_or(usize::MAX);
    let mut first = Vec::with_capacity(slices.len());
    for slice in slices {
        let bytes = slice.len().min(left);
        first.push(IoSlice::new(&slice[..bytes]));
        left -= bytes;
    }
    first
}

/// Values that are consistent after every step.
fn lock<T: ?Sized>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::sleep;

    use super::*;
    use crate::memory::MemoryTransport;
    use crate::tcp::TcpTransport;
    use crate::{Address, open};

    const REFUSES: Duration = Duration::from_secs(2);

    async fn connected(transport: &dyn Transport, listener: &mut dyn Listener) -> (Connection, Connection) {
        let (source, destination) = tokio::join!(transport.connect(), listener.accept_ready());
        (source.expect("connected"), destination.expect("accepted"))
    }

    async fn write(connection: &mut Connection, bytes: &[u8]) -> Result<(), ErrorKind> {
        connection.writer.as_mut().expect("a writer").write_all(bytes).await.map_err(|error| error.kind())
    }

    /// Everything up to the end or the loss of the connection.
    async fn read_all(connection: &mut Connection) -> Vec<u8> {
        let mut bytes = Vec::new();
        drop(connection.reader.as_mut().expect("a reader").read_to_end(&mut bytes).await);
        bytes
    }

    #[tokio::test(start_paused = true)]
    async fn each_cut_closes_all_connections_and_the_count_continues() {
        let memory: Arc<dyn Transport> = Arc::new(MemoryTransport::new(1024));
        let transport = Cuts::new([10, 15], REFUSES).on(memory);
        let mut listener = transport.listen().await.expect("listening");
        let (mut first, mut other_first) = connected(&*transport, &mut *listener).await;
        let (mut second, mut other_second) = connected(&*transport, &mut *listener).await;
        assert_eq!(write(&mut first, b"123456").await, Ok(()));
        assert_eq!(write(&mut second, b"7890 never").await, Err(ErrorKind::ConnectionReset));
        assert_eq!(write(&mut first, b"x").await, Err(ErrorKind::ConnectionReset));
        assert!(first.reader.as_mut().expect("a reader").read_u8().await.is_err());
        assert!(read_all(&mut other_first).await.len() <= 6 && read_all(&mut other_second).await.len() <= 4);
        assert!(write(&mut other_second, b"x").await.is_err());

        assert_eq!(transport.connect().await.expect_err("cut").kind(), ErrorKind::ConnectionRefused);
        sleep(REFUSES).await;
        let (mut third, _other) = connected(&*transport, &mut *listener).await;
        assert_eq!(write(&mut third, b"1234").await, Ok(()));
        assert_eq!(write(&mut third, b"5").await, Ok(()), "the write that reaches the cut");
        assert_eq!(write(&mut third, b"6").await, Err(ErrorKind::ConnectionReset));
        sleep(REFUSES).await;
        let (mut last, _other) = connected(&*transport, &mut *listener).await;
        assert_eq!(write(&mut last, &[0; 500]).await, Ok(()), "there is no third cut");
    }

    #[tokio::test]
    async fn a_cut_wakes_who_waits_and_closes_the_socket() {
        let tcp = TcpTransport::new("127.0.0.1", 0, Duration::from_secs(5));
        let mut listener = tcp.listen().await.expect("listening");
        let address: Address = listener.local_address().parse().expect("an address");
        let transport = Cuts::new([5], REFUSES).on(open(&address, Duration::from_secs(5)).into());
        let (mut source, mut destination) = connected(&*transport, &mut *listener).await;
        let mut reader = source.reader.take().expect("a reader");
        let waiting = tokio::spawn(async move { reader.read_u8().await.map_err(|error| error.kind()) });
        assert_eq!(write(&mut source, b"12345").await, Ok(()));
        assert_eq!(waiting.await.expect("no panic"), Err(ErrorKind::ConnectionReset));
        assert_eq!(read_all(&mut destination).await, b"12345");
        assert_eq!(transport.connect().await.expect_err("cut").kind(), ErrorKind::ConnectionRefused);
    }
}
