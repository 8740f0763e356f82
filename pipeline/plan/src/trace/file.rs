//! The file of a trace.
//!
//! ```text
//! file     = head, Guest, Interval*, Samples, End
//! head
//! ┌─────────────────────────┬────────────┬────────────────────────────┐
//! │ magic 8: "mfytrace"     │ version 4  │ xxh3-64 of these 12, low 4 │     all numbers little-endian
//! └─────────────────────────┴────────────┴────────────────────────────┘
//! section
//! ┌────────┬──────────────┬───────────────────────────────────────────────────────────────────────────┬──────┐
//! │ kind 4 │ body bytes 4 │ xxh3-64 of the 8 before it and the body, seeded with the section's place 8 │ body │
//! └────────┴──────────────┴───────────────────────────────────────────────────────────────────────────┴──────┘
//! kind: 1 Guest, 2 Interval, 3 Samples, 4 End. A body is a value in the format of postcard.
//! Guest body    = GuestFacts
//! Interval body = length, sync, pages, then what `runs` makes of them, to the body's end
//! Samples body  = Samples
//! End body      = count of the intervals, u64
//! ```
//!
//! The fields of a value follow one another in the order of its type, numbers as varints. So a change of one of these
//! types is a change of the format, and of its version. A program reads one version only.
//!
//! The seed binds a section to its position, so that a section that is missing, duplicated or moved is detected. Data
//! is used only after its checksum is verified. A list in it grows with the bytes that were read for it, and the size of
//! its section is bounded before it is decoded.

use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::Duration;

use memferry::values::Time;
use memferry_stages::geometry::{MAX_BLOCK_ID, MAX_BLOCKS};
use memferry_transports::temporary::Temporary;
use postcard::Deserializer;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::{DeltaSample, GuestFacts, Interval, Runs, Samples, Trace};
use memferry_transports::temporary::is_no_plain_file;
use memferry_transports::whole_file;

const MAGIC: [u8; 8] = *b"mfytrace";
const VERSION: u32 = 3;
const HEAD_BYTES: usize = 16;
const SECTION_BYTES: usize = 16;
/// The largest file that is read: one day of a large and busy guest.
const MOST_BYTES: u64 = 4 << 30;
/// The most pages of a guest: 1 PiB of small pages.
const MOST_PAGES: u64 = 1 << 38;
/// The most spans of deltas.
const MOST_SPANS: usize = 64;
/// The largest body that holds one value only: the most blocks with the longest ids, and settings.
const MOST_VALUE_BYTES: usize = 1 << 20;
/// The longest interval.
const LONGEST_INTERVAL: Duration = Duration::from_secs(86_400);
/// The longest of the other times.
const LONGEST: Duration = Time::LONGEST.0;

/// An error in a section.
type Wrong = &'static str;

/// Why a file cannot be read as a trace.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// It could not be read or written.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Its content is not a valid trace.
    #[error("byte {at}: {what}")]
    Damaged {
        /// Its offset in bytes.
        at: u64,
        /// The damage.
        what: Damage,
    },
}

/// The damage to a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Damage {
    /// It does not begin as a trace does.
    NoTrace,
    /// It has another version.
    Version(u32),
    /// It is truncated.
    Truncated,
    /// A checksum does not match.
    Checksum,
    /// A section is not of the expected kind.
    Order(u32),
    /// A section contains an invalid value.
    Section(&'static str, &'static str),
    /// Data follows the end.
    Behind,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoTrace => f.write_str("this is no trace of memferry record"),
            Self::Version(found) => write!(f, "a trace of version {found}, and this program reads version {VERSION}"),
            Self::Truncated => f.write_str("the trace ends too early"),
            Self::Checksum => f.write_str("the checksum is not that of the bytes"),
            Self::Order(kind) => write!(f, "a section of kind {kind} has no place here"),
            Self::Section(name, what) => write!(f, "section {name}: {what}"),
            Self::Behind => f.write_str("something follows the end of the trace"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Kind {
    Guest = 1,
    Interval = 2,
    Samples = 3,
    End = 4,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Guest => "Guest",
            Self::Interval => "Interval",
            Self::Samples => "Samples",
            Self::End => "End",
        }
    }
}

