//! A plan compared with its migration: for a guest that is not written, the forecast number of bytes is sent.
//!
//! Times, and guests that are written, depend on the machine: `examples/plan.rs` measures the accuracy of those
//! plans.

use std::time::Duration;

use memferry::codec::Codec;
use memferry::settings::{EncoderSettings, SourceSettings, Verify};
use memferry_tests::foreseen::{Case, off};
use memferry_tests::source_settings;

#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_is_what_was_foreseen() {
    for compress in [None, Some(Codec::Snap), Some(Codec::Lz4), Some(Codec::Zstd { level: 1 })] {
        let settings = SourceSettings {
            encoder: EncoderSettings { compress, xbzrle: None },
            downtime_limit: Duration::from_secs(20),
            verify: Verify::Off,
            ..source_settings(2, 2)
        };
        let case = Case { name: "idle", mib: 24, writers: vec![], settings };
        let (foreseen, went) = (case.foresee(Duration::from_millis(100)).await, case.run().await);
        println!("{compress:?}: foreseen {foreseen:.3?}, came to {went:.3?}");
        assert!(foreseen.moved && went.moved, "{compress:?}");
        assert!(off(foreseen.sent, went.sent).abs() < 0.05, "{compress:?}: {} of {} MB", foreseen.sent, went.sent);
    }
}
