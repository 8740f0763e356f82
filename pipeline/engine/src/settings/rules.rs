//! The rules for settings from any source: a VMM's own code, or a configuration, whose errors show the line.

use std::fmt;
use std::time::Duration;

use memferry_stages::codec::{Codec, ZSTD_LEVELS};
use memferry_stages::geometry::MAX_LANES;

use super::{
    ConvergenceSettings, DestinationSettings, EncoderSettings, LEAST_PEER_TIMEOUT, Mode, OnMiss, PostcopyAfter,
    RecoverySettings, SourceSettings, StallStep, SwitchoverBandwidth,
};
use crate::migration::least_cache;
use crate::values::{Size, Time};

/// A setting that a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Setting {
    /// [`SourceSettings::lanes`].
    Lanes,
    /// [`DestinationSettings::max_lanes`].
    MaxLanes,
    /// [`SourceSettings::connections`].
    Connections,
    /// [`XbzrleSettings::cache_bytes`](super::XbzrleSettings::cache_bytes).
    CacheBytes,
    /// [`XbzrleSettings::on_miss`](super::XbzrleSettings::on_miss).
    OnMiss,
    /// The level of [`Codec::Zstd`].
    CompressLevel,
    /// [`SourceSettings::downtime_limit`].
    DowntimeLimit,
    /// [`SourceSettings::max_downtime`].
    MaxDowntime,
    /// [`DestinationSettings::hello_timeout`].
    HelloTimeout,
    /// `handover_timeout`, at either end.
    HandoverTimeout,
    /// `peer_timeout`, at either end.
    PeerTimeout,
    /// [`RecoverySettings::backoff`].
    RecoveryBackoff,
    /// [`RecoverySettings::give_up`].
    RecoveryGiveUp,
    /// [`SourceSettings::mode`].
    Mode,
    /// [`SourceSettings::postcopy_after`].
    PostcopyAfter,
    /// [`SourceSettings::deadline`].
    Deadline,
    /// [`SourceSettings::max_bandwidth`].
    MaxBandwidth,
    /// [`SourceSettings::switchover_bandwidth`].
    SwitchoverBandwidth,
    /// [`SourceSettings::max_rounds`].
    MaxRounds,
    /// [`ConvergenceSettings::on_stall`].
    OnStall,
    /// [`ConvergenceSettings::stall_rounds`].
    StallRounds,
    /// [`ThrottleSettings::start`](super::ThrottleSettings::start).
    ThrottleStart,
    /// [`ThrottleSettings::step`](super::ThrottleSettings::step).
    ThrottleStep,
    /// [`ThrottleSettings::most`](super::ThrottleSettings::most).
    ThrottleMost,
    /// [`RaiseSettings::step`](super::RaiseSettings::step).
    RaiseStep,
    /// [`RaiseSettings::most`](super::RaiseSettings::most).
    RaiseMost,
}

impl Setting {
    /// Its key in a configuration.
    #[doc(hidden)]
    #[must_use]
    pub fn key(self) -> &'static str {
        match self {
            Self::Lanes => "pipeline.lanes",
            Self::MaxLanes => "pipeline.max_lanes",
            Self::Connections => "pipeline.connections",
            Self::CacheBytes => "encoder.xbzrle_cache",
            Self::OnMiss => "encoder.on_miss",
            Self::CompressLevel => "encoder.compress_level",
            Self::DowntimeLimit => "migration.downtime_limit",
            Self::MaxDowntime => "migration.max_downtime",
            Self::HelloTimeout => "migration.hello_timeout",
            Self::HandoverTimeout => "migration.handover_timeout",
            Self::PeerTimeout => "migration.peer_timeout",
            Self::RecoveryBackoff => "migration.recovery.backoff",
            Self::RecoveryGiveUp => "migration.recovery.give_up",
            Self::Mode => "migration.mode",
            Self::PostcopyAfter => "migration.postcopy_after",
            Self::Deadline => "migration.deadline",
            Self::MaxBandwidth => "migration.max_bandwidth",
            Self::SwitchoverBandwidth => "migration.switchover_bandwidth",
            Self::MaxRounds => "migration.max_rounds",
            Self::OnStall => "convergence.on_stall",
            Self::StallRounds => "convergence.stall_rounds",
            Self::ThrottleStart => "convergence.throttle.start",
            Self::ThrottleStep => "convergence.throttle.step",
            Self::ThrottleMost => "convergence.throttle.most",
            Self::RaiseStep => "convergence.raise.step",
            Self::RaiseMost => "convergence.raise.most",
        }
    }

    /// A valid duration.
    fn example(self) -> &'static str {
        match self {
            Self::HelloTimeout => "\"10s\"",
            Self::HandoverTimeout | Self::PeerTimeout => "\"30s\"",
            Self::Deadline => "\"5m\" or \"none\"",
            Self::PostcopyAfter => "3 (rounds) or \"10s\"",
            Self::RaiseStep => "\"100ms\"",
            Self::RecoveryBackoff => "\"500ms\"",
            Self::RecoveryGiveUp => "\"5m\"",
            _ => "\"300ms\"",
        }
    }
}

