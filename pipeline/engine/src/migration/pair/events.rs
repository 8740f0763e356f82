//! The events of one end, and the rules of their order.

use crate::events::{Event, Phase};

/// The phases before the outcome, in order.
const PHASES: [Phase; 3] = [Phase::Setup, Phase::Active, Phase::Switchover];

/// What an end has reported.
#[derive(Debug, Default)]
pub(super) struct Events {
    phases: usize,
    pub(super) paused: u32,
    pub(super) resumed: u32,
    pub(super) handed_over: u32,
    is_handed_over: bool,
    is_paused: bool,
    pub(super) warnings: u32,
    pub(super) disconnected: u32,
    /// The last round that was scanned, sent, and followed by a sync.
    scanned: u32,
    sent: u32,
    synced: u32,
}

impl Events {
    /// Notes an event.
    ///
    /// # Errors
    /// If it may not follow what was noted before.
    pub(super) fn note(&mut self, event: &Event) -> Result<(), String> {
        let follows = match event {
            Event::Phase(Phase::Disconnected) => self.disconnected > 0,
            Event::Phase(Phase::Postcopy) => self.is_handed_over,
            // Go is answered once more.
            Event::Phase(Phase::Switchover) if self.is_handed_over => self.disconnected > 0,
            Event::Disconnected { .. } => {
                self.disconnected += 1;
                true
            }
            Event::Reconnected { .. } => {
                // What is left of a round is sent as the same one.
                self.scanned = self.sent;
                true
            }
            Event::Phase(Phase::Active) if self.disconnected > 0 => {
                // Rounds, and a switchover, follow again. An earlier Go starts nothing any more.
                self.phases = 2;
                self.is_handed_over = false;
                self.is_paused = false;
                true
            }
            Event::Phase(phase) => {
                self.phases += 1;
                PHASES.get(self.phases - 1) == Some(phase)
            }
            Event::RoundScanned { round } => rises(&mut self.scanned, *round),
            Event::RoundSent { tally, .. } => rises(&mut self.sent, tally.round) && tally.round == self.scanned,
            Event::Synced { after_round, .. } => {
                let follows = *after_round == self.sent;
                self.synced = *after_round;
                follows
            }
            Event::Paused => {
                self.paused += 1;
                !std::mem::replace(&mut self.is_paused, true) && self.phases == 3
            }
            Event::HandedOver => {
                self.handed_over += 1;
                !std::mem::replace(&mut self.is_handed_over, true) && self.phases == 3
            }
            Event::Resumed => {
                self.resumed += 1;
                self.resumed <= self.paused.max(1)
            }
            Event::Warning(_) => {
                self.warnings += 1;
                true
            }
            _ => true,
        };
        if follows { Ok(()) } else { Err(format!("{event:?} may not follow {self:?}")) }
    }

    /// Were all phases reported?
    pub(super) fn are_complete(&self) -> bool {
        self.phases == PHASES.len()
    }
}

/// Sets the round. Returns whether it is the next one.
fn rises(last: &mut u32, round: u32) -> bool {
    std::mem::replace(last, round) + 1 == round
}
