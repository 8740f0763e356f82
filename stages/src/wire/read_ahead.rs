//! Reads ahead, so that small frames do not cost a system call each, without copying large payloads twice.
//!
//! Bytes that are read ahead are copied once more. So after a large payload, which most likely precedes another, only the next head
//! is read ahead.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

use super::frame::HEAD_BYTES;
use super::pages::MAX_HEAD_BYTES;

/// Small frames are read this many bytes at a time.
const MOST_BYTES: usize = 64 << 10;
/// After a large payload: the longest head.
const LEAST_BYTES: usize = HEAD_BYTES + MAX_HEAD_BYTES;

/// A reader with the bytes that it read ahead.
#[derive(Debug)]
pub(super) struct ReadAhead<R> {
    reader: R,
    buffer: Box<[u8]>,
    /// Buffered bytes are from here …
    start: usize,
    /// … to here.
    end: usize,
    /// How much is read ahead next.
    step: usize,
}

impl<R: AsyncRead + Unpin> ReadAhead<R> {
    pub(super) fn new(reader: R) -> Self {
        Self { reader, buffer: vec![0; MOST_BYTES].into(), start: 0, end: 0, step: MOST_BYTES }
    }

    /// Sets the payload size of the current frame.
    pub(super) fn expect_payload(&mut self, bytes: usize) {
        self.step = if bytes >= MOST_BYTES { LEAST_BYTES } else { MOST_BYTES };
    }

    /// The buffered bytes; more are read if there are none. Empty at the end of the stream.
    pub(super) async fn available(&mut self) -> io::Result<usize> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            self.end = self.reader.read(&mut self.buffer[..self.step]).await?;
        }
        Ok(self.end - self.start)
    }

    /// Consumes buffered bytes.
    pub(super) fn consume(&mut self, bytes: usize) {
        assert!(bytes <= self.end - self.start, "only what waits can be passed over");
        self.start += bytes;
    }

    /// Reads at least a byte, unless the stream has ended or there is no room: buffered bytes first, then from the stream, past the
    /// buffer if at least as much is wanted as would be read ahead.
    pub(super) async fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.start == self.end && into.len() >= self.step {
            return self.reader.read(into).await;
        }
        let bytes = self.available().await?.min(into.len());
        into[..bytes].copy_from_slice(&self.buffer[self.start..self.start + bytes]);
        self.consume(bytes);
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use tokio::io::ReadBuf;

    use super::*;

    /// An endless stream that records the sizes of its reads.
    #[derive(Default)]
    struct Asked(Vec<usize>);

    impl AsyncRead for Asked {
        fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            self.0.push(into.remaining());
            let room = into.initialize_unfilled().len();
            into.advance(room);
            Poll::Ready(Ok(()))
        }
    }

    /// Reads a frame: a head, and a payload into a buffer of its own.
    async fn frame(ahead: &mut ReadAhead<Asked>, payload: usize) {
        for part in [HEAD_BYTES, 100, payload] {
            if part == payload {
                ahead.expect_payload(payload);
            }
            let mut into = vec![0; part];
            let mut filled = 0;
            while filled < part {
                filled += ahead.read(&mut into[filled..]).await.unwrap();
            }
        }
    }

    #[tokio::test]
    async fn behind_a_large_payload_only_a_head_is_read_ahead() {
        let mut ahead = ReadAhead::new(Asked::default());
        for _ in 0..3 {
            frame(&mut ahead, 256 << 10).await;
        }
        let (first, next) =
            ((256 << 10) - (MOST_BYTES - HEAD_BYTES - 100), (256 << 10) - (LEAST_BYTES - HEAD_BYTES - 100));
        assert_eq!(ahead.reader.0, [MOST_BYTES, first, LEAST_BYTES, next, LEAST_BYTES, next]);
    }

    #[tokio::test]
    async fn small_frames_share_a_read() {
        let mut ahead = ReadAhead::new(Asked::default());
        for _ in 0..50 {
            frame(&mut ahead, 1000).await;
        }
        assert_eq!(ahead.reader.0, [MOST_BYTES]);
    }
}
