//! A mostly unwritten guest of 4 GiB: pages that were never touched are not read, not sent, not written and take no
//! memory, at either end, digests included.
//!
//! A binary of its own: resident memory is counted for the whole process.

use std::sync::Arc;

use memferry::events::Outcome;
use memferry::settings::{EncoderSettings, SourceSettings, Verify};
use memferry_stages::dirty_log::UserfaultLog;
use memferry_stages::geometry::PageSize;
use memferry_stages::memory::Memory;
use memferry_tests::sparse::{Backing, Held, LogKind, SparseGuest, written};
use memferry_tests::{migrate, skipped, source_settings};
use memferry_transports::memory::MemoryTransport;
use tokio_util::sync::CancellationToken;

const LENGTH: u64 = 4 << 30;
const PAGES: u64 = 512;
/// Pools of both ends in two lanes, bitmaps, page hashes (8 MiB at each end), queues, threads and the allocator's
/// overhead, in KiB.
const ENGINE: u64 = 48 << 10;

fn little_is_moved(backing: Backing, log: LogKind, verify: Verify) {
    let source = Arc::new(SparseGuest::source(backing, log, LENGTH, PAGES));
    let destination = Arc::new(SparseGuest::destination(backing, log));
    let encoder = EncoderSettings { compress: None, xbzrle: None };
    let settings = SourceSettings { encoder, verify, ..source_settings(2, 2) };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let transport = Arc::new(MemoryTransport::new(1 << 20));
    let before = Held::here();
    let migration = migrate(source.clone(), destination.clone(), transport, settings, CancellationToken::new());
    let ends = runtime.block_on(migration);
    let after = Held::here();
    assert_eq!(ends.source.outcome, Outcome::Completed, "{:?}", ends.source.error);
    assert_eq!(ends.destination.verified, Some(true));

    let (source, destination) = (source.counted(), destination.counted());
    assert_eq!((source.written(), destination.written()), (0, PAGES), "each page once, and no zeros");
    if verify == Verify::Full {
        // The first round and the digests read each page once; the cost of the digests is measured twice, on eight
        // stretches.
        let sampled = 2 * 8 * PAGES.div_ceil(LENGTH >> 21);
        assert!((2 * PAGES..=2 * PAGES + sampled).contains(&source.read()), "{} pages were read", source.read());
        assert_eq!(destination.read(), PAGES, "by the digests");
    } else {
        // The background check reads pages that were sent, and those alone.
        let [here, there] = [ends.source.checked, ends.destination.checked].map(|checked| checked.unwrap().of);
        assert_eq!((here, there), (PAGES, PAGES));
    }

    let (mut here, mut there) = ([0; 4096], [0; 4096]);
    for page in written(LENGTH, PAGES) {
        source.read_page(PageSize::DEFAULT, page, &mut here).unwrap();
        destination.read_page(PageSize::DEFAULT, page, &mut there).unwrap();
        assert!(here == there && here != [0; 4096], "page {page}");
    }
    for memory in [source, destination] {
        let untouched = memory.untouched(PageSize::DEFAULT).unwrap();
        let untouched: u64 = untouched.iter().map(|range| range.end - range.start).sum();
        assert_eq!(untouched, LENGTH / 4096 - PAGES, "{memory:?}");
    }

    let (Some(before), Some(after)) = (before, after) else {
        return skipped("there is no /proc that says what is resident");
    };
    let grown = after.resident.saturating_sub(before.resident);
    assert!(grown <= PAGES * 4 + ENGINE, "{grown} KiB more are resident");
}

/// One after another, for the same reason.
#[test]
fn a_guest_of_which_little_was_written_costs_little() {
    let followed = UserfaultLog::supported();
    for (backing, verify) in [
        (Backing::Anonymous, Verify::Full),
        (Backing::Anonymous, Verify::Pages),
        (Backing::Memfd, Verify::Full),
        (Backing::Memfd, Verify::Pages),
    ] {
        little_is_moved(backing, LogKind::Software, verify);
        match &followed {
            Ok(()) => little_is_moved(backing, LogKind::Userfault, verify),
            Err(why) => skipped(why),
        }
    }
}
