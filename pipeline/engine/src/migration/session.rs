//! The destination's listening side: refuses unrelated clients, and gathers the connections of one migration.
//!
//! Anyone can reach a listening socket: port scanners, other programs, other versions, a source that died during setup.
//! None of them may end the wait for the real peer, delay it, or make it use more memory. So each connection is greeted
//! in a task of its own, within a time limit, the handshake of its transport included, and only so many are greeted at once: `waiting`
//! has the rule by which one gives way to the next. An incomplete migration is refused
//! after that time, or at once if one of its connections ends or no further one can be accepted.
//!
//! The listener stays open while the guest is received: a second source is refused: this destination is busy. The source whose connection
//! was lost may return, if it proves that it is the one: see `returning`.

mod refusal;
mod returning;
mod waiting;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::stream::{FuturesUnordered, StreamExt};
use memferry_stages::geometry::PageSize;
use memferry_stages::silence::{Attentive, Ear};
use memferry_stages::untrusted::Untrusted;
use memferry_stages::wire::reader::{FrameReader, Incoming};
use memferry_stages::wire::{ConnectionRole, Features, Hello, Message, PROTOCOL_VERSION, SessionId};
use memferry_transports::{Arrival, Connection, Identity, Listener, is_shortage};
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::FAREWELL;
use super::connection::{Reader, Writer};
use super::error::MigrationError;
use super::turned_away::TurnedAways;
use crate::settings::DestinationSettings;
use refusal::{Earlier, Incomplete, Refusal, Shortage};
pub(super) use returning::Known;
use returning::{prove, unnumbered};
use waiting::Waiting;

/// The most migrations that are gathered at once.
const MAX_GATHERED: usize = 16;

/// The complete connections of one migration, with the content of their Hello.
pub(super) struct Session {
    /// The peer's name, for messages.
    pub(super) peer: Untrusted,
    /// Whose certificate every connection shows, where the transport has certificates.
    pub(super) identity: Option<Identity>,
    /// The content of every connection's Hello, except its number.
    pub(super) hello: Hello,
    /// The features that the stream uses.
    pub(super) features: Features,
    /// One for each bulk connection, in order.
    pub(super) readers: Vec<Reader>,
    /// The liveness of each of them.
    pub(super) ears: Vec<Arc<Ear>>,
    /// The return path, on connection 0, if the transport has one.
    pub(super) answer: Option<Writer>,
    /// The connection for pages that are asked for, if the guest may be started before all of them are here.
    pub(super) urgent: Option<Urgent>,
}

/// The connection for pages that this end asks for.
pub(super) struct Urgent {
    pub(super) pages: Reader,
    pub(super) requests: Writer,
}

/// A connection that sent an acceptable Hello.
struct Greeted {
    peer: Untrusted,
    identity: Option<Identity>,
    hello: Hello,
    features: Features,
    reader: Reader,
    ear: Arc<Ear>,
    writer: Option<Writer>,
}

impl Greeted {
    /// Returns when the peer has ended the connection. Bytes that arrive early are left for the reader of the stream.
    async fn ended(&mut self) {
        if matches!(self.reader.has_more().await, Ok(true)) {
            std::future::pending::<()>().await;
        }
    }
}

/// A migration that waits for more connections.
struct Group {
    since: Instant,
    connections: Vec<Option<Greeted>>,
}

/// A migration that is gathered, and its attempt.
type GroupId = (SessionId, u32);

/// Returns when a connection of one of the groups has ended, with that group. Safe to race in a `select!`.
async fn a_connection_ended(groups: &mut HashMap<GroupId, Group>) -> GroupId {
    let ends = groups.iter_mut().flat_map(|(&id, group)| {
        let connections = group.connections.iter_mut().flatten();
        connections.map(move |connection| connection.ended().map(move |()| id).boxed())
    });
    let mut ends: FuturesUnordered<_> = ends.collect();
    match ends.next().await {
        Some(id) => id,
        None => std::future::pending().await,
    }
}

