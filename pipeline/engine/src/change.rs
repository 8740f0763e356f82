//! The settings that may be changed while a migration runs, and what is right for them.

use std::fmt;
use std::time::Duration;

use crate::settings::{SourceSettings, StallStep, SwitchoverBandwidth};
use crate::values::{Bandwidth, Deadline, Size, Time};

/// Why a setting cannot be changed to a value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// There is no such value.
    #[error("{key}: {why}")]
    Invalid {
        /// Of which setting.
        key: &'static str,
        /// What is wrong, and what would be right.
        why: String,
    },
    /// This migration does not have the setting.
    #[error("{0}")]
    Absent(&'static str),
}

/// Another value for one setting of a running source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Bytes a second on the wire, all connections together, [`Bandwidth::LEAST`] or more; `None`: as fast as it goes.
    MaxBandwidth(Option<u64>),
    /// The same while the guest is paused.
    SwitchoverBandwidth(SwitchoverBandwidth),
    /// How long the guest may be paused, by the forecast. It counts at the next decision, and takes the place of a limit
    /// that was raised.
    DowntimeLimit(Duration),
    /// What no switchover may take by the forecast.
    MaxDowntime(Option<Duration>),
    /// The longest the whole may take, from its start.
    Deadline(Option<Duration>),
    /// The most that the guest is held back, in percent of its time. One that is held back for more is let run for more at
    /// once.
    ThrottleMost(u8),
    /// Bytes of the XBZRLE cache, all lanes together.
    XbzrleCache(u64),
}

/// A setting that was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Changed {
    /// The round in which it was.
    pub round: u32,
    /// What it was.
    pub from: Change,
    /// What it is.
    pub to: Change,
    /// Bound of the memory that the engine takes for itself from here on, in bytes.
    pub memory_bound: u64,
}

impl Change {
    /// The setting's name, as the configuration has it (`throttle`: the ceiling).
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

    /// Is the value one that can be, whatever the others are?
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

    /// The limit on bandwidth that it is.
    fn bandwidth(&self) -> Option<u64> {
        match *self {
            Self::MaxBandwidth(most) => most,
            Self::SwitchoverBandwidth(SwitchoverBandwidth::AtMost(most)) => Some(most),
            _ => None,
        }
    }

    /// The time that it is.
    fn time(&self) -> Option<Duration> {
        match *self {
            Self::DowntimeLimit(limit) => Some(limit),
            Self::MaxDowntime(time) | Self::Deadline(time) => time,
            Self::MaxBandwidth(_) | Self::SwitchoverBandwidth(_) | Self::ThrottleMost(_) | Self::XbzrleCache(_) => None,
        }
    }

    pub(crate) fn wrong(&self, why: String) -> ChangeError {
        ChangeError::Invalid { key: self.key(), why }
    }
}

impl fmt::Display for Change {
    /// The value, as the configuration writes it.
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

/// The settings of a source that may be changed, as they are in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InForce {
    /// [`SourceSettings::max_bandwidth`].
    pub max_bandwidth: Option<u64>,
    /// [`SourceSettings::switchover_bandwidth`].
    pub switchover_bandwidth: SwitchoverBandwidth,
    /// [`SourceSettings::downtime_limit`]: the operator's, not one that a stall has raised.
    pub downtime_limit: Duration,
    /// [`SourceSettings::max_downtime`].
    pub max_downtime: Option<Duration>,
    /// [`SourceSettings::deadline`].
    pub deadline: Option<Duration>,
    /// The throttle's ceiling; `None` where throttling is no step about a stall.
    pub throttle_most: Option<u8>,
    /// Bytes of the XBZRLE cache; `None` where no deltas are made.
    pub xbzrle_cache: Option<u64>,
}

impl InForce {
    /// Those of settings.
    #[must_use]
    pub fn of(settings: &SourceSettings) -> Self {
        let convergence = &settings.convergence;
        let throttles = convergence.on_stall.contains(&StallStep::Throttle);
        Self {
            max_bandwidth: settings.max_bandwidth,
            switchover_bandwidth: settings.switchover_bandwidth,
            downtime_limit: settings.downtime_limit,
            max_downtime: settings.max_downtime,
            deadline: settings.deadline,
            throttle_most: throttles.then_some(convergence.throttle.most),
            xbzrle_cache: settings.encoder.xbzrle.as_ref().map(|xbzrle| xbzrle.cache_bytes),
        }
    }

    /// Puts them into settings.
    pub(crate) fn put_into(self, settings: &mut SourceSettings) {
        settings.max_bandwidth = self.max_bandwidth;
        settings.switchover_bandwidth = self.switchover_bandwidth;
        settings.downtime_limit = self.downtime_limit;
        settings.max_downtime = self.max_downtime;
        settings.deadline = self.deadline;
        if let Some(most) = self.throttle_most {
            settings.convergence.throttle.most = most;
        }
        if let (Some(xbzrle), Some(bytes)) = (&mut settings.encoder.xbzrle, self.xbzrle_cache) {
            xbzrle.cache_bytes = bytes;
        }
    }

