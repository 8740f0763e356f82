//! One end of a migration played by hand: it acts as a peer that violates the protocol, or one that dies at an exact
//! point.

use std::sync::Arc;

use bytes::Bytes;
use memferry::settings::{After, SourceSettings};
use memferry_stages::geometry::PageSize;
use memferry_stages::wire::reader::{FrameReader, Incoming};
use memferry_stages::wire::{FrameHead, HEAD_BYTES, Kind, Message};
use memferry_transports::{Connection, Listener, Transport};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

use crate::TestGuest;

/// A connection that the test controls. Dropping it closes the connection.
pub struct Hand {
    writer: Box<dyn AsyncWrite + Send + Unpin>,
    reader: FrameReader<Box<dyn AsyncRead + Send + Unpin>>,
}

impl std::fmt::Debug for Hand {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a connection in hand, {} frames heard", self.reader.frames())
    }
}

impl Hand {
    fn new(connection: Connection) -> Self {
        let reader = connection.reader.expect("it goes both ways");
        let reader = FrameReader::new(reader, "the stream".into(), PageSize::DEFAULT);
        Self { writer: connection.writer.expect("it goes both ways"), reader }
    }

    /// Connects, as a source would.
    ///
    /// # Panics
    /// If nothing listens.
    pub async fn connect(transport: &dyn Transport) -> Self {
        Self::new(transport.connect().await.expect("somebody listens"))
    }

    /// Waits for a source.
    ///
    /// # Panics
    /// If the listener fails.
    pub async fn accept(listener: &mut dyn Listener) -> Self {
        Self::new(listener.accept_ready().await.expect("somebody connects"))
    }

    /// Sends a message; a peer that is gone does not receive it.
    pub async fn send_message(&mut self, message: Message) {
        self.send(&message.encode(0)).await;
    }

    /// Sends bytes; a peer that is gone does not get them.
    pub async fn send(&mut self, bytes: &[u8]) {
        drop(self.writer.write_all(bytes).await);
    }

    /// Closes the sending direction; the peer's messages can still be received.
    pub async fn fall_silent(&mut self) {
        drop(self.writer.shutdown().await);
    }

    /// The next message that is neither pages, progress nor a heartbeat; `None` at the end of the stream, whatever
    /// its cause.
    pub async fn hear(&mut self) -> Option<Message> {
        loop {
            match self.reader.next().await {
                Ok(Some(Incoming::Pages(_))) => self.reader.skip_payload().await.ok()?,
                Ok(Some(Incoming::Message { message: Message::Progress(_) | Message::Heartbeat(_), .. })) => {}
                Ok(Some(Incoming::Message { message, .. })) => return Some(message),
                Ok(None) | Err(_) => return None,
            }
        }
    }

    /// Receives everything up to a message of this kind, and returns it; `None` if the stream ends before.
    pub async fn hear_until(&mut self, kind: Kind) -> Option<Message> {
        loop {
            let message = self.hear().await?;
            if message.kind() == kind {
                return Some(message);
            }
        }
    }

    /// Plays the destination up to the first page: receives Hello and Blocks, sends Accept and Ready.
    ///
    /// # Panics
    /// If the source does not follow the protocol.
    pub async fn agree(&mut self) {
        self.hear_until(Kind::Hello).await.expect("a source sends Hello");
        self.send_message(Message::Accept { waits_ms: 0 }).await;
        self.hear_until(Kind::Blocks).await.expect("a source sends what it has");
        self.send_message(Message::Ready).await;
    }

    /// Plays the destination up to its Loaded, which is not sent.
    ///
    /// # Panics
    /// If the source does not follow the protocol.
    pub async fn take_all(&mut self) {
        self.agree().await;
        self.hear_until(Kind::End).await.expect("a source ends its stream");
    }
}

/// The frames of a whole migration up to its end mark, on one connection.
#[derive(Clone, Debug)]
pub struct Recording {
    /// All frames, complete.
    pub frames: Vec<Bytes>,
}

impl Recording {
    /// The stream of a source with this guest and these settings.
    ///
    /// # Panics
    /// If the migration to a file fails.
    pub async fn of(guest: Arc<TestGuest>, settings: SourceSettings) -> Self {
        let dir = tempfile::tempdir().expect("a directory for a test");
        let path = dir.path().join("stream");
        let settings = SourceSettings { after: Some(After::Pause), connections: 1, ..settings };
        let file = Arc::new(memferry_transports::file::FileTransport::new(&path));
        let ended = crate::run::source(guest, file, settings, Arc::default(), CancellationToken::new()).await;
        assert_eq!(ended.error, None, "the migration to a file");
        Self::split(&std::fs::read(&path).expect("the file is there"))
    }

    /// The frames of a stream.
    ///
    /// # Panics
    /// If it is damaged.
    #[must_use]
    pub fn split(stream: &[u8]) -> Self {
        let mut rest = Bytes::copy_from_slice(stream);
        let mut frames = Vec::new();
        while let Some(head) = rest.first_chunk::<HEAD_BYTES>() {
            let head = FrameHead::parse(head, PageSize::DEFAULT).expect("a good head");
            frames.push(rest.split_to(HEAD_BYTES + head.length as usize));
        }
        assert!(rest.is_empty(), "{} bytes behind the last frame", rest.len());
        Self { frames }
    }

    /// All bytes.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.frames.concat()
    }

    /// The index of the first frame of a kind.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn first(&self, kind: Kind) -> usize {
        self.frames.iter().position(|frame| frame[0] == kind as u8).expect("a frame of this kind")
    }
}
