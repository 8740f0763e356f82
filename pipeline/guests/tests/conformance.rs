//! The kit on correct guests, and on a guest that makes each mistake on purpose.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use memferry_stages::dirty_log::{DirtyLog, SoftwareLog};
use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::memory::{GuestMemory, MappedMemory, RamBlock};

use memferry::guest::conformance::*;
use memferry::guest::{
    DestinationGuest, Guest, GuestBuilder, GuestError, GuestState, RunState, SourceGuest, StateSection,
};
use memferry_guests::workload::{LogChoice, Pattern, Region, Workload, WorkloadSettings, WriterSettings};

struct Workloads(LogChoice);

impl Subject for Workloads {
    type Guest = Workload;

    fn source(&self) -> Arc<Workload> {
        let writer = |pattern, rate| WriterSettings { pattern, pages_per_second: rate, bytes: 64, region: Region::ALL };
        let writers = vec![writer(Pattern::Uniform, 20e3), writer(Pattern::Sequential, 5e3)];
        let settings =
            WorkloadSettings { memory: 4 << 20, blocks: 2, writers, dirty_log: self.0, ..Default::default() };
        Workload::source(settings).unwrap()
    }

    fn destination(&self) -> impl GuestBuilder<Built = Workload> {
        Workload::destination()
    }

    fn examine(&self, guest: &Workload) -> Result<(), String> {
        guest.check_all().first_stale.map_or(Ok(()), Err)
    }
}

#[test]
fn the_workload_is_right_under_each_log() {
    check(&Workloads(LogChoice::Auto)).unwrap();
    check(&Workloads(LogChoice::Software)).unwrap();
    check(&Workloads(LogChoice::Hash)).unwrap();
}

// ---- a small guest, with a mistake on request ----

const LENGTH: usize = 40 * 4096 + 100;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mistake {
    None,
    WritesAfterPause,
    WritesAfterSave,
    ForgetsToPause,
    LiesAboutRunning,
    ForgetsToResume,
    FailsToResumeTwice,
    ForgetsState,
    SavesOnce,
    NamesNothing,
    MarksNothing,
    MarksNothingInSave,
    StartsInPrepare,
    StartsThoughPaused,
    RunsOnAtItsSource,
    ForgetsToReacquire,
    StopsWhenThrottled,
    BuildsItsOwn,
    IsNotFresh,
    PanicsAtState,
    IsChoosyAboutThrottle,
}

/// One thread increments a counter in one page after another; the count is its device state.
#[derive(Debug)]
struct Counter {
    mistake: Mistake,
    parts: Parts,
    life: Mutex<Life>,
    saves: AtomicU64,
}

#[derive(Debug)]
struct Parts {
    ram: Arc<MappedMemory>,
    memory: GuestMemory,
    log: Arc<SoftwareLog>,
}

impl Parts {
    fn map(mistake: Mistake, page_size: PageSize, length: usize) -> Self {
        let ram = Arc::new(MappedMemory::anonymous(length).unwrap());
        if mistake == Mistake::IsNotFresh {
            ram.store(4096, &[1]);
        }
        let info = BlockInfo::new("ram", length as u64);
        let block = RamBlock { info, memory: ram.clone(), fresh: true };
        let memory = GuestMemory::new(page_size, vec![block]).unwrap();
        let log = Arc::new(SoftwareLog::new(memory.layout()));
        Self { ram, memory, log }
    }
}

