//! How good the forecast of the downtime is: workloads of many kinds are moved over links of many kinds, and what was
//! expected when the switchover was decided is put beside what it took. `cargo run --release --example forecast [TIMES] [NAME]`
//! moves each of them, or those that are called so, so many times.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use memferry::codec::Codec;
use memferry::events::{Event, Phase};
use memferry::guest::workload::{Pattern, Workload, WorkloadSettings};
use memferry::report::error_percent;
use memferry::settings::{EncoderSettings, SourceSettings, XbzrleSettings};
use memferry_tests::foreseen::{settings, workload, writer};
use memferry_tests::migrate;
use memferry_transports::{Address, open};
use tokio_util::sync::CancellationToken;

/// A run: its name, MiB of memory, pages a second, bytes a write, pattern, MiB a second, limit in ms, encoder, verify.
type Plan = (&'static str, u64, f64, usize, Pattern, Option<u64>, u64, Encoder, bool);

#[derive(Clone, Copy)]
enum Encoder {
    Raw,
    Lz4,
    Deltas,
}

const HOT: Pattern = Pattern::HotSpot { pages: 0.05, writes: 0.9 };
const PLANS: [Plan; 12] = [
    ("idle", 256, 1.0, 64, Pattern::Uniform, None, 300, Encoder::Deltas, true),
    ("quick, over deltas", 256, 20_000.0, 64, Pattern::Uniform, None, 300, Encoder::Deltas, true),
    ("hot spot, capped", 256, 15_000.0, 64, HOT, Some(100), 300, Encoder::Deltas, true),
    ("hot spot, tight", 256, 15_000.0, 64, HOT, Some(60), 60, Encoder::Deltas, false),
    ("log from end to end", 256, 4_000.0, 256, Pattern::Sequential, Some(60), 200, Encoder::Deltas, false),
    ("uniform, raw, capped", 128, 5_000.0, 4096, Pattern::Uniform, Some(60), 200, Encoder::Raw, false),
    ("uniform, raw, fast", 256, 50_000.0, 4096, Pattern::Uniform, None, 100, Encoder::Raw, false),
    ("uniform, lz4", 128, 5_000.0, 512, Pattern::Uniform, Some(40), 200, Encoder::Lz4, false),
    ("zipf, lz4, verified", 128, 10_000.0, 64, Pattern::Zipf { exponent: 1.1 }, Some(40), 300, Encoder::Lz4, true),
    ("zipf, deltas", 256, 30_000.0, 64, Pattern::Zipf { exponent: 1.1 }, Some(60), 150, Encoder::Deltas, false),
    ("outruns, throttled", 64, 40_000.0, 4096, Pattern::Uniform, Some(60), 200, Encoder::Raw, false),
    ("outruns, deltas", 64, 100_000.0, 64, Pattern::Uniform, Some(20), 150, Encoder::Deltas, false),
];

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let times: usize = arguments.next().map_or(Ok(1), |times| times.parse())?;
    let name = arguments.next().unwrap_or_default();
    println!("{:<22} {:>6} {:>10} {:>10} {:>8}", "run", "rounds", "expected", "downtime", "error");
    let mut errors = Vec::new();
    for plan in PLANS.iter().filter(|plan| plan.0.contains(&name)) {
        for _ in 0..times {
            errors.extend(run(*plan)?);
        }
    }
    errors.sort_by(f64::total_cmp);
    let median = errors.get(errors.len() / 2).ok_or("nothing was moved")?;
    println!("median of the errors of {} runs, either way: {median:.1} %", errors.len());
    Ok(())
}

/// Runs it and prints its line: how far the forecast was off, in percent.
fn run(plan: Plan) -> Result<Option<f64>, Box<dyn Error>> {
    let name = plan.0;
    let transport = open(&"tcp:127.0.0.1:0".parse::<Address>()?, Duration::from_secs(10));
    let (source, destination) = (Workload::source(guest(plan))?, Workload::destination());
    let runtime = tokio::runtime::Runtime::new()?;
    let moving = migrate(source, destination, Arc::from(transport), moved(plan), CancellationToken::new());
    let ends = runtime.block_on(moving);
    let ended = &ends.source;
    let (Phase::Completed, Some(forecast), Some(downtime)) = (ended.phase, ended.forecast, ended.downtime) else {
        println!("{name:<22} {:?}: {:?}", ended.phase, ended.error);
        return Ok(None);
    };
    let rounds = ends.events.iter().filter(|(_, event)| matches!(event, Event::Decided(_))).count();
    let error = error_percent(&forecast, downtime);
    println!("{name:<22} {rounds:>6} {:>10.1?} {downtime:>10.1?} {error:>+7.0} %", forecast.expected());
    let sent = ends.events.iter().rev().find_map(|(_, event)| match event {
        Event::RoundSent { tally, .. } => Some(tally.bytes_out),
        _ => None,
    });
    let (expected, sent) = (forecast.remaining_bytes / 1024.0, sent.unwrap_or(0) as f64 / 1024.0);
    println!("    {:.1?} for {expected:.0} KiB, {:.1?}", forecast.transfer, forecast.fixed);
    println!("    {:.1?} for {sent:.0} KiB", ended.parts);
    Ok(Some(error.abs()))
}

fn guest((_, mib, pages_per_second, bytes, pattern, ..): Plan) -> WorkloadSettings {
    workload(mib, vec![writer(pattern, pages_per_second, bytes, (0.0, 1.0))])
}

fn moved((.., cap, limit, encoder, verify): Plan) -> SourceSettings {
    let compress = Some(Codec::Lz4);
    let encoder = match encoder {
        Encoder::Raw => EncoderSettings { compress: None, xbzrle: None },
        Encoder::Lz4 => EncoderSettings { compress, xbzrle: None },
        Encoder::Deltas => EncoderSettings { compress, xbzrle: Some(XbzrleSettings::default()) },
    };
    settings(encoder, cap, limit, verify)
}
