//! What the bitmaps of a 1 TiB guest cost: sync, count and scan, each beside a read-only sweep over as many bytes of plain
//! memory in the same run.
//!
//! `cargo bench -p memferry-stages --bench scale`. A pass takes "sweep / ratio + batches x cost": the ratio is that of the clean
//! bitmap, the cost what one batch adds to it. No page is read: the lanes end in a drain.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memferry_stages::batch::RoundKind;
use memferry_stages::batch::{Batch, Item};
use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::bitmap_sync::{BitmapSync, SyncOrder};
use memferry_stages::dirty_log::{DirtyLog, SoftwareLog};
use memferry_stages::geometry::{BlockInfo, LaneMap, Layout, PageSize};
use memferry_stages::in_flight::InFlight;
use memferry_stages::meter::Meter;
use memferry_stages::queue::{Inlet, bounded};
use memferry_stages::scanner::{ScanOrder, Scanner};
use memferry_stages::stage_id::StageId;
use memferry_stages::take::PageTaker;
use tokio::runtime::Runtime;

const BYTES: u64 = 1 << 40;
const PAGES: u64 = BYTES / 4096;
const LANES: u16 = 2;
const RUNS: usize = 5;

/// Which pages are dirty.
#[derive(Clone, Copy)]
struct Pattern {
    name: &'static str,
    per_mille: u64,
    /// Pages side by side.
    cluster: u64,
}

const PATTERNS: [Pattern; 6] = [
    Pattern { name: "clean", per_mille: 0, cluster: 1 },
    Pattern { name: "0.1 % scattered", per_mille: 1, cluster: 1 },
    Pattern { name: "0.1 % clustered", per_mille: 1, cluster: 4096 },
    Pattern { name: "10 % scattered", per_mille: 100, cluster: 1 },
    Pattern { name: "10 % clustered", per_mille: 100, cluster: 4096 },
    Pattern { name: "all", per_mille: 1000, cluster: PAGES },
];

impl Pattern {
    fn mark(self, mut set: impl FnMut(u64, u64)) {
        let clusters = PAGES * self.per_mille / 1000 / self.cluster;
        let mut chance = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..clusters {
            chance ^= chance << 13;
            chance ^= chance >> 7;
            chance ^= chance << 17;
            let start = chance % PAGES / self.cluster * self.cluster;
            set(start, start + self.cluster);
        }
    }
}

struct Bench {
    runtime: Runtime,
    layout: Layout,
    plain: Vec<u64>,
}

impl Bench {
    fn new() -> Self {
        let info = BlockInfo::new("ram", BYTES);
        let layout = Layout::new(PageSize::DEFAULT, vec![info]).expect("one block");
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        Self { runtime, layout, plain: (0..PAGES / 64).collect() }
    }

    /// One read of as many bytes as the bitmap has.
    fn sweep(&self) -> Duration {
        let since = Instant::now();
        black_box(black_box(&self.plain).iter().fold(0, |all, word| all | word));
        since.elapsed()
    }

    /// Gives one order and takes one answer.
    fn sync(
        &self,
        log: &Arc<SoftwareLog>,
        bitmap: &Arc<DirtyBitmap>,
        untouched: Option<&Arc<DirtyBitmap>>,
    ) -> Duration {
        let sync = BitmapSync::new(vec![log.clone()], bitmap.clone(), Meter::start(StageId::BITMAP_SYNC));
        let sync = match untouched {
            Some(untouched) => sync.with_untouched(untouched.clone()),
            None => sync,
        };
        let ((order, orders), (answer, answers)) = (bounded(1), bounded(1));
        self.runtime.block_on(async {
            order.put(SyncOrder { after_round: 1 }).await.expect("it takes orders");
            drop(order);
            sync.run(orders, answer).await.expect("a sync");
            answers.next().await.expect("an answer").duration
        })
    }

    fn count(bitmap: &DirtyBitmap) -> Duration {
        let since = Instant::now();
        black_box(bitmap.count());
        since.elapsed()
    }

