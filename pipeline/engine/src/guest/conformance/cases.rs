//! Direct calls: the guest's behaviour without an engine.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use memferry_stages::geometry::BlockInfo;
use memferry_stages::memory::GuestMemory;

use super::image::{change_while_paused, changes};
use super::witness::what_is_wrong;
use super::{Breach, Guest, GuestBuilder, SourceGuest, Subject, contract};
use crate::guest::{DestinationGuest, GuestError, GuestState, RunState, StateSection};

/// How long a call may take before it counts as one that never returns.
const PATIENCE: Duration = Duration::from_secs(30);

const IGNORED: &str = "a block is ignored where both ends have its memory, whatever a peer sends";
const THROTTLED: &str = "a guest that is throttled slows down and continues";

/// A guest under test.
pub(super) struct Trial<G: ?Sized> {
    pub(super) case: &'static str,
    pub(super) guest: Arc<G>,
}

impl<G: SourceGuest + 'static> Trial<G> {
    /// A source, which runs.
    pub(super) fn source<S: Subject<Guest = G>>(case: &'static str, subject: &S) -> Result<Self, Breach> {
        let trial = Self { case, guest: subject.source() };
        trial.is(RunState::Running)?;
        trial.writes(contract::BUSY)?;
        Ok(trial)
    }

    pub(super) fn breach(&self, contract: &'static str, seen: impl std::fmt::Display) -> Breach {
        Breach::new(self.case, contract, seen)
    }

    /// Calls the guest on a thread of its own, since the call may never return.
    pub(super) fn call<T: Send + 'static>(
        &self,
        name: &str,
        call: impl FnOnce(&G) -> Result<T, GuestError> + Send + 'static,
    ) -> Result<T, Breach> {
        match self.try_call(name, call)? {
            Ok(value) => Ok(value),
            Err(error) => Err(self.breach(contract::RETURNS, format_args!("{name} failed: {error}"))),
        }
    }

    /// Like [`Trial::call`], but an error is a valid answer.
    pub(super) fn try_call<T: Send + 'static>(
        &self,
        name: &str,
        call: impl FnOnce(&G) -> Result<T, GuestError> + Send + 'static,
    ) -> Result<Result<T, GuestError>, Breach> {
        let guest = self.guest.clone();
        let (answer, answered) = channel();
        let caller = move || answer.send(std::panic::catch_unwind(AssertUnwindSafe(|| call(&guest))));
        thread::spawn(caller);
        match answered.recv_timeout(PATIENCE) {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(_panic)) => Err(self.breach(contract::RETURNS, format_args!("{name} panicked"))),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                Err(self.breach(contract::RETURNS, format_args!("{name} has not returned for {PATIENCE:?}")))
            }
        }
    }

    pub(super) fn pause(&self) -> Result<(), Breach> {
        self.call("pause", G::pause)?;
        self.is(RunState::Paused)
    }

    pub(super) fn resume(&self) -> Result<(), Breach> {
        self.call("resume", G::resume)?;
        self.is(RunState::Running)
    }

    pub(super) fn save(&self) -> Result<GuestState, Breach> {
        let state = self.call("save", G::save)?;
        match state.sections.iter().find(|section| !(1..=255).contains(&section.name.len())) {
            None => Ok(state),
            Some(section) => {
                Err(self.breach(contract::STATE, format_args!("a section has the name {:?}", section.name)))
            }
        }
    }

    /// Its run state.
    pub(super) fn is(&self, expected: RunState) -> Result<(), Breach> {
        match self.guest.run_state() {
            state if state == expected => Ok(()),
            state => {
                Err(self.breach(contract::RUN_STATE, format_args!("it reports {state:?} where it is {expected:?}")))
            }
        }
    }

    /// It runs: memory changes.
    pub(super) fn writes(&self, contract: &'static str) -> Result<(), Breach> {
        match changes(&self.guest.memory()) {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.breach(contract, "no byte of its memory changed for 5 s")),
            Err(error) => Err(self.breach(contract::RETURNS, format_args!("its memory cannot be read: {error}"))),
        }
    }

    /// It does not run: memory does not change.
    pub(super) fn stays_paused(&self, contract: &'static str) -> Result<(), Breach> {
        match change_while_paused(&self.guest.memory()) {
            Ok(None) => Ok(()),
            Ok(Some(change)) => Err(self.breach(contract, change.words("at first", "a little later"))),
            Err(error) => Err(self.breach(contract::RETURNS, format_args!("its memory cannot be read: {error}"))),
        }
    }

    /// Its own check finds no error.
    pub(super) fn examine<S: Subject<Guest = G>>(&self, subject: &S) -> Result<(), Breach> {
        subject.examine(&self.guest).map_err(|why| self.breach(contract::ITSELF, format_args!("it reports: {why}")))
    }
}

/// Paused, saved and resumed, repeatedly.
pub(super) fn pausing<S: Subject>(subject: &S) -> Result<(), Breach> {
    let trial = Trial::source("pausing", subject)?;
    trial.pause()?;
    trial.stays_paused(contract::PAUSED)?;
    let saved = trial.save()?;
    trial.stays_paused(contract::PAUSED_AFTER_SAVE)?;
    let again = trial.save()?;
    let differs = |why| trial.breach(contract::STATE, format_args!("the second time, {why}"));
    subject.same_state(&saved, &again).map_err(differs)?;
    trial.resume()?;
    trial.writes(contract::CONTINUES)?;
    // The calls that follow a pause that failed before it had paused anything.
    trial.resume()?;
    trial.writes(contract::CONTINUES)?;
    for _ in 0..5 {
        trial.pause()?;
        trial.stays_paused(contract::PAUSED)?;
        trial.resume()?;
    }
    trial.writes(contract::CONTINUES)?;
    trial.examine(subject)
}

