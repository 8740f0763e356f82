//! The size of pages that are sent whole, as the encoder codes them, but without a stage: for planning a migration.

use super::whole_coder::WholeCoder;
use crate::batch::group_pages;
use crate::codec::Codec;
use crate::geometry::PageSize;

/// Codes pages as an encoder's lane does, and keeps only their sizes.
#[derive(Debug)]
pub struct Estimate {
    page_bytes: usize,
    coder: WholeCoder,
    room: Vec<u8>,
}

/// The size of coded pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Came {
    /// Pages that are sent compressed, alone or in a group; all others are sent raw.
    pub compressed: u64,
    /// Bytes of all pages on the wire, without the heads of their frames.
    pub bytes: u64,
}

impl Estimate {
    /// An estimate with this codec.
    ///
    /// # Panics
    /// If the codec has no such level.
    #[must_use]
    pub fn new(page_size: PageSize, codec: Codec) -> Self {
        let room = vec![0; group_pages(page_size) * page_size.bytes()];
        Self { page_bytes: page_size.bytes(), coder: WholeCoder::new(page_size, codec), room }
    }

    /// Codes the pages of one batch, none of them zero: pages that look alike are compressed together, where the last ones were
    /// worth it.
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
