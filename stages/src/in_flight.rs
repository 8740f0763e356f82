//! What the scanner took and the destination has not acknowledged: the bits that can still be given back.
//!
//! A bit that was taken from the bitmap stands here until the destination says that it has loaded the frame it went into.
//! One frame is made of each batch, in the order of the lane, so a count of frames says which. The controller counts what
//! is here into what remains to be sent; a recovery gives it back to the bitmap.
//!
//! It is bounded, whatever the destination acknowledges: when a lane's list has grown to its limit, batches of the same
//! extent are merged into the latest of them. Their pages then count as on their way until that one is acknowledged, which
//! may send a page again but never loses one. No more than one entry for each extent is left, and the limit is twice that.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

use crate::batch::Batch;
use crate::bitmap::DirtyBitmap;
use crate::geometry::ExtentAt;

/// Entries that a lane may have before any are merged.
const FIRST_LIMIT: usize = 4096;

/// The pages on their way, lane by lane in the order they were taken. Shared by the scanner and whoever reads the return
/// path; locked for each batch and each acknowledgement.
#[derive(Debug)]
pub struct InFlight {
    lanes: Box<[Mutex<Lane>]>,
}

impl InFlight {
    /// Nothing on its way in `lanes` lanes.
    #[must_use]
    pub fn new(lanes: u16) -> Self {
        Self::with_limit(lanes, FIRST_LIMIT)
    }

    fn with_limit(lanes: u16, limit: usize) -> Self {
        Self { lanes: (0..lanes).map(|_| Mutex::new(Lane::new(limit))).collect() }
    }

    /// The most bytes it takes in a migration of so many extents.
    #[must_use]
    pub fn bound_bytes(&self, extents: u64) -> u64 {
        let entries = 2 * extents + (self.lanes.len() * FIRST_LIMIT) as u64;
        entries * size_of::<Taken>() as u64
    }

    /// A batch goes into a lane: one frame more.
    ///
    /// # Panics
    /// If there is no such lane.
    pub fn record(&self, lane: u16, batch: &Batch) {
        self.lane(lane).record(batch.at, batch.mask);
    }

    /// The destination has loaded the first `frames_total` Pages frames of a lane. Fewer than it said before says nothing.
    ///
    /// # Errors
    /// The number of frames that were taken for the lane, if the peer says that it has loaded more.
    ///
    /// # Panics
    /// If there is no such lane.
    pub fn acknowledge(&self, lane: u16, frames_total: u64) -> Result<(), u64> {
        self.lane(lane).acknowledge(frames_total)
    }

    /// Everything taken so far has arrived: a file is durable up to here.
    pub fn acknowledge_all(&self) {
        for mut lane in self.each_lane() {
            drop(lane.take_all());
        }
    }

    /// Pages on their way. One that is on its way twice may count twice: it is sent twice.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.each_lane().map(|lane| lane.pages).sum()
    }

    /// Gives the bits of all that is on its way back to the bitmap, where they are sent again; nothing is on its way then.
    ///
    /// # Panics
    /// If the bitmap is of another layout than the one the bits were taken from.
    pub fn put_back(&self, bitmap: &DirtyBitmap) {
        for mut lane in self.each_lane() {
            for taken in lane.take_all() {
                bitmap.set_mask(taken.at, taken.mask);
            }
        }
    }

    fn lane(&self, lane: u16) -> MutexGuard<'_, Lane> {
        lock(&self.lanes[usize::from(lane)])
    }

    fn each_lane(&self) -> impl Iterator<Item = MutexGuard<'_, Lane>> {
        self.lanes.iter().map(lock)
    }
}

fn lock(lane: &Mutex<Lane>) -> MutexGuard<'_, Lane> {
    lane.lock().expect("no holder of this lock panics")
}

/// The pages of one extent, and the latest frame they went into (the lane's first is 1).
#[derive(Debug)]
struct Taken {
    frame: u64,
    at: ExtentAt,
    mask: u64,
}

/// One lane's list, by frame.
#[derive(Debug)]
struct Lane {
    list: VecDeque<Taken>,
    frames: u64,
    pages: u64,
    limit: usize,
}

impl Lane {
    fn new(limit: usize) -> Self {
        Self { list: VecDeque::new(), frames: 0, pages: 0, limit }
    }