/// A connection that is refused.
struct TurnedAway {
    peer: Untrusted,
    why: Refusal,
    /// Was it a stored stream? Then no other connection will follow.
    stored: bool,
}

/// The clients so far, until the connections of one migration are complete.
struct Reception {
    settings: DestinationSettings,
    turned_away: Arc<TurnedAways>,
    greetings: JoinSet<Result<Greeted, TurnedAway>>,
    /// Connections that are being refused; the result is ignored.
    farewells: JoinSet<()>,
    waiting: Waiting,
    groups: HashMap<GroupId, Group>,
    /// The latest migrations that were refused as a whole: more connections of each may arrive.
    refused: VecDeque<(GroupId, Refusal)>,
    /// The source whose guest is received, once there is one.
    received: Option<Untrusted>,
    /// How it proves itself, if it returns.
    known: Arc<Known>,
}

/// The listener, and the clients that have connected. Runs on the data plane, where its sockets belong.
pub(super) struct Door {
    listener: Box<dyn Listener>,
    reception: Reception,
}

impl Door {
    pub(super) fn open(
        listener: Box<dyn Listener>,
        settings: DestinationSettings,
        turned_away: Arc<TurnedAways>,
        known: Arc<Known>,
    ) -> Self {
        Self { listener, reception: Reception::new(settings, turned_away, known) }
    }

    /// Waits until all connections of one migration have arrived.
    pub(super) async fn gather(mut self) -> Result<Box<(Session, Self)>, MigrationError> {
        loop {
            if let Some(session) = self.next().await? {
                self.reception.receives(&session.peer);
                return Ok(Box::new((session, self)));
            }
        }
    }

    /// Refuses every client, for a guest is received, but its source, if that returns. Returns only if the listener fails, or this end does not
    /// wait for the source any more.
    pub(super) async fn await_return(mut self, returned: mpsc::Sender<Session>) {
        while let Ok(session) = self.next().await {
            if let Some(session) = session
                && returned.send(session).await.is_err()
            {
                return;
            }
        }
    }

    /// Waits for one thing to happen, and handles it. Returns the session if one is complete.
    async fn next(&mut self) -> Result<Option<Session>, MigrationError> {
        let Self { listener, reception } = self;
        reception.waiting.forget_finished();
        let is_full = reception.waiting.is_full();
        let turned_away = reception.turned_away.clone();
        tokio::select! {
            accepted = listener.accept(), if !is_full => reception.accepted(accepted)?,
            () = reception.waiting.one_had_its_time(), if is_full => reception.waiting.drop_one(),
            () = reception.a_group_had_its_time() => reception.refuse_late_groups(),
            id = a_connection_ended(&mut reception.groups) => reception.refuse_group(id, Incomplete::OneEnded),
            () = turned_away.report_next() => {}
            Some(_) = reception.farewells.join_next() => {}
            Some(greeting) = reception.greetings.join_next() => match greeting {
                Err(error) if error.is_cancelled() => {}
                greeting => return reception.greeted(greeting.expect("greeting does not panic")),
            },
        }
        Ok(None)
    }
}

impl Reception {
    fn new(settings: DestinationSettings, turned_away: Arc<TurnedAways>, known: Arc<Known>) -> Self {
        Self {
            settings,
            turned_away,
            greetings: JoinSet::new(),
            farewells: JoinSet::new(),
            waiting: Waiting::default(),
            groups: HashMap::new(),
            refused: VecDeque::new(),
            received: None,
            known,
        }
    }

    /// The guest of this source is received: no other migration is waited for.
    fn receives(&mut self, source: &Untrusted) {
        self.received = Some(source.clone());
        for greeted in self.groups.drain().flat_map(|(_, group)| group.connections).flatten().collect::<Vec<_>>() {
            self.refuse(greeted, Refusal::Busy(source.clone()));
        }
    }

