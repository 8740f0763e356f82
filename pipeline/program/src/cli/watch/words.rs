//! Descriptions of a migration: words for its states, and a line for each event if there is no screen.

use std::time::Duration;

use memferry_stages::untrusted::{Untrusted, shown};

use crate::progress::{figures, reconnected};
use memferry::events::{Outcome, Phase, Role};
use memferry::human;
use memferry_report::event_json::{ChangedJson, EndedJson, EventJson, EventLine};

/// A time of the format, for people; an invalid value becomes zero.
pub(super) fn time(ms: f64) -> String {
    human::time(Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default())
}

/// A time of the migration: `12.3 s`, always with tenths, so that its width does not change.
pub(super) fn clock(ms: f64) -> String {
    let seconds = if ms.is_finite() { ms.max(0.0) / 1e3 } else { 0.0 };
    format!("{seconds:.1} s")
}

/// The state, and what it means for the guest.
pub(super) fn phase(phase: Option<Phase>) -> (&'static str, &'static str) {
    match phase {
        None => ("waiting", "nothing heard yet"),
        Some(Phase::Setup) => ("setup", "the guest runs at the source"),
        Some(Phase::Active) => ("active", "the guest runs at the source"),
        Some(Phase::Switchover) => ("switchover", "the guest is paused"),
        Some(Phase::Postcopy) => ("postcopy", "the guest runs at the destination and needs both ends"),
        Some(Phase::Disconnected) => ("disconnected", "the guest runs at the source, unless it was handed over"),
        Some(Phase::Completed) => ("completed", "the guest is at the destination"),
        Some(Phase::Failed) => ("failed", "the source is as it was"),
        Some(Phase::Cancelled) => ("cancelled", "the source is as it was"),
        Some(Phase::Unconfirmed) => ("unconfirmed", "look which end has the guest before doing anything"),
        Some(Phase::Lost) => ("lost", "the guest was started without all of its memory, and the rest did not come"),
    }
}

/// The outcome, in one line.
pub(super) fn verdict(ended: &EndedJson) -> String {
    let (name, meaning) = phase(Some(ended.outcome.into()));
    let mut line = format!("{name} after {}", time(ended.end.total_ms));
    if let Some(error) = &ended.end.error {
        line.push_str(&format!(": {error}"));
    }
    if let Some(downtime) = ended.end.downtime_ms {
        let word = if ended.outcome == Outcome::Completed { "downtime" } else { "the guest was paused for" };
        line.push_str(&format!(", {word} {}", time(downtime)));
    }
    if ended.outcome == Outcome::Completed {
        line.push_str(if ended.end.verified == Some(true) { ", verified" } else { ", not verified" });
    }
    let meaning = if ended.resume_failed { "the source guest could not be resumed and stays paused" } else { meaning };
    format!("{line}; {meaning}")
}

/// The line for an event, if it has one; progress figures at most once a second.
#[derive(Debug, Default)]
pub(super) struct EventLines {
    figures_ms: Option<f64>,
    source_heard: bool,
}

impl EventLines {
    pub(super) fn line(&mut self, line: &EventLine) -> Option<String> {
        self.source_heard |= line.role == Some(Role::Source);
        let text = match &line.event {
            EventJson::Progress(now) if self.are_due(line) => format!("round {}: {}", now.round, figures(now)),
            event => outage(line.role, event).or_else(|| milestone(event))?,
        };
        let who = line.role.map_or(String::new(), |end| format!("{}: ", end.name()));
        Some(printable(&format!("{:>8}  {who}{text}", clock(line.ms))))
    }

    /// If both ends report, the source's are enough.
    fn are_due(&mut self, line: &EventLine) -> bool {
        let wanted = !self.source_heard || line.role == Some(Role::Source);
        let due = wanted && self.figures_ms.is_none_or(|last| line.ms - last >= 1000.0);
        if due {
            self.figures_ms = Some(line.ms);
        }
        due
    }
}

/// A lost connection, or one that was made again.
pub(super) fn outage(role: Option<Role>, event: &EventJson) -> Option<String> {
    Some(match event {
        EventJson::Disconnected { attempt, why } => format!("connection {attempt} is lost: {why}"),
        EventJson::NotReached { why, again_in_ms, .. } => {
            format!("not connected again: {why}; next try in {}", time(*again_in_ms))
        }
        EventJson::Reconnected { attempt, outage_ms, put_back_bytes } => {
            let outage = Duration::try_from_secs_f64(outage_ms / 1e3).unwrap_or_default();
            reconnected(role?, *attempt, outage, *put_back_bytes)
        }
        _ => return None,
    })
}

fn milestone(event: &EventJson) -> Option<String> {
    Some(match event {
        EventJson::Phase { phase: now } => phase(Some(*now)).0.into(),
        EventJson::Connected { peer } => format!("connected to {peer}"),
        EventJson::Guest(guest) => {
            format!("{} in {} pages", human::bytes(guest.guest.bytes), human::count(guest.guest.pages))
        }
        EventJson::RoundSent(round) => format!(
            "round {} done in {}: {} pages, {} became {}",
            round.round,
            time(round.duration_ms),
            human::count(round.pages.all),
            human::bytes(round.pages.bytes_in),
            human::bytes(round.pages.bytes_out)
        ),
        EventJson::Decided(decided) => decided.decision.why.to_string(),
        EventJson::Changed(changed) => change(changed),
        EventJson::HandedOver => "handed over: a cancel is too late".into(),
        EventJson::TurnedAway { peer, why, count, .. } => turned_away(peer, why, *count),
        EventJson::Warning { what } => format!("warning: {what}"),
        EventJson::Paused => "the guest is paused at the source".into(),
        EventJson::Resumed => "the guest continues at the source".into(),
        EventJson::Ended(ended) => verdict(ended),
        EventJson::Lost { events } => format!("{events} events were lost before this line"),
        _ => return None,
    })
}

/// Refused peers.
pub(super) fn turned_away(peer: &Untrusted, why: &Untrusted, count: u64) -> String {
    match count {
        1 => format!("turned {peer} away: {why}"),
        _ => format!("turned {count} more away, the last of them {peer}: {why}"),
    }
}

/// A setting that was changed through the control API.
pub(super) fn change(changed: &ChangedJson) -> String {
    let change = &changed.change;
    format!("round {}: {} changed from {} to {}", change.round, change.key, change.from, change.to)
}

/// Text from outside must not move the cursor.
pub(super) fn printable(text: &str) -> String {
    shown(text).into_owned()
}
