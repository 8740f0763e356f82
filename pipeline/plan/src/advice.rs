//! The smallest change with which a migration meets its downtime limit.
//!
//! Changes that the guest does not notice come first. At a bandwidth at which a migration does not meet its limit,
//! these are tried in order, and the first that suffices is the answer:
//!
//! 1. the encoding of pages: deltas, a cache that holds the guest, another compressor;
//! 2. with the best of these, a longer downtime, a throttled guest and postcopy, each by itself: only an operator can weigh
//!    their costs.
//!
//! A `max_bandwidth` below what the link carries is the operator's choice: a higher one that meets the limit is
//! proposed in addition. If the settings meet the limit, cheaper settings that also meet it are searched for.

use std::time::Duration;

use memferry_stages::codec::Codec;

use super::bandwidth::Bandwidth;
use super::forecast::{Foreseen, foresee};
use super::model::SLOT_BYTES;
use super::written::Written;
use memferry::controller::forecast::whole;
use memferry::settings::{
    ConvergenceSettings, EncoderSettings, Mode, OnMiss, PostcopyAfter, SourceSettings, StallStep, ThrottleSettings,
    XbzrleSettings,
};
use memferry::units::Units;
use memferry::values::{Size, Time};

/// The range in which the smallest bandwidth is searched for, in bytes per second.
const LEAST: f64 = 125e3;
const MOST: f64 = 125e9;
/// The precision of that search.
const STEP: f64 = 1.03;
/// The factor by which each attempt raises the downtime limit, and the longest limit that is tried.
const LONGER: f64 = 1.25;
const LONGEST: Duration = Duration::from_secs(30);
/// The share of the switchover's cost that another encoding may leave for its change to be worthwhile.
const WORTH: f64 = 0.9;
/// The margin of bandwidth and downtime limit: tomorrow's writes differ from those that were recorded.
pub const MARGIN: f64 = 0.2;
/// The factor by which a migration may take longer with cheaper settings.
const LONGER_TOTAL: f64 = 1.1;
/// Smaller caches to try, as divisors of the configured one, and the smallest reduction worth a change.
const SMALLER_CACHES: [u64; 3] = [8, 4, 2];
const SMALLEST_CACHE: u64 = 16 << 20;
/// The throttle that is tried.
const THROTTLE: ThrottleSettings = ThrottleSettings { start: 10, step: 10, most: 90 };

/// A possible change of settings, and its forecast.
#[derive(Clone, Debug)]
pub struct Advice {
    /// The change in command-line form: `encoder.delta=xbzrle`. Empty: the settings are sufficient as they are.
    pub sets: Vec<String>,
    /// The forecast with this change.
    pub foreseen: Foreseen,
}

/// The smallest bandwidth at which the limit is met without any of the steps against a stall and without postcopy; `None` if there is
/// none.
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

/// That bandwidth with a margin.
#[must_use]
pub fn with_margin(smallest: Bandwidth) -> Bandwidth {
    Bandwidth { bytes_per_second: smallest.bytes_per_second / (1.0 - MARGIN), ..smallest }.rounded_up(2)
}

/// Changes that meet the limit at this bandwidth: encodings, or else a longer limit, a throttle or postcopy, or none; and in
/// addition a higher `max_bandwidth`.
#[must_use]
pub fn gentlest(written: &Written<'_>, settings: &SourceSettings, bandwidth: Bandwidth) -> Vec<Advice> {
    let as_set = settings;
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
    let throttled =
        advice(&SourceSettings { convergence, ..best.clone() }, with("convergence.on_stall=[\"throttle\"]".into()));
    found.extend(throttled.foreseen.meets.then_some(throttled));
    found.extend(postcopy(written, as_set, bandwidth));
    found
}

/// Postcopy after the first round, where that is possible and not set already.
fn postcopy(written: &Written<'_>, settings: &SourceSettings, bandwidth: Bandwidth) -> Option<Advice> {
    let is_possible = settings.after.is_none() && settings.checksum && settings.recovery.attempts > 0;
    if settings.mode.may_switch() || !is_possible {
        return None;
    }
    let after = Some(PostcopyAfter::Rounds(1));
    let changed = SourceSettings { mode: Mode::Hybrid, postcopy_after: after, ..without_steps(settings) };
    let sets = vec!["migration.mode=hybrid".into(), "migration.postcopy_after=1".into()];
    let foreseen = foresee(written, &changed, bandwidth);
    foreseen.meets.then_some(Advice { sets, foreseen })
}

/// A higher `max_bandwidth` that meets the limit, if the configured one is below the link's bandwidth.
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

/// The cheapest settings that meet the limit with a margin, take less memory or processor time than these, and take
/// hardly more time in all.
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
        (foreseen.is_gentle() && in_time && as_fast).then_some(Advice { sets, foreseen })
    })
}

/// The expected cost of the switchover, at the last decision.
fn rest(advice: &Advice) -> Duration {
    let forecasts = advice.foreseen.run.decided.iter().filter_map(|decided| decided.forecast);
    forecasts.map(|forecast| forecast.expected()).min().unwrap_or(Duration::MAX)
}

/// The same settings without steps against a stall, and without postcopy.
fn without_steps(settings: &SourceSettings) -> SourceSettings {
    let convergence = ConvergenceSettings { on_stall: Vec::new(), ..settings.convergence.clone() };
    SourceSettings { convergence, mode: Mode::Precopy, postcopy_after: None, ..settings.clone() }
}

/// Other encodings, those nearest to the settings first: the settings themselves, then deltas, a cache that holds the
/// guest, and other compressors.
fn encodings(written: &Written<'_>, settings: &SourceSettings) -> Vec<(SourceSettings, Vec<String>)> {
    let guest = &written.trace().guest;
    let filled = (guest.pages() - guest.untouched) * (guest.page_size.bytes() as u64 + SLOT_BYTES);
    // A little more than the whole guest: a cache never uses every slot.
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
    // An unset choice is made by what pays off.
    let on_miss = if deltas.on_miss == OnMiss::Raw { OnMiss::Auto } else { deltas.on_miss };
    for codec in [compress.unwrap_or(Codec::Lz4), Codec::Lz4, zstd] {
        add(Some(codec), Some(XbzrleSettings { on_miss, ..cached.clone() }));
    }
    add(Some(Codec::Lz4), None);
    add(Some(zstd), None);
    add(None, None);
    found
}

/// The command-line changes that turn one configuration into the other.
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

/// Rounded to two digits.
fn round(limit: Duration) -> Duration {
    let millis = limit.as_secs_f64() * 1000.0;
    let unit = 10_f64.powf(millis.log10().floor() - 1.0).max(1.0);
    Duration::from_secs_f64((millis / unit).ceil() * unit / 1000.0).min(LONGEST)
}
