//! A guest for tests: memory with writers that never rest, and a record of every call that it received.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use fastrand::Rng;
use memferry::guest::{DestinationGuest, Guest, GuestError, GuestState, RunState, SourceGuest, StateSection};
use memferry_stages::dirty_log::DirtyLog;
use memferry_stages::geometry::{BlockInfo, Layout, PageSize};
use memferry_stages::memory::{GuestMemory, MappedMemory, Memory, RamBlock};

use crate::run::Arrives;
use crate::trouble::{Trouble, TroubledMemory, Troubles, WatchedLog};

/// A call that the guest received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestCall {
    /// See [`SourceGuest`].
    Pause,
    /// See [`SourceGuest`].
    Save,
    /// See [`SourceGuest`].
    Release,
    /// See [`SourceGuest`].
    Reacquire,
    /// See [`SourceGuest`].
    Resume,
    /// See [`SourceGuest`].
    Committed,
    /// See [`SourceGuest`].
    Moved,
    /// See [`Arrives`].
    Build,
    /// See [`DestinationGuest`].
    Prepare,
    /// See [`DestinationGuest`].
    Start,
}

/// The calls that the guest fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fails {
    /// [`SourceGuest::pause`] fails.
    pub pause: bool,
    /// [`SourceGuest::save`] fails.
    pub save: bool,
    /// [`SourceGuest::release`] fails.
    pub release: bool,
    /// [`SourceGuest::reacquire`] fails.
    pub reacquire: bool,
    /// [`SourceGuest::resume`] fails.
    pub resume: bool,
    /// [`SourceGuest::committed`] fails.
    pub commit: bool,
    /// [`DestinationGuest::make_durable`] fails.
    pub durable: bool,
    /// [`DestinationGuest::prepare`] fails.
    pub prepare: bool,
    /// [`DestinationGuest::start`] fails.
    pub start: bool,
}

/// The guest.
#[derive(Debug)]
pub struct TestGuest {
    memory: Mutex<Option<GuestMemory>>,
    blocks: Mutex<Vec<Arc<MappedMemory>>>,
    log: Mutex<Option<Arc<WatchedLog>>>,
    /// A second log, of other writes.
    second_log: OnceLock<Arc<dyn DirtyLog>>,
    calls: Mutex<Vec<GuestCall>>,
    running: Arc<AtomicBool>,
    writers: Mutex<Vec<JoinHandle<()>>>,
    /// The number of writers while the guest runs.
    crew: AtomicU64,
    writes: Arc<AtomicU64>,
    pace: Option<Duration>,
    fails: Fails,
    troubles: Troubles,
    /// The trouble that begins at this call.
    trouble_from: Mutex<Option<(GuestCall, Trouble)>>,
    state: GuestState,
    state_here: Mutex<GuestState>,
    resumed_with: Mutex<Vec<Vec<u8>>>,
    /// The calls of [`DestinationGuest::make_durable`].
    durable_calls: AtomicU64,
    /// The duration of [`DestinationGuest::prepare`].
    prepare_takes: Duration,
    /// How [`Arrives::build`] changes the blocks that arrive.
    alters: fn(&mut Vec<BlockInfo>),
}

impl TestGuest {
    /// A source guest with blocks of these lengths, with some content; it does not run yet.
    #[must_use]
    pub fn source(page_size: PageSize, lengths: &[u64]) -> Self {
        let guest = Self::empty();
        let infos = lengths.iter().enumerate().map(|(index, &length)| info(index, length)).collect::<Vec<_>>();
        guest.map(page_size, &infos);
        guest.fill();
        guest
    }

    /// A source guest with one block of random bytes, which is not written.
    #[must_use]
    pub fn incompressible(page_size: PageSize, length: u64) -> Self {
        let guest = Self::empty();
        guest.map(page_size, &[info(0, length)]);
        let mut noise = Rng::with_seed(1);
        let mut chunk = vec![0; 64 << 10];
        let block = guest.blocks.lock().unwrap()[0].clone();
        for start in (0..block.len()).step_by(chunk.len()) {
            noise.fill(&mut chunk);
            block.store(start, &chunk[..chunk.len().min(block.len() - start)]);
        }
        guest
    }

