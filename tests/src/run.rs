//! Runs both ends of a migration in one process.

use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use memferry::control::Control;
use memferry::events::{Ended, Event, Observer, Observers, Outcome, Role};
use memferry::guest::hints::PageHinter;
use memferry::guest::{DestinationGuest, Guest, GuestBuilder, GuestError, GuestState, RunState, SourceGuest};
use memferry::migration::{DataPlane, ReceiveError, Received, RunsHere, SendError, Sent, receive, send};
use memferry::settings::{
    ConvergenceSettings, DestinationSettings, EncoderSettings, OnDeadline, OnMiss, RecoverySettings, SourceSettings,
    SwitchoverBandwidth, Verify, XbzrleSettings,
};
use memferry_guests::workload::WorkloadBuilder;
use memferry_stages::codec::Codec;
use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::memory::GuestMemory;
use memferry_transports::{Address, Listener, Transport, open};
use tokio_util::sync::CancellationToken;

use crate::guest::{GuestCall, TestGuest};

/// The outcome at both ends of a migration, and the events on the way.
#[derive(Debug)]
pub struct Ends {
    /// The source's end.
    pub source: Ended,
    /// The destination's end.
    pub destination: Ended,
    /// All events, in order.
    pub events: Vec<(Role, Event)>,
}

impl Ends {
    /// Asserts law 7: the source survives everything, never two run, and if none runs an end reports it. Neither
    /// guest received a call before this migration, and the source ran.
    ///
    /// # Panics
    /// If the law was violated.
    #[track_caller]
    pub fn check_law_seven(&self, source: &TestGuest, destination: &TestGuest) {
        let (calls, phase) = (source.calls(), self.source.outcome);
        let context = format!("{:?}, {:?}, calls {calls:?}", self.source.error, self.destination.error);
        let starts = destination.calls().iter().filter(|&&call| call == GuestCall::Start).count();
        assert!(!(source.runs() && destination.runs()), "two run: {context}");
        assert!(starts <= 1, "started twice: {context}");
        assert!(starts == 0 || calls.contains(&GuestCall::Committed), "started before Go: {context}");
        assert!(!source.log().is_armed(), "the log was not stopped: {context}");
        assert_eq!(source.log().misused(), None, "{context}");
        match phase {
            Outcome::Completed => assert!(starts == 1 && !source.runs(), "{context}"),
            Outcome::Unconfirmed => {
                assert!(!source.runs() && calls.contains(&GuestCall::Committed), "{context}");
                assert!(context.contains("look at the destination"), "{context}");
            }
            _ => {
                assert!(starts == 0 && self.destination.outcome != Outcome::Completed, "{phase:?}: {context}");
                assert!(self.source.error.is_some() && self.destination.error.is_some(), "{context}");
                let was = |what| calls.contains(&what);
                assert_eq!(was(GuestCall::Pause), was(GuestCall::Resume), "{context}");
                assert_eq!(was(GuestCall::Resume), self.source.downtime.is_some(), "{context}");
                assert!(!was(GuestCall::Moved), "{context}");
                assert_eq!(was(GuestCall::Release), was(GuestCall::Reacquire), "{context}");
                source.wait_for_writes();
            }
        }
    }
}

/// Records all events, and calls a hook if there is one.
#[derive(Default)]
pub struct Recorder {
    events: Mutex<Vec<(Role, Event)>>,
    hook: Option<Hook>,
}

type Hook = Box<dyn Fn(Role, &Event) + Send + Sync>;

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.events)
    }
}

impl Recorder {
    /// A recorder that calls `hook` at every event, on the control plane.
    pub fn calling(hook: impl Fn(Role, &Event) + Send + Sync + 'static) -> Self {
        Self { events: Mutex::default(), hook: Some(Box::new(hook)) }
    }

    /// The events so far.
    #[must_use]
    pub fn events(&self) -> Vec<(Role, Event)> {
        self.events.lock().unwrap().clone()
    }
}

impl Observer for Recorder {
    fn event(&self, role: Role, event: &Event) {
        self.events.lock().unwrap().push((role, event.clone()));
        if let Some(hook) = &self.hook {
            hook(role, event);
        }
    }
}

/// Settings for tests: all features on, limits that a busy machine meets.
#[must_use]
pub fn source_settings(lanes: u16, connections: u16) -> SourceSettings {
    SourceSettings {
        lanes,
        connections,
        encoder: EncoderSettings {
            compress: Some(Codec::Lz4),
            xbzrle: Some(XbzrleSettings { cache_bytes: 16 << 20, on_miss: OnMiss::Auto, cache_first_round: true }),
        },
        checksum: true,
        max_bandwidth: None,
        switchover_bandwidth: SwitchoverBandwidth::AsRounds,
        downtime_limit: Duration::from_millis(300),
        max_downtime: None,
        expected_pause: Duration::from_micros(250),
        expected_prepare: Duration::from_micros(250),
        expected_start: Duration::from_micros(250),
        max_rounds: 4,
        deadline: None,
        on_deadline: OnDeadline::SwitchOver,
        convergence: ConvergenceSettings::default(),
        verify: Verify::Pages,
        after: None,
        max_state_bytes: memferry::settings::MAX_STATE_BYTES,
        handover_timeout: Duration::from_secs(20),
        peer_timeout: Duration::from_secs(30),
        // A test that loses a connection on purpose sees it lost.
        recovery: RecoverySettings::OFF,
        ..SourceSettings::default()
    }
}

