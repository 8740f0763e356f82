//! The recording of a guest: the pages that it wrote in each interval, and samples of their content.
//!
//! Pages are numbered over all blocks, one block after the other. Each block begins at a multiple of 64, like the
//! words of the dirty bitmap. The file format is described in [`mod@file`].

pub mod file;
mod runs;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::time::Duration;

use memferry_stages::codec::Codec;
use memferry_stages::geometry::{EXTENT_PAGES, PageSize};
use memferry_stages::untrusted::Untrusted;
use serde::{Deserialize, Serialize};

pub use file::{TraceError, TraceWriter, read};
pub use runs::Runs;

/// A trace.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// Facts known before the first interval.
    pub guest: GuestFacts,
    /// The written pages, interval by interval, without gaps.
    pub intervals: Vec<Interval>,
    /// Samples of the pages' content.
    pub samples: Samples,
}

/// Facts known about a guest before its writes are recorded.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct GuestFacts {
    /// Size of every page.
    pub page_size: PageSize,
    /// The blocks: id and number of pages.
    pub blocks: Vec<(Untrusted, u64)>,
    /// Pages that never travel: unplugged, or of ignored blocks.
    pub excluded: u64,
    /// Pages that were never touched, of those that travel.
    pub untouched: u64,
    /// Does any log report a page that waits to be sent only for writes after the page was taken?
    pub rearms_late: bool,
    /// Cores of the host.
    pub cores: u32,
    /// The time it took to arm the logs.
    pub arming: Duration,
    /// The time that digests of the whole guest would add to the downtime.
    pub digests: Duration,
    /// The tables `encoder`, `pipeline`, `migration` and `convergence` of the configuration, as TOML.
    pub settings: Untrusted,
}

#[cfg(test)]
impl GuestFacts {
    /// The facts of a guest with these blocks; its settings and costs are unknown.
    pub(crate) fn of_blocks(blocks: Vec<(Untrusted, u64)>) -> Self {
        Self {
            page_size: PageSize::DEFAULT,
            blocks,
            excluded: 0,
            untouched: 0,
            rearms_late: false,
            cores: 2,
            arming: Duration::ZERO,
            digests: Duration::ZERO,
            settings: Untrusted::default(),
        }
    }
}

impl GuestFacts {
    /// The number of words of a bitmap of all blocks.
    #[must_use]
    pub fn words(&self) -> u64 {
        self.blocks.iter().map(|(_, pages)| pages.div_ceil(EXTENT_PAGES)).sum()
    }

    /// The number of pages that travel.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.blocks.iter().map(|(_, pages)| pages).sum::<u64>() - self.excluded
    }

    /// The page numbers of each block.
    pub fn block_ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.blocks.iter().scan(0, |next, (_, pages)| {
            let start = *next;
            *next = start + pages.div_ceil(EXTENT_PAGES) * EXTENT_PAGES;
            Some(start..start + pages)
        })
    }

    /// Do all pages of a range exist?
    fn has(&self, pages: &Range<u64>) -> bool {
        let holes = self.block_ranges().map(|block| block.end..block.end.next_multiple_of(EXTENT_PAGES));
        pages.end <= self.words() * EXTENT_PAGES
            && holes.into_iter().all(|hole| hole.end <= pages.start || pages.end <= hole.start || hole.is_empty())
    }
}

/// The writes between two syncs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interval {
    /// From the start of the previous sync (for the first interval: from when the logs were armed) to the start of
    /// this one.
    pub length: Duration,
    /// The duration of the sync.
    pub sync: Duration,
    /// The pages that it found.
    pub written: Runs,
}

/// Samples of the content of pages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Samples {
    /// The level of zstd that was measured.
    pub zstd_level: i32,
    /// Sampled pages that had been touched when the recording began, and the zero pages among them.
    pub touched: Share,
    /// Pages whose content at the start is known and that were written later, and those of them that were zero at the
    /// start.
    pub first_written: Share,
    /// Pages from all memory, encoded whole, in groups as encoders form them: snap, lz4, zstd.
    pub whole: [Coded; 3],
    /// The same for pages that had just been written.
    pub written: [Coded; 3],
    /// The same, each page by itself.
    pub alone: [Coded; 3],
    /// The time to read a page and test it for zero.
    pub read: Cost,
    /// The time to compute the checksum of a page.
    pub checksum: Cost,
    /// The time to encode a delta of a page.
    pub delta: Cost,
    /// Deltas, by the time between the copy and the page; shortest first.
    pub deltas: Vec<Deltas>,
}

