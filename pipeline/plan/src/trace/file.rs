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
//! kind: 1 Guest, 2 Interval, 3 Samples, 4 End. A body is varints, times in ns, and texts with their length in front, in
//! the order of the fields of GuestFacts, Interval and Samples.
//! Interval body = length, sync, pages, then what `runs` makes of them, to the body's end
//! End body      = count of the intervals
//! ```
//!
//! The seed binds a section to its position, so that a section that is missing, duplicated or moved is detected. Data
//! is used only after its checksum is verified, and nothing is allocated beyond what the file contains. A program
//! reads one version only.

use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::Duration;

use memferry_stages::geometry::{MAX_BLOCK_ID, MAX_BLOCKS, PageSize};
use memferry_transports::temporary::Temporary;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::fields::{Fields, Wrong, put_bytes, put_time, put_varint};
use super::{Coded, Cost, DeltaSample, Deltas, GuestFacts, Interval, Runs, Samples, Share, Trace};
use memferry_transports::temporary::is_no_plain_file;
use memferry_transports::whole_file;

const MAGIC: [u8; 8] = *b"mfytrace";
const VERSION: u32 = 1;
const HEAD_BYTES: usize = 16;
const SECTION_BYTES: usize = 16;
/// The largest file that is read: one day of a large and busy guest.
const MOST_BYTES: u64 = 4 << 30;
/// The most pages of a guest: 1 PiB of small pages.
const MOST_PAGES: u64 = 1 << 38;
/// The most spans of deltas.
const MOST_SPANS: usize = 64;

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
        writer.section(Kind::Guest, &guest_body(guest))?;
        Ok(writer)
    }

    /// Appends an interval.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn interval(&mut self, interval: &Interval) -> io::Result<()> {
        self.intervals += 1;
        self.section(Kind::Interval, &interval_body(interval))
    }

    /// Completes the trace. Returns its size in bytes.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn finish(mut self, samples: &Samples) -> io::Result<u64> {
        self.section(Kind::Samples, &samples_body(samples))?;
        let mut end = Vec::new();
        put_varint(&mut end, self.intervals);
        self.section(Kind::End, &end)?;
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
    let (_, at, body) = sections.next(&[Kind::Guest])?;
    let guest = guest(body).map_err(|what| wrong(at, Kind::Guest, what))?;
    let mut intervals = Vec::new();
    let samples = loop {
        let (kind, at, body) = sections.next(&[Kind::Interval, Kind::Samples])?;
        if kind == Kind::Samples {
            break samples(body).map_err(|what| wrong(at, kind, what))?;
        }
        intervals.push(interval(body, &guest).map_err(|what| wrong(at, kind, what))?);
    };
    let (_, at, body) = sections.next(&[Kind::End])?;
    let mut fields = Fields(body);
    let counted = fields.varint().and_then(|counted| fields.end().map(|()| counted));
    match counted {
        Err(what) => Err(wrong(at, Kind::End, what)),
        Ok(counted) if counted != intervals.len() as u64 => Err(wrong(at, Kind::End, "it counts other intervals")),
        Ok(_) if intervals.is_empty() => Err(wrong(at, Kind::End, "nothing was recorded")),
        Ok(_) if sections.at < bytes.len() => Err(damaged(sections.at, Damage::Behind)),
        Ok(_) => Ok(Trace { guest, intervals, samples }),
    }
}

fn damaged(at: usize, what: Damage) -> TraceError {
    TraceError::Damaged { at: at as u64, what }
}

