//! The rate for whoever watches: smoothed over about a second.

use std::time::{Duration, Instant};

/// The rate is 0 once nothing has moved for so long: what is smoothed would only come near it.
const STILL: Duration = Duration::from_secs(2);

/// The rate of bytes on the wire.
#[derive(Debug, Default)]
pub(super) struct Speed {
    last: Option<(Instant, u64)>,
    /// When something moved.
    moved: Option<Instant>,
    rate: f64,
}

impl Speed {
    /// So many bytes have gone out by now: the rate lately, in bytes a second.
    pub(super) fn tick(&mut self, total: u64) -> f64 {
        let now = Instant::now();
        if let Some((then, before)) = self.last {
            let time = now.duration_since(then).as_secs_f64().max(1e-3);
            let weight = time.min(1.0);
            if total != before {
                self.moved = Some(now);
            }
            self.rate += ((total - before) as f64 / time - self.rate) * weight;
        }
        self.last = Some((now, total));
        if self.moved.is_none_or(|moved| now.duration_since(moved) >= STILL) {
            self.rate = 0.0;
        }
        self.rate
    }
}
