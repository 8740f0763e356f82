//! The return path, from Accept on: the stage that sends answers to the source, and heartbeats with them.

use std::sync::Arc;
use std::time::Duration;

use memferry_stages::meter::Meter;
use memferry_stages::queue::{Outlet, bounded};
use memferry_stages::sender::{Control, Sender};
use memferry_stages::silence::Ear;
use memferry_stages::stage_id::StageId;
use memferry_stages::untrusted::Untrusted;
use memferry_stages::wire::Message;
use memferry_stages::wire::messages::Figure;
use tokio::runtime::Handle;

use crate::bottleneck;
use crate::events::Role;
use crate::migration::alive::Alive;
use crate::migration::connection::Writer;
use crate::migration::error::{Loss, MigrationError, Silence};
use crate::migration::stage_set::StageSet;
use crate::migration::{FAREWELL, bounds};

/// The return path before the other stages run.
pub(super) struct Answers {
    pub(super) stages: StageSet,
    pub(super) outlet: Outlet<Control>,
    pub(super) alive: Alive,
}

impl Answers {
    /// Starts the stage: a sender without bulk data. The peer is `source`; `ears` watches that it is alive.
    pub(super) fn start(
        writer: Writer,
        source: Untrusted,
        ears: Vec<Arc<Ear>>,
        limit: Duration,
        plane: &Handle,
    ) -> Self {
        let mut stages = StageSet::new(plane);
        let (outlet, frames) = bounded(bounds::CONTROL);
        let (_, no_bulk) = bounded(1);
        let (sent, _) = bounded(1);
        let sender = Sender::new(0, writer, None, false, 0, Meter::start(StageId::ANSWERS));
        stages.spawn(StageId::ANSWERS, sender.run(frames, no_bulk, sent));
        let silence = Silence { role: Role::Source, peer: source, limit };
        let alive = Alive::start(outlet.clone(), ears, silence);
        Self { stages, outlet, alive }
    }

    /// Sends the last message and ends the return path, within [`FAREWELL`].
    pub(super) async fn close(mut self, farewell: Option<Message>) {
        let Some(message) = farewell else { return };
        let closing = async {
            send_answer(Some(&self.outlet), &message).await?;
            finish(&self.outlet, &mut self.stages).await;
            Ok::<(), MigrationError>(())
        };
        // A source that is gone or does not read needs no last message.
        drop(tokio::time::timeout(FAREWELL, closing).await);
    }
}

/// Sends a message to the source, if there is a return path.
pub(super) async fn send_answer(answers: Option<&Outlet<Control>>, message: &Message) -> Result<(), MigrationError> {
    let Some(answers) = answers else { return Ok(()) };
    let sent = answers.put(Control::Frame(message.encode(0))).await;
    sent.map_err(|_| MigrationError::Lost(Loss::ReturnPathClosed))
}

/// Ends the return path once all queued answers are sent.
pub(super) async fn finish(answer: &Outlet<Control>, stages: &mut StageSet) {
    answer.put(Control::Finish).await.ok();
    while stages.next_end().await.stage != StageId::ANSWERS {}
}

/// The figures that this end reports to the source with each heartbeat, once the stages run.
pub(super) fn figures(receivers: &[Arc<Meter>]) -> Vec<Figure> {
    let receivers: Vec<_> = receivers.iter().map(|meter| meter.read()).collect();
    vec![bottleneck::figure_of(&receivers)]
}
