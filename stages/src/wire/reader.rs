//! The reading end of a stream: bytes in, checked frames out.
//!
//! Takes any [`AsyncRead`], gives [`Incoming`]s. Owns the place in the stream: every error names the byte at which its
//! frame began. Promises that a peer's bytes never make it panic, wait for more than a frame announces, or hold more than the
//! longest message (about 1 MiB); a Pages payload goes straight into the caller's buffer.

use std::io;

use tokio::io::AsyncRead;

use super::error::{FrameError, WireError};
use super::frame::{FrameHead, HEAD_BYTES};
use super::kind::Kind;
use super::messages::Message;
use super::pages::{FIXED_BYTES, MAX_HEAD_BYTES, MIN_HEAD_BYTES, head_bytes};
use super::read_ahead::ReadAhead;
use crate::geometry::PageSize;

/// A frame that came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// Any frame but Pages.
    Message {
        /// Its lane; 0 for control frames.
        lane: u16,
        /// The message.
        message: Message,
    },
    /// A Pages frame up to its payload, which must be read or skipped before the next frame.
    Pages(PagesFrame),
}

/// A Pages frame up to its payload: not checked against a layout yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagesFrame {
    /// Its lane.
    pub lane: u16,
    /// The body up to the payload, at most [`MAX_HEAD_BYTES`].
    pub body: Vec<u8>,
    /// Bytes behind the frame's head, payload included.
    pub frame_length: u32,
    /// Where the frame began in its stream.
    pub offset: u64,
}

impl PagesFrame {
    /// Bytes of the payload.
    #[must_use]
    pub fn payload_bytes(&self) -> usize {
        self.frame_length as usize - self.body.len()
    }
}

/// Why no frame could be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The peer sent an invalid frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The transport failed.
    #[error("cannot read {stream} at byte {offset}: {error}")]
    Io {
        /// How many bytes came before.
        offset: u64,
        /// Which stream.
        stream: String,
        /// The system's error.
        #[source]
        error: io::Error,
    },
    /// The stream ends inside a frame.
    #[error("{stream} ends at byte {end}, inside the frame that begins at byte {offset}")]
    Truncated {
        /// Where the frame began.
        offset: u64,
        /// Which stream.
        stream: String,
        /// How many bytes came.
        end: u64,
    },
}

impl ReadError {
    /// Whether the connection was lost, in contrast to an invalid frame.
    #[must_use]
    pub fn is_lost_connection(&self) -> bool {
        matches!(self, Self::Io { .. } | Self::Truncated { .. })
    }
}

/// Reads frames off a stream. See the module's text.
#[derive(Debug)]
pub struct FrameReader<R> {
    reader: ReadAhead<R>,
    stream: String,
    page_size: PageSize,
    /// Where the current frame began.
    offset: u64,
    /// Bytes taken from the stream.
    position: u64,
    frames: u64,
    /// Bytes of the current Pages frame that were not read yet.
    payload_left: usize,
    /// Bodies of messages, one after another.
    body: Vec<u8>,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// A reader at the start of a stream, which errors name `stream`. The page size bounds Pages frames; until Hello has arrived,
    /// any value will do.
    #[must_use]
    pub fn new(reader: R, stream: String, page_size: PageSize) -> Self {
        Self {
            reader: ReadAhead::new(reader),
            stream,
            page_size,
            offset: 0,
            position: 0,
            frames: 0,
            payload_left: 0,
            body: Vec::new(),
        }
    }

    /// Sets the page size of Hello.
    pub fn set_page_size(&mut self, page_size: PageSize) {
        self.page_size = page_size;
    }

    /// The name of the stream in errors.
    #[must_use]
    pub fn stream(&self) -> &str {
        &self.stream
    }

    /// Where the current frame began, in bytes from the stream's start.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// How many bytes of the stream were read.
    #[must_use]
    pub fn bytes_read(&self) -> u64 {
        self.position
    }

