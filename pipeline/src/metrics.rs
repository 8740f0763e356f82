//! Statistics through the `metrics` crate: whoever embeds memferry installs a recorder and sees every migration.
//!
//! | metric | kind | labels | meaning |
//! |---|---|---|---|
//! | `memferry_migrations_total` | counter | role, status | migrations that ended |
//! | `memferry_phase` | gauge | role, phase | 1 for the phase it is in, 0 for the others |
//! | `memferry_rounds_total` | counter | role | rounds that are complete |
//! | `memferry_round_seconds` | histogram | role | how long a round took |
//! | `memferry_pages_total` | counter | role, encoding | pages by how they travelled |
//! | `memferry_page_bytes_total` | counter | role | bytes of the pages scanned |
//! | `memferry_frame_bytes_total` | counter | role | bytes of the frames made of them |
//! | `memferry_wire_bytes_total` | counter | role | bytes handed to the transport or taken from it |
//! | `memferry_xbzrle_misses_total` | counter | role | pages that the XBZRLE cache did not hold |
//! | `memferry_xbzrle_overflows_total` | counter | role | pages whose delta was not smaller |
//! | `memferry_spared_pages_total` | counter | role, why | pages that were not sent: hinted, unplugged, ignored |
//! | `memferry_sync_seconds` | histogram | role | how long a bitmap sync took |
//! | `memferry_dirty_pages` | gauge | role | dirty pages at the last sync |
//! | `memferry_remaining_bytes` | gauge | role | page bytes to go |
//! | `memferry_wire_bytes_per_second` | gauge | role | bytes to the wire, lately |
//! | `memferry_dirty_bytes_per_second` | gauge | role | page bytes that the guest dirtied, lately |
//! | `memferry_expected_downtime_seconds` | gauge | role | what a switchover would cost |
//! | `memferry_downtime_seconds` | histogram | role | how long the guest stood still |
//! | `memferry_downtime_part_seconds` | histogram | role, part | where that time went |
//! | `memferry_memory_bound_bytes` | gauge | role | the most memory that the engine takes |
//! | `memferry_memory_peak_bytes` | gauge | role | the most it took |
//! | `memferry_stage_microseconds_total` | counter | role, stage, state | time of a stage, all lanes: busy, input_wait, output_wait |
//! | `memferry_turned_away_total` | counter | role | strangers and broken peers that were turned away |

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use memferry_stages::clears::Spared;
use memferry_stages::meter::Reading;
use memferry_stages::tally::RoundTally;
use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

use crate::events::{DowntimeParts, Ended, Event, Observer, Phase, Progress, Role};
use crate::log::name;
use crate::report::status;

/// Records events in the recorder that is installed; nothing if there is none.
#[derive(Debug, Default)]
pub struct MetricsObserver {
    /// Bytes on the wire counted so far, for source and destination.
    wire: Mutex<[u64; 2]>,
}

impl MetricsObserver {
    /// An observer; the metrics are described to the recorder.
    #[must_use]
    pub fn new() -> Self {
        describe();
        Self::default()
    }

    /// Counters only rise: adds what came on top since the last time.
    fn wire_bytes(&self, role: Role, total: u64) {
        let mut wire = self.wire.lock().unwrap_or_else(PoisonError::into_inner);
        let counted = &mut wire[role as usize];
        counter!("memferry_wire_bytes_total", "role" => name(role)).increment(total.saturating_sub(*counted));
        *counted = total.max(*counted);
    }

    fn ended(&self, role: Role, ended: &Ended) {
        self.wire_bytes(role, ended.wire_bytes);
        self.wire.lock().unwrap_or_else(PoisonError::into_inner)[role as usize] = 0;
        let role = name(role);
        counter!("memferry_migrations_total", "role" => role, "status" => status(ended.phase)).increment(1);
        gauge!("memferry_memory_peak_bytes", "role" => role).set(float(ended.memory_peak));
        let Spared { hinted, unplugged, ignored, .. } = ended.spared;
        for (why, pages) in [("hinted", hinted), ("unplugged", unplugged), ("ignored", ignored)] {
            counter!("memferry_spared_pages_total", "role" => role, "why" => why).increment(pages);
        }
        if let Some(downtime) = ended.downtime {
            histogram!("memferry_downtime_seconds", "role" => role).record(downtime);
            downtime_parts(role, &ended.parts);
        }
        ended.stages.iter().for_each(|reading| stage(role, reading));
    }
}