/// Writes a trace while it is recorded, to a temporary file beside its path that only the owner can read. The file is
/// renamed when it is complete. Dropped before that, it is removed.
#[derive(Debug)]
pub struct TraceWriter {
    out: BufWriter<File>,
    temporary: Temporary,
    written: u64,
    intervals: u64,
}

impl TraceWriter {
    /// Begins a trace at `path`.
    ///
    /// # Errors
    /// If no such file can be created.
    pub fn create(path: &Path, guest: &GuestFacts) -> io::Result<Self> {
        if path.is_dir() || path.file_name().is_none() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is a folder: name a file in it"));
        }
        if is_no_plain_file(path) {
            let what = "it is a link, a device or the like, which the trace would replace: name a plain file";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let (file, temporary) = Temporary::create(path)?;
        let mut writer = Self { out: BufWriter::new(file), temporary, written: 0, intervals: 0 };
        writer.put(&head())?;
        writer.section(Kind::Guest, &encoded(guest))?;
        Ok(writer)
    }

    /// Appends an interval.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn interval(&mut self, interval: &Interval) -> io::Result<()> {
        self.intervals += 1;
        let Interval { length, sync, written } = interval;
        let mut body = encoded(&(length, sync, written.pages()));
        body.extend_from_slice(written.compressed());
        self.section(Kind::Interval, &body)
    }

    /// Completes the trace. Returns its size in bytes.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn finish(mut self, samples: &Samples) -> io::Result<u64> {
        self.section(Kind::Samples, &encoded(samples))?;
        self.section(Kind::End, &encoded(&self.intervals))?;
        self.out.flush()?;
        self.out.get_ref().sync_all()?;
        self.temporary.replace()?;
        Ok(self.written)
    }

    fn section(&mut self, kind: Kind, body: &[u8]) -> io::Result<()> {
        let section = section(self.written, kind, body)?;
        self.put(&section)?;
        self.put(body)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }
}

/// Reads a trace.
///
/// # Errors
/// If it cannot be read, or is not a trace.
pub fn read(path: &Path) -> Result<Trace, TraceError> {
    let bytes = whole_file::read(path, MOST_BYTES)?;
    parse(&bytes)
}

/// Parses a trace.
///
/// # Errors
/// [`TraceError::Damaged`], with the position.
pub fn parse(bytes: &[u8]) -> Result<Trace, TraceError> {
    let mut sections = Sections { bytes, at: 0 };
    sections.head()?;
    let guest = sections.next(&[Kind::Guest])?.value(check_guest)?;
    let mut intervals = Vec::new();
    let samples = loop {
        let section = sections.next(&[Kind::Interval, Kind::Samples])?;
        if section.kind == Kind::Samples {
            break section.value(check_samples)?;
        }
        intervals.push(section.interval(&guest)?);
    };
    sections.next(&[Kind::End])?.value(|&counted: &u64| match intervals.len() {
        0 => Err("nothing was recorded"),
        recorded if recorded as u64 != counted => Err("it counts other intervals"),
        _ => Ok(()),
    })?;
    if sections.at < bytes.len() {
        return Err(damaged(sections.at, Damage::Behind));
    }
    Ok(Trace { guest, intervals, samples })
}

fn damaged(at: usize, what: Damage) -> TraceError {
    TraceError::Damaged { at: at as u64, what }
}

