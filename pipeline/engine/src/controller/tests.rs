//! The controller with simulated guests and links.

use memferry_stages::batch::RoundKind;
use memferry_stages::tally::PageTally;
use proptest::prelude::*;

use super::reason::Stalled;
use super::simulation::{Conditions, Run, simulate};
use super::*;
use crate::model::guest::{Costs, Encoded, Found, Guest, Sending};
use crate::model::link::Link;
use crate::settings::{ConvergenceSettings, EncoderSettings, RaiseSettings, StallStep, ThrottleSettings};

/// Pages that were sent, whatever their encoding.
fn sent(all: u64, bytes_in: u64, bytes_out: u64) -> PageTally {
    PageTally { all, bytes_in, bytes_out, ..PageTally::default() }
}

/// A guest that writes to some of its pages at random, every page of a set equally often.
#[derive(Clone, Debug)]
struct Writers {
    pages: u64,
    /// Pages of each set, and writes a second.
    sets: Vec<(f64, f64)>,
    /// With phases: it writes in the first half of each period, and rests in the second.
    period: Option<Duration>,
    costs: Costs,
}

impl Guest for Writers {
    fn pages(&self) -> u64 {
        self.pages
    }

    fn written(&mut self, from: Duration, to: Duration) -> Found {
        let time = self.awake(to) - self.awake(from);
        let of_set = |&(pages, rate): &(f64, f64)| pages * -f64::exp_m1(-rate * time / pages);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "pages")]
        let written = self.sets.iter().map(of_set).sum::<f64>().round() as u64;
        Found { dirty: written, cached: written }
    }

    fn page_bytes(&self) -> u64 {
        self.costs.page_bytes
    }

    fn look(&self, round: u32, pages: u64) -> Encoded {
        self.costs.encode(round, pages)
    }

    fn send(&mut self, sending: &Sending<'_>) -> Encoded {
        self.costs.encode(sending.round, sending.pages)
    }
}

impl Writers {
    /// Seconds in which it wrote, up to a moment.
    fn awake(&self, until: Duration) -> f64 {
        let Some(period) = self.period else { return until.as_secs_f64() };
        let (until, period) = (until.as_secs_f64(), period.as_secs_f64());
        (until / period).floor() * period / 2.0 + (until % period).min(period / 2.0)
    }
}

const MIB: f64 = 1024.0 * 1024.0;
const MS: Duration = Duration::from_millis(1);
const RAW: Costs =
    Costs { page_bytes: 4096, zero: 0.0, first: 4100.0, later: 4100.0, per_page: Duration::from_nanos(500) };

/// 256 MiB, with the given number of pages written in a second.
fn uniform(rate: f64) -> Writers {
    Writers { pages: 65_536, sets: vec![(65_536.0, rate)], period: None, costs: RAW }
}

fn link(mib_per_second: f64) -> Conditions {
    let fixed = FixedCost { sync: 2 * MS, handover: 5 * MS, ..FixedCost::default() };
    let link = Link::new(mib_per_second * MIB);
    Conditions { link, fixed, setup: Duration::ZERO, decision: Duration::ZERO, drain: Duration::ZERO }
}

fn settings() -> SourceSettings {
    SourceSettings {
        encoder: EncoderSettings { compress: None, xbzrle: None },
        downtime_limit: 100 * MS,
        max_rounds: 60,
        ..SourceSettings::default()
    }
}

fn on_stall(steps: &[StallStep]) -> SourceSettings {
    SourceSettings {
        convergence: ConvergenceSettings { on_stall: steps.to_vec(), ..ConvergenceSettings::default() },
        ..settings()
    }
}

fn run(guest: &Writers, link: &Conditions, settings: &SourceSettings) -> Run {
    simulate(&mut guest.clone(), link, settings)
}

/// Levels of the throttle in the order they were set.
fn levels(run: &Run) -> Vec<u8> {
    let level = |decided: &Decided| match decided.decision {
        Decision::Throttle(percent) => Some(percent),
        _ => None,
    };
    run.decided.iter().filter_map(level).collect()
}

