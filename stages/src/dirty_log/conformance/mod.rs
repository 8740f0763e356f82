//! The conformance kit: tests a dirty log against the contract of all of them.
//!
//! The author of a log provides a function that makes a [`Subject`]: memory, the logs that together track it, and a
//! [`Writer`] that stands for its guest. [`check`] makes several of them and acts as a migration's scanner and destination
//! on each. It ends with an equal copy, or with a [`Breach`] that names the lost page.
//!
//! | case | what must hold |
//! |---|---|
//! | quiet | memory without writers becomes clean and stays clean |
//! | found | every single write is found by the next sync |
//! | marked | a write that the log cannot see is found once it is marked |
//! | restarted | a log that was stopped can be started again, and misses nothing |
//! | unread | pages that leave the bitmap unread are armed: the next write to each is found |
//! | left out | excluded pages are neither read nor reported |
//! | schedules | in thousands of random orders of writes, holes, syncs, takes, reads and late reports nothing is lost, A-B-A included |
//! | race | nothing is lost under threads that never stop writing |
//!
//! # Example
//! ```
//! use std::sync::Arc;
//! use memferry_stages::dirty_log::conformance::{Subject, Writer, check};
//! use memferry_stages::dirty_log::{DirtyLog, SoftwareLog};
//! use memferry_stages::geometry::{BlockInfo, PageSize};
//! use memferry_stages::memory::{GuestMemory, MappedMemory, RamBlock};
//!
//! struct Guest(Arc<MappedMemory>, Arc<SoftwareLog>);
//!
//! impl Writer for Guest {
//!     fn store(&self, block: u32, offset: usize, bytes: &[u8]) {
//!         self.0.store(offset, bytes);
//!         let page = offset as u64 / 4096;
//!         self.1.mark(block, page..page + 1);
//!     }
//! }
//!
//! fn subject() -> Subject {
//!     let memory = Arc::new(MappedMemory::anonymous(100 * 4096).unwrap());
//!     let info = BlockInfo::new("ram", 100 * 4096);
//!     let block = RamBlock { info, memory: memory.clone(), fresh: true };
//!     let guest = GuestMemory::new(PageSize::DEFAULT, vec![block]).unwrap();
//!     let log = Arc::new(SoftwareLog::new(guest.layout()));
//!     Subject { memory: guest, logs: vec![log.clone()], writer: Arc::new(Guest(memory, log)) }
//! }
//! check(&subject).unwrap();
//! ```

mod cases;
mod mirror;
mod race;
mod schedule;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use fastrand::Rng;

use super::DirtyLog;
use crate::geometry::{Layout, PageAt};
use crate::memory::GuestMemory;

/// The subject of a test: a small guest, not started. A few hundred pages are enough; fewer make a harder test.
#[expect(missing_debug_implementations, reason = "a writer need not be Debug")]
pub struct Subject {
    /// Its memory; all zero.
    pub memory: GuestMemory,
    /// The logs that together see every write to it.
    pub logs: Vec<Arc<dyn DirtyLog>>,
    /// Its writer.
    pub writer: Arc<dyn Writer>,
}

/// Stands for a guest: writes memory in the way that the logs under test track. Called from several threads.
pub trait Writer: Send + Sync {
    /// Stores bytes that lie in one page, so that the logs find them: marks them where the logs need that.
    fn store(&self, block: u32, offset: usize, bytes: &[u8]);

    /// Makes pages zero by releasing them to the host, and marks them where the logs would not see it. False if this
    /// memory has no holes.
    fn punch(&self, block: u32, pages: Range<u64>) -> bool {
        let _ = (block, pages);
        false
    }

    /// Stores bytes in a way that the logs do not see, without a mark, which the kit makes. False if there is no such way.
    fn store_unseen(&self, block: u32, offset: usize, bytes: &[u8]) -> bool {
        let _ = (block, offset, bytes);
        false
    }
}

/// A case of the kit; the [module](self) lists what must hold in each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Case {
    /// Memory that nobody writes.
    Quiet,
    /// Writes that the log sees.
    Found,
    /// Writes that are marked.
    Marked,
    /// A log that is stopped and started again.
    Restarted,
    /// Pages that leave the bitmap unread.
    Unread,
    /// Pages that are excluded for the whole migration.
    LeftOut,
    /// Random orders.
    Schedules,
    /// Threads that never stop writing.
    Race,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Quiet => "quiet",
            Self::Found => "found",
            Self::Marked => "marked",
            Self::Restarted => "restarted",
            Self::Unread => "unread",
            Self::LeftOut => "left out",
            Self::Schedules => "schedules",
            Self::Race => "race",
        })
    }
}

/// A violation of the contract.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{case}: {what}")]
pub struct Breach {
    /// The case that found it.
    pub case: Case,
    /// The missed write.
    pub what: String,
}

/// Runs every case. Takes one to two seconds.
///
/// # Errors
/// The first [`Breach`]. An error that the log or the memory returns is one too.
pub fn check(make: &dyn Fn() -> Subject) -> Result<(), Breach> {
    check_as(make, Order::Right)
}

pub(in crate::dirty_log) fn check_as(make: &dyn Fn() -> Subject, order: Order) -> Result<(), Breach> {
    cases::quiet(make, order)?;
    cases::found(make, order)?;
    cases::marked(make, order)?;
    cases::restarted(make, order)?;
    cases::unread(make, order)?;
    cases::left_out(make, order)?;
    schedule::schedules(make, order)?;
    race::race(make, order)
}

/// The order of the kit's scanner. The wrong orders show that the kit finds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::dirty_log) enum Order {
    /// Take, re-arm, read.
    Right,
    /// Take, read, re-arm.
    ReadBeforeRearm,
    /// Read, re-arm, take.
    ReadBeforeTake,
}

impl Breach {
    fn new(case: Case, what: impl fmt::Display) -> Self {
        Self { case, what: what.to_string() }
    }

    /// Turns an error of the log or the memory into a breach.
    fn failed(case: Case) -> impl Fn(io::Error) -> Self {
        move |error| Self::new(case, format_args!("a call failed: {error}"))
    }
}

/// Any page of the guest.
fn any_page(random: &mut Rng, layout: &Layout) -> PageAt {
    let mut page = random.u64(..layout.pages());
    let mut block = 0;
    while page >= layout.block_pages(block) {
        page -= layout.block_pages(block);
        block += 1;
    }
    PageAt { block, page }
}

/// Where a page starts in its block, in bytes.
fn offset(layout: &Layout, at: PageAt) -> usize {
    usize::try_from(at.page).expect("a page in memory") * layout.page_size().bytes()
}

/// Every page of a guest.
fn all_pages(layout: &Layout) -> impl Iterator<Item = PageAt> + '_ {
    (0..layout.block_count()).flat_map(|block| (0..layout.block_pages(block)).map(move |page| PageAt { block, page }))
}
