//! How much memory a migration needs, known before it starts (law 9).
//!
//! Everything in flight lies in pooled buffers of one extent each; the queues carry those buffers and small headers.
//! The bound is the sum of: pools, XBZRLE cache, compressors, guest state (`max_state`, with the frames that carry it),
//! the process at idle (`PROCESS`), and what grows with the guest: bitmaps, pages in flight, and digests. For a guest
//! of 32 GiB or more for each lane the last group is less than 0.02 %, a log with one bit for each page included. The
//! pools grow with the number of lanes and with the page size.

use std::sync::Arc;

use memferry_stages::batch::group_pages;
use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::codec::{Compressor, Decompressor};
use memferry_stages::dirty_log::DirtyLog;
use memferry_stages::exclusions::Exclusions;
use memferry_stages::geometry::{Layout, PageSize};
use memferry_stages::in_flight::InFlight;
use memferry_stages::meter::Meter;
use memferry_stages::page_hashes::PageHashes;
use memferry_stages::pool::BufferPool;
use memferry_stages::wire::messages::MAX_STATE_CHUNK;

use super::digests;
use super::error::MigrationError;
use crate::host;
use crate::settings::{SourceSettings, Verify};
use crate::values::Size;

/// The most memory that an idle program needs for one end, as `tests/program/memory.rs` measures it: its code and
/// libraries, the stacks and arenas of its threads, connections, events and report. A VMM that embeds the library has
/// most of it anyway.
pub(super) const PROCESS: u64 = 24 << 20;

/// Batches that wait between scanner and detector, a lane: descriptors only, enough for two stretches of 4 KiB pages.
pub(super) const SCANNED: usize = 16;
/// Batches that wait between detector and encoder, a lane.
pub(super) const COPIED: usize = 2;
/// Frames that wait before a sender, a lane that shares it.
pub(super) const ENCODED: usize = 4;
/// Frames that wait between receiver and loader, a lane.
pub(super) const ARRIVED: usize = 4;
/// Control messages that wait on their way out.
pub(super) const CONTROL: usize = 8;

/// Buffers that a lane's detector copies into: those that wait behind it (queued as copies or as raw frames), and two at work.
const COPY_BUFFERS: usize = COPIED + ENCODED + 2;
/// Buffers that a lane's encoder writes into: those that wait behind it, and two at work.
const CODE_BUFFERS: usize = ENCODED + 2;
/// Buffers that a connection receives into, for each lane: those that wait, and two at work.
const LOAD_BUFFERS: usize = ARRIVED + 2;

/// A lane's pool for copies of pages.
pub(super) fn copy_pool(page_size: PageSize) -> BufferPool {
    BufferPool::new(COPY_BUFFERS, page_size.extent_bytes())
}

/// A lane's pool for encoded payloads.
pub(super) fn code_pool(page_size: PageSize) -> BufferPool {
    BufferPool::new(CODE_BUFFERS, page_size.extent_bytes())
}

/// A connection's pool for received payloads.
pub(super) fn load_pool(page_size: PageSize, lanes_here: usize) -> BufferPool {
    BufferPool::new(LOAD_BUFFERS * lanes_here, page_size.extent_bytes())
}

/// Bytes of the largest group of pages that is compressed.
fn group_bytes(page_size: PageSize) -> u64 {
    (group_pages(page_size) * page_size.bytes()) as u64
}