fn last_reason(run: &Run) -> Reason {
    run.decided.last().unwrap().reason
}

#[test]
fn an_idle_guest_takes_one_round() {
    let run = run(&uniform(0.0), &link(100.0), &settings());
    assert_eq!((run.end, run.rounds), (Decision::SwitchOver, 1));
    assert_eq!(last_reason(&run), Reason::Met(Met::NothingDirty), "{run:#?}");
    assert_eq!(run.downtime, 7 * MS);
}

#[test]
fn a_guest_that_converges_meets_the_limit_by_itself() {
    let run = run(&uniform(5_000.0), &link(100.0), &settings());
    assert_eq!(run.end, Decision::SwitchOver);
    assert!(run.rounds == 2 && run.downtime <= 100 * MS, "{run:#?}");
    let decided: Vec<_> = run.decided.iter().map(|decided| decided.decision).collect();
    assert!(decided[..decided.len() - 1].iter().all(|&decision| decision == Decision::AnotherRound));
}

#[test]
fn a_guest_that_does_not_converge_continues_until_the_rounds_are_used_up() {
    let run = run(&uniform(100_000.0), &link(100.0), &settings());
    assert_eq!((run.end, run.rounds), (Decision::GiveUp, 60));
    assert_eq!(last_reason(&run), Reason::UsedUp { budget: UsedUp::Rounds(60), forbidden_by: None });
}

#[test]
fn deltas_are_sampled_before_anything_is_decided_by_them() {
    let deltas = |rounds| SourceSettings { encoder: EncoderSettings::default(), max_rounds: rounds, ..settings() };
    // The dirty rate is above the bandwidth for whole pages, and below it for deltas of 100 bytes.
    let guest = Writers { costs: Costs { later: 100.0, ..RAW }, ..uniform(100_000.0) };
    let sampled = run(&guest, &link(100.0), &deltas(60));
    let decisions: Vec<_> = sampled.decided.iter().map(|decided| decided.decision).collect();
    assert!(matches!(decisions[..], [Decision::Sample(_), Decision::SwitchOver]), "{decisions:?}");
    let sample = sampled.sent[1].tally;
    assert!((256..1024).contains(&sample.pages.all), "{sample:?}");
    let expected = sampled.forecast().unwrap().expected().as_secs_f64();
    assert!((expected / sampled.downtime.as_secs_f64() - 1.0).abs() < 0.05, "{sampled:#?}");
    // A sample is sent only if the budgets leave room to act on its result.
    let decided = run(&guest, &link(100.0), &deltas(2)).decided;
    assert_eq!(decided[0].decision, Decision::AnotherRound, "{decided:#?}");
    assert_eq!(run(&guest, &link(100.0), &settings()).decided[0].decision, Decision::AnotherRound, "no deltas");
}

#[test]
fn what_is_on_its_way_arrives_before_the_guest_is_paused_and_is_not_taken_for_a_guest_that_writes_faster() {
    let mut controller = Controller::new(&settings(), 4096);
    let all = RoundTally { pages: sent(65_536, 256 << 20, 256 << 20), ..RoundTally::new(1, RoundKind::Live) };
    controller.armed(Duration::ZERO);
    controller.round(&all, 1000 * MS, Work { busiest: MS, sending: None });
    let found = |elapsed, dirty_pages, in_flight_pages| Standing {
        elapsed,
        dirty_pages,
        in_flight_pages,
        ..Standing::default()
    };
    let decided = controller.synced(&found(1000 * MS, 100, 20_000));
    assert_eq!(decided.decision, Decision::Drain, "{decided:?}");
    assert_eq!(decided.reason, Reason::Backlog { pages: 20_000, unwritten: None, met: Met::WithinLimit });
    // Meanwhile as much is written as before, in a third of a second.
    let decided = controller.synced(&found(1333 * MS, 133, 0));
    assert_eq!(decided.decision, Decision::SwitchOver, "{decided:?}");
    let rate = controller.forecaster().dirty_bytes_per_second().unwrap() / 4096.0;
    assert!((rate - 100.0).abs() < 1.0, "{rate}");
    // If too much was written, another round sends it.
    let mut controller = Controller::new(&settings(), 4096);
    controller.armed(Duration::ZERO);
    controller.round(&all, 1000 * MS, Work { busiest: MS, sending: None });
    assert_eq!(controller.synced(&found(1000 * MS, 100, 20_000)).decision, Decision::Drain);
    assert_eq!(controller.synced(&found(1333 * MS, 30_000, 0)).decision, Decision::AnotherRound);
}

