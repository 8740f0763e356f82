//! The source's stages, joined: build the pieces, connect them, spawn them.
//!
//! ```text
//!  sync ◀─ orders ─▶ found                         lane 0: detector ─▶ encoder ─┐
//!            bitmap sync ──▶ bitmap ──▶ scanner ─┬▶ lane 1: detector ─▶ encoder ─┴▶ sender 0 ═══▶
//!                                                └▶ lane 2: detector ─▶ encoder ──▶ sender 1 ═══▶
//! ```

use std::sync::{Arc, Mutex};
use std::time::Duration;

use memferry_stages::batch::{Batch, Item};
use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::bitmap_sync::{BitmapSync, SyncOrder, Synced};
use memferry_stages::codec::Codec;
use memferry_stages::dirty_log::DirtyLog;
use memferry_stages::encoder::misses::{self, Wire};
use memferry_stages::encoder::{CacheShare, DeltaPlan, Encoder, EncoderPlan, KnownZero, Outgoing};
use memferry_stages::exclusions::Exclusions;
use memferry_stages::geometry::{LaneMap, Layout};
use memferry_stages::in_flight::InFlight;
use memferry_stages::memory::GuestMemory;
use memferry_stages::meter::{Meter, Reading};
use memferry_stages::page_hashes::PageHashes;
use memferry_stages::page_server::PageServer;
use memferry_stages::pool::BufferPool;
use memferry_stages::queue::{Inlet, Outlet, bounded};
use memferry_stages::scanner::{Background, Cut, RoundScanned, Scanner, ScannerOrder};
use memferry_stages::sender::{Control, Sent};
use memferry_stages::stage_id::{StageId, StageKind};
use memferry_stages::take::{PageTaker, UrgentRefused};
use memferry_stages::token_bucket::TokenBucket;
use memferry_stages::wire::WireFramer;
use memferry_stages::zero_detector::ZeroDetector;
use tokio::runtime::Handle;

use super::link::Urgent;
use super::senders::{Senders, bulk_map};
use super::stage_set::StageSet;
use super::{blocking, bounds};
use crate::controller::forecast::Work;
use crate::settings::{EncoderSettings, OnMiss, SourceSettings};

/// The data that the stages work on.
pub(super) struct SourceParts {
    pub(super) memory: GuestMemory,
    pub(super) logs: Vec<Arc<dyn DirtyLog>>,
    pub(super) bitmap: Arc<DirtyBitmap>,
    /// Set if there can be pages that do not travel.
    pub(super) exclusions: Option<Arc<Exclusions>>,
    pub(super) untouched: Arc<DirtyBitmap>,
    /// Set if the hash of each page is recorded.
    pub(super) page_hashes: Option<Arc<PageHashes>>,
}

/// The running stages, and the ends of their queues that the controller holds.
pub(super) struct SourceGraph {
    pub(super) stages: StageSet,
    pub(super) scan: Outlet<ScannerOrder>,
    pub(super) scanned: Inlet<RoundScanned>,
    pub(super) sync: Outlet<SyncOrder>,
    pub(super) synced: Inlet<Synced>,
    /// Control frames, one for each connection.
    pub(super) control: Vec<Outlet<Control>>,
    pub(super) sent: Inlet<Sent>,
    pub(super) lanes: Lanes,
    pub(super) meters: Vec<Arc<Meter>>,
    /// The senders' counters among them: they count the bytes that went to the wire.
    pub(super) sender_meters: Vec<Arc<Meter>>,
    pub(super) pools: Vec<BufferPool>,
    /// The cap on bandwidth.
    bucket: Arc<TokenBucket>,
    sync_at_work: Arc<Mutex<()>>,
    taker: PageTaker,
    memory: GuestMemory,
    cut: Cut,
    background: Arc<Background>,
}

/// What the lanes know of the destination. It survives a lost connection.
pub(super) struct Lanes {
    pub(super) in_flight: Arc<InFlight>,
    /// Pages that can be sent as deltas, if deltas are enabled.
    pub(super) references: Option<References>,
    /// The XBZRLE cache, lane by lane.
    caches: Vec<CacheShare>,
}

impl Lanes {
    fn new(layout: &Layout, lane_map: LaneMap, settings: &SourceSettings) -> Self {
        Self {
            in_flight: Arc::new(InFlight::new(layout, lane_map)),
            references: settings.encoder.xbzrle.as_ref().map(|_| References::new(layout)),
            caches: Vec::new(),
        }
    }

    /// The stages have ended, and the destination has loaded this number of frames in each lane. Returns the pages that were in flight:
    /// what it holds of them is not known any more (law 6).
    ///
    /// # Errors
    /// The number of frames that were sent, if it has loaded more.
    pub(super) fn put_back(&self, layout: &Layout, frames: &[u64]) -> Result<DirtyBitmap, u64> {
        for (lane, &frames) in (0..).zip(frames).take(self.caches.len()) {
            self.in_flight.acknowledge(lane, frames)?;
        }
        let lost = DirtyBitmap::empty(layout);
        self.in_flight.put_back(&lost);
        self.caches.iter().for_each(|cache| cache.forget(&lost));
        self.references.iter().for_each(|references| references.forget(&lost));
        Ok(lost)
    }

