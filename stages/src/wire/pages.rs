//! The Pages frame: the dirty pages of one extent.
//!
//! ```text
//! body
//! ┌─────────┬──────────┬─────────┬────────────────┬────────┬────────┬────────────────┐
//! │ block 4 │ extent 4 │ round 4 │ payload bytes 4│ mask 8 │ zero 8 │ payload xxh3 8 │
//! ├─────────┴──────────┴─────────┴────────────────┴────────┴────────┴────────────────┤
//! │ descriptors: 4 bytes for each bit of mask & !zero, lowest bit first              │
//! │              encoding (8 bits) | payload bytes of the page << 8 (24 bits)        │
//! ├───────────────────────────────────────────────────────────────────────────────────┤
//! │ xxh3-64 of all of the body before it   8                                          │
//! ├───────────────────────────────────────────────────────────────────────────────────┤
//! │ payload: the pages' bytes, in the order of the descriptors                        │
//! └───────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! `mask` holds the pages that the frame brings (an unchanged page is in neither mask), `zero` those of them that are
//! all zero. Pages may be compressed together as a *group*: the first of them names the codec and the bytes of the whole, and
//! the others follow as `grouped`, with no bytes of their own. They need not be adjacent, in the extent or in the list:
//!
//! ```text
//! page          3          4         5            6          9         12         13
//! descriptor   lz4 6000   raw 4096   grouped 0    grouped 0  zstd 900  grouped 0  raw 4096
//!               └──────────────────── one group ──────┘       └─ another ─┘
//! payload      6000 bytes: pages 3, 5, 6 │ page 4 │ 900 bytes: pages 9, 12 │ page 13
//! ```
//!
//! A group has at most [`GROUP_BYTES`](crate::batch::GROUP_BYTES) of pages, and fewer bytes than its pages; a compressed page without followers is a
//! group of one. Groups need the `page-groups` feature.
//!
//! The payload's hash is 0 where the `payload-xxh3` feature is off. It is the xxh3-64 of the xxh3-64s of the payload's parts, in order:
//! the bytes of each raw page, delta and group. So a raw page's hash serves its frame and verification. One frame is sent for each batch, even if
//! it brings no page: the count of frames in a lane is what Progress acknowledges.

use xxhash_rust::xxh3::xxh3_64;

use super::encoding::{from_number, number, page_bytes};
use super::error::WireError;
use super::fields::{Fields, within};
use super::frame::{FrameHead, HEAD_BYTES};
use super::kind::Kind;
use super::limits::{CHECKSUM_BYTES, DESCRIPTOR_BYTES};
pub use super::limits::{FIXED_BYTES, MAX_HEAD_BYTES, MIN_HEAD_BYTES};
use crate::batch::{Arrived, PageEncoding, group_pages, page_hash, parts, payload_hash};
use crate::geometry::{ExtentAt, Layout, PageSize, bits};

/// Bytes before the payload, computed from the masks of the fixed part.
#[must_use]
pub fn head_bytes(fixed: &[u8; FIXED_BYTES]) -> usize {
    let word = |at: usize| u64::from_le_bytes(fixed[at..at + 8].try_into().expect("8 bytes"));
    let (mask, zero) = (word(16), word(24));
    MIN_HEAD_BYTES + (mask & !zero).count_ones() as usize * DESCRIPTOR_BYTES
}

/// The part of a Pages frame before its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagesHead {
    /// The extent.
    pub at: ExtentAt,
    /// The round, from 1.
    pub round: u32,
    /// Pages that the frame brings.
    pub mask: u64,
    /// Those of `mask` that are all zero.
    pub zero: u64,
    /// The [`payload_hash`], or 0.
    pub payload_hash: u64,
    /// For each page of `mask & !zero`, lowest first: its encoding and the bytes it has in the payload (all bytes of a group
    /// at its first page).
    pub pages: Vec<(PageEncoding, u32)>,
}