#[test]
fn a_throttle_rises_until_the_guest_converges() {
    let run = run(&uniform(100_000.0), &link(100.0), &on_stall(&[StallStep::Throttle, StallStep::Cancel]));
    assert_eq!(run.end, Decision::SwitchOver, "{run:#?}");
    let levels = levels(&run);
    assert!(levels.first() == Some(&20) && levels.is_sorted() && levels.len() > 1, "{levels:?}");
    assert!(run.downtime <= 100 * MS);
}

#[test]
fn the_last_step_of_a_throttle_is_smaller_where_that_suffices() {
    let mut coarse = on_stall(&[StallStep::Throttle]);
    let large = Writers { pages: 1 << 20, sets: vec![(1e6, 30_000.0)], ..uniform(0.0) };
    coarse.convergence.throttle = ThrottleSettings { start: 10, step: 80, most: 95 };
    let run = run(&large, &link(100.0), &coarse);
    let levels = levels(&run);
    assert_eq!(run.end, Decision::SwitchOver, "{run:#?}");
    assert!(levels[0] == 10 && levels.len() == 2 && levels[1] < 90, "{levels:?}");
}

#[test]
fn a_limit_is_raised_step_by_step_and_no_further_than_needed() {
    let mut raise = on_stall(&[StallStep::RaiseDowntimeLimit, StallStep::Cancel]);
    raise.convergence.raise = RaiseSettings { step: 200 * MS, most: Duration::from_secs(5) };
    let hot = Writers { sets: vec![(10_000.0, 1e6)], ..uniform(0.0) };
    let run = run(&hot, &link(100.0), &raise);
    assert_eq!(run.end, Decision::SwitchOver, "{run:#?}");
    assert!(matches!(last_reason(&run), Reason::Raised { limit, .. } if limit == 500 * MS), "{run:#?}");
    assert!(run.downtime <= run.limit && run.downtime + 200 * MS > run.limit, "{run:#?}");
}

#[test]
fn a_stall_is_switched_over_under_the_ceiling_and_cancelled_above_it() {
    let steps = on_stall(&[StallStep::SwitchOver, StallStep::Cancel]);
    let hot = Writers { sets: vec![(10_000.0, 1e6)], ..uniform(0.0) };
    let moved = run(&hot, &link(100.0), &steps);
    assert_eq!(moved.end, Decision::SwitchOver);
    assert!(moved.downtime > 100 * MS && moved.rounds < 12, "{moved:#?}");
    let ceiling = SourceSettings { max_downtime: Some(200 * MS), ..steps };
    let cancelled = run(&hot, &link(100.0), &ceiling);
    assert_eq!(cancelled.end, Decision::GiveUp);
    assert!(matches!(last_reason(&cancelled), Reason::Stall(Stalled::NoNewLeast { .. })), "{cancelled:#?}");
}

