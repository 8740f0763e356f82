//! The pages in flight: bits that the scanner took and the destination has not acknowledged, and that can still be put back.
//!
//! A bit that was taken from the bitmap stays here until the destination acknowledges the frame of its page. Each batch becomes
//! one frame, in the order of the lane, so the acknowledged count of frames identifies them. The controller counts pages in flight
//! as remaining; a recovery puts them back into the bitmap.
//!
//! Its memory is bounded, whatever the destination acknowledges: when a lane's list is full, its entries are folded into a bitmap
//! that has room for every page. Folded pages count as in flight until the latest of their frames is acknowledged. That may
//! send a page again but never loses one.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, OnceLock};

use crate::batch::Batch;
use crate::bitmap::{DirtyBitmap, locate};
use crate::geometry::{ExtentAt, LaneMap, Layout, PageAt};

/// The least number of entries of a lane's list: more than are taken between two acknowledgements.
const LEAST_ROOM: usize = 16384;
/// All lists together have room for at least one entry for this many extents of the guest.
const EXTENTS_PER_ENTRY: u64 = 8;

/// The pages in flight, lane by lane in the order they were taken. Shared by the scanner and the reader of the return
/// path; locked for each batch and each acknowledgement.
#[derive(Debug)]
pub struct InFlight {
    layout: Layout,
    lane_map: LaneMap,
    /// Entries that a lane's list has room for.
    room: usize,
    lanes: Box<[Mutex<Lane>]>,
    /// The folded pages of all lanes, which have disjoint extents. Allocated when it is needed.
    folded: OnceLock<DirtyBitmap>,
    /// Pages that were taken urgently: they travel outside of the lanes, and are acknowledged one by one. Allocated when it is
    /// needed.
    urgent: OnceLock<DirtyBitmap>,
}

impl InFlight {
    /// Nothing in flight in the lanes of the map.
    #[must_use]
    pub fn new(layout: &Layout, lane_map: LaneMap) -> Self {
        Self::with_room(layout, lane_map, room(layout, lane_map.lanes()))
    }

    fn with_room(layout: &Layout, lane_map: LaneMap, room: usize) -> Self {
        let lanes = (0..lane_map.lanes()).map(|_| Mutex::default()).collect();
        Self { layout: layout.clone(), lane_map, room, lanes, folded: OnceLock::new(), urgent: OnceLock::new() }
    }

    /// The most bytes it takes in a migration of such a guest over `lanes` lanes. Where pages are taken urgently,
    /// [`DirtyBitmap::bytes_of`] it more.
    #[must_use]
    pub fn bound_bytes(layout: &Layout, lanes: u16) -> u64 {
        DirtyBitmap::bytes_of(layout) + u64::from(lanes) * (room(layout, lanes) * size_of::<Taken>()) as u64
    }

