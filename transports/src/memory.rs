//! Connections inside the process, with faults on request: for tests.
//!
//! Takes nothing from the system, gives several [`Connection`]s, each two bounded byte queues. Owns their bytes. [`Faults`]
//! injects the failures of real networks: a cut of everything at once, a cut after an exact number of bytes, a stall in one
//! direction.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker, ready};

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{mpsc, watch};
use tokio::task::coop::poll_proceed;

use crate::{Arrival, Capabilities, Connection, Listener, Transport};

/// The most connections that wait to be accepted.
const BACKLOG: usize = 64;

/// Connections between two tasks of this process. Clones share the listener and the faults.
#[derive(Clone)]
pub struct MemoryTransport {
    buffer_bytes: usize,
    faults: Faults,
    door: Arc<watch::Sender<Option<mpsc::Sender<Connection>>>>,
}

impl fmt::Debug for MemoryTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryTransport of {} bytes a direction", self.buffer_bytes)
    }
}

impl MemoryTransport {
    /// A transport whose connections hold at most `buffer_bytes` in flight in each direction.
    ///
    /// # Panics
    /// If `buffer_bytes` is 0: nothing could ever move.
    #[must_use]
    pub fn new(buffer_bytes: usize) -> Self {
        assert!(buffer_bytes > 0, "a memory transport needs room for at least one byte");
        Self { buffer_bytes, faults: Faults::default(), door: Arc::new(watch::Sender::new(None)) }
    }

    /// The handle that injects faults into this transport.
    #[must_use]
    pub fn faults(&self) -> Faults {
        self.faults.clone()
    }
}

impl Transport for MemoryTransport {
    fn capabilities(&self) -> Capabilities {
        Capabilities { return_path: true, max_connections: u16::MAX, stored: false, authenticated: false }
    }

    fn address(&self) -> String {
        "memory".to_owned()
    }

    /// Waits for a listener without a time limit.
    fn connect(&self) -> BoxFuture<'_, io::Result<Connection>> {
        async move {
            let mut door = self.door.subscribe();
            loop {
                let open = door.wait_for(|open| open.as_ref().is_some_and(|open| !open.is_closed())).await;
                let open = open.map_err(|_| io::Error::from(ErrorKind::NotConnected))?.clone();
                // A place in the backlog comes first, so that a listener that is dropped loses no connection.
                if let Some(open) = open
                    && let Ok(place) = open.reserve().await
                {
                    let (source, destination) = self.faults.pair(self.buffer_bytes);
                    place.send(destination);
                    return Ok(source);
                }
            }
        }
        .boxed()
    }

    /// One listener at a time.
    fn listen(&self) -> BoxFuture<'_, io::Result<Box<dyn Listener>>> {
        async move {
            let (sender, arrivals) = mpsc::channel(BACKLOG);
            let opened = self.door.send_if_modified(|open| {
                let free = open.as_ref().is_none_or(mpsc::Sender::is_closed);
                if free {
                    *open = Some(sender);
                }
                free
            });
            if opened {
                return Ok(Box::new(Listening(arrivals)) as Box<dyn Listener>);
            }
            Err(io::Error::new(ErrorKind::AddrInUse, "this memory transport has a listener already"))
        }
        .boxed()
    }
}

#[derive(Debug)]
struct Listening(mpsc::Receiver<Connection>);

impl Listener for Listening {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Arrival>> {
        async move { self.0.recv().await.map(Arrival::from).ok_or_else(|| ErrorKind::NotConnected.into()) }.boxed()
    }

    fn local_address(&self) -> String {
        "memory".to_owned()
    }
}

/// The direction in which bytes travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the end that connected to the end that accepted.
    ToDestination,
    /// The return path.
    ToSource,
}

/// Faults to inject into a [`MemoryTransport`]. Clones act on the same connections.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    directions: Arc<[Mutex<Flow>; 2]>,
}

