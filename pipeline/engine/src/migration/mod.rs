//! Running a migration: the joined stages, the phases at the source and at the destination, and the last handshake. The
//! [`controller`](crate::controller) decides when to switch over.
//!
//! | | |
//! |---|---|
//! | `course` | what each end does and when, as a value: inputs and the time in, actions out |
//! | `driver` | delivers inputs to a course and performs its actions |
//! | `source`, `destination` | the worlds of the two courses: stages, peer, guest, operator, clock |
//! | `source_graph`, `destination_graph` | the stages, joined |
//! | `outcome` | the result for the caller: where the guest is, and why |
//! | `link`, `session` | connections opened, greeted and gathered |
//! | `turned_away` | refused peers, counted and reported |
//! | `senders` | the messages of the source, from Hello on |
//! | `alive` | heartbeats, and the watch for a silent peer |
//! | `arming` | starting the dirty logs, for a migration and for a program that only observes |
//! | `bounds` | the memory that a migration needs |
//! | `excluded` | the pages that never travel, for both ends |

mod alive;
#[doc(hidden)]
pub mod arming;
mod bounds;
mod cancel;
mod checker;
mod connection;
mod course;
mod destination;
mod destination_graph;
mod digests;
mod driver;
mod error;
#[doc(hidden)]
pub mod excluded;
mod link;
mod loss;
mod outcome;
#[cfg(test)]
mod pair;
mod plane;
mod senders;
mod session;
mod source;
mod source_graph;
mod speed;
mod stage_set;
mod state;
mod turned_away;

use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::geometry::{BlockInfo, Layout, PageSize};
use memferry_stages::memory::GuestMemory;
use tokio::time::{Interval, MissedTickBehavior};

// Shared with the other crates of this workspace. Not part of the public interface; changes without notice.
#[doc(hidden)]
pub use bounds::{cache_beyond_guest, cache_bytes, check_source, destination_bound, least_cache, source_bound};
pub use course::handshake::{HandoverError, NotStarted};
pub use destination::receive;
#[doc(hidden)]
pub use digests::{DIGEST_PASSES, HashingCost, downtime as digest_downtime, hashing_cost};
pub use error::Failure as StageFailure;
pub use error::{MigrationError, NotRecovered};
pub use loss::{Loss, Silence};
pub use memferry_stages::wire::WireError;
pub use memferry_stages::wire::reader::ReadError;
pub use outcome::{ReceiveError, Received, RunsHere, SendError, Sent};
pub use plane::DataPlane;
pub use source::send;
pub use tokio_util::sync::CancellationToken;

use crate::events::BlockFacts;
use crate::guest::GuestError;
use error::guarded;

/// How long a peer may take to read the reason of a failure before its connections are dropped.
const FAREWELL: Duration = Duration::from_millis(500);
/// How long an end waits for its peer's reason after a connection has failed.
const PATIENCE: Duration = Duration::from_millis(500);

/// Ticks at this interval. After a delay the next one comes an interval later.
fn ticks(every: Duration) -> Interval {
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Runs a call that may block, on a thread where blocking is allowed.
///
/// # Panics
/// If the call panics.
async fn blocking<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(call).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// What was put aside, if it was not taken before: a mutex makes it shared, and is never locked.
fn unparked<T>(parked: &mut Mutex<Option<T>>) -> Option<T> {
    parked.get_mut().unwrap_or_else(PoisonError::into_inner).take()
}

/// Asks a guest for something that the migration can do without. A panic in the call is an error like any other.
async fn asked(call: impl FnOnce() -> Result<(), GuestError> + Send + 'static) -> Result<(), MigrationError> {
    guarded(async { Ok(blocking(call).await?) }).await
}

fn block_facts(layout: &Layout) -> Vec<BlockFacts> {
    let page_size = layout.page_size().bytes() as u64;
    let facts = |block: &BlockInfo| BlockFacts { id: block.id.clone(), bytes: block.length, page_size };
    layout.blocks().iter().map(facts).collect()
}

/// Describes both layouts if the built memory does not match the received blocks: page size, ids, lengths, guest
/// addresses.
pub(crate) fn built_otherwise(memory: &GuestMemory, page_size: PageSize, came: &[BlockInfo]) -> Option<String> {
    let built = memory.layout().blocks();
    if memory.page_size() != page_size {
        let [came, built] = [page_size, memory.page_size()].map(PageSize::bytes);
        return Some(format!("pages of {came} bytes came and pages of {built} bytes were built"));
    }
    if built.len() != came.len() {
        return Some(format!("{} RAM blocks came and {} were built", came.len(), built.len()));
    }
    let described =
        |block: &BlockInfo| format!("{:?} of {} bytes at {:#x}", block.id, block.length, block.guest_address);
    let is_other = |(came, built): &(&BlockInfo, &BlockInfo)| {
        (&came.id, came.length, came.guest_address) != (&built.id, built.length, built.guest_address)
    };
    let (came, built) = came.iter().zip(built).find(is_other)?;
    Some(format!("RAM block {} came and {} was built", described(came), described(built)))
}

/// Pages for which one query asks what is untouched. A fragmented guest answers with a range for every other page.
const PAGES_ASKED: u64 = 1 << 16;

/// The pages that need not be read: untouched, as far as the memory knows. Pages of unknown state are read. May block.
fn untouched_pages(memory: &GuestMemory) -> DirtyBitmap {
    let (layout, untouched) = (memory.layout(), DirtyBitmap::empty(memory.layout()));
    (0..layout.block_count()).for_each(|block| note_untouched(memory, block, 0..layout.block_pages(block), &untouched));
    untouched
}

/// Sets the bits of those of the given pages of a block that are untouched. May block.
fn note_untouched(memory: &GuestMemory, block: u32, pages: Range<u64>, untouched: &DirtyBitmap) {
    let mut start = pages.start;
    while start < pages.end {
        let asked = start..pages.end.min(start + PAGES_ASKED);
        start = asked.end;
        let answer = memory.block(block).memory.untouched_in(memory.page_size(), asked);
        answer.unwrap_or_default().into_iter().for_each(|range| untouched.set_range(block, range));
    }
}
