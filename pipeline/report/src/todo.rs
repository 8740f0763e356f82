//! Settings that the figures of a migration suggest to change.

use memferry_stages::codec::Codec;
use memferry_stages::tally::RoundTally;
use std::fmt;
use std::time::Duration;

use super::account::{Account, Round};
use memferry::bottleneck::{Bottleneck, Cause};
use memferry::human;
use memferry::settings::SourceSettings;
use memferry::values::{Bandwidth, Size, Time};

/// The share of the time from which something counts as the bottleneck.
const HELD: f64 = 0.8;
/// The share of lookups that miss from which the cache is considered too small.
const MISSED: f64 = 0.5;
/// Fewer misses than this are ignored.
const WORTH: u64 = 1000;
/// A call into the guest that takes longer than expected by less than one part in this number of the downtime limit is ignored.
const SLOW_PART: u32 = 20;
/// Bytes that the cache stores in addition to each page.
const SLOT_BYTES: u64 = 16;

/// A suggested change, with the figures that justify it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Conclusion {
    /// The cache was too small for the pages that were written repeatedly.
    CacheTooSmall {
        /// The share of lookups that missed.
        missed: f64,
        /// The size of the cache.
        cache: u64,
        /// A size that holds every page that was written.
        would_do: u64,
    },
    /// The bandwidth limit was the bottleneck.
    LimitHeld {
        /// The share of the time.
        share: f64,
        /// The limit in bytes per second.
        limit: u64,
    },
    /// The processors were full, with more lanes than cores.
    TooManyLanes {
        /// The share of the cores' time.
        share: f64,
        /// The number of lanes.
        lanes: u16,
        /// The number of cores.
        cores: usize,
    },
    /// The processors were full.
    ProcessorFull {
        /// The share of the cores' time.
        share: f64,
        /// The number of cores.
        cores: usize,
        /// Is there a codec that takes less processor time than this one?
        has_lighter_codec: bool,
    },
    /// Calls into the guest took longer than the forecast counted on. Those that did not are `None`.
    CallsTookLonger {
        /// What pausing the guest took.
        pause: Option<Duration>,
        /// What preparing it at the destination took.
        prepare: Option<Duration>,
        /// What starting it there took.
        start: Option<Duration>,
    },
    /// Connections were lost.
    ConnectionsLost {
        /// How many.
        lost: u32,
        /// How long there was none.
        time: Duration,
    },
}

impl fmt::Display for Conclusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::CacheTooSmall { missed, cache, would_do } => write!(
                f,
                "{} of the pages that were written again missed the XBZRLE cache of {}: xbzrle_cache = \"{}\" would hold all that \
                 were written.",
                percent(missed),
                Size(cache),
                Size(would_do)
            ),
            Self::LimitHeld { share, limit } => write!(
                f,
                "max_bandwidth = \"{}\" held it up for {} of the time: a higher limit makes it faster.",
                Bandwidth(Some(limit)),
                percent(share)
            ),
            Self::TooManyLanes { share, lanes, cores } => write!(
                f,
                "The processor was {} busy with {lanes} lanes on {}: lanes = {cores} is enough.",
                percent(share),
                human::counted(cores as u64, "core")
            ),
            Self::ProcessorFull { share, cores, has_lighter_codec } => write!(
                f,
                "The processor was {} busy ({}): {}.",
                percent(share),
                human::counted(cores as u64, "core"),
                if has_lighter_codec { "compress = \"lz4\" takes less of it" } else { "leave it more cores" }
            ),
            Self::CallsTookLonger { pause, prepare, start } => {
                let took = [("expected_pause", pause), ("expected_prepare", prepare), ("expected_start", start)];
                let set: Vec<_> = took
                    .into_iter()
                    .filter_map(|(key, took)| Some(format!("{key} = \"{}\"", Time(whole_ms(took?)))))
                    .collect();
                write!(
                    f,
                    "Calls into the guest took longer than the forecast counts on: {} is what they took. Set the longest of several \
                     migrations.",
                    set.join(", ")
                )
            }
            Self::ConnectionsLost { lost, time } => write!(
                f,
                "The connection was lost {}, and there was none for {}: find out what between both ends cut it.",
                if lost == 1 { "once".to_owned() } else { format!("{lost} times") },
                human::time(time)
            ),
        }
    }
}

/// The suggestions. Empty if no setting would change the figures.
#[must_use]
pub fn conclusions(
    settings: &SourceSettings,
    account: &Account,
    held_up: &Bottleneck,
    cores: usize,
) -> Vec<Conclusion> {
    let settings = &at_the_end(settings, account);
    let limit = held(held_up, Cause::Limit)
        .zip(settings.max_bandwidth)
        .map(|(share, limit)| Conclusion::LimitHeld { share, limit });
    let processor = held(held_up, Cause::Processor).map(|share| processor(settings, share, cores));
    let all = [cache(settings, account), limit, processor, calls(settings, account), outages(account)];
    all.into_iter().flatten().collect()
}