#[derive(Debug, Default)]
struct Life {
    runs: bool,
    says_running: bool,
    count: u64,
    released: bool,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Counter {
    fn new(mistake: Mistake, page_size: PageSize, length: usize) -> Arc<Self> {
        let parts = Parts::map(mistake, page_size, length);
        let counter = Arc::new(Self { mistake, parts, life: Mutex::default(), saves: AtomicU64::new(0) });
        let of = Arc::downgrade(&counter);
        thread::spawn(move || Self::count(&of));
        counter
    }

    /// The counting thread, which runs while the counter is referenced.
    fn count(of: &Weak<Self>) {
        while let Some(counter) = of.upgrade() {
            {
                let mut life = held(&counter.life);
                if life.runs {
                    life.count += 1;
                    let (count, marks) = (life.count, counter.mistake != Mistake::MarksNothing);
                    counter.write(usize::try_from(count).unwrap() % 30, count, marks);
                }
            }
            drop(counter);
            thread::sleep(Duration::from_micros(100));
        }
    }

    fn write(&self, page: usize, count: u64, marks: bool) {
        self.parts.ram.store(page * 4096 + 8, &count.to_le_bytes());
        if marks {
            self.parts.log.mark(0, page as u64..page as u64 + 1);
        }
    }

    fn set_running(&self, runs: bool) {
        let mut life = held(&self.life);
        (life.runs, life.says_running) = (runs, runs);
    }

    /// Writes a page a little later, whatever the state of the guest is then.
    fn write_later(self: &Arc<Self>) {
        let counter = self.clone();
        thread::spawn(move || {
            for count in 0..20 {
                thread::sleep(Duration::from_millis(2));
                counter.write(30, u64::MAX - count, true);
            }
        });
    }
}

/// The counter, in an Arc of its own, so that its methods can hand it to threads.
#[derive(Debug)]
struct Guarded(Arc<Counter>);

impl Guest for Guarded {
    fn memory(&self) -> GuestMemory {
        self.0.parts.memory.clone()
    }
}

impl SourceGuest for Guarded {
    fn run_state(&self) -> RunState {
        if held(&self.0.life).says_running { RunState::Running } else { RunState::Paused }
    }

    fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError> {
        Ok(vec![self.0.parts.log.clone()])
    }

    fn pause(&self) -> Result<(), GuestError> {
        match self.0.mistake {
            Mistake::ForgetsToPause => held(&self.0.life).says_running = false,
            Mistake::LiesAboutRunning => held(&self.0.life).runs = false,
            Mistake::WritesAfterPause => {
                self.0.set_running(false);
                self.0.write_later();
            }
            _ => self.0.set_running(false),
        }
        Ok(())
    }

    fn resume(&self) -> Result<(), GuestError> {
        let (mistake, life) = (self.0.mistake, held(&self.0.life));
        if life.released {
            return Err(GuestError("its disk is not here".into()));
        }
        if mistake == Mistake::FailsToResumeTwice && life.runs {
            return Err(GuestError("it runs already".into()));
        }
        drop(life);
        self.0.set_running(true);
        if mistake == Mistake::ForgetsToResume {
            held(&self.0.life).runs = false;
        }
        Ok(())
    }

    fn throttle(&self, percent: u8) -> Result<(), GuestError> {
        if self.0.mistake == Mistake::StopsWhenThrottled {
            held(&self.0.life).runs = percent == 0;
        }
        if self.0.mistake == Mistake::IsChoosyAboutThrottle && percent > 100 {
            return Err(GuestError("at most 100 percent".into()));
        }
        Ok(())
    }

    fn save(&self) -> Result<GuestState, GuestError> {
        let mistake = self.0.mistake;
        if mistake == Mistake::WritesAfterSave {
            self.0.write_later();
        }
        let count = held(&self.0.life).count;
        let saves = self.0.saves.fetch_add(1, Ordering::Relaxed);
        self.0.write(35, saves | 1 << 32, mistake != Mistake::MarksNothingInSave);
        if mistake == Mistake::SavesOnce && saves > 0 {
            return Ok(GuestState::default());
        }
        let name = if mistake == Mistake::NamesNothing { "" } else { "counter" };
        let bytes = count.to_le_bytes().to_vec();
        Ok(GuestState { sections: vec![StateSection { name: name.into(), version: 1, bytes }] })
    }

    fn release(&self) -> Result<(), GuestError> {
        held(&self.0.life).released = true;
        Ok(())
    }

    fn reacquire(&self) -> Result<(), GuestError> {
        held(&self.0.life).released = self.0.mistake == Mistake::ForgetsToReacquire;
        Ok(())
    }

    fn committed(&self, _: &str) -> Result<(), GuestError> {
        if self.0.mistake == Mistake::RunsOnAtItsSource {
            held(&self.0.life).runs = true;
        }
        Ok(())
    }
}

impl GuestBuilder for Mistake {
    type Built = Guarded;