/// The last part of its key, which is its field name too, except for `cache_bytes`.
impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = self.key();
        f.write_str(key.split_once('.').map_or(key, |(_, name)| name))
    }
}

/// An invalid setting: its text names the setting, what is wrong and which value is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{setting}: {broken}; {help}", help = self.help())]
#[non_exhaustive]
pub struct SettingsError {
    /// The setting.
    pub setting: Setting,
    /// The rule that it violates.
    pub broken: Rule,
}

/// A rule for settings, with the figures that violate it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rule {
    /// There is at least one lane, and at most [`MAX_LANES`].
    Lanes(u16),
    /// There is at least one connection, and at most one for each lane: a lane travels on one connection.
    Connections {
        /// The configured number.
        connections: u16,
        /// The lanes.
        lanes: u16,
    },
    /// The cache holds two pages for each lane.
    CacheHoldsPages {
        /// The configured bytes.
        cache: u64,
        /// The least bytes.
        least: u64,
    },
    /// Pages that miss the cache can be compressed only if there is a compressor.
    Compressor,
    /// The level is one of [`ZSTD_LEVELS`].
    Level(i32),
    /// A duration is more than zero.
    LongerThanNothing,
    /// A duration is at most a hundred years.
    AtMostACentury,
    /// A live peer has time to send a heartbeat: [`LEAST_PEER_TIMEOUT`].
    PeerTimeout(Duration),
    /// A bandwidth is more than zero.
    Bandwidth,
    /// There is at least one round.
    Rounds,
    /// Each step occurs once in the list.
    StepOnce(StallStep),
    /// A throttle leaves the guest a part of its time: 1 to 99 percent.
    Percent(u8),
    /// A throttle starts at its ceiling or below.
    StartsBelowMost {
        /// The first level, in percent.
        start: u8,
        /// The ceiling.
        most: u8,
    },
    /// A downtime limit is raised to a higher one.
    RaisesLimit {
        /// The limit.
        limit: Duration,
        /// The highest limit.
        most: Duration,
    },
    /// The downtime limit is at most `max_downtime`.
    LimitBelowMost {
        /// The limit.
        limit: Duration,
        /// The downtime that no switchover may exceed.
        most: Duration,
    },
    /// A guest that runs on pages that follow needs checksums: a page that was damaged on its way must not reach it.
    PostcopyChecksum(Mode),
    /// It needs lost connections to be made again: without that, each one loses the guest.
    PostcopyRecovery(Mode),
    /// Only `hybrid` switches to postcopy later than at once.
    HybridOnly(Mode),
}

