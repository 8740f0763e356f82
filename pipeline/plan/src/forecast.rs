//! What a migration of a recorded guest would come to, over a link.

use std::time::Duration;

use super::bandwidth::Bandwidth;
use super::model::TracedGuest;
use super::trace::{GuestFacts, Trace};
use super::written::Written;
use memferry::controller::Decision;
use memferry::controller::forecast::FixedCost;
use memferry::controller::simulation::{Link, Run, simulate};
use memferry::migration::DIGEST_PASSES;
use memferry::settings::SourceSettings;

/// Device state and the last handshake, of a guest that nobody has paused yet.
const HANDOVER: Duration = Duration::from_millis(2);
/// Until the destination has acknowledged the last round and the guest's writers stand still.
const DRAIN: Duration = Duration::from_millis(5);
/// Stretches that are hashed before each decision, to know what digests will cost.
const STRETCHES_HASHED: u64 = 8;
/// How far above its limit a downtime may come out and still be called within it: it is a forecast, and so was the decision's.
const TOLERANCE: f64 = 1.05;

/// What is foreseen of a migration.
#[derive(Clone, Debug)]
pub struct Foreseen {
    /// Over this link.
    pub bandwidth: Bandwidth,
    /// How it goes.
    pub run: Run,
    /// Does it end with the guest moved, in a downtime within the limit that was set?
    pub meets: bool,
    /// How often the trace was begun again, because the migration takes longer than the recording did.
    pub repeated: bool,
}

/// Runs a migration over a link in simulated time.
#[must_use]
pub fn foresee(written: &Written<'_>, settings: &SourceSettings, bandwidth: Bandwidth) -> Foreseen {
    let trace = written.trace();
    let mut guest = TracedGuest::new(written, settings, bandwidth);
    let fixed = fixed_cost(trace, settings);
    let link = Link {
        bytes_per_second: bandwidth.bytes_per_second,
        fixed,
        setup: trace.guest.arming,
        decision: look_at_digests(&trace.guest, fixed.verify),
        drain: DRAIN,
    };
    let run = simulate(&mut guest, &link, settings);
    let meets = run.end == Decision::SwitchOver && run.downtime <= settings.downtime_limit.mul_f64(TOLERANCE);
    Foreseen { bandwidth, meets, repeated: guest.reached() > trace.length(), run }
}

/// What a switchover costs without a page.
#[must_use]
pub fn fixed_cost(trace: &Trace, settings: &SourceSettings) -> FixedCost {
    let verify = if settings.verify { trace.guest.digests } else { Duration::ZERO };
    FixedCost { sync: trace.sync(), verify, handover: HANDOVER }
}

/// What it takes to estimate the digests before a decision: a sample, on one core.
fn look_at_digests(guest: &GuestFacts, verify: Duration) -> Duration {
    let stretches = guest.words().div_ceil(guest.page_size.stretch_extents()).max(1);
    let one_pass = verify / DIGEST_PASSES * guest.cores;
    one_pass.mul_f64(STRETCHES_HASHED.min(stretches) as f64 / stretches as f64)
}
