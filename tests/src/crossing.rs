//! A migration through a [`Proxy`] whose connections are cut, and what must hold for every such migration.

use std::sync::Arc;
use std::time::Duration;

use memferry::events::{Ended, Event, Outcome, Phase, Role};
use memferry::guest::SourceGuest;
use memferry::settings::{DestinationSettings, RecoverySettings, SourceSettings};
use memferry_transports::{Address, Listener, Transport, open};
use memferry_transports_tls::{TlsSettings, TlsTransport, trial};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::TestGuest;
use crate::guest::GuestCall;
use crate::proxy::{Plan, Proxy};
use crate::run::{self, Expected, Recorder, destination_settings, source_settings};

/// No migration here takes this long unless it hangs.
const HANG: Duration = Duration::from_secs(60);
/// How long a source may try to reach an address before the try fails.
const CONNECT: Duration = Duration::from_millis(500);
/// How long a destination whose guest has started may wait for a source that needs it no more, before the test leaves it.
const LINGERS: Duration = Duration::from_secs(1);

/// Recovery that no fault of a plan exhausts.
pub const RECOVERY: RecoverySettings =
    RecoverySettings { attempts: 20, backoff: Duration::from_millis(20), give_up: Duration::from_secs(20) };

/// What the connections are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// TCP on the loopback interface.
    Tcp,
    /// Unix sockets.
    Unix,
    /// TLS over TCP.
    TlsTcp,
    /// TLS over Unix sockets.
    TlsUnix,
}

/// The transports of both ends: plain, or TLS over them.
#[derive(Debug)]
struct Opener {
    /// The folder of the certificates.
    certificates: Option<TempDir>,
}

impl Opener {
    fn new(way: Way) -> Self {
        let with_tls = matches!(way, Way::TlsTcp | Way::TlsUnix);
        let certificates = with_tls.then(|| {
            let folder = tempfile::tempdir().expect("a folder for certificates");
            trial::write(folder.path(), &["localhost".into()]).expect("certificates");
            folder
        });
        Self { certificates }
    }

    fn open(&self, address: &Address) -> Box<dyn Transport> {
        let plain = open(address, CONNECT);
        match &self.certificates {
            Some(folder) => {
                let settings = TlsSettings { directory: Some(folder.path().to_owned()), ..TlsSettings::default() };
                Box::new(TlsTransport::new(plain, settings, CONNECT))
            }
            None => plain,
        }
    }
}

/// The plain address of a listener, where a proxy finds it.
fn plain(address: &str) -> Address {
    let address: Address = address.parse().expect("the address of a listener");
    address.beneath().unwrap_or(address)
}

type Hook = Box<dyn Fn(Role, &Event) + Send + Sync>;

/// A migration that has not begun: both ends and the proxy between them.
pub struct Crossing {
    /// The proxy.
    pub proxy: Arc<Proxy>,
    /// The source's settings.
    pub source: SourceSettings,
    /// The destination's settings.
    pub destination: DestinationSettings,
    listener: Box<dyn Listener>,
    hook: Hook,
    opener: Opener,
    folder: TempDir,
}

impl std::fmt::Debug for Crossing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a crossing over {:?}", self.proxy)
    }
}

impl Crossing {
    /// The destination listens behind a proxy with this plan. One connection for each lane; both ends recover.
    ///
    /// # Panics
    /// If it cannot listen.
    pub async fn new(way: Way, lanes: u16, plan: Plan) -> Self {
        let folder = tempfile::tempdir().expect("a folder for a test");
        let [front, back] = ["front", "back"].map(|name| match way {
            Way::Tcp | Way::TlsTcp => Address::Tcp { host: "127.0.0.1".into(), port: 0 },
            Way::Unix | Way::TlsUnix => Address::Unix(folder.path().join(name)),
        });
        let opener = Opener::new(way);
        let listener = opener.open(&back).listen().await.expect("a transport that listens");
        let back = plain(&listener.local_address());
        let proxy = Arc::new(Proxy::begin(&front, back, plan).await.expect("a proxy"));
        let source = SourceSettings { recovery: RECOVERY, ..source_settings(lanes, lanes) };
        let destination = DestinationSettings { recovery: RECOVERY, ..destination_settings() };
        Self { proxy, source, destination, listener, hook: Box::new(|_, _| ()), opener, folder }
    }