/// What is wrong.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Lanes(lanes) => write!(f, "{lanes} lanes"),
            Self::Connections { connections, lanes } => write!(f, "{connections} connections for {lanes} lanes"),
            Self::CacheHoldsPages { cache, .. } => write!(f, "an XBZRLE cache of {} holds no pages", Size(cache)),
            Self::Compressor => f.write_str("pages cannot be compressed on a miss where `compress` is \"none\""),
            Self::Level(level) => write!(f, "zstd has no level {level}"),
            Self::LongerThanNothing => f.write_str("this must be longer than nothing"),
            Self::AtMostACentury => f.write_str("this is longer than a hundred years"),
            Self::PeerTimeout(limit) => {
                let limit = Time(limit);
                write!(
                    f,
                    "a peer_timeout of {limit} is too short: a peer that is alive sends something each half second"
                )
            }
            Self::Bandwidth => f.write_str("0 bytes a second"),
            Self::Rounds => f.write_str("0 rounds"),
            Self::StepOnce(_) => f.write_str("a step stands here twice"),
            Self::Percent(percent) => write!(f, "{percent} percent of the guest's time"),
            Self::StartsBelowMost { start, most } => {
                write!(f, "throttling that starts at {start} and ends at {most} percent")
            }
            Self::RaisesLimit { limit, most } => {
                write!(f, "a limit of {} cannot be raised to {}", Time(limit), Time(most))
            }
            Self::LimitBelowMost { limit, most } => {
                write!(f, "a downtime_limit of {} above a max_downtime of {}", Time(limit), Time(most))
            }
            Self::PostcopyChecksum(mode) => {
                write!(f, "mode {:?} without checksums: a damaged page would reach a guest that runs", mode.name())
            }
            Self::PostcopyRecovery(mode) => {
                write!(f, "mode {:?} without recovery: a lost connection would lose the guest", mode.name())
            }
            Self::HybridOnly(mode) => write!(f, "mode {:?} does not switch to postcopy later", mode.name()),
        }
    }
}

impl SettingsError {
    /// What to configure instead.
    #[must_use]
    pub fn help(&self) -> String {
        match self.broken {
            Rule::Lanes(_) => format!("write a number from 1 to {MAX_LANES}"),
            Rule::Connections { lanes, .. } => {
                let most = lanes.max(1);
                format!("write a number from 1 to {most}, or more lanes: a lane travels on one connection")
            }
            Rule::CacheHoldsPages { least, .. } => {
                format!("write \"256 MiB\", at least {} here, or delta = \"none\"", Size(least))
            }
            Rule::Compressor => "delete it, or choose a compressor: compress = \"lz4\"".into(),
            Rule::Level(_) => {
                let (least, most) = (ZSTD_LEVELS.start(), ZSTD_LEVELS.end());
                format!("write a number from {least} (fast) to {most} (dense)")
            }
            Rule::LongerThanNothing | Rule::AtMostACentury => format!("write {}", self.setting.example()),
            Rule::PeerTimeout(_) => format!("write \"30s\", at least \"{}\"", Time(LEAST_PEER_TIMEOUT)),
            Rule::Bandwidth => "write a rate, or \"unlimited\"".into(),
            Rule::Rounds => "write 1 or more".into(),
            Rule::StepOnce(_) => "write each step once".into(),
            Rule::Percent(_) => "write a number from 1 to 99".into(),
            Rule::StartsBelowMost { .. } => "write a start of at most `most`".into(),
            Rule::RaisesLimit { .. } => "write more than downtime_limit, or leave \"raise-downtime-limit\" out".into(),
            Rule::LimitBelowMost { .. } => "write at least the downtime_limit, or \"none\"".into(),
            Rule::PostcopyChecksum(_) => "write checksum = true, or mode = \"precopy\"".into(),
            Rule::PostcopyRecovery(_) => "write recovery.attempts = 10, or mode = \"precopy\"".into(),
            Rule::HybridOnly(_) => "write mode = \"hybrid\", or leave it out".into(),
        }
    }
}

impl SourceSettings {
    /// Can a guest with pages of `page_bytes` be sent with these settings? [`send`](crate::migration::send) calls this
    /// first.
    ///
    /// # Errors
    /// The first rule that is violated.
    pub fn check(&self, page_bytes: u64) -> Result<(), SettingsError> {
        first(self.broken_rules(page_bytes))
    }

