//! The software log: its writers mark what they write.

use std::io;
use std::ops::Range;

use super::DirtyLog;
use crate::bitmap::DirtyBitmap;
use crate::geometry::Layout;

/// A log of what its writers [`mark`](DirtyLog::mark), and nothing else. A mark costs one atomic operation for
/// each extent it touches. It re-arms in sync: one swap takes the bits and makes room for the next marks.
///
/// # Example
/// ```
/// use memferry_stages::{bitmap::DirtyBitmap, dirty_log::{DirtyLog, SoftwareLog}};
/// # use memferry_stages::geometry::{BlockInfo, ExtentAt, Layout, PageSize};
/// # let ram = BlockInfo::new("ram", 1 << 20);
/// # let layout = Layout::new(PageSize::DEFAULT, vec![ram]).unwrap();
/// let (log, dirty) = (SoftwareLog::new(&layout), DirtyBitmap::empty(&layout));
/// log.start()?;
/// // A writer has stored into pages 65 and 66 of block 0, and marks them:
/// log.mark(0, 65..67);
/// log.sync(0, 0..2, &dirty)?;
/// assert_eq!(dirty.peek(ExtentAt { block: 0, extent: 1 }), 0b110);
/// # std::io::Result::Ok(())
/// ```
#[derive(Debug)]
pub struct SoftwareLog {
    pending: DirtyBitmap,
}

impl SoftwareLog {
    /// A log for the blocks of this layout.
    #[must_use]
    pub fn new(layout: &Layout) -> Self {
        Self { pending: DirtyBitmap::empty(layout) }
    }
}

impl DirtyLog for SoftwareLog {
    /// Discards the marks made so far: their stores are in memory, which is still to be read.
    fn start(&self) -> io::Result<()> {
        clear(&self.pending);
        Ok(())
    }

    fn sync(&self, block: u32, extents: Range<u32>, into: &DirtyBitmap) -> io::Result<()> {
        collect(&self.pending, block, extents, into);
        Ok(())
    }

    fn mark(&self, block: u32, pages: Range<u64>) {
        self.pending.set_range(block, pages);
    }

    fn memory_bytes(&self) -> u64 {
        self.pending.memory_bytes()
    }

    /// Discards every mark.
    fn stop(&self) -> io::Result<()> {
        clear(&self.pending);
        Ok(())
    }
}

/// Moves the bits of some extents from a log's own bitmap into another.
pub(super) fn collect(pending: &DirtyBitmap, block: u32, extents: Range<u32>, into: &DirtyBitmap) {
    for at in pending.dirty_extents(block, extents) {
        into.set_mask(at, pending.take(at));
    }
}

/// Clears a log's own bitmap.
pub(super) fn clear(pending: &DirtyBitmap) {
    for at in pending.all_dirty_extents() {
        let _forgotten = pending.take(at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{BlockInfo, PageSize};

    #[test]
    fn a_mark_is_found_once_and_a_stopped_log_forgets() {
        let block = |id: &str| BlockInfo::new(id, 1 << 20);
        let layout = Layout::new(PageSize::DEFAULT, vec![block("a"), block("b")]).unwrap();
        let (log, dirty) = (SoftwareLog::new(&layout), DirtyBitmap::empty(&layout));
        log.start().unwrap();
        log.mark(1, 60..70);
        log.sync(0, 0..4, &dirty).unwrap();
        log.sync(1, 0..1, &dirty).unwrap();
        assert_eq!(dirty.count(), 4);
        log.sync(1, 0..4, &dirty).unwrap();
        assert_eq!(dirty.count(), 10);
        assert_eq!(dirty.clear_range(1, 0..256), 10);
        log.sync(1, 0..4, &dirty).unwrap();
        log.mark(0, 0..256);
        log.stop().unwrap();
        log.sync(0, 0..4, &dirty).unwrap();
        assert_eq!(dirty.count(), 0);
    }
}
