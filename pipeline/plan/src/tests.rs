//! Plans of made-up traces with known results.

use std::time::Duration;

use memferry_stages::codec::Codec;
use memferry_stages::tally::RoundTally;

use super::advice::{gentlest, smallest_bandwidth};
use super::answer::Answer;
use super::bandwidth::Bandwidth;
use super::forecast::{Foreseen, foresee};
use super::picture::draw;
use super::trace::{Coded, DeltaSample, Deltas, GuestFacts, Interval, Runs, Samples, Share, Trace};
use super::written::Written;
use memferry::controller::Decision;
use memferry::controller::simulation::Run;
use memferry::settings::{EncoderSettings, Mode, PostcopyAfter, SourceSettings, StallStep, Verify, XbzrleSettings};
use memferry::units::Units;

const PAGE: u64 = 4096;
/// Each trace has 64 MiB, a quarter of which is zero.
const PAGES: u64 = 16_384;
const FILLED: u64 = PAGES / 4 * 3;
const TENTH: Duration = Duration::from_millis(100);

/// A guest whose pages compress to half, whose deltas have 100 bytes, and that writes these pages in turn, interval
/// by interval.
fn trace(turns: impl IntoIterator<Item = std::ops::Range<u64>>) -> Trace {
    let coded = Coded { pages: 1000, compressed: 1000, bytes: 1000 * PAGE / 2, nanos: 4_000_000 };
    let sample = DeltaSample { pages: 100, deltas: 100, delta_bytes: 10_000, ..DeltaSample::default() };
    let interval = |pages| Interval { length: TENTH, sync: Duration::from_millis(1), written: Runs::of([pages]) };
    Trace {
        guest: GuestFacts {
            untouched: PAGES / 8,
            cores: 4,
            digests: Duration::from_millis(20),
            ..GuestFacts::of_blocks(vec![("ram".into(), PAGES)])
        },
        intervals: turns.into_iter().map(interval).collect(),
        samples: Samples {
            zstd_level: 1,
            touched: Share { of: 7000, part: 1000 },
            first_written: Share { of: 100, part: 0 },
            whole: [coded; 3],
            written: [coded; 3],
            alone: [coded; 3],
            deltas: vec![Deltas { span: TENTH, again: sample, rested: sample, from_zero: sample }],
            ..Samples::default()
        },
    }
}

/// 2,000 pages, the same all the time: 8 MB.
fn steady() -> Trace {
    trace(std::iter::repeat_n(4000..6000, 50))
}

fn settings(encoder: EncoderSettings) -> SourceSettings {
    SourceSettings { encoder, downtime_limit: TENTH, max_rounds: 30, verify: Verify::Off, ..SourceSettings::default() }
}

fn raw() -> SourceSettings {
    settings(EncoderSettings { compress: None, xbzrle: None })
}

fn deltas() -> SourceSettings {
    settings(EncoderSettings { compress: None, xbzrle: Some(XbzrleSettings::default()) })
}

fn mbyte(megabytes: f64) -> Bandwidth {
    Bandwidth { bytes_per_second: megabytes * 1e6, units: Units::Bits }
}

fn plan(trace: &Trace, settings: &SourceSettings, bandwidth: Bandwidth) -> Foreseen {
    foresee(&Written::of(trace), settings, bandwidth)
}

/// The first round of deltas: a sample round lies between it and the first round.
fn behind_the_sample(run: &Run) -> RoundTally {
    run.sent[2].tally
}

fn about(found: f64, wanted: f64) -> bool {
    (found - wanted).abs() < 0.03 * wanted
}

