//! The effect of `on_miss` on the duration. Guests with one kind of content that are written continuously are moved,
//! with limits from 5 MiB/s to none, and with cache misses sent raw, compressed, or by the automatic choice. The last
//! is to be within 5 % of the better of the other two.
//!
//! ```text
//! cargo run --release -p memferry-tests --example misses [-- TIMES [CELL]]
//! ```
//!
//! Each cell whose name contains CELL ("64 MiB", "zero", "64 MiB, zero, 5 MiB/s") is moved TIMES times (5) in each
//! way, the ways in turn, so that other load on the machine affects them alike. Medians are compared.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use memferry::events::{Event, Outcome};
use memferry::settings::{
    ConvergenceSettings, EncoderSettings, OnMiss, SourceSettings, StallStep, Verify, XbzrleSettings,
};
use memferry_guests::workload::{Fill, Pattern, Workload, WorkloadSettings};
use memferry_tests::foreseen::{settings, workload, writer};
use memferry_tests::migrate;
use memferry_transports::{Address, open};
use tokio_util::sync::CancellationToken;

const GUESTS: [(&str, u64); 2] = [("64 MiB", 64), ("1 GiB", 1024)];
const NONE: Fill = Fill { zero: 0.0, text: 0.0, random: 0.0, process: 0.0 };
const FILLS: [(&str, Fill); 4] = [
    ("zero", Fill { zero: 1.0, ..NONE }),
    ("text", Fill { text: 1.0, ..NONE }),
    ("process", Fill { process: 1.0, ..NONE }),
    ("random", Fill { random: 1.0, ..NONE }),
];
/// In MiB/s.
const LIMITS: [(&str, Option<u64>); 4] =
    [("5 MiB/s", Some(5)), ("20 MiB/s", Some(20)), ("100 MiB/s", Some(100)), ("unlimited", None)];
const WAYS: [OnMiss; 3] = [OnMiss::Raw, OnMiss::Compress, OnMiss::Auto];
/// How much longer than the better of the others the automatic choice may take.
const TOLERANCE: f64 = 1.05;

/// The results of one migration.
#[derive(Clone, Copy)]
struct Went {
    total: f64,
    downtime: f64,
    misses: u64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let times: usize = arguments.next().map_or(Ok(5), |times| times.parse())?;
    let wanted = arguments.next().unwrap_or_default();
    println!(
        "| guest, fill, limit | misses | raw, s | compress, s | auto, s | auto to the better | downtime, ms: raw | compress | auto |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    let (mut cells, mut worse) = (0, Vec::new());
    for (guest, mib) in GUESTS {
        for (fill_name, fill) in FILLS {
            for (limit_name, limit) in LIMITS {
                let name = format!("{guest}, {fill_name}, {limit_name}");
                if name.contains(&wanted) {
                    cells += 1;
                    let ratio = cell(&name, mib, fill, limit, times)?;
                    worse.extend((ratio > TOLERANCE).then(|| format!("{name}: {ratio:.3}")));
                }
            }
        }
    }
    println!("{} of {cells} cells are beyond {TOLERANCE}: {}", worse.len(), worse.join("; "));
    Ok(())
}

/// Prints the line of a cell, and returns the time of the automatic choice as a share of the better of the others.
fn cell(name: &str, mib: u64, fill: Fill, limit: Option<u64>, times: usize) -> Result<f64, Box<dyn Error>> {
    let mut went: [Vec<Went>; 3] = Default::default();
    for _ in 0..times {
        for (way, went) in WAYS.into_iter().zip(&mut went) {
            went.push(run(mib, fill, limit, way)?);
        }
    }
    let of = |figure: fn(&Went) -> f64| [0, 1, 2].map(|way| median(went[way].iter().map(figure)));
    let ([raw, compress, auto], downtimes) = (of(|went| went.total), of(|went| went.downtime * 1e3));
    let misses = went[2].iter().map(|went| went.misses).max().unwrap_or_default();
    let ratio = auto / raw.min(compress);
    print!("| {name} | {misses} | {raw:.3} | {compress:.3} | {auto:.3} | {ratio:.3} |");
    println!(" {:.1} | {:.1} | {:.1} |", downtimes[0], downtimes[1], downtimes[2]);
    Ok(ratio)
}

fn run(mib: u64, fill: Fill, limit: Option<u64>, on_miss: OnMiss) -> Result<Went, Box<dyn Error>> {
    let writers = vec![
        writer(Pattern::HotSpot { pages: 0.05, writes: 0.9 }, 8_000.0, 64, (0.0, 1.0)),
        writer(Pattern::Sequential, 2_000.0, 256, (0.5, 1.0)),
    ];
    let guest = WorkloadSettings { fill, ..workload(mib, writers) };
    let (source, destination) = (Workload::source(guest)?, Workload::destination());
    let transport = open(&"tcp:127.0.0.1:0".parse::<Address>()?, Duration::from_secs(10));
    let runtime = tokio::runtime::Runtime::new()?;
    let ends = runtime.block_on(migrate(
        source,
        destination,
        Arc::from(transport),
        moved(limit, on_miss),
        CancellationToken::new(),
    ));
    if ends.source.outcome != Outcome::Completed {
        return Err(format!("{:?}: {:?}", ends.source.outcome, ends.source.error).into());
    }
    let misses = ends.events.iter().map(|(_, event)| match event {
        Event::RoundSent { tally, .. } => tally.pages.xbzrle_misses,
        _ => 0,
    });
    let downtime = ends.source.downtime.unwrap_or_default();
    Ok(Went { total: ends.source.total.as_secs_f64(), downtime: downtime.as_secs_f64(), misses: misses.sum() })
}

/// The default settings, except for `on_miss` and the conditions of the end.
fn moved(limit: Option<u64>, on_miss: OnMiss) -> SourceSettings {
    let xbzrle = Some(XbzrleSettings { on_miss, ..XbzrleSettings::default() });
    SourceSettings {
        convergence: ConvergenceSettings { on_stall: vec![StallStep::SwitchOver], ..ConvergenceSettings::default() },
        ..settings(EncoderSettings { xbzrle, ..EncoderSettings::default() }, limit, 300, Verify::Off)
    }
}

fn median(figures: impl Iterator<Item = f64>) -> f64 {
    let mut figures: Vec<_> = figures.collect();
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}