/// The settings, including the changes made during the migration.
fn at_the_end(settings: &SourceSettings, account: &Account) -> SourceSettings {
    let mut settings = settings.clone();
    account.changed.iter().for_each(|changed| changed.to.put_into(&mut settings));
    settings
}

/// The share of a cause, if it was the bottleneck.
fn held(held_up: &Bottleneck, cause: Cause) -> Option<f64> {
    held_up.share(cause).filter(|share| *share >= HELD)
}

fn processor(settings: &SourceSettings, share: f64, cores: usize) -> Conclusion {
    let has_lighter_codec = matches!(settings.encoder.compress, Some(Codec::Zstd { .. }));
    if usize::from(settings.lanes) > cores {
        Conclusion::TooManyLanes { share, lanes: settings.lanes, cores }
    } else {
        Conclusion::ProcessorFull { share, cores, has_lighter_codec }
    }
}

fn cache(settings: &SourceSettings, account: &Account) -> Option<Conclusion> {
    let cache = settings.encoder.xbzrle.as_ref()?.cache_bytes;
    let block = account.status.blocks.first()?;
    let later = || account.rounds.iter().skip(1).map(|round: &Round| &round.tally);
    let sum = |of: fn(&RoundTally) -> u64| later().map(of).sum::<u64>();
    let misses = sum(|tally| tally.pages.xbzrle_misses);
    let lookups = misses + sum(|tally| tally.pages.xbzrle + tally.pages.unchanged + tally.pages.xbzrle_overflows);
    let missed = misses as f64 / lookups.max(1) as f64;
    // At most these pages were written; those of the first round do not displace others.
    let written = sum(|tally| tally.pages.all).min(account.status.pages);
    let needed = written * (block.page_size + SLOT_BYTES);
    // A little more than needed: a cache never uses every slot.
    let would_do = (needed + needed / 16).next_multiple_of(16 << 20);
    (missed >= MISSED && misses >= WORTH && needed > cache).then_some(Conclusion::CacheTooSmall {
        missed,
        cache,
        would_do,
    })
}

/// A shorter time is no reason to expect less: another migration may take longer.
fn calls(settings: &SourceSettings, account: &Account) -> Option<Conclusion> {
    let ended = account.status.ended.as_ref().filter(|ended| ended.switchover().is_some())?;
    let worth = settings.downtime_limit / SLOW_PART;
    let longer = |took: Duration, expected: Duration| (took > expected.saturating_add(worth)).then_some(took);
    let pause = longer(ended.parts.pause, settings.expected_pause);
    let prepare = longer(ended.parts.prepare, settings.expected_prepare);
    let start = longer(ended.parts.start, settings.expected_start);
    pause.or(prepare).or(start)?;
    Some(Conclusion::CallsTookLonger { pause, prepare, start })
}

/// In whole milliseconds, rounded up.
fn whole_ms(time: Duration) -> Duration {
    const MS: u128 = 1_000_000;
    Duration::from_millis(u64::try_from(time.as_nanos().div_ceil(MS)).unwrap_or(u64::MAX))
}

