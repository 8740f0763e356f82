//! The operator's requests to a source, their answers, and what must be in force after them.

use std::time::Duration;

use tokio::sync::oneshot::{self, Receiver, error::TryRecvError};

use crate::change::{Change, differences, with_all};
use crate::control::{Ask, ControlError, Request};
use crate::migration::course::source::SourceCourse;
use crate::settings::{SourceSettings, SwitchoverBandwidth};

/// How many requests there are to change settings.
pub(super) const SETS: u8 = 14;

/// The changes of a request. Some are refused, and some only at certain moments.
fn changes(number: u8) -> Vec<Change> {
    let ms = Duration::from_millis;
    match number {
        0 => vec![Change::MaxBandwidth(Some(1 << 20))],
        1 => vec![Change::MaxBandwidth(None)],
        2 => vec![Change::SwitchoverBandwidth(SwitchoverBandwidth::AtMost(1 << 18))],
        3 => vec![Change::MaxBandwidth(Some(1 << 19)), Change::SwitchoverBandwidth(SwitchoverBandwidth::Unlimited)],
        4 => vec![Change::DowntimeLimit(ms(2000))],
        5 => vec![Change::DowntimeLimit(ms(1))],
        6 => vec![Change::MaxDowntime(Some(ms(20)))],
        7 => vec![Change::Deadline(Some(ms(150)))],
        8 => vec![Change::Deadline(Some(ms(1)))],
        9 => vec![Change::ThrottleMost(0)],
        10 => vec![Change::ThrottleMost(50)],
        11 => vec![Change::XbzrleCache(16 << 20)],
        12 => vec![Change::MaxBandwidth(Some(1 << 20)), Change::DowntimeLimit(Duration::ZERO)],
        _ => vec![Change::DowntimeLimit(ms(10)), Change::MaxDowntime(Some(ms(10))), Change::Deadline(None)],
    }
}

/// Where the answer to a request comes.
type Answered = Receiver<Result<(), ControlError>>;

/// The requests of a run.
#[derive(Debug)]
pub(super) struct Requests {
    /// The settings that must be in force.
    settings: SourceSettings,
    /// Those that are not answered.
    pending: Vec<(Vec<Change>, Answered)>,
    /// The changes reported since the last answer.
    reported: Vec<(Change, Change)>,
    /// What the stages were ordered to use, once they run.
    stages: Option<Stages>,
}

/// Settings of the stages.
#[derive(Clone, Copy, Debug)]
struct Stages {
    bandwidth: Option<u64>,
    cache_bytes: Option<u64>,
}

impl Requests {
    pub(super) fn new(settings: SourceSettings) -> Self {
        Self { settings, pending: Vec::new(), reported: Vec::new(), stages: None }
    }

    /// A request to change settings.
    pub(super) fn set(&mut self, number: u8) -> Request {
        self.request(changes(number), Ask::Set)
    }

    /// A request to switch over.
    pub(super) fn switch_over(&mut self) -> Request {
        self.request(Vec::new(), |_| Ask::SwitchOver)
    }

    fn request(&mut self, changes: Vec<Change>, ask: impl FnOnce(Vec<Change>) -> Ask) -> Request {
        let (answer, answered) = oneshot::channel();
        self.pending.push((changes.clone(), answered));
        Request { ask: ask(changes), answer }
    }

    pub(super) fn stages_start(&mut self, bandwidth: Option<u64>, settings: &SourceSettings) {
        self.stages = Some(Stages { bandwidth, cache_bytes: cache_bytes(settings) });
    }

    pub(super) fn set_bandwidth(&mut self, bandwidth: Option<u64>) {
        self.stages.iter_mut().for_each(|stages| stages.bandwidth = bandwidth);
    }

    pub(super) fn set_cache(&mut self, bytes: u64) {
        self.stages.iter_mut().for_each(|stages| stages.cache_bytes = Some(bytes));
    }

    /// Notes a reported change.
    pub(super) fn report(&mut self, from: Change, to: Change) {
        self.reported.push((from, to));
    }

    /// Takes the answers that have come. The settings of those that are accepted must be in force.
    ///
    /// # Errors
    /// If a request was dropped, or other changes were reported than its own.
    pub(super) fn settle(&mut self) -> Result<(), String> {
        let mut index = 0;
        while let Some((changes, answered)) = self.pending.get_mut(index) {
            let answer = match answered.try_recv() {
                Err(TryRecvError::Empty) => {
                    index += 1;
                    continue;
                }
                Err(TryRecvError::Closed) => Err(format!("{changes:?} was not answered"))?,
                Ok(answer) => answer,
            };
            let (changes, _) = self.pending.remove(index);
            let reported = std::mem::take(&mut self.reported);
            let mut expected = Vec::new();
            if answer.is_ok() {
                let after = with_all(&self.settings, &changes).map_err(|why| format!("{changes:?} accepted: {why}"))?;
                expected = differences(&self.settings, &after);
                self.settings = after;
            }
            if reported != expected {
                return Err(format!("{reported:?} was reported, not {expected:?}"));
            }
        }
        Ok(())
    }

    /// Is every request answered?
    pub(super) fn are_settled(&self) -> bool {
        self.pending.is_empty()
    }

    /// What is not as the operator set it, once every request is answered.
    pub(super) fn check(&self, course: &SourceCourse, throttled: u8) -> Result<(), String> {
        let Some(stages) = self.stages.filter(|_| self.are_settled()) else { return Ok(()) };
        let Self { settings, .. } = self;
        let bandwidth = match settings.switchover_bandwidth {
            _ if course.is_serving() => settings.max_bandwidth,
            SwitchoverBandwidth::AtMost(most) if course.is_paused() => Some(most),
            SwitchoverBandwidth::Unlimited if course.is_paused() => None,
            _ => settings.max_bandwidth,
        };
        let limit = settings.max_downtime.map_or(settings.downtime_limit, |most| most.min(settings.downtime_limit));
        let checks = [
            ("the settings", course.settings() == settings),
            ("the bandwidth", stages.bandwidth == bandwidth),
            ("the cache", stages.cache_bytes == cache_bytes(settings)),
            ("the downtime limit", course.controller().downtime_limit() == limit),
            ("the throttle", throttled <= settings.convergence.throttle.most),
        ];
        match checks.iter().find(|(_, is_in_force)| !is_in_force) {
            Some((what, _)) => Err(format!("{what} is not what the operator set: {settings:?}, {stages:?}")),
            None => Ok(()),
        }
    }
}

fn cache_bytes(settings: &SourceSettings) -> Option<u64> {
    settings.encoder.xbzrle.as_ref().map(|xbzrle| xbzrle.cache_bytes)
}