    /// Sets how recovery is done, at both ends.
    #[must_use]
    pub fn recovering(mut self, recovery: RecoverySettings) -> Self {
        (self.source.recovery, self.destination.recovery) = (recovery, recovery);
        self
    }

    /// Calls `hook` at every event.
    #[must_use]
    pub fn calling(self, hook: impl Fn(Role, &Event) + Send + Sync + 'static) -> Self {
        Self { hook: Box::new(hook), ..self }
    }

    /// Begins the migration.
    #[must_use]
    pub fn begin(self, source: Arc<dyn SourceGuest>, destination: impl Expected) -> Underway {
        let (events, hook) = (watch::Sender::new(0), self.hook);
        let counted = events.clone();
        let recorder = Arc::new(Recorder::calling(move |role, event| {
            hook(role, event);
            counted.send_modify(|events| *events += 1);
        }));
        let [cancel_source, cancel_destination] = [(); 2].map(|()| CancellationToken::new());
        let way: Arc<dyn Transport> = self.opener.open(self.proxy.address()).into();
        let behind = self.listener.local_address();
        let sending = run::source(source, way, self.source, recorder.clone(), cancel_source.clone());
        let receiving = run::destination(
            destination,
            self.listener,
            self.destination,
            recorder.clone(),
            cancel_destination.clone(),
        );
        Underway {
            proxy: self.proxy,
            recorder,
            events,
            cancel_source,
            cancel_destination,
            source: tokio::spawn(sending),
            destination: tokio::spawn(receiving),
            behind,
            opener: self.opener,
            folder: self.folder,
        }
    }

    /// Runs the migration to its end.
    pub async fn run(self, source: Arc<dyn SourceGuest>, destination: impl Expected) -> Crossed {
        self.begin(source, destination).end().await
    }
}

/// A migration that runs.
pub struct Underway {
    /// The proxy.
    pub proxy: Arc<Proxy>,
    /// Cancels the source.
    pub cancel_source: CancellationToken,
    /// Cancels the destination.
    pub cancel_destination: CancellationToken,
    /// The source.
    pub source: JoinHandle<Ended>,
    /// The destination.
    pub destination: JoinHandle<Ended>,
    recorder: Arc<Recorder>,
    events: watch::Sender<u64>,
    behind: String,
    opener: Opener,
    folder: TempDir,
}

impl std::fmt::Debug for Underway {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a migration over {:?}, {:?}", self.proxy, self.recorder)
    }
}

impl Underway {
    /// The events so far.
    #[must_use]
    pub fn events(&self) -> Vec<(Role, Event)> {
        self.recorder.events()
    }

    /// A transport to the destination itself, past the proxy.
    ///
    /// # Panics
    /// If the listener has no address.
    #[must_use]
    pub fn past_the_proxy(&self) -> Box<dyn Transport> {
        self.opener.open(&plain(&self.behind))
    }

    /// Waits for an event of one end. It may have come already.
    ///
    /// # Panics
    /// If it does not come.
    pub async fn until(&self, what: &str, of: Role, is_it: impl Fn(&Event) -> bool) {
        let mut changes = self.events.subscribe();
        let waiting = async {
            loop {
                changes.borrow_and_update();
                let events = self.events();
                let mut own = events.iter().filter(|(role, _)| *role == of).map(|(_, event)| event);
                if own.clone().any(&is_it) {
                    return;
                }
                let ended = own.find(|event| matches!(event, Event::Ended(_)));
                assert!(ended.is_none(), "it ended without {what}: {ended:?}, {:?}", self.proxy);
                changes.changed().await.expect("the sender is here");
            }
        };
        timeout(HANG, waiting).await.unwrap_or_else(|_| panic!("in vain waited for: {what}, {self:?}"));
    }

