//! Migrations that cannot become complete are refused with the reason, once.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use futures::future::BoxFuture;
use memferry_transports::Transport;
use memferry_transports::memory::MemoryTransport;
use tokio::io::AsyncRead;
use tokio::task::JoinHandle;

use super::*;
use crate::events::{Event, Observer, Observers, Role, TurnedAwayKind};
use memferry_stages::wire::{ConnectionRole, Meeting, Nonce, Prover, Secret};

/// No test here takes this long unless it hangs.
const HANG: Duration = Duration::from_secs(60);

/// A listener that cannot accept while it is short of descriptors.
#[derive(Debug)]
struct Starved {
    listener: Box<dyn Listener>,
    is_short: Arc<AtomicBool>,
    accepted: Arc<AtomicUsize>,
    /// What the certificate of the next connections is.
    certificate: Arc<Mutex<Option<Identity>>>,
}

impl Listener for Starved {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Arrival>> {
        Box::pin(async {
            loop {
                let moment = tokio::time::timeout(Duration::from_millis(5), self.listener.accept());
                if self.is_short.load(Ordering::Relaxed) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    return Err(rustix::io::Errno::MFILE.into());
                }
                if let Ok(accepted) = moment.await {
                    self.accepted.fetch_add(1, Ordering::Relaxed);
                    let identity = *self.certificate.lock().unwrap();
                    let shown = move |connection| async move { Ok(Connection { identity, ..connection }) };
                    return accepted.map(|arrival| arrival.then(shown));
                }
            }
        })
    }

    fn local_address(&self) -> String {
        self.listener.local_address()
    }
}

type TurnedAwayEvents = Arc<Mutex<Vec<(TurnedAwayKind, u64, String)>>>;

/// A destination that gathers connections, and its reported events.
struct Gathering {
    transport: MemoryTransport,
    is_short: Arc<AtomicBool>,
    accepted: Arc<AtomicUsize>,
    certificate: Arc<Mutex<Option<Identity>>>,
    turned_away_events: TurnedAwayEvents,
    turned_away: Arc<TurnedAways>,
    task: JoinHandle<Result<Box<(Session, Door)>, MigrationError>>,
}

impl Gathering {
    async fn start(hello_timeout: Duration) -> Self {
        let (transport, is_short, turned_away_events) =
            (MemoryTransport::new(4096), Arc::new(AtomicBool::new(false)), TurnedAwayEvents::default());
        let accepted = Arc::new(AtomicUsize::new(0));
        let listener = transport.listen().await.unwrap();
        let certificate = Arc::<Mutex<Option<Identity>>>::default();
        let listener = Box::new(Starved {
            listener,
            is_short: is_short.clone(),
            accepted: accepted.clone(),
            certificate: certificate.clone(),
        });
        let listening = turned_away_events.clone();
        let observer: Arc<dyn Observer> = Arc::new(move |_: Role, event: &Event| {
            if let Event::TurnedAway { kind, why, count, .. } = event {
                listening.lock().unwrap().push((*kind, *count, why.clone()));
            }
        });
        let turned_away = Arc::new(TurnedAways::new(Observers::new(Role::Destination, vec![observer])));
        let settings = DestinationSettings { hello_timeout, ..DestinationSettings::default() };
        let door = Door::open(listener, settings, turned_away.clone(), Arc::default());
        let task = tokio::spawn(door.gather());
        Self { transport, is_short, accepted, certificate, turned_away_events, turned_away, task }
    }

    /// A connection that has sent Hello.
    async fn knock(&self, session: u8, connection: u16, connections: u16) -> Source {
        knock(&self.transport, session, connection, connections).await
    }

    /// A connection that has sent Hello after a change of it.
    async fn knock_with(
        &self,
        session: u8,
        connection: u16,
        connections: u16,
        change: impl FnOnce(&mut Hello),
    ) -> Source {
        knock_with(&self.transport, session, connection, connections, change).await
    }

