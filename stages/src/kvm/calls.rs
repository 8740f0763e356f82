//! What a dirty log asks of a KVM machine: the kernel behind two small traits.

use std::fmt;
use std::io;

/// What the dirty log asks of a machine.
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

/// What the dirty ring asks of a machine. Its rings are emptied one after another, so that it is known how many entries of
/// which of them the kernel reset.
pub trait RingCalls: Send + Sync + fmt::Debug {
    /// Switches the logging of a slot; when it is switched on, all is protected.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn set_logging(&self, slot: u32, on: bool) -> io::Result<()>;

    /// How many rings there are: one for each vCPU.
    fn count(&self) -> usize;

    /// Calls `found` with slot and page of each entry of a ring, which is harvested by that. Its page stays unprotected, and its
    /// place in the ring taken, until the reset. `is_full` says that its vCPU cannot go on for want of room. Returns how many
    /// places there are to reset.
    fn harvest(&self, ring: usize, is_full: bool, found: &mut dyn FnMut(u32, u64)) -> usize;

    /// Protects the pages of what was harvested of this ring and frees their places. True if the kernel has run over the ring:
    /// what was written may be missing in it.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn reset(&self, ring: usize) -> io::Result<bool>;
}
