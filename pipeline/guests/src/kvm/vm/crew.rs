//! The vCPUs' threads: started, paused, throttled, ended.
//!
//! A thread holds its vCPU's lock while it runs it, and checks the command under that lock whenever the vCPU leaves the
//! guest. The thread that gives a command kicks the vCPUs out of the guest with a signal, repeatedly until each lock
//! was free once: a kick that arrives just before a vCPU enters the guest is lost.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use libc::{c_int, c_void, siginfo_t};
use memferry_stages::dirty_log::KvmRingLog;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::devices::Devices;
use super::pace::Pace;
use super::vcpu::{Left, Vcpu};
use memferry::guest::GuestError;
use memferry::threads::explained;

/// The highest throttle: vCPUs always get some of their time.
const MOST_THROTTLED: u8 = 99;
/// The period of throttling: throttled vCPUs run for the first part of each.
const SLICE: Duration = Duration::from_millis(10);
/// How long to wait after a kick before the next one.
const KICK: Duration = Duration::from_micros(200);

/// vCPUs with a thread each. Dropping it ends the threads.
#[derive(Debug)]
pub(super) struct Crew {
    shared: Arc<Shared>,
    /// One for each vCPU; empty until they are started.
    threads: Arc<Mutex<Vec<JoinHandle<()>>>>,
    holder: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    vcpus: Vec<Mutex<Vcpu>>,
    devices: Arc<Devices>,
    rings: Option<Arc<KvmRingLog>>,
    command: Mutex<Command>,
    changed: Condvar,
    throttle: AtomicU8,
    pages_per_second: f64,
    failed: Mutex<Option<String>>,
}

/// The reasons why the vCPUs are stopped.
#[derive(Clone, Copy, Debug)]
struct Command {
    is_paused: bool,
    /// By the throttle, for the rest of a slice.
    is_held: bool,
    is_ended: bool,
}

impl Command {
    fn lets_run(self) -> bool {
        !self.is_paused && !self.is_held && !self.is_ended
    }
}

impl Crew {
    /// A paused crew without threads.
    pub(super) fn new(
        vcpus: Vec<VcpuFd>,
        devices: Arc<Devices>,
        rings: Option<Arc<KvmRingLog>>,
        pages_per_second: f64,
    ) -> Self {
        let shared = Shared {
            vcpus: vcpus.into_iter().map(|vcpu| Mutex::new(Vcpu::new(vcpu))).collect(),
            devices,
            rings,
            command: Mutex::new(Command { is_paused: true, is_held: false, is_ended: false }),
            changed: Condvar::new(),
            throttle: AtomicU8::new(0),
            pages_per_second,
            failed: Mutex::default(),
        };
        Self { shared: Arc::new(shared), threads: Arc::default(), holder: Mutex::default() }
    }

    /// Starts a thread for every vCPU; they wait until the crew is resumed.
    pub(super) fn hire(&self) -> Result<(), GuestError> {
        register_signal_handler(kick_signal(), nothing)
            .map_err(|error| GuestError::caused("no signal can be had to stop vCPUs with", error))?;
        let mut threads = held(&self.threads);
        assert!(threads.is_empty(), "the vCPUs have their threads");
        for index in 0..self.shared.vcpus.len() {
            let shared = self.shared.clone();
            let thread = thread::Builder::new().name(format!("vcpu-{index}")).spawn(move || shared.work(index));
            threads.push(
                thread.map_err(|error| GuestError::caused("a vCPU's thread cannot be started", explained(error)))?,
            );
        }
        Ok(())
    }

    /// Have the vCPUs their threads?
    pub(super) fn is_hired(&self) -> bool {
        !held(&self.threads).is_empty()
    }

    /// When this returns, no vCPU runs.
    pub(super) fn pause(&self) {
        self.shared.order(&held(&self.threads), |command| command.is_paused = true);
    }

    /// Resumes the vCPUs.
    pub(super) fn resume(&self) {
        self.shared.command().is_paused = false;
        self.shared.changed.notify_all();
    }

    pub(super) fn is_paused(&self) -> bool {
        self.shared.command().is_paused
    }

    /// Throttles the vCPUs: they are stopped for this percentage of their time.
    pub(super) fn throttle(&self, percent: u8) -> Result<(), GuestError> {
        {
            // Under the lock, because the throttle's thread might be about to wait.
            let _command = self.shared.command();
            self.shared.throttle.store(percent.min(MOST_THROTTLED), Ordering::Relaxed);
        }
        self.shared.changed.notify_all();
        let mut holder = held(&self.holder);
        if percent > 0 && holder.is_none() {
            let (shared, threads) = (self.shared.clone(), self.threads.clone());
            let thread = thread::Builder::new().name("throttle".into()).spawn(move || shared.hold(&threads));
            *holder =
                Some(thread.map_err(|error| {
                    GuestError::caused("the throttle's thread cannot be started", explained(error))
                })?);
        }
        Ok(())
    }

