//! The encoder that is used: it compares a block at a time into a mask of differing bytes, and walks the mask's turns.
//!
//! A [`Writer`] owns the place reached in the page and in the delta, and makes QEMU's overflow tests where it writes.

use super::differences::{BLOCK, differences};
use super::{Encoded, MAX_RUN, PIECE_BYTES};

/// Bytes whose differences are found before runs are written.
const SPAN: usize = BLOCK * 64;
/// Runs up to this length are copied as if they had it, where there is room: one load and one store.
const SHORT_RUN: usize = 16;

/// Encodes a page as pieces, each with its length in front.
pub(super) fn encode_pieces(old: &[u8], new: &[u8], out: &mut [u8]) -> Encoded {
    let (mut written, mut changed) = (0, false);
    for (old, new) in old.chunks(PIECE_BYTES).zip(new.chunks(PIECE_BYTES)) {
        let Some((length, room)) = out[written..].split_first_chunk_mut() else { return Encoded::Overflow };
        let Some(bytes) = encode_piece(old, new, room) else { return Encoded::Overflow };
        *length = u16::try_from(bytes).expect("little more than a piece").to_le_bytes();
        written += length.len() + bytes;
        changed |= bytes > 0;
    }
    if changed { Encoded::Delta(written) } else { Encoded::Equal }
}

/// Encodes one piece: its bytes, 0 if it is equal; as one run where runs are not shorter. `None` if there is no room.
fn encode_piece(old: &[u8], new: &[u8], room: &mut [u8]) -> Option<usize> {
    let most = room.len().min(new.len());
    match encode(old, new, &mut room[..most]) {
        Encoded::Equal => Some(0),
        Encoded::Delta(bytes) => Some(bytes),
        Encoded::Overflow => {
            let mut writer = Writer { new, out: room, read: 0, written: 0 };
            writer.run(0, new.len())?;
            Some(writer.written)
        }
    }
}

/// Encodes up to [`MAX_RUN`] bytes as one delta of at most the bytes of `out`.
pub(super) fn encode(old: &[u8], new: &[u8], out: &mut [u8]) -> Encoded {
    debug_assert!(new.len() <= MAX_RUN, "a run could be too long to be written");
    let mut writer = Writer { new, out, read: 0, written: 0 };
    match writer.runs(old) {
        None => Encoded::Overflow,
        Some(()) if writer.written == 0 => Encoded::Equal,
        Some(()) => Encoded::Delta(writer.written),
    }
}

/// Writes the runs of `new` one after another. Each step gives `None` if it does not fit.
struct Writer<'a> {
    new: &'a [u8],
    out: &'a mut [u8],
    /// Where the last run that was written ends in `new`, and in `out`.
    read: usize,
    written: usize,
}

impl Writer<'_> {
    /// Finds and writes all runs.
    #[inline]
    fn runs(&mut self, old: &[u8]) -> Option<()> {
        let mut open = None;
        for (index, (old, new)) in old.chunks(SPAN).zip(self.new.chunks(SPAN)).enumerate() {
            let turns = Turns::find(old, new, open.is_some());
            for block in ones(turns.blocks) {
                let from = index * SPAN + block * BLOCK;
                let mut turns = open.take().into_iter().chain(ones(turns.bytes[block]).map(|byte| from + byte));
                while let Some(start) = turns.next() {
                    match turns.next() {
                        Some(end) => self.run(start, end)?,
                        None => open = Some(start),
                    }
                }
            }
        }
        if let Some(start) = open {
            self.run(start, self.new.len())?;
        }
        self.end()
    }

    /// Writes the run of new bytes `start..end`, and that all before it are equal.
    #[inline]
    fn run(&mut self, start: usize, end: usize) -> Option<()> {
        let (equal, bytes) = (start - self.read, end - start);
        self.read = end;
        if self.short_run(equal, start, bytes).is_some() {
            return Some(());
        }
        self.length(equal)?;
        self.length(bytes)?;
        self.out.get_mut(self.written..self.written + bytes)?.copy_from_slice(&self.new[start..end]);
        self.written += bytes;
        Some(())
    }

    /// Writes a run whose lengths take a byte each, if there is room for [`SHORT_RUN`] bytes here and there.
    #[inline]
    fn short_run(&mut self, equal: usize, start: usize, bytes: usize) -> Option<()> {
        let equal = u8::try_from(equal).ok().filter(|&equal| equal < 0x80)?;
        let length = u8::try_from(bytes).ok().filter(|_| bytes <= SHORT_RUN)?;
        let from = self.new.get(start..)?.first_chunk::<SHORT_RUN>()?;
        let room = self.out.get_mut(self.written..)?.first_chunk_mut::<{ 2 + SHORT_RUN }>()?;
        room[..2].copy_from_slice(&[equal, length]);
        room[2..].copy_from_slice(from);
        self.written += 2 + bytes;
        Some(())
    }

    /// Writes a run length. Two bytes must be free even for one of a byte: QEMU's overflow test.
    #[inline]
    fn length(&mut self, length: usize) -> Option<()> {
        let room = self.out.get_mut(self.written..)?.first_chunk_mut()?;
        let [low, high] = [length & 0x7f, length >> 7].map(|bits| u8::try_from(bits).expect("at most the longest run"));
        *room = [if high == 0 { low } else { low | 0x80 }, high];
        self.written += if high == 0 { 1 } else { 2 };
        Some(())
    }

    /// The last of QEMU's overflow tests: equal bytes behind the last run want two bytes free, though they write none.
    fn end(&self) -> Option<()> {
        let fits = self.written == 0 || self.read == self.new.len() || self.written + 2 <= self.out.len();
        fits.then_some(())
    }
}

/// Where in a span equal bytes turn to differing ones, and back. All of a span is compared before its turns are looked
/// at: what they say is hard to predict, and must not hold up the loads of the next blocks.
struct Turns {
    /// A bit for each block that has a turn.
    blocks: u64,
    /// A bit for each byte that differs where its neighbour before does not, or the other way round.
    bytes: [u64; SPAN / BLOCK],
}

impl Turns {
    /// Compares a span; `last` tells whether the byte before it differs.
    #[inline]
    fn find(old: &[u8], new: &[u8], last: bool) -> Self {
        let mut turns = Self { blocks: 0, bytes: [0; SPAN / BLOCK] };
        let mut last = u64::from(last);
        for (block, bytes) in turns.bytes.iter_mut().enumerate().take(new.len().div_ceil(BLOCK)) {
            let mask = differences(&block_at(old, block), &block_at(new, block));
            *bytes = mask ^ (mask << 1 | last);
            last = mask >> (BLOCK - 1);
            turns.blocks |= u64::from(*bytes != 0) << block;
        }
        turns
    }
}

/// The bits of a word that are set, lowest first.
#[inline]
fn ones(mut word: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = word.trailing_zeros();
        word &= word.checked_sub(1)?;
        Some(bit as usize)
    })
}

/// A block of a page; zeros follow the end of a page that is no multiple of blocks.
#[inline]
fn block_at(page: &[u8], block: usize) -> [u8; BLOCK] {
    let rest = &page[block * BLOCK..];
    rest.first_chunk().copied().unwrap_or_else(|| {
        let mut padded = [0; BLOCK];
        padded[..rest.len()].copy_from_slice(rest);
        padded
    })
}
