//! The kinds of rounds, and the figures of a round, counted by the stages of a lane and added up over the lanes.

use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

/// When the pages of a round may change again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RoundKind {
    /// The guest runs: a page may be written while it travels, and is sent again in a later round.
    #[default]
    Live = 0,
    /// The guest is paused, and the last sync is still to come: it brings pages that were written before the pause, or while the
    /// state was saved.
    Paused = 1,
    /// No page changes any more: each is sent at most once.
    Final = 2,
}

impl RoundKind {
    /// Whether each page is sent at most once from here on.
    #[must_use]
    pub fn is_final(self) -> bool {
        self == Self::Final
    }
}

/// Figures of one round. Travels with RoundComplete: each stage adds its part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoundTally {
    /// The round, from 1.
    pub round: u32,
    /// Its kind.
    pub kind: RoundKind,
    /// Batches scanned.
    pub batches: u64,
    /// Its pages.
    pub pages: PageTally,
}

/// Pages by encoding, as counted and as in reports.
///
/// `zero + raw + compressed + xbzrle + unchanged = all`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageTally {
    /// Pages scanned.
    #[serde(rename = "pages")]
    pub all: u64,
    /// Pages that were all zero.
    pub zero: u64,
    /// Pages sent raw.
    pub raw: u64,
    /// Pages sent compressed.
    pub compressed: u64,
    /// Pages sent as a delta.
    pub xbzrle: u64,
    /// Pages that equal their reference: not sent.
    pub unchanged: u64,
    /// Pages that were looked up and had no entry in the XBZRLE cache.
    pub xbzrle_misses: u64,
    /// Pages whose delta was not smaller than the page; where it is against zeros, than the page compressed.
    pub xbzrle_overflows: u64,
    /// Bytes of the pages scanned.
    pub bytes_in: u64,
    /// Bytes of the frames made of them.
    pub bytes_out: u64,
}

impl RoundTally {
    /// An empty tally.
    #[must_use]
    pub fn new(round: u32, kind: RoundKind) -> Self {
        Self { round, kind, ..Self::default() }
    }
}

impl AddAssign for RoundTally {
    /// Adds another lane's figures of the same round.
    fn add_assign(&mut self, other: Self) {
        debug_assert_eq!(self.round, other.round, "tallies of two rounds");
        self.batches += other.batches;
        self.pages += other.pages;
    }
}

impl AddAssign for PageTally {
    fn add_assign(&mut self, other: Self) {
        self.all += other.all;
        self.zero += other.zero;
        self.raw += other.raw;
        self.compressed += other.compressed;
        self.xbzrle += other.xbzrle;
        self.unchanged += other.unchanged;
        self.xbzrle_misses += other.xbzrle_misses;
        self.xbzrle_overflows += other.xbzrle_overflows;
        self.bytes_in += other.bytes_in;
        self.bytes_out += other.bytes_out;
    }
}
