//! Where a page is: RAM blocks, pages, extents, stretches and lanes.
//!
//! ```text
//! guest   = RAM blocks, numbered from 0 in the order the guest names them
//! block   = pages of one size; the last page may be partial (a file of any length)
//! extent  = 64 pages: one word of the dirty bitmap, one batch, at most one Pages frame
//! stretch = the larger of 2 MiB and one extent: the unit that is assigned to a lane, and that one digest covers
//! ```
//!
//! A [`Layout`] is the checked list of blocks. It is built once from the guest's blocks (or those that the peer sent) and
//! computes every size and place afterwards, so no stage does this arithmetic itself.

use std::fmt;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::untrusted::Untrusted;

/// Pages of one extent: the bits of one bitmap word.
pub const EXTENT_PAGES: u64 = 64;
/// The least size of a stretch, in bytes.
pub const STRETCH_BYTES: u64 = 2 << 20;
/// The longest id of a RAM block, in bytes of UTF-8.
pub const MAX_BLOCK_ID: usize = 255;
/// The most RAM blocks a guest may have.
pub const MAX_BLOCKS: usize = 1024;
/// The most lanes a migration may have.
pub const MAX_LANES: u16 = 64;

/// The size of a page: a power of two from 4 KiB to 64 KiB, one for all blocks of a guest.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageSize(u32);

impl PageSize {
    /// 4 KiB, the default.
    pub const DEFAULT: Self = Self(4096);

    /// A page size of `bytes`, or `None` unless it is a power of two from 4 KiB to 64 KiB.
    #[must_use]
    pub fn new(bytes: u64) -> Option<Self> {
        let fits = (4096..=65536).contains(&bytes) && bytes.is_power_of_two();
        fits.then(|| Self(u32::try_from(bytes).expect("at most 65536")))
    }

    /// Bytes of one page.
    #[must_use]
    pub fn bytes(self) -> usize {
        self.0 as usize
    }

    /// Bytes of one extent.
    #[must_use]
    pub fn extent_bytes(self) -> usize {
        self.bytes() << EXTENT_PAGES.trailing_zeros()
    }

    /// Extents of one stretch.
    #[must_use]
    pub fn stretch_extents(self) -> u64 {
        (STRETCH_BYTES / self.extent_bytes() as u64).max(1)
    }

    /// Bytes of one stretch.
    #[must_use]
    pub fn stretch_bytes(self) -> u64 {
        self.stretch_extents() * self.extent_bytes() as u64
    }
}

/// As the number of its bytes.
impl Serialize for PageSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(self.0)
    }
}

impl<'de> Deserialize<'de> for PageSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = u32::deserialize(deserializer)?;
        Self::new(bytes.into()).ok_or_else(|| D::Error::custom(format_args!("there are no pages of {bytes} bytes")))
    }
}

impl fmt::Debug for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} B", self.0)
    }
}

/// The description of a RAM block, on which guest and peer agree. Travels in the Blocks frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockInfo {
    /// Name, unique in the guest: 1 to [`MAX_BLOCK_ID`] bytes.
    pub id: Untrusted,
    /// True length in bytes; need not be a multiple of the page size.
    pub length: u64,
    /// Address in the guest's physical memory, in bytes; 0 where it has none.
    pub guest_address: u64,
    /// Bytes of the pages that back the block on its host (4 KiB, 2 MiB, …); informative.
    pub backing_page_size: u64,
    /// Whether both ends share this memory already (a file that both have mapped). Then none of its pages ever travels, and the
    /// destination only checks that its block is that of the source: id, length and guest address.
    pub ignored: bool,
}

impl BlockInfo {
    /// A block that is sent, of memory in pages of 4 KiB at address 0. Other values are set with the update syntax.
    ///
    /// ```
    /// # use memferry_stages::geometry::BlockInfo;
    /// let high = BlockInfo { guest_address: 4 << 30, ..BlockInfo::new("high", 1 << 30) };
    /// # assert_eq!((high.length, high.backing_page_size, high.ignored), (1 << 30, 4096, false));
    /// ```
    #[must_use]
    pub fn new(id: impl Into<Untrusted>, length: u64) -> Self {
        Self { id: id.into(), length, guest_address: 0, backing_page_size: 4096, ignored: false }
    }
}

/// A page of the guest, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageAt {
    /// Index of the block in the layout.
    pub block: u32,
    /// Number of the page in the block.
    pub page: u64,
}

