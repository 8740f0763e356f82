//! The settings that can be changed while a migration runs, and their rules.

use std::fmt;
use std::time::Duration;

use crate::settings::{SourceSettings, StallStep, SwitchoverBandwidth};
use crate::values::{Bandwidth, Deadline, Size, Time};

/// Why a setting cannot be changed to a value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// The value is not valid.
    #[error("{key}: {why}")]
    Invalid {
        /// The setting.
        key: &'static str,
        /// What is wrong, and which value is accepted.
        why: String,
    },
    /// This migration does not have the setting.
    #[error("{0}")]
    Absent(&'static str),
}

/// A new value for one setting of a running source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Bytes a second on the wire, all connections together, [`Bandwidth::LEAST`] or more; `None` is unlimited.
    MaxBandwidth(Option<u64>),
    /// The same limit while the guest is paused.
    SwitchoverBandwidth(SwitchoverBandwidth),
    /// How long the guest may be paused, by the forecast. It takes effect at the next decision, and replaces a limit
    /// that was raised.
    DowntimeLimit(Duration),
    /// The downtime that no switchover may exceed by the forecast.
    MaxDowntime(Option<Duration>),
    /// The longest the migration may take, from its start.
    Deadline(Option<Duration>),
    /// The highest throttle, in percent of the guest's time. A guest that is throttled more is throttled less at once.
    ThrottleMost(u8),
    /// Bytes of the XBZRLE cache, all lanes together.
    XbzrleCache(u64),
}

/// A setting that was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Changed {
    /// The round in which it was changed.
    pub round: u32,
    /// The old value.
    pub from: Change,
    /// The new value.
    pub to: Change,
    /// The bound of the memory that the engine takes for itself from here on, in bytes.
    pub memory_bound: u64,
}

impl Change {
    /// The setting's name in the configuration (`throttle` is the ceiling).
    #[must_use]
    pub fn key(&self) -> &'static str {
        match self {
            Self::MaxBandwidth(_) => "max_bandwidth",
            Self::SwitchoverBandwidth(_) => "switchover_bandwidth",
            Self::DowntimeLimit(_) => "downtime_limit",
            Self::MaxDowntime(_) => "max_downtime",
            Self::Deadline(_) => "deadline",
            Self::ThrottleMost(_) => "throttle",
            Self::XbzrleCache(_) => "xbzrle_cache",
        }
    }

    /// Is the value valid by itself, whatever the other settings are?
    pub fn check(&self) -> Result<(), ChangeError> {
        if let Some((what, write)) = self.bandwidth().and_then(|most| Bandwidth(Some(most)).too_slow()) {
            return Err(self.wrong(format!("{what}; write {write}")));
        }
        let nothing = match *self {
            Self::DowntimeLimit(limit) => limit.is_zero(),
            Self::Deadline(deadline) => deadline == Some(Duration::ZERO),
            Self::ThrottleMost(percent) if percent > 99 => {
                return Err(self.wrong(format!("{percent} percent of the guest's time; 99 is the most")));
            }
            _ => false,
        };
        if nothing {
            return Err(self.wrong("this must be longer than nothing".into()));
        }
        match self.time() {
            Some(time) if time > Time::LONGEST.0 => Err(self.wrong("this is longer than a hundred years".into())),
            _ => Ok(()),
        }
    }

    /// The bandwidth limit for this value.
    fn bandwidth(&self) -> Option<u64> {
        match *self {
            Self::MaxBandwidth(most) => most,
            Self::SwitchoverBandwidth(SwitchoverBandwidth::AtMost(most)) => Some(most),
            _ => None,
        }
    }

    /// The duration for this value.
    fn time(&self) -> Option<Duration> {
        match *self {
            Self::DowntimeLimit(limit) => Some(limit),
            Self::MaxDowntime(time) | Self::Deadline(time) => time,
            Self::MaxBandwidth(_) | Self::SwitchoverBandwidth(_) | Self::ThrottleMost(_) | Self::XbzrleCache(_) => None,
        }
    }

    /// The settings of a source that can be changed, with their values here. Settings that do not apply to this
    /// migration are left out: the throttle's ceiling if throttling is not a step on a stall, the cache if deltas are
    /// off.
    #[must_use]
    pub fn list(settings: &SourceSettings) -> Vec<Self> {
        let convergence = &settings.convergence;
        let throttles = convergence.on_stall.contains(&StallStep::Throttle);
        let always = [
            Self::MaxBandwidth(settings.max_bandwidth),
            Self::SwitchoverBandwidth(settings.switchover_bandwidth),
            Self::DowntimeLimit(settings.downtime_limit),
            Self::MaxDowntime(settings.max_downtime),
            Self::Deadline(settings.deadline),
        ];
        let throttle = throttles.then_some(Self::ThrottleMost(convergence.throttle.most));
        let cache = settings.encoder.xbzrle.as_ref().map(|xbzrle| Self::XbzrleCache(xbzrle.cache_bytes));
        always.into_iter().chain(throttle).chain(cache).collect()
    }

    /// Applies the value to settings.
    pub fn put_into(self, settings: &mut SourceSettings) {
        match self {
            Self::MaxBandwidth(most) => settings.max_bandwidth = most,
            Self::SwitchoverBandwidth(bandwidth) => settings.switchover_bandwidth = bandwidth,
            Self::DowntimeLimit(limit) => settings.downtime_limit = limit,
            Self::MaxDowntime(most) => settings.max_downtime = most,
            Self::Deadline(deadline) => settings.deadline = deadline,
            Self::ThrottleMost(most) => settings.convergence.throttle.most = most,
            Self::XbzrleCache(bytes) => {
                settings.encoder.xbzrle.iter_mut().for_each(|xbzrle| xbzrle.cache_bytes = bytes);
            }
        }
    }

    pub(crate) fn wrong(&self, why: String) -> ChangeError {
        ChangeError::Invalid { key: self.key(), why }
    }
}

