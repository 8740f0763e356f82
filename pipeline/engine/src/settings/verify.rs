//! How memories are compared.

use std::fmt;

use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// How the destination's memory is compared with the source's before the guest may run there.
///
/// In a configuration it is `true` (pages), `false` (off) or `"full"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Verify {
    /// Not at all. Checksums of payloads still guard what is on its way.
    Off,
    /// By the hash of each page, recorded as it is sent and as it is loaded. The paused guest waits for the hashes of the last round's
    /// pages alone.
    ///
    /// This proves that the destination loaded every page as it was last sent. In the background each end reads its memory again: the
    /// source's equalled what was sent at the time of a page's last check, and the report has the share of pages that were checked. A
    /// write that a dirty log loses after that is not seen.
    #[default]
    Pages,
    /// By hashes of the whole memory of both ends, while the guest is paused: a write that a dirty log loses is seen whenever it
    /// happens. This takes about a quarter of a second for each GiB and core.
    Full,
}

impl Verify {
    /// Whether anything is compared.
    #[must_use]
    pub fn is_on(self) -> bool {
        self != Self::Off
    }
}

impl Serialize for Verify {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => serializer.serialize_bool(false),
            Self::Pages => serializer.serialize_bool(true),
            Self::Full => serializer.serialize_str("full"),
        }
    }
}

impl<'de> Deserialize<'de> for Verify {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BoolOrFull;

        impl Visitor<'_> for BoolOrFull {
            type Value = Verify;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false or \"full\"")
            }

            fn visit_bool<E>(self, pages: bool) -> Result<Verify, E> {
                Ok(if pages { Verify::Pages } else { Verify::Off })
            }

            fn visit_str<E: Error>(self, name: &str) -> Result<Verify, E> {
                match name {
                    "full" => Ok(Verify::Full),
                    _ => Err(E::invalid_value(Unexpected::Str(name), &self)),
                }
            }
        }

        deserializer.deserialize_any(BoolOrFull)
    }
}
