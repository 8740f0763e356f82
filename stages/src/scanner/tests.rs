use std::io;
use std::ops::Range;
use std::sync::Mutex;

use futures::FutureExt;
use proptest::prelude::*;

use super::*;
use crate::bitmap::DirtyBitmap;
use crate::dirty_log::DirtyLog;
use crate::geometry::{EXTENT_PAGES, ExtentAt, Layout, PageSize, bits};
use crate::in_flight::InFlight;
use crate::queue::bounded;
use crate::stage::testing::{batches, block_on, drain, layout, meter, page_size, words};

/// Records what it re-armed; fails at one extent, if set.
#[derive(Debug, Default)]
struct Rearmed {
    bits: Mutex<Vec<(ExtentAt, u64)>>,
    fails_at: Option<ExtentAt>,
}

impl DirtyLog for Rearmed {
    fn start(&self) -> io::Result<()> {
        Ok(())
    }
    fn sync(&self, _block: u32, _extents: Range<u32>, _into: &DirtyBitmap) -> io::Result<()> {
        Ok(())
    }
    fn rearm(&self, at: ExtentAt, mask: u64) -> io::Result<()> {
        if self.fails_at == Some(at) {
            return Err(io::Error::other("no more"));
        }
        self.bits.lock().unwrap().push((at, mask));
        Ok(())
    }
    fn mark(&self, _block: u32, _pages: Range<u64>) {}
    fn stop(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A scanner's surroundings.
struct Bench {
    bitmap: Arc<DirtyBitmap>,
    untouched: Option<Arc<DirtyBitmap>>,
    logs: Vec<Arc<dyn DirtyLog>>,
    lanes: LaneMap,
    in_flight: Arc<InFlight>,
}

impl Bench {
    fn new(layout: &Layout, lanes: u16) -> Self {
        let lanes = LaneMap::new(lanes, layout.page_size());
        Self {
            bitmap: Arc::new(DirtyBitmap::empty(layout)),
            untouched: None,
            logs: Vec::new(),
            lanes,
            in_flight: Arc::new(InFlight::new(layout, lanes)),
        }
    }

    fn scanner(&self) -> Scanner {
        let (bitmap, untouched) = (self.bitmap.clone(), self.untouched.clone());
        let taker = PageTaker::new(bitmap, untouched, self.logs.clone(), self.in_flight.clone());
        Scanner::new(taker, self.lanes, meter())
    }

    /// One scanner for all the orders, each after some bits were set; what came into each lane, and the answers.
    fn scan(&self, rounds: &[(ScanOrder, Vec<(u32, u64)>)]) -> (Vec<Vec<Item<Batch>>>, Vec<RoundScanned>) {
        let (into, lanes): (Vec<_>, Vec<_>) = (0..self.lanes.lanes()).map(|_| bounded(10_000)).unzip();
        let ((order, orders), (answer, answers)) = (bounded(1), bounded(1));
        block_on(async {
            let controller = async {
                let mut scanned = Vec::new();
                for (what, dirty) in rounds {
                    dirty.iter().for_each(|&(block, page)| self.bitmap.set_range(block, page..page + 1));
                    order.put((*what).into()).await.unwrap();
                    scanned.push(answers.next().await.unwrap());
                }
                order.put(ScannerOrder::EndLanes).await.unwrap();
                scanned
            };
            let (ended, scanned) = tokio::join!(self.scanner().run(orders, into, answer), controller);
            ended.unwrap();
            (lanes.iter().map(drain).collect(), scanned)
        })
    }
}

fn order(round: u32) -> ScanOrder {
    ScanOrder::all(round, RoundKind::Live)
}

/// The lane rule of the design: by address, in stretches.
fn naive_lane(page_size: PageSize, lanes: u16, block: u32, page: u64) -> usize {
    let stretch = (2 << 20).max(64 * page_size.bytes() as u64);
    let lane = (page * page_size.bytes() as u64 / stretch + u64::from(block)) % u64::from(lanes);
    usize::try_from(lane).unwrap()
}

/// What a lane must get of a round: its pages in address order, one by one.
fn naive_lanes(layout: &Layout, lanes: u16, dirty: &[(u32, u64)]) -> Vec<Vec<(u32, u64)>> {
    let mut dealt = vec![Vec::new(); usize::from(lanes)];
    let dirty: std::collections::BTreeSet<_> = dirty.iter().copied().collect();
    for (block, page) in dirty {
        dealt[naive_lane(layout.page_size(), lanes, block, page)].push((block, page));
    }
    dealt
}

/// The pages of batches, one by one.
fn pages(batches: &[Batch]) -> Vec<(u32, u64)> {
    let pages = |batch: &Batch| bits(batch.mask).map(|bit| batch.at.page(bit)).collect::<Vec<_>>();
    batches.iter().flat_map(pages).map(|at| (at.block, at.page)).collect()
}

/// Page size, lengths of blocks, lanes, and the dirty pages of some rounds.
fn cases() -> impl Strategy<Value = (Layout, u16, Vec<Vec<(u32, u64)>>)> {
    let layouts = (0..5u32, prop::collection::vec(1u64..20 << 20, 1..4))
        .prop_map(|(shift, lengths)| layout(page_size(4 << shift), &lengths));
    (layouts, 1..6u16).prop_flat_map(|(layout, lanes)| {
        let pages = |block| usize::try_from(layout.block_pages(block)).unwrap();
        let counts: Vec<_> = (0..layout.block_count()).map(pages).collect();
        let page = (0..counts.len(), any::<prop::sample::Index>())
            .prop_map(move |(block, page)| (u32::try_from(block).unwrap(), page.index(counts[block]) as u64));
        let rounds = prop::collection::vec(prop::collection::vec(page, 0..300), 1..4);
        (Just(layout), Just(lanes), rounds)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_set_bit_is_taken_once_in_its_lane_in_order_with_the_round_complete_behind((layout, lanes, rounds) in cases()) {
        let bench = Bench::new(&layout, lanes);
        let orders: Vec<_> = (1..).map(order).zip(rounds.iter().cloned()).collect();
        let (got, scanned) = bench.scan(&orders);
        let page_bytes = layout.page_size().bytes() as u64;
        let mut got: Vec<_> = got.into_iter().map(Vec::into_iter).collect();
        for (round, dirty) in (1..).zip(&rounds) {
            let naive = naive_lanes(&layout, lanes, dirty);
            for (lane, wanted) in naive.iter().enumerate() {
                let mut of_round = Vec::new();
                let tally = loop {
                    match got[lane].next() {
                        Some(Item::Batch(batch)) => of_round.push(batch),
                        Some(Item::Mark(Mark::RoundComplete(tally))) => break tally,
                        other => panic!("lane {lane} has {other:?} in round {round}"),
                    }
                };
                prop_assert_eq!(&pages(&of_round), wanted);
                prop_assert!(of_round.iter().all(|batch| batch.round == round && batch.kind == RoundKind::Live && batch.untouched == 0));
                prop_assert!(of_round.is_sorted_by(|one, next| one.at < next.at), "one batch for each extent");
                let mut figures = RoundTally::new(round, RoundKind::Live);
                (figures.batches, figures.pages.all) = (of_round.len() as u64, wanted.len() as u64);
                figures.pages.bytes_in = figures.pages.all * page_bytes;
                prop_assert_eq!(tally, figures);
            }
            let total = naive.iter().map(Vec::len).sum::<usize>() as u64;
            prop_assert_eq!(scanned[round as usize - 1], RoundScanned { round, pages: total });
        }
        prop_assert!(got.iter_mut().all(|lane| matches!(lane.next(), Some(Item::Mark(Mark::LaneEnds)))));
        prop_assert!(got.iter_mut().all(|lane| lane.next().is_none()));
        prop_assert_eq!(bench.bitmap.count(), 0);
    }
}

#[test]
fn a_round_with_nothing_dirty_is_a_round_and_the_lanes_end_when_it_is_ordered() {
    let bench = Bench::new(&layout(page_size(4), &[8 << 20]), 3);
    let (lanes, scanned) = bench.scan(&[(order(1), vec![]), (ScanOrder::all(2, RoundKind::Final), vec![(0, 0)])]);
    assert_eq!(scanned, [RoundScanned { round: 1, pages: 0 }, RoundScanned { round: 2, pages: 1 }]);
    for (lane, items) in lanes.into_iter().enumerate() {
        let mut items = items.into_iter();
        assert!(
            matches!(items.next(), Some(Item::Mark(Mark::RoundComplete(tally))) if tally == RoundTally::new(1, RoundKind::Live))
        );
        if lane == 0 {
            assert!(matches!(items.next(), Some(Item::Batch(batch)) if batch.kind.is_final() && batch.mask == 1));
        }
        assert!(
            matches!(items.next(), Some(Item::Mark(Mark::RoundComplete(tally))) if tally.round == 2 && tally.kind.is_final())
        );
        assert!(matches!(items.next(), Some(Item::Mark(Mark::LaneEnds))));
        assert!(items.next().is_none());
    }
}

/// The pages that a sample of 4 MiB took, lane by lane, and those of the round behind it.
fn sampled(dirty: Vec<(u32, u64)>, pages: u32) -> [Vec<Vec<(u32, u64)>>; 2] {
    let bench = Bench::new(&layout(page_size(4), &[4 << 20]), 2);
    let sample = ScanOrder::sample(2, NonZeroU32::new(pages).unwrap());
    let (lanes, scanned) = bench.scan(&[(sample, dirty), (order(3), vec![])]);
    let taken = |of_round: u32| {
        let of_lane = |items: &Vec<Item<Batch>>| {
            let batches = items.iter().filter_map(|item| match item {
                Item::Batch(batch) if batch.round == of_round => Some(*batch),
                _ => None,
            });
            self::pages(&batches.collect::<Vec<_>>())
        };
        lanes.iter().map(of_lane).collect::<Vec<_>>()
    };
    let taken = [2, 3].map(taken);
    let counts = taken.each_ref().map(|lanes| lanes.iter().map(Vec::len).sum::<usize>() as u64);
    assert_eq!(scanned.iter().map(|scanned| scanned.pages).collect::<Vec<_>>(), counts);
    taken
}

#[test]
fn a_sample_is_of_all_lanes_and_what_it_leaves_out_stays_dirty() {
    // 16 extents, 16 pages of each third.
    let [sample, rest] = sampled((0..1024).map(|page| (0, page)).collect(), 96);
    assert_eq!(sample.iter().map(Vec::len).collect::<Vec<_>>(), [48, 48]);
    assert_eq!(sample[0][..17], [&(0..16).map(|page| (0, page)).collect::<Vec<_>>()[..], &[(0, 192)]].concat());
    let mut all = [sample, rest].concat().concat();
    all.sort_unstable();
    assert!(all.into_iter().eq((0..1024).map(|page| (0, page))), "each page once");
    // Single pages: one of three.
    let [sample, rest] = sampled((0..16).map(|extent| (0, extent * 64 + 5)).collect(), 6);
    assert_eq!([sample.concat().len(), rest.concat().len()], [6, 10]);
}

#[test]
fn untouched_pages_are_reported_once() {
    let layout = layout(page_size(4), &[1 << 20]);
    let untouched = Arc::new(DirtyBitmap::empty(&layout));
    untouched.set_range(0, 2..66);
    let bench = Bench { untouched: Some(untouched.clone()), ..Bench::new(&layout, 1) };
    let dirty: Vec<_> = [0, 2, 3, 64, 70].map(|page| (0, page)).to_vec();
    let (lanes, _) = bench.scan(&[(order(1), dirty.clone()), (order(2), dirty)]);
    let reported: Vec<_> = batches(lanes.into_iter().next().unwrap()).iter().map(|batch| batch.untouched).collect();
    assert_eq!(reported, [0b1100, 1, 0, 0]);
    assert_eq!(words(&untouched)[..2], [!0b1111, 0b10], "those that were not sent are kept");
}

/// Polls the future of a scanner until nothing more happens, and returns it.
fn until_it_waits<F: Future<Output = Result<(), StageError>>>(run: &mut std::pin::Pin<Box<F>>) {
    for _ in 0..100 {
        assert!(run.as_mut().now_or_never().is_none(), "it waits");
    }
}

#[test]
fn a_full_lane_stops_the_scanner_with_exactly_one_batch_in_hand_taken_rearmed_and_recorded() {
    const ROOM: usize = 5;
    let layout = layout(page_size(4), &[64 << 20]);
    let log = Arc::new(Rearmed::default());
    let bench = Bench { logs: vec![log.clone(), log.clone()], ..Bench::new(&layout, 1) };
    bench.bitmap.set_range(0, 0..layout.pages());
    let (lane, batches) = bounded(ROOM);
    let ((order_to, orders), (answer, _answers)) = (bounded(1), bounded(1));
    assert_eq!(order_to.put(order(1).into()).now_or_never(), Some(Ok(())));
    let mut run = Box::pin(bench.scanner().run(orders, vec![lane], answer));

    until_it_waits(&mut run);
    let taken = || layout.pages() - bench.bitmap.count();
    assert_eq!(taken(), (ROOM as u64 + 1) * EXTENT_PAGES);
    assert_eq!(bench.in_flight.pages(), taken(), "recorded before it has a place in the lane");
    assert_eq!(log.bits.lock().unwrap().len(), 2 * (ROOM + 1), "re-armed, for both logs, before it can be read");

    // Each batch that is taken from the lane lets the scanner take exactly one more.
    for more in 1..=10 {
        assert!(batches.try_next().is_some());
        until_it_waits(&mut run);
        assert_eq!(taken(), (ROOM as u64 + 1 + more) * EXTENT_PAGES);
    }
    let rearmed: Vec<_> = log.bits.lock().unwrap().iter().step_by(2).copied().collect();
    let first_extents = (0..16).map(|extent| (ExtentAt { block: 0, extent }, u64::MAX));
    assert_eq!(rearmed, first_extents.collect::<Vec<_>>());

    // The migration ends here: batches that were not received can be put back.
    drop(run);
    bench.in_flight.put_back(&bench.bitmap);
    assert_eq!(bench.bitmap.count(), layout.pages());
}

#[test]
fn the_word_is_taken_before_the_log_is_rearmed() {
    /// A guest that writes at the moment it is re-armed: it must find the word taken, or its write is lost.
    #[derive(Debug)]
    struct WritesWhenRearmed(Arc<DirtyBitmap>);

    impl DirtyLog for WritesWhenRearmed {
        fn start(&self) -> io::Result<()> {
            Ok(())
        }
        fn sync(&self, _block: u32, _extents: Range<u32>, _into: &DirtyBitmap) -> io::Result<()> {
            Ok(())
        }
        fn rearm(&self, at: ExtentAt, mask: u64) -> io::Result<()> {
            self.0.set_mask(at, mask & 0b101);
            Ok(())
        }
        fn mark(&self, _block: u32, _pages: Range<u64>) {}
        fn stop(&self) -> io::Result<()> {
            Ok(())
        }
    }

    let layout = layout(page_size(4), &[1 << 20]);
    let bench = Bench::new(&layout, 1);
    let bench = Bench { logs: vec![Arc::new(WritesWhenRearmed(bench.bitmap.clone()))], ..bench };
    let (lanes, _) = bench.scan(&[(order(1), vec![(0, 0), (0, 1), (0, 2)]), (order(2), vec![])]);
    let masks: Vec<_> = batches(lanes.into_iter().next().unwrap()).iter().map(|batch| batch.mask).collect();
    assert_eq!(masks, [0b111, 0b101]);
}

#[test]
fn a_log_that_cannot_be_rearmed_ends_the_scan_and_no_bit_is_lost() {
    let layout = layout(page_size(4), &[1 << 20]);
    let log = Rearmed { fails_at: Some(ExtentAt { block: 0, extent: 2 }), ..Rearmed::default() };
    let bench = Bench { logs: vec![Arc::new(log)], ..Bench::new(&layout, 1) };
    bench.bitmap.set_range(0, 10..200);
    let ((lane, _batches), (order_to, orders), (answer, _answers)) = (bounded(8), bounded(1), bounded(1));
    assert_eq!(order_to.put(order(1).into()).now_or_never(), Some(Ok(())));
    let error = block_on(bench.scanner().run(orders, vec![lane], answer)).unwrap_err();
    assert_eq!(error.to_string(), "scanner: the dirty log cannot re-arm: no more");
    bench.in_flight.put_back(&bench.bitmap);
    assert_eq!(bench.bitmap.count(), 190);
}

#[test]
fn a_lane_that_has_ended_ends_the_scanner() {
    let bench = Bench::new(&layout(page_size(4), &[1 << 20]), 1);
    bench.bitmap.set_range(0, 0..1);
    let ((lane, batches), (order_to, orders), (answer, _answers)) = (bounded(8), bounded(1), bounded(1));
    drop(batches);
    assert_eq!(order_to.put(order(1).into()).now_or_never(), Some(Ok(())));
    let error = block_on(bench.scanner().run(orders, vec![lane], answer)).unwrap_err();
    assert!(error.is_closed(), "{error}");
    assert_eq!(bench.in_flight.pages(), 1);
}
