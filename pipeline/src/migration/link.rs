//! The source's way to its destination: connections opened and greeted.

use std::sync::Arc;

use memferry_stages::codec::Codec;
use memferry_stages::geometry::PageSize;
use memferry_stages::untrusted::Untrusted;
use memferry_stages::wire::hello::{Features, Hello, SessionId};
use memferry_stages::wire::reader::{FrameReader, Incoming};
use memferry_stages::wire::{Message, PROTOCOL_VERSION};
use memferry_transports::Transport;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use super::error::MigrationError;
use crate::settings::SourceSettings;

pub(super) type Writer = Box<dyn AsyncWrite + Send + Unpin>;
pub(super) type Reader = FrameReader<Box<dyn AsyncRead + Send + Unpin>>;

/// The open connections of one migration, Hello said on each.
pub(super) struct Link {
    /// Who answers, for messages.
    pub(super) peer: Untrusted,
    /// One for each connection, in order.
    pub(super) writers: Vec<Writer>,
    /// The return path, on connection 0, if the transport has one.
    pub(super) said: Option<Reader>,
}

/// What a source's stream uses, by its settings.
pub(super) fn features(settings: &SourceSettings) -> Features {
    let codec = settings.encoder.compress;
    Features {
        checksum: settings.checksum,
        snap: codec == Some(Codec::Snap),
        lz4: codec == Some(Codec::Lz4),
        zstd: matches!(codec, Some(Codec::Zstd { .. })),
        groups: codec.is_some(),
        xbzrle: settings.encoder.xbzrle.is_some(),
        verify: settings.verify,
        // What the guest is like is not known from settings.
        left_out: false,
        ignored_blocks: false,
    }
}

impl Link {
    /// Opens every connection and says Hello on it.
    pub(super) async fn open(
        transport: Arc<dyn Transport>,
        settings: SourceSettings,
        page_size: PageSize,
        features: Features,
    ) -> Result<Self, MigrationError> {
        let session = SessionId::random()?;
        let mut link = Self { peer: transport.address().into(), writers: Vec::new(), said: None };
        for connection in 0..settings.connections {
            let opened = transport.connect().await?;
            let mut writer = opened.writer.expect("a source writes");
            let hello = Hello {
                version: PROTOCOL_VERSION,
                session,
                connection,
                connections: settings.connections,
                lanes: settings.lanes,
                page_size,
                features: features.to_list(),
            };
            writer.write_all(&Message::Hello(hello).encode(0)).await?;
            link.writers.push(writer);
            if connection == 0 {
                link.peer = opened.peer.into();
                let name = format!("the return path from {}", link.peer);
                link.said = opened.reader.map(|reader| FrameReader::new(reader, name, page_size));
            }
        }
        Ok(link)
    }

    /// Sends a message before the stages run.
    pub(super) async fn say(&mut self, message: &Message) -> Result<(), MigrationError> {
        Ok(self.writers[0].write_all(&message.encode(0)).await?)
    }

    /// Waits for one message and demands that it is the one expected. A stream without a return path answers nothing.
    pub(super) async fn expect(&mut self, expected: fn(&Message) -> bool) -> Result<(), MigrationError> {
        let Some(said) = &mut self.said else { return Ok(()) };
        match said.next().await? {
            Some(Incoming::Message { message, .. }) if expected(&message) => Ok(()),
            Some(Incoming::Message { message: Message::Refused(why), .. }) => {
                Err(MigrationError::Refused { peer: "destination", why })
            }
            Some(Incoming::Message { message: Message::Abort(why), .. }) => {
                Err(MigrationError::GivenUp { peer: "destination", why })
            }
            Some(Incoming::Message { message, .. }) => {
                Err(MigrationError::Protocol(format!("{} came out of turn", message.kind().name())))
            }
            Some(Incoming::Pages(_)) => Err(MigrationError::Protocol("pages came on the return path".into())),
            None => Err(MigrationError::Lost(format!("{} closed it while the migration was being agreed", self.peer))),
        }
    }
}
