//! Measures the accuracy of plans: workloads are recorded, planned and then moved, over links made of the token
//! bucket.
//!
//! ```text
//! cargo run --release -p memferry-tests --example plan [CASE…]      with RUNS=3 each is moved so often; ROUNDS=1 shows rounds
//! ```
//!
//! The model was developed with the first half of the cases; the second half is for validation only.

use std::error::Error;
use std::time::Duration;

use memferry::codec::Codec;
use memferry::settings::{EncoderSettings, OnMiss, Verify, XbzrleSettings};
use memferry_guests::workload::{Pattern, WriterSettings};
use memferry_tests::foreseen::{Case, Went, median, off, settings, writer};

const RECORDED: Duration = Duration::from_secs(5);
const ALL: (f64, f64) = (0.0, 1.0);
const HOT: Pattern = Pattern::HotSpot { pages: 0.05, writes: 0.9 };
const ZIPF: Pattern = Pattern::Zipf { exponent: 1.1 };

fn main() -> Result<(), Box<dyn Error>> {
    let wanted: Vec<_> = std::env::args().skip(1).collect();
    let runs = std::env::var("RUNS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(2);
    let runtime = tokio::runtime::Runtime::new()?;
    println!("{:<16} {:>9} {:>16} {:>18} {:>22}", "case", "rounds", "total s", "sent MB", "downtime ms");
    let mut errors: [Vec<f64>; 3] = Default::default();
    let is_wanted = |case: &Case| wanted.is_empty() || wanted.iter().any(|name| name == case.name);
    for case in cases().into_iter().filter(is_wanted) {
        let (foreseen, went) = runtime.block_on(async {
            let foreseen = case.foresee(RECORDED).await;
            let mut went = Vec::new();
            for _ in 0..runs {
                went.push(case.run().await);
            }
            (foreseen, median(&went))
        });
        let off = print(case.name, &foreseen, &went);
        errors.iter_mut().zip(off).for_each(|(errors, off)| errors.push(off.abs()));
    }
    let mut middle = |at: usize| {
        errors[at].sort_by(f64::total_cmp);
        errors[at].get(errors[at].len() / 2).copied().unwrap_or(0.0) * 100.0
    };
    println!("median off: total {:.0} %, sent {:.0} %, downtime {:.0} %", middle(0), middle(1), middle(2));
    Ok(())
}

/// The forecast, the actual result, and the error.
fn print(name: &str, foreseen: &Went, went: &Went) -> [f64; 3] {
    let off = [off(foreseen.total, went.total), off(foreseen.sent, went.sent), off(foreseen.downtime, went.downtime)];
    let ended = if foreseen.moved == went.moved { "" } else { "   ends otherwise!" };
    println!(
        "{name:<16} {:>3} {:>3}   {:>5.2} {:>5.2} {:>+4.0}%  {:>6.1} {:>6.1} {:>+4.0}%   {:>6.0} {:>6.0} {:>+4.0}%{ended}",
        foreseen.rounds,
        went.rounds,
        foreseen.total,
        went.total,
        off[0] * 100.0,
        foreseen.sent,
        went.sent,
        off[1] * 100.0,
        foreseen.downtime * 1e3,
        went.downtime * 1e3,
        off[2] * 100.0,
    );
    off
}

#[derive(Clone, Copy)]
enum Encoder {
    Raw,
    Whole(Codec),
    Deltas,
    /// With a cache of this many MiB, and misses compressed.
    Cached(u64),
}

fn cases() -> Vec<Case> {
    use Encoder::{Cached, Deltas, Raw, Whole};
    let one = |pattern, pages, bytes| vec![writer(pattern, pages, bytes, ALL)];
    let two = |one: WriterSettings, other: WriterSettings| vec![one, other];
    vec![
        case("uniform-deltas", 128, one(Pattern::Uniform, 20_000.0, 64), 30, 150, Deltas, false),
        case("hot-deltas", 128, one(HOT, 30_000.0, 256), 25, 60, Deltas, false),
        case("log-deltas", 128, one(Pattern::Sequential, 9_000.0, 1024), 30, 60, Deltas, false),
        case("zipf-lz4", 128, one(ZIPF, 10_000.0, 64), 40, 200, Whole(Codec::Lz4), false),
        case("uniform-raw", 128, one(Pattern::Uniform, 4_000.0, 4096), 60, 200, Raw, false),
        case("diverges-raw", 64, one(Pattern::Uniform, 40_000.0, 4096), 60, 200, Raw, false),
        // For validation: not used to develop the model.
        case("idle-verified", 192, one(Pattern::Uniform, 10.0, 64), 80, 300, Deltas, true),
        case(
            "two-deltas",
            128,
            two(writer(HOT, 6_000.0, 32, (0.0, 0.4)), writer(Pattern::Sequential, 1_500.0, 2048, (0.4, 1.0))),
            30,
            100,
            Deltas,
            false,
        ),
        case("zipf-cache", 128, one(Pattern::Zipf { exponent: 0.8 }, 12_000.0, 128), 30, 150, Cached(24), false),
        case(
            "hot-zstd",
            128,
            one(Pattern::HotSpot { pages: 0.2, writes: 0.7 }, 6_000.0, 512),
            30,
            250,
            Whole(Codec::Zstd { level: 1 }),
            true,
        ),
        case(
            "busy-throttled",
            96,
            two(writer(Pattern::Uniform, 20_000.0, 1024, (0.0, 0.5)), writer(ZIPF, 20_000.0, 16, (0.5, 1.0))),
            25,
            150,
            Deltas,
            false,
        ),
        case("sweep-raw", 96, one(Pattern::Sequential, 9_000.0, 4096), 60, 150, Raw, true),
    ]
}

fn case(
    name: &'static str,
    mib: u64,
    writers: Vec<WriterSettings>,
    cap: u64,
    limit: u64,
    encoder: Encoder,
    verify: bool,
) -> Case {
    let lz4 = Some(Codec::Lz4);
    let encoder = match encoder {
        Encoder::Raw => EncoderSettings { compress: None, xbzrle: None },
        Encoder::Whole(codec) => EncoderSettings { compress: Some(codec), xbzrle: None },
        Encoder::Deltas => EncoderSettings { compress: lz4, xbzrle: Some(XbzrleSettings::default()) },
        Encoder::Cached(mib) => EncoderSettings {
            compress: lz4,
            xbzrle: Some(XbzrleSettings {
                cache_bytes: mib << 20,
                on_miss: OnMiss::Compress,
                ..XbzrleSettings::default()
            }),
        },
    };
    let settings = settings(encoder, Some(cap), limit, if verify { Verify::Full } else { Verify::Off });
    Case { name, mib, writers, settings }
}
