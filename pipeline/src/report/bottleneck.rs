//! Names what held a migration up, from how its stages spent their time.
//!
//! Every stage lives as long as the rounds do. One that is busy nearly all of that time holds up the others: those
//! before it wait for room, those behind it wait for input. So the bottleneck is the stage with the greatest share of
//! busy time, where a sender that waits for its output counts as a busy transport. Below `HELD_UP` nothing was: the
//! migration waited for something outside, such as a guest that dirtied little.

use std::fmt;

use memferry_stages::meter::Reading;

/// The share of its time from which a stage holds the others up.
const HELD_UP: f64 = 0.5;

/// What one stage's reading blames.
#[derive(Debug)]
struct Suspect<'a> {
    reading: &'a Reading,
    /// Is it the transport behind this sender?
    transport: bool,
    /// Share of its time, 0 to 1.
    share: f64,
}

/// The bottleneck in one line. `capped` says whether the senders kept to a bandwidth limit.
#[must_use]
pub fn bottleneck(stages: &[Reading], capped: bool) -> String {
    match worst(stages) {
        None => "unknown: no stage has run".into(),
        Some(suspect) if suspect.share < HELD_UP => format!("none: at most {}", Blame { suspect, capped }),
        Some(suspect) => Blame { suspect, capped }.to_string(),
    }
}

/// The stage that the bottleneck is seen at, if anything held the others up.
#[must_use]
pub fn culprit(stages: &[Reading]) -> Option<&Reading> {
    worst(stages).filter(|suspect| suspect.share >= HELD_UP).map(|suspect| suspect.reading)
}

fn worst(stages: &[Reading]) -> Option<Suspect<'_>> {
    stages.iter().flat_map(suspects).max_by(|a, b| a.share.total_cmp(&b.share))
}

fn suspects(reading: &Reading) -> impl Iterator<Item = Suspect<'_>> {
    let life = (reading.busy + reading.input_wait + reading.output_wait).as_secs_f64();
    let share = move |time: std::time::Duration| if life > 0.0 { time.as_secs_f64() / life } else { 0.0 };
    let itself = Suspect { reading, transport: false, share: share(reading.busy) };
    let behind =
        (reading.name == "sender").then(|| Suspect { reading, transport: true, share: share(reading.output_wait) });
    std::iter::once(itself).chain(behind)
}

struct Blame<'a> {
    suspect: Suspect<'a>,
    capped: bool,
}

impl fmt::Display for Blame<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Suspect { reading, transport, share } = &self.suspect;
        let percent = share * 100.0;
        if !transport {
            return write!(f, "the {}: busy {percent:.0} % of the time", Name(reading));
        }
        let limit = if self.capped { "max_bandwidth or " } else { "" };
        write!(f, "{limit}the transport: the {} waited {percent:.0} % of the time", Name(reading))
    }
}

/// "encoder of lane 1", "sender of connection 0".
struct Name<'a>(&'a Reading);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if matches!(self.0.name, "sender" | "receiver") { "connection" } else { "lane" };
        match self.0.lane {
            Some(lane) => write!(f, "{} of {kind} {lane}", self.0.name),
            None => f.write_str(self.0.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn stage(name: &'static str, lane: u16, busy: u64, input: u64, output: u64) -> Reading {
        let [busy, input_wait, output_wait] = [busy, input, output].map(Duration::from_millis);
        Reading { name, lane: Some(lane), busy, input_wait, output_wait, batches: 1, pages: 64, bytes: 0 }
    }

    #[test]
    fn the_busiest_stage_is_named() {
        let stages = [stage("encoder", 0, 60, 30, 10), stage("encoder", 1, 97, 2, 1), stage("sender", 0, 20, 75, 5)];
        assert_eq!(bottleneck(&stages, false), "the encoder of lane 1: busy 97 % of the time");
        assert_eq!(culprit(&stages), Some(&stages[1]));
    }

    #[test]
    fn a_sender_that_waits_means_the_transport() {
        let stages = [stage("encoder", 0, 20, 0, 80), stage("sender", 0, 7, 0, 93), stage("receiver", 0, 9, 91, 0)];
        let blamed = "the transport: the sender of connection 0 waited 93 % of the time";
        assert_eq!(bottleneck(&stages, false), blamed);
        assert_eq!(bottleneck(&stages, true), format!("max_bandwidth or {blamed}"));
    }

    #[test]
    fn where_all_waited_for_input_nothing_held_up() {
        let stages = [stage("loader", 0, 30, 70, 0)];
        assert_eq!(bottleneck(&stages, false), "none: at most the loader of lane 0: busy 30 % of the time");
        assert_eq!(culprit(&stages), None);
        assert_eq!(bottleneck(&[], false), "unknown: no stage has run");
    }
}
