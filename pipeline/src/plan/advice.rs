//! The least that would have to be otherwise for a migration to meet its limit.
//!
//! Gentle is what its guest does not notice. So at a bandwidth at which a migration does not meet its limit these are tried, the
//! first that suffices is the answer:
//!
//! 1. how pages are encoded: deltas, a cache that holds the guest, another compressor;
//! 2. with the best of these, each by itself, for they hurt in ways that only an operator can weigh: a longer downtime, and a
//!    guest that is held back.

use std::time::Duration;

use memferry_stages::codec::Codec;

use super::bandwidth::Bandwidth;
use super::forecast::{Foreseen, foresee};
use super::model::SLOT_BYTES;
use super::written::Written;
use crate::config::values::{Size, Time};
use crate::settings::{ConvergenceSettings, SourceSettings, StallStep, ThrottleSettings, XbzrleSettings};

/// Where the smallest bandwidth is looked for.
const LEAST: Bandwidth = Bandwidth { bytes_per_second: 125e3 };
const MOST: Bandwidth = Bandwidth { bytes_per_second: 125e9 };
/// How exactly.
const STEP: f64 = 1.03;
/// A longer limit is tried in such steps, and no longer one than that.
const LONGER: f64 = 1.25;
const LONGEST: Duration = Duration::from_secs(30);
/// What another encoding must leave of the wait to be worth its change.
const WORTH: f64 = 0.9;
/// How a guest is held back where that is tried.
const THROTTLE: ThrottleSettings = ThrottleSettings { start: 10, step: 10, most: 90 };

/// What could be set, and what would come of it.
#[derive(Clone, Debug)]
pub struct Advice {
    /// As a command line says it: `encoder.delta=xbzrle`. None: the settings do as they are.
    pub sets: Vec<String>,
    /// What is foreseen then.
    pub foreseen: Foreseen,
}

/// The smallest bandwidth that meets the limit without anything that is done about a stall; `None` if none does.
#[must_use]
pub fn smallest_bandwidth(written: &Written<'_>, settings: &SourceSettings) -> Option<Bandwidth> {
    let settings = without_steps(settings);
    let meets = |bandwidth| foresee(written, &settings, bandwidth).meets;
    let (mut below, mut above) = (LEAST.bytes_per_second, MOST.bytes_per_second);
    if let Some(cap) = settings.max_bandwidth {
        above = above.min(cap as f64);
    }
    if !meets(Bandwidth { bytes_per_second: above }) {
        return None;
    }
    while above / below > STEP {
        let middle = (below * above).sqrt();
        *(if meets(Bandwidth { bytes_per_second: middle }) { &mut above } else { &mut below }) = middle;
    }
    let mut found = Bandwidth { bytes_per_second: above };
    let rounded = found.rounded_up(2);
    if meets(rounded) {
        found = rounded;
    }
    Some(found)
}

/// What meets the limit at this bandwidth: one answer, or those of the last kind, or none.
#[must_use]
pub fn gentlest(written: &Written<'_>, settings: &SourceSettings, bandwidth: Bandwidth) -> Vec<Advice> {
    let settings = without_steps(settings);
    let advice = |changed: &SourceSettings, sets| Advice { sets, foreseen: foresee(written, changed, bandwidth) };
    let mut best: Option<(SourceSettings, Advice)> = None;
    for (changed, sets) in encodings(written, &settings) {
        let found = advice(&changed, sets);
        if found.foreseen.meets {
            return vec![found];
        }
        if best.as_ref().is_none_or(|(_, best)| rest(&found) < rest(best).mul_f64(WORTH)) {
            best = Some((changed, found));
        }
    }
    let Some((best, Advice { sets, .. })) = best else { return Vec::new() };
    let with = |more: String| sets.iter().cloned().chain([more]).collect();
    let mut found = Vec::new();
    let longer = std::iter::successors(Some(best.downtime_limit.mul_f64(LONGER)), |limit| Some(limit.mul_f64(LONGER)));
    let longer = longer.take_while(|&limit| limit <= LONGEST).map(round).find_map(|limit| {
        let changed = SourceSettings {
            downtime_limit: limit,
            max_downtime: best.max_downtime.map(|most| most.max(limit)),
            ..best.clone()
        };
        let advice = advice(&changed, with(format!("migration.downtime_limit={}", Time(limit)).replace(' ', "")));
        advice.foreseen.meets.then_some(advice)
    });
    found.extend(longer);
    let convergence =
        ConvergenceSettings { on_stall: vec![StallStep::Throttle], throttle: THROTTLE, ..best.convergence.clone() };
    let throttled = advice(&SourceSettings { convergence, ..best }, with("convergence.on_stall=[\"throttle\"]".into()));
    found.extend(throttled.foreseen.meets.then_some(throttled));
    found
}

