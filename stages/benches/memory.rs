//! Copying pages out of memory, beside what memory can do: memcpy and a read-only sweep in the same run.
//!
//! The memory is larger than any cache and is walked from end to end, as a scanner does; no huge pages, on either side of
//! a comparison. Every page is written before, or it would read as the kernel's one zero page.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::digest::{Known, stretch_count, stretch_digest};
use memferry_stages::dirty_log::{DirtyLog, HashLog, UserfaultLog};
use memferry_stages::geometry::{BlockInfo, PageSize};
use memferry_stages::memory::{FileMemory, GuestMemory, MappedMemory, Memory, RamBlock};
use memferry_stages::pool::{BufferPool, PooledBuffer};
use xxhash_rust::xxh3::xxh3_64;

const BYTES: usize = 256 << 20;
const PAGE: PageSize = PageSize::DEFAULT;
const EXTENT: usize = 64 * 4096;

/// Memory whose page `n` is zero where `zero(n)`, and noise elsewhere.
fn memory(zero: impl Fn(usize) -> bool) -> Arc<MappedMemory> {
    let memory = Arc::new(MappedMemory::anonymous(BYTES).expect("memory"));
    let mut state = 1_u64;
    let mut noise = [0; 4096];
    for (page, offset) in (0..BYTES).step_by(4096).enumerate() {
        for word in noise.chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&state.to_ne_bytes());
        }
        memory.store(offset, black_box(if zero(page) { &[0; 4096] } else { &noise }));
    }
    memory
}

fn guest(memory: Arc<dyn Memory>) -> GuestMemory {
    let info = BlockInfo { id: "ram".into(), length: memory.length(), guest_address: 0, backing_page_size: 4096 };
    GuestMemory::new(PAGE, vec![RamBlock { info, memory, fresh: false }]).expect("a layout")
}

fn buffer() -> PooledBuffer {
    BufferPool::new(1, EXTENT).try_take().expect("a buffer")
}

fn group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Bytes(BYTES as u64));
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    group
}

/// Reads all extents through the seam.
fn read_all(memory: &dyn Memory, into: &mut PooledBuffer) -> u64 {
    (0..BYTES / EXTENT).map(|at| memory.read_extent(PAGE, at as u64 * 64, u64::MAX, into).expect("reads")).sum()
}

fn copy(criterion: &mut Criterion) {
    let mut group = group(criterion, "copy");
    let bytes: Vec<u64> = (0..BYTES as u64 / 8).map(black_box).collect();
    let mut target = vec![0_u64; EXTENT / 8];
    group.bench_function("memcpy", |bencher| {
        bencher.iter(|| {
            for extent in bytes.chunks_exact(EXTENT / 8) {
                target.copy_from_slice(extent);
                black_box(&mut target);
            }
        });
    });
    group.bench_function("sweep", |bencher| {
        bencher.iter(|| black_box(&bytes).iter().fold(0, |all, word| all | word));
    });
    drop(bytes);
    let mut into = buffer();
    for (name, zero) in [("zero", 1), ("half zero", 2), ("noise", usize::MAX)] {
        let memory = memory(|page| page % zero == 0 && zero < usize::MAX);
        group.bench_function(format!("copy and test, {name}"), |bencher| {
            bencher.iter(|| read_all(&*memory, &mut into));
        });
    }
}

fn hash(criterion: &mut Criterion) {
    let mut group = group(criterion, "hash");
    let memory = guest(memory(|page| page % 4 == 0));
    let mut scratch = buffer();
    group.bench_function("digest", |bencher| {
        bencher.iter(|| {
            let digest = |stretch| stretch_digest(&memory, 0, stretch, &Known::default(), &mut scratch).expect("reads");
            (0..stretch_count(&memory, 0)).map(digest).fold(0, |all, digest| all ^ digest)
        });
    });
    let log = HashLog::new(memory.clone());
    let dirty = DirtyBitmap::empty(memory.layout());
    settle(&log, &memory);
    group.bench_function("hash log, clean sync", |bencher| {
        bencher.iter(|| log.sync(0, 0..memory.layout().block_extents(0), &dirty).expect("syncs"));
    });
    assert_eq!(dirty.count(), 0, "nobody wrote");
    let page = vec![7; 4096];
    group.throughput(Throughput::Bytes(4096));
    group.bench_function("xxh3-64 of a page in the cache", |bencher| bencher.iter(|| xxh3_64(black_box(&page))));
}

/// Reports a copy of everything to a log.
fn settle(log: &dyn DirtyLog, memory: &GuestMemory) {
    use memferry_stages::batch::{Batch, CopiedBatch};
    log.start().expect("starts");
    for at in DirtyBitmap::empty(memory.layout()).extents() {
        log.rearm(at, u64::MAX).expect("re-arms");
        let mut into = buffer();
        let zero = memory.block(0).memory.read_extent(PAGE, at.first_page(), u64::MAX, &mut into).expect("reads");
        let batch = Batch { at, mask: u64::MAX, untouched: 0, round: 1, last: false };
        log.copied(&CopiedBatch { batch, zero, pages: (zero != u64::MAX).then_some(into) });
    }
}

fn others(criterion: &mut Criterion) {
    let mut group = group(criterion, "other");
    let folder = tempfile::tempdir().expect("a folder");
    let file = FileMemory::create(&folder.path().join("image"), BYTES as u64).expect("a file");
    let page = [7; EXTENT];
    (0..BYTES / EXTENT).for_each(|at| file.write_pages(PAGE, at as u64 * 64, &page).expect("writes"));
    let mut into = buffer();
    group.bench_function("copy and test, file in the page cache", |bencher| {
        bencher.iter(|| read_all(&file, &mut into));
    });
    if let Err(why) = UserfaultLog::supported() {
        println!("skipped: userfault sync: {why}");
        return;
    }
    let mapped = memory(|_| false);
    let guest = guest(mapped.clone());
    let log = UserfaultLog::new(guest.layout(), vec![(0, mapped.clone())]);
    let dirty = DirtyBitmap::empty(guest.layout());
    log.start().expect("starts");
    let sync = || log.sync(0, 0..guest.layout().block_extents(0), &dirty).expect("syncs");
    group.bench_function("userfault, clean sync", |bencher| bencher.iter(sync));
    group.bench_function("userfault, sync with one page in four written", |bencher| {
        let write = || (0..BYTES).step_by(4 * 4096).for_each(|offset| mapped.store(offset, &[1]));
        bencher.iter_batched(write, |()| sync(), criterion::BatchSize::PerIteration);
    });
    log.stop().expect("stops");
}

criterion_group!(benches, copy, hash, others);
criterion_main!(benches);
