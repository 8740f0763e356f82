//! A guest whose dirty rate is far above the bandwidth of a slow wire, even on a busy machine.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use memferry::bitmap::DirtyBitmap;
use memferry::dirty_log::DirtyLog;
use memferry::guest::{Guest, GuestError, GuestState, RunState, SourceGuest};
use memferry::memory::GuestMemory;
use memferry_guests::workload::{Fill, LogChoice, Pattern, Region, Workload, WorkloadSettings, WriterSettings};

/// A workload that records how it was throttled, and may refuse to be.
#[derive(Debug)]
pub struct Hot {
    workload: Arc<Workload>,
    refuses: bool,
    throttled: Mutex<Vec<u8>>,
    always: Arc<AlwaysDirty>,
}

/// Reports pages as written at each sync, whether or not its writers had time to write them: all pages, less the
/// percentage to which the guest is throttled.
#[derive(Debug, Default)]
struct AlwaysDirty {
    throttle: AtomicU8,
}

impl DirtyLog for AlwaysDirty {
    fn start(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self, block: u32, _extents: Range<u32>, into: &DirtyBitmap) -> io::Result<()> {
        // A block is smaller than the range that one call covers.
        let share = 100 - u64::from(self.throttle.load(Ordering::Relaxed));
        into.set_range(block, 0..into.layout().block_pages(block) * share / 100);
        Ok(())
    }

    fn mark(&self, _block: u32, _pages: Range<u64>) {}

    fn stop(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Guest for Hot {
    fn memory(&self) -> GuestMemory {
        self.workload.memory()
    }
}

impl SourceGuest for Hot {
    fn run_state(&self) -> RunState {
        self.workload.run_state()
    }

    fn dirty_logs(&self) -> Result<Vec<Arc<dyn DirtyLog>>, GuestError> {
        let mut logs = self.workload.dirty_logs()?;
        logs.push(self.always.clone());
        Ok(logs)
    }

    fn setup_state(&self) -> Result<GuestState, GuestError> {
        self.workload.setup_state()
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.workload.pause()
    }

    fn resume(&self) -> Result<(), GuestError> {
        self.workload.resume()
    }

    fn throttle(&self, percent: u8) -> Result<(), GuestError> {
        self.throttled.lock().unwrap().push(percent);
        if self.refuses && percent > 0 {
            return Err(GuestError("this guest cannot be throttled".into()));
        }
        self.always.throttle.store(percent, Ordering::Relaxed);
        self.workload.throttle(percent)
    }

    fn save(&self) -> Result<GuestState, GuestError> {
        self.workload.save()
    }

    fn committed(&self, destination: &str) -> Result<(), GuestError> {
        self.workload.committed(destination)
    }

    fn moved(&self) {
        self.workload.moved();
    }
}

impl Hot {
    /// 2 MiB of noise in two blocks, of which every page is dirty at every sync.
    ///
    /// # Panics
    /// If the host has not enough memory.
    #[must_use]
    pub fn new() -> Self {
        let writer = WriterSettings {
            pattern: Pattern::Uniform,
            pages_per_second: 2_000.0,
            bytes: 4000,
            region: Region { from: 0.0, to: 1.0 },
        };
        let settings = WorkloadSettings {
            memory: 2 << 20,
            blocks: 2,
            dirty_log: LogChoice::Software,
            fill: Fill { zero: 0.0, text: 0.0, random: 1.0, process: 0.0 },
            writers: vec![writer],
            ..WorkloadSettings::default()
        };
        let workload = Workload::source(settings).expect("a workload of 2 MiB");
        Self { workload, refuses: false, throttled: Mutex::default(), always: Arc::default() }
    }

    /// The same, except that it cannot be throttled.
    #[must_use]
    pub fn refusing() -> Self {
        Self { refuses: true, ..Self::new() }
    }

    /// Every throttle percentage that was set, in order.
    #[must_use]
    pub fn throttled(&self) -> Vec<u8> {
        self.throttled.lock().unwrap().clone()
    }
}

impl Default for Hot {
    fn default() -> Self {
        Self::new()
    }
}