    /// The most bytes of memory that it has taken. It does not release them.
    ///
    /// # Panics
    /// As [`InFlight::pages`].
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        let lists: usize = self.each_lane().map(|lane| lane.list.capacity() * size_of::<Taken>()).sum();
        let bitmaps = [&self.folded, &self.urgent].into_iter().filter_map(OnceLock::get);
        bitmaps.map(DirtyBitmap::memory_bytes).sum::<u64>() + lists as u64
    }

    /// Adds a batch to a lane, as one more frame.
    ///
    /// # Panics
    /// If `lane` is not that of the batch's extent.
    pub fn record(&self, lane: u16, batch: &Batch) {
        debug_assert_eq!(self.lane_map.lane(batch.at), lane, "the lane of {:?}", batch.at);
        let mut here = self.lane(lane);
        if here.list.len() == self.room {
            here.fold(self.folded.get_or_init(|| DirtyBitmap::empty(&self.layout)));
        }
        here.record(batch.at, batch.mask);
    }

    /// Adds the pages of a batch that does not travel in a lane.
    pub fn record_urgent(&self, batch: &Batch) {
        let urgent = self.urgent.get_or_init(|| DirtyBitmap::empty(&self.layout));
        let added = urgent.set_mask(batch.at, batch.mask);
        debug_assert_eq!(added, batch.mask, "each page is sent at most once");
    }

    /// Notes that the destination has placed a page that was taken urgently. False if none such is in flight.
    ///
    /// # Panics
    /// If there is no such page.
    #[must_use]
    pub fn acknowledge_urgent(&self, page: PageAt) -> bool {
        let (at, mask) = locate(page);
        self.urgent.get().is_some_and(|urgent| urgent.take_mask(at, mask) != 0)
    }

    /// Takes all pages that were taken urgently for sent: once the guest runs at the destination, that reports which pages it has.
    pub fn forget_urgent(&self) {
        self.urgent
            .get()
            .into_iter()
            .flat_map(|urgent| urgent.all_dirty_extents().map(move |at| urgent.take(at)))
            .for_each(drop);
    }

    /// Notes that the destination has loaded the first `frames_total` Pages frames of a lane. A count below an earlier one has no
    /// effect.
    ///
    /// # Errors
    /// The number of frames that were taken for the lane, if the peer acknowledges more.
    ///
    /// # Panics
    /// If there is no such lane.
    pub fn acknowledge(&self, lane: u16, frames_total: u64) -> Result<(), u64> {
        let mut here = self.lane(lane);
        here.acknowledge(frames_total)?;
        if here.folded_frame.is_some_and(|frame| frame <= frames_total) {
            self.unfold(lane, &mut here, |_, _| ());
        }
        Ok(())
    }

    /// Notes that everything taken so far has arrived: a file is durable up to this point.
    pub fn acknowledge_all(&self) {
        self.take_all(|_, _| ());
    }

    /// The number of pages in flight. A page that is in flight twice may count twice: it is sent twice.
    #[must_use]
    pub fn pages(&self) -> u64 {
        let urgent = self.urgent.get().map_or(0, DirtyBitmap::count);
        urgent + self.each_lane().map(|lane| lane.pages + lane.folded_pages).sum::<u64>()
    }

    /// Puts the bits of all pages in flight back into the bitmap, to be sent again. Nothing is in flight afterwards.
    ///
    /// # Panics
    /// If the bitmap is of another layout than the one the bits were taken from.
    pub fn put_back(&self, bitmap: &DirtyBitmap) {
        self.take_all(|at, mask| _ = bitmap.set_mask(at, mask));
    }

    fn take_all(&self, mut taken: impl FnMut(ExtentAt, u64)) {
        for (lane, mut here) in (0..).zip(self.each_lane()) {
            self.unfold(lane, &mut here, &mut taken);
            here.pages = 0;
            here.list.drain(..).for_each(|Taken { at, mask, .. }| taken(at, mask));
        }
        if let Some(urgent) = self.urgent.get() {
            urgent.all_dirty_extents().for_each(|at| taken(at, urgent.take(at)));
        }
    }

    /// Removes the folded pages of a lane.
    fn unfold(&self, lane: u16, here: &mut Lane, mut taken: impl FnMut(ExtentAt, u64)) {
        let Some(folded) = self.folded.get().filter(|_| here.folded_frame.take().is_some()) else { return };
        here.folded_pages = 0;
        for at in folded.all_dirty_extents().filter(|&at| self.lane_map.lane(at) == lane) {
            taken(at, folded.take(at));
        }
    }

    fn lane(&self, lane: u16) -> MutexGuard<'_, Lane> {
        lock(&self.lanes[usize::from(lane)])
    }

    fn each_lane(&self) -> impl Iterator<Item = MutexGuard<'_, Lane>> {
        self.lanes.iter().map(lock)
    }
}

/// The number of entries of each of `lanes` lists: a power of two, as lists grow.
fn room(layout: &Layout, lanes: u16) -> usize {
    let extents: u64 = (0..layout.block_count()).map(|block| u64::from(layout.block_extents(block))).sum();
    let share = extents / EXTENTS_PER_ENTRY / u64::from(lanes);
    usize::try_from(share).expect("they fit memory").next_power_of_two().max(LEAST_ROOM)
}

fn lock(lane: &Mutex<Lane>) -> MutexGuard<'_, Lane> {
    lane.lock().expect("no holder of this lock panics")
}

