//! The reasons of decisions: types with their figures. The English text is the `Display` of each.

use std::fmt;
use std::time::Duration;

use super::forecast::{Forecast, seconds, whole};
use super::{Decided, Decision};
use crate::human;
use crate::settings::PostcopyAfter;

/// Why a decision was made.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Reason {
    /// The guest is paused: only the switchover can follow.
    AlreadyPaused,
    /// The size of deltas is unknown.
    DeltasUnknown,
    /// The limit allows a switchover.
    Met(Met),
    /// The limit allows a switchover, except for the pages in flight, or for what the destination has to write to disk.
    Backlog {
        /// Pages in flight.
        pages: u64,
        /// How long the destination needs to write to disk what is to be written first, if anything is.
        unwritten: Option<Duration>,
        /// Why the limit would allow a switchover without them.
        met: Met,
    },
    /// The limit is not met, and another round may help.
    AboveLimit,
    /// The migration does not converge.
    Stall(Stalled),
    /// The migration does not converge, and it meets the limit that was raised for this.
    Raised {
        /// The raised limit.
        limit: Duration,
        /// Why it was raised.
        stalled: Stalled,
        /// Why the limit allows a switchover now.
        met: Met,
    },
    /// The migration does not converge, and what remains is at a local minimum.
    Minimum {
        /// Why it is not expected to converge.
        stalled: Stalled,
        /// Rounds without a local minimum; `None` if there is one.
        waited: Option<u32>,
    },
    /// A budget is used up.
    UsedUp {
        /// Which one.
        budget: UsedUp,
        /// The `max_downtime` that forbids a switchover, if it does.
        forbidden_by: Option<Duration>,
    },
    /// The settings have postcopy begin at this point.
    PostcopyDue(PostcopyAfter),
    /// The operator requested it.
    Operator,
}

/// Why the limit allows a switchover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Met {
    /// The expected downtime is at or below the limit.
    WithinLimit,
    /// The last round left nothing dirty.
    NothingDirty,
}

/// Why a migration does not converge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stalled {
    /// Rounds without a new minimum of what remains.
    NoNewLeast {
        /// The number of rounds.
        rounds: u32,
    },
    /// A switchover without any page would take longer than the limit.
    FixedCost,
    /// At its pace the migration needs more rounds than are left.
    TooFewRounds {
        /// The latest rounds, which show the pace.
        shown_by: u32,
        /// Rounds that it needs.
        needed: u64,
        /// Rounds that are left.
        left: u32,
    },
    /// At its pace the migration needs more time than is left.
    TooLittleTime {
        /// The latest rounds, which show the pace.
        shown_by: u32,
        /// Time that it needs.
        needed: Duration,
        /// Time that is left.
        left: Duration,
    },
    /// A step is in effect, and what remains does not shrink.
    NotNearer,
}

/// A budget that is used up, or will be before anything better than a switchover can be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum UsedUp {
    /// This many rounds.
    Rounds(u32),
    /// The deadline has passed.
    Deadline {
        /// Since the start.
        deadline: Duration,
        /// The round in which it passed; `None` between two rounds.
        in_round: Option<u32>,
    },
    /// Only an immediate switchover meets the deadline, or comes near it.
    NowOrNever {
        /// Since the start.
        deadline: Duration,
        /// By how much it is missed at best; `None` if it can be met.
        late: Option<Duration>,
        /// How long the migration has taken, if this was found within a round.
        elapsed: Option<Duration>,
    },
    /// Another round ends after the deadline, whatever it leaves.
    RoundTooLong {
        /// The duration of a round.
        round: Duration,
        /// How long the migration has taken.
        elapsed: Duration,
        /// Since the start.
        deadline: Duration,
    },
}

impl Reason {
    /// Its name in JSON.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::AlreadyPaused => "already-paused",
            Self::DeltasUnknown => "deltas-unknown",
            Self::Met(Met::WithinLimit) => "within-limit",
            Self::Met(Met::NothingDirty) => "nothing-dirty",
            Self::Backlog { .. } => "backlog",
            Self::AboveLimit => "above-limit",
            Self::Stall(_) => "stall",
            Self::Raised { .. } => "limit-raised",
            Self::Minimum { .. } => "stall-minimum",
            Self::UsedUp { .. } => "budget-used-up",
            Self::PostcopyDue(_) => "postcopy-due",
            Self::Operator => "operator",
        }
    }
}