#[test]
fn the_first_round_sends_what_is_not_zero_as_it_is_encoded() {
    let idle = trace(std::iter::once(0..1));
    let first = |settings: &SourceSettings| plan(&idle, settings, mbyte(100.0)).run.sent[0].tally;
    let tally = first(&raw());
    assert_eq!((tally.pages.all, tally.pages.zero, tally.pages.raw), (PAGES, PAGES / 4, FILLED));
    assert!(about(tally.pages.bytes_out as f64, (FILLED * PAGE) as f64), "{tally:?}");
    let lz4 = first(&settings(EncoderSettings { compress: Some(Codec::Lz4), xbzrle: None }));
    assert_eq!((lz4.pages.raw, lz4.pages.compressed), (0, FILLED));
    assert!(about(lz4.pages.bytes_out as f64, (FILLED * PAGE / 2) as f64), "{lz4:?}");
}

#[test]
fn pages_that_are_written_all_the_time_are_left_in_every_round() {
    let trace = steady();
    let run = plan(&trace, &raw(), mbyte(50.0)).run;
    assert_eq!((run.end, run.rounds), (Decision::GiveUp, 30));
    assert!(run.sent[1..].iter().all(|round| about(round.tally.pages.all as f64, 2000.0)), "{run:?}");
    let faster = plan(&trace, &raw(), mbyte(150.0));
    assert!(faster.meets && about(faster.run.downtime.as_secs_f64(), 0.058), "{faster:?}");
}

#[test]
fn deltas_count_as_they_were_sampled_and_miss_where_the_cache_is_small() {
    let trace = steady();
    let run = plan(&trace, &deltas(), mbyte(50.0)).run;
    let [sample, rest] = [run.sent[1].tally, behind_the_sample(&run)];
    assert_eq!(run.sent.len(), 3);
    assert!(rest.pages.xbzrle > 1900 && rest.pages.xbzrle_misses < 20, "{rest:?}");
    assert!(about(rest.pages.bytes_out as f64, 2000.0 * 104.0), "{rest:?}");
    assert!(
        about(sample.pages.bytes_out as f64, sample.pages.all as f64 * 104.0) && sample.pages.all <= 512,
        "{sample:?}"
    );
    let mut small = deltas();
    small.encoder.xbzrle.as_mut().unwrap().cache_bytes = 8 << 20;
    let missed = behind_the_sample(&plan(&trace, &small, mbyte(50.0)).run);
    assert!((1000..1800).contains(&missed.pages.xbzrle_misses), "{missed:?}");
}

/// 2,000 pages that the first round sends as zero.
#[test]
fn the_first_write_to_a_zero_page_is_a_delta_without_a_copy_in_the_cache() {
    let mut trace = steady();
    trace.samples.first_written.part = 100;
    let mut settings = deltas();
    settings.encoder.xbzrle.as_mut().unwrap().cache_first_round = false;
    let second = |trace: &Trace| behind_the_sample(&plan(trace, &settings, mbyte(50.0)).run);
    let known = second(&trace);
    assert!(known.pages.xbzrle > 1900 && known.pages.xbzrle_misses < 100, "{known:?}");
    assert!(known.pages.bytes_out < 2000 * PAGE / 10, "{known:?}");
    // What is written whole at once is sent whole.
    let all = DeltaSample { pages: 100, overflows: 100, ..DeltaSample::default() };
    trace.samples.deltas[0].from_zero = all;
    let filled = second(&trace);
    assert!(filled.pages.xbzrle_overflows > 1900 && filled.pages.bytes_out > 1900 * PAGE, "{filled:?}");
}

/// Written once during the first round, before or after the page is sent.
#[test]
fn what_is_written_before_its_turn_is_unchanged_or_not_even_found() {
    // The last page is written first: it is sent last.
    let mut trace = trace([PAGES - 64..PAGES, 0..64, 2000..2000, 2000..2000, 2000..2000, 2000..2000, 2000..2000]);
    let rest = |trace: &Trace| behind_the_sample(&plan(trace, &deltas(), mbyte(100.0)).run);
    let both = rest(&trace);
    assert_eq!((both.pages.all, both.pages.unchanged), (128, 64), "{both:?}");
    trace.guest.rearms_late = true;
    let late = rest(&trace);
    assert_eq!((late.pages.all, late.pages.unchanged), (64, 0), "{late:?}");
}

