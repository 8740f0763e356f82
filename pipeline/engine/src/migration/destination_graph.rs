//! The destination's stages, joined: build the pieces, connect them, spawn them.
//!
//! ```text
//!  ═══▶ receiver 0 ─┬▶ loader of lane 0 ─┐
//!        │          └▶ loader of lane 2 ─┼──▶ guest memory          (only its loader writes a lane's memory)
//!  ═══▶ receiver 1 ──▶ loader of lane 1 ─┘
//!        └ control messages ──▶ controller ──▶ answers ═══▶ (return path, on connection 0)
//! ```

use std::sync::{Arc, OnceLock};

use memferry_stages::batch::{Arrived, Item};
use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::geometry::LaneMap;
use memferry_stages::loader::{self, Direct, Hybrid, LaneProgress, Loaded, Loader, PageSink};
use memferry_stages::memory::GuestMemory;
use memferry_stages::meter::{Meter, Reading};
use memferry_stages::missing::MissingMemory;
use memferry_stages::page_hashes::PageHashes;
use memferry_stages::page_requester::PageRequester;
use memferry_stages::pool::BufferPool;
use memferry_stages::queue::{Inlet, Outlet, bounded};
use memferry_stages::receiver::Receiver;
use memferry_stages::sender::Control;
use memferry_stages::stage_id::StageId;
use memferry_stages::wire::hello::{Features, Hello};
use memferry_stages::wire::{Message, WireDeframer};
use tokio::runtime::Handle;

use super::bounds;
use super::connection::{Deframer, Reader};
use super::session::Urgent;
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

/// What a stream is like, for its urgent connection.
#[derive(Clone, Copy)]
pub(super) struct Stream {
    pub(super) lanes: u16,
    pub(super) bulk: u16,
    pub(super) features: Features,
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

/// How lanes write.
#[derive(Clone)]
pub(super) enum Sinks {
    /// Into the memory of a guest that does not run.
    Direct,
    /// The same until the switch to postcopy, which sets the memory whose pages are missing then.
    Hybrid(Arc<OnceLock<Arc<MissingMemory>>>),
    /// Into what is missing in the memory of a guest that runs.
    Place(Arc<MissingMemory>),
}

impl Place {
    fn direct(&self) -> Direct {
        let sink = Direct::new(self.memory.clone(), self.received.clone());
        match &self.page_hashes {
            Some(page_hashes) => sink.with_page_hashes(page_hashes.clone()),
            None => sink,
        }
    }

    fn placing(&self, missing: Arc<MissingMemory>) -> loader::Place {
        let sink = loader::Place::new(missing, self.received.clone());
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
        sinks: &Sinks,
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
        let mut lanes = graph.start_loaders(place, sinks, hello.lanes, &loaded_out);
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
        sinks: &Sinks,
        lanes: u16,
        loaded: &Outlet<Loaded>,
    ) -> Vec<Option<Outlet<Item<Arrived>>>> {
        let start = |lane| match sinks {
            Sinks::Direct => self.start_loader(lane, place.direct(), loaded),
            Sinks::Hybrid(switched) => self.start_loader(lane, Hybrid::new(place.direct(), switched.clone()), loaded),
            Sinks::Place(missing) => self.start_loader(lane, place.placing(missing.clone()), loaded),
        };
        (0..lanes).map(start).map(Some).collect()
    }

    fn start_loader(
        &mut self,
        lane: u16,
        sink: impl PageSink + 'static,
        loaded: &Outlet<Loaded>,
    ) -> Outlet<Item<Arrived>> {
        let (frames, arrived) = bounded(bounds::ARRIVED);
        let meter = self.meter(StageId::loader(lane));
        let progress = Arc::new(LaneProgress::default());
        self.progress.push(progress.clone());
        let loader = Loader::new(lane, sink, progress, meter);
        self.stages.spawn(StageId::loader(lane), loader.run(arrived, loaded.clone()));
        frames
    }

    /// Asks for the pages of `missing` that threads wait for, and places them, on this runtime. Returns how many stages do that.
    pub(super) fn start_urgent(
        &mut self,
        urgent: Urgent,
        stream: &Stream,
        place: &Place,
        missing: &Arc<MissingMemory>,
        runtime: &Handle,
    ) -> usize {
        let Stream { lanes, bulk, features } = *stream;
        let (memory, lane_map) = (&place.memory, LaneMap::new(lanes, place.memory.page_size()));
        let deframer = WireDeframer::urgent(urgent.pages, memory.layout().clone(), lane_map, features);
        let pool = bounds::load_pool(memory.page_size(), 1);
        self.pools.push(pool.clone());
        let meter = self.meter(StageId::receiver(bulk));
        self.receiver_meters.push(meter.clone());
        let (frames, arrived) = bounded(bounds::ARRIVED);
        // It carries pages only: neither messages nor marks.
        let (messages, _) = bounded(1);
        let (marks, _) = bounded(1);
        let receiver = Receiver::new(bulk, deframer, pool, meter);
        let every_lane = vec![Some(frames); usize::from(lanes)];
        self.stages.spawn_on(StageId::receiver(bulk), receiver.run(every_lane, messages), runtime);
        let loader = Loader::urgent(place.placing(missing.clone()), self.meter(StageId::URGENT_LOADER));
        self.stages.spawn_on(StageId::URGENT_LOADER, loader.run(arrived, marks), runtime);
        let requester = PageRequester::new(missing.clone(), self.meter(StageId::PAGE_REQUESTER));
        self.stages.spawn_on(StageId::PAGE_REQUESTER, requester.run(urgent.requests), runtime);
        3
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
