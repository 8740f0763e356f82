//! Samples the content of pages: how they compress, how large their deltas are, and the processor time of each stage
//! on this host.
//!
//! **Whole pages.** At the start, extents from all over the memory are read and encoded by every codec, in groups as
//! an encoder forms them. Later, a few extents that were just written are sampled from time to time.
//!
//! **Deltas.** The size of a delta depends on the age of the copy: a page that is written all the time changes more
//! in a second than in a tenth of it. So pages are followed over spans of several lengths at once. In each span two
//! kinds are followed: pages that were written in the span before (and would have been sent at its end), and any
//! others, which were not. Pages of which the destination would hold zeros count by themselves. The set of pages written in a span is never in memory as a whole; a uniform sample of it
//! is drawn by retaining the pages with the smallest hashes.
//!
//! The sampler reads a few hundred pages per interval and stores at most 12 MiB of copies. The copies are taken while
//! the guest writes, as an encoder's are.

use std::collections::BinaryHeap;
use std::io;
use std::time::{Duration, Instant};

use fastrand::Rng;
use memferry_stages::batch::page_hash;
use memferry_stages::bitmap::DirtyBitmap;
use memferry_stages::encoder::estimate::Estimate;
use memferry_stages::geometry::{ExtentAt, Layout, PageAt, bits};
use memferry_stages::memory::GuestMemory;
use memferry_stages::pool::{BufferPool, PooledBuffer};
use memferry_stages::xbzrle::{self, Encoded};

use super::trace::{Coded, Cost, DeltaSample, Deltas, Samples};

/// The lengths in intervals of the spans over which pages are followed.
const SPANS: [u32; 6] = [1, 4, 16, 64, 256, 1024];
/// The most bytes of copies that are stored.
const COPIED_BYTES: usize = 12 << 20;
/// The most pages of each kind that are followed in a span.
const FOLLOWED: usize = 192;
/// The amount of memory that is read at the start.
const FIRST_LOOK: usize = 128 << 20;
/// The number of intervals between samples of pages that were just written.
const WRITTEN_EVERY: u32 = 8;
/// The number of extents in such a sample.
const WRITTEN_EXTENTS: usize = 4;

/// See the [module](self).
#[derive(Debug)]
pub struct Sampler {
    memory: GuestMemory,
    samples: Samples,
    whole: [Estimate; 3],
    written: [Estimate; 3],
    alone: [Estimate; 3],
    spans: Vec<Span>,
    /// The pages whose content at the start is known and that have not been written since, and those of them that
    /// were zero.
    known: DirtyBitmap,
    zero: DirtyBitmap,
    random: Rng,
    buffer: PooledBuffer,
    zero_page: Box<[u8]>,
    page: Vec<u8>,
    delta: Vec<u8>,
}

impl Sampler {
    /// A sampler of this memory, with zstd at this level.
    ///
    /// # Panics
    /// If zstd does not support the level.
    #[must_use]
    pub fn new(memory: GuestMemory, zstd_level: i32) -> Self {
        let size = memory.page_size();
        let samples = Samples { zstd_level, ..Samples::default() };
        let estimates = || samples.codecs().map(|codec| Estimate::new(size, codec));
        let followed = (COPIED_BYTES / SPANS.len() / 2 / size.bytes()).clamp(1, FOLLOWED);
        let buffer = BufferPool::new(1, size.extent_bytes()).try_take().expect("the only one");
        Self {
            whole: estimates(),
            written: estimates(),
            alone: estimates(),
            spans: SPANS.iter().map(|&intervals| Span::new(intervals, followed)).collect(),
            known: DirtyBitmap::empty(memory.layout()),
            zero: DirtyBitmap::empty(memory.layout()),
            random: Rng::with_seed(0x6d65_6d66_6572_7279),
            buffer,
            zero_page: vec![0; size.bytes()].into(),
            page: vec![0; size.bytes()],
            delta: vec![0; size.bytes()],
            samples,
            memory,
        }
    }

    /// Samples extents all over the memory, except pages of `unread`: never touched, or never to travel.
    ///
    /// # Errors
    /// If the memory cannot be read.
    pub fn first_look(&mut self, unread: &DirtyBitmap) -> io::Result<()> {
        let layout = self.memory.layout().clone();
        let extents: u64 = (0..layout.block_count()).map(|block| u64::from(layout.block_extents(block))).sum();
        let looks = (FIRST_LOOK / layout.page_size().extent_bytes()) as u64;
        for look in 0..looks.min(extents) {
            // One extent from each of equally many parts of the memory, at a random place in its part.
            let (start, end) = (extents * look / looks.min(extents), extents * (look + 1) / looks.min(extents));
            let at = extent_at(&layout, start + self.random.u64(..end - start));
            let mask = layout.valid_mask(at) & !unread.peek(at);
            self.known.set_mask(at, layout.valid_mask(at));
            self.zero.set_mask(at, layout.valid_mask(at) & !mask);
            if mask == 0 {
                continue;
            }
            let zero = self.read(at, mask)?;
            self.zero.set_mask(at, zero);
            self.samples.touched.of += u64::from(mask.count_ones());
            self.samples.touched.part += u64::from(zero.count_ones());
            let began = Instant::now();
            std::hint::black_box(page_hash(&self.buffer));
            count(&mut self.samples.checksum, mask & !zero, began);
            code(&mut self.whole, &self.buffer, self.page.len(), &mut self.samples.whole);
        }
        Ok(())
    }

