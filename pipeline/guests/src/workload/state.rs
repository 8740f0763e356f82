//! The state of a workload that travels besides its memory, as two sections of guest state, little-endian.
//!
//! ```text
//! "workload" in setup, version 2
//! ┌────────┬────────┬───────────┬─────────┬─────┬──────┬───────────────┬───────────┬─────────┬─────────────┐
//! │ memory │ blocks │ page size │ backing │ log │ seed │ fill 4 shares │ absent    │ writers │ each writer │
//! │ u64    │ u32    │ u32       │ u8      │ u8  │ u64  │ 4 × f64       │ 37 bytes  │ u32     │ 49 bytes    │
//! └────────┴────────┴───────────┴─────────┴─────┴──────┴───────────────┴───────────┴─────────┴─────────────┘
//! absent: free share f64 (0: none is free), turns a second f64, pages of a range u32; unplugged share f64,
//!         plugged u8; bytes of the shared block u64 (0: there is none)
//! each writer: pattern u8, its two numbers 2 × f64, pages a second f64, bytes u64, region 2 × f64
//!
//! "workload" of the devices, version 2
//! ┌─────────┬─────────┬──────────────────────────────┬───────┬────────┬────────────┐
//! │ written │ writers │ each writer: generator, next │ pages │ groups │ each group │
//! │ u64     │ u32     │ u64, u32                     │ u32   │ u32    │            │
//! └─────────┴─────────┴──────────────────────────────┴───────┴────────┴────────────┘
//! group: 64 pages of which any was written: its number u32, ascending; the sequence of each u32, 0: never
//! ```
//!
//! The device state travels while the guest is paused, so it leaves out pages that were never written.
//!
//! A peer may have made these bytes up: lengths and values are checked before anything is built from them, and invalid
//! bytes are an error.

use std::path::Path;

use bytes::{Buf, BufMut};
use fastrand::Rng;
use memferry_stages::geometry::PageSize;
use memferry_stages::untrusted::listed;

use super::pattern::Cursor;

use super::settings::{
    Backing, Fill, FreeSettings, LogChoice, MAX_WRITERS, Pattern, Region, WorkloadSettings, WriterSettings,
};
use crate::shared::SharedSettings;
use memferry::guest::{GuestError, GuestState, StateSection};

const NAME: &str = "workload";
/// Versions of the setup section and of the device section.
const SETUP_VERSION: u32 = 2;
const DEVICE_VERSION: u32 = 2;
/// Pages whose sequences are encoded as one group.
const GROUP: usize = 64;

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
        let mut bytes = Vec::new();
        bytes.put_u64_le(self.written);
        bytes.put_u32_le(count(self.cursors.len()));
        for cursor in &self.cursors {
            bytes.put_u64_le(cursor.random.get_seed());
            bytes.put_u32_le(cursor.next);
        }
        bytes.put_u32_le(count(self.sequences.len()));
        let groups = self.sequences.chunks(GROUP).enumerate();
        let written = groups.filter(|(_, group)| group.iter().any(|&sequence| sequence != 0));
        bytes.put_u32_le(count(written.clone().count()));
        for (number, group) in written {
            bytes.put_u32_le(count(number));
            group.iter().for_each(|&sequence| bytes.put_u32_le(sequence));
        }
        section(bytes, DEVICE_VERSION)
    }

    /// Decodes it from a section, for a workload with these numbers of writers and pages.
    pub(super) fn load(state: &GuestState, writers: usize, pages: u32) -> Result<Self, GuestError> {
        let mut input = Input::of(state, "device state", DEVICE_VERSION)?;
        let written = input.u64()?;
        let came = input.u32()?;
        input.expect("writers", came.into(), writers as u64)?;
        let cursors = (0..writers).map(|_| Ok(Cursor { random: Rng::with_seed(input.u64()?), next: input.u32()? }));
        let cursors = cursors.collect::<Result<_, GuestError>>()?;
        let came = input.u32()?;
        input.expect("pages", came.into(), pages.into())?;
        let sequences = load_sequences(&mut input, pages)?;
        Ok(Self { written, cursors, sequences })
    }
}

