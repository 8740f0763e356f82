//! Stage: encoder. Makes the frames of a lane.
//!
//! - **Takes** copied batches and the marks between them.
//! - **Gives** [`Outgoing`] frames, for each batch exactly one, whatever it comes to: the count of frames in a lane is what
//!   the destination acknowledges.
//! - **Owns** its lane's share of the XBZRLE cache, and the compressor.
//! - **Promises** law 5: the choice of encoding changes where the first RoundComplete passes, and only there. And law 6:
//!   once a page is sent, the cache holds of it what the destination holds, or nothing.
//!
//! ```text
//! pages ──▶ page_coder: which encoding? ──▶ payload: where do their bytes stand? ──▶ here: the frame
//!                │  ├─▶ reference: what does the destination hold?
//!                │  └─▶ misses: is it worth compressing what no delta helps?
//!                └─▶ whole_coder: compressed together ──▶ sampler: is it worth a try?
//! ```
//!
//! It takes buffers of a pool of its own while it holds one of the detector's (law 9). Where all pages of a batch go raw,
//! the detector's buffer is the payload and no byte is copied.

pub mod estimate;
pub mod misses;
mod page_coder;
mod payload;
mod reference;
mod sampler;
mod whole_coder;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use crate::batch::{Batch, CopiedBatch, Item};
use crate::bitmap::DirtyBitmap;
use crate::codec::Codec;
use crate::error::StageError;
use crate::geometry::{ExtentAt, PageSize, bits};
use crate::meter::Meter;
use crate::pool::{BufferPool, PooledBuffer};
use crate::queue::{Inlet, Outlet};
use crate::stage::Stage;
use crate::stage_id::StageId;
use crate::tally::RoundTally;
use crate::wire::pages::payload_hash;
use crate::wire::{Message, PageEncoding, PagesHead};
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
    /// Does each payload carry its xxh3-64?
    pub checksum: bool,
}

/// How deltas are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaPlan {
    /// Bytes of the cache: this lane's share.
    pub cache_bytes: u64,
    /// What is done with pages that miss the cache or whose delta is not smaller.
    pub on_miss: OnMiss,
    /// Do pages enter the cache in the first round already?
    pub cache_first_round: bool,
}

/// A frame for the sender, or as much of one as stands before its payload.
#[derive(Debug)]
pub struct Outgoing {
    /// The lane whose frame it is.
    pub lane: u16,
    /// The frame's head and its body up to the payload; a whole frame where there is no payload.
    pub head: Bytes,
    /// The payload.
    pub payload: Option<PooledBuffer>,
    /// What is reached when this frame is sent.
    pub mark: Option<Mark>,
}

/// What a frame stands for, for the sender to report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// All frames of the round stand before this one in the lane; the figures are complete.
    RoundComplete(RoundTally),
    /// The lane's last frame.
    Switchover,
}

/// How large an encoder's cache is to be: may be changed while it runs, and counts from its next batch on.
///
/// The cache itself is left here when the switchover has passed, and lives as long as the last of these: to give a large one back
/// takes milliseconds, for which the paused guest would wait.
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

    /// So many bytes from the next batch on.
    pub fn set(&self, bytes: u64) {
        self.0.bytes.store(bytes, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.bytes.load(Ordering::Relaxed)
    }

    fn leave(&self, coder: PageCoder) {
        *self.0.left_behind.lock().unwrap_or_else(PoisonError::into_inner) = Some(coder);
    }
}

/// The stage: see the module.
#[derive(Debug)]
pub struct Encoder {
    lane: u16,
    page_size: PageSize,
    checksum: bool,
    coder: PageCoder,
    cache_share: CacheShare,
    pool: BufferPool,
    /// What was counted since the last RoundComplete.
    counted: RoundTally,
    /// Of which pages a delta may be made when they come again, for whoever wants to know.
    kept: Option<Arc<DirtyBitmap>>,
    /// The head of the frame that is being made; its list of pages is used again and again.
    head: PagesHead,
    stage: Stage,
}

impl Encoder {
    /// The encoder of one lane. A buffer of `pool`, which is not the detector's, holds a whole extent. The meter counts
    /// batches, their pages, and the bytes of the Pages frames made of them.
    #[must_use]
    pub fn new(lane: u16, page_size: PageSize, plan: EncoderPlan, pool: BufferPool, meter: Arc<Meter>) -> Self {
        let at = ExtentAt { block: 0, extent: 0 };
        Self {
            lane,
            page_size,
            checksum: plan.checksum,
            coder: PageCoder::new(page_size, &plan),
            cache_share: CacheShare::new(plan.delta.map_or(0, |delta| delta.cache_bytes)),
            pool,
            counted: RoundTally::default(),
            kept: None,
            head: PagesHead { at, round: 0, mask: 0, zero: 0, payload_hash: 0, pages: Vec::with_capacity(64) },
            stage: Stage::new(StageId::encoder(lane), meter),
        }
    }