#[test]
fn a_migration_that_takes_longer_than_the_recording_is_reported_so() {
    let trace = steady();
    assert!(plan(&trace, &raw(), mbyte(5.0)).repeated);
    assert!(!plan(&trace, &raw(), mbyte(150.0)).repeated);
}

#[test]
fn the_smallest_bandwidth_does_and_a_smaller_one_does_not() {
    let trace = steady();
    let written = Written::of(&trace);
    for settings in [raw(), deltas()] {
        let found = smallest_bandwidth(&written, &settings, Units::Bits).unwrap();
        let less = Bandwidth { bytes_per_second: found.bytes_per_second * 0.8, ..found };
        assert!(foresee(&written, &settings, found).meets, "{found}");
        assert!(!foresee(&written, &settings, less).meets, "{found}");
    }
    let [whole, less] = [raw(), deltas()].map(|settings| smallest_bandwidth(&written, &settings, Units::Bits).unwrap());
    assert!(less.bytes_per_second * 5.0 < whole.bytes_per_second, "{less} and {whole}");
    let strict = SourceSettings { downtime_limit: Duration::from_millis(2), ..raw() };
    assert_eq!(smallest_bandwidth(&written, &strict, Units::Bits), None, "a switchover alone takes longer");
}

#[test]
fn advice_is_what_the_guest_does_not_notice_where_that_suffices() {
    let trace = steady();
    let written = Written::of(&trace);
    let found = gentlest(&written, &raw(), mbyte(50.0));
    let sets: Vec<_> = found.iter().map(|advice| advice.sets.clone()).collect();
    assert_eq!(sets, [["encoder.delta=xbzrle"]]);
    assert!(found[0].foreseen.meets);

    // Pages that change completely: neither deltas nor a compressor help.
    let mut trace = trace.clone();
    let overflows = DeltaSample { pages: 100, overflows: 100, ..DeltaSample::default() };
    trace.samples.deltas = vec![Deltas { span: TENTH, again: overflows, rested: overflows, from_zero: overflows }];
    let noise = Coded { pages: 1000, compressed: 0, bytes: 1000 * PAGE, nanos: 1_000_000 };
    (trace.samples.whole, trace.samples.written, trace.samples.alone) = ([noise; 3], [noise; 3], [noise; 3]);
    // With different pages in each interval, a throttle leaves fewer of them.
    trace.intervals = (0..50)
        .map(|at: u64| {
            let start = 1000 + at % 10 * 1500;
            Interval { length: TENTH, sync: Duration::ZERO, written: Runs::of(std::iter::once(start..start + 1500)) }
        })
        .collect();
    let found = gentlest(&Written::of(&trace), &raw(), mbyte(50.0));
    let last: Vec<_> = found.iter().map(|advice| advice.sets.last().unwrap().as_str()).collect();
    assert!(last.len() == 3 && last[0].starts_with("migration.downtime_limit="), "{last:?}");
    assert_eq!(last[1..], ["convergence.on_stall=[\"throttle\"]", "migration.postcopy_after=1"]);
    assert!(found.iter().all(|advice| advice.foreseen.meets) && found[1].foreseen.run.throttle > 0);
}

#[test]
fn a_limit_that_is_what_holds_is_raised_with_a_margin() {
    let trace = steady();
    let written = Written::of(&trace);
    let limited = SourceSettings { max_bandwidth: Some(50_000_000), ..raw() };
    let found = gentlest(&written, &limited, mbyte(500.0));
    let sets: Vec<_> = found.iter().map(|advice| advice.sets.join(" ")).collect();
    assert_eq!(sets.len(), 2, "{sets:?}");
    assert_eq!(sets[0], "encoder.delta=xbzrle");
    let rate = sets[1].strip_prefix("migration.max_bandwidth=").unwrap().parse::<Bandwidth>().unwrap();
    let needed = smallest_bandwidth(&written, &raw(), Units::Bits).unwrap();
    assert!(rate.bytes_per_second >= needed.bytes_per_second * 1.2, "{rate} and {needed}");
    assert!(found.iter().all(|advice| advice.foreseen.meets));
    // The link carries no more than the limit: a higher limit gains nothing.
    let found = gentlest(&written, &limited, mbyte(50.0));
    assert!(found.iter().all(|advice| advice.sets == ["encoder.delta=xbzrle"]), "{found:?}");
}