    /// Waits until the source has lost its connection.
    ///
    /// # Panics
    /// If it does not.
    pub async fn until_disconnected(&self) {
        self.until("the loss", Role::Source, |event| matches!(event, Event::Disconnected { .. })).await;
    }

    /// Waits for both ends. A destination that waits for a source that has ended without it is cancelled.
    ///
    /// # Panics
    /// If the migration hangs, or an end panics.
    pub async fn end(self) -> Crossed {
        self.ended(true).await
    }

    /// Waits for both ends, which end by themselves.
    ///
    /// # Panics
    /// If the migration hangs, or an end panics.
    pub async fn end_by_themselves(self) -> Crossed {
        self.ended(false).await
    }

    async fn ended(mut self, cancels: bool) -> Crossed {
        let hangs = |what: &str| format!("{what} hangs: {:?}, {:?}", self.proxy, self.recorder);
        let source = timeout(HANG, &mut self.source).await.unwrap_or_else(|_| panic!("{}", hangs("the source")));
        let source = source.expect("the source does not panic");
        if cancels && matches!(source.outcome, Outcome::Failed | Outcome::Cancelled) {
            self.cancel_destination.cancel();
        }
        let patience = if source.outcome == Outcome::Completed { LINGERS } else { HANG };
        let destination = timeout(patience, &mut self.destination).await;
        assert!(destination.is_ok() || source.outcome == Outcome::Completed, "{}", hangs("the destination"));
        self.destination.abort();
        let destination = destination.ok().map(|ended| ended.expect("the destination does not panic"));
        Crossed { source, destination, events: self.recorder.events(), proxy: self.proxy, folder: self.folder }
    }
}

/// A migration that has ended.
#[derive(Debug)]
pub struct Crossed {
    /// The source's end.
    pub source: Ended,
    /// The destination's end; `None` if it still waited, with its guest started, for a source that has ended.
    pub destination: Option<Ended>,
    /// All events, in order.
    pub events: Vec<(Role, Event)>,
    /// The proxy.
    pub proxy: Arc<Proxy>,
    folder: TempDir,
}

impl Crossed {
    /// The source's events that a function selects.
    pub fn of_source<T>(&self, select: impl Fn(&Event) -> Option<T>) -> Vec<T> {
        let selected = |(role, event): &(Role, Event)| if *role == Role::Source { select(event) } else { None };
        self.events.iter().filter_map(selected).collect()
    }

    /// The files that are left in the folder of the sockets, without the proxy's own.
    ///
    /// # Panics
    /// If the folder cannot be read.
    #[must_use]
    pub fn left(&self) -> Vec<std::ffi::OsString> {
        let entries = self.folder.path().read_dir().expect("the folder of a test");
        entries.map(|entry| entry.expect("an entry").file_name()).filter(|name| name != "front").collect()
    }

    /// Did the source send pages? The connection can be made again from then on.
    #[must_use]
    pub fn was_active(&self) -> bool {
        self.events.contains(&(Role::Source, Event::Phase(Phase::Active)))
    }

