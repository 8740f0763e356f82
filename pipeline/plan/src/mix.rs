//! What became of the pages of a sample, in shares, and how such shares are mixed.

use std::time::Duration;

use super::trace::DeltaSample;

/// Shares of the pages of a sample.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mix {
    pub(super) to_zero: f64,
    pub(super) equal: f64,
    pub(super) overflows: f64,
    pub(super) deltas: f64,
    /// Bytes of a delta.
    pub(super) delta_bytes: f64,
}

impl Mix {
    pub(super) fn of(sample: DeltaSample) -> Self {
        let share = |part: u64| if sample.pages == 0 { 0.0 } else { part as f64 / sample.pages as f64 };
        Self {
            to_zero: share(sample.to_zero),
            equal: share(sample.equal),
            overflows: share(sample.overflows),
            deltas: share(sample.deltas),
            delta_bytes: if sample.deltas == 0 { 0.0 } else { sample.delta_bytes as f64 / sample.deltas as f64 },
        }
    }

    /// So much of the other, and the rest of this.
    pub(super) fn and(self, other: Self, share: f64) -> Self {
        let mix = |one: f64, other: f64| one * (1.0 - share) + other * share;
        Self {
            to_zero: mix(self.to_zero, other.to_zero),
            equal: mix(self.equal, other.equal),
            overflows: mix(self.overflows, other.overflows),
            deltas: mix(self.deltas, other.deltas),
            delta_bytes: if self.deltas == 0.0 {
                other.delta_bytes
            } else if other.deltas == 0.0 {
                self.delta_bytes
            } else {
                mix(self.delta_bytes, other.delta_bytes)
            },
        }
    }

    /// As if no more than this share of the pages that were compared had been as they were.
    pub(super) fn with_equal_at_most(self, share: f64) -> Self {
        let changed = self.overflows + self.deltas;
        let most = if share < 1.0 { changed * share / (1.0 - share) } else { self.equal };
        Self { equal: self.equal.min(most), ..self }
    }

    /// Of the pages whose copy was not zero.
    pub(super) fn share_of_compared(&self, of: impl Fn(&Self) -> f64) -> f64 {
        let compared = self.to_zero + self.equal + self.overflows + self.deltas;
        if compared > 0.0 { of(self) / compared } else { 0.0 }
    }

    /// Of those that are not zero now either.
    pub(super) fn share_of_changes(&self, of: impl Fn(&Self) -> f64) -> f64 {
        let changes = self.equal + self.overflows + self.deltas;
        if changes > 0.0 { of(self) / changes } else { 0.0 }
    }
}

/// The least share of pages that were written and are as they were, over spans of any length. A copy is made a moment after the
/// sync that it belongs to: what is written between the two is found by the next sync, and is in the copy already. The shorter the
/// span the more of it that moment is.
pub(super) fn least_equal(spans: &[(Duration, DeltaSample)]) -> f64 {
    let share = |sample: &DeltaSample| {
        let compared = sample.equal + sample.overflows + sample.deltas;
        if compared == 0 { 0.0 } else { sample.equal as f64 / compared as f64 }
    };
    spans.iter().map(|(_, sample)| share(sample)).fold(1.0, f64::min)
}