/// Throttled, if it supports that.
pub(super) fn throttling<S: Subject>(subject: &S) -> Result<(), Breach> {
    let trial = Trial::source("throttling", subject)?;
    if trial.try_call("throttle", |guest| guest.throttle(80))?.is_err() {
        return Ok(());
    }
    trial.writes(THROTTLED)?;
    for percent in [20, 99, 100, 255, 0] {
        let guest = trial.guest.clone();
        let beside = thread::spawn(move || guest.throttle(percent));
        trial.pause()?;
        trial.stays_paused(contract::PAUSED)?;
        trial.resume()?;
        if !matches!(beside.join(), Ok(Ok(()))) {
            let seen = format_args!("throttle({percent}) beside pause failed, though throttle(80) had not");
            return Err(trial.breach(contract::RETURNS, seen));
        }
    }
    trial.call("throttle", |guest| guest.throttle(0))?;
    trial.writes(THROTTLED)
}

/// Blocks and state that a peer has made up.
pub(super) fn strange_peers<S: Subject>(subject: &S) -> Result<(), Breach> {
    let source = Trial::source("strange peers", subject)?;
    source.pause()?;
    let setup = source.call("setup_state", G::<S>::setup_state)?;
    let device = source.save()?;
    let (layout, page_size) = (source.guest.memory().layout().clone(), source.guest.memory().page_size());
    let right = layout.blocks();

    let wrong_blocks = strange_blocks(right).into_iter().map(|blocks| (blocks, setup.clone()));
    let wrong_setup = strange_states(&setup).into_iter().map(|setup| (right.to_vec(), setup));
    for (blocks, setup) in wrong_blocks.chain(wrong_setup) {
        let (builder, came) = (subject.destination(), blocks.clone());
        let built = source.try_call("build", move |_| builder.build(page_size, &came, &setup))?;
        let Ok(guest) = built else { continue };
        if let Some(wrong) = what_is_wrong(&guest.memory(), page_size, &blocks) {
            return Err(source.breach(super::BUILT, wrong));
        }
        if let Some(claimed) = claims(&guest.memory(), right) {
            return Err(source.breach(IGNORED, claimed));
        }
    }
    for state in strange_states(&device) {
        let (builder, blocks, setup) = (subject.destination(), right.to_vec(), setup.clone());
        let guest = source.call("build", move |_| builder.build(page_size, &blocks, &setup))?;
        let destination = Trial { case: source.case, guest };
        let _either_way = destination.try_call("prepare", move |guest| guest.prepare(&state))?;
        destination.stays_paused(contract::NOT_STARTED)?;
    }
    Ok(())
}

type G<S> = <S as Subject>::Guest;

/// Describes the first block that was built with the wrong `ignored` flag, if there is one.
fn claims(memory: &GuestMemory, right: &[BlockInfo]) -> Option<String> {
    let own = |block: &&BlockInfo| right.iter().any(|own| own.id == block.id && own.ignored != block.ignored);
    let claimed = memory.layout().blocks().iter().find(own)?;
    Some(format!("block {:?} was built with ignored = {}, as a peer had made up", claimed.id, claimed.ignored))
}

/// The blocks, each variant with one error.
fn strange_blocks(right: &[BlockInfo]) -> Vec<Vec<BlockInfo>> {
    let changed = |change: &dyn Fn(&mut BlockInfo)| {
        let mut blocks = right.to_vec();
        change(blocks.last_mut().expect("a layout has blocks"));
        blocks
    };
    let mut more = right.to_vec();
    more.push(BlockInfo { guest_address: 1 << 50, ..BlockInfo::new("conformance", 4096) });
    let mut strange = vec![
        more,
        changed(&|block| block.length += 1),
        changed(&|block| block.length = block.length.div_ceil(2)),
        changed(&|block| block.id = "conformance".into()),
        changed(&|block| block.ignored = !block.ignored),
    ];
    if right.len() > 1 {
        strange.push(right[1..].to_vec());
        strange.push(right.iter().rev().cloned().collect());
    }
    strange
}

/// The state, each variant with one error.
fn strange_states(right: &GuestState) -> Vec<GuestState> {
    let with = |change: &dyn Fn(&mut Vec<StateSection>)| {
        let mut state = right.clone();
        change(&mut state.sections);
        state
    };
    let of_first =
        |change: &dyn Fn(&mut StateSection)| with(&|sections| sections.first_mut().into_iter().for_each(change));
    let flipped = |byte: usize| {
        move |section: &mut StateSection| {
            let length = section.bytes.len().max(1);
            section.bytes.get_mut(byte % length).into_iter().for_each(|byte| *byte ^= 0xff);
        }
    };
    let mut strange = vec![
        GuestState::default(),
        with(&|sections| sections.extend(right.sections.clone())),
        of_first(&|section| section.name = "conformance".into()),
        of_first(&|section| section.version = section.version.wrapping_add(1)),
        of_first(&|section| section.bytes.truncate(section.bytes.len() / 2)),
        of_first(&|section| section.bytes.push(0)),
        of_first(&|section| section.bytes.fill(0xff)),
    ];
    strange.extend((0..24).map(|byte| of_first(&flipped(byte))));
    strange
}
