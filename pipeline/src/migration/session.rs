//! The destination's way to its source: strangers turned away, the connections of one migration gathered.
//!
//! Anyone can reach a listening socket: port scanners, other programs, other versions, a source that died half-way. None of
//! them may end the wait for the real peer, hold it up, or make it grow. So each connection is greeted in a task of its
//! own, within a time limit; only a few are greeted at once; and what was gathered of a migration that does not become
//! complete is dropped after that time.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use memferry_stages::geometry::PageSize;
use memferry_stages::untrusted::Untrusted;
use memferry_stages::wire::hello::{Features, Hello, SessionId};
use memferry_stages::wire::reader::{FrameReader, Incoming};
use memferry_stages::wire::{Message, PROTOCOL_VERSION};
use memferry_transports::{Connection, Listener};
use tokio::io::AsyncWriteExt;
use tokio::task::{AbortHandle, JoinSet};

use super::error::MigrationError;
use super::link::{Reader, Writer};
use crate::events::{Event, Observers};
use crate::settings::DestinationSettings;

/// The most connections that are greeted at once.
const MAX_GREETED: usize = 64;
/// How long a connection may be silent before it can be dropped for the next: the real peer says Hello at once, but it may come in a
/// burst of others, to a host that is busy.
const GRACE: Duration = Duration::from_millis(250);
/// The most migrations that are gathered at once.
const MAX_GATHERED: usize = 16;

/// The connections of one migration, complete, with what their Hello says.
pub(super) struct Session {
    /// Who sends, for messages.
    pub(super) peer: Untrusted,
    /// What every connection's Hello says, but for its number.
    pub(super) hello: Hello,
    /// What the stream uses.
    pub(super) features: Features,
    /// One for each connection, in order.
    pub(super) readers: Vec<Reader>,
    /// The return path, on connection 0, if the transport has one.
    pub(super) answer: Option<Writer>,
}

/// A connection that said a Hello we can take.
struct Greeted {
    peer: Untrusted,
    hello: Hello,
    features: Features,
    reader: Reader,
    writer: Option<Writer>,
}

/// A migration whose connections arrive.
struct Gathering {
    since: Instant,
    connections: Vec<Option<Greeted>>,
}

/// A connection that is turned away.
struct TurnedAway {
    peer: Untrusted,
    why: String,
    /// Was it a stored stream? Then no other will come.
    stored: bool,
}

impl Session {
    /// Waits until all connections of one migration are there. Runs on the data plane, where its sockets belong.
    pub(super) async fn gather(
        mut listener: Box<dyn Listener>,
        settings: DestinationSettings,
        observers: Observers,
    ) -> Result<Self, MigrationError> {
        let mut greetings: JoinSet<Result<Greeted, TurnedAway>> = JoinSet::new();
        let mut waiting = Waiting::default();
        let mut gathered: HashMap<SessionId, Gathering> = HashMap::new();
        loop {
            waiting.forget_finished();
            tokio::select! {
                accepted = listener.accept(), if !waiting.is_full() => {
                    waiting.add(greetings.spawn(greet(accepted?, settings.clone())));
                }
                () = waiting.oldest_had_its_time(), if waiting.is_full() => waiting.drop_oldest(),
                Some(greeting) = greetings.join_next() => {
                    gathered.retain(|_, gathering| gathering.since.elapsed() < settings.hello_timeout);
                    let greeting = match greeting {
                        Err(error) if error.is_cancelled() => continue,
                        greeting => greeting.expect("greeting does not panic"),
                    };
                    match greeting {
                        Ok(greeted) => match place(&mut gathered, greeted) {
                            Ok(None) => {}
                            Ok(Some(session)) => return Ok(session),
                            Err(refused) => {
                                let (Greeted { peer, writer, .. }, why) = *refused;
                                greetings.spawn(async { Err(turn_away(peer, writer, why).await) });
                            }
                        },
                        // There is no second reader of a file to wait for.
                        Err(TurnedAway { peer, why, stored: true }) => {
                            return Err(MigrationError::Protocol(format!("{peer}: {why}")));
                        }
                        Err(TurnedAway { peer, why, stored: false }) => observers.tell(&Event::TurnedAway { peer, why }),
                    }
                }
            }
        }
    }
}

/// Connections that have said no Hello yet, the oldest first, each with the time it came.
///
/// They must not keep out the one that will: where too many are greeted, the one that has been silent longest is dropped, but
/// none before its [`GRACE`] is over.
#[derive(Default)]
struct Waiting(VecDeque<(Instant, AbortHandle)>);

impl Waiting {
    fn add(&mut self, greeting: AbortHandle) {
        self.0.push_back((Instant::now(), greeting));
    }

    fn forget_finished(&mut self) {
        self.0.retain(|(_, greeting)| !greeting.is_finished());
    }

    fn is_full(&self) -> bool {
        self.0.len() >= MAX_GREETED
    }

    /// Returns when the oldest may be dropped.
    fn oldest_had_its_time(&self) -> impl Future<Output = ()> + use<> {
        let since = self.0.front().map_or_else(Instant::now, |&(since, _)| since);
        tokio::time::sleep_until((since + GRACE).into())
    }