/// Settings of a destination for tests.
#[must_use]
pub fn destination_settings() -> DestinationSettings {
    DestinationSettings {
        page_size: None,
        max_lanes: 64,
        require_verify: false,
        hello_timeout: Duration::from_secs(10),
        max_state_bytes: memferry::settings::MAX_STATE_BYTES,
        handover_timeout: Duration::from_secs(20),
        peer_timeout: Duration::from_secs(30),
        // A test that loses a connection on purpose sees it lost.
        recovery: RecoverySettings::OFF,
    }
}

/// A migration that runs while it is polled. It is boxed, so that it is compiled here and not again in every test.
pub type Running<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// A test's guest that exists before it is built, so that the test can inspect it whatever the outcome.
pub trait Arrives: DestinationGuest {
    /// See [`GuestBuilder::build`].
    ///
    /// # Errors
    /// See there.
    fn build(&self, page_size: PageSize, blocks: &[BlockInfo], setup: &GuestState) -> Result<(), GuestError>;
}

/// The guest to arrive in a test: a builder, or a guest that [`Arrives`].
pub trait Expected: Send + 'static {
    /// Its builder, type-erased.
    fn builder(self) -> AnyBuilder;
}

/// A builder, type-erased.
pub type AnyBuilder = Box<dyn FnOnce(PageSize, &[BlockInfo], &GuestState) -> Result<Arc<AnyGuest>, GuestError> + Send>;

/// A guest that was built, type-erased.
#[derive(Debug)]
pub struct AnyGuest(Arc<dyn DestinationGuest>);

impl Guest for AnyGuest {
    fn memory(&self) -> GuestMemory {
        self.0.memory()
    }

    fn page_hinters(&self) -> Vec<Arc<dyn PageHinter>> {
        self.0.page_hinters()
    }

    fn can_be_userfaulted(&self) -> Result<(), GuestError> {
        self.0.can_be_userfaulted()
    }

    fn mapping_is_exclusive(&self) -> Result<(), GuestError> {
        self.0.mapping_is_exclusive()
    }
}

impl DestinationGuest for AnyGuest {
    fn make_durable(&self) -> Result<(), GuestError> {
        self.0.make_durable()
    }

    fn prepare(&self, state: &GuestState) -> Result<(), GuestError> {
        self.0.prepare(state)
    }

    fn unprepare(&self) -> Result<(), GuestError> {
        self.0.unprepare()
    }

    fn start(&self, run_state: RunState) -> Result<(), GuestError> {
        self.0.start(run_state)
    }
}

impl<G: Arrives + 'static> Expected for Arc<G> {
    fn builder(self) -> AnyBuilder {
        Box::new(move |page_size, blocks, setup| {
            self.build(page_size, blocks, setup)?;
            Ok(Arc::new(AnyGuest(self)))
        })
    }
}

impl Expected for AnyBuilder {
    fn builder(self) -> AnyBuilder {
        self
    }
}

impl Expected for WorkloadBuilder {
    fn builder(self) -> AnyBuilder {
        keeping(self).0
    }
}

/// A builder that lets a test access the guest it builds, whatever the outcome.
pub fn keeping<B: GuestBuilder>(builder: B) -> (AnyBuilder, Arc<OnceLock<Arc<B::Built>>>) {
    let built = Arc::new(OnceLock::new());
    let keep = built.clone();
    let builder: AnyBuilder = Box::new(move |page_size, blocks, setup| {
        let guest = builder.build(page_size, blocks, setup)?;
        keep.set(guest.clone()).expect("a builder builds once");
        Ok(Arc::new(AnyGuest(guest)))
    });
    (builder, built)
}