#[test]
fn a_switchover_waits_until_no_more_remains_than_before() {
    let mut steps = on_stall(&[StallStep::SwitchOver]);
    steps.convergence.stall_rounds = 3;
    let mut controller = Controller::new(&steps, 4096);
    let mut elapsed = Duration::ZERO;
    let mut decisions = Vec::new();
    for (round, dirty_pages) in (1..).zip([9_000, 9_100, 9_200, 9_300, 9_400, 9_350]) {
        let tally = RoundTally { round, pages: sent(10_000, 40_960_000, 41_000_000), ..RoundTally::default() };
        controller.round(&tally, 400 * MS, Work::default());
        elapsed += 400 * MS;
        decisions.push(controller.synced(&Standing { elapsed, dirty_pages, ..Standing::default() }).decision);
    }
    assert_eq!(decisions[..5], [Decision::AnotherRound; 5]);
    assert_eq!(decisions[5], Decision::SwitchOver);
}

#[test]
fn a_guest_that_cannot_be_throttled_gets_the_next_step() {
    let steps = on_stall(&[StallStep::Throttle, StallStep::Cancel]);
    let mut controller = Controller::new(&steps, 4096);
    let mut last = Decision::AnotherRound;
    for round in 1..20 {
        let tally = RoundTally { round, pages: sent(10_000, 40_960_000, 41_000_000), ..RoundTally::default() };
        controller.round(&tally, 400 * MS, Work::default());
        let now = Standing { elapsed: round * 400 * MS, dirty_pages: 10_000, ..Standing::default() };
        last = controller.synced(&now).decision;
        match last {
            Decision::Throttle(_) => controller.cannot_throttle(),
            Decision::GiveUp => break,
            _ => {}
        }
    }
    assert_eq!(last, Decision::GiveUp);
}

#[test]
fn equality_with_the_limit_counts_and_the_least_more_does_not() {
    let limits = SourceSettings { downtime_limit: 300 * MS, ..settings() };
    let decided = |dirty_pages| {
        let mut controller = Controller::new(&limits, 1000);
        controller.fixed().sync = 10 * MS;
        let tally = RoundTally { round: 1, pages: sent(1000, 1_000_000, 1_000_000), ..RoundTally::default() };
        controller.round(&tally, Duration::from_secs(1), Work::default());
        let now = Standing { elapsed: Duration::from_secs(1), dirty_pages, ..Standing::default() };
        controller.synced(&now)
    };
    assert_eq!(decided(290).forecast.unwrap().expected(), 300 * MS);
    assert_eq!(decided(290).decision, Decision::SwitchOver);
    assert_eq!(decided(291).decision, Decision::AnotherRound);
}

#[test]
fn without_a_figure_there_is_another_round() {
    let mut controller = Controller::new(&settings(), 4096);
    let now = Standing { dirty_pages: 1, ..Standing::default() };
    let decided = controller.synced(&now);
    assert_eq!((decided.decision, decided.reason), (Decision::AnotherRound, Reason::AboveLimit));
    assert_eq!(decided.forecast, None);
}

#[test]
fn a_deadline_is_met_by_pausing_as_late_as_it_can() {
    let deadline = Duration::from_secs(8);
    let limits = SourceSettings { deadline: Some(deadline), on_deadline: OnDeadline::SwitchOver, ..settings() };
    let run = run(&uniform(100_000.0), &link(100.0), &limits);
    assert_eq!(run.end, Decision::SwitchOver);
    let used_up = |reason| matches!(reason, Reason::UsedUp { budget: UsedUp::NowOrNever { late: None, .. }, .. });
    assert!(used_up(last_reason(&run)), "{run:#?}");
    let off = run.total.abs_diff(deadline);
    assert!(off < deadline / 10, "it took {:?}, with a downtime of {:?}", run.total, run.downtime);
}

#[test]
fn a_deadline_that_cannot_be_met_cancels_before_it_passes() {
    let limits = SourceSettings { deadline: Some(Duration::from_secs(6)), ..settings() };
    let run = run(&uniform(100_000.0), &link(100.0), &limits);
    assert_eq!(run.end, Decision::GiveUp);
    assert!(run.total < Duration::from_secs(6), "{run:#?}");
    let too_long = |reason| matches!(reason, Reason::UsedUp { budget: UsedUp::RoundTooLong { .. }, .. });
    assert!(too_long(last_reason(&run)), "{run:#?}");
}