    /// Records that the interval with this number, from 0, has passed, and that these pages were written in it.
    ///
    /// # Errors
    /// If the memory cannot be read.
    pub fn interval(&mut self, number: u32, written: &DirtyBitmap, unread: &DirtyBitmap) -> io::Result<()> {
        for at in written.all_dirty_extents() {
            let mask = written.peek(at);
            let first = self.known.take_mask(at, mask);
            self.samples.first_written.of += u64::from(first.count_ones());
            self.samples.first_written.part += u64::from((first & self.zero.peek(at)).count_ones());
            for span in &mut self.spans {
                bits(mask).for_each(|bit| span.written.offer(at.page(bit)));
            }
        }
        let mut spans = std::mem::take(&mut self.spans);
        for span in &mut spans {
            for followed in span.copies.iter_mut().chain(&mut span.candidates) {
                followed.written |= written.is_set(followed.at);
            }
            if (number + 1).is_multiple_of(span.intervals) {
                self.turn(span, unread)?;
            }
        }
        self.spans = spans;
        if number.is_multiple_of(WRITTEN_EVERY) {
            self.look_at_written(written)?;
        }
        Ok(())
    }

    /// The samples, given the duration of an interval.
    #[must_use]
    pub fn finish(mut self, interval: Duration) -> Samples {
        let deltas = |span: &Span| {
            let &Span { intervals, again, rested, from_zero, .. } = span;
            Deltas { span: interval * intervals, again, rested, from_zero }
        };
        self.samples.deltas = self.spans.iter().map(deltas).filter(|deltas| !deltas.span.is_zero()).collect();
        self.samples
    }

    /// Ends a span: the followed pages that were written are compared, and others are followed next.
    fn turn(&mut self, span: &mut Span, unread: &DirtyBitmap) -> io::Result<()> {
        for copy in std::mem::take(&mut span.copies).into_iter().filter(|copy| copy.written) {
            let found = self.compare(&copy)?;
            *match (&copy.copy, copy.again) {
                (None, _) => &mut span.from_zero,
                (Some(_), true) => &mut span.again,
                (Some(_), false) => &mut span.rested,
            } += found;
        }
        let again = span.written.take().into_iter().map(|at| (at, true));
        let rested = std::mem::take(&mut span.candidates).into_iter().filter(|page| !page.written);
        for (at, again) in again.chain(rested.map(|page| (page.at, false))).collect::<Vec<_>>() {
            let copy = if unread.is_set(at) { None } else { self.copy(at)? };
            span.copies.push(Followed { at, again, written: false, copy });
        }
        let layout = self.memory.layout();
        let candidate =
            |()| Followed { at: any_page(layout, &mut self.random), again: false, written: false, copy: None };
        span.candidates = std::iter::repeat_n((), span.followed).map(candidate).collect();
        Ok(())
    }

    /// A copy of a page; `None` if it is all zero.
    fn copy(&mut self, at: PageAt) -> io::Result<Option<Box<[u8]>>> {
        self.memory.block(at.block).memory.read_page(self.memory.page_size(), at.page, &mut self.page)?;
        Ok((!is_zero(&self.page)).then(|| self.page.as_slice().into()))
    }

    fn compare(&mut self, copy: &Followed) -> io::Result<DeltaSample> {
        self.memory.block(copy.at.block).memory.read_page(self.memory.page_size(), copy.at.page, &mut self.page)?;
        let mut found = DeltaSample { pages: 1, ..DeltaSample::default() };
        if is_zero(&self.page) {
            found.to_zero = 1;
            return Ok(found);
        }
        let began = Instant::now();
        let held = copy.copy.as_deref().unwrap_or(&self.zero_page);
        let encoded = xbzrle::encode_page(held, &self.page, &mut self.delta);
        count(&mut self.samples.delta, 1, began);
        match encoded {
            Encoded::Equal => found.equal = 1,
            Encoded::Delta(bytes) if bytes < self.page.len() => (found.deltas, found.delta_bytes) = (1, bytes as u64),
            Encoded::Delta(_) | Encoded::Overflow => found.overflows = 1,
        }
        Ok(found)
    }

