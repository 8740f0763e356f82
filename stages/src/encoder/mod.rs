//! Stage: encoder. Encodes the pages of a lane, and has the stream's framer make frames of them.
//!
//! - **Takes** copied batches and the marks between them.
//! - **Gives** [`Outgoing`] frames, exactly one for each batch, even an empty one: the destination acknowledges the count of
//!   frames in a lane.
//! - **Owns** its lane's share of the XBZRLE cache, and the compressor.
//! - **Promises** two laws of ARCHITECTURE.md. Law 5 (the round travels in band): the choice of encoding changes where the first
//!   RoundComplete passes, and only there. Law 6 (the delta's reference is what the destination holds): once a page is sent, its
//!   cache entry equals what the destination holds, or is gone; a page that was sent as zero needs none.
//!
//! ```text
//! pages ──▶ page_coder: which encoding? ──▶ payload: where do their bytes lie? ──▶ here: EncodedBatch ──▶ framer
//!                │  ├─▶ reference: what does the destination hold?
//!                │  └─▶ misses: is it worth compressing what no delta helps?
//!                └─▶ whole_coder: compressed together ──▶ sampler: is it worth a try?
//! ```
//!
//! It takes buffers of a separate pool while it holds one of the detector's, so the two cannot wait for each other (law 9: memory
//! is bounded). Where all pages of a batch are raw, the detector's buffer is the payload and no byte is copied.
//!
//! The stage knows no stream: its [`Framer`] is of the stream's [dialect](crate::dialect), and works in the lane's task, so that the
//! hashes of payloads are computed in as many tasks as there are lanes.

pub mod estimate;
mod known_zero;
pub mod misses;
mod page_coder;
mod payload;
mod reference;
mod sampler;
mod whole_coder;

use std::ops::{Deref, DerefMut, Range};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::batch::{Batch, CopiedBatch, EncodedBatch, Item, Mark, PageEncoding, page_hash};
use crate::bitmap::DirtyBitmap;
use crate::codec::Codec;
use crate::dialect::{Framed, Framer};
use crate::error::StageError;
use crate::geometry::{PageSize, bits};
use crate::meter::Meter;
use crate::page_hashes::PageHashes;
use crate::pool::{BufferPool, PooledBuffer};
use crate::queue::{Inlet, Outlet};
use crate::stage::Stage;
use crate::stage_id::StageId;
use crate::tally::{PageTally, RoundTally};
pub use known_zero::KnownZero;
use misses::{OnMiss, Wire};
use page_coder::{Coded, PageCoder};
use payload::Payload;
use sampler::Span;

/// How pages are to be encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncoderPlan {
    /// Compressor of the first round; of every round where `delta` is `None`.
    pub compress: Option<Codec>,
    /// Deltas, from the first RoundComplete on.
    pub delta: Option<DeltaPlan>,
}

/// How deltas are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaPlan {
    /// Bytes of the cache: this lane's share.
    pub cache_bytes: u64,
    /// What to do with pages that miss the cache or whose delta is not smaller.
    pub on_miss: OnMiss,
    /// Whether pages enter the cache in the first round already.
    pub cache_first_round: bool,
}

/// A frame for the sender: the part before its payload, and the payload.
#[derive(Debug)]
pub struct Outgoing {
    /// The lane whose frame it is.
    pub lane: u16,
    /// The frame's head and its body up to the payload; a whole frame where there is no payload.
    pub head: Bytes,
    /// The payload.
    pub payload: Option<PooledBuffer>,
    /// The mark that is reached when this frame is sent, for the sender to report.
    pub mark: Option<Mark>,
}

/// An encoder's cache, as others see it. Its size may be changed while the encoder runs, and takes effect at its next batch.
///
/// The cache itself is moved here when the encoder ends, in whatever way, and is freed with the last clone: freeing a large one takes
/// milliseconds, for which the paused guest would wait. After a lost connection the next encoder of the lane takes it from here
/// ([`Encoder::with_cache_of`]).
#[derive(Clone, Debug)]
pub struct CacheShare(Arc<Cache>);