    /// Asserts that the figures of the outages agree with the events.
    ///
    /// # Panics
    /// If they do not.
    #[track_caller]
    pub fn check_outages(&self) {
        let outages = self.source.outages;
        let lost = self.of_source(|event| match event {
            Event::Disconnected { attempt, .. } => Some(*attempt),
            _ => None,
        });
        let regained = self.of_source(|event| match event {
            Event::Reconnected { attempt, outage, put_back_bytes } => Some((*attempt, *outage, *put_back_bytes)),
            _ => None,
        });
        let disconnected = self.of_source(|event| (*event == Event::Phase(Phase::Disconnected)).then_some(()));
        assert_eq!(outages.lost as usize, lost.len(), "{self:?}");
        assert_eq!(disconnected.len(), lost.len(), "{self:?}");
        assert!((lost.len().saturating_sub(1)..=lost.len()).contains(&regained.len()), "{self:?}");
        assert!(lost.first().is_none_or(|&attempt| attempt == 1), "{self:?}");
        let attempts = lost.iter().copied().zip(regained.iter().map(|it| it.0)).flat_map(|(end, next)| [end, next]);
        assert!(attempts.collect::<Vec<_>>().is_sorted(), "{self:?}");
        assert!(lost.iter().zip(&regained).all(|(end, (next, ..))| end < next), "{self:?}");
        assert_eq!(outages.put_back_bytes, regained.iter().map(|it| it.2).sum::<u64>(), "{self:?}");
        assert!(outages.time >= regained.iter().map(|it| it.1).sum::<Duration>(), "{self:?}");
        assert!(!lost.is_empty() || outages.time.is_zero(), "{self:?}");
        let there = self.destination.as_ref().map_or(0, |ended| ended.outages.put_back_bytes);
        assert_eq!(there, 0, "{self:?}");
    }

    /// Asserts law 7 for guests that had received no call before: never two run, and if none does, an end reports it.
    ///
    /// # Panics
    /// If the law was violated.
    #[track_caller]
    pub fn check_law_seven(&self, source: &TestGuest, destination: &TestGuest) {
        let calls = source.calls();
        let context = format!("calls {calls:?}, {:?}: {self:?}", destination.calls());
        let count = |of: &[GuestCall], what| of.iter().filter(|&&call| call == what).count();
        let starts = count(&destination.calls(), GuestCall::Start);
        let [pauses, resumes] = [GuestCall::Pause, GuestCall::Resume].map(|call| count(&calls, call));
        assert!(!(source.runs() && destination.runs()), "two run: {context}");
        assert!(starts <= 1, "started twice: {context}");
        assert!(starts == 0 || calls.contains(&GuestCall::Committed), "started before Go: {context}");
        assert!(!source.log().is_armed(), "the log was not stopped: {context}");
        assert_eq!(source.log().misused(), None, "{context}");
        let there = self.destination.as_ref().map(|ended| ended.outcome);
        match self.source.outcome {
            Outcome::Completed => {
                assert!(starts == 1 && !source.runs() && pauses == resumes + 1, "{context}");
                assert!(there.is_none_or(|there| there == Outcome::Completed), "{context}");
            }
            Outcome::Unconfirmed => {
                assert!(!source.runs() && pauses == resumes + 1 && calls.contains(&GuestCall::Committed), "{context}");
            }
            Outcome::Lost => assert!(starts == 1 && !source.runs(), "{context}"),
            Outcome::Failed | Outcome::Cancelled => {
                assert!(starts == 0 && there != Some(Outcome::Completed) && pauses == resumes, "{context}");
                assert!(self.source.error.is_some(), "{context}");
                source.wait_for_writes();
            }
        }
    }

    /// Asserts that it completed, verified, every byte arrived, and no connection was lost that the proxy did not break.
    ///
    /// # Panics
    /// If not.
    #[track_caller]
    pub fn check_completed(&self, source: &TestGuest, destination: &TestGuest) {
        self.check_arrived(source, destination);
        assert!(self.source.outages.lost as usize <= self.proxy.breaks(), "{self:?}");
    }

    /// As [`Crossed::check_completed`], where a slow machine may lose more connections than the proxy breaks.
    ///
    /// # Panics
    /// If not.
    #[track_caller]
    pub fn check_arrived(&self, source: &TestGuest, destination: &TestGuest) {
        assert_eq!((self.source.outcome, &self.source.error), (Outcome::Completed, &None), "{self:?}");
        self.check_law_seven(source, destination);
        self.check_outages();
        assert_eq!(self.source.verified, Some(true), "{self:?}");
        assert!(self.destination.as_ref().is_none_or(|ended| ended.verified == Some(true)), "{self:?}");
        assert!(source.bytes() == destination.bytes(), "the two memories differ: {self:?}");
    }
}
