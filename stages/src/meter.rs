//! How a stage spends its time: working, waiting for input, waiting for output.
//!
//! A stage's queues do the measuring ([`crate::queue`]): only a wait reads the clock, and only when there is one, so
//! a stage that never waits costs nothing to measure. What is left of its lifetime is work. The figures go to the
//! report, and the stage that waits least is the bottleneck.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::stage_id::StageId;

/// The meter of one stage in one lane. Shared: the stage writes, anyone reads.
#[derive(Debug)]
pub struct Meter {
    stage: StageId,
    started: Instant,
    ended_ns: AtomicU64,
    input_wait_ns: AtomicU64,
    output_wait_ns: AtomicU64,
    limit_wait_ns: AtomicU64,
    /// Since when it waits, in nanoseconds from the start, and for what in the lowest bit; 0 if it does not.
    waits: AtomicU64,
    /// Since when it waits for the bandwidth limit, in nanoseconds from the start; 0 if it does not.
    limited: AtomicU64,
    batches: AtomicU64,
    pages: AtomicU64,
    bytes: AtomicU64,
    control_bytes: AtomicU64,
    held_bytes: AtomicU64,
}

/// What a stage waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Something to do.
    Input,
    /// Room behind it: a full queue, an empty pool, a slow transport.
    Output,
    /// The bandwidth limit. It is waited for within a wait for [`Wait::Output`], which does not count it.
    Limit,
}

/// A wait of a stage, which ends when this is dropped.
#[derive(Debug)]
pub struct Waiting<'a> {
    meter: &'a Meter,
    wait: Wait,
    since: Duration,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.meter.since(self.wait).store(0, Ordering::Relaxed);
        self.meter.waited(self.wait, self.meter.started.elapsed().saturating_sub(self.since));
    }
}

/// What a [`Meter`] read at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Which stage.
    pub stage: StageId,
    /// Time it worked: its lifetime less its waits.
    pub busy: Duration,
    /// Time it waited for something to do.
    pub input_wait: Duration,
    /// Time it waited for room behind it: a full queue, an empty pool, a slow transport.
    pub output_wait: Duration,
    /// Time it waited for the bandwidth limit.
    pub limit_wait: Duration,
    /// Batches that passed.
    pub batches: u64,
    /// Pages that passed.
    pub pages: u64,
    /// Bytes that passed, as the stage counts them.
    pub bytes: u64,
}

impl Reading {
    /// The stage's lifetime: its work and its waits.
    #[must_use]
    pub fn life(&self) -> Duration {
        self.busy + self.input_wait + self.output_wait + self.limit_wait
    }
}

impl Meter {
    /// A meter that starts to run.
    #[must_use]
    pub fn start(stage: StageId) -> Arc<Self> {
        let zero = || AtomicU64::new(0);
        Arc::new(Self {
            stage,
            started: Instant::now(),
            ended_ns: zero(),
            input_wait_ns: zero(),
            output_wait_ns: zero(),
            limit_wait_ns: zero(),
            waits: zero(),
            limited: zero(),
            batches: zero(),
            pages: zero(),
            bytes: zero(),
            control_bytes: zero(),
            held_bytes: zero(),
        })
    }

    /// A batch passed, of so many pages and bytes.
    pub fn count(&self, pages: u64, bytes: u64) {
        self.batches.fetch_add(1, Ordering::Relaxed);
        self.pages.fetch_add(pages, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A control frame passed, of so many bytes.
    pub fn count_control(&self, bytes: u64) {
        self.count(0, bytes);
        self.control_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that passed so far, control frames aside.
    #[must_use]
    pub fn bulk_bytes(&self) -> u64 {
        self.bytes().saturating_sub(self.control_bytes.load(Ordering::Relaxed))
    }

    /// Bytes that passed so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The stage holds so many bytes of memory of its own, pooled buffers aside.
    pub fn holds(&self, bytes: u64) {
        self.held_bytes.fetch_max(bytes, Ordering::Relaxed);
    }

    /// The most bytes that the stage ever said it holds.
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        self.held_bytes.load(Ordering::Relaxed)
    }

    /// The stage waits until what this returns is dropped. It waits for one thing at a time, the limit aside.
    pub fn waiting(&self, wait: Wait) -> Waiting<'_> {
        let since = self.started.elapsed();
        let started = nanos(since).max(1);
        let cell = if wait == Wait::Limit { started } else { started << 1 | wait as u64 };
        self.since(wait).store(cell, Ordering::Relaxed);
        Waiting { meter: self, wait, since }
    }

    /// Where the beginning of a wait is noted.
    fn since(&self, wait: Wait) -> &AtomicU64 {
        if wait == Wait::Limit { &self.limited } else { &self.waits }
    }

    fn waited(&self, wait: Wait, time: Duration) {
        let waits = match wait {
            Wait::Input => &self.input_wait_ns,
            Wait::Output => &self.output_wait_ns,
            Wait::Limit => &self.limit_wait_ns,
        };
        waits.fetch_add(nanos(time), Ordering::Relaxed);
    }

    /// The wait that goes on, and how long it has lasted.
    fn ongoing(&self, life: Duration) -> (Duration, Duration) {
        let waits = self.waits.load(Ordering::Relaxed);
        if waits == 0 {
            return (Duration::ZERO, Duration::ZERO);
        }
        let time = life.saturating_sub(Duration::from_nanos(waits >> 1));
        if waits & 1 == Wait::Input as u64 { (time, Duration::ZERO) } else { (Duration::ZERO, time) }
    }

    /// How long the limit was waited for, with the wait that goes on.
    fn limit_wait(&self, life: Duration) -> Duration {
        let (waited, since) = (self.limit_wait_ns.load(Ordering::Relaxed), self.limited.load(Ordering::Relaxed));
        let ongoing = if since == 0 { Duration::ZERO } else { life.saturating_sub(Duration::from_nanos(since)) };
        Duration::from_nanos(waited) + ongoing
    }

    /// The stage has ended: its lifetime stops here.
    pub fn end(&self) {
        self.ended_ns.store(nanos(self.started.elapsed()).max(1), Ordering::Relaxed);
    }

    /// The figures as they are.
    #[must_use]
    pub fn read(&self) -> Reading {
        let load = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
        let ended = load(&self.ended_ns);
        let life = if ended == 0 { self.started.elapsed() } else { Duration::from_nanos(ended) };
        let (input_wait, output_wait) = self.ongoing(life);
        let input_wait = input_wait + Duration::from_nanos(load(&self.input_wait_ns));
        let output_wait = output_wait + Duration::from_nanos(load(&self.output_wait_ns));
        let limit_wait = self.limit_wait(life).min(output_wait);
        Reading {
            stage: self.stage,
            busy: life.saturating_sub(input_wait + output_wait),
            input_wait,
            output_wait: output_wait - limit_wait,
            limit_wait,
            batches: load(&self.batches),
            pages: load(&self.pages),
            bytes: load(&self.bytes),
        }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