fn outages(account: &Account) -> Option<Conclusion> {
    let outages = account.status.ended.as_ref()?.outages;
    (outages.lost > 0).then_some(Conclusion::ConnectionsLost { lost: outages.lost, time: outages.time })
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

#[cfg(test)]
mod tests {
    use memferry_stages::tally::PageTally;

    use super::*;
    use memferry::control::Status;
    use memferry::events::BlockFacts;
    use memferry::settings::{EncoderSettings, XbzrleSettings};

    fn settings() -> SourceSettings {
        let xbzrle = Some(XbzrleSettings { cache_bytes: 64 << 20, ..XbzrleSettings::default() });
        SourceSettings {
            encoder: EncoderSettings { xbzrle, ..EncoderSettings::default() },
            ..SourceSettings::default()
        }
    }

    /// 1 GiB, of which each later round has this number of pages, with this number of misses among them.
    fn account(rounds: &[(u64, u64)]) -> Account {
        let tally = |(pages, misses)| RoundTally {
            pages: PageTally { all: pages, xbzrle_misses: misses, xbzrle: pages - misses, ..PageTally::default() },
            ..RoundTally::default()
        };
        let first = RoundTally {
            pages: PageTally { all: 262_144, raw: 262_144, ..PageTally::default() },
            ..RoundTally::default()
        };
        let rounds = std::iter::once(first).chain(rounds.iter().copied().map(tally));
        let round = |tally| Round { tally, duration: Duration::ZERO, is_sample: false, dirty_after: None };
        let blocks = vec![BlockFacts { id: "ram".into(), bytes: 1 << 30, page_size: 4096 }];
        Account {
            status: Status { blocks, pages: 262_144, ..Status::default() },
            rounds: rounds.map(round).collect(),
            ..Account::default()
        }
    }

    fn words(settings: &SourceSettings, account: &Account, held_up: &Bottleneck) -> Vec<String> {
        conclusions(settings, account, held_up, 4).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_cache_that_is_too_small_is_named_with_one_that_would_do() {
        let missed = words(&settings(), &account(&[(60_000, 59_500), (40_000, 39_500)]), &Bottleneck::default());
        let expected = "99 % of the pages that were written again missed the XBZRLE cache of 64 MiB: xbzrle_cache = \"432 MiB\" would \
                        hold all that were written.";
        assert_eq!(missed, [expected]);
        // A cache that holds all pages still misses those that were never inserted; another size changes nothing.
        assert_eq!(words(&settings(), &account(&[(10_000, 9_900)]), &Bottleneck::default()), [""; 0]);
        assert_eq!(words(&settings(), &account(&[(60_000, 20_000)]), &Bottleneck::default()), [""; 0]);
        let most = conclusions(&settings(), &account(&[(262_144, 262_144); 9]), &Bottleneck::default(), 4);
        assert!(matches!(most[..], [Conclusion::CacheTooSmall { would_do, .. }] if would_do < 1200 << 20), "{most:?}");
        let none = SourceSettings { encoder: EncoderSettings { compress: None, xbzrle: None }, ..settings() };
        assert_eq!(words(&none, &account(&[(60_000, 60_000)]), &Bottleneck::default()), [""; 0]);
    }

    #[test]
    fn lost_connections_are_a_reason_to_look_at_the_network() {
        let mut account = account(&[]);
        account.status.ended = Some(memferry::samples::ended(memferry::events::Role::Source));
        assert_eq!(
            words(&settings(), &account, &Bottleneck::default()),
            ["The connection was lost once, and there was none for 2.30 s: find out what between both ends cut it."]
        );
        account.status.ended.as_mut().unwrap().outages = memferry::events::Outages::default();
        assert_eq!(words(&settings(), &account, &Bottleneck::default()), [""; 0]);
    }

    #[test]
    fn calls_that_took_longer_than_expected_are_named_with_what_they_took_and_no_others() {
        let took = |pause, start| {
            let mut account = account(&[]);
            let mut ended = memferry::samples::ended(memferry::events::Role::Source);
            ended.outages = memferry::events::Outages::default();
            (ended.parts.pause, ended.parts.start) = (Duration::from_micros(pause), Duration::from_micros(start));
            account.status.ended = Some(ended);
            account
        };
        let ms = Duration::from_millis;
        let settings = SourceSettings { downtime_limit: ms(300), expected_start: ms(900), ..settings() };
        assert_eq!(
            words(&settings, &took(271_300, 268_000), &Bottleneck::default()),
            [
                "Calls into the guest took longer than the forecast counts on: expected_pause = \"272ms\" is what they took. Set the \
              longest of several migrations."
            ]
        );
        let both = conclusions(&settings, &took(271_000, 1_000_000), &Bottleneck::default(), 4);
        assert_eq!(both, [Conclusion::CallsTookLonger { pause: Some(ms(271)), prepare: None, start: Some(ms(1000)) }]);
        // A twentieth of the limit is not worth a setting, and neither is a pause that was over sooner.
        assert_eq!(words(&settings, &took(15_000, 0), &Bottleneck::default()), [""; 0]);
    }

    #[test]
    fn what_held_it_up_is_named_with_what_to_set() {
        let limited = SourceSettings { max_bandwidth: Some(100 << 20), ..settings() };
        let shares = |limit, processor| Bottleneck::made_up(&[(Cause::Limit, limit), (Cause::Processor, processor)]);
        let limit = &shares(0.93, 0.1);
        let full = &shares(0.0, 0.95);
        assert_eq!(
            words(&limited, &account(&[]), limit),
            ["max_bandwidth = \"100 MiB/s\" held it up for 93 % of the time: a higher limit makes it faster."]
        );
        assert_eq!(words(&settings(), &account(&[]), limit), [""; 0], "no limit is set");
        let many = SourceSettings { lanes: 8, ..settings() };
        assert_eq!(
            words(&many, &account(&[]), full),
            ["The processor was 95 % busy with 8 lanes on 4 cores: lanes = 4 is enough."]
        );
        assert_eq!(
            words(&settings(), &account(&[]), full),
            ["The processor was 95 % busy (4 cores): leave it more cores."]
        );
        let mut heavy = settings();
        heavy.encoder.compress = Some(Codec::Zstd { level: 3 });
        assert_eq!(
            words(&heavy, &account(&[]), full),
            ["The processor was 95 % busy (4 cores): compress = \"lz4\" takes less of it."]
        );
        assert_eq!(words(&many, &account(&[]), &shares(0.5, 0.5)), [""; 0]);
    }
}
