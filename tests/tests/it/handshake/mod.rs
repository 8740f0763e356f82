//! The last handshake against a peer played by hand: whatever the peer sends or omits, the source guest survives,
//! never two run, and if none runs an end reports it (law 7).

mod cancel;
mod destination;
mod silence;
mod source;

use std::time::Duration;

use memferry::events::{Ended, Event, Outcome};
use memferry::settings::SourceSettings;
use memferry_tests::source_settings;

/// No test here takes this long unless something hangs.
const HANG: Duration = Duration::from_secs(60);
/// Bytes of the guest: more than one stretch, and not a multiple of a page.
const LENGTH: u64 = (3 << 20) + 5;

fn settings() -> SourceSettings {
    SourceSettings { max_rounds: 1, ..source_settings(1, 1) }
}

/// It ended this way and reported it last; the error contains all of `words`.
#[track_caller]
fn says(ended: &Ended, last: Option<&Event>, outcome: Outcome, words: &[&str]) {
    let error = ended.error.clone().unwrap_or_default();
    assert_eq!(ended.outcome, outcome, "{error}");
    for word in words {
        assert!(error.contains(word), "{word:?} is not in {error:?}");
    }
    assert_eq!(last, Some(&Event::Ended(Box::new(ended.clone()))));
}

fn block_on<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async { tokio::time::timeout(HANG, test).await.expect("it hangs") })
}
