//! When bytes leave a link, and arrive.

use std::time::Duration;

use memferry_stages::token_bucket::BURST;

use crate::controller::forecast::seconds;

/// The latency of a link of which none is measured.
const LATENCY: Duration = Duration::from_millis(1);

/// A link.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// What a connection carries.
    pub bytes_per_second: f64,
    /// From the moment that a byte leaves until it arrives.
    pub latency: Duration,
}

impl Link {
    /// A link of this bandwidth, with a latency of 1 ms.
    #[must_use]
    pub const fn new(bytes_per_second: f64) -> Self {
        Self { bytes_per_second, latency: LATENCY }
    }
}

/// One direction of a link: connections that each carry bytes in order, and the cap that they share.
///
/// Moments are times since a beginning that the caller chooses.
#[derive(Clone, Debug)]
pub struct Wire {
    link: Link,
    /// For each connection: when everything that it was given has left.
    free: Vec<Duration>,
    /// The token bucket's rate, in bytes a second.
    cap: Option<u64>,
    /// When the bucket has neither credit nor debt. Earlier than now is credit, as time at the rate.
    even: Duration,
}

impl Wire {
    /// A wire of this number of connections, without a cap.
    #[must_use]
    pub fn new(link: Link, connections: usize) -> Self {
        Self { link, free: vec![Duration::ZERO; connections], cap: None, even: Duration::ZERO }
    }

    /// The link.
    #[must_use]
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Sets the cap, as [`TokenBucket::set_rate`](memferry_stages::token_bucket::TokenBucket::set_rate) does: a bucket
    /// that had no rate is empty, and otherwise the same bytes of credit or debt are left.
    pub fn set_cap(&mut self, now: Duration, cap: Option<u64>) {
        self.even = match (self.cap, cap) {
            (Some(before), Some(rate)) => {
                let bytes = before as f64 / rate as f64;
                let (credit, debt) = (now.saturating_sub(self.even), self.even.saturating_sub(now));
                (now + debt.mul_f64(bytes)).saturating_sub(credit.min(BURST).mul_f64(bytes).min(BURST))
            }
            _ => now,
        };
        self.cap = cap;
    }

    /// When the last of these bytes has left if they are sent over a connection at this moment: no earlier than the link
    /// carries them, and than the bucket has credit for them.
    #[must_use]
    pub fn leaves(&self, connection: usize, now: Duration, bytes: u64) -> Duration {
        let carried = self.free[connection].max(now).saturating_add(seconds(bytes as f64 / self.link.bytes_per_second));
        self.cap.map_or(carried, |cap| carried.max(self.even_after(cap, now, bytes)))
    }

    /// Sends these bytes over a connection. Returns when the last of them has left.
    pub fn send(&mut self, connection: usize, now: Duration, bytes: u64) -> Duration {
        let left = self.leaves(connection, now, bytes);
        self.free[connection] = left;
        if let Some(cap) = self.cap {
            self.even = self.even_after(cap, now, bytes);
        }
        left
    }

    /// When the last byte of everything that was sent arrives.
    #[must_use]
    pub fn all_arrived(&self) -> Duration {
        self.free.iter().copied().max().unwrap_or_default() + self.link.latency
    }

    /// The wire was in use up to this moment: credit that was saved before is spent.
    pub fn idle_from(&mut self, now: Duration) {
        self.free.fill(now);
        self.even = now;
    }

    fn even_after(&self, cap: u64, now: Duration, bytes: u64) -> Duration {
        self.even.max(now.saturating_sub(BURST)).saturating_add(seconds(bytes as f64 / cap as f64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn bytes_of_a_connection_leave_in_order_and_those_of_others_beside_them() {
        let mut wire = Wire::new(Link::new(1e6), 2);
        assert_eq!(wire.leaves(0, 5 * MS, 1000), 6 * MS);
        assert_eq!(
            [wire.send(0, 5 * MS, 1000), wire.send(0, 5 * MS, 1000), wire.send(1, 5 * MS, 1000)],
            [6, 7, 6].map(|ms| ms * MS)
        );
        assert_eq!(wire.all_arrived(), 8 * MS);
    }

    #[test]
    fn a_cap_lets_a_burst_pass_as_fast_as_the_link_carries_it() {
        let mut wire = Wire::new(Link::new(10e6), 2);
        wire.set_cap(Duration::ZERO, Some(1_000_000));
        // A bucket begins empty.
        assert_eq!(wire.leaves(0, Duration::ZERO, 1000), MS);
        // 20 ms of credit at 1 MB a second are 20 kB.
        assert_eq!(
            [10_000, 20_000, 25_000].map(|bytes| wire.leaves(0, 500 * MS, bytes)),
            [501, 502, 505].map(|ms| ms * MS)
        );
        // Both connections spend the same credit.
        wire.send(0, 500 * MS, 25_000);
        assert_eq!(wire.leaves(1, 505 * MS, 3000), 508 * MS);
        // A cap above what the link carries changes nothing.
        wire.set_cap(600 * MS, Some(20_000_000));
        assert_eq!(wire.leaves(0, 700 * MS, 1_000_000), 800 * MS);
    }

    #[test]
    fn another_cap_leaves_the_bytes_of_credit_and_debt() {
        let mut wire = Wire::new(Link::new(100e6), 1);
        wire.set_cap(Duration::ZERO, Some(1_000_000));
        wire.set_cap(10 * MS, Some(2_000_000));
        assert_eq!(wire.leaves(0, 10 * MS, 20_000), 15 * MS, "10 kB of credit are left");
        wire.send(0, 10 * MS, 20_000);
        wire.set_cap(10 * MS, Some(1_000_000));
        assert_eq!(wire.leaves(0, 10 * MS, 1000), 21 * MS, "10 kB of debt are left");
        wire.set_cap(10 * MS, None);
        wire.set_cap(10 * MS, Some(1_000_000));
        // The bytes before have left at 15 ms.
        assert_eq!(wire.leaves(0, 10 * MS, 10_000), 20 * MS);
    }
}
