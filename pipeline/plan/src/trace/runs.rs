//! A set of pages as compressed runs.
//!
//! ```text
//! runs = ( pages left out, pages of the run )*     two u64 in the format of postcard, as many as fill the text, which
//!                                                  zstd compresses
//! ```

use std::io::{self, BufRead, BufReader};
use std::ops::Range;

/// Level of zstd: a higher one takes longer and gains little.
const LEVEL: i32 = 3;
/// The largest zstd window that is accepted, in bytes. It bounds the memory for a file with any content.
const WINDOW_LOG: u32 = 23;

/// Pages in ascending order, compressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runs {
    pages: u64,
    compressed: Box<[u8]>,
}

impl Runs {
    /// Compresses runs that are not empty, ascend and do not touch.
    ///
    /// # Panics
    /// If zstd cannot allocate memory.
    #[must_use]
    pub fn of(runs: impl IntoIterator<Item = Range<u64>>) -> Self {
        let (mut text, mut next, mut pages) = (Vec::new(), 0, 0);
        for run in runs {
            let lengths = (run.start - next, run.end - run.start);
            text = postcard::to_extend(&lengths, text).expect("a vector takes everything");
            pages += run.end - run.start;
            next = run.end;
        }
        let compressed = if pages == 0 {
            Vec::new()
        } else {
            zstd::bulk::compress(&text, LEVEL).expect("zstd compresses into memory of its own")
        };
        Self { pages, compressed: compressed.into() }
    }

    /// Checks bytes from an untrusted source: they must contain this number of pages, all in ranges that `has`
    /// accepts.
    pub(super) fn check(
        compressed: &[u8],
        pages: u64,
        has: impl Fn(&Range<u64>) -> bool,
    ) -> Result<Self, &'static str> {
        let runs = Self { pages, compressed: compressed.into() };
        let (mut found, mut fits) = (0_u64, true);
        let walked = runs.walk(|run| {
            found += run.end - run.start;
            fits &= has(&run);
            fits && found <= pages
        });
        match walked {
            Err(_) => Err("its pages cannot be read"),
            Ok(()) if !fits => Err("it names pages that the guest has not"),
            Ok(()) if found != pages => Err("it does not name as many pages as it counts"),
            Ok(()) => Ok(runs),
        }
    }

    /// The number of pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The compressed bytes.
    pub(super) fn compressed(&self) -> &[u8] {
        &self.compressed
    }

    /// The runs, in ascending order.
    #[must_use]
    pub fn runs(&self) -> Vec<Range<u64>> {
        let mut runs = Vec::new();
        self.walk(|run| {
            runs.push(run);
            true
        })
        .expect("they were checked when they were made");
        runs
    }

    /// Visits the runs until `each` returns false. No run is empty, and none exceeds the numbers of 63 bits.
    fn walk(&self, mut each: impl FnMut(Range<u64>) -> bool) -> io::Result<()> {
        if self.compressed.is_empty() {
            return Ok(());
        }
        let mut decoder = zstd::stream::read::Decoder::with_buffer(&self.compressed[..])?.single_frame();
        decoder.window_log_max(WINDOW_LOG)?;
        let mut text = BufReader::new(decoder);
        let mut next = 0_u64;
        while !text.fill_buf()?.is_empty() {
            // They need no buffer of their own.
            let lengths = postcard::from_io::<(u64, u64), _>((&mut text, &mut []));
            let ((gap, length), _) = lengths.map_err(|_| io::ErrorKind::InvalidData)?;
            let start = next.checked_add(gap).filter(|_| length > 0 && (gap > 0 || next == 0));
            let end = start.and_then(|start| start.checked_add(length)).filter(|&end| end < 1 << 63);
            let (Some(start), Some(end)) = (start, end) else { return Err(io::ErrorKind::InvalidData.into()) };
            next = end;
            if !each(start..end) {
                return Ok(());
            }
        }
        // No data may follow the frame.
        let rest = text.into_inner().finish();
        if rest.is_empty() { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
    }
}