#[derive(Debug)]
struct Cache {
    bytes: AtomicU64,
    left_behind: Mutex<Option<PageCoder>>,
}

impl CacheShare {
    fn new(bytes: u64) -> Self {
        Self(Arc::new(Cache { bytes: AtomicU64::new(bytes), left_behind: Mutex::new(None) }))
    }

    /// Sets the size in bytes, from the next batch on.
    pub fn set(&self, bytes: u64) {
        self.0.bytes.store(bytes, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.bytes.load(Ordering::Relaxed)
    }

    /// Drops the entries of all pages that are set in `lost`: the destination may not hold them. The encoder must have ended.
    ///
    /// # Panics
    /// If it has not.
    pub fn forget(&self, lost: &DirtyBitmap) {
        let mut left_behind = self.left_behind();
        let coder = left_behind.as_mut().expect("the encoder has ended");
        lost.all_dirty_extents().for_each(|at| coder.forget(at, lost.peek(at)));
    }

    fn left_behind(&self) -> MutexGuard<'_, Option<PageCoder>> {
        self.0.left_behind.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The coder of an encoder: moved to its share when the encoder ends.
#[derive(Debug)]
struct Lent {
    coder: Option<PageCoder>,
    share: CacheShare,
}

impl Lent {
    fn new(coder: PageCoder, share: CacheShare) -> Self {
        Self { coder: Some(coder), share }
    }
}

impl Deref for Lent {
    type Target = PageCoder;

    fn deref(&self) -> &PageCoder {
        self.coder.as_ref().expect("it is here until it is dropped")
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut PageCoder {
        self.coder.as_mut().expect("it is here until it is dropped")
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        *self.share.left_behind() = self.coder.take();
    }
}

/// The stage: see the module.
#[derive(Debug)]
pub struct Encoder<F> {
    lane: u16,
    page_size: PageSize,
    framer: F,
    coder: Lent,
    pool: BufferPool,
    /// What was counted since the last RoundComplete.
    counted: PageTally,
    /// The bitmap of pages that were cached, if it was requested.
    cached: Option<Arc<DirtyBitmap>>,
    /// Where the hash of each page that is sent is recorded, if it was requested.
    page_hashes: Option<Arc<PageHashes>>,
    /// How each page of the batch in progress is encoded, and where its bytes lie.
    pages: Vec<(PageEncoding, Range<u32>)>,
    stage: Stage,
}

impl<F: Framer> Encoder<F> {
    /// The encoder of one lane, with the framer of its stream. A buffer of `pool`, which must not be the detector's, holds a whole extent. The meter counts
    /// batches, their pages, and the bytes of the frames made of them.
    #[must_use]
    pub fn new(
        lane: u16,
        page_size: PageSize,
        plan: EncoderPlan,
        framer: F,
        pool: BufferPool,
        meter: Arc<Meter>,
    ) -> Self {
        let share = CacheShare::new(plan.delta.map_or(0, |delta| delta.cache_bytes));
        Self {
            lane,
            page_size,
            framer,
            coder: Lent::new(PageCoder::new(page_size, &plan), share),
            pool,
            counted: PageTally::default(),
            cached: None,
            page_hashes: None,
            pages: Vec::new(),
            stage: Stage::new(StageId::encoder(lane), meter),
        }
    }

    /// Marks in `cached` each page that was cached: a delta can be made when it comes again, unless others have taken its place.
    /// Bits are only ever set. Zero pages are not cached: see [`Encoder::with_known_zero`].
    #[must_use]
    pub fn with_cached(mut self, cached: Arc<DirtyBitmap>) -> Self {
        self.cached = Some(cached);
        self
    }

    /// Records the hash of each page that is sent in `page_hashes`.
    #[must_use]
    pub fn with_page_hashes(mut self, page_hashes: Arc<PageHashes>) -> Self {
        self.page_hashes = Some(page_hashes);
        self
    }

    /// Sets the pages that the destination holds as zero, shared with the other lanes: their first writes become deltas, whatever
    /// the size of the cache. Without it, a page that was sent as zero misses. Where no deltas are planned it has no effect.
    #[must_use]
    pub fn with_known_zero(mut self, known_zero: Arc<KnownZero>) -> Self {
        self.coder.set_known_zero(known_zero);
        self
    }

    /// Sets the connection behind it, by which [`OnMiss::Auto`] decides. Without one, pages that miss are sent raw.
    #[must_use]
    pub fn with_wire(mut self, wire: Wire) -> Self {
        self.coder.set_wire(wire);
        self
    }

    /// Continues where the lane's encoder before it ended: with its cache, and with the encodings of the round that it was in. To be
    /// called before everything else that is set.
    ///
    /// # Panics
    /// If that encoder has not ended.
    #[must_use]
    pub fn with_cache_of(mut self, before: &CacheShare) -> Self {
        let coder = before.left_behind().take().expect("the encoder has ended");
        self.coder = Lent::new(coder, before.clone());
        self
    }

    /// The most bytes that its cache and its compressor take.
    #[must_use]
    pub fn bound_bytes(&self) -> u64 {
        self.coder.bound_bytes()
    }

    /// The handle to the size of its cache. Where no deltas are planned it has no effect.
    #[must_use]
    pub fn cache_share(&self) -> CacheShare {
        self.coder.share.clone()
    }

    /// Runs until the lane's end has passed, or there is no more input.
    ///
    /// # Errors
    /// When the next stage has ended.
    pub async fn run(mut self, input: Inlet<Item<CopiedBatch>>, output: Outlet<Outgoing>) -> Result<(), StageError> {
        let (input, output) = (input.metered(&self.stage.meter), output.metered(&self.stage.meter));
        while let Some(item) = input.next().await {
            let outgoing = match item {
                Item::Batch(copied) => self.batch(copied).await,
                Item::Mark(mark) => self.mark(mark),
            };
            let over = outgoing.mark == Some(Mark::LaneEnds);
            output.put(outgoing).await.map_err(|closed| self.stage.fails(closed))?;
            if over {
                break;
            }
        }
        Ok(())
    }

    /// The frame of a batch.
    async fn batch(&mut self, copied: CopiedBatch) -> Outgoing {
        let taken = copied.batch.mask.count_ones();
        let encoded = self.encode(copied).await;
        let Framed { head, payload } = self.framer.batch(self.lane, encoded);
        let bytes = (head.len() + payload.as_ref().map_or(0, |payload| payload.len())) as u64;
        self.counted.bytes_out += bytes;
        self.stage.meter.count(taken.into(), bytes);
        self.stage.meter.holds(self.coder.memory_bytes());
        Outgoing { lane: self.lane, head, payload, mark: None }
    }

    async fn encode(&mut self, copied: CopiedBatch) -> EncodedBatch {
        let CopiedBatch { batch, zero, pages } = copied;
        let cache_bytes = self.coder.share.get();
        self.coder.resize_cache(cache_bytes);
        self.pages = Vec::with_capacity((batch.mask & !zero).count_ones() as usize);
        self.coder.zeros(&batch, zero);
        let mut hashes = self.hash(&batch, zero, pages.as_deref().unwrap_or_default());
        let (unchanged, payload) = match pages {
            Some(pages) => {
                let own = self.stage.take_buffer(&self.pool).await;
                self.code(&batch, batch.mask & !zero, Payload::new(self.page_size.bytes(), pages, own))
            }
            None => (0, None),
        };
        if let Some(cached) = &self.cached {
            cached.set_mask(batch.at, self.coder.caches(batch.mask, zero));
        }
        let mut copied = bits(batch.mask & !zero);
        hashes.retain(|_| copied.next().is_some_and(|bit| unchanged >> bit & 1 == 0));
        let batch = Batch { mask: batch.mask & !unchanged, ..batch };
        EncodedBatch { batch, zero, pages: std::mem::take(&mut self.pages), payload, hashes }
    }

    /// The hash of each copied page, recorded; none if no hashes are requested. Untouched pages are not to be read again.
    fn hash(&self, batch: &Batch, zero: u64, pages: &[u8]) -> Vec<u64> {
        let Some(page_hashes) = &self.page_hashes else { return Vec::new() };
        let hashes: Vec<_> = pages.chunks_exact(self.page_size.bytes()).map(page_hash).collect();
        page_hashes.record(batch.at, batch.mask, zero, !batch.untouched, hashes.iter().copied());
        hashes
    }

    /// Codes the pages in the payload's buffer, and lists them. Returns those that are not sent.
    fn code(&mut self, batch: &Batch, present: u64, payload: Payload) -> (u64, Option<PooledBuffer>) {
        if self.coder.makes_deltas() {
            self.code_each(batch, present, payload)
        } else {
            (0, self.code_together(batch, present, payload))
        }
    }

    /// Every page is sent whole: compressed with others, or raw.
    fn code_together(&mut self, batch: &Batch, present: u64, mut payload: Payload) -> Option<PooledBuffer> {
        let (pages, _) = payload.rest();
        let mut looks = self.coder.pass_whole(bits(present).map(|bit| batch.at.page(bit)), pages, batch);
        let mut left = present.count_ones();
        while left > 0 {
            let (pages, room) = payload.rest();
            let (span, coded) = self.coder.code_whole(pages, looks, room);
            self.put(span, coded, &mut payload);
            looks = looks.behind(span.pages);
            left -= span.pages;
        }
        payload.finish()
    }

    /// Lists pages in order: where the pages that were tried shrank, the first carries the bytes of their group.
    fn put(&mut self, span: Span, mut coded: Option<usize>, payload: &mut Payload) {
        let compressed = if coded.is_some() { span.tried } else { 0 };
        let mut encoding = self.coder.codec();
        for page in 0..span.pages {
            if compressed >> page & 1 == 0 {
                payload.push_raw();
                self.list(PageEncoding::Raw, self.page_size.bytes());
            } else if let (Some(codec), Some(bytes)) = (encoding.take(), coded.take()) {
                payload.push_coded(bytes);
                self.list(codec, bytes);
            } else {
                payload.leave_out();
                self.list(PageEncoding::Grouped, 0);
            }
        }
        self.counted.compressed += u64::from(compressed.count_ones());
        self.counted.raw += u64::from(span.pages - compressed.count_ones());
    }

    fn code_each(&mut self, batch: &Batch, present: u64, mut payload: Payload) -> (u64, Option<PooledBuffer>) {
        let mut unchanged = 0;
        self.coder.next_batch();
        for bit in bits(present) {
            let (page, room) = payload.next_page();
            match self.coder.code(batch.at.page(bit), page, batch, room, &mut self.counted) {
                Coded::Unchanged => {
                    payload.leave_out();
                    unchanged |= 1 << bit;
                }
                Coded::Raw => {
                    payload.push_raw();
                    self.list(PageEncoding::Raw, self.page_size.bytes());
                }
                Coded::As(encoding, bytes) => {
                    payload.push_coded(bytes);
                    self.list(encoding, bytes);
                }
            }
        }
        (unchanged, payload.finish())
    }

    fn list(&mut self, encoding: PageEncoding, bytes: usize) {
        let start = self.pages.last().map_or(0, |(_, before)| before.end);
        let bytes = u32::try_from(bytes).expect("no more than a group");
        self.pages.push((encoding, start..start + bytes));
    }

    /// The round's figures are complete here, and the choice of encoding may change.
    fn round_complete(&mut self, mut tally: RoundTally) -> RoundTally {
        tally.pages += std::mem::take(&mut self.counted);
        debug_assert_eq!(
            tally.pages.zero + tally.pages.raw + tally.pages.compressed + tally.pages.xbzrle + tally.pages.unchanged,
            tally.pages.all,
            "the encodings add up: {tally:?}"
        );
        self.coder.round_complete();
        tally
    }

    fn mark(&mut self, mark: Mark) -> Outgoing {
        let mark = match mark {
            Mark::RoundComplete(tally) => Mark::RoundComplete(self.round_complete(tally)),
            Mark::DirectEnds => {
                self.coder.direct_ends();
                mark
            }
            Mark::Checkpoint(_) | Mark::LaneEnds => mark,
        };
        Outgoing { lane: self.lane, head: self.framer.mark(self.lane, &mark), payload: None, mark: Some(mark) }
    }
}

#[cfg(test)]
mod tests;