impl fmt::Display for PageAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {} of block {}", self.page, self.block)
    }
}

/// An extent of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExtentAt {
    /// Index of the block in the layout.
    pub block: u32,
    /// Number of the extent in the block.
    pub extent: u32,
}

impl ExtentAt {
    /// The first page of the extent, as a number in its block.
    #[must_use]
    pub fn first_page(self) -> u64 {
        u64::from(self.extent) * EXTENT_PAGES
    }

    /// The page at `bit` of the extent's mask.
    #[must_use]
    pub fn page(self, bit: u32) -> PageAt {
        PageAt { block: self.block, page: self.first_page() + u64::from(bit) }
    }
}

/// Why a list of blocks is not a layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A guest needs memory.
    #[error("there are no RAM blocks")]
    NoBlocks,
    /// More than [`MAX_BLOCKS`].
    #[error("{0} RAM blocks, at most {MAX_BLOCKS} are supported")]
    TooManyBlocks(usize),
    /// The id is empty or longer than [`MAX_BLOCK_ID`].
    #[error("RAM block {index}: an id has 1 to {MAX_BLOCK_ID} bytes, this one has {bytes}")]
    IdLength {
        /// Index of the block.
        index: usize,
        /// Length of its id.
        bytes: usize,
    },
    /// Two blocks of one name.
    #[error("two RAM blocks have the id {0:?}")]
    DuplicateId(Untrusted),
    /// Empty, or too many extents for 32 bits.
    #[error("RAM block {id:?} is {length} bytes long: a block has 1 byte to 2^32 extents")]
    Length {
        /// Id of the block.
        id: Untrusted,
        /// Its length in bytes.
        length: u64,
    },
}

/// The RAM blocks of a guest, checked, with their page size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    page_size: PageSize,
    blocks: Vec<BlockInfo>,
}

impl Layout {
    /// Checks the blocks: names, number, lengths.
    ///
    /// # Errors
    /// A [`LayoutError`] that names the invalid block.
    pub fn new(page_size: PageSize, blocks: Vec<BlockInfo>) -> Result<Self, LayoutError> {
        if blocks.is_empty() {
            return Err(LayoutError::NoBlocks);
        }
        if blocks.len() > MAX_BLOCKS {
            return Err(LayoutError::TooManyBlocks(blocks.len()));
        }
        let mut ids = std::collections::HashSet::new();
        for (index, block) in blocks.iter().enumerate() {
            if !(1..=MAX_BLOCK_ID).contains(&block.id.len()) {
                return Err(LayoutError::IdLength { index, bytes: block.id.len() });
            }
            if !ids.insert(&block.id) {
                return Err(LayoutError::DuplicateId(block.id.clone()));
            }
            let extents = block.length.div_ceil(page_size.extent_bytes() as u64);
            if block.length == 0 || extents > u64::from(u32::MAX) {
                return Err(LayoutError::Length { id: block.id.clone(), length: block.length });
            }
        }
        Ok(Self { page_size, blocks })
    }

    /// The page size of every block.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The blocks, by index.
    #[must_use]
    pub fn blocks(&self) -> &[BlockInfo] {
        &self.blocks
    }

