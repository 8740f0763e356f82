//! The last handshake against a peer played by hand: whatever the peer sends or omits, the source guest survives,
//! never two run, and if none runs an end reports it (law 7).

mod cancel;
mod destination;
mod silence;
mod source;

use std::time::Duration;

use memferry::settings::SourceSettings;
use memferry_tests::source_settings;

/// No test here takes this long unless something hangs.
const HANG: Duration = Duration::from_secs(60);
/// Bytes of the guest: more than one stretch, and not a multiple of a page.
const LENGTH: u64 = (3 << 20) + 5;

fn settings() -> SourceSettings {
    SourceSettings { max_rounds: 1, ..source_settings(1, 1) }
}

fn block_on<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async { tokio::time::timeout(HANG, test).await.expect("it hangs") })
}
