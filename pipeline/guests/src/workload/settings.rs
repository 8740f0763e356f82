//! The settings of a workload: the size of its memory, its content, and its writers. Plain values with their limits.

use std::ops::Range;

use memferry_stages::geometry::{MAX_BLOCKS, PageSize};
use serde::{Deserialize, Serialize};

use crate::shared::SharedSettings;
use memferry::guest::GuestError;

/// Bytes of a stamp, at the start of a page.
pub(super) const STAMP_BYTES: usize = 16;

/// The most pages a workload may have: their sequences travel as device state, which is bounded.
pub const MAX_PAGES: u64 = 48 << 20;
/// The most writers, each one a thread.
pub const MAX_WRITERS: usize = 64;

/// The settings of a workload. They travel as setup state, as serde encodes them, so a destination needs none of its own.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct WorkloadSettings {
    /// Bytes of memory, all blocks together: a multiple of `blocks` pages.
    pub memory: u64,
    /// The number of RAM blocks, of equal length.
    pub blocks: u32,
    /// Size of a page.
    pub page_size: PageSize,
    /// The kind of memory.
    pub backing: Backing,
    /// How written pages are found.
    pub dirty_log: LogChoice,
    /// The initial content of the memory.
    pub fill: Fill,
    /// The threads that write it. With none the guest is idle.
    pub writers: Vec<WriterSettings>,
    /// Memory that is free, and hinted as free: it lies after the memory in use. `None`: no page is ever free.
    pub free: Option<FreeSettings>,
    /// The share of the memory that is unplugged, at its end; 0 to less than 1.
    pub unplugged: f64,
    /// An additional block, whose memory is in a file that both ends have: it never travels, and serde leaves it out.
    #[serde(skip)]
    pub shared: Option<SharedSettings>,
    /// The seed of all random choices: the same seed gives the same content and the same choice of pages.
    pub seed: u64,
}

/// The kind of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backing {
    /// Private anonymous memory.
    Anonymous,
    /// A shared anonymous memory file.
    Memfd,
    /// The same, of huge pages of 2 MiB that the host has reserved.
    Hugetlb,
}

impl Backing {
    /// The page size that the host uses for it, in bytes.
    pub(super) fn page_bytes(self) -> u64 {
        match self {
            Self::Anonymous | Self::Memfd => rustix::param::page_size() as u64,
            Self::Hugetlb => 2 << 20,
        }
    }
}

/// How written pages are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogChoice {
    /// Userfault if this host supports it, else software.
    Auto,
    /// Writers mark what they write.
    Software,
    /// The kernel records them; only stores through the mapping write this memory.
    Userfault,
    /// Hashes of the pages.
    Hash,
}

/// The initial content of the memory: shares that add up to at most 1, assigned in runs of 64 KiB or one page,
/// whichever is larger. The rest is never touched. A share that a configuration leaves out is 0.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Fill {
    /// Never touched: zero pages.
    #[serde(default)]
    pub zero: f64,
    /// Words, as in logs and sources.
    #[serde(default)]
    pub text: f64,
    /// Bytes that do not compress.
    #[serde(default)]
    pub random: f64,
    /// Bytes of this program's own binary.
    #[serde(default)]
    pub process: f64,
}

/// Memory that is free at the start. It is filled like the rest, as memory that was used before, and hinted while a
/// migration runs. A thread takes ranges of it, writes all of their pages, and later checks them and gives them back;
/// at most an eighth is taken at a time.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub struct FreeSettings {
    /// The share of the memory; more than 0.
    pub share: f64,
    /// Ranges that are taken or given back in a second; 0 is none, [`f64::INFINITY`] is no limit.
    pub turns_per_second: f64,
    /// Pages of a range, 1 to 65536.
    pub range_pages: u32,
}

/// One writer: a thread.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub struct WriterSettings {
    /// Which of its pages it writes next.
    pub pattern: Pattern,
    /// Pages it writes in a second; 0 is no limit.
    pub pages_per_second: f64,
    /// Bytes it changes at each write besides the stamp; at most a page, including the stamp.
    pub bytes: usize,
    /// Where it writes. A page in the regions of several writers belongs to one of them, assigned in turn.
    pub region: Region,
}