    fn build(self, page_size: PageSize, blocks: &[BlockInfo], _: &GuestState) -> Result<Arc<Guarded>, GuestError> {
        let [block] = blocks else { return Err(GuestError(format!("{} blocks came, it has one", blocks.len()))) };
        if block.id != "ram" {
            return Err(GuestError(format!("block {:?} came, it has \"ram\"", block.id)));
        }
        let own = self == Mistake::BuildsItsOwn;
        let length = if own { LENGTH } else { usize::try_from(block.length).unwrap() };
        Ok(Arc::new(Guarded(Counter::new(self, page_size, length))))
    }
}

impl DestinationGuest for Guarded {
    fn prepare(&self, state: &GuestState) -> Result<(), GuestError> {
        let count = state.sections.first().and_then(|section| section.bytes.as_slice().try_into().ok());
        match self.0.mistake {
            Mistake::PanicsAtState => held(&self.0.life).count = u64::from_le_bytes(count.expect("a right peer")),
            Mistake::ForgetsState => {}
            _ => {
                let count = count.ok_or_else(|| GuestError("no count came".into()))?;
                held(&self.0.life).count = u64::from_le_bytes(count);
            }
        }
        if self.0.mistake == Mistake::StartsInPrepare {
            self.0.set_running(true);
        }
        Ok(())
    }

    fn start(&self, run_state: RunState) -> Result<(), GuestError> {
        if run_state == RunState::Running || self.0.mistake == Mistake::StartsThoughPaused {
            self.0.set_running(true);
        }
        Ok(())
    }
}

struct Counters(Mistake);

impl Subject for Counters {
    type Guest = Guarded;

    fn source(&self) -> Arc<Guarded> {
        // Its own memory need not be fresh: it is never loaded.
        let counter = Counter::new(self.0, PageSize::DEFAULT, LENGTH);
        counter.set_running(true);
        Arc::new(Guarded(counter))
    }

    fn destination(&self) -> impl GuestBuilder<Built = Guarded> {
        self.0
    }
}

/// The kit finds the mistake, and reports it. A guest that writes when it must not is detected by its writes: if the
/// machine is too busy to let it write while it is watched, the test tries again.
#[track_caller]
fn is_caught(mistake: Mistake, case: &str, contract: &str) {
    let finds = |_| {
        let found = check(&Counters(mistake));
        println!("{mistake:?}: {found:?}");
        found.is_err_and(|breach| breach.case == case && breach.contract.contains(contract))
    };
    assert!((0..10).any(finds), "{mistake:?} is not found in {case}: {contract}");
}

#[test]
fn a_right_guest_of_a_few_lines_passes() {
    check(&Counters(Mistake::None)).unwrap();
}

#[test]
fn a_guest_that_writes_while_it_is_paused_is_caught() {
    is_caught(Mistake::WritesAfterPause, "pausing", "once pause has returned, nothing writes");
    is_caught(Mistake::ForgetsToPause, "pausing", "once pause has returned, nothing writes");
    is_caught(Mistake::WritesAfterSave, "pausing", "once save has returned, nothing writes");
    is_caught(Mistake::RunsOnAtItsSource, "moving", "stays paused at its source");
}

#[test]
fn a_guest_that_does_not_continue_is_caught() {
    is_caught(Mistake::LiesAboutRunning, "pausing", "run_state reports whether the guest runs");
    is_caught(Mistake::ForgetsToResume, "pausing", "a guest that was resumed continues");
    is_caught(Mistake::FailsToResumeTwice, "pausing", "a call returns, without an error");
    is_caught(Mistake::StopsWhenThrottled, "throttling", "slows down and continues");
    is_caught(Mistake::IsChoosyAboutThrottle, "throttling", "a call returns");
    is_caught(Mistake::ForgetsToReacquire, "failures", "a source continues as it was");
}

#[test]
fn a_guest_that_forgets_state_is_caught() {
    is_caught(Mistake::ForgetsState, "paused", "saving reports all that a guest is");
    is_caught(Mistake::SavesOnce, "pausing", "reports it again when asked again");
    is_caught(Mistake::NamesNothing, "pausing", "saving reports all");
}

#[test]
fn a_guest_whose_log_misses_writes_is_caught() {
    is_caught(Mistake::MarksNothing, "moving", "the dirty logs see every write");
    is_caught(Mistake::MarksNothingInSave, "moving", "the dirty logs see what save writes");
}

#[test]
fn a_guest_that_starts_when_it_should_not_is_caught() {
    is_caught(Mistake::StartsInPrepare, "moving", "nothing runs at a destination before start");
    is_caught(Mistake::StartsThoughPaused, "paused", "leaves it paused if it was");
}

#[test]
fn a_guest_that_does_not_build_what_came_is_caught() {
    is_caught(Mistake::BuildsItsOwn, "strange peers", "what build has built is what came");
    is_caught(Mistake::IsNotFresh, "moving", "zero wherever it is reported as fresh");
    is_caught(Mistake::PanicsAtState, "strange peers", "a call returns");
}
