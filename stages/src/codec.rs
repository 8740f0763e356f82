//! Page compressors: snap, lz4, zstd. A page is compressed alone or with others of its batch.
//!
//! Takes pages, gives compressed bytes, and back. A [`Compressor`] and a [`Decompressor`] own their working memory and
//! use it again for every page or group. Compressed bytes come from a peer: decompressing them gives exactly the
//! requested number of bytes, or an error.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use lz4_flex::block::CompressTable;
use zstd::zstd_safe::{self, CCtx, CParameter, DCtx, ResetDirective};

use crate::batch::{PageEncoding, group_pages};
use crate::geometry::PageSize;

/// The levels of zstd, fast to dense.
pub const ZSTD_LEVELS: RangeInclusive<i32> = -7..=19;
/// The default level of zstd.
pub const ZSTD_DEFAULT_LEVEL: i32 = -1;

/// What compresses pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// Snappy, raw format.
    Snap,
    /// LZ4, block format without a length in front.
    Lz4,
    /// Zstandard at a level.
    Zstd {
        /// -7 (fast) to 19 (dense): one of [`ZSTD_LEVELS`].
        level: i32,
    },
}

impl Codec {
    /// Its name in a configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Snap => "snap",
            Self::Lz4 => "lz4",
            Self::Zstd { .. } => "zstd",
        }
    }

    /// The encoding of its pages.
    #[must_use]
    pub fn encoding(self) -> PageEncoding {
        match self {
            Self::Snap => PageEncoding::Snap,
            Self::Lz4 => PageEncoding::Lz4,
            Self::Zstd { .. } => PageEncoding::Zstd,
        }
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zstd { level } => write!(f, "zstd level {level}"),
            other => f.write_str(other.name()),
        }
    }
}

/// An unknown name of a codec.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no codec {0:?}, choose one of snap, lz4, zstd")]
pub struct UnknownCodec(pub String);

impl FromStr for Codec {
    type Err = UnknownCodec;

    /// The codec of a [`Codec::name`]; zstd at [`ZSTD_DEFAULT_LEVEL`].
    fn from_str(name: &str) -> Result<Self, UnknownCodec> {
        match name {
            "snap" => Ok(Self::Snap),
            "lz4" => Ok(Self::Lz4),
            "zstd" => Ok(Self::Zstd { level: ZSTD_DEFAULT_LEVEL }),
            other => Err(UnknownCodec(other.to_owned())),
        }
    }
}

/// Bytes of snap's tables, the small and the one for longer inputs.
const SNAP_BYTES: usize = (1024 + 16384) * 2;
/// Bytes of lz4's large table.
const LZ4_BYTES: usize = 4096 * 4;

/// A compressor with its working memory; one for each encoder.
pub struct Compressor {
    codec: Codec,
    engine: Engine,
    /// Output of snap and lz4, which need room for the worst case; callers pass less.
    scratch: Vec<u8>,
}

enum Engine {
    Snap(Box<snap::raw::Encoder>),
    Lz4(CompressTable),
    Zstd(CCtx<'static>),
}

impl fmt::Debug for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compressor").field("codec", &self.codec).finish_non_exhaustive()
    }
}

impl Compressor {
    /// A compressor for `codec`.
    ///
    /// # Panics
    /// If the level is none of [`ZSTD_LEVELS`], or zstd gets no memory.
    #[must_use]
    pub fn new(codec: Codec) -> Self {
        let engine = match codec {
            Codec::Snap => Engine::Snap(Box::new(snap::raw::Encoder::new())),
            // The small table has half as many bytes to clear, and finds fewer matches.
            Codec::Lz4 => Engine::Lz4(CompressTable::large()),
            Codec::Zstd { level } => Engine::Zstd(zstd_context(level)),
        };
        Self { codec, engine, scratch: Vec::new() }
    }

    /// A compressor with all the working memory that groups of such pages can take.
    ///
    /// # Panics
    /// As [`Compressor::new`].
    #[must_use]
    pub fn for_groups(codec: Codec, page_size: PageSize) -> Self {
        let mut compressor = Self::new(codec);
        let pages = vec![0; page_size.bytes() * group_pages(page_size)];
        let mut out = vec![0; pages.len()];
        // Zstd chooses its tables by the length, and the longest input does not have the largest.
        for group in (page_size.bytes()..=pages.len()).step_by(page_size.bytes()) {
            compressor.compress(&pages[..group], &mut out).expect("zeros shrink");
        }
        compressor
    }