    fn drop_oldest(&mut self) {
        self.0.pop_front().into_iter().for_each(|(_, greeting)| greeting.abort());
    }
}

/// Reads a connection's Hello and answers one that cannot be taken with the reason.
async fn greet(connection: Connection, settings: DestinationSettings) -> Result<Greeted, TurnedAway> {
    let Connection { peer, writer, reader } = connection;
    let peer = Untrusted::from(peer);
    let reader = reader.expect("a destination reads");
    let mut reader = FrameReader::new(reader, format!("the stream from {peer}"), PageSize::DEFAULT);
    let hello = match tokio::time::timeout(settings.hello_timeout, read_hello(&mut reader)).await {
        Ok(hello) => hello,
        Err(_) => Err(format!("it said nothing for {:.1?}", settings.hello_timeout)),
    };
    match hello.and_then(|hello| acceptable(&hello, &settings).map(|features| (hello, features))) {
        Ok((hello, features)) => {
            reader.set_page_size(hello.page_size);
            Ok(Greeted { peer, hello, features, reader, writer })
        }
        Err(why) => Err(turn_away(peer, writer, why).await),
    }
}

/// Answers a connection that cannot be taken, if it can be answered.
async fn turn_away(peer: Untrusted, mut writer: Option<Writer>, why: String) -> TurnedAway {
    if let Some(writer) = &mut writer {
        refuse(writer, &why).await;
    }
    TurnedAway { peer, why, stored: writer.is_none() }
}

async fn read_hello(reader: &mut Reader) -> Result<Hello, String> {
    match reader.next().await {
        Ok(Some(Incoming::Message { message: Message::Hello(hello), .. })) => Ok(hello),
        Ok(Some(_)) => Err("its first frame is not Hello".into()),
        Ok(None) => Err("it ended at byte 0, without a word".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// Can this destination take such a stream? What it uses, if so.
fn acceptable(hello: &Hello, settings: &DestinationSettings) -> Result<Features, String> {
    if hello.version != PROTOCOL_VERSION {
        return Err(format!("it speaks protocol version {}, this is version {PROTOCOL_VERSION}", hello.version));
    }
    let features = Features::from_list(&hello.features).map_err(|error| error.to_string())?;
    if hello.lanes > settings.max_lanes {
        return Err(format!("it has {} lanes, at most {} are accepted here", hello.lanes, settings.max_lanes));
    }
    match settings.page_size {
        Some(ours) if ours != hello.page_size => {
            return Err(format!("its pages have {} bytes, ours {}", hello.page_size.bytes(), ours.bytes()));
        }
        _ => {}
    }
    if settings.require_verify && !features.verify {
        return Err("it sends no digests, and this destination requires them (require_verify)".into());
    }
    Ok(features)
}

/// Says no. A stranger that does not read is not waited for.
async fn refuse(writer: &mut Writer, why: &str) {
    let farewell = async {
        writer.write_all(&Message::Refused(why.into()).encode(0)).await?;
        writer.shutdown().await
    };
    drop(tokio::time::timeout(Duration::from_millis(500), farewell).await);
}

/// Puts a connection to those of its migration; the session, if they are complete with it. Or the connection again, and why
/// it cannot be taken.
fn place(
    gathered: &mut HashMap<SessionId, Gathering>,
    greeted: Greeted,
) -> Result<Option<Session>, Box<(Greeted, String)>> {
    let away = |greeted: Greeted, why: String| Err(Box::new((greeted, why)));
    let id = greeted.hello.session;
    if !gathered.contains_key(&id) {
        if gathered.len() == MAX_GATHERED {
            // Half-open migrations must not keep the real one out: the one that has waited longest makes room.
            let oldest = gathered.iter().min_by_key(|(_, gathering)| gathering.since).map(|(&oldest, _)| oldest);
            gathered.remove(&oldest.expect("there are some"));
        }
        let connections = (0..greeted.hello.connections).map(|_| None).collect();
        gathered.insert(id, Gathering { since: Instant::now(), connections });
    }
    let gathering = gathered.get_mut(&id).expect("it is there");
    let same = |other: &Greeted| Hello { connection: greeted.hello.connection, ..other.hello.clone() } == greeted.hello;
    if !gathering.connections.iter().flatten().all(same) {
        return away(greeted, "it contradicts another connection of the same migration".into());
    }
    let number = usize::from(greeted.hello.connection);
    match gathering.connections.get_mut(number) {
        Some(place @ None) => *place = Some(greeted),
        _ => return away(greeted, format!("connection {number} of its migration is there already")),
    }
    if gathering.connections.iter().any(Option::is_none) {
        return Ok(None);
    }
    let gathering = gathered.remove(&id).expect("it is there");
    Ok(Some(complete(gathering.connections.into_iter().flatten())))
}

fn complete(connections: impl Iterator<Item = Greeted>) -> Session {
    let mut connections = connections.peekable();
    let first = connections.peek_mut().expect("there is at least one");
    let (peer, hello, features) = (first.peer.clone(), first.hello.clone(), first.features);
    let answer = first.writer.take();
    Session { peer, hello, features, readers: connections.map(|greeted| greeted.reader).collect(), answer }
}
