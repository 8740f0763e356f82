//! The machine behind the KVM guest, and the guest itself.
//!
//! | | |
//! |---|---|
//! | `program` | what the guest runs |
//! | `ram`, `machine` | memory and machine, built from settings |
//! | `vcpu`, `crew`, `pace` | vCPUs, their threads, when they may run |
//! | `console`, `devices` | the ports |
//! | `state` | the state that travels besides memory |
//! | `descriptor` | the only `unsafe` of this crate |

mod console;
mod crew;
mod descriptor;
mod devices;
mod machine;
mod pace;
mod program;
mod ram;
mod state;
mod vcpu;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memferry_stages::dirty_log::DirtyLog;
use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::memory::GuestMemory;

use self::machine::Machine;
use super::settings::{KvmLogChoice, KvmSettings};
use crate::balloon::Balloon;
use memferry::guest::hints::PageHinter;
use memferry::guest::{DestinationGuest, Guest, GuestBuilder, GuestError, GuestState, RunState, SourceGuest};

/// A virtual machine under KVM. See the [module](super).
#[derive(Debug)]
pub struct KvmGuest {
    life: Mutex<Life>,
}

/// A machine, and its phase.
#[derive(Debug)]
struct Life {
    machine: Machine,
    stage: Stage,
    /// The reports from before it came here.
    before: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Its pages are in flight; nothing has run.
    Built,
    /// Its vCPUs have their state.
    Prepared,
    Started,
}

/// Builds the machine that arrives: its settings travel with it, except how its writes are found at this end.
#[derive(Clone, Debug)]
pub struct KvmBuilder {
    dirty_log: KvmLogChoice,
    /// The path of the file for the shared block, if one arrives.
    shared: Option<PathBuf>,
}

/// The status of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KvmStatus {
    /// Do the vCPUs run?
    pub running: bool,
    /// Passes that vCPUs have reported, in this process.
    pub heartbeats: u64,
    /// The pass that every vCPU has completed since the machine was created, those at its source included.
    pub pass: u32,
    /// Ticks of its timer at its last report.
    pub ticks: u32,
    /// Pages that were checked and written, in this process.
    pub pages: u64,
    /// How often the guest reported a wrong page or another error since it was created.
    pub troubles: u64,
    /// The first of these, as the guest reported it.
    pub first_trouble: Option<String>,
    /// Why a vCPU cannot continue, if one cannot.
    pub failed: Option<String>,
}

impl KvmGuest {
    /// Creates a machine and starts it.
    ///
    /// # Errors
    /// When the settings are outside their limits, KVM is not available, or KVM refuses.
    pub fn source(settings: KvmSettings) -> Result<Arc<Self>, GuestError> {
        let machine = Machine::new(settings, None)?;
        machine.begin()?;
        machine.crew.hire()?;
        machine.crew.resume();
        Ok(Self::of(Life { machine, stage: Stage::Started, before: 0 }))
    }

    /// Could [`KvmGuest::source`] create such a machine here? Creates one without a program, and drops it.
    ///
    /// # Errors
    /// As [`KvmGuest::source`], and when the dirty log is not available.
    pub fn check(mut settings: KvmSettings) -> Result<(), GuestError> {
        settings.validate()?;
        settings.shared.take().map_or(Ok(()), |shared| shared.check())?;
        Machine::new(settings, None)?.dirty_logs().map(drop)
    }

    /// The builder of a machine that arrives.
    #[must_use]
    pub fn destination(dirty_log: KvmLogChoice) -> KvmBuilder {
        KvmBuilder { dirty_log, shared: None }
    }

    /// As [`KvmGuest::destination`], with the file of the shared block. The source does not choose the path: a
    /// destination opens no file that a peer names.
    #[must_use]
    pub fn destination_sharing(dirty_log: KvmLogChoice, file: PathBuf) -> KvmBuilder {
        KvmBuilder { dirty_log, shared: Some(file) }
    }

    /// Its status.
    #[must_use]
    pub fn status(&self) -> KvmStatus {
        let Life { machine, stage, before } = &*self.life();
        if *stage == Stage::Built {
            return KvmStatus::default();
        }
        let (log, failed) = (machine.devices.log(), machine.crew.failed());
        KvmStatus {
            running: *stage == Stage::Started && !machine.crew.is_paused() && failed.is_none(),
            heartbeats: log.heartbeats.saturating_sub(*before),
            pass: log.passes.iter().copied().min().unwrap_or(0),
            ticks: log.ticks,
            pages: machine.devices.pages(),
            troubles: log.troubles,
            first_trouble: log.first_trouble.clone(),
            failed,
        }
    }

