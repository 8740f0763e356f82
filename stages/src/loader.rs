//! Loader: writes the pages of one lane into guest memory. No other task writes that part of it (ARCHITECTURE.md, law 4: a page
//! keeps its lane).
//!
//! ```text
//! receiver ── Arrived ──▶ ┌────────┐ ──▶ guest memory
//!                         │ loader │ ──▶ received bitmap
//!                         └────────┘ ── RoundComplete, Switchover ──▶ controller
//! ```
//!
//! It takes batches as a [deframer](crate::dialect::Deframer) has checked them, in the order they were sent, and promises (law 8: the peer is not trusted):
//! - Nothing of a frame is written before its payload's hash was compared, where the stream has hashes.
//! - A page is written only once it is decoded completely: a compressed page is decompressed into a buffer, with all of its
//!   group; a delta is checked to its last byte, and needs a received page to patch. Damage never leaves a wrong page; an error
//!   names the frame's offset and the page.
//! - A page's bit in the received bitmap is cleared before the page is written, and set once it is complete.
//! - A zero page of a fresh block that was never loaded is not touched: it is zero already. In any other block it is
//!   written, since its content is unknown. Adjacent pages are written in one call, if they are raw, zero or of one group.
//! - Memory is populated ahead of its first write (`first_touch`).
//!
//! Its meter counts pages and page bytes.

mod first_touch;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::batch::{Arrived, Item, PageEncoding, PageFault, Piece};
use crate::bitmap::DirtyBitmap;
use crate::decoder::Decoder;
use crate::error::{Cause, StageError};
use crate::geometry::{ExtentAt, PageAt, run_mask, runs};
use crate::memory::GuestMemory;
use crate::meter::Meter;
use crate::queue::{Inlet, Outlet};
use crate::stage::Stage;
use crate::stage_id::StageId;
use crate::tally::RoundTally;
use first_touch::FirstTouch;

/// The progress of a lane's loader, which the destination acknowledges. The loader writes it, any thread reads it.
#[derive(Debug, Default)]
pub struct LaneProgress {
    /// Pages frames that are loaded, in the order they were sent.
    pub frames: AtomicU64,
    /// Page bytes of these frames.
    pub bytes: AtomicU64,
}

/// A report of a loader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loaded {
    /// Everything of the lane up to the end of this round is in memory.
    RoundComplete {
        /// The lane.
        lane: u16,
        /// The source's figures of the round in the lane.
        tally: RoundTally,
    },
    /// Everything of the lane is in memory.
    Switchover {
        /// The lane.
        lane: u16,
    },
}

/// The stage: see the module.
#[derive(Debug)]
pub struct Loader {
    lane: u16,
    memory: GuestMemory,
    received: Arc<DirtyBitmap>,
    progress: Arc<LaneProgress>,
    first_touch: FirstTouch,
    decoder: Decoder,
    stage: Stage,
}

/// Why a frame cannot be loaded.
enum Fault {
    /// The peer's pages are damaged.
    Pages(PageFault),
    /// The memory failed.
    Memory(PageAt, io::Error),
}

impl From<PageFault> for Fault {
    fn from(fault: PageFault) -> Self {
        Self::Pages(fault)
    }
}

impl Loader {
    /// The loader of one lane. The bitmap `received` starts empty and is shared by all lanes.
    #[must_use]
    pub fn new(
        lane: u16,
        memory: GuestMemory,
        received: Arc<DirtyBitmap>,
        progress: Arc<LaneProgress>,
        meter: Arc<Meter>,
    ) -> Self {
        let decoder = Decoder::new(memory.page_size());
        let stage = Stage::new(StageId::loader(lane), meter);
        Self { lane, memory, received, progress, first_touch: FirstTouch::default(), decoder, stage }
    }

    /// Runs until the lane's Switchover, or until there is no more input.
    ///
    /// # Errors
    /// When a frame cannot be loaded, memory cannot be written, or the reports' receiver was dropped.
    pub async fn run(mut self, input: Inlet<Item<Arrived>>, output: Outlet<Loaded>) -> Result<(), StageError> {
        let (input, output) = (input.metered(&self.stage.meter), output.metered(&self.stage.meter));
        let lane = self.lane;
        while let Some(item) = input.next().await {
            let report = match item {
                Item::Batch(arrived) => {
                    self.batch(&arrived)?;
                    continue;
                }
                Item::RoundComplete(tally) => Loaded::RoundComplete { lane, tally },
                Item::Switchover => Loaded::Switchover { lane },
            };
            output.put(report).await.map_err(|closed| self.stage.fails(closed))?;
            if let Loaded::Switchover { .. } = report {
                break;
            }
        }
        Ok(())
    }

