//! Measures the accuracy of the downtime forecast: workloads from idle to a dirty rate far above the bandwidth are
//! moved over links from 100 Mbit/s to the loopback's own rate, and the downtime expected at the switchover's
//! decision is compared with the actual one. `cargo run --release -p memferry-tests --example forecast [TIMES] [NAME]`
//! moves each workload, or those with this name, TIMES times. With `PARTS` in the environment it prints the parts of
//! each downtime below those of its forecast. The last lines are the medians of the errors, what they would be for a
//! forecast that knew beforehand how long each workload's downtimes are, and how often the downtime was above the limit
//! where the limit allowed the switchover.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use memferry::codec::Codec;
use memferry::controller::reason::{Met, Reason};
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
    let mut moved = Vec::new();
    for plan in PLANS.iter().filter(|plan| plan.0.contains(&name)) {
        for link in LINKS {
            for _ in 0..times {
                moved.extend(run(*plan, link)?);
            }
        }
    }
    println!("medians of the errors, either way:");
    for (link, _) in LINKS {
        println!("{link}: {}", median(moved.iter().filter(|moved| moved.link == link).map(|moved| moved.error)));
    }
    println!("all: {}", median(moved.iter().map(|moved| moved.error)));
    println!("of a forecast that knows the workload's downtimes, their median: {}", median(known(&moved, 50)));
    println!("of one that knows them, their 90th percentile: {}", median(known(&moved, 90)));
    let decided: Vec<_> = moved.iter().filter(|moved| moved.limit_decided).collect();
    let over = decided.iter().filter(|moved| moved.is_over).count();
    println!("above the limit: {over} of {} where the limit decided", decided.len());
    Ok(())
}

/// A migration that was completed with a forecast.
struct Moved {
    workload: &'static str,
    link: &'static str,
    downtime: Duration,
    /// The error of the forecast in percent, either way.
    error: f64,
    /// Did the controller switch over because the limit was met?
    limit_decided: bool,
    /// Was the downtime above the limit?
    is_over: bool,
}

/// The errors in percent, if the forecast of each migration were this percentile of the downtimes of its workload over its
/// link: the downtimes' own spread. It takes several runs of each to say anything.
fn known(moved: &[Moved], percent: usize) -> impl Iterator<Item = f64> + '_ {
    moved.iter().map(move |one| {
        let is_alike = |other: &&Moved| (other.workload, other.link) == (one.workload, one.link);
        let mut downtimes: Vec<_> = moved.iter().filter(is_alike).map(|other| other.downtime).collect();
        downtimes.sort();
        let forecast = downtimes[(downtimes.len() - 1) * percent / 100];
        (forecast.as_secs_f64() / one.downtime.as_secs_f64() - 1.0).abs() * 100.0
    })
}

fn median(errors: impl Iterator<Item = f64>) -> String {
    let mut errors: Vec<_> = errors.collect();
    errors.sort_by(f64::total_cmp);
    errors.get(errors.len() / 2).map_or_else(|| "-".into(), |median| format!("{median:.1} % of {}", errors.len()))
}

/// Runs a workload and prints its line.
fn run(plan: Plan, (link, bandwidth): (&'static str, Option<u64>)) -> Result<Option<Moved>, Box<dyn Error>> {
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
    let mut switched = None;
    for (_, event) in &ends.events {
        match event {
            Event::RoundSent { tally, .. } => (rounds, sent) = (tally.round, sent + tally.pages.bytes_out),
            Event::Decided(Decided { decision: Decision::Throttle(percent), .. }) => throttled = *percent,
            Event::Decided(decided) if decided.decision == Decision::SwitchOver => switched = Some(decided.clone()),
            _ => {}
        }
    }
    let seconds = ended.total.as_secs_f64();
    let outcome = format!("{:?}", ended.outcome).to_lowercase();
    let sent = sent as f64 / f64::from(1 << 20);
    print!("| {name}, {link} | {outcome} | {rounds} | {seconds:.1} | {sent:.1} | {throttled} | {limit} |");
    let (Some(forecast), Some(downtime), Some(switched)) = (ended.forecast, ended.downtime, switched) else {
        println!(" - | - | - |");
        return Ok(None);
    };
    let error = error_percent(&forecast, downtime);
    let limit_decided = matches!(switched.reason, Reason::Met(Met::WithinLimit) | Reason::Raised { .. });
    let moved =
        Moved { workload: name, link, downtime, error: error.abs(), limit_decided, is_over: downtime > switched.limit };
    let [expected, downtime] = [forecast.expected(), downtime].map(|time| time.as_secs_f64() * 1e3);
    println!(" {expected:.1} | {downtime:.1} | {error:+.0} |");
    if std::env::var_os("PARTS").is_some() {
        println!("    expected {}", forecast.parts());
        println!("    measured {}", ended.parts);
    }
    Ok(Some(moved))
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