    /// Bytes of its working memory.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        let engine = match &self.engine {
            Engine::Snap(_) => SNAP_BYTES,
            Engine::Lz4(_) => LZ4_BYTES,
            Engine::Zstd(context) => context.sizeof(),
        };
        (engine + self.scratch.capacity()) as u64
    }

    /// Its codec.
    #[must_use]
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// Compresses a page into `out`. Returns the number of bytes written, or `None` if the page does not shrink to `out.len()`, so
    /// `out` should be shorter than the page. The content of `out` beyond the written bytes is unspecified.
    pub fn compress(&mut self, page: &[u8], out: &mut [u8]) -> Option<usize> {
        let scratch = &mut self.scratch;
        let bytes = match &mut self.engine {
            Engine::Zstd(context) => return compress_zstd(context, page, out),
            Engine::Snap(encoder) => {
                let room = room_for(scratch, snap::raw::max_compress_len(page.len()));
                encoder.compress(page, room).expect("there is room for the worst case")
            }
            Engine::Lz4(table) => {
                let room = room_for(scratch, lz4_flex::block::get_maximum_output_size(page.len()));
                lz4_flex::block::compress_into_with_table(page, room, table).expect("there is room for the worst case")
            }
        };
        (bytes < out.len()).then(|| {
            out[..bytes].copy_from_slice(&scratch[..bytes]);
            bytes
        })
    }
}

fn zstd_context(level: i32) -> CCtx<'static> {
    assert!(ZSTD_LEVELS.contains(&level), "zstd level {level} is not from {ZSTD_LEVELS:?}");
    let mut context = CCtx::create();
    context.set_parameter(CParameter::CompressionLevel(level)).expect("zstd has this level");
    context
}

fn compress_zstd(context: &mut CCtx<'static>, page: &[u8], out: &mut [u8]) -> Option<usize> {
    match context.compress2(out, page) {
        Ok(bytes) => (bytes < out.len()).then_some(bytes),
        Err(_) => {
            // It ran out of room in the middle of a frame: end that frame, or the next page would be refused.
            context.reset(ResetDirective::SessionOnly).expect("a frame can always be left");
            None
        }
    }
}

/// The buffer, grown to at least `bytes` where it is shorter: once for each page size.
fn room_for(buffer: &mut Vec<u8>, bytes: usize) -> &mut [u8] {
    if buffer.len() < bytes {
        buffer.resize(bytes, 0);
    }
    buffer
}

/// Why compressed bytes do not decompress to a page.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{codec} data is damaged: {why}")]
pub struct DecompressError {
    /// Name of the codec.
    pub codec: &'static str,
    /// What is wrong with it.
    pub why: String,
}

/// A decompressor for every codec, with its working memory; one for each loader.
#[derive(Default)]
pub struct Decompressor {
    snap: snap::raw::Decoder,
    /// Made with the first zstd page.
    zstd: Option<DCtx<'static>>,
}

impl fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decompressor").finish_non_exhaustive()
    }
}

impl Decompressor {
    /// The most bytes of its working memory: zstd's, which does not depend on the data.
    #[must_use]
    pub fn bound_bytes() -> u64 {
        DCtx::create().sizeof() as u64
    }

    /// Decompresses into exactly the whole of `page`. Its earlier content never shows in the result; after an error
    /// its content is unspecified.
    ///
    /// # Errors
    /// [`DecompressError`] if the data is damaged, or comes out shorter or longer than a page.
    ///
    /// # Panics
    /// If `encoding` is not that of a codec.
    pub fn decompress(&mut self, encoding: PageEncoding, bytes: &[u8], page: &mut [u8]) -> Result<(), DecompressError> {
        let (codec, result) = match encoding {
            PageEncoding::Snap => ("snap", self.snap.decompress(bytes, page).map_err(|error| error.to_string())),
            PageEncoding::Lz4 => {
                ("lz4", lz4_flex::block::decompress_into(bytes, page).map_err(|error| error.to_string()))
            }
            PageEncoding::Zstd => ("zstd", self.decompress_zstd(bytes, page)),
            PageEncoding::Raw | PageEncoding::Xbzrle | PageEncoding::Grouped => {
                panic!("{encoding:?} is no codec's encoding")
            }
        };
        let written = result.map_err(|why| DecompressError { codec, why })?;
        if written != page.len() {
            let why = format!("it holds {written} bytes, a page has {}", page.len());
            return Err(DecompressError { codec, why });
        }
        Ok(())
    }