impl PagesHead {
    /// Bytes of the payload: the sum of the pages'.
    #[must_use]
    pub fn payload_bytes(&self) -> usize {
        self.pages.iter().map(|&(_, bytes)| bytes as usize).sum()
    }

    /// With the hash of this payload, made of its parts: raw pages, deltas, groups.
    ///
    /// # Panics
    /// If the payload does not have the bytes of the pages.
    #[must_use]
    pub fn with_hash_of(mut self, payload: &[u8]) -> Self {
        assert_eq!(payload.len(), self.payload_bytes(), "the bytes of its pages");
        let pages = self.pages.iter().map(|&(encoding, bytes)| (encoding, bytes as usize));
        self.payload_hash = payload_hash(parts(pages, payload).map(|(_, bytes)| page_hash(bytes)));
        self
    }

    /// The frame's head and the body up to the payload, as they precede it on the wire.
    ///
    /// # Panics
    /// If `zero` has a page that `mask` has not, `pages` is not one for each page of `mask & !zero`, or `lane` is not below
    /// [`crate::geometry::MAX_LANES`].
    #[must_use]
    pub fn to_bytes(&self, lane: u16) -> bytes::Bytes {
        assert_eq!(self.zero & !self.mask, 0, "zero pages outside the mask");
        assert_eq!((self.mask & !self.zero).count_ones() as usize, self.pages.len(), "a descriptor for each page");
        let payload = u32::try_from(self.payload_bytes()).expect("an extent is at most 4 MiB");
        let head_bytes = MIN_HEAD_BYTES + self.pages.len() * DESCRIPTOR_BYTES;
        let length = u32::try_from(head_bytes).expect("a few hundred") + payload;
        let mut out = Vec::with_capacity(HEAD_BYTES + head_bytes);
        out.extend(FrameHead::new(Kind::Pages, lane, length).to_bytes());
        for field in [self.at.block, self.at.extent, self.round, payload] {
            out.extend(field.to_le_bytes());
        }
        for field in [self.mask, self.zero, self.payload_hash] {
            out.extend(field.to_le_bytes());
        }
        for &(encoding, bytes) in &self.pages {
            out.extend((u32::from(number(encoding)) | bytes << 8).to_le_bytes());
        }
        let checksum = xxh3_64(&out[HEAD_BYTES..]);
        out.extend(checksum.to_le_bytes());
        out.into()
    }

    /// Reads a body up to its payload (`bytes` is that part and no more) and checks all of it against the layout: block,
    /// extent, masks within the block, descriptors that add up to the payload length, raw pages of exactly a page.
    ///
    /// # Errors
    /// [`WireError`] with what is wrong and both figures.
    pub fn parse(bytes: &[u8], frame_length: u32, layout: &Layout) -> Result<Self, WireError> {
        let short = WireError::Short { field: "the head of a Pages frame", needs: MIN_HEAD_BYTES, left: bytes.len() };
        let (checked, checksum) = bytes.split_last_chunk::<CHECKSUM_BYTES>().ok_or(short)?;
        if xxh3_64(checked) != u64::from_le_bytes(*checksum) {
            return Err(WireError::BodyChecksum { kind: Kind::Pages });
        }
        let mut fields = Fields::new(checked);
        let at = ExtentAt { block: fields.u32("block")?, extent: fields.u32("extent")? };
        let round = fields.u32("round")?;
        let payload = fields.u32("payload bytes")?;
        let [mask, zero, payload_hash] =
            [fields.u64("mask")?, fields.u64("zero mask")?, fields.u64("hash of the payload")?];
        within("round", round.into(), 1..=u32::MAX.into())?;
        check_masks(at, mask, zero, layout)?;
        let pages = take_descriptors(&mut fields, at, mask & !zero)?;
        fields.end()?;
        check_pages(at, mask & !zero, &pages, layout.page_size())?;
        let head = Self { at, round, mask, zero, payload_hash, pages };
        head.check_lengths(payload, bytes.len(), frame_length)?;
        Ok(head)
    }

