//! The sinks for the memory of a guest that runs before all of its pages are there.

use std::sync::{Arc, OnceLock};

use super::direct::Direct;
use super::sink::{PageSink, SinkError};
use crate::batch::{Mark, page_hash};
use crate::bitmap::DirtyBitmap;
use crate::geometry::{ExtentAt, PageAt, PageSize, bits};
use crate::missing::MissingMemory;
use crate::page_hashes::PageHashes;
use crate::xbzrle::Delta;

/// Places pages that are missing, each once. The guest may run, and other sinks and threads may place pages of the same memory.
///
/// - A page that is there already is left as it is: another sink or thread has placed the same content.
/// - A page's bit in the received bitmap is set once it is placed (law 8).
/// - Memory is written through the [`MissingMemory`] alone.
/// - Deltas are refused: a page that is missing has no earlier version.
#[derive(Debug)]
pub struct Place {
    missing: Arc<MissingMemory>,
    received: Arc<DirtyBitmap>,
    page_hashes: Option<Arc<PageHashes>>,
}

impl Place {
    /// A sink for one lane. The bitmap `received` is shared by all lanes.
    #[must_use]
    pub fn new(missing: Arc<MissingMemory>, received: Arc<DirtyBitmap>) -> Self {
        Self { missing, received, page_hashes: None }
    }

    /// Records the hash of each page that is placed in `page_hashes`.
    #[must_use]
    pub fn with_page_hashes(mut self, page_hashes: Arc<PageHashes>) -> Self {
        self.page_hashes = Some(page_hashes);
        self
    }
}

impl PageSink for Place {
    fn page_size(&self) -> PageSize {
        self.missing.page_size()
    }

    fn wants_hashes(&self) -> bool {
        self.page_hashes.is_some()
    }

    fn begin(&mut self, at: ExtentAt, zero: u64, _others: u64) -> Result<(), SinkError> {
        if zero == 0 {
            return Ok(());
        }
        let placed = self.missing.place_zero(at, zero)?;
        self.received.set_mask(at, placed);
        if let Some(page_hashes) = &self.page_hashes {
            page_hashes.record(at, placed, placed, 0, []);
        }
        Ok(())
    }

    fn write(&mut self, at: ExtentAt, pages: u64, bytes: &[u8], hashes: &[u64]) -> Result<(), SinkError> {
        let placed = self.missing.place(at, pages, bytes)?;
        self.received.set_mask(at, placed);
        let Some(page_hashes) = &self.page_hashes else { return Ok(()) };
        let contents = bytes.chunks_exact(self.missing.page_size().bytes());
        let hash = |(index, (bit, page)): (usize, (u32, &[u8]))| {
            (placed >> bit & 1 == 1).then(|| hashes.get(index).copied().unwrap_or_else(|| page_hash(page)))
        };
        page_hashes.record(at, placed, 0, placed, bits(pages).zip(contents).enumerate().filter_map(hash));
        Ok(())
    }

    fn patch(&mut self, page: PageAt, _delta: &Delta<'_>) -> Result<(), SinkError> {
        Err(SinkError::Delta(page))
    }

    fn mark(&mut self, _mark: Mark) -> Result<(), SinkError> {
        Ok(())
    }
}

/// [`Direct`] until the lane's [`Mark::DirectEnds`], and [`Place`] after it: the sink of a lane that may switch to postcopy.
///
/// The missing memory exists only after the last sync, which is later than the mark. Pages that arrive between the two were not asked
/// for by anybody, and are refused as [`Direct`] does.
#[derive(Debug)]
pub struct Hybrid {
    direct: Direct,
    direct_ended: bool,
    switched: Arc<OnceLock<Arc<MissingMemory>>>,
    place: Option<Place>,
}

impl Hybrid {
    /// A sink for one lane. `switched` is shared by all lanes, and is set when pages may be placed.
    #[must_use]
    pub fn new(direct: Direct, switched: Arc<OnceLock<Arc<MissingMemory>>>) -> Self {
        Self { direct, direct_ended: false, switched, place: None }
    }

    /// The sink whose turn it is.
    fn sink(&mut self) -> &mut dyn PageSink {
        if self.direct_ended && self.place.is_none() {
            let Direct { received, page_hashes, .. } = &self.direct;
            let place = |missing: &Arc<MissingMemory>| Place {
                missing: missing.clone(),
                received: received.clone(),
                page_hashes: page_hashes.clone(),
            };
            self.place = self.switched.get().map(place);
        }
        match &mut self.place {
            Some(place) => place,
            None => &mut self.direct,
        }
    }
}

impl PageSink for Hybrid {
    fn page_size(&self) -> PageSize {
        self.direct.page_size()
    }

    fn wants_hashes(&self) -> bool {
        self.direct.wants_hashes()
    }

    fn begin(&mut self, at: ExtentAt, zero: u64, others: u64) -> Result<(), SinkError> {
        self.sink().begin(at, zero, others)
    }

    fn write(&mut self, at: ExtentAt, pages: u64, bytes: &[u8], hashes: &[u64]) -> Result<(), SinkError> {
        self.sink().write(at, pages, bytes, hashes)
    }

