//! A batch that arrived, as a dialect's deframer gives it.

use std::ops::Range;

use super::{PageEncoding, page_hash, parts, payload_hash};
use crate::geometry::{ExtentAt, PageAt, bits, run_mask};
use crate::pool::PooledBuffer;

/// A batch that was received and checked, except for the content of its payload.
#[derive(Debug)]
pub struct Arrived {
    /// The extent.
    pub at: ExtentAt,
    /// The round, from 1.
    pub round: u32,
    /// Pages that the batch brings. They lie in the layout.
    pub mask: u64,
    /// Those of `mask` that are all zero.
    pub zero: u64,
    /// For each page of `mask & !zero`, lowest first: its encoding, which was agreed on, and where its bytes lie in the payload.
    /// The bytes follow each other without a gap. A group's bytes belong to its first page, and the others have none.
    pub pages: Vec<(PageEncoding, Range<u32>)>,
    /// The [`payload_hash`] that the payload must have, where the stream has hashes.
    pub payload_hash: Option<u64>,
    /// The pages' bytes; `None` if there are none, or if they are not read yet.
    pub payload: Option<PooledBuffer>,
    /// Where the batch began, in bytes from the start of its stream.
    pub offset: u64,
}

impl Arrived {
    /// Bytes that the pages have in the payload.
    #[must_use]
    pub fn payload_bytes(&self) -> usize {
        self.pages.last().map_or(0, |(_, range)| range.end as usize)
    }

    /// Checks that this is the payload that was sent, where the stream has hashes, and lists the hashes of its raw pages in `raw`,
    /// which are computed for that. An empty payload cannot be damaged.
    ///
    /// # Errors
    /// [`PageFault::PayloadHash`] if it is not.
    ///
    /// # Panics
    /// If the payload does not have [`payload_bytes`](Self::payload_bytes).
    pub fn check_payload(&self, payload: &[u8], raw: &mut Vec<u64>) -> Result<(), PageFault> {
        assert_eq!(payload.len(), self.payload_bytes(), "the bytes of its pages");
        raw.clear();
        let Some(expected) = self.payload_hash.filter(|_| !payload.is_empty()) else { return Ok(()) };
        let found = payload_hash(self.parts(payload).map(|(encoding, bytes)| {
            let hash = page_hash(bytes);
            raw.extend((encoding == PageEncoding::Raw).then_some(hash));
            hash
        }));
        if found == expected { Ok(()) } else { Err(PageFault::PayloadHash { expected, found }) }
    }

    /// Lists the hashes of the raw pages in `raw`, where the check of the payload has not done so.
    pub(crate) fn hash_raw(&self, payload: &[u8], raw: &mut Vec<u64>) {
        if self.payload_hash.is_none() {
            let pages = self.parts(payload).filter(|(encoding, _)| *encoding == PageEncoding::Raw);
            raw.extend(pages.map(|(_, page)| page_hash(page)));
        }
    }

    fn parts<'a>(&self, payload: &'a [u8]) -> impl Iterator<Item = (PageEncoding, &'a [u8])> {
        parts(self.pages.iter().map(|(encoding, range)| (*encoding, range.len())), payload)
    }

    /// The pieces of its payload, in the order of the pages.
    ///
    /// A page that carries bytes starts a piece. Adjacent raw pages join its piece, so that one call writes them; pages marked
    /// `grouped` belong to the compressed page before them, wherever they lie, and have no bytes of their own.
    pub(crate) fn pieces<'a>(&'a self, payload: &'a [u8]) -> impl Iterator<Item = Piece<'a>> {
        let mut pages = bits(self.mask & !self.zero).zip(&self.pages).peekable();
        std::iter::from_fn(move || {
            let (first, (encoding, range)) = pages.find(|(_, (encoding, _))| *encoding != PageEncoding::Grouped)?;
            let (encoding, mut count, mut end) = (*encoding, 1, range.end);
            while encoding == PageEncoding::Raw
                && let Some((_, (_, next))) =
                    pages.next_if(|&(bit, (next, _))| *next == encoding && bit == first + count)
            {
                count += 1;
                end = next.end;
            }
            let followers = pages.clone().take_while(|(_, (next, _))| encoding.is_codec() && !next.is_codec());
            let grouped = followers.filter(|(_, (next, _))| *next == PageEncoding::Grouped);
            let mask = grouped.fold(run_mask(first, count), |mask, (bit, _)| mask | 1 << bit);
            Some(Piece { mask, encoding, bytes: &payload[range.start as usize..end as usize] })
        })
    }
}

/// The unit of a loader's step: a delta, adjacent raw pages, or the pages of a group.
#[derive(Debug)]
pub(crate) struct Piece<'a> {
    /// Which pages of the extent.
    pub(crate) mask: u64,
    pub(crate) encoding: PageEncoding,
    pub(crate) bytes: &'a [u8],
}

impl Piece<'_> {
    /// Its first page.
    pub(crate) fn page(&self, at: ExtentAt) -> PageAt {
        at.page(self.mask.trailing_zeros())
    }
}

/// Why the pages of a batch that arrived are refused: the fault is the peer's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageFault {
    /// The payload is damaged.
    #[error("the payload is damaged (xxh3 {found:016x} instead of {expected:016x})")]
    PayloadHash {
        /// The hash that was sent.
        expected: u64,
        /// The hash of the payload.
        found: u64,
    },
    /// A delta against a page that was never loaded.
    #[error("a delta for {page}, which was not loaded before")]
    NotHeld {
        /// The page.
        page: PageAt,
    },
    /// Pages where the lane's DirectEnds came before them.
    #[error("the lane's DirectEnds came before these pages")]
    DirectEnded,
    /// A delta where pages are placed whole.
    #[error("a delta for {page}, though no page has an earlier version any more")]
    Delta {
        /// The page.
        page: PageAt,
    },
    /// A page that was not missing when the guest switched.
    #[error("{page} was not missing")]
    NotExpected {
        /// The page.
        page: PageAt,
    },
    /// A page that cannot be decoded.
    #[error("{page} cannot be decoded: {why}")]
    Undecodable {
        /// The page.
        page: PageAt,
        /// What the decoder says.
        why: String,
    },
}