#[test]
fn a_plan_that_meets_its_limit_says_by_how_much_and_what_does_for_less() {
    let trace = steady();
    let written = Written::of(&trace);
    let smallest = smallest_bandwidth(&written, &raw(), Units::Bits).unwrap().bytes_per_second / 1e6;
    let answer = Answer::of(&written, &raw(), &[mbyte(smallest * 1.05), mbyte(smallest * 4.0)]);
    let margins = answer.bandwidths.iter().map(|at| at.margin.unwrap()).collect::<Vec<_>>();
    assert!(margins[0] < 0.1 && (margins[1] - 0.75).abs() < 0.01, "{margins:?}");
    let picture = draw(&answer);
    assert!(picture.contains("of the bandwidth to spare") && picture.contains("with a margin of 20 %"), "{picture}");
    assert!(answer.bandwidths.iter().all(|at| at.cheaper.is_none()), "nothing costs less than raw pages");
    // 256 MiB of cache for a guest that writes 8 MB.
    let at = &Answer::of(&written, &deltas(), &[mbyte(20.0)]).bandwidths[0];
    assert_eq!(at.cheaper.as_ref().unwrap().set, ["encoder.xbzrle_cache='32 MiB'"]);
}

#[test]
fn rates_are_shown_in_the_units_that_were_asked_for() {
    let trace = steady();
    let bandwidth = "64 MiB/s".parse().unwrap();
    let picture = draw(&Answer::of(&Written::of(&trace), &deltas(), &[bandwidth]));
    assert!(picture.contains("64 MiB/s") && !picture.contains("bit/s"), "{picture}");
}

#[test]
fn misses_are_compressed_over_a_link_that_is_slower_than_the_compressor() {
    let trace = steady();
    let mut small = settings(EncoderSettings { compress: Some(Codec::Lz4), xbzrle: Some(XbzrleSettings::default()) });
    small.encoder.xbzrle.as_mut().unwrap().cache_bytes = 8 << 20;
    // An attempt takes 4 µs and saves half a page. Two lanes share the link: that pays up to 512 MB/s.
    let rest = |settings: &SourceSettings, megabytes| behind_the_sample(&plan(&trace, settings, mbyte(megabytes)).run);
    assert!(rest(&small, 50.0).pages.compressed > 900);
    assert_eq!(rest(&small, 5000.0).pages.compressed, 0);
    let limited = SourceSettings { max_bandwidth: Some(50_000_000), ..small };
    assert!(rest(&limited, 5000.0).pages.compressed > 900);
}

#[test]
fn the_answer_shows_each_link_and_names_what_helps() {
    let trace = steady();
    let verified = SourceSettings {
        verify: Verify::Full,
        convergence: memferry::settings::ConvergenceSettings {
            on_stall: vec![StallStep::Cancel],
            ..memferry::settings::ConvergenceSettings::default()
        },
        ..raw()
    };
    let answer = Answer::of(&Written::of(&trace), &verified, &[mbyte(50.0), mbyte(500.0)]);
    let picture = draw(&answer);
    for words in
        ["does not converge", "converges", "switchover", "--set encoder.delta=xbzrle", "The smallest bandwidth"]
    {
        assert!(picture.contains(words), "{words:?} in\n{picture}");
    }
    let is_drawn = |line: &&str| line.contains('█') || line.contains("Mbit/s  ");
    assert!(picture.lines().filter(is_drawn).all(|line| line.chars().count() <= 80), "{picture}");
    let json = serde_json::to_value(&answer).unwrap();
    assert_eq!(json["version"], 1);
    assert_eq!(json["bandwidths"][0]["foreseen"]["moves"], false);
    assert_eq!(json["bandwidths"][0]["advice"][0]["set"][0], "encoder.delta=xbzrle");
    assert_eq!(json["bandwidths"][1]["foreseen"]["meets"], true);
}