    /// Loads a frame and acknowledges it.
    fn batch(&mut self, arrived: &Arrived) -> Result<(), StageError> {
        self.load(arrived).map_err(|fault| self.stage.fails(cause(fault, arrived.offset)))?;
        let pages = u64::from(arrived.mask.count_ones());
        let bytes = pages * self.memory.page_size().bytes() as u64;
        self.stage.meter.count(pages, bytes);
        self.progress.bytes.fetch_add(bytes, Ordering::Release);
        self.progress.frames.fetch_add(1, Ordering::Release);
        Ok(())
    }

    fn load(&mut self, arrived: &Arrived) -> Result<(), Fault> {
        let payload = arrived.payload.as_deref().unwrap_or_default();
        arrived.check_payload(payload)?;
        self.clear(arrived.at, arrived.zero)?;
        self.first_touch.prepare(&self.memory, &self.received, arrived.at, arrived.mask & !arrived.zero);
        arrived.pieces(payload).try_for_each(|piece| self.place(arrived.at, &piece))
    }

    /// Makes pages zero. Pages of a fresh block that were not received were never written: a write that fails ends the loader.
    fn clear(&self, at: ExtentAt, zero: u64) -> Result<(), Fault> {
        let touched = if self.memory.block(at.block).fresh { self.received.peek(at) } else { u64::MAX };
        for (first, count) in runs(zero & touched) {
            let start = at.page(first);
            self.replace(at, run_mask(first, count), || {
                let pages = start.page..start.page + u64::from(count);
                self.memory.block(at.block).memory.write_zeros(self.memory.page_size(), pages)
            })?;
        }
        self.received.set_mask(at, zero & !touched);
        Ok(())
    }

    /// Decodes a piece and writes it.
    fn place(&mut self, at: ExtentAt, piece: &Piece<'_>) -> Result<(), Fault> {
        match piece.encoding {
            PageEncoding::Raw => self.write(at, piece.mask, piece.bytes),
            PageEncoding::Xbzrle => self.patch(at, piece),
            _ => self.unpack(at, piece),
        }
    }

    /// Decompresses a group into a buffer, and writes its pages once all of them are complete.
    fn unpack(&mut self, at: ExtentAt, piece: &Piece<'_>) -> Result<(), Fault> {
        self.decoder.unpack(at, piece)?;
        let mut pages = self.decoder.group();
        for (first, count) in runs(piece.mask) {
            let (run, rest) = pages.split_at(count as usize * self.memory.page_size().bytes());
            self.write(at, run_mask(first, count), run)?;
            pages = rest;
        }
        Ok(())
    }

    /// Writes adjacent whole pages.
    fn write(&self, at: ExtentAt, mask: u64, bytes: &[u8]) -> Result<(), Fault> {
        let first = at.page(mask.trailing_zeros()).page;
        self.replace(at, mask, || self.memory.block(at.block).memory.write_pages(self.memory.page_size(), first, bytes))
    }

    fn patch(&self, at: ExtentAt, piece: &Piece<'_>) -> Result<(), Fault> {
        let page = piece.page(at);
        let delta = self.decoder.delta(at, piece, self.received.is_set(page))?;
        self.replace(at, piece.mask, || {
            self.memory.block(at.block).memory.patch(self.memory.page_size(), page.page, &delta)
        })
    }

    /// Runs a write of pages, whose received bits are clear meanwhile.
    fn replace(&self, at: ExtentAt, mask: u64, write: impl FnOnce() -> io::Result<()>) -> Result<(), Fault> {
        let _before = self.received.take_mask(at, mask);
        write().map_err(|error| Fault::Memory(at.page(mask.trailing_zeros()), error))?;
        self.received.set_mask(at, mask);
        Ok(())
    }
}

fn cause(fault: Fault, offset: u64) -> Cause {
    match fault {
        Fault::Pages(fault) => Cause::Pages { offset, fault },
        Fault::Memory(at, error) => Cause::Memory { doing: "cannot write", at, error },
    }
}

#[cfg(test)]
pub(crate) mod recorder;
#[cfg(test)]
mod tests;
