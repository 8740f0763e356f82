//! The kit over every log here, and over logs and scanners that are wrong on purpose.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::FallocateFlags;
use tempfile::NamedTempFile;

use super::*;
use crate::bitmap::DirtyBitmap;
use crate::dirty_log::model::{Hypervisor, ModelLog};
use crate::dirty_log::{HashLog, SoftwareLog, UserfaultLog};
use crate::geometry::{BlockInfo, ExtentAt, PageSize};
use crate::memory::{FileMemory, MappedMemory, Memory, RamBlock};

/// Two blocks, one with a partial last page, of one and a half extents each.
const LENGTHS: [usize; 2] = [96 * 4096, 70 * 4096 + 123];

fn guest(memory: Vec<Arc<dyn Memory>>, page_size: PageSize) -> GuestMemory {
    let block = |(index, memory): (usize, Arc<dyn Memory>)| RamBlock {
        info: BlockInfo::new(format!("ram{index}"), memory.length()),
        memory,
        fresh: true,
    };
    GuestMemory::new(page_size, memory.into_iter().enumerate().map(block).collect()).unwrap()
}

fn mapped(blocks: &[Arc<MappedMemory>], page_size: PageSize) -> GuestMemory {
    guest(blocks.iter().map(|block| block.clone() as Arc<dyn Memory>).collect(), page_size)
}

fn anonymous() -> Vec<Arc<MappedMemory>> {
    LENGTHS.iter().map(|&length| Arc::new(MappedMemory::anonymous(length).unwrap())).collect()
}

/// How a guest releases pages of mapped memory: to the host, or to the file that backs them.
fn discard(memory: &MappedMemory, file: Option<&File>, pages: Range<u64>) {
    let bytes = pages.start * 4096..(pages.end * 4096).min(memory.len() as u64).next_multiple_of(4096);
    if let Some(file) = file {
        punch_file(file, bytes);
        return;
    }
    let (start, length) = (usize::try_from(bytes.start).unwrap(), usize::try_from(bytes.end - bytes.start).unwrap());
    memory.give_back(start, length).unwrap();
}

fn punch_file(file: &File, bytes: Range<u64>) {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, flags, bytes.start, bytes.end - bytes.start).unwrap();
}

/// A guest on mapped memory, whose logs may need marks.
struct MappedGuest {
    blocks: Vec<Arc<MappedMemory>>,
    files: Vec<File>,
    notify: Option<Arc<dyn DirtyLog>>,
    notify_of_holes: Vec<Arc<dyn DirtyLog>>,
}

impl Writer for MappedGuest {
    fn store(&self, block: u32, offset: usize, bytes: &[u8]) {
        self.blocks[block as usize].store(offset, bytes);
        let page = offset as u64 / 4096;
        self.notify.iter().for_each(|log| log.mark(block, page..page + 1));
    }

    fn punch(&self, block: u32, pages: Range<u64>) -> bool {
        discard(&self.blocks[block as usize], self.files.get(block as usize), pages.clone());
        self.notify_of_holes.iter().for_each(|log| log.mark(block, pages.clone()));
        true
    }

    fn store_unseen(&self, block: u32, offset: usize, bytes: &[u8]) -> bool {
        match self.files.get(block as usize) {
            Some(file) => file.write_all_at(bytes, offset as u64).is_ok(),
            None => {
                self.blocks[block as usize].store(offset, bytes);
                self.notify.is_some()
            }
        }
    }
}

fn software() -> Subject {
    let blocks = anonymous();
    let memory = mapped(&blocks, PageSize::DEFAULT);
    let log: Arc<dyn DirtyLog> = Arc::new(SoftwareLog::new(memory.layout()));
    let (notify, notify_of_holes) = (Some(log.clone()), vec![log.clone()]);
    Subject {
        memory,
        logs: vec![log],
        writer: Arc::new(MappedGuest { blocks, files: vec![], notify, notify_of_holes }),
    }
}