fn load_sequences(input: &mut Input<'_>, pages: u32) -> Result<Vec<u32>, GuestError> {
    let mut sequences = vec![0; pages as usize];
    let mut next = 0;
    for _ in 0..input.u32()? {
        let number = input.u32()? as usize;
        let mut groups = sequences.chunks_mut(GROUP).skip(next);
        let group = number.checked_sub(next).and_then(|skipped| groups.nth(skipped));
        let group = group.ok_or_else(|| input.refuse(format_args!("group {number} of pages, behind {next} others")))?;
        group.iter_mut().try_for_each(|sequence| input.u32().map(|came| *sequence = came))?;
        next = number + 1;
    }
    input.expect("bytes left", input.left.len() as u64, 0)?;
    Ok(sequences)
}

/// Encodes settings as a section, and whether their unplugged memory was plugged.
pub(super) fn save_settings(settings: &WorkloadSettings, is_plugged: bool) -> GuestState {
    let mut bytes = Vec::new();
    bytes.put_u64_le(settings.memory);
    bytes.put_u32_le(settings.blocks);
    bytes.put_u32_le(count(settings.page_size.bytes()));
    bytes.put_u8(settings.backing as u8);
    bytes.put_u8(settings.dirty_log as u8);
    bytes.put_u64_le(settings.seed);
    settings.fill.shares().iter().for_each(|&share| bytes.put_f64_le(share));
    let none = FreeSettings { share: 0.0, turns_per_second: 0.0, range_pages: 0 };
    let FreeSettings { share, turns_per_second, range_pages } = settings.free.unwrap_or(none);
    [share, turns_per_second].iter().for_each(|&number| bytes.put_f64_le(number));
    bytes.put_u32_le(range_pages);
    bytes.put_f64_le(settings.unplugged);
    bytes.put_u8(is_plugged.into());
    bytes.put_u64_le(SharedSettings::bytes_of(settings.shared.as_ref()));
    bytes.put_u32_le(count(settings.writers.len()));
    for writer in &settings.writers {
        let (tag, one, two) = match writer.pattern {
            Pattern::Sequential => (0, 0.0, 0.0),
            Pattern::Uniform => (1, 0.0, 0.0),
            Pattern::Zipf { exponent } => (2, exponent, 0.0),
            Pattern::HotSpot { pages, writes } => (3, pages, writes),
        };
        bytes.put_u8(tag);
        [one, two, writer.pages_per_second].iter().for_each(|&number| bytes.put_f64_le(number));
        bytes.put_u64_le(writer.bytes as u64);
        [writer.region.from, writer.region.to].iter().for_each(|&number| bytes.put_f64_le(number));
    }
    section(bytes, SETUP_VERSION)
}

/// Decodes settings from a section, checked. This end chooses the file of a shared block.
pub(super) fn load_settings(state: &GuestState, shared: Option<&Path>) -> Result<(WorkloadSettings, bool), GuestError> {
    let mut input = Input::of(state, "setup state", SETUP_VERSION)?;
    let (memory, blocks, page_bytes) = (input.u64()?, input.u32()?, input.u32()?);
    let page_size =
        PageSize::new(page_bytes.into()).ok_or_else(|| input.refuse(format_args!("pages of {page_bytes} bytes")))?;
    let backing = input.tag("backing", &[Backing::Anonymous, Backing::Memfd, Backing::Hugetlb])?;
    let logs = [LogChoice::Auto, LogChoice::Software, LogChoice::Userfault, LogChoice::Hash];
    let dirty_log = input.tag("dirty log", &logs)?;
    let seed = input.u64()?;
    let fill = Fill { zero: input.f64()?, text: input.f64()?, random: input.f64()?, process: input.f64()? };
    let free = FreeSettings { share: input.f64()?, turns_per_second: input.f64()?, range_pages: input.u32()? };
    let free = (free.share != 0.0).then_some(free);
    let unplugged = input.f64()?;
    let is_plugged = input.tag("plugged", &[false, true])?;
    let shared = SharedSettings::that_came(input.u64()?, shared).map_err(|why| input.refuse(why))?;
    let writers = input.u32()?;
    if writers as usize > MAX_WRITERS {
        return Err(input.refuse(format_args!("{writers} writers")));
    }
    let writers = (0..writers).map(|_| load_writer(&mut input)).collect::<Result<_, _>>()?;
    input.expect("bytes left", input.left.len() as u64, 0)?;
    let settings = WorkloadSettings {
        memory,
        blocks,
        page_size,
        backing,
        dirty_log,
        fill,
        writers,
        free,
        unplugged,
        shared,
        seed,
    };
    settings.validate().map_err(|error| input.refuse(error))?;
    Ok((settings, is_plugged))
}

