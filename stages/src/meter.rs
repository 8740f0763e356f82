//! How a stage spends its time: working, waiting for input, waiting for output.
//!
//! A stage's queues measure its waits ([`crate::queue`]): the clock is read only when there is a wait, so
//! a stage that never waits costs nothing to measure. The rest of its lifetime is work. The figures go to the
//! report, and the stage that waits least is the bottleneck.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::stage_id::StageId;
use crate::token_bucket::TokenBucket;

/// The meter of one stage in one lane. Shared: the stage writes, anyone reads.
#[derive(Debug)]
pub struct Meter {
    stage: StageId,
    started: Instant,
    ended_ns: AtomicU64,
    input_wait_ns: AtomicU64,
    output_wait_ns: AtomicU64,
    limit_wait_ns: AtomicU64,
    /// Time in which it waited for the limit though the bucket was full: it was not woken.
    late_ns: AtomicU64,
    /// Since when it waits, in nanoseconds from the start, and for what in the lowest bit; 0 if it does not.
    waits: AtomicU64,
    /// Since when it waits for the bandwidth limit, in nanoseconds from the start; 0 if it does not.
    limited: AtomicU64,
    /// What [`TokenBucket::filling`] read then, in nanoseconds.
    filling: AtomicU64,
    bucket: OnceLock<Arc<TokenBucket>>,
    passed: Passed,
}

/// What has passed a stage.
#[derive(Debug, Default)]
struct Passed {
    batches: AtomicU64,
    pages: AtomicU64,
    bytes: AtomicU64,
    control_bytes: AtomicU64,
    held_bytes: AtomicU64,
}

/// What a stage waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Input.
    Input,
    /// Room for its output: a full queue, an empty pool, a slow transport.
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
    filling: Duration,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.meter.since(self.wait).store(0, Ordering::Relaxed);
        let time = self.meter.started.elapsed().saturating_sub(self.since);
        if self.wait == Wait::Limit {
            let limited = self.meter.limited_since(self.filling).min(time);
            self.meter.limit_wait_ns.fetch_add(nanos(limited), Ordering::Relaxed);
            self.meter.late_ns.fetch_add(nanos(time - limited), Ordering::Relaxed);
        } else {
            self.meter.waited(self.wait, time);
        }
    }
}

/// The values of a [`Meter`] at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Which stage.
    pub stage: StageId,
    /// Time it worked, or waited for a processor behind the bandwidth limit: its lifetime less its waits.
    pub busy: Duration,
    /// Time it waited for input.
    pub input_wait: Duration,
    /// Time it waited for room for its output: a full queue, an empty pool, a slow transport.
    pub output_wait: Duration,
    /// Time it waited for the bandwidth limit while credit grew.
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
            late_ns: zero(),
            waits: zero(),
            limited: zero(),
            filling: zero(),
            bucket: OnceLock::new(),
            passed: Passed::default(),
        })
    }

    /// Counts a batch with its pages and bytes.
    pub fn count(&self, pages: u64, bytes: u64) {
        self.passed.batches.fetch_add(1, Ordering::Relaxed);
        self.passed.pages.fetch_add(pages, Ordering::Relaxed);
        self.passed.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts a control frame of `bytes` bytes.
    pub fn count_control(&self, bytes: u64) {
        self.count(0, bytes);
        self.passed.control_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that passed so far, control frames aside.
    #[must_use]
    pub fn bulk_bytes(&self) -> u64 {
        self.bytes().saturating_sub(self.passed.control_bytes.load(Ordering::Relaxed))
    }

    /// Bytes that passed so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.passed.bytes.load(Ordering::Relaxed)
    }

    /// Sets the bytes of memory that the stage itself holds, without pooled buffers.
    pub fn holds(&self, bytes: u64) {
        self.passed.held_bytes.fetch_max(bytes, Ordering::Relaxed);
    }

    /// The most bytes that the stage ever reported to hold.
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        self.passed.held_bytes.load(Ordering::Relaxed)
    }

    /// What limits the stage's bandwidth, which [`Wait::Limit`] waits for: once, before it waits.
    pub fn limited_by(&self, bucket: Arc<TokenBucket>) {
        self.bucket.set(bucket).expect("a stage has one limit");
    }

    /// The stage waits until what this returns is dropped. It waits for one thing at a time, the limit aside.
    pub fn waiting(&self, wait: Wait) -> Waiting<'_> {
        let since = self.started.elapsed();
        let started = nanos(since).max(1);
        let cell = if wait == Wait::Limit { started } else { started << 1 | wait as u64 };
        let filling = if wait == Wait::Limit { self.limited_since(Duration::ZERO) } else { Duration::ZERO };
        self.filling.store(nanos(filling), Ordering::Relaxed);
        self.since(wait).store(cell, Ordering::Relaxed);
        Waiting { meter: self, wait, since, filling }
    }

    /// Where the beginning of a wait is noted.
    fn since(&self, wait: Wait) -> &AtomicU64 {
        if wait == Wait::Limit { &self.limited } else { &self.waits }
    }

    /// For how long credit has grown since the bucket read so much.
    fn limited_since(&self, filling: Duration) -> Duration {
        self.bucket.get().map_or(Duration::ZERO, |bucket| bucket.filling().saturating_sub(filling))
    }

    fn waited(&self, wait: Wait, time: Duration) {
        let waits = if wait == Wait::Input { &self.input_wait_ns } else { &self.output_wait_ns };
        waits.fetch_add(nanos(time), Ordering::Relaxed);
    }

    /// The wait in progress, and how long it has lasted.
    fn ongoing(&self, life: Duration) -> (Duration, Duration) {
        let waits = self.waits.load(Ordering::Relaxed);
        if waits == 0 {
            return (Duration::ZERO, Duration::ZERO);
        }
        let time = life.saturating_sub(Duration::from_nanos(waits >> 1));
        if waits & 1 == Wait::Input as u64 { (time, Duration::ZERO) } else { (Duration::ZERO, time) }
    }

    /// How long the limit was waited for, and how long it was no longer, with the current wait.
    fn limit_waits(&self, life: Duration) -> (Duration, Duration) {
        let load = |cell: &AtomicU64| Duration::from_nanos(cell.load(Ordering::Relaxed));
        let (waited, late, since) = (load(&self.limit_wait_ns), load(&self.late_ns), load(&self.limited));
        if since.is_zero() {
            return (waited, late);
        }
        let time = life.saturating_sub(since);
        let limited = self.limited_since(load(&self.filling)).min(time);
        (waited + limited, late + (time - limited))
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
        let (limit_wait, late) = self.limit_waits(life);
        let limit_wait = limit_wait.min(output_wait);
        let late = late.min(output_wait - limit_wait);
        Reading {
            stage: self.stage,
            busy: life.saturating_sub(input_wait + output_wait) + late,
            input_wait,
            output_wait: output_wait - limit_wait - late,
            limit_wait,
            batches: load(&self.passed.batches),
            pages: load(&self.passed.pages),
            bytes: load(&self.passed.bytes),
        }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
