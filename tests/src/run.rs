//! Running both ends of a migration in one process.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use memferry::events::{Ended, Event, Observer, Observers, Role};
use memferry::guest::Guest;
use memferry::migration::{DataPlane, receive, send};
use memferry::settings::{DestinationSettings, EncoderSettings, OnDeadline, SourceSettings, XbzrleSettings};
use memferry_stages::codec::Codec;
use memferry_transports::{Address, Transport, open};
use tokio_util::sync::CancellationToken;

/// How both ends of a migration ended, and what was told on the way.
#[derive(Debug)]
pub struct Ends {
    /// The source's end.
    pub source: Ended,
    /// The destination's end.
    pub destination: Ended,
    /// Every event, in the order in which it was told.
    pub events: Vec<(Role, Event)>,
}

/// Keeps every event.
#[derive(Debug, Default)]
pub struct Recorder {
    events: Mutex<Vec<(Role, Event)>>,
}

impl Recorder {
    /// What was told so far.
    #[must_use]
    pub fn events(&self) -> Vec<(Role, Event)> {
        self.events.lock().unwrap().clone()
    }
}

impl Observer for Recorder {
    fn event(&self, role: Role, event: &Event) {
        self.events.lock().unwrap().push((role, event.clone()));
    }
}

/// Settings that suit tests: everything on, limits that a busy machine meets.
#[must_use]
pub fn source_settings(lanes: u16, connections: u16) -> SourceSettings {
    SourceSettings {
        lanes,
        connections,
        encoder: EncoderSettings {
            compress: Some(Codec::Lz4),
            xbzrle: Some(XbzrleSettings { cache_bytes: 16 << 20, compress_on_miss: false, cache_first_round: true }),
        },
        checksum: true,
        max_bandwidth: None,
        downtime_limit: Duration::from_millis(300),
        max_rounds: 4,
        deadline: None,
        on_deadline: OnDeadline::SwitchOver,
        verify: true,
        after: None,
        handover_timeout: Duration::from_secs(20),
    }
}

/// Settings of a destination that suit tests.
#[must_use]
pub fn destination_settings() -> DestinationSettings {
    DestinationSettings {
        page_size: None,
        max_lanes: 64,
        require_verify: false,
        hello_timeout: Duration::from_secs(10),
        handover_timeout: Duration::from_secs(20),
    }
}

/// Migrates `source` to `destination` over `transport`; a stored stream is written first and read then.
pub async fn migrate(
    source: Arc<dyn Guest>,
    destination: Arc<dyn Guest>,
    transport: Arc<dyn Transport>,
    settings: SourceSettings,
    cancel: CancellationToken,
) -> Ends {
    let plane = DataPlane::new().expect("threads for a test");
    let recorder = Arc::new(Recorder::default());
    let observers = |role| Observers::new(role, vec![recorder.clone() as Arc<dyn Observer>]);
    let sending = |transport: Arc<dyn Transport>| {
        send(source, transport, settings, &plane, observers(Role::Source), cancel.clone())
    };
    let receiving = |listener| {
        let never = CancellationToken::new();
        receive(destination, listener, destination_settings(), &plane, observers(Role::Destination), never)
    };
    let (source, destination) = if transport.capabilities().stored {
        let source = sending(transport.clone()).await;
        (source, receiving(transport.listen().await.expect("a file to read")).await)
    } else {
        let listener = transport.listen().await.expect("a transport that listens");
        // Port 0 asks the system for one: the listener knows which.
        let way = listener.local_address().parse::<Address>();
        let way = way.map_or(transport, |address| open(&address, Duration::from_secs(10)).into());
        tokio::join!(sending(way), receiving(listener))
    };
    Ends { source, destination, events: recorder.events() }
}
