//! The numbers of page encodings in memferry's stream, and the bounds of their bytes.

use super::hello::Features;
use crate::batch::PageEncoding;
use crate::geometry::PageSize;

/// The number of an encoding.
pub(super) fn number(encoding: PageEncoding) -> u8 {
    match encoding {
        PageEncoding::Raw => 1,
        PageEncoding::Snap => 2,
        PageEncoding::Lz4 => 3,
        PageEncoding::Zstd => 4,
        PageEncoding::Xbzrle => 5,
        PageEncoding::Grouped => 6,
    }
}

/// The encoding of a number, if this version knows it.
pub(super) fn from_number(byte: u8) -> Option<PageEncoding> {
    PageEncoding::ALL.into_iter().find(|&known| number(known) == byte)
}

/// The least and the most bytes that a page has in this encoding, if it is the first of a group of `group` pages.
pub(super) fn page_bytes(encoding: PageEncoding, page_size: PageSize, group: u32) -> (u32, u32) {
    let page = u32::try_from(page_size.bytes()).expect("at most 64 KiB");
    match encoding {
        PageEncoding::Raw => (page, page),
        PageEncoding::Snap | PageEncoding::Lz4 | PageEncoding::Zstd => (1, group * page - 1),
        PageEncoding::Xbzrle => (1, page),
        PageEncoding::Grouped => (0, 0),
    }
}

/// Whether a stream with these features may have pages in this encoding.
pub(super) fn is_agreed(encoding: PageEncoding, features: &Features) -> bool {
    match encoding {
        PageEncoding::Raw => true,
        PageEncoding::Snap => features.snap,
        PageEncoding::Lz4 => features.lz4,
        PageEncoding::Zstd => features.zstd,
        PageEncoding::Xbzrle => features.xbzrle,
        PageEncoding::Grouped => features.groups,
    }
}