fn wrong(at: usize, kind: Kind, what: Wrong) -> TraceError {
    damaged(at, Damage::Section(kind.name(), what))
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

    /// The next section, which must be of one of these kinds: its kind, its position and its body.
    fn next(&mut self, kinds: &[Kind]) -> Result<(Kind, usize, &'a [u8]), TraceError> {
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
        Ok((*kind, at, body))
    }
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

fn guest_body(guest: &GuestFacts) -> Vec<u8> {
    let mut body = Vec::new();
    put_varint(&mut body, guest.page_size.bytes() as u64);
    put_varint(&mut body, guest.blocks.len() as u64);
    for (id, pages) in &guest.blocks {
        put_bytes(&mut body, id.raw().as_bytes());
        put_varint(&mut body, *pages);
    }
    for number in [guest.out_for_good, guest.untouched, guest.rearms_late.into(), guest.cores.into()] {
        put_varint(&mut body, number);
    }
    put_time(&mut body, guest.arming);
    put_time(&mut body, guest.digests);
    put_bytes(&mut body, guest.settings.raw().as_bytes());
    body
}

fn guest(body: &[u8]) -> Result<GuestFacts, Wrong> {
    let mut fields = Fields(body);
    let page_size = PageSize::new(fields.varint()?).ok_or("there is no such page size")?;
    let count = fields.count()?;
    if !(1..=MAX_BLOCKS).contains(&count) {
        return Err("a guest has 1 to 1024 blocks");
    }
    let (mut blocks, mut all) = (Vec::with_capacity(count), 0_u64);
    for _ in 0..count {
        let (id, pages) = (fields.text()?, fields.varint()?);
        all = all.checked_add(pages).filter(|&all| all <= MOST_PAGES).ok_or("no guest has so many pages")?;
        if pages == 0 || id.is_empty() || id.len() > MAX_BLOCK_ID {
            return Err("a block has a name and pages");
        }
        blocks.push((id, pages));
    }
    let (out_for_good, untouched) = (fields.varint()?, fields.varint()?);
    if out_for_good.checked_add(untouched).is_none_or(|both| both > all) || out_for_good == all {
        return Err("it leaves out more pages than there are");
    }
    let rearms_late = match fields.varint()? {
        0 => false,
        1 => true,
        _ => return Err("a yes or no is neither"),
    };
    let cores = u32::try_from(fields.varint()?).ok().filter(|&cores| cores > 0).ok_or("no host has so many cores")?;
    let (arming, digests, settings) = (fields.time()?, fields.time()?, fields.text()?);
    fields.end()?;
    Ok(GuestFacts { page_size, blocks, out_for_good, untouched, rearms_late, cores, arming, digests, settings })
}

fn interval_body(interval: &Interval) -> Vec<u8> {
    let mut body = Vec::new();
    put_time(&mut body, interval.length);
    put_time(&mut body, interval.sync);
    put_varint(&mut body, interval.written.pages());
    body.extend_from_slice(interval.written.compressed());
    body
}

fn interval(body: &[u8], guest: &GuestFacts) -> Result<Interval, Wrong> {
    let mut fields = Fields(body);
    let (length, sync, pages) = (fields.time()?, fields.time()?, fields.varint()?);
    if length.is_zero() || length > Duration::from_secs(86_400) {
        return Err("an interval is longer than nothing, and no longer than a day");
    }
    let written = Runs::check(fields.0, pages, |run| guest.has(run))?;
    Ok(Interval { length, sync, written })
}

fn samples_body(samples: &Samples) -> Vec<u8> {
    let mut body = Vec::new();
    put_varint(&mut body, u64::from(samples.zstd_level.cast_unsigned()));
    let mut put = |number: u64| put_varint(&mut body, number);
    [samples.touched, samples.first_written].into_iter().flat_map(|share| [share.of, share.part]).for_each(&mut put);
    for coded in samples.whole.iter().chain(&samples.written).chain(&samples.alone) {
        [coded.pages, coded.compressed, coded.bytes, coded.nanos].into_iter().for_each(&mut put);
    }
    for cost in [samples.read, samples.checksum, samples.delta] {
        [cost.pages, cost.nanos].into_iter().for_each(&mut put);
    }
    put(samples.deltas.len() as u64);
    for deltas in &samples.deltas {
        put_time(&mut body, deltas.span);
        for sample in [deltas.again, deltas.rested] {
            let DeltaSample { pages, from_zero, to_zero, equal, overflows, deltas, delta_bytes } = sample;
            for number in [pages, from_zero, to_zero, equal, overflows, deltas, delta_bytes] {
                put_varint(&mut body, number);
            }
        }
    }
    body
}

fn samples(body: &[u8]) -> Result<Samples, Wrong> {
    let mut fields = Fields(body);
    let zstd_level = u32::try_from(fields.varint()?).map_err(|_| "there is no such level of zstd")?.cast_signed();
    if !memferry_stages::codec::ZSTD_LEVELS.contains(&zstd_level) {
        return Err("there is no such level of zstd");
    }
    let [touched, first_written] = [share(&mut fields)?, share(&mut fields)?];
    let [whole, written, alone] = [codeds(&mut fields)?, codeds(&mut fields)?, codeds(&mut fields)?];
    let [read, checksum, delta] = [cost(&mut fields)?, cost(&mut fields)?, cost(&mut fields)?];
    let count = fields.count()?;
    if count > MOST_SPANS {
        return Err("deltas of more spans than any trace has");
    }
    let mut deltas = Vec::with_capacity(count);
    for _ in 0..count {
        let span = fields.time()?;
        deltas.push(Deltas { span, again: delta_sample(&mut fields)?, rested: delta_sample(&mut fields)? });
    }
    fields.end()?;
    if !deltas.is_sorted_by(|one: &Deltas, two| one.span < two.span)
        || deltas.first().is_some_and(|one| one.span.is_zero())
    {
        return Err("the spans of the deltas do not ascend");
    }
    Ok(Samples { zstd_level, touched, first_written, whole, written, alone, read, checksum, delta, deltas })
}

fn share(fields: &mut Fields<'_>) -> Result<Share, Wrong> {
    let share = Share { of: fields.varint()?, part: fields.varint()? };
    if share.part <= share.of { Ok(share) } else { Err("a part is more than the whole") }
}

fn codeds(fields: &mut Fields<'_>) -> Result<[Coded; 3], Wrong> {
    let mut codeds = [Coded::default(); 3];
    for coded in &mut codeds {
        *coded = Coded {
            pages: fields.varint()?,
            compressed: fields.varint()?,
            bytes: fields.varint()?,
            nanos: fields.varint()?,
        };
        if coded.compressed > coded.pages {
            return Err("a part is more than the whole");
        }
    }
    Ok(codeds)
}

fn cost(fields: &mut Fields<'_>) -> Result<Cost, Wrong> {
    Ok(Cost { pages: fields.varint()?, nanos: fields.varint()? })
}

fn delta_sample(fields: &mut Fields<'_>) -> Result<DeltaSample, Wrong> {
    let sample = DeltaSample {
        pages: fields.varint()?,
        from_zero: fields.varint()?,
        to_zero: fields.varint()?,
        equal: fields.varint()?,
        overflows: fields.varint()?,
        deltas: fields.varint()?,
        delta_bytes: fields.varint()?,
    };
    let parts = [sample.from_zero, sample.to_zero, sample.equal, sample.overflows, sample.deltas];
    let sum = parts.iter().try_fold(0_u64, |sum, &part| sum.checked_add(part));
    if sum != Some(sample.pages) {
        return Err("what became of the deltas does not add up");
    }
    Ok(sample)
}