/// A part of a total.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Share {
    /// The total.
    pub of: u64,
    /// The part.
    pub part: u64,
}

impl Share {
    /// The part as a number from 0 to 1; 0 if the total is 0.
    #[must_use]
    pub fn share(self) -> f64 {
        if self.of == 0 { 0.0 } else { self.part as f64 / self.of as f64 }
    }
}

/// The results of compressing pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Coded {
    /// The number of pages, none of them zero.
    pub pages: u64,
    /// Those that were sent compressed.
    pub compressed: u64,
    /// Their total bytes.
    pub bytes: u64,
    /// The time it took, in ns of one core.
    pub nanos: u64,
}

/// The time of an operation on one core.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Cost {
    /// Pages.
    pub pages: u64,
    /// Nanoseconds.
    pub nanos: u64,
}

impl Cost {
    /// Nanoseconds per page.
    #[must_use]
    pub fn per_page(self) -> f64 {
        if self.pages == 0 { 0.0 } else { self.nanos as f64 / self.pages as f64 }
    }
}

/// Deltas of pages that were written between two samples of them, at this distance in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Deltas {
    /// The time between the two.
    pub span: Duration,
    /// Pages that were written in the preceding span too.
    pub again: DeltaSample,
    /// Pages that were not.
    pub rested: DeltaSample,
    /// Pages that were all zero, of either kind.
    pub from_zero: DeltaSample,
}

/// The results of encoding deltas: `to_zero + equal + overflows + deltas = pages`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct DeltaSample {
    /// Pages that were written in the span.
    pub pages: u64,
    /// Pages that are all zero now.
    pub to_zero: u64,
    /// Pages that are unchanged.
    pub equal: u64,
    /// Pages whose delta is no smaller than the page.
    pub overflows: u64,
    /// All other pages, which are sent as deltas.
    pub deltas: u64,
    /// Bytes of these deltas.
    pub delta_bytes: u64,
}

impl std::ops::AddAssign for DeltaSample {
    fn add_assign(&mut self, other: Self) {
        self.pages += other.pages;
        self.to_zero += other.to_zero;
        self.equal += other.equal;
        self.overflows += other.overflows;
        self.deltas += other.deltas;
        self.delta_bytes += other.delta_bytes;
    }
}

impl Samples {
    /// The codecs that are measured, in the order of the figures.
    #[must_use]
    pub fn codecs(&self) -> [Codec; 3] {
        [Codec::Snap, Codec::Lz4, Codec::Zstd { level: self.zstd_level }]
    }

    /// The index of this codec's figures.
    #[must_use]
    pub fn index(codec: Codec) -> usize {
        match codec {
            Codec::Snap => 0,
            Codec::Lz4 => 1,
            Codec::Zstd { .. } => 2,
        }
    }
}

impl Trace {
    /// The duration of the recording.
    #[must_use]
    pub fn length(&self) -> Duration {
        self.intervals.iter().map(|interval| interval.length).sum()
    }

    /// The median duration of a sync.
    #[must_use]
    pub fn sync(&self) -> Duration {
        let mut syncs: Vec<_> = self.intervals.iter().map(|interval| interval.sync).collect();
        syncs.sort_unstable();
        syncs.get(syncs.len() / 2).copied().unwrap_or_default()
    }

    /// Pages found dirty per second, counted once in each interval.
    #[must_use]
    pub fn pages_per_second(&self) -> f64 {
        let pages: u64 = self.intervals.iter().map(|interval| interval.written.pages()).sum();
        let seconds = self.length().as_secs_f64();
        if seconds > 0.0 { pages as f64 / seconds } else { 0.0 }
    }
}
