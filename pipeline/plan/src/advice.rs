//! The least that would have to be otherwise for a migration to meet its limit.
//!
//! Gentle is what its guest does not notice. So at a bandwidth at which a migration does not meet its limit these are tried, the
//! first that suffices is the answer:
//!
//! 1. how pages are encoded: deltas, a cache that holds the guest, another compressor;
//! 2. with the best of these, each by itself, for they hurt in ways that only an operator can weigh: a longer downtime, and a
//!    throttled guest.
//!
//! A `max_bandwidth` that is below what the link carries is an operator's own: a higher one that meets the limit is proposed beside
//! either. Where the settings meet the limit, others that do so too and cost less are looked for.

use std::time::Duration;

use memferry_stages::codec::Codec;

use super::bandwidth::Bandwidth;
use super::forecast::{Foreseen, foresee};
use super::model::SLOT_BYTES;
use super::written::Written;
use memferry::controller::forecast::whole;
use memferry::settings::{
    ConvergenceSettings, EncoderSettings, OnMiss, SourceSettings, StallStep, ThrottleSettings, XbzrleSettings,
};
use memferry::units::Units;
use memferry::values::{Size, Time};

/// Where the smallest bandwidth is looked for, in bytes a second.
const LEAST: f64 = 125e3;
const MOST: f64 = 125e9;
/// How exactly.
const STEP: f64 = 1.03;
/// A longer limit is tried in such steps, and no longer one than that.
const LONGER: f64 = 1.25;
const LONGEST: Duration = Duration::from_secs(30);
/// What another encoding must leave of the wait to be worth its change.
const WORTH: f64 = 0.9;
/// What should be left of the bandwidth and of the downtime limit: a guest does not write tomorrow exactly what was recorded.
pub const MARGIN: f64 = 0.2;
/// How much longer a migration may take with cheaper settings.
const LONGER_TOTAL: f64 = 1.1;
/// Smaller caches that are tried, as divisors of the one that is set, and the smallest worth a change.
const SMALLER_CACHES: [u64; 3] = [8, 4, 2];
const SMALLEST_CACHE: u64 = 16 << 20;
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
pub fn smallest_bandwidth(written: &Written<'_>, settings: &SourceSettings, units: Units) -> Option<Bandwidth> {
    let settings = without_steps(settings);
    let of = |bytes_per_second| Bandwidth { bytes_per_second, units };
    let meets = |bandwidth| foresee(written, &settings, bandwidth).meets;
    let (mut below, mut above) = (LEAST, MOST);
    if let Some(cap) = settings.max_bandwidth {
        above = above.min(cap as f64);
    }
    if !meets(of(above)) {
        return None;
    }
    while above / below > STEP {
        let middle = (below * above).sqrt();
        *(if meets(of(middle)) { &mut above } else { &mut below }) = middle;
    }
    let mut found = of(above);
    let rounded = found.rounded_up(2);
    if meets(rounded) {
        found = rounded;
    }
    Some(found)
}

/// The smallest such bandwidth with a margin.
#[must_use]
pub fn with_margin(smallest: Bandwidth) -> Bandwidth {
    Bandwidth { bytes_per_second: smallest.bytes_per_second / (1.0 - MARGIN), ..smallest }.rounded_up(2)
}

/// What meets the limit at this bandwidth: encodings, or those of the last kind, or none; and a higher `max_bandwidth` beside them.
#[must_use]
pub fn gentlest(written: &Written<'_>, settings: &SourceSettings, bandwidth: Bandwidth) -> Vec<Advice> {
    let settings = without_steps(settings);
    let advice = |changed: &SourceSettings, sets| Advice { sets, foreseen: foresee(written, changed, bandwidth) };
    let mut best: Option<(SourceSettings, Advice)> = None;
    for (changed, sets) in encodings(written, &settings) {
        let found = advice(&changed, sets);
        if found.foreseen.meets {
            let as_it_is = found.sets.is_empty();
            let limit = (!as_it_is).then(|| higher_limit(written, &settings, &[], bandwidth)).flatten();
            return std::iter::once(found).chain(limit).collect();
        }
        if best.as_ref().is_none_or(|(_, best)| rest(&found) < rest(best).mul_f64(WORTH)) {
            best = Some((changed, found));
        }
    }
    let Some((best, Advice { sets, .. })) = best else { return Vec::new() };
    let with = |more: String| sets.iter().cloned().chain([more]).collect();
    let mut found = Vec::from_iter(higher_limit(written, &best, &sets, bandwidth));
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

/// A higher `max_bandwidth` that meets the limit, where the one that is set is below the link's bandwidth.
fn higher_limit(
    written: &Written<'_>,
    settings: &SourceSettings,
    sets: &[String],
    bandwidth: Bandwidth,
) -> Option<Advice> {
    let limit = settings.max_bandwidth? as f64;
    let unlimited = SourceSettings { max_bandwidth: None, ..settings.clone() };
    let needed = with_margin(smallest_bandwidth(written, &unlimited, bandwidth.units)?);
    if needed.bytes_per_second <= limit || needed.bytes_per_second > bandwidth.bytes_per_second {
        return None;
    }
    let changed = SourceSettings { max_bandwidth: Some(whole(needed.bytes_per_second)), ..settings.clone() };
    let foreseen = foresee(written, &changed, bandwidth);
    let set = format!("migration.max_bandwidth={needed}").replace(' ', "");
    foreseen.meets.then(|| Advice { sets: sets.iter().cloned().chain([set]).collect(), foreseen })
}

/// Settings that meet the limit with a margin, take less memory or processor time than these and hardly more time in all. The
/// cheapest of them.
#[must_use]
pub fn cheaper(written: &Written<'_>, settings: &SourceSettings, as_set: &Foreseen) -> Option<Advice> {
    let deltas = settings.encoder.xbzrle.as_ref();
    let caches = SMALLER_CACHES.iter().filter_map(|part| {
        let deltas = deltas?;
        let cache_bytes = (deltas.cache_bytes / part).next_multiple_of(1 << 20);
        (cache_bytes >= SMALLEST_CACHE).then(|| Some(XbzrleSettings { cache_bytes, ..deltas.clone() }))
    });
    let compress = settings.encoder.compress;
    let encoders = [(None, None), (compress, None)].into_iter().chain(caches.map(|cache| (compress, cache)));
    encoders.map(|(compress, xbzrle)| EncoderSettings { compress, xbzrle }).find_map(|encoder| {
        let changed = SourceSettings { encoder, ..settings.clone() };
        let sets = sets(settings, &changed);
        if sets.is_empty() {
            return None;
        }
        let foreseen = foresee(written, &changed, as_set.bandwidth);
        let run = &foreseen.run;
        let in_time = run.downtime <= settings.downtime_limit.mul_f64(1.0 - MARGIN);
        let as_fast = run.total <= as_set.run.total.mul_f64(LONGER_TOTAL);
        (foreseen.meets && run.throttle == 0 && in_time && as_fast).then_some(Advice { sets, foreseen })
    })
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
    // What is left open is decided as it pays.
    let on_miss = if deltas.on_miss == OnMiss::Raw { OnMiss::Auto } else { deltas.on_miss };
    for codec in [compress.unwrap_or(Codec::Lz4), Codec::Lz4, zstd] {
        add(Some(codec), Some(XbzrleSettings { on_miss, ..cached.clone() }));
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
            if old.on_miss != new.on_miss {
                sets.push(format!("encoder.on_miss={}", new.on_miss.name()));
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
