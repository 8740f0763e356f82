//! Guest state as sections of values in the format of postcard.
//!
//! The fields of a value follow one another in the order of its type, numbers as varints and without names. So a change
//! of such a type is a change of the format, and of its version; tests compare the bytes.
//!
//! A peer may have made the bytes up. Name and version are checked first. A list in a value grows with the bytes that are
//! read for it, and the length of a section is bounded before its lists are decoded. Values are checked by those who know
//! their limits.

use memferry_stages::untrusted::listed;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use memferry::guest::{GuestError, GuestState, StateSection};

/// The bytes of a value.
pub(crate) fn encoded(value: &impl Serialize) -> Vec<u8> {
    postcard::to_allocvec(value).expect("its lists know their lengths, and a vector takes everything")
}

pub(crate) fn section(name: &str, version: u32, bytes: Vec<u8>) -> StateSection {
    StateSection { name: name.into(), version, bytes }
}

/// The section of a guest that has one; `guest` names it for the error.
pub(crate) fn only_section<'a>(state: &'a GuestState, guest: &str) -> Result<&'a StateSection, GuestError> {
    let names = || listed(state.sections.iter().map(|section| &section.name));
    let [section] = &state.sections[..] else {
        return Err(GuestError(format!("state with the sections [{}] came, {guest} has one", names())));
    };
    Ok(section)
}

/// The value of a section of this name and version, of at most `most` bytes.
pub(crate) fn value_of<T: DeserializeOwned + Serialize>(
    section: &StateSection,
    name: &str,
    version: u32,
    most: usize,
) -> Result<T, GuestError> {
    let mut input = Input::of(section, name, version)?;
    if section.bytes.len() > most {
        return Err(input.refuse(format_args!("{} bytes came, at most {most} can be", section.bytes.len())));
    }
    let value = input.take()?;
    input.end()?;
    // The structs of kvm-bindings are padded or cut if they are of another length.
    if encoded(&value) != section.bytes {
        return Err(input.refuse("the value encodes to other bytes"));
    }
    Ok(value)
}

/// A section being read, value by value.
#[derive(Debug)]
pub(crate) struct Input<'a> {
    section: &'a StateSection,
    left: &'a [u8],
}

impl<'a> Input<'a> {
    pub(crate) fn of(section: &'a StateSection, name: &str, version: u32) -> Result<Self, GuestError> {
        if section.name != name || section.version != version {
            let (came, its) = (&section.name, section.version);
            return Err(GuestError(format!(
                "the state {came:?} version {its} came, here belongs {name:?} version {version}"
            )));
        }
        Ok(Self { section, left: &section.bytes })
    }

    pub(crate) fn refuse(&self, why: impl std::fmt::Display) -> GuestError {
        let at = self.section.bytes.len() - self.left.len();
        GuestError(format!("the state {:?} does not fit, at byte {at}: {why}", self.section.name))
    }

    pub(crate) fn take<T: Deserialize<'a>>(&mut self) -> Result<T, GuestError> {
        let mut decoder = postcard::Deserializer::from_bytes(self.left);
        let value = T::deserialize(&mut decoder);
        self.left = decoder.finalize().expect("the rest of a slice");
        value.map_err(|error| match error {
            postcard::Error::DeserializeUnexpectedEnd => self.refuse("it ends within a value"),
            _ => self.refuse("a value cannot be decoded"),
        })
    }

    /// Takes a count, which must be that of this end.
    pub(crate) fn expect(&mut self, what: &str, here: u32) -> Result<(), GuestError> {
        let came: u32 = self.take()?;
        if came == here { Ok(()) } else { Err(self.refuse(format_args!("{came} {what} came, {here} belong here"))) }
    }

    /// No bytes may be left.
    pub(crate) fn end(&self) -> Result<(), GuestError> {
        if self.left.is_empty() { Ok(()) } else { Err(self.refuse(format_args!("{} bytes are left", self.left.len()))) }
    }
}
