//! The conformance kit for guests: what [`SourceGuest`] and [`DestinationGuest`] ask of a guest, tried on one.
//!
//! Whoever writes a guest gives a [`Subject`] that makes small ones. [`check`] calls them as the engine does, in every order
//! in which it may, and runs whole migrations inside this process. It ends well, or with a [`Breach`] that names the
//! contract and what was seen instead.
//!
//! | case | what must hold |
//! |---|---|
//! | pausing | no page changes once pause has returned; saving twice says the same; resume lets it go on, over and over |
//! | throttling | a throttled guest goes on, and pauses as well as any; throttle may come beside any call |
//! | moving | what is loaded is what the source held when it was paused, to the last byte; it goes on there and only there |
//! | paused | a guest that its operator paused arrives paused, with the same state, and can be resumed |
//! | failures | after a cancel, a lost connection, a refusal, the source goes on as it was, and can be moved after that |
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

/// What is tried. The guests should have some MiB of memory: all of it is read often.
pub trait Subject {
    /// The guest under test: what arrives is what may be sent again.
    type Guest: SourceGuest + DestinationGuest + 'static;

    /// A guest that runs and never stops writing memory: that it goes on is seen by that.
    fn source(&self) -> Arc<Self::Guest>;

    /// What builds a guest for what [`Subject::source`] makes.
    fn destination(&self) -> impl GuestBuilder<Built = Self::Guest>;

    /// Is the state that a destination saves, where the guest has not run since it came, that which its source saved? Equal
    /// unless said otherwise: a guest whose state holds a clock must say.
    ///
    /// # Errors
    /// What differs.
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

/// A guest does not do what [`SourceGuest`] or [`DestinationGuest`] asks of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{case}: {contract}; but {seen}")]
pub struct Breach {
    /// The case that found it.
    pub case: &'static str,
    /// What must hold.
    pub contract: &'static str,
    /// What was seen instead.
    pub seen: String,
}

/// Runs every case. Takes some seconds.
///
/// # Errors
/// The first [`Breach`]. An error, a panic or silence of the guest is one too.
///
/// # Panics
/// If it is called from async code, or the host gives no threads.
pub fn check<S: Subject>(subject: &S) -> Result<(), Breach> {
    cases::pausing(subject)?;
    cases::throttling(subject)?;
    moving::moving(subject)?;
    moving::paused(subject)?;
    moving::failures(subject)?;
    cases::strange_peers(subject)
}

/// The contracts that several cases hold a guest to.
mod contract {
    pub(super) const BUSY: &str = "the source of the subject runs and never stops writing memory";
    pub(super) const STILL: &str = "once pause has returned, nothing writes guest memory until resume";
    pub(super) const STILL_AFTER_SAVE: &str = "once save has returned, nothing writes guest memory until resume";
    pub(super) const GOES_ON: &str = "a guest that was resumed goes on where it stood";
    pub(super) const RUN_STATE: &str = "run_state says whether the guest runs";
    pub(super) const RETURNS: &str = "a call returns, without an error where there is no cause for one";
    pub(super) const STATE: &str =
        "saving says all that a guest is besides its memory, and says it again when asked again";
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
