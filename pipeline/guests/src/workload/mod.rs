//! The workload guest: memory of this process that real threads never stop writing to, with an expected content.
//!
//! It builds a guest from its settings whose content can be checked. Its memory is filled with a configured mix.
//! Writers, a thread each, write pages in configured patterns and leave a stamp in each, with the page's number and how
//! often it was written. The expected stamp of each page is stored outside that memory and travels as device state. So
//! the writers at the destination compare a page with it before they write the page again: a page that became stale
//! during the migration is found even without a digest.
//!
//! ```text
//! settings ─▶ fill ─▶ memory ◀── store, then mark ── writers (threads: crew) ── expected sequences
//!    │                   │                                                         │
//!    └─ setup state      └─ pages                                   device state ──┘
//! ```
//!
//! The guest owns its memory and its threads; dropping it ends them.

mod crew;
mod fill;
mod machine;
mod pacer;
mod pattern;
mod random;
pub mod settings;
mod stamp;
mod state;
mod writer;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memferry_stages::dirty_log::DirtyLog;
use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::memory::GuestMemory;
use tokio_util::sync::CancellationToken;

use self::crew::Crew;
use self::machine::Machine;
use self::state::DeviceState;
use self::writer::Writer;
use super::balloon::Balloon;
use memferry::guest::hints::PageHinter;
use memferry::guest::{DestinationGuest, Guest, GuestBuilder, GuestError, GuestState, RunState, SourceGuest};

pub use super::shared::SharedSettings;
pub use settings::{Backing, Fill, FreeSettings, LogChoice, Pattern, Region, WorkloadSettings, WriterSettings};

/// A guest that writes its own memory and checks it. See the [module](self).
///
/// # Example
/// ```
/// use memferry::guest::SourceGuest;
/// use memferry_guests::workload::{Pattern, Region, Workload, WorkloadSettings, WriterSettings};
///
/// let writer = WriterSettings { pattern: Pattern::Uniform, pages_per_second: 0.0, bytes: 64, region: Region::ALL };
/// let guest = Workload::source(WorkloadSettings { memory: 1 << 20, writers: vec![writer], ..Default::default() })?;
/// while guest.status().writes < 1_000 {
///     std::thread::yield_now();
/// }
/// guest.pause()?;
/// assert_eq!(guest.check_all().stale_pages, 0);
/// # Ok::<(), memferry::guest::GuestError>(())
/// ```
#[derive(Debug)]
pub struct Workload {
    life: Mutex<Life>,
    machine: Arc<Machine>,
}

/// The phase of a workload.
#[derive(Debug)]
enum Life {
    /// Its pages are in flight; its writers have not written yet.
    Built { writers: Vec<Writer> },
    /// It has its writers' state. `written` counts the pages written before it came here.
    Whole { crew: Crew, written: u64, has_started: bool },
}

/// Builds the workload that arrives: all its settings travel with it.
#[derive(Clone, Debug, Default)]
pub struct WorkloadBuilder {
    /// The path of the file for the shared block, if one arrives.
    shared: Option<PathBuf>,
}

/// The results of the writers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkloadStatus {
    /// Do the writers run?
    pub running: bool,
    /// Pages written since the workload was created, those at its source included.
    pub writes: u64,
    /// How many of these were written in this process.
    pub writes_since_start_here: u64,
    /// How many times a page was compared with the last write to it, in this process.
    pub pages_checked: u64,
    /// How many of these comparisons found another content.
    pub stale_pages: u64,
    /// A description of the first of them.
    pub first_stale: Option<String>,
}

impl Workload {
    /// Fills the memory and starts the writers.
    ///
    /// # Errors
    /// When the settings are outside their limits, or the host lacks the memory or the threads.
    pub fn source(settings: WorkloadSettings) -> Result<Arc<Self>, GuestError> {
        Self::source_unless(settings, &CancellationToken::new())
    }