struct Sections<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Sections<'a> {
    fn head(&mut self) -> Result<(), TraceError> {
        let here = self.bytes.get(..HEAD_BYTES).ok_or(damaged(0, Damage::NoTrace))?;
        if here[..8] != MAGIC {
            return Err(damaged(0, Damage::NoTrace));
        }
        let version = u32::from_le_bytes(here[8..12].try_into().expect("4 bytes"));
        if here[12..] != xxh3_64(&here[..12]).to_le_bytes()[..4] {
            return Err(damaged(8, Damage::Checksum));
        }
        if version != VERSION {
            return Err(damaged(8, Damage::Version(version)));
        }
        self.at = HEAD_BYTES;
        Ok(())
    }

    /// The next section, which must be of one of these kinds.
    fn next(&mut self, kinds: &[Kind]) -> Result<Section<'a>, TraceError> {
        let at = self.at;
        let rest = &self.bytes[at..];
        let (head, rest) = rest.split_at_checked(SECTION_BYTES).ok_or(damaged(at, Damage::Truncated))?;
        let number = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("4 bytes"));
        let (found, length) = (number(0), number(4) as usize);
        let body = rest.get(..length).ok_or(damaged(at, Damage::Truncated))?;
        if head[8..] != checksum(at as u64, &head[..8], body).to_le_bytes() {
            return Err(damaged(at, Damage::Checksum));
        }
        let kind = kinds.iter().find(|&&kind| kind as u32 == found).ok_or(damaged(at, Damage::Order(found)))?;
        self.at = at + SECTION_BYTES + length;
        Ok(Section { kind: *kind, at, body })
    }
}

/// A section whose checksum was verified.
struct Section<'a> {
    kind: Kind,
    at: usize,
    body: &'a [u8],
}

impl<'a> Section<'a> {
    /// The value that the body holds, checked.
    fn value<T: Deserialize<'a>>(&self, check: impl FnOnce(&T) -> Result<(), Wrong>) -> Result<T, TraceError> {
        if self.body.len() > MOST_VALUE_BYTES {
            return Err(self.wrong("it is longer than any such section"));
        }
        let (value, rest) = self.start()?;
        if !rest.is_empty() {
            return Err(self.wrong_before(rest, "something stands behind its end"));
        }
        check(&value).map_err(|what| self.wrong(what))?;
        Ok(value)
    }

    fn interval(&self, guest: &GuestFacts) -> Result<Interval, TraceError> {
        let ((length, sync, pages), compressed) = self.start::<(Duration, Duration, u64)>()?;
        if length.is_zero() || length > LONGEST_INTERVAL {
            return Err(self.wrong("an interval is longer than nothing, and no longer than a day"));
        }
        if sync > LONGEST {
            return Err(self.wrong("no sync takes so long"));
        }
        let written = Runs::check(compressed, pages, |run| guest.has(run)).map_err(|what| self.wrong(what))?;
        Ok(Interval { length, sync, written })
    }

    /// The value at the start of the body, and the bytes after it.
    fn start<T: Deserialize<'a>>(&self) -> Result<(T, &'a [u8]), TraceError> {
        let mut decoder = Deserializer::from_bytes(self.body);
        let value = T::deserialize(&mut decoder);
        let rest = decoder.finalize().expect("the rest of a slice");
        match value {
            Ok(value) => Ok((value, rest)),
            Err(postcard::Error::DeserializeUnexpectedEnd) => Err(self.wrong_before(rest, "it ends within a value")),
            Err(_) => Err(self.wrong_before(rest, "a value cannot be decoded")),
        }
    }

    fn wrong(&self, what: Wrong) -> TraceError {
        damaged(self.at, Damage::Section(self.kind.name(), what))
    }

    /// As [`Section::wrong`], where the rest of the body begins.
    fn wrong_before(&self, rest: &[u8], what: Wrong) -> TraceError {
        let at = self.at + SECTION_BYTES + self.body.len() - rest.len();
        damaged(at, Damage::Section(self.kind.name(), what))
    }
}

fn encoded(value: &impl Serialize) -> Vec<u8> {
    postcard::to_allocvec(value).expect("its lists know their lengths, and a vector takes everything")
}

