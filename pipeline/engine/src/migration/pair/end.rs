//! What the models of both ends have in common: a side of the link, faults, timers and a guest that is called.

use std::time::Duration;

use tokio::time::Instant;

use super::events::Events;
use super::link::{Found, Port};
use super::script::{Fault, Faults};
use super::{Truth, guest_error, mistake};
use crate::events::Event;
use crate::migration::error::MigrationError;

/// An end. `T` is what happens at it by itself after a time.
#[derive(Debug)]
pub(super) struct End<T> {
    pub(super) truth: Truth,
    pub(super) faults: Faults,
    pub(super) port: Port,
    /// Is the link read?
    pub(super) reads: bool,
    begun: Instant,
    timers: Vec<(Instant, T)>,
    /// What it has reported.
    pub(super) events: Events,
    /// The process is to be stopped for this time, with the next action.
    stop: Option<Duration>,
}

/// What happens at an end.
pub(super) enum Happened<T> {
    /// A fault that is an input of the course.
    Fault(Fault),
    Timed(T),
    Found(Found),
}

impl<T> End<T> {
    pub(super) fn new(truth: Truth, faults: Faults, port: Port) -> Self {
        Self {
            truth,
            faults,
            port,
            reads: true,
            begun: Instant::now(),
            timers: Vec::new(),
            events: Events::default(),
            stop: None,
        }
    }

    /// The time since the migration began.
    pub(super) fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    pub(super) fn at(&mut self, moment: Instant, what: T) {
        self.timers.push((moment, what));
    }

    pub(super) fn after(&mut self, time: Duration, what: T) {
        self.at(Instant::now() + time, what);
    }

    /// Takes back what was to happen.
    pub(super) fn forget(&mut self, is_it: impl Fn(&T) -> bool) {
        self.timers.retain(|(_, timed)| !is_it(timed));
    }

    /// Notifies the observers.
    ///
    /// # Errors
    /// If one of them panics.
    pub(super) fn notify(&mut self, event: &Event) -> Result<(), MigrationError> {
        if std::mem::take(&mut self.faults.notify) {
            return Err(MigrationError::Mistake("an observer panics".into()));
        }
        let noted = self.events.note(event);
        self.require_reported(noted);
        Ok(())
    }

    /// A violation if this is an error, unless a panic has disturbed the lists of actions.
    pub(super) fn require_reported(&self, checked: Result<(), String>) {
        let mut shared = self.truth.lock().unwrap();
        if let Err(violation) = checked
            && !shared.is_disturbed()
        {
            shared.violations.push(violation);
        }
    }

    /// A violation, unless this holds.
    pub(super) fn require(&self, holds: bool, what: &str) {
        if !holds {
            self.truth.lock().unwrap().violations.push(what.into());
        }
    }

    /// Waits for what happens next. Safe to race in a `select!`.
    pub(super) async fn next(&mut self) -> Happened<T> {
        while let Some(fault) = self.faults.due() {
            if !self.suffers(fault) {
                return Happened::Fault(fault);
            }
        }
        let earliest = self.timers.iter().enumerate().map(|(index, (at, _))| (*at, index)).min();
        tokio::select! {
            biased;
            index = passed(earliest) => Happened::Timed(self.timers.remove(index).1),
            found = self.port.next(), if self.reads => Happened::Found(found),
        }
    }

    /// The faults that are due before an action.
    pub(super) async fn before_action(&mut self) {
        while let Some(fault) = self.faults.due_in_action() {
            self.suffers(fault);
        }
        self.faults.stepped();
        if let Some(time) = self.stop.take() {
            self.port.stops(time);
            tokio::time::sleep(time).await;
        }
    }

    /// What a fault does by itself. Returns `false` if it does nothing but become an input.
    fn suffers(&mut self, fault: Fault) -> bool {
        let seconds = |seconds: u16| Duration::from_secs(seconds.into());
        match fault {
            Fault::Cut => self.port.cut(),
            Fault::Outage(time) => {
                self.truth.lock().unwrap().refused_until = Some(Instant::now() + seconds(time));
                self.port.cut();
            }
            Fault::Mute => self.port.mute(),
            Fault::Stop(time) => self.stop = Some(seconds(time)),
            Fault::Stall(time) => self.truth.lock().unwrap().stalled_until = Some(Instant::now() + seconds(time)),
            Fault::Mistake => mistake(),
            Fault::Cancel | Fault::SwitchOver | Fault::Set(_) | Fault::StageFails => return false,
            Fault::CallFails
            | Fault::CallPanics
            | Fault::Lie(_)
            | Fault::NotifyPanics
            | Fault::Corrupt
            | Fault::Refuse => {
                unreachable!("{fault:?} waits for a call, a message, a notification or a source that returns")
            }
        }
        true
    }

    /// The guest is called: it takes this time, or fails.
    pub(super) async fn call(&mut self, takes: Duration) -> Result<(), MigrationError> {
        tokio::time::sleep(takes).await;
        self.called()
    }

    /// The result of a call into the guest.
    pub(super) fn called(&mut self) -> Result<(), MigrationError> {
        match self.faults.call.take() {
            Some(Fault::CallPanics) => Err(MigrationError::Mistake("the guest panics".into())),
            Some(_) => Err(guest_error()),
            None => Ok(()),
        }
    }
}

/// Waits for the earliest moment. Returns what stands beside it.
async fn passed(earliest: Option<(Instant, usize)>) -> usize {
    match earliest {
        Some((at, index)) => {
            tokio::time::sleep_until(at).await;
            index
        }
        None => std::future::pending().await,
    }
}
