//! Switchover: the guest is paused, and the rest is sent.

use std::time::Duration;

use memferry_stages::batch::RoundKind;
use memferry_stages::scanner::ScanOrder;
use memferry_stages::wire::messages::RunState;

use super::{Action, Part, SourceCourse, State};
use crate::events::{Event, Phase};
use crate::migration::course::handshake::SourceHandshake;
use crate::settings::SwitchoverBandwidth;

impl SourceCourse {
    /// The rounds are over: the guest is paused.
    pub(super) fn pause(&mut self, now: Duration) -> Vec<Action> {
        self.state = State::Pausing;
        self.pause_at_once(now)
    }

    /// The guest is paused whatever the state is, which then completes its work. From here on it counts as paused: a
    /// pause that fails is followed by a resume.
    pub(super) fn pause_at_once(&mut self, now: Duration) -> Vec<Action> {
        self.done.paused = true;
        if let State::Sending(round) = &mut self.state {
            round.paused();
        }
        self.spent.pausing(now);
        let mut actions = vec![Self::phase(Phase::Switchover)];
        match self.facts.was {
            RunState::Running => actions.push(Action::Pause),
            // Its operator has paused it.
            RunState::Paused => actions.extend(self.paused(now)),
        }
        actions
    }

    /// The guest is paused, and the pages it waits for have a bandwidth limit of their own.
    pub(super) fn paused(&mut self, now: Duration) -> Vec<Action> {
        self.spent.paused(now);
        let mut actions = vec![Action::SetBandwidth(self.bandwidth()), Action::notify(Event::Paused)];
        if matches!(self.state, State::Pausing | State::Draining(_)) {
            actions.extend(self.save(now));
        }
        actions
    }

    /// The limit in force at this moment, in bytes a second on the wire.
    pub(super) fn bandwidth(&self) -> Option<u64> {
        match self.settings.switchover_bandwidth {
            _ if !self.done.paused || self.is_serving() => self.settings.max_bandwidth,
            SwitchoverBandwidth::AsRounds => self.settings.max_bandwidth,
            SwitchoverBandwidth::Unlimited => None,
            SwitchoverBandwidth::AtMost(most) => Some(most),
        }
    }

    pub(super) fn save(&mut self, now: Duration) -> Vec<Action> {
        self.spent.on(Part::State, now);
        self.state = State::Saving;
        vec![Action::Save]
    }

    /// From here on the guest may have released what only one side may hold.
    pub(super) fn saved(&mut self) -> Vec<Action> {
        self.done.released = true;
        self.state = State::Releasing;
        vec![Action::Release]
    }

    /// The last sync is complete: from here on bits leave the bitmap only when pages are sent.
    pub(super) fn send_state(&mut self, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.settings.verify.is_on() {
            actions.push(Action::StartDigests);
        }
        if self.is_switching() {
            actions.extend([Action::Serve, Action::SendMissing]);
        }
        self.spent.on(Part::State, now);
        self.state = State::SendingSaved;
        actions.push(Action::SendState);
        actions
    }

    /// The rest of the pages follow the device state.
    pub(super) fn state_sent(&mut self, now: Duration) -> Vec<Action> {
        if self.is_switching() {
            return self.last_round_sent(now);
        }
        let mut actions = self.scan(ScanOrder::all(self.round + 1, RoundKind::Final), now);
        actions.push(Action::EndLanes);
        actions
    }

    pub(super) fn last_round_sent(&mut self, now: Duration) -> Vec<Action> {
        if !self.settings.verify.is_on() {
            return self.send_end();
        }
        self.spent.on(Part::Verify, now);
        self.state = State::Digesting;
        vec![Action::AwaitDigests]
    }

    pub(super) fn digested(&mut self) -> Vec<Action> {
        let mut actions = vec![Action::SendDigests];
        actions.extend(self.send_end());
        actions
    }

    fn send_end(&mut self) -> Vec<Action> {
        self.state = State::Ending;
        vec![Action::SendEnd { run_state: self.facts.was, frames: self.frames }]
    }

    pub(super) fn end_sent(&mut self, now: Duration) -> Vec<Action> {
        if !self.facts.return_path {
            return self.complete_file(now);
        }
        // The destination loads what it has not loaded yet, and reports how long the rest of its work took.
        self.spent.on(Part::Load, now);
        let handshake = SourceHandshake::AwaitingLoaded { verify: self.settings.verify.is_on() };
        self.state = State::HandingOver { handshake, give_up: now + self.settings.handover_timeout };
        Vec::new()
    }
}