impl fmt::Display for Decided {
    /// The decision, its reason and the figures, in one line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write_decision(f)?;
        if self.reason == Reason::AlreadyPaused {
            return f.write_str("the guest is paused already");
        }
        self.write_reason(f)?;
        Outlook { forecast: self.forecast.as_ref(), limit: self.limit }.fmt(f)
    }
}

impl Decided {
    /// The action, without its reason.
    fn write_decision(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.decision {
            Decision::AnotherRound => f.write_str("another round: "),
            Decision::Sample(pages) => write!(f, "a sample of about {pages} pages: "),
            // The reason states how much is to arrive.
            Decision::Drain => Ok(()),
            Decision::Throttle(percent) => write!(f, "throttle the guest to {percent} %: "),
            Decision::RaiseLimit(limit) => write!(f, "the downtime limit is raised to {}, for ", human::time(limit)),
            Decision::SwitchOver => f.write_str("switch over: "),
            Decision::Postcopy => f.write_str("postcopy: "),
            Decision::GiveUp => f.write_str("gave up: "),
        }
    }

    /// The reason, without the outlook.
    fn write_reason(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reason {
            // The outlook states everything.
            Reason::AlreadyPaused | Reason::AboveLimit => Ok(()),
            Reason::DeltasUnknown => f.write_str("nothing has shown yet what deltas come to; "),
            Reason::Met(met) => f.write_str(met.clause()),
            Reason::Backlog { pages, unwritten, met } => {
                write!(f, "let {pages} pages arrive that are on their way")?;
                if let Some(time) = unwritten {
                    write!(f, ", and the destination write to disk for {}", human::time(time))?;
                }
                write!(f, ": {}", met.clause())
            }
            Reason::Stall(stalled) => write!(f, "{stalled}; "),
            Reason::Raised { limit, stalled, met } => {
                let limit = human::time(limit);
                write!(f, "the downtime limit is raised to {limit}, for {stalled}; {}", met.clause())
            }
            Reason::Minimum { stalled, waited: None } => {
                write!(f, "{stalled}, and no more remains than a round before; ")
            }
            Reason::Minimum { stalled, waited: Some(rounds) } => {
                write!(f, "{stalled}, and {rounds} rounds more brought no local minimum; ")
            }
            Reason::UsedUp { budget, forbidden_by: None } => write!(f, "{budget}; "),
            Reason::UsedUp { budget, forbidden_by: Some(most) } => {
                write!(f, "{budget}, and max_downtime is {}; ", human::time(most))
            }
            Reason::PostcopyDue(PostcopyAfter::Rounds(0)) => f.write_str("before the first round (mode); "),
            Reason::PostcopyDue(after) => write!(f, "postcopy_after is {after}; "),
            Reason::Operator => f.write_str("the operator asked for it; "),
        }
    }
}

impl Met {
    /// What it adds to the outlook that follows: the outlook itself states that the limit is met.
    fn clause(self) -> &'static str {
        match self {
            Self::WithinLimit => "",
            Self::NothingDirty => "the last round left nothing dirty; ",
        }
    }
}

/// Why the operator's switchover is refused: `max_downtime` forbids it, by the forecast or because there is none.
#[derive(Clone, Debug, PartialEq)]
pub struct AboveMaxDowntime {
    /// The setting.
    pub max_downtime: Duration,
    /// The downtime limit at that moment.
    pub limit: Duration,
    /// The forecast. There is none in the first round, in which the pages written since the start are unknown.
    pub forecast: Option<Forecast>,
    /// The remaining bytes and the rate at which pages are read, once it is measured.
    pub left: Option<LeftAtRate>,
}

/// The remaining bytes of a round, and the current rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeftAtRate {
    /// Bytes of pages that remain.
    pub bytes: u64,
    /// Bytes of pages a second, not 0.
    pub rate: u64,
}

impl fmt::Display for LeftAtRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = self.rate as f64;
        let time = human::time(seconds(self.bytes as f64 / rate));
        write!(f, "{} are left, which take {time} at {}", human::bytes(self.bytes), human::rate(rate))
    }
}

impl std::error::Error for AboveMaxDowntime {}

impl fmt::Display for AboveMaxDowntime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it does not switch over, for max_downtime is {}: ", human::time(self.max_downtime))?;
        match (&self.forecast, self.left) {
            (None, Some(left)) => {
                write!(f, "{left}, and what the guest writes in the first round is known at its end")?
            }
            (forecast, _) => Outlook { forecast: forecast.as_ref(), limit: self.limit }.fmt(f)?,
        }
        f.write_str("; wait, or set max_downtime")
    }
}

