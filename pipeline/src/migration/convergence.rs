//! When to switch over: figures in, a decision out. No I/O, no clock, no tasks.
//!
//! The decision comes after each bitmap sync between rounds. What remains is what the sync found plus what was taken and
//! is not acknowledged; at the rate measured, plus the fixed cost of a switchover, that is the expected downtime. At or
//! below the limit the guest is paused; else there is another round, until rounds or time are used up.

use std::collections::VecDeque;
use std::time::Duration;

use crate::settings::{OnDeadline, SourceSettings};

/// How much measured time a rate is made of: long enough to be smooth, short enough to follow a change of encoding.
const RATE_WINDOW: Duration = Duration::from_millis(200);
/// How many bytes a rate is made of: a round of a few pages measures the latency of a round and no rate.
const RATE_BYTES: u64 = 8 << 20;

/// The rate at which page bytes get done, from the rounds lately finished.
#[derive(Clone, Debug, Default)]
pub struct PageRate {
    rounds: VecDeque<(u64, Duration)>,
}

impl PageRate {
    /// A round of `bytes` of pages took `duration`, from its first batch to its last byte sent.
    pub fn round(&mut self, bytes: u64, duration: Duration) {
        self.rounds.push_front((bytes, duration));
        self.rounds.truncate(64);
    }

    /// Bytes a second over the latest rounds that together are long and large enough (all there are, if they are not), or
    /// `None` before anything was measured.
    #[must_use]
    pub fn bytes_per_second(&self) -> Option<f64> {
        let (mut bytes, mut time) = (0u64, Duration::ZERO);
        for &(round_bytes, round_time) in &self.rounds {
            bytes += round_bytes;
            time += round_time;
            if time >= RATE_WINDOW && bytes >= RATE_BYTES {
                break;
            }
        }
        (bytes > 0 && !time.is_zero()).then(|| bytes as f64 / time.as_secs_f64())
    }
}

/// What a switchover costs whatever remains to be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FixedCost {
    /// One more bitmap sync: the longest measured so far.
    pub sync: Duration,
    /// Digests of the whole guest at both ends.
    pub verify: Duration,
    /// Device state and the last handshake.
    pub handover: Duration,
}

impl FixedCost {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.sync + self.verify + self.handover
    }
}

/// The limits that the operator set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The longest expected downtime to accept.
    pub downtime: Duration,
    /// The most rounds before the last one.
    pub rounds: u32,
    /// The longest the rounds may take.
    pub deadline: Option<Duration>,
    /// What happens when rounds or time are used up.
    pub on_deadline: OnDeadline,
}

impl From<&SourceSettings> for Limits {
    fn from(settings: &SourceSettings) -> Self {
        Self {
            downtime: settings.downtime_limit,
            rounds: settings.max_rounds,
            deadline: settings.deadline,
            on_deadline: settings.on_deadline,
        }
    }
}

/// How things stand after a sync.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Situation {
    /// The round that was just scanned.
    pub round: u32,
    /// Time since the migration began.
    pub elapsed: Duration,
    /// Page bytes that the sync found dirty.
    pub dirty_bytes: u64,
    /// Page bytes taken by the scanner and not acknowledged.
    pub in_flight_bytes: u64,
    /// Page bytes a second, lately.
    pub rate: Option<f64>,
    /// What a switchover costs beside them.
    pub fixed: FixedCost,
}

impl Situation {
    /// What a switchover would cost; `None` while no rate is known and something remains.
    #[must_use]
    pub fn expected_downtime(&self) -> Option<Duration> {
        Some(self.transfer()?.saturating_add(self.fixed.total()))
    }

    /// What sending the rest would take.
    fn transfer(&self) -> Option<Duration> {
        match (self.dirty_bytes + self.in_flight_bytes, self.rate) {
            (0, _) => Some(Duration::ZERO),
            (rest, Some(rate)) => Some(Duration::try_from_secs_f64(rest as f64 / rate).unwrap_or(Duration::MAX)),
            (_, None) => None,
        }
    }

    /// The forecast in words: the sum, its parts and the limit.
    fn outlook(&self, limit: Duration) -> String {
        let (Some(expected), Some(transfer)) = (self.expected_downtime(), self.transfer()) else {
            return "no rate is known yet".into();
        };
        let FixedCost { sync, verify, handover } = self.fixed;
        format!(
            "expected downtime {expected:.1?} (transfer {transfer:.1?}, sync {sync:.1?}, verify {verify:.1?}, handover \
             {handover:.1?}), limit {limit:.1?}"
        )
    }
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Scan again while the guest runs.
    AnotherRound,
    /// Pause the guest and send the rest.
    SwitchOver,
    /// Cancel: the limits cannot be met.
    GiveUp,
}

