//! What was recorded of a guest: which pages it wrote in each interval, and what pages come to.
//!
//! Pages are numbered over all blocks, one behind the other, each block from a multiple of 64 on: as the words of the dirty
//! bitmap lie. What the file looks like says [`mod@file`].

mod fields;
pub mod file;
mod runs;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::time::Duration;

use memferry_stages::codec::Codec;
use memferry_stages::geometry::{EXTENT_PAGES, PageSize};
use memferry_stages::untrusted::Untrusted;

pub use file::{TraceError, TraceWriter, read};
pub use runs::Runs;

/// A trace.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// What was known before the first interval.
    pub guest: GuestFacts,
    /// What was written, interval by interval, without gaps.
    pub intervals: Vec<Interval>,
    /// What pages come to.
    pub samples: Samples,
}

/// What is known of a guest before its writes are followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestFacts {
    /// Size of every page.
    pub page_size: PageSize,
    /// The blocks: id, and pages.
    pub blocks: Vec<(Untrusted, u64)>,
    /// Pages that never travel: unplugged, or of ignored blocks.
    pub out_for_good: u64,
    /// Pages that were never touched, of those that travel.
    pub untouched: u64,
    /// Is a page that waits to be sent found again only for what is written after it was taken, by any of the logs?
    pub rearms_late: bool,
    /// Cores of the host.
    pub cores: u32,
    /// What it took to arm the logs.
    pub arming: Duration,
    /// What digests of the whole guest would add to the downtime.
    pub digests: Duration,
    /// The tables `encoder`, `pipeline`, `migration` and `convergence` of the configuration, as TOML.
    pub settings: Untrusted,
}

#[cfg(test)]
impl GuestFacts {
    /// Of a guest with these blocks, of whose settings and costs nothing is known.
    pub(crate) fn of_blocks(blocks: Vec<(Untrusted, u64)>) -> Self {
        Self {
            page_size: PageSize::DEFAULT,
            blocks,
            out_for_good: 0,
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
    /// Words of a bitmap of all blocks.
    #[must_use]
    pub fn words(&self) -> u64 {
        self.blocks.iter().map(|(_, pages)| pages.div_ceil(EXTENT_PAGES)).sum()
    }

    /// Pages that travel.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.blocks.iter().map(|(_, pages)| pages).sum::<u64>() - self.out_for_good
    }

    /// The numbers of the pages of each block.
    pub fn block_ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.blocks.iter().scan(0, |next, (_, pages)| {
            let start = *next;
            *next = start + pages.div_ceil(EXTENT_PAGES) * EXTENT_PAGES;
            Some(start..start + pages)
        })
    }

    /// Are all pages of a range there?
    fn has(&self, pages: &Range<u64>) -> bool {
        let holes = self.block_ranges().map(|block| block.end..block.end.next_multiple_of(EXTENT_PAGES));
        pages.end <= self.words() * EXTENT_PAGES
            && holes.into_iter().all(|hole| hole.end <= pages.start || pages.end <= hole.start || hole.is_empty())
    }
}

/// What was written between two syncs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interval {
    /// From the begin of the sync before (for the first one: from when the logs were armed) to the begin of this one.
    pub length: Duration,
    /// What the sync took.
    pub sync: Duration,
    /// The pages that it found.
    pub written: Runs,
}

/// What was seen of the content of pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Samples {
    /// Level of the zstd in the figures.
    pub zstd_level: i32,
    /// Pages that were read of those that had been touched when the recording began, and zero ones among them.
    pub touched: Share,
    /// Pages whose content at the start is known and that were written later, and those that were zero at the start.
    pub first_written: Share,
    /// Pages of all memory, sent whole, in groups as encoders make them: snap, lz4, zstd.
    pub whole: [Coded; 3],
    /// The same of pages that had just been written.
    pub written: [Coded; 3],
    /// The same, each page alone.
    pub alone: [Coded; 3],
    /// What reading a page and testing it for zero takes.
    pub read: Cost,
    /// What the checksum of a page takes.
    pub checksum: Cost,
    /// What a delta of a page takes.
    pub delta: Cost,
    /// Deltas, by the time that lay between the copy and the page; short ones first.
    pub deltas: Vec<Deltas>,
}

/// So many of so many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Of so many.
    pub of: u64,
    /// So many.
    pub part: u64,
}

impl Share {
    /// As a number from 0 to 1; 0 of none.
    #[must_use]
    pub fn share(self) -> f64 {
        if self.of == 0 { 0.0 } else { self.part as f64 / self.of as f64 }
    }
}

/// What compressed pages came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coded {
    /// Pages, none of them zero.
    pub pages: u64,
    /// Those that were sent compressed.
    pub compressed: u64,
    /// Bytes of all of them.
    pub bytes: u64,
    /// What it took, in ns of one core.
    pub nanos: u64,
}

/// What something takes on one core.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Pages.
    pub pages: u64,
    /// Nanoseconds.
    pub nanos: u64,
}

impl Cost {
    /// Nanoseconds of a page.
    #[must_use]
    pub fn per_page(self) -> f64 {
        if self.pages == 0 { 0.0 } else { self.nanos as f64 / self.pages as f64 }
    }
}

/// Deltas of pages that were written between two looks at them, that far apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deltas {
    /// How far.
    pub span: Duration,
    /// Of pages that were written in the span before too.
    pub again: DeltaSample,
    /// Of pages that were not.
    pub rested: DeltaSample,
}

/// What deltas came to: `from_zero + to_zero + equal + overflows + deltas = pages`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeltaSample {
    /// Pages that were written in the span.
    pub pages: u64,
    /// Those whose copy was all zero.
    pub from_zero: u64,
    /// Those that are all zero now.
    pub to_zero: u64,
    /// Those that are as they were.
    pub equal: u64,
    /// Those whose delta is no smaller than the page.
    pub overflows: u64,
    /// All others.
    pub deltas: u64,
    /// Bytes of their deltas.
    pub delta_bytes: u64,
}

impl std::ops::AddAssign for DeltaSample {
    fn add_assign(&mut self, other: Self) {
        self.pages += other.pages;
        self.from_zero += other.from_zero;
        self.to_zero += other.to_zero;
        self.equal += other.equal;
        self.overflows += other.overflows;
        self.deltas += other.deltas;
        self.delta_bytes += other.delta_bytes;
    }
}

impl Samples {
    /// The codecs of the figures, in their order.
    #[must_use]
    pub fn codecs(&self) -> [Codec; 3] {
        [Codec::Snap, Codec::Lz4, Codec::Zstd { level: self.zstd_level }]
    }

    /// Which of the figures are of this codec.
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
    /// How long was recorded.
    #[must_use]
    pub fn length(&self) -> Duration {
        self.intervals.iter().map(|interval| interval.length).sum()
    }

    /// The middle one of what the syncs took.
    #[must_use]
    pub fn sync(&self) -> Duration {
        let mut syncs: Vec<_> = self.intervals.iter().map(|interval| interval.sync).collect();
        syncs.sort_unstable();
        syncs.get(syncs.len() / 2).copied().unwrap_or_default()
    }

    /// Pages that were found in a second, each interval's counted.
    #[must_use]
    pub fn pages_per_second(&self) -> f64 {
        let pages: u64 = self.intervals.iter().map(|interval| interval.written.pages()).sum();
        let seconds = self.length().as_secs_f64();
        if seconds > 0.0 { pages as f64 / seconds } else { 0.0 }
    }
}
