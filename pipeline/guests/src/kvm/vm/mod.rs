//! The machine behind the KVM guest, and the guest itself.
//!
//! | | |
//! |---|---|
//! | `program` | what the guest runs |
//! | `ram`, `machine` | memory and machine, made for settings |
//! | `vcpu`, `crew`, `pace` | vCPUs, their threads, when they may run |
//! | `console`, `devices` | the ports |
//! | `state` | what travels besides memory |
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
use memferry::guest::clearer::Clearer;
use memferry::guest::{Guest, GuestError, GuestState, RunState};

/// A virtual machine under KVM. See the [module](super).
#[derive(Debug)]
pub struct KvmGuest {
    life: Mutex<Life>,
    /// How its writes are found, wherever it came from.
    dirty_log: KvmLogChoice,
    /// At a destination: its way to the file of the shared block that may come.
    shared: Option<PathBuf>,
}

/// How far a machine has come.
#[derive(Debug)]
enum Life {
    /// A destination that knows nothing yet.
    Expected,
    /// Its memory is there, its pages are on their way; nothing has run.
    Built(Box<Machine>),
    /// Its vCPUs have their state. `before` counts what was told before it came here.
    Whole { machine: Box<Machine>, before: u64, has_started: bool },
}

/// How a machine fares.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KvmStatus {
    /// Do the vCPUs run?
    pub running: bool,
    /// Passes that vCPUs have told of, in this process.
    pub heartbeats: u64,
    /// The pass that every vCPU has completed, since the machine was made, at its source too.
    pub pass: u32,
    /// Ticks of its timer that it had counted when it last spoke.
    pub ticks: u32,
    /// Pages that were checked and written, in this process.
    pub pages: u64,
    /// How often the guest found a page wrong, or complained of something else, since it was made.
    pub troubles: u64,
    /// The first of these, as the guest said it.
    pub first_trouble: Option<String>,
    /// Why a vCPU cannot go on, if one cannot.
    pub failed: Option<String>,
}

impl KvmGuest {
    /// Makes a machine and starts it.
    ///
    /// # Errors
    /// When the settings are out of their limits, there is no KVM, or KVM refuses.
    pub fn source(settings: KvmSettings) -> Result<Arc<Self>, GuestError> {
        let dirty_log = settings.dirty_log;
        let machine = Box::new(Machine::new(settings, None)?);
        machine.begin()?;
        machine.crew.hire()?;
        machine.crew.resume();
        let life = Mutex::new(Life::Whole { machine, before: 0, has_started: true });
        Ok(Arc::new(Self { life, dirty_log, shared: None }))
    }

    /// Could [`KvmGuest::source`] make such a machine here? Makes one that has no program, and drops it.
    ///
    /// # Errors
    /// As [`KvmGuest::source`], and when there is no such dirty log.
    pub fn check(mut settings: KvmSettings) -> Result<(), GuestError> {
        settings.validate()?;
        settings.shared.take().map_or(Ok(()), |shared| shared.check())?;
        Machine::new(settings, None)?.dirty_logs().map(drop)
    }

    /// A machine that is to arrive: what it must know travels with it, but for how its writes are found here.
    #[must_use]
    pub fn destination(dirty_log: KvmLogChoice) -> Arc<Self> {
        Arc::new(Self { life: Mutex::new(Life::Expected), dirty_log, shared: None })
    }

    /// As [`KvmGuest::destination`], for one whose shared block is in this file. A source does not say where: a destination
    /// opens no file that a peer names.
    #[must_use]
    pub fn destination_sharing(dirty_log: KvmLogChoice, file: PathBuf) -> Arc<Self> {
        Arc::new(Self { life: Mutex::new(Life::Expected), dirty_log, shared: Some(file) })
    }

