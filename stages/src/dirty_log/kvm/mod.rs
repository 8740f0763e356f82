//! The dirty logs of a KVM machine.
//!
//! | log | the kernel keeps | re-arms |
//! |---|---|---|
//! | [`KvmLog`] | a bit for each page, until it is cleared | in rearm, a chunk at a time, exactly what was fetched |
//! | [`KvmRingLog`] | a ring of written pages for each vCPU | in sync, before what was harvested is in the bitmap |
//!
//! Both see what vCPUs and the kernel itself write to the machine's [slots](Slot). They do not see what the VMM
//! itself writes (its devices): it marks, best in a separate [`SoftwareLog`](super::SoftwareLog).
//!
//! Two small traits, [`LogCalls`] and [`RingCalls`], stand for the kernel, so that the logs can be tested against a strict
//! model.

mod log;
#[cfg(test)]
mod machine_tests;
#[cfg(test)]
mod model;
mod ring;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;

use crate::geometry::{EXTENT_PAGES, Layout};
use crate::kvm::{KVM_PAGE_BYTES, Slot};

pub use log::KvmLog;
pub use ring::KvmRingLog;

/// The calls to a machine that the dirty log makes.
pub trait LogCalls: Send + Sync + fmt::Debug {
    /// Leaves the protection of pages to [`LogCalls::clear`]. True if a slot's bits are all set, and nothing is protected,
    /// when its logging is switched on; else they are clear and all is protected.
    ///
    /// # Errors
    /// When the kernel is too old.
    fn manual_protect(&self) -> io::Result<bool>;

    /// Switches the logging of a slot.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn set_logging(&self, slot: u32, on: bool) -> io::Result<()>;

    /// The bits of a slot, which stay as they are. A page written twice since it was cleared has one.
    ///
    /// # Errors
    /// When the slot is not logged.
    fn fetch(&self, slot: u32, into: &mut [u64]) -> io::Result<()>;

    /// Clears the bits of some pages and protects those that had one, so that the next write sets it again. A write that
    /// was not fetched before is forgotten with its bit. `first_page` is a multiple of 64, and so is `pages` unless they
    /// reach the slot's end.
    ///
    /// # Errors
    /// When the slot is not logged.
    fn clear(&self, slot: u32, first_page: u64, pages: u32, bits: &[u64]) -> io::Result<()>;
}

/// The calls to a machine that the dirty ring makes. The rings are emptied one after another, so that it is known how many
/// entries of each the kernel reset.
pub trait RingCalls: Send + Sync + fmt::Debug {
    /// Switches the logging of a slot; when it is switched on, all is protected.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn set_logging(&self, slot: u32, on: bool) -> io::Result<()>;

    /// How many rings there are: one for each vCPU.
    fn count(&self) -> usize;

    /// Calls `found` with slot and page of each entry of a ring, which is harvested by that. Its page stays unprotected, and its
    /// place in the ring taken, until the reset. `is_full` means that its vCPU cannot continue without room. Returns how many
    /// places there are to reset.
    fn harvest(&self, ring: usize, is_full: bool, found: &mut dyn FnMut(u32, u64)) -> usize;

    /// Protects the pages of the harvested entries of this ring and frees their places. True if the kernel has overrun the ring:
    /// written pages may be missing in it.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn reset(&self, ring: usize) -> io::Result<bool>;
}

/// KVM's pages in a page of the layout.
fn per_page(layout: &Layout) -> u64 {
    layout.page_size().bytes() as u64 / KVM_PAGE_BYTES
}

/// The extent where a slot begins, and the one after its end.
///
/// # Panics
/// If the slot does not begin on an extent, or reaches beyond its block.
fn extents_of(layout: &Layout, slot: &Slot) -> std::ops::Range<u64> {
    let extent = EXTENT_PAGES * layout.page_size().bytes() as u64;
    let block = layout.blocks().get(slot.block as usize).unwrap_or_else(|| panic!("{slot:?}: no such block"));
    let end = slot.offset + slot.length;
    assert!(slot.offset.is_multiple_of(extent), "{slot:?} does not begin on an extent");
    assert!(slot.length > 0 && slot.length.is_multiple_of(KVM_PAGE_BYTES), "{slot:?} is not of whole pages");
    assert!(end <= block.length.next_multiple_of(KVM_PAGE_BYTES), "{slot:?} in a block of {} bytes", block.length);
    slot.offset / extent..end.div_ceil(extent)
}
