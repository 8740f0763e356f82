//! Setup: the destination is reached and accepts, the logs are armed, the stages are started.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::memory::GuestMemory;
use memferry_stages::wire::messages::StatePhase;
use memferry_stages::wire::{Features, Message};
use memferry_transports::Transport;

use super::{HANDOVER_MOST, Source};
use crate::bottleneck::Watch;
use crate::events::{Event, Phase};
use crate::guest::SourceGuest;
use crate::migration::arming::{Armed, arm};
use crate::migration::error::MigrationError;
use crate::migration::flow::{Flow, asked};
use crate::migration::link::{Greeted, Link, features};
use crate::migration::plane::DataPlane;
use crate::migration::source_graph::{SourceGraph, SourceParts};
use crate::migration::state::Room;
use crate::migration::{FAREWELL, block_facts, blocking, bounds, digests, state};
use crate::settings::SourceSettings;

/// The values needed to reach the destination, separate from the source, whose settings may be changed meanwhile.
struct Introduction {
    guest: Arc<dyn SourceGuest>,
    memory: GuestMemory,
    transport: Arc<dyn Transport>,
    settings: SourceSettings,
    features: Features,
    /// The limit for guest state.
    room: Room,
}

impl Introduction {
    async fn connect(&self, plane: &DataPlane) -> Result<Link, MigrationError> {
        let (transport, settings) = (self.transport.clone(), self.settings.clone());
        let (page_size, features) = (self.memory.page_size(), self.features);
        let opening = async move { Greeted::open(transport, settings, page_size, features).await };
        let greeted = plane.run(opening).await?;
        // A bandwidth limit that was set in the meantime is applied when the stages start.
        Ok(Link::start(greeted, &self.settings, self.transport.capabilities().stored, plane.handle()))
    }

    /// The destination accepts the stream, builds its machine and is ready for pages, before any is sent. Returns the
    /// time of one request and its answer.
    async fn agree(&mut self, link: &mut Link) -> Result<Duration, MigrationError> {
        self.answer(link, "Accept", |message| matches!(message, Message::Accept)).await?;
        let guest = self.guest.clone();
        let setup = blocking(move || guest.setup_state()).await?;
        for chunk in state::chunks(StatePhase::Setup, setup, &mut self.room)? {
            link.say(&Message::State(chunk)).await?;
        }
        link.say(&Message::Blocks(self.memory.layout().blocks().to_vec())).await?;
        let asked = Instant::now();
        self.answer(link, "Ready", |message| *message == Message::Ready).await?;
        Ok(asked.elapsed())
    }

    /// Waits for an answer, for as long as the last handshake may take.
    async fn answer(&self, link: &mut Link, name: &str, is_it: fn(&Message) -> bool) -> Result<(), MigrationError> {
        let answered = tokio::time::timeout(self.settings.handover_timeout, link.expect(is_it)).await;
        answered.unwrap_or_else(|_| Err(MigrationError::TimedOut(format!("{} does not answer with {name}", link.peer))))
    }
}

impl Source {
    /// Reaches the destination, which accepts. Requests to this end are answered meanwhile.
    pub(super) async fn reach(&mut self, plane: &DataPlane) -> Result<Link, MigrationError> {
        let mut introduction = self.introduction();
        let agreed = async {
            let mut link = introduction.connect(plane).await?;
            let answered_in = introduction.agree(&mut link).await?;
            Ok::<_, MigrationError>((link, answered_in, introduction.room))
        };
        let (mut agreed, cancel) = (pin!(agreed), self.cancel.clone());
        let (link, answered_in, room) = loop {
            tokio::select! {
                biased;
                () = cancel.cancelled() => return Err(MigrationError::Cancelled),
                request = asked(&mut self.requests) => self.answer(None, request).await?,
                agreed = &mut agreed => break agreed?,
            }
        };
        self.state_room = room;
        // The handover takes two one-way trips, as this request and its answer do.
        let fixed = self.controller.fixed();
        fixed.handover = fixed.handover.max(answered_in.min(HANDOVER_MOST));
        self.observers.tell(&Event::Connected { peer: link.peer.clone() });
        Ok(link)
    }

    fn introduction(&self) -> Introduction {
        let features = Features {
            left_out: self.may_leave_out(),
            ignored_blocks: self.layout().blocks().iter().any(|block| block.ignored),
            ..features(&self.settings)
        };
        Introduction {
            guest: self.guest.clone(),
            memory: self.memory.clone(),
            transport: self.transport.clone(),
            settings: self.settings.clone(),
            features,
            room: self.state_room,
        }
    }

    /// The work that remains before the first page.
    pub(super) async fn make_ready(&mut self) -> Result<(Arc<DirtyBitmap>, Arc<DirtyBitmap>), MigrationError> {
        let armed = self.arm().await?;
        self.estimate_verify().await?;
        Ok(armed)
    }

    /// Reports to the destination why no data will come, before the stages run that would report it.
    pub(super) async fn take_leave(&self, link: Link, why: &MigrationError) {
        if self.transport.capabilities().return_path {
            link.close(Message::Abort(why.to_string().into()), FAREWELL).await;
        }
    }

    /// Starts the logs, and only then asks which pages are untouched, so that a log sees every later write. All bits
    /// are set but those of pages that never travel: the bitmap is the truth from here on (law 1).
    async fn arm(&mut self) -> Result<(Arc<DirtyBitmap>, Arc<DirtyBitmap>), MigrationError> {
        let out = self.reach_setup().await?;
        let (guest, memory) = (self.guest.clone(), self.memory.clone());
        self.logs = blocking(move || guest.dirty_logs()).await?;
        self.observers.tell(&Event::Guest {
            blocks: block_facts(self.layout()),
            pages: self.layout().pages(),
            memory_bound: self.bound() + bounds::logs_bytes(&self.logs),
        });
        let (logs, may_leave_out) = (self.logs.clone(), self.may_leave_out());
        let Armed { bitmap, clears, untouched } = blocking(move || arm(&memory, &logs, &out, may_leave_out)).await?;
        self.bitmap = Some(bitmap.clone());
        self.clears = clears;
        self.tell_spared();
        self.warn_of_lost_hints();
        self.controller.armed(self.started.elapsed());
        Ok((bitmap, untouched))
    }

    /// The cost of the digests: measured on a sample, and counted for both ends, which may run on one machine. Measured
    /// again before each decision, because other load on the machine varies.
    pub(super) async fn estimate_verify(&mut self) -> Result<(), MigrationError> {
        if self.settings.verify {
            let (memory, clears) = (self.memory.clone(), self.clears.clone());
            let left_out = move || clears.map(|clears| clears.left_out());
            let estimate = blocking(move || digests::downtime(&memory, left_out().as_ref())).await;
            self.controller.fixed().verify = estimate.map_err(MigrationError::Digest)?;
        }
        Ok(())
    }

    pub(super) fn start_stages(&mut self, link: Link, bitmap: Arc<DirtyBitmap>, untouched: Arc<DirtyBitmap>) -> Flow {
        let parts = SourceParts {
            memory: self.memory.clone(),
            logs: self.logs.clone(),
            bitmap,
            clears: self.clears.clone(),
            untouched,
            senders: link.senders,
        };
        let graph = SourceGraph::start(parts, &self.settings);
        graph.set_bandwidth(self.bandwidth());
        self.watch = Some(Watch::begin(self.transport.capabilities().return_path));
        self.setup = self.started.elapsed();
        self.tell_phase(Phase::Active);
        Flow::new(graph, link.said, link.alive, self.cancel.clone(), self.requests.take())
    }
}
