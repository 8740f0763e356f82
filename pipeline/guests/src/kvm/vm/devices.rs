//! The devices outside the vCPUs: the ports they access, and the status of the guest that follows from it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::console::{Console, ConsoleLine, PORTS};
use super::program::{ANSWERS, PAGE_DONE, PAGE_FREED, PAGE_TAKEN};
use super::ram::Ram;

/// The effect of a port access on its vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// Nothing.
    Continue,
    /// A page is written: the vCPU waits according to its pace.
    Pace,
}

/// The devices of a machine. A vCPU's thread calls them while the vCPU is outside the guest: when all vCPUs are paused,
/// nothing here writes memory.
#[derive(Debug)]
pub(super) struct Devices {
    ram: Arc<Ram>,
    console: Mutex<Console>,
    log: Mutex<Log>,
    pages: AtomicU64,
}

/// The guest's reports, those at its source included.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Log {
    /// Passes that were reported.
    pub(super) heartbeats: u64,
    /// The last pass of each vCPU.
    pub(super) passes: Vec<u32>,
    /// Ticks that its timer has given.
    pub(super) ticks: u32,
    /// Wrong pages and other reported errors.
    pub(super) troubles: u64,
    /// The first of them.
    pub(super) first_trouble: Option<String>,
}

impl Devices {
    pub(super) fn new(ram: Arc<Ram>, vcpus: u32) -> Self {
        let log = Log { passes: vec![0; vcpus as usize], ..Log::default() };
        Self { ram, console: Mutex::default(), log: Mutex::new(log), pages: AtomicU64::new(0) }
    }

    /// Bytes written to a port.
    pub(super) fn write(&self, port: u16, bytes: &[u8]) -> Ask {
        if port == PAGE_DONE {
            self.pages.fetch_add(1, Ordering::Relaxed);
            return Ask::Pace;
        }
        if let (PAGE_TAKEN | PAGE_FREED, &[a, b, c, d]) = (port, bytes) {
            self.ram.turn_page(u32::from_le_bytes([a, b, c, d]), port == PAGE_TAKEN);
        } else if PORTS.contains(&port) {
            for &byte in bytes {
                let line = self.console().write(port, byte);
                line.into_iter().for_each(|line| self.hear(line));
            }
        }
        Ask::Continue
    }

    /// Bytes read from a port: ones where there is no device.
    pub(super) fn read(&self, port: u16, bytes: &mut [u8]) {
        bytes.fill(if PORTS.contains(&port) { self.console().read(port) } else { 0xff });
    }

    /// Pages written in this process.
    pub(super) fn pages(&self) -> u64 {
        self.pages.load(Ordering::Relaxed)
    }

    pub(super) fn console(&self) -> MutexGuard<'_, Console> {
        self.console.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hear(&self, line: ConsoleLine) {
        let mut log = self.log();
        match line {
            ConsoleLine::Pass { vcpu, pass, ticks } if (vcpu as usize) < log.passes.len() => {
                log.heartbeats += 1;
                log.passes[vcpu as usize] = pass;
                log.ticks = log.ticks.max(ticks);
                self.ram.write(ANSWERS + u64::from(vcpu) * 8, &u64::from(pass).to_le_bytes());
            }
            line => {
                log.troubles += 1;
                let line = match line {
                    ConsoleLine::Trouble(line) => line,
                    ConsoleLine::Pass { vcpu, .. } => format!("there is no vCPU {vcpu}"),
                };
                log.first_trouble.get_or_insert(line);
            }
        }
    }
}