/// A part of the memory in use (neither free nor unplugged), with all blocks as one sequence: from share `from` to
/// share `to` of its pages, each 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub struct Region {
    /// Where it begins.
    pub from: f64,
    /// Where it ends; more than `from`.
    pub to: f64,
}

impl Region {
    /// All of the memory.
    pub const ALL: Self = Self { from: 0.0, to: 1.0 };
}

/// The next page to write, among the pages of a writer.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Pattern {
    /// One after another, from the start again at the end.
    Sequential,
    /// Uniformly at random.
    Uniform,
    /// At random, with the page of rank r in proportion to 1 / r^exponent; the ranks are scattered over the region.
    Zipf {
        /// More than 0, at most 16.
        exponent: f64,
    },
    /// Some pages, those at the region's start, get a larger share of the writes than the others.
    HotSpot {
        /// The share of the pages that is hot, more than 0 and at most 1.
        pages: f64,
        /// The share of the writes that goes to them, 0 to 1.
        writes: f64,
    },
}

impl Default for WorkloadSettings {
    /// 64 MiB in one block, a mixed fill, no writers.
    fn default() -> Self {
        Self {
            memory: 64 << 20,
            blocks: 1,
            page_size: PageSize::DEFAULT,
            backing: Backing::Anonymous,
            dirty_log: LogChoice::Auto,
            fill: Fill::default(),
            writers: Vec::new(),
            free: None,
            unplugged: 0.0,
            shared: None,
            seed: 1,
        }
    }
}

impl Default for Fill {
    /// A typical guest: a third never touched, the rest text, program and some of it incompressible.
    fn default() -> Self {
        Self { zero: 0.3, text: 0.3, random: 0.1, process: 0.3 }
    }
}

impl WorkloadSettings {
    /// Pages of all blocks.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.memory / self.page_size.bytes() as u64
    }

    /// The pages that are in use, free, and unplugged: in this order, over all blocks.
    #[must_use]
    pub fn parts(&self) -> [Range<u32>; 3] {
        let pages = u32::try_from(self.pages()).expect("at most MAX_PAGES");
        let of = |share: f64| {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of 0 to 1 of a u32")]
            let part = (share * f64::from(pages)).round() as u32;
            part.min(pages)
        };
        let plugged = pages - of(self.unplugged);
        let used = plugged - of(self.free.map_or(0.0, |free| free.share)).min(plugged);
        [0..used, used..plugged, plugged..pages]
    }

    /// How many operations a second the writer of this number does, 0 for no limit. An operation is a write of a page
    /// or, for the one after all writers, a range of free memory that is taken or given back.
    pub(super) fn turns_per_second(&self, writer: usize) -> f64 {
        let free = || self.free.map_or(0.0, |free| free.turns_per_second);
        let turns = self.writers.get(writer).map_or_else(free, |writer| writer.pages_per_second);
        if turns.is_finite() { turns } else { 0.0 }
    }

    /// Bytes of one block.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        self.memory / u64::from(self.blocks)
    }

    /// Checks every limit. Settings from a peer are checked by this before anything is built from them.
    ///
    /// # Errors
    /// A sentence that names the setting, its value and the valid values.
    pub fn validate(&self) -> Result<(), GuestError> {
        let block_limit = u32::try_from(MAX_BLOCKS).expect("small");
        check((1..=block_limit).contains(&self.blocks), || {
            format!("blocks is {}: it may be 1 to {MAX_BLOCKS}", self.blocks)
        })?;
        let unit = self.backing.page_bytes().max(self.page_size.bytes() as u64) * u64::from(self.blocks);
        check(self.memory > 0 && self.memory.is_multiple_of(unit), || {
            format!("memory is {} bytes: it must be a multiple of blocks × page size, {unit} bytes", self.memory)
        })?;
        check(self.pages() <= MAX_PAGES, || {
            format!("memory has {} pages, at most {MAX_PAGES} are possible: take larger pages", self.pages())
        })?;
        check(self.writers.len() <= MAX_WRITERS, || {
            format!("{} writers: at most {MAX_WRITERS} are possible", self.writers.len())
        })?;
        self.fill.validate()?;
        self.validate_what_does_not_travel()?;
        self.writers.iter().enumerate().try_for_each(|(index, writer)| {
            writer.validate(self.page_size).map_err(|error| GuestError::caused(format_args!("writer {index}"), error))
        })
    }
}

