//! One end of memferry, or of bare sockets, in a process of its own: this program, started again with an order.
//!
//! ```text
//! the bench            the end
//!   ◀── Ready ────────  its guest is there; a destination listens
//!   ─── a line ──────▶  it migrates
//!   ◀── Done ─────────  the verdict; nothing of it is freed
//!   ─── a line ──────▶  it looks at what it has
//!   ◀── Checked ──────
//!   ─── end of input ▶  it ends
//! ```

use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use memferry::events::{Ended, Event, Observer, Observers, Outcome, Role};
use memferry::guest::{GuestBuilder, SourceGuest};
use memferry::migration::{DataPlane, receive, send};
use memferry::settings::{
    ConvergenceSettings, EncoderSettings, OnDeadline, OnMiss, SourceSettings, StallStep, ThrottleSettings, Verify,
    XbzrleSettings,
};
use memferry_guests::workload::{Fill, Pattern, Region, Workload, WorkloadSettings, WriterSettings};
use memferry_stages::codec::Codec;
use memferry_tests::run::{destination_settings, source_settings};
use memferry_transports::{Address, Listener, Transport, open};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::boot::Pace;
use crate::floor::Sockets;
use crate::still_guest::StillGuest;
use crate::{Fallible, floor};

/// The hidden command, followed by an order in JSON.
pub(crate) const COMMAND: &str = "one-end";

/// An order for an end.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Send.
    Send {
        /// The address to send to.
        address: String,
        /// The guest.
        what: What,
        /// The settings.
        how: How,
    },
    /// Receive.
    Receive {
        /// The address to listen on.
        address: String,
        /// The kind of guest.
        what: Expected,
    },
    /// Send an image over bare sockets.
    SendBare {
        /// The address to send to.
        address: String,
        /// The image.
        image: PathBuf,
        /// The sockets.
        sockets: Sockets,
    },
    /// Receive an image over bare sockets.
    ReceiveBare {
        /// The address to listen on.
        address: String,
        /// The image's length.
        bytes: usize,
        /// The number of connections.
        connections: u8,
    },
}

/// The guest to send.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum What {
    /// An image that does not change.
    Image(PathBuf),
    /// A workload that writes at this pace.
    Workload(Pace),
}

/// The guest to receive.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Expected {
    /// An image.
    Image,
    /// A workload.
    Workload,
}

/// The settings of a migration.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct How {
    /// Lanes, each with a connection of its own.
    pub(crate) lanes: u16,
    /// The compressor.
    pub(crate) compress: Compress,
    /// Bytes of the XBZRLE cache; `None`: no deltas.
    pub(crate) xbzrle: Option<u64>,
    /// Are digests compared at the end?
    pub(crate) verify: bool,
    /// Bytes per second.
    pub(crate) max_bandwidth: Option<u64>,
    /// The downtime limit.
    pub(crate) downtime_limit: Duration,
    /// The time after which it is cancelled.
    pub(crate) deadline: Option<Duration>,
    /// Is the guest throttled if its dirty rate is above the bandwidth?
    pub(crate) throttles: bool,
}

/// A compressor, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Compress {
    /// Pages are sent raw.
    None,
    /// LZ4.
    Lz4,
    /// Zstandard, level 1.
    Zstd,
}

/// A message of an end.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    /// Its guest is ready; a destination adds the address on which it listens.
    Ready(String),
    /// The migration is over.
    Done(Verdict),
    /// The hash of the image that arrived.
    Hash(u128),
    /// The number of pages of a workload that differ from what its writers wrote.
    StalePages(u64),
}

/// The outcome of a migration at one end.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Verdict {
    /// Did it complete?
    pub(crate) completed: bool,
    /// The error, if it did not.
    pub(crate) error: Option<String>,
    /// From its start to its verdict.
    pub(crate) total: Duration,
    /// How long no guest ran.
    pub(crate) downtime: Duration,
    /// Bytes through the sockets.
    pub(crate) wire_bytes: u64,
    /// Rounds that were sent.
    pub(crate) rounds: u64,
    /// Pages that a workload wrote during the migration.
    pub(crate) written: u64,
    /// How every stage spent its time, if `STAGES` is set.
    pub(crate) stages: Vec<String>,
}

/// Executes an order in JSON.
pub(crate) fn run(order: &str) -> Fallible<()> {
    let order: Order = serde_json::from_str(order)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        match order {
            Order::Send { address, what, how } => send_guest(&address, what, how).await,
            Order::Receive { address, what } => receive_guest(&address, what).await,
            Order::SendBare { address, image, sockets } => floor::send(&address, &image, sockets),
            Order::ReceiveBare { address, bytes, connections } => floor::receive(&address, bytes, connections),
        }
    })
}

async fn send_guest(address: &str, what: What, how: How) -> Fallible<()> {
    match what {
        What::Image(path) => send_from(Arc::new(StillGuest::mapping(&path)?), || 0, address, how).await,
        What::Workload(pace) => {
            let guest = Workload::source(workload(pace))?;
            send_from(guest.clone(), || guest.status().writes, address, how).await
        }
    }
}

