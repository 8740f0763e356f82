//! What pages come to when they are sent whole, as the encoder would do it, without a stage: for who plans a migration.

use super::whole_coder::WholeCoder;
use crate::codec::Codec;
use crate::geometry::PageSize;
use crate::wire::pages::group_pages;

/// Codes pages as an encoder's lane does, and keeps only what they come to.
#[derive(Debug)]
pub struct Estimate {
    page_bytes: usize,
    coder: WholeCoder,
    room: Vec<u8>,
}

/// What pages came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Came {
    /// Pages that are sent compressed, each or with others; all others go raw.
    pub compressed: u64,
    /// Bytes of all of them on the wire, without what stands before them in their frames.
    pub bytes: u64,
}

impl Estimate {
    /// Of pages that this codec compresses.
    ///
    /// # Panics
    /// If the codec has no such level.
    #[must_use]
    pub fn new(page_size: PageSize, codec: Codec) -> Self {
        let room = vec![0; group_pages(page_size) * page_size.bytes()];
        Self { page_bytes: page_size.bytes(), coder: WholeCoder::new(page_size, codec), room }
    }

    /// The pages of one batch, none of them zero: compressed together as they look alike, where the last ones were worth it.
    ///
    /// # Panics
    /// If they are more than 64, or not whole pages.
    pub fn code(&mut self, mut pages: &[u8]) -> Came {
        assert!(pages.len().is_multiple_of(self.page_bytes), "{} bytes are no pages", pages.len());
        let (mut looks, mut came) = (self.coder.look(pages), Came::default());
        while !pages.is_empty() {
            let (span, coded) = self.coder.code(pages, looks, &mut self.room);
            let compressed = if coded.is_some() { u64::from(span.tried.count_ones()) } else { 0 };
            came.compressed += compressed;
            came.bytes += coded.unwrap_or(0) as u64;
            came.bytes += (u64::from(span.pages) - compressed) * self.page_bytes as u64;
            looks = looks.behind(span.pages);
            pages = &pages[span.pages as usize * self.page_bytes..];
        }
        came
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    #[test]
    fn pages_come_to_what_the_codec_makes_of_them() {
        let text: Vec<u8> = (0..16 * PAGE).map(|at| b"a page of text, "[at % 16]).collect();
        let mut state = 1_u64;
        let noise: Vec<u8> = (0..16 * PAGE)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                state.to_le_bytes()[7]
            })
            .collect();
        for codec in [Codec::Snap, Codec::Lz4, Codec::Zstd { level: 1 }] {
            let mut estimate = Estimate::new(PageSize::DEFAULT, codec);
            let came = estimate.code(&text);
            assert!(came.compressed == 16 && came.bytes < 4 * PAGE as u64, "{codec}: {came:?}");
            assert_eq!(estimate.code(&noise), Came { compressed: 0, bytes: 16 * PAGE as u64 }, "{codec}");
            assert_eq!(estimate.code(&[]), Came::default());
        }
    }
}
