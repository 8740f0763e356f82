//! The source's senders, one for each connection. They run from Hello on, and send every message.

use std::sync::Arc;
use std::time::Duration;

use memferry_stages::encoder::Outgoing;
use memferry_stages::geometry::BulkMap;
use memferry_stages::meter::Meter;
use memferry_stages::queue::{Inlet, Outlet, bounded};
use memferry_stages::scanner::Background;
use memferry_stages::sender::{Control, Sender, Sent};
use memferry_stages::stage_id::{StageId, StageKind};
use memferry_stages::token_bucket::{Share, TokenBucket};
use memferry_stages::wire::Message;
use tokio::runtime::Handle;

use super::bounds;
use super::connection::Writer;
use super::error::{Loss, MigrationError};
use super::stage_set::StageSet;
use crate::settings::SourceSettings;

/// The running senders, and the ends of their queues.
pub(super) struct Senders {
    /// The sender stages alone, until other stages join them.
    pub(super) stages: StageSet,
    /// Control frames, one queue for each connection.
    pub(super) control: Vec<Outlet<Control>>,
    /// Frames of pages, one queue for each connection.
    pub(super) bulk: Vec<Outlet<Outgoing>>,
    pub(super) sent: Inlet<Sent>,
    pub(super) meters: Vec<Arc<Meter>>,
    /// The cap on bandwidth.
    pub(super) bucket: Arc<TokenBucket>,
    /// Where written frames are reported.
    pub(super) background: Arc<Background>,
}

impl Senders {
    /// Starts one for each of `writers`. With `durable_rounds` (a file) the written data is made durable after each
    /// round.
    pub(super) fn start(writers: Vec<Writer>, settings: &SourceSettings, durable_rounds: bool, plane: &Handle) -> Self {
        let (sent_out, sent) = bounded(usize::from(settings.lanes) * 2);
        let bucket = Arc::new(settings.max_bandwidth.map_or_else(TokenBucket::unlimited, TokenBucket::new));
        let (control, bulk, meters) = (Vec::new(), Vec::new(), Vec::new());
        let mut senders =
            Self { stages: StageSet::new(plane), control, bulk, sent, meters, bucket, background: Arc::default() };
        let most = settings.lanes.div_ceil(settings.connections);
        for (connection, writer) in (0..settings.connections).zip(writers) {
            let lanes_here = bulk_map(settings).lanes_of(connection);
            let share = Share::new(lanes_here, settings.lanes, most);
            let lanes_here = usize::from(lanes_here);
            let bucket = Some((senders.bucket.clone(), share));
            let (frames, bulk) = bounded(bounds::ENCODED * lanes_here);
            let (control, control_frames) = bounded(bounds::CONTROL);
            let id = StageId::sender(connection);
            let meter = Meter::start(id);
            let sender = Sender::new(connection, writer, bucket, durable_rounds, lanes_here, meter.clone())
                .with_background(senders.background.clone());
            let running = sender.run(control_frames, bulk, sent_out.clone());
            senders.stages.spawn(id, running);
            senders.control.push(control);
            senders.bulk.push(frames);
            senders.meters.push(meter);
        }
        senders
    }

    /// Queues a message on connection 0.
    pub(super) async fn send(&mut self, message: &Message) -> Result<(), MigrationError> {
        if self.control[0].put(Control::Frame(message.encode(0))).await.is_ok() {
            return Ok(());
        }
        match self.stages.next_end().await.result {
            Err(failure) => Err(MigrationError::Stage(failure)),
            Ok(()) => Err(MigrationError::Lost(Loss::SenderEnded)),
        }
    }
}

/// Which connection carries each lane: all of a source's connections are bulk.
pub(super) fn bulk_map(settings: &SourceSettings) -> BulkMap {
    BulkMap::new(settings.lanes, settings.connections)
}

/// Sends the last message on connection 0 and ends all connections, within the time given.
pub(super) async fn close(
    stages: &mut StageSet,
    control: &[Outlet<Control>],
    farewell: Option<Message>,
    within: Duration,
) {
    let closing = async {
        if let Some(message) = farewell {
            control[0].put(Control::Frame(message.encode(0))).await?;
        }
        for control in control {
            control.put(Control::Finish).await?;
        }
        let mut senders = control.len();
        while senders > 0 {
            let end = stages.next_end().await;
            senders -= usize::from(end.stage.kind == StageKind::Sender);
        }
        Ok::<(), memferry_stages::queue::Closed>(())
    };
    // A peer that is gone or does not read needs no last message: dropping the connections notifies it.
    drop(tokio::time::timeout(within, closing).await);
}
