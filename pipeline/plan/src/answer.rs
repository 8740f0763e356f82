//! The answer of a plan: plain values, for JSON and for the [picture](super::picture).

use std::time::Duration;

use serde::Serialize;

use super::advice::{Advice, cheaper, gentlest, smallest_bandwidth, with_margin};
use super::bandwidth::Bandwidth;
use super::forecast::{Foreseen, fixed_cost, foresee};
use super::written::Written;
use memferry::controller::Decision;
use memferry::settings::SourceSettings;
use memferry::units::Units;

/// Version of the JSON.
const VERSION: u32 = 1;

/// A plan. Times are in seconds.
#[derive(Clone, Debug, Serialize)]
pub struct Answer {
    /// Version of these fields.
    pub version: u32,
    /// The recording.
    pub trace: TraceFigures,
    /// The downtime limit to meet.
    pub downtime_limit: f64,
    /// The cost of a switchover without any pages: a sync, digests and the handover.
    pub switchover_floor: f64,
    /// The part of that cost that digests take.
    pub digests: f64,
    /// The bandwidth limit in bytes per second, if one is set: no link carries more than that.
    pub max_bandwidth: Option<u64>,
    /// The forecast at each bandwidth that was asked for.
    pub bandwidths: Vec<AtBandwidth>,
    /// Bytes per second that are needed to meet the limit without a throttle or postcopy; `None`: no link suffices.
    pub smallest_bandwidth: Option<f64>,
    /// The same with a margin.
    pub bandwidth_with_margin: Option<f64>,
    /// The units of the first bandwidth that was asked for.
    #[serde(skip)]
    pub units: Units,
}

/// The recording, in figures.
#[derive(Clone, Debug, Serialize)]
pub struct TraceFigures {
    /// Its duration.
    pub length: f64,
    /// Bytes of guest memory to send.
    pub bytes: u64,
    /// Pages of guest memory to send.
    pub pages: u64,
    /// The share of them that is zero.
    pub zero: f64,
    /// Pages found dirty per second.
    pub pages_per_second: f64,
}

/// The forecast over one link.
#[derive(Clone, Debug, Serialize)]
pub struct AtBandwidth {
    /// Bytes per second.
    pub bytes_per_second: f64,
    /// The units in which it was asked for.
    #[serde(skip)]
    pub units: Units,
    /// The share of the bandwidth in excess of what meets the limit, if the settings meet it without a throttle or postcopy.
    pub margin: Option<f64>,
    /// The forecast with the settings as they are.
    pub foreseen: Figures,
    /// Changes that would meet the limit, if the settings do not.
    pub advice: Vec<AdviceFigures>,
    /// A cheaper change that also meets the limit, if the settings do.
    pub cheaper: Option<AdviceFigures>,
}

/// The forecast of a migration.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Is the guest moved?
    pub moves: bool,
    /// Is the downtime within the limit?
    pub meets: bool,
    /// Rounds before the switchover.
    pub rounds: u32,
    /// From the start to the end.
    pub total: f64,
    /// How long the guest is paused; 0 if it is not moved.
    pub downtime: f64,
    /// How long it runs at its destination before all of its pages are there, part of the total; `None` if all are there when it starts.
    pub postcopy: Option<f64>,
    /// Bytes on the wire.
    pub bytes: u64,
    /// The highest throttle of the guest, in percent.
    pub throttle: u8,
    /// The final downtime limit, if it is raised.
    pub raised_limit: Option<f64>,
    /// Does the migration take longer than the recording, so that the trace is repeated?
    pub repeats_trace: bool,
    /// The last decision, in words.
    pub why: String,
    /// The expected cost of a switchover after each round.
    pub expected_downtimes: Vec<f64>,
    /// Bytes that each round put on the wire; the last one is the switchover's, or what follows in postcopy.
    pub round_bytes: Vec<u64>,
}

/// A possible change, and its forecast.
#[derive(Clone, Debug, Serialize)]
pub struct AdviceFigures {
    /// The change, in the form that `--set` takes.
    pub set: Vec<String>,
    /// The forecast with this change.
    pub foreseen: Figures,
}