/// The most memory that a source takes for itself, in bytes: pools, caches, compressors and the state for each page.
/// The memory of the guest's dirty logs is added to it. `may_leave_out`: can there be pages that do not travel?
#[must_use]
pub fn source_bound(layout: &Layout, settings: &SourceSettings, may_leave_out: bool) -> u64 {
    let extent = layout.page_size().extent_bytes() as u64;
    let pools = u64::from(settings.lanes) * (COPY_BUFFERS + CODE_BUFFERS) as u64 * extent;
    let cache = cache_bytes(layout, settings);
    let compressor = settings.encoder.compress.map_or(0, |codec| {
        Compressor::for_groups(codec, layout.page_size()).memory_bytes() + group_bytes(layout.page_size())
    });
    let compressors = u64::from(settings.lanes) * compressor;
    let in_flight = InFlight::bound_bytes(layout, settings.lanes);
    // After a lost connection: the received bitmap as it arrives, and what is put back. No stage has buffers then.
    let put_back = if settings.recovery.attempts > 0 { 2 * DirtyBitmap::bytes_of(layout) } else { 0 };
    let pools = pools.max(put_back);
    // A switch to postcopy: the pages that were named, those that were found besides, and those that are sent urgently.
    let switch = if settings.mode.may_switch() { 3 * DirtyBitmap::bytes_of(layout) } else { 0 };
    let all_else =
        PROCESS + pools + switch + compressors + source_keeps(layout, in_flight, settings.verify, may_leave_out);
    // These settings are the operator's and may have any value.
    all_else.saturating_add(cache).saturating_add(state_bytes(settings.max_state_bytes, STATE_FRAMES))
}

/// The smallest cache in bytes that holds pages: two for each lane.
pub fn least_cache(page_bytes: u64, lanes: u16) -> u64 {
    page_bytes.saturating_mul(2 * u64::from(lanes))
}

/// The bytes of the cache that a source of such a guest takes: the configured size, but no more than the guest's
/// memory.
pub fn cache_bytes(layout: &Layout, settings: &SourceSettings) -> u64 {
    let most = layout.bytes().max(least_cache(layout.page_size().bytes() as u64, settings.lanes));
    settings.encoder.xbzrle.as_ref().map_or(0, |xbzrle| xbzrle.cache_bytes.min(most))
}

/// Describes why a cache is larger than the guest's memory, and what to configure instead.
pub fn cache_beyond_guest(cache: u64, guest_bytes: u64, page_bytes: u64, lanes: u16) -> Option<(String, String)> {
    let (cache, guest) = (Size(cache), Size(guest_bytes));
    let most = guest.max(Size(least_cache(page_bytes, lanes)));
    let what = format!("an XBZRLE cache of {cache} is larger than the guest's memory, {guest}");
    (cache > most).then(|| (what, format!("write {most} or less, or leave it out")))
}

/// The per-page state of a source: pages that are dirty, pages that are untouched, pages that can be sent as deltas (in the
/// cache, or known to be zero), pages that do not travel, pages in flight, and digests.
pub(super) fn source_keeps(layout: &Layout, in_flight: u64, verify: Verify, may_leave_out: bool) -> u64 {
    let digests = verification(layout, verify, may_leave_out);
    let exclusions = if may_leave_out { Exclusions::bytes_of(layout) } else { 0 };
    4 * DirtyBitmap::bytes_of(layout) + exclusions + in_flight + digests
}

/// The per-page state of a destination: received pages, pages that never come, and digests.
pub(super) fn destination_keeps(layout: &Layout, verify: Verify, may_leave_out: bool) -> u64 {
    let digests = verification(layout, verify, may_leave_out);
    (1 + u64::from(may_leave_out)) * DirtyBitmap::bytes_of(layout) + digests
}

/// The hashes that verification needs: of pages, and of stretches.
fn verification(layout: &Layout, verify: Verify, may_leave_out: bool) -> u64 {
    let digests = digests::bound_bytes(layout, may_leave_out);
    match verify {
        Verify::Off => 0,
        Verify::Pages => PageHashes::bytes_of(layout) + digests,
        Verify::Full => digests,
    }
}

/// The memory of a guest's dirty logs.
pub(super) fn logs_bytes(logs: &[Arc<dyn DirtyLog>]) -> u64 {
    logs.iter().map(|log| log.memory_bytes()).sum()
}

/// The most memory that a destination takes for itself, in bytes. Assumes digests that leave pages out, for the source
/// decides on them.
#[must_use]
pub fn destination_bound(layout: &Layout, lanes: u16, max_state: u64) -> u64 {
    let extent = layout.page_size().extent_bytes() as u64;
    let decompressor = Decompressor::bound_bytes() + group_bytes(layout.page_size());
    let pages = u64::from(lanes) * (LOAD_BUFFERS as u64 * extent + decompressor)
        + destination_keeps(layout, Verify::Pages, true);
    PROCESS + pages + state_bytes(max_state, state_messages(lanes.into()))
}

