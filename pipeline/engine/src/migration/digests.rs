//! Verification: digests of both memories, compared while the guest is paused.
//!
//! Each stretch has one digest. By [page hashes](Verify::Pages) it is the sum of the hashes that were recorded as pages were sent
//! and loaded. In [full](Verify::Full) it is a hash of the paused guest's memory: both ends hash on every core, and
//! neither reads untouched pages, which the memory is asked for once. Pages that did not travel (hinted free, unplugged, of ignored blocks) are left out: the source sends
//! which, for each stretch. The destination hashes at the same time and leaves out the pages that it knows of itself.
//! It hashes a stretch again if the source leaves out more of it. If a hash differs, the destination sends the hashes
//! of that stretch's pages, and the paused source finds the page.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::digest::{self, Known, STRETCH_WORDS};
use memferry_stages::geometry::{BlockInfo, EXTENT_PAGES, ExtentAt, Layout, PageAt, PageSize};
use memferry_stages::host::cores;
use memferry_stages::memory::{GuestMemory, MappedMemory, RamBlock};
use memferry_stages::page_hashes::PageHashes;
use memferry_stages::pool::{BufferPool, PooledBuffer};
use memferry_stages::wire::Message;
use memferry_stages::wire::messages::{MAX_DIGESTS, StretchDigest};
use tokio::task::JoinHandle;

use super::error::MigrationError;
use super::{note_untouched, untouched_pages};

/// Stretches that are hashed to estimate the cost of hashing all of them.
const SAMPLES: usize = 8;
/// Passes over the guest's memory that the estimate counts: each end makes one, and both may run on one machine.
pub const DIGEST_PASSES: u32 = 2;
/// Memory that is hashed to measure a host that has no guest yet: more than its CPU caches hold.
const SAMPLE_BYTES: usize = 128 << 20;
/// How often such a host is measured: other load on it varies.
const MEASUREMENTS: usize = 7;

/// A stretch of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StretchAt {
    pub(super) block: u32,
    pub(super) stretch: u64,
}

/// Pages that digests leave out; `None` if none may be, so that such a migration allocates no bitmap for them.
pub(super) type LeftOut = Option<Arc<DirtyBitmap>>;

/// The hash of every stretch, by block, and the pages that they leave out. At a destination it grows as frames arrive,
/// never beyond the layout.
#[derive(Clone, Debug)]
pub(super) struct Digests {
    layout: Layout,
    blocks: Vec<Vec<u128>>,
    left_out: LeftOut,
}

impl Digests {
    /// No hashes yet, and nothing left out. `may_leave_out`: was it agreed that digests may leave pages out?
    pub(super) fn none(layout: &Layout, may_leave_out: bool) -> Self {
        let left_out = may_leave_out.then(|| Arc::new(DirtyBitmap::empty(layout)));
        Self { layout: layout.clone(), blocks: vec![Vec::new(); layout.blocks().len()], left_out }
    }

    /// The sums of page hashes, without the pages that are left out.
    pub(super) fn of_pages(layout: &Layout, page_hashes: &PageHashes, left_out: LeftOut) -> Self {
        let mut digests = Self { left_out, ..Self::none(layout, false) };
        for at in all_stretches(layout) {
            let left_out = masks(digests.left_out.as_deref(), at);
            let sum = page_hashes.stretch_sum(at.block, at.stretch, &left_out);
            digests.blocks[at.block as usize].push(sum.into());
        }
        digests
    }