impl Answer {
    /// Plans a migration with these settings over each of these links.
    #[must_use]
    pub fn of(written: &Written<'_>, settings: &SourceSettings, bandwidths: &[Bandwidth]) -> Self {
        let (guest, touched) = (&written.trace().guest, &written.trace().samples.touched);
        let filled = (guest.pages() - guest.untouched) as f64 * (1.0 - touched.share());
        let fixed = fixed_cost(written.trace(), settings);
        let units = bandwidths.first().map(|bandwidth| bandwidth.units).unwrap_or_default();
        let smallest = smallest_bandwidth(written, settings, units);
        Self {
            version: VERSION,
            trace: TraceFigures {
                length: written.trace().length().as_secs_f64(),
                bytes: guest.pages() * guest.page_size.bytes() as u64,
                pages: guest.pages(),
                zero: 1.0 - filled / guest.pages() as f64,
                pages_per_second: written.trace().pages_per_second(),
            },
            downtime_limit: settings.downtime_limit.as_secs_f64(),
            switchover_floor: fixed.total().as_secs_f64(),
            digests: fixed.verify.as_secs_f64(),
            max_bandwidth: settings.max_bandwidth,
            bandwidths: bandwidths.iter().map(|&bandwidth| at(written, settings, bandwidth, smallest)).collect(),
            smallest_bandwidth: smallest.map(|found| found.bytes_per_second),
            bandwidth_with_margin: smallest.map(|found| with_margin(found).bytes_per_second),
            units,
        }
    }
}

fn at(
    written: &Written<'_>,
    settings: &SourceSettings,
    bandwidth: Bandwidth,
    smallest: Option<Bandwidth>,
) -> AtBandwidth {
    let foreseen = foresee(written, settings, bandwidth);
    let is_gentle = foreseen.is_gentle();
    let advice = if is_gentle { Vec::new() } else { gentlest(written, settings, bandwidth) };
    // A setting that already has this value is not advice.
    let advice = advice.into_iter().filter(|advice| !advice.sets.is_empty());
    let usable = settings.max_bandwidth.map_or(f64::INFINITY, |limit| limit as f64).min(bandwidth.bytes_per_second);
    let margin = smallest.filter(|_| is_gentle).map(|smallest| 1.0 - (smallest.bytes_per_second / usable).min(1.0));
    let cheaper = is_gentle.then(|| cheaper(written, settings, &foreseen)).flatten();
    AtBandwidth {
        bytes_per_second: bandwidth.bytes_per_second,
        units: bandwidth.units,
        margin,
        foreseen: figures(&foreseen, settings.downtime_limit),
        advice: advice.map(advice_figures).collect(),
        cheaper: cheaper.map(advice_figures),
    }
}

fn advice_figures(Advice { sets, foreseen }: Advice) -> AdviceFigures {
    AdviceFigures { set: sets, foreseen: figures(&foreseen, Duration::MAX) }
}

fn figures(foreseen: &Foreseen, limit: Duration) -> Figures {
    let run = &foreseen.run;
    let is_postcopy = run.end == Decision::Postcopy;
    let moves = run.end == Decision::SwitchOver || is_postcopy;
    let expected = run.decided.iter().filter_map(|decided| decided.forecast);
    Figures {
        moves,
        meets: foreseen.meets,
        rounds: run.rounds,
        total: run.total.as_secs_f64(),
        downtime: run.downtime.as_secs_f64(),
        postcopy: is_postcopy.then(|| run.sent.last().map_or(0.0, |rest| rest.time.as_secs_f64())),
        bytes: run.bytes,
        throttle: run.throttle,
        raised_limit: (moves && run.limit > limit).then_some(run.limit.as_secs_f64()),
        repeats_trace: foreseen.repeated,
        why: run.decided.last().map(|decided| decided.to_string()).unwrap_or_default(),
        expected_downtimes: expected.map(|forecast| forecast.expected().as_secs_f64()).collect(),
        round_bytes: run.sent.iter().map(|round| round.tally.pages.bytes_out).collect(),
    }
}