    /// Calls a function for every vCPU while the crew is paused.
    pub(super) fn visit<T>(
        &self,
        mut look: impl FnMut(u32, &VcpuFd) -> Result<T, GuestError>,
    ) -> Result<Vec<T>, GuestError> {
        assert!(self.is_paused(), "vCPUs are looked at while they are paused");
        (0..).zip(&self.shared.vcpus).map(|(index, vcpu)| look(index, held(vcpu).descriptor())).collect()
    }

    /// Why a vCPU cannot continue, if one cannot.
    pub(super) fn failed(&self) -> Option<String> {
        held(&self.shared.failed).clone()
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        let mut threads = held(&self.threads);
        self.shared.order(&threads, |command| command.is_ended = true);
        let holder = held(&self.holder).take();
        for thread in threads.drain(..) {
            // A thread that panicked has reported it itself.
            drop(thread.join());
        }
        drop(threads);
        holder.into_iter().for_each(|thread| drop(thread.join()));
    }
}

impl Shared {
    /// A vCPU's thread: runs until the end is requested or the vCPU has failed.
    fn work(&self, index: usize) {
        let mut pace = Pace::new(self.pages_per_second, Instant::now());
        while self.waits_for_leave(&mut pace) {
            if let Err(why) = self.run(index, &mut pace) {
                held(&self.failed).get_or_insert(format!("vCPU {index} {why}"));
                return;
            }
        }
    }

    /// Runs a vCPU until a command stops it.
    fn run(&self, index: usize, pace: &mut Pace) -> Result<(), String> {
        let mut vcpu = held(&self.vcpus[index]);
        while self.command().lets_run() {
            match vcpu.run(&self.devices)? {
                Left::Kicked => {}
                Left::PageDone => {
                    if let Some(time) = pace.page(Instant::now()) {
                        self.sleep(time);
                    }
                }
                Left::RingFull => self.make_room(index, &mut vcpu)?,
            }
        }
        // A device access is complete only once the vCPU enters the guest again, which it must not do while paused. It
        // is completed here, because the saved state does not record an incomplete access.
        vcpu.complete_access()
    }

    fn make_room(&self, index: usize, vcpu: &mut Vcpu) -> Result<(), String> {
        let rings = self.rings.as_ref().ok_or("has a full ring, and no log has rings")?;
        let made =
            rings.make_room(index).map_err(|error| format!("has a full ring that cannot be emptied: {error}"))?;
        vcpu.ring_emptied(made)
    }

    /// Changes the command and waits until every vCPU has seen it.
    fn order(&self, threads: &[JoinHandle<()>], change: impl FnOnce(&mut Command)) {
        change(&mut self.command());
        self.changed.notify_all();
        for (vcpu, thread) in self.vcpus.iter().zip(threads) {
            while matches!(vcpu.try_lock(), Err(TryLockError::WouldBlock)) {
                // A thread that has ended runs no vCPU.
                let _ended = thread.kill(kick_signal());
                thread::sleep(KICK);
            }
        }
    }

    /// The throttle's thread: while a percentage is set, it lets the vCPUs run for a part of a slice, and then stops
    /// them in proportion to how long they actually ran.
    fn hold(&self, threads: &Mutex<Vec<JoinHandle<()>>>) {
        loop {
            let idle = |command: &mut Command| self.throttle.load(Ordering::Relaxed) == 0 && !command.is_ended;
            if self.changed.wait_while(self.command(), idle).unwrap_or_else(PoisonError::into_inner).is_ended {
                return;
            }
            let percent = u32::from(self.throttle.load(Ordering::Relaxed));
            let begun = Instant::now();
            thread::sleep(SLICE * (100 - percent) / 100);
            // If the lock is taken, another call pauses or ends the crew, and that stops the vCPUs.
            if let Ok(threads) = threads.try_lock() {
                self.order(&threads, |command| command.is_held = true);
            }
            let asleep = begun.elapsed() * percent / (100 - percent);
            let holds = |command: &mut Command| self.throttle.load(Ordering::Relaxed) > 0 && !command.is_ended;
            drop(self.changed.wait_timeout_while(self.command(), asleep, holds));
            self.command().is_held = false;
            self.changed.notify_all();
        }
    }

    /// Waits until running is allowed; false once it never will be again. Time in which a vCPU is stopped earns it no
    /// pages.
    fn waits_for_leave(&self, pace: &mut Pace) -> bool {
        let begun = Instant::now();
        let waits = |command: &mut Command| !command.lets_run() && !command.is_ended;
        let command = self.changed.wait_while(self.command(), waits).unwrap_or_else(PoisonError::into_inner);
        pace.postpone(begun.elapsed());
        !command.is_ended
    }

    /// Sleeps, but returns early on a command that stops it.
    fn sleep(&self, time: Duration) {
        let sleeps = |command: &mut Command| command.lets_run();
        drop(self.changed.wait_timeout_while(self.command(), time, sleeps));
    }

    fn command(&self) -> MutexGuard<'_, Command> {
        held(&self.command)
    }
}

/// The signal that interrupts a vCPU. Its handler does nothing: its arrival makes KVM return.
fn kick_signal() -> c_int {
    SIGRTMIN() + 1
}

extern "C" fn nothing(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

/// Takes the lock, also after a panic: the thread has reported it, and the others must still be paused and ended.
fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