/// What the paused guest would wait for, as the last decision saw it.
fn rest(advice: &Advice) -> Duration {
    let forecasts = advice.foreseen.run.decided.iter().filter_map(|decided| decided.forecast);
    forecasts.map(|forecast| forecast.expected()).min().unwrap_or(Duration::MAX)
}

fn without_steps(settings: &SourceSettings) -> SourceSettings {
    let convergence = ConvergenceSettings { on_stall: Vec::new(), ..settings.convergence.clone() };
    SourceSettings { convergence, ..settings.clone() }
}

/// Other ways to encode the pages, those nearest to the settings first: these themselves, then deltas, a cache that holds the
/// guest, and other compressors.
fn encodings(written: &Written<'_>, settings: &SourceSettings) -> Vec<(SourceSettings, Vec<String>)> {
    let guest = &written.trace().guest;
    let filled = (guest.pages() - guest.untouched) * (guest.page_size.bytes() as u64 + SLOT_BYTES);
    // A little more than all of it: not every slot of a cache is ever used.
    let all = (filled + filled / 16).next_multiple_of(64 << 20).min(guest.pages() * guest.page_size.bytes() as u64);
    let mut found = vec![(settings.clone(), Vec::new())];
    let mut add = |compress: Option<Codec>, xbzrle: Option<XbzrleSettings>| {
        let mut changed = settings.clone();
        changed.encoder.compress = compress;
        changed.encoder.xbzrle = xbzrle;
        let sets = sets(settings, &changed);
        if !sets.is_empty() && found.iter().all(|(_, others)| *others != sets) {
            found.push((changed, sets));
        }
    };
    let compress = settings.encoder.compress;
    let deltas = settings.encoder.xbzrle.clone().unwrap_or_default();
    let cached = XbzrleSettings { cache_bytes: deltas.cache_bytes.max(all), ..deltas.clone() };
    let zstd = Codec::Zstd { level: written.trace().samples.zstd_level };
    add(compress, Some(deltas.clone()));
    add(compress, Some(cached.clone()));
    for codec in [compress.unwrap_or(Codec::Lz4), Codec::Lz4, zstd] {
        add(Some(codec), Some(XbzrleSettings { compress_on_miss: true, ..cached.clone() }));
    }
    add(Some(Codec::Lz4), None);
    add(Some(zstd), None);
    add(None, None);
    found
}

/// What a command line says to make of one the other.
fn sets(from: &SourceSettings, to: &SourceSettings) -> Vec<String> {
    let mut sets = Vec::new();
    let (old, new) = (&from.encoder, &to.encoder);
    if old.compress != new.compress {
        sets.push(format!("encoder.compress={}", new.compress.map_or("none", Codec::name)));
    }
    match (&old.xbzrle, &new.xbzrle) {
        (Some(_), None) => sets.push("encoder.delta=none".into()),
        (old, Some(new)) => {
            if old.is_none() {
                sets.push("encoder.delta=xbzrle".into());
            }
            let old = old.clone().unwrap_or_default();
            if old.cache_bytes != new.cache_bytes {
                sets.push(format!("encoder.xbzrle_cache='{}'", Size(new.cache_bytes)));
            }
            if old.compress_on_miss != new.compress_on_miss {
                sets.push("encoder.on_miss=compress".into());
            }
        }
        (None, None) => {}
    }
    sets
}

/// Two digits of it.
fn round(limit: Duration) -> Duration {
    let millis = limit.as_secs_f64() * 1000.0;
    let unit = 10_f64.powf(millis.log10().floor() - 1.0).max(1.0);
    Duration::from_secs_f64((millis / unit).ceil() * unit / 1000.0).min(LONGEST)
}
