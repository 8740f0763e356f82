//! The state of a migration, folded from the lines of its events. Lines in, figures out; no clock, no terminal.
//!
//! It is bounded for any input: histories have a fixed number of entries, the newest or evenly thinned ones.

use std::collections::VecDeque;

use memferry_stages::stage_id::StageKind;
use memferry_stages::untrusted::Untrusted;

use super::words;
use crate::progress::{Moves, Whereabouts};
use memferry::events::{Phase, Role};
use memferry_report::event_json::{ChangedJson, EndedJson, EventJson, EventLine, GuestJson, ProgressJson, RoundJson};
use memferry_report::series::Thinned;
use memferry_report::{DecisionReport, StageReport};

/// The most rounds, remarks and readings that are stored.
const ROUNDS: usize = 64;
const REMARKS: usize = 32;
const READINGS: usize = 64;
/// The stages in the order in which pages pass them; all others follow.
const FLOW: [StageKind; 6] = [
    StageKind::Scanner,
    StageKind::ZeroDetector,
    StageKind::Encoder,
    StageKind::Sender,
    StageKind::Receiver,
    StageKind::Loader,
];
/// The window over which stages are measured, in milliseconds.
const LATELY_MS: f64 = 1000.0;

/// Both ends, as far as their lines are read.
#[derive(Clone, Debug, Default)]
pub(super) struct Model {
    source: End,
    destination: End,
    /// The time of the latest line, in milliseconds.
    pub(super) ms: f64,
    /// Events that the writer lost.
    pub(super) lost: u64,
    /// Lines that are not known events.
    pub(super) strange: u64,
}

/// One end.
#[derive(Clone, Debug, Default)]
pub(super) struct End {
    heard: bool,
    pub(super) phase: Option<Phase>,
    pub(super) peer: Option<Untrusted>,
    pub(super) guest: Option<GuestJson>,
    pub(super) now: Option<ProgressJson>,
    pub(super) history: Thinned<Sample>,
    /// Rounds that are sent, the latest last.
    pub(super) rounds: VecDeque<RoundJson>,
    /// Decisions and warnings, the latest last.
    pub(super) remarks: VecDeque<Remark>,
    pub(super) ended: Option<EndedJson>,
    /// When the connection was lost, and the latest reason why there is none.
    pub(super) lost: Option<(f64, Untrusted)>,
    /// Where the guest is.
    pub(super) guest_at: Whereabouts,
    readings: VecDeque<(f64, Vec<StageReport>)>,
}

/// A decision or a warning.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Remark {
    pub(super) ms: f64,
    pub(super) kind: RemarkKind,
    pub(super) text: String,
}

/// The kind of a remark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RemarkKind {
    /// The decision for another round: only the latest is of interest.
    AnotherRound,
    Decision,
    Warning,
}

/// How a stage spent its recent time, as shares that add up to 1, or to 0 if it does not run.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Shares {
    pub(super) name: Untrusted,
    pub(super) lane: Option<u16>,
    pub(super) busy: f64,
    pub(super) input_wait: f64,
    pub(super) output_wait: f64,
}

/// Figures at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sample {
    pub(super) remaining: u64,
    pub(super) wire_rate: u64,
    pub(super) dirty_rate: u64,
}

impl Model {
    /// Enters a line.
    pub(super) fn take(&mut self, line: &EventLine) {
        if line.ms.is_finite() {
            self.ms = self.ms.max(line.ms);
        }
        match (&line.event, line.role) {
            (EventJson::Lost { events }, _) => self.lost = self.lost.saturating_add(*events),
            (event, Some(Role::Source)) => self.source.take(line.ms, Role::Source, event),
            (event, Some(Role::Destination)) => self.destination.take(line.ms, Role::Destination, event),
            (_, None) => {}
        }
    }

    /// The end that is shown: the source if it is present, because it decides.
    pub(super) fn shown(&self) -> (Role, &End) {
        if self.source.heard || !self.destination.heard {
            (Role::Source, &self.source)
        } else {
            (Role::Destination, &self.destination)
        }
    }

    /// Have all ends that reported ended?
    pub(super) fn is_over(&self) -> bool {
        let ends = || [&self.source, &self.destination].into_iter().filter(|end| end.heard);
        ends().count() > 0 && ends().all(|end| end.ended.is_some())
    }

    /// How the stages of both ends spent their recent time, in the order in which pages pass them.
    pub(super) fn stages(&self) -> Vec<Shares> {
        let mut stages: Vec<_> = self.source.stages().chain(self.destination.stages()).collect();
        let place = |stage: &Shares| {
            let kind = StageKind::from_name(stage.name.raw());
            FLOW.iter().position(|&of| Some(of) == kind).unwrap_or(FLOW.len())
        };
        stages.sort_by_key(place);
        stages
    }
}

impl End {
    fn take(&mut self, ms: f64, role: Role, event: &EventJson) {
        self.heard = true;
        self.outage(ms, role, event);
        match event {
            EventJson::Phase { phase } => self.phase(*phase),
            EventJson::Connected { peer } => self.peer = Some(peer.clone()),
            EventJson::Guest(guest) => self.guest = Some(guest.clone()),
            EventJson::RoundSent(round) => keep(&mut self.rounds, *round, ROUNDS),
            EventJson::Decided(decided) => self.decided(ms, &decided.decision),
            EventJson::Changed(changed) => self.changed(ms, changed),
            EventJson::Warning { what } => self.remark(ms, RemarkKind::Warning, what.to_string()),
            EventJson::TurnedAway { peer, why, count, .. } => {
                self.remark(ms, RemarkKind::Warning, words::turned_away(peer, why, *count));
            }
            EventJson::Progress(now) => self.progress(ms, now),
            EventJson::Ended(ended) => self.end(ended),
            _ => {}
        }
    }

