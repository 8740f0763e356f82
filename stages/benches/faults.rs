//! From the touch of a missing page until it is there and its thread continues, beside a bare handler of faults.
//!
//! `cargo bench -p memferry-stages --bench faults [FILTER]`; how to read it stands in [`common`]. The figure is bytes of the pages that
//! one thread touches one after another; 0.5 GB/s are 8 µs a page. Both threads run on one processor: where the kernel puts them decides more than
//! what they do. The control *bare* reads one fault at a time, places the page with one system call, and keeps no account.

mod common;

use std::io::Write as _;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::{PAGE, Suite, timed};
use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::geometry::{BlockInfo, ExtentAt, Layout, PageSize};
use memferry_stages::memory::MappedMemory;
use memferry_stages::missing::{self, Discards, MissingMemory, Next};

const PAGES: usize = 1024;

fn main() {
    if let Err(why) = missing::supported() {
        writeln!(std::io::stderr(), "skipped: {why}").expect("stderr is open");
        return;
    }
    stay_on_one_processor();
    let mut suite = Suite::new();
    type Make = fn() -> MappedMemory;
    let private: Make = || MappedMemory::anonymous(PAGES * PAGE).expect("memory");
    let shared: Make = || MappedMemory::memfd("faults", PAGES * PAGE).expect("memory");
    for (group, make) in [("fault to wake, private memory", private), ("fault to wake, shared memory", shared)] {
        suite.measure(group, "bare", PAGES * PAGE, &[], || bare(&make()));
        for (name, discards) in [("missing memory", Discards::Excluded), ("that follows discards", Discards::Followed)]
        {
            suite.measure(group, name, PAGES * PAGE, &[("bare", "bare")], || placed(Arc::new(make()), discards));
        }
    }
    suite.finish();
}

fn stay_on_one_processor() {
    // SAFETY: the set is plain bytes, and outlives the calls.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &set)
    };
    assert_eq!(result, 0, "processor 0 is ours to use");
}

/// Touches every page, and checks what it then holds.
fn touch_all(memory: &MappedMemory) -> Duration {
    timed(|| {
        for page in 0..PAGES {
            let mut byte = [0];
            memory.load(page * PAGE, &mut byte);
            assert_eq!(byte, [7], "page {page}");
        }
    })
}

fn placed(memory: Arc<MappedMemory>, discards: Discards) -> Duration {
    let blocks = vec![BlockInfo::new("ram", (PAGES * PAGE) as u64)];
    let layout = Layout::new(PageSize::DEFAULT, blocks).expect("a layout");
    let all = DirtyBitmap::filled(&layout);
    let missing = MissingMemory::register(&layout, vec![(0, memory.clone())], all, discards).expect("registers");
    let mut faults = missing.faults();
    let handler = thread::spawn(move || {
        while let Next::Page(page) = faults.next().expect("faults are reported") {
            let at = ExtentAt { block: page.block, extent: u32::try_from(page.page / 64).expect("a small block") };
            missing.place(at, 1 << (page.page % 64), &[7; PAGE]).expect("places");
        }
    });
    let took = touch_all(&memory);
    handler.join().expect("all pages were asked for");
    took
}

const API: libc::c_ulong = 0xc018_aa3f;
const REGISTER: libc::c_ulong = 0xc020_aa00;
const COPY: libc::c_ulong = 0xc028_aa03;

fn bare(memory: &MappedMemory) -> Duration {
    let start = memory.as_ptr().expose_provenance() as u64;
    // SAFETY: the system call takes flags; the descriptor does nothing yet.
    let descriptor = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    let descriptor = libc::c_int::try_from(descriptor).expect("a descriptor");
    ioctl(descriptor, API, &mut [0xaa, 0, 0]);
    ioctl(descriptor, REGISTER, &mut [start, (PAGES * PAGE) as u64, 1, 0]);
    let handler = thread::spawn(move || {
        let content = [7_u8; PAGE];
        for _ in 0..PAGES {
            let mut event = [0_u64; 4];
            // SAFETY: the event has room for the 32 bytes.
            let read = unsafe { libc::read(descriptor, event.as_mut_ptr().cast(), 32) };
            assert_eq!(read, 32, "an event");
            let from = content.as_ptr().expose_provenance() as u64;
            ioctl(descriptor, COPY, &mut [event[2], from, PAGE as u64, 0, 0]);
        }
    });
    let took = touch_all(memory);
    handler.join().expect("all pages were touched");
    // SAFETY: the descriptor is closed once, when nothing is missing.
    unsafe { libc::close(descriptor) };
    took
}

fn ioctl<const WORDS: usize>(descriptor: libc::c_int, operation: libc::c_ulong, argument: &mut [u64; WORDS]) {
    // SAFETY: the words are the operation's argument. Pages are placed in memory that outlives the handler.
    let result = unsafe { libc::ioctl(descriptor, operation, argument.as_mut_ptr()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}
