//! Signals. The first Ctrl-C, SIGTERM or SIGHUP cancels the current operation, the next one ends the program at once.
//! Ctrl-Z is deferred while the guest is paused. A thread of its own receives them, so that no other wait delays a
//! signal.
//!
//! This program installs handlers and never ignores a signal: so the commands that it runs have the default action
//! for all of them.

use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGTSTP, SIGXFSZ};
use signal_hook::iterator::Signals as Taken;
use signal_hook::low_level;
use tokio_util::sync::CancellationToken;

use super::console;
use super::verdict::{CANCELLED, LOST};
use memferry::events::{Event, Observer, Phase, Role};
use memferry::threads::explained;

/// The time limit for the last line of a program that ends at once.
const LAST_LINE: Duration = Duration::from_millis(200);

/// Makes a write to a file at its size limit (`ulimit -f`) fail, instead of SIGXFSZ ending the program; Rust's own
/// startup does the same for SIGPIPE.
pub(super) fn outlive_full_files() {
    // If the system refuses, the default stays.
    drop(signal_hook::flag::register(SIGXFSZ, Arc::<AtomicBool>::default()));
}

/// The signals that the parent process does not have ignored for this program, as `nohup` does with SIGHUP.
pub(super) fn heeded(signals: &[i32]) -> Vec<i32> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    signals.iter().copied().filter(|signal| ignored >> (signal - 1) & 1 == 0).collect()
}

/// Cancels the current operation when a signal arrives. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Signals(Arc<Mutex<Armed>>);

#[derive(Debug)]
struct Armed {
    token: CancellationToken,
    /// Has a signal arrived for the current operation?
    arrived: bool,
    /// The message to print when the signal arrives.
    notice: &'static str,
    stop: Stop,
    postcopy: Postcopy,
}

/// Whether the guest runs without all of its pages: ending this program loses it then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Postcopy {
    #[default]
    No,
    /// They follow. A cancel is too late, and a signal is kept from it: once there is no connection it would have no effect.
    Follow {
        /// Has a signal arrived?
        is_warned: bool,
    },
    /// There is no connection: a cancel gives the guest up.
    Disconnected,
}

/// The action of Ctrl-Z (SIGTSTP).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// Stops the program.
    AtOnce,
    /// Is deferred until the migration has ended, because a guest is paused for it.
    Later,
    /// Has arrived, and is deferred.
    Waits,
}

impl Signals {
    /// Starts to listen. A signal that arrives early cancels the first armed operation.
    ///
    /// # Errors
    /// If the system refuses.
    pub(super) fn listen(notice: &'static str) -> io::Result<(Self, CancellationToken)> {
        let token = CancellationToken::new();
        let signals = Self(Arc::new(Mutex::new(Armed::new(token.clone(), notice))));
        let mut taken = Taken::new([&[SIGINT, SIGTERM][..], &heeded(&[SIGHUP, SIGTSTP])].concat())?;
        let shared = signals.clone();
        let take = move || {
            for signal in taken.forever() {
                match signal {
                    SIGTSTP => shared.armed().stop_asked(),
                    _ => shared.armed().end_asked(),
                }
            }
        };
        thread::Builder::new().name("memferry-signals".into()).spawn(take).map_err(explained)?;
        Ok((signals, token))
    }

    /// Arms the next operation: a signal cancels the token that is returned, and prints `notice`. No guest is paused
    /// any more.
    pub(super) fn arm(&self, notice: &'static str) -> CancellationToken {
        self.armed().next(notice)
    }

    /// Like [`Signals::arm`], but a signal for the operation before counts for this one as well: it came too late for
    /// that one.
    pub(super) fn arm_after_success(&self, notice: &'static str) -> CancellationToken {
        let mut armed = self.armed();
        let arrived = armed.arrived;
        let token = armed.next(notice);
        if arrived {
            armed.end_asked();
        }
        token
    }

    fn armed(&self) -> MutexGuard<'_, Armed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// From just before the guest is paused, Ctrl-Z is deferred to the next [`Signals::arm`]. The lock prevents a stop in
/// between.
impl Observer for Signals {
    fn event(&self, _: Role, event: &Event) {
        match event {
            Event::Phase(Phase::Switchover) => {
                let mut armed = self.armed();
                if armed.stop == Stop::AtOnce {
                    armed.stop = Stop::Later;
                }
            }
            Event::Phase(phase) => self.armed().note(*phase),
            _ => {}
        }
    }
}

impl Armed {
    fn new(token: CancellationToken, notice: &'static str) -> Self {
        Self { token, arrived: false, notice, stop: Stop::AtOnce, postcopy: Postcopy::No }
    }