    /// Marks in `kept` each page whose content the cache was given: a delta can be made when it comes again, unless others have
    /// taken its place. Bits are only ever set.
    #[must_use]
    pub fn with_kept(mut self, kept: Arc<DirtyBitmap>) -> Self {
        self.kept = Some(kept);
        self
    }

    /// The connection behind it, by which [`OnMiss::Auto`] decides. Without one nothing is known to wait for the wire, and pages go raw.
    #[must_use]
    pub fn with_wire(mut self, wire: Wire) -> Self {
        self.coder.set_wire(wire);
        self
    }

    /// The most bytes that its cache and its compressor take.
    #[must_use]
    pub fn bound_bytes(&self) -> u64 {
        self.coder.bound_bytes()
    }

    /// How large its cache is to be, to be kept by whoever may change it. Where no deltas are planned it changes nothing.
    #[must_use]
    pub fn cache_share(&self) -> CacheShare {
        self.cache_share.clone()
    }

    /// Runs until the switchover has passed, or there is no more input.
    ///
    /// # Errors
    /// When the next stage has ended.
    pub async fn run(mut self, input: Inlet<Item<CopiedBatch>>, output: Outlet<Outgoing>) -> Result<(), StageError> {
        let (input, output) = (input.metered(&self.stage.meter), output.metered(&self.stage.meter));
        while let Some(item) = input.next().await {
            let outgoing = match item {
                Item::Batch(copied) => self.encode(copied).await,
                Item::RoundComplete(tally) => self.round_complete(tally),
                Item::Switchover => self.mark(&Message::Switchover, Mark::Switchover),
            };
            let over = outgoing.mark == Some(Mark::Switchover);
            output.put(outgoing).await.map_err(|closed| self.stage.fails(closed))?;
            if over {
                self.cache_share.leave(self.coder);
                break;
            }
        }
        Ok(())
    }

    /// The frame of a batch.
    async fn encode(&mut self, copied: CopiedBatch) -> Outgoing {
        let CopiedBatch { batch, zero, pages } = copied;
        self.coder.resize_cache(self.cache_share.get());
        self.head.pages.clear();
        for bit in bits(zero) {
            self.coder.zero(batch.at.page(bit), &batch);
        }
        let (unchanged, payload) = match pages {
            Some(pages) => {
                let own = self.stage.take_buffer(&self.pool).await;
                self.code(&batch, batch.mask & !zero, Payload::new(self.page_size.bytes(), pages, own))
            }
            None => (0, None),
        };
        if let Some(kept) = &self.kept {
            kept.set_mask(batch.at, self.coder.keeps(batch.mask, zero));
        }
        self.head.at = batch.at;
        self.head.round = batch.round;
        self.head.mask = batch.mask & !unchanged;
        self.head.zero = zero;
        self.frame(payload, &batch)
    }

    /// Codes the pages that stand in the payload's buffer, and lists them in the head. Returns those that are not sent.
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

    /// Puts pages in their order: where those that were tried shrank, the first stands for their group.
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
        self.head.pages.push((encoding, u32::try_from(bytes).expect("no more than a group")));
    }

    fn frame(&mut self, payload: Option<PooledBuffer>, batch: &Batch) -> Outgoing {
        self.head.payload_hash = match &payload {
            Some(payload) if self.checksum => payload_hash(payload),
            _ => 0,
        };
        let head = self.head.to_bytes(self.lane);
        let bytes = (head.len() + payload.as_ref().map_or(0, |payload| payload.len())) as u64;
        self.counted.bytes_out += bytes;
        self.stage.meter.count(u64::from(batch.mask.count_ones()), bytes);
        self.stage.meter.holds(self.coder.memory_bytes());
        Outgoing { lane: self.lane, head, payload, mark: None }
    }

    /// The round's figures are complete here, and the choice of encoding may change.
    fn round_complete(&mut self, mut tally: RoundTally) -> Outgoing {
        tally += RoundTally { round: tally.round, ..std::mem::take(&mut self.counted) };
        debug_assert_eq!(
            tally.zero + tally.raw + tally.compressed + tally.xbzrle + tally.unchanged,
            tally.pages,
            "the encodings add up: {tally:?}"
        );
        self.coder.round_complete();
        self.mark(&Message::RoundComplete(tally), Mark::RoundComplete(tally))
    }

    fn mark(&self, message: &Message, mark: Mark) -> Outgoing {
        Outgoing { lane: self.lane, head: message.encode(self.lane), payload: None, mark: Some(mark) }
    }
}

#[cfg(test)]
mod tests;
