//! What limits the speed of a migration: a share for each possible cause.
//!
//! | share | the part of the time in which |
//! |---|---|
//! | processor | the processors were in demand, in one of two measures: see below |
//! | limit | the senders waited for `max_bandwidth`, and credit grew: a sender that is not woken waits for the processor |
//! | destination | the senders waited for the transport, and the destination worked or was silent |
//! | wire | the senders waited for the transport, and the destination for the wire |
//! | guest | there was nothing to send: syncs, state, the handover, a guest that dirties little |
//! | source | the receivers waited for bytes: all that a destination knows of the stages before it |
//!
//! The processor's share is the stages' busy time, summed, over cores × time; or, if that is more, the time in which
//! threads of the process ran or waited for a processor. It is independent of the others. The shares from limit to
//! guest are parts of the senders' time, as source and destination are parts of the receivers' time at a destination.
//! So each of these sums is at most 1, and the rest is the work of stages. A busy stage that waits for a processor
//! counts as busy: more busy stages than cores give a full processor.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::num::NonZeroUsize;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use memferry_stages::meter::Reading;
use memferry_stages::stage_id::StageKind;
use memferry_stages::wire::messages::Figure;
use procfs::ProcResult;
use procfs::process::{Process, Task};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A destination that is silent for longer than this counts as the cause: its heartbeats come twice a second.
const SILENCE: Duration = Duration::from_secs(1);
/// The figure in a destination's heartbeat: nanoseconds since its start in which its receivers did not wait for bytes,
/// as the mean over connections.
const WORKED: &str = "receivers_worked_ns";
/// How often the scheduling delay of threads is read: that takes a file for each thread.
const DELAY_EVERY: Duration = Duration::from_secs(1);
/// How many samples back the latest shares reach.
const LOOKS: usize = 50;

/// A possible cause that limits the speed of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The processors of this host.
    Processor,
    /// `max_bandwidth`.
    Limit,
    /// The destination.
    Destination,
    /// The transport between the two.
    Wire,
    /// The guest: there was nothing to send.
    Guest,
    /// The source and the wire, as the destination sees them.
    Source,
}

impl Cause {
    /// Every cause.
    pub const ALL: [Self; 6] = [Self::Processor, Self::Limit, Self::Destination, Self::Wire, Self::Guest, Self::Source];

    /// Its name, in JSON and as a label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Processor => "processor",
            Self::Limit => "limit",
            Self::Destination => "destination",
            Self::Wire => "wire",
            Self::Guest => "guest",
            Self::Source => "source",
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Limit => "max_bandwidth",
            Self::Source => "source and wire",
            other => other.name(),
        })
    }
}

/// The shares, each from 0 to 1: see the [module](self). Shares that this end cannot know are missing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bottleneck {
    shares: [Option<f64>; Cause::ALL.len()],
    /// The stages' busy time over cores × time: above 1 where they waited for a processor.
    load: f64,
}

impl Bottleneck {
    /// The share of one cause.
    #[must_use]
    pub fn share(&self, cause: Cause) -> Option<f64> {
        self.shares[cause as usize]
    }

    /// The known shares.
    pub fn shares(&self) -> impl Iterator<Item = (Cause, f64)> {
        Cause::ALL.into_iter().filter_map(|cause| Some((cause, self.share(cause)?)))
    }

    /// The greatest share.
    #[must_use]
    pub fn greatest(&self) -> Option<(Cause, f64)> {
        self.shares().max_by(|a, b| a.1.total_cmp(&b.1))
    }

    /// Shares for tests.
    #[cfg(any(test, feature = "samples"))]
    #[must_use]
    pub fn made_up(shares: &[(Cause, f64)]) -> Self {
        let mut made_up = Self::default();
        shares.iter().for_each(|(cause, share)| made_up.shares[*cause as usize] = Some(*share));
        made_up
    }

    /// The same if the other end is in this process: its stages use the same processors.
    #[must_use]
    pub fn beside(mut self, other: &Self) -> Self {
        self.load += other.load;
        self.shares[Cause::Processor as usize] = self
            .share(Cause::Processor)
            .into_iter()
            .chain(other.share(Cause::Processor))
            .chain([self.load.min(1.0)])
            .reduce(f64::max);
        self
    }
}

/// As JSON: percent of the time for each cause, to one decimal. A share that an end cannot know is null.
impl Serialize for Bottleneck {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let percent = |share: f64| (share * 1e3).round() / 10.0;
        serializer.collect_map(Cause::ALL.map(|cause| (cause.name(), self.share(cause).map(percent))))
    }
}

impl<'de> Deserialize<'de> for Bottleneck {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let percents = HashMap::<String, Option<f64>>::deserialize(deserializer)?;
        let share = |cause: Cause| percents.get(cause.name()).copied().flatten().map(|percent| percent / 100.0);
        Ok(Self { shares: Cause::ALL.map(share), load: 0.0 })
    }
}

