//! How the bytes of a page are coded.

use std::fmt;

use crate::geometry::PageSize;

/// How a page's bytes are coded. The number is on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PageEncoding {
    /// The page as it is.
    Raw = 1,
    /// Snappy, raw format.
    Snap = 2,
    /// LZ4 block.
    Lz4 = 3,
    /// A Zstandard frame.
    Zstd = 4,
    /// A delta against what the destination holds.
    Xbzrle = 5,
    /// In the group of the last compressed page before it.
    Grouped = 6,
}

impl PageEncoding {
    /// The encoding of a byte, if this version knows it.
    #[must_use]
    pub fn from_u8(byte: u8) -> Option<Self> {
        let known = [Self::Raw, Self::Snap, Self::Lz4, Self::Zstd, Self::Xbzrle, Self::Grouped];
        known.into_iter().find(|&known| known as u8 == byte)
    }

    /// Does a page in this encoding begin a group?
    #[must_use]
    pub fn is_codec(self) -> bool {
        matches!(self, Self::Snap | Self::Lz4 | Self::Zstd)
    }

    /// The least and the most bytes that a page has in this encoding, if it is the first of a group of `group` pages.
    pub(super) fn page_bytes(self, page_size: PageSize, group: u32) -> (u32, u32) {
        let page = u32::try_from(page_size.bytes()).expect("at most 64 KiB");
        match self {
            Self::Raw => (page, page),
            Self::Snap | Self::Lz4 | Self::Zstd => (1, group * page - 1),
            Self::Xbzrle => (1, page),
            Self::Grouped => (0, 0),
        }
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
