//! The cap on bandwidth: a byte-exact token bucket, shared by all connections.
//!
//! Credit grows with time at the rate, to the fraction of a byte, and writers spend it. It never grows beyond
//! [`BURST`]'s worth (or two bytes), so no interval passes more than the rate allows plus one burst: 2 % over a second.
//! Takers are served in the order they came. A turn grants the same for each lane that the taker carries, so connections that
//! always have something to send divide the rate by their lanes. That is a share of [`QUANTUM`]'s worth, or more where that
//! would make small writes: up to [`LANE_TURN`] for each lane, as long as a turn stays within [`LONGEST_TURN`]'s worth.
//!
//! The rate may change at any time. Without a rate, every request is granted at once.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// Credit that an idle bucket saves up, as time at the rate.
pub const BURST: Duration = Duration::from_millis(20);
/// What the turns of all takers grant together, as time at the rate.
pub const QUANTUM: Duration = Duration::from_millis(5);
/// Bytes that a turn grants for each lane where the rate is low. Each write costs headers and acknowledgements, some 130 bytes.
pub const LANE_TURN: usize = 4 << 10;
/// The most that a turn grants for that, as time at the rate. A waiting taker may wake late by the rest of [`BURST`], and credit is
/// not lost.
pub const LONGEST_TURN: Duration = Duration::from_millis(15);

/// Credit is counted in bytes × nanoseconds: growth is `rate × elapsed`, without rounding.
const BYTE: i128 = 1_000_000_000;

/// A shared cap on bytes a second.
#[derive(Debug)]
pub struct TokenBucket {
    /// Held by the taker whose turn it is: tokio's mutex is first come, first served.
    turn: tokio::sync::Mutex<()>,
    account: Mutex<Account>,
    /// Wakes the taker whose turn it is when its wait was computed with another rate.
    rate_changed: Notify,
}

impl TokenBucket {
    /// An empty bucket that fills at `bytes_per_second`.
    ///
    /// # Panics
    /// If the rate is 0: nothing would ever pass.
    #[must_use]
    pub fn new(bytes_per_second: u64) -> Self {
        let bucket = Self::unlimited();
        bucket.set_rate(Some(bytes_per_second));
        bucket
    }

    /// A bucket that grants everything, until it gets a rate.
    #[must_use]
    pub fn unlimited() -> Self {
        Self {
            turn: tokio::sync::Mutex::new(()),
            account: Mutex::new(Account { rate: None, credit: 0, refilled: Instant::now(), filling: Duration::ZERO }),
            rate_changed: Notify::new(),
        }
    }

    /// Whether there is a rate now.
    #[must_use]
    pub fn is_limited(&self) -> bool {
        self.rate().is_some()
    }

    /// The current rate in bytes a second, if there is one.
    #[must_use]
    pub fn rate(&self) -> Option<u64> {
        self.account().rate
    }

    /// Time in which credit grew, since the bucket was made.
    ///
    /// A wait for credit is the limit's for as long as this grows. When the bucket is full, nothing but its taker is
    /// waited for, and what the rate allows is lost.
    #[must_use]
    pub fn filling(&self) -> Duration {
        let mut account = self.account();
        account.refill(Instant::now());
        account.filling
    }

    /// Waits for credit and takes it: `want` bytes, or what a turn grants to this share (at least a byte) if that is less.
    ///
    /// Safe to race in a `select!`: a take that is dropped before its end takes no credit.
    pub async fn take(&self, want: usize, share: Share) -> usize {
        let _turn = self.turn.lock().await;
        loop {
            let wait = match self.account().ask(want, share, Instant::now()) {
                Ok(granted) => return granted,
                Err(wait) => wait,
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.rate_changed.notified() => {}
            }
        }
    }

    /// Takes credit for `bytes` that were written without a grant. Missing credit becomes debt: the next takers wait until it is
    /// paid.
    pub fn charge(&self, bytes: usize) {
        let mut account = self.account();
        account.refill(Instant::now());
        if account.rate.is_some() {
            account.credit -= cost(bytes);
        }
    }

    /// Changes the rate in bytes a second, also for takers that wait already. Debts stay, unless there is no rate to pay
    /// them.
    ///
    /// # Panics
    /// If the rate is 0.
    pub fn set_rate(&self, rate: Option<u64>) {
        assert!(rate != Some(0), "a bandwidth of 0");
        let mut account = self.account();
        account.refill(Instant::now());
        account.rate = rate;
        account.credit = rate.map_or(0, |rate| account.credit.min(most(rate)));
        drop(account);
        self.rate_changed.notify_one();
    }

