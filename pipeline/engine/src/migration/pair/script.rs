//! Scripts: what happens in a run.

use memferry_stages::wire::messages::RunState;

/// An end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Side {
    Source,
    Destination,
}

/// What a run begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Scene {
    pub(super) verify: bool,
    pub(super) hints: bool,
    pub(super) was_running: bool,
    pub(super) lanes: u16,
    /// Pages a second that the guest writes.
    pub(super) writes: u32,
    /// The downtime limit, in milliseconds.
    pub(super) limit: u32,
    /// A guest that does not converge is throttled.
    pub(super) throttles: bool,
    /// In milliseconds; what happens at the deadline is `switches_at_deadline`.
    pub(super) deadline: Option<u32>,
    pub(super) switches_at_deadline: bool,
    /// The destination answers. Where it does not, the stream is stored, and the destination reads what is complete.
    pub(super) return_path: bool,
    /// Without a return path: the guest is resumed once the stream is complete.
    pub(super) resumes: bool,
    /// A lost connection is made again.
    pub(super) recovers: bool,
    pub(super) postcopy: Postcopy,
}

/// When the guest is started at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Postcopy {
    /// Once all pages are there.
    No,
    /// After the first round, if it does not converge.
    AfterRound,
    /// After this time, in milliseconds.
    After(u16),
    /// Before the first round.
    AtOnce,
}

/// A fault, or what an operator does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    /// The link is cut. Both ends notice.
    Cut,
    /// The link is cut, and not made again for this number of seconds.
    Outage(u16),
    /// What this end sends is lost from here on.
    Mute,
    /// This end is cancelled.
    Cancel,
    /// The operator requests the switchover. At the source.
    SwitchOver,
    /// The operator requests changes of settings, of this number. At the source.
    Set(u8),
    /// The process of this end is stopped for this number of seconds.
    Stop(u16),
    /// The next call into the guest fails.
    CallFails,
    /// The next call into the guest panics.
    CallPanics,
    /// The next observer that is notified panics.
    NotifyPanics,
    /// A stage fails.
    StageFails,
    /// The course itself panics, as a bug in it would.
    Mistake,
    /// The destination takes no pages for this number of seconds.
    Stall(u16),
    /// The listener refuses the next attempt of a source that returns. At the destination.
    Refuse,
    /// A page of this end differs when digests are compared. At the destination.
    Corrupt,
    /// The next message that this end receives is another one, of this number.
    Lie(u8),
}

/// A run: what it begins with, and what happens at which step of which end. A step is an input or an action.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Script {
    pub(super) scene: Scene,
    pub(super) faults: Vec<(Side, u32, Fault)>,
}

impl Scene {
    pub(super) const PLAIN: Self = Self {
        verify: true,
        hints: false,
        was_running: true,
        lanes: 2,
        writes: 40,
        limit: 30,
        throttles: false,
        deadline: None,
        switches_at_deadline: true,
        return_path: true,
        resumes: false,
        recovers: false,
        postcopy: Postcopy::No,
    };

    /// A guest that does not converge, and is started before its pages are all there.
    pub(super) const HYBRID: Self = Self { limit: 1, writes: 5000, postcopy: Postcopy::AfterRound, ..Self::RECOVERS };

    /// A lost connection is made again.
    pub(super) const RECOVERS: Self = Self { recovers: true, ..Self::PLAIN };

    /// A stream that is stored, and a guest that stays paused.
    pub(super) const STORED: Self = Self { return_path: false, ..Self::PLAIN };

    pub(super) fn was(&self) -> RunState {
        if self.was_running { RunState::Running } else { RunState::Paused }
    }
}

/// The faults of one end, in order.
#[derive(Debug)]
pub(super) struct Faults {
    left: Vec<(u32, Fault)>,
    step: u32,
    /// The next call fails, or panics.
    pub(super) call: Option<Fault>,
    /// The next message is this one.
    pub(super) lie: Option<u8>,
    /// The next notification panics.
    pub(super) notify: bool,
    /// A page differs.
    pub(super) corrupt: bool,
    /// The next attempt is refused.
    pub(super) refuse: bool,
}

impl Faults {
    pub(super) fn of(script: &Script, side: Side) -> Self {
        let mut left: Vec<_> =
            script.faults.iter().filter(|fault| fault.0 == side).map(|&(_, step, fault)| (step, fault)).collect();
        left.sort_unstable();
        left.reverse();
        Self { left, step: 0, call: None, lie: None, notify: false, corrupt: false, refuse: false }
    }

    /// Steps so far.
    pub(super) fn steps(&self) -> u32 {
        self.step
    }

    /// An input was delivered, or an action performed.
    pub(super) fn stepped(&mut self) {
        self.step += 1;
    }

    /// The next fault that is due by now. Faults of calls, messages, notifications and returns wait until there is one.
    pub(super) fn due(&mut self) -> Option<Fault> {
        self.next(|_| true)
    }

    /// The next fault that is due by now and is no input: an input waits until the action is performed.
    pub(super) fn due_in_action(&mut self) -> Option<Fault> {
        self.next(|fault| !matches!(fault, Fault::Cancel | Fault::SwitchOver | Fault::Set(_) | Fault::StageFails))
    }

    fn next(&mut self, may_be: fn(Fault) -> bool) -> Option<Fault> {
        while let Some(&(step, fault)) = self.left.last() {
            if step > self.step || !may_be(fault) {
                return None;
            }
            self.left.pop();
            match fault {
                Fault::CallFails | Fault::CallPanics => self.call = Some(fault),
                Fault::Lie(message) => self.lie = Some(message),
                Fault::NotifyPanics => self.notify = true,
                Fault::Corrupt => self.corrupt = true,
                Fault::Refuse => self.refuse = true,
                other => return Some(other),
            }
        }
        None
    }
}