    /// Adds the content of a Digests frame: the next stretches of a block.
    ///
    /// # Errors
    /// When the stretches are not the next ones or not of the layout, when they leave out pages that do not exist, or
    /// when they leave out any and `may_leave_out` was not agreed.
    pub(super) fn add(&mut self, block: u32, first: u64, stretches: Vec<StretchDigest>) -> Result<(), MigrationError> {
        let wrong = |what: String| Err(MigrationError::Protocol(what));
        let layout = &self.layout;
        let Some(here) = self.blocks.get_mut(block as usize) else {
            return wrong(format!("digests of block {block}, which is not there"));
        };
        let next = here.len() as u64;
        if first != next || next + stretches.len() as u64 > layout.block_stretches(block) {
            let count = stretches.len();
            return wrong(format!("{count} digests of block {block} from stretch {first} on, where {next} comes next"));
        }
        for (stretch, digest) in (first..).zip(stretches) {
            here.push(digest.hash);
            let Some(left_out) = &self.left_out else {
                if digest.left_out != [0; STRETCH_WORDS] {
                    return wrong(format!("digests of block {block} leave pages out"));
                }
                continue;
            };
            let mut extents = layout.stretch_extents(block, stretch);
            for mask in digest.left_out {
                match extents.next() {
                    Some(at) if mask & !layout.valid_mask(at) == 0 => _ = left_out.set_mask(at, mask),
                    None if mask == 0 => {}
                    _ => {
                        return wrong(format!(
                            "a digest of block {block} leaves pages out that stretch {stretch} has not"
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// The frames that carry them, one after another.
    pub(super) fn messages(&self) -> impl Iterator<Item = Message> {
        (0..).zip(&self.blocks).flat_map(move |(block, hashes)| {
            hashes.chunks(MAX_DIGESTS).enumerate().map(move |(index, hashes)| {
                let first = (index * MAX_DIGESTS) as u64;
                let digest = |(stretch, &hash)| {
                    let left_out = masks(self.left_out.as_deref(), StretchAt { block, stretch });
                    StretchDigest { hash, left_out }
                };
                Message::Digests { block, first, stretches: (first..).zip(hashes).map(digest).collect() }
            })
        })
    }

    /// The pages that they leave out.
    pub(super) fn left_out(&self) -> &LeftOut {
        &self.left_out
    }

    /// The first page that these digests leave out and `others` do not.
    pub(super) fn first_left_out_beside(&self, others: &LeftOut) -> Option<PageAt> {
        let own = self.left_out.as_ref()?;
        let more = |at: ExtentAt| own.peek(at) & !others.as_ref().map_or(0, |others| others.peek(at));
        let at = own.all_dirty_extents().find(|&at| more(at) != 0)?;
        Some(at.page(more(at).trailing_zeros()))
    }

    /// These digests with `left_out` left out, which has at least the same pages. The stretches that it affects are
    /// hashed again.
    pub(super) async fn leaving_out(mut self, memory: &GuestMemory, left_out: LeftOut) -> io::Result<Self> {
        let concerns = |at: &StretchAt| masks(self.left_out.as_deref(), *at) != masks(left_out.as_deref(), *at);
        let stretches: Arc<[_]> = all_stretches(memory.layout()).filter(concerns).collect();
        let hashes = if stretches.is_empty() {
            Vec::new()
        } else {
            start_some(memory, left_out.clone(), stretches.clone()).hashes().await?
        };
        for (at, hash) in stretches.iter().zip(hashes) {
            self.blocks[at.block as usize][usize::try_from(at.stretch).expect("one of them")] = hash;
        }
        self.left_out = left_out;
        Ok(self)
    }

    /// The first stretch whose hash differs, or is missing on one side.
    pub(super) fn first_difference(&self, layout: &Layout, other: &Self) -> Option<StretchAt> {
        let hash = |digests: &Self, at: StretchAt| {
            let block = digests.blocks.get(at.block as usize)?;
            block.get(usize::try_from(at.stretch).ok()?).copied()
        };
        all_stretches(layout).find(|&at| hash(self, at).is_none() || hash(self, at) != hash(other, at))
    }
}

/// The most bytes that digests of a guest take: untouched pages, pages left out if any may be, the list of stretches,
/// and the hashes, once as computed and once as stored.
pub(super) fn bound_bytes(layout: &Layout, may_leave_out: bool) -> u64 {
    // An upper bound, without walking the layout: it is a peer's, and whether this host has room for it is not checked
    // yet.
    let stretches: u64 = (0..layout.block_count()).map(|block| layout.block_stretches(block)).sum();
    let hashes = stretches * (2 * size_of::<u128>() + size_of::<StretchAt>()) as u64;
    (1 + u64::from(may_leave_out)) * DirtyBitmap::bytes_of(layout) + hashes
}

/// Digests that are being computed. Dropping them stops the work.
pub(super) struct Pending {
    layout: Layout,
    left_out: LeftOut,
    stretches: Arc<[StretchAt]>,
    stop: Arc<AtomicBool>,
    /// Worker N of M hashes each M-th stretch, in order.
    workers: Vec<JoinHandle<io::Result<Vec<u128>>>>,
}

/// Starts to hash all of the guest's memory except what is left out, on every core.
pub(super) fn start(memory: &GuestMemory, left_out: LeftOut) -> Pending {
    start_some(memory, left_out, all_stretches(memory.layout()).collect())
}

fn start_some(memory: &GuestMemory, left_out: LeftOut, stretches: Arc<[StretchAt]>) -> Pending {
    let stop = Arc::new(AtomicBool::new(false));
    let untouched = Arc::new(OnceLock::new());
    let cores = cores();
    let worker = |number: usize| {
        let (memory, stop, untouched) = (memory.clone(), stop.clone(), untouched.clone());
        let (left_out, stretches) = (left_out.clone(), stretches.clone());
        tokio::task::spawn_blocking(move || {
            let untouched = untouched.get_or_init(|| untouched_pages(&memory));
            let mut hasher = Hasher::new(&memory, untouched, left_out.as_deref());
            let own = stretches.iter().skip(number).step_by(cores);
            own.take_while(|_| !stop.load(Ordering::Relaxed)).map(|&at| hasher.hash(at)).collect()
        })
    };
    let workers = (0..cores).map(worker).collect();
    Pending { layout: memory.layout().clone(), left_out, stretches, stop, workers }
}

impl Pending {
    /// Waits for all of them.
    pub(super) async fn finish(self) -> io::Result<Digests> {
        let mut digests = Digests { left_out: self.left_out.clone(), ..Digests::none(&self.layout, false) };
        let stretches = self.stretches.clone();
        for (at, hash) in stretches.iter().zip(self.hashes().await?) {
            digests.blocks[at.block as usize].push(hash);
        }
        Ok(digests)
    }

    /// The hashes, in the order of the stretches.
    async fn hashes(mut self) -> io::Result<Vec<u128>> {
        let mut found = Vec::new();
        for worker in std::mem::take(&mut self.workers) {
            let hashes = worker.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
            found.push(hashes?.into_iter());
        }
        let workers = found.len();
        let hash = |index: usize| found[index % workers].next().expect("only dropping this stops a worker");
        Ok((0..self.stretches.len()).map(hash).collect())
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// What hashing the whole guest will cost one end, estimated from a few stretches hashed now. May block.
fn estimate(memory: &GuestMemory, left_out: Option<&DirtyBitmap>) -> io::Result<Duration> {
    let stretches: Vec<_> = all_stretches(memory.layout()).collect();
    let step = stretches.len().div_ceil(SAMPLES);
    let sample: Vec<_> = stretches.iter().step_by(step).collect();
    let untouched = DirtyBitmap::empty(memory.layout());
    let began = Instant::now();
    for &&at in &sample {
        note_untouched(memory, at.block, pages_of(memory.layout(), at), &untouched);
        Hasher::new(memory, &untouched, left_out).hash(at)?;
    }
    Ok(began.elapsed().mul_f64(stretches.len() as f64 / sample.len() as f64 / cores() as f64))
}

/// What digests add to the downtime, estimated from a few stretches hashed now. May block.
pub fn downtime(memory: &GuestMemory, left_out: Option<&DirtyBitmap>) -> io::Result<Duration> {
    Ok(estimate(memory, left_out)? * DIGEST_PASSES)
}

/// The duration of a pass, from several measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashingCost {
    /// The median.
    pub median: Duration,
    /// The shortest.
    pub least: Duration,
    /// The longest.
    pub most: Duration,
    /// The number of measurements.
    pub measurements: usize,
}

impl HashingCost {
    /// The summary of some measurements.
    ///
    /// # Panics
    /// If there are none.
    fn of(mut measured: Vec<Duration>) -> Self {
        measured.sort_unstable();
        let (least, most) = (measured[0], measured[measured.len() - 1]);
        Self { median: measured[measured.len() / 2], least, most, measurements: measured.len() }
    }

    /// The estimate for several passes.
    #[must_use]
    pub fn times(self, passes: u32) -> Self {
        let Self { median, least, most, measurements } = self;
        Self { median: median * passes, least: least * passes, most: most * passes, measurements }
    }
}

/// What one pass over the given number of bytes of written memory takes on this host, on every core. A sync of the hash
/// log makes one pass, digests [`DIGEST_PASSES`]. Measured on samples; may block.
///
/// # Errors
/// When there is no memory for the samples.
pub fn hashing_cost(bytes: u64) -> io::Result<HashingCost> {
    let mapped = Arc::new(MappedMemory::anonymous(SAMPLE_BYTES)?);
    for start in (0..SAMPLE_BYTES).step_by(4096) {
        mapped.store(start, &[1; 4096]);
    }
    let info = BlockInfo::new("sample", SAMPLE_BYTES as u64);
    let block = RamBlock { info, memory: mapped, fresh: false };
    let sample = GuestMemory::new(PageSize::DEFAULT, vec![block]).expect("one good block");
    let measure = |_| Ok(estimate(&sample, None)?.mul_f64(bytes as f64 / SAMPLE_BYTES as f64));
    (0..MEASUREMENTS).map(measure).collect::<io::Result<_>>().map(HashingCost::of)
}

/// The recorded page hashes of a stretch, to be sent.
pub(super) fn recorded_hashes(layout: &Layout, page_hashes: &PageHashes, left_out: &LeftOut, at: StretchAt) -> Message {
    let hashes = page_hashes.of_stretch(at.block, at.stretch, &masks(left_out.as_deref(), at));
    Message::PageHashes { first: first_page(layout, at), hashes }
}

/// The page hashes of a stretch, to be sent. Pages that are left out have none. May block.
pub(super) fn page_hashes(memory: &GuestMemory, left_out: &LeftOut, at: StretchAt) -> io::Result<Message> {
    let first = first_page(memory.layout(), at);
    let known = Known { untouched: None, left_out: masks(left_out.as_deref(), at) };
    let hashes = digest::page_hashes(memory, at.block, at.stretch, &known, &mut scratch(memory))?;
    Ok(Message::PageHashes { first, hashes })
}

/// The first page whose hash, by the recorded ones or by its memory, differs from the given one. May block.
pub(super) fn first_differing_page(
    memory: &GuestMemory,
    recorded: Option<&PageHashes>,
    left_out: &LeftOut,
    first: PageAt,
    theirs: &[u64],
) -> io::Result<Option<PageAt>> {
    let layout = memory.layout();
    let pages = layout.page_size().stretch_extents() * EXTENT_PAGES;
    if first.block >= layout.block_count() || first.page >= layout.block_pages(first.block) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("the peer asks about {first}")));
    }
    let at = StretchAt { block: first.block, stretch: first.page / pages };
    let left_out = masks(left_out.as_deref(), at);
    let ours = match recorded {
        Some(recorded) => recorded.of_stretch(at.block, at.stretch, &left_out),
        None => {
            let known = Known { untouched: None, left_out };
            digest::page_hashes(memory, at.block, at.stretch, &known, &mut scratch(memory))?
        }
    };
    let differs = (first.page..).zip(ours.iter().zip(theirs)).find(|(_, (ours, theirs))| ours != theirs);
    Ok(differs.map(|(page, _)| PageAt { block: first.block, page }))
}

/// The first page of resting memory that differs from its recorded hash, among those that a check has noted. May block.
pub(super) fn first_unrecorded_change(
    memory: &GuestMemory,
    page_hashes: &PageHashes,
    left_out: &LeftOut,
) -> io::Result<Option<PageAt>> {
    let skip = |at| left_out.as_ref().map_or(0, |left_out| left_out.peek(at));
    page_hashes.first_difference(memory, skip, &mut scratch(memory))
}

/// A page, in words.
pub(super) fn describe(layout: &Layout, at: PageAt) -> String {
    let block = &layout.blocks()[at.block as usize];
    let offset = at.page * layout.page_size().bytes() as u64;
    format!("page {} of block {:?}, at byte {offset:#x}", at.page, block.id)
}

/// The first page of a stretch.
pub(super) fn first_page(layout: &Layout, at: StretchAt) -> PageAt {
    PageAt { block: at.block, page: pages_of(layout, at).start }
}

fn pages_of(layout: &Layout, at: StretchAt) -> Range<u64> {
    let pages = layout.page_size().stretch_extents() * EXTENT_PAGES;
    at.stretch * pages..layout.block_pages(at.block).min((at.stretch + 1) * pages)
}

/// Hashes stretches, one after another. The hash of an untouched stretch is computed once and reused.
struct Hasher<'a> {
    memory: &'a GuestMemory,
    untouched: &'a DirtyBitmap,
    left_out: Option<&'a DirtyBitmap>,
    scratch: PooledBuffer,
    /// The cached hash of a whole stretch of zeros.
    hole: Option<u128>,
}

impl<'a> Hasher<'a> {
    fn new(memory: &'a GuestMemory, untouched: &'a DirtyBitmap, left_out: Option<&'a DirtyBitmap>) -> Self {
        Self { memory, untouched, left_out, scratch: scratch(memory), hole: None }
    }

    fn hash(&mut self, at: StretchAt) -> io::Result<u128> {
        let left_out = masks(self.left_out, at);
        let hole = left_out == [0; STRETCH_WORDS] && self.is_hole(at);
        if let Some(hash) = self.hole.filter(|_| hole) {
            return Ok(hash);
        }
        let known = Known { untouched: Some(self.untouched), left_out };
        let hash = digest::stretch_digest(self.memory, at.block, at.stretch, &known, &mut self.scratch)?;
        if hole {
            self.hole = Some(hash);
        }
        Ok(hash)
    }

    /// Is it a stretch of full size in which every page is untouched?
    fn is_hole(&self, at: StretchAt) -> bool {
        let extents = self.memory.page_size().stretch_extents();
        let first = at.stretch * extents;
        (first..first + extents).all(|extent| {
            let extent = u32::try_from(extent).ok().filter(|&it| it < self.memory.layout().block_extents(at.block));
            extent.is_some_and(|extent| self.untouched.peek(ExtentAt { block: at.block, extent }) == u64::MAX)
        })
    }
}

/// A buffer to read an extent into.
pub(super) fn scratch(memory: &GuestMemory) -> PooledBuffer {
    BufferPool::new(1, memory.page_size().extent_bytes()).try_take().expect("it has one")
}

/// The pages of a stretch that are left out, extent by extent.
fn masks(pages: Option<&DirtyBitmap>, at: StretchAt) -> [u64; STRETCH_WORDS] {
    let mut masks = [0; STRETCH_WORDS];
    let Some(pages) = pages else { return masks };
    masks
        .iter_mut()
        .zip(pages.layout().stretch_extents(at.block, at.stretch))
        .for_each(|(mask, at)| *mask = pages.peek(at));
    masks
}

fn all_stretches(layout: &Layout) -> impl Iterator<Item = StretchAt> + use<'_> {
    let of_block = |block| (0..layout.block_stretches(block)).map(move |stretch| StretchAt { block, stretch });
    (0..layout.block_count()).flat_map(of_block)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cost_is_the_median_of_what_was_measured() {
        let measured = [9, 2, 4, 3, 30].map(Duration::from_millis).to_vec();
        let cost = HashingCost::of(measured).times(2);
        assert_eq!([cost.least, cost.median, cost.most].map(|time| time.as_millis()), [4, 8, 60]);
        assert_eq!(cost.measurements, 5);
    }

    /// Three blocks: one with a hole in its middle, one never touched and of no whole stretch, one without a hole.
    fn memory(written: &[(usize, usize)]) -> GuestMemory {
        let lengths = [9 << 20, (4 << 20) + 5, 4 << 20];
        let blocks = lengths.into_iter().enumerate().map(|(index, length)| {
            let memory = Arc::new(MappedMemory::anonymous(length).unwrap());
            for &(_, offset) in written.iter().filter(|(block, _)| *block == index) {
                memory.store(offset, b"written");
            }
            let info = BlockInfo::new(index.to_string(), length as u64);
            RamBlock { info, memory, fresh: true }
        });
        GuestMemory::new(PageSize::DEFAULT, blocks.collect()).unwrap()
    }

    #[test]
    fn holes_hash_as_the_zeros_that_they_are() {
        let written = [(0, 100), (0, 8 << 20), (2, 0), (2, 3 << 20)];
        let sparse = memory(&written);
        let untouched = untouched_pages(&sparse);
        let mut hasher = Hasher::new(&sparse, &untouched, None);
        for at in all_stretches(sparse.layout()) {
            let known = Known::default();
            let plain = digest::stretch_digest(&sparse, at.block, at.stretch, &known, &mut scratch(&sparse)).unwrap();
            assert_eq!(hasher.hash(at).unwrap(), plain, "{at:?}");
        }
        assert!(hasher.hole.is_some(), "block 0 has stretches that were never touched");
    }

    #[tokio::test]
    async fn the_first_difference_is_found_and_its_page_named() {
        let (ours, theirs) = (memory(&[(0, 100), (2, 3 << 20)]), memory(&[(0, 100), (2, (3 << 20) + 4096)]));
        let digests = [start(&ours, None), start(&theirs, None)];
        let [ours_hashed, theirs_hashed] =
            futures::future::join_all(digests.map(Pending::finish)).await.try_into().unwrap();
        let layout = ours.layout();
        let differs = theirs_hashed.unwrap().first_difference(layout, &ours_hashed.unwrap()).unwrap();
        assert_eq!(differs, StretchAt { block: 2, stretch: 1 });
        let Message::PageHashes { first, hashes } = page_hashes(&theirs, &None, differs).unwrap() else { panic!() };
        let page = first_differing_page(&ours, None, &None, first, &hashes).unwrap();
        assert_eq!(page, Some(PageAt { block: 2, page: (3 << 20) / 4096 }));
    }

    #[tokio::test]
    async fn pages_left_out_travel_with_the_digests_and_are_hashed_at_neither_end() {
        // They differ in the page at 3 MiB of block 2 and the one behind it.
        let (ours, theirs) = (memory(&[(0, 100), (2, 3 << 20)]), memory(&[(0, 100), (2, (3 << 20) + 4096)]));
        let (layout, page) = (ours.layout(), (3 << 20) / 4096);
        let left_out = |pages| {
            let left_out = DirtyBitmap::empty(layout);
            left_out.set_range(2, pages);
            Some(Arc::new(left_out))
        };
        // The destination knows one of them itself.
        let sent = start(&ours, left_out(page..page + 2)).finish().await.unwrap();
        let own = start(&theirs, left_out(page..page + 1)).finish().await.unwrap();
        let mut came = Digests::none(layout, true);
        for message in sent.messages() {
            let Message::Digests { block, first, stretches } = message else { panic!() };
            came.add(block, first, stretches).unwrap();
        }
        assert_eq!(came.left_out.as_ref().unwrap().count(), 2);
        assert_eq!(own.first_left_out_beside(&came.left_out), None);
        let beside = came.first_left_out_beside(&own.left_out);
        assert_eq!(beside, Some(PageAt { block: 2, page: page + 1 }));
        assert!(came.first_difference(layout, &own).is_some());
        let own = own.leaving_out(&theirs, came.left_out.clone()).await.unwrap();
        assert_eq!(came.first_difference(layout, &own), None);
    }

    #[test]
    fn digests_that_leave_out_what_was_not_agreed_or_is_not_there_are_refused() {
        let guest = memory(&[]);
        let refusal = |block, first, left_out, may| {
            let mut digests = Digests::none(guest.layout(), may);
            for stretch in 0..first {
                digests.add(block, stretch, vec![StretchDigest { hash: 0, left_out: [0; 8] }]).unwrap();
            }
            let added = digests.add(block, first, vec![StretchDigest { hash: 0, left_out }]);
            added.err().map(|error| error.to_string())
        };
        let one = |word: usize, mask| {
            let mut left_out = [0; 8];
            left_out[word] = mask;
            left_out
        };
        assert_eq!(refusal(0, 0, one(7, u64::MAX), true), None);
        assert!(refusal(0, 0, one(7, 1), false).unwrap().contains("digests of block 0 leave pages out"));
        // Block 1 has 4 MiB and 5 bytes: one page in its third stretch.
        assert_eq!(refusal(1, 2, one(0, 1), true), None);
        for left_out in [one(0, 2), one(0, u64::MAX), one(1, 1), one(7, 1 << 63)] {
            assert!(refusal(1, 2, left_out, true).unwrap().contains("leaves pages out that stretch 2 has not"));
        }
        assert!(refusal(3, 0, [0; 8], true).unwrap().contains("block 3, which is not there"));
        assert!(refusal(2, 2, [0; 8], true).unwrap().contains("1 digests of block 2 from stretch 2 on"));
    }
}
