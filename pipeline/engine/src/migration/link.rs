//! The source's link to its destination: opens the connections and sends Hello on each.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use memferry_stages::codec::Codec;
use memferry_stages::geometry::PageSize;
use memferry_stages::queue::{Inlet, bounded};
use memferry_stages::silence::{Attentive, Ear};
use memferry_stages::untrusted::Untrusted;
use memferry_stages::wire::messages::Figure;
use memferry_stages::wire::reader::{FrameReader, Incoming};
use memferry_stages::wire::{ConnectionRole, Features, Hello, Meeting, Message, Nonce, Prover, Secret, SessionId};
use memferry_transports::{Connection, Transport};
use tokio::io::AsyncWriteExt;
use tokio::runtime::Handle;
use tokio_util::task::AbortOnDropHandle;

use super::alive::{Alive, silenced};
use super::connection::{Reader, Writer};
use super::error::{Loss, MigrationError, Silence};
use super::senders::{Senders, close};
use crate::events::Role;
use crate::settings::{SourceSettings, Verify};

/// What the two ends of a migration know each other by.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    pub(super) session: SessionId,
    /// Set if a lost connection is made again.
    pub(super) secret: Option<Secret>,
    /// The number of the attempt, from 1.
    pub(super) attempt: u32,
    /// Who the destination is, once its first connection was made: all others, those of later attempts included, lead to the same.
    destination: Arc<OnceLock<Option<memferry_transports::Identity>>>,
}

impl Identity {
    /// The identity of a migration that begins.
    ///
    /// # Errors
    /// When the system has no random numbers.
    pub(super) fn new(features: Features) -> Result<Self, MigrationError> {
        let secret = if features.recovery { Some(Secret::random()?) } else { None };
        Ok(Self { session: SessionId::random()?, secret, attempt: 1, destination: Arc::default() })
    }

    /// Requires the connection to lead to the destination of the first one.
    fn same_destination(&self, opened: &Connection) -> Result<(), MigrationError> {
        if *self.destination.get_or_init(|| opened.identity) == opened.identity {
            return Ok(());
        }
        Err(MigrationError::OtherPeer { peer: Role::Destination, name: opened.peer.as_str().into() })
    }
}

/// The connections of one attempt. Hello was sent on each, and after a lost connection both ends have proven themselves on each.
pub(super) struct Greeted {
    /// The peer's name, for messages.
    peer: Untrusted,
    /// One for each connection, in order.
    writers: Vec<Writer>,
    /// The return path, on connection 0, if the transport has one.
    reader: Option<(Reader, Arc<Ear>)>,
    urgent: Option<Urgent>,
}

/// The connection for pages that the destination asks for, which follows the bulk connections.
pub(super) struct Urgent {
    pub(super) requests: Reader,
    pub(super) pages: Writer,
}

/// The link to the destination, before the stages run.
pub(super) struct Link {
    /// The peer's name, for messages.
    pub(super) peer: Untrusted,
    pub(super) senders: Senders,
    /// Messages from the destination, if the transport has a return path.
    pub(super) return_path: Option<ReturnPath>,
    /// Set if there is a return path.
    pub(super) alive: Option<Alive>,
    /// Set if the guest may be started before all of its pages are there.
    pub(super) urgent: Option<Urgent>,
}

/// The stream features that a source uses, by its settings.
pub(super) fn features(settings: &SourceSettings) -> Features {
    let codec = settings.encoder.compress;
    Features {
        checksum: settings.checksum,
        snap: codec == Some(Codec::Snap),
        lz4: codec == Some(Codec::Lz4),
        zstd: matches!(codec, Some(Codec::Zstd { .. })),
        groups: codec.is_some(),
        xbzrle: settings.encoder.xbzrle.is_some(),
        verify: settings.verify.is_on(),
        page_hashes: settings.verify == Verify::Pages,
        // The guest's properties are not known from settings. In a switch to postcopy digests leave out what is missing.
        left_out: settings.mode.may_switch(),
        ignored_blocks: false,
        checkpoints: false,
        postcopy: settings.mode.may_switch(),
        // The transport is not known from settings.
        recovery: false,
    }
}

