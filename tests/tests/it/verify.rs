//! What each way of comparing the memories finds: a write that no log reports, and a page that something else than the loader changes.
//!
//! The log's sync after round 1 is held, so that every page has been sent once, and none is sent again until the test has done what it does.

use std::sync::Arc;

use memferry::events::{Ended, Outcome};
use memferry::settings::{SourceSettings, Verify};
use memferry_stages::geometry::PageSize;
use memferry_stages::page_hashes::Coverage;
use memferry_tests::{Ends, Recorder, TestGuest, Trouble, migrate_watched, source_settings};
use memferry_transports::memory::MemoryTransport;
use tokio_util::sync::CancellationToken;

const PAGES: u64 = 768;
/// A page that is not zero.
const PAGE: u64 = 589;
const OFFSET: usize = 589 * 4096 + 17;

/// Moves a guest that does not write. `meanwhile` is called between the first round and the sync after it.
fn moved(verify: Verify, lanes: u16, meanwhile: impl FnOnce(&TestGuest, &TestGuest) + Send + 'static) -> Ends {
    let source = TestGuest::source(PageSize::DEFAULT, &[PAGES * 4096]).troubled(Trouble::SyncWaits).running(0);
    let destination = Arc::new(TestGuest::destination());
    let held = {
        let (source, destination) = (source.clone(), destination.clone());
        std::thread::spawn(move || {
            source.until_the_log_waits();
            meanwhile(&source, &destination);
            source.repair();
        })
    };
    let settings = SourceSettings { verify, ..source_settings(lanes, 1) };
    let transport = Arc::new(MemoryTransport::new(64 << 10));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (cancel, recorder) = (CancellationToken::new(), Recorder::default());
    let ends =
        runtime.block_on(migrate_watched(source.clone(), destination.clone(), transport, settings, cancel, recorder));
    held.join().unwrap();
    let completed = ends.source.outcome == Outcome::Completed;
    assert_eq!((source.runs(), destination.runs()), (!completed, completed));
    ends
}

/// Changes a byte of a page that was sent and loaded. With page hashes, waits until the background check of that end has read it before
/// and after: a second read after the change begins behind the end of the first.
fn change(guest: &TestGuest, verify: Verify) {
    if verify == Verify::Pages {
        guest.until_read(PAGE, 1);
    }
    guest.corrupt(0, OFFSET);
    if verify == Verify::Pages {
        guest.until_read(PAGE, 3);
    }
}

#[track_caller]
fn failed(ended: &Ended, words: &[&str]) {
    assert_eq!(ended.outcome, Outcome::Failed);
    let error = ended.error.as_deref().unwrap_or_default();
    words.iter().for_each(|word| assert!(error.contains(word), "{word:?} is not in {error:?}"));
}

#[test]
fn a_write_that_the_log_loses_is_found_by_both() {
    for (verify, words) in [(Verify::Pages, "the dirty log lost a write"), (Verify::Full, "verification failed")] {
        let ends = moved(verify, 2, move |source, _| change(source, verify));
        failed(&ends.source, &[words, "page 589 of block \"ram0\", at byte 0x24d000"]);
    }
}

/// [`Verify::Full`] finds it too: see `faults`.
#[test]
fn a_page_that_changes_at_the_destination_is_found() {
    let ends = moved(Verify::Pages, 3, |_, destination| change(destination, Verify::Pages));
    let words =
        ["verification failed", "page 589 of block \"ram0\", at byte 0x24d000 was changed here after it was loaded"];
    failed(&ends.destination, &words);
    failed(&ends.source, &words);
}

#[test]
fn without_verification_neither_is_found() {
    let ends = moved(Verify::Off, 2, |source, _| source.corrupt(0, OFFSET));
    assert_eq!((ends.source.outcome, ends.source.verified), (Outcome::Completed, None));
    assert_eq!(ends.source.checked, None);
}

#[test]
fn the_report_has_the_share_of_pages_that_were_read_again() {
    let ends = moved(Verify::Pages, 2, |source, destination| {
        for guest in [source, destination] {
            guest.until_read(PAGES - 1, 1);
            // From the last page to the last page, in a circle.
            guest.until_read(PAGES - 1, 1);
        }
    });
    assert_eq!((ends.source.outcome, ends.source.verified), (Outcome::Completed, Some(true)));
    // Every third page is zero: the source never read it, and the destination never wrote it. One of these is written as the paused
    // guest's state is saved, and sent in the last round.
    let all = Coverage { checked: PAGES - PAGES / 3, of: PAGES - PAGES / 3 + 1 };
    assert_eq!((ends.source.checked, ends.destination.checked), (Some(all), Some(all)));
    assert_eq!(moved(Verify::Full, 2, |_, _| {}).source.checked, None);
}