    /// A whole migration arrives and is accepted; returns the events until then, with the remaining counts.
    async fn ends_well(self) -> Vec<(TurnedAwayKind, u64, String)> {
        let _source = self.knock(99, 0, 1).await;
        let gathered = tokio::time::timeout(HANG, self.task).await.expect("it hangs").unwrap();
        assert_eq!(gathered.unwrap_or_else(|_| panic!("no session")).0.hello.session, SessionId([99; 16]));
        self.turned_away.finish();
        self.turned_away_events.lock().unwrap().clone()
    }
}

/// A connection that has sent Hello.
async fn knock(transport: &MemoryTransport, session: u8, connection: u16, connections: u16) -> Source {
    knock_with(transport, session, connection, connections, |_| ()).await
}

/// A connection that has sent Hello after a change of it.
async fn knock_with(
    transport: &MemoryTransport,
    session: u8,
    connection: u16,
    connections: u16,
    change: impl FnOnce(&mut Hello),
) -> Source {
    let opened = transport.connect().await.unwrap();
    let (mut writer, reader) = (opened.writer.unwrap(), opened.reader.unwrap());
    let session = SessionId([session; 16]);
    let mut hello = Hello::bulk(session, connection, connections, connections, PageSize::DEFAULT, Vec::new());
    change(&mut hello);
    writer.write_all(&Message::Hello(hello).encode(0)).await.unwrap();
    Source { reader: FrameReader::new(reader, "test".into(), PageSize::DEFAULT), writer }
}

struct Source {
    reader: FrameReader<Box<dyn AsyncRead + Send + Unpin>>,
    writer: Writer,
}

impl Source {
    async fn refused(&mut self) -> Untrusted {
        let heard = tokio::time::timeout(HANG, self.reader.next()).await.expect("it hangs").unwrap();
        let Some(Incoming::Message { message: Message::Refused(why), .. }) = heard else { panic!("{heard:?}") };
        why
    }
}

#[tokio::test]
async fn a_migration_whose_connections_do_not_all_come_is_refused_with_the_reason() {
    let gathering = Gathering::start(Duration::from_millis(100)).await;
    let mut sources = [gathering.knock(1, 0, 3).await, gathering.knock(1, 2, 3).await];
    for source in &mut sources {
        let why = source.refused().await;
        assert!(why.contains("of the 3 connections of its migration came") && why.contains("hello_timeout"), "{why}");
    }
    let turned_away_events = gathering.ends_well().await;
    assert!(turned_away_events.iter().all(|(kind, ..)| *kind == TurnedAwayKind::Incomplete), "{turned_away_events:?}");
    assert!(turned_away_events[0].2.contains("of the 3 connections"), "{turned_away_events:?}");
}

#[tokio::test]
async fn what_a_stream_has_no_use_for_is_refused_at_once_with_the_reason() {
    let gathering = Gathering::start(2 * HANG).await;
    let urgent = |hello: &mut Hello| (hello.role, hello.bulk) = (ConnectionRole::Urgent, 1);
    let control = |hello: &mut Hello| (hello.role, hello.bulk) = (ConnectionRole::Control, 1);
    let mut refused = Vec::new();
    for mut source in [
        gathering.knock_with(1, 1, 2, urgent).await,
        gathering.knock_with(1, 1, 2, control).await,
        gathering.knock_with(1, 0, 2, |hello| hello.bulk = 1).await,
        gathering.knock_with(1, 0, 1, |hello| hello.features = vec!["checkpoints".into()]).await,
        gathering.knock_with(1, 0, 1, |hello| hello.features = vec!["postcopy".into()]).await,
        gathering.knock_with(1, 0, 2, |hello| (hello.features, hello.bulk) = (vec!["postcopy".into()], 1)).await,
    ] {
        refused.push(source.refused().await.to_string());
    }
    let reasons = [
        Refusal::Role(ConnectionRole::Urgent).to_string(),
        Refusal::Role(ConnectionRole::Control).to_string(),
        Refusal::OtherConnections { others: 1 }.to_string(),
        Refusal::Marks.to_string(),
        Refusal::OtherConnections { others: 0 }.to_string(),
        Refusal::UnsafePostcopy.to_string(),
    ];
    assert_eq!(refused, reasons);
    let turned_away_events = gathering.ends_well().await;
    assert!(turned_away_events.iter().all(|(kind, ..)| *kind == TurnedAwayKind::Unfit), "{turned_away_events:?}");
}