    fn refuse(&mut self, greeted: Greeted, why: Refusal) {
        let Greeted { peer, writer, .. } = greeted;
        self.note(peer, &why);
        self.send_farewell(writer, why);
    }

    /// Greets a connection. If none can be accepted, room is made.
    fn accepted(&mut self, accepted: io::Result<Arrival>) -> Result<(), MigrationError> {
        match accepted {
            Ok(arrival) => {
                let host = arrival.host();
                let greeting = greet(arrival, self.settings.clone(), self.known.clone());
                self.waiting.add(host, self.greetings.spawn(greeting));
            }
            Err(error) if is_shortage(&error) => self.make_room(Shortage(Arc::new(error))),
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// No connection can be accepted, so a migration that waits for more of them cannot become complete. The one that
    /// has waited longest is refused, after connections that sent nothing in their time.
    fn make_room(&mut self, shortage: Shortage) {
        if self.waiting.one_is_late() {
            return self.waiting.drop_one();
        }
        match self.oldest_group() {
            Some(id) => self.refuse_group(id, Incomplete::Shortage(shortage)),
            None => self.note("any peer".into(), &Refusal::Shortage(shortage)),
        }
    }

    /// Accepts a greeted connection. Returns the session if it is now complete.
    fn greeted(&mut self, greeting: Result<Greeted, TurnedAway>) -> Result<Option<Session>, MigrationError> {
        match greeting {
            Ok(greeted) => match self.place(greeted) {
                Ok(complete) => return Ok(complete),
                Err(refused) => {
                    let (greeted, why) = *refused;
                    self.refuse(greeted, why);
                }
            },
            // There is no second reader of a file to wait for.
            Err(TurnedAway { peer, why, stored: true, .. }) => {
                return Err(MigrationError::Protocol(format!("{peer}: {why}")));
            }
            Err(TurnedAway { peer, why, stored: false }) => self.note(peer, &why),
        }
        Ok(None)
    }

    /// Adds a connection to its migration. Returns the session if it is now complete, or the connection again with the
    /// reason for refusing it.
    fn place(&mut self, greeted: Greeted) -> Result<Option<Session>, Box<(Greeted, Refusal)>> {
        let away = |greeted: Greeted, refusal: Refusal| Err(Box::new((greeted, refusal)));
        if let Some(source) = self.received.as_ref().filter(|_| greeted.hello.attempt == 1) {
            return away(greeted, Refusal::Busy(source.clone()));
        }
        let id = (greeted.hello.session, greeted.hello.attempt);
        if let Some((_, refusal)) = self.refused.iter().find(|(refused, _)| *refused == id) {
            return away(greeted, refusal.clone());
        }
        if !self.groups.contains_key(&id) && self.groups.len() == MAX_GATHERED {
            // Incomplete migrations must not keep the real one out: the one that has waited longest is dropped.
            let oldest = self.oldest_group().expect("there are some");
            self.refuse_group(oldest, Incomplete::Overtaken);
        }
        let group = self.groups.entry(id).or_insert_with(|| Group {
            since: Instant::now(),
            connections: (0..greeted.hello.connections).map(|_| None).collect(),
        });
        let same = |other: &Greeted| unnumbered(&other.hello) == unnumbered(&greeted.hello);
        if !group.connections.iter().flatten().all(same) {
            return away(greeted, Refusal::Contradicts);
        }
        if !group.connections.iter().flatten().all(|other| other.identity == greeted.identity) {
            return away(greeted, Refusal::OtherPeer(Earlier::Connection));
        }
        let number = usize::from(greeted.hello.connection);
        match group.connections.get_mut(number) {
            Some(place @ None) => *place = Some(greeted),
            _ => return away(greeted, Refusal::Occupied(number)),
        }
        if group.connections.iter().any(Option::is_none) {
            return Ok(None);
        }
        let group = self.groups.remove(&id).expect("it is there");
        let attempt = id.1;
        if attempt > 1 && !self.known.begin(attempt) {
            // Another attempt was faster; this source has given this one up.
            return Ok(None);
        }
        Ok(Some(complete(group.connections.into_iter().flatten())))
    }

    fn oldest_group(&self) -> Option<GroupId> {
        self.groups.iter().min_by_key(|(_, group)| group.since).map(|(&oldest, _)| oldest)
    }

    /// Returns when the oldest group has waited for the longest time allowed.
    fn a_group_had_its_time(&self) -> impl Future<Output = ()> + use<> {
        let oldest = self.groups.values().map(|group| group.since).min();
        let end = oldest.map(|since| since + self.settings.hello_timeout);
        async move {
            match end {
                Some(end) => sleep_until(end).await,
                None => std::future::pending().await,
            }
        }
    }

    fn refuse_late_groups(&mut self) {
        let timeout = self.settings.hello_timeout;
        while let Some(id) = self.oldest_group().filter(|id| self.groups[id].since.elapsed() >= timeout) {
            self.refuse_group(id, Incomplete::Late(timeout));
        }
    }

    /// Refuses a migration as a whole: each connection is sent the reason, and one event reports it here.
    fn refuse_group(&mut self, id: GroupId, why: Incomplete) {
        let Some(group) = self.groups.remove(&id) else { return };
        let of = group.connections.len();
        let connections: Vec<_> = group.connections.into_iter().flatten().collect();
        let why = Refusal::Incomplete { came: connections.len(), of, why };
        let peer = connections.first().map_or_else(Untrusted::default, |first| first.peer.clone());
        self.note(peer, &why);
        if self.refused.len() == MAX_GATHERED {
            self.refused.pop_front();
        }
        self.refused.push_back((id, why.clone()));
        for Greeted { writer, .. } in connections {
            self.send_farewell(writer, why.clone());
        }
    }

    /// Counts a refused peer, for observers.
    fn note(&self, peer: Untrusted, why: &Refusal) {
        self.turned_away.note(why.kind(), peer, why.to_string());
    }

    fn send_farewell(&mut self, writer: Option<Writer>, why: Refusal) {
        if let Some(mut writer) = writer {
            self.farewells.spawn(async move { refuse(&mut writer, &why).await });
        }
    }
}

/// Completes a connection's handshake, reads its Hello and answers an unacceptable one with the reason.
async fn greet(arrival: Arrival, settings: DestinationSettings, known: Arc<Known>) -> Result<Greeted, TurnedAway> {
    let stranger = Untrusted::from(arrival.peer().to_owned());
    let Connection { peer, identity, mut writer, reader } = match completed(arrival, settings.hello_timeout).await {
        Ok(connection) => connection,
        Err(why) => return Err(TurnedAway { peer: stranger, why, stored: false }),
    };
    let peer = Untrusted::from(peer);
    let (reader, ear) = Attentive::new(reader.expect("a destination reads"));
    let mut reader = FrameReader::new(reader, format!("the stream from {peer}"), PageSize::DEFAULT);
    let hello = match tokio::time::timeout(settings.hello_timeout, read_hello(&mut reader)).await {
        Ok(hello) => hello,
        Err(_) => Err(Refusal::Silent(settings.hello_timeout)),
    };
    let mut greeting = hello.and_then(|hello| acceptable(&hello, &settings).map(|features| (hello, features)));
    if let Ok((hello, _)) = &greeting
        && hello.attempt != 1
    {
        let proving = prove(&known, hello, identity, &mut reader, &mut writer);
        let proven = tokio::time::timeout(settings.hello_timeout, proving).await;
        if let Err(refusal) = proven.unwrap_or(Err(Refusal::Silent(settings.hello_timeout))) {
            greeting = Err(refusal);
        }
    }
    match greeting {
        Ok((hello, features)) => {
            reader.set_page_size(hello.page_size);
            // On all connections but the first, no data arrives before the stages run.
            ear.expect_nothing();
            Ok(Greeted { peer, identity, hello, features, reader, ear, writer })
        }
        Err(refusal) => Err(turn_away(peer, writer, refusal).await),
    }
}

/// The connection after its handshake, or why there is none.
async fn completed(arrival: Arrival, within: Duration) -> Result<Connection, Refusal> {
    match tokio::time::timeout(within, arrival.complete()).await {
        Ok(completed) => completed.map_err(|error| Refusal::Handshake(Arc::new(error))),
        Err(_) => Err(Refusal::Silent(within)),
    }
}

/// Answers an unacceptable connection, if it can be answered.
async fn turn_away(peer: Untrusted, mut writer: Option<Writer>, why: Refusal) -> TurnedAway {
    if let Some(writer) = &mut writer {
        refuse(writer, &why).await;
    }
    TurnedAway { peer, why, stored: writer.is_none() }
}

async fn read_hello(reader: &mut Reader) -> Result<Hello, Refusal> {
    match reader.next().await {
        Ok(Some(Incoming::Message { message: Message::Hello(hello), .. })) => Ok(hello),
        Ok(Some(_)) => Err(Refusal::NoHello),
        Ok(None) => Err(Refusal::Ended),
        Err(error) => Err(Refusal::Unreadable(Arc::new(error))),
    }
}

/// Can this destination accept such a stream? Returns the features it uses, if so.
fn acceptable(hello: &Hello, settings: &DestinationSettings) -> Result<Features, Refusal> {
    if hello.version != PROTOCOL_VERSION {
        return Err(Refusal::Version(hello.version));
    }
    let features = Features::from_list(&hello.features).map_err(Refusal::Features)?;
    if hello.role != ConnectionRole::Bulk && !(features.postcopy && hello.role == ConnectionRole::Urgent) {
        return Err(Refusal::Role(hello.role));
    }
    if hello.connections != hello.bulk + u16::from(features.postcopy) {
        return Err(Refusal::OtherConnections { others: hello.connections - hello.bulk });
    }
    if features.checkpoints {
        return Err(Refusal::Marks);
    }
    if features.postcopy && !(features.checksum && features.recovery) {
        return Err(Refusal::UnsafePostcopy);
    }
    if features.postcopy && settings.recovery.attempts == 0 {
        return Err(Refusal::PostcopyWithoutRecovery);
    }
    if hello.lanes > settings.max_lanes {
        return Err(Refusal::Lanes { lanes: hello.lanes, most: settings.max_lanes });
    }
    match settings.page_size {
        Some(ours) if ours != hello.page_size => {
            return Err(Refusal::PageSize { theirs: hello.page_size.bytes(), ours: ours.bytes() });
        }
        _ => {}
    }
    if settings.require_verify && !features.verify {
        return Err(Refusal::NoDigests);
    }
    Ok(features)
}

/// Sends a refusal. Does not wait for a client that does not read.
async fn refuse(writer: &mut Writer, why: &Refusal) {
    let farewell = async {
        writer.write_all(&Message::Refused(why.to_string().into()).encode(0)).await?;
        writer.shutdown().await
    };
    drop(tokio::time::timeout(FAREWELL, farewell).await);
}

fn complete(connections: impl Iterator<Item = Greeted>) -> Session {
    let mut connections = connections.peekable();
    let first = connections.peek_mut().expect("there is at least one");
    let (peer, hello, features) = (first.peer.clone(), first.hello.clone(), first.features);
    let mut session = Session {
        peer,
        identity: first.identity,
        hello,
        features,
        readers: Vec::new(),
        ears: Vec::new(),
        answer: first.writer.take(),
        urgent: None,
    };
    for Greeted { hello, reader, ear, writer, .. } in connections {
        session.ears.push(ear);
        match (hello.role, writer) {
            (ConnectionRole::Urgent, Some(requests)) => session.urgent = Some(Urgent { pages: reader, requests }),
            _ => session.readers.push(reader),
        }
    }
    session
}

#[cfg(test)]
mod tests;
