//! Silence: detects that a peer has sent nothing for too long.
//!
//! Each connection's reader is an [`Attentive`] one and notes in its [`Ear`] that bytes came, and whether it waits for more. A
//! peer is silent while no byte comes on any connection and every reader waits. A reader that does not wait has bytes that
//! this end is slow to process: the peer is not silent then.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};

/// How often the ears are checked within the limit. Checks are counted, not time: a process that was itself stopped has heard
/// nothing meanwhile, and that is one check.
const LOOKS: u32 = 20;

/// The state of one connection's reader.
#[derive(Debug, Default)]
pub struct Ear {
    /// Reads that gave bytes.
    heard: AtomicU64,
    /// Whether the reader does something other than wait.
    busy: AtomicBool,
    closed: AtomicBool,
}

impl Ear {
    /// Counts the reader as one that waits, because nothing is expected and it will not read for a while.
    pub fn expect_nothing(&self) {
        self.busy.store(false, Ordering::Relaxed);
    }
}

/// A reader that notes in an [`Ear`] that bytes came.
#[derive(Debug)]
pub struct Attentive<R> {
    reader: R,
    ear: Arc<Ear>,
}

impl<R> Attentive<R> {
    /// The reader of a connection, with its ear.
    #[must_use]
    pub fn new(reader: R) -> (Self, Arc<Ear>) {
        let ear = Arc::new(Ear::default());
        (Self { reader, ear: ear.clone() }, ear)
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for Attentive<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let read = Pin::new(&mut self.reader).poll_read(context, buffer);
        self.ear.busy.store(read.is_ready(), Ordering::Relaxed);
        if read.is_ready() {
            self.ear.heard.fetch_add(1, Ordering::Relaxed);
        }
        read
    }
}

impl<R> Drop for Attentive<R> {
    fn drop(&mut self) {
        self.ear.closed.store(true, Ordering::Relaxed);
    }
}

/// Returns when no byte came at any of the ears for `limit`, within a twentieth of it.
pub async fn silence(ears: Vec<Arc<Ear>>, limit: Duration) {
    let heard = || ears.iter().fold(0_u64, |sum, ear| sum.wrapping_add(ear.heard.load(Ordering::Relaxed)));
    let (mut before, mut quiet) = (heard(), 0);
    while quiet < LOOKS {
        tokio::time::sleep(limit / LOOKS).await;
        let (now, listens) = (heard(), all_listen(&ears));
        quiet = if listens && now == before { quiet + 1 } else { 0 };
        before = now;
    }
}

/// Whether every open connection waits for the peer. False where none is open: the end was received then.
fn all_listen(ears: &[Arc<Ear>]) -> bool {
    let mut open = ears.iter().filter(|ear| !ear.closed.load(Ordering::Relaxed)).peekable();
    open.peek().is_some() && open.all(|ear| !ear.busy.load(Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::task::JoinHandle;
    use tokio::time::{Instant, sleep};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    /// Connections whose readers read continuously, with the watch over them.
    struct Watched {
        peers: Vec<DuplexStream>,
        watch: JoinHandle<()>,
    }

    impl Watched {
        fn new(connections: usize) -> Self {
            let (peers, ears) = (0..connections)
                .map(|_| {
                    let (peer, end) = duplex(64);
                    let (mut reader, ear) = Attentive::new(end);
                    tokio::spawn(async move { while reader.read_u8().await.is_ok() {} });
                    (peer, ear)
                })
                .unzip();
            Self { peers, watch: tokio::spawn(silence(ears, LIMIT)) }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_found_after_the_limit() {
        let (watched, began) = (Watched::new(2), Instant::now());
        watched.watch.await.unwrap();
        let silent = began.elapsed();
        assert!((LIMIT..LIMIT * 21 / 20).contains(&silent), "{silent:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_byte_on_any_connection_ends_it() {
        let mut watched = Watched::new(3);
        for beat in 0..10 {
            sleep(LIMIT * 9 / 10).await;
            watched.peers[beat % 3].write_all(b".").await.unwrap();
        }
        assert!(!watched.watch.is_finished());
        let began = Instant::now();
        watched.watch.await.unwrap();
        assert!(began.elapsed() >= LIMIT * 19 / 20, "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn an_end_that_is_slow_to_take_what_came_does_not_blame_the_peer() {
        let ((mut peer, end), (_other, quiet)) = (duplex(64), duplex(64));
        let (mut reader, ear) = Attentive::new(end);
        let (mut waiting, other_ear) = Attentive::new(quiet);
        tokio::spawn(async move { waiting.read_u8().await });
        let watch = tokio::spawn(silence(vec![ear, other_ear], LIMIT));
        peer.write_all(b"..").await.unwrap();
        reader.read_u8().await.unwrap();
        sleep(LIMIT * 10).await;
        assert!(!watch.is_finished());
        reader.read_u8().await.unwrap();
        tokio::spawn(async move { reader.read_u8().await });
        watch.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn an_end_of_stream_is_no_silence_and_one_connection_may_end_before_others() {
        let mut watched = Watched::new(2);
        watched.peers.pop();
        let began = Instant::now();
        (&mut watched.watch).await.unwrap();
        assert!(began.elapsed() >= LIMIT);

        let mut ended = Watched::new(2);
        ended.peers.clear();
        sleep(LIMIT * 10).await;
        assert!(!ended.watch.is_finished());
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_nobody_polls_counts_as_busy_unless_nothing_is_expected() {
        let (mut peer, end) = duplex(64);
        let (mut reader, ear) = Attentive::new(end);
        peer.write_all(b".").await.unwrap();
        reader.read_u8().await.unwrap();
        let watch = tokio::spawn(silence(vec![ear.clone()], LIMIT));
        sleep(LIMIT * 3).await;
        assert!(!watch.is_finished());
        ear.expect_nothing();
        watch.await.unwrap();
    }
}
