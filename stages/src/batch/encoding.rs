//! How the bytes of a page are coded, whatever stream carries them.

use std::fmt;

use crate::geometry::PageSize;

/// The most bytes of pages that are compressed as one group; a larger page is a group of its own.
pub const GROUP_BYTES: usize = 64 << 10;

/// The most pages of one group.
#[must_use]
pub fn group_pages(page_size: PageSize) -> usize {
    (GROUP_BYTES / page_size.bytes()).max(1)
}

/// How a page's bytes are coded. A dialect gives it a number of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageEncoding {
    /// The page itself.
    Raw,
    /// Snappy, raw format.
    Snap,
    /// LZ4 block.
    Lz4,
    /// A Zstandard frame.
    Zstd,
    /// A delta against what the destination holds.
    Xbzrle,
    /// In the group of the last compressed page before it.
    Grouped,
}

impl PageEncoding {
    /// Every encoding.
    pub const ALL: [Self; 6] = [Self::Raw, Self::Snap, Self::Lz4, Self::Zstd, Self::Xbzrle, Self::Grouped];

    /// Whether a page in this encoding begins a group.
    #[must_use]
    pub fn is_codec(self) -> bool {
        matches!(self, Self::Snap | Self::Lz4 | Self::Zstd)
    }
}

impl fmt::Display for PageEncoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Snap => "snap",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
            Self::Xbzrle => "xbzrle",
            Self::Grouped => "grouped",
        })
    }
}
