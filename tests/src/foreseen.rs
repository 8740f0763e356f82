//! A plan's forecast compared with the actual result: a workload is recorded, its migration is planned, and then run.

use std::sync::Arc;
use std::time::Duration;

use memferry::events::{Event, Outcome, Role};
use memferry::settings::{ConvergenceSettings, EncoderSettings, SourceSettings, StallStep, Verify};
use memferry::units::Units;
use memferry_guests::workload::{Fill, Pattern, Region, Workload, WorkloadSettings, WriterSettings};
use memferry_plan::bandwidth::Bandwidth;
use memferry_plan::forecast::foresee;
use memferry_plan::record::{INTERVAL, RecordSettings, record};
use memferry_plan::trace::read;
use memferry_plan::written::Written;
use memferry_transports::{Address, open};
use tokio_util::sync::CancellationToken;

use crate::run::{migrate, source_settings};

/// A workload and the settings of its migration. The link is the token bucket.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its name.
    pub name: &'static str,
    /// MiB of memory.
    pub mib: u64,
    /// Its writers.
    pub writers: Vec<WriterSettings>,
    /// The settings of the migration; `max_bandwidth` is the link.
    pub settings: SourceSettings,
}

/// The result of a migration, or its forecast.
#[derive(Clone, Copy, Debug, Default)]
pub struct Went {
    /// Is the guest moved?
    pub moved: bool,
    /// Rounds before the switchover.
    pub rounds: u32,
    /// From the start to the end, in seconds.
    pub total: f64,
    /// How long the guest was paused, in seconds.
    pub downtime: f64,
    /// MB on the wire.
    pub sent: f64,
}

/// A writer of any page of a part of the memory.
#[must_use]
pub fn writer(pattern: Pattern, pages_per_second: f64, bytes: usize, region: (f64, f64)) -> WriterSettings {
    WriterSettings { pattern, pages_per_second, bytes, region: Region { from: region.0, to: region.1 } }
}

/// A workload with this many MiB of all kinds of pages, and these writers.
#[must_use]
pub fn workload(mib: u64, writers: Vec<WriterSettings>) -> WorkloadSettings {
    WorkloadSettings {
        memory: mib << 20,
        fill: Fill { zero: 0.3, text: 0.3, random: 0.1, process: 0.3 },
        writers,
        ..WorkloadSettings::default()
    }
}

/// Settings for a link of this many MiB per second, if it has a limit, and a downtime limit in milliseconds. If the
/// migration does not converge, the guest is throttled, and is switched over at the end.
#[must_use]
pub fn settings(encoder: EncoderSettings, link: Option<u64>, limit_ms: u64, verify: Verify) -> SourceSettings {
    SourceSettings {
        encoder,
        max_bandwidth: link.map(|mib| mib << 20),
        downtime_limit: Duration::from_millis(limit_ms),
        max_rounds: 60,
        verify,
        convergence: ConvergenceSettings {
            on_stall: vec![StallStep::Throttle, StallStep::SwitchOver],
            stall_rounds: 2,
            ..ConvergenceSettings::default()
        },
        ..source_settings(2, 2)
    }
}

impl Case {
    fn workload(&self) -> WorkloadSettings {
        workload(self.mib, self.writers.clone())
    }

    /// Records the workload for this long, and forecasts its migration.
    ///
    /// # Panics
    /// If it cannot be recorded.
    pub async fn foresee(&self, length: Duration) -> Went {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("trace");
        let settings =
            RecordSettings { interval: INTERVAL, length: Some(length), zstd_level: 1, settings: String::new() };
        let guest = Workload::source(self.workload()).expect("a workload");
        record(guest, settings, &file, CancellationToken::new()).await.expect("recorded");
        let trace = read(&file).expect("a trace");
        let link = self.settings.max_bandwidth.map_or(1e11, |bytes| bytes as f64);
        let run =
            foresee(&Written::of(&trace), &self.settings, Bandwidth { bytes_per_second: link, units: Units::Bits }).run;
        if std::env::var_os("ROUNDS").is_some() {
            for round in &run.sent {
                println!("    foreseen {:.3} s {:?}", round.time.as_secs_f64(), round.tally);
            }
        }
        Went {
            moved: run.end == memferry::controller::Decision::SwitchOver,
            rounds: run.rounds,
            total: run.total.as_secs_f64(),
            downtime: run.downtime.as_secs_f64(),
            sent: run.bytes as f64 / 1e6,
        }
    }

    /// Moves the workload.
    ///
    /// # Panics
    /// If the migration neither completes nor gives up.
    pub async fn run(&self) -> Went {
        let address = "tcp:127.0.0.1:0".parse::<Address>().expect("an address");
        let transport = Arc::from(open(&address, Duration::from_secs(10)));
        let (source, destination) = (Workload::source(self.workload()).expect("a workload"), Workload::destination());
        let ends = migrate(source, destination, transport, self.settings.clone(), CancellationToken::new()).await;
        let ended = &ends.source;
        assert!(matches!(ended.outcome, Outcome::Completed | Outcome::Cancelled), "{:?}", ended.error);
        let decided = |(role, event): &&(Role, Event)| *role == Role::Source && matches!(event, Event::Decided(_));
        if std::env::var_os("ROUNDS").is_some() {
            for (_, event) in &ends.events {
                if let Event::RoundSent { tally, duration } = event {
                    println!("    real     {:.3} s {tally:?}", duration.as_secs_f64());
                }
            }
            println!("    {:?} setup {:?}", ended.parts, ended.setup);
        }
        Went {
            moved: ended.outcome == Outcome::Completed,
            rounds: u32::try_from(ends.events.iter().filter(decided).count()).expect("few"),
            total: ended.total.as_secs_f64(),
            downtime: ended.downtime.unwrap_or_default().as_secs_f64(),
            sent: ended.wire_bytes as f64 / 1e6,
        }
    }
}

/// The median of each figure.
///
/// # Panics
/// If there are no results.
#[must_use]
pub fn median(went: &[Went]) -> Went {
    let middle = |of: fn(&Went) -> f64| {
        let mut all: Vec<_> = went.iter().map(of).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    let mut rounds: Vec<_> = went.iter().map(|went| went.rounds).collect();
    rounds.sort_unstable();
    Went {
        moved: went.iter().filter(|went| went.moved).count() * 2 > went.len(),
        rounds: rounds[rounds.len() / 2],
        total: middle(|went| went.total),
        downtime: middle(|went| went.downtime),
        sent: middle(|went| went.sent),
    }
}

/// The error of a forecast, as a share of the actual figure.
#[must_use]
pub fn off(foreseen: f64, real: f64) -> f64 {
    if foreseen == real { 0.0 } else { (foreseen - real) / real }
}
