//! Connections that have not sent Hello yet. They must not keep out the real peer.
//!
//! Whoever connects decides how long its handshake and its Hello take, so only so many are waited for at once. If there are more, one
//! gives way to the next: of the host that has the most of them, the one that has waited longest, but none before its [`GRACE`] is
//! over. So clients of one host first compete with each other. And where all come from one host, as through a proxy, a thousand of them
//! give way within a second: a real peer that comes behind them is greeted by then.

use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until};

/// The most connections that are greeted at once. One takes a descriptor, and 100 KiB or so once it sends something.
pub(super) const MAX_GREETED: usize = 256;
/// How long a connection may be silent before it can be dropped for the next one. The real peer sends Hello at once,
/// but it may arrive in a burst of other clients, at a busy host. `MAX_GREETED / GRACE` is how many silent clients pass in a second.
const GRACE: Duration = Duration::from_millis(200);

/// One of them.
#[derive(Debug)]
struct One {
    since: Instant,
    host: Option<IpAddr>,
    greeting: AbortHandle,
}

/// Connections that have not sent Hello yet, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Waiting(VecDeque<One>);

impl Waiting {
    pub(super) fn add(&mut self, host: Option<IpAddr>, greeting: AbortHandle) {
        self.0.push_back(One { since: Instant::now(), host, greeting });
    }

    pub(super) fn forget_finished(&mut self) {
        self.0.retain(|one| !one.greeting.is_finished());
    }

    pub(super) fn is_full(&self) -> bool {
        self.0.len() >= MAX_GREETED
    }

    /// Returns when one may be dropped.
    pub(super) fn one_had_its_time(&self) -> impl Future<Output = ()> + use<> {
        let since = self.0.front().map_or_else(Instant::now, |oldest| oldest.since);
        sleep_until(since + GRACE)
    }

    /// Has one been silent for its grace time?
    pub(super) fn one_is_late(&self) -> bool {
        self.0.front().is_some_and(One::is_late)
    }

    /// Drops one whose grace is over, by the rule of the module's text.
    pub(super) fn drop_one(&mut self) {
        let mut of_host: HashMap<_, usize> = HashMap::new();
        self.0.iter().for_each(|one| *of_host.entry(one.host).or_default() += 1);
        let late = self.0.iter().enumerate().take_while(|(_, one)| one.is_late());
        let chosen = late.min_by_key(|(_, one)| Reverse(of_host[&one.host])).map(|(at, _)| at);
        if let Some(dropped) = chosen.and_then(|at| self.0.remove(at)) {
            dropped.greeting.abort();
        }
    }
}

impl One {
    fn is_late(&self) -> bool {
        self.since.elapsed() >= GRACE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waits for ever.
    fn silent() -> AbortHandle {
        tokio::spawn(std::future::pending::<()>()).abort_handle()
    }

    fn host(last: u8) -> Option<IpAddr> {
        Some(IpAddr::from([192, 0, 2, last]))
    }

    #[tokio::test(start_paused = true)]
    async fn the_host_with_the_most_gives_way_first_and_its_oldest() {
        let mut waiting = Waiting::default();
        for last in [1, 2, 2, 3, 2, 3] {
            waiting.add(host(last), silent());
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        assert!(!waiting.one_is_late());
        waiting.drop_one();
        assert_eq!(waiting.0.len(), 6, "none before its grace is over");
        waiting.one_had_its_time().await;
        assert!(waiting.one_is_late());
        waiting.drop_one();
        let left = |waiting: &Waiting| waiting.0.iter().map(|one| one.host).collect::<Vec<_>>();
        // Only the first is late: its host has but one.
        assert_eq!(left(&waiting), [2, 2, 3, 2, 3].map(host));
        tokio::time::advance(GRACE).await;
        let first = waiting.0[0].greeting.clone();
        waiting.drop_one();
        tokio::task::yield_now().await;
        assert_eq!((left(&waiting), first.is_finished()), ([2, 3, 2, 3].map(host).to_vec(), true));
        waiting.drop_one();
        assert_eq!(left(&waiting), [3, 2, 3].map(host));
        waiting.drop_one();
        assert_eq!(left(&waiting), [2, 3].map(host));
    }

    /// What the module promises of a thousand silent clients.
    #[test]
    fn a_thousand_silent_clients_pass_within_a_second() {
        let refills = (1000_usize - MAX_GREETED).div_ceil(MAX_GREETED);
        assert!(GRACE * u32::try_from(refills).unwrap() < Duration::from_secs(1));
    }
}
