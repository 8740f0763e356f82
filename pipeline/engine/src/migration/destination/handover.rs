//! The handover: digests are compared, the machine is prepared, and it starts when the source sends Go.

use std::sync::Arc;
use std::time::Instant;

use memferry_stages::memory::GuestMemory;
use memferry_stages::wire::Message;
use memferry_stages::wire::messages::RunState;

use super::Destination;
use super::flow::{Flow, Signal};
use crate::events::{Event, Role};
use crate::guest::{DestinationGuest, GuestState};
use crate::migration::alive::silenced;
use crate::migration::digests::{Digests, Pending};
use crate::migration::error::{Loss, MigrationError};
use crate::migration::handshake::{DestinationStep, Happening, NotStarted, awaiting_go};
use crate::migration::{blocking, digests};

impl Destination {
    /// Compares digests. If they differ, sends the page hashes of the first stretch that differs, so that the source
    /// can name the page.
    pub(super) async fn verify(
        &mut self,
        flow: &mut Flow,
        memory: &GuestMemory,
        ours: Pending,
        theirs: &Digests,
    ) -> Result<(), MigrationError> {
        let began = Instant::now();
        let left_out = theirs.left_out().clone();
        let ours = async {
            let ours = ours.finish().await.map_err(MigrationError::Digest)?;
            if let Some(page) = ours.first_left_out_beside(&left_out) {
                let what = format!("{page} is unplugged or ignored here, and not at the source");
                return Err(MigrationError::Differs(what));
            }
            ours.leaving_out(memory, left_out.clone()).await.map_err(MigrationError::Digest)
        };
        let ours = tokio::select! {
            biased;
            () = self.cancel.cancelled() => return Err(MigrationError::Cancelled),
            silence = silenced(flow.alive.as_ref()) => return Err(MigrationError::Silent(silence)),
            ours = ours => ours?,
        };
        let differs = theirs.first_difference(memory.layout(), &ours);
        self.parts.verify = began.elapsed();
        self.verified = Some(differs.is_none());
        let Some(stretch) = differs else { return Ok(()) };
        if flow.graph.answer.is_some() {
            let memory = memory.clone();
            let hashes = blocking(move || digests::page_hashes(&memory, &left_out, stretch)).await;
            flow.say(&hashes.map_err(MigrationError::Digest)?).await?;
        }
        let layout = memory.layout();
        let (block, first) = (&layout.blocks()[stretch.block as usize], digests::first_page(layout, stretch));
        let start = first.page * layout.page_size().bytes() as u64;
        let end = block.length.min(start + layout.page_size().stretch_bytes());
        let what = format!("block {:?} differs from the source's between bytes {start:#x} and {end:#x}", block.id);
        Err(MigrationError::Differs(what))
    }

    /// The last handshake: see [`super::super::handshake`].
    pub(super) async fn take_over(
        &mut self,
        flow: &mut Flow,
        guest: &Arc<dyn DestinationGuest>,
    ) -> Result<(), MigrationError> {
        flow.say(&Message::Loaded { verified: self.verified == Some(true) }).await?;
        let give_up = tokio::time::Instant::now() + self.settings.handover_timeout;
        let run_state = loop {
            let happening = match tokio::time::timeout_at(give_up, flow.next()).await {
                Err(_) => Happening::TimedOut,
                Ok(Ok(Signal::Said(message))) => Happening::Said(message),
                Ok(Ok(Signal::StreamEnded)) => Happening::Lost(Loss::Closed(Role::Source)),
                Ok(Ok(Signal::Tick)) => {
                    self.watch_progress(flow);
                    continue;
                }
                Ok(Ok(Signal::Loaded(_))) => continue,
                Ok(Err(MigrationError::Cancelled)) => Happening::Cancel,
                Ok(Err(MigrationError::Silent(silence))) => Happening::Lost(Loss::Silent(silence)),
                Ok(Err(error)) => Happening::Broke(error.to_string()),
            };
            match awaiting_go(happening) {
                DestinationStep::Wait => {}
                DestinationStep::Start(run_state) => break run_state,
                DestinationStep::End(NotStarted::Cancelled) => return Err(MigrationError::Cancelled),
                DestinationStep::End(why) => return Err(MigrationError::NotStarted(why)),
            }
        };
        let began = Instant::now();
        let started = self.start(guest, run_state).await;
        self.parts.handover = began.elapsed();
        let answer = match &started {
            Ok(()) => Message::Running,
            Err(error) => Message::StartFailed(error.to_string().into()),
        };
        if flow.say(&answer).await.is_err() {
            let what = "the source could not be told that the guest was started here";
            self.observers.tell(&Event::Warning(what.into()));
        }
        started
    }

    pub(super) async fn start(
        &mut self,
        guest: &Arc<dyn DestinationGuest>,
        run_state: RunState,
    ) -> Result<(), MigrationError> {
        self.start_begun = true;
        self.observers.tell(&Event::HandedOver);
        let guest = guest.clone();
        Ok(blocking(move || guest.start(run_state)).await?)
    }
}

/// Everything is loaded: applies the device state to the guest.
pub(super) async fn prepare(guest: &Arc<dyn DestinationGuest>, device: GuestState) -> Result<(), MigrationError> {
    let guest = guest.clone();
    Ok(blocking(move || guest.prepare(&device)).await?)
}