    fn next(&mut self, notice: &'static str) -> CancellationToken {
        let before = std::mem::replace(self, Self::new(CancellationToken::new(), notice));
        if before.stop == Stop::Waits {
            stop();
        }
        self.token.clone()
    }

    fn note(&mut self, phase: Phase) {
        match (phase, self.postcopy) {
            (Phase::Postcopy, Postcopy::No | Postcopy::Disconnected) => {
                self.postcopy = Postcopy::Follow { is_warned: false };
            }
            (Phase::Disconnected, Postcopy::Follow { .. }) => self.postcopy = Postcopy::Disconnected,
            _ => {}
        }
    }

    fn end_asked(&mut self) {
        if self.postcopy == (Postcopy::Follow { is_warned: false }) && !self.token.is_cancelled() {
            self.postcopy = Postcopy::Follow { is_warned: true };
            message!(
                "memferry: the guest runs at the destination and needs both ends: it can be given up only while there is no \
                 connection; once more to end at once and lose it"
            );
            return;
        }
        if self.token.is_cancelled() || self.postcopy == (Postcopy::Follow { is_warned: true }) {
            let (lost, code) = match self.postcopy {
                Postcopy::No => ("", CANCELLED),
                _ => (": the guest is lost, for it runs without all of its memory", LOST),
            };
            message!("memferry: second signal, ending at once{lost}");
            console::flush(LAST_LINE);
            // No cleanup may delay this.
            low_level::exit(i32::from(code));
        }
        self.arrived = true;
        self.token.cancel();
        message!("memferry: {}", self.notice);
    }

    fn stop_asked(&mut self) {
        match self.stop {
            Stop::AtOnce => stop(),
            Stop::Later | Stop::Waits => {
                message!(
                    "memferry: the guest is paused for the handover: the program stops when the migration has ended"
                );
                self.stop = Stop::Waits;
            }
        }
    }
}

/// Stops this process until it is continued.
fn stop() {
    // The signal cannot be caught, so the call cannot fail.
    drop(low_level::emulate_default_handler(SIGTSTP));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stop_waits_from_the_switchover_on() {
        let signals = Signals(Arc::new(Mutex::new(Armed::new(CancellationToken::new(), ""))));
        for event in [Event::Phase(Phase::Active), Event::Paused] {
            signals.event(Role::Source, &event);
            assert_eq!(signals.armed().stop, Stop::AtOnce);
        }
        signals.event(Role::Source, &Event::Phase(Phase::Switchover));
        assert_eq!(signals.armed().stop, Stop::Later);
        signals.armed().stop_asked();
        // The other end in the same program.
        signals.event(Role::Destination, &Event::Phase(Phase::Switchover));
        assert_eq!(signals.armed().stop, Stop::Waits);
    }

    #[test]
    fn in_postcopy_a_signal_cancels_only_while_there_is_no_connection() {
        let signals = Signals(Arc::new(Mutex::new(Armed::new(CancellationToken::new(), ""))));
        signals.event(Role::Source, &Event::Phase(Phase::Postcopy));
        signals.armed().end_asked();
        assert!(!signals.armed().token.is_cancelled());
        assert_eq!(signals.armed().postcopy, Postcopy::Follow { is_warned: true });
        signals.event(Role::Source, &Event::Phase(Phase::Disconnected));
        signals.event(Role::Source, &Event::Phase(Phase::Postcopy));
        signals.armed().end_asked();
        assert!(!signals.armed().token.is_cancelled(), "it is the first since the connection was made again");
        signals.event(Role::Source, &Event::Phase(Phase::Disconnected));
        signals.armed().end_asked();
        assert!(signals.armed().token.is_cancelled());
    }

    #[test]
    fn a_signal_too_late_for_one_operation_ends_the_next() {
        let begun = || Signals(Arc::new(Mutex::new(Armed::new(CancellationToken::new(), ""))));
        let signals = begun();
        signals.armed().end_asked();
        assert!(!signals.arm("").is_cancelled(), "a cancelled operation has had its signal");
        assert!(!signals.arm_after_success("").is_cancelled(), "the signal is of the operation before the last");
        signals.armed().end_asked();
        assert!(signals.arm_after_success("").is_cancelled());
        let signals = begun();
        signals.armed().token.cancel();
        assert!(!signals.arm_after_success("").is_cancelled(), "that was no signal");
    }
}
