//! The production encoder: it compares a block at a time into a mask of differing bytes, and walks the mask's *turns*, the
//! positions where equal bytes change to differing ones or back.
//!
//! A [`Writer`] owns the position in the page and in the delta, and makes QEMU's overflow tests where it writes. The code is
//! generic over the comparison; the version for each set of instructions is a thin wrapper.

#[cfg(target_arch = "x86_64")]
use super::differences::{Avx2, Avx512};
use super::differences::{BLOCK, Compare, Words};
use super::{Encoded, MAX_RUN, PIECE_BYTES};

/// Bytes whose differences are found before runs are written.
const SPAN: usize = BLOCK * 64;
/// Runs up to this length are copied as if they had this length, where there is room: one load and one store.
const SHORT_RUN: usize = 16;

/// Encodes a page with the widest instructions that the processor has.
#[inline]
pub(super) fn encode_page(old: &[u8], new: &[u8], out: &mut [u8]) -> Encoded {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(avx512) = Avx512::detect() {
            // SAFETY: the processor has what the version is compiled for; it takes and gives slices.
            return unsafe { encode_page_avx512(avx512, old, new, out) };
        }
        if let Some(avx2) = Avx2::detect() {
            // SAFETY: as above.
            return unsafe { encode_page_avx2(avx2, old, new, out) };
        }
    }
    encode_page_by(Words, old, new, out)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512bw")]