impl Greeted {
    /// Opens every connection and sends Hello on it. Where a lost connection is made again, both ends prove themselves.
    pub(super) async fn open(
        transport: Arc<dyn Transport>,
        settings: SourceSettings,
        page_size: PageSize,
        features: Features,
        identity: Identity,
    ) -> Result<Self, MigrationError> {
        let mut greeted = Self { peer: transport.address().into(), writers: Vec::new(), reader: None, urgent: None };
        let urgent = features.postcopy.then_some(settings.connections);
        for connection in (0..settings.connections).chain(urgent) {
            let opened = transport.connect().await?;
            identity.same_destination(&opened)?;
            let mut writer = opened.writer.expect("a source writes");
            let bulk = settings.connections;
            let mut hello =
                Hello::bulk(identity.session, connection, bulk, settings.lanes, page_size, features.to_list());
            hello.connections += u16::from(urgent.is_some());
            if urgent == Some(connection) {
                hello.role = ConnectionRole::Urgent;
            }
            if identity.attempt > 1 {
                hello.attempt = identity.attempt;
                hello.nonce = Nonce::random()?;
            }
            writer.write_all(&Message::Hello(hello.clone()).encode(0)).await?;
            if connection == 0 {
                greeted.peer = opened.peer.into();
            }
            let name = format!("the return path from {}", greeted.peer);
            let mut reader = opened.reader.map(|reader| {
                let (reader, ear) = Attentive::new(reader);
                (FrameReader::new(reader, name, page_size), ear)
            });
            if let (Some((reader, _)), Some(secret), 2..) = (&mut reader, &identity.secret, identity.attempt) {
                prove(secret, &hello, reader, &mut writer).await?;
            }
            if urgent == Some(connection) {
                let (requests, _) =
                    reader.ok_or_else(|| MigrationError::Mistake("an urgent connection answers".into()))?;
                greeted.urgent = Some(Urgent { requests, pages: writer });
                continue;
            }
            greeted.writers.push(writer);
            if connection == 0 {
                greeted.reader = reader;
            }
        }
        Ok(greeted)
    }
}

/// Both ends prove that they have the secret: the destination first, so that no other peer gets a proof of the source.
async fn prove(secret: &Secret, hello: &Hello, reader: &mut Reader, writer: &mut Writer) -> Result<(), MigrationError> {
    let (nonce, proof) = loop {
        match reader.next().await? {
            Some(Incoming::Message { message: Message::Challenge { nonce, proof }, .. }) => break (nonce, proof),
            Some(Incoming::Message { message: Message::Heartbeat(_), .. }) => {}
            Some(Incoming::Message { message: Message::Refused(why), .. }) => {
                return Err(MigrationError::Refused { peer: Role::Destination, why });
            }
            Some(_) => return Err(MigrationError::Protocol("a challenge must answer a source that returns".into())),
            None => return Err(MigrationError::Lost(Loss::Closed(Role::Destination))),
        }
    };
    let meeting = Meeting::of(hello, nonce);
    if !secret.is_proven(Prover::Destination, &meeting, &proof) {
        return Err(MigrationError::NotProven(Role::Destination));
    }
    writer.write_all(&Message::Proof(secret.prove(Prover::Source, &meeting)).encode(0)).await?;
    Ok(())
}

/// A message of the destination that was waited for.
pub(super) struct Heard {
    pub(super) message: Message,
    /// The figures of the heartbeat before it.
    pub(super) figures: Vec<Figure>,
}

impl Link {
    /// Starts the senders, and the task that reads the destination's messages. Called on the caller's runtime.
    pub(super) fn start(greeted: Greeted, settings: &SourceSettings, durable_rounds: bool, plane: &Handle) -> Self {
        let Greeted { peer, writers, reader, urgent } = greeted;
        let senders = Senders::start(writers, settings, durable_rounds, plane);
        let (return_path, alive) = reader
            .map(|(reader, ear)| {
                let silence = Silence { role: Role::Destination, peer: peer.clone(), limit: settings.peer_timeout };
                let alive = Alive::start(senders.control[0].clone(), vec![ear], silence);
                (ReturnPath::listen(reader), alive)
            })
            .unzip();
        Self { peer, senders, return_path, alive, urgent }
    }

    /// Sends a message before the stages run.
    pub(super) async fn send(&mut self, message: &Message) -> Result<(), MigrationError> {
        tokio::select! {
            sent = self.senders.send(message) => sent,
            silence = silenced(self.alive.as_ref()) => Err(MigrationError::Silent(silence)),
        }
    }

    /// Waits for one message and requires it to be an expected one. A stream without a return path is not answered.
    pub(super) async fn expect(&mut self, expected: fn(&Message) -> bool) -> Result<Option<Heard>, MigrationError> {
        let mut figures = Vec::new();
        let Some(return_path) = &mut self.return_path else { return Ok(None) };
        loop {
            let message = tokio::select! {
                biased;
                message = return_path.next() => message,
                silence = silenced(self.alive.as_ref()) => return Err(MigrationError::Silent(silence)),
            };
            return match message {
                Ok(Message::Heartbeat(latest)) => {
                    figures = latest;
                    continue;
                }
                Ok(message) if expected(&message) => Ok(Some(Heard { message, figures })),
                Ok(Message::Refused(why)) => Err(MigrationError::Refused { peer: Role::Destination, why }),
                Ok(Message::Abort(why)) => Err(MigrationError::GivenUp { peer: Role::Destination, why }),
                Ok(other) => Err(MigrationError::Protocol(format!("unexpected message: {}", other.kind().name()))),
                Err(loss) => Err(MigrationError::Lost(Loss::NotAgreed(Box::new(loss)))),
            };
        }
    }