    /// How many frames came, the current one included, skipped ones too.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// Bytes that the reader has allocated for the bodies of messages, without its read buffer.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.body.capacity()
    }

    /// Waits until more of the stream has come, which is not taken, or the stream has ended: has more come? Between frames, and
    /// safe to race in a `select!`.
    ///
    /// # Errors
    /// When the stream cannot be read.
    pub async fn has_more(&mut self) -> io::Result<bool> {
        Ok(self.reader.available().await? > 0)
    }

    /// The next frame, or `None` if the stream ends behind the last one. Frames of unknown kinds that need not be understood
    /// are passed over.
    ///
    /// Must not be raced in a `select!`: a dropped read loses its place in the stream.
    ///
    /// # Errors
    /// [`ReadError`]; the stream cannot be read further after it.
    ///
    /// # Panics
    /// If the payload of the frame before was neither read nor skipped.
    pub async fn next(&mut self) -> Result<Option<Incoming>, ReadError> {
        assert_eq!(self.payload_left, 0, "a payload was neither read nor skipped");
        while let Some(head) = self.read_head().await? {
            match Kind::from_u8(head.kind) {
                Some(Kind::Pages) => return self.read_pages(head).await.map(Some),
                Some(kind) => return self.read_message(kind, head).await.map(Some),
                None => self.skip(head.length as usize).await?,
            }
        }
        Ok(None)
    }

    /// Reads the payload of the current Pages frame, or the next part of it, into the whole of `buffer`.
    ///
    /// # Errors
    /// [`ReadError`]; the content of `buffer` is then unspecified.
    ///
    /// # Panics
    /// If the payload has fewer bytes left.
    pub async fn read_payload(&mut self, buffer: &mut [u8]) -> Result<(), ReadError> {
        assert!(buffer.len() <= self.payload_left, "{} of {} payload bytes", buffer.len(), self.payload_left);
        self.payload_left -= buffer.len();
        self.fill(buffer).await
    }

    /// Skips the rest of the current Pages frame's payload.
    ///
    /// # Errors
    /// [`ReadError`], as for a read.
    pub async fn skip_payload(&mut self) -> Result<(), ReadError> {
        let left = std::mem::take(&mut self.payload_left);
        self.skip(left).await
    }

    /// The error of a fault that was found in the current frame.
    #[must_use]
    pub fn fail(&self, error: WireError) -> FrameError {
        FrameError { offset: self.offset, stream: self.stream.clone(), error }
    }

    /// The head of the next frame, or `None` at the end of the stream.
    async fn read_head(&mut self) -> Result<Option<FrameHead>, ReadError> {
        self.offset = self.position;
        if self.available().await? == 0 {
            return Ok(None);
        }
        let mut head = [0; HEAD_BYTES];
        let filled = self.fill(&mut head).await;
        if self.offset == 0 && FrameHead::is_tls(&head) {
            return Err(self.fail(WireError::Tls).into());
        }
        filled?;
        let head = FrameHead::parse(&head, self.page_size).map_err(|error| self.fail(error))?;
        self.frames += 1;
        Ok(Some(head))
    }

    async fn read_message(&mut self, kind: Kind, head: FrameHead) -> Result<Incoming, ReadError> {
        let mut body = std::mem::take(&mut self.body);
        body.resize(head.length as usize, 0);
        self.fill(&mut body).await?;
        let message = Message::decode(kind, &body).map_err(|error| self.fail(error))?;
        self.body = body;
        Ok(Incoming::Message { lane: head.lane, message })
    }

    /// Reads a Pages frame up to its payload. The masks give the length of that part before their checksum can be checked; the
    /// frame's length bounds it.
    async fn read_pages(&mut self, head: FrameHead) -> Result<Incoming, ReadError> {
        let length = head.length as usize;
        let enough = |needs: usize| {
            let short = WireError::Short { field: "the head of a Pages frame", needs, left: length };
            if needs <= length { Ok(()) } else { Err(short) }
        };
        enough(MIN_HEAD_BYTES).map_err(|error| self.fail(error))?;
        let mut body = [0; MAX_HEAD_BYTES];
        let (fixed, rest) = body.split_first_chunk_mut::<FIXED_BYTES>().expect("the fixed part is a part");
        self.fill(fixed).await?;
        let head_bytes = head_bytes(fixed);
        enough(head_bytes).map_err(|error| self.fail(error))?;
        self.fill(&mut rest[..head_bytes - FIXED_BYTES]).await?;
        self.payload_left = length - head_bytes;
        self.reader.expect_payload(self.payload_left);
        let body = body[..head_bytes].to_vec();
        Ok(Incoming::Pages(PagesFrame { lane: head.lane, body, frame_length: head.length, offset: self.offset }))
    }

    /// Reads the whole of `buffer`.
    async fn fill(&mut self, buffer: &mut [u8]) -> Result<(), ReadError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.reader.read(&mut buffer[filled..]).await {
                Ok(0) => return Err(self.truncated()),
                Ok(bytes) => {
                    filled += bytes;
                    self.position += bytes as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(error)),
            }
        }
        Ok(())
    }

    /// Skips `bytes` bytes.
    async fn skip(&mut self, bytes: usize) -> Result<(), ReadError> {
        let mut left = bytes;
        while left > 0 {
            let step = self.available().await?.min(left);
            if step == 0 {
                return Err(self.truncated());
            }
            self.reader.consume(step);
            self.position += step as u64;
            left -= step;
        }
        Ok(())
    }

    /// How many bytes can be had at once; 0 at the end of the stream.
    async fn available(&mut self) -> Result<usize, ReadError> {
        loop {
            match self.reader.available().await {
                Ok(bytes) => return Ok(bytes),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(error)),
            }
        }
    }

    fn failed(&self, error: io::Error) -> ReadError {
        ReadError::Io { offset: self.position, stream: self.stream.clone(), error }
    }

    fn truncated(&self) -> ReadError {
        ReadError::Truncated { offset: self.offset, stream: self.stream.clone(), end: self.position }
    }
}