impl fmt::Display for Bottleneck {
    /// The greatest first: "max_bandwidth 89 %, processor 31 %, guest 5 %, destination 4 %, wire 2 %".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shares: Vec<_> = self.shares().collect();
        shares.sort_by(|a, b| b.1.total_cmp(&a.1));
        for (index, (cause, share)) in shares.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{cause} {:.0} %", share * 100.0)?;
        }
        Ok(())
    }
}

/// The times that the destination reports, since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct DestinationTime {
    /// Time in which its receivers did not wait for bytes: the mean over connections.
    worked: Duration,
    /// Time in which it was silent, though its answers were due.
    silent: Duration,
}

impl DestinationTime {
    fn since(self, before: Self) -> Self {
        Self { worked: self.worked.saturating_sub(before.worked), silent: self.silent.saturating_sub(before.silent) }
    }
}

/// The inputs of the shares, counted from the start of the stages.
#[derive(Clone, Copy, Debug, Default)]
struct Times {
    life: Duration,
    busy: Duration,
    /// Time in which threads of the process ran or waited for a processor.
    threads: Duration,
    /// Waits of the senders, as their mean: `None` at a destination.
    senders: Option<Waits>,
    /// Waits of the receivers, as their mean.
    receivers: Option<Waits>,
    /// Time in which the scanner had no order.
    idle: Duration,
    /// A stored stream is not answered.
    destination: Option<DestinationTime>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Waits {
    life: Duration,
    input: Duration,
    output: Duration,
    limit: Duration,
}

impl Waits {
    /// The mean over the stages of a kind, if there are any.
    fn of(stages: &[Reading], kind: StageKind) -> Option<Self> {
        let of_kind = || stages.iter().filter(|reading| reading.stage.kind == kind);
        let count = u32::try_from(of_kind().count()).ok().filter(|count| *count > 0)?;
        let mean = |wait: fn(&Reading) -> Duration| of_kind().map(wait).sum::<Duration>() / count;
        Some(Self {
            life: mean(Reading::life),
            input: mean(|stage| stage.input_wait),
            output: mean(|stage| stage.output_wait),
            limit: mean(|stage| stage.limit_wait),
        })
    }

    fn since(self, before: Option<Self>) -> Self {
        let before = before.unwrap_or_default();
        Self {
            life: self.life.saturating_sub(before.life),
            input: self.input.saturating_sub(before.input),
            output: self.output.saturating_sub(before.output),
            limit: self.limit.saturating_sub(before.limit),
        }
    }

    /// Time that was not spent waiting for input.
    fn worked(self) -> Duration {
        self.life.saturating_sub(self.input)
    }
}

impl Times {
    /// The times of an end's stages, with the time of the process's threads and the times that the destination reports.
    fn of(stages: &[Reading], threads: Duration, destination: Option<DestinationTime>) -> Self {
        let scanner = stages.iter().find(|reading| reading.stage.kind == StageKind::Scanner);
        Self {
            life: stages.iter().map(Reading::life).max().unwrap_or_default(),
            busy: stages.iter().map(|stage| stage.busy).sum(),
            threads,
            senders: Waits::of(stages, StageKind::Sender),
            receivers: Waits::of(stages, StageKind::Receiver),
            idle: scanner.map_or(Duration::ZERO, |scanner| scanner.input_wait),
            destination,
        }
    }

    /// The increase since `before`.
    fn since(&self, before: &Self) -> Self {
        Self {
            life: self.life.saturating_sub(before.life),
            busy: self.busy.saturating_sub(before.busy),
            threads: self.threads.saturating_sub(before.threads),
            senders: self.senders.map(|senders| senders.since(before.senders)),
            receivers: self.receivers.map(|receivers| receivers.since(before.receivers)),
            idle: self.idle.saturating_sub(before.idle),
            destination: self.destination.map(|time| time.since(before.destination.unwrap_or_default())),
        }
    }