    /// The lanes of the next attempt: frames are counted from its beginning.
    fn next(self, layout: &Layout, lane_map: LaneMap) -> Self {
        Self { in_flight: Arc::new(InFlight::new(layout, lane_map)), ..self }
    }
}

/// The pages that the encoders can send as deltas.
pub(super) struct References {
    /// Those that entered the cache, and may have left it since.
    cached: Arc<DirtyBitmap>,
    known_zero: Arc<KnownZero>,
}

impl References {
    fn new(layout: &Layout) -> Self {
        Self { cached: Arc::new(DirtyBitmap::empty(layout)), known_zero: Arc::new(KnownZero::new(layout)) }
    }

    fn forget(&self, lost: &DirtyBitmap) {
        self.known_zero.forget(lost);
        lost.all_dirty_extents().for_each(|at| _ = self.cached.take_mask(at, lost.peek(at)));
    }

    /// How many of these pages can be sent as deltas. One sweep over the words.
    pub(super) fn count_in(&self, pages: &DirtyBitmap) -> u64 {
        let can_be_deltas = |at| pages.peek(at) & (self.cached.peek(at) | self.known_zero.pages(at));
        pages.all_dirty_extents().map(|at| u64::from(can_be_deltas(at).count_ones())).sum()
    }
}

impl SourceGraph {
    /// Builds, joins and starts the stages before the senders. They wait for the first order. After a lost connection the lanes continue
    /// with what those of the attempt before know.
    pub(super) fn start(
        parts: SourceParts,
        senders: Senders,
        settings: &SourceSettings,
        before: Option<Lanes>,
    ) -> Self {
        let layout = parts.memory.layout();
        let lane_map = LaneMap::new(settings.lanes, parts.memory.page_size());
        // A round, and the end of the lanes behind it.
        let (scan, scan_orders) = bounded(2);
        let (scanned_out, scanned) = bounded(1);
        let (sync, sync_orders) = bounded(1);
        let (synced_out, synced) = bounded(1);
        let Senders { stages, control, bulk: connections, sent, meters, bucket, background } = senders;
        let lanes =
            before.map_or_else(|| Lanes::new(layout, lane_map, settings), |before| before.next(layout, lane_map));
        let untouched = Some(parts.untouched.clone());
        let taker = PageTaker::new(parts.bitmap.clone(), untouched, parts.logs.clone(), lanes.in_flight.clone());
        let scanner_meter = Meter::start(StageId::SCANNER);
        let scanner = Scanner::new(taker.clone(), lane_map, scanner_meter.clone()).with_background(background.clone());
        let mut graph = Self {
            stages,
            scan,
            scanned,
            sync,
            synced,
            control,
            sent,
            lanes,
            meters: meters.clone(),
            sender_meters: meters,
            pools: Vec::new(),
            bucket,
            sync_at_work: Arc::default(),
            taker,
            memory: parts.memory.clone(),
            cut: scanner.cut(),
            background,
        };
        let lanes = graph.start_lanes(&parts, settings, &connections);

        graph.meters.push(scanner_meter);
        graph.stages.spawn(StageId::SCANNER, scanner.run(scan_orders, lanes, scanned_out));

        let meter = graph.meter(StageId::BITMAP_SYNC);
        let mut bitmap_sync = BitmapSync::new(parts.logs, parts.bitmap, meter).with_untouched(parts.untouched);
        if let Some(exclusions) = parts.exclusions {
            bitmap_sync = bitmap_sync.with_exclusions(exclusions);
        }
        graph.sync_at_work = bitmap_sync.at_work();
        graph.stages.spawn(StageId::BITMAP_SYNC, bitmap_sync.run(sync_orders, synced_out));
        graph
    }

    /// Ends the round that is scanned: what is left of it stays dirty.
    pub(super) fn cut_round(&self) {
        self.cut.cut();
    }

    /// In a switch to postcopy, nothing is known of what the destination holds of pages that are sent after it (law 6).
    pub(super) fn forget_references(&mut self) {
        self.lanes.references = None;
    }

    /// Serves pages that the destination asks for, from here on, on this runtime. `round` is the one that follows.
    ///
    /// # Errors
    /// When a page could overtake an earlier version of itself.
    pub(super) fn serve(&mut self, urgent: Urgent, round: u32, runtime: &Handle) -> Result<(), UrgentRefused> {
        let taker = self.taker.open_urgent(round)?;
        let lanes = LaneMap::new(u16::try_from(self.lanes()).expect("as many as were set"), self.memory.page_size());
        let meter = self.meter(StageId::PAGE_SERVER);
        // They count what goes to the wire.
        self.sender_meters.push(meter.clone());
        let server = PageServer::new(taker, self.memory.clone(), lanes, WireFramer::new(true), meter)
            .with_background(self.background.clone());
        self.stages.spawn_on(StageId::PAGE_SERVER, server.run(urgent.requests, urgent.pages), runtime);
        Ok(())
    }