#[test]
fn a_first_round_that_is_too_long_for_the_deadline_ends_with_it() {
    let limits = SourceSettings { deadline: Some(Duration::from_secs(1)), ..settings() };
    let cancelled = run(&uniform(1.0), &link(100.0), &limits);
    assert_eq!((cancelled.end, cancelled.total), (Decision::GiveUp, Duration::from_secs(1)));
    let limits = SourceSettings { on_deadline: OnDeadline::SwitchOver, ..limits };
    let moved = run(&uniform(1.0), &link(100.0), &limits);
    assert_eq!(moved.end, Decision::SwitchOver);
    let ceiling = SourceSettings { max_downtime: Some(Duration::from_secs(5)), ..limits };
    assert_eq!(run(&uniform(1.0), &link(100.0), &ceiling).end, Decision::GiveUp, "nothing is known of its downtime");
}

fn guests() -> impl Strategy<Value = Writers> {
    let set = (1.0f64..60_000.0, 0.0f64..300_000.0);
    let costs = (0.0f64..0.9, 100.0f64..4100.0, 0.1f64..1.0, 0u64..3000);
    let costs = costs.prop_map(|(zero, first, share, per_page)| Costs {
        page_bytes: 4096,
        zero,
        first,
        later: first * share,
        per_page: Duration::from_nanos(per_page),
    });
    (proptest::collection::vec(set, 0..3), costs, proptest::option::of(100u64..20_000)).prop_map(
        |(sets, costs, period)| Writers { pages: 65_536, sets, period: period.map(Duration::from_millis), costs },
    )
}

fn links() -> impl Strategy<Value = Conditions> {
    (1.0f64..4000.0, 0u64..50).prop_map(|(rate, handover)| {
        let fixed = FixedCost { sync: MS, handover: MS * u32::try_from(handover).unwrap(), ..FixedCost::default() };
        Conditions { fixed, ..link(rate) }
    })
}

