//! The pages that never travel, as each end finds them: unplugged, or of ignored blocks.

use std::ops::Range;

use memferry_stages::exclusions::ExclusionReason;
use memferry_stages::geometry::Layout;

use crate::guest::GuestError;
use crate::guest::hints::BlockPages;

/// All such pages with their block, for a guest whose page hinters report these as unplugged.
///
/// # Errors
/// When some are not pages of the guest, which is the guest's error.
pub fn excluded_ranges(
    layout: &Layout,
    unplugged: Vec<BlockPages>,
) -> Result<Vec<(ExclusionReason, u32, Range<u64>)>, GuestError> {
    for (block, pages) in &unplugged {
        let has = if *block < layout.block_count() { layout.block_pages(*block) } else { 0 };
        if pages.end > has {
            return Err(GuestError(format!("pages {pages:?} of block {block} are unplugged, and it has {has}")));
        }
    }
    let unplugged = unplugged.into_iter().map(|(block, pages)| (ExclusionReason::Unplugged, block, pages));
    let ignored = (0..).zip(layout.blocks()).filter(|(_, block)| block.ignored);
    let ignored = ignored.map(|(block, _)| (ExclusionReason::Ignored, block, 0..layout.block_pages(block)));
    Ok(unplugged.chain(ignored).collect())
}