/// The figures, after the result is compared with them.
fn sent(result: Result<Sent, SendError>) -> Ended {
    let here = result.as_ref().map_or_else(SendError::guest_runs_here, Sent::guest_runs_here);
    let ended = match &result {
        Ok(sent) => sent.ended.clone(),
        Err(error) => error.ended().expect("settings of a test can be").clone(),
    };
    let context = format!("{result:?}");
    match &result {
        Ok(_) => assert_eq!((ended.outcome, ended.resume_failed), (Outcome::Completed, false), "{context}"),
        Err(SendError::Failed { .. }) => assert_eq!(ended.outcome, Outcome::Failed, "{context}"),
        Err(SendError::Cancelled { .. }) => assert_eq!(ended.outcome, Outcome::Cancelled, "{context}"),
        Err(SendError::Unconfirmed { .. }) => assert_eq!(ended.outcome, Outcome::Unconfirmed, "{context}"),
        Err(SendError::Lost { .. }) => assert_eq!(ended.outcome, Outcome::Lost, "{context}"),
        Err(SendError::ResumeFailed { .. }) => assert!(ended.resume_failed, "{context}"),
        Err(other) => panic!("{other:?}"),
    }
    assert_eq!(here == RunsHere::ResumeFailed, ended.resume_failed, "{context}");
    assert_eq!(here == RunsHere::Unknown, ended.outcome == Outcome::Unconfirmed, "{context}");
    ended
}

/// The figures, after the result is compared with them.
fn received<G: std::fmt::Debug>(result: Result<Received<G>, ReceiveError>) -> Ended {
    let (expected, ended) = match &result {
        Ok(received) => (Outcome::Completed, Some(&received.ended)),
        Err(error @ ReceiveError::Cancelled { .. }) => (Outcome::Cancelled, error.ended()),
        Err(error) => (Outcome::Failed, error.ended()),
    };
    let ended = ended.expect("settings of a test can be").clone();
    assert_eq!(ended.outcome, expected, "{result:?}");
    ended
}

/// Runs the source's end alone.
pub fn source(
    guest: Arc<dyn SourceGuest>,
    transport: Arc<dyn Transport>,
    settings: SourceSettings,
    recorder: Arc<Recorder>,
    control: impl Into<Control>,
) -> Running<Ended> {
    let control = control.into();
    Box::pin(async move {
        let plane = DataPlane::new().expect("threads for a test");
        let observers = Observers::new(Role::Source, vec![recorder as Arc<dyn Observer>]);
        sent(send(guest, transport, settings, &plane, observers, control).await)
    })
}

/// Runs the destination's end alone.
pub fn destination(
    guest: impl Expected,
    listener: Box<dyn Listener>,
    settings: DestinationSettings,
    recorder: Arc<Recorder>,
    control: impl Into<Control>,
) -> Running<Ended> {
    let (builder, control) = (guest.builder(), control.into());
    Box::pin(async move {
        let plane = DataPlane::new().expect("threads for a test");
        let observers = Observers::new(Role::Destination, vec![recorder as Arc<dyn Observer>]);
        received(receive(builder, listener, settings, &plane, observers, control).await)
    })
}

/// Migrates `source` to `destination` over `transport`; a stored stream is first written and then read.
pub fn migrate(
    source: Arc<dyn SourceGuest>,
    destination: impl Expected,
    transport: Arc<dyn Transport>,
    settings: SourceSettings,
    control: impl Into<Control>,
) -> Running<Ends> {
    migrate_watched(source, destination, transport, settings, control, Recorder::default())
}

/// As [`migrate`], with the caller's recorder. A destination that continues to wait for the real source after this
/// one has failed is cancelled.
pub fn migrate_watched(
    source: Arc<dyn SourceGuest>,
    destination: impl Expected,
    transport: Arc<dyn Transport>,
    settings: SourceSettings,
    control: impl Into<Control>,
    recorder: Recorder,
) -> Running<Ends> {
    Box::pin(both_ends(source, destination.builder(), transport, settings, control.into(), recorder))
}

async fn both_ends(
    source: Arc<dyn SourceGuest>,
    destination: AnyBuilder,
    transport: Arc<dyn Transport>,
    settings: SourceSettings,
    control: Control,
    recorder: Recorder,
) -> Ends {
    let recorder = Arc::new(recorder);
    let over = CancellationToken::new();
    let there = DestinationSettings { recovery: settings.recovery, ..destination_settings() };
    let sending = |transport| self::source(source, transport, settings, recorder.clone(), control);
    let receiving = |listener| self::destination(destination, listener, there, recorder.clone(), over.clone());
    let (source, destination) = if transport.capabilities().stored {
        let source = sending(transport.clone()).await;
        (source, receiving(transport.listen().await.expect("a file to read")).await)
    } else {
        let listener = transport.listen().await.expect("a transport that listens");
        // Port 0 requests any free port: the listener knows which. TLS needs the certificates that its transport has.
        let way = listener.local_address().parse::<Address>().ok().filter(|address| address.beneath().is_none());
        let way = way.map_or(transport, |address| open(&address, Duration::from_secs(10)).into());
        let sending = async {
            let ended = sending(way).await;
            let waits =
                |(role, event): &(Role, Event)| *role == Role::Destination && matches!(event, Event::Connected { .. });
            if ended.outcome != Outcome::Completed && !recorder.events().iter().any(waits) {
                over.cancel();
            }
            ended
        };
        tokio::join!(sending, receiving(listener))
    };
    Ends { source, destination, events: recorder.events() }
}