impl Observer for MetricsObserver {
    fn event(&self, role: Role, event: &Event) {
        match event {
            Event::Phase(now) => phase(name(role), *now),
            Event::Guest { memory_bound, .. } => {
                gauge!("memferry_memory_bound_bytes", "role" => name(role)).set(float(*memory_bound));
            }
            Event::Changed(changed) => {
                gauge!("memferry_memory_bound_bytes", "role" => name(role)).set(float(changed.memory_bound));
            }
            Event::RoundSent { tally, duration } => round(name(role), tally, *duration),
            Event::Synced { dirty_pages, duration, .. } => {
                gauge!("memferry_dirty_pages", "role" => name(role)).set(float(*dirty_pages));
                histogram!("memferry_sync_seconds", "role" => name(role)).record(*duration);
            }
            Event::Progress(now) => {
                self.wire_bytes(role, now.wire_bytes);
                progress(name(role), now);
            }
            Event::TurnedAway { .. } => counter!("memferry_turned_away_total", "role" => name(role)).increment(1),
            Event::Ended(end) => self.ended(role, end),
            Event::Connected { .. }
            | Event::RoundScanned { .. }
            | Event::Spared(_)
            | Event::Decided(_)
            | Event::Warning(_)
            | Event::Paused
            | Event::HandedOver
            | Event::Resumed => {}
        }
    }
}

fn phase(role: &'static str, now: Phase) {
    let phases = [
        (Phase::Setup, "setup"),
        (Phase::Active, "active"),
        (Phase::Switchover, "switchover"),
        (Phase::Completed, "completed"),
        (Phase::Failed, "failed"),
        (Phase::Cancelled, "cancelled"),
        (Phase::Unconfirmed, "unconfirmed"),
    ];
    for (phase, name) in phases {
        gauge!("memferry_phase", "role" => role, "phase" => name).set(if phase == now { 1.0 } else { 0.0 });
    }
}

fn round(role: &'static str, tally: &RoundTally, duration: Duration) {
    counter!("memferry_rounds_total", "role" => role).increment(1);
    histogram!("memferry_round_seconds", "role" => role).record(duration);
    let encodings = [
        ("zero", tally.zero),
        ("raw", tally.raw),
        ("compressed", tally.compressed),
        ("xbzrle", tally.xbzrle),
        ("unchanged", tally.unchanged),
    ];
    for (encoding, pages) in encodings {
        counter!("memferry_pages_total", "role" => role, "encoding" => encoding).increment(pages);
    }
    counter!("memferry_page_bytes_total", "role" => role).increment(tally.bytes_in);
    counter!("memferry_frame_bytes_total", "role" => role).increment(tally.bytes_out);
    counter!("memferry_xbzrle_misses_total", "role" => role).increment(tally.xbzrle_misses);
    counter!("memferry_xbzrle_overflows_total", "role" => role).increment(tally.xbzrle_overflows);
}

fn progress(role: &'static str, now: &Progress) {
    gauge!("memferry_remaining_bytes", "role" => role).set(float(now.remaining_bytes));
    gauge!("memferry_wire_bytes_per_second", "role" => role).set(now.wire_rate);
    if let Some(rate) = now.dirty_rate {
        gauge!("memferry_dirty_bytes_per_second", "role" => role).set(rate);
    }
    if let Some(downtime) = now.expected_downtime {
        gauge!("memferry_expected_downtime_seconds", "role" => role).set(downtime);
    }
}

fn downtime_parts(role: &'static str, parts: &DowntimeParts) {
    let parts = [
        ("final_sync", parts.final_sync),
        ("final_transfer", parts.final_transfer),
        ("state", parts.state),
        ("verify", parts.verify),
        ("handover", parts.handover),
    ];
    for (part, time) in parts {
        histogram!("memferry_downtime_part_seconds", "role" => role, "part" => part).record(time);
    }
}

