//! Records the dirty pages of a guest without moving anything.
//!
//! The guest's logs are armed as for a migration. In each interval, every page that was found is taken from the
//! bitmap, the logs are re-armed for it, and it is recorded (law 2). A log that compares with copies (the hash log)
//! receives a copy of each page, which is not passed to anything else; for all other logs nothing is read. The guest
//! is never paused, and its content never leaves this process: a trace contains page numbers, counts and times only.
//!
//! **What it costs the guest**: what its logs cost it in a migration (a write fault for the first write to each page
//! in an interval, or for the hash log one read of all memory), and about a hundredth of a core for the samples.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memferry_stages::batch::{Batch, CopiedBatch, RoundKind};
use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::bitmap_sync::ranges;
use memferry_stages::dirty_log::{DirtyLog, LogCall};
use memferry_stages::exclusions::ExclusionReason;
use memferry_stages::geometry::{EXTENT_PAGES, ExtentAt, runs};
use memferry_stages::host::cores;
use memferry_stages::memory::GuestMemory;
use memferry_stages::pool::BufferPool;
use tokio_util::sync::CancellationToken;

use super::sampler::Sampler;
use super::trace::{GuestFacts, Interval, Runs, TraceWriter};
use memferry::guest::hints::{PageHinter, Point};
use memferry::guest::{GuestError, SourceGuest};
use memferry::migration::MigrationError;
use memferry::migration::arming::{Armed, arm};
use memferry::migration::digest_downtime;
use memferry::migration::excluded::excluded_ranges;

/// The settings of a recording.
#[derive(Clone, Debug)]
pub struct RecordSettings {
    /// The time from one sync to the next.
    pub interval: Duration,
    /// The duration; `None`: until it is cancelled.
    pub length: Option<Duration>,
    /// The level of zstd that is measured.
    pub zstd_level: i32,
    /// The tables `encoder`, `pipeline`, `migration` and `convergence` of a configuration, as TOML: the settings that
    /// a plan starts from.
    pub settings: String,
}

/// The default interval.
pub const INTERVAL: Duration = Duration::from_millis(100);
/// The shortest interval.
pub const SHORTEST: Duration = Duration::from_millis(10);

/// Summary of a recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// Its duration.
    pub length: Duration,
    /// The number of intervals.
    pub intervals: u64,
    /// Pages found dirty, counted once in each interval.
    pub written: u64,
    /// Bytes of the file.
    pub bytes: u64,
    /// The median duration of a sync.
    pub sync: Duration,
}

/// Why no trace was recorded.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The guest or its logs cannot be followed.
    #[error("{0}")]
    Guest(String),
    /// The memory could not be read for a sample or a log.
    #[error("guest memory cannot be read: {0}")]
    Memory(std::io::Error),
    /// The file could not be written.
    #[error("the trace cannot be written: {0}")]
    Write(std::io::Error),
    /// It was cancelled before anything was recorded.
    #[error("nothing was recorded")]
    Nothing,
}

impl From<MigrationError> for RecordError {
    fn from(error: MigrationError) -> Self {
        Self::Guest(error.to_string())
    }
}

impl From<GuestError> for RecordError {
    fn from(error: GuestError) -> Self {
        Self::Guest(error.to_string())
    }
}

/// Records a guest until `cancel`, or for the duration in the settings, into a file that is written completely or not
/// at all. The logs are stopped when this returns, also after an error. A cancel ends the recording and is not an
/// error.
///
/// # Errors
/// [`RecordError`]; then no file is written.
pub async fn record(
    guest: Arc<dyn SourceGuest>,
    settings: RecordSettings,
    file: &Path,
    cancel: CancellationToken,
) -> Result<Recorded, RecordError> {
    record_watched(guest, settings, file, cancel, |_| ()).await
}