    /// The batch of the frame that began at `offset`, without its payload. `checksum`: whether the stream has hashes.
    #[must_use]
    pub fn into_arrived(self, checksum: bool, offset: u64) -> Arrived {
        let Self { at, round, mask, zero, payload_hash, pages } = self;
        let mut end = 0;
        let place = |(encoding, bytes)| {
            let start = end;
            end += bytes;
            (encoding, start..end)
        };
        let pages = pages.into_iter().map(place).collect();
        Arrived { at, round, mask, zero, pages, payload_hash: checksum.then_some(payload_hash), payload: None, offset }
    }

    fn check_lengths(&self, payload: u32, head_bytes: usize, frame_length: u32) -> Result<(), WireError> {
        let sum = self.payload_bytes() as u64;
        if sum != u64::from(payload) {
            return Err(WireError::PayloadSum { sum, payload });
        }
        let parts = head_bytes as u64 + sum;
        if parts == u64::from(frame_length) {
            Ok(())
        } else {
            Err(WireError::FrameLength { length: frame_length, parts })
        }
    }
}

fn check_masks(at: ExtentAt, mask: u64, zero: u64, layout: &Layout) -> Result<(), WireError> {
    let blocks = layout.block_count();
    if at.block >= blocks {
        return Err(WireError::NoBlock { block: at.block, blocks });
    }
    if layout.blocks()[at.block as usize].ignored {
        return Err(WireError::IgnoredBlock { block: at.block });
    }
    let extents = layout.block_extents(at.block);
    if at.extent >= extents {
        return Err(WireError::NoExtent { at, extents });
    }
    let valid = layout.valid_mask(at);
    if mask & !valid != 0 {
        return Err(WireError::BeyondBlock { at, mask, valid });
    }
    if zero & !mask != 0 { Err(WireError::ZeroOutside { zero, mask }) } else { Ok(()) }
}

fn take_descriptors(
    fields: &mut Fields<'_>,
    at: ExtentAt,
    present: u64,
) -> Result<Vec<(PageEncoding, u32)>, WireError> {
    let mut pages = Vec::with_capacity(present.count_ones() as usize);
    for bit in bits(present) {
        let [encoding, bytes @ ..] = fields.array::<DESCRIPTOR_BYTES>("descriptors")?;
        let [b0, b1, b2] = bytes;
        let (page, bytes) = (at.page(bit), u32::from_le_bytes([b0, b1, b2, 0]));
        let encoding = from_number(encoding).ok_or(WireError::UnknownEncoding { page, encoding })?;
        pages.push((encoding, bytes));
    }
    Ok(pages)
}

/// Checks that each page has as many bytes as its encoding allows, and each group as many pages.
fn check_pages(
    at: ExtentAt,
    present: u64,
    pages: &[(PageEncoding, u32)],
    page_size: PageSize,
) -> Result<(), WireError> {
    let (most_pages, mut open) = (group_pages(page_size), false);
    for (index, (bit, &(encoding, bytes))) in bits(present).zip(pages).enumerate() {
        let (page, mut group) = (at.page(bit), 1);
        if encoding.is_codec() {
            group = group_of(&pages[index..]);
            open = true;
        } else if encoding == PageEncoding::Grouped && !open {
            return Err(WireError::NoGroup { page });
        }
        if group > most_pages {
            return Err(WireError::GroupPages { page, pages: group, most: most_pages });
        }
        let (least, most) = page_bytes(encoding, page_size, u32::try_from(group).expect("at most 16"));
        if !(least..=most).contains(&bytes) {
            return Err(WireError::PageBytes { page, encoding, bytes, least, most });
        }
    }
    Ok(())
}

/// How many pages are in the group that begins a list.
fn group_of(pages: &[(PageEncoding, u32)]) -> usize {
    let followers = pages[1..].iter().take_while(|(encoding, _)| !encoding.is_codec());
    1 + followers.filter(|(encoding, _)| *encoding == PageEncoding::Grouped).count()
}