fn userfault(shared: bool) -> Subject {
    let (blocks, files): (Vec<_>, Vec<_>) = if shared { memfds() } else { (anonymous(), vec![]) };
    let memory = mapped(&blocks, PageSize::DEFAULT);
    let followed = blocks.iter().cloned().enumerate().map(|(index, block)| (u32::try_from(index).unwrap(), block));
    let log: Arc<dyn DirtyLog> = Arc::new(UserfaultLog::new(memory.layout(), followed.collect()));
    let notify_of_holes = vec![log.clone()];
    Subject { memory, logs: vec![log], writer: Arc::new(MappedGuest { blocks, files, notify: None, notify_of_holes }) }
}

fn memfds() -> (Vec<Arc<MappedMemory>>, Vec<File>) {
    let memfd = |&length: &usize| {
        let file = File::from(rustix::fs::memfd_create("kit", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(length as u64).unwrap();
        (Arc::new(MappedMemory::file(file.try_clone().unwrap()).unwrap()), file)
    };
    LENGTHS.iter().map(memfd).unzip()
}

fn hash(page_size: u64) -> Subject {
    let blocks = anonymous();
    let memory = mapped(&blocks, PageSize::new(page_size).unwrap());
    let log: Arc<dyn DirtyLog> = Arc::new(HashLog::new(memory.clone()));
    let writer = MappedGuest { blocks, files: vec![], notify: None, notify_of_holes: vec![] };
    Subject { memory, logs: vec![log], writer: Arc::new(writer) }
}

/// A guest in files that another program writes.
struct FileGuest(Vec<NamedTempFile>);

impl Writer for FileGuest {
    fn store(&self, block: u32, offset: usize, bytes: &[u8]) {
        self.0[block as usize].as_file().write_all_at(bytes, offset as u64).unwrap();
    }

    fn punch(&self, block: u32, pages: Range<u64>) -> bool {
        punch_file(self.0[block as usize].as_file(), pages.start * 4096..pages.end * 4096);
        true
    }
}

fn hash_of_files() -> Subject {
    let files = LENGTHS.map(|length| {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(length as u64).unwrap();
        file
    });
    let open = |file: &NamedTempFile| {
        let memory = FileMemory::of_source(file.reopen().unwrap(), file.path());
        Arc::new(memory.unwrap()) as Arc<dyn Memory>
    };
    let memory = guest(files.iter().map(open).collect(), PageSize::DEFAULT);
    let log: Arc<dyn DirtyLog> = Arc::new(HashLog::new(memory.clone()));
    Subject { memory, logs: vec![log], writer: Arc::new(FileGuest(files.into())) }
}

/// A guest under the strict hypervisor, with device threads that the hypervisor does not see where `devices` are given.
struct StrictGuest {
    blocks: Vec<Arc<MappedMemory>>,
    hypervisor: Arc<Hypervisor>,
    devices: Arc<dyn DirtyLog>,
}

impl Writer for StrictGuest {
    fn store(&self, block: u32, offset: usize, bytes: &[u8]) {
        let at = PageAt { block, page: offset as u64 / 4096 };
        self.hypervisor.write(at, || self.blocks[block as usize].store(offset, bytes));
    }

    fn punch(&self, block: u32, pages: Range<u64>) -> bool {
        discard(&self.blocks[block as usize], None, pages.clone());
        self.devices.mark(block, pages);
        true
    }

    fn store_unseen(&self, block: u32, offset: usize, bytes: &[u8]) -> bool {
        self.blocks[block as usize].store(offset, bytes);
        true
    }
}

/// A guest whose hypervisor is tracked by `log`; what it does not see is marked in `devices`, or in the log if there is
/// none.
fn strict(log: impl Fn(Arc<Hypervisor>, &Layout) -> Arc<dyn DirtyLog>, devices: bool) -> Subject {
    let blocks = anonymous();
    let memory = mapped(&blocks, PageSize::DEFAULT);
    let hypervisor = Hypervisor::new(memory.layout());
    let mut logs = vec![log(hypervisor.clone(), memory.layout())];
    if devices {
        logs.push(Arc::new(SoftwareLog::new(memory.layout())));
    }
    let devices = logs.last().unwrap().clone();
    Subject { memory, logs, writer: Arc::new(StrictGuest { blocks, hypervisor, devices }) }
}

fn model(hypervisor: Arc<Hypervisor>, layout: &Layout) -> Arc<dyn DirtyLog> {
    Arc::new(ModelLog::new(hypervisor, layout))
}

#[test]
fn the_software_log_misses_nothing() {
    check(&software).unwrap();
}

#[test]
fn the_userfault_log_misses_nothing_in_anonymous_memory() {
    match UserfaultLog::supported() {
        Ok(()) => check(&|| userfault(false)).unwrap(),
        Err(why) => println!("skipped: {why}"),
    }
}

#[test]
fn the_userfault_log_misses_nothing_in_shared_memory() {
    match UserfaultLog::supported() {
        Ok(()) => check(&|| userfault(true)).unwrap(),
        Err(why) => println!("skipped: {why}"),
    }
}

#[test]
fn the_hash_log_misses_nothing_in_mapped_memory() {
    check(&|| hash(4096)).unwrap();
}

#[test]
fn the_hash_log_misses_nothing_in_larger_pages() {
    check(&|| hash(16384)).unwrap();
}

#[test]
fn the_hash_log_misses_nothing_in_files() {
    check(&hash_of_files).unwrap();
}

#[test]
fn the_model_log_misses_nothing() {
    check(&|| strict(model, false)).unwrap();
}

#[test]
fn two_logs_of_one_guest_miss_nothing() {
    check(&|| strict(model, true)).unwrap();
}

// ---- the kit finds what is wrong ----

/// The breach that the kit must find within a number of attempts: a race need not be lost at the first, nor at the tenth where
/// the machine is busy.
fn must_breach(make: &dyn Fn() -> Subject, order: Order) -> Breach {
    let found = (0..40).find_map(|_| check_as(make, order).err());
    let breach = found.expect("the kit finds the mistake");
    println!("found: {breach}");
    breach
}

#[test]
fn a_scanner_that_reads_before_it_rearms_is_found() {
    must_breach(&|| strict(model, false), Order::ReadBeforeRearm);
    must_breach(&|| hash(4096), Order::ReadBeforeRearm);
}

#[test]
fn a_scanner_that_reads_before_it_takes_is_found() {
    must_breach(&|| strict(model, false), Order::ReadBeforeTake);
}

/// A log that makes one mistake over a right one.
#[derive(Debug)]
struct Wrong {
    mistake: Mistake,
    hypervisor: Option<Arc<Hypervisor>>,
    right: Arc<dyn DirtyLog>,
    syncs: AtomicU64,
    in_flight: DirtyBitmap,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mistake {
    /// Re-arms the whole extent, fetched and taken or not.
    RearmsTooMuch,
    /// Re-arms before it has fetched.
    RearmsTooEarly,
    ForgetsToRearm,
    ForgetsCopies,
    /// Fetches, and now and then does not report what.
    ForgetsBits,
    IgnoresMarks,
    /// Takes a second take of a page for the first.
    CountsNoTakes,
    /// Does not arm pages that leave the bitmap unread.
    ForgetsUnread,
    /// Still reports excluded pages.
    ForgetsLeftOut,
}

impl DirtyLog for Wrong {
    fn start(&self) -> io::Result<()> {
        self.right.start()
    }

    fn sync(&self, block: u32, extents: Range<u32>, into: &DirtyBitmap) -> io::Result<()> {
        let forgets = self.mistake == Mistake::ForgetsBits && self.syncs.fetch_add(1, Ordering::Relaxed) % 50 == 49;
        if forgets {
            return self.right.sync(block, extents, &DirtyBitmap::empty(into.layout()));
        }
        if let (Mistake::RearmsTooEarly, Some(hypervisor)) = (self.mistake, &self.hypervisor) {
            let at = ExtentAt { block, extent: extents.start };
            hypervisor.rearm(at, into.layout().valid_mask(at));
        }
        self.right.sync(block, extents, into)
    }

    fn rearm(&self, at: ExtentAt, mask: u64) -> io::Result<()> {
        match (self.mistake, &self.hypervisor) {
            (Mistake::RearmsTooMuch, Some(hypervisor)) => {
                hypervisor.rearm(at, if at.extent == 0 { u64::MAX } else { mask })
            }
            (Mistake::ForgetsToRearm, _) => {}
            (Mistake::CountsNoTakes, _) => self.right.rearm(at, self.in_flight.set_mask(at, mask))?,
            _ => self.right.rearm(at, mask)?,
        }
        Ok(())
    }

    fn arm_unread(&self, pages: &DirtyBitmap) -> io::Result<bool> {
        if self.mistake == Mistake::ForgetsUnread { Ok(false) } else { self.right.arm_unread(pages) }
    }

    fn leave_out(&self, pages: &DirtyBitmap) -> io::Result<()> {
        if self.mistake == Mistake::ForgetsLeftOut { Ok(()) } else { self.right.leave_out(pages) }
    }

    fn sees_stores(&self) -> bool {
        self.right.sees_stores()
    }

    fn copied(&self, copy: &crate::batch::CopiedBatch) {
        let _now_out = self.in_flight.take_mask(copy.batch.at, copy.batch.mask);
        if self.mistake != Mistake::ForgetsCopies {
            self.right.copied(copy);
        }
    }

    fn mark(&self, block: u32, pages: Range<u64>) {
        if self.mistake != Mistake::IgnoresMarks {
            self.right.mark(block, pages);
        }
    }

    fn stop(&self) -> io::Result<()> {
        self.right.stop()
    }
}

fn wrong(
    mistake: Mistake,
    hypervisor: Option<Arc<Hypervisor>>,
    right: Arc<dyn DirtyLog>,
    layout: &Layout,
) -> Arc<dyn DirtyLog> {
    Arc::new(Wrong { mistake, hypervisor, right, syncs: AtomicU64::default(), in_flight: DirtyBitmap::empty(layout) })
}

fn wrong_model(mistake: Mistake) -> Subject {
    let log = |hypervisor: Arc<Hypervisor>, layout: &Layout| {
        let right = model(hypervisor.clone(), layout);
        wrong(mistake, Some(hypervisor), right, layout)
    };
    strict(log, false)
}

fn wrong_hash(mistake: Mistake) -> Subject {
    let mut subject = hash(4096);
    let right = subject.logs[0].clone();
    subject.logs = vec![wrong(mistake, None, right, subject.memory.layout())];
    subject
}

#[test]
fn a_log_that_rearms_what_it_did_not_fetch_is_found() {
    must_breach(&|| wrong_model(Mistake::RearmsTooMuch), Order::Right);
    must_breach(&|| wrong_model(Mistake::RearmsTooEarly), Order::Right);
}

#[test]
fn a_log_that_forgets_is_found() {
    must_breach(&|| wrong_model(Mistake::ForgetsToRearm), Order::Right);
    must_breach(&|| wrong_model(Mistake::ForgetsBits), Order::Right);
    must_breach(&|| wrong_model(Mistake::IgnoresMarks), Order::Right);
}

#[test]
fn a_log_that_does_not_arm_what_is_not_read_or_reports_what_is_out_is_found() {
    assert_eq!(must_breach(&|| wrong_model(Mistake::ForgetsUnread), Order::Right).case, Case::Unread);
    assert_eq!(must_breach(&|| wrong_hash(Mistake::ForgetsLeftOut), Order::Right).case, Case::LeftOut);
}

#[test]
fn a_hash_log_that_does_not_know_what_is_in_flight_is_found() {
    let breach = must_breach(&|| wrong_hash(Mistake::ForgetsToRearm), Order::Right);
    assert!([Case::Schedules, Case::Race].contains(&breach.case), "{breach}");
    must_breach(&|| wrong_hash(Mistake::CountsNoTakes), Order::Right);
    assert_eq!(must_breach(&|| wrong_hash(Mistake::ForgetsCopies), Order::Right).case, Case::Quiet);
}