    fn decompress_zstd(&mut self, bytes: &[u8], page: &mut [u8]) -> Result<usize, String> {
        let context = self.zstd.get_or_insert_with(DCtx::create);
        context.decompress(page, bytes).map_err(|code| zstd_safe::get_error_name(code).to_owned())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CODECS: [Codec; 5] =
        [Codec::Snap, Codec::Lz4, Codec::Zstd { level: -7 }, Codec::Zstd { level: 1 }, Codec::Zstd { level: 19 }];

    fn text(length: usize) -> Vec<u8> {
        (0..)
            .flat_map(|line| format!("line {line} of a text: {}\n", line * line % 997).into_bytes())
            .take(length)
            .collect()
    }

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        };
        (0..length).map(|_| next()).collect()
    }

    /// Decompresses into two pages of different content: the results must be the same (nothing of the old page shows).
    fn decompress_twice(codec: Codec, bytes: &[u8], page_bytes: usize) -> Result<Vec<u8>, DecompressError> {
        let mut decompressor = Decompressor::default();
        let [one, two] = [0x00, 0xff].map(|fill| {
            let mut page = vec![fill; page_bytes];
            decompressor.decompress(codec.encoding(), bytes, &mut page).map(|()| page)
        });
        assert_eq!(one, two, "{codec} shows what was in the page");
        one
    }

    fn compressed(codec: Codec, page: &[u8]) -> Option<Vec<u8>> {
        let mut out = vec![0; page.len() - 1];
        let bytes = Compressor::new(codec).compress(page, &mut out)?;
        out.truncate(bytes);
        Some(out)
    }

    #[test]
    fn pages_of_every_size_come_back() {
        for codec in CODECS {
            let mut compressor = Compressor::new(codec);
            for size in [4096, 65536, 8192, 4096] {
                let page = text(size);
                let mut out = vec![0; size - 1];
                let bytes = compressor.compress(&page, &mut out).expect("text shrinks");
                assert!(bytes < size * 2 / 3, "{codec}: {bytes} of {size}");
                assert_eq!(decompress_twice(codec, &out[..bytes], size).unwrap(), page);
            }
        }
    }

    #[test]
    fn a_page_that_does_not_shrink_is_none_and_spoils_nothing() {
        for codec in CODECS {
            let mut compressor = Compressor::new(codec);
            let (page, mut out) = (text(4096), vec![0; 4095]);
            let bytes = compressor.compress(&page, &mut out).unwrap();
            assert_eq!(compressor.compress(&noise(4096), &mut out), None);
            assert_eq!(compressor.compress(&page, &mut out[..bytes]), None, "not below the room given");
            assert_eq!(compressor.compress(&page, &mut out[..bytes / 2]), None);
            assert_eq!(compressor.compress(&page, &mut []), None);
            assert_eq!(compressor.compress(&page, &mut out), Some(bytes), "{codec} continues");
        }
    }

    #[test]
    fn a_page_of_another_size_is_an_error() {
        for codec in CODECS {
            let bytes = compressed(codec, &text(8192)).unwrap();
            for size in [0, 4096, 8191, 8193, 16384] {
                let error = decompress_twice(codec, &bytes, size).unwrap_err();
                assert_eq!(error.codec, codec.name());
            }
        }
    }

    #[test]
    fn data_cut_anywhere_is_an_error() {
        for codec in CODECS {
            let bytes = compressed(codec, &text(4096)).unwrap();
            for length in 0..bytes.len() {
                let result = decompress_twice(codec, &bytes[..length], 4096);
                assert!(result.is_err(), "{codec}: {length} of {} bytes were taken", bytes.len());
            }
        }
    }

    #[test]
    fn any_flipped_bit_gives_a_page_or_an_error() {
        for codec in CODECS {
            let mut bytes = compressed(codec, &text(4096)).unwrap();
            for bit in 0..bytes.len() * 8 {
                bytes[bit / 8] ^= 1 << (bit % 8);
                let _checked = decompress_twice(codec, &bytes, 4096);
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
        }
    }

    /// Data may claim to be far longer than a page: that must allocate nothing.
    #[test]
    fn a_hostile_length_is_an_error() {
        let snap = [0xff, 0xff, 0xff, 0xff, 0x0f, 0, 0];
        let zstd = [0x28, 0xb5, 0x2f, 0xfd, 0xe0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 1, 0, 0];
        let lz4 = [0xff; 4096];
        for (codec, bytes) in [(CODECS[0], &snap[..]), (CODECS[1], &lz4), (CODECS[2], &zstd)] {
            assert!(decompress_twice(codec, bytes, 4096).is_err());
        }
    }

    #[test]
    fn names_are_read_back() {
        for codec in CODECS {
            assert_eq!(codec.name().parse::<Codec>().unwrap().encoding(), codec.encoding());
        }
        let error = "gzip".parse::<Codec>().unwrap_err();
        assert_eq!(error.to_string(), "there is no codec \"gzip\", choose one of snap, lz4, zstd");
        assert!(matches!("zstd".parse(), Ok(Codec::Zstd { level: ZSTD_DEFAULT_LEVEL })));
    }

    #[test]
    fn they_may_move_between_threads() {
        fn send<T: Send>() {}
        send::<Compressor>();
        send::<Decompressor>();
    }

    #[test]
    #[should_panic(expected = "zstd level 20")]
    fn a_level_that_does_not_exist_is_our_own_mistake() {
        drop(Compressor::new(Codec::Zstd { level: 20 }));
    }

    proptest! {
        #[test]
        fn random_bytes_give_a_page_or_an_error(
            codec in prop::sample::select(&CODECS[..]),
            bytes in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let _checked = decompress_twice(codec, &bytes, 4096);
        }

        #[test]
        fn pages_of_pieces_come_back(
            codec in prop::sample::select(&CODECS[..4]),
            runs in prop::collection::vec((0..4096_usize, 1..700_usize, any::<u8>()), 0..20),
        ) {
            let mut page = text(4096);
            for (start, length, fill) in runs {
                page[start..(start + length).min(4096)].fill(fill);
            }
            if let Some(bytes) = compressed(codec, &page) {
                prop_assert_eq!(decompress_twice(codec, &bytes, 4096).unwrap(), page);
            }
        }
    }
}