/// A forecast compared with a limit.
struct Outlook<'a> {
    forecast: Option<&'a Forecast>,
    limit: Duration,
}

impl fmt::Display for Outlook<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(forecast) = self.forecast else { return f.write_str("no forecast can be made yet") };
        let [expected, limit] = [forecast.expected(), self.limit].map(human::time);
        let rest = human::bytes(whole(forecast.remaining_bytes));
        write!(f, "expected downtime {expected} for {rest} ({}), limit {limit}", forecast.parts())
    }
}

impl fmt::Display for Stalled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoNewLeast { rounds } => write!(f, "{rounds} rounds brought no new least of what remains"),
            Self::FixedCost => f.write_str("what a switchover costs without a page is above the limit already"),
            Self::TooFewRounds { shown_by, needed, left } => {
                write!(f, "at the pace of the last {shown_by} rounds it needs {needed} more, and {left} are left")
            }
            Self::TooLittleTime { shown_by, needed, left } => {
                let (needed, left) = (human::time(needed), human::time(left));
                write!(f, "at the pace of the last {shown_by} rounds it needs {needed} more, and {left} are left")
            }
            Self::NotNearer => f.write_str("it does not come nearer to its end"),
        }
    }
}

impl fmt::Display for UsedUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Rounds(1) => f.write_str("the one round is used up"),
            Self::Rounds(rounds) => write!(f, "{rounds} rounds are used up"),
            Self::Deadline { deadline, in_round } => {
                write!(f, "the deadline of {} has passed", human::time(deadline))?;
                in_round.map_or(Ok(()), |round| write!(f, " in round {round}"))
            }
            Self::NowOrNever { deadline, late, elapsed } => {
                if let Some(elapsed) = elapsed {
                    write!(f, "after {} ", human::time(elapsed))?;
                }
                write!(f, "the deadline of {} ", human::time(deadline))?;
                match late {
                    Some(late) => write!(f, "will be missed by {} at best", human::time(late)),
                    None => f.write_str("can be met only from here"),
                }
            }
            Self::RoundTooLong { round, elapsed, deadline } => {
                let [round, elapsed, deadline] = [round, elapsed, deadline].map(human::time);
                write!(f, "another round takes {round}, and {elapsed} of the deadline of {deadline} are gone")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::forecast::FixedCost;

    const MS: Duration = Duration::from_millis(1);

    fn words(decision: Decision, reason: Reason) -> String {
        let fixed = FixedCost { sync: 2 * MS, ..FixedCost::default() };
        let forecast = Some(Forecast { remaining_bytes: 1e6, transfer: 20 * MS, fixed });
        Decided { round: 3, decision, reason, limit: 300 * MS, forecast }.to_string()
    }

    /// The text before the outlook, which ends every line but one.
    fn before_outlook(decision: Decision, reason: Reason) -> String {
        let words = words(decision, reason);
        words.split_once("expected downtime 22.0 ms for 977 KiB (").expect("an outlook").0.to_owned()
    }

    #[test]
    fn a_decision_is_one_line_with_the_outlook_at_its_end() {
        assert_eq!(
            words(Decision::SwitchOver, Reason::Met(Met::WithinLimit)),
            "switch over: expected downtime 22.0 ms for 977 KiB (sync 2.00 ms, transfer 20.0 ms), limit 300 ms"
        );
        let paused = words(Decision::SwitchOver, Reason::AlreadyPaused);
        assert_eq!(paused, "switch over: the guest is paused already");
        let unknown = Decided {
            round: 0,
            decision: Decision::AnotherRound,
            reason: Reason::AboveLimit,
            limit: MS,
            forecast: None,
        };
        assert_eq!(unknown.to_string(), "another round: no forecast can be made yet");
    }

    #[test]
    fn each_reason_has_its_words() {
        use Decision::{Drain, GiveUp, RaiseLimit, Sample, SwitchOver, Throttle};
        let stalled = Stalled::NoNewLeast { rounds: 2 };
        let stall = "2 rounds brought no new least of what remains";
        let budget = UsedUp::Rounds(60);
        let met = Met::NothingDirty;
        let lines = [
            (
                Sample(512.try_into().unwrap()),
                Reason::DeltasUnknown,
                "a sample of about 512 pages: nothing has shown yet what deltas come to; ".to_owned(),
            ),
            (SwitchOver, Reason::Met(met), "switch over: the last round left nothing dirty; ".into()),
            (
                Drain,
                Reason::Backlog { pages: 9, unwritten: None, met: Met::WithinLimit },
                "let 9 pages arrive that are on their way: ".into(),
            ),
            (
                Drain,
                Reason::Backlog { pages: 9, unwritten: Some(30 * MS), met },
                "let 9 pages arrive that are on their way, and the destination write to disk for 30.0 ms: the last round left nothing dirty; ".into(),
            ),
            (Throttle(50), Reason::Stall(stalled), format!("throttle the guest to 50 %: {stall}; ")),
            (
                RaiseLimit(400 * MS),
                Reason::Stall(stalled),
                format!("the downtime limit is raised to 400 ms, for {stall}; "),
            ),
            (
                SwitchOver,
                Reason::Raised { limit: 400 * MS, stalled, met: Met::WithinLimit },
                format!("switch over: the downtime limit is raised to 400 ms, for {stall}; "),
            ),
            (
                SwitchOver,
                Reason::Minimum { stalled, waited: None },
                format!("switch over: {stall}, and no more remains than a round before; "),
            ),
            (
                SwitchOver,
                Reason::Minimum { stalled, waited: Some(3) },
                format!("switch over: {stall}, and 3 rounds more brought no local minimum; "),
            ),
            (GiveUp, Reason::UsedUp { budget, forbidden_by: None }, "gave up: 60 rounds are used up; ".into()),
            (
                GiveUp,
                Reason::UsedUp { budget, forbidden_by: Some(500 * MS) },
                "gave up: 60 rounds are used up, and max_downtime is 500 ms; ".into(),
            ),
            (SwitchOver, Reason::Operator, "switch over: the operator asked for it; ".into()),
            (
                Decision::Postcopy,
                Reason::PostcopyDue(PostcopyAfter::Rounds(3)),
                "postcopy: postcopy_after is 3 rounds; ".into(),
            ),
        ];
        for (decision, reason, expected) in lines {
            assert_eq!(before_outlook(decision, reason), expected);
        }
    }

    #[test]
    fn each_stall_and_each_budget_has_its_words() {
        let seconds = Duration::from_secs;
        let stalls = [
            Stalled::FixedCost,
            Stalled::TooFewRounds { shown_by: 3, needed: 12, left: 4 },
            Stalled::TooLittleTime { shown_by: 3, needed: seconds(8), left: seconds(4) },
            Stalled::NotNearer,
        ];
        assert_eq!(
            stalls.map(|stalled| stalled.to_string()),
            [
                "what a switchover costs without a page is above the limit already",
                "at the pace of the last 3 rounds it needs 12 more, and 4 are left",
                "at the pace of the last 3 rounds it needs 8.00 s more, and 4.00 s are left",
                "it does not come nearer to its end",
            ]
        );
        let deadline = seconds(9);
        let budgets = [
            UsedUp::Rounds(1),
            UsedUp::Deadline { deadline, in_round: None },
            UsedUp::Deadline { deadline, in_round: Some(2) },
            UsedUp::NowOrNever { deadline, late: None, elapsed: None },
            UsedUp::NowOrNever { deadline, late: Some(seconds(1)), elapsed: Some(seconds(8)) },
            UsedUp::RoundTooLong { round: seconds(2), elapsed: seconds(8), deadline },
        ];
        assert_eq!(
            budgets.map(|budget| budget.to_string()),
            [
                "the one round is used up",
                "the deadline of 9.00 s has passed",
                "the deadline of 9.00 s has passed in round 2",
                "the deadline of 9.00 s can be met only from here",
                "after 8.00 s the deadline of 9.00 s will be missed by 1.00 s at best",
                "another round takes 2.00 s, and 8.00 s of the deadline of 9.00 s are gone",
            ]
        );
    }

    #[test]
    fn an_operators_switchover_is_refused_with_the_figures() {
        let refused = AboveMaxDowntime { max_downtime: 5 * MS, limit: 2 * MS, forecast: None, left: None };
        assert_eq!(
            refused.to_string(),
            "it does not switch over, for max_downtime is 5.00 ms: no forecast can be made yet; wait, or set max_downtime"
        );
    }
}
