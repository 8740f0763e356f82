//! The conformance kit for guests: tests the contracts of [`SourceGuest`] and [`DestinationGuest`] on an
//! implementation.
//!
//! The author of a guest implements a [`Subject`] that makes small guests. [`check`] calls them as the engine does, in
//! every order that is possible, and runs whole migrations inside this process. It returns success, or a [`Breach`]
//! with the contract and the observed behaviour.
//!
//! | case | what must hold |
//! |---|---|
//! | pausing | no page changes once pause has returned; two saves give the same state; resume lets the guest run again, repeatedly |
//! | throttling | a throttled guest still runs, and can be paused; throttle may be called beside any call |
//! | moving | the loaded memory is the source's at its pause, to the last byte; the guest runs there and only there |
//! | paused | a guest that its operator paused arrives paused, with the same state, and can be resumed |
//! | failures | after a cancel, a lost connection, a refusal, the source continues as it was, and can be moved after that |
//! | recovered | a switchover that a lost connection interrupts is taken back, and the guest is moved afterwards |
//! | postcopied | a guest that allows it is started before its memory is there, and gets it whole; one that does not stays at its source |
//! | strange peers | blocks and state that do not fit are refused or taken, without a panic, and nothing starts |
//!
//! # Example
//! ```
//! use std::sync::Arc;
//! use memferry::guest::conformance::{Subject, check};
//! use memferry::guest::GuestBuilder;
//! use memferry_guests::workload::{Pattern, Region, Workload, WorkloadSettings, WriterSettings};
//!
//! struct Workloads;
//!
//! impl Subject for Workloads {
//!     type Guest = Workload;
//!
//!     fn source(&self) -> Arc<Workload> {
//!         let writer = WriterSettings { pattern: Pattern::Uniform, pages_per_second: 20e3, bytes: 64, region: Region::ALL };
//!         Workload::source(WorkloadSettings { memory: 2 << 20, writers: vec![writer], ..Default::default() }).unwrap()
//!     }
//!
//!     fn destination(&self) -> impl GuestBuilder<Built = Workload> {
//!         Workload::destination()
//!     }
//!
//!     fn examine(&self, guest: &Workload) -> Result<(), String> {
//!         guest.check_all().first_stale.map_or(Ok(()), Err)
//!     }
//! }
//! check(&Workloads).unwrap();
//! ```

mod cases;
mod image;
mod moving;
mod witness;

use std::fmt;
use std::sync::Arc;

use super::{DestinationGuest, Guest, GuestBuilder, GuestState, SourceGuest};

const BUILT: &str = "what build has built is what came, zero wherever it is reported as fresh";

/// The guests under test. They should have some MiB of memory: all of it is read often.
pub trait Subject {
    /// The guest type: what arrives can be sent again.
    type Guest: SourceGuest + DestinationGuest + 'static;

    /// A guest that runs and never stops writing memory: the kit detects by that whether it runs.
    fn source(&self) -> Arc<Self::Guest>;

    /// Builds a guest for the blocks of [`Subject::source`].
    fn destination(&self) -> impl GuestBuilder<Built = Self::Guest>;

    /// Is the state that a destination saves, if the guest has not run since it arrived, the state that its source
    /// saved? The default compares for equality: a guest whose state holds a clock must override it.
    ///
    /// # Errors
    /// The difference.
    fn same_state(&self, source: &GuestState, destination: &GuestState) -> Result<(), String> {
        if source == destination { Ok(()) } else { Err(first_difference(source, destination)) }
    }

    /// The guest's own check of itself, if it has one. Called while it runs, at either end.
    ///
    /// # Errors
    /// What is wrong.
    fn examine(&self, guest: &Self::Guest) -> Result<(), String> {
        let _ = guest;
        Ok(())
    }
}

/// A violation of a contract of [`SourceGuest`] or [`DestinationGuest`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{case}: {contract}; but {seen}")]
pub struct Breach {
    /// The case that found it.
    pub case: &'static str,
    /// The contract.
    pub contract: &'static str,
    /// The observed behaviour.
    pub seen: String,
}

/// Runs every case. Takes some seconds.
///
/// # Errors
/// The first [`Breach`]. An error, a panic or a hang of the guest is one too.
///
/// # Panics
/// If it is called from async code, or the host cannot start threads.
pub fn check<S: Subject>(subject: &S) -> Result<(), Breach> {
    cases::pausing(subject)?;
    cases::throttling(subject)?;
    moving::moving(subject)?;
    moving::paused(subject)?;
    moving::failures(subject)?;
    moving::recovered(subject)?;
    moving::postcopied(subject)?;
    cases::strange_peers(subject)
}

/// The contracts that several cases check.
mod contract {
    pub(super) const BUSY: &str = "the source of the subject runs and never stops writing memory";
    pub(super) const PAUSED: &str = "once pause has returned, nothing writes guest memory until resume";
    pub(super) const PAUSED_AFTER_SAVE: &str = "once save has returned, nothing writes guest memory until resume";
    pub(super) const CONTINUES: &str = "a guest that was resumed continues where it was";
    pub(super) const RUN_STATE: &str = "run_state reports whether the guest runs";
    pub(super) const RETURNS: &str = "a call returns, without an error where there is no cause for one";
    pub(super) const STATE: &str =
        "saving reports all that a guest is besides its memory, and reports it again when asked again";
    pub(super) const NOT_STARTED: &str = "nothing runs at a destination before start";
    pub(super) const ITSELF: &str = "a guest finds nothing wrong with itself";
}

impl Breach {
    fn new(case: &'static str, contract: &'static str, seen: impl fmt::Display) -> Self {
        Self { case, contract, seen: seen.to_string() }
    }
}

fn first_difference(source: &GuestState, destination: &GuestState) -> String {
    let named = |state: &GuestState| {
        state.sections.iter().map(|section| format!("{} v{}", section.name, section.version)).collect::<Vec<_>>()
    };
    let (ours, theirs) = (named(source), named(destination));
    if ours != theirs {
        return format!("the source saved the sections {ours:?} and the destination {theirs:?}");
    }
    let differing = source.sections.iter().zip(&destination.sections).find(|(one, other)| one != other);
    let name = differing.map_or_else(String::new, |(section, _)| section.name.to_string());
    format!("section {name:?} is not the same at the destination")
}
