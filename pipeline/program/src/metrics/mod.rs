//! Statistics through the `metrics` crate. An embedding program that installs a recorder receives those of every
//! migration; the `memferry` program serves them to Prometheus ([`prometheus`]).
//!
//! Takes events, and stores only what it needs to count increases once. Names and units follow Prometheus: seconds
//! and bytes, `_total` for counters. Counters and histograms accumulate over the migrations of a process; a gauge has
//! its last value. After an end rates and throttle are 0, and the remaining bytes of a completed migration are 0. An
//! unknown value is NaN.
//!
//! | metric | kind | labels | meaning |
//! |---|---|---|---|
//! | `memferry_migrations_total` | counter | role, status | migrations that ended |
//! | `memferry_phase` | gauge | role, phase | 1 for the phase it is in, 0 for the others |
//! | `memferry_round` | gauge | role | the round it is in |
//! | `memferry_rounds_total` | counter | role | rounds that are complete |
//! | `memferry_round_seconds` | histogram | role | how long a round took |
//! | `memferry_pages_total` | counter | role, encoding | pages by how they travelled |
//! | `memferry_page_bytes_total` | counter | role | bytes of the pages scanned |
//! | `memferry_frame_bytes_total` | counter | role | bytes of the frames made of them |
//! | `memferry_wire_bytes_total` | counter | role | bytes handed to the transport or taken from it |
//! | `memferry_xbzrle_misses_total` | counter | role | pages that the XBZRLE cache did not hold |
//! | `memferry_xbzrle_overflows_total` | counter | role | pages whose delta was not smaller |
//! | `memferry_excluded_pages_total` | counter | role, why | pages that were not sent: hinted, unplugged, ignored |
//! | `memferry_sync_seconds` | histogram | role | how long a bitmap sync took |
//! | `memferry_dirty_pages` | gauge | role | dirty pages at the last sync; 0 after completion |
//! | `memferry_guest_bytes` | gauge | role | bytes of the guest's memory |
//! | `memferry_remaining_bytes` | gauge | role | page bytes to go; at the destination those of the first round, NaN after it |
//! | `memferry_wire_bytes_per_second` | gauge | role | bytes to the wire, lately |
//! | `memferry_page_bytes_per_second` | gauge | role | page bytes that are read, or loaded, lately |
//! | `memferry_dirty_bytes_per_second` | gauge | role | page bytes that the guest dirtied, lately |
//! | `memferry_expected_downtime_seconds` | gauge | role | what a switchover would cost |
//! | `memferry_downtime_limit_seconds` | gauge | role | the downtime limit, including raises; at the source only |
//! | `memferry_throttle_ratio` | gauge | role | share of its time that the guest is throttled |
//! | `memferry_bottleneck_ratio` | gauge | role, cause | the bottleneck over the latest seconds, from 0 to 1: processor, limit, destination, wire, guest, source; after an end, over all of it |
//! | `memferry_decisions_total` | counter | role, decision | what the controller decided |
//! | `memferry_downtime_seconds` | histogram | role | how long the guest was paused: until it ran at the destination or was resumed at the source |
//! | `memferry_downtime_part_seconds` | histogram | role, part | the parts of that time |
//! | `memferry_memory_bound_bytes` | gauge | role | the most memory that the engine takes |
//! | `memferry_memory_peak_bytes` | gauge | role | the peak of the engine's memory |
//! | `memferry_stage_seconds_total` | counter | role, stage, lane, state | time of a stage: busy, input_wait, output_wait, limit_wait; no lane if there is only one |
//! | `memferry_connections_lost_total` | counter | role | connections that were lost, made again or not |
//! | `memferry_outage_seconds_total` | counter | role | time without a connection, after one was lost |
//! | `memferry_sent_again_bytes_total` | counter | role | page bytes that were in flight when a connection was lost, and were sent again; 0 at the destination |
//! | `memferry_postcopy_missing_pages_total` | counter | role | pages that were missing when a guest was handed over |
//! | `memferry_postcopy_urgent_pages_total` | counter | role | pages that were sent, or asked for, because threads waited for them |
//! | `memferry_postcopy_faults_total` | counter | role | faults on missing pages; at the destination only, as all that follow up to the discards |
//! | `memferry_postcopy_waits_total` | counter | role | waits of threads for a page that was requested |
//! | `memferry_postcopy_waited_seconds_total` | counter | role | all of these waits together |
//! | `memferry_postcopy_wait_seconds` | gauge | role, quantile | the length of these waits in the last migration: 0.5, 0.99, 1 |
//! | `memferry_postcopy_discarded_pages_total` | counter | role | missing pages that the guest discarded |
//! | `memferry_postcopy_discard_seconds` | histogram | role, when | how long the destination discarded pages: ahead of the pause, or paused |
//! | `memferry_postcopy_seconds` | histogram | role | how long a guest ran without all of its pages |
//! | `memferry_turned_away_total` | counter | role | peers that were refused |
//! | `memferry_warnings_total` | counter | role | warnings for the operator |
//! | `memferry_build_info` | gauge | version | always 1 |
//!
//! The counters of the `metrics` crate are integers, and seconds are not: `memferry_stage_seconds_total`,
//! `memferry_outage_seconds_total` and `memferry_postcopy_waited_seconds_total` are recorded as gauges that only increase. The program exposes them to Prometheus as counters.

