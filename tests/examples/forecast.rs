//! Measures the accuracy of the downtime forecast: workloads from idle to a dirty rate far above the bandwidth are
//! moved over links from 100 Mbit/s to the loopback's own rate, and the downtime expected at the switchover's
//! decision is compared with the actual one. `cargo run --release --example forecast [TIMES] [NAME]` moves each
//! workload, or those with this name, TIMES times.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use memferry::codec::Codec;
use memferry::controller::{Decided, Decision};
use memferry::events::Event;
use memferry::settings::{EncoderSettings, OnDeadline, SourceSettings, Verify, XbzrleSettings};
use memferry_guests::workload::{Pattern, Workload, WorkloadSettings};
use memferry_report::error_percent;
use memferry_tests::foreseen::{settings, workload, writer};
use memferry_tests::migrate;
use memferry_transports::{Address, open};
use tokio_util::sync::CancellationToken;

/// A workload: its name, pages per second, bytes per write, pattern, limit in ms, encoder, verify.
type Plan = (&'static str, f64, usize, Pattern, u64, Encoder, bool);

#[derive(Clone, Copy)]
enum Encoder {
    Raw,
    Lz4,
    Deltas,
}

const MIB: u64 = 96;
const HOT: Pattern = Pattern::HotSpot { pages: 0.05, writes: 0.9 };
const PLANS: [Plan; 8] = [
    ("idle", 1.0, 64, Pattern::Uniform, 300, Encoder::Deltas, true),
    ("log, deltas", 4_000.0, 256, Pattern::Sequential, 200, Encoder::Deltas, false),
    ("zipf, lz4, verified", 5_000.0, 64, Pattern::Zipf { exponent: 1.1 }, 300, Encoder::Lz4, true),
    ("hot spot, deltas", 15_000.0, 64, HOT, 60, Encoder::Deltas, false),
    ("uniform, deltas", 20_000.0, 64, Pattern::Uniform, 300, Encoder::Deltas, true),
    ("uniform, raw", 5_000.0, 4096, Pattern::Uniform, 200, Encoder::Raw, false),
    ("far too hot, deltas", 100_000.0, 64, Pattern::Uniform, 150, Encoder::Deltas, false),
    ("far too hot, raw", 100_000.0, 4096, Pattern::Uniform, 200, Encoder::Raw, false),
];

/// Bytes per second, or the loopback's own rate. The token bucket is the link.
const LINKS: [(&str, Option<u64>); 4] = [
    ("100 Mbit/s", Some(12_500_000)),
    ("1 Gbit/s", Some(125_000_000)),
    ("10 Gbit/s", Some(1_250_000_000)),
    ("loopback", None),
];
/// The guest is throttled as the last resort, and a migration that has not ended after this time is given up.
const DEADLINE: Duration = Duration::from_secs(30);

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let times: usize = arguments.next().map_or(Ok(1), |times| times.parse())?;
    let name = arguments.next().unwrap_or_default();
    println!(
        "| workload, link | outcome | rounds | s | MiB sent | throttled, % | limit, ms | expected, ms | downtime, ms | error, % |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    let mut errors = Vec::new();
    for plan in PLANS.iter().filter(|plan| plan.0.contains(&name)) {
        for link in LINKS {
            for _ in 0..times {
                errors.extend(run(*plan, link)?);
            }
        }
    }
    errors.sort_by(f64::total_cmp);
    let median = errors.get(errors.len() / 2).ok_or("nothing was moved")?;
    println!("median of the errors of {} runs, either way: {median:.1} %", errors.len());
    Ok(())
}

/// Runs a workload and prints its line: the error of the forecast, in percent.
fn run(plan: Plan, (link, bandwidth): (&str, Option<u64>)) -> Result<Option<f64>, Box<dyn Error>> {
    let (name, limit) = (plan.0, plan.4);
    let transport = open(&"tcp:127.0.0.1:0".parse::<Address>()?, Duration::from_secs(10));
    let (source, destination) = (Workload::source(guest(plan))?, Workload::destination());
    let runtime = tokio::runtime::Runtime::new()?;
    let settings = SourceSettings {
        max_bandwidth: bandwidth,
        deadline: Some(DEADLINE),
        on_deadline: OnDeadline::Cancel,
        ..moved(plan)
    };
    let moving = migrate(source, destination, Arc::from(transport), settings, CancellationToken::new());
    let ends = runtime.block_on(moving);
    let ended = &ends.source;
    let (mut rounds, mut sent, mut throttled) = (0, 0, 0);
    for (_, event) in &ends.events {
        match event {
            Event::RoundSent { tally, .. } => (rounds, sent) = (tally.round, sent + tally.pages.bytes_out),
            Event::Decided(Decided { decision: Decision::Throttle(percent), .. }) => throttled = *percent,
            _ => {}
        }
    }
    let seconds = ended.total.as_secs_f64();
    let outcome = format!("{:?}", ended.outcome).to_lowercase();
    let sent = sent as f64 / f64::from(1 << 20);
    print!("| {name}, {link} | {outcome} | {rounds} | {seconds:.1} | {sent:.1} | {throttled} | {limit} |");
    let (Some(forecast), Some(downtime)) = (ended.forecast, ended.downtime) else {
        println!(" - | - | - |");
        return Ok(None);
    };
    let error = error_percent(&forecast, downtime);
    let [expected, downtime] = [forecast.expected(), downtime].map(|time| time.as_secs_f64() * 1e3);
    println!(" {expected:.1} | {downtime:.1} | {error:+.0} |");
    Ok(Some(error.abs()))
}

fn guest((_, pages_per_second, bytes, pattern, ..): Plan) -> WorkloadSettings {
    workload(MIB, vec![writer(pattern, pages_per_second, bytes, (0.0, 1.0))])
}

fn moved((.., limit, encoder, verify): Plan) -> SourceSettings {
    let compress = Some(Codec::Lz4);
    let encoder = match encoder {
        Encoder::Raw => EncoderSettings { compress: None, xbzrle: None },
        Encoder::Lz4 => EncoderSettings { compress, xbzrle: None },
        Encoder::Deltas => EncoderSettings { compress, xbzrle: Some(XbzrleSettings::default()) },
    };
    settings(encoder, None, limit, if verify { Verify::default() } else { Verify::Off })
}
