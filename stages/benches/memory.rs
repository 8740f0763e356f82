//! Reading memory through `Memory`, hashing it, and syncing the dirty logs, beside the speed of memory.
//!
//! `cargo bench -p memferry-stages --bench memory [FILTER]`; how to read it stands in [`common`]. No huge pages, on either
//! side of a comparison. The controls are *memcpy* into a warm buffer and *sweep*, which reads and does no more.

mod common;

use std::hint::black_box;
use std::io::Write as _;
use std::sync::Arc;

use common::inputs::{self, CONTENTS};
use common::{EXTENT, PAGE, PLACES, Suite, memcpy, sweep, timed};
use memferry_stages::batch::RoundKind;
use memferry_stages::batch::{Batch, CopiedBatch};
use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::digest::{Known, stretch_digest};
use memferry_stages::dirty_log::{DirtyLog, HashLog, UserfaultLog};
use memferry_stages::geometry::PageSize;
use memferry_stages::memory::{FileMemory, GuestMemory, MappedMemory, Memory};
use memferry_stages::pool::{BufferPool, PooledBuffer};
use xxhash_rust::xxh3::xxh3_64;

const CONTROLS: [(&str, &str); 2] = [("memcpy", "memcpy"), ("sweep", "sweep")];

fn main() {
    inputs::process(PAGE);
    let mut suite = Suite::new();
    for (place, bytes) in PLACES {
        copy(&mut suite, &format!("copy and test untouched, {place}"), &vec![0; PAGE], &inputs::untouched(bytes));
        for (kind, content) in CONTENTS.into_iter().chain([("half zero", half_zero as inputs::Content)]) {
            let content = content(bytes);
            copy(&mut suite, &format!("copy and test {kind}, {place}"), &content, &inputs::mapped(&content));
        }
    }
    let content = half_zero(PLACES[0].1);
    let memory = inputs::mapped(&content);
    hash(&mut suite, &content, &memory);
    file(&mut suite, &content);
    userfault(&mut suite, &memory);
    suite.finish();
}

/// Every other page zero, the others random.
fn half_zero(bytes: usize) -> Vec<u8> {
    let mut content = inputs::random(bytes);
    content.chunks_exact_mut(PAGE).step_by(2).for_each(|page| page.fill(0));
    content
}

fn buffer() -> PooledBuffer {
    BufferPool::new(1, EXTENT).try_take().expect("a buffer")
}

/// Reads all pages through `Memory`, extent by extent. A set in cache is read several times.
fn read_all(memory: &dyn Memory, into: &mut PooledBuffer) -> u32 {
    let pages = memory.length() / PAGE as u64;
    let mask = |first: u64| if pages - first >= 64 { u64::MAX } else { (1 << (pages - first)) - 1 };
    let mut read = |first| {
        let zero = memory.read_extent(PageSize::DEFAULT, first, mask(first), into).expect("reads").count_ones();
        black_box(&mut **into);
        zero
    };
    (0..pages).step_by(64).map(&mut read).sum()
}

fn copy(suite: &mut Suite, group: &str, content: &[u8], memory: &Arc<MappedMemory>) {
    memcpy(suite, group, inputs::pages(memory));
    sweep(suite, group, inputs::pages(memory));
    check_copy(content, &**memory);
    let mut into = buffer();
    suite.measure(group, "read extents", memory.len(), &CONTROLS, || {
        timed(|| {
            black_box(read_all(&**memory, &mut into));
        })
    });
}

fn check_copy(content: &[u8], memory: &dyn Memory) {
    let mut into = buffer();
    let mask = if content.len() < EXTENT { (1 << (content.len() / PAGE)) - 1 } else { u64::MAX };
    memory.read_extent(PageSize::DEFAULT, 0, mask, &mut into).expect("reads");
    let pages = content[..EXTENT.min(content.len())].chunks_exact(PAGE).filter(|page| *page != [0; PAGE]);
    assert!(into[..] == pages.collect::<Vec<_>>().concat());
}

fn hash(suite: &mut Suite, content: &[u8], memory: &Arc<MappedMemory>) {
    let (group, guest) = ("hashing, half the pages zero", inputs::guest(memory.clone()));
    memcpy(suite, group, inputs::pages(memory));
    sweep(suite, group, inputs::pages(memory));
    let mut scratch = buffer();
    suite.measure(group, "digest", content.len(), &CONTROLS, || {
        timed(|| {
            let digest = |stretch| stretch_digest(&guest, 0, stretch, &Known::default(), &mut scratch).expect("reads");
            black_box((0..guest.layout().block_stretches(0)).map(digest).fold(0, |all, digest| all ^ digest));
        })
    });
    let log = HashLog::new(guest.clone());
    let dirty = DirtyBitmap::empty(guest.layout());
    report_all(&log, &guest);
    suite.measure(group, "hash log, clean sync", content.len(), &CONTROLS, || {
        timed(|| log.sync(0, 0..guest.layout().block_extents(0), &dirty).expect("syncs"))
    });
    assert_eq!(dirty.count(), 0, "nobody wrote");
    suite.measure(group, "xxh3-64 of pages, library", content.len(), &CONTROLS, || {
        timed(|| {
            for page in content.chunks_exact(PAGE) {
                black_box(xxh3_64(page));
            }
        })
    });
}

/// Reports a copy of everything to a log.
fn report_all(log: &dyn DirtyLog, memory: &GuestMemory) {
    log.start().expect("starts");
    for at in DirtyBitmap::empty(memory.layout()).extents() {
        log.rearm(at, u64::MAX).expect("re-arms");
        let mut into = buffer();
        let read = memory.block(0).memory.read_extent(PageSize::DEFAULT, at.first_page(), u64::MAX, &mut into);
        let zero = read.expect("reads");
        let batch = Batch { at, mask: u64::MAX, untouched: 0, round: 1, kind: RoundKind::Live };
        log.copied(&CopiedBatch { batch, zero, pages: (zero != u64::MAX).then_some(into) });
    }
}

fn file(suite: &mut Suite, content: &[u8]) {
    let group = "file in the page cache";
    let folder = tempfile::tempdir().expect("a folder");
    let file = FileMemory::create(&folder.path().join("image"), content.len() as u64).expect("a file");
    for (extent, pages) in content.chunks_exact(EXTENT).enumerate() {
        file.write_pages(PageSize::DEFAULT, extent as u64 * 64, pages).expect("writes");
    }
    memcpy(suite, group, content);
    check_copy(content, &file);
    let mut into = buffer();
    suite.measure(group, "read extents", content.len(), &[("memcpy", "memcpy")], || {
        timed(|| {
            black_box(read_all(&file, &mut into));
        })
    });
}

/// The figure is bytes of the memory that is asked about.
fn userfault(suite: &mut Suite, memory: &Arc<MappedMemory>) {
    if let Err(why) = UserfaultLog::supported() {
        writeln!(std::io::stderr(), "skipped: userfault sync: {why}").expect("stderr is open");
        return;
    }
    let guest = inputs::guest(memory.clone());
    let log = UserfaultLog::new(guest.layout(), vec![(0, memory.clone())]);
    let dirty = DirtyBitmap::empty(guest.layout());
    log.start().expect("starts");
    let sync = || log.sync(0, 0..guest.layout().block_extents(0), &dirty).expect("syncs");
    suite.measure("userfault log", "clean sync", memory.len(), &[], || timed(sync));
    suite.measure("userfault log", "sync with one page in four written", memory.len(), &[], || {
        (0..memory.len()).step_by(4 * PAGE).for_each(|offset| memory.store(offset, &[1]));
        timed(sync)
    });
    log.stop().expect("stops");
}