#[tokio::test]
async fn a_migration_of_which_a_connection_ends_is_refused_at_once() {
    let gathering = Gathering::start(2 * HANG).await;
    let mut early = gathering.knock(1, 0, 3).await;
    // Bytes that arrive early do not end it, and are not lost.
    early.writer.write_all(&Message::Ready.encode(0)).await.unwrap();
    let ending = gathering.knock(1, 2, 3).await;
    while gathering.accepted.load(Ordering::Relaxed) < 2 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(ending);
    let why = early.refused().await;
    assert!(why.contains("of the 3 connections of its migration came, and one of them has ended"), "{why}");
    assert!(gathering.knock(1, 1, 3).await.refused().await.contains("has ended"));
    let turned_away_events = gathering.ends_well().await;
    assert!(turned_away_events.iter().all(|(kind, ..)| *kind == TurnedAwayKind::Incomplete), "{turned_away_events:?}");
}

#[tokio::test]
async fn what_comes_before_a_migration_is_complete_is_not_lost() {
    let gathering = Gathering::start(2 * HANG).await;
    let mut early = gathering.knock(1, 0, 2).await;
    early.writer.write_all(&Message::Ready.encode(0)).await.unwrap();
    while gathering.accepted.load(Ordering::Relaxed) < 1 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let _other = gathering.knock(1, 1, 2).await;
    let session = tokio::time::timeout(HANG, gathering.task).await.expect("it hangs").unwrap();
    let mut gathered = session.unwrap_or_else(|_| panic!("no session"));
    let heard = gathered.0.readers[0].next().await.unwrap();
    assert!(matches!(heard, Some(Incoming::Message { message: Message::Ready, .. })), "{heard:?}");
}

#[tokio::test]
async fn a_migration_that_cannot_become_complete_for_want_of_descriptors_is_refused_once_and_the_next_is_taken() {
    let gathering = Gathering::start(HANG).await;
    let mut sources = [gathering.knock(1, 0, 3).await, gathering.knock(1, 1, 3).await];
    while gathering.accepted.load(Ordering::Relaxed) < 2 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    gathering.is_short.store(true, Ordering::Relaxed);
    let why = sources[0].refused().await;
    assert!(why.contains("of the 3 connections") && why.contains("cannot accept a connection"), "{why}");
    gathering.is_short.store(false, Ordering::Relaxed);
    assert!(sources[1].refused().await.contains("cannot accept a connection"));
    // The third was still in flight.
    assert!(gathering.knock(1, 2, 3).await.refused().await.contains("of the 3 connections"));
    let turned_away_events = gathering.ends_well().await;
    assert!(
        turned_away_events.len() <= 2 && turned_away_events.iter().all(|(kind, ..)| *kind == TurnedAwayKind::Shortage),
        "{turned_away_events:?}"
    );
}

#[tokio::test]
async fn a_want_of_descriptors_is_reported_once() {
    let gathering = Gathering::start(HANG).await;
    gathering.is_short.store(true, Ordering::Relaxed);
    while gathering.turned_away_events.lock().unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(gathering.turned_away_events.lock().unwrap().len(), 1);
    gathering.is_short.store(false, Ordering::Relaxed);
    let turned_away_events = gathering.ends_well().await;
    let (first, left) = (&turned_away_events[0], &turned_away_events[1]);
    assert!(
        (first.0, first.1, turned_away_events.len()) == (TurnedAwayKind::Shortage, 1, 2) && left.1 > 1,
        "{turned_away_events:?}"
    );
    assert!(first.2.contains("ulimit -n"), "{turned_away_events:?}");
}

