//! Outcomes of encoding the pages of a sample, as shares, and how such shares are mixed.

use std::time::Duration;

use super::trace::DeltaSample;

/// Shares of the pages of a sample.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mix {
    pub(super) to_zero: f64,
    pub(super) equal: f64,
    pub(super) overflows: f64,
    pub(super) deltas: f64,
    /// Mean bytes of a delta.
    pub(super) delta_bytes: f64,
}

impl Mix {
    /// Where nothing was sampled: no delta helps.
    pub(super) const WHOLE: Self = Self { to_zero: 0.0, equal: 0.0, overflows: 1.0, deltas: 0.0, delta_bytes: 0.0 };

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

    /// A mixture: this share of `other`, the rest of `self`.
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

    /// The same, with the share of unchanged pages among the compared ones capped at `share`.
    pub(super) fn with_equal_at_most(self, share: f64) -> Self {
        let changed = self.overflows + self.deltas;
        let most = if share < 1.0 { changed * share / (1.0 - share) } else { self.equal };
        Self { equal: self.equal.min(most), ..self }
    }

    /// Relative to the pages that were compared.
    pub(super) fn share_of_compared(&self, of: impl Fn(&Self) -> f64) -> f64 {
        let compared = self.to_zero + self.equal + self.overflows + self.deltas;
        if compared > 0.0 { of(self) / compared } else { 0.0 }
    }

    /// Relative to those that are not zero now.
    pub(super) fn share_of_changes(&self, of: impl Fn(&Self) -> f64) -> f64 {
        let changes = self.equal + self.overflows + self.deltas;
        if changes > 0.0 { of(self) / changes } else { 0.0 }
    }
}

/// The least share of written pages that are found unchanged, over spans of any length. A copy is made a moment after
/// the sync that it belongs to. A write between the two is found by the next sync and is already in the copy. The
/// shorter the span, the larger the part that this moment takes.
pub(super) fn least_equal(spans: &[(Duration, DeltaSample)]) -> f64 {
    let share = |sample: &DeltaSample| {
        let compared = sample.equal + sample.overflows + sample.deltas;
        if compared == 0 { 0.0 } else { sample.equal as f64 / compared as f64 }
    };
    spans.iter().map(|(_, sample)| share(sample)).fold(1.0, f64::min)
}