    fn of(life: Life) -> Arc<Self> {
        Arc::new(Self { life: Mutex::new(life) })
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_started<T>(&self, act: impl FnOnce(&Machine) -> Result<T, GuestError>) -> Result<T, GuestError> {
        match &*self.life() {
            Life { machine, stage: Stage::Started, .. } => act(machine),
            _ => Err(GuestError("the machine has not started here".into())),
        }
    }
}

impl Guest for KvmGuest {
    fn memory(&self) -> GuestMemory {
        self.life().machine.ram.memory.clone()
    }

    /// A balloon, if it has memory that is free or unplugged.
    fn page_hinters(&self) -> Vec<Arc<dyn PageHinter>> {
        Balloon::of(self.life().machine.ram.clone())
    }

    fn can_be_userfaulted(&self) -> Result<(), GuestError> {
        Ok(())
    }

    /// Nothing else maps it, and no page is pinned.
    fn mapping_is_exclusive(&self) -> Result<(), GuestError> {
        Ok(())
    }
}

impl SourceGuest for KvmGuest {
    fn run_state(&self) -> RunState {
        if self.status().running { RunState::Running } else { RunState::Paused }
    }

    fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError> {
        self.life().machine.dirty_logs()
    }

    fn setup_state(&self) -> Result<GuestState, GuestError> {
        Ok(state::save_setup(&self.life().machine))
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.with_started(|machine| {
            machine.crew.pause();
            Ok(())
        })
    }

    fn resume(&self) -> Result<(), GuestError> {
        self.with_started(|machine| {
            machine.crew.resume();
            Ok(())
        })
    }

    /// Up to 99 percent; a higher value counts as 99.
    fn throttle(&self, percent: u8) -> Result<(), GuestError> {
        self.with_started(|machine| machine.crew.throttle(percent))
    }

    fn save(&self) -> Result<GuestState, GuestError> {
        self.with_started(state::save)
    }
}

impl GuestBuilder for KvmBuilder {
    type Built = KvmGuest;

    fn build(self, page_size: PageSize, blocks: &[BlockInfo], setup: &GuestState) -> Result<Arc<KvmGuest>, GuestError> {
        let (settings, cpuid) = state::load_setup(setup, self.dirty_log, self.shared.as_deref())?;
        compare_blocks(&ram::block_infos(&settings), page_size, blocks)?;
        state::compare_processors(&cpuid)?;
        let machine = Machine::new(settings, Some(cpuid))?;
        Ok(KvmGuest::of(Life { machine, stage: Stage::Built, before: 0 }))
    }
}

impl DestinationGuest for KvmGuest {
    fn prepare(&self, state: &GuestState) -> Result<(), GuestError> {
        let mut life = self.life();
        let Life { machine, stage: stage @ Stage::Built, before } = &mut *life else {
            return Err(GuestError("the machine is prepared already".into()));
        };
        state::load(machine, state)?;
        if !machine.crew.is_hired() {
            machine.crew.hire()?;
        }
        *before = machine.devices.log().heartbeats;
        *stage = Stage::Prepared;
        Ok(())
    }

    /// Its vCPUs have not run here, and get the state of a later moment.
    fn unprepare(&self) -> Result<(), GuestError> {
        let mut life = self.life();
        let Life { stage: stage @ Stage::Prepared, .. } = &mut *life else {
            return Err(GuestError("the machine is not prepared, or has started already".into()));
        };
        *stage = Stage::Built;
        Ok(())
    }

    fn start(&self, run_state: RunState) -> Result<(), GuestError> {
        let mut life = self.life();
        let Life { machine, stage: stage @ Stage::Prepared, .. } = &mut *life else {
            return Err(GuestError("the machine is not prepared, or has started already".into()));
        };
        *stage = Stage::Started;
        if run_state == RunState::Running {
            machine.crew.resume();
        }
        Ok(())
    }
}

/// Refuses blocks that do not match the machine's, with both layouts in the error.
fn compare_blocks(own: &[BlockInfo], page_size: PageSize, came: &[BlockInfo]) -> Result<(), GuestError> {
    let named = |blocks: &[BlockInfo]| {
        let facts = |block: &BlockInfo| (block.id.clone(), block.length, block.guest_address, block.ignored);
        blocks.iter().map(facts).collect::<Vec<_>>()
    };
    if named(own) == named(came) && page_size == PageSize::DEFAULT {
        return Ok(());
    }
    Err(GuestError(format!(
        "the blocks {:?} with pages of {page_size:?} came, the machine has {:?} with pages of {:?}",
        named(came),
        named(own),
        PageSize::DEFAULT,
    )))
}

#[cfg(test)]
mod tests;