fn load_writer(input: &mut Input<'_>) -> Result<WriterSettings, GuestError> {
    let tag = input.u8()?;
    let (one, two, pages_per_second) = (input.f64()?, input.f64()?, input.f64()?);
    let pattern = match tag {
        0 => Pattern::Sequential,
        1 => Pattern::Uniform,
        2 => Pattern::Zipf { exponent: one },
        3 => Pattern::HotSpot { pages: one, writes: two },
        _ => return Err(input.refuse(format_args!("pattern number {tag}"))),
    };
    let bytes = input.u64()?;
    let bytes = usize::try_from(bytes).map_err(|_| input.refuse(format_args!("{bytes} bytes a write")))?;
    Ok(WriterSettings { pattern, pages_per_second, bytes, region: Region { from: input.f64()?, to: input.f64()? } })
}

fn section(bytes: Vec<u8>, version: u32) -> GuestState {
    GuestState { sections: vec![StateSection { name: NAME.into(), version, bytes }] }
}

fn count(items: usize) -> u32 {
    u32::try_from(items).expect("within the limits of the settings")
}

/// A section being read.
struct Input<'a> {
    what: &'static str,
    left: &'a [u8],
}

impl<'a> Input<'a> {
    fn of(state: &'a GuestState, what: &'static str, version: u32) -> Result<Self, GuestError> {
        let [section] = &state.sections[..] else {
            let names = listed(state.sections.iter().map(|section| &section.name));
            return Err(GuestError(format!("{what} has the sections [{names}], a workload has one, {NAME:?}")));
        };
        if section.name != NAME || section.version != version {
            let (name, came) = (&section.name, section.version);
            return Err(GuestError(format!(
                "{what} is {name:?} version {came}, here it is {NAME:?} version {version}"
            )));
        }
        Ok(Self { what, left: &section.bytes })
    }

    fn refuse(&self, why: impl std::fmt::Display) -> GuestError {
        GuestError(format!("the workload's {} does not fit: {why}", self.what))
    }

    fn expect(&self, what: &str, came: u64, here: u64) -> Result<(), GuestError> {
        if came == here { Ok(()) } else { Err(self.refuse(format_args!("{came} {what} came, {here} belong here"))) }
    }

    fn tag<T: Copy>(&mut self, what: &str, values: &[T]) -> Result<T, GuestError> {
        let tag = self.u8()?;
        values.get(usize::from(tag)).copied().ok_or_else(|| self.refuse(format_args!("{what} number {tag}")))
    }

    fn u8(&mut self) -> Result<u8, GuestError> {
        self.left.try_get_u8().map_err(|error| self.refuse(error))
    }

    fn u32(&mut self) -> Result<u32, GuestError> {
        self.left.try_get_u32_le().map_err(|error| self.refuse(error))
    }

    fn u64(&mut self) -> Result<u64, GuestError> {
        self.left.try_get_u64_le().map_err(|error| self.refuse(error))
    }

    fn f64(&mut self) -> Result<f64, GuestError> {
        self.left.try_get_f64_le().map_err(|error| self.refuse(error))
    }
}