    /// The account is consistent after every step, so a panic elsewhere cannot have left it half changed.
    fn account(&self) -> MutexGuard<'_, Account> {
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A taker's share of a turn: the lanes it carries, of all there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    lanes: u16,
    of: u16,
    most: u16,
}

impl Share {
    /// The share of a single taker.
    pub const ALL: Self = Self { lanes: 1, of: 1, most: 1 };

    /// `lanes` of `of` lanes, where the taker with the most lanes has `most`.
    ///
    /// # Panics
    /// If there are no lanes, or more than `most`, or `most` is more than all.
    #[must_use]
    pub fn new(lanes: u16, of: u16, most: u16) -> Self {
        assert!((1..=most).contains(&lanes) && most <= of, "{lanes} of {of} lanes, at most {most}");
        Self { lanes, of, most }
    }
}

#[derive(Debug)]
struct Account {
    /// Bytes a second, if there is a limit.
    rate: Option<u64>,
    /// In units of 1 / [`BYTE`] bytes; negative is debt.
    credit: i128,
    /// When the credit was last computed.
    refilled: Instant,
    /// Time in which it grew, up to then.
    filling: Duration,
}

impl Account {
    /// Returns the grant of a [`TokenBucket::take`], or how long to wait until there is enough credit.
    fn ask(&mut self, want: usize, share: Share, now: Instant) -> Result<usize, Duration> {
        self.refill(now);
        let Some(rate) = self.rate else { return Ok(want) };
        let grant = want.min(quantum(rate, share));
        let missing = cost(grant) - self.credit;
        if missing > 0 {
            return Err(time_for(rate, missing));
        }
        self.credit -= cost(grant);
        Ok(grant)
    }

    fn refill(&mut self, now: Instant) {
        if let Some(rate) = self.rate {
            let elapsed = now - self.refilled;
            self.filling += elapsed.min(time_for(rate, most(rate) - self.credit));
            self.credit = (self.credit + worth(rate, elapsed)).min(most(rate));
        }
        self.refilled = now;
    }
}

/// The credit that grows in `time`.
fn worth(rate: u64, time: Duration) -> i128 {
    i128::from(rate) * i128::try_from(time.as_nanos()).expect("an uptime fits")
}

