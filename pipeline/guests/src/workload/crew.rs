//! The writers' threads: started, paused, throttled, ended.
//!
//! A thread holds its writer's lock while it writes a burst of pages, and checks the command under that lock. So after
//! a command was given and each writer's lock was taken once, no writer writes any more.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::fill::check_shared;
use super::machine::Machine;
use super::pacer::{Pacer, Turn};
use super::writer::{Findings, Writer};
use memferry::guest::GuestError;
use memferry::threads::explained;

/// The highest throttle: a writer always gets some of its time.
const MOST_THROTTLED: u8 = 99;

/// Writers with a thread each. Dropping it ends the threads.
#[derive(Debug)]
pub(super) struct Crew {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    machine: Arc<Machine>,
    writers: Vec<Mutex<Writer>>,
    command: Mutex<Command>,
    changed: Condvar,
    throttle: AtomicU8,
    written: AtomicU64,
    checked: AtomicU64,
    stale: AtomicU64,
    first_stale: Mutex<Option<String>>,
}

/// The reasons why the writers are stopped.
#[derive(Clone, Copy, Debug)]
struct Command {
    is_paused: bool,
    is_ended: bool,
    visitors: u32,
}

impl Command {
    fn lets_write(self) -> bool {
        !self.is_paused && !self.is_ended && self.visitors == 0
    }
}

impl Crew {
    /// A paused crew without threads.
    pub(super) fn new(machine: Arc<Machine>, writers: Vec<Writer>) -> Self {
        let shared = Shared {
            machine,
            writers: writers.into_iter().map(Mutex::new).collect(),
            command: Mutex::new(Command { is_paused: true, is_ended: false, visitors: 0 }),
            changed: Condvar::new(),
            throttle: AtomicU8::new(0),
            written: AtomicU64::new(0),
            checked: AtomicU64::new(0),
            stale: AtomicU64::new(0),
            first_stale: Mutex::new(None),
        };
        Self { shared: Arc::new(shared), threads: Vec::new() }
    }

    /// Starts a thread for every writer; they wait until the crew is resumed.
    pub(super) fn hire(&mut self) -> Result<(), GuestError> {
        assert!(self.threads.is_empty(), "the writers have their threads");
        for index in 0..self.shared.writers.len() {
            let shared = self.shared.clone();
            let thread = thread::Builder::new().name(format!("writer-{index}")).spawn(move || shared.work(index));
            self.threads.push(
                thread.map_err(|error| GuestError::caused("a writer's thread cannot be started", explained(error)))?,
            );
        }
        Ok(())
    }

    /// Ends the threads. Returns the writers.
    pub(super) fn dismiss(self) -> Vec<Writer> {
        let shared = self.shared.clone();
        drop(self);
        let shared = Arc::into_inner(shared).expect("its threads have ended");
        shared.writers.into_iter().map(|writer| writer.into_inner().unwrap_or_else(PoisonError::into_inner)).collect()
    }

    /// When this returns, no writer writes.
    pub(super) fn pause(&self) {
        self.shared.order(|command| command.is_paused = true);
    }

    /// Resumes the writers.
    pub(super) fn resume(&self) {
        self.shared.order(|command| command.is_paused = false);
    }

    pub(super) fn is_paused(&self) -> bool {
        self.shared.command().is_paused
    }

    /// Throttles the writers: they are stopped for this percentage of their time.
    pub(super) fn throttle(&self, percent: u8) {
        self.shared.throttle.store(percent.min(MOST_THROTTLED), Ordering::Relaxed);
    }

    /// Calls a function for every writer while all of them are paused.
    pub(super) fn visit<T>(&self, mut look: impl FnMut(&mut Writer) -> T) -> Vec<T> {
        self.shared.order(|command| command.visitors += 1);
        let seen = self.shared.writers.iter().map(|writer| look(&mut held(writer))).collect();
        self.shared.order(|command| command.visitors -= 1);
        seen
    }

    /// Compares every page that was ever written; the writers are paused meanwhile.
    pub(super) fn check_all(&self) {
        let mut shared = Findings::default();
        check_shared(&self.shared.machine, &mut shared);
        self.shared.add(shared);
        for findings in self.visit(|writer| {
            let mut findings = Findings::default();
            writer.check_all(&self.shared.machine, &mut findings);
            findings
        }) {
            self.shared.add(findings);
        }
    }

    /// The results of the writes and checks in this process so far.
    pub(super) fn findings(&self) -> Findings {
        let shared = &self.shared;
        Findings {
            written: shared.written.load(Ordering::Relaxed),
            checked: shared.checked.load(Ordering::Relaxed),
            stale: shared.stale.load(Ordering::Relaxed),
            first_stale: held(&shared.first_stale).clone(),
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.shared.order(|command| command.is_ended = true);
        for thread in self.threads.drain(..) {
            // A writer that panicked has reported it itself.
            drop(thread.join());
        }
    }
}

impl Shared {
    /// A writer's thread: runs until the end is requested.
    fn work(&self, index: usize) {
        if held(&self.writers[index]).is_idle() {
            return;
        }
        let mut pacer = Pacer::new(self.machine.settings().turns_per_second(index));
        let begin = Instant::now();
        while self.waits_for_leave() {
            match pacer.turn(begin.elapsed(), self.throttle.load(Ordering::Relaxed)) {
                Turn::Write(pages) => self.burst(index, pages),
                Turn::Sleep(time) => self.sleep(time),
            }
        }
    }

    fn burst(&self, index: usize, pages: u32) {
        let mut findings = Findings::default();
        let mut writer = held(&self.writers[index]);
        if self.command().lets_write() {
            writer.write(&self.machine, pages, &mut findings);
        }
        // Under the lock: once the guest is paused the figures do not change either.
        self.add(findings);
    }

    fn add(&self, findings: Findings) {
        self.written.fetch_add(findings.written, Ordering::Relaxed);
        self.checked.fetch_add(findings.checked, Ordering::Relaxed);
        self.stale.fetch_add(findings.stale, Ordering::Relaxed);
        if let Some(why) = findings.first_stale {
            held(&self.first_stale).get_or_insert(why);
        }
    }

    /// Changes the command and waits until every writer has seen it.
    fn order(&self, change: impl FnOnce(&mut Command)) {
        change(&mut self.command());
        self.changed.notify_all();
        for writer in &self.writers {
            drop(held(writer));
        }
    }

    /// Waits until writing is allowed; false once it never will be again.
    fn waits_for_leave(&self) -> bool {
        let waits = |command: &mut Command| !command.lets_write() && !command.is_ended;
        let command = self.changed.wait_while(self.command(), waits).unwrap_or_else(PoisonError::into_inner);
        !command.is_ended
    }

    /// Sleeps, but returns early on a command that stops it.
    fn sleep(&self, time: Duration) {
        let sleeps = |command: &mut Command| command.lets_write();
        drop(self.changed.wait_timeout_while(self.command(), time, sleeps));
    }

    fn command(&self) -> MutexGuard<'_, Command> {
        held(&self.command)
    }
}

/// Takes the lock, also after a panic: the writer has reported it, and the others must still be paused and ended.
fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
