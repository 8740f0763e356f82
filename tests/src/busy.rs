//! A migration that keeps every core busy and never ends by itself: a guest whose writers never rest is compressed at
//! the highest level. For measurements of latency under load.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use memferry::control::Control;
use memferry::events::{Event, Outcome, Phase, Role};
use memferry::settings::{EncoderSettings, SourceSettings};
use memferry_stages::codec::Codec;
use memferry_stages::geometry::PageSize;
use memferry_transports::memory::MemoryTransport;
use tokio::task::JoinHandle;

use crate::TestGuest;
use crate::run::{Ends, Recorder, migrate_watched, source_settings};

/// The running migration.
#[derive(Debug)]
pub struct Busy {
    source: Arc<TestGuest>,
    cancelled: Arc<OnceLock<Instant>>,
    migration: JoinHandle<Ends>,
}

impl Busy {
    /// Begins it, on the caller's runtime.
    #[must_use]
    pub fn begin(control: impl Into<Control>) -> Self {
        let source = TestGuest::source(PageSize::DEFAULT, &[256 << 20]).running(2);
        let settings = SourceSettings {
            encoder: EncoderSettings { compress: Some(Codec::Zstd { level: 19 }), xbzrle: None },
            max_rounds: u32::MAX,
            downtime_limit: Duration::from_micros(1),
            ..source_settings(4, 4)
        };
        let cancelled = Arc::new(OnceLock::new());
        let at = cancelled.clone();
        let recorder = Recorder::calling(move |role, event| {
            if role == Role::Source && matches!(event, Event::Phase(Phase::Cancelled)) {
                at.get_or_init(Instant::now);
            }
        });
        let migration = tokio::spawn(migrate_watched(
            source.clone(),
            Arc::new(TestGuest::destination()),
            Arc::new(MemoryTransport::new(1 << 20)),
            settings,
            control.into(),
            recorder,
        ));
        Self { source, cancelled, migration }
    }

    /// Waits for its end after a cancel, and returns when the source's verdict was reported. (Its stages end a little
    /// later, each with its current batch.)
    ///
    /// # Panics
    /// If it ended otherwise, or the source guest does not continue.
    pub async fn verdict(self) -> Instant {
        let ends = self.migration.await.expect("a migration does not panic");
        assert_eq!(ends.source.outcome, Outcome::Cancelled, "{:?}", ends.source.error);
        assert!(self.source.runs(), "the source guest continues");
        *self.cancelled.get().expect("it was cancelled")
    }
}
