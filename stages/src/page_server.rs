//! Page server: sends the pages that a destination asks for, past all queues and the bandwidth limit.
//!
//! ```text
//!  ═══ PageRequest ══▶ ┌─────────────┐ ◀── bitmap: the page's bit, taken (law 2)
//!                      │ page server │ ◀── guest memory: one copy (law 3)
//!  ◀══ Pages ═════════ └─────────────┘
//! ```
//!
//! It serves one request after the other, and promises:
//! - A page is sent if its bit is taken here (law 1). Of a page that somebody else took, and of one that never travels, nothing is
//!   sent: it is in a lane, or was sent.
//! - A request for a page that does not exist ends the stage with an error. Any other request costs a look at the bitmap at most,
//!   however often it comes.
//!
//! Its meter counts pages and the bytes of their frames.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use crate::batch::{Batch, EncodedBatch, PageEncoding};
use crate::bitmap::locate;
use crate::dialect::{Framed, Framer};
use crate::dirty_log::LogCall;
use crate::error::{Cause, StageError};
use crate::geometry::{LaneMap, Layout, PageAt};
use crate::memory::GuestMemory;
use crate::meter::{Meter, Wait};
use crate::pending::pending;
use crate::pool::BufferPool;
use crate::scanner::Background;
use crate::stage::Stage;
use crate::stage_id::StageId;
use crate::take::{UrgentPage, UrgentTaker};
use crate::wire::order::misplaced;
use crate::wire::reader::{FrameReader, Incoming, ReadError};
use crate::wire::{Kind, Message, WireError};

/// The stage: see the module.
#[derive(Debug)]
pub struct PageServer<F> {
    taker: UrgentTaker,
    memory: GuestMemory,
    lanes: LaneMap,
    framer: F,
    pool: BufferPool,
    background: Arc<Background>,
    /// The frame in progress: it is written in one call.
    frame: Vec<u8>,
    stage: Stage,
}

impl<F: Framer> PageServer<F> {
    /// The server of the taker's pages, which are framed as those of their lanes.
    #[must_use]
    pub fn new(taker: UrgentTaker, memory: GuestMemory, lanes: LaneMap, framer: F, meter: Arc<Meter>) -> Self {
        let pool = BufferPool::new(1, memory.page_size().bytes());
        let stage = Stage::new(StageId::PAGE_SERVER, meter);
        Self { taker, memory, lanes, framer, pool, background: Arc::default(), frame: Vec::new(), stage }
    }

    /// Reports to a scanner where pages are asked for.
    #[must_use]
    pub fn with_background(mut self, background: Arc<Background>) -> Self {
        self.background = background;
        self
    }

    /// Runs until the destination asks no more.
    ///
    /// # Errors
    /// When the transport fails, a request is invalid, memory cannot be read or a log not be re-armed.
    pub async fn run<R, W>(mut self, mut requests: FrameReader<R>, mut pages: W) -> Result<(), StageError>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        self.serve(&mut requests, &mut pages).await.map_err(|cause| self.stage.fails(cause))
    }

    async fn serve<R, W>(&mut self, requests: &mut FrameReader<R>, pages: &mut W) -> Result<(), Cause>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let meter = self.stage.meter.clone();
        while let Some(incoming) = pending(requests.next(), &meter, Wait::Input).await? {
            let page = requested(&incoming, self.memory.layout());
            let Some(page) = page.map_err(|error| ReadError::from(requests.fail(error)))? else { continue };
            self.background.asked_for(locate(page).0);
            if self.take(page).await? {
                pending(pages.write_all(&self.frame), &meter, Wait::Output).await.map_err(Cause::Transport)?;
                meter.count(1, self.frame.len() as u64);
            }
        }
        // Over TLS a connection that is only dropped is a lost one. That the end cannot be notified is an end too.
        drop(pending(pages.shutdown(), &meter, Wait::Output).await);
        Ok(())
    }

    /// Takes and frames a page. False if somebody else has it.
    async fn take(&mut self, page: PageAt) -> Result<bool, Cause> {
        let taken = self.taker.take(page).map_err(|error| Cause::Log { doing: LogCall::Rearm, error })?;
        let UrgentPage::Taken(batch) = taken else { return Ok(false) };
        let encoded = self.read(batch, page).await.map_err(|error| {
            let doing = "cannot read";
            Cause::Memory { doing, at: page, error }
        })?;
        let Framed { head, payload } = self.framer.batch(self.lanes.lane(batch.at), encoded);
        self.frame.clear();
        self.frame.extend_from_slice(&head);
        self.frame.extend_from_slice(payload.as_deref().unwrap_or_default());
        Ok(true)
    }

    async fn read(&self, batch: Batch, page: PageAt) -> io::Result<EncodedBatch> {
        let mut buffer = self.stage.take_buffer(&self.pool).await;
        let zero = if batch.untouched == 0 {
            let memory = &self.memory.block(page.block).memory;
            memory.read_extent(self.memory.page_size(), batch.at.first_page(), batch.mask, &mut buffer)?
        } else {
            batch.mask
        };
        let bytes = u32::try_from(self.memory.page_size().bytes()).expect("64 KiB at most");
        let raw = (zero == 0).then_some((PageEncoding::Raw, 0..bytes));
        let payload = raw.is_some().then_some(buffer);
        Ok(EncodedBatch { batch, zero, pages: raw.into_iter().collect(), payload, hashes: Vec::new() })
    }
}

/// The page that is asked for; `None` if the destination only shows that it is alive.
fn requested(incoming: &Incoming, layout: &Layout) -> Result<Option<PageAt>, WireError> {
    let page = match incoming {
        Incoming::Message { message: Message::PageRequest(page), .. } => *page,
        Incoming::Message { message: Message::Heartbeat(_), .. } => return Ok(None),
        Incoming::Message { message, .. } => return misplaced(message.kind(), "pages are asked for here"),
        Incoming::Pages(_) => return misplaced(Kind::Pages, "pages are asked for here"),
    };
    if page.block >= layout.block_count() {
        return Err(WireError::NoBlock { block: page.block, blocks: layout.block_count() });
    }
    if page.page >= layout.block_pages(page.block) {
        return Err(WireError::NoPage(page));
    }
    let (at, mask) = locate(page);
    debug_assert_eq!(mask & !layout.valid_mask(at), 0, "{page} is of its block");
    Ok(Some(page))
}

#[cfg(test)]
mod tests;