    fn look_at_written(&mut self, written: &DirtyBitmap) -> io::Result<()> {
        let mut least = LeastHashes::new(WRITTEN_EXTENTS, self.random.u64(..));
        written.all_dirty_extents().for_each(|at| least.offer(at.page(0)));
        for first in least.take() {
            #[expect(clippy::cast_possible_truncation, reason = "a block has at most 2^32 extents")]
            let at = ExtentAt { block: first.block, extent: (first.page / 64) as u32 };
            self.read(at, written.peek(at))?;
            code(&mut self.written, &self.buffer, self.page.len(), &mut self.samples.written);
            let page_bytes = self.page.len();
            for page in self.buffer.chunks_exact(page_bytes) {
                code(&mut self.alone, page, page_bytes, &mut self.samples.alone);
            }
        }
        Ok(())
    }

    /// Reads pages of an extent into the buffer; omits the zero pages and returns them.
    fn read(&mut self, at: ExtentAt, mask: u64) -> io::Result<u64> {
        let began = Instant::now();
        let memory = &self.memory.block(at.block).memory;
        let zero = memory.read_extent(self.memory.page_size(), at.first_page(), mask, &mut self.buffer)?;
        count(&mut self.samples.read, mask, began);
        Ok(zero)
    }
}

fn count(cost: &mut Cost, pages: u64, began: Instant) {
    cost.pages += u64::from(pages.count_ones());
    cost.nanos += nanos(began);
}

fn nanos(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

fn code(estimates: &mut [Estimate; 3], pages: &[u8], page_bytes: usize, sums: &mut [Coded; 3]) {
    if pages.is_empty() {
        return;
    }
    for (estimate, sum) in estimates.iter_mut().zip(sums) {
        let began = Instant::now();
        let came = estimate.code(pages);
        sum.nanos += nanos(began);
        sum.pages += (pages.len() / page_bytes) as u64;
        sum.compressed += came.compressed;
        sum.bytes += came.bytes;
    }
}

fn is_zero(page: &[u8]) -> bool {
    page.iter().all(|&byte| byte == 0)
}

/// The extent with this number, counted over all blocks.
fn extent_at(layout: &Layout, mut number: u64) -> ExtentAt {
    for block in 0..layout.block_count() {
        let extents = layout.block_extents(block);
        match u32::try_from(number) {
            Ok(extent) if extent < extents => return ExtentAt { block, extent },
            _ => number -= u64::from(extents),
        }
    }
    unreachable!("an extent of the layout")
}

fn any_page(layout: &Layout, random: &mut Rng) -> PageAt {
    let mut page = random.u64(..layout.pages());
    for block in 0..layout.block_count() {
        match page.checked_sub(layout.block_pages(block)) {
            Some(beyond) => page = beyond,
            None => return PageAt { block, page },
        }
    }
    unreachable!("a page of the layout")
}

/// The pages that are followed over spans of one length.
#[derive(Debug)]
struct Span {
    intervals: u32,
    /// The most pages of each kind.
    followed: usize,
    /// A sample of the pages written so far in this span.
    written: LeastHashes,
    /// Copies made when the span began.
    copies: Vec<Followed>,
    /// Pages to follow in the next span, if they are not written in this one.
    candidates: Vec<Followed>,
    again: DeltaSample,
    rested: DeltaSample,
    from_zero: DeltaSample,
}

impl Span {
    fn new(intervals: u32, followed: usize) -> Self {
        let written = LeastHashes::new(followed, u64::from(intervals));
        let none = DeltaSample::default();
        Self {
            intervals,
            followed,
            written,
            copies: Vec::new(),
            candidates: Vec::new(),
            again: none,
            rested: none,
            from_zero: none,
        }
    }
}

/// A page that is followed.
#[derive(Debug)]
struct Followed {
    at: PageAt,
    /// Was it written in the span before?
    again: bool,
    /// Was it written in this span?
    written: bool,
    /// `None`: all zero.
    copy: Option<Box<[u8]>>,
}

/// A uniform sample of the distinct pages that are offered, of at most `room` pages.
#[derive(Debug)]
struct LeastHashes {
    room: usize,
    seed: u64,
    /// The largest hash on top.
    sample: BinaryHeap<(u64, PageAt)>,
}

impl LeastHashes {
    fn new(room: usize, seed: u64) -> Self {
        Self { room, seed, sample: BinaryHeap::with_capacity(room + 1) }
    }

    fn offer(&mut self, at: PageAt) {
        let hash = Rng::with_seed(self.seed ^ (u64::from(at.block) << 40) ^ at.page).u64(..);
        let most = self.sample.peek().filter(|_| self.sample.len() == self.room).map_or(u64::MAX, |&(most, _)| most);
        if hash < most && !self.holds(hash) {
            self.sample.push((hash, at));
            if self.sample.len() > self.room {
                self.sample.pop();
            }
        }
    }

    fn holds(&self, hash: u64) -> bool {
        self.sample.iter().any(|&(sample, _)| sample == hash)
    }

    /// Returns the sample, and starts a new one.
    fn take(&mut self) -> Vec<PageAt> {
        self.seed = Rng::with_seed(self.seed).u64(..);
        self.sample.drain().map(|(_, at)| at).collect()
    }
}