/// The pages of one extent, and the frame they went into (the lane's first is 1).
#[derive(Debug)]
struct Taken {
    frame: u64,
    at: ExtentAt,
    mask: u64,
}

/// The pages of one lane in flight.
#[derive(Debug, Default)]
struct Lane {
    /// By frame.
    list: VecDeque<Taken>,
    frames: u64,
    /// The number of pages in the list.
    pages: u64,
    /// The latest folded frame, if there is one.
    folded_frame: Option<u64>,
    folded_pages: u64,
}

impl Lane {
    fn record(&mut self, at: ExtentAt, mask: u64) {
        self.frames += 1;
        self.pages += u64::from(mask.count_ones());
        self.list.push_back(Taken { frame: self.frames, at, mask });
    }

    fn acknowledge(&mut self, frames: u64) -> Result<(), u64> {
        if frames > self.frames {
            return Err(self.frames);
        }
        while let Some(taken) = self.list.pop_front_if(|taken| taken.frame <= frames) {
            self.pages -= u64::from(taken.mask.count_ones());
        }
        Ok(())
    }

    /// Empties the list.
    fn fold(&mut self, into: &DirtyBitmap) {
        for Taken { at, mask, .. } in self.list.drain(..) {
            self.folded_pages += u64::from(into.set_mask(at, mask).count_ones());
        }
        self.pages = 0;
        self.folded_frame = Some(self.frames);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::geometry::{PageSize, bits};
    use crate::stage::testing::{batch, layout, page_size, words};

    const LANES: u16 = 2;
    /// Three stretches: two of lane 0, one of lane 1.
    const EXTENTS: u32 = 24;

    fn in_flight(room: usize) -> InFlight {
        InFlight::with_room(&guest(), LaneMap::new(LANES, PageSize::DEFAULT), room)
    }

    fn guest() -> Layout {
        layout(page_size(4), &[u64::from(EXTENTS) << 18])
    }

    fn lane(extent: u32) -> u16 {
        u16::from((8..16).contains(&extent))
    }

    /// A simple model of the lists: every frame with its pages, and how many arrived, by lane.
    #[derive(Default)]
    struct Naive {
        frames: [Vec<(u32, u64)>; LANES as usize],
        arrived: [usize; LANES as usize],
    }

    impl Naive {
        fn words(frames: impl Iterator<Item = (u32, u64)>) -> Vec<u64> {
            let mut words = vec![0; EXTENTS as usize];
            frames.for_each(|(extent, mask)| words[extent as usize] |= mask);
            words
        }

        fn on_their_way(&self) -> impl Iterator<Item = (u32, u64)> {
            self.frames.iter().zip(self.arrived).flat_map(|(frames, arrived)| frames[arrived..].iter().copied())
        }
    }

    fn put_back(in_flight: &InFlight) -> Vec<u64> {
        let bitmap = DirtyBitmap::empty(&guest());
        in_flight.put_back(&bitmap);
        words(&bitmap)
    }

    /// (extent, mask) of a batch that is taken, or an acknowledgement: of a lane, a share of what is in flight.
    type Step = Result<(u32, u64), (u16, u8)>;

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let taken = (0..EXTENTS, 1..=u64::MAX).prop_map(Ok);
        prop::collection::vec(prop_oneof![4 => taken, 1 => (0..LANES, any::<u8>()).prop_map(Err)], 0..200)
    }

    /// Both after the same steps.
    fn both_after(steps: &[Step], room: usize) -> (InFlight, Naive) {
        let (in_flight, mut naive) = (in_flight(room), Naive::default());
        for step in steps {
            match *step {
                Ok((extent, mask)) => {
                    in_flight.record(lane(extent), &batch(extent, mask, 1));
                    naive.frames[usize::from(lane(extent))].push((extent, mask));
                }
                Err((lane, share)) => {
                    let (frames, arrived) =
                        (naive.frames[usize::from(lane)].len(), &mut naive.arrived[usize::from(lane)]);
                    *arrived += (frames - *arrived) * usize::from(share) / 255;
                    in_flight.acknowledge(lane, *arrived as u64).unwrap();
                }
            }
        }
        (in_flight, naive)
    }