    /// The shares on a host with the given number of cores.
    fn shares(&self, cores: NonZeroUsize) -> Bottleneck {
        let mut bottleneck = Bottleneck::default();
        if self.life.is_zero() {
            return bottleneck;
        }
        #[expect(clippy::cast_precision_loss, reason = "a number of cores")]
        let capacity = self.life.as_secs_f64() * cores.get() as f64;
        bottleneck.load = self.busy.as_secs_f64() / capacity;
        let wanted = self.threads.as_secs_f64() / capacity;
        let mut set = |cause, share: f64| bottleneck.shares[cause as usize] = Some(share.clamp(0.0, 1.0));
        set(Cause::Processor, (self.busy.as_secs_f64() / capacity).max(wanted));
        let part = |time: Duration, life: Duration| time.as_secs_f64() / life.as_secs_f64().max(f64::MIN_POSITIVE);
        if let Some(senders) = self.senders {
            let destination = self.destination.map(|time| (time.worked + time.silent).min(senders.output));
            set(Cause::Limit, part(senders.limit, senders.life));
            if let Some(destination) = destination {
                set(Cause::Destination, part(destination, senders.life));
            }
            let destination = destination.unwrap_or_default();
            set(Cause::Wire, part(senders.output - destination, senders.life));
            set(Cause::Guest, part(senders.input.min(self.idle), senders.life));
        } else if let Some(receivers) = self.receivers {
            set(Cause::Destination, part(receivers.worked(), receivers.life));
            set(Cause::Source, part(receivers.input, receivers.life));
        }
        bottleneck
    }
}

/// Observes an end: its processor time, the messages of the destination, and the shares of the last few seconds.
#[derive(Debug)]
pub(crate) struct Watch {
    cores: NonZeroUsize,
    cpu_began: Duration,
    delay_began: Duration,
    /// The latest total of the time that threads waited for a processor, and when it was read.
    delay: (Duration, Instant),
    heard: Instant,
    /// The destination's reports, if there is a return path.
    destination: Option<DestinationTime>,
    looks: VecDeque<Times>,
}

impl Watch {
    /// Begins with the stages. Is there a destination that answers?
    pub(crate) fn begin(answers: bool) -> Self {
        Self {
            cores: available_parallelism().unwrap_or(NonZeroUsize::MIN),
            cpu_began: process_time(),
            delay_began: run_delay(),
            delay: (Duration::ZERO, Instant::now()),
            heard: Instant::now(),
            destination: answers.then(DestinationTime::default),
            looks: VecDeque::from([Times::default()]),
        }
    }

    /// The destination sent a message, which may carry its figures.
    pub(crate) fn hear(&mut self, figures: &[Figure]) {
        let Some(destination) = &mut self.destination else { return };
        destination.silent += counted_silence(self.heard.elapsed());
        if let Some(figure) = figures.iter().find(|figure| figure.name == WORKED) {
            destination.worked = destination.worked.max(Duration::from_nanos(figure.value));
        }
        self.heard = Instant::now();
    }

    /// Processor time of the process since the stages began.
    pub(crate) fn cpu(&self) -> Duration {
        process_time().saturating_sub(self.cpu_began)
    }

    /// The shares of the last few seconds, with these readings.
    pub(crate) fn latest(&mut self, stages: &[Reading]) -> Bottleneck {
        if self.delay.1.elapsed() >= DELAY_EVERY {
            self.delay = (self.delay(), Instant::now());
        }
        let now = self.times(stages, self.delay.0);
        let shares = self.looks.front().map_or(now, |before| now.since(before)).shares(self.cores);
        if self.looks.len() == LOOKS {
            self.looks.pop_front();
        }
        self.looks.push_back(now);
        shares
    }

    /// The shares from the start.
    pub(crate) fn all(&self, stages: &[Reading]) -> Bottleneck {
        self.times(stages, self.delay()).shares(self.cores)
    }

    /// Time in which threads of the process waited for a processor since the stages began. A thread that has ended is
    /// not counted.
    fn delay(&self) -> Duration {
        run_delay().saturating_sub(self.delay_began).max(self.delay.0)
    }

    fn times(&self, stages: &[Reading], delay: Duration) -> Times {
        let silence = counted_silence(self.heard.elapsed());
        let destination = self.destination.map(|time| DestinationTime { silent: time.silent + silence, ..time });
        Times::of(stages, self.cpu() + delay, destination)
    }
}

/// A destination's report to its source about its receivers.
pub(crate) fn figure_of(receivers: &[Reading]) -> Figure {
    let worked = Waits::of(receivers, StageKind::Receiver).map_or(Duration::ZERO, Waits::worked);
    Figure { name: WORKED.into(), value: u64::try_from(worked.as_nanos()).unwrap_or(u64::MAX) }
}

/// The part of a silence that counts.
fn counted_silence(silence: Duration) -> Duration {
    if silence >= SILENCE { silence } else { Duration::ZERO }
}

/// Processor time of this process, of all its threads.
pub fn process_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// Time in which the threads of this process waited for a processor; nothing on a kernel that does not count it. A thread
/// of a lower priority than the first one's is meant to wait, as the background check is, and does not count.
fn run_delay() -> Duration {
    delays().map_or(Duration::ZERO, |delays| Duration::from_nanos(delays.sum()))
}

fn delays() -> ProcResult<impl Iterator<Item = u64>> {
    let process = Process::myself()?;
    let first = process.stat()?.nice;
    let delay = move |thread: Task| {
        let is_lowered = thread.stat()?.nice > first;
        Ok(if is_lowered { 0 } else { thread.schedstat()?.run_delay })
    };
    Ok(process.tasks()?.filter_map(move |thread| thread.and_then(delay).ok()))
}

#[cfg(test)]
mod tests;