    fn patch(&mut self, page: PageAt, delta: &Delta<'_>) -> Result<(), SinkError> {
        self.sink().patch(page, delta)
    }

    fn mark(&mut self, mark: Mark) -> Result<(), SinkError> {
        self.direct_ended |= mark == Mark::DirectEnds;
        self.direct.mark(mark)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::PageSize;
    use crate::memory::{MappedMemory, Memory};
    use crate::missing::{Discards, PlaceError};
    use crate::stage::testing::guest;
    use crate::xbzrle::{Encoded, encode_page};

    const AT: ExtentAt = ExtentAt { block: 0, extent: 0 };

    /// Eight pages in a lane's sink.
    struct Scene {
        memory: Arc<MappedMemory>,
        received: Arc<DirtyBitmap>,
        hashes: Arc<PageHashes>,
        switched: Arc<OnceLock<Arc<MissingMemory>>>,
        sink: Hybrid,
    }

    fn scene() -> Scene {
        let memory = Arc::new(MappedMemory::anonymous(8 * 4096).unwrap());
        let guest = guest(PageSize::DEFAULT, vec![memory.clone()]);
        let received = Arc::new(DirtyBitmap::empty(guest.layout()));
        let hashes = Arc::new(PageHashes::new(guest.layout()));
        let direct = Direct::new(guest, received.clone()).with_page_hashes(hashes.clone());
        let switched = Arc::default();
        Scene { memory, received, hashes, sink: Hybrid::new(direct, Arc::clone(&switched)), switched }
    }

    impl Scene {
        /// The pages of the mask are dropped, and missing from here on.
        fn switch(&self, mask: u64) {
            let expected = DirtyBitmap::empty(self.received.layout());
            expected.set_mask(AT, mask);
            self.memory.discard(PageSize::DEFAULT, expected.page_runs(0)).unwrap();
            _ = self.received.take_mask(AT, mask);
            let blocks = vec![(0, self.memory.clone())];
            let layout = expected.layout().clone();
            let missing = MissingMemory::register(&layout, blocks, expected, Discards::Excluded).unwrap();
            self.switched.set(missing).unwrap();
        }

        fn page(&self, page: u64) -> Vec<u8> {
            let mut bytes = vec![9; 4096];
            self.memory.read_page(PageSize::DEFAULT, page, &mut bytes).unwrap();
            bytes
        }
    }

    #[test]
    fn pages_are_written_over_until_direct_ends_and_then_only_placed() {
        if !crate::missing::tests::can_run() {
            return;
        }
        let mut scene = scene();
        scene.sink.write(AT, 0b11, &[5; 2 * 4096], &[]).unwrap();
        scene.sink.write(AT, 0b1, &[6; 4096], &[]).unwrap();
        scene.sink.mark(Mark::DirectEnds).unwrap();
        assert!(matches!(scene.sink.begin(AT, 0, 0b10), Err(SinkError::DirectEnded)));
        scene.switch(0b1110);
        assert_eq!(scene.received.peek(AT), 0b1);
        assert!(matches!(
            scene.sink.write(AT, 0b1, &[7; 4096], &[]),
            Err(SinkError::Place(PlaceError::NotExpected(PageAt { block: 0, page: 0 })))
        ));
        scene.sink.write(AT, 0b110, &[[7; 4096], [8; 4096]].concat(), &[70, 80]).unwrap();
        assert_eq!(scene.received.peek(AT), 0b111);
        scene.sink.write(AT, 0b100, &[9; 4096], &[90]).unwrap();
        scene.sink.begin(AT, 0b1000, 0).unwrap();
        assert_eq!(scene.received.peek(AT), 0b1111);
        assert_eq!([0, 1, 2, 3].map(|page| scene.page(page)), [6, 7, 8, 0].map(|byte| vec![byte; 4096]));
        let hashes = scene.hashes.of_stretch(0, 0, &[0; 8]);
        assert_eq!(hashes[..4], [page_hash(&[6; 4096]), 70, 80, page_hash(&[0; 4096])], "duplicates record nothing");
    }

    #[test]
    fn deltas_are_refused_once_pages_are_placed() {
        if !crate::missing::tests::can_run() {
            return;
        }
        let mut scene = scene();
        let page = PageAt { block: 0, page: 0 };
        let mut changed = [5; 4096];
        changed[0] = 4;
        let mut out = [0; 4096];
        let Encoded::Delta(length) = encode_page(&[5; 4096], &changed, &mut out) else { panic!("a small delta") };
        let delta = Delta::parse(&out[..length], 4096).unwrap();
        scene.sink.write(AT, 0b1, &[5; 4096], &[]).unwrap();
        scene.sink.patch(page, &delta).unwrap();
        scene.sink.mark(Mark::DirectEnds).unwrap();
        scene.switch(0b10);
        assert!(matches!(scene.sink.patch(page, &delta), Err(SinkError::Delta(found)) if found == page));
        assert_eq!(scene.page(0), changed);
    }
}
