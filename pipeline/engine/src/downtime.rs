//! The parts of the downtime: what observers, the forecast and the report count it in.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::human;
use crate::values::millis;

/// The parts of the downtime, and of its forecast, in the order in which they begin.
///
/// The source measures all of them with one clock, so that they add up. The parts that are work of the destination are
/// as long as it reports, but no longer than the source waited for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub struct DowntimeParts {
    /// Pausing the guest, with the commands that this takes.
    #[serde(rename = "pause_ms", with = "millis")]
    pub pause: Duration,
    /// Saving, releasing and sending device state.
    #[serde(rename = "state_ms", with = "millis")]
    pub state: Duration,
    /// The last sync.
    #[serde(rename = "final_sync_ms", with = "millis")]
    pub final_sync: Duration,
    /// The last round, until its last byte is sent.
    #[serde(rename = "final_transfer_ms", with = "millis")]
    pub final_transfer: Duration,
    /// From then until the destination has loaded everything: what is on its way, or waits to be loaded.
    #[serde(rename = "load_ms", with = "millis")]
    pub load: Duration,
    /// Verification, at both ends.
    #[serde(rename = "verify_ms", with = "millis")]
    pub verify: Duration,
    /// Writing to disk at the destination, or of the file that stores the stream.
    #[serde(rename = "durable_ms", with = "millis")]
    pub durable: Duration,
    /// Applying device state at the destination, with the commands that this takes.
    #[serde(rename = "prepare_ms", with = "millis")]
    pub prepare: Duration,
    /// Starting the guest at the destination, with the commands that this takes.
    #[serde(rename = "start_ms", with = "millis")]
    pub start: Duration,
    /// The rest of the time from Loaded to Running.
    #[serde(rename = "handover_ms", with = "millis")]
    pub handover: Duration,
    /// From the decision not to hand the guest over until it was resumed at the source.
    #[serde(rename = "resume_ms", with = "millis")]
    pub resume: Duration,
}

impl fmt::Display for DowntimeParts {
    /// The parts that took any time.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let taken = self.named().into_iter().filter(|(_, time)| !time.is_zero());
        for (index, (name, time)) in taken.enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{} {}", name.trim_start_matches("final_"), human::time(time))?;
        }
        Ok(())
    }
}

impl DowntimeParts {
    /// Each part with its name, in order. The name is that of the field.
    #[must_use]
    pub fn named(&self) -> [(&'static str, Duration); 11] {
        [
            ("pause", self.pause),
            ("state", self.state),
            ("final_sync", self.final_sync),
            ("final_transfer", self.final_transfer),
            ("load", self.load),
            ("verify", self.verify),
            ("durable", self.durable),
            ("prepare", self.prepare),
            ("start", self.start),
            ("handover", self.handover),
            ("resume", self.resume),
        ]
    }

    /// The sum of all parts: the downtime.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.named().into_iter().fold(Duration::ZERO, |sum, (_, time)| sum.saturating_add(time))
    }
}
