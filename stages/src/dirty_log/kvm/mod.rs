//! The dirty logs of a KVM machine.
//!
//! | log | the kernel keeps | re-arms |
//! |---|---|---|
//! | [`KvmLog`] | a bit for each page, until it is cleared | in rearm, a chunk at a time, exactly what was fetched |
//! | [`KvmRingLog`] | a ring of written pages for each vCPU | in sync, before what was harvested is in the bitmap |
//!
//! Both see what vCPUs and the kernel itself write to the machine's [slots](Slot). What the VMM writes (its devices) is not
//! seen: it marks, best in a [`SoftwareLog`](super::SoftwareLog) of its own beside this one.
//!
//! The kernel is behind two small traits, [`LogCalls`] and [`RingCalls`], so that the logs can be tried against a model
//! that forgives nothing.

mod log;
#[cfg(test)]
mod machine_tests;
#[cfg(test)]
mod model;
mod ring;
#[cfg(test)]
mod tests;

use crate::geometry::{EXTENT_PAGES, Layout};
use crate::kvm::{KVM_PAGE_BYTES, LogCalls, RingCalls, Slot};

pub use log::KvmLog;
pub use ring::KvmRingLog;

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