    /// What an event says about a lost connection. Of the tries to make it again only the latest is of interest.
    fn outage(&mut self, ms: f64, role: Role, event: &EventJson) {
        match event {
            EventJson::HandedOver => self.guest_at = self.guest_at.after(Moves::HandedOver),
            EventJson::Phase { phase: Phase::Postcopy } => self.guest_at = self.guest_at.after(Moves::Postcopy),
            EventJson::Disconnected { why, .. } => self.lost = Some((ms, why.clone())),
            EventJson::NotReached { why, .. } => self.lost.iter_mut().for_each(|lost| lost.1 = why.clone()),
            EventJson::Reconnected { .. } => {
                self.lost = None;
                self.guest_at = self.guest_at.after(Moves::Reconnected);
            }
            _ => {}
        }
        let kind = match event {
            EventJson::Disconnected { .. } => RemarkKind::Warning,
            EventJson::Reconnected { .. } => RemarkKind::Decision,
            _ => return,
        };
        words::outage(Some(role), event).into_iter().for_each(|text| self.remark(ms, kind, text));
    }

    /// A setup after an end begins another migration.
    fn phase(&mut self, phase: Phase) {
        if phase == Phase::Setup && self.ended.is_some() {
            *self = Self { heard: true, ..Self::default() };
        }
        self.phase = Some(phase);
    }

    fn end(&mut self, ended: &EndedJson) {
        self.phase = Some(ended.outcome.into());
        self.ended = Some(ended.clone());
    }

    fn decided(&mut self, ms: f64, decision: &DecisionReport) {
        let kind = if decision.decision == "another-round" { RemarkKind::AnotherRound } else { RemarkKind::Decision };
        self.remark(ms, kind, format!("round {}: {}", decision.round, decision.why));
    }

    fn changed(&mut self, ms: f64, changed: &ChangedJson) {
        self.remark(ms, RemarkKind::Decision, words::change(changed));
        if let Some(guest) = &mut self.guest {
            guest.memory_bound_bytes = changed.memory_bound_bytes;
        }
    }

    fn remark(&mut self, ms: f64, kind: RemarkKind, text: String) {
        if self.remarks.back().is_some_and(|last| last.kind == RemarkKind::AnotherRound) {
            self.remarks.pop_back();
        }
        keep(&mut self.remarks, Remark { ms, kind, text }, REMARKS);
    }

    fn progress(&mut self, ms: f64, now: &ProgressJson) {
        self.history.push(Sample {
            remaining: now.remaining_bytes.unwrap_or(0),
            wire_rate: now.wire_bytes_per_s,
            dirty_rate: now.dirty_bytes_per_s.unwrap_or(0),
        });
        keep(&mut self.readings, (ms, now.stages.clone()), READINGS);
        self.now = Some(now.clone());
    }

    /// The last reading minus the one of a second before it, or minus the oldest.
    fn stages(&self) -> impl Iterator<Item = Shares> {
        let (at, last) = self.readings.back().map_or((0.0, &[][..]), |(at, stages)| (*at, stages));
        let before = self.readings.iter().rev().find(|(then, _)| *then <= at - LATELY_MS).or(self.readings.front());
        let before = before.filter(|_| self.readings.len() > 1).map_or(&[][..], |(_, stages)| stages);
        last.iter().map(|stage| {
            let same = |other: &&StageReport| other.name == stage.name && other.lane == stage.lane;
            shares(stage, before.iter().find(same))
        })
    }
}

fn shares(stage: &StageReport, before: Option<&StageReport>) -> Shares {
    let since = |time: fn(&StageReport) -> f64| (time(stage) - before.map_or(0.0, time)).max(0.0);
    let times = [
        since(|stage| stage.busy_ms),
        since(|stage| stage.input_wait_ms),
        since(|stage| stage.output_wait_ms + stage.limit_wait_ms),
    ];
    let total: f64 = times.iter().sum();
    let [busy, input_wait, output_wait] = times.map(|time| if total > 0.0 { time / total } else { 0.0 });
    Shares { name: stage.name.clone(), lane: stage.lane, busy, input_wait, output_wait }
}

/// The lanes of each stage combined, in the order of their first.
pub(super) fn without_lanes(stages: &[Shares]) -> Vec<Shares> {
    let mut names: Vec<&Untrusted> = Vec::new();
    stages.iter().for_each(|stage| {
        if !names.contains(&&stage.name) {
            names.push(&stage.name);
        }
    });
    let mean = |name: &Untrusted, part: fn(&Shares) -> f64| {
        let parts: Vec<_> = stages.iter().filter(|stage| stage.name == *name).map(part).collect();
        #[expect(clippy::cast_precision_loss, reason = "a few lanes")]
        let count = parts.len() as f64;
        parts.iter().sum::<f64>() / count
    };
    let joined = |name: &&Untrusted| Shares {
        name: (*name).clone(),
        lane: None,
        busy: mean(name, |stage| stage.busy),
        input_wait: mean(name, |stage| stage.input_wait),
        output_wait: mean(name, |stage| stage.output_wait),
    };
    names.iter().map(joined).collect()
}

fn keep<T>(list: &mut VecDeque<T>, item: T, most: usize) {
    if list.len() == most {
        list.pop_front();
    }
    list.push_back(item);
}

/// One figure over time in at most `width` columns, each the maximum of its samples.
pub(super) fn greatest(samples: &[Sample], width: usize, figure: fn(&Sample) -> u64) -> Vec<u64> {
    let count = samples.len();
    if count <= width {
        return samples.iter().map(figure).collect();
    }
    let column = |column: usize| &samples[column * count / width..(column + 1) * count / width];
    (0..width).map(|index| column(index).iter().map(figure).max().unwrap_or(0)).collect()
}
