//! Page compressors: snap, lz4, zstd. A page is compressed alone and carries its codec's number on the wire.

/// What compresses pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// Snappy, raw format.
    Snap,
    /// LZ4, block format without a length in front.
    Lz4,
    /// Zstandard at a level.
    Zstd {
        /// -7 (fast) to 19 (dense).
        level: i32,
    },
}

/// A compressor with its working memory; one for each encoder.
#[derive(Debug)]
pub struct Compressor {}

impl Compressor {
    /// A compressor for `codec`.
    #[must_use]
    pub fn new(codec: Codec) -> Self {
        todo!()
    }

    /// Compresses a page into `out`: the bytes written, or `None` if it would not shrink below `out.len()`.
    pub fn compress(&mut self, page: &[u8], out: &mut [u8]) -> Option<usize> {
        todo!()
    }
}

/// Why compressed bytes are no page.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{codec} data is damaged: {why}")]
pub struct DecompressError {
    /// Name of the codec.
    pub codec: &'static str,
    /// What is wrong with it.
    pub why: String,
}

/// A decompressor for every codec, with its working memory; one for each loader.
#[derive(Debug, Default)]
pub struct Decompressor {}

impl Decompressor {
    /// Decompresses into exactly the whole of `page`. What was in `page` before never shows in the result.
    ///
    /// # Errors
    /// [`DecompressError`] if the data is damaged, or comes out shorter or longer than a page.
    pub fn decompress(
        &mut self,
        codec: crate::wire::PageEncoding,
        bytes: &[u8],
        page: &mut [u8],
    ) -> Result<(), DecompressError> {
        todo!()
    }
}
