use std::thread;

use tokio::io::{DuplexStream, ReadHalf, WriteHalf, duplex, split};

use super::*;
use crate::batch::Item;
use crate::bitmap::DirtyBitmap;
use crate::geometry::{ExtentAt, PageSize};
use crate::in_flight::InFlight;
use crate::loader::{Loader, Place};
use crate::memory::Memory;
use crate::missing::{Discards, MissingMemory};
use crate::page_requester::PageRequester;
use crate::queue::bounded;
use crate::receiver::Receiver;
use crate::stage::testing::{block_on, guest, mapped, meter, numbered};
use crate::take::PageTaker;
use crate::wire::{Features, HEAD_BYTES, WireDeframer, WireFramer};

const PAGES: u64 = 300;
const FEATURES: Features = Features { checksum: true, postcopy: true, ..NONE };
const NONE: Features = Features {
    checksum: false,
    snap: false,
    lz4: false,
    zstd: false,
    groups: false,
    xbzrle: false,
    verify: false,
    page_hashes: false,
    left_out: false,
    ignored_blocks: false,
    checkpoints: false,
    postcopy: false,
    recovery: false,
};

/// A source whose guest is paused.
struct Served {
    memory: GuestMemory,
    bitmap: Arc<DirtyBitmap>,
    in_flight: Arc<InFlight>,
    server: PageServer<WireFramer>,
}

/// Every page is dirty, but for those of the first extent whose bits are clear in `first`.
fn served(memory: GuestMemory, first: u64) -> Served {
    let lanes = LaneMap::new(2, PageSize::DEFAULT);
    let bitmap = Arc::new(DirtyBitmap::filled(memory.layout()));
    _ = bitmap.take_mask(ExtentAt { block: 0, extent: 0 }, !first);
    let in_flight = Arc::new(InFlight::new(memory.layout(), lanes));
    let taker = PageTaker::new(bitmap.clone(), None, Vec::new(), in_flight.clone());
    let taker = taker.open_urgent(2).expect("nothing is in flight");
    let server = PageServer::new(taker, memory.clone(), lanes, WireFramer::new(true), meter());
    Served { memory, bitmap, in_flight, server }
}

/// Runs a server on what is sent to it, to its end.
fn answered(served: PageServer<WireFramer>, sent: Vec<u8>) -> (Result<(), StageError>, Vec<u8>) {
    block_on(async {
        let requests = FrameReader::new(&sent[..], "the test".into(), PageSize::DEFAULT);
        let mut pages = Vec::new();
        let result = served.run(requests, &mut pages).await;
        (result, pages)
    })
}

fn requests(pages: impl IntoIterator<Item = u64>) -> Vec<u8> {
    let request = |page| Message::PageRequest(PageAt { block: 0, page }).encode(0);
    pages.into_iter().flat_map(request).collect()
}

#[test]
fn a_page_is_sent_once_and_one_that_is_not_dirty_never() {
    let Served { bitmap, in_flight, server, .. } =
        served(guest(PageSize::DEFAULT, vec![numbered(PAGES * 4096)]), 0b111);
    let (result, pages) = answered(server, requests([1, 1, 9, 299, 1]));
    result.unwrap();
    let page = 4096 + HEAD_BYTES;
    assert!((2 * page..2 * page + 200).contains(&pages.len()), "two pages: {} bytes", pages.len());
    let taken: Vec<_> = (0..PAGES).filter(|&page| !bitmap.is_set(PageAt { block: 0, page })).collect();
    assert_eq!(taken.len(), 61 + 2);
    assert!(taken.contains(&1) && taken.contains(&299) && !taken.contains(&2));
    assert_eq!(in_flight.pages(), 2, "they can be put back");
}

