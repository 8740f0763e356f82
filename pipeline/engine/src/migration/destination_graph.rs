//! The destination's stages, joined: build the pieces, connect them, spawn them.
//!
//! ```text
//!  ═══▶ receiver 0 ─┬▶ loader of lane 0 ─┐
//!        │          └▶ loader of lane 2 ─┼──▶ guest memory          (only its loader writes a lane's memory)
//!  ═══▶ receiver 1 ──▶ loader of lane 1 ─┘
//!        └ control messages ──▶ controller ──▶ answers ═══▶ (return path, on connection 0)
//! ```

use std::sync::Arc;

use memferry_stages::batch::{Arrived, Item};
use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::geometry::LaneMap;
use memferry_stages::loader::{Direct, LaneProgress, Loaded, Loader};
use memferry_stages::memory::GuestMemory;
use memferry_stages::meter::{Meter, Reading};
use memferry_stages::page_hashes::PageHashes;
use memferry_stages::pool::BufferPool;
use memferry_stages::queue::{Inlet, Outlet, bounded};
use memferry_stages::receiver::Receiver;
use memferry_stages::sender::Control;
use memferry_stages::stage_id::StageId;
use memferry_stages::wire::hello::{Features, Hello};
use memferry_stages::wire::{Message, WireDeframer};

use super::bounds;
use super::connection::{Deframer, Reader};
use super::stage_set::StageSet;

/// The running stages, and the ends of their queues that the controller holds.
pub(super) struct DestinationGraph {
    pub(super) stages: StageSet,
    /// Answers to the source, if there is a return path.
    pub(super) answer: Option<Outlet<Control>>,
    pub(super) messages: Inlet<Message>,
    pub(super) loaded: Inlet<Loaded>,
    pub(super) progress: Vec<Arc<LaneProgress>>,
    pub(super) meters: Vec<Arc<Meter>>,
    /// The receivers' counters among them: they count the bytes received from the wire.
    pub(super) receiver_meters: Vec<Arc<Meter>>,
    pub(super) pools: Vec<BufferPool>,
}

/// Where pages are loaded. It survives a lost connection.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) memory: GuestMemory,
    /// The received bitmap.
    pub(super) received: Arc<DirtyBitmap>,
    /// Set if the hash of each page is recorded.
    pub(super) page_hashes: Option<Arc<PageHashes>>,
}

impl Place {
    fn sink(&self) -> Direct {
        let sink = Direct::new(self.memory.clone(), self.received.clone());
        match &self.page_hashes {
            Some(page_hashes) => sink.with_page_hashes(page_hashes.clone()),
            None => sink,
        }
    }
}

impl DestinationGraph {
    /// Builds, joins and starts the stages. The stage that sends answers runs already.
    pub(super) fn start(
        hello: &Hello,
        features: Features,
        readers: Vec<Reader>,
        stages: StageSet,
        answer: Option<Outlet<Control>>,
        place: &Place,
    ) -> Self {
        let memory = &place.memory;
        let (loaded_out, loaded) = bounded(usize::from(hello.lanes) * 2);
        let (messages_out, messages) = bounded(bounds::CONTROL);
        let mut graph = Self {
            stages,
            answer,
            messages,
            loaded,
            progress: Vec::new(),
            meters: Vec::new(),
            receiver_meters: Vec::new(),
            pools: Vec::new(),
        };
        let mut lanes = graph.start_loaders(place, hello.lanes, &loaded_out);
        for (connection, reader) in (0..).zip(readers) {
            let of_connection = |lane: u16| hello.bulk_map().connection(lane) == connection;
            let here = (0..).zip(&mut lanes).map(|(lane, outlet)| outlet.take_if(|_| of_connection(lane))).collect();
            let (bulk, lane_map) = (hello.bulk_map(), LaneMap::new(hello.lanes, memory.page_size()));
            let layout = memory.layout().clone();
            let deframer = WireDeframer::new(connection, bulk, reader, layout, lane_map, features);
            graph.start_receiver(connection, deframer, memory, here, messages_out.clone());
        }
        graph
    }

    /// How every stage has spent its time so far.
    pub(super) fn readings(&self) -> Vec<Reading> {
        self.meters.iter().map(|meter| meter.read()).collect()
    }

    fn meter(&mut self, stage: StageId) -> Arc<Meter> {
        let meter = Meter::start(stage);
        self.meters.push(meter.clone());
        meter
    }

    fn start_loaders(
        &mut self,
        place: &Place,
        lanes: u16,
        loaded: &Outlet<Loaded>,
    ) -> Vec<Option<Outlet<Item<Arrived>>>> {
        (0..lanes)
            .map(|lane| {
                let (frames, arrived) = bounded(bounds::ARRIVED);
                let meter = self.meter(StageId::loader(lane));
                let progress = Arc::new(LaneProgress::default());
                self.progress.push(progress.clone());
                let loader = Loader::new(lane, place.sink(), progress, meter);
                let running = loader.run(arrived, loaded.clone());
                self.stages.spawn(StageId::loader(lane), running);
                Some(frames)
            })
            .collect()
    }

    fn start_receiver(
        &mut self,
        connection: u16,
        deframer: Deframer,
        memory: &GuestMemory,
        lanes: Vec<Option<Outlet<Item<Arrived>>>>,
        messages: Outlet<Message>,
    ) {
        let lanes_here = lanes.iter().flatten().count();
        let pool = bounds::load_pool(memory.page_size(), lanes_here);
        self.pools.push(pool.clone());
        let meter = self.meter(StageId::receiver(connection));
        self.receiver_meters.push(meter.clone());
        let receiver = Receiver::new(connection, deframer, pool, meter);
        self.stages.spawn(StageId::receiver(connection), receiver.run(lanes, messages));
    }
}
