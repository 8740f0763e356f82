//! The fields of a body. A bounded cursor reads them: nothing is read, believed or allocated for before it is checked. Names and
//! lists are written by functions that assert the same bounds.

use std::ops::RangeInclusive;

use super::error::WireError;
use crate::untrusted::Untrusted;

/// What is left of a body's fields. Every read names its field, for the error.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    left: &'a [u8],
}

impl<'a> Fields<'a> {
    /// A cursor at the first of the fields.
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { left: bytes }
    }

    /// Is nothing left?
    pub(super) fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    /// The next `bytes` bytes.
    pub(super) fn slice(&mut self, field: &'static str, bytes: usize) -> Result<&'a [u8], WireError> {
        let short = WireError::Short { field, needs: bytes, left: self.left.len() };
        let (taken, left) = self.left.split_at_checked(bytes).ok_or(short)?;
        self.left = left;
        Ok(taken)
    }

    /// The next `N` bytes.
    pub(super) fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], WireError> {
        self.slice(field, N).map(|bytes| bytes.try_into().expect("a slice of N bytes"))
    }

    pub(super) fn u8(&mut self, field: &'static str) -> Result<u8, WireError> {
        self.array(field).map(u8::from_le_bytes)
    }

    pub(super) fn u16(&mut self, field: &'static str) -> Result<u16, WireError> {
        self.array(field).map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, WireError> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, field: &'static str) -> Result<u64, WireError> {
        self.array(field).map(u64::from_le_bytes)
    }

    pub(super) fn u128(&mut self, field: &'static str) -> Result<u128, WireError> {
        self.array(field).map(u128::from_le_bytes)
    }

    /// A byte that is 0 or 1.
    pub(super) fn bool(&mut self, field: &'static str) -> Result<bool, WireError> {
        self.choice(field, &[false, true])
    }

    /// A byte that is the index of one of `choices`.
    pub(super) fn choice<T: Copy>(&mut self, field: &'static str, choices: &[T]) -> Result<T, WireError> {
        let value = self.u8(field)?;
        choices.get(usize::from(value)).copied().ok_or(WireError::UnknownValue { field, value })
    }

    /// Text with its length in a byte before it.
    pub(super) fn name(&mut self, field: &'static str, most: usize) -> Result<Untrusted, WireError> {
        let bytes = self.u8(field)?;
        within(field, bytes.into(), 1..=most as u64)?;
        self.text(field, bytes.into())
    }

    /// Text of `bytes` bytes.
    pub(super) fn text(&mut self, field: &'static str, bytes: usize) -> Result<Untrusted, WireError> {
        let bytes = self.slice(field, bytes)?;
        std::str::from_utf8(bytes).map(Untrusted::from).map_err(|_| WireError::Utf8 { field })
    }

    /// A list with the number of its items in two bytes before it. Grows as items are read, so that a count alone
    /// allocates nothing.
    pub(super) fn list<T>(
        &mut self,
        field: &'static str,
        counts: RangeInclusive<usize>,
        mut item: impl FnMut(&mut Self) -> Result<T, WireError>,
    ) -> Result<Vec<T>, WireError> {
        let count = self.u16(field)?;
        within(field, count.into(), *counts.start() as u64..=*counts.end() as u64)?;
        (0..count).map(|_| item(self)).collect()
    }

    /// Nothing may be left.
    pub(super) fn end(self) -> Result<(), WireError> {
        if self.left.is_empty() { Ok(()) } else { Err(WireError::Trailing { bytes: self.left.len() }) }
    }
}

/// Gives `value` back if it is in `bounds`.
pub(super) fn within(field: &'static str, value: u64, bounds: RangeInclusive<u64>) -> Result<u64, WireError> {
    let (least, most) = bounds.into_inner();
    if (least..=most).contains(&value) { Ok(value) } else { Err(WireError::Range { field, value, least, most }) }
}

/// A name: its length in a byte, then its bytes.
pub(super) fn put_name(out: &mut Vec<u8>, name: &str, most: usize) {
    assert!((1..=most).contains(&name.len()), "a name of {} bytes, 1 to {most} are possible", name.len());
    out.push(u8::try_from(name.len()).expect("no name is longer than 255 bytes"));
    out.extend(name.as_bytes());
}

/// A list: its count in two bytes, then its items.
pub(super) fn put_list<T>(
    out: &mut Vec<u8>,
    items: &[T],
    counts: RangeInclusive<usize>,
    put: impl Fn(&mut Vec<u8>, &T),
) {
    assert!(counts.contains(&items.len()), "a list of {} items, {counts:?} are possible", items.len());
    out.extend(u16::try_from(items.len()).expect("no list is longer than 65535").to_le_bytes());
    for item in items {
        put(out, item);
    }
}
