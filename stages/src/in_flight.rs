//! What the scanner took and the destination has not acknowledged.

use crate::batch::Batch;
use crate::bitmap::DirtyBitmap;

/// The pages on their way, lane by lane in the order they were taken.
#[derive(Debug)]
pub struct InFlight {}

impl InFlight {
    /// Nothing on its way in `lanes` lanes.
    #[must_use]
    pub fn new(lanes: u16) -> Self {
        todo!()
    }

    /// A batch goes into a lane: one frame more.
    pub fn record(&self, lane: u16, batch: &Batch) {
        todo!()
    }

    /// The destination has loaded the first `frames_total` Pages frames of a lane.
    ///
    /// # Errors
    /// The number of frames that were taken for the lane, if the peer says that it has loaded more.
    pub fn acknowledge(&self, lane: u16, frames_total: u64) -> Result<(), u64> {
        todo!()
    }

    /// Everything taken so far has arrived.
    pub fn acknowledge_all(&self) {
        todo!()
    }

    /// Pages on their way; one that is under way twice counts twice.
    #[must_use]
    pub fn pages(&self) -> u64 {
        todo!()
    }

    /// Gives the bits of all that is on its way back to the bitmap.
    pub fn put_back(&self, bitmap: &DirtyBitmap) {
        todo!()
    }
}