    fn record(&mut self, at: ExtentAt, mask: u64) {
        if self.list.len() == self.limit {
            self.merge();
        }
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

    fn take_all(&mut self) -> impl Iterator<Item = Taken> {
        self.pages = 0;
        std::mem::take(&mut self.list).into_iter()
    }

    /// Leaves one entry for each extent, and room for as many again.
    fn merge(&mut self) {
        let mut list = Vec::from(std::mem::take(&mut self.list));
        list.sort_unstable_by_key(|taken| (taken.at, taken.frame));
        list.dedup_by(|later, earlier| {
            let same = later.at == earlier.at;
            if same {
                earlier.frame = later.frame;
                earlier.mask |= later.mask;
            }
            same
        });
        list.sort_unstable_by_key(|taken| taken.frame);
        self.limit = self.limit.max(2 * list.len());
        list.reserve_exact(self.limit - list.len());
        self.pages = list.iter().map(|taken| u64::from(taken.mask.count_ones())).sum();
        self.list = list.into();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::geometry::{BlockInfo, Layout, PageSize, bits};

    const EXTENTS: u32 = 8;

    fn layout() -> Layout {
        let block = BlockInfo { id: "ram".into(), length: 8 << 18, guest_address: 0, backing_page_size: 4096 };
        Layout::new(PageSize::DEFAULT, vec![block]).unwrap()
    }

    fn batch(extent: u32, mask: u64) -> Batch {
        Batch { at: ExtentAt { block: 0, extent }, mask, untouched: 0, round: 1, last: false }
    }

    /// What the lists amount to, kept as simply as can be: every frame with its pages, and how many arrived.
    #[derive(Default)]
    struct Naive {
        frames: Vec<(u32, u64)>,
        arrived: usize,
    }

    impl Naive {
        fn words(&self, frames: &[(u32, u64)]) -> [u64; EXTENTS as usize] {
            let mut words = [0; EXTENTS as usize];
            frames.iter().for_each(|&(extent, mask)| words[extent as usize] |= mask);
            words
        }

        fn on_their_way(&self) -> [u64; EXTENTS as usize] {
            self.words(&self.frames[self.arrived..])
        }
    }

    fn put_back(in_flight: &InFlight) -> [u64; EXTENTS as usize] {
        let bitmap = DirtyBitmap::empty(&layout());
        in_flight.put_back(&bitmap);
        std::array::from_fn(|extent| bitmap.peek(ExtentAt { block: 0, extent: u32::try_from(extent).unwrap() }))
    }

    /// (extent, mask) of a batch that is taken, or an acknowledgement of a share of what is on its way.
    type Step = Result<(u32, u64), u8>;

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let taken = (0..EXTENTS, 1..=u64::MAX).prop_map(Ok);
        prop::collection::vec(prop_oneof![4 => taken, 1 => any::<u8>().prop_map(Err)], 0..200)
    }

    /// Both after the same steps in one lane.
    fn both_after(steps: &[Step], limit: usize) -> (InFlight, Naive) {
        let (in_flight, mut naive) = (InFlight::with_limit(1, limit), Naive::default());
        for step in steps {
            match *step {
                Ok((extent, mask)) => {
                    in_flight.record(0, &batch(extent, mask));
                    naive.frames.push((extent, mask));
                }
                Err(share) => {
                    naive.arrived += (naive.frames.len() - naive.arrived) * usize::from(share) / 255;
                    in_flight.acknowledge(0, naive.arrived as u64).unwrap();
                }
            }
        }
        (in_flight, naive)
    }

    proptest! {
        #[test]
        fn what_is_on_its_way_is_what_was_taken_and_not_acknowledged(steps in steps()) {
            let (in_flight, naive) = both_after(&steps, FIRST_LIMIT);
            let pages: u32 = naive.frames[naive.arrived..].iter().map(|(_, mask)| mask.count_ones()).sum();
            prop_assert_eq!(in_flight.pages(), u64::from(pages));
            prop_assert_eq!(put_back(&in_flight), naive.on_their_way());
            prop_assert_eq!((in_flight.pages(), put_back(&in_flight)), (0, [0; EXTENTS as usize]));
        }

        #[test]
        fn a_merged_list_stays_short_loses_nothing_and_invents_nothing(steps in steps()) {
            let (in_flight, naive) = both_after(&steps, 2);
            let entries = in_flight.lane(0).list.len();
            prop_assert!(entries <= 2 * EXTENTS as usize, "{entries} entries for {EXTENTS} extents");
            let (kept, wanted, ever) = (put_back(&in_flight), naive.on_their_way(), naive.words(&naive.frames));
            for extent in 0..EXTENTS as usize {
                prop_assert_eq!(wanted[extent] & !kept[extent], 0, "lost from extent {}", extent);
                prop_assert_eq!(kept[extent] & !ever[extent], 0, "invented in extent {}", extent);
            }
        }
    }

    #[test]
    fn merged_entries_arrive_with_the_latest_frame_of_their_extent() {
        let in_flight = InFlight::with_limit(1, 3);
        [(0, 1), (1, 1), (0, 2), (2, 1)].iter().for_each(|&(extent, mask)| in_flight.record(0, &batch(extent, mask)));
        assert_eq!(in_flight.pages(), 4);
        in_flight.acknowledge(0, 2).unwrap();
        assert_eq!(in_flight.pages(), 3, "both pages of extent 0 wait for frame 3");
        in_flight.acknowledge(0, 3).unwrap();
        assert_eq!(bits(put_back(&in_flight)[2]).collect::<Vec<_>>(), [0]);
    }

    #[test]
    fn a_peer_that_has_loaded_more_than_was_sent_is_caught() {
        let in_flight = InFlight::new(2);
        in_flight.record(1, &batch(0, 1));
        assert_eq!(in_flight.acknowledge(1, 2), Err(1));
        assert_eq!(in_flight.acknowledge(0, 1), Err(0));
        assert_eq!(in_flight.pages(), 1);
        assert_eq!((in_flight.acknowledge(1, 1), in_flight.acknowledge(1, 0)), (Ok(()), Ok(())));
        assert_eq!(in_flight.pages(), 0);
    }

    #[test]
    fn acknowledging_all_empties_every_lane_and_counting_goes_on() {
        let in_flight = InFlight::new(2);
        in_flight.record(0, &batch(0, 7));
        in_flight.record(1, &batch(1, 7));
        in_flight.acknowledge_all();
        assert_eq!(in_flight.pages(), 0);
        in_flight.record(0, &batch(2, 1));
        assert_eq!((in_flight.acknowledge(0, 1), in_flight.pages()), (Ok(()), 1), "frame 1 arrived long ago");
        assert_eq!((in_flight.acknowledge(0, 2), in_flight.pages()), (Ok(()), 0));
    }
}
