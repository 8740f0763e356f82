//! A delta that came from a peer: checked completely, then applied (ARCHITECTURE.md, law 8: the peer is not trusted).

use super::{MAX_RUN, PIECE_BYTES};

/// Why bytes are not a delta of a page. Every offset counts from the first byte of the delta.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// It changes nothing: an equal page is never sent.
    #[error("it changes nothing")]
    Empty,
    /// Ends in the middle.
    #[error("it ends in the middle of a run at byte {at}")]
    Truncated {
        /// Offset in the delta.
        at: usize,
    },
    /// A length of more than two bytes.
    #[error("the run length at byte {at} is longer than two bytes")]
    Length {
        /// Offset in the delta.
        at: usize,
    },
    /// A run of no bytes, other than no equal bytes at the start.
    #[error("the run at byte {at} is empty")]
    EmptyRun {
        /// Offset in the delta.
        at: usize,
    },
    /// A run exceeds its page, or its piece of one.
    #[error("the run at byte {at} ends at byte {end} of the page, beyond byte {limit}")]
    BeyondPage {
        /// Offset in the delta.
        at: usize,
        /// Where in the page the run would end.
        end: usize,
        /// Where it must end at the latest.
        limit: usize,
    },
    /// Bytes follow the last piece.
    #[error("{bytes} bytes follow the last piece, which ends at byte {at}")]
    Trailing {
        /// Offset in the delta.
        at: usize,
        /// How many.
        bytes: usize,
    },
}

/// A delta that was checked from its first byte to its last: applying it cannot fail.
#[derive(Clone, Copy, Debug)]
pub struct Delta<'a> {
    bytes: &'a [u8],
    page_bytes: usize,
}

impl<'a> Delta<'a> {
    /// Checks a whole delta of a page of `page_bytes`.
    ///
    /// # Errors
    /// A [`DeltaError`] with the offset of the first invalid byte.
    // Inlined so that the result is never assembled in memory and read back in other pieces: such a load waits for the
    // stores to the previous page, which is mostly out of cache.
    #[inline(always)]
    pub fn parse(bytes: &'a [u8], page_bytes: usize) -> Result<Self, DeltaError> {
        let mut runs = 0;
        walk(bytes, page_bytes, |_, _| runs += 1)?;
        if runs == 0 { Err(DeltaError::Empty) } else { Ok(Self { bytes, page_bytes }) }
    }

    /// Bytes of the page that it is a delta of.
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// Gives each run of new bytes with its offset in the page, in order.
    #[inline(always)]
    pub fn each_run(&self, run: impl FnMut(usize, &'a [u8])) {
        walk(self.bytes, self.page_bytes, run).expect("the delta was checked");
    }

    /// Patches the old copy of the page.
    ///
    /// # Panics
    /// If `page` is not of the size the delta was checked for.
    pub fn apply(&self, page: &mut [u8]) {
        assert_eq!(page.len(), self.page_bytes, "a delta of another page size");
        self.each_run(|offset, new| page[offset..offset + new.len()].copy_from_slice(new));
    }
}

/// Walks a delta run by run, checking as it goes.
///
/// Its state stays in registers: a page to patch is mostly out of cache, so stores to it wait for memory in the processor's store
/// buffer, and every other store takes a place in that buffer.
#[inline(always)]
fn walk<'a>(bytes: &'a [u8], page_bytes: usize, mut run: impl FnMut(usize, &'a [u8])) -> Result<(), DeltaError> {
    if page_bytes <= MAX_RUN {
        return walk_piece(bytes, 0, 0, page_bytes, run);
    }
    let mut at = 0;
    for offset in (0..page_bytes).step_by(PIECE_BYTES) {
        let (length, rest) = bytes[at..].split_first_chunk().ok_or(DeltaError::Truncated { at })?;
        let length = usize::from(u16::from_le_bytes(*length));
        if length > rest.len() {
            return Err(DeltaError::Truncated { at });
        }
        let end = at + 2 + length;
        walk_piece(&bytes[..end], at + 2, offset, (offset + PIECE_BYTES).min(page_bytes), &mut run)?;
        at = end;
    }
    let bytes = bytes.len() - at;
    if bytes == 0 { Ok(()) } else { Err(DeltaError::Trailing { at, bytes }) }
}

/// Walks a delta of one piece, which is `bytes` from `first` to the end, and changes the page from `offset` up to
/// `limit`.
#[inline(always)]
fn walk_piece<'a>(
    bytes: &'a [u8],
    first: usize,
    mut offset: usize,
    limit: usize,
    mut run: impl FnMut(usize, &'a [u8]),
) -> Result<(), DeltaError> {
    let mut at = first;
    while at < bytes.len() {
        let (equal, behind) = length(bytes, at)?;
        if equal == 0 && at != first {
            return Err(DeltaError::EmptyRun { at });
        }
        let (changed, start) = length(bytes, behind)?;
        if changed == 0 {
            return Err(DeltaError::EmptyRun { at: behind });
        }
        offset += equal;
        let end = offset + changed;
        if end > limit {
            return Err(DeltaError::BeyondPage { at: behind, end, limit });
        }
        let new = bytes[start..].get(..changed).ok_or(DeltaError::Truncated { at: start })?;
        run(offset, new);
        (at, offset) = (start + changed, end);
    }
    Ok(())
}

/// Reads the run length at `at`, and returns it with the offset after it. Two bytes must be left: a length of one byte and
/// its data, or a length of two bytes.
#[inline(always)]
fn length(bytes: &[u8], at: usize) -> Result<(usize, usize), DeltaError> {
    let Some(&[low, high]) = bytes[at..].first_chunk() else { return Err(DeltaError::Truncated { at }) };
    if low < 0x80 {
        return Ok((usize::from(low), at + 1));
    }
    if high >= 0x80 {
        return Err(DeltaError::Length { at });
    }
    Ok((usize::from(low & 0x7f) | usize::from(high) << 7, at + 2))
}