fn all_settings() -> impl Strategy<Value = SourceSettings> {
    use StallStep::{Cancel, RaiseDowntimeLimit, SwitchOver, Throttle};
    let steps =
        proptest::sample::subsequence(vec![Throttle, RaiseDowntimeLimit, SwitchOver, Cancel], 0..=4).prop_shuffle();
    let throttle =
        (1u8..=50, 1u8..=50, 50u8..=99).prop_map(|(start, step, most)| ThrottleSettings { start, step, most });
    let raise = (1u64..500, 500u64..3000).prop_map(|(step, most)| RaiseSettings {
        step: Duration::from_millis(step),
        most: Duration::from_millis(most),
    });
    let convergence = (steps, 1u32..6, 0u32..4, throttle, raise).prop_map(
        |(on_stall, stall_rounds, cool_down_rounds, throttle, raise)| ConvergenceSettings {
            on_stall,
            stall_rounds,
            cool_down_rounds,
            throttle,
            raise,
        },
    );
    let limits =
        (10u64..500, proptest::option::of(500u64..3000), proptest::option::of(500u64..60_000), 1u32..60, any::<bool>());
    (convergence, limits).prop_map(|(convergence, (limit, ceiling, deadline, max_rounds, moves))| SourceSettings {
        convergence,
        downtime_limit: Duration::from_millis(limit),
        max_downtime: ceiling.map(Duration::from_millis),
        deadline: deadline.map(Duration::from_millis),
        max_rounds,
        on_deadline: if moves { OnDeadline::SwitchOver } else { OnDeadline::Cancel },
        ..settings()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn it_ends_as_the_settings_say_that_it_must(guest in guests(), link in links(), settings in all_settings()) {
        let run = run(&guest, &link, &settings);
        prop_assert!(run.rounds <= settings.max_rounds, "{:?}", run);
        if let Some(deadline) = settings.deadline {
            // The controller checks it every tenth of a second.
            let running = run.total - run.downtime;
            prop_assert!(running <= deadline + 100 * MS, "{:?}", run);
        }
        for decided in &run.decided {
            prop_assert!(decided.to_string().len() > 20, "{:?}", decided);
        }
    }

    #[test]
    fn nothing_exceeds_the_ceiling_knowingly(guest in guests(), link in links(), settings in all_settings()) {
        let run = run(&guest, &link, &settings);
        if let (Some(most), Decision::SwitchOver) = (settings.max_downtime, run.end) {
            prop_assert!(run.forecast().is_some_and(|forecast| forecast.expected() <= most), "{:?}", run);
            prop_assert!(run.limit <= most);
        }
    }

    #[test]
    fn what_is_switched_over_by_the_limit_keeps_it(guest in guests(), link in links(), settings in all_settings()) {
        let run = run(&guest, &link, &settings);
        let by_the_limit = run.forecast().is_some_and(|forecast| forecast.expected() <= run.limit);
        if run.end == Decision::SwitchOver && by_the_limit && settings.deadline.is_none() {
            // The least time of a round is added to the time of the pages.
            prop_assert!(run.downtime <= run.limit + run.limit / 20 + 2 * MS, "{:?}", run);
        }
    }

    #[test]
    fn a_throttle_never_falls_and_keeps_to_its_settings(guest in guests(), link in links(), settings in all_settings()) {
        let run = run(&guest, &link, &settings);
        let levels = levels(&run);
        let throttle = settings.convergence.throttle;
        prop_assert!(levels.is_sorted_by(|a, b| a < b), "{:?}", levels);
        prop_assert!(levels.iter().all(|&level| level <= throttle.most), "{:?}", levels);
        // One step may be smaller, and the last one ends at the ceiling.
        let steps = usize::from((throttle.most - throttle.start.min(throttle.most)) / throttle.step) + 3;
        prop_assert!(levels.len() <= steps, "{:?}", levels);
        if let Some(&first) = levels.first() {
            prop_assert_eq!(first, throttle.start.min(throttle.most));
        }
        let cool_down = settings.convergence.cool_down_rounds;
        let at = |decided: &Decided| matches!(decided.decision, Decision::Throttle(_));
        let rounds: Vec<_> = (0u32..).zip(&run.decided).filter(|(_, decided)| at(decided)).map(|(round, _)| round).collect();
        prop_assert!(rounds.windows(2).all(|pair| pair[1] - pair[0] >= cool_down.max(1)), "{:?}", rounds);
    }

    /// For guests that do not change: if a slow link completes within the limit, so does a faster one.
    #[test]
    fn a_better_link_never_gives_a_worse_outcome(
        guest in guests(), link in links(), faster in 1.0f64..20.0, settings in all_settings()
    ) {
        let guest = Writers { period: None, ..guest };
        let better = Conditions { link: Link::new(link.link.bytes_per_second * faster), ..link };
        let (slow, fast) = (run(&guest, &link, &settings), run(&guest, &better, &settings));
        let by_the_limit = |forecast: Forecast| forecast.expected() <= settings.downtime_limit;
        if slow.end != Decision::SwitchOver || !slow.forecast().is_some_and(by_the_limit) {
            return Ok(());
        }
        prop_assert!(is_within_the_limit(&fast, &settings), "slow {:?}\nfast {:?}", slow, fast);
        if levels(&slow).is_empty() && slow.limit == settings.downtime_limit {
            prop_assert!(fast.total <= slow.total + MS, "slow {:?}\nfast {:?}", slow, fast);
        }
    }
}

/// Was it moved within the configured limit, apart from the least time of a round?
fn is_within_the_limit(run: &Run, settings: &SourceSettings) -> bool {
    let limit = settings.downtime_limit;
    run.end == Decision::SwitchOver && run.downtime <= limit + limit / 20 + 2 * MS
}