    /// As [`Workload::source`], and can be cancelled: filling a large memory takes seconds.
    ///
    /// # Errors
    /// As [`Workload::source`], and when it was cancelled.
    pub fn source_unless(settings: WorkloadSettings, cancel: &CancellationToken) -> Result<Arc<Self>, GuestError> {
        let machine = Arc::new(Machine::new(settings, false, false)?);
        fill::fill(&machine, cancel)?;
        let mut crew = Crew::new(machine.clone(), writer::writers(machine.settings()));
        crew.hire()?;
        crew.resume();
        Ok(Self::of(machine, Life::Whole { crew, written: 0, has_started: true }))
    }

    /// Could [`Workload::source`] create such a workload here? Fills no memory, starts no thread and creates no file.
    ///
    /// # Errors
    /// When the settings are outside their limits, the host lacks the memory, or the dirty log is not available.
    pub fn check(mut settings: WorkloadSettings) -> Result<(), GuestError> {
        settings.validate()?;
        settings.shared.take().map_or(Ok(()), |shared| shared.check())?;
        Machine::new(settings, false, false)?.dirty_logs().map(drop)
    }

    /// The builder of a workload that arrives.
    #[must_use]
    pub fn destination() -> WorkloadBuilder {
        WorkloadBuilder::default()
    }

    /// As [`Workload::destination`], with the file of the shared block. The source does not choose the path: a
    /// destination opens no file that a peer names.
    #[must_use]
    pub fn destination_sharing(file: PathBuf) -> WorkloadBuilder {
        WorkloadBuilder { shared: Some(file) }
    }

    /// Plugs the unplugged memory: it may be used from here on, and travels like the rest.
    ///
    /// # Errors
    /// While a migration runs.
    pub fn plug(&self) -> Result<(), GuestError> {
        match &*self.life() {
            Life::Whole { has_started: true, .. } => self.machine.plug(),
            _ => Err(GuestError("the workload has not started here".into())),
        }
    }

    /// The results of the writers so far.
    #[must_use]
    pub fn status(&self) -> WorkloadStatus {
        let Life::Whole { crew, written, has_started, .. } = &*self.life() else { return WorkloadStatus::default() };
        let findings = crew.findings();
        WorkloadStatus {
            running: *has_started && !crew.is_paused(),
            writes: written.saturating_add(findings.written),
            writes_since_start_here: findings.written,
            pages_checked: findings.checked,
            stale_pages: findings.stale,
            first_stale: findings.first_stale,
        }
    }

    /// Compares every page that was ever written with the last write to it, and returns the status after that. Running
    /// writers are paused meanwhile.
    pub fn check_all(&self) -> WorkloadStatus {
        if let Life::Whole { crew, .. } = &*self.life() {
            crew.check_all();
        }
        self.status()
    }

    fn of(machine: Arc<Machine>, life: Life) -> Arc<Self> {
        Arc::new(Self { life: Mutex::new(life), machine })
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_crew<T>(&self, act: impl FnOnce(&Crew) -> T) -> Result<T, GuestError> {
        match &*self.life() {
            Life::Whole { crew, has_started: true, .. } => Ok(act(crew)),
            _ => Err(GuestError("the workload has not started here".into())),
        }
    }
}

impl Guest for Workload {
    fn memory(&self) -> GuestMemory {
        self.machine.memory().clone()
    }

    /// A balloon, if it has memory that is free or unplugged.
    fn page_hinters(&self) -> Vec<Arc<dyn PageHinter>> {
        Balloon::of(self.machine.clone())
    }

    fn can_be_userfaulted(&self) -> Result<(), GuestError> {
        Ok(())
    }

    /// Nothing else maps it, and no page is pinned.
    fn mapping_is_exclusive(&self) -> Result<(), GuestError> {
        Ok(())
    }
}

impl SourceGuest for Workload {
    fn run_state(&self) -> RunState {
        if self.status().running { RunState::Running } else { RunState::Paused }
    }

    fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError> {
        self.machine.dirty_logs()
    }

    fn setup_state(&self) -> Result<GuestState, GuestError> {
        Ok(state::save_settings(self.machine.settings(), self.machine.is_plugged()))
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.with_crew(Crew::pause)
    }

    fn resume(&self) -> Result<(), GuestError> {
        self.with_crew(Crew::resume)
    }

    /// Up to 99 percent; a higher value counts as 99.
    fn throttle(&self, percent: u8) -> Result<(), GuestError> {
        self.with_crew(|crew| crew.throttle(percent))
    }