    /// A source guest with one block that repeats these pages, which is not written.
    #[must_use]
    pub fn repeating(page_size: PageSize, length: u64, pages: &[u8]) -> Self {
        let guest = Self::empty();
        guest.map(page_size, &[info(0, length)]);
        let block = guest.blocks.lock().unwrap()[0].clone();
        for start in (0..block.len()).step_by(pages.len()) {
            block.store(start, &pages[..pages.len().min(block.len() - start)]);
        }
        guest
    }

    /// A destination guest: it accepts any blocks.
    #[must_use]
    pub fn destination() -> Self {
        Self::empty()
    }

    fn empty() -> Self {
        let section =
            StateSection { name: "devices".into(), version: 7, bytes: (0..=255).cycle().take(100_000).collect() };
        Self {
            memory: Mutex::default(),
            blocks: Mutex::default(),
            log: Mutex::default(),
            second_log: OnceLock::new(),
            calls: Mutex::default(),
            running: Arc::new(AtomicBool::new(false)),
            writers: Mutex::default(),
            crew: AtomicU64::new(0),
            writes: Arc::default(),
            pace: None,
            fails: Fails::default(),
            troubles: Troubles::default(),
            trouble_from: Mutex::default(),
            state: GuestState { sections: vec![section] },
            state_here: Mutex::default(),
            resumed_with: Mutex::default(),
            durable_calls: AtomicU64::new(0),
            prepare_takes: Duration::ZERO,
            alters: |_| (),
        }
    }

    /// The same guest, which fails these calls.
    #[must_use]
    pub fn failing(mut self, fails: Fails) -> Self {
        self.fails = fails;
        self
    }

    /// The same guest, with trouble in its memory or its log.
    #[must_use]
    pub fn troubled(self, trouble: Trouble) -> Self {
        self.troubles.set(Some(trouble));
        self
    }

    /// The same guest, with trouble that begins at this call.
    #[must_use]
    pub fn troubled_from(self, call: GuestCall, trouble: Trouble) -> Self {
        *self.trouble_from.lock().unwrap() = Some((call, trouble));
        self
    }

    /// Sets the trouble in its memory or its log from here on.
    pub fn trouble(&self, trouble: Trouble) {
        self.troubles.set(Some(trouble));
    }

    /// Waits until its log blocks on its trouble.
    pub fn until_the_log_waits(&self) {
        self.troubles.until_it_waits();
    }

    /// Ends all trouble.
    pub fn repair(&self) {
        self.troubles.set(None);
        *self.trouble_from.lock().unwrap() = None;
    }

    /// The same guest, whose writers rest this long between bursts of 64 writes.
    #[must_use]
    pub fn paced(mut self, pace: Duration) -> Self {
        self.pace = Some(pace);
        self
    }

    /// How often it was made durable.
    #[must_use]
    pub fn durable_calls(&self) -> u64 {
        self.durable_calls.load(Ordering::SeqCst)
    }

    /// The same guest, whose prepare takes this long.
    #[must_use]
    pub fn preparing_for(mut self, time: Duration) -> Self {
        self.prepare_takes = time;
        self
    }

    /// The same guest, which builds other blocks than those that arrive.
    #[must_use]
    pub fn building(mut self, alters: fn(&mut Vec<BlockInfo>)) -> Self {
        self.alters = alters;
        self
    }

    /// Starts `count` writers; they never rest until the guest is paused.
    #[must_use]
    pub fn running(self, count: u64) -> Arc<Self> {
        self.crew.store(count, Ordering::SeqCst);
        self.start_writers();
        Arc::new(self)
    }

