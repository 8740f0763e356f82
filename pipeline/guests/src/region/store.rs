//! The content of a region: its memory, its named state, and who may access them now.
//!
//! One lock guards all three. A holder of [`Access`] holds the lock. So once a pause has taken it and changed the place
//! of the region, no write is in flight, and none begins until the region is open here again.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::memory::{GuestMemory, MappedMemory, RamBlock};

use super::Gone;
use memferry::guest::RunState;

/// The id of the only RAM block.
pub(super) const BLOCK: &str = "region";

/// The place of the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stand {
    Here,
    /// It is being handed over, or not open yet.
    Paused,
    Gone(Gone),
}

#[derive(Debug)]
struct Held {
    stand: Stand,
    states: BTreeMap<String, Vec<u8>>,
}

#[derive(Debug)]
pub(super) struct Store {
    mapped: Arc<MappedMemory>,
    memory: GuestMemory,
    held: Mutex<Held>,
    changed: Condvar,
    /// A pause is requested: new accesses let it go first.
    pausing: AtomicBool,
    /// Held by the send that is running.
    pub(super) sending: tokio::sync::Mutex<()>,
}

impl Store {
    pub(super) fn new(bytes: usize, page_size: PageSize, run_state: RunState) -> io::Result<Self> {
        let mapped = Arc::new(MappedMemory::anonymous(bytes)?);
        let info =
            BlockInfo { backing_page_size: rustix::param::page_size() as u64, ..BlockInfo::new(BLOCK, bytes as u64) };
        let block = RamBlock { info, memory: mapped.clone(), fresh: true };
        let memory = GuestMemory::new(page_size, vec![block]).map_err(io::Error::other)?;
        let stand = if run_state == RunState::Running { Stand::Here } else { Stand::Paused };
        let held = Mutex::new(Held { stand, states: BTreeMap::new() });
        Ok(Self {
            mapped,
            memory,
            held,
            changed: Condvar::new(),
            pausing: AtomicBool::new(false),
            sending: tokio::sync::Mutex::default(),
        })
    }

    pub(super) fn len(&self) -> usize {
        self.mapped.len()
    }

    pub(super) fn mapped(&self) -> &Arc<MappedMemory> {
        &self.mapped
    }

    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    pub(super) fn access(&self) -> Result<Access<'_>, Gone> {
        let waits = |held: &mut Held| held.stand == Stand::Paused || self.pausing.load(Ordering::Relaxed);
        let held = self.changed.wait_while(self.held(), waits).unwrap_or_else(PoisonError::into_inner);
        match held.stand {
            Stand::Gone(gone) => Err(gone),
            Stand::Here | Stand::Paused => Ok(Access { mapped: &self.mapped, held }),
        }
    }

    pub(super) fn is_here(&self) -> Result<(), Gone> {
        if let Stand::Gone(gone) = self.held().stand { Err(gone) } else { Ok(()) }
    }

    pub(super) fn run_state(&self) -> RunState {
        if self.held().stand == Stand::Here { RunState::Running } else { RunState::Paused }
    }

    /// Once this returns, there is no access, and none is granted.
    pub(super) fn pause(&self) {
        self.pausing.store(true, Ordering::Relaxed);
        let mut held = self.held();
        held.stand = Stand::Paused;
        self.pausing.store(false, Ordering::Relaxed);
    }

    pub(super) fn resume(&self) {
        self.stand(|_| Stand::Here);
    }

    /// The send has ended: a region that is still paused is gone.
    pub(super) fn conclude(&self, gone: Gone) {
        self.stand(|stand| if stand == Stand::Paused { Stand::Gone(gone) } else { stand });
    }

    pub(super) fn reopen(&self) {
        self.stand(|stand| if stand == Stand::Gone(Gone::Unconfirmed) { Stand::Here } else { stand });
    }

    pub(super) fn states(&self) -> BTreeMap<String, Vec<u8>> {
        self.held().states.clone()
    }

    pub(super) fn set_states(&self, states: BTreeMap<String, Vec<u8>>) {
        self.held().states = states;
    }

    fn stand(&self, change: impl FnOnce(Stand) -> Stand) {
        let mut held = self.held();
        held.stand = change(held.stand);
        self.changed.notify_all();
    }

    /// Takes the lock, also after a panic of its holder: memory is bytes, written in whole words.
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Exclusive access to read and write a region. See [`Region::access`](super::Region::access).
pub struct Access<'a> {
    mapped: &'a MappedMemory,
    held: MutexGuard<'a, Held>,
}

impl Access<'_> {
    /// Copies bytes out.
    ///
    /// # Panics
    /// If they reach beyond the region's end.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        self.mapped.load(offset, into);
    }

    /// Copies a fixed number of bytes out.
    ///
    /// # Panics
    /// If they reach beyond the region's end.
    #[must_use]
    pub fn load<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        self.read(offset, &mut bytes);
        bytes
    }

    /// Copies bytes in.
    ///
    /// # Panics
    /// If they reach beyond the region's end.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        self.mapped.store(offset, bytes);
    }

    /// A named piece of state, if it exists.
    #[must_use]
    pub fn state(&self, name: &str) -> Option<&[u8]> {
        self.held.states.get(name).map(Vec::as_slice)
    }

    /// Sets a named piece of state. It travels at the switchover, while accesses wait: keep it small.
    ///
    /// # Panics
    /// If the name does not have 1 to 255 bytes.
    pub fn set_state(&mut self, name: &str, bytes: Vec<u8>) {
        assert!((1..=255).contains(&name.len()), "the name of a state has 1 to 255 bytes: {name:?}");
        self.held.states.insert(name.to_owned(), bytes);
    }
}

impl fmt::Debug for Access<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").field("mapped", &self.mapped).finish_non_exhaustive()
    }
}