    /// Every rule that is violated.
    #[doc(hidden)]
    #[must_use]
    pub fn broken_rules(&self, page_bytes: u64) -> Vec<SettingsError> {
        let mut rules = Broken::default();
        rules.need((1..=MAX_LANES).contains(&self.lanes), Setting::Lanes, Rule::Lanes(self.lanes));
        let connections = Rule::Connections { connections: self.connections, lanes: self.lanes };
        rules.need((1..=self.lanes.max(1)).contains(&self.connections), Setting::Connections, connections);
        rules.encoder(&self.encoder, page_bytes, self.lanes);
        rules.time(Setting::DowntimeLimit, self.downtime_limit);
        rules.timeouts(self.handover_timeout, self.peer_timeout);
        rules.recovery(&self.recovery);
        self.deadline.iter().for_each(|&deadline| rules.time(Setting::Deadline, deadline));
        rules.need(self.max_bandwidth != Some(0), Setting::MaxBandwidth, Rule::Bandwidth);
        let is_zero = self.switchover_bandwidth == SwitchoverBandwidth::AtMost(0);
        rules.need(!is_zero, Setting::SwitchoverBandwidth, Rule::Bandwidth);
        rules.need(self.max_rounds > 0, Setting::MaxRounds, Rule::Rounds);
        rules.convergence(&self.convergence, self.downtime_limit);
        rules.postcopy(self);
        if let Some(most) = self.max_downtime {
            let limit = self.downtime_limit;
            rules.need(limit <= most, Setting::MaxDowntime, Rule::LimitBelowMost { limit, most });
        }
        rules.0
    }
}

impl DestinationSettings {
    /// Can a guest be received with these settings? [`receive`](crate::migration::receive) calls this first.
    ///
    /// # Errors
    /// The first rule that is violated.
    pub fn check(&self) -> Result<(), SettingsError> {
        first(self.broken_rules())
    }

    /// Every rule that is violated.
    #[doc(hidden)]
    #[must_use]
    pub fn broken_rules(&self) -> Vec<SettingsError> {
        let mut rules = Broken::default();
        rules.need((1..=MAX_LANES).contains(&self.max_lanes), Setting::MaxLanes, Rule::Lanes(self.max_lanes));
        rules.time(Setting::HelloTimeout, self.hello_timeout);
        rules.timeouts(self.handover_timeout, self.peer_timeout);
        rules.recovery(&self.recovery);
        rules.0
    }
}

fn first(broken: Vec<SettingsError>) -> Result<(), SettingsError> {
    broken.into_iter().next().map_or(Ok(()), Err)
}

/// The rules that are violated.
#[derive(Default)]
struct Broken(Vec<SettingsError>);

impl Broken {
    /// Adds a rule unless it `holds`.
    fn need(&mut self, holds: bool, setting: Setting, broken: Rule) {
        if !holds {
            self.0.push(SettingsError { setting, broken });
        }
    }

    fn time(&mut self, setting: Setting, time: Duration) {
        self.need(!time.is_zero(), setting, Rule::LongerThanNothing);
        self.need(Time(time) <= Time::LONGEST, setting, Rule::AtMostACentury);
    }

    fn recovery(&mut self, recovery: &RecoverySettings) {
        self.time(Setting::RecoveryBackoff, recovery.backoff);
        self.time(Setting::RecoveryGiveUp, recovery.give_up);
    }

    fn postcopy(&mut self, settings: &SourceSettings) {
        let (mode, is_hybrid) = (settings.mode, settings.mode == Mode::Hybrid);
        if mode.may_switch() {
            self.need(settings.checksum, Setting::Mode, Rule::PostcopyChecksum(mode));
            self.need(settings.recovery.attempts > 0, Setting::Mode, Rule::PostcopyRecovery(mode));
        }
        match settings.postcopy_after {
            Some(_) if !is_hybrid => self.need(false, Setting::PostcopyAfter, Rule::HybridOnly(mode)),
            Some(PostcopyAfter::Rounds(rounds)) => self.need(rounds > 0, Setting::PostcopyAfter, Rule::Rounds),
            Some(PostcopyAfter::Time(time)) => self.time(Setting::PostcopyAfter, time),
            None => {}
        }
        let step = settings.convergence.on_stall.contains(&StallStep::Postcopy);
        self.need(!step || is_hybrid, Setting::OnStall, Rule::HybridOnly(mode));
    }

