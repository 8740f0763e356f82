//! Values in human-readable form: sizes, rates, times, and the words for "no limit".

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use super::units;

/// The word for no bandwidth limit.
const UNLIMITED: &str = "unlimited";
/// The word for no deadline.
const NONE: &str = "none";

/// Bytes: `"64 MiB"`, `"100 MB"`, `"512 Mbit"`, or a plain number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// Bytes a second, or no limit: `"100 MiB/s"`, `"100 MB/s"`, `"1 Gbit/s"`, `"unlimited"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bandwidth(pub Option<u64>);

/// A duration: `"300ms"`, `"1m 30s"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub Duration);

/// A duration, or `"none"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline(pub Option<Duration>);

impl Bandwidth {
    /// The least limit, in bytes a second. Below it one frame of the stream may take longer than a handover waits.
    pub const LEAST: u64 = 64 << 10;

    /// Describes why a limit is below the least one, and what to write.
    pub fn too_slow(self) -> Option<(String, String)> {
        let slow = self.0.is_some_and(|bytes| bytes < Self::LEAST);
        let least = Self(Some(Self::LEAST));
        slow.then(|| {
            (format!("{self} is too slow to move a guest"), format!("\"{least}\" or more, or \"{UNLIMITED}\""))
        })
    }
}

impl Time {
    /// The longest duration that is accepted, a hundred years: clocks can represent more.
    pub const LONGEST: Self = Self(Duration::from_secs(100 * 366 * 24 * 3600));
}

impl fmt::Display for Size {
    /// The largest unit that divides it, so that it is exact: `1536 MiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u64, &str); 7] = [
            (1 << 40, "TiB"),
            (1 << 30, "GiB"),
            (1 << 20, "MiB"),
            (1 << 10, "KiB"),
            (1_000_000_000_000, "TB"),
            (1_000_000_000, "GB"),
            (1_000_000, "MB"),
        ];
        let fits = |&&(unit, _): &&(u64, &str)| self.0 >= unit && self.0.is_multiple_of(unit);
        match UNITS.iter().find(fits) {
            Some((unit, name)) => write!(f, "{} {name}", self.0 / unit),
            None => write!(f, "{} B", self.0),
        }
    }
}

impl fmt::Display for Bandwidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(bytes) => write!(f, "{}/s", Size(bytes)),
            None => f.write_str(UNLIMITED),
        }
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

impl fmt::Display for Deadline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(time) => Time(time).fmt(f),
            None => f.write_str(NONE),
        }
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        units::amount(text).map(|(bytes, _)| Self(bytes)).ok_or_else(|| format!("{text:?} is not a size"))
    }
}

impl FromStr for Bandwidth {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == UNLIMITED {
            return Ok(Self(None));
        }
        units::rate(text).map(|(bytes, _)| Self(Some(bytes))).ok_or_else(|| format!("{text:?} is not a rate"))
    }
}

impl FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        humantime::parse_duration(text.trim()).map(Self).map_err(|_| format!("{text:?} is not a length of time"))
    }
}

impl FromStr for Deadline {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == NONE { Ok(Self(None)) } else { text.parse::<Time>().map(|time| Self(Some(time.0))) }
    }
}

/// The syntax of a value, for messages, and whether a plain number is valid.
trait Written: FromStr<Err = String> {
    const EXAMPLES: &str;

    fn from_number(number: u64) -> Option<Self>;
}

impl Written for Size {
    const EXAMPLES: &str = r#"a size such as "64 MiB" or "4 KiB""#;

    fn from_number(number: u64) -> Option<Self> {
        Some(Self(number))
    }
}

impl Written for Bandwidth {
    const EXAMPLES: &str = r#"a rate such as "100 MiB/s" or "1 Gbit/s", or "unlimited""#;

    fn from_number(_: u64) -> Option<Self> {
        None
    }
}

impl Written for Time {
    const EXAMPLES: &str = r#"a length of time such as "300ms", "10s" or "1m 30s""#;