    fn save(&self) -> Result<GuestState, GuestError> {
        let written = self.status().writes;
        let mut sequences = vec![0; self.machine.pages() as usize];
        let cursors = self.with_crew(|crew| {
            crew.visit(|writer| {
                writer.sequences().for_each(|(page, sequence)| sequences[page as usize] = sequence);
                writer.cursor.clone()
            })
        })?;
        Ok(DeviceState { written, cursors, sequences }.save())
    }
}

impl GuestBuilder for WorkloadBuilder {
    type Built = Workload;

    fn build(self, page_size: PageSize, blocks: &[BlockInfo], setup: &GuestState) -> Result<Arc<Workload>, GuestError> {
        let (settings, is_plugged) = state::load_settings(setup, self.shared.as_deref())?;
        compare_blocks(&settings, page_size, blocks)?;
        let machine = Arc::new(Machine::new(settings, true, is_plugged)?);
        let writers = writer::writers(machine.settings());
        Ok(Workload::of(machine, Life::Built { writers }))
    }
}

impl DestinationGuest for Workload {
    fn prepare(&self, state: &GuestState) -> Result<(), GuestError> {
        let mut life = self.life();
        let Life::Built { writers } = &mut *life else {
            return Err(GuestError("the workload is prepared already".into()));
        };
        let count = u32::try_from(writers.len()).expect("at most MAX_WRITERS, and one");
        let came = DeviceState::load(state, count, self.machine.pages())?;
        let written = came.written;
        restore(&self.machine, writers, came)?;
        let mut crew = Crew::new(self.machine.clone(), std::mem::take(writers));
        crew.hire()?;
        *life = Life::Whole { crew, written, has_started: false };
        Ok(())
    }

    /// Its writers have not written here, and get the state of a later moment.
    fn unprepare(&self) -> Result<(), GuestError> {
        let mut life = self.life();
        let Life::Whole { has_started: false, .. } = &*life else {
            return Err(GuestError("the workload is not prepared, or has started already".into()));
        };
        let Life::Whole { crew, .. } = std::mem::replace(&mut *life, Life::Built { writers: Vec::new() }) else {
            unreachable!("it is whole");
        };
        *life = Life::Built { writers: crew.dismiss() };
        Ok(())
    }

    fn start(&self, run_state: RunState) -> Result<(), GuestError> {
        let mut life = self.life();
        let Life::Whole { crew, has_started: has_started @ false, .. } = &mut *life else {
            return Err(GuestError("the workload is not prepared, or has started already".into()));
        };
        *has_started = true;
        if run_state == RunState::Running {
            crew.resume();
        }
        Ok(())
    }
}

/// Refuses blocks that do not match the settings, with both layouts in the error.
fn compare_blocks(settings: &WorkloadSettings, page_size: PageSize, blocks: &[BlockInfo]) -> Result<(), GuestError> {
    let named = |blocks: &[BlockInfo]| {
        blocks.iter().map(|block| (block.id.clone(), block.length, block.ignored)).collect::<Vec<_>>()
    };
    let (came, own) = (named(blocks), named(&machine::block_infos(settings)));
    if came != own || page_size != settings.page_size {
        let first = came.iter().zip(&own).find(|(came, own)| came != own);
        return Err(GuestError(format!(
            "{} blocks with pages of {page_size:?} came, the workload has {} with pages of {:?}; first difference {first:?}",
            came.len(),
            own.len(),
            settings.page_size,
        )));
    }
    Ok(())
}

/// Sets the writers to their saved state.
fn restore(machine: &Machine, writers: &mut [Writer], came: DeviceState) -> Result<(), GuestError> {
    let DeviceState { cursors, mut sequences, .. } = came;
    for (index, (writer, cursor)) in writers.iter_mut().zip(cursors).enumerate() {
        writer
            .restore(machine, cursor, &mut sequences)
            .map_err(|why| GuestError(format!("state of writer {index}: {why}")))?;
    }
    match sequences.iter().position(|&sequence| sequence != 0) {
        Some(page) => Err(GuestError(format!("the state says that page {page} was written, and no writer has it"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