impl WorkloadSettings {
    fn validate_what_does_not_travel(&self) -> Result<(), GuestError> {
        check((0.0..1.0).contains(&self.unplugged), || {
            format!("unplugged is {}: a share of 0 to less than 1", self.unplugged)
        })?;
        if let Some(FreeSettings { share, turns_per_second, range_pages }) = self.free {
            check(share > 0.0 && share + self.unplugged < 1.0, || {
                format!("free is {share}: a share more than 0, and with what is unplugged less than 1")
            })?;
            check(turns_per_second >= 0.0, || format!("turns_per_second is {turns_per_second}: it may be 0 or more"))?;
            check((1..=1 << 16).contains(&range_pages), || {
                format!("a range of free memory has {range_pages} pages: it may have 1 to 65536")
            })?;
        }
        let (page, blocks) = (self.page_size.bytes() as u64, self.blocks as usize);
        self.shared.as_ref().map_or(Ok(()), |SharedSettings { bytes, .. }| {
            check(*bytes > 0 && bytes.is_multiple_of(page) && bytes / page + self.pages() <= MAX_PAGES, || {
                format!("the shared block has {bytes} bytes: it must have whole pages of {page}, and not too many")
            })?;
            check(blocks < MAX_BLOCKS, || {
                format!("{blocks} blocks and a shared one: at most {MAX_BLOCKS} are possible")
            })
        })
    }
}

impl Fill {
    /// The shares in the order zero, text, random, process.
    #[must_use]
    pub fn shares(&self) -> [f64; 4] {
        [self.zero, self.text, self.random, self.process]
    }

    fn validate(&self) -> Result<(), GuestError> {
        let shares = self.shares();
        check(shares.iter().all(|share| *share >= 0.0), || {
            format!("fill has the shares {shares:?}: none may be below 0")
        })?;
        let sum: f64 = shares.iter().sum();
        // Shares such as 0.1 have no exact sum.
        check(sum <= 1.0 + 1e-9, || format!("fill has shares that add up to {sum}: at most 1 is possible"))
    }
}

impl WriterSettings {
    fn validate(&self, page_size: PageSize) -> Result<(), GuestError> {
        check((0.0..=1e9).contains(&self.pages_per_second), || {
            format!("pages_per_second is {}: it may be 0 (as fast as it can) to 1000000000", self.pages_per_second)
        })?;
        check(self.bytes <= page_size.bytes(), || {
            format!("bytes is {}: a write changes at most a page, {} bytes", self.bytes, page_size.bytes())
        })?;
        let Region { from, to } = self.region;
        check((0.0..1.0).contains(&from) && to > from && to <= 1.0, || {
            format!("region is {from} to {to}: it must be 0 ≤ from < to ≤ 1")
        })?;
        self.pattern.validate()
    }

    /// Bytes that a write changes besides the stamp, in a page of this size.
    #[must_use]
    pub fn body_bytes(&self, page_size: PageSize) -> usize {
        self.bytes.min(page_size.bytes() - STAMP_BYTES)
    }
}

impl Pattern {
    fn validate(&self) -> Result<(), GuestError> {
        match *self {
            Self::Sequential | Self::Uniform => Ok(()),
            Self::Zipf { exponent } => check(exponent > 0.0 && exponent <= 16.0, || {
                format!("the exponent of zipf is {exponent}: it may be more than 0, at most 16")
            }),
            Self::HotSpot { pages, writes } => {
                check(pages > 0.0 && pages <= 1.0, || {
                    format!("pages of the hot spot is {pages}: a share more than 0, at most 1")
                })?;
                check((0.0..=1.0).contains(&writes), || {
                    format!("writes of the hot spot is {writes}: a share of 0 to 1")
                })
            }
        }
    }
}

fn check(fine: bool, otherwise: impl FnOnce() -> String) -> Result<(), GuestError> {
    if fine { Ok(()) } else { Err(GuestError(otherwise())) }
}
