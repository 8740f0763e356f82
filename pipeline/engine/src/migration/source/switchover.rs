//! Switchover: the guest is paused, and the rest is sent.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memferry_stages::scanner::ScanOrder;
use memferry_stages::wire::Message;
use memferry_stages::wire::messages::{RunState, StatePhase};

use super::Source;
use super::rounds::unexpected;
use super::spent::Part;
use crate::events::{Event, Phase};
use crate::guest::GuestState;
use crate::migration::alive::silenced;
use crate::migration::error::MigrationError;
use crate::migration::flow::Flow;
use crate::migration::{blocking, digests, state};

/// A destination that has acknowledged nothing for this time is not waited for: it may acknowledge only at the end.
const PATIENCE: Duration = Duration::from_millis(500);

impl Source {
    /// The guest is paused: its device state, the last sync, the last round, digests, and the end mark.
    pub(super) async fn send_the_rest(&mut self, flow: &mut Flow) -> Result<(), MigrationError> {
        // If another reason than the limit decided, the backlog has not been waited for yet, and the switchover may be
        // urgent.
        self.drain(flow, self.controller.downtime_limit()).await?;
        self.pause(flow).await?;
        self.reach_complete().await;
        let device = self.save().await?;
        self.sync(flow).await?;

        let digests = self.start_digests();
        self.say_state(flow, device).await?;
        self.scan(flow, ScanOrder::all(self.round + 1, true)).await?;

        if let Some(digests) = digests {
            self.say_digests(flow, digests).await?;
        }
        self.say(flow, &Message::End { run_state: self.was, frames: self.pages_frames }).await
    }

    /// From here on bits leave the bitmap only when pages are sent. Pages left out so far are left out of the digests.
    fn start_digests(&mut self) -> Option<digests::Pending> {
        if !self.settings.verify {
            return None;
        }
        self.left_out = self.clears.as_ref().map(|clears| Arc::new(clears.left_out()));
        Some(digests::start(&self.memory, self.left_out.clone()))
    }

    /// Waits until the backlog is down to a small share of the downtime limit, before the guest is paused. It waits
    /// while anything arrives, and no longer than `at_most`.
    pub(super) async fn drain(&mut self, flow: &mut Flow, at_most: Duration) -> Result<(), MigrationError> {
        let enough = self.controller.backlog_pages();
        let (mut left, mut give_up) = (u64::MAX, Instant::now());
        let end = give_up.checked_add(at_most);
        while self.transport.capabilities().return_path && self.paused.is_none() {
            let in_flight = flow.graph.in_flight.pages();
            if in_flight <= enough {
                break;
            }
            if in_flight < left {
                let patience = Instant::now() + PATIENCE;
                (left, give_up) = (in_flight, end.map_or(patience, |end| patience.min(end)));
            }
            match tokio::time::timeout_at(give_up.into(), self.attend(flow)).await {
                Ok(signal) => _ = signal?,
                Err(_) => break,
            }
        }
        Ok(())
    }

    /// The guest is paused from here on, and the pages it waits for have a bandwidth limit of their own.
    pub(super) async fn pause(&mut self, flow: &Flow) -> Result<(), MigrationError> {
        if self.paused.is_none() {
            self.tell_phase(Phase::Switchover);
            let now = Instant::now();
            self.paused = Some(now);
            self.spent.paused(now);
            if self.was == RunState::Running {
                let guest = self.guest.clone();
                blocking(move || guest.pause()).await?;
            }
            flow.graph.set_bandwidth(self.bandwidth());
            self.observers.tell(&Event::Paused);
        }
        Ok(())
    }

    async fn save(&mut self) -> Result<GuestState, MigrationError> {
        self.spent.on(Part::State);
        let guest = self.guest.clone();
        let device = blocking(move || guest.save()).await?;
        self.released = true;
        let guest = self.guest.clone();
        blocking(move || guest.release()).await?;
        Ok(device)
    }

    /// Sends a control message. A destination that does not read delays neither a cancel nor, forever, a paused guest.
    async fn say(&mut self, flow: &mut Flow, message: &Message) -> Result<(), MigrationError> {
        let said = tokio::select! {
            biased;
            () = self.cancel.cancelled() => return Err(MigrationError::Cancelled),
            silence = silenced(flow.alive.as_ref()) => return Err(MigrationError::Silent(silence)),
            said = tokio::time::timeout(self.settings.handover_timeout, flow.say(message)) => said,
        };
        match said {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(self.broken(flow).await),
            Err(_) => Err(MigrationError::TimedOut("the destination does not read what it is sent".into())),
        }
    }

    async fn say_state(&mut self, flow: &mut Flow, device: GuestState) -> Result<(), MigrationError> {
        self.spent.on(Part::State);
        let chunks = state::chunks(StatePhase::Device, device, &mut self.state_room)?;
        for chunk in chunks {
            self.say(flow, &Message::State(chunk)).await?;
        }
        Ok(())
    }

    async fn say_digests(&mut self, flow: &mut Flow, digests: digests::Pending) -> Result<(), MigrationError> {
        self.spent.on(Part::Verify);
        let mut digests = pin!(digests.finish());
        let digests = loop {
            let signal = tokio::select! {
                biased;
                digests = &mut digests => break digests.map_err(MigrationError::Digest)?,
                signal = flow.next() => signal,
            };
            if let Some(signal) = self.act_on(flow, signal).await? {
                return Err(unexpected(&signal));
            }
        };
        for message in digests.messages() {
            self.say(flow, &message).await?;
        }
        Ok(())
    }
}
