//! Loading: collects the messages that arrive besides the pages, and reports rounds, until everything has arrived.

use std::sync::atomic::Ordering;
use std::time::Instant;

use memferry_stages::geometry::Layout;
use memferry_stages::loader::Loaded;
use memferry_stages::memory::GuestMemory;
use memferry_stages::tally::RoundTally;
use memferry_stages::wire::Message;
use memferry_stages::wire::messages::{RunState, StatePhase};

use super::Destination;
use super::flow::{Flow, Signal, ended_early};
use crate::events::{Event, Phase, Progress, Role};
use crate::migration::digests::{self, Digests, Pending};
use crate::migration::error::MigrationError;
use crate::migration::state::Assembly;

/// How many of these intervals make one progress event for observers.
const TICKS_PER_EVENT: u32 = 5;
/// The most tallies that are stored for rounds that are not complete in every lane.
const MAX_TALLIES: usize = 4096;

/// Messages that arrive besides the pages.
pub(super) struct Arrival {
    pub(super) device: Assembly,
    pub(super) digests: Digests,
    /// Tallies of rounds that are not complete in every lane.
    pub(super) tallies: Vec<RoundTally>,
    pub(super) lanes: usize,
    pub(super) switched_over: u16,
    pub(super) end: Option<(RunState, u64)>,
    /// This end's digests, begun when every page had arrived: the source hashes at the same time.
    pub(super) ours: Option<Pending>,
}

impl Destination {
    /// Processes arrivals until the end mark and every lane's Switchover have arrived.
    pub(super) async fn load(&mut self, flow: &mut Flow, memory: &GuestMemory) -> Result<Arrival, MigrationError> {
        let lanes = u16::try_from(flow.graph.progress.len()).expect("at most MAX_LANES");
        let mut arrival = Arrival {
            device: Assembly::new(StatePhase::Device, self.state_room),
            digests: Digests::none(memory.layout(), flow.may_leave_out),
            tallies: Vec::new(),
            lanes: usize::from(lanes),
            switched_over: 0,
            end: None,
            ours: None,
        };
        while arrival.end.is_none() || arrival.switched_over < lanes {
            match flow.next().await? {
                Signal::Said(Message::State(chunk)) => {
                    arrival.device.add(chunk)?;
                    self.state_room = arrival.device.room();
                }
                Signal::Said(Message::Digests { block, first, stretches }) => {
                    arrival.digests.add(block, first, stretches)?;
                }
                Signal::Said(Message::End { run_state, frames }) => arrival.end = Some((run_state, frames)),
                Signal::Said(Message::Abort(why)) => return Err(MigrationError::GivenUp { peer: Role::Source, why }),
                Signal::Said(other) => {
                    return Err(MigrationError::Protocol(format!("{} came out of turn", other.kind().name())));
                }
                Signal::Loaded(loaded) => {
                    self.loaded(flow, &mut arrival, loaded)?;
                    if arrival.switched_over == lanes && flow.verify {
                        arrival.ours = Some(digests::start(memory, flow.out_for_good.clone()));
                    }
                }
                Signal::StreamEnded => return Err(ended_early()),
                Signal::Tick => self.tick(flow)?,
            }
        }
        let expected = arrival.end.expect("the loop ends with it").1;
        let frames: u64 = flow.graph.progress.iter().map(|lane| lane.frames.load(Ordering::Acquire)).sum();
        if frames != expected {
            let what = format!("{frames} Pages frames came, the end mark says {expected}");
            return Err(MigrationError::Protocol(what));
        }
        flow.report()?;
        flow.acknowledge()?;
        Ok(arrival)
    }

    /// Nothing may follow the end mark of a stored stream: further bytes mean a damaged file.
    pub(super) async fn reach_end(&self, flow: &mut Flow) -> Result<(), MigrationError> {
        loop {
            match flow.next().await? {
                Signal::StreamEnded => return Ok(()),
                Signal::Said(message) => {
                    let what = format!("{} stands behind the end mark", message.kind().name());
                    return Err(MigrationError::Protocol(what));
                }
                Signal::Tick => self.watch_progress(flow),
                Signal::Loaded(_) => {}
            }
        }
    }

    fn loaded(&self, flow: &mut Flow, arrival: &mut Arrival, loaded: Loaded) -> Result<(), MigrationError> {
        match loaded {
            Loaded::RoundComplete { tally, .. } => {
                // These are figures for the report. They are bounded, in case a source ends round after round in one
                // lane only.
                if arrival.tallies.len() < MAX_TALLIES {
                    arrival.tallies.push(tally);
                }
                let of_round = |other: &&RoundTally| other.round == tally.round;
                if arrival.tallies.iter().filter(of_round).count() == arrival.lanes {
                    self.round_loaded(flow, &mut arrival.tallies, tally.round);
                    // The source is about to decide, and counts on what it believes to be in flight.
                    flow.report()?;
                    flow.acknowledge()?;
                }
            }
            Loaded::Switchover { .. } => {
                if arrival.switched_over == 0 {
                    self.observers.tell(&Event::Phase(Phase::Switchover));
                }
                arrival.switched_over += 1;
            }
        }
        Ok(())
    }

    /// Every lane has loaded the round: its figures are added up and reported.
    fn round_loaded(&self, flow: &mut Flow, tallies: &mut Vec<RoundTally>, round: u32) {
        let mut whole = RoundTally::new(round, false);
        for tally in tallies.extract_if(.., |tally| tally.round == round) {
            whole.last = tally.last;
            whole += tally;
        }
        flow.round = if whole.last { round } else { round.saturating_add(1) };
        let duration = flow.round_began.elapsed();
        flow.round_began = Instant::now();
        self.observers.tell(&Event::RoundSent { tally: whole, duration });
    }

    fn tick(&self, flow: &mut Flow) -> Result<(), MigrationError> {
        flow.acknowledge()?;
        self.watch_progress(flow);
        Ok(())
    }

    /// Time has passed: figures are reported every few intervals.
    pub(super) fn watch_progress(&self, flow: &mut Flow) {
        flow.tick += 1;
        if !flow.tick.is_multiple_of(TICKS_PER_EVENT) {
            return;
        }
        let still = self.still(flow);
        let progress = Progress {
            wire_rate: flow.wire_speed.tick(still.wire_bytes),
            page_rate: flow.page_speed.tick(flow.loaded_bytes()),
            bottleneck: flow.watch.latest(&still.stages),
            ..still
        };
        self.observers.tell(&Event::Progress(progress));
    }

    /// The final figures: no data moves any more, and after a completed migration nothing remains.
    pub(super) fn report_last_progress(&self, flow: &Flow, completed: bool) {
        let still = self.still(flow);
        self.observers.tell(&Event::Progress(Progress {
            remaining_bytes: if completed { Some(0) } else { still.remaining_bytes },
            bottleneck: flow.watch.all(&still.stages),
            ..still
        }));
    }

    /// The figures that are not rates.
    fn still(&self, flow: &Flow) -> Progress {
        let total_bytes = self.layout.as_ref().map_or(0, Layout::bytes);
        Progress {
            round: flow.round,
            // Only the source knows what the guest has written since.
            remaining_bytes: (flow.round == 1).then(|| total_bytes.saturating_sub(flow.loaded_bytes())),
            total_bytes,
            wire_bytes: flow.wire_bytes(),
            stages: flow.graph.readings(),
            cpu: flow.watch.cpu(),
            ..Progress::default()
        }
    }
}
