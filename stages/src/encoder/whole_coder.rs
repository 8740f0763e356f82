//! Pages that are sent whole: compressed in groups, or raw.
//!
//! The [sampler](super::sampler) decides which pages are worth a try. Those of a batch that are, and look alike, are compressed
//! together, up to [`GROUP_BYTES`](crate::batch::GROUP_BYTES), even where others lie between: a codec finds more matches in
//! 64 KiB than in 4. Pages that do not shrink are sent raw.

use super::sampler::{Sampler, Span, looks_like_noise};
use crate::batch::{PageEncoding, group_pages};
use crate::codec::{Codec, Compressor};
use crate::geometry::{PageSize, runs};

/// A group that shrinks by less than one part in this many counts as a failed try.
const WORTH: usize = 16;

/// The compressor of one lane, with its sampler.
#[derive(Debug)]
pub(super) struct WholeCoder {
    page_bytes: usize,
    /// The most pages of a group.
    group: u32,
    compressor: Compressor,
    sampler: Sampler,
    /// Room for the pages of a group that are not adjacent.
    gathered: Vec<u8>,
}

/// Which of a number of consecutive pages look like noise.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Looks(u64);

impl Looks {
    /// Those after the first `pages`.
    pub(super) fn behind(self, pages: u32) -> Self {
        Self(self.0.checked_shr(pages).unwrap_or(0))
    }
}

impl WholeCoder {
    pub(super) fn new(page_size: PageSize, codec: Codec) -> Self {
        let room = group_pages(page_size) * page_size.bytes();
        Self {
            page_bytes: page_size.bytes(),
            group: u32::try_from(group_pages(page_size)).expect("at most 16"),
            compressor: Compressor::for_groups(codec, page_size),
            sampler: Sampler::new(),
            gathered: Vec::with_capacity(room),
        }
    }

    /// The encoding of pages that are compressed.
    pub(super) fn encoding(&self) -> PageEncoding {
        self.compressor.codec().encoding()
    }

    /// Bytes of its working memory.
    pub(super) fn memory_bytes(&self) -> u64 {
        self.compressor.memory_bytes() + self.gathered.capacity() as u64
    }

    /// Tests each of up to 64 pages for noise.
    pub(super) fn look(&self, pages: &[u8]) -> Looks {
        let pages = (0..).zip(pages.chunks_exact(self.page_bytes));
        Looks(pages.fold(0, |noise, (bit, page)| noise | u64::from(looks_like_noise(page)) << bit))
    }

    /// Codes the next of these pages. Returns the span, and the bytes written to `room` for the tried pages, if they shrank.
    pub(super) fn code(&mut self, pages: &[u8], looks: Looks, room: &mut [u8]) -> (Span, Option<usize>) {
        let count = u32::try_from(pages.len() / self.page_bytes).expect("at most 64");
        let span = self.sampler.span(count, looks.0, self.group);
        if span.tried == 0 {
            return (span, None);
        }
        let tried = gather(span.tried, pages, self.page_bytes, &mut self.gathered);
        let coded = self.compressor.compress(tried, &mut room[..tried.len() - 1]);
        let shrank = coded.is_some_and(|bytes| bytes <= tried.len() - tried.len() / WORTH);
        self.sampler.outcome(span, looks.0, shrank);
        (span, coded)
    }
}

/// The pages of a mask, one after another: in place, if they are adjacent.
fn gather<'a>(mask: u64, pages: &'a [u8], page_bytes: usize, gathered: &'a mut Vec<u8>) -> &'a [u8] {
    let place = |first: u32, count: u32| first as usize * page_bytes..(first + count) as usize * page_bytes;
    let first = mask.trailing_zeros();
    if (mask >> first).trailing_ones() == mask.count_ones() {
        return &pages[place(first, mask.count_ones())];
    }
    gathered.clear();
    runs(mask).for_each(|(first, count)| gathered.extend_from_slice(&pages[place(first, count)]));
    gathered
}