/// The state shared by all pipes of one direction.
#[derive(Debug, Default)]
struct Flow {
    stalled: bool,
    /// Bytes that may still be delivered before everything is cut.
    until_cut: Option<u64>,
    /// Bytes delivered so far.
    delivered: u64,
    pipes: Vec<Weak<Mutex<Pipe>>>,
}

impl Faults {
    /// Cuts every existing connection: bytes in flight are lost, and the next operation of either end fails with
    /// `ConnectionReset`. Connections made later work.
    pub fn cut(&self) {
        for direction in self.directions.iter() {
            let pipes = std::mem::take(&mut lock(direction).pipes);
            pipes.iter().filter_map(Weak::upgrade).for_each(|pipe| lock(&pipe).cut());
        }
    }

    /// Cuts every connection, as [`cut`](Self::cut) does, when exactly `bytes` more have been delivered in a direction, all
    /// connections together. Bytes behind them are lost, even if a write of them succeeded.
    pub fn cut_after(&self, direction: Direction, bytes: u64) {
        lock(self.flow(direction)).until_cut = (bytes > 0).then_some(bytes);
        if bytes == 0 {
            self.cut();
        }
    }

    /// Stops delivery in a direction, also on connections made later, until [`release`](Self::release). Writers continue until
    /// the buffer is full.
    pub fn stall(&self, direction: Direction) {
        lock(self.flow(direction)).stalled = true;
    }

    /// Ends a [`stall`](Self::stall) and delivers the bytes that wait.
    pub fn release(&self, direction: Direction) {
        let mut flow = lock(self.flow(direction));
        flow.stalled = false;
        let pipes: Vec<_> = flow.pipes.iter().filter_map(Weak::upgrade).collect();
        drop(flow);
        pipes.iter().for_each(|pipe| lock(pipe).wake());
    }

    /// Bytes delivered in a direction so far, all connections together: a test can cut its next run there.
    #[must_use]
    pub fn delivered(&self, direction: Direction) -> u64 {
        lock(self.flow(direction)).delivered
    }

    fn flow(&self, direction: Direction) -> &Mutex<Flow> {
        &self.directions[direction as usize]
    }

    /// The two ends of a connection: the source's and the destination's.
    fn pair(&self, buffer_bytes: usize) -> (Connection, Connection) {
        let (forth, taker) = self.pipe(Direction::ToDestination, buffer_bytes);
        let (back, hearer) = self.pipe(Direction::ToSource, buffer_bytes);
        let end = |peer: &str, writer, reader| Connection {
            peer: format!("the {peer} in memory"),
            identity: None,
            writer: Some(Box::new(writer)),
            reader: Some(Box::new(reader)),
        };
        (end("destination", forth, hearer), end("source", back, taker))
    }

    fn pipe(&self, direction: Direction, capacity: usize) -> (PipeWriter, PipeReader) {
        let pipe = Arc::new(Mutex::new(Pipe { capacity, ..Pipe::default() }));
        let mut flow = lock(self.flow(direction));
        flow.pipes.retain(|pipe| pipe.strong_count() > 0);
        flow.pipes.push(Arc::downgrade(&pipe));
        (PipeWriter(pipe.clone()), PipeReader { pipe, direction, faults: self.clone() })
    }

    /// Counts how many of `wanted` bytes may be delivered, and returns them with whether they are the last before a cut.
    /// `None` in a stall.
    fn admit(&self, direction: Direction, wanted: usize) -> Option<(usize, bool)> {
        let mut flow = lock(self.flow(direction));
        if flow.stalled {
            return None;
        }
        let admitted = flow.until_cut.map_or(wanted, |left| usize::try_from(left).unwrap_or(usize::MAX).min(wanted));
        flow.delivered += admitted as u64;
        flow.until_cut = flow.until_cut.map(|left| left - admitted as u64);
        let cut = flow.until_cut == Some(0);
        if cut {
            flow.until_cut = None;
        }
        Some((admitted, cut))
    }
}