impl fmt::Display for Change {
    /// The value in the syntax of the configuration.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::MaxBandwidth(bandwidth) => Bandwidth(bandwidth).fmt(f),
            Self::SwitchoverBandwidth(SwitchoverBandwidth::AsRounds) => f.write_str("as max_bandwidth"),
            Self::SwitchoverBandwidth(SwitchoverBandwidth::Unlimited) => Bandwidth(None).fmt(f),
            Self::SwitchoverBandwidth(SwitchoverBandwidth::AtMost(most)) => Bandwidth(Some(most)).fmt(f),
            Self::DowntimeLimit(limit) => Time(limit).fmt(f),
            Self::MaxDowntime(time) | Self::Deadline(time) => Deadline(time).fmt(f),
            Self::ThrottleMost(percent) => percent.fmt(f),
            Self::XbzrleCache(bytes) => Size(bytes).fmt(f),
        }
    }
}

impl fmt::Display for Changed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is changed from {} to {}", self.to.key(), self.from, self.to)
    }
}

/// The settings with these changes, if the result is valid. A setting that does not apply cannot be changed.
pub(crate) fn with_all(settings: &SourceSettings, changes: &[Change]) -> Result<SourceSettings, ChangeError> {
    let mut all = settings.clone();
    for change in changes {
        change.check()?;
        check_there_is(settings, change)?;
        change.put_into(&mut all);
    }
    match all.max_downtime {
        Some(most) if all.downtime_limit > most => {
            let (limit, most) = (Time(all.downtime_limit), Time(most));
            let why = format!("a downtime_limit of {limit} above a max_downtime of {most}");
            Err(ChangeError::Invalid { key: "max_downtime", why })
        }
        _ => Ok(all),
    }
}

