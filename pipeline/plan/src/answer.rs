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

/// What a plan says. Times are in seconds.
#[derive(Clone, Debug, Serialize)]
pub struct Answer {
    /// Version of these fields.
    pub version: u32,
    /// What was recorded.
    pub trace: TraceFigures,
    /// The limit that is to be met.
    pub downtime_limit: f64,
    /// What a switchover costs without a page: a sync, digests and the hand-over.
    pub switchover_floor: f64,
    /// What of it digests cost.
    pub digests: f64,
    /// Bytes a second of the cap that is set, if one is: no link carries more than that.
    pub max_bandwidth: Option<u64>,
    /// What is foreseen at each bandwidth that was asked for.
    pub bandwidths: Vec<AtBandwidth>,
    /// Bytes a second that are needed to meet the limit without a throttle; `None`: no link does.
    pub smallest_bandwidth: Option<f64>,
    /// The same with a margin.
    pub bandwidth_with_margin: Option<f64>,
    /// The units that the first bandwidth was asked for in.
    #[serde(skip)]
    pub units: Units,
}

/// What was recorded.
#[derive(Clone, Debug, Serialize)]
pub struct TraceFigures {
    /// How long.
    pub length: f64,
    /// Bytes of the guest that travel.
    pub bytes: u64,
    /// Pages of the guest that travel.
    pub pages: u64,
    /// The share of them that is zero.
    pub zero: f64,
    /// Pages found dirty in a second.
    pub pages_per_second: f64,
}

/// What is foreseen over one link.
#[derive(Clone, Debug, Serialize)]
pub struct AtBandwidth {
    /// Bytes a second.
    pub bytes_per_second: f64,
    /// The units that it was asked for in.
    #[serde(skip)]
    pub units: Units,
    /// The share of it that is not needed to meet the limit, where the settings do without a throttle.
    pub margin: Option<f64>,
    /// How it goes with the settings as they are.
    pub foreseen: Figures,
    /// What would meet the limit, if that does not.
    pub advice: Vec<AdviceFigures>,
    /// What meets it too and costs less, if that does.
    pub cheaper: Option<AdviceFigures>,
}

/// How a migration goes.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Is the guest moved?
    pub moves: bool,
    /// In a downtime within the limit?
    pub meets: bool,
    /// Rounds before the switchover.
    pub rounds: u32,
    /// From the start to the end.
    pub total: f64,
    /// How long the guest stands still; 0 if it is not moved.
    pub downtime: f64,
    /// Bytes on the wire.
    pub bytes: u64,
    /// The most that the guest is throttled, in percent.
    pub throttle: u8,
    /// The downtime limit in the end, if it is raised.
    pub raised_limit: Option<f64>,
    /// Does it take longer than was recorded, so that the trace was begun again?
    pub repeats_trace: bool,
    /// The last decision, in words.
    pub why: String,
    /// What a switchover after each round was expected to cost.
    pub expected_downtimes: Vec<f64>,
    /// Bytes that each round put on the wire, the last in the switchover.
    pub round_bytes: Vec<u64>,
}

/// What could be set, and how it goes then.
#[derive(Clone, Debug, Serialize)]
pub struct AdviceFigures {
    /// As `--set` takes them.
    pub set: Vec<String>,
    /// How it goes.
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
    let is_gentle = foreseen.meets && foreseen.run.throttle == 0;
    let advice = if is_gentle { Vec::new() } else { gentlest(written, settings, bandwidth) };
    // What is set already is no advice.
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
    let moves = run.end == Decision::SwitchOver;
    let expected = run.decided.iter().filter_map(|decided| decided.forecast);
    Figures {
        moves,
        meets: foreseen.meets,
        rounds: run.rounds,
        total: run.total.as_secs_f64(),
        downtime: run.downtime.as_secs_f64(),
        bytes: run.bytes,
        throttle: run.throttle,
        raised_limit: (moves && run.limit > limit).then_some(run.limit.as_secs_f64()),
        repeats_trace: foreseen.repeated,
        why: run.decided.last().map(|decided| decided.to_string()).unwrap_or_default(),
        expected_downtimes: expected.map(|forecast| forecast.expected().as_secs_f64()).collect(),
        round_bytes: run.sent.iter().map(|round| round.tally.bytes_out).collect(),
    }
}