    fn timeouts(&mut self, handover: Duration, peer: Duration) {
        self.time(Setting::HandoverTimeout, handover);
        self.time(Setting::PeerTimeout, peer);
        self.need(peer.is_zero() || peer >= LEAST_PEER_TIMEOUT, Setting::PeerTimeout, Rule::PeerTimeout(peer));
    }

    fn encoder(&mut self, settings: &EncoderSettings, page_bytes: u64, lanes: u16) {
        if let Some(xbzrle) = &settings.xbzrle {
            let cache = xbzrle.cache_bytes;
            let least = least_cache(page_bytes, lanes);
            self.need(cache >= least, Setting::CacheBytes, Rule::CacheHoldsPages { cache, least });
            let compresses = settings.compress.is_some() || xbzrle.on_miss != OnMiss::Compress;
            self.need(compresses, Setting::OnMiss, Rule::Compressor);
        }
        if let Some(Codec::Zstd { level }) = settings.compress {
            self.need(ZSTD_LEVELS.contains(&level), Setting::CompressLevel, Rule::Level(level));
        }
    }

    fn convergence(&mut self, settings: &ConvergenceSettings, limit: Duration) {
        let steps = &settings.on_stall;
        let twice = steps.iter().enumerate().find(|(at, step)| steps[..*at].contains(step));
        twice.into_iter().for_each(|(_, &step)| self.need(false, Setting::OnStall, Rule::StepOnce(step)));
        self.need(settings.stall_rounds > 0, Setting::StallRounds, Rule::Rounds);
        let throttle = settings.throttle;
        let percents = [
            (Setting::ThrottleStart, throttle.start),
            (Setting::ThrottleStep, throttle.step),
            (Setting::ThrottleMost, throttle.most),
        ];
        for (setting, percent) in percents {
            self.need((1..=99).contains(&percent), setting, Rule::Percent(percent));
        }
        let starts = Rule::StartsBelowMost { start: throttle.start, most: throttle.most };
        self.need(throttle.start <= throttle.most, Setting::ThrottleStart, starts);
        let raise = settings.raise;
        self.time(Setting::RaiseStep, raise.step);
        let raises = !steps.contains(&StallStep::RaiseDowntimeLimit) || raise.most > limit;
        self.need(raises, Setting::RaiseMost, Rule::RaisesLimit { limit, most: raise.most });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::XbzrleSettings;

    const PAGE: u64 = 4096;

    /// The one rule that these settings violate.
    #[track_caller]
    fn broken(change: impl FnOnce(&mut SourceSettings)) -> (Setting, Rule) {
        let mut settings = SourceSettings::default();
        change(&mut settings);
        let [SettingsError { setting, broken }] = settings.broken_rules(PAGE)[..] else {
            panic!("{:?}", settings.broken_rules(PAGE));
        };
        assert_eq!(settings.check(PAGE), Err(SettingsError { setting, broken }));
        (setting, broken)
    }

    #[test]
    fn the_defaults_keep_to_every_rule() {
        assert_eq!(SourceSettings::default().check(PAGE), Ok(()));
        assert_eq!(DestinationSettings::default().check(), Ok(()));
    }

    #[test]
    fn what_cannot_be_is_named_with_its_figures() {
        let (zero, ms) = (Duration::ZERO, Duration::from_millis);
        assert_eq!(broken(|set| (set.lanes, set.connections) = (65, 1)), (Setting::Lanes, Rule::Lanes(65)));
        let connections = Rule::Connections { connections: 3, lanes: 2 };
        assert_eq!(broken(|set| set.connections = 3), (Setting::Connections, connections));
        let small = Some(XbzrleSettings { cache_bytes: 4 * PAGE - 1, ..XbzrleSettings::default() });
        let cache = Rule::CacheHoldsPages { cache: 4 * PAGE - 1, least: 4 * PAGE };
        assert_eq!(broken(|set| set.encoder.xbzrle = small), (Setting::CacheBytes, cache));
        let compress = Some(XbzrleSettings { on_miss: OnMiss::Compress, ..XbzrleSettings::default() });
        let plain = EncoderSettings { compress: None, xbzrle: compress };
        assert_eq!(broken(|set| set.encoder = plain), (Setting::OnMiss, Rule::Compressor));
        let level = |level| move |set: &mut SourceSettings| set.encoder.compress = Some(Codec::Zstd { level });
        assert_eq!(broken(level(20)), (Setting::CompressLevel, Rule::Level(20)));
        assert_eq!(broken(level(-8)), (Setting::CompressLevel, Rule::Level(-8)));
        assert_eq!(broken(|set| set.downtime_limit = zero), (Setting::DowntimeLimit, Rule::LongerThanNothing));
        let long = Duration::MAX;
        assert_eq!(broken(|set| set.deadline = Some(long)), (Setting::Deadline, Rule::AtMostACentury));
        assert_eq!(broken(|set| set.peer_timeout = ms(1999)), (Setting::PeerTimeout, Rule::PeerTimeout(ms(1999))));
        assert_eq!(broken(|set| set.max_bandwidth = Some(0)), (Setting::MaxBandwidth, Rule::Bandwidth));
        let paused = SwitchoverBandwidth::AtMost(0);
        assert_eq!(broken(|set| set.switchover_bandwidth = paused), (Setting::SwitchoverBandwidth, Rule::Bandwidth));
        assert_eq!(broken(|set| set.max_rounds = 0), (Setting::MaxRounds, Rule::Rounds));
        let twice = vec![StallStep::Throttle, StallStep::Cancel, StallStep::Throttle];
        let once = Rule::StepOnce(StallStep::Throttle);
        assert_eq!(broken(|set| set.convergence.on_stall = twice), (Setting::OnStall, once));
        let step = Setting::ThrottleStep;
        assert_eq!(broken(|set| set.convergence.throttle.step = 100), (step, Rule::Percent(100)));
        let most = Rule::LimitBelowMost { limit: ms(300), most: ms(200) };
        assert_eq!(broken(|set| set.max_downtime = Some(ms(200))), (Setting::MaxDowntime, most));
        let hybrid = |set: &mut SourceSettings| set.mode = Mode::Hybrid;
        let unchecked = |set: &mut SourceSettings| (set.checksum, set.mode) = (false, Mode::Hybrid);
        assert_eq!(broken(unchecked), (Setting::Mode, Rule::PostcopyChecksum(Mode::Hybrid)));
        let once = |set: &mut SourceSettings| (set.recovery, set.mode) = (RecoverySettings::OFF, Mode::Postcopy);
        assert_eq!(broken(once), (Setting::Mode, Rule::PostcopyRecovery(Mode::Postcopy)));
        let after = |after| move |set: &mut SourceSettings| set.postcopy_after = Some(after);
        let later = (Setting::PostcopyAfter, Rule::HybridOnly(Mode::Precopy));
        assert_eq!(broken(after(PostcopyAfter::Rounds(1))), later);
        let step = |set: &mut SourceSettings| set.convergence.on_stall = vec![StallStep::Postcopy];
        assert_eq!(broken(step), (Setting::OnStall, Rule::HybridOnly(Mode::Precopy)));
        let no_rounds = |set: &mut SourceSettings| {
            hybrid(set);
            after(PostcopyAfter::Rounds(0))(set);
        };
        assert_eq!(broken(no_rounds), (Setting::PostcopyAfter, Rule::Rounds));
        let none = DestinationSettings { max_lanes: 0, ..DestinationSettings::default() };
        assert_eq!(none.check(), Err(SettingsError { setting: Setting::MaxLanes, broken: Rule::Lanes(0) }));
    }

    #[test]
    fn no_lanes_is_a_sentence() {
        let error = SourceSettings { lanes: 0, ..SourceSettings::default() }.check(PAGE).unwrap_err();
        assert_eq!(error.to_string(), "lanes: 0 lanes; write a number from 1 to 64");
    }
}