/// Decides, and says why in words and figures.
#[must_use]
pub fn decide(limits: &Limits, now: &Situation) -> (Decision, String) {
    if now.dirty_bytes == 0 {
        return (Decision::SwitchOver, "switch over: the last round left nothing dirty".into());
    }
    let outlook = now.outlook(limits.downtime);
    if now.expected_downtime().is_some_and(|expected| expected <= limits.downtime) {
        return (Decision::SwitchOver, format!("switch over: {outlook}"));
    }
    match (limits.used_up(now), limits.on_deadline) {
        (Some(why), OnDeadline::Cancel) => (Decision::GiveUp, format!("gave up: {why}; {outlook}")),
        (Some(why), OnDeadline::SwitchOver) => (Decision::SwitchOver, format!("switch over: {why}; {outlook}")),
        (None, _) => (Decision::AnotherRound, format!("another round: {outlook}")),
    }
}

impl Limits {
    /// Which limit is reached, in words.
    fn used_up(&self, now: &Situation) -> Option<String> {
        if now.round >= self.rounds {
            return Some(format!("{} rounds are used up", self.rounds));
        }
        let deadline = self.deadline.filter(|&deadline| now.elapsed >= deadline)?;
        Some(format!("the deadline of {deadline:.1?} has passed"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        downtime: Duration::from_millis(300),
        rounds: 10,
        deadline: Some(Duration::from_secs(60)),
        on_deadline: OnDeadline::Cancel,
    };

    fn situation() -> Situation {
        Situation {
            round: 2,
            elapsed: Duration::from_secs(5),
            dirty_bytes: 250,
            in_flight_bytes: 40,
            rate: Some(1000.0),
            fixed: FixedCost {
                sync: Duration::from_millis(6),
                verify: Duration::ZERO,
                handover: Duration::from_millis(4),
            },
        }
    }

    #[test]
    fn equality_with_the_limit_counts() {
        assert_eq!(situation().expected_downtime(), Some(Duration::from_millis(300)));
        assert_eq!(decide(&LIMITS, &situation()).0, Decision::SwitchOver);
        let more = Situation { dirty_bytes: 251, ..situation() };
        assert_eq!(decide(&LIMITS, &more).0, Decision::AnotherRound);
    }

    #[test]
    fn what_is_in_flight_and_what_a_switchover_costs_anyway_count() {
        let in_flight = Situation { in_flight_bytes: 41, ..situation() };
        assert_eq!(decide(&LIMITS, &in_flight).0, Decision::AnotherRound);
        let fixed = FixedCost { verify: Duration::from_millis(1), ..situation().fixed };
        assert_eq!(decide(&LIMITS, &Situation { fixed, ..situation() }).0, Decision::AnotherRound);
    }

    #[test]
    fn nothing_dirty_switches_over_whatever_the_fixed_cost() {
        let fixed = FixedCost { verify: Duration::from_secs(9), ..FixedCost::default() };
        let idle = Situation { dirty_bytes: 0, rate: None, fixed, ..situation() };
        assert_eq!(decide(&LIMITS, &idle).0, Decision::SwitchOver);
    }

    #[test]
    fn without_a_rate_there_is_another_round() {
        assert_eq!(decide(&LIMITS, &Situation { rate: None, ..situation() }).0, Decision::AnotherRound);
    }

    #[test]
    fn used_up_rounds_or_time_do_what_the_operator_said() {
        let hot = Situation { dirty_bytes: 1 << 40, ..situation() };
        for used_up in [Situation { round: 10, ..hot }, Situation { elapsed: Duration::from_secs(60), ..hot }] {
            assert_eq!(decide(&LIMITS, &used_up).0, Decision::GiveUp);
            let limits = Limits { on_deadline: OnDeadline::SwitchOver, ..LIMITS };
            assert_eq!(decide(&limits, &used_up).0, Decision::SwitchOver);
        }
        assert_eq!(decide(&LIMITS, &hot).0, Decision::AnotherRound);
    }

    #[test]
    fn a_rate_is_made_of_the_latest_rounds_that_are_long_and_large_enough() {
        let mut rate = PageRate::default();
        assert_eq!(rate.bytes_per_second(), None);
        rate.round(1_000_000, Duration::from_secs(10));
        assert_eq!(rate.bytes_per_second(), Some(100_000.0));
        rate.round(10_000_000, Duration::from_millis(100));
        rate.round(30_000_000, Duration::from_millis(100));
        assert_eq!(rate.bytes_per_second(), Some(2e8));
    }

    #[test]
    fn rounds_of_a_few_pages_do_not_pass_their_latency_off_as_a_rate() {
        let mut rate = PageRate::default();
        rate.round(1 << 30, Duration::from_secs(1));
        (0..30).for_each(|_| rate.round(4096, Duration::from_millis(10)));
        assert!(rate.bytes_per_second().unwrap() > 0.7 * f64::from(1 << 30));
    }
}