    proptest! {
        #[test]
        fn what_is_on_its_way_is_what_was_taken_and_not_acknowledged(steps in steps()) {
            let (in_flight, naive) = both_after(&steps, LEAST_ROOM);
            let pages: u32 = naive.on_their_way().map(|(_, mask)| mask.count_ones()).sum();
            prop_assert_eq!(in_flight.pages(), u64::from(pages));
            prop_assert_eq!(put_back(&in_flight), Naive::words(naive.on_their_way()));
            prop_assert_eq!((in_flight.pages(), put_back(&in_flight)), (0, vec![0; EXTENTS as usize]));
        }

        #[test]
        fn a_list_that_is_full_stays_so_loses_nothing_and_invents_nothing(steps in steps(), room in 1..20usize) {
            let (in_flight, naive) = both_after(&steps, room);
            prop_assert!(in_flight.each_lane().all(|lane| lane.list.len() <= room));
            let counted = in_flight.pages();
            let (kept, wanted) = (put_back(&in_flight), Naive::words(naive.on_their_way()));
            let ever = Naive::words(naive.frames.iter().flatten().copied());
            prop_assert!(counted >= kept.iter().map(|word| u64::from(word.count_ones())).sum());
            for extent in 0..EXTENTS as usize {
                prop_assert_eq!(wanted[extent] & !kept[extent], 0, "lost from extent {}", extent);
                prop_assert_eq!(kept[extent] & !ever[extent], 0, "invented in extent {}", extent);
            }
            if naive.frames.iter().zip(naive.arrived).all(|(frames, arrived)| frames.len() == arrived) {
                prop_assert_eq!(counted, 0, "everything has arrived");
            }
        }
    }

    #[test]
    fn what_is_folded_arrives_with_its_latest_frame() {
        let in_flight = in_flight(3);
        let record = |extent, mask| in_flight.record(lane(extent), &batch(extent, mask, 1));
        [(0, 1), (1, 1), (0, 0b11), (8, 1), (2, 1)].into_iter().for_each(|(extent, mask)| record(extent, mask));
        assert_eq!(in_flight.pages(), 5, "one page of extent 0 went twice, and is folded into one");
        in_flight.acknowledge(0, 2).unwrap();
        assert_eq!(in_flight.pages(), 5, "all that is folded waits for frame 3");
        in_flight.acknowledge(0, 3).unwrap();
        assert_eq!(in_flight.pages(), 2);
        let left = put_back(&in_flight);
        assert_eq!([2, 8].map(|extent| bits(left[extent]).collect::<Vec<_>>()), [[0], [0]]);
        assert!(in_flight.memory_bytes() <= InFlight::bound_bytes(&guest(), LANES));
    }

    #[test]
    fn a_peer_that_has_loaded_more_than_was_sent_is_caught() {
        let in_flight = in_flight(10);
        in_flight.record(1, &batch(8, 1, 1));
        assert_eq!(in_flight.acknowledge(1, 2), Err(1));
        assert_eq!(in_flight.acknowledge(0, 1), Err(0));
        assert_eq!(in_flight.pages(), 1);
        assert_eq!((in_flight.acknowledge(1, 1), in_flight.acknowledge(1, 0)), (Ok(()), Ok(())));
        assert_eq!(in_flight.pages(), 0);
    }

    #[test]
    fn acknowledging_all_empties_every_lane_and_counting_continues() {
        let in_flight = in_flight(1);
        [0, 8, 9].into_iter().for_each(|extent| in_flight.record(lane(extent), &batch(extent, 7, 1)));
        in_flight.acknowledge_all();
        assert_eq!(in_flight.pages(), 0);
        in_flight.record(0, &batch(2, 1, 1));
        assert_eq!((in_flight.acknowledge(0, 1), in_flight.pages()), (Ok(()), 1), "frame 1 arrived long ago");
        assert_eq!((in_flight.acknowledge(0, 2), in_flight.pages()), (Ok(()), 0));
    }
}