#[test]
fn requests_that_cannot_be_met_end_it_with_an_error() {
    let wrong = [
        requests([PAGES]),
        requests([u64::MAX]),
        Message::PageRequest(PageAt { block: 1, page: 0 }).encode(0).to_vec(),
        Message::Running.encode(0).to_vec(),
        requests([1])[..20].to_vec(),
        vec![0; 64],
    ];
    for sent in wrong {
        let Served { server, .. } = served(guest(PageSize::DEFAULT, vec![numbered(PAGES * 4096)]), u64::MAX);
        let (result, pages) = answered(server, sent);
        let error = result.unwrap_err();
        assert_eq!(error.stage, StageId::PAGE_SERVER);
        assert!(matches!(error.cause, Cause::Read(_)), "{error}");
        assert!(pages.is_empty());
    }
}

/// Threads of a guest touch memory of which every page is missing, and which pages are zero.
#[test]
fn threads_get_the_pages_that_they_touch() {
    if !crate::missing::tests::can_run() {
        return;
    }
    let source = numbered(PAGES * 4096);
    (0..PAGES).step_by(7).for_each(|page| source.write_zeros(PageSize::DEFAULT, page..page + 1).unwrap());
    let Served { memory, bitmap, server, .. } = served(guest(PageSize::DEFAULT, vec![source.clone()]), u64::MAX);
    let layout = memory.layout().clone();
    let there = mapped(PAGES * 4096);
    let missing =
        MissingMemory::register(&layout, vec![(0, there.clone())], DirtyBitmap::filled(&layout), Discards::Followed);
    let missing = missing.unwrap();
    let received = Arc::new(DirtyBitmap::empty(&layout));
    let (source_end, destination_end) = duplex(16 << 10);
    let touching = thread::spawn(move || {
        let read = |page: u64| {
            let mut bytes = vec![9; 4096];
            there.load(usize::try_from(page).unwrap() * 4096, &mut bytes);
            bytes
        };
        (0..PAGES).map(|page| read(page * 131 % PAGES)).collect::<Vec<_>>()
    });
    let (requests, pages) = split(source_end);
    let serving = async {
        server.run(FrameReader::new(requests, "requests".into(), PageSize::DEFAULT), pages).await.unwrap();
    };
    block_on(async { tokio::join!(serving, destination(destination_end, &layout, missing.clone(), received.clone())) });
    let found = touching.join().unwrap();
    for (page, bytes) in (0..PAGES).map(|page| page * 131 % PAGES).zip(found) {
        let mut right = vec![0; 4096];
        source.read_page(PageSize::DEFAULT, page, &mut right).unwrap();
        assert!(bytes == right, "page {page}");
    }
    assert_eq!((bitmap.count(), received.count()), (0, PAGES));
    let counts = missing.counts();
    assert_eq!((counts.requests, counts.placed, counts.duplicates), (PAGES, PAGES, 0));
}

/// The urgent stages of a destination, until every page has come.
async fn destination(end: DuplexStream, layout: &Layout, missing: Arc<MissingMemory>, received: Arc<DirtyBitmap>) {
    let (reader, writer): (ReadHalf<_>, WriteHalf<_>) = split(end);
    let lanes = LaneMap::new(2, PageSize::DEFAULT);
    let reader = FrameReader::new(reader, "pages".into(), PageSize::DEFAULT);
    let deframer = WireDeframer::urgent(reader, layout.clone(), lanes, FEATURES);
    let receiver = Receiver::new(2, deframer, BufferPool::new(2, PageSize::DEFAULT.extent_bytes()), meter());
    let (frames, arrived) = bounded::<Item<_>>(2);
    let (messages, _none) = bounded(1);
    let (loaded, _marks) = bounded(1);
    let loader = Loader::urgent(Place::new(missing.clone(), received), meter());
    let (received, loaded, asked) = tokio::join!(
        receiver.run(vec![Some(frames.clone()), Some(frames)], messages),
        loader.run(arrived, loaded),
        PageRequester::new(missing, meter()).run(writer),
    );
    received.and(loaded).and(asked).unwrap();
}