    /// How it fares.
    #[must_use]
    pub fn status(&self) -> KvmStatus {
        let Life::Whole { machine, before, has_started } = &*self.life() else { return KvmStatus::default() };
        let (log, failed) = (machine.devices.log(), machine.crew.failed());
        KvmStatus {
            running: *has_started && !machine.crew.is_paused() && failed.is_none(),
            heartbeats: log.heartbeats.saturating_sub(*before),
            pass: log.passes.iter().copied().min().unwrap_or(0),
            ticks: log.ticks,
            pages: machine.devices.pages(),
            troubles: log.troubles,
            first_trouble: log.first_trouble.clone(),
            failed,
        }
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_machine<T>(&self, act: impl FnOnce(&Machine) -> Result<T, GuestError>) -> Result<T, GuestError> {
        match &*self.life() {
            Life::Expected => Err(GuestError("the machine is not built yet".into())),
            Life::Built(machine) | Life::Whole { machine, .. } => act(machine),
        }
    }

    fn with_started<T>(&self, act: impl FnOnce(&Machine) -> Result<T, GuestError>) -> Result<T, GuestError> {
        match &*self.life() {
            Life::Whole { machine, has_started: true, .. } => act(machine),
            _ => Err(GuestError("the machine has not started here".into())),
        }
    }
}

impl Guest for KvmGuest {
    /// # Panics
    /// At a destination, before [`Guest::build`] has returned.
    fn memory(&self) -> GuestMemory {
        self.with_machine(|machine| Ok(machine.ram.memory.clone())).expect("build comes before memory")
    }

    fn run_state(&self) -> RunState {
        if self.status().running { RunState::Running } else { RunState::Paused }
    }

    /// A balloon, if it has memory that is free or unplugged.
    fn clearers(&self) -> Vec<Arc<dyn Clearer>> {
        let balloon = self.with_machine(|machine| Ok(Balloon::of(machine.ram.clone())));
        balloon.unwrap_or_default()
    }

    fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError> {
        self.with_machine(Machine::dirty_logs)
    }

    fn setup_state(&self) -> Result<GuestState, GuestError> {
        self.with_machine(|machine| Ok(state::save_setup(machine)))
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

    /// Up to 99 percent: more is taken as that.
    fn throttle(&self, percent: u8) -> Result<(), GuestError> {
        self.with_started(|machine| machine.crew.throttle(percent))
    }

    fn save(&self) -> Result<GuestState, GuestError> {
        self.with_started(state::save)
    }

    fn build(&self, page_size: PageSize, blocks: &[BlockInfo], setup: &GuestState) -> Result<(), GuestError> {
        let mut life = self.life();
        if !matches!(*life, Life::Expected) {
            return Err(GuestError("the machine is built already".into()));
        }
        let (settings, cpuid) = state::load_setup(setup, self.dirty_log, self.shared.as_deref())?;
        compare_blocks(&ram::block_infos(&settings), page_size, blocks)?;
        state::compare_processors(&cpuid)?;
        *life = Life::Built(Box::new(Machine::new(settings, Some(cpuid))?));
        Ok(())
    }

    fn prepare(&self, state: &GuestState) -> Result<(), GuestError> {
        let mut life = self.life();
        let Life::Built(machine) = &*life else {
            return Err(GuestError("the machine is not between build and start".into()));
        };
        state::load(machine, state)?;
        machine.crew.hire()?;
        let before = machine.devices.log().heartbeats;
        let Life::Built(machine) = std::mem::replace(&mut *life, Life::Expected) else {
            unreachable!("looked at above")
        };
        *life = Life::Whole { machine, before, has_started: false };
        Ok(())
    }

    fn start(&self, run_state: RunState) -> Result<(), GuestError> {
        let mut life = self.life();
        let Life::Whole { machine, has_started: has_started @ false, .. } = &mut *life else {
            return Err(GuestError("the machine is not prepared, or has started already".into()));
        };
        *has_started = true;
        if run_state == RunState::Running {
            machine.crew.resume();
        }
        Ok(())
    }
}

/// Refuses blocks that are not those of the machine, with both.
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
