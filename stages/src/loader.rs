//! Loader: decodes the pages of one lane and gives them to its page sink. No other task writes that part of guest memory
//! (ARCHITECTURE.md, law 4: a page keeps its lane).
//!
//! ```text
//! receiver ── Arrived, marks ──▶ ┌────────┐ ──▶ page sink: guest memory, received bitmap
//!                                │ loader │
//!                                └────────┘ ── marks ──▶ controller
//! ```
//!
//! It takes batches as a [deframer](crate::dialect::Deframer) has checked them, in the order they were sent, and promises (law 8: the peer is not trusted):
//! - Nothing of a frame is written before its payload's hash was compared, where the stream has hashes.
//! - A page is written only once it is decoded completely: a compressed page is decompressed into a buffer, with all of its
//!   group; a delta is checked to its last byte, and needs a received page to patch. Damage never leaves a wrong page; an error
//!   names the frame's offset and the page.
//! - Adjacent pages are written in one call, if they are raw, zero or of one group.
//! - What a page may replace is up to the [`PageSink`].
//!
//! Its meter counts pages and page bytes.

mod direct;
mod first_touch;
mod place;
pub(crate) mod sink;

pub use direct::Direct;
pub use place::{Hybrid, Place};
pub use sink::{PageSink, SinkError};

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::batch::{Arrived, Item, Mark, PageEncoding, PageFault, Piece};
use crate::decoder::Decoder;
use crate::error::{Cause, StageError};
use crate::geometry::{ExtentAt, run_mask, runs};
use crate::meter::Meter;
use crate::missing::PlaceError;
use crate::queue::{Inlet, Outlet};
use crate::stage::Stage;
use crate::stage_id::StageId;

/// The progress of a lane's loader, which the destination acknowledges. The loader writes it, any thread reads it.
#[derive(Debug, Default)]
pub struct LaneProgress {
    /// Pages frames that are loaded, in the order they were sent.
    pub frames: AtomicU64,
    /// Page bytes of these frames.
    pub bytes: AtomicU64,
}

/// A report of a loader: everything of the lane up to this mark is in the sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The lane.
    pub lane: u16,
    /// The mark, with the source's figures.
    pub mark: Mark,
}

/// The stage: see the module.
#[derive(Debug)]
pub struct Loader<S = Direct> {
    lane: u16,
    sink: S,
    progress: Arc<LaneProgress>,
    decoder: Decoder,
    /// The hashes of the raw pages of the batch in progress, if they are needed.
    raw_hashes: Vec<u64>,
    stage: Stage,
}

/// Why a frame cannot be loaded.
enum Fault {
    /// The peer's pages are damaged.
    Pages(PageFault),
    /// The sink does not take its pages.
    Sink(SinkError),
}

impl From<PageFault> for Fault {
    fn from(fault: PageFault) -> Self {
        Self::Pages(fault)
    }
}

impl From<SinkError> for Fault {
    fn from(error: SinkError) -> Self {
        Self::Sink(error)
    }
}

impl<S: PageSink> Loader<S> {
    /// The loader of one lane, into `sink`.
    #[must_use]
    pub fn new(lane: u16, sink: S, progress: Arc<LaneProgress>, meter: Arc<Meter>) -> Self {
        Self::of(StageId::loader(lane), lane, sink, progress, meter)
    }

    /// The loader of pages of all lanes that were asked for. They are in no lane's order, so the sink must place each page once.
    #[must_use]
    pub fn urgent(sink: S, meter: Arc<Meter>) -> Self {
        Self::of(StageId::URGENT_LOADER, 0, sink, Arc::default(), meter)
    }

    fn of(id: StageId, lane: u16, sink: S, progress: Arc<LaneProgress>, meter: Arc<Meter>) -> Self {
        let decoder = Decoder::new(sink.page_size());
        Self { lane, sink, progress, decoder, raw_hashes: Vec::new(), stage: Stage::new(id, meter) }
    }

