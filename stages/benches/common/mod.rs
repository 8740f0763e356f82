//! What the benches share: how they measure, and what they measure on ([`inputs`]).
//!
//! Everything is measured in turns beside its controls in the same run, for the same pages. A figure is page bytes a
//! second, whatever comes out of them, and the median of the samples. At the end a table gives each figure and its ratio to
//! its controls: the machine's speed changes from hour to hour, the ratios do not.
//!
//! *Out of cache*: sets of 128 MiB are walked from end to end. *In cache*: the same 128 KiB again and again.

#![allow(dead_code, reason = "each bench uses its part")]

pub(crate) mod inputs;

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, SamplingMode, Throughput};

pub(crate) const PAGE: usize = 4096;
pub(crate) const EXTENT: usize = 64 * PAGE;
/// Where the pages of a set lie, and how many bytes it has.
pub(crate) const PLACES: [(&str, usize); 2] = [("out of cache", 128 << 20), ("in cache", 128 << 10)];
/// Bytes of a turn over such a set.
pub(crate) const TURN: usize = 1 << 20;

const SAMPLES: usize = 10;

/// The benches of one program, and their results.
pub(crate) struct Suite {
    criterion: Criterion,
    rows: Vec<Row>,
}

struct Row {
    group: String,
    name: String,
    /// Page bytes a second.
    speed: f64,
    /// Names of controls with the ratio to each.
    ratios: Vec<(String, f64)>,
}

impl Suite {
    /// Turns of so long are measured for a third of a second each; Criterion's options choose which.
    pub(crate) fn new() -> Self {
        let criterion = Criterion::default()
            .sample_size(SAMPLES)
            .warm_up_time(Duration::from_millis(100))
            .measurement_time(Duration::from_millis(300))
            .nresamples(1000)
            .without_plots()
            .configure_from_args();
        Self { criterion, rows: Vec::new() }
    }

    /// Measures the time that `turn` returns for a number of page bytes. `controls`: the name of each in the table, and its
    /// name in the same group, where it was measured before.
    pub(crate) fn measure(
        &mut self,
        group: &str,
        name: &str,
        bytes: usize,
        controls: &[(&str, &str)],
        mut turn: impl FnMut() -> Duration,
    ) {
        let mut samples = Vec::new();
        let mut benches = self.criterion.benchmark_group(group);
        benches.throughput(Throughput::Bytes(bytes as u64)).sampling_mode(SamplingMode::Flat);
        benches.bench_function(name, |bencher| {
            bencher.iter_custom(|turns| {
                let took: Duration = (0..turns).map(|_| turn()).sum();
                samples.push(took.as_secs_f64() / turns as f64);
                took
            });
        });
        benches.finish();
        // Those before the last are of the warm-up; there are none if this bench was not chosen.
        let from = samples.len().saturating_sub(SAMPLES);
        samples[from..].sort_by(f64::total_cmp);
        let Some(median) = samples.get(from + (samples.len() - from) / 2) else { return };
        let speed = bytes as f64 / median;
        let ratio = |&(called, name): &(&str, &str)| {
            let control = self.rows.iter().find(|row| row.group == group && row.name == name)?;
            Some((called.to_string(), speed / control.speed))
        };
        let ratios = controls.iter().filter_map(ratio).collect();
        self.rows.push(Row { group: group.into(), name: name.into(), speed, ratios });
    }

    /// The table.
    pub(crate) fn finish(self) {
        self.criterion.final_summary();
        let mut group = "";
        for row in &self.rows {
            if row.group != group {
                group = &row.group;
                println!("\n{group:42}   GB/s  ratio to its controls");
            }
            let ratios: Vec<_> = row.ratios.iter().map(|(name, ratio)| format!("{ratio:.2} x {name}")).collect();
            println!("  {:40} {:6.2}  {}", row.name, row.speed / 1e9, ratios.join(", "));
        }
    }
}

/// How long `work` takes.
pub(crate) fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

/// Gives the offsets of the pages of one turn after the other, round and round over a set.
pub(crate) struct Walk {
    set_bytes: usize,
    at: usize,
}

impl Walk {
    pub(crate) fn over(set_bytes: usize) -> Self {
        Self { set_bytes, at: 0 }
    }

    pub(crate) fn turn(&mut self) -> impl Iterator<Item = usize> + use<> {
        let (start, set_bytes) = (self.at, self.set_bytes);
        self.at = (self.at + TURN) % set_bytes;
        (0..TURN).step_by(PAGE).map(move |offset| (start + offset) % set_bytes)
    }

    /// Whether the next turn starts at the first page.
    pub(crate) fn at_start(&self) -> bool {
        self.at == 0
    }
}

/// Control "memcpy": the pages of a set into a warm buffer of an extent, as the zero detector copies them.
pub(crate) fn memcpy(suite: &mut Suite, group: &str, from: &[u8]) {
    let (mut buffer, mut walk) = (vec![1; EXTENT], Walk::over(from.len()));
    suite.measure(group, "memcpy", TURN, &[], || {
        timed(|| {
            for at in walk.turn() {
                black_box(&mut buffer[at % EXTENT..][..PAGE]).copy_from_slice(&from[at..at + PAGE]);
            }
        })
    });
}

/// Control "memcpy to its place": the pages of a set onto those of another one.
pub(crate) fn memcpy_in_place(suite: &mut Suite, group: &str, from: &[u8], to: &mut [u8]) {
    let mut walk = Walk::over(from.len());
    suite.measure(group, "memcpy to its place", TURN, &[], || {
        timed(|| walk.turn().for_each(|at| black_box(&mut to[at..at + PAGE]).copy_from_slice(&from[at..at + PAGE])))
    });
}

/// Control "sweep": reads the pages of a set and does no more.
pub(crate) fn sweep(suite: &mut Suite, group: &str, set: &[u8]) {
    let mut walk = Walk::over(set.len());
    suite.measure(group, "sweep", TURN, &[], || {
        timed(|| {
            walk.turn().for_each(|at| {
                black_box(or_of(&set[at..at + PAGE]));
            });
        })
    });
}

/// All words of some bytes or'ed.
pub(crate) fn or_of(bytes: &[u8]) -> u64 {
    bytes.as_chunks().0.iter().fold(0, |all, word| all | u64::from_le_bytes(*word))
}