    /// Sends the last message and ends the connections, within the time given.
    pub(super) async fn close(mut self, farewell: Message, within: Duration) {
        close(&mut self.senders.stages, &self.senders.control, Some(farewell), within).await;
    }
}

/// Messages from the destination: read by a task, because reading a frame must not be interrupted.
pub(super) struct ReturnPath {
    messages: Inlet<Result<Message, Loss>>,
    is_over: bool,
    _listening: AbortOnDropHandle<()>,
}

impl ReturnPath {
    /// Reads the return path until it ends.
    fn listen(mut reader: Reader) -> Self {
        let (heard, messages) = bounded(16);
        let listening = tokio::spawn(async move {
            loop {
                let item = match reader.next().await {
                    Ok(Some(Incoming::Message { message, .. })) => Ok(message),
                    Ok(Some(Incoming::Pages(_))) => Err(Loss::PagesReturned),
                    Ok(None) => Err(Loss::Closed(Role::Destination)),
                    Err(error) => Err(Loss::Unreadable(error.to_string())),
                };
                let over = item.is_err();
                if heard.put(item).await.is_err() || over {
                    return;
                }
            }
        });
        Self { messages, is_over: false, _listening: AbortOnDropHandle::new(listening) }
    }

    /// Reads what is left, within the time given.
    pub(super) async fn read_to_end(&mut self, within: Duration) {
        let reading = async {
            while !self.is_over {
                drop(self.next().await);
            }
        };
        drop(tokio::time::timeout(within, reading).await);
    }

    /// The next message. The end of the return path is an error, reported once. Safe to race in a `select!`.
    pub(super) async fn next(&mut self) -> Result<Message, Loss> {
        if self.is_over {
            return std::future::pending().await;
        }
        let message = self.messages.next().await.unwrap_or_else(|| Err(Loss::ReaderEnded));
        self.is_over = message.is_err();
        message
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::io;
    use std::sync::Mutex;

    use futures::FutureExt;
    use futures::future::BoxFuture;
    use memferry_transports::memory::MemoryTransport;
    use memferry_transports::{Capabilities, Identity as Certificate, Listener};

    use super::*;

    /// Memory whose destinations show these certificates, one after another.
    #[derive(Debug)]
    struct Shown(MemoryTransport, Mutex<VecDeque<Option<Certificate>>>);

    impl Transport for Shown {
        fn capabilities(&self) -> Capabilities {
            self.0.capabilities()
        }

        fn address(&self) -> String {
            self.0.address()
        }

        fn connect(&self) -> BoxFuture<'_, io::Result<Connection>> {
            let identity = self.1.lock().unwrap().pop_front().expect("no more connections");
            async move { Ok(Connection { identity, ..self.0.connect().await? }) }.boxed()
        }

        fn listen(&self) -> BoxFuture<'_, io::Result<Box<dyn Listener>>> {
            self.0.listen()
        }
    }

    /// Opens the connections of an attempt to destinations that show these certificates.
    async fn opens(identity: &Identity, shown: [Option<Certificate>; 2]) -> Result<(), MigrationError> {
        let memory = MemoryTransport::new(4096);
        let _listener = memory.listen().await.unwrap();
        let transport = Arc::new(Shown(memory, Mutex::new(shown.into())));
        let settings = SourceSettings { connections: 2, ..SourceSettings::default() };
        let features = features(&settings);
        Greeted::open(transport, settings, PageSize::DEFAULT, features, identity.clone()).await.map(drop)
    }

    #[tokio::test]
    async fn every_connection_leads_to_the_destination_of_the_first() {
        let of = |byte| Some(Certificate::of_digest([byte; 32]));
        let identity = Identity::new(Features::default()).unwrap();
        opens(&identity, [of(1), of(1)]).await.unwrap();
        // A later attempt is of the same migration.
        for shown in [[of(2), of(2)], [of(1), of(2)], [of(1), None], [None, None]] {
            let error = opens(&identity, shown).await.unwrap_err();
            assert!(matches!(error, MigrationError::OtherPeer { peer: Role::Destination, .. }), "{error}");
        }
        opens(&identity, [of(1), of(1)]).await.unwrap();
        let plain = Identity::new(Features::default()).unwrap();
        opens(&plain, [None, None]).await.unwrap();
        assert!(matches!(opens(&plain, [of(1), of(1)]).await, Err(MigrationError::OtherPeer { .. })));
    }
}