    /// Bytes of all blocks.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.length).sum()
    }

    /// Pages of all blocks.
    #[must_use]
    pub fn pages(&self) -> u64 {
        (0..self.block_count()).map(|block| self.block_pages(block)).sum()
    }

    /// How many blocks there are.
    #[must_use]
    pub fn block_count(&self) -> u32 {
        u32::try_from(self.blocks.len()).expect("at most MAX_BLOCKS")
    }

    /// Pages of one block, the partial last one included.
    ///
    /// # Panics
    /// If there is no such block.
    #[must_use]
    pub fn block_pages(&self, block: u32) -> u64 {
        self.blocks[block as usize].length.div_ceil(self.page_size.bytes() as u64)
    }

    /// Extents of one block, the partial last one included.
    ///
    /// # Panics
    /// If there is no such block.
    #[must_use]
    pub fn block_extents(&self, block: u32) -> u32 {
        u32::try_from(self.block_pages(block).div_ceil(EXTENT_PAGES)).expect("checked when built")
    }

    /// Stretches of one block, the partial last one included.
    ///
    /// # Panics
    /// If there is no such block.
    #[must_use]
    pub fn block_stretches(&self, block: u32) -> u64 {
        u64::from(self.block_extents(block)).div_ceil(self.page_size.stretch_extents())
    }

    /// The extents of a stretch, in order; none beyond the end of its block.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn stretch_extents(&self, block: u32, stretch: u64) -> impl Iterator<Item = ExtentAt> + use<> {
        let extents = self.page_size.stretch_extents();
        let first = stretch * extents;
        let end = (first + extents).min(self.block_extents(block).into());
        (first..end).map(move |extent| ExtentAt { block, extent: u32::try_from(extent).expect("of the block") })
    }

    /// The bits of an extent that stand for pages: all ones except in a block's last extent. 0 for an extent or a block
    /// that does not exist, so it can check what a peer sent.
    #[must_use]
    pub fn valid_mask(&self, at: ExtentAt) -> u64 {
        if at.block >= self.block_count() {
            return 0;
        }
        let left = self.block_pages(at.block).saturating_sub(at.first_page());
        if left >= EXTENT_PAGES { u64::MAX } else { (1 << left) - 1 }
    }

    /// Bytes of a page that belong to the block: the page size, less in a partial last page.
    ///
    /// # Panics
    /// If there is no such block.
    #[must_use]
    pub fn page_bytes(&self, at: PageAt) -> usize {
        let start = at.page * self.page_size.bytes() as u64;
        let left = self.blocks[at.block as usize].length.saturating_sub(start);
        usize::try_from(left).unwrap_or(usize::MAX).min(self.page_size.bytes())
    }
}

/// Assigns memory to lanes by address: lane = (stretch + block) mod lanes. Part of the protocol (ARCHITECTURE.md, law 4: a page
/// keeps its lane).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneMap {
    lanes: u16,
    stretch_extents: u64,
}

impl LaneMap {
    /// A map for `lanes` lanes, 1 to [`MAX_LANES`].
    ///
    /// # Panics
    /// If `lanes` is out of range.
    #[must_use]
    pub fn new(lanes: u16, page_size: PageSize) -> Self {
        assert!((1..=MAX_LANES).contains(&lanes), "{lanes} lanes");
        Self { lanes, stretch_extents: page_size.stretch_extents() }
    }

    /// How many lanes there are.
    #[must_use]
    pub fn lanes(self) -> u16 {
        self.lanes
    }

    /// The lane of an extent.
    #[must_use]
    pub fn lane(self, at: ExtentAt) -> u16 {
        let stretch = u64::from(at.extent) / self.stretch_extents;
        u16::try_from((stretch + u64::from(at.block)) % u64::from(self.lanes)).expect("less than lanes")
    }
}

/// Which bulk connection carries each lane: both ends follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BulkMap {
    lanes: u16,
    bulk: u16,
}

impl BulkMap {
    /// A map for `lanes` lanes on the connections 0 to `bulk` - 1; connections of other roles follow them and carry no lane.
    ///
    /// # Panics
    /// If there is no bulk connection, or there are more of them than lanes.
    #[must_use]
    pub fn new(lanes: u16, bulk: u16) -> Self {
        assert!((1..=lanes).contains(&bulk), "{bulk} bulk connections for {lanes} lanes");
        Self { lanes, bulk }
    }

    /// The connection that carries a lane.
    #[must_use]
    pub fn connection(self, lane: u16) -> u16 {
        lane % self.bulk
    }

    /// How many lanes a connection carries.
    #[must_use]
    pub fn lanes_of(self, connection: u16) -> u16 {
        let lanes = (0..self.lanes).filter(|&lane| self.connection(lane) == connection).count();
        u16::try_from(lanes).expect("some of the lanes")
    }
}

/// The positions of the set bits of a mask, lowest first.
#[must_use]
pub fn bits(mask: u64) -> Bits {
    Bits(mask)
}

/// See [`bits`].
#[derive(Clone, Debug)]
pub struct Bits(u64);

impl Iterator for Bits {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        if self.0 == 0 {
            return None;
        }
        let bit = self.0.trailing_zeros();
        self.0 &= self.0 - 1;
        Some(bit)
    }
}

/// The runs of set bits of a mask as (first bit, length), lowest first.
pub fn runs(mask: u64) -> impl Iterator<Item = (u32, u32)> {
    let mut left = mask;
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let first = left.trailing_zeros();
        let length = (left >> first).trailing_ones();
        left &= !(run_mask(first, length));
        Some((first, length))
    })
}