/// One direction of one connection.
#[derive(Debug, Default)]
struct Pipe {
    bytes: VecDeque<u8>,
    capacity: usize,
    /// Whether the writer is done: the reader gets the rest, then the end.
    ended: bool,
    /// Whether the reader was dropped.
    unread: bool,
    cut: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Pipe {
    fn wake(&mut self) {
        self.reader.take().into_iter().chain(self.writer.take()).for_each(Waker::wake);
    }

    fn cut(&mut self) {
        self.cut = true;
        self.bytes.clear();
        self.wake();
    }

    fn write(&mut self, context: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if self.cut {
            return Poll::Ready(Err(ErrorKind::ConnectionReset.into()));
        }
        if self.unread || self.ended {
            return Poll::Ready(Err(ErrorKind::BrokenPipe.into()));
        }
        let mut room = self.capacity - self.bytes.len();
        if room == 0 && slices.iter().any(|slice| !slice.is_empty()) {
            self.writer = Some(context.waker().clone());
            return Poll::Pending;
        }
        let before = self.bytes.len();
        for slice in slices {
            let part = &slice[..slice.len().min(room)];
            self.bytes.extend(part);
            room -= part.len();
        }
        self.reader.take().into_iter().for_each(Waker::wake);
        Poll::Ready(Ok(self.bytes.len() - before))
    }
}

#[derive(Debug)]
struct PipeWriter(Arc<Mutex<Pipe>>);

impl AsyncWrite for PipeWriter {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let budget = ready!(poll_proceed(context));
        let written = ready!(lock(&self.0).write(context, slices));
        budget.made_progress();
        Poll::Ready(written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let cut = lock(&self.0).cut;
        Poll::Ready(if cut { Err(ErrorKind::ConnectionReset.into()) } else { Ok(()) })
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        {
            let mut pipe = lock(&self.0);
            pipe.ended = true;
            pipe.wake();
        }
        self.poll_flush(context)
    }
}

impl Drop for PipeWriter {
    fn drop(&mut self) {
        let mut pipe = lock(&self.0);
        pipe.ended = true;
        pipe.wake();
    }
}

#[derive(Debug)]
struct PipeReader {
    pipe: Arc<Mutex<Pipe>>,
    direction: Direction,
    faults: Faults,
}

impl PipeReader {
    /// Reads, and returns whether everything is to be cut afterwards.
    fn read(&self, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<bool>> {
        let mut pipe = lock(&self.pipe);
        if pipe.cut {
            return Poll::Ready(Err(ErrorKind::ConnectionReset.into()));
        }
        let wanted = buffer.remaining().min(pipe.bytes.len());
        let at_rest = wanted == 0 && (pipe.ended || buffer.remaining() == 0);
        // The waker is stored before the stall is checked, so that a release in between wakes it.
        pipe.reader = Some(context.waker().clone());
        let Some((admitted, cut)) = self.faults.admit(self.direction, wanted) else { return Poll::Pending };
        if admitted == 0 && !at_rest {
            return Poll::Pending;
        }
        take_front(&mut pipe.bytes, admitted, buffer);
        pipe.writer.take().into_iter().for_each(Waker::wake);
        Poll::Ready(Ok(cut))
    }
}

fn take_front(bytes: &mut VecDeque<u8>, count: usize, buffer: &mut ReadBuf<'_>) {
    let (front, back) = bytes.as_slices();
    let split = count.min(front.len());
    buffer.put_slice(&front[..split]);
    buffer.put_slice(&back[..count - split]);
    bytes.drain(..count);
}

impl AsyncRead for PipeReader {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let budget = ready!(poll_proceed(context));
        let cut = ready!(self.read(context, buffer));
        budget.made_progress();
        if cut? {
            self.faults.cut();
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for PipeReader {
    fn drop(&mut self) {
        let mut pipe = lock(&self.pipe);
        pipe.unread = true;
        pipe.bytes = VecDeque::new();
        pipe.wake();
    }
}

/// No code here panics while it holds a lock. A test that panics elsewhere may still inspect the state.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