    /// Scans into lanes that are drained at once; returns how many batches there were, too.
    fn scan(&self, bitmap: &Arc<DirtyBitmap>) -> (Duration, u64) {
        let lanes = LaneMap::new(LANES, PageSize::DEFAULT);
        let in_flight = Arc::new(InFlight::new(&self.layout, lanes));
        let meter = Meter::start(StageId::SCANNER);
        let scanner =
            Scanner::new(PageTaker::new(bitmap.clone(), None, Vec::new(), in_flight.clone()), lanes, meter.clone());
        let (into, ends): (Vec<_>, Vec<_>) = (0..LANES).map(|_| bounded(16)).unzip();
        let ((order, orders), (answer, answers)) = (bounded(1), bounded(1));
        self.runtime.block_on(async {
            order.put(ScanOrder::all(1, RoundKind::Live).into()).await.expect("it takes orders");
            drop(order);
            let drained = futures::future::join_all((0..).zip(&ends).map(|(lane, end)| drain(lane, end, &in_flight)));
            let since = Instant::now();
            let (ended, _) = tokio::join!(scanner.run(orders, into, answer), drained);
            let took = since.elapsed();
            ended.expect("a scan");
            answers.next().await.expect("an answer");
            (took, meter.read().batches)
        })
    }

    fn measure(&self, pattern: Pattern) -> Row {
        let (log, bitmap) = (Arc::new(SoftwareLog::new(&self.layout)), Arc::new(DirtyBitmap::empty(&self.layout)));
        let touched = Arc::new(DirtyBitmap::empty(&self.layout));
        let mut times: [Vec<Duration>; 5] = Default::default();
        let mut batches = 0;
        for _ in 0..RUNS {
            for untouched in [None, Some(&touched)] {
                bitmap.clear_range(0, 0..PAGES);
                pattern.mark(|start, end| log.mark(0, start..end));
                times[0].push(self.sweep());
                times[if untouched.is_none() { 1 } else { 2 }].push(self.sync(&log, &bitmap, untouched));
            }
            times[3].push(Self::count(&bitmap));
            let (took, taken) = self.scan(&bitmap);
            times[4].push(took);
            batches = taken;
        }
        let [sweep, sync, sync_untouched, count, scan] = times.map(median);
        Row { batches, sweep, sync, sync_untouched, count, scan }
    }
}

/// A lane's end: everything is acknowledged now and then.
async fn drain(lane: u16, end: &Inlet<Item<Batch>>, in_flight: &InFlight) {
    let mut frames = 0;
    while let Some(item) = end.next().await {
        frames += u64::from(matches!(item, Item::Batch(_)));
        if frames % 1024 == 0 {
            in_flight.acknowledge(lane, frames).expect("as many as came");
        }
    }
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}

struct Row {
    batches: u64,
    sweep: f64,
    sync: f64,
    sync_untouched: f64,
    count: f64,
    scan: f64,
}

fn main() {
    let bench = Bench::new();
    println!("1 TiB of 4 KiB pages: bitmaps of 32 MiB; times in ms (in sweeps, ns a batch beyond the clean pass)");
    let mut clean: Option<Row> = None;
    for pattern in PATTERNS {
        let row = bench.measure(pattern);
        let base = clean.as_ref().unwrap_or(&row);
        let show = |time: f64, base: f64| {
            let each = (time - base) * 1e9 / row.batches.max(1) as f64;
            format!("{:8.2} ({:7.2}x {each:6.1} ns)", time * 1e3, time / row.sweep)
        };
        println!(
            "{:16} {:8} batches  sweep {:5.2}  sync {}  sync, untouched known {}  count {}  scan {}",
            pattern.name,
            row.batches,
            row.sweep * 1e3,
            show(row.sync, base.sync),
            show(row.sync_untouched, base.sync_untouched),
            show(row.count, base.count),
            show(row.scan, base.scan),
        );
        clean.get_or_insert(row);
    }
}