fn encode_page_avx512(avx512: Avx512, old: &[u8], new: &[u8], out: &mut [u8]) -> Encoded {
    encode_page_by(avx512, old, new, out)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn encode_page_avx2(avx2: Avx2, old: &[u8], new: &[u8], out: &mut [u8]) -> Encoded {
    encode_page_by(avx2, old, new, out)
}

#[inline(always)]
fn encode_page_by(compare: impl Compare, old: &[u8], new: &[u8], out: &mut [u8]) -> Encoded {
    if new.len() <= MAX_RUN { encode(compare, old, new, out) } else { encode_pieces(compare, old, new, out) }
}

/// Encodes a page as pieces, each with its length in front.
#[inline(always)]
fn encode_pieces(compare: impl Compare, old: &[u8], new: &[u8], out: &mut [u8]) -> Encoded {
    let (mut written, mut changed) = (0, false);
    for (old, new) in old.chunks(PIECE_BYTES).zip(new.chunks(PIECE_BYTES)) {
        let Some((length, room)) = out[written..].split_first_chunk_mut() else { return Encoded::Overflow };
        let Some(bytes) = encode_piece(compare, old, new, room) else { return Encoded::Overflow };
        *length = u16::try_from(bytes).expect("little more than a piece").to_le_bytes();
        written += length.len() + bytes;
        changed |= bytes > 0;
    }
    if changed { Encoded::Delta(written) } else { Encoded::Equal }
}

/// Encodes one piece, as a single run where separate runs are not shorter. Returns its number of bytes, 0 if it is equal; `None` if
/// there is no room.
#[inline(always)]
fn encode_piece(compare: impl Compare, old: &[u8], new: &[u8], room: &mut [u8]) -> Option<usize> {
    let most = room.len().min(new.len());
    match encode(compare, old, new, &mut room[..most]) {
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
#[inline(always)]
fn encode(compare: impl Compare, old: &[u8], new: &[u8], out: &mut [u8]) -> Encoded {
    debug_assert!(new.len() <= MAX_RUN, "a run could be too long to be written");
    let mut writer = Writer { new, out, read: 0, written: 0 };
    match writer.runs(compare, old) {
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
    #[inline(always)]
    fn runs(&mut self, compare: impl Compare, old: &[u8]) -> Option<()> {
        let mut open = None;
        for (index, (old, new)) in old.chunks(SPAN).zip(self.new.chunks(SPAN)).enumerate() {
            let turns = Turns::find(compare, old, new, open.is_some());
            for block in ones(turns.blocks) {
                let from = index * SPAN + block * BLOCK;
                let mut turns = ones(turns.bytes[block]).map(|byte| from + byte);
                if let Some(start) = open.take() {
                    self.run(start, turns.next()?)?;
                }
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

    /// Writes the run of new bytes `start..end`, after a run of the equal bytes before it.
    #[inline(always)]
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

    /// Writes a run of at most [`SHORT_RUN`] bytes, if both sides have room for that many.
    #[inline(always)]
    fn short_run(&mut self, equal: usize, start: usize, bytes: usize) -> Option<()> {
        if bytes > SHORT_RUN {
            return None;
        }
        let from = self.new.get(start..)?.first_chunk::<SHORT_RUN>()?;
        let room = self.out.get_mut(self.written..)?.first_chunk_mut::<{ 3 + SHORT_RUN }>()?;
        let ([low, high], lengths) = length(equal);
        [room[0], room[1]] = [low, high];
        room[lengths] = length(bytes).0[0];
        let lengths = lengths + 1;
        room[lengths..lengths + SHORT_RUN].copy_from_slice(from);
        self.written += lengths + bytes;
        Some(())
    }

    /// Writes a run length. Two bytes must be free even for one of a byte: QEMU's overflow test.
    #[inline(always)]
    fn length(&mut self, of: usize) -> Option<()> {
        let room = self.out.get_mut(self.written..)?.first_chunk_mut()?;
        let bytes;
        (*room, bytes) = length(of);
        self.written += bytes;
        Some(())
    }

    /// The last of QEMU's overflow tests: equal bytes after the last run require two free bytes, though they write none.
    fn end(&self) -> Option<()> {
        let fits = self.written == 0 || self.read == self.new.len() || self.written + 2 <= self.out.len();
        fits.then_some(())
    }
}

/// A run length in its encoding, and how many of the two bytes are written.
#[inline(always)]
fn length(of: usize) -> ([u8; 2], usize) {
    let [low, high] = [of & 0x7f, of >> 7].map(|bits| u8::try_from(bits).expect("at most the longest run"));
    if high == 0 { ([low, 0], 1) } else { ([low | 0x80, high], 2) }
}

/// The turns of a span. All of the span is compared before its turns are walked: branches on them are hard to predict, and a
/// misprediction must not delay the loads of the next blocks.
struct Turns {
    /// A bit for each block that has a turn.
    blocks: u64,
    /// A bit for each byte that differs where its neighbour before does not, or the other way round.
    bytes: [u64; SPAN / BLOCK],
}

impl Turns {
    /// Compares a span; `last` is whether the byte before it differs.
    #[inline(always)]
    fn find(compare: impl Compare, old: &[u8], new: &[u8], last: bool) -> Self {
        let mut turns = Self { blocks: 0, bytes: [0; SPAN / BLOCK] };
        let ((old, old_rest), (new, new_rest)) = (old.as_chunks(), new.as_chunks());
        let mut last = u64::from(last);
        let mut find = |block: usize, bytes: &mut u64, mask: u64| {
            *bytes = mask ^ (mask << 1 | last);
            last = mask >> (BLOCK - 1);
            turns.blocks |= u64::from(*bytes != 0) << block;
        };
        let mut bytes = turns.bytes.iter_mut().enumerate();
        for ((old, new), (block, bytes)) in old.iter().zip(new).zip(bytes.by_ref()) {
            find(block, bytes, compare.differences(old, new));
        }
        if let Some((block, bytes)) = bytes.next().filter(|_| !new_rest.is_empty()) {
            find(block, bytes, compare.differences(&padded(old_rest), &padded(new_rest)));
        }
        turns
    }
}

/// The bits of a word that are set, lowest first.
#[inline(always)]
fn ones(mut word: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = word.trailing_zeros();
        word &= word.checked_sub(1)?;
        Some(bit as usize)
    })
}

/// The end of a page that is not a multiple of blocks, padded with zeros.
#[cold]
fn padded(rest: &[u8]) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    block[..rest.len()].copy_from_slice(rest);
    block
}

/// Every version that this processor can run, by name: for tests.
#[cfg(test)]
pub(super) fn versions() -> Vec<(&'static str, super::Version)> {
    let mut versions: Vec<(_, super::Version)> =
        vec![("words", Box::new(|old, new, out| encode_page_by(Words, old, new, out)))];
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(avx2) = Avx2::detect() {
            // SAFETY: the processor has AVX2.
            versions.push(("AVX2", Box::new(move |old, new, out| unsafe { encode_page_avx2(avx2, old, new, out) })));
        }
        if let Some(avx512) = Avx512::detect() {
            // SAFETY: the processor has AVX-512BW.
            let version: super::Version =
                Box::new(move |old, new, out| unsafe { encode_page_avx512(avx512, old, new, out) });
            versions.push(("AVX-512", version));
        }
    }
    versions
}