/// As [`record`], and calls `watch` after each interval with a summary so far, on the recording thread. From the
/// first call on there is a trace to write.
///
/// # Errors
/// As [`record`].
pub async fn record_watched(
    guest: Arc<dyn SourceGuest>,
    settings: RecordSettings,
    file: &Path,
    cancel: CancellationToken,
    mut watch: impl FnMut(&Recorded) + Send + 'static,
) -> Result<Recorded, RecordError> {
    let (hinters, file) = (guest.page_hinters(), file.to_owned());
    let handle = tokio::runtime::Handle::current();
    let work = move || {
        let mut set_up = 0;
        let mut logs = Vec::new();
        let recorded = begin(&*guest, &hinters, &mut set_up, &mut logs).and_then(|out| {
            Recorder::new(guest.memory(), &logs, out).run(&settings, &file, &handle, &cancel, &mut watch)
        });
        // Each log is stopped, whatever the others return.
        let stopped = logs.iter().fold(None, |failed, log| log.stop().err().or(failed));
        for hinter in &hinters[..set_up] {
            // The page hinter is notified of the end; its answer changes nothing here.
            drop(hinter.reached(&Point::Cleanup));
        }
        match stopped {
            Some(error) => recorded.and(Err(MigrationError::Log { doing: LogCall::Stop, error }.into())),
            None => recorded,
        }
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(recorded) => recorded,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// The setup before the first page: unplugged memory is fixed here, and the logs are requested but not started.
fn begin(
    guest: &dyn SourceGuest,
    hinters: &[Arc<dyn PageHinter>],
    set_up: &mut usize,
    logs: &mut Vec<Arc<dyn DirtyLog>>,
) -> Result<Vec<(ExclusionReason, u32, Range<u64>)>, RecordError> {
    let mut unplugged = Vec::new();
    for hinter in hinters {
        *set_up += 1;
        hinter.reached(&Point::Setup)?;
        unplugged.extend(hinter.unplugged());
    }
    let out = excluded_ranges(guest.memory().layout(), unplugged)?;
    *logs = guest.dirty_logs()?;
    Ok(out)
}

struct Recorder<'a> {
    memory: GuestMemory,
    logs: &'a [Arc<dyn DirtyLog>],
    out: Vec<(ExclusionReason, u32, Range<u64>)>,
    /// Are copies needed, for a log that compares with them?
    copies: bool,
    pool: BufferPool,
}

impl<'a> Recorder<'a> {
    fn new(memory: GuestMemory, logs: &'a [Arc<dyn DirtyLog>], out: Vec<(ExclusionReason, u32, Range<u64>)>) -> Self {
        let pool = BufferPool::new(1, memory.page_size().extent_bytes());
        Self { copies: logs.iter().any(|log| !log.sees_stores()), memory, logs, out, pool }
    }

    fn run(
        self,
        settings: &RecordSettings,
        file: &Path,
        handle: &tokio::runtime::Handle,
        cancel: &CancellationToken,
        watch: &mut dyn FnMut(&Recorded),
    ) -> Result<Recorded, RecordError> {
        let began = Instant::now();
        let armed = arm(&self.memory, self.logs, &self.out, !self.out.is_empty())?;
        let facts = self.facts(&armed, began.elapsed(), settings)?;
        let mut writer = TraceWriter::create(file, &facts).map_err(RecordError::Write)?;
        let mut sampler = Sampler::new(self.memory.clone(), settings.zstd_level);
        let (found, unread) = (DirtyBitmap::empty(self.memory.layout()), unread(&armed));
        sampler.first_look(&unread).map_err(RecordError::Memory)?;
        self.take(&armed, |at, mask| self.rearm(at, mask, unread.peek(at) & mask))?;
        // Time is counted from a sync, because it ends with one.
        let mut synced = Instant::now();
        self.sync(&armed, cancel)?;
        self.take(&armed, |at, mask| self.rearm_written(at, mask, &unread))?;
        let (mut syncs, mut recorded) = (Vec::new(), Recorded::nothing());
        let end = settings.length.map(|length| synced + length);
        // At least one interval, however long the setup took.
        let continues = |intervals| intervals == 0 || end.is_none_or(|end| Instant::now() < end);
        while !cancel.is_cancelled() && continues(recorded.intervals) {
            let until = synced + settings.interval;
            let until = end.map_or(until, |end| until.min(end));
            drop(handle.block_on(async { tokio::time::timeout_at(until.into(), cancel.cancelled()).await }));
            let now = Instant::now();
            let length = now - std::mem::replace(&mut synced, now);
            if !self.sync(&armed, cancel)? {
                break;
            }
            let sync = now.elapsed();
            let written = self.take(&armed, |at, mask| {
                found.set_mask(at, mask);
                self.rearm_written(at, mask, &unread)
            })?;
            writer.interval(&Interval { length, sync, written: written.clone() }).map_err(RecordError::Write)?;
            #[expect(clippy::cast_possible_truncation, reason = "it wraps after more than a year")]
            let number = recorded.intervals as u32;
            sampler.interval(number, &found, &unread).map_err(RecordError::Memory)?;
            found.all_dirty_extents().for_each(|at| _ = found.take(at));
            recorded.intervals += 1;
            recorded.length += length;
            recorded.written += written.pages();
            syncs.push(sync);
            watch(&recorded);
        }
        if recorded.intervals == 0 {
            return Err(RecordError::Nothing);
        }
        syncs.sort_unstable();
        recorded.sync = syncs[syncs.len() / 2];
        let interval = recorded.length / u32::try_from(recorded.intervals).unwrap_or(u32::MAX);
        recorded.bytes = writer.finish(&sampler.finish(interval)).map_err(RecordError::Write)?;
        Ok(recorded)
    }

    fn facts(&self, armed: &Armed, arming: Duration, settings: &RecordSettings) -> Result<GuestFacts, RecordError> {
        let layout = self.memory.layout();
        let left_out = armed.exclusions.as_ref().map(|exclusions| exclusions.left_out());
        let digests = digest_downtime(&self.memory, left_out.as_ref()).map_err(RecordError::Memory)?;
        Ok(GuestFacts {
            page_size: layout.page_size(),
            blocks: (0..).zip(layout.blocks()).map(|(at, block)| (block.id.clone(), layout.block_pages(at))).collect(),
            excluded: layout.pages() - armed.bitmap.count(),
            untouched: armed.untouched.count(),
            rearms_late: self.logs.iter().any(|log| log.rearms_late()),
            cores: u32::try_from(cores()).unwrap_or(u32::MAX),
            arming,
            digests,
            settings: settings.settings.as_str().into(),
        })
    }

    /// Fetches the logs' dirty pages into the bitmap. Returns false if a cancel came first.
    fn sync(&self, armed: &Armed, cancel: &CancellationToken) -> Result<bool, RecordError> {
        for (block, extents) in ranges(self.memory.layout()) {
            if cancel.is_cancelled() {
                return Ok(false);
            }
            for log in self.logs {
                let synced = log.sync(block, extents.clone(), &armed.bitmap);
                synced.map_err(|error| MigrationError::Log { doing: LogCall::Sync, error })?;
            }
            if let Some(exclusions) = &armed.exclusions {
                exclusions.synced(block, extents);
            }
        }
        Ok(true)
    }

    /// Takes every page from the bitmap, has the logs re-armed for it, and returns what was found.
    fn take(
        &self,
        armed: &Armed,
        mut rearm: impl FnMut(ExtentAt, u64) -> Result<(), RecordError>,
    ) -> Result<Runs, RecordError> {
        let (layout, mut taken) = (self.memory.layout(), Vec::<Range<u64>>::new());
        let mut first = 0;
        for block in 0..layout.block_count() {
            let extents = layout.block_extents(block);
            for at in armed.bitmap.dirty_extents(block, 0..extents) {
                let mask = armed.bitmap.take(at);
                rearm(at, mask)?;
                let page = first + at.first_page();
                for (start, count) in runs(mask) {
                    let run = page + u64::from(start)..page + u64::from(start + count);
                    match taken.last_mut() {
                        Some(last) if last.end == run.start => last.end = run.end,
                        _ => taken.push(run),
                    }
                }
            }
            first += u64::from(extents) * EXTENT_PAGES;
        }
        Ok(Runs::of(taken))
    }

    /// Pages that a sync has found are no longer untouched.
    fn rearm_written(&self, at: ExtentAt, mask: u64, unread: &DirtyBitmap) -> Result<(), RecordError> {
        let _touched = unread.take_mask(at, mask);
        self.rearm(at, mask, 0)
    }

    fn rearm(&self, at: ExtentAt, mask: u64, untouched: u64) -> Result<(), RecordError> {
        for log in self.logs {
            log.rearm(at, mask).map_err(|error| MigrationError::Log { doing: LogCall::Rearm, error })?;
        }
        if self.copies {
            self.report_copies(Batch { at, mask, untouched, round: 1, kind: RoundKind::Live })
                .map_err(RecordError::Memory)?;
        }
        Ok(())
    }

    /// Reads pages for a log that compares with copies.
    fn report_copies(&self, batch: Batch) -> std::io::Result<()> {
        let (mut pages, size) = (self.pool.try_take().expect("one is read at a time"), self.memory.page_size());
        let to_read = batch.mask & !batch.untouched;
        let memory = &self.memory.block(batch.at.block).memory;
        let zero = memory.read_extent(size, batch.at.first_page(), to_read, &mut pages)? | batch.untouched;
        let copied = CopiedBatch { batch, zero, pages: (zero != batch.mask).then_some(pages) };
        self.logs.iter().for_each(|log| log.copied(&copied));
        Ok(())
    }
}

/// The pages that are not read: untouched ones, until they are found dirty, and those that never travel.
fn unread(armed: &Armed) -> DirtyBitmap {
    let unread = DirtyBitmap::empty(armed.untouched.layout());
    let out = armed.exclusions.as_ref().and_then(|exclusions| exclusions.permanent());
    for pages in std::iter::once(&*armed.untouched).chain(out) {
        pages.all_dirty_extents().for_each(|at| _ = unread.set_mask(at, pages.peek(at)));
    }
    unread
}

impl Recorded {
    fn nothing() -> Self {
        Self { length: Duration::ZERO, intervals: 0, written: 0, bytes: 0, sync: Duration::ZERO }
    }
}
