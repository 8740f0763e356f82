//! The state of a workload that travels besides its memory, as two sections of guest state.
//!
//! ```text
//! "workload" in setup, version 3   = WorkloadSettings; is its unplugged memory plugged?; bytes of the shared block u64, 0 for none
//! "workload" of the devices, version 3
//! ┌─────────┬─────────┬──────────────────────────────┬───────┬────────────────┬─────────────────────────────────┐
//! │ written │ writers │ each writer: generator, next │ pages │ pages that     │ each of them: pages left out    │
//! │ u64     │ u32     │ u64, u32                     │ u32   │ were ever      │ before it, its sequence         │
//! │         │         │                              │       │ written u32    │ u32, u32                        │
//! └─────────┴─────────┴──────────────────────────────┴───────┴────────────────┴─────────────────────────────────┘
//! ```
//!
//! The device state travels while the guest is paused, so it leaves out pages that were never written. It may be large,
//! and is decoded value by value, into no more than this end has pages and writers.

use std::path::Path;

use fastrand::Rng;

use super::pattern::Cursor;
use super::settings::WorkloadSettings;
use crate::shared::SharedSettings;
use crate::state::{Input, encoded, only_section, section, value_of};
use memferry::guest::{GuestError, GuestState};

const NAME: &str = "workload";
/// How errors name the guest.
const GUEST: &str = "a workload";
/// Versions of the setup section and of the device section.
const SETUP_VERSION: u32 = 3;
const DEVICE_VERSION: u32 = 3;
/// The most bytes of the setup section: settings with the most writers take less.
const MOST_SETUP_BYTES: usize = 16 << 10;

/// The writers' state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DeviceState {
    /// Pages written so far.
    pub(super) written: u64,
    /// The position of each writer.
    pub(super) cursors: Vec<Cursor>,
    /// How often each page was written, over all blocks.
    pub(super) sequences: Vec<u32>,
}

impl DeviceState {
    /// Encodes it as a section.
    pub(super) fn save(&self) -> GuestState {
        let cursors: Vec<_> = self.cursors.iter().map(|cursor| (cursor.random.get_seed(), cursor.next)).collect();
        let written = (0..).zip(&self.sequences).filter(|&(_, &sequence)| sequence != 0);
        let mut bytes = encoded(&(self.written, cursors, self.sequences.len(), written.clone().count()));
        let mut next = 0_u32;
        for (page, sequence) in written {
            bytes = postcard::to_extend(&(page - next, sequence), bytes).expect("a vector takes everything");
            next = page + 1;
        }
        GuestState { sections: vec![section(NAME, DEVICE_VERSION, bytes)] }
    }

    /// Decodes it from a section, for a workload with these numbers of writers and pages.
    pub(super) fn load(state: &GuestState, writers: u32, pages: u32) -> Result<Self, GuestError> {
        let mut input = Input::of(only_section(state, GUEST)?, NAME, DEVICE_VERSION)?;
        let written = input.take()?;
        input.expect("writers", writers)?;
        let cursor = |(seed, next)| Cursor { random: Rng::with_seed(seed), next };
        let cursors = (0..writers).map(|_| input.take().map(cursor)).collect::<Result<_, _>>()?;
        input.expect("pages", pages)?;
        let mut sequences = vec![0; pages as usize];
        let mut rest = sequences.iter_mut();
        for _ in 0..input.take::<u32>()? {
            let (left_out, came): (u32, u32) = input.take()?;
            let sequence = rest.nth(left_out as usize);
            *sequence.ok_or_else(|| input.refuse("a page behind the last one"))? = came;
        }
        input.end()?;
        Ok(Self { written, cursors, sequences })
    }
}

/// Encodes settings as a section, and whether their unplugged memory was plugged.
pub(super) fn save_settings(settings: &WorkloadSettings, is_plugged: bool) -> GuestState {
    let bytes = encoded(&(settings, is_plugged, SharedSettings::bytes_of(settings.shared.as_ref())));
    GuestState { sections: vec![section(NAME, SETUP_VERSION, bytes)] }
}

/// Decodes settings from a section, checked. This end chooses the file of a shared block.
pub(super) fn load_settings(state: &GuestState, shared: Option<&Path>) -> Result<(WorkloadSettings, bool), GuestError> {
    let section = only_section(state, GUEST)?;
    let (mut settings, is_plugged, shared_bytes): (WorkloadSettings, bool, u64) =
        value_of(section, NAME, SETUP_VERSION, MOST_SETUP_BYTES)?;
    settings.shared = SharedSettings::that_came(shared_bytes, shared).map_err(GuestError)?;
    settings.validate().map_err(|error| GuestError::caused("the workload that came cannot be", error))?;
    Ok((settings, is_plugged))
}