    /// The same with another value. What is not there cannot be changed.
    pub(crate) fn with(self, change: Change) -> Self {
        match change {
            Change::MaxBandwidth(max_bandwidth) => Self { max_bandwidth, ..self },
            Change::SwitchoverBandwidth(switchover_bandwidth) => Self { switchover_bandwidth, ..self },
            Change::DowntimeLimit(downtime_limit) => Self { downtime_limit, ..self },
            Change::MaxDowntime(max_downtime) => Self { max_downtime, ..self },
            Change::Deadline(deadline) => Self { deadline, ..self },
            Change::ThrottleMost(most) => Self { throttle_most: self.throttle_most.map(|_| most), ..self },
            Change::XbzrleCache(bytes) => Self { xbzrle_cache: self.xbzrle_cache.map(|_| bytes), ..self },
        }
    }

    /// The same with other values, if these can be.
    pub(crate) fn with_all(self, changes: &[Change]) -> Result<Self, ChangeError> {
        let mut all = self;
        for change in changes {
            change.check()?;
            all.check_there_is(change)?;
            all = all.with(*change);
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

    fn check_there_is(&self, change: &Change) -> Result<(), ChangeError> {
        let missing = match change {
            Change::ThrottleMost(_) if self.throttle_most.is_none() => {
                "throttle: this migration does not throttle its guest: \"throttle\" is not among the steps of on_stall"
            }
            Change::XbzrleCache(_) if self.xbzrle_cache.is_none() => {
                "xbzrle_cache: this migration makes no deltas, so there is no cache"
            }
            _ => return Ok(()),
        };
        Err(ChangeError::Absent(missing))
    }

    /// Each setting that there is, with its value.
    #[must_use]
    pub fn list(&self) -> Vec<Change> {
        let always = [
            Change::MaxBandwidth(self.max_bandwidth),
            Change::SwitchoverBandwidth(self.switchover_bandwidth),
            Change::DowntimeLimit(self.downtime_limit),
            Change::MaxDowntime(self.max_downtime),
            Change::Deadline(self.deadline),
        ];
        let throttle = self.throttle_most.map(Change::ThrottleMost);
        let cache = self.xbzrle_cache.map(Change::XbzrleCache);
        always.into_iter().chain(throttle).chain(cache).collect()
    }

    /// What is different in `other`: what it is here, and what it is there.
    pub(crate) fn differences(&self, other: &Self) -> Vec<(Change, Change)> {
        self.list().into_iter().zip(other.list()).filter(|(here, there)| here != there).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{ConvergenceSettings, EncoderSettings};

    const MS: Duration = Duration::from_millis(1);

    fn in_force() -> InForce {
        let convergence = ConvergenceSettings { on_stall: vec![StallStep::Throttle], ..Default::default() };
        InForce::of(&SourceSettings { convergence, ..SourceSettings::default() })
    }

    fn refused(changes: &[Change]) -> String {
        in_force().with_all(changes).unwrap_err().to_string()
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
        let changed = in_force().with_all(&changes).unwrap();
        assert_eq!(changed.list(), changes);
        assert_eq!(changed.differences(&in_force()).len(), changes.len());
        let mut settings = SourceSettings::default();
        settings.convergence.on_stall = vec![StallStep::Throttle];
        changed.put_into(&mut settings);
        assert_eq!(InForce::of(&settings), changed);
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
        assert!(in_force().with_all(&[Change::MaxBandwidth(Some(Bandwidth::LEAST))]).is_ok());
        assert!(refused(&[Change::DowntimeLimit(Duration::ZERO)]).starts_with("downtime_limit: "));
        assert!(refused(&[Change::Deadline(Some(Duration::ZERO))]).starts_with("deadline: "));
        assert!(refused(&[Change::ThrottleMost(100)]).starts_with("throttle: 100 percent"));
        assert_eq!(
            refused(&[Change::MaxDowntime(Some(100 * MS))]),
            "max_downtime: a downtime_limit of 300ms above a max_downtime of 100ms"
        );
        assert!(in_force().with_all(&[Change::MaxDowntime(Some(100 * MS)), Change::DowntimeLimit(90 * MS)]).is_ok());
    }

    #[test]
    fn what_a_migration_has_not_cannot_be_changed() {
        let encoder = EncoderSettings { xbzrle: None, ..EncoderSettings::default() };
        let without = InForce::of(&SourceSettings { encoder, ..SourceSettings::default() });
        assert_eq!(without.list().len(), 5);
        for change in [Change::ThrottleMost(50), Change::XbzrleCache(1 << 30)] {
            assert!(matches!(without.with_all(&[change]), Err(ChangeError::Absent(_))), "{change:?}");
        }
    }
}
