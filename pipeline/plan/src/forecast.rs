//! The forecast of a migration of a recorded guest over a link.

use std::time::Duration;

use super::bandwidth::Bandwidth;
use super::model::TracedGuest;
use super::trace::{GuestFacts, Trace};
use super::written::Written;
use memferry::controller::Decision;
use memferry::controller::forecast::FixedCost;
use memferry::controller::simulation::{Conditions, Run, simulate};
use memferry::migration::DIGEST_PASSES;
use memferry::model::link::Link;
use memferry::settings::{SourceSettings, Verify};

/// The time of device state and the last handshake, for a guest that has not been paused yet.
const HANDOVER: Duration = Duration::from_millis(2);
/// The time until the destination has acknowledged the last round and the guest's writers have stopped.
const DRAIN: Duration = Duration::from_millis(5);
/// The number of stretches that are hashed before each decision, to estimate the cost of digests.
const STRETCHES_HASHED: u64 = 8;
/// A downtime may exceed its limit by this much and still count as within it: it is a forecast, as was the
/// decision's.
const TOLERANCE: f64 = 1.05;

/// The forecast of a migration.
#[derive(Clone, Debug)]
pub struct Foreseen {
    /// Over this link.
    pub bandwidth: Bandwidth,
    /// The simulated migration.
    pub run: Run,
    /// Does it end with the guest moved, in a downtime within the limit that was set?
    pub meets: bool,
    /// How often the trace was repeated because the migration takes longer than the recording.
    pub repeated: bool,
}

impl Foreseen {
    /// Does it meet the limit without what a guest notices or an operator has to weigh: a throttle, or postcopy?
    #[must_use]
    pub fn is_gentle(&self) -> bool {
        self.meets && self.run.throttle == 0 && self.run.end == Decision::SwitchOver
    }
}

/// Runs a migration over a link in simulated time.
#[must_use]
pub fn foresee(written: &Written<'_>, settings: &SourceSettings, bandwidth: Bandwidth) -> Foreseen {
    let trace = written.trace();
    let mut guest = TracedGuest::new(written, settings, bandwidth);
    let fixed = fixed_cost(trace, settings);
    let conditions = Conditions {
        link: Link::new(bandwidth.bytes_per_second),
        fixed,
        setup: trace.guest.arming,
        decision: look_at_digests(&trace.guest, fixed.verify),
        drain: DRAIN,
    };
    let run = simulate(&mut guest, &conditions, settings);
    let moves = matches!(run.end, Decision::SwitchOver | Decision::Postcopy);
    let meets = moves && run.downtime <= settings.downtime_limit.mul_f64(TOLERANCE);
    Foreseen { bandwidth, meets, repeated: guest.reached() > trace.length(), run }
}

/// The cost of a switchover without any pages.
#[must_use]
pub fn fixed_cost(trace: &Trace, settings: &SourceSettings) -> FixedCost {
    let verify = if settings.verify == Verify::Full { trace.guest.digests } else { Duration::ZERO };
    FixedCost {
        pause: settings.expected_pause,
        sync: trace.sync(),
        verify,
        prepare: settings.expected_prepare,
        start: settings.expected_start,
        handover: HANDOVER,
        ..FixedCost::default()
    }
}

/// The time to estimate the cost of digests before a decision: one sample, on one core.
fn look_at_digests(guest: &GuestFacts, verify: Duration) -> Duration {
    let stretches = guest.words().div_ceil(guest.page_size.stretch_extents()).max(1);
    let one_pass = verify / DIGEST_PASSES * guest.cores;
    one_pass.mul_f64(STRETCHES_HASHED.min(stretches) as f64 / stretches as f64)
}