fn stage(role: &'static str, reading: &Reading) {
    let states = [("busy", reading.busy), ("input_wait", reading.input_wait), ("output_wait", reading.output_wait)];
    for (state, time) in states {
        let labels = [("role", role), ("stage", reading.name), ("state", state)];
        counter!("memferry_stage_microseconds_total", &labels)
            .increment(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }
}

#[expect(clippy::cast_precision_loss, reason = "gauges are floating-point")]
fn float(number: u64) -> f64 {
    number as f64
}

fn describe() {
    describe_counter!("memferry_migrations_total", "Migrations that ended");
    describe_gauge!("memferry_phase", "1 for the phase the migration is in");
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
    describe_gauge!("memferry_remaining_bytes", Unit::Bytes, "Page bytes to go");
    describe_gauge!("memferry_wire_bytes_per_second", "Bytes to the wire, lately");
    describe_gauge!("memferry_dirty_bytes_per_second", "Page bytes that the guest dirtied, lately");
    describe_gauge!("memferry_expected_downtime_seconds", Unit::Seconds, "What a switchover would cost");
    describe_histogram!("memferry_downtime_seconds", Unit::Seconds, "How long the guest stood still");
    describe_histogram!("memferry_downtime_part_seconds", Unit::Seconds, "Where the downtime went");
    describe_gauge!("memferry_memory_bound_bytes", Unit::Bytes, "The most memory that the engine takes");
    describe_gauge!("memferry_memory_peak_bytes", Unit::Bytes, "The most memory that the engine took");
    describe_counter!("memferry_spared_pages_total", "Pages that were not sent for what the guest said of them");
    describe_counter!("memferry_stage_microseconds_total", Unit::Microseconds, "How a stage spent its time");
    describe_counter!("memferry_turned_away_total", "Strangers and broken peers that were turned away");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::script;
    use metrics_util::debugging::{DebugValue, DebuggingRecorder};
    use std::collections::HashMap;

    /// Every metric that a migration leaves, by name and labels without the role.
    fn recorded() -> HashMap<String, DebugValue> {
        let recorder = DebuggingRecorder::new();
        let snapshotter = recorder.snapshotter();
        metrics::with_local_recorder(&recorder, || {
            let observer = MetricsObserver::new();
            script(Role::Source).iter().for_each(|event| observer.event(Role::Source, event));
        });
        let entry =
            |(key, _, description, value): (metrics_util::CompositeKey, _, Option<metrics::SharedString>, _)| {
                assert!(description.is_some(), "{key:?} is described");
                let labels =
                    key.key().labels().filter(|label| label.key() != "role").map(|label| label.value().to_owned());
                (std::iter::once(key.key().name().to_owned()).chain(labels).collect::<Vec<_>>().join(" "), value)
            };
        snapshotter.snapshot().into_vec().into_iter().map(entry).collect()
    }

    #[test]
    fn a_migration_leaves_its_figures() {
        let recorded = recorded();
        let counter = |name: &str| match recorded[name] {
            DebugValue::Counter(count) => count,
            ref other => panic!("{name} is {other:?}"),
        };
        assert_eq!(counter("memferry_rounds_total"), 2);
        assert_eq!(counter("memferry_pages_total compressed"), 150_000);
        assert_eq!(counter("memferry_pages_total xbzrle"), 890);
        assert_eq!(counter("memferry_wire_bytes_total"), 512 << 20);
        assert_eq!(counter("memferry_spared_pages_total hinted"), 5000);
        assert_eq!(counter("memferry_migrations_total completed"), 1);
        assert_eq!(counter("memferry_stage_microseconds_total encoder busy"), 2_200_000);
        assert_eq!(recorded["memferry_phase completed"], DebugValue::Gauge(1.0.into()));
        assert_eq!(recorded["memferry_phase active"], DebugValue::Gauge(0.0.into()));
        assert_eq!(recorded["memferry_dirty_pages"], DebugValue::Gauge(100.0.into()));
        assert_eq!(recorded["memferry_downtime_seconds"], DebugValue::Histogram(vec![0.213.into()]));
    }

    #[test]
    fn the_wire_counter_never_counts_a_byte_twice() {
        let recorder = DebuggingRecorder::new();
        let snapshotter = recorder.snapshotter();
        metrics::with_local_recorder(&recorder, || {
            let observer = MetricsObserver::default();
            [100, 250, 250].iter().for_each(|&total| observer.wire_bytes(Role::Source, total));
        });
        let (.., value) = snapshotter.snapshot().into_vec().pop().unwrap();
        assert_eq!(value, DebugValue::Counter(250));
    }
}