/// Frames of guest state on the way out, each a copy of a chunk: those that wait, and two in use.
pub(super) const STATE_FRAMES: u64 = CONTROL as u64 + 2;

/// Messages of guest state on the way in: those that wait, one in use, and one that each connection reads. At most as
/// many of these as there are lanes.
pub(super) fn state_messages(lanes: u64) -> u64 {
    CONTROL as u64 + 1 + lanes
}

/// Guest state of the given size, and the given number of copies of its chunks in flight.
pub(super) fn state_bytes(state: u64, chunks: u64) -> u64 {
    state.saturating_add(state.min(chunks * MAX_STATE_CHUNK as u64))
}

/// Does this host have the memory to send or receive such a guest? A block may be larger than the host's memory (a
/// sparse file, or a length that a hostile source sends), and an allocation that fails would abort the whole program.
///
/// # Errors
/// The memory needed and the memory available, if the first is more than half of the memory that this process may use.
pub(super) fn check_host(bound: u64) -> Result<(), MigrationError> {
    match host::beyond_half_of_memory(bound) {
        None => Ok(()),
        Some(host) => Err(MigrationError::TooLarge(format!(
            "to move its memory takes {bound} bytes beside it, more than half of {host}"
        ))),
    }
}

/// The same check for a source, where the cache alone may be too large.
///
/// # Errors
/// What is too large, and by which figures.
pub fn check_source(bound: u64, layout: &Layout, settings: &SourceSettings) -> Result<(), MigrationError> {
    let cache = cache_bytes(layout, settings);
    check_host(bound.saturating_sub(cache))?;
    check_cache(bound, cache).map_err(MigrationError::CacheTooLarge)
}

/// Does this host have the memory for a cache of the given size, in a migration that needs `bound` with it?
///
/// # Errors
/// What is wrong, and which value is accepted.
pub(super) fn check_cache(bound: u64, cache: u64) -> Result<(), String> {
    let Some(host) = host::beyond_half_of_memory(bound) else { return Ok(()) };
    let most = (host.bytes / 2).saturating_sub(bound.saturating_sub(cache)) >> 20;
    Err(format!(
        "a cache of {} takes, with all else that the migration does, more than half of {host}; \
         write {most} MiB or less",
        Size(cache)
    ))
}

/// The memory that was used: the peak of each pool and of each stage, and the per-page state.
pub(super) fn peak(pools: &[BufferPool], stages: &[Arc<Meter>], keeps: u64) -> u64 {
    pools.iter().map(BufferPool::peak_bytes).sum::<u64>()
        + stages.iter().map(|stage| stage.peak_bytes()).sum::<u64>()
        + keeps
}

#[cfg(test)]
mod tests {
    use memferry_stages::geometry::BlockInfo;

    use super::*;

    /// A larger cache holds no more pages, so it is not counted.
    #[test]
    fn a_cache_has_at_most_the_bytes_of_its_guest() {
        let settings = SourceSettings::default();
        let layout = |bytes| Layout::new(PageSize::DEFAULT, vec![BlockInfo::new("ram", bytes)]).unwrap();
        assert_eq!(cache_bytes(&layout(64 << 20), &settings), 64 << 20);
        assert_eq!(cache_bytes(&layout(1 << 30), &settings), 256 << 20);
        // Two pages of each lane, for a guest of one page.
        assert_eq!(cache_bytes(&layout(4096), &settings), 4 * 4096);
        assert!(source_bound(&layout(64 << 20), &settings, false) < 128 << 20);
        assert_eq!(cache_beyond_guest(64 << 20, 64 << 20, 4096, 2), None);
        assert_eq!(cache_beyond_guest(4 * 4096, 1, 4096, 2), None);
        let (what, help) = cache_beyond_guest(65 << 20, 64 << 20, 4096, 2).unwrap();
        assert_eq!(what, "an XBZRLE cache of 65 MiB is larger than the guest's memory, 64 MiB");
        assert_eq!(help, "write 64 MiB or less, or leave it out");
    }
}
