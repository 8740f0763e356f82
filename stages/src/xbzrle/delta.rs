//! A delta that came from a peer: checked whole, then applied.

use super::{MAX_RUN, PIECE_BYTES};

/// Why bytes are no delta of a page. Every offset counts from the first byte of the delta.
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
    /// A run leaves its page, or its piece of one.
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
    /// A [`DeltaError`] with the offset of the first byte that cannot be.
    pub fn parse(bytes: &'a [u8], page_bytes: usize) -> Result<Self, DeltaError> {
        let mut reader = Reader::new(bytes, page_bytes);
        if reader.next_run()?.is_none() {
            return Err(DeltaError::Empty);
        }
        while reader.next_run()?.is_some() {}
        Ok(Self { bytes, page_bytes })
    }

    /// The runs of new bytes as (offset in the page, bytes), in order.
    pub fn runs(&self) -> impl Iterator<Item = (usize, &'a [u8])> + use<'a> {
        let mut reader = Reader::new(self.bytes, self.page_bytes);
        std::iter::from_fn(move || reader.next_run().expect("the delta was checked"))
    }

    /// Patches the old copy of the page.
    ///
    /// # Panics
    /// If `page` is not of the size the delta was checked for.
    pub fn apply(&self, page: &mut [u8]) {
        assert_eq!(page.len(), self.page_bytes, "a delta of another page size");
        for (offset, new) in self.runs() {
            page[offset..offset + new.len()].copy_from_slice(new);
        }
    }
}

/// Walks a delta run by run, checking as it goes. A page in one delta is read as its only piece, without a length.
struct Reader<'a> {
    bytes: &'a [u8],
    page_bytes: usize,
    /// The next byte to read.
    at: usize,
    /// Where the piece's delta starts and ends.
    first: usize,
    end: usize,
    /// Where in the page the run before ended, and where the piece ends.
    offset: usize,
    limit: usize,
}

impl<'a> Reader<'a> {
    fn new(bytes: &'a [u8], page_bytes: usize) -> Self {
        let (end, limit) = if page_bytes <= MAX_RUN { (bytes.len(), page_bytes) } else { (0, 0) };
        Self { bytes, page_bytes, at: 0, first: 0, end, offset: 0, limit }
    }

    /// The next run of new bytes and its offset in the page; `None` after the last.
    #[inline]
    fn next_run(&mut self) -> Result<Option<(usize, &'a [u8])>, DeltaError> {
        while self.at == self.end {
            if !self.open_piece()? {
                return Ok(None);
            }
        }
        let run = self.at;
        let equal = self.length()?;
        if equal == 0 && run != self.first {
            return Err(DeltaError::EmptyRun { at: run });
        }
        let run = self.at;
        let changed = self.length()?;
        if changed == 0 {
            return Err(DeltaError::EmptyRun { at: run });
        }
        let (offset, end) = (self.offset + equal, self.offset + equal + changed);
        if end > self.limit {
            return Err(DeltaError::BeyondPage { at: run, end, limit: self.limit });
        }
        let new = self.bytes[self.at..self.end].get(..changed).ok_or(DeltaError::Truncated { at: self.at })?;
        self.at += changed;
        self.offset = end;
        Ok(Some((offset, new)))
    }

    /// Reads the length of the next piece; false if the page is complete.
    fn open_piece(&mut self) -> Result<bool, DeltaError> {
        let at = self.at;
        let rest = &self.bytes[at..];
        if self.limit == self.page_bytes {
            return if rest.is_empty() { Ok(false) } else { Err(DeltaError::Trailing { at, bytes: rest.len() }) };
        }
        let (length, rest) = rest.split_first_chunk().ok_or(DeltaError::Truncated { at })?;
        let length = usize::from(u16::from_le_bytes(*length));
        if length > rest.len() {
            return Err(DeltaError::Truncated { at });
        }
        self.at += 2;
        (self.first, self.end) = (self.at, self.at + length);
        self.offset = self.limit;
        self.limit = (self.offset + PIECE_BYTES).min(self.page_bytes);
        Ok(true)
    }

    /// Reads a run length. Two bytes must be left: a length of one byte and what follows it, or one of two.
    #[inline]
    fn length(&mut self) -> Result<usize, DeltaError> {
        let at = self.at;
        let Some(&[low, high]) = self.bytes[at..self.end].first_chunk() else {
            return Err(DeltaError::Truncated { at });
        };
        if low < 0x80 {
            self.at += 1;
            return Ok(usize::from(low));
        }
        if high >= 0x80 {
            return Err(DeltaError::Length { at });
        }
        self.at += 2;
        Ok(usize::from(low & 0x7f) | usize::from(high) << 7)
    }
}