pub mod process;
pub mod prometheus;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use memferry_stages::exclusions::ExcludedPages;
use memferry_stages::meter::Reading;
use memferry_stages::stage_id::StageId;
use memferry_stages::tally::RoundTally;
use metrics::{Label, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

use memferry::bottleneck::Cause;
use memferry::controller::Decided;
use memferry::events::{BlockFacts, DowntimeParts, Ended, Event, Observer, Outcome, Phase, Postcopy, Progress, Role};
use memferry_report::decision_name;

/// Upper bounds in seconds of the buckets of each histogram.
pub const BUCKETS: [(&str, &[f64]); 6] = [
    ("memferry_round_seconds", &[0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]),
    ("memferry_sync_seconds", &[0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]),
    ("memferry_downtime_seconds", &[0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0]),
    ("memferry_downtime_part_seconds", &[0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]),
    ("memferry_postcopy_discard_seconds", &[0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]),
    ("memferry_postcopy_seconds", &[0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]),
];

/// Records the events of consecutive migrations in the installed recorder; records nothing if there is none.
#[derive(Debug, Default)]
pub struct MetricsObserver {
    /// The amounts already counted, of source and destination.
    counted: Mutex<[Counted; 2]>,
}

/// The totals of a running migration's events so far, so that only increases are added.
#[derive(Debug, Default)]
struct Counted {
    wire_bytes: u64,
    outage: Duration,
    /// Seconds of a stage in each of its states.
    stages: HashMap<StageId, [f64; 4]>,
}

impl MetricsObserver {
    /// Creates an observer, and describes the metrics to the recorder.
    #[must_use]
    pub fn new() -> Self {
        describe();
        gauge!("memferry_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
        Self::default()
    }

    fn progress(&self, role: Role, now: &Progress) {
        self.counted(role, |counted| counted.rise(role.name(), now.wire_bytes, &now.stages));
        progress(role.name(), now);
    }

    fn ended(&self, role: Role, ended: &Ended) {
        self.counted(role, |counted| {
            counted.rise(role.name(), ended.wire_bytes, &ended.stages);
            // An outage that did not end is in none of the events before.
            counted.outages(role.name(), ended.outages.time);
            // The next migration counts from zero.
            *counted = Counted::default();
        });
        let role = role.name();
        if ended.outcome == Outcome::Completed {
            gauge!("memferry_dirty_pages", "role" => role).set(0.0);
        }
        counter!("memferry_migrations_total", "role" => role, "status" => ended.outcome.name()).increment(1);
        gauge!("memferry_memory_peak_bytes", "role" => role).set(float(ended.memory_peak));
        let ExcludedPages { hinted, unplugged, ignored, .. } = ended.excluded;
        for (why, pages) in [("hinted", hinted), ("unplugged", unplugged), ("ignored", ignored)] {
            counter!("memferry_excluded_pages_total", "role" => role, "why" => why).increment(pages);
        }
        if let Some(downtime) = ended.downtime {
            histogram!("memferry_downtime_seconds", "role" => role).record(downtime);
        }
        if ended.switchover().is_some() {
            downtime_parts(role, &ended.parts);
        }
        ended.postcopy.iter().for_each(|figures| postcopy(role, figures));
    }

    fn counted(&self, role: Role, change: impl FnOnce(&mut Counted)) {
        change(&mut self.counted.lock().unwrap_or_else(PoisonError::into_inner)[role as usize]);
    }
}

impl Counted {
    /// Adds the increase of all outages together.
    fn outages(&mut self, role: &'static str, time: Duration) {
        let more = time.saturating_sub(self.outage);
        gauge!("memferry_outage_seconds_total", "role" => role).increment(more.as_secs_f64());
        self.outage = time.max(self.outage);
    }

    /// Adds the increase since the last time.
    fn rise(&mut self, role: &'static str, wire_bytes: u64, stages: &[Reading]) {
        counter!("memferry_wire_bytes_total", "role" => role).increment(wire_bytes.saturating_sub(self.wire_bytes));
        self.wire_bytes = wire_bytes.max(self.wire_bytes);
        for reading in stages {
            let counted = self.stages.entry(reading.stage).or_default();
            let lane = reading.stage.at.number().map_or(String::new(), |lane| lane.to_string());
            for (counted, (state, time)) in counted.iter_mut().zip(by_state(reading)) {
                let labels = vec![
                    Label::from_static_parts("role", role),
                    Label::from_static_parts("stage", reading.stage.kind.name()),
                    Label::new("lane", lane.clone()),
                    Label::from_static_parts("state", state),
                ];
                gauge!("memferry_stage_seconds_total", labels).increment((time.as_secs_f64() - *counted).max(0.0));
                *counted = time.as_secs_f64().max(*counted);
            }
        }
    }
}

/// How a stage spent its time.
fn by_state(reading: &Reading) -> [(&'static str, Duration); 4] {
    [
        ("busy", reading.busy),
        ("input_wait", reading.input_wait),
        ("output_wait", reading.output_wait),
        ("limit_wait", reading.limit_wait),
    ]
}

impl Observer for MetricsObserver {
    fn event(&self, role: Role, event: &Event) {
        match event {
            Event::Phase(now) => phase(role.name(), *now),
            Event::Guest { blocks, memory_bound, .. } => guest(role.name(), blocks, *memory_bound),
            Event::Changed(changed) => {
                gauge!("memferry_memory_bound_bytes", "role" => role.name()).set(float(changed.memory_bound));
            }
            Event::RoundSent { tally, duration } => round(role.name(), tally, *duration),
            Event::Synced { dirty_pages, duration, .. } => {
                gauge!("memferry_dirty_pages", "role" => role.name()).set(float(*dirty_pages));
                histogram!("memferry_sync_seconds", "role" => role.name()).record(*duration);
            }
            Event::Decided(decided) => decision(role.name(), decided),
            Event::Progress(now) => self.progress(role, now),
            Event::TurnedAway { count, .. } => {
                counter!("memferry_turned_away_total", "role" => role.name()).increment(*count);
            }
            Event::Disconnected { .. } => {
                counter!("memferry_connections_lost_total", "role" => role.name()).increment(1);
            }
            Event::Reconnected { outage, put_back_bytes, .. } => {
                self.counted(role, |counted| counted.outages(role.name(), counted.outage + *outage));
                counter!("memferry_sent_again_bytes_total", "role" => role.name()).increment(*put_back_bytes);
            }
            Event::Warning(_) => counter!("memferry_warnings_total", "role" => role.name()).increment(1),
            Event::Ended(end) => self.ended(role, end),
            _ => {}
        }
    }
}

fn guest(role: &'static str, blocks: &[BlockFacts], memory_bound: u64) {
    gauge!("memferry_guest_bytes", "role" => role).set(float(blocks.iter().map(|block| block.bytes).sum()));
    gauge!("memferry_memory_bound_bytes", "role" => role).set(float(memory_bound));
}

fn decision(role: &'static str, decided: &Decided) {
    counter!("memferry_decisions_total", "role" => role, "decision" => decision_name(decided.decision)).increment(1);
}

fn phase(role: &'static str, now: Phase) {
    for phase in Phase::ALL {
        let is = if phase == now { 1.0 } else { 0.0 };
        gauge!("memferry_phase", "role" => role, "phase" => phase.name()).set(is);
    }
}

fn round(role: &'static str, tally: &RoundTally, duration: Duration) {
    counter!("memferry_rounds_total", "role" => role).increment(1);
    histogram!("memferry_round_seconds", "role" => role).record(duration);
    let encodings = [
        ("zero", tally.pages.zero),
        ("raw", tally.pages.raw),
        ("compressed", tally.pages.compressed),
        ("xbzrle", tally.pages.xbzrle),
        ("unchanged", tally.pages.unchanged),
    ];
    for (encoding, pages) in encodings {
        counter!("memferry_pages_total", "role" => role, "encoding" => encoding).increment(pages);
    }
    counter!("memferry_page_bytes_total", "role" => role).increment(tally.pages.bytes_in);
    counter!("memferry_frame_bytes_total", "role" => role).increment(tally.pages.bytes_out);
    counter!("memferry_xbzrle_misses_total", "role" => role).increment(tally.pages.xbzrle_misses);
    counter!("memferry_xbzrle_overflows_total", "role" => role).increment(tally.pages.xbzrle_overflows);
}

fn progress(role: &'static str, now: &Progress) {
    gauge!("memferry_round", "role" => role).set(now.round);
    gauge!("memferry_throttle_ratio", "role" => role).set(f64::from(now.throttle) / 100.0);
    if !now.downtime_limit.is_zero() {
        gauge!("memferry_downtime_limit_seconds", "role" => role).set(now.downtime_limit);
    }
    gauge!("memferry_remaining_bytes", "role" => role).set(now.remaining_bytes.map_or(f64::NAN, float));
    gauge!("memferry_wire_bytes_per_second", "role" => role).set(now.wire_rate);
    gauge!("memferry_page_bytes_per_second", "role" => role).set(now.page_rate);
    gauge!("memferry_dirty_bytes_per_second", "role" => role).set(now.dirty_rate.unwrap_or(f64::NAN));
    let expected = now.expected_downtime.map_or(f64::NAN, |downtime| downtime.as_secs_f64());
    gauge!("memferry_expected_downtime_seconds", "role" => role).set(expected);
    for cause in Cause::ALL {
        let share = now.bottleneck.share(cause).unwrap_or(f64::NAN);
        gauge!("memferry_bottleneck_ratio", "role" => role, "cause" => cause.name()).set(share);
    }
}

fn downtime_parts(role: &'static str, parts: &DowntimeParts) {
    for (part, time) in parts.named() {
        histogram!("memferry_downtime_part_seconds", "role" => role, "part" => part).record(time);
    }
}

/// The figures of a guest that ran before all of its pages were there.
fn postcopy(role: &'static str, figures: &Postcopy) {
    counter!("memferry_postcopy_missing_pages_total", "role" => role).increment(figures.missing_pages);
    counter!("memferry_postcopy_urgent_pages_total", "role" => role).increment(figures.urgent_pages);
    histogram!("memferry_postcopy_seconds", "role" => role).record(figures.time);
    let Some(faults) = &figures.faults else { return };
    counter!("memferry_postcopy_faults_total", "role" => role).increment(faults.faults);
    counter!("memferry_postcopy_discarded_pages_total", "role" => role).increment(faults.discarded);
    let waits = &faults.waits;
    counter!("memferry_postcopy_waits_total", "role" => role).increment(waits.count());
    gauge!("memferry_postcopy_waited_seconds_total", "role" => role).increment(waits.total().as_secs_f64());
    for (quantile, part) in [("0.5", 0.5), ("0.99", 0.99), ("1", 1.0)] {
        gauge!("memferry_postcopy_wait_seconds", "role" => role, "quantile" => quantile).set(waits.quantile(part));
    }
    for (when, time) in [("ahead", figures.discarded_ahead), ("paused", figures.discarded_paused)] {
        histogram!("memferry_postcopy_discard_seconds", "role" => role, "when" => when).record(time);
    }
}

#[expect(clippy::cast_precision_loss, reason = "gauges are floating-point")]
fn float(number: u64) -> f64 {
    number as f64
}

fn describe() {
    describe_counter!("memferry_migrations_total", "Migrations that ended");
    describe_gauge!("memferry_phase", "1 for the phase the migration is in");
    describe_gauge!("memferry_round", "The round the migration is in");
    describe_counter!("memferry_rounds_total", "Rounds that are complete");
    describe_histogram!("memferry_round_seconds", Unit::Seconds, "How long a round took");
    describe_counter!("memferry_pages_total", "Pages by how they travelled");
    describe_counter!("memferry_page_bytes_total", Unit::Bytes, "Bytes of the pages scanned");
    describe_counter!("memferry_frame_bytes_total", Unit::Bytes, "Bytes of the frames made of the pages");
    describe_counter!("memferry_wire_bytes_total", Unit::Bytes, "Bytes handed to the transport or taken from it");
    describe_counter!("memferry_xbzrle_misses_total", "Pages that the XBZRLE cache did not hold");
    describe_counter!("memferry_xbzrle_overflows_total", "Pages whose delta was not smaller");
    describe_histogram!("memferry_sync_seconds", Unit::Seconds, "How long a bitmap sync took");
    describe_gauge!("memferry_dirty_pages", "Dirty pages at the last sync");
    describe_gauge!("memferry_guest_bytes", Unit::Bytes, "Bytes of the guest's memory");
    describe_gauge!("memferry_remaining_bytes", Unit::Bytes, "Page bytes to go");
    describe_gauge!("memferry_wire_bytes_per_second", "Bytes to the wire, lately");
    describe_gauge!("memferry_page_bytes_per_second", "Page bytes that are read, or loaded, lately");
    describe_gauge!("memferry_dirty_bytes_per_second", "Page bytes that the guest dirtied, lately");
    describe_gauge!("memferry_expected_downtime_seconds", Unit::Seconds, "What a switchover would cost");
    describe_gauge!("memferry_downtime_limit_seconds", Unit::Seconds, "What a switchover may cost");
    describe_gauge!("memferry_throttle_ratio", "Share of its time that the guest is throttled");
    describe_gauge!("memferry_bottleneck_ratio", "What holds it up, over the latest seconds");
    describe_counter!("memferry_decisions_total", "What the controller decided");
    describe_histogram!(
        "memferry_downtime_seconds",
        Unit::Seconds,
        "How long the guest was paused, until it ran at the destination or was resumed at the source"
    );
    describe_histogram!("memferry_downtime_part_seconds", Unit::Seconds, "Where the downtime went");
    describe_gauge!("memferry_memory_bound_bytes", Unit::Bytes, "The most memory that the engine takes");
    describe_gauge!("memferry_memory_peak_bytes", Unit::Bytes, "The most memory that the engine took");
    describe_counter!("memferry_excluded_pages_total", "Pages that were not sent: hinted as free, unplugged, ignored");
    describe_gauge!("memferry_stage_seconds_total", Unit::Seconds, "How a stage spent its time");
    describe_counter!("memferry_connections_lost_total", "Connections that were lost");
    describe_gauge!("memferry_outage_seconds_total", Unit::Seconds, "Time without a connection, after one was lost");
    describe_counter!(
        "memferry_sent_again_bytes_total",
        Unit::Bytes,
        "Page bytes that were sent again after a lost connection"
    );
    describe_postcopy();
    describe_gauge!("memferry_build_info", "The version of memferry, always 1");
    describe_counter!("memferry_warnings_total", "Warnings that the operator was given");
    describe_counter!("memferry_turned_away_total", "Connections that were turned away");
}

fn describe_postcopy() {
    describe_counter!("memferry_postcopy_missing_pages_total", "Pages that were missing when a guest was handed over");
    describe_counter!(
        "memferry_postcopy_urgent_pages_total",
        "Pages that were sent, or asked for, because threads waited"
    );
    describe_counter!("memferry_postcopy_faults_total", "Faults on missing pages");
    describe_counter!("memferry_postcopy_waits_total", "Waits of threads for a page that was requested");
    describe_gauge!("memferry_postcopy_waited_seconds_total", Unit::Seconds, "All waits for requested pages together");
    describe_gauge!("memferry_postcopy_wait_seconds", Unit::Seconds, "The length of the waits in the last migration");
    describe_counter!("memferry_postcopy_discarded_pages_total", "Missing pages that the guest discarded");
    describe_histogram!("memferry_postcopy_discard_seconds", Unit::Seconds, "How long the destination discarded pages");
    describe_histogram!("memferry_postcopy_seconds", Unit::Seconds, "How long a guest ran without all of its pages");
}
