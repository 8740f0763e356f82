//! Long runs of what `cargo test` does as a fixed sample.
//!
//! ```text
//! cargo run --release -p memferry-tests --example soak -- SUBJECT [COUNT [SEED]]
//! ```
//!
//! | subject | what COUNT counts |
//! |---|---|
//! | `cancel` | cancels while every core compresses; their latency is printed |
//! | `cuts` | places at which the connection is cut, in each direction |
//! | `frames` | frames that are damaged or malicious |
//! | `streams` | streams with such a frame, received by a whole destination |
//! | `files` | stored streams with one bit flipped |
//! | `hints` | migrations of a guest that hints, takes and writes pages all the time |
//! | `tls` | hostile clients at a TLS port, before and beside a real migration |
//! | `kills` | kills of each end of two programs, at random moments |
//! | `recovery` | migrations whose connections are cut, stalled, half-closed and refused, and as many cuts around Go |
//!
//! All but `cancel` run the test of that subject. The seed is random unless it is given; it is printed, and the same
//! seed draws the same again.

use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use memferry_tests::busy::Busy;
use tokio_util::sync::CancellationToken;

/// A subject whose tests draw what they try: their test binaries, and parts of their names.
struct Subject {
    name: &'static str,
    count: u64,
    binaries: &'static [&'static str],
    tests: &'static [&'static str],
}

const SUBJECTS: [Subject; 8] = [
    Subject { name: "cuts", count: 1000, binaries: &["it"], tests: &["faults::cut_"] },
    Subject { name: "frames", count: 1_000_000, binaries: &["it"], tests: &["hostile::a_hostile_frame"] },
    Subject { name: "streams", count: 10_000, binaries: &["it"], tests: &["hostile::a_destination_survives"] },
    Subject { name: "files", count: 10_000, binaries: &["it"], tests: &["hostile::a_file_with_one_bit_flipped"] },
    Subject { name: "hints", count: 100, binaries: &["it"], tests: &["exclusions::torture::ranges"] },
    Subject { name: "tls", count: 10_000, binaries: &["tls_hostile"], tests: &["hostile_clients"] },
    Subject {
        name: "kills",
        count: 200,
        binaries: &["program"],
        tests: &["kills::a_source_survives", "kills::a_destination_starts", "handover_kills::"],
    },
    Subject {
        name: "recovery",
        count: 1000,
        binaries: &["recovery", "it"],
        tests: &["random_faults", "recovery::cuts_around_go"],
    },
];

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().unwrap_or_default();
    let mut number = || arguments.next().map(|text| text.parse::<u64>().expect("COUNT and SEED are numbers"));
    let (count, seed) = (number(), number());
    if name == "cancel" {
        cancel(count.unwrap_or(40).max(1));
        return ExitCode::SUCCESS;
    }
    let Some(subject) = SUBJECTS.iter().find(|subject| subject.name == name) else {
        let names: Vec<_> = SUBJECTS.iter().map(|subject| subject.name).collect();
        eprintln!("usage: soak SUBJECT [COUNT [SEED]], with a SUBJECT of cancel, {}", names.join(", "));
        return ExitCode::from(2);
    };
    subject.run(count.unwrap_or(subject.count), seed.unwrap_or_else(|| fastrand::u64(..)))
}

impl Subject {
    fn run(&self, count: u64, seed: u64) -> ExitCode {
        println!("soak {} {count} {seed}", self.name);
        // As the README's test command, so that what it built is used.
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["test", "--workspace", "--release"]);
        cargo.args(self.binaries.iter().flat_map(|binary| ["--test", binary]));
        cargo.args(["--", "--nocapture"]).args(self.tests);
        cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
        cargo.env("MEMFERRY_COUNT", count.to_string()).env("MEMFERRY_SEED", seed.to_string());
        let passed = cargo.status().expect("cargo runs").success();
        if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// The latency of a cancel while every core is busy: a guest whose writers never rest is compressed at the highest
/// level, and cancelled at different moments.
fn cancel(runs: u64) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads");
    let mut times: Vec<Duration> = (0..runs).map(|run| runtime.block_on(cancel_once(run))).collect();
    times.sort();
    let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
    println!("{runs} cancels with all cores compressing: median {median:.1?}, worst {worst:.1?}");
}

/// From the cancel to the source's verdict.
async fn cancel_once(run: u64) -> Duration {
    let cancel = CancellationToken::new();
    let migration = Busy::begin(cancel.clone());
    tokio::time::sleep(Duration::from_millis(300 + run * 37 % 700)).await;
    let asked = Instant::now();
    cancel.cancel();
    migration.verdict().await.duration_since(asked)
}