fn check_there_is(settings: &SourceSettings, change: &Change) -> Result<(), ChangeError> {
    if Change::list(settings).iter().any(|there| there.key() == change.key()) {
        return Ok(());
    }
    let missing = match change {
        Change::ThrottleMost(_) => {
            "throttle: this migration does not throttle its guest: \"throttle\" is not among the steps of on_stall"
        }
        _ => "xbzrle_cache: this migration makes no deltas, so there is no cache",
    };
    Err(ChangeError::Absent(missing))
}

/// The differences of `after`: the old value, and the new one.
pub(crate) fn differences(before: &SourceSettings, after: &SourceSettings) -> Vec<(Change, Change)> {
    Change::list(before).into_iter().zip(Change::list(after)).filter(|(before, after)| before != after).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{ConvergenceSettings, EncoderSettings};

    const MS: Duration = Duration::from_millis(1);

    fn settings() -> SourceSettings {
        let convergence = ConvergenceSettings { on_stall: vec![StallStep::Throttle], ..Default::default() };
        SourceSettings { convergence, ..SourceSettings::default() }
    }

    fn refused(changes: &[Change]) -> String {
        with_all(&settings(), changes).unwrap_err().to_string()
    }

    #[test]
    fn what_is_put_into_settings_is_found_in_them() {
        let changes = [
            Change::MaxBandwidth(Some(1 << 20)),
            Change::SwitchoverBandwidth(SwitchoverBandwidth::Unlimited),
            Change::DowntimeLimit(20 * MS),
            Change::MaxDowntime(Some(50 * MS)),
            Change::Deadline(Some(9000 * MS)),
            Change::ThrottleMost(0),
            Change::XbzrleCache(64 << 20),
        ];
        let changed = with_all(&settings(), &changes).unwrap();
        assert_eq!(Change::list(&changed), changes);
        assert_eq!(differences(&settings(), &changed).len(), changes.len());
        let written: Vec<_> = changes.iter().map(Change::to_string).collect();
        assert_eq!(written, ["1 MiB/s", "unlimited", "20ms", "50ms", "9s", "0", "64 MiB"]);
    }

    #[test]
    fn values_that_cannot_be_are_refused_by_name() {
        assert_eq!(
            refused(&[Change::MaxBandwidth(Some(1))]),
            "max_bandwidth: 1 B/s is too slow to move a guest; write \"64 KiB/s\" or more, or \"unlimited\""
        );
        let crawling = SwitchoverBandwidth::AtMost(Bandwidth::LEAST - 1);
        assert!(
            refused(&[Change::SwitchoverBandwidth(crawling)]).starts_with("switchover_bandwidth: 65535 B/s is too")
        );
        assert!(with_all(&settings(), &[Change::MaxBandwidth(Some(Bandwidth::LEAST))]).is_ok());
        assert!(refused(&[Change::DowntimeLimit(Duration::ZERO)]).starts_with("downtime_limit: "));
        assert!(refused(&[Change::Deadline(Some(Duration::ZERO))]).starts_with("deadline: "));
        assert!(refused(&[Change::ThrottleMost(100)]).starts_with("throttle: 100 percent"));
        assert_eq!(
            refused(&[Change::MaxDowntime(Some(100 * MS))]),
            "max_downtime: a downtime_limit of 300ms above a max_downtime of 100ms"
        );
        assert!(with_all(&settings(), &[Change::MaxDowntime(Some(100 * MS)), Change::DowntimeLimit(90 * MS)]).is_ok());
    }

    #[test]
    fn what_a_migration_has_not_cannot_be_changed() {
        let encoder = EncoderSettings { xbzrle: None, ..EncoderSettings::default() };
        let without = SourceSettings { encoder, ..SourceSettings::default() };
        assert_eq!(Change::list(&without).len(), 5);
        for change in [Change::ThrottleMost(50), Change::XbzrleCache(1 << 30)] {
            assert!(matches!(with_all(&without, &[change]), Err(ChangeError::Absent(_))), "{change:?}");
        }
    }
}