    /// Ends every stage: once this returns, no stage accesses memory or logs.
    pub(super) async fn end(&mut self) {
        self.stages.end().await;
        let at_work = self.sync_at_work.clone();
        blocking(move || drop(at_work.lock())).await;
    }

    /// What the lanes know. The stages have ended.
    pub(super) fn into_lanes(self) -> Lanes {
        self.lanes
    }

    /// Sets the limit in bytes a second from here on, all connections together.
    pub(super) fn set_bandwidth(&self, bytes_per_second: Option<u64>) {
        self.bucket.set_rate(bytes_per_second);
    }

    /// Sets the bytes of the XBZRLE cache, all lanes together. Each lane applies it from its next batch on.
    pub(super) fn set_cache(&self, bytes: u64) {
        let caches = &self.lanes.caches;
        caches.iter().for_each(|cache| cache.set(bytes / caches.len() as u64));
    }

    pub(super) fn lanes(&self) -> usize {
        self.lanes.caches.len()
    }

    /// How long the stages have worked since then.
    pub(super) fn work_since(&self, before: &[Reading]) -> Work {
        let mut work = Work::default();
        for (now, before) in self.readings().iter().zip(before) {
            work.busiest = work.busiest.max(now.busy.saturating_sub(before.busy));
            if now.stage.kind == StageKind::Sender {
                let sending = not_idle(now).saturating_sub(not_idle(before));
                work.sending = work.sending.max(Some(sending));
            }
        }
        work
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

    /// The connection behind a lane's encoder.
    fn wire(&self, lane: u16, settings: &SourceSettings) -> Wire {
        let bulk = bulk_map(settings);
        let connection = bulk.connection(lane);
        let sender = self.sender_meters[usize::from(connection)].clone();
        Wire::new(sender, self.bucket.clone(), bulk.lanes_of(connection), settings.lanes)
    }

    fn start_lanes(
        &mut self,
        parts: &SourceParts,
        settings: &SourceSettings,
        connections: &[Outlet<Outgoing>],
    ) -> Vec<Outlet<Item<Batch>>> {
        let SourceParts { memory, logs, page_hashes, .. } = parts;
        let page_size = memory.page_size();
        let before = std::mem::take(&mut self.lanes.caches);
        (0..settings.lanes)
            .map(|lane| {
                let (batches, detector_in) = bounded(bounds::SCANNED);
                let (copies, encoder_in) = bounded(bounds::COPIED);
                let frames = connections[usize::from(bulk_map(settings).connection(lane))].clone();
                let (copy_pool, code_pool) = (bounds::copy_pool(page_size), bounds::code_pool(page_size));
                self.pools.extend([copy_pool.clone(), code_pool.clone()]);

                let meter = self.meter(StageId::zero_detector(lane));
                let detector = ZeroDetector::new(lane, memory.clone(), copy_pool, logs.clone(), meter.clone());
                let running = detector.run(detector_in, copies);
                self.stages.spawn(StageId::zero_detector(lane), running);

                let meter = self.meter(StageId::encoder(lane));
                let framer = WireFramer::new(settings.checksum);
                let mut encoder = Encoder::new(lane, page_size, plan(settings), framer, code_pool, meter.clone());
                if let Some(cache) = before.get(usize::from(lane)) {
                    encoder = encoder.with_cache_of(cache);
                }
                if let Some(References { cached, known_zero }) = &self.lanes.references {
                    encoder = encoder.with_cached(cached.clone()).with_known_zero(known_zero.clone());
                }
                if let Some(page_hashes) = page_hashes {
                    encoder = encoder.with_page_hashes(page_hashes.clone());
                }
                encoder = encoder.with_wire(self.wire(lane, settings));
                self.lanes.caches.push(encoder.cache_share());
                let running = encoder.run(encoder_in, frames);
                self.stages.spawn(StageId::encoder(lane), running);
                batches
            })
            .collect()
    }
}

/// How long a stage had an input: it worked, or waited to give its output on.
fn not_idle(reading: &Reading) -> Duration {
    reading.busy + reading.output_wait + reading.limit_wait
}

/// How cache misses are encoded with this compressor.
fn on_miss(on_miss: OnMiss, compress: Option<Codec>) -> misses::OnMiss {
    match (on_miss, compress) {
        (OnMiss::Raw, _) | (_, None) => misses::OnMiss::Raw,
        (OnMiss::Auto, Some(codec)) => misses::OnMiss::Auto(codec),
        (OnMiss::Compress, Some(codec)) => misses::OnMiss::Compress(codec),
    }
}

/// One lane's share of the encoder's settings.
fn plan(settings: &SourceSettings) -> EncoderPlan {
    let EncoderSettings { compress, xbzrle } = &settings.encoder;
    EncoderPlan {
        compress: *compress,
        delta: xbzrle.as_ref().map(|xbzrle| DeltaPlan {
            cache_bytes: xbzrle.cache_bytes / u64::from(settings.lanes),
            on_miss: on_miss(xbzrle.on_miss, *compress),
            cache_first_round: xbzrle.cache_first_round,
        }),
    }
}