    /// Runs until the lane's end, or until there is no more input.
    ///
    /// # Errors
    /// When a frame cannot be loaded, the sink fails, or the reports' receiver was dropped.
    pub async fn run(mut self, input: Inlet<Item<Arrived>>, output: Outlet<Loaded>) -> Result<(), StageError> {
        let (input, output) = (input.metered(&self.stage.meter), output.metered(&self.stage.meter));
        let lane = self.lane;
        while let Some(item) = input.next().await {
            let mark = match item {
                Item::Batch(arrived) => {
                    self.batch(&arrived)?;
                    continue;
                }
                Item::Mark(mark) => mark,
            };
            self.sink.mark(mark).map_err(|error| self.stage.fails(Cause::Sink(error)))?;
            output.put(Loaded { lane, mark }).await.map_err(|closed| self.stage.fails(closed))?;
            if mark == Mark::LaneEnds {
                break;
            }
        }
        Ok(())
    }

    /// Loads a frame and acknowledges it.
    fn batch(&mut self, arrived: &Arrived) -> Result<(), StageError> {
        self.load(arrived).map_err(|fault| self.stage.fails(cause(fault, arrived.offset)))?;
        let pages = u64::from(arrived.mask.count_ones());
        let bytes = pages * self.sink.page_size().bytes() as u64;
        self.stage.meter.count(pages, bytes);
        self.progress.bytes.fetch_add(bytes, Ordering::Release);
        self.progress.frames.fetch_add(1, Ordering::Release);
        Ok(())
    }

    fn load(&mut self, arrived: &Arrived) -> Result<(), Fault> {
        let payload = arrived.payload.as_deref().unwrap_or_default();
        arrived.check_payload(payload, &mut self.raw_hashes)?;
        if self.sink.wants_hashes() {
            arrived.hash_raw(payload, &mut self.raw_hashes);
        }
        self.sink.begin(arrived.at, arrived.zero, arrived.mask & !arrived.zero)?;
        let mut raw = 0;
        for piece in arrived.pieces(payload) {
            match piece.encoding {
                PageEncoding::Raw => {
                    let end = raw + piece.mask.count_ones() as usize;
                    let hashes = self.raw_hashes.get(raw..end).unwrap_or_default();
                    self.sink.write(arrived.at, piece.mask, piece.bytes, hashes)?;
                    raw = end;
                }
                PageEncoding::Xbzrle => self.patch(arrived.at, &piece)?,
                _ => self.unpack(arrived.at, &piece)?,
            }
        }
        Ok(())
    }

    /// Decompresses a group into a buffer, and writes its pages once all of them are complete.
    fn unpack(&mut self, at: ExtentAt, piece: &Piece<'_>) -> Result<(), Fault> {
        let page_bytes = self.sink.page_size().bytes();
        self.decoder.unpack(at, piece)?;
        let mut pages = self.decoder.group();
        for (first, count) in runs(piece.mask) {
            let (run, rest) = pages.split_at(count as usize * page_bytes);
            self.sink.write(at, run_mask(first, count), run, &[])?;
            pages = rest;
        }
        Ok(())
    }

    fn patch(&mut self, at: ExtentAt, piece: &Piece<'_>) -> Result<(), Fault> {
        let page = piece.page(at);
        let delta = self.decoder.delta(at, piece)?;
        Ok(self.sink.patch(page, &delta)?)
    }
}

fn cause(fault: Fault, offset: u64) -> Cause {
    let fault = match fault {
        Fault::Pages(fault) => fault,
        Fault::Sink(SinkError::NotReceived(page)) => PageFault::NotHeld { page },
        Fault::Sink(SinkError::Memory(at, error)) => return Cause::Memory { doing: "cannot write", at, error },
        Fault::Sink(SinkError::DirectEnded) => PageFault::DirectEnded,
        Fault::Sink(SinkError::Delta(page)) => PageFault::Delta { page },
        Fault::Sink(SinkError::Place(PlaceError::NotExpected(page))) => PageFault::NotExpected { page },
        Fault::Sink(error @ SinkError::Place(_)) => return Cause::Sink(error),
    };
    Cause::Pages { offset, fault }
}

#[cfg(test)]
pub(crate) mod recorder;
#[cfg(test)]
mod tests;