#[tokio::test]
async fn while_a_guest_is_received_another_source_is_told_so_and_the_listener_stays() {
    let gathering = Gathering::start(HANG).await;
    let mut incomplete = gathering.knock(1, 0, 2).await;
    let _first = gathering.knock(2, 0, 1).await;
    let Gathering { transport, task, turned_away_events, turned_away, .. } = gathering;
    let (session, door) = *tokio::time::timeout(HANG, task).await.expect("it hangs").unwrap().unwrap();
    assert_eq!(session.hello.session, SessionId([2; 16]));
    assert!(incomplete.refused().await.contains("a guest is received from"));
    let refusing = tokio::spawn(door.await_return(mpsc::channel(1).0));
    for number in 3..6 {
        let mut late = knock(&transport, number, 0, 1).await;
        assert!(late.refused().await.contains("try again when it has arrived"));
    }
    refusing.abort();
    assert!(refusing.await.unwrap_err().is_cancelled());
    turned_away.finish();
    let kinds: Vec<_> = turned_away_events.lock().unwrap().iter().map(|(kind, count, _)| (*kind, *count)).collect();
    assert_eq!(kinds, [(TurnedAwayKind::Busy, 1), (TurnedAwayKind::Busy, 3)]);
}

/// A connection of a source that returns with this secret, as this attempt. Whether it is challenged, and how it is refused.
async fn returns(
    transport: &MemoryTransport,
    attempt: u32,
    secret: &Secret,
    change: impl FnOnce(&mut Hello),
) -> (Source, Option<Untrusted>) {
    let mut sent = None;
    let mut source = knock_with(transport, 2, 0, 1, |hello| {
        (hello.attempt, hello.nonce) = (attempt, Nonce([u8::try_from(attempt).unwrap(); 32]));
        change(hello);
        sent = Some(hello.clone());
    })
    .await;
    let hello = sent.expect("it was sent");
    let heard = tokio::time::timeout(HANG, source.reader.next()).await.expect("it hangs").unwrap();
    let nonce = match heard {
        Some(Incoming::Message { message: Message::Challenge { nonce, .. }, .. }) => nonce,
        Some(Incoming::Message { message: Message::Refused(why), .. }) => return (source, Some(why)),
        other => panic!("{other:?}"),
    };
    let meeting = Meeting::of(&hello, nonce);
    source.writer.write_all(&Message::Proof(secret.prove(Prover::Source, &meeting)).encode(0)).await.unwrap();
    (source, None)
}

#[tokio::test]
async fn the_source_that_was_lost_returns_and_nobody_in_its_place() {
    let secret = Secret::from([7; 32]);
    let gathering = Gathering::start(HANG).await;
    let _first = gathering.knock(2, 0, 1).await;
    let Gathering { transport, task, turned_away_events, turned_away, .. } = gathering;
    let (session, door) = *tokio::time::timeout(HANG, task).await.expect("it hangs").unwrap().unwrap();
    let known = door.reception.known.clone();
    let (returned, mut returning) = mpsc::channel(1);
    let waiting = tokio::spawn(door.await_return(returned));

    // It has not sent its secret yet.
    let (_, refused) = returns(&transport, 2, &secret, |_| ()).await;
    assert_eq!(refused, Some(Refusal::NotLost.to_string().into()));
    known.learn(&session.hello, session.identity, secret.clone(), HANG);

    let (mut stranger, refused) = returns(&transport, 2, &Secret::from([8; 32]), |_| ()).await;
    assert_eq!((refused, stranger.refused().await), (None, Refusal::NotProven.to_string().into()));
    let (_, refused) = returns(&transport, 2, &secret, |hello| hello.session = SessionId([9; 16])).await;
    assert_eq!(refused, Some(Refusal::NotLost.to_string().into()));
    let (_, refused) = returns(&transport, 2, &secret, |hello| hello.features = vec!["lz4".into()]).await;
    assert_eq!(refused, Some(Refusal::Contradicts.to_string().into()));

    let (_source, refused) = returns(&transport, 5, &secret, |_| ()).await;
    let session = tokio::time::timeout(HANG, returning.recv()).await.expect("it hangs").expect("it listens");
    assert_eq!((refused, session.hello.attempt), (None, 5));
    for attempt in [5, 4, 0] {
        let (_, refused) = returns(&transport, attempt, &secret, |_| ()).await;
        assert_eq!(refused, Some(Refusal::OldAttempt { attempt, latest: 5 }.to_string().into()));
    }
    // None of that has closed the door.
    let (_source, _) = returns(&transport, 6, &secret, |_| ()).await;
    let session = tokio::time::timeout(HANG, returning.recv()).await.expect("it hangs").expect("it listens");
    assert_eq!(session.hello.attempt, 6);
    waiting.abort();
    turned_away.finish();
    let turned_away_events = turned_away_events.lock().unwrap();
    let not_proven = turned_away_events.iter().filter(|(kind, ..)| *kind == TurnedAwayKind::NotProven);
    assert_eq!(not_proven.map(|(_, count, _)| count).sum::<u64>(), 6);
}