#[test]
fn a_migration_that_is_longer_than_its_trace_is_marked_and_the_mark_is_explained() {
    let picture = |intervals| {
        let trace = trace(std::iter::repeat_n(4000..6000, intervals));
        draw(&Answer::of(&Written::of(&trace), &raw(), &[mbyte(500.0)]))
    };
    let (short, long) = (picture(1), picture(50));
    assert!(short.contains("ms*") && short.contains("\n* longer than the 100 ms that were recorded"), "{short}");
    assert!(!long.contains('*'), "{long}");
    assert!(!short.contains(" 1 rounds"), "{short}");
}

/// Half of all pages, all the time: 32 MB each tenth of a second.
fn hot() -> Trace {
    trace(std::iter::repeat_n(4000..12_000, 50))
}

#[test]
fn postcopy_pauses_the_guest_for_no_page_and_sends_the_rest_as_it_runs() {
    let trace = hot();
    let precopy = plan(&trace, &raw(), mbyte(20.0));
    assert_eq!((precopy.meets, precopy.run.end), (false, Decision::GiveUp));
    let hybrid = SourceSettings { mode: Mode::Hybrid, postcopy_after: Some(PostcopyAfter::Rounds(1)), ..raw() };
    let run = plan(&trace, &hybrid, mbyte(20.0)).run;
    assert_eq!((run.end, run.rounds), (Decision::Postcopy, 1));
    assert!(run.downtime < Duration::from_millis(10), "{:?}", run.downtime);
    let [first, rest] = run.sent[..] else { panic!("{:?}", run.sent) };
    assert_eq!((first.tally.pages.all, rest.tally.pages.all), (PAGES, 8000));
    assert!(run.total >= first.time + rest.time);
    let at_once = SourceSettings { mode: Mode::Postcopy, ..raw() };
    let run = plan(&trace, &at_once, mbyte(20.0)).run;
    assert_eq!((run.end, run.rounds, run.sent.len()), (Decision::Postcopy, 0, 1));
    assert_eq!(run.sent[0].tally.pages.all, PAGES);
    // In the middle of the first round, which takes about 2.5 s.
    let second = SourceSettings { postcopy_after: Some(PostcopyAfter::Time(Duration::from_secs(1))), ..hybrid.clone() };
    let run = plan(&trace, &second, mbyte(20.0)).run;
    let [rest] = run.sent[..] else { panic!("{:?}", run.sent) };
    assert!((10_000..PAGES).contains(&rest.tally.pages.all), "{rest:?}");
    // Deltas are off.
    let encoder = deltas().encoder;
    let run = plan(&trace, &SourceSettings { encoder, ..hybrid }, mbyte(20.0)).run;
    assert_eq!(run.sent.last().unwrap().tally.pages.xbzrle, 0);
}

#[test]
fn a_guest_that_does_not_converge_is_told_of_postcopy() {
    let trace = hot();
    // Too slow for deltas too.
    let text = |settings: &SourceSettings| draw(&Answer::of(&Written::of(&trace), settings, &[mbyte(2.0)]));
    let precopy = text(&raw());
    assert!(precopy.contains("--set migration.mode=hybrid --set migration.postcopy_after=1\n"), "{precopy}");
    assert!(precopy.contains("of it in postcopy") && precopy.contains("losing either\nend loses it then"), "{precopy}");
    let hybrid = SourceSettings { mode: Mode::Hybrid, postcopy_after: Some(PostcopyAfter::Rounds(1)), ..raw() };
    let set = text(&hybrid);
    assert!(set.contains("moves by postcopy") && set.contains("they meet 100 ms by postcopy, for "), "{set}");
    assert!(!set.contains("mode=hybrid"), "{set}");
    let once = SourceSettings { checksum: false, ..raw() };
    assert!(!text(&once).contains("ostcopy"), "it needs checksums");
}
