//! Sections of state, written and read: numbers, the kernel's structs, lists of either.

use memferry_stages::untrusted::Untrusted;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use memferry::guest::{GuestError, StateSection};

/// A section being written.
#[derive(Debug, Default)]
pub(super) struct Output(Vec<u8>);

impl Output {
    pub(super) fn put(&mut self, value: &(impl IntoBytes + Immutable)) {
        self.bytes(value.as_bytes());
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    /// How many there are, and each of them.
    pub(super) fn list<T: IntoBytes + Immutable>(&mut self, items: &[T]) {
        self.u32(u32::try_from(items.len()).expect("a short list"));
        items.iter().for_each(|item| self.put(item));
    }

    pub(super) fn section(self, name: &str, version: u32) -> StateSection {
        StateSection { name: name.into(), version, bytes: self.0 }
    }
}

/// A section being read.
#[derive(Debug)]
pub(super) struct Input<'a> {
    name: &'a Untrusted,
    left: &'a [u8],
}

impl<'a> Input<'a> {
    pub(super) fn of(section: &'a StateSection, name: &str, version: u32) -> Result<Self, GuestError> {
        if section.name != name || section.version != version {
            let (came, its) = (&section.name, section.version);
            return Err(GuestError(format!(
                "the state {came:?} version {its} came, here belongs {name:?} version {version}"
            )));
        }
        Ok(Self { name: &section.name, left: &section.bytes })
    }

    pub(super) fn refuse(&self, why: impl std::fmt::Display) -> GuestError {
        GuestError(format!("the state {:?} does not fit: {why}", self.name))
    }

    pub(super) fn take<T: FromBytes>(&mut self) -> Result<T, GuestError> {
        let (value, left) = T::read_from_prefix(self.left).map_err(|_| {
            self.refuse(format_args!("{} bytes are left, {} belong here", self.left.len(), size_of::<T>()))
        })?;
        self.left = left;
        Ok(value)
    }

    pub(super) fn u32(&mut self) -> Result<u32, GuestError> {
        self.take().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, GuestError> {
        self.take().map(u64::from_le_bytes)
    }

    pub(super) fn list<T: FromBytes>(&mut self, what: &str, most: usize) -> Result<Vec<T>, GuestError> {
        let count = self.u32()? as usize;
        if count > most {
            return Err(self.refuse(format_args!("{count} {what} came, at most {most} can be")));
        }
        (0..count).map(|_| self.take()).collect()
    }

    /// No bytes may be left.
    pub(super) fn end(&self) -> Result<(), GuestError> {
        if self.left.is_empty() {
            return Ok(());
        }
        Err(self.refuse(format_args!("{} bytes are left", self.left.len())))
    }
}