    fn map(&self, page_size: PageSize, infos: &[BlockInfo]) {
        let map = |info: &BlockInfo| {
            let length = usize::try_from(info.length).expect("it fits memory");
            Arc::new(MappedMemory::anonymous(length).expect("memory for a test"))
        };
        let blocks: Vec<_> = infos.iter().map(map).collect();
        let ram = |(info, memory): (&BlockInfo, &Arc<MappedMemory>)| RamBlock {
            info: info.clone(),
            memory: Arc::new(TroubledMemory::new(memory.clone(), self.troubles.clone())) as Arc<dyn Memory>,
            fresh: true,
        };
        let memory = GuestMemory::new(page_size, infos.iter().zip(&blocks).map(ram).collect()).expect("good blocks");
        *self.log.lock().unwrap() = Some(Arc::new(WatchedLog::new(memory.layout(), self.troubles.clone())));
        *self.blocks.lock().unwrap() = blocks;
        *self.memory.lock().unwrap() = Some(memory);
    }

    /// A third stays zero, a third is text, a third is random bytes.
    fn fill(&self) {
        let mut noise = Rng::with_seed(2);
        for block in self.blocks.lock().unwrap().iter() {
            for start in (0..block.len()).step_by(4096) {
                let bytes: Vec<u8> = match start / 4096 % 3 {
                    0 => continue,
                    1 => b"all work and no play makes a dull page; ".iter().copied().cycle().take(4096).collect(),
                    _ => (0..4096).map(|_| noise.u8(..)).collect(),
                };
                block.store(start, &bytes[..bytes.len().min(block.len() - start)]);
            }
        }
    }

    fn start_writers(&self) {
        self.running.store(true, Ordering::SeqCst);
        let blocks = self.blocks.lock().unwrap().clone();
        let log = self.log.lock().unwrap().clone().expect("mapped");
        let layout = self.memory().layout().clone();
        let since = self.writes();
        for seed in since..since + self.crew.load(Ordering::SeqCst) {
            let writer = Writer {
                blocks: blocks.clone(),
                log: log.clone(),
                page: layout.page_size().bytes(),
                noise: Rng::with_seed(seed),
                running: self.running.clone(),
                writes: self.writes.clone(),
                pace: self.pace,
            };
            self.writers.lock().unwrap().push(std::thread::spawn(|| writer.run()));
        }
    }

    /// The calls that it received so far, in order.
    #[must_use]
    pub fn calls(&self) -> Vec<GuestCall> {
        self.calls.lock().unwrap().clone()
    }

    /// Did it receive this call?
    #[must_use]
    pub fn was_called(&self, what: GuestCall) -> bool {
        self.calls().contains(&what)
    }

    /// Do its writers run?
    #[must_use]
    pub fn runs(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }

    /// The number of writes so far.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::SeqCst)
    }

    /// The device state that was applied here.
    #[must_use]
    pub fn applied_state(&self) -> GuestState {
        self.state_here.lock().unwrap().clone()
    }

    /// All bytes of all blocks.
    #[must_use]
    pub fn bytes(&self) -> Vec<Vec<u8>> {
        let copy = |block: &Arc<MappedMemory>| {
            let mut bytes = vec![0; block.len()];
            block.load(0, &mut bytes);
            bytes
        };
        self.blocks.lock().unwrap().iter().map(copy).collect()
    }

    /// All bytes of all blocks as they were when the guest was resumed, before its writers continued.
    #[must_use]
    pub fn resumed_with(&self) -> Vec<Vec<u8>> {
        self.resumed_with.lock().unwrap().clone()
    }

    /// Stores bytes that do not cross a page, and marks the page.
    pub fn write(&self, block: u32, offset: usize, bytes: &[u8]) {
        self.blocks.lock().unwrap()[block as usize].store(offset, bytes);
        let page = (offset / self.memory().page_size().bytes()) as u64;
        self.log().mark(block, page..page + 1);
    }

    /// The same guest, with the block of this number ignored.
    #[must_use]
    pub fn ignoring(self, block: usize) -> Self {
        let memory = self.memory();
        let mut blocks = memory.blocks().to_vec();
        blocks[block].info.ignored = true;
        *self.memory.lock().unwrap() = Some(GuestMemory::new(memory.page_size(), blocks).expect("good blocks"));
        self
    }

    /// Changes a byte without marking it in the log: a fault that only verification detects.
    pub fn corrupt(&self, block: usize, offset: usize) {
        let block = &self.blocks.lock().unwrap()[block];
        let mut byte = [0];
        block.load(offset, &mut byte);
        block.store(offset, &[byte[0] ^ 1]);
    }

    /// Waits until this page of any block has been read so often, from here on.
    pub fn until_read(&self, page: u64, times: u64) {
        self.troubles.watch(page);
        while self.troubles.reads() < times {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    /// Its dirty log, once its memory exists.
    ///
    /// # Panics
    /// Before that.
    #[must_use]
    pub fn log(&self) -> Arc<WatchedLog> {
        self.log.lock().unwrap().clone().expect("built")
    }

    /// Adds a second log. Writes by other means than the guest's own are in it alone.
    ///
    /// # Panics
    /// If there is one.
    pub fn add_log(&self, log: Arc<dyn DirtyLog>) {
        self.second_log.set(log).expect("one second log");
    }

    /// The calls that it received since the previous `take_calls`.
    #[must_use]
    pub fn take_calls(&self) -> Vec<GuestCall> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }

    /// Waits until its writers have written again, which proves that it runs.
    ///
    /// # Panics
    /// If they do not within a minute.
    #[track_caller]
    pub fn wait_for_writes(&self) {
        let (before, since) = (self.writes(), std::time::Instant::now());
        while self.writes() == before {
            assert!(since.elapsed() < Duration::from_secs(60), "the writers do not write");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn note(&self, what: GuestCall) {
        self.calls.lock().unwrap().push(what);
        if let Some((_, trouble)) = self.trouble_from.lock().unwrap().filter(|&(from, _)| from == what) {
            self.troubles.set(Some(trouble));
        }
    }

    fn stop_writers(&self) {
        self.running.store(false, Ordering::SeqCst);
        for writer in self.writers.lock().unwrap().drain(..) {
            writer.join().expect("a writer does not panic");
        }
    }
}

impl Drop for TestGuest {
    fn drop(&mut self) {
        self.stop_writers();
    }
}

struct Writer {
    blocks: Vec<Arc<MappedMemory>>,
    log: Arc<WatchedLog>,
    page: usize,
    noise: Rng,
    running: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    pace: Option<Duration>,
}

impl Writer {
    /// Small writes everywhere, and occasionally a page of zeros or random bytes.
    fn run(mut self) {
        while self.running.load(Ordering::SeqCst) {
            for _ in 0..64 {
                self.write();
            }
            if let Some(pace) = self.pace {
                std::thread::sleep(pace);
            }
        }
    }

    fn write(&mut self) {
        let index = self.noise.usize(..self.blocks.len());
        let block = self.blocks[index].clone();
        let offset = self.noise.usize(..block.len());
        let page = offset / self.page;
        let start = page * self.page;
        let room = block.len() - start;
        match self.noise.u64(..64) {
            0 => block.store(start, &vec![0; self.page.min(room)]),
            1 => {
                let bytes: Vec<u8> = (0..self.page.min(room)).map(|_| self.noise.u8(..)).collect();
                block.store(start, &bytes);
            }
            _ => {
                let bytes = self.noise.u64(..).to_le_bytes();
                block.store(offset, &bytes[..bytes.len().min(block.len() - offset)]);
                let end = (offset + 7).min(block.len() - 1) / self.page;
                self.log.mark(u32::try_from(index).unwrap(), page as u64..end as u64 + 1);
            }
        }
        self.log.mark(u32::try_from(index).unwrap(), page as u64..page as u64 + 1);
        self.writes.fetch_add(1, Ordering::Relaxed);
    }
}

impl Guest for TestGuest {
    fn memory(&self) -> GuestMemory {
        self.memory.lock().unwrap().clone().expect("built")
    }

    fn can_be_userfaulted(&self) -> Result<(), GuestError> {
        Ok(())
    }

    /// Nothing else maps it, and no page is pinned.
    fn mapping_is_exclusive(&self) -> Result<(), GuestError> {
        Ok(())
    }
}

impl SourceGuest for TestGuest {
    fn run_state(&self) -> RunState {
        if self.runs() { RunState::Running } else { RunState::Paused }
    }

    fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError> {
        let first: Arc<dyn DirtyLog> = self.log();
        Ok(std::iter::once(first).chain(self.second_log.get().cloned()).collect())
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.note(GuestCall::Pause);
        if self.fails.pause {
            return Err(GuestError("made to fail at pause".into()));
        }
        self.stop_writers();
        Ok(())
    }

    fn resume(&self) -> Result<(), GuestError> {
        self.note(GuestCall::Resume);
        if self.fails.resume {
            return Err(GuestError("made to fail at resume".into()));
        }
        if !self.runs() {
            *self.resumed_with.lock().unwrap() = self.bytes();
            self.start_writers();
        }
        Ok(())
    }

    fn save(&self) -> Result<GuestState, GuestError> {
        self.note(GuestCall::Save);
        if self.fails.save {
            return Err(GuestError("made to fail at save".into()));
        }
        // Saving may write memory, and marks what it writes.
        self.blocks.lock().unwrap()[0].store(0, b"saved!");
        self.log().mark(0, 0..1);
        Ok(self.state.clone())
    }

    fn release(&self) -> Result<(), GuestError> {
        self.note(GuestCall::Release);
        if self.fails.release { Err(GuestError("made to fail at release".into())) } else { Ok(()) }
    }

    fn reacquire(&self) -> Result<(), GuestError> {
        self.note(GuestCall::Reacquire);
        if self.fails.reacquire { Err(GuestError("made to fail at reacquire".into())) } else { Ok(()) }
    }

    fn committed(&self, _: &str) -> Result<(), GuestError> {
        self.note(GuestCall::Committed);
        if self.fails.commit { Err(GuestError("made to fail at commit".into())) } else { Ok(()) }
    }

    fn moved(&self) {
        self.note(GuestCall::Moved);
    }

    fn setup_state(&self) -> Result<GuestState, GuestError> {
        let bytes = b"two fans".to_vec();
        Ok(GuestState { sections: vec![StateSection { name: "board".into(), version: 1, bytes }] })
    }
}

impl DestinationGuest for TestGuest {
    fn make_durable(&self) -> Result<(), GuestError> {
        self.durable_calls.fetch_add(1, Ordering::SeqCst);
        if self.fails.durable { Err(GuestError("made to fail at make_durable".into())) } else { Ok(()) }
    }

    fn prepare(&self, state: &GuestState) -> Result<(), GuestError> {
        self.note(GuestCall::Prepare);
        std::thread::sleep(self.prepare_takes);
        if self.fails.prepare {
            return Err(GuestError("made to fail at prepare".into()));
        }
        *self.state_here.lock().unwrap() = state.clone();
        Ok(())
    }

    fn unprepare(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn start(&self, run_state: RunState) -> Result<(), GuestError> {
        self.note(GuestCall::Start);
        if self.fails.start {
            return Err(GuestError("made to fail at start".into()));
        }
        self.running.store(run_state == RunState::Running, Ordering::SeqCst);
        Ok(())
    }
}

impl Arrives for TestGuest {
    fn build(&self, page_size: PageSize, blocks: &[BlockInfo], setup: &GuestState) -> Result<(), GuestError> {
        self.note(GuestCall::Build);
        if setup.sections.first().is_none_or(|section| section.bytes != b"two fans") {
            return Err(GuestError(format!("the board has two fans here, there it has {:?}", setup.sections)));
        }
        Layout::new(page_size, blocks.to_vec()).expect("the engine checks the layout first");
        if blocks.iter().any(|block| block.id == "refused") {
            return Err(GuestError("block \"refused\" has 4096 bytes there and none here".into()));
        }
        let mut own = blocks.to_vec();
        (self.alters)(&mut own);
        self.map(page_size, &own);
        Ok(())
    }
}

fn info(index: usize, length: u64) -> BlockInfo {
    BlockInfo { guest_address: (index as u64) << 40, ..BlockInfo::new(format!("ram{index}"), length) }
}