/// `writes` returns how many pages the guest has written so far.
async fn send_from(guest: Arc<dyn SourceGuest>, writes: impl Fn() -> u64, address: &str, how: How) -> Fallible<()> {
    let (transport, plane, rounds) = (transport(address)?, DataPlane::new()?, Arc::new(Rounds::default()));
    let observers = Observers::new(Role::Source, vec![rounds.clone() as Arc<dyn Observer>]);
    reply(&Reply::Ready(address.to_owned()))?;
    wait_for_line()?;
    let before = writes();
    // The memory is unmapped after the measurement.
    let sent = send(guest.clone(), transport.into(), settings(how), &plane, observers, CancellationToken::new()).await;
    let ended = match &sent {
        Ok(sent) => &sent.ended,
        Err(error) => error.ended().ok_or("the settings cannot be")?,
    };
    reply(&Reply::Done(verdict(ended, &rounds, writes() - before)))?;
    wait_for_line()
}

async fn receive_guest(address: &str, what: Expected) -> Fallible<()> {
    let listener = transport(address)?.listen().await?;
    match what {
        Expected::Image => {
            let guest = receive_into(StillGuest::build, listener).await?;
            reply(&Reply::Hash(guest.hash()))?;
        }
        Expected::Workload => {
            let guest = receive_into(Workload::destination(), listener).await?;
            reply(&Reply::StalePages(guest.check_all().stale_pages))?;
        }
    }
    wait_for_line()
}

async fn receive_into<B: GuestBuilder>(builder: B, listener: Box<dyn Listener>) -> Fallible<Arc<B::Built>> {
    let (plane, rounds) = (DataPlane::new()?, Arc::new(Rounds::default()));
    let observers = Observers::new(Role::Destination, vec![rounds.clone() as Arc<dyn Observer>]);
    reply(&Reply::Ready(listener.local_address()))?;
    wait_for_line()?;
    let received =
        receive(builder, listener, destination_settings(), &plane, observers, CancellationToken::new()).await?;
    reply(&Reply::Done(verdict(&received.ended, &rounds, 0)))?;
    wait_for_line()?;
    Ok(received.guest)
}

fn transport(address: &str) -> Fallible<Box<dyn Transport>> {
    Ok(open(&address.parse::<Address>()?, Duration::from_secs(10)))
}

fn settings(how: How) -> SourceSettings {
    let compress = match how.compress {
        Compress::None => None,
        Compress::Lz4 => Some(Codec::Lz4),
        Compress::Zstd => Some(Codec::Zstd { level: 1 }),
    };
    let xbzrle =
        how.xbzrle.map(|cache_bytes| XbzrleSettings { cache_bytes, on_miss: OnMiss::Raw, cache_first_round: true });
    SourceSettings {
        encoder: EncoderSettings { compress, xbzrle },
        checksum: true,
        verify: if how.verify { Verify::Pages } else { Verify::Off },
        max_bandwidth: how.max_bandwidth,
        downtime_limit: how.downtime_limit,
        max_rounds: u32::MAX,
        deadline: how.deadline,
        on_deadline: OnDeadline::Cancel,
        convergence: ConvergenceSettings {
            on_stall: if how.throttles { vec![StallStep::Throttle] } else { Vec::new() },
            stall_rounds: 2,
            cool_down_rounds: 1,
            throttle: ThrottleSettings { start: 30, step: 20, most: 90 },
            ..ConvergenceSettings::default()
        },
        ..source_settings(how.lanes, how.lanes)
    }
}

/// The boot sector's work as a workload: the same memory, the same pages in the same order at the same pace.
fn workload(pace: Pace) -> WorkloadSettings {
    let share = |page: u32| f64::from(page) / f64::from(pace.memory_pages);
    let writer = WriterSettings {
        pattern: Pattern::Sequential,
        pages_per_second: f64::from(pace.pages_per_second),
        bytes: 1,
        region: Region { from: share(pace.first_page), to: share(pace.first_page + pace.pages) },
    };
    WorkloadSettings {
        memory: u64::from(pace.memory_pages) * 4096,
        fill: Fill { zero: 1.0, text: 0.0, random: 0.0, process: 0.0 },
        writers: vec![writer],
        ..WorkloadSettings::default()
    }
}

fn verdict(ended: &Ended, rounds: &Rounds, written: u64) -> Verdict {
    let stage = |stage: &memferry_stages::meter::Reading| {
        let lane = stage.stage.at.number().map_or(String::new(), |lane| lane.to_string());
        format!(
            "{:<16}{lane:<4} busy {:>10.1?}  waits for input {:>10.1?}  for output {:>10.1?}",
            stage.stage.kind.name(),
            stage.busy,
            stage.input_wait,
            stage.output_wait
        )
    };
    Verdict {
        completed: ended.outcome == Outcome::Completed,
        error: ended.error.clone(),
        total: ended.total,
        downtime: ended.downtime.unwrap_or_default(),
        wire_bytes: ended.wire_bytes,
        rounds: rounds.count(),
        written,
        stages: ended.stages.iter().map(stage).collect(),
    }
}

/// Counts rounds.
#[derive(Debug, Default)]
struct Rounds(AtomicU64);

impl Rounds {
    fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Observer for Rounds {
    fn event(&self, _role: Role, event: &Event) {
        if let Event::RoundSent { .. } = event {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Sends a message to the bench.
pub(crate) fn reply(what: &Reply) -> Fallible<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(what)?)?;
    Ok(out.flush()?)
}

/// Waits for a line from the bench. The end of input counts as one: the bench is gone.
pub(crate) fn wait_for_line() -> Fallible<()> {
    std::io::stdin().lock().read_line(&mut String::new())?;
    Ok(())
}