    fn from_number(_: u64) -> Option<Self> {
        None
    }
}

impl Written for Deadline {
    const EXAMPLES: &str = r#"a length of time such as "30s" or "5m", or "none""#;

    fn from_number(_: u64) -> Option<Self> {
        None
    }
}

struct AsWritten<T>(std::marker::PhantomData<T>);

impl<T: Written> Visitor<'_> for AsWritten<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::EXAMPLES)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(|what| E::custom(format!("{what}, expected {}", T::EXAMPLES)))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        let value = u64::try_from(number).ok().and_then(T::from_number);
        value.ok_or_else(|| E::custom(format!("{number} has no unit, expected {}", T::EXAMPLES)))
    }
}

/// (De)serialises the types as strings in their syntax.
macro_rules! as_written {
    ($($type:ty),*) => { $(
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any(AsWritten::<Self>(std::marker::PhantomData))
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    )* };
}

as_written!(Size, Bandwidth, Time, Deadline);

/// Whole milliseconds, at most as many as fit.
pub(crate) fn whole_ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds, to the microsecond.
#[must_use]
pub fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// For serde: a duration as [milliseconds](ms()), as in events and reports.
pub mod millis {
    use super::*;

    /// Writes it.
    pub fn serialize<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(ms(*time))
    }

    /// Reads it.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let ms = f64::deserialize(deserializer)?;
        Duration::try_from_secs_f64(ms / 1e3).map_err(de::Error::custom)
    }
}

/// The types by their inner values, and a module of each for fields of that type: `#[serde(with =
/// "memferry::values::size")]`.
macro_rules! holds {
    ($($module:ident: $written:ident($held:ty);)*) => { $(
        impl From<$held> for $written {
            fn from(held: $held) -> Self {
                Self(held)
            }
        }

        impl From<$written> for $held {
            fn from(written: $written) -> Self {
                written.0
            }
        }

        #[doc = concat!("For serde: what a [`", stringify!($written), "`] holds, as it is written.")]
        pub mod $module {
            use super::*;

            /// Writes it.
            pub fn serialize<S: Serializer>(held: &$held, serializer: S) -> Result<S::Ok, S::Error> {
                $written(*held).serialize(serializer)
            }

            /// Reads it.
            pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<$held, D::Error> {
                $written::deserialize(deserializer).map(|written| written.0)
            }
        }
    )* };
}

holds! {
    size: Size(u64);
    bandwidth: Bandwidth(Option<u64>);
    time: Time(Duration);
    deadline: Deadline(Option<Duration>);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_read_back_as_they_are_shown() {
        for text in ["1 GiB", "1536 MiB", "100 MB", "4097 B", "0 B"] {
            assert_eq!(text.parse::<Size>().unwrap().to_string(), text);
        }
        for text in ["1 GiB/s", "100 MB/s", "unlimited"] {
            assert_eq!(text.parse::<Bandwidth>().unwrap().to_string(), text);
        }
        assert_eq!("1Gbit/s".parse::<Bandwidth>().unwrap(), Bandwidth(Some(125_000_000)));
        assert_eq!("512 Mbit".parse::<Size>().unwrap(), Size(64_000_000));
        for text in ["300ms", "1m 30s", "none"] {
            assert_eq!(text.parse::<Deadline>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_value_is_refused_with_what_it_is() {
        assert_eq!("64 MiBB".parse::<Size>().unwrap_err(), r#""64 MiBB" is not a size"#);
        assert_eq!("1 GiB".parse::<Bandwidth>().unwrap_err(), r#""1 GiB" is not a rate"#);
        assert_eq!("1 Gb/s".parse::<Bandwidth>().unwrap_err(), r#""1 Gb/s" is not a rate"#);
        assert_eq!("soon".parse::<Time>().unwrap_err(), r#""soon" is not a length of time"#);
        assert_eq!("-3s".parse::<Deadline>().unwrap_err(), r#""-3s" is not a length of time"#);
    }
}
