use super::*;
use crate::geometry::{LaneMap, PageSize};
use crate::stage::testing::{layout, page_size};

/// A log that fails at a given call.
#[derive(Debug, Default)]
struct Fails(Mutex<bool>);

impl DirtyLog for Fails {
    fn start(&self) -> io::Result<()> {
        Ok(())
    }
    fn sync(&self, _block: u32, _extents: std::ops::Range<u32>, _into: &DirtyBitmap) -> io::Result<()> {
        Ok(())
    }
    fn rearm(&self, _at: ExtentAt, _mask: u64) -> io::Result<()> {
        if *self.0.lock().unwrap() { Err(io::Error::other("no more")) } else { Ok(()) }
    }
    fn mark(&self, _block: u32, _pages: std::ops::Range<u64>) {}
    fn stop(&self) -> io::Result<()> {
        Ok(())
    }
}

struct Bench {
    taker: PageTaker,
    bitmap: Arc<DirtyBitmap>,
    untouched: Arc<DirtyBitmap>,
    in_flight: Arc<InFlight>,
    log: Arc<Fails>,
}

fn bench() -> Bench {
    let layout = layout(page_size(4), &[1 << 20]);
    let (bitmap, untouched) = (Arc::new(DirtyBitmap::filled(&layout)), Arc::new(DirtyBitmap::empty(&layout)));
    untouched.set_range(0, 3..5);
    let in_flight = Arc::new(InFlight::new(&layout, LaneMap::new(1, PageSize::DEFAULT)));
    let log = Arc::new(Fails::default());
    let taker = PageTaker::new(bitmap.clone(), Some(untouched.clone()), vec![log.clone()], in_flight.clone());
    Bench { taker, bitmap, untouched, in_flight, log }
}

fn page(page: u64) -> PageAt {
    PageAt { block: 0, page }
}

const AT: ExtentAt = ExtentAt { block: 0, extent: 0 };

#[test]
fn a_page_is_taken_once_by_the_first_and_is_in_flight_until_it_is_placed() {
    let Bench { taker, bitmap, untouched, in_flight, .. } = bench();
    let urgent = taker.open_urgent(7).unwrap();
    let batch = Batch { at: AT, mask: 1 << 3, untouched: 1 << 3, round: 7, kind: RoundKind::Final };
    assert_eq!(urgent.take(page(3)).unwrap(), UrgentPage::Taken(batch));
    assert_eq!(urgent.take(page(3)).unwrap(), UrgentPage::AlreadyTaken);
    assert_eq!((bitmap.is_set(page(3)), untouched.peek(AT), in_flight.pages()), (false, 1 << 4, 1));
    let scanned = taker.take(AT, 64, 7, RoundKind::Final).unwrap().unwrap();
    assert_eq!((scanned.mask, scanned.untouched), (!(1 << 3), 1 << 4));
    assert_eq!(urgent.take(page(9)).unwrap(), UrgentPage::AlreadyTaken);
    assert!(!in_flight.acknowledge_urgent(page(9)) && in_flight.acknowledge_urgent(page(3)));
    assert!(!in_flight.acknowledge_urgent(page(3)), "once");
    assert_eq!(in_flight.pages(), 0);
}

#[test]
fn what_was_taken_urgently_is_put_back_with_the_rest() {
    let Bench { taker, bitmap, in_flight, .. } = bench();
    let urgent = taker.open_urgent(1).unwrap();
    for number in [0, 70, 200] {
        assert!(matches!(urgent.take(page(number)).unwrap(), UrgentPage::Taken(_)));
    }
    in_flight.put_back(&bitmap);
    assert_eq!((bitmap.count(), in_flight.pages()), (256, 0));
}

#[test]
fn a_log_that_cannot_be_rearmed_leaves_the_page_dirty() {
    let Bench { taker, bitmap, in_flight, log, .. } = bench();
    let urgent = taker.open_urgent(1).unwrap();
    *log.0.lock().unwrap() = true;
    assert_eq!(urgent.take(page(5)).unwrap_err().to_string(), "no more");
    assert_eq!((bitmap.count(), in_flight.pages()), (256, 0));
    *log.0.lock().unwrap() = false;
    assert!(matches!(urgent.take(page(5)).unwrap(), UrgentPage::Taken(_)));
}

#[test]
fn no_page_is_urgent_while_an_earlier_version_of_one_may_be_on_its_way() {
    let Bench { mut taker, in_flight, .. } = bench();
    taker.begin_round(RoundKind::Live);
    assert_eq!(taker.open_urgent(2).unwrap_err(), UrgentRefused::RoundOpen(RoundKind::Live));
    let batch = taker.take(AT, 64, 1, RoundKind::Live).unwrap().unwrap();
    in_flight.record(0, &batch);
    taker.end_round();
    assert_eq!(taker.open_urgent(2).unwrap_err(), UrgentRefused::InFlight(64));
    in_flight.acknowledge(0, 1).unwrap();
    let urgent = taker.open_urgent(2).unwrap();
    taker.begin_round(RoundKind::Final);
    assert!(matches!(urgent.take(page(64)).unwrap(), UrgentPage::Taken(batch) if batch.kind.is_final()));
}

#[test]
#[should_panic(expected = "pages are taken urgently, and the round is Live")]
fn a_round_whose_pages_may_change_is_a_mistake_once_pages_are_urgent() {
    let mut taker = bench().taker;
    let _urgent = taker.open_urgent(1).unwrap();
    taker.begin_round(RoundKind::Live);
}
