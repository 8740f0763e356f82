//! A plan beside the migration that it is of: a workload is recorded, planned, and then moved over a link that the token bucket makes.
//!
//! The margins are those of a machine that does other things as well; `examples/plan.rs` has more workloads, and says how good it is
//! when nothing disturbs it.

use std::time::Duration;

use memferry::codec::Codec;
use memferry::guest::workload::Pattern;
use memferry::settings::{EncoderSettings, SourceSettings, XbzrleSettings};
use memferry_tests::foreseen::{Case, median, off, writer};
use memferry_tests::source_settings;

const RECORDED: Duration = Duration::from_secs(3);
const RUNS: usize = 3;

fn cases() -> [Case; 3] {
    let settings = |cap: u64, limit, encoder| SourceSettings {
        encoder,
        max_bandwidth: Some(cap << 20),
        downtime_limit: Duration::from_millis(limit),
        max_rounds: 30,
        verify: false,
        ..source_settings(2, 2)
    };
    let raw = EncoderSettings { compress: None, xbzrle: None };
    let deltas = EncoderSettings { compress: Some(Codec::Lz4), xbzrle: Some(XbzrleSettings::default()) };
    let lz4 = EncoderSettings { compress: Some(Codec::Lz4), xbzrle: None };
    let case = |name, writer, settings| Case { name, mib: 64, writers: vec![writer], settings };
    let all = (0.0, 1.0);
    [
        case("uniform, raw", writer(Pattern::Uniform, 3_000.0, 4096, all), settings(40, 250, raw)),
        case("uniform, deltas", writer(Pattern::Uniform, 12_000.0, 128, all), settings(15, 150, deltas)),
        case("zipf, lz4", writer(Pattern::Zipf { exponent: 1.0 }, 6_000.0, 64, all), settings(20, 300, lz4)),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_goes_as_its_plan_has_it() {
    let mut errors: [Vec<f64>; 3] = Default::default();
    for case in cases() {
        let foreseen = case.foresee(RECORDED).await;
        let mut went = Vec::new();
        for _ in 0..RUNS {
            went.push(case.run().await);
        }
        let went = median(&went);
        println!("{}: foreseen {foreseen:.3?}, came to {went:.3?}", case.name);
        assert!(foreseen.moved && went.moved, "{}", case.name);
        let pairs = [(foreseen.total, went.total), (foreseen.sent, went.sent), (foreseen.downtime, went.downtime)];
        errors.iter_mut().zip(pairs).for_each(|(errors, (foreseen, came))| errors.push(off(foreseen, came).abs()));
    }
    let [total, sent, downtime] = errors.map(|mut errors| {
        errors.sort_by(f64::total_cmp);
        errors[errors.len() / 2]
    });
    println!("median off: total {total:.2}, sent {sent:.2}, downtime {downtime:.2}");
    assert!(total < 0.3 && sent < 0.3 && downtime < 0.6, "total {total:.2}, sent {sent:.2}, downtime {downtime:.2}");
}