/// The mask of `length` bits from `first` on; `first + length` is at most 64.
#[must_use]
pub fn run_mask(first: u32, length: u32) -> u64 {
    debug_assert!(first + length <= 64);
    if length == 0 { 0 } else { (u64::MAX >> (64 - length)) << first }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_sizes_are_powers_of_two_from_4_to_64_kib() {
        let good: Vec<u64> = (0..=(1 << 17)).filter(|&bytes| PageSize::new(bytes).is_some()).collect();
        assert_eq!(good, [4096, 8192, 16384, 32768, 65536]);
        assert_eq!(PageSize::new(1 << 40), None);
    }

    #[test]
    fn a_stretch_is_two_mebibytes_or_one_extent() {
        let sizes = [4096, 32768, 65536].map(|bytes| PageSize::new(bytes).unwrap().stretch_bytes());
        assert_eq!(sizes, [2 << 20, 2 << 20, 4 << 20]);
    }

    #[test]
    fn partial_pages_and_extents_are_counted() {
        let layout =
            Layout::new(PageSize::DEFAULT, vec![BlockInfo::new("a", 64 * 4096 + 1), BlockInfo::new("b", 7)]).unwrap();
        assert_eq!((layout.block_pages(0), layout.block_extents(0)), (65, 2));
        assert_eq!(layout.valid_mask(ExtentAt { block: 0, extent: 0 }), u64::MAX);
        assert_eq!(layout.valid_mask(ExtentAt { block: 0, extent: 1 }), 1);
        assert_eq!(layout.valid_mask(ExtentAt { block: 0, extent: 2 }), 0);
        assert_eq!(layout.valid_mask(ExtentAt { block: 2, extent: 0 }), 0);
        assert_eq!(layout.page_bytes(PageAt { block: 0, page: 64 }), 1);
        assert_eq!(layout.page_bytes(PageAt { block: 0, page: 0 }), 4096);
        assert_eq!((layout.bytes(), layout.pages()), (64 * 4096 + 8, 66));
    }

    #[test]
    fn bad_layouts_are_refused() {
        let refuse = |blocks| Layout::new(PageSize::DEFAULT, blocks).unwrap_err();
        assert_eq!(refuse(vec![]), LayoutError::NoBlocks);
        assert!(matches!(refuse(vec![BlockInfo::new("", 1)]), LayoutError::IdLength { .. }));
        assert!(matches!(refuse(vec![BlockInfo::new("a", 1), BlockInfo::new("a", 2)]), LayoutError::DuplicateId(_)));
        assert!(matches!(refuse(vec![BlockInfo::new("a", 0)]), LayoutError::Length { .. }));
        assert!(matches!(refuse(vec![BlockInfo::new("a", u64::MAX)]), LayoutError::Length { .. }));
    }

    #[test]
    fn stretches_are_dealt_in_turn_and_blocks_start_on_different_lanes() {
        let map = LaneMap::new(3, PageSize::DEFAULT);
        let lane = |block, extent| map.lane(ExtentAt { block, extent });
        assert_eq!([0, 7, 8, 16, 24].map(|extent| lane(0, extent)), [0, 0, 1, 2, 0]);
        assert_eq!([0, 8].map(|extent| lane(1, extent)), [1, 2]);
    }

    #[test]
    fn lanes_are_on_bulk_connections_alone() {
        let map = BulkMap::new(5, 2);
        assert_eq!([0, 1, 2, 3, 4].map(|lane| map.connection(lane)), [0, 1, 0, 1, 0]);
        assert_eq!([0, 1, 2].map(|connection| map.lanes_of(connection)), [3, 2, 0]);
    }

    #[test]
    fn runs_and_bits_cover_a_mask() {
        let mask = 0x8000_0000_0000_f00d;
        assert_eq!(bits(mask).collect::<Vec<_>>(), [0, 2, 3, 12, 13, 14, 15, 63]);
        assert_eq!(runs(mask).collect::<Vec<_>>(), [(0, 1), (2, 2), (12, 4), (63, 1)]);
        assert_eq!(runs(u64::MAX).collect::<Vec<_>>(), [(0, 64)]);
        assert_eq!(runs(0).count(), 0);
        assert_eq!(run_mask(0, 64), u64::MAX);
    }
}