fn identity(byte: u8) -> Option<Identity> {
    Some(Identity::of_digest([byte; 32]))
}

#[tokio::test]
async fn every_connection_of_a_migration_shows_the_same_certificate() {
    let gathering = Gathering::start(HANG).await;
    let certificate = gathering.certificate.clone();
    *certificate.lock().unwrap() = identity(1);
    let _first = gathering.knock(2, 0, 2).await;
    while gathering.accepted.load(Ordering::Relaxed) < 1 {
        tokio::task::yield_now().await;
    }
    for other in [identity(2), None] {
        *certificate.lock().unwrap() = other;
        let mut stranger = gathering.knock(2, 1, 2).await;
        assert_eq!(stranger.refused().await, Refusal::OtherPeer(Earlier::Connection).to_string());
    }
    *certificate.lock().unwrap() = identity(1);
    let _second = gathering.knock(2, 1, 2).await;
    let Gathering { task, turned_away, turned_away_events, .. } = gathering;
    let (session, _door) = *tokio::time::timeout(HANG, task).await.expect("it hangs").unwrap().unwrap();
    assert_eq!((session.identity, session.readers.len()), (identity(1), 2));
    turned_away.finish();
    let turned_away_events = turned_away_events.lock().unwrap();
    assert!(turned_away_events.iter().all(|(kind, ..)| *kind == TurnedAwayKind::NotProven), "{turned_away_events:?}");
}

#[tokio::test]
async fn a_source_that_returns_shows_the_certificate_that_it_had() {
    let secret = Secret::from([7; 32]);
    let gathering = Gathering::start(HANG).await;
    let certificate = gathering.certificate.clone();
    *certificate.lock().unwrap() = identity(1);
    let _first = gathering.knock(2, 0, 1).await;
    let Gathering { transport, task, .. } = gathering;
    let (session, door) = *tokio::time::timeout(HANG, task).await.expect("it hangs").unwrap().unwrap();
    door.reception.known.learn(&session.hello, session.identity, secret.clone(), HANG);
    let (returned, mut returning) = mpsc::channel(1);
    let waiting = tokio::spawn(door.await_return(returned));
    for other in [identity(2), None] {
        *certificate.lock().unwrap() = other;
        // Though it has the secret.
        let (_, refused) = returns(&transport, 2, &secret, |_| ()).await;
        assert_eq!(refused, Some(Refusal::OtherPeer(Earlier::LostSource).to_string().into()));
    }
    *certificate.lock().unwrap() = identity(1);
    let (_source, refused) = returns(&transport, 2, &secret, |_| ()).await;
    assert_eq!(refused, None);
    let session = tokio::time::timeout(HANG, returning.recv()).await.expect("it hangs").expect("it listens");
    assert_eq!((session.hello.attempt, session.identity), (2, identity(1)));
    waiting.abort();
}

/// In virtual time: a thousand clients that send nothing are there before the real peer, which comes behind them.
#[tokio::test(start_paused = true)]
async fn a_thousand_silent_clients_delay_the_real_peer_by_less_than_a_second() {
    let gathering = Gathering::start(Duration::from_secs(30)).await;
    let transport = gathering.transport.clone();
    let silent = tokio::spawn(async move {
        let connecting = (0..1000).map(|_| transport.connect());
        let _silent = futures::future::join_all(connecting).await;
        std::future::pending::<()>().await;
    });
    while gathering.accepted.load(Ordering::Relaxed) < waiting::MAX_GREETED {
        tokio::task::yield_now().await;
    }
    let begun = Instant::now();
    let _source = gathering.knock(9, 0, 1).await;
    let gathered = tokio::time::timeout(HANG, gathering.task).await.expect("it hangs").unwrap();
    assert_eq!(gathered.unwrap_or_else(|_| panic!("no session")).0.hello.session, SessionId([9; 16]));
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    silent.abort();
}