/// The time in which so much credit grows, which is not negative.
fn time_for(rate: u64, credit: i128) -> Duration {
    let nanos = (credit + i128::from(rate) - 1) / i128::from(rate);
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// The most credit: a burst, and never less than the byte of the smallest take and one to grow while its taker wakes.
fn most(rate: u64) -> i128 {
    worth(rate, BURST).max(2 * BYTE)
}

/// The bytes that one turn grants.
fn quantum(rate: u64, share: Share) -> usize {
    let [lanes, of, most] = [share.lanes, share.of, share.most].map(i128::from);
    let large = cost(LANE_TURN).min(worth(rate, LONGEST_TURN) / most);
    let turn = lanes * large.max(worth(rate, QUANTUM) / of);
    usize::try_from(turn / BYTE).unwrap_or(usize::MAX).max(1)
}

fn cost(bytes: usize) -> i128 {
    i128::try_from(bytes).expect("a length in memory") * BYTE
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// Takes `want` again and again for `time`: when each grant came, in nanoseconds, and how large it was.
    async fn drain(bucket: &TokenBucket, want: usize, time: Duration) -> Vec<(u128, u128)> {
        drain_share(bucket, want, Share::ALL, time).await
    }

    async fn drain_share(bucket: &TokenBucket, want: usize, share: Share, time: Duration) -> Vec<(u128, u128)> {
        let start = Instant::now();
        let mut grants = Vec::new();
        while start.elapsed() < time {
            let granted = bucket.take(want, share).await;
            assert!((1..=want).contains(&granted));
            grants.push((start.elapsed().as_nanos(), granted as u128));
        }
        grants
    }

    /// No stretch of time sees more than the rate and a burst: checked for all stretches in one pass, against the
    /// fullest moment so far.
    fn assert_bound(rate: u64, grants: &[(u128, u128)]) {
        let burst = u128::from(rate) * BURST.as_nanos();
        let (mut sum, mut lead) = (0_i128, i128::MIN);
        for &(at, bytes) in grants {
            let allowed = i128::try_from(at * u128::from(rate)).unwrap();
            lead = lead.max(allowed - sum);
            sum += i128::try_from(bytes).unwrap() * BYTE;
            assert!(sum - allowed + lead <= i128::try_from(burst).unwrap(), "rate {rate}: too much by {at} ns");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_rate_is_held_to_2_percent_over_every_second_from_4_kib_to_10_gib() {
        for rate in [4096, 10_007, 1_000_000, 100 * MIB, 1024 * MIB, 10 * 1024 * MIB] {
            for want in [1500, 256 << 10, 1 << 20] {
                if rate / want as u64 > 200_000 {
                    continue; // millions of takes, and no case of its own
                }
                let grants = drain(&TokenBucket::new(rate), want, Duration::from_secs(3)).await;
                assert_bound(rate, &grants);
                for second in 0..3_u128 {
                    let range = second * 1_000_000_000..(second + 1) * 1_000_000_000;
                    let sum: u128 = grants.iter().filter(|(at, _)| range.contains(at)).map(|(_, bytes)| bytes).sum();
                    let off = sum.abs_diff(u128::from(rate)) * 100;
                    assert!(off <= 2 * u128::from(rate), "{sum} bytes in second {second} at {rate} B/s, {want} a take");
                }
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_lost_to_rounding() {
        // 7 bytes a second for 1,000 seconds, taken byte by byte.
        let bucket = TokenBucket::new(7);
        let start = Instant::now();
        for _ in 0..7000 {
            assert_eq!(bucket.take(1, Share::ALL).await, 1);
        }
        let off = start.elapsed().abs_diff(Duration::from_secs(1000));
        assert!(off <= Duration::from_millis(2), "off by {off:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_bucket_saves_one_burst_and_no_more() {
        let bucket = TokenBucket::new(1000 * 1000);
        tokio::time::advance(Duration::from_secs(60)).await;
        let start = Instant::now();
        let mut at_once = 0;
        while start.elapsed().is_zero() {
            at_once += bucket.take(1000, Share::ALL).await;
        }
        // The last take had to wait.
        assert_eq!(at_once, 20_000 + 1000);
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_grants_a_quantum_or_what_is_wanted_if_that_is_less() {
        let bucket = TokenBucket::new(1000 * 1000);
        assert_eq!(bucket.take(usize::MAX, Share::ALL).await, 5000);
        assert_eq!(bucket.take(7, Share::ALL).await, 7);
        assert_eq!(bucket.take(0, Share::ALL).await, 0);
        assert_eq!(TokenBucket::new(1).take(100, Share::ALL).await, 1);
    }

    /// Headers are not to double the traffic of a low rate: each write is of 15 ms, or of 4 KiB.
    #[tokio::test(start_paused = true)]
    async fn a_low_rate_makes_few_writes() {
        let one_of_four = Share::new(1, 4, 1);
        for (rate, turn) in [(64 << 10, 983), (MIB, 4096), (100 * MIB, 131_072)] {
            assert_eq!(TokenBucket::new(rate).take(usize::MAX, one_of_four).await, turn, "at {rate} B/s");
        }
        // Lanes that share a connection share its writes.
        assert_eq!(TokenBucket::new(64 << 10).take(usize::MAX, Share::new(4, 4, 4)).await, 983);
        assert_eq!(TokenBucket::new(64 << 10).take(usize::MAX, Share::new(1, 3, 2)).await, 491);
    }

    #[tokio::test(start_paused = true)]
    async fn takers_share_evenly_whatever_they_ask_for() {
        let bucket = Arc::new(TokenBucket::new(MIB));
        let taker = |want| {
            let bucket = bucket.clone();
            tokio::spawn(async move { drain(&bucket, want, Duration::from_secs(10)).await })
        };
        let takers = [taker(1 << 20), taker(1 << 16), taker(1 << 13)];
        let share = (10 << 20) / 3;
        for task in takers {
            let sum: u128 = task.await.unwrap().iter().map(|(_, bytes)| bytes).sum();
            assert!(sum.abs_diff(share) * 100 <= 2 * share, "{sum} of {share}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn lanes_share_evenly_however_they_are_dealt_to_connections() {
        const RATE: u64 = 10 * MIB;
        for connections in [&[2, 1][..], &[3, 3, 2], &[1, 1, 1, 61], &[1; 64]] {
            let of: u16 = connections.iter().sum();
            let bucket = Arc::new(TokenBucket::new(RATE));
            let taker = |&lanes: &u16| {
                let most = connections.iter().copied().max().expect("there are some");
                let (bucket, share) = (bucket.clone(), Share::new(lanes, of, most));
                tokio::spawn(async move { drain_share(&bucket, 1 << 20, share, Duration::from_secs(5)).await })
            };
            let takers: Vec<_> = connections.iter().map(taker).collect();
            let mut all = Vec::new();
            for (task, &lanes) in takers.into_iter().zip(connections) {
                let grants = task.await.unwrap();
                let sum: u128 = grants.iter().map(|(_, bytes)| bytes).sum();
                let share = u128::from(5 * RATE) * u128::from(lanes) / u128::from(of);
                assert!(sum.abs_diff(share) * 100 <= 2 * share, "{lanes} of {connections:?}: {sum} of {share}");
                all.extend(grants);
            }
            all.sort_unstable();
            assert_bound(RATE, &all);
            let sum: u128 = all.iter().map(|(_, bytes)| bytes).sum();
            assert!(sum.abs_diff(u128::from(5 * RATE)) * 100 <= 2 * u128::from(5 * RATE), "{connections:?}: {sum}");
        }
    }

    /// The switchover's own bandwidth takes effect at once, and limits like the one before.
    #[tokio::test(start_paused = true)]
    async fn a_rate_that_changes_in_the_middle_is_held_on_both_sides() {
        let bucket = Arc::new(TokenBucket::new(MIB));
        let taking = tokio::spawn({
            let bucket = bucket.clone();
            async move { drain(&bucket, 1 << 16, Duration::from_secs(4)).await }
        });
        tokio::time::sleep(Duration::from_secs(2)).await;
        bucket.set_rate(Some(10 * MIB));
        let grants = taking.await.unwrap();
        let (before, after): (Vec<_>, Vec<_>) = grants.into_iter().partition(|&(at, _)| at < 2_000_000_000);
        for (rate, grants) in [(MIB, before), (10 * MIB, after)] {
            assert_bound(rate, &grants);
            let sum: u128 = grants.iter().map(|(_, bytes)| bytes).sum();
            assert!(sum.abs_diff(u128::from(2 * rate)) * 100 <= 2 * u128::from(2 * rate), "{sum} bytes at {rate}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_rate_everything_passes_and_nothing_is_saved_up() {
        let bucket = Arc::new(TokenBucket::new(1));
        bucket.charge(1_000_000);
        let waiting = tokio::spawn({
            let bucket = bucket.clone();
            async move { bucket.take(1 << 30, Share::ALL).await }
        });
        tokio::time::sleep(Duration::from_millis(10)).await;
        bucket.set_rate(None);
        let start = Instant::now();
        waiting.await.unwrap();
        assert_eq!(bucket.take(1 << 30, Share::ALL).await, 1 << 30);
        assert!(start.elapsed().is_zero());
        tokio::time::advance(Duration::from_secs(60)).await;
        bucket.set_rate(Some(1000));
        let start = Instant::now();
        bucket.take(5, Share::ALL).await;
        assert!(start.elapsed() >= Duration::from_millis(5));
    }

    #[tokio::test(start_paused = true)]
    async fn a_taker_that_wakes_late_waits_for_the_limit_until_the_bucket_is_full() {
        let bucket = TokenBucket::new(1000);
        bucket.charge(5);
        let mut take = std::pin::pin!(bucket.take(5, Share::ALL));
        assert!(futures::poll!(&mut take).is_pending());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(take.await, 5);
        // The debt, and a burst on top of it.
        assert_eq!(bucket.filling(), Duration::from_millis(5) + BURST);
        bucket.set_rate(None);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(bucket.filling(), Duration::from_millis(5) + BURST);
    }

    #[tokio::test(start_paused = true)]
    async fn a_charge_is_paid_by_those_who_come_after() {
        let bucket = TokenBucket::new(1000);
        bucket.charge(5000);
        let start = Instant::now();
        assert_eq!(bucket.take(1, Share::ALL).await, 1);
        let waited = start.elapsed().as_millis();
        assert!((5001..=5003).contains(&waited), "{waited} ms");
    }

    #[tokio::test(start_paused = true)]
    async fn another_rate_reaches_those_who_wait_already() {
        let bucket = Arc::new(TokenBucket::new(1));
        bucket.charge(1_000_000);
        let start = Instant::now();
        let waiting = tokio::spawn({
            let bucket = bucket.clone();
            async move { bucket.take(1, Share::ALL).await }
        });
        tokio::time::sleep(Duration::from_millis(10)).await;
        bucket.set_rate(Some(1_000_000));
        assert_eq!(waiting.await.unwrap(), 1);
        assert!(start.elapsed() < Duration::from_millis(1020), "{:?}", start.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_take_that_is_dropped_takes_nothing_and_lets_the_next_one_in() {
        let bucket = TokenBucket::new(1000);
        let dropped = tokio::time::timeout(Duration::from_millis(2), bucket.take(5, Share::ALL)).await;
        assert!(dropped.is_err());
        let start = Instant::now();
        assert_eq!(bucket.take(5, Share::ALL).await, 5);
        assert!(start.elapsed() <= Duration::from_millis(4), "{:?}", start.elapsed());
    }
}
