//! The pages of a guest that runs at the destination, and that nothing waits for yet.
//!
//! A page that waits in a lane keeps a thread waiting that touches it: it left the bitmap, so it cannot be sent urgently. So from the
//! switch to postcopy on little is taken at a time, and no more before it is handed to the transport: at most [`WINDOW`] frames of [`PAGES`]
//! pages, 64 KiB of 4 KiB pages, are between the bitmap and the sockets, all lanes together. And the scan continues where a page was asked
//! for last: threads touch pages near each other.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

use crate::bitmap::DirtyBitmap;
use crate::geometry::ExtentAt;

/// Pages that are taken at once.
pub(super) const PAGES: u32 = 8;
/// Frames of such pages that are on their way to the sockets.
const WINDOW: u64 = 2;

/// What senders and the page server report to the scanner. Shared by them.
#[derive(Debug, Default)]
pub struct Background {
    /// Frames of pages that were handed to the transport.
    sent: AtomicU64,
    room: Notify,
    /// Where a page was asked for last, until the scan continues there.
    asked: Mutex<Option<ExtentAt>>,
}

impl Background {
    /// A frame of pages was handed to the transport.
    pub fn frame_sent(&self) {
        self.sent.fetch_add(1, Ordering::Release);
        self.room.notify_one();
    }

    /// A page of this extent was asked for.
    pub fn asked_for(&self, at: ExtentAt) {
        *self.asked.lock().unwrap_or_else(PoisonError::into_inner) = Some(at);
    }

    /// Frames that were sent so far.
    pub(super) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Acquire)
    }

    /// Waits until fewer than [`WINDOW`] frames are on their way, if `taken` were taken in all.
    pub(super) async fn room(&self, taken: u64) {
        while taken.saturating_sub(self.sent()) >= WINDOW {
            self.room.notified().await;
        }
    }

    /// The next extent with a dirty page: where one was asked for last, or else from `from` on, and around the end.
    pub(super) fn next(&self, bitmap: &DirtyBitmap, from: ExtentAt) -> Option<ExtentAt> {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner).take();
        next_dirty(bitmap, asked.unwrap_or(from))
    }
}

/// The next extent with a dirty page from `from` on, and around the end.
fn next_dirty(bitmap: &DirtyBitmap, from: ExtentAt) -> Option<ExtentAt> {
    let (blocks, extents) = (bitmap.layout().block_count(), |block| bitmap.layout().block_extents(block));
    let whole = |block| bitmap.dirty_extents(block, 0..extents(block)).next();
    let rest = bitmap.dirty_extents(from.block, from.extent..extents(from.block)).next();
    let behind = || (from.block + 1..blocks).find_map(whole);
    rest.or_else(behind).or_else(|| (0..=from.block).find_map(whole))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stage::testing::{block_on, layout, page_size};

    #[test]
    fn the_scan_continues_where_a_page_was_asked_for_and_around_the_end() {
        let bitmap = DirtyBitmap::empty(&layout(page_size(4), &[64 << 12, (3 * 64) << 12]));
        let at = |block, extent| ExtentAt { block, extent };
        let background = Background::default();
        assert_eq!(background.next(&bitmap, at(1, 1)), None);
        bitmap.set_mask(at(0, 0), 1);
        bitmap.set_mask(at(1, 1), 0b100);
        assert_eq!(background.next(&bitmap, at(0, 0)), Some(at(0, 0)));
        assert_eq!(background.next(&bitmap, at(1, 0)), Some(at(1, 1)));
        assert_eq!(background.next(&bitmap, at(1, 2)), Some(at(0, 0)), "around the end");
        background.asked_for(at(1, 1));
        assert_eq!(background.next(&bitmap, at(0, 0)), Some(at(1, 1)), "where a page was asked for");
        assert_eq!(background.next(&bitmap, at(0, 0)), Some(at(0, 0)), "once");
    }

    #[test]
    fn no_more_is_taken_than_the_window_holds() {
        use futures::FutureExt;
        let background = Background::default();
        background.frame_sent();
        assert!(background.room(WINDOW).now_or_never().is_some());
        assert!(background.room(WINDOW + 1).now_or_never().is_none());
        block_on(async {
            let sends = async {
                tokio::task::yield_now().await;
                background.frame_sent();
            };
            tokio::join!(background.room(WINDOW + 1), sends);
        });
    }
}