fn head() -> [u8; HEAD_BYTES] {
    let mut head = [0; HEAD_BYTES];
    head[..8].copy_from_slice(&MAGIC);
    head[8..12].copy_from_slice(&VERSION.to_le_bytes());
    let sum = xxh3_64(&head[..12]).to_le_bytes();
    head[12..].copy_from_slice(&sum[..4]);
    head
}

/// The header of a section, which precedes its body.
fn section(at: u64, kind: Kind, body: &[u8]) -> io::Result<[u8; SECTION_BYTES]> {
    let length = u32::try_from(body.len())
        .map_err(|_| io::Error::new(io::ErrorKind::FileTooLarge, "an interval of 4 GiB and more"))?;
    let mut section = [0; SECTION_BYTES];
    section[..4].copy_from_slice(&(kind as u32).to_le_bytes());
    section[4..8].copy_from_slice(&length.to_le_bytes());
    let sum = checksum(at, &section[..8], body);
    section[8..].copy_from_slice(&sum.to_le_bytes());
    Ok(section)
}

fn checksum(at: u64, head: &[u8], body: &[u8]) -> u64 {
    let mut hasher = Xxh3::with_seed(at);
    hasher.update(head);
    hasher.update(body);
    hasher.digest()
}

fn check_guest(guest: &GuestFacts) -> Result<(), Wrong> {
    if !(1..=MAX_BLOCKS).contains(&guest.blocks.len()) {
        return Err("a guest has 1 to 1024 blocks");
    }
    let mut all = 0_u64;
    for (id, pages) in &guest.blocks {
        all = all.checked_add(*pages).filter(|&all| all <= MOST_PAGES).ok_or("more pages than a guest can have")?;
        if *pages == 0 || !(1..=MAX_BLOCK_ID).contains(&id.len()) {
            return Err("a block has a name and pages");
        }
    }
    let left_out = guest.excluded.checked_add(guest.untouched);
    if left_out.is_none_or(|both| both > all) || guest.excluded == all {
        return Err("it leaves out more pages than there are");
    }
    if guest.cores == 0 {
        return Err("a host has a core");
    }
    if guest.arming.max(guest.digests) > LONGEST { Err("nothing takes so long") } else { Ok(()) }
}

fn check_samples(samples: &Samples) -> Result<(), Wrong> {
    if !memferry_stages::codec::ZSTD_LEVELS.contains(&samples.zstd_level) {
        return Err("there is no such level of zstd");
    }
    let shares = [samples.touched, samples.first_written];
    let mut coded = samples.whole.iter().chain(&samples.written).chain(&samples.alone);
    if shares.iter().any(|share| share.part > share.of) || coded.any(|coded| coded.compressed > coded.pages) {
        return Err("a part is more than the whole");
    }
    let deltas = &samples.deltas;
    if deltas.len() > MOST_SPANS {
        return Err("deltas of more spans than any trace has");
    }
    if !deltas.is_sorted_by(|one, two| one.span < two.span) || deltas.first().is_some_and(|one| one.span.is_zero()) {
        return Err("the spans of the deltas do not ascend");
    }
    if deltas.last().is_some_and(|one| one.span > LONGEST) {
        return Err("no span is so long");
    }
    deltas.iter().flat_map(|one| [&one.again, &one.rested, &one.from_zero]).try_for_each(check_deltas)
}

/// The sums over all spans fit their types: page counts and bytes are bounded.
fn check_deltas(sample: &DeltaSample) -> Result<(), Wrong> {
    let parts = [sample.to_zero, sample.equal, sample.overflows, sample.deltas];
    let sum = parts.iter().try_fold(0_u64, |sum, &part| sum.checked_add(part));
    if sum != Some(sample.pages) {
        return Err("what became of the deltas does not add up");
    }
    // In pages of the largest size, 64 KiB.
    let full_pages = sample.delta_bytes >> 16;
    if sample.pages.max(full_pages) > MOST_PAGES { Err("more pages than a guest can have") } else { Ok(()) }
}
