//! When a guest is switched over: before its pages are all sent, or after.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::values::Time;

/// When the guest is started at the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Once all of its memory is there. Losing an end before that loses nothing.
    #[default]
    Precopy,
    /// As in precopy where that converges. Otherwise, at a moment that the settings or the operator choose, with the pages missing that
    /// are dirty then: they follow while the guest runs. Losing an end in that time loses the guest.
    Hybrid,
    /// Before any page is sent: all of them follow while it runs. Losing an end in that time loses the guest.
    Postcopy,
}

impl Mode {
    /// May the guest be started before all of its memory is there?
    #[must_use]
    pub fn may_switch(self) -> bool {
        self != Self::Precopy
    }

    /// The value in the syntax of the configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Precopy => "precopy",
            Self::Hybrid => "hybrid",
            Self::Postcopy => "postcopy",
        }
    }
}

/// When [`Mode::Hybrid`] switches to postcopy, if precopy has not converged before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PostcopyAfter {
    /// After this number of rounds.
    Rounds(u32),
    /// After this time since the start, in the middle of a round too.
    Time(Duration),
}

impl fmt::Display for PostcopyAfter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Rounds(1) => f.write_str("1 round"),
            Self::Rounds(rounds) => write!(f, "{rounds} rounds"),
            Self::Time(time) => Time(time).fmt(f),
        }
    }
}

impl FromStr for PostcopyAfter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(rounds) = text.trim().parse() {
            return Ok(Self::Rounds(rounds));
        }
        text.parse().map(|Time(time)| Self::Time(time))
    }
}

impl<'de> Deserialize<'de> for PostcopyAfter {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AsWritten)
    }
}

impl Serialize for PostcopyAfter {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Self::Rounds(rounds) => serializer.serialize_u32(rounds),
            Self::Time(time) => Time(time).serialize(serializer),
        }
    }
}

struct AsWritten;

impl Visitor<'_> for AsWritten {
    type Value = PostcopyAfter;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number of rounds such as 3, or a length of time such as \"10s\"")
    }

    fn visit_i64<E: de::Error>(self, rounds: i64) -> Result<PostcopyAfter, E> {
        let rounds = u32::try_from(rounds).map_err(|_| E::custom(format!("{rounds} is no number of rounds")))?;
        Ok(PostcopyAfter::Rounds(rounds))
    }

    fn visit_u64<E: de::Error>(self, rounds: u64) -> Result<PostcopyAfter, E> {
        let rounds = u32::try_from(rounds).map_err(|_| E::custom(format!("{rounds} is no number of rounds")))?;
        Ok(PostcopyAfter::Rounds(rounds))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<PostcopyAfter, E> {
        text.parse().map_err(|what| E::custom(format!("{what}, expected a number of rounds such as 3, or \"10s\"")))
    }
}

/// What happens between the start at the destination and the arrival of the last page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct PostcopySettings {
    /// Are pages sent that nothing waits for? Without them the source keeps what the guest never touches, and the migration does not
    /// end: for measurements.
    pub background: bool,
}

impl Default for PostcopySettings {
    fn default() -> Self {
        Self { background: true }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_of_rounds_and_a_length_of_time_has_a_unit() {
        assert_eq!("3".parse(), Ok(PostcopyAfter::Rounds(3)));
        assert_eq!("10s".parse(), Ok(PostcopyAfter::Time(Duration::from_secs(10))));
        assert!("-1".parse::<PostcopyAfter>().is_err() && "soon".parse::<PostcopyAfter>().is_err());
        let shown = [PostcopyAfter::Rounds(1), PostcopyAfter::Rounds(4), PostcopyAfter::Time(Duration::from_secs(90))];
        assert_eq!(shown.map(|after| after.to_string()), ["1 round", "4 rounds", "1m 30s"]);
    }
}
