//! Writing and reading of the numbers and texts of a section.

use std::time::Duration;

use memferry_stages::untrusted::Untrusted;

/// Writes a number as a varint: 7 bits per byte, the lowest first, the highest bit set in all bytes but the last.
pub(super) fn put_varint(into: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        into.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    into.push(u8::try_from(value).expect("7 bits"));
}

/// Writes a duration, in nanoseconds.
pub(super) fn put_time(into: &mut Vec<u8>, time: Duration) {
    put_varint(into, u64::try_from(time.as_nanos()).unwrap_or(u64::MAX >> 1));
}

/// Writes bytes, preceded by their count.
pub(super) fn put_bytes(into: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(into, bytes.len() as u64);
    into.extend_from_slice(bytes);
}

/// An error in a section.
pub(super) type Wrong = &'static str;

/// The fields of a section that are yet to be read.
#[derive(Debug)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn varint(&mut self) -> Result<u64, Wrong> {
        let mut value = 0_u64;
        for shift in (0..63).step_by(7) {
            let (&byte, rest) = self.0.split_first().ok_or("it ends within a number")?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("a number has more than 63 bits")
    }

    pub(super) fn time(&mut self) -> Result<Duration, Wrong> {
        self.varint().map(Duration::from_nanos)
    }

    pub(super) fn bytes(&mut self) -> Result<&'a [u8], Wrong> {
        let length = usize::try_from(self.varint()?).unwrap_or(usize::MAX);
        let (bytes, rest) = self.0.split_at_checked(length).ok_or("a text is longer than its section")?;
        self.0 = rest;
        Ok(bytes)
    }

    pub(super) fn text(&mut self) -> Result<Untrusted, Wrong> {
        std::str::from_utf8(self.bytes()?).map(Untrusted::from).map_err(|_| "a text is no UTF-8")
    }

    /// A count of items that take at least one byte each.
    pub(super) fn count(&mut self) -> Result<usize, Wrong> {
        let count = usize::try_from(self.varint()?).unwrap_or(usize::MAX);
        if count <= self.0.len() { Ok(count) } else { Err("it counts more than it can hold") }
    }

    pub(super) fn end(self) -> Result<(), Wrong> {
        if self.0.is_empty() { Ok(()) } else { Err("something stands behind its end") }
    }
}
